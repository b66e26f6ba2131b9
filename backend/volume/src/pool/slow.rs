//! What does not take the hot path: straight-line tasks on the queue's own reactor, over the same members.
//!
//! Order of a write to blocks that are not there yet: the owner maps the extents and marks the regions ([`super::owner::Owner::prepare`]); the data
//! is written; the owner notes which units are valid ([`super::owner::Owner::finish`]). A reader sees the data from then on, and not before.

use super::bounce::{Bounce, fill_payload, zero_payload};
use super::channel::Core;
use super::failure::{OUT_OF_REACH, is_out_of_reach};
use super::lost_caches::Seen;
use super::resolve::{self, by_extent, runs};
use super::shared::{Class, Counted, View};
use super::stripes::{Change, Changed, IsValid};
use super::wait::all;
use crate::format::NONE;
use crate::raid::{Mode, Piece, Set};
use crate::simulated::is_broken;
use crate::thin::{Entry, VolumeMap};
use hawser_block::{Buffers, Operation, Outcome, Request, Status};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Bytes that a request has in extents: index, where in the extent, where in the request, how many.
type Part = (u32, u64, u64, u64);

/// How long it waits at most for a window or a mark that has come and gone.
const LONGEST_WAIT: Duration = Duration::from_millis(5);
/// How often a read is tried while members come and go.
const READS_MAX: u32 = 1000;

/// Carries a request out. While no copy is within reach it is tried again. `counted`: why it is slow, as far as that is known.
pub(super) async fn carry_out(core: Rc<Core>, request: Request, counted: Counted) -> Outcome {
    loop {
        match carry_out_once(&core, &request, &counted).await {
            Err(status) if is_out_of_reach(&core, status) => core.runtime.sleep(OUT_OF_REACH).await,
            outcome => return outcome,
        };
    }
}

async fn carry_out_once(core: &Rc<Core>, request: &Request, counted: &Counted) -> Outcome {
    match request.operation {
        // A task is as large as the largest of these ways, and is moved when it is made: all but that of writes are apart.
        Operation::Read => Box::pin(read(core, request, counted)).await,
        Operation::Flush => Box::pin(flush(core)).await,
        Operation::Write { fua } => {
            let payload = Payload::Guest(request.buffers);
            write(core, bounds(core, request)?, &payload, counted).await?;
            finish_fua(core, fua).await
        }
        Operation::Discard => {
            let range = bounds(core, request)?;
            may_change(core).await?;
            Box::pin(discard(core, range)).await.map(drop)
        }
        Operation::WriteZeroes { unmap, fua } => {
            let range = bounds(core, request)?;
            may_change(core).await?;
            let left = match unmap {
                true => Box::pin(discard(core, range)).await?,
                false => vec![range],
            };
            for range in left {
                Box::pin(write_zeroes(core, range, counted)).await?;
            }
            finish_fua(core, fua).await
        }
    }
}

/// Waits until the tables may change.
async fn may_change(core: &Core) -> Outcome {
    // A process that finds the same loss does not take what was changed since for there.
    caches_seen_to(core).await?;
    core.shared.request(|owner| async move { owner.check_writable() }).await
}

fn bounds(core: &Core, request: &Request) -> Result<(u64, u64), Status> {
    resolve::bounds(&core.shared.view(), &core.volume.map(), request)
}

/// Makes everything durable. Who has waited long enough does not wait for the round's end.
///
/// It fails, too, where something was lost before that may be the volume's and that none of its users has been told of: another volume's FLUSH may
/// have met with it, or one of the pool's own.
async fn flush(core: &Core) -> Outcome {
    let volume = &core.volume;
    let (before, number) = (volume.losses.load(Ordering::Acquire), volume.unflushed.begin());
    // All that are under way then stand for it, whichever ends first.
    let told_before = volume.told_losses.load(Ordering::Acquire);
    let outcome = flush_pool(core).await;
    let losses = volume.losses.load(Ordering::Acquire);
    let outcome = match outcome {
        Ok(()) if told_before < losses && !is_broken("loss_told_to_one") => Err(Status::Media),
        outcome => outcome,
    };
    match outcome {
        Ok(()) => volume.unflushed.has_flushed(number),
        Err(Status::Media) => {
            // For a write that has ended since it began, and was lost too, it does not stand: that is told by the next one.
            let stands_for_all =
                !volume.unflushed.has_more_than(number) || is_broken("loss_of_later_writes_not_told");
            let told = if stands_for_all { losses } else { before };
            if volume.told_losses.fetch_max(told, Ordering::AcqRel) < told {
                drop(core.shared.ask(|owner| async move { owner.losses_have_changed() }));
            }
        }
        Err(_) => {}
    }
    outcome
}

async fn flush_pool(core: &Core) -> Outcome {
    let mut answer = core.shared.ask(|owner| async move { owner.flush().await });
    let ended = core.place.bell.until_or(&mut answer, || core.is_given_up.load(Ordering::Relaxed));
    ended.await.flatten().unwrap_or(Err(Status::Aborted))
}

/// Data and mapping are durable when it ends.
pub(super) async fn finish_fua(core: &Core, fua: bool) -> Outcome {
    match fua {
        true => Box::pin(flush(core)).await,
        false => Ok(()),
    }
}

/// The regions that a write goes to are not the same on all members, or may not be.
pub(super) fn mark_unsynced(core: &Core, request: &Request) {
    core.shared.mark_unsynced();
    // As they are now: an extent that was unmapped meanwhile is nobody's, and need not be the same.
    let (view, map) = (&core.shared.view(), &core.volume.map());
    let Ok(range) = resolve::bounds(view, map, request) else { return };
    for (index, within, _, len) in by_extent(view.thin.extent_bytes, range) {
        let entry = view.table.lookup(map, index);
        if entry.is_mapped() {
            mark_extent(view, extent_of(view, entry), within, len);
        }
    }
}

fn mark_extent(view: &View, extent: u32, within: u64, len: u64) {
    let (set, address) = view.array.locate(extent);
    let set = view.array.set(set);
    for piece in set.pieces(address + within, len) {
        mark_piece(set, &piece);
    }
}

fn mark_piece(set: &Set, piece: &Piece) {
    for copy in piece.copies.as_slice() {
        let last = copy.offset + u64::from(piece.len) - 1;
        for region in set.region_of(copy.offset)..=set.region_of(last) {
            set.unsynced.set(region);
        }
    }
}

fn extent_of(view: &View, entry: Entry) -> u32 {
    match entry.is_partial() {
        true => view.table.partial(entry.low()).extent,
        false => entry.low(),
    }
}

/// A part of a read: bytes of an extent, and where they go.
struct Wanted {
    set: usize,
    piece: Piece,
    /// In the request's payload, or in a buffer.
    start: u64,
}

/// What a range of a volume is made of now: pieces to read, and zeroes.
fn wanted(view: &View, map: &VolumeMap, range: (u64, u64)) -> (Vec<Wanted>, Vec<(u64, u64)>) {
    let (mut pieces, mut zeroes) = (Vec::new(), Vec::new());
    for (index, within, start, len) in by_extent(view.thin.extent_bytes, range) {
        let entry = view.table.lookup(map, index);
        content(view, entry, (within, len), start, &mut pieces, &mut zeroes);
    }
    (pieces, zeroes)
}

/// The same of one extent, whose mapping is `entry`.
fn content(
    view: &View,
    entry: Entry,
    (within, len): (u64, u64),
    start: u64,
    pieces: &mut Vec<Wanted>,
    zeroes: &mut Vec<(u64, u64)>,
) {
    let mut add = |extent: u32, at: u64, len: u64| {
        let start = start + (at - within);
        if extent == NONE {
            zeroes.push((start, len));
            return;
        }
        let (set, address) = view.array.locate(extent);
        for piece in view.array.set(set).pieces(address + at, len) {
            pieces.push(Wanted { set, piece, start: start + piece.start });
        }
    };
    if !entry.is_mapped() {
        add(NONE, within, len);
    } else if entry.is_partial() {
        let partial = view.table.partial(entry.low());
        for (valid, at, len) in runs(partial.bits, view.thin.unit_shift(), within, len) {
            add(if valid { partial.extent } else { partial.fallback }, at, len);
        }
    } else {
        add(entry.low(), within, len);
    }
}

/// Whether copies of a piece may differ, so that it matters which is read.
fn is_unsettled(set: &Set, piece: &Piece) -> bool {
    if set.parity().is_some() {
        // What is read must not change when its member is lost before parity is made right.
        return set.are_all_in_sync() && any_unsynced(set, piece);
    }
    let copies = piece.copies.as_slice();
    let with_data =
        copies.iter().filter(|copy| set.mode(copy.member - set.first_member()) == Mode::InSync).count();
    with_data > 1 && any_unsynced(set, piece)
}

fn any_unsynced(set: &Set, piece: &Piece) -> bool {
    piece.copies.as_slice().iter().any(|copy| {
        let last = copy.offset + u64::from(piece.len) - 1;
        (set.region_of(copy.offset)..=set.region_of(last)).any(|region| set.unsynced.get(region))
    })
}

/// A piece, as settled ones are remembered.
fn name_of(wanted: &Wanted) -> (usize, u16, u64, u32) {
    let copy = wanted.piece.copies.as_slice()[0];
    (wanted.set, copy.member, copy.offset, wanted.piece.len)
}

/// Waits while it is not known what a lost cache has taken with it: which were lost until then.
async fn caches_seen_to(core: &Core) -> Result<Seen, Status> {
    loop {
        let seen = core.shared.lost_caches.look();
        if !seen.is_open() || is_broken("lost_cache_read_on") {
            return Ok(seen);
        }
        let mut answer = core.shared.ask(|owner| async move { owner.caches_seen_to().await });
        let ended = core.place.bell.until_or(&mut answer, || core.is_given_up.load(Ordering::Relaxed));
        ended.await.flatten().unwrap_or(Err(Status::Aborted))?;
    }
}

/// Reads where it matters which copy, or after a copy could not be read.
async fn read(core: &Rc<Core>, request: &Request, counted: &Counted) -> Outcome {
    loop {
        let seen = caches_seen_to(core).await?;
        let outcome = read_once(core, request, counted).await;
        // Whatever it is, it may be of the time before.
        if core.shared.lost_caches.look() == seen || is_broken("lost_cache_read_on") {
            return outcome;
        }
    }
}

async fn read_once(core: &Rc<Core>, request: &Request, counted: &Counted) -> Outcome {
    let range = bounds(core, request)?;
    let mut settled = BTreeSet::new();
    for _ in 0..READS_MAX {
        let under_way = core.place.under_way();
        let (view, map) = (core.shared.view(), core.volume.map());
        if view.is_lost {
            return Err(Status::Conflict);
        }
        let (pieces, zeroes) = wanted(&view, &map, range);
        let is_redundant = view.is_redundant && !is_broken("read_unsynced_from_any");
        let unsettled: Vec<_> = pieces
            .iter()
            .filter(|wanted| is_redundant && is_unsettled(view.array.set(wanted.set), &wanted.piece))
            .filter(|wanted| !settled.contains(&name_of(wanted)))
            .map(|wanted| (wanted.set, wanted.piece))
            .collect();
        if !unsettled.is_empty() {
            drop(under_way);
            for (set, piece) in unsettled {
                let settle = core.shared.request(move |owner| async move { owner.settle(set, piece).await });
                match settle.await {
                    Err(Status::Aborted) if !core.is_given_up.load(Ordering::Relaxed) => {
                        pause(core).await;
                        continue;
                    }
                    outcome => outcome?,
                }
                settled.insert(name_of(&Wanted { set, piece, start: 0 }));
            }
            continue;
        }
        for (start, len) in zeroes {
            zero_payload(&request.buffers.slice(usize_of(start), usize_of(len)));
        }
        let reads = pieces.iter().map(|wanted| {
            let into = request.buffers.slice(usize_of(wanted.start), wanted.piece.len as usize);
            read_piece(core, &view, wanted, (into, None), counted)
        });
        let outcomes = all(reads).await;
        drop(under_way);
        match outcomes.into_iter().find(Result::is_err) {
            // It may have become another volume's data meanwhile.
            None if core.shared.view().is_lost => return Err(Status::Conflict),
            None => return Ok(()),
            Some(Err(Status::Aborted)) if !core.is_given_up.load(Ordering::Relaxed) => pause(core).await,
            Some(other) => return other,
        }
    }
    Err(Status::Path)
}

async fn pause(core: &Core) {
    core.runtime.sleep(Duration::from_millis(10)).await;
}

fn usize_of(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a request is far below 4 GiB")
}

/// Reads a piece from its first copy that has it and gives it; bad ones are rewritten.
async fn read_piece(
    core: &Rc<Core>,
    view: &Arc<View>,
    wanted: &Wanted,
    (into, kept): (Buffers, Option<Rc<Bounce>>),
    counted: &Counted,
) -> Outcome {
    let set = view.array.set(wanted.set);
    let (mut tried, mut bad, mut last) = (0u64, false, Status::Path);
    loop {
        let copy = wanted.piece.copies.as_slice().iter().find(|copy| {
            tried & 1 << copy.member == 0
                && (set.mode(copy.member - set.first_member()) == Mode::InSync
                    || is_broken("stale_member_read"))
                && view.leaves[usize::from(copy.member)].is_some()
        });
        let Some(copy) = copy else {
            if set.parity().is_none() {
                return Err(last);
            }
            counted.count(&core.volume, Class::Degraded);
            let computed = core.ways().read_lost(set, &wanted.piece).await?;
            if bad {
                let (set, piece) = (wanted.set, wanted.piece);
                // It goes on by itself.
                drop(core.shared.ask(move |owner| async move { owner.repair(set, piece).await }));
            }
            let bytes = computed.bytes(0, wanted.piece.len as usize);
            fill_payload(&into, bytes);
            return Ok(());
        };
        let leaf = view.leaves[usize::from(copy.member)].as_ref().expect("looked at just now");
        let at = view.data_offset + copy.offset;
        let outcome = core.place.lanes.start(leaf, Operation::Read, at, into, kept.clone()).await;
        tried |= 1 << copy.member;
        let is_there =
            set.mode(copy.member - set.first_member()) == Mode::InSync || is_broken("stale_member_read");
        match outcome {
            Ok(()) if is_there || !view.is_redundant => {
                if bad {
                    let (set, piece) = (wanted.set, wanted.piece);
                    // It goes on by itself.
                    drop(core.shared.ask(move |owner| async move { owner.repair(set, piece).await }));
                }
                return Ok(());
            }
            Ok(()) => {}
            Err(Status::Aborted) => return Err(Status::Aborted),
            Err(status) => {
                counted.count(&core.volume, Class::DeviceFailure);
                bad |= status == Status::Media;
                last = status;
            }
        }
    }
}

/// What a write writes.
enum Payload {
    Guest(Buffers),
    Zeroes,
}

/// Writes bytes of the volume, whatever is there before.
async fn write(core: &Rc<Core>, (first, len): (u64, u64), payload: &Payload, counted: &Counted) -> Outcome {
    if core.volume.is_snapshot {
        return Err(Status::ReadOnly);
    }
    let extent_bytes = core.shared.view().thin.extent_bytes;
    // One extent at a time: what waits for space in the second has not kept anybody from the first.
    for (_, _, start, here) in by_extent(extent_bytes, (first, len)) {
        let part = match payload {
            Payload::Guest(buffers) => Payload::Guest(buffers.slice(usize_of(start), usize_of(here))),
            Payload::Zeroes => Payload::Zeroes,
        };
        write_extent(core, (first + start, here), &part, counted).await?;
    }
    Ok(())
}

/// Writes within one extent.
async fn write_extent(core: &Rc<Core>, range: (u64, u64), payload: &Payload, counted: &Counted) -> Outcome {
    let id = core.volume.id;
    let is_given_up = || core.is_given_up.load(Ordering::Relaxed);
    let mut wait = Duration::from_micros(50);
    for tries in 0u64.. {
        let seen = caches_seen_to(core).await?;
        let view = core.shared.view();
        let part = by_extent(view.thin.extent_bytes, range).next().ok_or(Status::Invalid)?;
        let unit = u64::from(view.thin.unit_bytes);
        let (_, within, _, len) = part;
        let end = within + len;
        // Only who fills a unit whose rest it does not have must be alone with it.
        let is_whole = within % unit == 0 && (end % unit == 0 || end == view.thin.extent_bytes);
        // Where parity says what members have that are lost, others who have written and not noted it yet are in the way too.
        let has_parity = view.array.sets().iter().any(|set| set.parity().is_some());
        let is_lacking = || view.array.sets().iter().any(|set| !set.are_all_in_sync());
        let is_alone = !is_whole || (has_parity && (tries > 0 || is_lacking()));
        let (index, given_up) = (part.0, Arc::clone(&core.is_given_up));
        let prepared = core.shared.request(move |owner| async move {
            owner.prepare(id, index, (within, len), is_alone, given_up).await
        });
        let prepared = prepared.await;
        let is_current = || core.shared.lost_caches.look() == seen;
        if prepared.is_err() && !is_current() && !is_given_up() {
            // What it was made of may have been lost meanwhile.
            continue;
        }
        let class = match prepared {
            Err(Status::NoSpace) => Some((Class::NoSpace, Status::NoSpace)),
            Err(status) => Some((Class::MappingFailure, status)),
            Ok(()) => None,
        };
        if let Some((class, status)) = class {
            counted.count(&core.volume, class);
            return Err(status);
        }
        // Not before: who waits for space keeps nobody from copying.
        let copied = core.place.copy(usize_of(range.1), is_given_up).await;
        // Until the units are noted: a snapshot waits for that too.
        let under_way = core.place.under_way();
        if !core.shared.is_writable.load(Ordering::Acquire) {
            // It is being closed, and who closes it waits for those only who were under way before.
            let released = core
                .shared
                .request(move |owner| async move { owner.finish(id, index, is_alone, ([0; 4], seen)).await });
            let _ = released.await;
            return Err(Status::ReadOnly);
        }
        let written = match &copied {
            Some(_) => write_prepared(core, part, is_alone, payload, counted).await,
            None => Err(Status::Aborted),
        };
        let outcome = match written {
            // Somebody else's abort.
            Err(Status::Aborted) if !is_given_up() => Ok(None),
            Err(_) if !is_current() && !is_given_up() => Ok(None),
            outcome => outcome,
        };
        let bits = match outcome {
            Ok(Some(bits)) => bits,
            _ => [0; 4],
        };
        let finished = core
            .shared
            .request(move |owner| async move { owner.finish(id, index, is_alone, (bits, seen)).await });
        let finished = finished.await;
        drop((under_way, copied));
        match outcome? {
            Some(_) if finished.is_err() => return finished.map(drop),
            // What was written in place may have been valid when it began, and not any more.
            Some(_) if finished == Ok(true) && is_current() => return Ok(()),
            _ => {
                // What it waits for was there when it was prepared, and has come again since.
                core.runtime.sleep(wait).await;
                wait = (wait * 2).min(LONGEST_WAIT);
            }
        }
        if core.is_given_up.load(Ordering::Relaxed) {
            return Err(Status::Aborted);
        }
    }
    unreachable!("it is tried until it has ended")
}

/// Writes into an extent that is ours, while the caller is under way; says which units are valid now, or `None` when it is not ours after all.
async fn write_prepared(
    core: &Rc<Core>,
    part: Part,
    is_alone: bool,
    payload: &Payload,
    counted: &Counted,
) -> Result<Option<[u64; 4]>, Status> {
    let (view, map) = (core.shared.view(), core.volume.map());
    let (index, within, _, len) = part;
    let entry = view.table.lookup(&map, index);
    if !entry.is_mapped() || entry.birth() <= map.shared_generation() {
        return Ok(None);
    }
    if is_broken("valid_before_data") {
        let bits = bits_of(&view, within, within + len);
        let id = core.volume.id;
        let seen = core.shared.lost_caches.look();
        core.shared
            .request(move |owner| async move { owner.validate(id, index, (bits, seen)).await })
            .await?;
    }
    // Units that are not valid are written whole.
    let (mut from, mut to) = (within, within + len);
    let unit = u64::from(view.thin.unit_bytes);
    if entry.is_partial() {
        let bits = view.table.partial(entry.low()).bits;
        let is_valid = |at: u64| runs(bits, view.thin.unit_shift(), at, 1).all(|(valid, ..)| valid);
        if !is_valid(from) {
            from -= from % unit;
        }
        if !is_valid(to - 1) {
            to = (to.div_ceil(unit) * unit).min(view.thin.extent_bytes);
        }
    }
    let size = usize_of(to - from);
    let bounce = Rc::new(core.place.spare.take(size));
    for (edge, edge_end) in [(from, within), (within + len, to)] {
        if edge < edge_end {
            let into = (usize_of(edge - from), &bounce);
            Box::pin(fill(core, &view, entry, (edge, edge_end - edge), into, counted)).await?;
        }
    }
    let at = usize_of(within - from);
    match payload {
        Payload::Guest(buffers) => bounce.copy_payload(at, buffers),
        Payload::Zeroes => bounce.zero(at, usize_of(len)),
    }
    core.volume.count_copied(usize_of(len));
    let extent = extent_of(&view, entry);
    let written = match view.array.sets()[view.array.locate(extent).0].parity() {
        Some(_) => {
            let written =
                write_stripes(core, &view, (index, extent), (from, size, &bounce), is_alone, counted);
            Box::pin(written).await?
        }
        None => write_copies(core, &view, extent, (from, size, &bounce), counted).await?,
    };
    match written {
        true => Ok(Some(bits_of(&view, from, to))),
        false => Ok(None),
    }
}

/// Reads what an extent shows at `within..within + len` into the bounce.
async fn fill(
    core: &Rc<Core>,
    view: &Arc<View>,
    entry: Entry,
    (within, len): (u64, u64),
    (at, bounce): (usize, &Rc<Bounce>),
    counted: &Counted,
) -> Outcome {
    let (mut pieces, mut zeroes) = (Vec::new(), Vec::new());
    content(view, entry, (within, len), 0, &mut pieces, &mut zeroes);
    for (start, len) in zeroes {
        bounce.zero(at + usize_of(start), usize_of(len));
    }
    for wanted in &pieces {
        // A shared extent is not written any more, but after a crash its copies may differ still. Who reads the first copy that is in
        // sync gets what a resync will make of all.
        let into = bounce.buffers(at + usize_of(wanted.start), wanted.piece.len as usize);
        read_piece(core, view, wanted, (into, Some(Rc::clone(bounce))), counted).await?;
    }
    Ok(())
}

/// Writes to all members that have the extent; `false`: not now, because it is being resynchronised or is not marked.
async fn write_copies(
    core: &Rc<Core>,
    view: &Arc<View>,
    extent: u32,
    (within, len, bounce): (u64, usize, &Rc<Bounce>),
    counted: &Counted,
) -> Result<bool, Status> {
    let (set, address) = view.array.locate(extent);
    let set = view.array.set(set);
    let mut copies = Vec::with_capacity(set.members().into());
    for piece in set.pieces(address + within, len as u64) {
        let here = match set.writable(&piece) {
            Ok(here) => here,
            Err(crate::raid::Slow::Degraded) => return Err(Status::Path),
            Err(_) => return Ok(false),
        };
        copies.extend(here.as_slice().iter().map(|copy| (*copy, usize_of(piece.start), piece.len as usize)));
    }
    let (lanes, since) = (&core.place.lanes, core.shared.joins());
    let mut writes = Vec::with_capacity(copies.len());
    writes.extend(copies.into_iter().map(|(copy, start, len)| {
        let leaf = view.leaves[usize::from(copy.member)].as_ref();
        let at = view.data_offset + copy.offset;
        (copy.member, leaf.map(|leaf| lanes.write(leaf, at, bounce, start, len, false)))
    }));
    let (mut failed, mut status, mut is_aborted) = (0u64, None, false);
    for (member, write) in writes {
        let outcome = match write {
            Some(write) => write.await,
            None => Err(Status::Path),
        };
        if let Err(why) = outcome {
            failed |= 1 << member;
            is_aborted |= why == Status::Aborted;
            if matches!(status, None | Some(Status::Aborted)) {
                status = Some(why);
            }
        }
    }
    let Some(status) = status else { return Ok(true) };
    if !view.is_redundant {
        return Err(status);
    }
    counted.count(&core.volume, Class::DeviceFailure);
    core.shared.mark_unsynced();
    mark_extent(view, extent, within, len as u64);
    // Who was aborted has not failed.
    if is_aborted {
        return match core.is_given_up.load(Ordering::Relaxed) {
            true => Err(Status::Aborted),
            // Somebody else's abort: again.
            false => Ok(false),
        };
    }
    Box::pin(
        core.shared.request(move |owner| async move { owner.report_beside(failed, status, since).await }),
    )
    .await?;
    Ok(true)
}

/// The same where there is parity, stripe by stripe.
async fn write_stripes(
    core: &Rc<Core>,
    view: &Arc<View>,
    (index, extent): (u32, u32),
    (within, len, bounce): (u64, usize, &Rc<Bounce>),
    is_alone: bool,
    counted: &Counted,
) -> Result<bool, Status> {
    let (set, address) = view.array.locate(extent);
    let set = view.array.set(set);
    let parity = set.parity().expect("looked at just now");
    let (stripe, strip) = (parity.stripes.stripe_bytes(), parity.stripes.strip_bytes());
    let data = u64::from(parity.stripes.data_strips());
    let names = Rc::clone(core);
    // As it is when the stripe's turn comes.
    let is_valid: IsValid = Rc::new(move |row: u64, within: u64, len: u64| {
        let view = names.shared.view();
        let entry = view.table.lookup(&names.volume.map(), index);
        if !entry.is_partial() {
            return true;
        }
        let bits = view.table.partial(entry.low()).bits;
        let first = row * stripe - address;
        (0..data).any(|slot| {
            let at = first + slot * strip + within;
            runs(bits, view.thin.unit_shift(), at, len).any(|(valid, ..)| valid)
        })
    });
    let ways = core.ways();
    let changes = parity.stripes.touched(address + within, len as u64).map(|touched| {
        if !touched.is_whole() {
            counted.count(&core.volume, Class::PartialStripe);
        }
        let change = Change {
            from: touched.from,
            to: touched.to,
            bounce: Rc::clone(bounce),
            at: usize_of(touched.start),
            is_valid: Rc::clone(&is_valid),
            is_alone,
        };
        ways.change(set, touched.row, change)
    });
    let mut changed = Box::pin(all(changes.collect::<Vec<_>>()));
    // Who has waited long enough does not wait for a member: what was begun is ended without him.
    let ended = core.place.bell.until_or(&mut changed, || core.is_given_up.load(Ordering::Relaxed)).await;
    let outcomes = ended.ok_or(Status::Aborted)?.into_iter().collect::<Result<Vec<Changed>, Status>>()?;
    Ok(outcomes.iter().all(|outcome| *outcome == Changed::Done))
}

/// The units that lie wholly in bytes `from..to` of an extent.
fn bits_of(view: &View, from: u64, to: u64) -> [u64; 4] {
    let unit = u64::from(view.thin.unit_bytes);
    let first = from.div_ceil(unit);
    let last = if to == view.thin.extent_bytes { u64::from(view.thin.units()) } else { to / unit };
    let mut bits = [0u64; 4];
    for at in first..last {
        bits[usize::try_from(at >> 6).unwrap_or(3)] |= 1 << (at & 63);
    }
    bits
}

/// Writes zeroes where something is mapped; what is not reads as zeroes.
async fn write_zeroes(core: &Rc<Core>, (first, len): (u64, u64), counted: &Counted) -> Outcome {
    let view = core.shared.view();
    for (index, _, start, here) in by_extent(view.thin.extent_bytes, (first, len)) {
        if view.table.lookup(&core.volume.map(), index).is_mapped() {
            write_extent(core, (first + start, here), &Payload::Zeroes, counted).await?;
        }
    }
    Ok(())
}

/// Gives back what can be; returns the bytes that do not read as zeroes for certain.
async fn discard(core: &Rc<Core>, (first, len): (u64, u64)) -> Result<Vec<(u64, u64)>, Status> {
    let view = core.shared.view();
    let map = core.volume.map();
    let size = map.size_bytes();
    let unit = u64::from(view.thin.unit_bytes);
    let id = core.volume.id;
    let mut left = Vec::new();
    let mut whole: Option<(u32, u32)> = None;
    let parts: Vec<Part> = by_extent(view.thin.extent_bytes, (first, len)).collect();
    for (index, within, start, here) in parts {
        let reaches_end = within == 0 && first + start + here == size;
        if here == view.thin.extent_bytes || reaches_end {
            whole = Some(whole.map_or((index, 1), |(from, count)| (from, count + 1)));
            continue;
        }
        if !view.table.lookup(&map, index).is_mapped() {
            continue;
        }
        let (from, to) = (within.div_ceil(unit) * unit, (within + here) / unit * unit);
        let base = first + start - within;
        if from >= to {
            left.push((first + start, here));
            continue;
        }
        let bits = bits_of(&view, from, to);
        let done =
            core.shared.request(move |owner| async move { owner.invalidate(id, index, bits).await }).await?;
        match done {
            true => {
                left.extend([(base + within, from - within), (base + to, within + here - to)]);
            }
            false => left.push((first + start, here)),
        }
    }
    left.retain(|(_, len)| *len > 0);
    if let Some((index, count)) = whole {
        let kept = core
            .shared
            .request(move |owner| async move { owner.unmap(id, (index, count), size).await })
            .await?;
        let bytes = |index: u32| (u64::from(index) * view.thin.extent_bytes).clamp(first, first + len);
        left.extend(kept.into_iter().map(|(from, to)| (bytes(from), bytes(to) - bytes(from))));
    }
    Ok(left)
}
