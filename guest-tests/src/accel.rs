//! Which accelerator QEMU gets.
//!
//! `/dev/kvm` may exist, run firmware and a boot sector, and still hang every Linux (nested hosts do). So a tiny guest,
//! our kernel without a disk, is started once per boot of this machine, with a deadline.

#![forbid(unsafe_code)]

use crate::image::Image;
use crate::process::{Deadline, Process};
use crate::scratch::Scratch;
use crate::{Result, progress};
use std::fs;
use std::path::Path;
use std::process::Command;

/// QEMU's program.
pub const QEMU: &str = "qemu-system-x86_64";

/// How long a KVM guest may take from power-on to its first program: it needs under a second.
const PROBE_SECONDS: u64 = 12;

/// An accelerator that was seen to work, or the one that always does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// Hardware virtualisation.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

impl std::fmt::Display for Accel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Accel::Kvm => "KVM",
            Accel::Tcg => "TCG",
        })
    }
}

impl Accel {
    /// QEMU's `-accel` value.
    pub fn argument(self) -> &'static str {
        match self {
            Accel::Kvm => "kvm",
            Accel::Tcg => "tcg,thread=multi",
        }
    }

    /// Deadlines are written for KVM; without it a guest is about this much slower.
    pub fn patience(self) -> u64 {
        match self {
            Accel::Kvm => 1,
            Accel::Tcg => 3,
        }
    }

    /// Chooses, says so, and remembers the choice under `cache` until this machine boots again.
    pub fn probe(cache: &Path, image: &Image) -> Result<Accel> {
        if fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
            progress("accelerator: TCG (no usable /dev/kvm)");
            return Ok(Accel::Tcg);
        }
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let note = cache.join("accelerator");
        let (accel, how) = match fs::read_to_string(&note) {
            Ok(text) if text == format!("{boot}kvm") => (Accel::Kvm, "probed before"),
            Ok(text) if text == format!("{boot}tcg") => (Accel::Tcg, "KVM was probed before and hangs"),
            _ => {
                progress("accelerator: does Linux start under KVM here?");
                let accel = if linux_starts_under_kvm(image)? { Accel::Kvm } else { Accel::Tcg };
                let word = if accel == Accel::Kvm { "kvm" } else { "tcg" };
                // Without the note the next run probes again: nothing is lost.
                let _ = fs::write(&note, format!("{boot}{word}"));
                (
                    accel,
                    if accel == Accel::Kvm {
                        "Linux starts under it"
                    } else {
                        "/dev/kvm is there, but Linux does not start under it"
                    },
                )
            }
        };
        progress(&format!("accelerator: {accel} ({how})"));
        Ok(accel)
    }
}

fn linux_starts_under_kvm(image: &Image) -> Result<bool> {
    let scratch = Scratch::new()?;
    let console = scratch.file("console");
    let mut qemu = Command::new(QEMU);
    qemu.args(["-accel", "kvm", "-M", "q35", "-m", "256M", "-nodefaults", "-display", "none", "-no-reboot"])
        .arg("-kernel")
        .arg(&image.kernel)
        .arg("-initrd")
        .arg(&image.initrd)
        .args(["-append", "console=ttyS0 hawser.probe", "-serial"])
        .arg(format!("file:{}", console.display()));
    let mut process = Process::start(qemu, &scratch.file("qemu.log"))?;
    let deadline = Deadline::new(PROBE_SECONDS, "the probe");
    loop {
        let text = fs::read(&console).unwrap_or_default();
        if String::from_utf8_lossy(&text).contains("HAWSER-PROBE-OK") {
            return Ok(true);
        }
        // QEMU that ends by itself has refused KVM or the guest has died: both mean no.
        if process.poll()?.is_some() {
            return Ok(false);
        }
        if let Err(error) = deadline.nap() {
            return if error == "interrupted" { Err(error) } else { Ok(false) };
        }
    }
}
