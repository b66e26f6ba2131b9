//! One history: what its plan says happens, while guests go on; then all is well again, nothing may be lost, and mirrors agree.

use crate::cast::{Cast, Crash, Health};
use crate::events;
use crate::model::Op;
use crate::plan::{Event, Plan};
use crate::runner::Seen;
use hawser_block::Device;
use hawser_sim::Random;
use hawser_volume::pool::{MemberState, PoolError};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

/// Which of the plan's events happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// The first so many,
    pub(crate) events: usize,
    /// without these.
    pub(crate) skip: Vec<usize>,
}

/// Lets the history happen.
///
/// # Errors
/// What was broken.
pub(crate) fn happen(plan: Plan, limits: &Limits) -> Result<Seen, String> {
    let mut cast = Cast::new(plan);
    let result = catch_unwind(AssertUnwindSafe(|| match happen_to(&mut cast, limits) {
        Err(_) if cast.is_half_written => Ok(Seen { trace: cast.world.trace(), counts: counts(&cast) }),
        result => result,
    }));
    let result = result.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Err(format!("panic: {}", text.unwrap_or_default()))
    });
    if result.is_err() {
        if let Some(id) = crate::sought() {
            cast.tell_where(id);
        }
        // Whatever is broken may not come to an end.
        std::mem::forget(cast);
    }
    result
}

/// The fewest events with which a history still fails, and how it is run again.
pub(crate) fn shrink(plan: &Plan) -> String {
    let fails = |limits: &Limits| happen(plan.clone(), limits).err();
    let mut limits = Limits { events: plan.events.len(), skip: Vec::new() };
    let shortest =
        (0..plan.events.len()).find(|count| fails(&Limits { events: *count, skip: vec![] }).is_some());
    limits.events = shortest.unwrap_or(limits.events);
    for at in 0..limits.events {
        let mut fewer = limits.clone();
        fewer.skip.push(at);
        if fails(&fewer).is_some() {
            limits = fewer;
        }
    }
    let events: Vec<&Event> =
        (0..limits.events).filter(|at| !limits.skip.contains(at)).map(|at| &plan.events[at]).collect();
    let skip: Vec<String> = limits.skip.iter().map(usize::to_string).collect();
    let skip = if skip.is_empty() { String::new() } else { format!(" --skip {}", skip.join(",")) };
    let why = fails(&limits).unwrap_or_else(|| "it does not fail any more".to_owned());
    let Plan { level, members, block_size, strip_bytes, extent_bytes, region_bytes, .. } = plan;
    format!(
        " --events {}{skip}\n  shortest: {events:?} ({why})\n  {level:?} of {members}, blocks {}, strips {strip_bytes}, extents {extent_bytes}, regions {region_bytes}",
        limits.events,
        block_size.bytes(),
    )
}

fn happen_to(cast: &mut Cast, limits: &Limits) -> Result<Seen, String> {
    cast.create()?;
    cast.start(false)?;
    for number in 0..cast.plan.volumes {
        let size = cast.plan.volume_bytes >> cast.plan.block_size.shift();
        events::begin_change(cast, Op::Create(format!("v0{number}"), size))?;
        cast.wait("the first volume", &mut |cast| cast.change.is_none())?;
        if cast.plan.lanes > 1 {
            cast.new_queue(&format!("v0{number}"));
        }
    }
    cast.attach_all();
    let all = cast.plan.events.clone();
    for (at, event) in all.into_iter().enumerate() {
        // Each event's chances are its own, whatever was left out before it.
        cast.random = Random::new(cast.plan.seed.wrapping_mul(31).wrapping_add(at as u64) ^ 0xe7e7);
        if at >= limits.events {
            break;
        }
        if limits.skip.contains(&at) {
            continue;
        }
        verify_if_due(cast)?;
        cast.go_on(16);
        if cast.random.chance(250) {
            // Long enough for what pools do when nothing happens.
            let pause = Duration::from_millis(1000 + cast.random.below(3000));
            cast.pass(cast.world.now() + pause, &mut |_| false)?;
            cast.go_on(8);
        }
        let most = if cast.random.chance(300) { 600_000_000u64 } else { 40_000_000 };
        let shift = cast.random.below(10);
        let until = cast.world.now() + Duration::from_nanos(20_000 + cast.random.below(most >> shift));
        cast.pass(until, &mut |_| false)?;
        cast.take_roll();
        cast.world.note(&[5, event as u64, cast.world.now().0]);
        if crate::tells() {
            println!("{:?} event {at} {event:?}", cast.world.now());
        }
        events::strike(cast, event)?;
    }
    mend(cast)?;
    let splits = cast.plan.events.last() == Some(&Event::Split)
        && limits.events >= cast.plan.events.len()
        && !limits.skip.contains(&(cast.plan.events.len() - 1));
    if splits {
        split(cast)?;
    }
    end(cast)?;
    Ok(Seen { trace: cast.world.trace(), counts: counts(cast) })
}

/// After a restart everything is read before it is written again, mostly.
fn verify_if_due(cast: &mut Cast) -> Result<(), String> {
    if !std::mem::take(&mut cast.wants_verify) {
        return Ok(());
    }
    cast.verify_all();
    if cast.random.chance(700) {
        verified(cast)?;
    }
    Ok(())
}

fn verified(cast: &mut Cast) -> Result<(), String> {
    cast.wait("reading everything", &mut |cast| {
        cast.queues.iter().all(|queue| queue.guest.borrow().to_verify.is_empty())
    })
}

/// Everything works again, and everything comes to its end.
fn mend(cast: &mut Cast) -> Result<(), String> {
    cast.shared.trap.clear();
    cast.is_mended = true;
    events::heal_all(cast);
    cast.wait("what was asked for", &mut |cast| cast.change.is_none() && cast.asks.is_empty())?;
    let is_failed = cast.pool.as_ref().is_some_and(|pool| pool.view().is_failed);
    if is_failed {
        if cast.plan.is_redundant() {
            return Err(format!("the pool has failed: {}", cast.state()));
        }
        cast.count("pools_that_failed");
        cast.die(Crash::Kill)?;
    }
    cast.wait("everything", &mut |cast| cast.is_idle())?;
    cast.shared.rules.borrow_mut().may_fail = false;
    whole(cast)?;
    cast.verify_all();
    cast.wait("everything", &mut |cast| cast.is_idle())?;
    cast.shared.models.borrow_mut().check_instants()?;
    if cast.plan.is_redundant() {
        if cast.members.iter().any(|member| !member.disk.state().media_errors.is_empty()) {
            scrub(cast, true)?;
        }
        for member in &cast.members {
            member.disk.state().media_errors.clear();
        }
        let mismatches = scrub(cast, false)?;
        if mismatches > 0 {
            return Err(format!("mirrors differ in {mismatches} places when all is mended"));
        }
    }
    Ok(())
}

/// All members have all the data.
fn whole(cast: &mut Cast) -> Result<(), String> {
    if !cast.plan.is_redundant() && cast.replacement().is_none() {
        return Ok(());
    }
    let mut asked_at = cast.world.now();
    events::return_members(cast);
    let mut tries = 0;
    cast.wait("bringing members up to date", &mut |cast| {
        // A disk that was refused, or was not missed yet, is offered again.
        if cast.asks.is_empty() && tries < 20 && cast.world.now() > asked_at + Duration::from_secs(1) {
            asked_at = cast.world.now();
            tries += 1;
            cast.take_roll();
            events::return_members(cast);
            events::fill_places(cast);
        }
        cast.asks.is_empty() && cast.is_whole()
    })?;
    cast.take_roll();
    Ok(())
}

/// Compares members; how many places differ.
fn scrub(cast: &mut Cast, repair: bool) -> Result<u64, String> {
    let pool = cast.pool.clone().ok_or("the pool is open")?;
    for attempt in 0.. {
        cast.wait("the scrub before", &mut |cast| !cast.is_scrubbed())?;
        match cast.ask("a scrub", pool.scrub(repair))? {
            Ok(()) => break,
            // One waits for its turn.
            Err(PoolError::Conflict(_)) if attempt < 20 => {
                let later = cast.world.now() + Duration::from_millis(300);
                cast.pass(later, &mut |_| false)?;
            }
            Err(why) => return Err(format!("a scrub: {why:?}")),
        }
    }
    let task = |pool: &hawser_volume::pool::Pool| {
        let view = pool.view();
        view.tasks.into_iter().rev().find(|task| task.kind == "scrub")
    };
    cast.wait("a scrub", &mut |_| task(&pool).is_some_and(|task| task.is_done))?;
    cast.count("scrubs");
    Ok(task(&pool).map_or(0, |task| task.mismatches))
}

/// Each half of a mirror is used without the other; together they are refused.
fn split(cast: &mut Cast) -> Result<(), String> {
    let halves: Vec<usize> = (0..cast.members.len()).filter(|at| !cast.members[*at].is_retired).collect();
    let [first, second] = halves[..] else { return Ok(()) };
    cast.close()?;
    let before = cast.shared.models.borrow().clone();
    cast.keeps_dead = true;
    for (here, away) in [(first, second), (second, first)] {
        *cast.shared.models.borrow_mut() = before.clone();
        cast.members[away].health = Health::Dead;
        cast.members[here].health = Health::Good;
        cast.start(false)?;
        verify_if_due(cast)?;
        cast.go_on(20);
        if cast.random.chance(500) {
            let most = cast.random.below(20_000_000);
            cast.pass(cast.world.now() + Duration::from_nanos(most), &mut |_| false)?;
            // What ends it matters to nobody.
        }
        cast.wait("everything", &mut |cast| cast.is_idle())?;
        cast.close()?;
    }
    cast.count("splits");
    cast.members[first].health = Health::Good;
    if let Some(how) = cast.opens_split()? {
        return Err(format!("two halves that each went on alone are opened together: {how}"));
    }
    // The second is right.
    cast.members[first].disk.state().wipe();
    cast.members[first].health = Health::Dead;
    cast.start(false)?;
    cast.keeps_dead = false;
    cast.members[first].health = Health::Good;
    let (pool, disk) = (cast.pool.clone().ok_or("it is open")?, cast.members[first].disk.clone());
    let name = events::name_or_place(cast, disk.name());
    let ask = pool.replace(&name, disk, false);
    cast.ask("replacing a half", ask)?.map_err(|why| format!("replacing a half: {why:?}"))?;
    mend(cast)
}

/// At the end: space comes back, what is durable stays, and a check finds nothing.
fn end(cast: &mut Cast) -> Result<(), String> {
    if cast.shared.rules.borrow().no_space > 0 {
        give_space_back(cast)?;
    }
    let pool = cast.pool.clone().ok_or("the pool is open")?;
    cast.ask("sync", pool.sync())?.map_err(|why| format!("sync: {why:?}"))?;
    drop(pool);
    cast.shared.models.borrow_mut().all_durable();
    cast.die(Crash::Cut)?;
    cast.wants_verify = false;
    cast.verify_all();
    cast.wait("everything", &mut |cast| cast.is_idle())?;
    whole(cast)?;
    cast.close()?;
    cast.start_for_check()?;
    cast.check(true)?;
    cast.end_check();
    Ok(())
}

/// Whoever deletes enough can write again.
fn give_space_back(cast: &mut Cast) -> Result<(), String> {
    let names = cast.shared.models.borrow().names();
    for name in names.into_keys() {
        events::begin_change(cast, Op::Delete(name))?;
        cast.wait("deletion", &mut |cast| cast.change.is_none())?;
    }
    let size = (384 << 10) >> cast.plan.block_size.shift();
    events::begin_change(cast, Op::Create("last".to_owned(), size))?;
    cast.wait("the last volume", &mut |cast| cast.change.is_none())?;
    let later = cast.world.now() + Duration::from_secs(10);
    cast.pass(later, &mut |_| false)?;
    cast.shared.rules.borrow_mut().may_lack_space = false;
    cast.go_on(10);
    cast.wait("everything", &mut |cast| cast.is_idle())?;
    let view = cast.pool.as_ref().map(hawser_volume::pool::Pool::view);
    let is_there = view.is_some_and(|view| {
        let used = view.size_bytes - view.free_bytes;
        let most = (384u64 << 10).div_ceil(view.extent_bytes) * view.extent_bytes;
        used <= most && view.members.iter().all(|member| member.state != MemberState::Missing)
    });
    if is_there { Ok(()) } else { Err(format!("space does not come back: {}", cast.state())) }
}

fn counts(cast: &Cast) -> std::collections::BTreeMap<&'static str, u64> {
    let mut counts = cast.counts.clone();
    let rules = cast.shared.rules.borrow();
    let disks = || cast.members.iter().map(|member| member.disk.state());
    counts.extend([
        ("requests", rules.ended),
        ("failed_requests", rules.failed),
        ("no_space", rules.no_space),
        ("replayed_requests", rules.replayed),
        ("verifying_reads", rules.verified),
        ("torn_writes", disks().map(|disk| disk.torn_writes).sum()),
        ("ghost_writes", disks().map(|disk| disk.ghost_writes).sum()),
        ("lost_blocks", disks().map(|disk| disk.lost_blocks).sum()),
        ("seconds", cast.world.now().0 / 1_000_000_000),
    ]);
    counts
}
