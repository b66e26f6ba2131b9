//! The target of a VM's disk stops answering, with writes of the VM under way, and answers long after. Who stops the VM
//! meanwhile is not held up by that, and nothing is lost, repeated or reported to the guest.

#![forbid(unsafe_code)]

use super::Outcome;
use super::pieces::{DISK, Served, boot, expect_no_trace, verify_options};
use crate::lab::Lab;
use crate::qemu::Firmware;
use crate::{Result, fio, progress};
use std::time::{Duration, Instant};

const DRAIN_SECONDS: u64 = 2;
const JOB_SECONDS: u32 = 30;

/// What a stop may take: `drain_timeout`, 5 s for what was given up, and a slow machine's share.
const STOP_MAX: Duration = Duration::from_secs(DRAIN_SECONDS + 5 + 8);

pub(super) fn stops(lab: &Lab) -> Result<Outcome> {
    // Requests time out meanwhile, too: the path is lost before it is given up.
    let daemon = format!("drain_timeout = {DRAIN_SECONDS}\n\n");
    let mut served = Served::start_with(lab, &daemon, "io_timeout = 1\n", 2, false)?;
    let mut guest = boot(lab, "reconnect.cfg", Firmware::SeaBios, served.scratch().path(), &[])?;
    let load = fio::start(&mut guest, &verify_options(lab.accel, JOB_SECONDS))?;
    let mut longest = Duration::ZERO;
    for round in 0..2 {
        served.serve.await_writes(DISK, 500)?;
        let target = served.target.as_mut().ok_or("the disk is not remote")?;
        target.pause()?;
        // Some requests are under way by now; the second time their time-out is over.
        std::thread::sleep(Duration::from_millis(200 + 1500 * round));
        let since = Instant::now();
        guest.monitor("stop", "{}").map_err(|e| served.serve.explain(&e))?;
        longest = longest.max(since.elapsed());
        progress(&format!("the VM was stopped after {:.1} s", since.elapsed().as_secs_f64()));
        if since.elapsed() > STOP_MAX {
            return Err(served.serve.explain(&format!("stopping the VM took {:?}", since.elapsed())));
        }
        // It runs again before its target does: its rings wait.
        guest.monitor("cont", "{}")?;
        std::thread::sleep(Duration::from_secs(2));
        served.target.as_mut().ok_or("the disk is not remote")?.go_on()?;
        served.serve.await_writes(DISK, 500)?;
    }
    let report =
        fio::finish(&mut guest, load, u64::from(JOB_SECONDS)).map_err(|e| served.serve.explain(&e))?;
    if report.latency_max < 2.0 {
        return Err(format!("the longest request took {:.3} s: nothing was stuck", report.latency_max));
    }
    expect_no_trace(&mut guest)?;
    guest.sync_and_quit()?;
    served.stop()?;
    Ok(Outcome::Passed(format!(
        "stopped twice, after {:.1} s at most; {:.0} I/Os verified, 0 errors, longest pause {:.1} s",
        longest.as_secs_f64(),
        report.ios,
        report.latency_max
    )))
}
