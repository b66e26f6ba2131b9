//! Guest images, built from Debian packages without root rights and without loop mounts.
//!
//! Owns: the recipe, the cache under `<target>/guest/<key>` and the names of the files in it.
//! Must not know: how the guests are run.
//! Invariants: a folder of the cache is complete (it appears by a rename) and its key changes with the recipe, the guest's
//! scripts and the version of every package that goes into it.

#![forbid(unsafe_code)]

mod disk;
mod kernel;
mod release;
mod tree;

use crate::process::output;
use crate::{Result, progress};
use release::Apt;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

pub use disk::{DISK_BYTES, ROOT_BYTES, ROOT_START, SCRATCH_PARTITION};
pub use release::Release;

/// Changes with every change of the recipe that the scripts and package versions do not show.
const RECIPE: u32 = 7;

/// Packages whose installed files go into an image; the kernel is only downloaded.
const PACKAGES: [&str; 11] = [
    "busybox-static",
    "e2fsprogs",
    "fio",
    "grub-common",
    "grub-pc-bin",
    "ibverbs-providers",
    "iproute2",
    "librdmacm1",
    "mtools",
    "nvme-cli",
    "systemd-boot-efi",
];

const SCRIPTS: [&str; 3] = [tree::INITRAMFS_INIT, tree::INIT, tree::AGENT];

/// The files of one built image.
#[derive(Debug, Clone)]
pub struct Image {
    /// Whose kernel it has.
    pub release: Release,
    /// Name and version of the kernel package.
    pub kernel_package: String,
    /// The kernel's version as far as people name it: `6.1`.
    pub kernel_version: String,
    /// The kernel for `-kernel`: an ELF with a PVH entry where it can be had, else the bzImage.
    pub kernel: PathBuf,
    /// Initial RAM disk: modules for the root disk.
    pub initrd: PathBuf,
    /// ext4 without partition table, label `hawser-tools`: the root of directly booted guests, attached read-only.
    pub tools: PathBuf,
    /// The bootable disk: SeaBIOS (GRUB) and UEFI (systemd-boot), root label `hawser-root`, an empty scratch partition.
    pub disk: PathBuf,
}

fn package_versions() -> Result<String> {
    let mut query = Command::new("dpkg-query");
    query.args(["-W", "-f", "${Package} ${Version}\\n"]).args(PACKAGES);
    output(&mut query)
}

impl Image {
    /// The image with the release's kernel, for this machine's package versions: built if the cache under `cache` has none.
    pub fn ensure(cache: &Path, release: Release) -> Result<Image> {
        let apt = Apt::of(release, cache)?;
        let kernel = kernel::Package::candidate(&apt)?;
        let mut hasher = DefaultHasher::new();
        (RECIPE, SCRIPTS, package_versions()?, &kernel.name, &kernel.version).hash(&mut hasher);
        let prefix = format!("image-{}-", release.codename());
        let folder = cache.join(format!("{prefix}{:016x}", hasher.finish()));
        if !folder.join("disk.raw").exists() {
            fs::create_dir_all(cache).map_err(|e| format!("{}: {e}", cache.display()))?;
            let work = cache.join(format!("build-{}", std::process::id()));
            let packages = cache.join("packages").join(release.codename());
            let built = build(&kernel, &apt, &packages, &work);
            let moved = built
                .and_then(|()| fs::rename(&work, &folder).map_err(|e| format!("{}: {e}", folder.display())));
            if moved.is_err() {
                let _ = fs::remove_dir_all(&work);
            }
            moved?;
            forget_others(cache, &prefix, &folder);
        }
        let elf = folder.join("vmlinux");
        Ok(Image {
            release,
            kernel_package: format!("{} {}", kernel.name, kernel.version),
            kernel_version: kernel.version.split('.').take(2).collect::<Vec<_>>().join("."),
            kernel: if elf.exists() { elf } else { folder.join("vmlinuz") },
            initrd: folder.join("initrd.img"),
            tools: folder.join("tools.ext4"),
            disk: folder.join("disk.raw"),
        })
    }
}

/// A read-only file system for a guest, of programs of this machine with what the dynamic loader loads for them, all in its root and
/// without debugging information.
pub fn of_programs(programs: &[PathBuf], work: &Path, image: &Path) -> Result<()> {
    tree::programs(programs, work)?;
    disk::ext4(work, "hawser-programs", PROGRAMS_BYTES, image)?;
    fs::remove_dir_all(work).map_err(|e| format!("{}: {e}", work.display()))
}

/// Room for programs.
const PROGRAMS_BYTES: u64 = 64 << 20;

/// One image of a release is enough: those of other package versions are removed, and what a killed build left.
fn forget_others(cache: &Path, prefix: &str, keep: &Path) {
    for entry in fs::read_dir(cache).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.path() != keep && (name.starts_with(prefix) || name.starts_with("build-")) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn build(kernel: &kernel::Package, apt: &Apt, packages: &Path, work: &Path) -> Result<()> {
    let make = |path: &Path| fs::create_dir_all(path).map_err(|e| format!("{}: {e}", path.display()));
    let unpacked = work.join("kernel");
    make(&unpacked)?;
    progress(&format!("guest image: kernel {} {}", kernel.name, kernel.version));
    let modules = kernel.unpack(apt, packages, &unpacked, work)?;

    progress("guest image: initial RAM disk and root tree");
    tree::initramfs(&modules, &work.join("initramfs"), &work.join("initrd.img"))?;
    let root = work.join("root");
    tree::root(&modules, &root)?;

    progress("guest image: bootable disk");
    disk::ext4(&root, "hawser-tools", disk::ROOT_BYTES, &work.join("tools.ext4"))?;
    disk::bootable(&root, work)?;
    for folder in ["kernel", "initramfs", "root"] {
        let path = work.join(folder);
        fs::remove_dir_all(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    Ok(())
}
