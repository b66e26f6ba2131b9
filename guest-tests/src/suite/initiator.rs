//! The kernel's NVMe/TCP initiator, in a guest, against our target.

#![forbid(unsafe_code)]

use super::Outcome;
use super::pieces::{connect_from_guest, expect_no_trace, target_sections};
use crate::daemon::Daemon;
use crate::lab::{Lab, NQN};
use crate::qemu::Qemu;
use crate::scratch::Scratch;
use crate::{Result, fio};
use std::fs::File;
use std::time::Duration;

const SIZE: u64 = 256 << 20;

/// Seconds of load around the target's restart.
const LOAD_SECONDS: u32 = 15;

/// mkfs, fio with verify on the file system, and the target daemon's death and return under it.
pub(super) fn kernel_initiator(lab: &Lab) -> Result<Outcome> {
    let scratch = Scratch::new()?;
    let file = scratch.file("n0.raw");
    File::create(&file).and_then(|f| f.set_len(SIZE)).map_err(|e| format!("{}: {e}", file.display()))?;
    let uri = format!("file://{}", file.display());
    let mut target =
        Daemon::start("target", &lab.hawser, scratch.path(), &target_sections(&uri, "127.0.0.1:0"))?;
    let address = target.listener(NQN)?;
    let port = address.rsplit_once(':').and_then(|(_, port)| port.parse().ok());
    let port = port.ok_or_else(|| format!("the target listens at {address:?}, which has no port"))?;
    // A restarted target must listen where the initiator looks for it.
    target.keep_ports(NQN)?;

    let mut guest = Qemu::from_kernel("initiator", &lab.image, scratch.path(), lab.accel, &[], &[])?;
    connect_from_guest(&mut guest, port)?;
    guest.run_for(
        &format!(
            "set -e; [ $(cat /sys/block/nvme0n1/size) = {} ]
            mkfs.ext4 -q -F /dev/nvme0n1; mount -t ext4 /dev/nvme0n1 /mnt",
            SIZE / 512
        ),
        30,
    )?;
    let options = "--directory=/mnt --ioengine=io_uring --iodepth=8 --rw=randwrite --bs=8k --size=24M \
        --verify=crc32c --verify_backlog=256 --verify_fatal=1 --serialize_overlap=1 --time_based";
    let load = fio::start(&mut guest, &format!("{options} --runtime={LOAD_SECONDS}"))?;
    std::thread::sleep(Duration::from_secs(4));
    target.kill()?;
    target.launch()?;
    let report = fio::finish(&mut guest, load, u64::from(LOAD_SECONDS)).map_err(|e| target.explain(&e))?;
    let connects = guest.run("dmesg | grep -c 'Successfully reconnected' || true")?;
    if connects == "0" {
        return Err(guest.explain("the kernel's initiator did not report a reconnect"));
    }
    // What is on the device must be a sound file system for everybody else too.
    guest.run_for("umount /mnt && echo 1 > /sys/class/nvme/nvme0/delete_controller", 30)?;
    target.terminate()?;
    crate::process::output(std::process::Command::new("/sbin/e2fsck").args(["-f", "-n"]).arg(&file))?;
    expect_no_trace(&mut guest)?;
    guest.quit()?;
    Ok(Outcome::Passed(format!(
        "mkfs, {:.0} verified writes/s, target killed: longest request {:.1} s, 0 errors",
        report.write_iops, report.latency_max
    )))
}
