//! A VM moves from QEMU to QEMU while it writes and verifies; some migrations are cancelled.

#![forbid(unsafe_code)]

use super::Outcome;
use super::pieces::{DISK, Served, boot, expect_no_trace, verify_options};
use crate::daemon::FrontEnd;
use crate::lab::Lab;
use crate::qemu::{Cancelled, Firmware, Qemu};
use crate::{Result, fio, progress};

/// Migrations that are carried out under one load.
const MIGRATIONS: u32 = 4;
const JOB_SECONDS: u32 = 60;

/// Fails unless exactly one front end is connected, whose rings run and who logs nothing.
fn expect_one_front_end(served: &mut Served) -> Result<()> {
    // The old one has ended; its session ends when the daemon has noticed.
    let deadline = crate::process::Deadline::new(20, "one front end, which serves");
    loop {
        let front_ends = served.serve.disk(DISK)?.front_ends;
        if front_ends == [FrontEnd { serving: true, logging: false }] {
            return Ok(());
        }
        deadline.nap().map_err(|e| served.serve.explain(&format!("{e}; there are {front_ends:?}")))?;
    }
}

/// Writes a file, and reads it back through an empty cache.
fn check_file(guest: &mut Qemu) -> Result<()> {
    guest
        .run_for(
            "set -e; dd if=/dev/urandom of=/root/a bs=64k count=16 2>/dev/null; sync
            before=$(sha256sum < /root/a); echo 3 > /proc/sys/vm/drop_caches
            [ \"$before\" = \"$(sha256sum < /root/a)\" ]",
            30,
        )
        .map(drop)
}

pub(super) fn migrates(lab: &Lab) -> Result<Outcome> {
    let mut served = Served::start(lab, 2, false)?;
    let mut guest = boot(lab, "migration.cfg", Firmware::SeaBios, served.scratch().path(), &[])?;
    let load = fio::start(&mut guest, &verify_options(lab.accel, JOB_SECONDS))?;
    let mut moves = || {
        let (mut longest_ms, mut seconds) = (0f64, 0.0);
        for number in 0..MIGRATIONS {
            served.serve.await_writes(DISK, 300)?;
            let cancelled = match number {
                1 => Some(Cancelled::WhileCopying),
                2 => Some(Cancelled::BeforeSwitchover),
                _ => None,
            };
            if let Some(when) = cancelled {
                guest.migrate_and_cancel(when)?;
                progress(&format!("migration cancelled {when:?}"));
                expect_one_front_end(&mut served)?;
                served.serve.await_writes(DISK, 300)?;
            }
            let moved = guest.migrate()?;
            progress(&format!("migration {number}: {:.1} s, {} ms down", moved.seconds, moved.downtime_ms));
            (longest_ms, seconds) = (longest_ms.max(moved.downtime_ms), seconds + moved.seconds);
            expect_one_front_end(&mut served)?;
        }
        served.serve.await_writes(DISK, 300)?;
        Ok((longest_ms, seconds))
    };
    let moved: Result<(f64, f64)> = moves();
    let (longest_ms, seconds) = moved.map_err(|e| served.serve.explain(&e))?;
    let report =
        fio::finish(&mut guest, load, u64::from(JOB_SECONDS)).map_err(|e| served.serve.explain(&e))?;
    check_file(&mut guest)?;
    expect_no_trace(&mut guest)?;
    guest.sync_and_quit()?;
    served.stop()?;
    Ok(Outcome::Passed(format!(
        "{MIGRATIONS} migrations of {:.1} s, at most {longest_ms:.0} ms down, 2 cancelled; {:.0} I/Os verified, 0 errors",
        seconds / f64::from(MIGRATIONS),
        report.ios
    )))
}
