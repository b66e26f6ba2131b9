//! How things happen: each event, once.

use crate::cast::{Cast, Crash, Health, Member};
use crate::model::Op;
use crate::plan::Event;
use hawser_block::{Device, Status};
use hawser_runtime::Instant;
use hawser_sim::SimDisk;
use hawser_volume::pool::{MemberState, MemberView, NoSpacePolicy, Pool, PoolError};
use hawser_volume::raid::Level;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

const VOLUMES_MAX: usize = 8;

/// Lets it happen.
///
/// # Errors
/// What was broken meanwhile.
pub(crate) fn strike(cast: &mut Cast, event: Event) -> Result<(), String> {
    match event {
        Event::Pause => {}
        Event::Cut => return cast.die(Crash::Cut),
        Event::Kill => return cast.die(Crash::Kill),
        Event::CutAtStep | Event::KillAtStep => {
            cast.crash = if event == Event::CutAtStep { Crash::Cut } else { Crash::Kill };
            let most = [20, 100, 400][cast.random.index(3)];
            let steps = 1 + cast.random.below(most);
            cast.shared.trap.set(steps);
        }
        Event::Reopen => {
            return if cast.close()? { cast.start(false) } else { Ok(()) };
        }
        Event::Sync => {
            if let Some(pool) = &cast.pool {
                let ask = pool.sync();
                cast.asks.push(("sync".to_owned(), false, Box::pin(ask)));
            }
        }
        Event::Dies | Event::Errs | Event::Slow | Event::Power | Event::Media => fault(cast, event),
        Event::Lose => lose(cast),
        Event::Back => back(cast),
        Event::BackEmpty => back_empty(cast),
        Event::Replace => replace(cast),
        Event::AbortReplace => abort_replace(cast),
        Event::Spare => {
            let waiting = cast.pool.as_ref().map(|pool| {
                let view = pool.view();
                view.members.iter().filter(|member| member.place.is_none()).count()
            });
            if waiting == Some(0) && cast.plan.is_redundant() && cast.asks.is_empty() {
                add(cast, "add_spare", |pool, device| Box::pin(pool.add_spare(device, false)));
            }
        }
        Event::Scrub => {
            let is_possible = cast.plan.is_redundant() && cast.is_whole() && !cast.is_scrubbed();
            if let Some(pool) = cast.pool.clone().filter(|_| is_possible) {
                let repair = cast.random.chance(500);
                // One may wait for its turn already.
                cast.asks.push(("scrub".to_owned(), true, Box::pin(pool.scrub(repair))));
                if cast.plan.scenario != "calm" && cast.random.chance(300) {
                    // The next process goes on with it.
                    cast.crash = if cast.random.chance(500) { Crash::Cut } else { Crash::Kill };
                    let steps = 1 + cast.random.below(100);
                    cast.shared.trap.set(steps);
                }
            }
        }
        Event::Grow => grow(cast),
        Event::Create | Event::Snapshot | Event::Clone | Event::Delete | Event::Resize => {
            return change(cast, event);
        }
        Event::Fill => fill(cast),
        // At the end only.
        Event::Split => {}
    }
    Ok(())
}

fn choose(cast: &mut Cast, fits: impl Fn(&Cast, usize) -> bool) -> Option<usize> {
    let all: Vec<usize> = (0..cast.members.len())
        .filter(|at| !cast.members[*at].is_retired && !cast.members[*at].is_new)
        .filter(|at| fits(cast, *at))
        .collect();
    if all.is_empty() { None } else { Some(all[cast.random.index(all.len())]) }
}

fn fault(cast: &mut Cast, event: Event) {
    if event == Event::Slow {
        let Some(at) = choose(cast, |_, _| true) else { return };
        let most = [50_000u64, 2_000_000, 100_000_000][cast.random.index(3)];
        let (permille, shift) = ([0, 30, 200][cast.random.index(3)], cast.random.below(10));
        let stuck = cast.random.below(1_000_000_000 >> shift);
        let mut state = cast.members[at].disk.state();
        state.set_latency(Duration::from_nanos(most));
        // Longer than a member is waited for.
        let longer = if state.ignores_aborts { 16 } else { 1 };
        (state.stuck_permille, state.stuck_ns) = (permille, stuck * longer);
        drop(state);
        if cast.world.now() < cast.doubtful_until {
            cast.doubtful_until = noticed(cast);
        }
        return cast.count("slow");
    }
    let is_redundant = cast.plan.is_redundant();
    if !is_redundant && event != Event::Errs || event == Event::Power && !cast.plan.has_cache_identity {
        return;
    }
    let is_good = |cast: &Cast, at: usize| cast.members[at].health == Health::Good;
    let Some(at) = choose(cast, |cast, at| is_good(cast, at) && (!is_redundant || cast.can_lose(at))) else {
        return;
    };
    if crate::tells() {
        println!("{:?} {event:?} {}", cast.world.now(), cast.members[at].name());
    }
    if matches!(event, Event::Dies | Event::Errs) && cast.random.chance(300) {
        // And the process, while it finds that out.
        cast.crash = if cast.random.chance(500) { Crash::Cut } else { Crash::Kill };
        let steps = 1 + cast.random.below(16);
        cast.members[at].disk.state().trap_after_failure = Some(steps);
    }
    let disk = Arc::clone(&cast.members[at].disk);
    match event {
        Event::Dies => {
            disk.fail_all(Some([Status::Path, Status::Timeout, Status::Media][cast.random.index(3)]));
            cast.members[at].health = Health::Dead;
            cast.lost_until = lost(cast);
            let view = cast.pool.as_ref().map(Pool::view);
            // A spare may take a place without being asked. And who is out now may come back without it, and be alone with it later:
            // each of the two says that the other is out, and nobody who knows better is there.
            cast.members[at].is_outdated |= view.is_some_and(|view| {
                view.members
                    .iter()
                    .any(|member| member.place.is_none() || member.state != MemberState::InSync)
            });
            cast.count("deaths");
        }
        Event::Errs => {
            let mut state = disk.state();
            state.errors_permille = [20, 100, 500][cast.random.index(3)];
            // A member that is full must not leave a stripe half written, nor copies that differ.
            let error = [Status::Path, Status::Timeout, Status::Media, Status::NoSpace][cast.random.index(4)];
            state.error = error;
            drop(state);
            cast.members[at].health = Health::Faulty;
            cast.shared.rules.borrow_mut().may_fail |= !is_redundant || error == Status::NoSpace;
            cast.count("errors");
        }
        Event::Power => {
            disk.lose_power();
            cast.doubtful_until = noticed(cast);
            cast.lost_until = lost(cast);
            cast.count("members_without_power");
        }
        _ => {
            let mut lbas = Vec::new();
            let blocks = disk.geometry().map_or(0, |geometry| geometry.blocks);
            for _ in 0..1 + cast.random.below(20) {
                // Where something is, mostly.
                for _ in 0..20 {
                    let lba = cast.random.below(blocks);
                    let is_used = disk.state().blocks(lba, 1).iter().any(|byte| *byte != 0);
                    if is_used || cast.random.chance(20) {
                        lbas.push(lba);
                        break;
                    }
                }
            }
            disk.state().media_errors.extend(lbas);
            cast.members[at].health = Health::Faulty;
            cast.count("media_errors");
        }
    }
}

/// Caches are lost that nobody else makes good: it is told.
fn lose(cast: &mut Cast) {
    let all: Vec<usize> = (0..cast.members.len())
        .filter(|at| !cast.members[*at].is_retired && !cast.members[*at].is_new)
        .collect();
    let disks: Vec<Arc<SimDisk>> = match cast.plan.is_redundant() {
        true => all.iter().map(|at| Arc::clone(&cast.members[*at].disk)).collect(),
        false => vec![Arc::clone(&cast.members[all[cast.random.index(all.len())]].disk)],
    };
    if crate::tells() {
        let names: Vec<&str> = disks.iter().map(|disk| disk.name()).collect();
        println!("{:?} {names:?} lose their caches", cast.world.now());
    }
    // Nothing ends between them.
    disks.iter().for_each(|disk| disk.state().lose_cache_alone(true));
    let mut models = cast.shared.models.borrow_mut();
    {
        let mut rules = cast.shared.rules.borrow_mut();
        rules.must_be_told.extend(models.unflushed());
        (rules.may_tell_loss, rules.lost_at) = (models.lose_unflushed(), models.request());
        rules.lost_until = rules.lost_at;
        rules.straddling = cast.queues.iter().map(|queue| queue.guest.borrow().writes_under_way()).sum();
    }
    drop(models);
    disks.iter().for_each(|disk| disk.tell());
    cast.doubtful_until = noticed(cast);
    cast.lost_until = self::lost(cast);
    cast.count("caches_lost_for_good");
}

/// A disk is well again, and was maybe without power meanwhile.
fn heal(cast: &mut Cast, at: usize) {
    let disk = Arc::clone(&cast.members[at].disk);
    if crate::tells() {
        println!("{:?} heals {}", cast.world.now(), disk.name());
    }
    let was_dead = cast.members[at].health == Health::Dead;
    // Who says nothing of its cache, and was not missed, cannot be found out.
    let is_missed = cast.plan.has_cache_identity || cast.pool.is_some() && !is_taken(cast, at);
    {
        let mut state = disk.state();
        state.errors_permille = 0;
        state.trap_after_failure = None;
        state.media_errors.clear();
        if was_dead && is_missed && cast.random.chance(500) {
            state.lose_cache();
            // With what it had of whole stripes that nobody has flushed.
            cast.is_lost_before |= cast.pool.is_none();
        }
    }
    if was_dead {
        disk.fail_all(None);
    }
    if cast.members[at].health == Health::Faulty {
        // It may be out just now, by one of its failures.
        cast.lost_until = lost(cast);
    }
    cast.members[at].health = Health::Good;
    cast.doubtful_until = noticed(cast);
}

/// When what has just happened to a disk has been noticed, and the slowest of them has written that down.
fn noticed(cast: &Cast) -> Instant {
    let slowest = |disk: &SimDisk| {
        let state = disk.state();
        10 * state.latency_ns_max + 3 * state.stuck_ns
    };
    let slow = cast.members.iter().map(|member| slowest(&member.disk)).max().unwrap_or(0);
    cast.world.now() + Duration::from_millis(20) + Duration::from_nanos(slow)
}

/// When a disk that is lost now is out for certain, and what was written without the log is durable.
fn lost(cast: &Cast) -> Instant {
    noticed(cast) + 3 * cast.plan.intent_idle + Duration::from_secs(3)
}

/// The pool has this disk in sync, or is at it.
fn is_taken(cast: &Cast, at: usize) -> bool {
    let Some(pool) = &cast.pool else { return false };
    let state = cast.state_of(&pool.view(), cast.members[at].disk.name());
    let taken = [MemberState::InSync, MemberState::Syncing, MemberState::Spare, MemberState::Replacing];
    state.is_some_and(|state| taken.contains(&state))
}

/// Disks that are well, and that the pool does not use, are given back to it.
pub(crate) fn return_members(cast: &mut Cast) {
    let Some(pool) = cast.pool.clone() else { return };
    for at in 0..cast.members.len() {
        let member = &cast.members[at];
        if member.is_retired || member.is_new || member.health != Health::Good || is_taken(cast, at) {
            continue;
        }
        let (what, device) = (format!("add_member {}", member.name()), Arc::clone(&member.disk));
        cast.count("members_back");
        // It may be taken back without being asked.
        cast.asks.push((what, true, Box::pin(pool.add_member(device))));
    }
}

/// A place whose member is gone for good gets a new disk.
pub(crate) fn fill_places(cast: &mut Cast) {
    let Some(pool) = cast.pool.clone().filter(|_| cast.asks.is_empty()) else { return };
    let view = pool.view();
    let is_gone = |member: &&MemberView| {
        let is_strange = member.why == "another device than it was";
        let is_place = member.place.is_some() && member.state != MemberState::Replacing;
        is_place && (member.device.is_none() || is_strange)
    };
    let leaves = cast.replacement().and_then(|new| new.place);
    let missing = view.members.iter().filter(is_gone).find(|member| member.place != leaves);
    let has_more = (0..cast.members.len()).any(|at| {
        let member = &cast.members[at];
        let is_listed = view.members.iter().any(|it| it.device.as_deref() == Some(member.disk.name()));
        !member.is_retired && !member.is_new && !is_listed
    });
    let Some(place) = missing.and_then(|member| member.place).filter(|_| !has_more) else { return };
    add(cast, &format!("replace {place} by"), |pool, device| {
        Box::pin(pool.replace(&place.to_string(), device, false))
    });
}

fn back(cast: &mut Cast) {
    if let Some(at) = choose(cast, |cast, at| cast.members[at].health != Health::Good) {
        heal(cast, at);
    }
    if cast.asks.is_empty() {
        return_members(cast);
    }
}

fn back_empty(cast: &mut Cast) {
    let dead = |cast: &Cast, at: usize| {
        let member = &cast.members[at];
        // One that is still to be written what was left there is refused.
        member.health == Health::Dead && !is_taken(cast, at) && !member.disk.has_left_behind()
    };
    let Some(pool) = cast.pool.clone().filter(|_| cast.asks.is_empty()) else { return };
    // Its replacement takes its place.
    let Some(at) = choose(cast, dead).filter(|_| cast.replacement().is_none()) else { return };
    let disk = Arc::clone(&cast.members[at].disk);
    cast.members_change();
    disk.state().wipe();
    cast.members[at].is_new = true;
    heal(cast, at);
    let name = name_or_place(cast, disk.name());
    cast.count("members_back_empty");
    let refused = cast.random.chance(300).then(|| pool.add_member(Arc::clone(&disk) as Arc<dyn Device>));
    let replaced = pool.replace(&name, disk, false);
    let ask = async move {
        if let Some(refused) = refused
            && refused.await.is_ok()
        {
            return Err(PoolError::Failed("an empty disk passes for a member".to_owned()));
        }
        replaced.await
    };
    cast.asks.push((format!("replace {name} by itself"), false, Box::pin(ask)));
}

/// What the pool calls a member: its device's name, or the place of one that is missing.
pub(crate) fn name_or_place(cast: &Cast, name: &str) -> String {
    let view = cast.pool.as_ref().map(Pool::view);
    let members = view.map(|view| view.members).unwrap_or_default();
    let is_known = members.iter().any(|member| member.device.as_deref() == Some(name));
    let missing = members.iter().filter(|member| member.device.is_none()).find_map(|member| member.place);
    match missing {
        Some(place) if !is_known => place.to_string(),
        _ => name.to_owned(),
    }
}

fn add(cast: &mut Cast, what: &str, ask: impl FnOnce(&Pool, Arc<dyn Device>) -> crate::cast::AnyAsk) {
    let Some(pool) = cast.pool.clone() else { return };
    cast.members_change();
    let member = cast.new_member();
    let ask = ask(&pool, Arc::clone(&member.disk) as Arc<dyn Device>);
    cast.count("new_disks");
    cast.asks.push((format!("{what} {}", member.name()), false, ask));
    cast.members.push(member);
}

fn replace(cast: &mut Cast) {
    if !cast.asks.is_empty() || cast.replacement().is_some() || cast.pool.is_none() {
        return;
    }
    let is_redundant = cast.plan.is_redundant();
    // A good one, or one that is dead while the others are good.
    let can_go = |cast: &Cast, at: usize| match is_redundant {
        true => cast.can_lose(at) && !is_spare(cast, at),
        false => cast.members[at].health == Health::Good && is_taken(cast, at),
    };
    let Some(at) = choose(cast, can_go) else { return };
    let name = name_or_place(cast, &cast.members[at].name());
    cast.members[at].is_leaving = true;
    add(cast, &format!("replace {name} by"), |pool, device| Box::pin(pool.replace(&name, device, false)));
}

fn abort_replace(cast: &mut Cast) {
    let Some(pool) = cast.pool.clone().filter(|_| cast.asks.is_empty()) else { return };
    let Some(new) = cast.replacement() else { return };
    cast.count("replacements_given_up");
    for member in &mut cast.members {
        member.is_new |= Some(member.disk.name()) == new.device.as_deref();
    }
    // It may be over just now.
    cast.asks.push(("abort_replace".to_owned(), true, Box::pin(pool.abort_replace())));
}

fn is_spare(cast: &Cast, at: usize) -> bool {
    let state = cast.pool.as_ref().and_then(|pool| cast.state_of(&pool.view(), cast.members[at].disk.name()));
    state == Some(MemberState::Spare)
}

fn grow(cast: &mut Cast) {
    let has_grown = cast.counts.contains_key("grown");
    let Some(pool) = cast.pool.clone().filter(|_| !has_grown && cast.is_whole()) else { return };
    if !cast.asks.is_empty() || cast.plan.level == Level::Linear && cast.random.chance(500) {
        return;
    }
    let members: Vec<_> = (0..cast.plan.members).map(|_| cast.new_member()).collect();
    let devices = members.iter().map(|member| Arc::clone(&member.disk) as Arc<dyn Device>).collect();
    cast.members.extend(members);
    cast.count("grown");
    cast.asks.push(("grow".to_owned(), false, Box::pin(pool.grow(devices, false))));
}

fn fill(cast: &mut Cast) {
    let names = cast.shared.models.borrow().names();
    let volumes: Vec<&String> =
        names.iter().filter(|(_, (_, is_snapshot))| !is_snapshot).map(|it| it.0).collect();
    if volumes.is_empty() {
        return;
    }
    let name = volumes[cast.random.index(volumes.len())];
    let all = cast.random.below(6 << 20) / cast.shared.block_bytes as u64;
    for queue in &cast.queues {
        let mut guest = queue.guest.borrow_mut();
        if guest.volume == *name {
            let size = names[name].0;
            let from = if size > all { guest.random.below(size - all) } else { 0 };
            guest.to_fill = (from, (from + all).min(size));
        }
    }
    cast.wake_guests();
}

fn change(cast: &mut Cast, event: Event) -> Result<(), String> {
    cast.wait("a change of volumes", &mut |cast| cast.change.is_none())?;
    let names = cast.shared.models.borrow().names();
    let pick = |cast: &mut Cast, want: &dyn Fn(bool) -> bool| {
        let all: Vec<&String> = names.iter().filter(|(_, volume)| want(volume.1)).map(|it| it.0).collect();
        if all.is_empty() { None } else { Some(all[cast.random.index(all.len())].clone()) }
    };
    cast.next_name += 1;
    let number = cast.next_name;
    let shift = cast.plan.block_size.shift();
    let op = match event {
        Event::Create if names.len() < VOLUMES_MAX => {
            let waits = cast.plan.no_space == NoSpacePolicy::Wait;
            let large = if waits { 2 << 20 } else { 1 << 40 };
            let bytes = [cast.plan.volume_bytes, 384 << 10, large][cast.random.index(3)];
            Some(Op::Create(format!("v{number}"), bytes >> shift))
        }
        Event::Snapshot if names.len() < VOLUMES_MAX => {
            let mut items = Vec::new();
            if let Some(origin) = pick(cast, &|is_snapshot| !is_snapshot) {
                items.push((origin, format!("s{number}")));
            }
            if let Some(origin) = pick(cast, &|is_snapshot| !is_snapshot).filter(|it| *it != items[0].0) {
                items.push((origin, format!("s{number}b")));
            }
            (!items.is_empty()).then_some(Op::Snapshot(items))
        }
        Event::Clone if names.len() < VOLUMES_MAX => {
            pick(cast, &|is_snapshot| is_snapshot).map(|snapshot| Op::Clone(snapshot, format!("c{number}")))
        }
        Event::Delete if names.len() > 1 => pick(cast, &|_| true).map(Op::Delete),
        Event::Resize => pick(cast, &|is_snapshot| !is_snapshot).map(|name| {
            let (size, step) = (names[&name].0, (64 << 10) >> shift);
            let steps = cast.random.below(16);
            let size = match cast.random.chance(300) {
                true => size.saturating_sub(steps * step).max(step),
                false => size + steps * step + cast.random.below(2) * (4096 >> shift),
            };
            Op::Resize(name, size)
        }),
        _ => None,
    };
    let (Some(op), Some(_)) = (op, &cast.pool) else { return Ok(()) };
    begin_change(cast, op)
}

/// Asks for a change of volumes.
pub(crate) fn begin_change(cast: &mut Cast, op: Op) -> Result<(), String> {
    if let Op::Create(name, _) | Op::Clone(_, name) = &op
        && cast.world.now() < cast.doubtful_until
    {
        // What it has written when the loss is found out may be a part of it.
        cast.shared.rules.borrow_mut().may_tell_loss.insert(name.clone());
    }
    if let Op::Delete(name) = &op {
        let name = name.clone();
        // Nobody begins anything there any more.
        let of_it = |cast: &Cast| {
            let queues = cast.queues.iter().map(|queue| queue.guest.borrow());
            queues.filter(|guest| guest.volume == name).all(|guest| guest.is_done())
        };
        for queue in &cast.queues {
            let mut guest = queue.guest.borrow_mut();
            if guest.volume == name {
                guest.stop();
            }
        }
        cast.wait("a volume's requests", &mut |cast| of_it(cast))?;
        // The process may have died meanwhile, and the volume's history with it.
        if !cast.shared.models.borrow().names().contains_key(&name) || cast.change.is_some() {
            return Ok(());
        }
        cast.detach(|volume| volume == name);
        cast.queues.retain(|queue| queue.guest.borrow().volume != name);
        cast.freed_at = cast.world.now();
    }
    if let Op::Resize(name, size) = &op {
        // Who makes a volume smaller has told its guest.
        let size = *size;
        let name = name.clone();
        let is_smaller = size < cast.shared.models.borrow().size_blocks(&name);
        if is_smaller {
            for queue in &cast.queues {
                let mut guest = queue.guest.borrow_mut();
                if guest.volume == name {
                    guest.stop();
                }
            }
            cast.wait("a volume's requests", &mut |cast| {
                let queues = cast.queues.iter().map(|queue| queue.guest.borrow());
                queues.filter(|guest| guest.volume == name).all(|guest| guest.is_done())
            })?;
            if !cast.shared.models.borrow().names().contains_key(&name) || cast.change.is_some() {
                return Ok(());
            }
        }
    }
    ask_change(cast, op);
    Ok(())
}

fn ask_change(cast: &mut Cast, op: Op) {
    let Some(pool) = cast.pool.clone() else { return };
    let shift = cast.plan.block_size.shift();
    if crate::tells() {
        println!("{:?} {op:?}", cast.world.now());
    }
    let ask = match &op {
        Op::Create(name, size) => pool.create_volume(name, size << shift),
        Op::Snapshot(items) => pool.snapshot(items.clone()),
        Op::Clone(snapshot, name) => pool.clone_volume(snapshot, name),
        Op::Delete(name) => pool.delete_volume(name),
        Op::Resize(name, size) => pool.resize_volume(name, size << shift),
    };
    cast.count(match &op {
        Op::Create(..) => "creates",
        Op::Snapshot(_) => "snapshots",
        Op::Clone(..) => "clones",
        Op::Delete(_) => "deletes",
        Op::Resize(..) => "resizes",
    });
    cast.shared.models.borrow_mut().op_begins(op);
    cast.change = Some(Box::pin(ask));
}

/// Guests give back what they have, and a snapshot is deleted: writes wait for space.
pub(crate) fn make_room(cast: &mut Cast) {
    if cast.pool.is_none() {
        return;
    }
    cast.count("room_made");
    let models = Rc::clone(&cast.shared.models);
    for queue in &cast.queues {
        let mut guest = queue.guest.borrow_mut();
        if !guest.read_only && guest.to_discard.is_empty() {
            guest.to_discard = models.borrow().written(&guest.volume).into();
        }
    }
    cast.freed_at = cast.world.now();
    let names = models.borrow().names();
    let is_unused = |cast: &Cast, name: &String| {
        let queues = cast.queues.iter().map(|queue| queue.guest.borrow());
        queues.filter(|guest| guest.volume == *name).all(|guest| guest.is_idle())
    };
    let snapshot = names.iter().find(|(name, (_, is_snapshot))| *is_snapshot && is_unused(cast, name));
    if let Some((name, _)) = snapshot.filter(|_| cast.change.is_none()) {
        cast.detach(|volume| volume == name);
        cast.queues.retain(|queue| queue.guest.borrow().volume != *name);
        ask_change(cast, Op::Delete(name.clone()));
    }
    cast.wake_guests();
}

/// Disks that are there can be read and written.
pub(crate) fn mend_faulty(cast: &mut Cast) {
    for at in 0..cast.members.len() {
        if cast.members[at].health == Health::Faulty {
            heal(cast, at);
        }
    }
}

/// A disk that may be lost is, at the moment at which the process ends: it is out for the next one, which nobody could write down.
pub(crate) fn lose_at_crash(cast: &mut Cast) {
    let Some(view) = cast.pool.as_ref().map(Pool::view) else { return };
    let is_there = |cast: &Cast, at: usize| {
        let state = cast.state_of(&view, cast.members[at].disk.name());
        cast.members[at].health == Health::Good && state == Some(MemberState::InSync) && cast.can_lose(at)
    };
    let Some(at) = choose(cast, is_there) else { return };
    let is_whole =
        view.members.iter().all(|member| member.place.is_some() && member.state == MemberState::InSync);
    cast.members[at].is_outdated |= !is_whole;
    cast.members[at].is_new = false;
    if crate::tells() {
        println!("{:?} {} is lost with the process", cast.world.now(), cast.members[at].name());
    }
    cast.members[at].disk.fail_all(Some(Status::Path));
    cast.members[at].health = Health::Dead;
    cast.is_lost_with_process = true;
    cast.count("deaths_at_crashes");
}

/// Disks of which the pool does not know yet that they fail do not.
pub(crate) fn heal_unnoticed(cast: &mut Cast) {
    let view = cast.pool.as_ref().map(Pool::view);
    for at in 0..cast.members.len() {
        let name = cast.members[at].name();
        let state = view.as_ref().and_then(|view| cast.state_of(view, &name));
        let is_out = matches!(state, Some(MemberState::Stale | MemberState::Missing | MemberState::Spare));
        if cast.members[at].health != Health::Good && !cast.members[at].is_retired && !is_out {
            heal(cast, at);
        }
    }
}

/// Disks that were dead are there again, and have kept what they had; whether there are any.
pub(crate) fn return_lost(cast: &mut Cast) -> bool {
    let is_lost = |member: &&mut Member| member.health == Health::Dead && !member.is_retired;
    let mut lost = cast.members.iter_mut().filter(is_lost).peekable();
    let is_any = lost.peek().is_some();
    for member in lost {
        member.disk.fail_all(None);
        member.health = Health::Good;
    }
    is_any
}

/// Disks that were dead are there again.
pub(crate) fn heal_dead(cast: &mut Cast) {
    for at in 0..cast.members.len() {
        if cast.members[at].health == Health::Dead && !cast.members[at].is_retired {
            heal(cast, at);
        }
    }
}

/// Everything works again.
pub(crate) fn heal_all(cast: &mut Cast) {
    let view = cast.pool.as_ref().map(Pool::view);
    for at in 0..cast.members.len() {
        // One that was refused while it was just being put in a place is a member all the same.
        let name = cast.members[at].name();
        let is_listed = view.as_ref().is_some_and(|view| cast.state_of(view, &name).is_some());
        cast.members[at].is_retired &= !is_listed;
        if cast.members[at].is_retired {
            continue;
        }
        {
            let mut state = cast.members[at].disk.state();
            state.set_latency(Duration::from_micros(50));
            state.stuck_permille = 0;
        }
        // Who is out cannot even say who it is, if that is what cannot be read.
        let is_used = is_taken(cast, at);
        let keeps_media =
            is_used && cast.plan.is_redundant() && !cast.members[at].disk.state().media_errors.is_empty();
        if cast.members[at].health != Health::Good {
            let media = keeps_media.then(|| cast.members[at].disk.state().media_errors.clone());
            heal(cast, at);
            if let Some(media) = media {
                // A scrub's business.
                cast.members[at].disk.state().media_errors = media;
            }
        }
    }
}
