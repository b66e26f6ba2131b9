//! The disk grows under its VM, which sees it without a reboot: at once, and when it grew while no daemon served it.

#![forbid(unsafe_code)]

use super::Outcome;
use super::pieces::{DISK, Served, boot, expect_no_trace, verify_options};
use crate::image::DISK_BYTES;
use crate::lab::Lab;
use crate::process::Deadline;
use crate::qemu::{Firmware, Qemu};
use crate::{Result, fio};
use std::fs;

const MIB: u64 = 1 << 20;

/// Makes the file behind the disk `bytes` long.
fn grow(served: &Served, bytes: u64) -> Result<()> {
    let path = served.scratch().file("disk.raw");
    let file = fs::OpenOptions::new().write(true).open(&path);
    file.and_then(|file| file.set_len(bytes)).map_err(|e| format!("{}: {e}", path.display()))
}

/// Waits until the guest's kernel knows the disk as `bytes` long, and writes and reads back its new end.
fn expect(served: &Served, guest: &mut Qemu, bytes: u64) -> Result<()> {
    let deadline = Deadline::new(30, format!("the guest to see {bytes} bytes"));
    while guest.run("cat /sys/block/vda/size")? != (bytes / 512).to_string() {
        deadline.nap().map_err(|e| served.serve.explain(&guest.explain(&e)))?;
    }
    guest
        .run(&format!(
            "set -e; dd if=/dev/urandom of=/run/new bs=1M count=1 2>/dev/null
            dd if=/run/new of=/dev/vda bs=1M seek={last} conv=notrunc oflag=direct 2>/dev/null
            dd if=/dev/vda bs=1M skip={last} iflag=direct 2>/dev/null | cmp - /run/new",
            last = bytes / MIB - 1
        ))
        .map(drop)
}

pub(super) fn grows(lab: &Lab) -> Result<Outcome> {
    let mut served = Served::local(lab, 2)?;
    let mut guest = boot(lab, "reconnect.cfg", Firmware::SeaBios, served.scratch().path(), &[])?;
    let load = fio::start(&mut guest, &verify_options(lab.accel, 5))?;
    grow(&served, DISK_BYTES + 16 * MIB)?;
    fio::finish(&mut guest, load, 5).map_err(|e| served.serve.explain(&e))?;
    expect(&served, &mut guest, DISK_BYTES + 16 * MIB)?;

    // QEMU does not read the size again by itself when it reconnects.
    served.serve.kill()?;
    grow(&served, DISK_BYTES + 48 * MIB)?;
    served.serve.launch()?;
    served.serve.await_disk(DISK, "connected")?;
    expect(&served, &mut guest, DISK_BYTES + 48 * MIB)?;
    expect_no_trace(&mut guest)?;
    guest.sync_and_quit()?;
    served.stop()?;
    Ok(Outcome::Passed("16 MiB more under load, 32 MiB more while no daemon ran".into()))
}
