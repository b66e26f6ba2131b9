//! The back end dies, or is replaced, under a VM that writes and verifies.
//!
//! QEMU 7.2 never comes back from a back end that dies inside a reconnect's feature handshake, so the next blow falls only
//! when the new process has answered writes: then VRING_ENABLE is over.

#![forbid(unsafe_code)]

use super::Outcome;
use super::pieces::{DISK, Served, boot, expect_no_trace, verify_options};
use crate::fio::{self, Report};
use crate::lab::Lab;
use crate::qemu::{Firmware, Qemu};
use crate::{Result, progress};

/// Kills that fall into one fio job, and the job's length: QEMU dials once a second.
const BLOWS_PER_JOB: u32 = 5;
const JOB_SECONDS: u32 = 20;

/// Runs one fio job, and `blow` on the daemon `BLOWS_PER_JOB` times while it runs.
fn under_load(
    lab: &Lab,
    served: &mut Served,
    guest: &mut Qemu,
    mut blow: impl FnMut(&mut Served, u32) -> Result<()>,
) -> Result<Report> {
    let load = fio::start(guest, &verify_options(lab.accel, JOB_SECONDS))?;
    let mut blows = || {
        for number in 0..BLOWS_PER_JOB {
            // Somewhere into the load; the moment differs from blow to blow.
            served.serve.await_writes(DISK, 300 + 97 * number)?;
            blow(served, number)?;
        }
        served.serve.await_writes(DISK, 300)
    };
    let struck = blows();
    let report = fio::finish(guest, load, u64::from(JOB_SECONDS)).map_err(|e| served.serve.explain(&e))?;
    struck?;
    // QEMU dials again after a second: a load that waited for less was not there.
    if report.latency_max < 0.5 {
        return Err(format!(
            "the longest request took {:.3} s: the load missed the blows",
            report.latency_max
        ));
    }
    Ok(report)
}

fn finish(guest: Qemu, served: Served, jobs: &[Report], what: &str) -> Result<Outcome> {
    let mut guest = guest;
    expect_no_trace(&mut guest)?;
    guest.sync_and_quit()?;
    let (pause, ios) =
        jobs.iter().fold((0f64, 0.0), |(pause, ios), job| (pause.max(job.latency_max), ios + job.ios));
    served.stop()?;
    Ok(Outcome::Passed(format!("{what}; {ios:.0} I/Os verified, 0 errors, longest pause {pause:.2} s")))
}

/// `kill -9` and start again, twenty times in a row.
pub(super) fn kills(lab: &Lab) -> Result<Outcome> {
    let mut served = Served::start(lab, 2, false)?;
    let mut guest = boot(lab, "reconnect.cfg", Firmware::SeaBios, served.scratch().path(), &[])?;
    let mut jobs = Vec::new();
    let mut kills = 0;
    while kills < 20 {
        jobs.push(under_load(lab, &mut served, &mut guest, |served, _| {
            served.serve.kill()?;
            kills += 1;
            served.serve.launch()
        })?);
        progress(&format!("{kills} kills"));
    }
    finish(guest, served, &jobs, &format!("{kills} kills"))
}

/// `kill -9` of the owner of a `file:` device: its successor may write only when the dead one's last write has ended.
pub(super) fn kills_of_file_owner(lab: &Lab) -> Result<Outcome> {
    let mut served = Served::local(lab, 2)?;
    let mut guest = boot(lab, "reconnect.cfg", Firmware::SeaBios, served.scratch().path(), &[])?;
    let report = under_load(lab, &mut served, &mut guest, |served, _| {
        served.serve.kill()?;
        served.serve.launch()
    })?;
    finish(guest, served, &[report], &format!("{BLOWS_PER_JOB} kills"))
}

/// SIGTERM and start again; a newer binary in place of a killed one and of one that was told to end; and back.
pub(super) fn upgrades(lab: &Lab) -> Result<Outcome> {
    let mut served = Served::start(lab, 2, false)?;
    let newer = lab.newer_binary(served.scratch())?;
    let first_id = served.serve.status()?.text("build_id")?.to_owned();
    let mut guest = boot(lab, "reconnect.cfg", Firmware::SeaBios, served.scratch().path(), &[])?;
    let report = under_load(lab, &mut served, &mut guest, |served, number| {
        if number == 2 {
            served.serve.kill()?
        } else {
            served.serve.terminate()?
        }
        // 0: the same binary; 1, 2, 3: the newer one, by SIGTERM, by SIGKILL, after itself; 4: back to the older.
        let is_newer = (1..=3).contains(&number);
        served.serve.use_binary(if is_newer { &newer } else { &lab.hawser });
        served.serve.launch()?;
        let id = served.serve.status()?.text("build_id")?.to_owned();
        match (id != first_id) == is_newer {
            true => Ok(()),
            false => Err(format!(
                "restart {number}: the daemon's build ID is {id}, the first one's was {first_id}"
            )),
        }
    })?;
    finish(guest, served, &[report], "SIGTERM 4, newer binary 2, back to the older 1")
}
