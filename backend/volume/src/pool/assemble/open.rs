//! Opening and closing. The order: the tail is made ours, then the superblocks say that we have the pool (from then on nothing of a process before us is
//! under way), then everything is read, then a checkpoint is made that all who have tables agree on.

use super::found::Found;
use super::tables::{is_within, read_intents, read_tables};
use super::{parity_log, still_gets_writes};
use crate::format::{self, Record, Superblock, TailContent, Uuid};
use crate::pool::lanes::{Lanes, Leaf};
use crate::pool::owner::{
    Intents, Locks, Log, Member, Options, Owner, Pending, Replacing, Rounds, Turns, Work, is_copied,
};
use crate::pool::place::Place;
use crate::pool::shared::{Shared, View, lock};
use crate::pool::wait::Bell;
use crate::pool::{Ask, MemoryTail, OpenOptions, Pool, PoolError, PoolView, coverage};
use crate::raid::Mode;
use crate::simulated::is_broken;
use crate::thin::{Metadata, Thin};
use hawser_block::{Device, Status};
use hawser_runtime::{ReactorHandle, Runtime};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

pub(in crate::pool) fn open(
    owner: &ReactorHandle,
    devices: Vec<Arc<dyn Device>>,
    options: OpenOptions,
) -> Ask<Pool> {
    let handle = owner.clone();
    Ask::of(owner, move |runtime| async move {
        let lanes = Lanes::new(&runtime);
        match start(&runtime, handle, &lanes, devices, options).await {
            Ok(pool) => Ok(pool),
            Err(error) => {
                lanes.close();
                Err(error)
            }
        }
    })
}

async fn start(
    runtime: &Runtime,
    handle: ReactorHandle,
    lanes: &Rc<Lanes>,
    devices: Vec<Arc<dyn Device>>,
    mut options: OpenOptions,
) -> Result<Pool, PoolError> {
    let found = Found::read(lanes, devices).await?;
    found.set_modes(options.degraded || options.read_only)?;
    let was_closed = found.book.opened_by.is_none();
    if let Some(other) = found.book.opened_by
        && other != options.host
        && !options.assume_exclusive
        && !options.read_only
    {
        return Err(PoolError::Conflict(format!(
            "pool {} is open on host {}, or was not closed there: want it closed, or --assume-exclusive when that host is dead",
            found.book.name,
            uuid_text(&other)
        )));
    }
    // Before anything is changed: whether it can be opened at all.
    let mut tables = Some(read_tables(lanes, &found).await?);
    let mut logs = parity_log::read(lanes, &found, was_closed, options.accept_loss).await?;
    if options.read_only && !was_closed && logs.iter().any(parity_log::SetLog::is_half_written) {
        return Err(PoolError::Conflict(format!(
            "pool {} lacks members and was not closed, and stripes that were being written are only put right when it is opened for writing",
            found.book.name
        )));
    }
    // Who is out gets nothing before it comes back. Nobody else may get what this process has left, for an earlier opening perhaps.
    let members = found.book.members.iter().zip(&found.members).filter(|(record, _)| record.in_sync);
    let taken = members.filter_map(|(_, place)| place.as_ref().map(|(leaf, _)| leaf));
    let mut taken = taken.chain(&found.replacement).filter(|_| !options.read_only);
    if let Some(leaf) = taken.find(|leaf| leaf.device.has_left_behind()) {
        return Err(still_gets_writes(leaf.name()));
    }
    let untold = untold_of(&found.book, &options);
    let tail = tail_of(&found.book, &options).unwrap_or_default();
    let (caches, mut entries) = (tail.caches, tail.records);
    let book = next_book(runtime, &found.book, &options);
    let now = runtime.now();
    let mut lost_caches = Vec::new();
    let members: Vec<Member> = (0..)
        .zip(book.members.iter().zip(&found.members))
        .map(|(number, (record, place))| {
            let leaf = place.as_ref().map(|(leaf, _)| leaf.clone());
            let new = found.replacement.as_ref().filter(|_| !options.read_only);
            let new = new.filter(|_| {
                let replaced = book.replacement.and_then(|it| book.members.get(usize::from(it.member)));
                replaced.is_some_and(|replaced| replaced.uuid == record.uuid)
            });
            // Whatever is written to the one is written to the other from the beginning.
            let leaf = leaf.map(|old| new.map_or_else(|| old.clone(), |new| Leaf::twin(&old, new)));
            let is_recorded = record.in_sync && leaf.is_some();
            let cache = leaf.as_ref().and_then(|leaf| leaf.device.cache_identity());
            let was = caches.iter().find(|(member, _)| *member == record.uuid).map(|(_, cache)| *cache);
            let is_another = was.is_some() && cache.is_some() && was != cache;
            // One whose cache has no name that we can see tells it by its next FLUSH.
            let owes = leaf.as_ref().is_some_and(|leaf| leaf.device.owes_a_loss());
            let has_lost =
                is_recorded && (is_another || owes && !was_closed && !is_broken("owed_loss_ignored"));
            let is_needed = !was_closed
                && logs.iter().any(|log| log.is_needed(number))
                && !is_broken("needed_member_put_out");
            let is_out = has_lost && !options.read_only && !is_needed && found.goes_on_without(&record.uuid);
            let is_recorded = is_recorded && !is_out;
            let mut member = Member::new(record.uuid, leaf, is_recorded, now);
            member.owes_a_loss = owes;
            if has_lost && is_recorded {
                lost_caches.push((usize::from(number), member.whole_cache));
                // Until it is seen to.
                member.whole_cache = was;
            }
            if !is_recorded {
                let why = match (is_out, place.is_some()) {
                    (true, _) => "lost its volatile cache",
                    (_, true) => "was away",
                    (_, false) => "is missing",
                };
                why.clone_into(&mut member.why);
            }
            member
        })
        .collect();
    let is_cache_lost = !lost_caches.is_empty() && !was_closed && !is_broken("loss_before_opening_not_told");
    let kept_entries = entries.clone();
    if is_cache_lost {
        // As after a power cut: what is acknowledged and not flushed may not be there, and what says that it is would show what stood there before.
        entries.clear();
    }
    let leaves: Vec<Option<Leaf>> = members.iter().map(|member| member.leaf.clone()).collect();
    let is_read_only = options.read_only;
    // What a dead process wrote is on both where a mark says so, or where it is copied again.
    let replacing = book.replacement.filter(|_| !is_read_only).map(|mut it| {
        let is_twin = leaves[usize::from(it.member)].as_ref().is_some_and(|leaf| leaf.twin.is_some());
        if !is_twin || !(was_closed || book.level.is_redundant()) {
            it.copied_bytes = 0;
        }
        Replacing::new(it, found.replacement.clone(), now)
    });
    let work = Work::default();
    // Who only looks does not go on with it.
    work.scrub.set(book.scrub.filter(|_| !is_read_only));
    let shared = Shared::new(
        PoolView::empty(&book),
        handle,
        View {
            is_redundant: book.level.is_redundant(),
            is_copied: is_copied(book.level.is_redundant(), &leaves),
            is_lost: false,
            data_offset: book.layout.data_offset(),
            block_shift: book.block_bytes.trailing_zeros(),
            table: tables.as_ref().expect("read just now").meta.table(),
            thin: Thin {
                extents: found.array.extents(),
                extent_bytes: book.extent_bytes,
                unit_bytes: book.unit_bytes,
            },
            array: found.array.clone(),
            leaves,
        },
        options.read_only,
    );
    let nothing = Thin { extents: 1, extent_bytes: book.extent_bytes, unit_bytes: book.unit_bytes };
    let owner = Rc::new(Owner {
        runtime: runtime.clone(),
        place: Place::of(runtime, &shared),
        shared,
        lanes: Rc::clone(lanes),
        meta: RefCell::new(Metadata::new(nothing, book.layout.metadata_pages)),
        book: RefCell::new(book),
        members: RefCell::new(members),
        spares: RefCell::new(found.spares.clone()),
        replacing: RefCell::new(replacing),
        options: Options::of(&options),
        tail: RefCell::new(std::mem::replace(&mut options.tail, Box::new(MemoryTail::default()))),
        tail_used: Cell::new(0),
        seq: Cell::new(0),
        durable: Cell::new(0),
        flushed: Cell::new(0),
        pending: RefCell::new(VecDeque::new()),
        log: Cell::new(Log::default()),
        intents: RefCell::new(Intents::default()),
        turns: Turns::default(),
        rounds: Rounds::default(),
        copies: Rounds::default(),
        freed: RefCell::default(),
        let_go: Cell::new(0),
        locks: Locks::default(),
        frozen: RefCell::default(),
        bell: Bell::default(),
        space: Bell::default(),
        work,
        lost: RefCell::new(None),
        stopped: RefCell::new(None),
        is_low: Cell::new(false),
        is_metadata_low: Cell::new(false),
        is_open: Cell::new(false),
        is_ready: Cell::new(false),
        is_closing: Cell::new(false),
        is_over: Cell::new(false),
        is_read_only,
    });
    for member in 0..owner.members.borrow().len() {
        owner.watch(u16::try_from(member).unwrap_or(0));
    }
    let spares = owner.spares.borrow().clone();
    for leaf in spares.iter().filter_map(|(_, spare)| spare.as_ref()).chain(&found.replacement) {
        leaf.device.fail_after(owner.options.member_timeout);
    }
    if !is_read_only {
        // The tail is ready for us before anybody may take it for another's.
        if !is_broken("tail_not_kept") {
            keep_tail(&owner, &caches, &untold, &kept_entries);
        }
        if !is_broken("opened_unrecorded") {
            let _turn = owner.turns.superblock.take().await;
            let (_, failed) = owner.write_superblocks(&BTreeSet::new()).await;
            if !failed.is_empty() {
                let names: Vec<String> = failed.iter().map(|member| owner.device_name(*member)).collect();
                return Err(PoolError::Failed(format!(
                    "pool {}: superblocks of {} cannot be written",
                    owner.shared.name,
                    names.join(", ")
                )));
            }
        }
        owner.is_open.set(true);
        // Who is out and there may say that it is not. Now that it was found to be behind, it says so itself: later it may not be to be seen.
        let is_there: Vec<bool> = owner.members.borrow().iter().map(|member| member.leaf.is_some()).collect();
        for (member, is_there) in (0u16..).zip(is_there) {
            if is_there && owner.mode_of(member) == Mode::Away && !owner.has_left_behind(member) {
                // Who cannot be is told when it joins.
                let _ = owner.tell(member).await;
            }
        }
        if !was_closed {
            // Writes of the process before us are over only now.
            drop((tables.take(), logs));
            tables = Some(read_tables(lanes, &found).await?);
            logs = parity_log::read(lanes, &found, was_closed, options.accept_loss).await?;
        }
    }
    let tables = tables.expect("read just now");
    let pages = read_intents(lanes, &found).await;
    owner.take_over(tables.meta, tables.seq, tables.log);
    owner.begin_intents(pages, was_closed);
    if is_read_only && !was_closed && !is_broken("read_only_not_doubted") {
        owner.doubt_what_is_marked();
    }
    if !is_read_only {
        parity_log::put_in_place(&owner, logs).await?;
    }
    owner.resume_replacing();
    let replayed = replay_tail(&owner, tables.seq, entries)?;
    owner.register();
    owner.show_volumes();
    if is_cache_lost || !untold.is_empty() {
        // With what the process before us had acknowledged, to guests that go on: the next FLUSH of each tells it.
        let volumes: Vec<_> = lock(&owner.shared.volumes).values().cloned().collect();
        let have_lost = volumes.iter().filter(|volume| is_cache_lost || untold.contains(&volume.id));
        have_lost.for_each(|volume| volume.has_lost());
    }
    if !is_read_only {
        for (member, cache) in lost_caches {
            owner.members.borrow_mut()[member].whole_cache = cache;
        }
        owner.begin_tail();
    }
    if !is_read_only {
        let ready = async {
            // A page that was bad somewhere is written anew everywhere.
            if !is_broken("opened_without_checkpoint") {
                owner.checkpoint(tables.bad_pages > 0).await?;
            }
            owner.rewrite_intents().await
        };
        if let Err(status) = ready.await {
            owner.unregister();
            if !owner.has_lost_while_opening() {
                return Err(owner.failed("cannot be opened", status));
            }
            // As if it had been lost before: what the process before us had written first to some units may be gone.
            owner.pending.borrow_mut().clear();
            lock(&owner.shared.volumes).values().for_each(|volume| volume.has_lost());
            owner.begin_tail();
            return Err(PoolError::Failed(format!(
                "pool {}: a member has lost its volatile cache while it was being opened: want it opened again",
                owner.shared.name
            )));
        }
        owner.is_ready.set(true);
        owner.shared.is_writable.store(true, Ordering::Release);
        if let Err(error) = owner.use_all_extents().await {
            owner.unregister();
            return Err(error);
        }
        runtime.spawn(Rc::clone(&owner).tick());
        runtime.spawn(Rc::clone(&owner).housekeeping());
        runtime.spawn(Rc::clone(&owner).resync());
    }
    owner.publish();
    log::info!(
        "pool {}: open, {} records of its log and {replayed} of its last process were done again",
        owner.shared.name,
        tables.replayed
    );
    Ok(Pool::of(Arc::clone(&owner.shared)))
}

/// Volumes that have lost something, which the process before us has told nobody of, whether it has closed the pool or not.
fn untold_of(book: &Superblock, options: &OpenOptions) -> Vec<u32> {
    let tail = format::decode_tail(&options.tail.content(), &book.pool_uuid).unwrap_or_default();
    let is_last = tail.epoch == book.epoch;
    let is_next = count_of(tail.epoch) == count_of(book.epoch) + 1 && book.opened_by == Some(options.host);
    let counts = (is_last || is_next) && !is_broken("loss_not_kept");
    if counts { tail.untold } else { Vec::new() }
}

/// What the process before us acknowledged and may not have made durable; of this pool, this host, and its last opening.
fn tail_of(book: &Superblock, options: &OpenOptions) -> Option<TailContent> {
    let tail = format::decode_tail(&options.tail.content(), &book.pool_uuid)?;
    let is_last = tail.epoch == book.epoch && book.opened_by == Some(options.host);
    // A process that died while it opened the pool.
    // Of a pool that was closed it has nothing: what is in it then was made on other members, without these.
    let is_next = count_of(tail.epoch) == count_of(book.epoch) + 1 && book.opened_by == Some(options.host);
    if !(is_last || is_next || tail.records.is_empty()) {
        log::warn!(
            "pool {}: {} changes that a process of this host left in its run folder are of an earlier opening: the pool was opened \
             elsewhere, or with another run folder, since; they are not done again",
            book.name,
            tail.records.len()
        );
    }
    (is_last || is_next).then_some(tail)
}

/// The openings before an epoch: its upper half. The lower half is random, so that two openings that know nothing of each other differ.
fn count_of(epoch: u64) -> u64 {
    epoch >> 32
}

/// What the superblocks say while we have it open.
fn next_book(runtime: &Runtime, book: &Superblock, options: &OpenOptions) -> Superblock {
    let mut next = book.clone();
    if !options.read_only {
        next.epoch = (count_of(book.epoch) + 1) << 32 | runtime.random() >> 32;
        next.opened_by = Some(options.host);
    }
    next
}

fn keep_tail(owner: &Rc<Owner>, caches: &[(Uuid, [u8; 16])], untold: &[u32], entries: &[(u64, Record)]) {
    let mut kept = owner.whole_caches();
    // Who has lost its cache is found out again, if we do not come to write that down.
    let lost = caches.iter().filter(|(member, _)| !kept.iter().any(|(other, _)| other == member));
    let lost: Vec<_> = lost.copied().collect();
    kept.extend(lost);
    let epoch = owner.book.borrow().epoch;
    let mut content = format::encode_tail_header(&owner.shared.uuid, epoch, &kept, untold);
    for (seq, record) in entries {
        format::encode_tail_entry(*seq, record, &mut content);
    }
    owner.tail.borrow_mut().replace(&content);
}

/// Applies what the members' log does not have.
fn replay_tail(owner: &Rc<Owner>, seq: u64, entries: Vec<(u64, Record)>) -> Result<u64, PoolError> {
    let mut next = seq;
    for (number, record) in entries {
        if number < next {
            continue;
        }
        let failed = |what: String| {
            PoolError::Failed(format!(
                "pool {}: what its last process acknowledged and left in its run folder {what}: want that file back, or removed if \
                 it may be lost",
                owner.shared.name
            ))
        };
        if number > next {
            return Err(failed(format!("lacks records before {number}")));
        }
        if !is_within(&record, &owner.view().array) {
            return Err(failed("names more extents than its members have".to_owned()));
        }
        owner.replay_one(number, &record).map_err(|what| failed(format!("cannot be done: {what}")))?;
        next += 1;
    }
    if next > seq {
        coverage::count(coverage::Event::TailReplayed);
    }
    Ok(next - seq)
}

impl Owner {
    fn take_over(&self, meta: Metadata, seq: u64, log: Log) {
        let view = self.view();
        let table = meta.table();
        *self.meta.borrow_mut() = meta;
        self.seq.set(seq);
        self.durable.set(seq);
        self.flushed.set(seq);
        // A batch of this number may stand on somebody who was away.
        self.log.set(Log { batch: log.batch + 1, ..log });
        self.shared.set_view(View { table, ..View::clone(&view) });
    }

    fn replay_one(&self, seq: u64, record: &Record) -> Result<(), String> {
        self.meta.borrow_mut().apply(record)?;
        self.seq.set(seq + 1);
        self.pending.borrow_mut().push_back(Pending::new(seq, record));
        self.take_freed();
        Ok(())
    }

    /// Takes the marks over. After a death, what is marked may differ.
    fn begin_intents(&self, pages: Vec<Option<Vec<u64>>>, was_closed: bool) {
        *self.intents.borrow_mut() = Intents::new(pages);
        let sets = self.view().array.sets().to_vec();
        for (index, set) in sets.iter().enumerate().filter(|(_, set)| set.level().is_redundant()) {
            let first = self.first_region(index);
            for region in (0..set.regions()).filter(|region| self.intents.borrow().is_durable(first + region))
            {
                set.intents.set(region);
                if !was_closed {
                    set.unsynced.set(region);
                }
            }
        }
    }

    /// Makes everything durable and lets go. Nobody uses a volume any more. What fails is made good by the next opening, as after a death.
    pub(crate) async fn close(self: Rc<Self>) -> Result<(), PoolError> {
        if self.is_closing.replace(true) {
            return Err(PoolError::Conflict(format!("pool {} is being closed", self.shared.name)));
        }
        self.shared.is_writable.store(false, Ordering::Release);
        self.shared.is_stopped.store(false, Ordering::Release);
        self.bell.ring();
        self.space.ring();
        let is_lost = self.lost.borrow().is_some();
        let closed = match (self.is_read_only, is_lost) {
            (true, _) => Ok(()),
            // What it has acknowledged and not made durable is in the tail only.
            (false, true) => Err(Status::ReadOnly),
            (false, false) => self.make_whole().await,
        };
        // What is made whole is what was acknowledged; the rest is for the next opening.
        let is_stopped = self.stopped.borrow().is_some();
        let closed = closed.and(if is_stopped { Err(Status::ReadOnly) } else { Ok(()) });
        // Tasks that sleep still name it, or wait for a turn.
        self.is_over.set(true);
        self.unregister();
        closed.map_err(|status| self.failed("is closed as after a crash", status))
    }

    async fn make_whole(self: &Rc<Self>) -> Result<(), Status> {
        // What is just being copied.
        drop(self.turns.window.take().await);
        let _turn = self.turns.change.take().await;
        // What is just being discarded: who has the pool next may give that to somebody.
        let _discards = match is_broken("discards_outlive_close") {
            true => None,
            false => Some(self.turns.reclaim.take().await),
        };
        self.barrier().await;
        if is_broken("closed_before_durable") {
            let _turn = self.turns.superblock.take().await;
            self.book.borrow_mut().opened_by = None;
            self.record_members().await?;
        }
        let copied = self.copied();
        self.flush().await?;
        self.release_all_stripes().await?;
        self.end_idle_unlogged(true).await?;
        if self.has_stripes_half_written() && !is_broken("closed_with_entries") {
            // The next opening does them again, and does not look for them in a pool that was closed.
            return Err(Status::Path);
        }
        self.copied_is_durable(copied);
        self.clear_idle_intents(true).await?;
        self.checkpoint(false).await?;
        let _turn = self.turns.superblock.take().await;
        let is_same = self.view().array.sets().iter().all(|set| !set.unsynced.any());
        if is_same {
            self.book.borrow_mut().opened_by = None;
        }
        self.record_members().await?;
        self.begin_tail();
        Ok(())
    }
}

fn uuid_text(uuid: &Uuid) -> String {
    let hex: String = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}
