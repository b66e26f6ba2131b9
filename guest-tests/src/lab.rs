//! What every guest test and the demo start from: the repository, the built binary, the image, the accelerator.
//!
//! Invariants: only one lab exists on a machine at a time (its lock); opening one sweeps what dead runs left.

#![forbid(unsafe_code)]

use crate::accel::Accel;
use crate::image::{Image, Release};
use crate::process::{output, run};
use crate::scratch::{GuestLock, Scratch, sweep};
use crate::{Result, progress};
use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// NQN of the subsystem that the tests' targets offer.
pub const NQN: &str = "nqn.2026-11.io.hawser:guest";
/// NQN of the tests' host.
pub const HOST_NQN: &str = "nqn.2014-08.org.nvmexpress:uuid:5c3f0f3a-6a1e-4c58-9d0e-1f2b3c4d5e6f";
/// Host identifier of the tests' host.
pub const HOST_ID: &str = "5c3f0f3a-6a1e-4c58-9d0e-1f2b3c4d5e6f";

/// The repository's folder.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_path_buf).unwrap_or_default()
}

/// cargo's target folder.
pub fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| repository().join("target"), |dir| repository().join(dir))
}

/// The cargo that runs us, or the one on PATH.
pub fn cargo() -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")));
    cargo.current_dir(repository());
    cargo
}

/// The environment of a run.
pub struct Lab {
    /// The binary under test.
    pub hawser: PathBuf,
    /// Guest images, with the kernel that was last asked for.
    pub image: Image,
    /// How guests run.
    pub accel: Accel,
    cache: PathBuf,
    _lock: GuestLock,
}

impl Lab {
    /// Builds the binary and the image, probes the accelerator, takes the machine's guest lock.
    pub fn open() -> Result<Lab> {
        match sweep() {
            0 => {}
            count => progress(&format!("{count} temporary folders of runs that died were removed")),
        }
        progress("build: hawser");
        run(cargo().args(["build", "--package", "hawser"]))?;
        let cache = target().join("guest");
        let lock = GuestLock::take()?;
        let image = Image::ensure(&cache, Release::of_machine())?;
        progress(&format!("guest image: {} with {}", image.disk.display(), image.kernel_package));
        let accel = Accel::probe(&cache, &image)?;
        Ok(Lab { hawser: target().join("debug/hawser"), image, accel, cache, _lock: lock })
    }

    /// From now on guests run the kernel of `release`.
    pub fn use_kernel(&mut self, release: Release) -> Result<()> {
        if self.image.release != release {
            self.image = Image::ensure(&self.cache, release)?;
        }
        Ok(())
    }

    /// A file of `qemu-configs/`.
    pub fn config(&self, name: &str) -> PathBuf {
        repository().join("qemu-configs").join(name)
    }

    /// A binary that differs from ours in its build ID only, as an upgrade's does.
    pub fn newer_binary(&self, scratch: &Scratch) -> Result<PathBuf> {
        const NOTE: &str = ".note.gnu.build-id";
        let (note, newer) = (scratch.file("build-id"), scratch.file("hawser-newer"));
        let mut dump = Command::new("objcopy");
        dump.arg("-O").arg("binary").args(["--only-section", NOTE]).arg(&self.hawser).arg(&note);
        output(&mut dump)?;
        let mut bytes = std::fs::read(&note).map_err(|e| format!("{NOTE}: {e}"))?;
        // Elf64_Nhdr (12 bytes), "GNU\0", then the 20 bytes of the ID.
        let last = bytes.last_mut().ok_or_else(|| format!("{} has no {NOTE}", self.hawser.display()))?;
        *last ^= 0xff;
        std::fs::write(&note, bytes).map_err(|e| format!("{NOTE}: {e}"))?;
        let update = format!("{NOTE}={}", note.display());
        output(Command::new("objcopy").args(["--update-section", &update]).arg(&self.hawser).arg(&newer))?;
        Ok(newer)
    }
}
