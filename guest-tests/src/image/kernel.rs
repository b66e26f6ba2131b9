//! The guest's kernel: Debian's package, downloaded and unpacked but not installed.
//!
//! Owns: which package that is, its download, `vmlinuz`, the ELF inside it, and what each module depends on.

#![forbid(unsafe_code)]

use super::release::Apt;
use crate::Result;
use crate::process::output;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Debian's kernel with all drivers (the cloud flavour lacks some that the targets need).
const META_PACKAGE: &str = "linux-image-amd64";

/// A kernel package that apt can download.
pub(super) struct Package {
    pub(super) name: String,
    pub(super) version: String,
}

impl Package {
    /// What Debian's meta package depends on today.
    pub(super) fn candidate(apt: &Apt) -> Result<Self> {
        let depends = output(apt.command("apt-cache").args(["depends", META_PACKAGE]))?;
        let name = depends
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .find(|name| name.starts_with("linux-image-"))
            .ok_or_else(|| format!("apt knows no kernel behind {META_PACKAGE}: run apt-get update"))?
            .to_owned();
        let policy = output(apt.command("apt-cache").args(["policy", &name]))?;
        let version = policy
            .lines()
            .find_map(|line| line.trim().strip_prefix("Candidate: "))
            .filter(|version| *version != "(none)")
            .ok_or_else(|| format!("apt has no candidate for {name}: run apt-get update"))?
            .to_owned();
        Ok(Self { name, version })
    }

    /// The package's file in `folder`, which has at most one.
    fn download(&self, apt: &Apt, folder: &Path) -> Result<PathBuf> {
        fs::create_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        let find = || {
            let entries = fs::read_dir(folder).into_iter().flatten().flatten();
            // apt writes an epoch's colon as %3a.
            let start = format!("{}_{}_", self.name, self.version.replace(':', "%3a"));
            entries.map(|e| e.path()).find(|p| {
                let name = p.file_name().unwrap_or_default().to_string_lossy();
                name.starts_with(&start) && name.ends_with(".deb")
            })
        };
        if let Some(deb) = find() {
            return Ok(deb);
        }
        for old in fs::read_dir(folder).into_iter().flatten().flatten() {
            let _ = fs::remove_file(old.path());
        }
        output(apt.command("apt-get").current_dir(folder).args([
            "download",
            "-q",
            &format!("{}={}", self.name, self.version),
        ]))?;
        find().ok_or_else(|| format!("apt-get download left no {} in {}", self.name, folder.display()))
    }

    /// Unpacks into `unpacked`, and leaves `vmlinuz` and perhaps `vmlinux` in `boot`; `packages` keeps the download.
    pub(super) fn unpack(&self, apt: &Apt, packages: &Path, unpacked: &Path, boot: &Path) -> Result<Modules> {
        let deb = self.download(apt, packages)?;
        output(Command::new("dpkg").arg("-x").arg(&deb).arg(unpacked))?;
        let release = self.name.trim_start_matches("linux-image-").to_owned();
        let packed = unpacked.join("boot").join(format!("vmlinuz-{release}"));
        let image = fs::read(&packed).map_err(|e| format!("{}: {e}", packed.display()))?;
        fs::write(boot.join("vmlinuz"), &image).map_err(|e| format!("vmlinuz: {e}"))?;
        if let Some((program, stream)) = compressed_elf(&image) {
            let compressed = boot.join("vmlinux.packed");
            fs::write(&compressed, stream).map_err(|e| format!("{}: {e}", compressed.display()))?;
            shell(&format!("{program} < vmlinux.packed > vmlinux && rm vmlinux.packed"), boot)?;
        }
        // Debian 13 ships modules under /usr/lib and may compress them; our tools want neither.
        if unpacked.join("usr/lib/modules").exists() {
            fs::create_dir_all(unpacked.join("lib")).map_err(|e| format!("lib: {e}"))?;
            fs::rename(unpacked.join("usr/lib/modules"), unpacked.join("lib/modules"))
                .map_err(|e| format!("usr/lib/modules: {e}"))?;
        }
        Ok(Modules { base: unpacked.to_path_buf(), release }).and_then(Modules::index)
    }
}

pub(super) fn shell(script: &str, folder: &Path) -> Result<String> {
    output(Command::new("sh").current_dir(folder).args(["-ec", script]))
}

/// The compressed ELF in a bzImage, and what unpacks it: Linux x86 boot protocol, `setup_sects` at 0x1f1,
/// `payload_offset` and `payload_length` at 0x248 and 0x24c, counted from the start of the protected-mode code. The
/// payload's last four bytes are its unpacked size and not part of the stream.
fn compressed_elf(image: &[u8]) -> Option<(&'static str, &[u8])> {
    let word = |at: usize| Some(u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?) as usize);
    let setup_sects = usize::from(*image.get(0x1f1)?);
    let from = (setup_sects + 1) * 512 + word(0x248)?;
    let stream = image.get(from..from.checked_add(word(0x24c)?.checked_sub(4)?)?)?;
    match stream {
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Some(("xz -dc", stream)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(("zstd -dc", stream)),
        _ => None,
    }
}

/// The modules of an unpacked kernel.
pub(super) struct Modules {
    base: PathBuf,
    release: String,
}

impl Modules {
    fn index(self) -> Result<Self> {
        output(Command::new("/sbin/depmod").arg("-b").arg(&self.base).arg(&self.release))?;
        Ok(self)
    }

    /// The kernel's release: the folder below `lib/modules`.
    pub(super) fn release(&self) -> &str {
        &self.release
    }

    /// Files to load for `names`, dependencies first, each once. A name that this kernel has built in, or does not know
    /// (the CRC modules come and go between versions), adds nothing.
    pub(super) fn closure(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        let mut files: Vec<PathBuf> = Vec::new();
        for name in names {
            let mut modprobe = Command::new("/sbin/modprobe");
            modprobe.arg("-d").arg(&self.base).args(["-S", &self.release, "--show-depends", name]);
            let Ok(lines) = output(&mut modprobe) else { continue };
            for line in lines.lines() {
                let Some(file) = line.trim().strip_prefix("insmod ") else { continue };
                let file = PathBuf::from(file.split(' ').next().unwrap_or_default());
                if !files.contains(&file) {
                    files.push(file);
                }
            }
        }
        Ok(files)
    }

    /// The path of a module file below the kernel's folder.
    pub(super) fn relative<'a>(&self, file: &'a Path) -> Result<&'a Path> {
        file.strip_prefix(&self.base)
            .or_else(|_| file.strip_prefix("/"))
            .map_err(|_| format!("{}: not below {}", file.display(), self.base.display()))
    }
}

/// Copies a module, uncompressed: busybox's insmod takes plain files only.
pub(super) fn copy_module(from: &Path, folder: &Path) -> Result<String> {
    let name = from.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let (plain, unpack) = match name.rsplit_once('.') {
        Some((plain, "xz")) => (plain.to_owned(), Some("xz -dc")),
        Some((plain, "zst")) => (plain.to_owned(), Some("zstd -dc")),
        _ => (name, None),
    };
    fs::create_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let to = folder.join(&plain);
    match unpack {
        Some(program) => {
            shell(&format!("{program} '{}' > '{}'", from.display(), to.display()), folder)?;
        }
        None => {
            fs::copy(from, &to).map_err(|e| format!("{}: {e}", from.display()))?;
        }
    }
    Ok(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payload_of_a_made_up_bzimage_is_found_and_lies_are_not_followed() {
        let mut image = vec![0u8; 2048];
        image[0x1f1] = 1; // Two sectors of set-up code, then 100 bytes of loader.
        image[0x248..0x24c].copy_from_slice(&100u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&14u32.to_le_bytes());
        image[1124..1130].copy_from_slice(b"\xfd7zXZ\0");
        assert_eq!(
            compressed_elf(&image).map(|(program, stream)| (program, stream.len())),
            Some(("xz -dc", 10))
        );
        image[1124..1128].copy_from_slice(b"\x28\xb5\x2f\xfd");
        assert_eq!(compressed_elf(&image).map(|(program, _)| program), Some("zstd -dc"));
        for lie in [3, u32::MAX] {
            image[0x24c..0x250].copy_from_slice(&lie.to_le_bytes());
            assert_eq!(compressed_elf(&image), None);
        }
        assert_eq!(compressed_elf(&image[..0x24d]), None);
    }
}
