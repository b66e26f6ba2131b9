//! Tests of the harness itself, and of front ends that are not everywhere.

#![forbid(unsafe_code)]

use super::Outcome;
use super::pieces::{
    KernelTarget, Served, boot, boot_note, connect_from_guest, expect_no_trace, installed, verify_options,
};
use crate::accel::Accel;
use crate::lab::Lab;
use crate::process::{Deadline, Process, tail};
use crate::qemu::{Firmware, Qemu};
use crate::scratch::Scratch;
use crate::{Result, fio};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

/// The same image, configuration and fio job behind somebody else's back end: if this fails, the lab is at fault.
pub(super) fn control(lab: &Lab) -> Result<Outcome> {
    let scratch = Scratch::new()?;
    let disk = scratch.file("disk.raw");
    std::fs::copy(&lab.image.disk, &disk).map_err(|e| format!("{}: {e}", disk.display()))?;
    let mut backend = Command::new("qemu-storage-daemon");
    let socket = scratch.file("disk0.sock");
    backend.arg("--blockdev").arg(format!("driver=file,node-name=disk,filename={}", disk.display()));
    backend.arg("--export").arg(format!(
        "type=vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path={}",
        socket.display()
    ));
    let mut backend = Process::start(backend, &scratch.file("backend.log"))?;
    let deadline = Deadline::new(10, "qemu-storage-daemon's socket");
    while !socket.exists() {
        backend.must_live()?;
        deadline.nap()?;
    }
    let mut guest = boot(lab, "single-queue.cfg", Firmware::SeaBios, scratch.path(), &[])?;
    let seconds = guest.age().as_secs_f64();
    let report = fio::run(&mut guest, &verify_options(lab.accel, 3), 3)?;
    expect_no_trace(&mut guest)?;
    guest.sync_and_quit()?;
    Ok(Outcome::Passed(boot_note(seconds, report.write_iops)))
}

/// The kernel's initiator against the kernel's target: if this fails, what the tests of ours measure is the lab.
pub(super) fn control_kernels(lab: &Lab) -> Result<Outcome> {
    let scratch = Scratch::new()?;
    let target = KernelTarget::start(lab, &scratch, 64 << 20)?;
    let mut guest = Qemu::from_kernel("initiator", &lab.image, scratch.path(), lab.accel, &[], &[])?;
    connect_from_guest(&mut guest, target.port())?;
    let report = fio::run(
        &mut guest,
        "--filename=/dev/nvme0n1 --ioengine=io_uring --iodepth=8 --rw=randwrite --bs=4k --size=8M --verify=crc32c",
        5,
    )?;
    expect_no_trace(&mut guest)?;
    guest.quit()?;
    Ok(Outcome::Passed(format!("{:.0} verified writes/s", report.write_iops)))
}

/// Where the EDK2 build for Cloud Hypervisor is looked for.
const CLOUDHV: [&str; 2] =
    ["/usr/share/cloud-hypervisor/CLOUDHV.fd", "/usr/local/share/cloud-hypervisor/CLOUDHV.fd"];

/// The first command line of `qemu-configs/cloud-hypervisor.md`; Linux must mount its root.
pub(super) fn cloud_hypervisor(lab: &Lab) -> Result<Outcome> {
    let skip = |reason: &str| Ok(Outcome::Skipped(reason.into()));
    if lab.accel != Accel::Kvm {
        return skip("Cloud Hypervisor needs KVM, and Linux does not start under KVM here");
    }
    if !installed("cloud-hypervisor") {
        return skip("cloud-hypervisor is not on PATH, and Debian does not package it");
    }
    let Some(firmware) = CLOUDHV.iter().find(|path| Path::new(path).exists()) else {
        return skip("there is no CLOUDHV.fd in /usr/share/cloud-hypervisor");
    };
    let served = Served::start(lab, 1, false)?;
    let console = served.scratch().file("console");
    let mut command = Command::new("cloud-hypervisor");
    command.args(["--kernel", firmware, "--cpus", "boot=1", "--memory", "size=512M,shared=on", "--disk"]);
    command.arg(format!(
        "vhost_user=true,socket={},num_queues=1,queue_size=128",
        served.scratch().file("disk0.sock").display()
    ));
    command.arg("--serial").arg(format!("file={}", console.display())).args(["--console", "off"]);
    let started = Instant::now();
    let mut vm = Process::start(command, &served.scratch().file("cloud-hypervisor.log"))?;
    let deadline = Deadline::new(60, "Linux to mount its root under Cloud Hypervisor");
    while !std::fs::read_to_string(&console).unwrap_or_default().contains("init: root is mounted") {
        vm.must_live()?;
        deadline.nap().map_err(|e| format!("{e}{}", tail(&console, 25)))?;
    }
    vm.kill()?;
    Ok(Outcome::Passed(format!("root mounted after {:.1} s", started.elapsed().as_secs_f64())))
}
