//! `cargo xtask fresh`: the two commands on a machine that has only gcc and a Rust toolchain.
//!
//! A minimal Debian is made by mmdebstrap; the toolchain and the repository are bound into it read-only, in a mount and a
//! process namespace of its own, so that nothing mounted or running outlives the command.

use guest_tests::lab::{repository, target};
use guest_tests::process::{output, run};
use guest_tests::{Result, progress};
use std::fs;
use std::path::Path;
use std::process::Command;

/// gcc is the linker; a machine that got its toolchain from rustup has certificates (this machine's are put in their place,
/// because it may sit behind a proxy with one of its own).
const INCLUDE: &str = "gcc,libc6-dev,ca-certificates";

struct Removed<'a>(&'a Path);

impl Drop for Removed<'_> {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_dir_all(self.0) {
            eprintln!("{}: not removed: {e}", self.0.display());
        }
    }
}

/// Runs `cargo xtask COMMAND… --yes` in a new Debian of `suite`.
pub(crate) fn run_in(suite: &str, command: &[&str]) -> Result<()> {
    let command = command.join(" ");
    let root = target().join(format!("fresh-{suite}"));
    if root.exists() {
        fs::remove_dir_all(&root).map_err(|e| format!("{}: {e}", root.display()))?;
    }
    fs::create_dir_all(&root).map_err(|e| format!("{}: {e}", root.display()))?;
    let _removed = Removed(&root);
    progress(&format!("mmdebstrap {suite}"));
    let mut make = Command::new("mmdebstrap");
    make.args(["--quiet", "--variant=minbase", &format!("--include={INCLUDE}"), suite]).arg(&root);
    run(&mut make)?;

    let sysroot = output(Command::new("rustc").current_dir(repository()).args(["--print", "sysroot"]))?;
    let script = format!(
        "root='{root}'
        mkdir -p $root/toolchain $root/hawser
        mount --bind '{toolchain}' $root/toolchain
        mount -o remount,bind,ro $root/toolchain
        mount --bind '{repository}' $root/hawser
        mount -o remount,bind,ro $root/hawser
        mount -t proc proc $root/proc
        mount --rbind /dev $root/dev
        mount -t sysfs -o ro sys $root/sys
        cp /etc/resolv.conf $root/etc/resolv.conf
        cp -L /etc/ssl/certs/ca-certificates.crt $root/etc/ssl/certs/ca-certificates.crt
        exec chroot $root /usr/bin/env -i HOME=/root PATH=/toolchain/bin:/usr/sbin:/usr/bin:/sbin:/bin \
            CARGO_TARGET_DIR=/build TERM=dumb sh -ec 'cd /hawser; cargo xtask {command} --yes'",
        root = root.display(),
        toolchain = sysroot.trim(),
        repository = repository().display(),
    );
    progress(&format!("{suite}: cargo xtask {command} --yes"));
    run(Command::new("unshare").args(["--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", &script]))
}
