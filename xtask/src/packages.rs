//! Which Debian packages a command needs, and how they come onto the machine.
//!
//! Owns: the lists, the check, the question, the installation. Nothing else in the repository calls apt-get install.

use guest_tests::process::{output, run};
use guest_tests::{Result, progress};
use std::io::{BufRead, IsTerminal, Write};
use std::process::Command;

/// A Debian package and what it is for.
pub(crate) type Need = (&'static str, &'static str);

/// To build guest images and to run VMs.
pub(crate) const GUESTS: [Need; 25] = [
    ("qemu-system-x86", "runs the VMs"),
    ("qemu-utils", "reads qcow2 images"),
    ("seabios", "PC firmware"),
    ("ovmf", "UEFI firmware"),
    ("busybox-static", "the guest's programs"),
    ("fio", "the guest's load"),
    ("nvme-cli", "asks our target what people ask"),
    ("iproute2", "makes the guest's RDMA device"),
    ("ibverbs-providers", "the guest's RDMA device, for programs"),
    ("librdmacm1", "the guest's RDMA connections, for programs"),
    ("libibverbs-dev", "to build the verbs driver"),
    ("librdmacm-dev", "to build the verbs driver"),
    ("pkg-config", "finds them"),
    ("libclang-dev", "reads their declarations"),
    ("kmod", "finds the guest's kernel modules"),
    ("cpio", "packs the guest's initial RAM disk"),
    ("xz-utils", "unpacks the guest's kernel"),
    ("zstd", "unpacks the guest's other kernel"),
    ("debian-archive-keyring", "verifies the other Debian's kernel"),
    ("e2fsprogs", "makes the guest's root file system"),
    ("dosfstools", "makes the guest's EFI partition"),
    ("mtools", "fills the guest's EFI partition"),
    ("grub-common", "makes the guest's BIOS boot loader"),
    ("grub-pc-bin", "the guest's BIOS boot loader"),
    ("systemd-boot-efi", "the guest's UEFI boot loader"),
];

/// To make a minimal Debian.
pub(crate) const FRESH: [Need; 2] =
    [("mmdebstrap", "makes the minimal Debian"), ("debian-archive-keyring", "verifies its packages")];

/// To build cargo-fuzz's targets (libFuzzer is C++), and the verbs driver.
pub(crate) const CI: [Need; 5] = [
    ("g++", "compiles libFuzzer"),
    ("libibverbs-dev", "to build the verbs driver"),
    ("librdmacm-dev", "to build the verbs driver"),
    ("pkg-config", "finds them"),
    ("libclang-dev", "reads their declarations"),
];

/// The kernel is downloaded, not installed: apt only has to know it.
const KERNEL: &str = "linux-image-amd64";

fn installed(package: &str) -> bool {
    let mut query = Command::new("dpkg-query");
    query.args(["-W", "-f", "${db:Status-Status}", package]);
    output(&mut query).is_ok_and(|status| status == "installed")
}

fn apt_knows(package: &str) -> bool {
    output(Command::new("apt-cache").args(["policy", package]))
        .is_ok_and(|policy| policy.contains("Candidate: ") && !policy.contains("Candidate: (none)"))
}

fn missing(needs: &[Need]) -> Vec<Need> {
    needs.iter().filter(|(package, _)| !installed(package)).copied().collect()
}

/// Makes sure that everything in `needs` is installed; says what is not, and asks unless `yes`.
pub(crate) fn ensure(needs: &[Need], yes: bool) -> Result<()> {
    if output(Command::new("dpkg-query").arg("--version")).is_err() {
        return Err("this needs Debian 12 or 13: there is no dpkg here".into());
    }
    // Installing one package may remove another: QEMU takes a qemu-utils of another version along. Hence twice.
    for _ in 0..2 {
        let lacking = missing(needs);
        if lacking.is_empty() && apt_knows(KERNEL) {
            return Ok(());
        }
        install(&lacking, yes)?;
    }
    match missing(needs)[..] {
        [] => Ok(()),
        [(package, _), ..] => Err(format!("{package} is not installed, although apt-get succeeded")),
    }
}

fn install(lacking: &[Need], yes: bool) -> Result<()> {
    let names: Vec<&str> = lacking.iter().map(|(package, _)| *package).collect();
    let mut line = "apt-get update".to_owned();
    if !names.is_empty() {
        line = format!("{line} && apt-get install --no-install-recommends {}", names.join(" "));
        eprintln!("These Debian packages are missing:");
        for (package, purpose) in lacking {
            eprintln!("  {package:<24} {purpose}");
        }
    }
    let root = output(Command::new("id").arg("-u")).is_ok_and(|id| id.trim() == "0");
    if !root && output(Command::new("sudo").arg("--version")).is_err() {
        return Err(format!("you are not root and there is no sudo; let root run:\n  {line}"));
    }
    if !yes && !agreed(&line)? {
        return Err(format!("not installed; run:\n  {line}"));
    }
    apt(root, yes, &["update", "-qq"])?;
    if names.is_empty() {
        return if apt_knows(KERNEL) { Ok(()) } else { Err(format!("apt has no candidate for {KERNEL}")) };
    }
    let mut args = vec!["install", "-qq", "-y", "--no-install-recommends"];
    let plan = output(Command::new("apt-get").args(["-s"]).args(&args).args(&names))?;
    for removed in plan.lines().filter(|line| line.starts_with("Remv ")) {
        eprintln!("apt-get will remove{}", removed.trim_start_matches("Remv"));
    }
    progress(&format!("apt-get: {} packages and what they depend on", names.len()));
    args.extend(&names);
    apt(root, yes, &args)
}

fn agreed(line: &str) -> Result<bool> {
    if !std::io::stdin().is_terminal() {
        return Err(format!("standard input is no terminal to ask on; use --yes, or run:\n  {line}"));
    }
    eprint!("{line}\nDo it? [Y/n] ");
    let _ = std::io::stderr().flush();
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer).map_err(|e| format!("standard input: {e}"))?;
    Ok(matches!(answer.trim().to_lowercase().as_str(), "" | "y" | "yes"))
}

fn apt(root: bool, yes: bool, args: &[&str]) -> Result<()> {
    if root {
        let mut apt = Command::new("apt-get");
        apt.env("DEBIAN_FRONTEND", "noninteractive").args(args);
        // dpkg's chatter goes with standard output; errors stay visible.
        return run(apt.stdout(std::process::Stdio::null()));
    }
    // sudo may ask for a password on the terminal, so it stays in our process group.
    let mut sudo = Command::new("sudo");
    if yes {
        sudo.arg("--non-interactive");
    }
    sudo.args(["DEBIAN_FRONTEND=noninteractive", "apt-get"]).args(args).stdout(std::process::Stdio::null());
    let status = sudo.status().map_err(|e| format!("sudo does not start: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("sudo apt-get {}: {status}", args.join(" "))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_every_debian_has_is_installed_and_nonsense_is_not() {
        if output(Command::new("dpkg-query").arg("--version")).is_err() {
            return;
        }
        assert!(installed("dpkg"));
        assert_eq!(
            missing(&[("dpkg", ""), ("no-such-package-of-debian", "x")]),
            [("no-such-package-of-debian", "x")]
        );
        assert!(!apt_knows("no-such-package-of-debian"));
    }
}
