//! `hawser pool create|list|status|check|replace|scrub|grow|add-spare`

use super::offline::{Offline, Purpose, WhereArgs};
use super::pool_show::{faults_of, table_of, text_of};
use super::progress::{is_watched, watch};
use super::table;
use super::{Failure, all_is_shown, print_json, say};
use crate::assemble::pool as assemble;
use crate::daemon::api::pool_view::{AddDevices, CreatePool, PoolState, PoolView, Replace, Scrub, TaskView};
use clap::{Args, Subcommand};
use hawser_config::value::{ByteSize, Name};
use hawser_volume::pool;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;

#[derive(Subcommand)]
pub(super) enum PoolCommand {
    /// Make a pool of devices; what is on them is lost
    Create(CreateArgs),
    /// Show all pools
    List(ListArgs),
    /// Show pools with their members; the exit code is 1 when one is not as it should be
    Status(StatusArgs),
    /// Verify all that a pool's devices say of it, without a daemon, and name each fault; data and parity are compared by `pool scrub`
    Check(CheckArgs),
    /// Put a device in the place of a member, which stays in service until that has all the data
    Replace(ReplaceArgs),
    /// Compare the members of a pool; the next start goes on with what has not ended
    Scrub(ScrubArgs),
    /// Append another set of as many members
    Grow(GrowArgs),
    /// Give a pool a device that takes the place of a member that is away for long
    AddSpare(SpareArgs),
}

#[derive(Args)]
pub(super) struct CreateArgs {
    /// The new pool's name
    name: Name,
    /// Devices, by their names in the configuration; their order is that of the members, spares last
    #[arg(required = true, value_name = "DEVICE")]
    devices: Vec<String>,
    /// linear, raid0, raid1 (2 to 4 members), raid10, raid5 (3 or more) or raid6 (4 or more)
    #[arg(long, value_name = "LEVEL")]
    raid: String,
    /// What of one member follows on what of another: 4KiB to 1MiB
    #[arg(long, value_name = "SIZE", default_value = "64KiB")]
    strip: ByteSize,
    /// The unit of allocation, 4KiB to 64MiB; made whole stripes
    #[arg(long, value_name = "SIZE", default_value = "1MiB")]
    extent: ByteSize,
    /// Room for the log of mapping changes on each member
    #[arg(long, value_name = "SIZE", default_value = "16MiB")]
    log: ByteSize,
    /// Room for mappings on each member, of which less than half can be used; by the pool's size if not said
    #[arg(long, value_name = "SIZE")]
    metadata_size: Option<ByteSize>,
    /// How many of the devices are spares
    #[arg(long, value_name = "N", default_value_t = 0)]
    spares: usize,
    /// Take devices that belong to another pool all the same
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    at: WhereArgs,
}

#[derive(Args)]
pub(super) struct ListArgs {
    #[command(flatten)]
    at: WhereArgs,
}

#[derive(Args)]
pub(super) struct StatusArgs {
    /// The pool; all of them if not said
    name: Option<Name>,
    #[command(flatten)]
    at: WhereArgs,
}

#[derive(Args)]
pub(super) struct CheckArgs {
    /// The pool
    name: Name,
    #[command(flatten)]
    at: WhereArgs,
}

#[derive(Args)]
pub(super) struct ReplaceArgs {
    /// The pool
    name: Name,
    /// The member's device; or its place, if it is missing
    #[arg(required_unless_present = "abort")]
    old: Option<String>,
    /// The device that takes its place
    #[arg(required_unless_present = "abort")]
    new: Option<String>,
    /// Give up a replacement that is under way: the member stays, the device belongs to nobody
    #[arg(long, conflicts_with_all = ["old", "new", "force", "wait"])]
    abort: bool,
    /// Take a device that belongs to another pool all the same
    #[arg(long)]
    force: bool,
    /// Wait until the new member has all the data
    #[arg(long)]
    wait: bool,
    #[command(flatten)]
    at: WhereArgs,
}

#[derive(Args)]
pub(super) struct ScrubArgs {
    /// The pool
    name: Name,
    /// Rewrite what differs
    #[arg(long)]
    repair: bool,
    /// Wait until it has ended; the exit code is 1 when members differ, or when something could not be compared or rewritten
    #[arg(long)]
    wait: bool,
    #[command(flatten)]
    at: WhereArgs,
}

#[derive(Args)]
pub(super) struct GrowArgs {
    /// The pool
    name: Name,
    /// As many devices as the pool has members
    #[arg(required = true, value_name = "DEVICE")]
    devices: Vec<String>,
    /// Take devices that belong to another pool all the same
    #[arg(long)]
    force: bool,
    /// Wait until all work that follows has ended
    #[arg(long)]
    wait: bool,
    #[command(flatten)]
    at: WhereArgs,
}

#[derive(Args)]
pub(super) struct SpareArgs {
    /// The pool
    name: Name,
    /// The device
    device: String,
    /// Take a device that belongs to another pool all the same
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    at: WhereArgs,
}

/// What `pool check --json` prints.
#[derive(Serialize)]
struct CheckView {
    faults: Vec<String>,
    checked: BTreeMap<&'static str, u64>,
}

pub(super) fn run(command: &PoolCommand) -> Result<(), Failure> {
    match command {
        PoolCommand::Create(args) => create(args),
        PoolCommand::List(ListArgs { at }) => {
            let (pools, left_out) = views(at)?;
            if at.json {
                print_json(&pools)?;
            } else {
                say(&table_of(&pools));
            }
            all_is_shown(&left_out)
        }
        PoolCommand::Status(args) => status(args),
        PoolCommand::Check(args) => check(args),
        PoolCommand::Replace(args) => replace(args),
        PoolCommand::Scrub(args) => scrub(args),
        PoolCommand::Grow(args) => {
            let body = AddDevices { devices: args.devices.clone(), force: args.force };
            let pool = change(&args.at, args.name.as_str(), "grow", &body, args.wait, |offline, pool| {
                let devices =
                    args.devices.iter().map(|name| offline.device(name)).collect::<Result<_, _>>()?;
                Ok(pool.grow(devices, args.force).wait()?)
            })?;
            show(&args.at, &pool, "grown")
        }
        PoolCommand::AddSpare(args) => {
            let body = AddDevices { devices: vec![args.device.clone()], force: args.force };
            let pool = change(&args.at, args.name.as_str(), "spares", &body, false, |offline, pool| {
                Ok(pool.add_spare(offline.device(&args.device)?, args.force).wait()?)
            })?;
            show(&args.at, &pool, "has a new spare")
        }
    }
}

fn create(args: &CreateArgs) -> Result<(), Failure> {
    let CreateArgs { name, devices, raid, strip, extent, log, metadata_size, spares, force, at } = args;
    let metadata_bytes = metadata_size.map(|size| size.0);
    let level = assemble::level(raid).map_err(|what| Failure::Usage(format!("--raid: {what}")))?;
    let strip_bytes = u32::try_from(strip.0);
    let strip_bytes = strip_bytes
        .map_err(|_| Failure::Usage(format!("--strip: {strip} is too large, want 4KiB to 1MiB")))?;
    let pool: PoolView = match &at.config {
        None => {
            let create = CreatePool {
                name: name.to_string(),
                level: raid.clone(),
                devices: devices.clone(),
                strip_bytes: Some(strip_bytes),
                extent_bytes: Some(extent.0),
                log_bytes: Some(log.0),
                metadata_bytes,
                spares: *spares,
                force: *force,
            };
            at.client().post("/v1/pools", Some(&create))?
        }
        Some(file) => {
            let uuid = assemble::new_uuid().map_err(Failure::Failed)?;
            let mut options = pool::CreateOptions::new(name.as_str(), uuid, level);
            (options.strip_bytes, options.extent_bytes) = (strip_bytes, extent.0);
            (options.log_bytes, options.metadata_bytes) = (log.0, metadata_bytes);
            (options.spares, options.force) = (*spares, *force);
            let offline = Offline::begin(at, file, Purpose::Change)?;
            let created = offline.create(devices, options);
            offline.end(created)
        }
    };
    // Whole stripes: not always what was asked for.
    let rounded = pool.extent_bytes.filter(|bytes| *bytes != extent.0);
    let rounded = rounded.map(|bytes| format!(" with extents of {}", table::bytes(bytes)));
    show(at, &pool, &format!("created{}", rounded.unwrap_or_default()))
}

/// All pools, open or not; and what cannot be seen without a daemon.
fn views(at: &WhereArgs) -> Result<(Vec<PoolView>, Vec<String>), Failure> {
    let Some(file) = &at.config else { return Ok((at.client().get("/v1/pools")?, Vec::new())) };
    let offline = Offline::begin(at, file, Purpose::Look)?;
    let mut views: Vec<PoolView> = Vec::new();
    let mut left_out = offline.left_out();
    let all = offline.found();
    for found in &all {
        let seen = match offline.open_found(found) {
            Ok(open) => {
                let mut view = assemble::pool_view(&open.pool.view());
                view.troubles.extend(found.missing_line());
                offline.close(open).map(|()| view)
            }
            Err(failure) => Err(failure),
        };
        views.push(match seen {
            Ok(view) => view,
            Err(Failure::Usage(what) | Failure::Failed(what)) => {
                left_out.push(format!("pool {}", found.label.pool));
                found.view(vec![what])
            }
        });
    }
    views.sort_by(|one, other| (&one.name, &one.uuid).cmp(&(&other.name, &other.uuid)));
    Ok(offline.end(Ok((views, left_out))))
}

fn status(args: &StatusArgs) -> Result<(), Failure> {
    let (mut pools, left_out) = views(&args.at)?;
    if let Some(name) = &args.name {
        let names: Vec<String> = pools.iter().map(|pool| pool.name.clone()).collect();
        pools.retain(|pool| pool.name == name.as_str());
        if pools.is_empty() {
            let there = if names.is_empty() {
                "there is none".to_owned()
            } else {
                format!("there are {}", names.join(", "))
            };
            return Err(Failure::Failed(format!("pool \"{name}\" is not there; {there}")));
        }
    }
    if args.at.json {
        print_json(&pools)?;
    } else {
        let texts: Vec<String> = pools.iter().map(text_of).collect();
        say(&texts.join("\n"));
    }
    let wrong: Vec<String> = pools
        .iter()
        .filter(|pool| pool.state != PoolState::Ready)
        .map(|pool| format!("{} is {}", pool.name, pool.state.name()))
        .collect();
    match wrong.as_slice() {
        // A device that nobody can look at may be another pool's.
        [] if args.name.is_none() => all_is_shown(&left_out),
        [] => Ok(()),
        wrong => Err(Failure::Failed(format!("pool {}", wrong.join(", pool ")))),
    }
}

fn check(args: &CheckArgs) -> Result<(), Failure> {
    let Some(file) = &args.at.config else {
        let what = "a pool is checked without a daemon, want --config FILE; `pool scrub` compares members while serving";
        return Err(Failure::Usage(what.to_owned()));
    };
    let report = check_offline(&args.at, file, args.name.as_str())?;
    if args.at.json {
        let checked = report.checked.iter().copied().collect();
        print_json(&CheckView { faults: report.faults.clone(), checked })?;
    } else {
        let mut text: String = report.faults.iter().map(|fault| format!("{fault}\n")).collect();
        let checked: Vec<String> =
            report.checked.iter().map(|(what, count)| format!("{count} {what}")).collect();
        text.push_str(&format!("pool {}: checked {}\n", args.name, checked.join(", ")));
        say(&text);
    }
    match report.faults.len() {
        0 => Ok(()),
        1 => Err(Failure::Failed(format!("pool {}: 1 fault", args.name))),
        count => Err(Failure::Failed(format!("pool {}: {count} faults", args.name))),
    }
}

fn check_offline(at: &WhereArgs, file: &Path, name: &str) -> Result<pool::CheckReport, Failure> {
    let offline = Offline::begin(at, file, Purpose::Look)?;
    let checked = offline.find(name).and_then(|found| {
        let report = pool::check(offline.reactor(), offline.members(&found)).wait();
        let mut report = report.map_err(|error| offline.explained(&found, error))?;
        let missing = std::mem::take(&mut report.missing);
        report.faults.splice(0..0, missing.into_iter().map(|what| offline.and_others(&found, what)));
        Ok(report)
    });
    Ok(offline.end(checked))
}

fn replace(args: &ReplaceArgs) -> Result<(), Failure> {
    let (Some(old), Some(new)) = (&args.old, &args.new) else {
        return abort_replace(args);
    };
    let body = Replace { old: old.clone(), new: new.clone(), force: args.force };
    let pool = change(&args.at, args.name.as_str(), "replace", &body, args.wait, |offline, pool| {
        Ok(pool.replace(old, offline.device(new)?, args.force).wait()?)
    })?;
    let is_under_way = pool.members.iter().any(|member| member.state == pool::MemberState::Replacing.name());
    let what = if is_under_way { "copies to" } else { "has" };
    show(&args.at, &pool, &format!("{what} {new} in the place of {old}"))
}

fn abort_replace(args: &ReplaceArgs) -> Result<(), Failure> {
    let pool: PoolView = match &args.at.config {
        None => args.at.client().delete(&format!("/v1/pools/{}/replace", args.name))?,
        Some(file) => {
            let offline = Offline::begin(&args.at, file, Purpose::Change)?;
            let done = offline.with_pool(args.name.as_str(), |_, pool| {
                pool.abort_replace().wait()?;
                Ok(assemble::pool_view(&pool.view()))
            });
            offline.end(done)
        }
    };
    show(&args.at, &pool, "keeps its member")
}

fn scrub(args: &ScrubArgs) -> Result<(), Failure> {
    let body = Scrub { repair: args.repair };
    let pool = change(&args.at, args.name.as_str(), "scrub", &body, args.wait, |_, pool| {
        Ok(pool.scrub(args.repair).wait()?)
    })?;
    let task = pool.tasks.iter().rev().find(|task| task.kind == "scrub");
    let Some(task) = task.filter(|task| task.done) else {
        show(&args.at, &pool, "is being scrubbed")?;
        let state = pool.state.name();
        return match args.wait {
            true => Err(Failure::Failed(format!("pool {}: {state}, and the scrub has not ended", args.name))),
            false => Ok(()),
        };
    };
    let (what, wrong) = outcome(task, args.repair);
    show(&args.at, &pool, &what)?;
    match wrong {
        None => Ok(()),
        Some(wrong) => Err(Failure::Failed(format!("pool {}: {wrong}", args.name))),
    }
}

/// What a scrub has come to, and what is wrong.
fn outcome(task: &TaskView, repair: bool) -> (String, Option<String>) {
    let mut found = Vec::new();
    let faults = faults_of(task);
    match (task.mismatches, task.failures) {
        (0, 0) => {}
        (count, 0) if repair => found.push(format!("{count} units differed{faults} and were rewritten")),
        (count, _) if count > 0 => found.push(format!("{count} units differ{faults}")),
        _ => {}
    }
    match (task.failures, repair) {
        (0, _) => {}
        (count, false) => found.push(format!("{count} units could not be compared")),
        (count, true) => found.push(format!("{count} units could not be compared or rewritten")),
    }
    if let Some(why) = &task.cut_short {
        let found =
            if found.is_empty() { String::new() } else { format!("; until then {}", found.join(", ")) };
        return (
            "is not scrubbed to its end".to_owned(),
            Some(format!("the scrub has ended early: {why}{found}")),
        );
    }
    if found.is_empty() {
        return ("scrubbed, members do not differ".to_owned(), None);
    }
    let what = format!("scrubbed, {}", found.join(", "));
    let wrong = match (task.mismatches, task.failures, repair) {
        (_, 0, true) => None,
        (_, 0, false) => Some(format!("{}, want --repair to rewrite them", found.join(", "))),
        _ => Some(found.join(", ")),
    };
    (what, wrong)
}

/// Changes a pool, through its daemon or without one, and waits for the work that follows where somebody looks, or asked for it.
/// Without a daemon there is nobody else to do it.
fn change(
    at: &WhereArgs,
    name: &str,
    action: &str,
    body: &impl Serialize,
    wait: bool,
    offline_change: impl FnOnce(&Offline, &pool::Pool) -> Result<(), Failure>,
) -> Result<PoolView, Failure> {
    match &at.config {
        None => {
            let client = at.client();
            let pool: PoolView = client.post(&format!("/v1/pools/{name}/{action}"), Some(body))?;
            if !wait && !is_watched() {
                return Ok(pool);
            }
            watch(|| client.get(&format!("/v1/pools/{name}")))
        }
        Some(file) => {
            let offline = Offline::begin(at, file, Purpose::Change)?;
            let done = offline.with_pool(name, |offline, pool| {
                offline_change(offline, pool)?;
                watch(|| Ok(assemble::pool_view(&pool.view())))
            });
            Ok(offline.end(done))
        }
    }
}

fn show(at: &WhereArgs, pool: &PoolView, what: &str) -> Result<(), Failure> {
    if at.json {
        return print_json(pool);
    }
    let size =
        pool.size_bytes.map_or_else(String::new, |size| format!(": {}, {}", pool.level, table::bytes(size)));
    say(&format!("pool {} {what}{size}\n", pool.name));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scrub_that_missed_something_is_no_success() {
        let task = |mismatches, failures, why: Option<&str>| TaskView {
            kind: "scrub".to_owned(),
            done_bytes: 4,
            total_bytes: 4,
            elapsed_seconds: 1,
            left_seconds: None,
            mismatches,
            // One of two is known.
            data_faults: u64::from(mismatches == 2),
            parity_faults: 0,
            failures,
            done: true,
            cut_short: why.map(str::to_owned),
        };
        type Case<'a> = (u64, u64, Option<&'a str>, bool, &'a str, Option<&'a str>);
        let lost = Some("another host has opened it");
        let cases: [Case<'_>; 9] = [
            (0, 0, None, false, "scrubbed, members do not differ", None),
            (0, 0, None, true, "scrubbed, members do not differ", None),
            (2, 0, None, true, "scrubbed, 2 units differed (1 in data) and were rewritten", None),
            (
                2,
                0,
                None,
                false,
                "scrubbed, 2 units differ (1 in data)",
                Some("2 units differ (1 in data), want --repair to rewrite them"),
            ),
            (
                0,
                3,
                None,
                false,
                "scrubbed, 3 units could not be compared",
                Some("3 units could not be compared"),
            ),
            (
                2,
                1,
                None,
                true,
                "scrubbed, 2 units differ (1 in data), 1 units could not be compared or rewritten",
                Some("2 units differ (1 in data), 1 units could not be compared or rewritten"),
            ),
            (
                2,
                3,
                None,
                false,
                "scrubbed, 2 units differ (1 in data), 3 units could not be compared",
                Some("2 units differ (1 in data), 3 units could not be compared"),
            ),
            (
                0,
                0,
                lost,
                true,
                "is not scrubbed to its end",
                Some("the scrub has ended early: another host has opened it"),
            ),
            (
                1,
                0,
                lost,
                false,
                "is not scrubbed to its end",
                Some("the scrub has ended early: another host has opened it; until then 1 units differ"),
            ),
        ];
        for (mismatches, failures, why, repair, what, wrong) in cases {
            let got = outcome(&task(mismatches, failures, why), repair);
            assert_eq!((got.0.as_str(), got.1.as_deref()), (what, wrong));
        }
    }
}
