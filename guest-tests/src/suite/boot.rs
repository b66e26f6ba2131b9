//! Firmware, boot loader, Linux: from our target and from the kernel's.

#![forbid(unsafe_code)]

use super::Outcome;
use super::pieces::{
    DISK, KernelTarget, Served, boot, boot_note, disk_sections, expect_no_trace, host_section, import,
    verify_options,
};
use crate::daemon::Daemon;
use crate::image::DISK_BYTES;
use crate::lab::{Lab, NQN};
use crate::process::output;
use crate::qemu::{Firmware, Qemu};
use crate::scratch::Scratch;
use crate::{Result, fio};
use std::process::Command;

fn check_vm(lab: &Lab, guest: &mut Qemu) -> Result<f64> {
    let serial = guest.run("cat /sys/block/vda/serial")?;
    if serial != DISK {
        return Err(guest.explain(&format!("the disk's serial is {serial:?}, not {DISK:?}")));
    }
    let report = fio::run(guest, &verify_options(lab.accel, 3), 3)?;
    // What the guest writes through its file system it must read back through an empty cache.
    guest.run(
        "set -e; dd if=/dev/urandom of=/root/a bs=64k count=16 2>/dev/null; sync
        before=$(sha256sum < /root/a); echo 3 > /proc/sys/vm/drop_caches
        [ \"$before\" = \"$(sha256sum < /root/a)\" ]",
    )?;
    expect_no_trace(guest)?;
    Ok(report.write_iops)
}

fn ours(lab: &Lab, config: &str, firmware: Firmware) -> Result<Outcome> {
    let served = Served::start(lab, 1, false)?;
    let mut guest = boot(lab, config, firmware, served.scratch().path(), &[])?;
    let seconds = guest.age().as_secs_f64();
    let iops = check_vm(lab, &mut guest)?;
    guest.sync_and_quit()?;
    served.stop()?;
    Ok(Outcome::Passed(boot_note(seconds, iops)))
}

pub(super) fn seabios_ours(lab: &Lab) -> Result<Outcome> {
    ours(lab, "single-queue.cfg", Firmware::SeaBios)
}

pub(super) fn ovmf_ours(lab: &Lab) -> Result<Outcome> {
    ours(lab, "uefi.cfg", Firmware::Ovmf)
}

/// One daemon, two reactors, two disks of two queues: a `file:` device with the image, a `mem:` device of 4096-byte blocks.
pub(super) fn two_disks(lab: &Lab) -> Result<Outcome> {
    let scratch = Scratch::new()?;
    let disk = scratch.file("disk.raw");
    std::fs::copy(&lab.image.disk, &disk).map_err(|e| format!("{}: {e}", disk.display()))?;
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let reactors = if cpus > 1 { "reactors = [0, 1]\n\n" } else { "" };
    let sections = reactors.to_owned()
        + &disk_sections(scratch.path(), DISK, &format!("file://{}", disk.display()), None, 2)
        + &disk_sections(scratch.path(), "disk1", "mem:?size=64MiB", Some(4096), 2);
    let mut serve = Daemon::start("serve", &lab.hawser, scratch.path(), &sections)?;
    serve.await_disk(DISK, "listening")?;
    serve.await_disk("disk1", "listening")?;
    let mut guest = boot(lab, "two-disks.cfg", Firmware::SeaBios, scratch.path(), &["-smp", "2"])?;
    let second = guest.run(
        "for disk in /sys/block/vd*; do [ \"$(cat $disk/serial)\" = disk1 ] && echo ${disk##*/}; done",
    )?;
    let facts = guest.run(&format!(
        "cd /sys/block/{second}; echo $(cat size) $(ls mq | wc -l) $(cat queue/logical_block_size)"
    ))?;
    if facts != "131072 2 4096" {
        return Err(guest.explain(&format!("disk1: sectors, queues, block size: {facts}, not 131072 2 4096")));
    }
    let options = format!(
        "--filename=/dev/{second} --ioengine=io_uring --iodepth=8 --rw=randwrite --bs=16k --size=24M \
        --verify=crc32c --verify_fatal=1 --numjobs=2 --offset_increment=32M"
    );
    let report = fio::run(&mut guest, &options, 5)?;
    // What was discarded reads as zeroes: `mem:` promises that.
    guest.run(&format!(
        "set -e; blkdiscard -o 1048576 -l 4194304 /dev/{second}
        dd if=/dev/{second} bs=1M skip=1 count=4 iflag=direct 2>/dev/null | cmp -n 4194304 - /dev/zero"
    ))?;
    expect_no_trace(&mut guest)?;
    guest.sync_and_quit()?;
    serve.terminate()?;
    Ok(Outcome::Passed(format!(
        "2 reactors, 2 disks, 2 queues each, discard, {:.0} writes/s",
        report.write_iops
    )))
}

/// A kernel target with the image on it, and a daemon that serves it.
fn kernel_served(lab: &Lab, scratch: &Scratch) -> Result<(Daemon, KernelTarget)> {
    let target = KernelTarget::start(lab, scratch, DISK_BYTES)?;
    import(lab, scratch, &target.uri(), false)?;
    let sections = host_section() + &disk_sections(scratch.path(), DISK, &target.uri(), None, 2);
    let mut serve = Daemon::start("serve", &lab.hawser, scratch.path(), &sections)?;
    serve.await_disk(DISK, "listening")?;
    Ok((serve, target))
}

/// `hawser device discover` must find the subsystem at a target.
fn discover(lab: &Lab, port: u16) -> Result<()> {
    let mut command = Command::new(&lab.hawser);
    let found = output(command.args(["device", "discover", &format!("tcp://127.0.0.1:{port}")]))?;
    if found.contains(NQN) { Ok(()) } else { Err(format!("device discover did not find {NQN}: {found}")) }
}

/// Discovery, import with verify into the kernel's target, firmware boot from it, and its restart under load: a pause, no error.
pub(super) fn seabios_kernel(lab: &Lab) -> Result<Outcome> {
    let scratch = Scratch::new()?;
    let (serve, mut target) = kernel_served(lab, &scratch)?;
    discover(lab, target.port())?;
    let mut guest = boot(lab, "reconnect.cfg", Firmware::SeaBios, scratch.path(), &[])?;
    let seconds = guest.age().as_secs_f64();
    let load = fio::start(&mut guest, &verify_options(lab.accel, 25))?;
    std::thread::sleep(std::time::Duration::from_secs(4));
    target.restart(lab, &scratch)?;
    let report = fio::finish(&mut guest, load, 25).map_err(|e| serve.explain(&e))?;
    // The load must have met the outage: a guest needs seconds to boot.
    if report.latency_max < 1.0 {
        return Err(format!(
            "the longest request took {:.3} s: the restart went unnoticed",
            report.latency_max
        ));
    }
    expect_no_trace(&mut guest)?;
    guest.sync_and_quit()?;
    Ok(Outcome::Passed(format!(
        "shell after {seconds:.1} s; target restarted: longest request {:.1} s, 0 errors",
        report.latency_max
    )))
}

pub(super) fn ovmf_kernel(lab: &Lab) -> Result<Outcome> {
    let scratch = Scratch::new()?;
    let (_serve, _target) = kernel_served(lab, &scratch)?;
    let mut guest = boot(lab, "uefi.cfg", Firmware::Ovmf, scratch.path(), &[])?;
    let seconds = guest.age().as_secs_f64();
    let iops = check_vm(lab, &mut guest)?;
    guest.sync_and_quit()?;
    Ok(Outcome::Passed(boot_note(seconds, iops)))
}
