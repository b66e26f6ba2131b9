//! A member that another device takes the place of while it stays in service.
//!
//! ```text
//!   begun      superblocks name the replacement; the member's place is a twin: who writes to the one writes to the other
//!   copied     window by window, from the member's first byte to its last; superblocks say how far, now and then
//!   strict     tables and marks are written anew, to both; from now on a write that is not on both has failed
//!   swapped    superblocks have the replacement in the place; the old one's are wiped when they are durable
//! ```
//!
//! Redundancy is the same all the time. If the old one goes out before the end, the new one takes its place at once with what it has,
//! and lacks the rest. If the new one fails something, it begins anew.
//!
//! Invariant: what is below `done` and not in `stale` is the same on both, whoever is read: all that writes to the member writes to both.

use super::Owner;
use super::caches::Cache;
use super::members::write_superblock;
use super::slide::Slices;
use crate::format::{Layout, PAGE_BYTES, Replacement, Superblock, Uuid};
use crate::pool::PoolError;
use crate::pool::bounce::Bounce;
use crate::pool::coverage;
use crate::pool::lanes::Leaf;
use crate::pool::manners::slice_bytes;
use crate::pool::twin::{Phase, Twin};
use crate::raid::{Level, Mode, Set};
use crate::simulated::is_broken;
use hawser_block::{Device, DeviceState, Outcome, Status};
use hawser_runtime::Instant;
use std::collections::BTreeSet;
use std::ops::Range;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What is copied before it is looked at what is next: so much, or more when that takes no longer than [`STEP_MS`].
const STEP_BYTES: Range<u64> = 256 << 10..8 << 20;
const STEP_MS: u64 = 100;
/// How long it copies before whatever else is due has its turn.
const SHIFT: Duration = Duration::from_secs(2);
/// How long it leaves a device alone that failed.
const AGAIN: Duration = Duration::from_secs(2);
/// How often at least the superblocks say how far it is, in parts of the whole.
const RECORDS: u64 = 64;
/// And not for less.
const RECORD_BYTES_MIN: u64 = 1 << 20;

const REPLACE: &str = "replace";

/// A replacement that is under way.
pub(crate) struct Replacing {
    pub(crate) member: u16,
    pub(crate) uuid: Uuid,
    /// The new device, if it is there.
    pub(crate) leaf: Option<Leaf>,
    /// Bytes of the member's data area that were copied.
    done: u64,
    /// Of these, that are durable.
    safe: u64,
    /// What is to be copied again.
    stale: Vec<Range<u64>>,
    /// Not before.
    again: Instant,
    /// What hinders it, or empty.
    why: String,
    /// The old member, as the superblocks knew it, while these are being rewritten.
    swapped: Option<(Uuid, Option<[u8; 16]>)>,
}

impl Replacing {
    /// It has `copied_bytes` already.
    pub(crate) fn new(
        Replacement { uuid, copied_bytes, member }: Replacement,
        leaf: Option<Leaf>,
        now: Instant,
    ) -> Replacing {
        Replacing {
            member,
            uuid,
            leaf,
            done: copied_bytes,
            safe: copied_bytes,
            stale: Vec::new(),
            again: now,
            why: String::new(),
            swapped: None,
        }
    }

    /// The old member's entry in the tail, as long as it may still be the member.
    pub(super) fn old_cache(&self) -> Option<(Uuid, [u8; 16])> {
        self.swapped.and_then(|(uuid, cache)| Some((uuid, cache?)))
    }
}

enum Step {
    Wait,
    Begin,
    Copy(Range<u64>),
    Finish,
    /// The old member is out.
    TakeOver,
}

impl Owner {
    fn twin_of(&self, member: u16) -> Option<Arc<Twin>> {
        self.members.borrow()[usize::from(member)].leaf.as_ref()?.twin.clone()
    }

    /// What the superblocks shall say of it.
    pub(super) fn replacement(&self) -> Option<Replacement> {
        let replacing = self.replacing.borrow();
        let Replacing { member, uuid, safe, .. } = *replacing.as_ref().filter(|it| it.swapped.is_none())?;
        let has_it = self.twin_of(member).is_some_and(|twin| twin.is_good());
        Some(Replacement { uuid, copied_bytes: if has_it { safe } else { 0 }, member })
    }

    /// Whether the superblocks call something copied that has to be copied again: what tells where must stay marked.
    pub(super) fn replacement_lacks(&self, set: &Set) -> bool {
        let is_of_set =
            |member: u16| (set.first_member()..set.first_member() + set.members()).contains(&member);
        let replacing = self.replacing.borrow();
        let has_stale = replacing.as_ref().is_some_and(|it| is_of_set(it.member) && !it.stale.is_empty());
        let recorded =
            self.book.borrow().replacement.filter(|it| it.copied_bytes > 0 && is_of_set(it.member));
        let is_good = |member| self.twin_of(member).is_some_and(|twin| twin.is_good());
        has_stale || recorded.is_some_and(|it| !is_good(it.member))
    }

    /// Writes down on the new device that it is the replacement. The superblocks' turn is the caller's.
    pub(super) async fn label_replacement(self: &Rc<Self>, book: &Superblock) -> Outcome {
        let Some(Replacement { uuid, .. }) = book.replacement else { return Ok(()) };
        let leaf = self.replacing.borrow().as_ref().and_then(|it| it.leaf.clone());
        let leaf = leaf.filter(|leaf| !leaf.device.has_left_behind());
        let Some(leaf) = leaf else { return Ok(()) };
        write_superblock(self, &leaf, &Superblock { this: uuid, ..book.clone() }).await
    }

    /// Whether the member can be copied, so that it need not be put out first.
    pub(super) fn can_be_copied(&self, member: u16) -> bool {
        let members = self.members.borrow();
        let entry = &members[usize::from(member)];
        let is_there = entry.leaf.as_ref().is_some_and(|leaf| leaf.device.state() == DeviceState::Ready);
        is_there && entry.is_recorded && self.mode_of(member) == Mode::InSync
    }

    /// Begins to replace a member that is in service. The turn of changes is the caller's.
    pub(super) async fn begin_replacing(self: &Rc<Self>, member: u16, leaf: Leaf) -> Result<(), PoolError> {
        let name = leaf.name().to_owned();
        leaf.device.fail_after(self.options.member_timeout);
        let now = self.runtime.now();
        let replacement = Replacement { uuid: self.random_uuid(), copied_bytes: 0, member };
        let recorded = {
            let _turn = self.turns.superblock.take().await;
            // The new one first, with a generation that counts for nothing: the others name none that does not know that it is.
            let book = self.book.borrow().clone();
            let own =
                Superblock { generation: 0, replacement: Some(replacement), this: replacement.uuid, ..book };
            match write_superblock(self, &leaf, &own).await {
                Ok(()) => {
                    *self.replacing.borrow_mut() = Some(Replacing::new(replacement, Some(leaf), now));
                    self.record_members().await
                }
                error => error,
            }
        };
        if let Err(status) = recorded {
            self.replacing.borrow_mut().take();
            let _turn = self.turns.superblock.take().await;
            let _ = self.record_members().await;
            return Err(self.failed(&name, status));
        }
        self.publish();
        Ok(())
    }

    /// The member stays; the device that was to take its place is nobody's.
    pub(crate) async fn abort_replacing(self: Rc<Self>) -> Result<(), PoolError> {
        let _turn = self.turns.change.take().await;
        self.check_writable().map_err(|status| self.failed("cannot be changed", status))?;
        let Some(replacing) = self.replacing.borrow_mut().take() else {
            return Err(PoolError::Conflict(format!("pool {} is replacing no member", self.shared.name)));
        };
        let member = replacing.member;
        self.work.forget(REPLACE);
        if let Some(twin) = self.twin_of(member) {
            twin.switch_off();
            self.be(member, Leaf::new(Arc::clone(&twin.old)));
        }
        {
            let _turn = self.turns.superblock.take().await;
            self.record_members().await.map_err(|status| self.failed("cannot be changed", status))?;
        }
        self.all_have_ended().await;
        if let Some(leaf) = replacing.leaf {
            self.wipe(&leaf).await;
        }
        self.publish();
        Ok(())
    }

    /// From now on this is the member's device.
    fn be(self: &Rc<Self>, member: u16, leaf: Option<Leaf>) {
        let Some(leaf) = leaf else { return };
        self.members.borrow_mut()[usize::from(member)].leaf = Some(leaf);
        self.new_view();
        self.watch(member);
    }

    /// Waits until nobody is at work any more who may have taken a device for a member's that is not.
    async fn all_have_ended(&self) {
        let Self { turns, .. } = self;
        for turn in [
            &turns.reclaim,
            self.rounds.turn(),
            self.copies.turn(),
            &turns.checkpoint,
            &turns.commit,
            &turns.intents,
            &turns.superblock,
        ] {
            drop(turn.take().await);
        }
        drop(turns.window.take().await);
        self.barrier().await;
    }

    /// A device is no member's any more, and does not say that it is.
    async fn wipe(self: &Rc<Self>, leaf: &Leaf) {
        let nothing = Rc::new(Bounce::zeroed(PAGE_BYTES));
        if leaf.device.has_left_behind() {
            let (pool, name) = (&self.shared.name, leaf.name());
            log::warn!(
                "pool {pool}: {name} is no member any more, and still says that it is: writes of before may still reach it"
            );
            return;
        }
        for offset in Layout::SUPERBLOCKS {
            if let Err(status) = self.lanes.write(leaf, offset, &nothing, 0, PAGE_BYTES, true).await {
                let (pool, name, why) = (&self.shared.name, leaf.name(), status.name());
                log::warn!("pool {pool}: {name} is no member any more, and still says that it is: {why}");
                return;
            }
        }
    }

    /// For people: the device, and what hinders it.
    pub(super) fn replacement_view(&self) -> Option<(u16, Option<String>, String)> {
        let replacing = self.replacing.borrow();
        let replacing = replacing.as_ref()?;
        let device = replacing.leaf.as_ref().map(|leaf| leaf.name().to_owned());
        let why = match &replacing.leaf {
            None => "is missing".to_owned(),
            Some(leaf) if replacing.why.is_empty() => leaf.device.trouble(),
            Some(_) => replacing.why.clone(),
        };
        Some((replacing.member, device, why))
    }

    fn next_step(&self) -> Step {
        let replacing = self.replacing.borrow();
        let Some(it) = replacing.as_ref() else { return Step::Wait };
        let Some(leaf) = &it.leaf else { return Step::Wait };
        let is_ready = leaf.device.state() == DeviceState::Ready && !leaf.device.has_left_behind();
        if self.runtime.now() < it.again || !is_ready {
            return Step::Wait;
        }
        let twin = self.twin_of(it.member);
        let is_good = twin.is_some_and(|twin| twin.is_good());
        let (set, _) = self.place_of(it.member);
        match self.mode_of(it.member) {
            Mode::Away if set.level().is_redundant() => return Step::TakeOver,
            Mode::InSync => {}
            _ => return Step::Wait,
        }
        if !is_good {
            return Step::Begin;
        }
        if let Some(range) = it.stale.last() {
            return Step::Copy(range.start..range.end.min(range.start + STEP_BYTES.start));
        }
        let total = self.needed_bytes(it.member);
        match it.done < total {
            true => Step::Copy(it.done..total.min(it.done + self.step_bytes(total))),
            false => Step::Finish,
        }
    }

    fn step_bytes(&self, total: u64) -> u64 {
        let in_time = match self.options.sync_bytes_per_second {
            0 => STEP_BYTES.end,
            rate => rate / 1000 * STEP_MS,
        };
        let bytes = in_time.min(total / RECORDS).clamp(STEP_BYTES.start, STEP_BYTES.end);
        bytes - bytes % STEP_BYTES.start
    }

    fn hindered(&self, why: String) {
        let again = self.runtime.now() + AGAIN;
        if let Some(it) = self.replacing.borrow_mut().as_mut() {
            if it.why != why && !why.is_empty() {
                log::warn!("pool {}: replacing member {}: {why}", self.shared.name, it.member);
            }
            (it.again, it.why) = (again, why);
        }
    }

    /// Goes on with a replacement for a while, if there is one and it can be.
    pub(super) async fn go_on_replacing(self: &Rc<Self>) {
        let until = self.runtime.now() + SHIFT;
        while self.runtime.now() < until && !self.is_closing.get() && self.ended().is_none() {
            match self.next_step() {
                Step::Wait => break,
                Step::Begin => self.begin_copy().await,
                Step::Copy(range) => self.copy_range(range).await,
                Step::Finish => self.finish_replacing().await,
                Step::TakeOver => self.take_over_early().await,
            }
        }
        self.work.pause();
    }

    /// Nothing counts that was copied; from now on all writes go to both.
    async fn begin_copy(self: &Rc<Self>) {
        let (member, leaf) = {
            let mut replacing = self.replacing.borrow_mut();
            let Some(it) = replacing.as_mut() else { return };
            (it.done, it.safe) = (0, 0);
            it.stale.clear();
            let Some(leaf) = it.leaf.clone() else { return };
            (it.member, leaf)
        };
        self.work.forget(REPLACE);
        if self.book.borrow().replacement.is_some_and(|it| it.copied_bytes > 0) {
            let _turn = self.turns.superblock.take().await;
            let _ = self.record_members().await;
        }
        // What the old one is told not to need, both would have to be told, or neither.
        let _discards = self.turns.reclaim.take().await;
        let _turn = self.turns.window.take().await;
        let is_still = self
            .replacing
            .borrow()
            .as_ref()
            .is_some_and(|it| it.leaf.as_ref().is_some_and(|it| it.same(&leaf)));
        let old = self.members.borrow()[usize::from(member)].leaf.clone();
        let Some(old) = old.filter(|_| is_still) else { return };
        match &old.twin {
            Some(twin) if Arc::ptr_eq(&twin.new, &leaf.device) => twin.switch_on(),
            Some(twin) => {
                if let Some(old) = Leaf::new(Arc::clone(&twin.old)) {
                    self.be(member, Some(Leaf::twin(&old, &leaf)));
                }
            }
            None => self.be(member, Some(Leaf::twin(&old, &leaf))),
        }
        self.barrier().await;
    }

    async fn copy_range(self: &Rc<Self>, range: Range<u64>) {
        let Some((member, uuid, total)) =
            self.replacing.borrow().as_ref().map(|it| (it.member, it.uuid, self.needed_bytes(it.member)))
        else {
            return;
        };
        let (set, index) = self.place_of(member);
        let Some(twin) = self.twin_of(member) else { return };
        let done = self.replacing.borrow().as_ref().map_or(0, |it| it.done);
        self.work.go_on(REPLACE, done, total, self.runtime.now());
        let len = range.end - range.start;
        // With parity what nobody has written counts too: parity may be made of it later.
        let counts = set.parity().is_some() || self.is_in_use(&set, range.start, len);
        let copied = match counts {
            true => {
                // What cannot be read is written again, copies of it too, which may be a strip before or behind.
                let len = slice_bytes(2, self.options.sync_bytes_per_second);
                let slices = Slices { len, cost: 2, margin: u64::from(set.strip_bytes()) };
                let copy = |part: Range<u64>| self.copy_to_new(&set, (index, uuid), &twin, part);
                self.slide(&set, range.clone(), slices, copy).await
            }
            false => Ok(range.end),
        };
        match copied {
            Ok(end) if end == range.end => {}
            // It is being closed.
            Ok(_) => return,
            Err(why) => return self.hindered(why),
        }
        let is_due = {
            let mut replacing = self.replacing.borrow_mut();
            // Another may have begun while this one had to wait.
            let Some(it) = replacing.as_mut().filter(|it| it.uuid == uuid) else { return };
            it.why.clear();
            match it.stale.last_mut() {
                Some(stale) => {
                    stale.start = range.end;
                    it.stale.retain(|stale| stale.start < stale.end);
                }
                None => {
                    it.done = range.end;
                    self.work.add(len, 0);
                }
            }
            it.stale.is_empty() && it.done >= it.safe + (total / RECORDS).max(RECORD_BYTES_MIN)
        };
        if is_due {
            self.record_copied().await;
        }
    }

    /// Copies bytes of a member's data area from the old device, or from who else has them, to the new one. The window is the caller's.
    async fn copy_to_new(
        self: &Rc<Self>,
        set: &Arc<Set>,
        (index, uuid): (u16, Uuid),
        twin: &Arc<Twin>,
        range: Range<u64>,
    ) -> Result<(), String> {
        let view = self.view();
        let leaf = self.members.borrow()[usize::from(set.first_member() + index)].leaf.clone();
        let new =
            self.replacing.borrow().as_ref().filter(|it| it.uuid == uuid).and_then(|it| it.leaf.clone());
        let (Some(leaf), Some(new)) = (leaf, new) else { return Err(String::new()) };
        let (at, len) = (view.data_offset + range.start, range.end - range.start);
        let size = usize::try_from(len).expect("a window is small");
        let bounce = Rc::new(self.place.spare.take(size));
        let cannot = |status: Status| {
            format!("{} cannot be read at {at}: {}; tried again", leaf.name(), status.name())
        };
        if let Err(status) = self.lanes.read(&leaf, at, &bounce, 0, size).await {
            if !set.level().is_redundant() {
                return Err(cannot(status));
            }
            match set.parity() {
                Some(_) => {
                    self.rewrite_bad_strips(set, range.clone()).await.map_err(cannot)?;
                    self.lanes.read(&leaf, at, &bounce, 0, size).await.map_err(cannot)?;
                }
                None => {
                    // What has no data may stay as it is: nobody has a copy of it, nor needs one.
                    bounce.zero(0, size);
                    for piece in set.pieces_of_member(index, range.start, len).collect::<Vec<_>>() {
                        self.rewrite_bad(set, &piece).await.map_err(cannot)?;
                        let (within, len) = (usize::try_from(piece.start), piece.len as usize);
                        let within = within.expect("a window is small");
                        self.lanes
                            .read(&leaf, at + piece.start, &bounce, within, len)
                            .await
                            .map_err(cannot)?;
                    }
                }
            }
        }
        if self.lost.borrow().is_some() {
            return Err(String::new());
        }
        self.lanes.write(&new, at, &bounce, 0, size, false).await.map_err(|status| {
            twin.switch_off();
            format!("{} cannot be written at {at}: {}; it begins anew", new.name(), status.name())
        })
    }

    /// Makes what was copied durable, and writes down how much it is.
    async fn record_copied(self: &Rc<Self>) {
        let Some((member, leaf, done)) =
            self.replacing.borrow().as_ref().and_then(|it| Some((it.member, it.leaf.clone()?, it.done)))
        else {
            return;
        };
        let Some(twin) = self.twin_of(member) else { return };
        if self.lanes.flush(&leaf).await.is_err() {
            twin.switch_off();
            return;
        }
        // The old one, too: discards of before this began must not be undone where the other has what stands there now.
        // With all members, as everybody does: who has lost something says so once.
        if self.flush_members().await.is_err() {
            return;
        }
        if let Some(it) = self.replacing.borrow_mut().as_mut().filter(|_| twin.is_good()) {
            it.safe = it.done.min(done);
        }
        let _turn = self.turns.superblock.take().await;
        let _ = self.record_members().await;
    }

    /// How much was copied.
    pub(crate) fn copied(&self) -> u64 {
        self.replacing.borrow().as_ref().filter(|it| it.stale.is_empty()).map_or(0, |it| it.done)
    }

    /// So much of what was copied is durable: all members have flushed since.
    pub(crate) fn copied_is_durable(&self, copied: u64) {
        if let Some(it) = self.replacing.borrow_mut().as_mut() {
            it.safe = it.safe.max(copied.min(it.done));
        }
    }

    /// What is marked may be on one of the two only, if the process before us died: it is copied again.
    pub(crate) fn resume_replacing(&self) {
        let Some((member, copied)) = self.replacing.borrow().as_ref().map(|it| (it.member, it.done)) else {
            return;
        };
        let (set, _) = self.place_of(member);
        let bytes = set.region_bytes();
        let of_region =
            |region: u32| (u64::from(region) * bytes)..((u64::from(region) + 1) * bytes).min(copied);
        let stale: Vec<_> =
            set.intents.iter_set().map(of_region).filter(|range| range.start < range.end).collect();
        if is_broken("marked_not_copied_again") {
            return;
        }
        if let Some(it) = self.replacing.borrow_mut().as_mut() {
            it.stale = stale;
        }
    }

    /// The old member is out: the new one takes its place with what it has.
    async fn take_over_early(self: &Rc<Self>) {
        let _turn = self.turns.change.take().await;
        let Some((member, uuid, leaf, done)) = self.replacing.borrow().as_ref().and_then(|it| {
            let is_good = it.stale.is_empty() && self.twin_of(it.member).is_some_and(|twin| twin.is_good());
            // Only what is durable there: what was copied since may be lost with a cache, and is marked by nobody.
            let has = if is_broken("taken_over_unflushed") { it.done } else { it.safe };
            Some((it.member, it.uuid, it.leaf.clone()?, if is_good { has } else { 0 }))
        }) else {
            return;
        };
        if self.mode_of(member) != Mode::Away {
            return;
        }
        self.work.forget(REPLACE);
        let name = leaf.name().to_owned();
        log::warn!("pool {}: {name} takes the place of member {member} before it has all", self.shared.name);
        if let Err(what) = self.put_in(member, leaf, uuid, done).await {
            self.hindered(what.to_string());
        }
    }

    /// Everything is on both: the new one becomes the member.
    async fn finish_replacing(self: &Rc<Self>) {
        let _turn = self.turns.change.take().await;
        if !matches!(self.next_step(), Step::Finish) || self.is_closing.get() {
            return;
        }
        let Some((member, leaf)) =
            self.replacing.borrow().as_ref().and_then(|it| Some((it.member, it.leaf.clone()?)))
        else {
            return;
        };
        let Some(twin) = self.twin_of(member) else { return };
        let made = self.make_same(member, &leaf, &twin).await;
        if let Err(status) = made {
            twin.set_phase(Phase::Copying);
            self.hindered(format!("cannot be finished: {}; tried again", status.name()));
            return;
        }
        if is_broken("old_member_erased_first")
            && let Some(old) = Leaf::new(Arc::clone(&twin.old))
        {
            self.wipe(&old).await;
        }
        if !self.swap(member, &leaf, &twin).await {
            return;
        }
        self.replacing.borrow_mut().take();
        // It may have been paused since its last step.
        self.work.go_on(REPLACE, 0, 0, self.runtime.now());
        self.work.end(self.runtime.now());
        let (set, _) = self.place_of(member);
        if !set.level().is_redundant() {
            leaf.device.fail_after(Duration::MAX);
        }
        {
            let mut members = self.members.borrow_mut();
            let entry = &mut members[usize::from(member)];
            entry.why.clear();
            // What the old one has lost, if it has, is the new one's still: it is found out as a doubt if it matters.
            let cache = Cache { name: entry.whole_cache, ..Cache::of(leaf.device.as_ref()) };
            (entry.cache, entry.is_doubted) = (Arc::new(Mutex::new(cache)), Arc::default());
        }
        self.be(member, Some(leaf.clone()));
        self.begin_tail();
        self.all_have_ended().await;
        if let Some(old) = Leaf::new(Arc::clone(&twin.old)) {
            self.wipe(&old).await;
        }
        coverage::count(coverage::Event::Replaced);
        log::info!(
            "pool {}: member {member} is {} now, instead of {}",
            self.shared.name,
            leaf.name(),
            twin.name()
        );
        self.publish();
    }

    /// What is behind the tables' last root is on both, and durable on the new one; what is written from now on is on both or fails.
    async fn make_same(self: &Rc<Self>, member: u16, leaf: &Leaf, twin: &Twin) -> Outcome {
        let (set, _) = self.place_of(member);
        if set.parity().is_some() {
            // What was logged before it got everything is not on it, and is not needed any more.
            self.repeat_parity_header(&set, member).await?;
            self.release_stripes(&set).await?;
        }
        if member < self.book.borrow().metadata_members() && !is_broken("swapped_without_tables") {
            self.forget_tables(leaf).await?;
            self.checkpoint(true).await?;
            self.rewrite_intents().await?;
        }
        {
            // It says itself what the others say of it: who looks at it as a member finds it so.
            let _turn = self.turns.superblock.take().await;
            let book = self.book.borrow().clone();
            self.label_replacement(&book).await?;
        }
        twin.set_phase(Phase::Strict);
        self.barrier().await;
        if !is_broken("swapped_unflushed") {
            self.lanes.flush(leaf).await.inspect_err(|_| twin.switch_off())?;
        }
        match twin.is_good() {
            true => Ok(()),
            false => Err(Status::Path),
        }
    }

    /// Writes down that the new one is the member, on all members; whether it is. While it is not known, both are.
    async fn swap(self: &Rc<Self>, member: u16, leaf: &Leaf, twin: &Twin) -> bool {
        let mut to_new = true;
        loop {
            let failed = {
                let _turn = self.turns.superblock.take().await;
                self.name_member(member, leaf, twin, to_new);
                self.begin_tail();
                self.write_superblocks(&BTreeSet::new()).await.1
            };
            if self.lost.borrow().is_some() || self.is_closing.get() && !failed.is_empty() {
                // Nobody writes any more: the next opening finds out.
                return false;
            }
            if failed.is_empty() {
                if !to_new {
                    twin.switch_off();
                    twin.set_phase(Phase::Copying);
                    self.hindered(format!("{} cannot be written; it begins anew", leaf.name()));
                }
                return to_new;
            }
            if to_new && failed.contains(&member) {
                to_new = false;
                continue;
            }
            for other in failed {
                let is_redundant = self.place_of(other).0.level().is_redundant();
                if is_redundant && self.put_out(other, "cannot be written").await && other == member {
                    break;
                }
            }
            self.runtime.sleep(Duration::from_millis(500)).await;
        }
    }

    /// Who is the member, for the superblocks that are about to be written.
    fn name_member(&self, member: u16, leaf: &Leaf, twin: &Twin, to_new: bool) {
        let mut replacing = self.replacing.borrow_mut();
        let Some(it) = replacing.as_mut() else { return };
        let rows = self.needed_bytes(member);
        let mut members = self.members.borrow_mut();
        let entry = &mut members[usize::from(member)];
        match (to_new, it.swapped) {
            (true, None) => {
                it.swapped = Some((entry.uuid, entry.whole_cache));
                entry.uuid = it.uuid;
                entry.whole_cache = leaf.device.cache_identity();
                self.book.borrow_mut().members[usize::from(member)].data_bytes = rows;
                twin.set_phase(Phase::Swapped);
            }
            (false, Some((uuid, cache))) => {
                (entry.uuid, entry.whole_cache) = (uuid, cache);
                it.swapped = None;
                twin.set_phase(Phase::Strict);
            }
            _ => {}
        }
    }

    /// What a member needs for data: as much as the pool uses of it.
    pub(super) fn needed_bytes(&self, number: u16) -> u64 {
        let set = self.place_of(number).0;
        match set.level() {
            Level::Linear => self.book.borrow().members[usize::from(number)].data_bytes,
            _ => set.member_rows_bytes(),
        }
    }
}
