//! The target of a VM's disk stops answering, with writes of the VM under way, and answers long after. Who stops the VM
//! meanwhile is not held up by that, and nothing is lost, repeated or reported to the guest.

#![forbid(unsafe_code)]

use super::Outcome;
use super::pieces::{DISK, Served, boot, expect_no_trace, verify_options};
use crate::lab::Lab;
use crate::qemu::Firmware;
use crate::{Result, fio, progress};
use std::time::{Duration, Instant};

/// How the VM's daemon is configured, and what befalls it.
struct Case {
    daemon: &'static str,
    device: &'static str,
    /// Its `drain_timeout`.
    drain_seconds: u64,
    job_seconds: u32,
    /// For each round: how long the target is silent before the VM is stopped, and in all.
    rounds: &'static [(Duration, Duration)],
}

/// Requests time out meanwhile, too: the path is lost before it is given up. The second time their time-out is over.
const SHORT: Case = Case {
    daemon: "drain_timeout = 2\n\n",
    device: "io_timeout = 1\n",
    drain_seconds: 2,
    job_seconds: 30,
    rounds: &[
        (Duration::from_millis(200), Duration::from_secs(2)),
        (Duration::from_millis(1700), Duration::from_secs(4)),
    ],
};

/// As nobody has configured it, with I/O stuck for half a minute.
const DEFAULTS: Case = Case {
    daemon: "",
    device: "",
    drain_seconds: 10,
    job_seconds: 40,
    rounds: &[(Duration::from_millis(500), Duration::from_secs(30))],
};

pub(super) fn stops(lab: &Lab) -> Result<Outcome> {
    let told = [SHORT, DEFAULTS].iter().map(|case| stops_in(lab, case)).collect::<Result<Vec<_>>>()?;
    Ok(Outcome::Passed(told.join("; by default: ")))
}

fn stops_in(lab: &Lab, case: &Case) -> Result<String> {
    // What is given up may take 5 s; the rest is a slow machine's share.
    let stop_max = Duration::from_secs(case.drain_seconds + 5 + 8);
    let mut served = Served::start_with(lab, case.daemon, case.device, 2, false)?;
    let mut guest = boot(lab, "reconnect.cfg", Firmware::SeaBios, served.scratch().path(), &[])?;
    let load = fio::start(&mut guest, &verify_options(lab.accel, case.job_seconds))?;
    let mut longest = Duration::ZERO;
    for (number, (before, in_all)) in case.rounds.iter().enumerate() {
        served.serve.await_writes(DISK, 500)?;
        let target = served.target.as_mut().ok_or("the disk is not remote")?;
        target.pause()?;
        let silent_since = Instant::now();
        // Some requests are under way by now.
        std::thread::sleep(*before);
        let since = Instant::now();
        guest.monitor("stop", "{}").map_err(|e| served.serve.explain(&e))?;
        let took = since.elapsed();
        longest = longest.max(took);
        progress(&format!("the VM was stopped after {:.1} s", took.as_secs_f64()));
        if took > stop_max {
            return Err(served.serve.explain(&format!("stopping the VM took {took:?}")));
        }
        // It runs again before its target does: its rings wait.
        guest.monitor("cont", "{}")?;
        let rest = in_all.saturating_sub(silent_since.elapsed()).max(Duration::from_secs(2));
        std::thread::sleep(rest);
        served.target.as_mut().ok_or("the disk is not remote")?.go_on()?;
        if number + 1 < case.rounds.len() {
            served.serve.await_writes(DISK, 500)?;
        }
    }
    let seconds = u64::from(case.job_seconds);
    let report = fio::finish(&mut guest, load, seconds).map_err(|e| served.serve.explain(&e))?;
    let silent = case.rounds.iter().map(|(_, in_all)| in_all.as_secs_f64()).fold(0.0, f64::max);
    // A stopped VM's clock stands.
    if report.latency_max < (silent - longest.as_secs_f64() - 1.0).max(2.0) {
        return Err(format!("the longest request took {:.3} s: nothing was stuck", report.latency_max));
    }
    expect_no_trace(&mut guest)?;
    guest.sync_and_quit()?;
    served.stop()?;
    Ok(format!(
        "target silent for up to {silent:.0} s, VM stopped {} times, after {:.1} s at most; {:.0} I/Os verified, 0 errors, longest pause {:.1} s",
        case.rounds.len(),
        longest.as_secs_f64(),
        report.ios,
        report.latency_max
    ))
}
