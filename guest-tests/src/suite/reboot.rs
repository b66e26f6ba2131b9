//! One back end, many incarnations of its VM: the guest's reboot, the reset button, a power cycle with other queues.

#![forbid(unsafe_code)]

use super::Outcome;
use super::pieces::{DISK, Served, boot, expect_no_trace, verify_options};
use crate::Result;
use crate::fio;
use crate::lab::Lab;
use crate::qemu::{Firmware, Qemu};
use std::time::Duration;

fn mark(guest: &mut Qemu, number: u32) -> Result<()> {
    guest.run(&format!("echo boot {number} >> /root/boots && sync")).map(drop)
}

fn check(lab: &Lab, guest: &mut Qemu, boots: u32) -> Result<()> {
    let marks = guest.run("wc -l < /root/boots")?;
    if marks != boots.to_string() {
        return Err(guest.explain(&format!("{marks} marks of earlier boots on the disk, not {boots}")));
    }
    fio::run(guest, &verify_options(lab.accel, 2), 2)?;
    expect_no_trace(guest)
}

pub(super) fn reboots(lab: &Lab) -> Result<Outcome> {
    let mut served = Served::start(lab, 4, false)?;
    let folder = served.scratch().path().to_path_buf();
    let mut guest = boot(lab, "multi-queue.cfg", Firmware::SeaBios, &folder, &["-smp", "2"])?;
    let mut last = guest.run("cat /proc/sys/kernel/random/boot_id")?;
    mark(&mut guest, 1)?;

    // By the guest itself, while nothing is in flight.
    for boots in 1..=3 {
        let boot_id = guest.reboot()?.boot_id;
        if boot_id == last {
            return Err(guest.explain("the boot id did not change: the guest did not reboot"));
        }
        last = boot_id;
        check(lab, &mut guest, boots)?;
        mark(&mut guest, boots + 1)?;
    }

    // By the reset button, in the middle of its work: requests are in flight when the firmware takes the device over. And again
    // while the firmware, or the boot loader that it runs, reads from the disk.
    let _ = fio::start(&mut guest, &verify_options(lab.accel, 60))?;
    served.serve.await_writes(DISK, 500)?;
    guest.press_reset()?;
    // The load's last reads are over by then, and the firmware's first have not begun or are of the kind that is meant.
    std::thread::sleep(Duration::from_millis(500));
    served.serve.await_reads(DISK, 20)?;
    let boot_id = guest.reset()?.boot_id;
    if boot_id == last {
        return Err(guest.explain("the boot id did not change: the guest was not reset"));
    }
    check(lab, &mut guest, 4)?;
    mark(&mut guest, 5)?;

    // Power off and on: other firmware, one queue of 1024 instead of four of 256.
    guest.sync_and_quit()?;
    served.serve.await_disk(DISK, "listening")?;
    let other = ["-set", "device.disk0.queue-size=1024"];
    let mut guest = boot(lab, "uefi.cfg", Firmware::Ovmf, &folder, &other)?;
    check(lab, &mut guest, 5)?;
    guest.sync_and_quit()?;
    served.stop()?;
    Ok(Outcome::Passed(
        "3 reboots, resets under load and in firmware, power cycle with OVMF and one queue of 1024".into(),
    ))
}
