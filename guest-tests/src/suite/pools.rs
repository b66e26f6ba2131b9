//! A VM on a clone in a pool over several targets, while everything happens to the pool at once.

#![forbid(unsafe_code)]

use super::Outcome;
use super::pieces::{DISK, KernelTarget, boot, expect_no_trace, verify_options};
use crate::image::{ROOT_BYTES, ROOT_START};
use crate::lab::Lab;
use crate::pools::{CLONE, MEMBER_BYTES, POOL, Pooled, View, target, the_disk, uri_of_target};
use crate::process::output;
use crate::qemu::Firmware;
use crate::scratch::Scratch;
use crate::{Result, fio};
use std::process::Command;

/// Seconds that a request may take: a member is waited for 2 s, and a daemon that comes back dials its targets.
const PAUSE_MAX: f64 = 12.0;

pub(super) fn raid1(lab: &Lab) -> Result<Outcome> {
    survives(lab, "raid1", 2)
}

pub(super) fn raid10(lab: &Lab) -> Result<Outcome> {
    survives(lab, "raid10", 3)
}

pub(super) fn raid5(lab: &Lab) -> Result<Outcome> {
    survives(lab, "raid5", 3)
}

pub(super) fn raid6(lab: &Lab) -> Result<Outcome> {
    survives(lab, "raid6", 4)
}

/// A member's target dies, of RAID 6 two; a snapshot and a clone are made of the running disk; the targets return, last first; the daemon is
/// killed. With parity another member is replaced then, one that has died (RAID 5) or serves on (RAID 6), and the daemon killed meanwhile.
fn survives(lab: &Lab, level: &str, members: usize) -> Result<Outcome> {
    let (away, is_replaced): (&[usize], bool) = match level {
        "raid6" => (&[1, 2], true),
        "raid5" => (&[1], true),
        _ => (&[1], false),
    };
    let mut pooled = Pooled::with_vm(lab, level, members, usize::from(is_replaced))?;
    let folder = pooled.scratch().path().to_path_buf();
    let mut guest = boot(lab, "reconnect.cfg", Firmware::SeaBios, &folder, &[])?;
    fio::begin(&mut guest, &verify_options(lab.accel, fio::UNTIL_ENDED))?;
    strike(&mut pooled, away)?;
    if is_replaced {
        replace(&mut pooled, members, level == "raid5")?;
    }
    let report = fio::end(&mut guest).map_err(|e| pooled.serve.explain(&e))?;
    if report.latency_max > PAUSE_MAX {
        return Err(pooled.serve.explain(&format!("a request took {:.1} s", report.latency_max)));
    }
    expect_no_trace(&mut guest)?;
    guest.run_for("sync", 30)?;
    pooled.wait("whole", View::is_whole)?;
    pooled.scrub()?;
    guest.quit()?;
    pooled.close(lab)?;
    is_sound(&pooled, "p0/vm1-copy")?;
    pooled.stop()?;
    Ok(Outcome::Passed(format!(
        "{} of {members} members away and back, snapshot, clone, kill -9{}; {:.0} I/Os verified, 0 errors, longest pause {:.2} s, members alike",
        away.len(),
        if is_replaced { ", one replaced, kill -9" } else { "" },
        report.ios,
        report.latency_max
    )))
}

fn strike(pooled: &mut Pooled, away: &[usize]) -> Result<()> {
    pooled.serve.await_writes(DISK, 500)?;
    for &member in away {
        pooled.targets[member].kill()?;
        pooled.wait("without its member", |view| {
            view.state == "degraded" && view.members[member] != "in_sync"
        })?;
        pooled.serve.await_writes(DISK, 300)?;
    }
    pooled.serve.command(&["volume", "snapshot", CLONE, "vm1-then"])?;
    pooled.serve.command(&["volume", "clone", "p0/vm1-then", "p0/vm1-copy"])?;
    pooled.serve.await_writes(DISK, 300)?;
    for &member in away.iter().rev() {
        pooled.targets[member].launch()?;
        pooled.wait("given its member back", |view| {
            ["syncing", "in_sync"].contains(&view.members[member].as_str())
        })?;
    }
    pooled.serve.kill()?;
    pooled.serve.launch()?;
    pooled.serve.await_writes(DISK, 300)?;
    pooled.wait("whole", View::is_whole).map(drop)
}

/// Member 0 becomes the device behind the last one, and the daemon dies on the way.
fn replace(pooled: &mut Pooled, members: usize, is_dead: bool) -> Result<()> {
    if is_dead {
        pooled.targets[0].kill()?;
        pooled.wait("without its member", |view| view.state == "degraded" && view.members[0] != "in_sync")?;
    }
    pooled.serve.command(&["pool", "replace", POOL, "0", &format!("m{members}")])?;
    pooled.serve.await_writes(DISK, 100)?;
    pooled.serve.kill()?;
    pooled.serve.launch()?;
    pooled.serve.await_writes(DISK, 300)?;
    pooled.wait("whole", View::is_whole)?;
    // What it was is nothing that the pool needs.
    if !is_dead {
        pooled.targets[0].kill()?;
        pooled.serve.await_writes(DISK, 300)?;
    }
    pooled.targets[0].launch()
}

/// A clone of a running VM's disk is what a power cut would have left: its file system mounts, and is sound.
fn is_sound(pooled: &Pooled, volume: &str) -> Result<()> {
    let (file, root) = (pooled.scratch().file("copy.raw"), pooled.scratch().file("copy.ext4"));
    pooled.export(volume, &file)?;
    let mut dd = Command::new("dd");
    dd.arg(format!("if={}", file.display())).arg(format!("of={}", root.display()));
    let (skip, count) = (ROOT_START >> 20, ROOT_BYTES >> 20);
    output(dd.args(["bs=1M", "conv=sparse"]).arg(format!("skip={skip}")).arg(format!("count={count}")))?;
    let found = Command::new("/sbin/e2fsck").args(["-f", "-p"]).arg(&root).output();
    let found = found.map_err(|e| format!("e2fsck does not start: {e}"))?;
    match found.status.code() {
        // 1: the journal was replayed, as after any power cut.
        Some(0 | 1) => Ok(()),
        _ => Err(format!("{volume}: e2fsck: {}", String::from_utf8_lossy(&found.stdout))),
    }
}

/// One member is the kernel's target, the other one of ours; the kernel's restarts under load.
pub(super) fn kernel_member(lab: &Lab) -> Result<Outcome> {
    let scratch = Scratch::new()?;
    let mut kernel = KernelTarget::start(lab, &scratch, MEMBER_BYTES)?;
    let ours = target(lab, &scratch, 1, MEMBER_BYTES)?;
    let uris = [kernel.uri(), uri_of_target(&ours, 1)?];
    let mut pooled = Pooled::create(lab, scratch, vec![ours], &uris, "raid1", &[the_disk()])?.serving(lab)?;
    let folder = pooled.scratch().path().to_path_buf();
    let mut guest = boot(lab, "reconnect.cfg", Firmware::SeaBios, &folder, &[])?;
    fio::begin(&mut guest, &verify_options(lab.accel, fio::UNTIL_ENDED))?;
    pooled.serve.await_writes(DISK, 300)?;
    kernel.end()?;
    pooled.wait("without its member", |view| view.state == "degraded" && view.members[0] != "in_sync")?;
    pooled.serve.await_writes(DISK, 300)?;
    kernel.launch(lab, pooled.scratch())?;
    pooled.wait("whole", View::is_whole)?;
    pooled.serve.await_writes(DISK, 300)?;
    let report = fio::end(&mut guest).map_err(|e| pooled.serve.explain(&e))?;
    expect_no_trace(&mut guest)?;
    guest.run_for("sync", 30)?;
    pooled.scrub()?;
    guest.quit()?;
    pooled.close(lab)?;
    pooled.stop()?;
    Ok(Outcome::Passed(format!(
        "nvmet away and back; {:.0} I/Os verified, 0 errors, longest pause {:.2} s, members alike",
        report.ios, report.latency_max
    )))
}
