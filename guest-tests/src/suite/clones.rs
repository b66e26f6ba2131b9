//! Ten VMs boot from ten clones of one image.

#![forbid(unsafe_code)]

use super::Outcome;
use super::pieces::{DISK, expect_no_trace};
use crate::Result;
use crate::image::DISK_BYTES;
use crate::lab::Lab;
use crate::pools::{DiskOn, GOLDEN, MEMBER_BYTES, POOL, Pooled, SNAPSHOT, View, empty_file};
use crate::qemu::Qemu;
use crate::scratch::Scratch;
use std::fs;

const VMS: usize = 10;
/// So many start at the same time: more are no faster.
const AT_ONCE: usize = 2;
/// What a VM writes of its own.
const OWN_BYTES: u64 = 4 << 20;
/// Besides that, a VM's first start changes a few places of its root file system, each in an extent of its own.
const CHANGED_BYTES: u64 = 16 << 20;

/// All run at the same time in the end, each has what it wrote, and together they take little more than one.
pub(super) fn ten(lab: &Lab) -> Result<Outcome> {
    let scratch = Scratch::new()?;
    let uris = (0..2).map(|number| {
        Ok(format!("file://{}", empty_file(&scratch, &format!("m{number}.raw"), MEMBER_BYTES)?))
    });
    let uris = uris.collect::<Result<Vec<_>>>()?;
    // Each VM has a folder of its own, because the configuration names the socket.
    let disk = |number: usize| DiskOn {
        name: format!("vm{number}"),
        volume: format!("{POOL}/vm{number}"),
        socket: format!("vm{number}/{DISK}.sock"),
    };
    for number in 1..=VMS {
        let folder = scratch.file(&format!("vm{number}"));
        fs::create_dir(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    }
    let disks: Vec<_> = (1..=VMS).map(disk).collect();
    let mut pooled = Pooled::create(lab, scratch, Vec::new(), &uris, "raid1", &disks)?;
    pooled.import(lab, false)?;
    pooled.serve.launch()?;
    pooled.wait("open", View::is_whole)?;
    let image = pooled.mapped_bytes(GOLDEN)?;
    let before = pooled.view()?.used_bytes;
    for DiskOn { volume, .. } in &disks {
        pooled.serve.command(&["volume", "clone", SNAPSHOT, volume])?;
    }
    let cloned = pooled.view()?.used_bytes - before;
    if cloned != 0.0 {
        return Err(format!("{VMS} clones took {cloned} bytes before anything was written to them"));
    }
    let numbers: Vec<usize> = (1..=VMS).collect();
    let (mut guests, mut slowest) = (Vec::new(), 0f64);
    for some in numbers.chunks(AT_ONCE) {
        let from = guests.len();
        for number in some {
            pooled.serve.await_disk(&format!("vm{number}"), "listening")?;
            let folder = pooled.scratch().file(&format!("vm{number}"));
            let config = lab.config("single-queue.cfg");
            guests.push(Qemu::from_config(&format!("vm{number}"), &config, &folder, lab.accel, &[])?);
        }
        for (guest, number) in guests[from..].iter_mut().zip(some) {
            guest.ready().map_err(|e| pooled.serve.explain(&e))?;
            slowest = slowest.max(guest.age().as_secs_f64());
            // Under the same name everywhere: in blocks that all of them share until then.
            guest.run_for(
                &format!(
                    "set -e; echo {number} > /root/who
                    dd if=/dev/urandom of=/root/own bs=64k count={} 2> /dev/null
                    sha256sum < /root/own > /root/sum; sync",
                    OWN_BYTES >> 16
                ),
                30,
            )?;
        }
    }
    let written = pooled.view()?.used_bytes - before;
    let most = (OWN_BYTES + CHANGED_BYTES) * VMS as u64;
    if written > most as f64 || most > DISK_BYTES {
        return Err(format!("{VMS} VMs have changed {written} bytes of {image}, which are more than {most}"));
    }
    for (guest, number) in guests.iter_mut().zip(1..) {
        guest.run_for(
            &format!(
                "set -e; echo 3 > /proc/sys/vm/drop_caches
                [ $(cat /root/who) = {number} ]; [ \"$(sha256sum < /root/own)\" = \"$(cat /root/sum)\" ]"
            ),
            20,
        )?;
        expect_no_trace(guest)?;
    }
    guests.into_iter().try_for_each(Qemu::quit)?;
    pooled.close(lab)?;
    Ok(Outcome::Passed(format!(
        "slowest shell after {slowest:.1} s; image {:.0} MiB, ten VMs {:.0} MiB more",
        image / 1048576.0,
        written / 1048576.0
    )))
}
