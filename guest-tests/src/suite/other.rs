//! Tests of the harness itself, and of front ends that are not everywhere.

#![forbid(unsafe_code)]

use super::Outcome;
use super::pieces::{
    KernelTarget, boot, boot_note, connect_from_guest, expect_no_trace, installed, verify_options,
};
use crate::accel::Accel;
use crate::lab::Lab;
use crate::process::{Deadline, Process};
use crate::qemu::{Firmware, Qemu};
use crate::scratch::Scratch;
use crate::{Result, fio};
use std::process::Command;

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
    let mut guest = Qemu::from_kernel("initiator", &lab.image, scratch.path(), lab.accel, None, &[])?;
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

pub(super) fn cloud_hypervisor(lab: &Lab) -> Result<Outcome> {
    if lab.accel != Accel::Kvm {
        return Ok(Outcome::Skipped(
            "Cloud Hypervisor needs KVM, and Linux does not start under KVM here".into(),
        ));
    }
    if !installed("cloud-hypervisor") {
        return Ok(Outcome::Skipped("cloud-hypervisor is not on PATH; Debian does not package it".into()));
    }
    Ok(Outcome::Skipped("not automated: see qemu-configs/cloud-hypervisor.md".into()))
}
