//! Firmware and operating system drive one disk after another, each with its own number of queues and their own sizes.

#![forbid(unsafe_code)]

use super::Outcome;
use super::pieces::{DISK, Served, boot, expect_no_trace, verify_options};
use crate::lab::Lab;
use crate::qemu::{Firmware, ONE_CPU};
use crate::{Result, fio};

/// Firmware, the VM's queues, their size. Firmware has one queue, of its own size where the VM's is larger than it can use; Linux
/// has as many as there are processors.
const VMS: [(Firmware, &str, u32, u32); 3] = [
    (Firmware::SeaBios, "multi-queue.cfg", 1, 64),
    (Firmware::SeaBios, "multi-queue.cfg", 4, 1024),
    (Firmware::Ovmf, "uefi.cfg", 4, 256),
];

/// One back end, a remote disk, and a VM after the other that boots from it.
pub(super) fn matrix(lab: &Lab) -> Result<Outcome> {
    let mut served = Served::start(lab, 4, false)?;
    let mut notes = Vec::new();
    for (firmware, config, queues, size) in VMS {
        let (queues, size) = (queues.to_string(), size.to_string());
        let what = format!("{firmware} {queues}x{size}");
        let explain = |e: String| format!("{what}: {e}");
        let options =
            [format!("device.disk0.num-queues={queues}"), format!("device.disk0.queue-size={size}")];
        let cpus = if queues == "1" { ONE_CPU } else { &queues };
        let more = ["-smp", cpus, "-set", &options[0], "-set", &options[1]];
        served.serve.await_disk(DISK, "listening").map_err(explain)?;
        let mut guest = boot(lab, config, firmware, served.scratch().path(), &more).map_err(explain)?;
        let found = guest.run("uname -r; ls /sys/block/vda/mq | wc -l; cat /root/before 2> /dev/null || true; echo $$ >> /root/before; sync")?;
        let mut lines = found.lines();
        let release = lines.next().unwrap_or_default();
        if !release.starts_with(&format!("{}.", lab.image.kernel_version)) {
            return Err(explain(format!(
                "the guest's kernel is {release}, not {}",
                lab.image.kernel_version
            )));
        }
        if lines.next() != Some(&queues) || lines.count() != notes.len() {
            return Err(explain(guest.explain(&format!("queues, and marks of earlier boots: {found}"))));
        }
        fio::run(&mut guest, &verify_options(lab.accel, 2), 2).map_err(explain)?;
        expect_no_trace(&mut guest).map_err(explain)?;
        guest.sync_and_quit()?;
        notes.push(what);
    }
    served.stop()?;
    Ok(Outcome::Passed(notes.join(", ")))
}
