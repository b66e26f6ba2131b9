//! What makes members the same again: after a crash, an outage, a replacement; and what looks whether they are.
//!
//! Writers keep out of a *window* of the members while it is copied: it is announced, everybody who is under way ends, the first copy that is in
//! sync is read and the others are written. A region's mark of difference goes when all of it has been copied.

use super::Owner;
use crate::format::{MemberRecord, Superblock, Uuid};
use crate::pool::bounce::Bounce;
use crate::pool::coverage;
use crate::pool::lanes::Leaf;
use crate::pool::shared::View;
use crate::pool::{PoolError, TaskView};
use crate::raid::{Copy, Mode, Piece, Set};
use crate::simulated::is_broken;
use crate::thin::Mapped;
use hawser_block::{Device, Outcome, Status};
use hawser_runtime::Instant;
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::future::Future;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// What is copied while writers keep out.
const WINDOW_BYTES: u64 = 1 << 20;

const SCRUB: &str = "scrub";

/// Work that takes long.
#[derive(Default)]
pub(crate) struct Work {
    running: Cell<Option<Progress>>,
    /// The last resync or rebuild, and the last scrub.
    last: [Cell<Option<Progress>>; 2],
    scrub_wanted: RefCell<Option<bool>>,
}

#[derive(Clone, Copy, Debug)]
struct Progress {
    kind: &'static str,
    done_bytes: u64,
    total_bytes: u64,
    began: Instant,
    ended: Option<Instant>,
    mismatches: u64,
}

impl Work {
    fn begin(&self, kind: &'static str, total_bytes: u64, now: Instant) {
        let progress = Progress { kind, done_bytes: 0, total_bytes, began: now, ended: None, mismatches: 0 };
        self.running.set(Some(progress));
    }

    fn add(&self, bytes: u64, mismatches: u64) {
        if let Some(mut progress) = self.running.get() {
            progress.done_bytes += bytes;
            progress.mismatches += mismatches;
            self.running.set(Some(progress));
        }
    }

    fn end(&self, now: Instant) {
        if let Some(progress) = self.running.take() {
            let place = usize::from(progress.kind == SCRUB);
            self.last[place].set(Some(Progress { ended: Some(now), ..progress }));
        }
    }

    pub(crate) fn views(&self, now: Instant) -> Vec<TaskView> {
        let waiting = self.scrub_wanted.borrow().map(|_| Progress {
            kind: SCRUB,
            done_bytes: 0,
            total_bytes: 0,
            began: now,
            ended: None,
            mismatches: 0,
        });
        let each =
            [self.running.get(), waiting, self.last[0].get(), self.last[1].get()].into_iter().flatten();
        each.map(|progress| TaskView {
            kind: progress.kind,
            done_bytes: progress.done_bytes,
            total_bytes: progress.total_bytes.max(progress.done_bytes),
            elapsed: progress.ended.unwrap_or(now) - progress.began,
            mismatches: progress.mismatches,
            is_done: progress.ended.is_some(),
        })
        .collect()
    }
}

impl Owner {
    /// Reads a piece from its first copy that is in sync and gives it; says which that was.
    pub(crate) async fn read_first(
        self: &Rc<Self>,
        view: &View,
        set: &Set,
        piece: &Piece,
        into: &Rc<Bounce>,
        at: usize,
    ) -> Result<Copy, Status> {
        let mut last = Status::Path;
        for copy in piece.copies.as_slice() {
            let Some(leaf) = &view.leaves[usize::from(copy.member)] else { continue };
            if set.mode(copy.member - set.first_member()) != Mode::InSync {
                continue;
            }
            match self.lanes.read(leaf, view.data_offset + copy.offset, into, at, piece.len as usize).await {
                Ok(()) if set.mode(copy.member - set.first_member()) == Mode::InSync => return Ok(*copy),
                Ok(()) => {}
                Err(status) => last = status,
            }
        }
        Err(last)
    }

    /// Makes all copies of a piece those of the first that is in sync. The window is the caller's.
    async fn copy_piece(
        self: &Rc<Self>,
        view: &View,
        set: &Set,
        piece: &Piece,
        only: Option<u16>,
    ) -> Outcome {
        let bounce = Rc::new(self.place.spare.take(piece.len as usize));
        let first = self.read_first(view, set, piece, &bounce, 0).await?;
        for copy in piece.copies.as_slice().iter().filter(|copy| copy.member != first.member) {
            let index = copy.member - set.first_member();
            if only.is_some_and(|only| only != index) || set.mode(index) == Mode::Away {
                continue;
            }
            let Some(leaf) = &view.leaves[usize::from(copy.member)] else { continue };
            let offset = view.data_offset + copy.offset;
            if let Err(status) = self.lanes.write(leaf, offset, &bounce, 0, piece.len as usize, false).await {
                self.report(1 << copy.member, status).await?;
            }
        }
        Ok(())
    }

    /// Keeps writers out of a window while `work` runs.
    async fn in_window<T>(
        self: &Rc<Self>,
        set: &Arc<Set>,
        window: Range<u64>,
        work: impl Future<Output = T>,
    ) -> T {
        let _turn = self.turns.window.take().await;
        if !is_broken("resync_without_window") {
            set.set_window(Some(window));
            self.barrier().await;
        }
        let result = work.await;
        set.set_window(None);
        self.bell.ring();
        result
    }

    /// Makes the copies of a piece the same before it is read.
    pub(crate) async fn settle(self: Rc<Self>, set: usize, piece: Piece) -> Outcome {
        let view = self.view();
        let set = Arc::clone(view.array.set(set));
        coverage::count(coverage::Event::Settled);
        self.in_window(&set, window_of(&piece), self.copy_piece(&view, &set, &piece, None)).await
    }

    /// A copy could not be read and another could: it is written again.
    pub(crate) async fn repair(self: Rc<Self>, set: usize, piece: Piece) -> Outcome {
        let view = self.view();
        let set = Arc::clone(view.array.set(set));
        let outcome = self.in_window(&set, window_of(&piece), self.rewrite_bad(&view, &set, &piece)).await;
        self.publish();
        outcome
    }

    async fn rewrite_bad(self: &Rc<Self>, view: &View, set: &Arc<Set>, piece: &Piece) -> Outcome {
        let good = Rc::new(self.place.spare.take(piece.len as usize));
        self.read_first(view, set, piece, &good, 0).await?;
        for copy in piece.copies.as_slice() {
            let index = copy.member - set.first_member();
            let Some(leaf) = &view.leaves[usize::from(copy.member)] else { continue };
            if set.mode(index) != Mode::InSync {
                continue;
            }
            let offset = view.data_offset + copy.offset;
            let look = Rc::new(self.place.spare.take(piece.len as usize));
            if self.lanes.read(leaf, offset, &look, 0, piece.len as usize).await != Err(Status::Media) {
                continue;
            }
            match self.lanes.write(leaf, offset, &good, 0, piece.len as usize, false).await {
                Ok(()) => {
                    coverage::count(coverage::Event::Repaired);
                    self.members.borrow_mut()[usize::from(copy.member)].repaired += 1;
                    let name = leaf.name().to_owned();
                    log::warn!(
                        "pool {}: {name}: bytes that could not be read at {offset} are written again",
                        self.shared.name
                    );
                }
                Err(status) => self.report(1 << copy.member, status).await?,
            }
        }
        Ok(())
    }

    /// Runs until the pool is closed: resynchronises what is marked, brings members back, scrubs when asked.
    pub(crate) async fn resync(self: Rc<Self>) {
        while !self.is_closing.get() {
            if self.lost.borrow().is_some() || self.is_read_only {
                self.pause().await;
                continue;
            }
            let sets = self.view().array.sets().to_vec();
            for set in &sets {
                if set.level().is_redundant() {
                    self.resync_set(set).await;
                }
            }
            let scrub = self.work.scrub_wanted.take();
            if let Some(repair) = scrub {
                self.scrub_all(repair).await;
            }
            self.pause().await;
        }
    }

    /// A while, or until something has changed.
    async fn pause(&self) {
        self.runtime.sleep(Duration::from_millis(200)).await;
    }

    async fn resync_set(self: &Rc<Self>, set: &Arc<Set>) {
        let syncing: Vec<u16> =
            (0..set.members()).filter(|member| set.mode(*member) == Mode::Syncing).collect();
        let regions: Vec<u32> = set.unsynced.iter_set().collect();
        let in_sync = (0..set.members()).filter(|member| set.mode(*member) == Mode::InSync).count();
        if (regions.is_empty() || in_sync + syncing.len() < 2) && syncing.is_empty() {
            return;
        }
        let kind = if syncing.is_empty() { "resync" } else { "rebuild" };
        let total = regions.len() as u64 * set.region_bytes();
        self.work.begin(kind, total, self.runtime.now());
        let mut is_whole = true;
        for region in regions {
            if self.is_closing.get() {
                is_whole = false;
                break;
            }
            is_whole &= self.resync_region(set, region).await;
            self.work.add(set.region_bytes(), 0);
        }
        self.work.end(self.runtime.now());
        if !is_whole || self.is_closing.get() {
            return;
        }
        for member in syncing {
            if set.mode(member) == Mode::Syncing
                && let Err(status) = self.is_whole_again(set, member).await
            {
                log::warn!("pool {}: member {member}: {}", self.shared.name, status.name());
            }
        }
    }

    /// Copies a region to all who lack it; whether it is the same everywhere now.
    async fn resync_region(self: &Rc<Self>, set: &Arc<Set>, region: u32) -> bool {
        let first = u64::from(region) * set.region_bytes();
        let end = (first + set.region_bytes()).min(set.member_rows_bytes());
        // A write that fails meanwhile marks it again.
        let mut at = first;
        let marks = self.shared.unsynced_marks();
        while at < end {
            if self.is_closing.get() {
                return false;
            }
            let len = WINDOW_BYTES.min(end - at);
            let began = self.runtime.now();
            let copied = match self.is_in_use(set, at, len) {
                true => {
                    self.in_window(set, wide_window(set, at, len), self.resync_window(set, at, len)).await
                }
                false => Ok(()),
            };
            if copied.is_err() {
                return false;
            }
            self.throttle(began, len * u64::from(set.members())).await;
            at += len;
        }
        set.unsynced.clear(region);
        if self.shared.unsynced_marks() != marks {
            set.unsynced.set(region);
            return false;
        }
        coverage::count(coverage::Event::Resync);
        true
    }

    async fn resync_window(self: &Rc<Self>, set: &Arc<Set>, offset: u64, len: u64) -> Outcome {
        let view = self.view();
        for member in (0..set.members()).filter(|member| set.mode(*member) != Mode::Away) {
            let pieces: Vec<Piece> = set.pieces_of_member(member, offset, len).collect();
            for piece in &pieces {
                self.copy_piece(&view, set, piece, Some(member)).await?;
            }
        }
        Ok(())
    }

    /// Whether some extent that lies there is in use: what was never written need not be the same.
    fn is_in_use(&self, set: &Set, offset: u64, len: u64) -> bool {
        let data = set.data_of_rows(offset, len);
        let view = self.view();
        let extent_bytes = view.thin.extent_bytes;
        let before: u64 = view
            .array
            .sets()
            .iter()
            .take_while(|other| other.first_member() < set.first_member())
            .map(|other| u64::from(other.extents()))
            .sum();
        let meta = self.meta.borrow();
        let (first, last) = (data.start / extent_bytes, data.end.div_ceil(extent_bytes));
        (first..last).any(|extent| u32::try_from(before + extent).is_ok_and(|extent| !meta.is_free(extent)))
    }

    /// Keeps within the rate that was asked for.
    async fn throttle(&self, began: Instant, bytes: u64) {
        let rate = self.options.sync_bytes_per_second;
        if rate == 0 {
            return;
        }
        let due = Duration::from_nanos(bytes.saturating_mul(1_000_000_000) / rate);
        self.runtime.sleep_until(began + due).await;
    }

    /// A member has everything: that is written down, and it is read from again.
    async fn is_whole_again(self: &Rc<Self>, set: &Arc<Set>, member: u16) -> Outcome {
        let number = set.first_member() + member;
        if set.unsynced.any() {
            return Ok(());
        }
        // Before it may be taken for the first copy that is in sync.
        let leaf = self.members.borrow()[usize::from(number)].leaf.clone().ok_or(Status::Path)?;
        self.lanes.flush(&leaf).await?;
        let _turn = self.turns.superblock.take().await;
        let is_ready = {
            let members = self.members.borrow();
            let member = &members[usize::from(number)];
            !member.is_joining
                && !member.is_recorded
                && !member.is_doubted.load(std::sync::atomic::Ordering::Acquire)
        };
        if !is_ready || set.mode(member) != Mode::Syncing || set.unsynced.any() {
            return Ok(());
        }
        self.members.borrow_mut()[usize::from(number)].is_recorded = true;
        // It has everything, whoever could write that down: those who could not are found out by the next write to them.
        let (_, failed) = self.write_superblocks().await;
        if !failed.is_empty() {
            log::warn!("pool {}: superblocks of members {failed:?} could not be written", self.shared.name);
        }
        if set.mode(member) != Mode::Syncing {
            // It failed meanwhile, and may be called in sync by some: that must not stay.
            self.members.borrow_mut()[usize::from(number)].is_recorded = false;
            return self.record_members().await;
        }
        {
            let member = &mut self.members.borrow_mut()[usize::from(number)];
            member.why.clear();
            member.away_since = None;
        }
        set.set_mode(member, Mode::InSync);
        coverage::count(coverage::Event::Rejoined);
        log::info!(
            "pool {}: member {number} ({}) has all data again",
            self.shared.name,
            self.device_name(number)
        );
        self.publish();
        Ok(())
    }

    /// Begins to bring a member up to date, whose device is there.
    pub(crate) async fn rejoin(self: &Rc<Self>, number: u16) {
        let leaf = self.members.borrow()[usize::from(number)].leaf.clone();
        let Some(leaf) = leaf else { return };
        let uuid = self.members.borrow()[usize::from(number)].uuid;
        match self.label_of(&leaf).await {
            Ok(Some(label)) if label.this == uuid => {
                if let Err(what) = self.bring_back(number, leaf, Some(&label)).await {
                    self.members.borrow_mut()[usize::from(number)].why = what;
                }
            }
            Ok(_) => {
                self.members.borrow_mut()[usize::from(number)].why = "another device than it was".to_owned()
            }
            Err(_) => {}
        }
    }

    /// What a device says of itself.
    pub(crate) async fn label_of(&self, leaf: &Leaf) -> Result<Option<Superblock>, Status> {
        crate::pool::assemble::read_superblock(&self.lanes, leaf).await.map_err(|_| Status::Path)
    }

    /// Takes a device as this member, which gets everything that it lacks. `label`: what it says of itself; `None`: it is new.
    pub(crate) async fn bring_back(
        self: &Rc<Self>,
        number: u16,
        leaf: Leaf,
        label: Option<&Superblock>,
    ) -> Result<(), String> {
        if let Some(label) = label {
            self.check_no_split(number, label)?;
        }
        let (set, index) = self.place_of(number);
        if set.mode(index) != Mode::Away {
            return Ok(());
        }
        {
            let mut members = self.members.borrow_mut();
            let member = &mut members[usize::from(number)];
            *crate::pool::shared::lock(&member.cache) = leaf.device.cache_identity();
            let is_new = member.leaf.as_ref().is_none_or(|before| !before.same(&leaf));
            member.leaf = Some(leaf);
            drop(members);
            if is_new {
                self.watch(number);
            }
        }
        self.new_view();
        self.members.borrow_mut()[usize::from(number)].is_joining = true;
        let joined = self.join(number, &set, index).await;
        self.members.borrow_mut()[usize::from(number)].is_joining = false;
        if let Err(status) = joined {
            set.set_mode(index, Mode::Away);
            return Err(status.name().to_owned());
        }
        self.publish();
        Ok(())
    }

    /// A member gets all writes from now on; what it lacks from before is marked, and its tables are made those of the others.
    async fn join(self: &Rc<Self>, number: u16, set: &Arc<Set>, index: u16) -> Outcome {
        self.shared.mark_unsynced();
        let first = self.first_region_of(set);
        for region in 0..set.regions() {
            if self.intents.borrow().is_durable(first + region) {
                set.unsynced.set(region);
            }
        }
        set.set_mode(index, Mode::Syncing);
        self.barrier().await;
        if number < self.book.borrow().metadata_members() {
            self.checkpoint(true).await?;
            self.rewrite_intents().await?;
        }
        Ok(())
    }

    fn first_region_of(&self, set: &Arc<Set>) -> u32 {
        let view = self.view();
        let index = view.array.sets().iter().position(|other| Arc::ptr_eq(other, set)).unwrap_or(0);
        self.first_region(index)
    }

    /// Refuses a member that went on without the others.
    fn check_no_split(&self, number: u16, label: &Superblock) -> Result<(), String> {
        let (set, _) = self.place_of(number);
        let members = self.members.borrow();
        let is_rival = (0..set.members()).map(|other| usize::from(set.first_member() + other)).any(|other| {
            other != usize::from(number)
                && members[other].is_recorded
                && label.members.get(other).is_some_and(|record| !record.in_sync)
        });
        match is_rival {
            true => Err("it was used without the others, and they without it: want it put in as a replacement, with --force".to_owned()),
            false => Ok(()),
        }
    }

    pub(crate) async fn add_member(self: Rc<Self>, device: Arc<dyn Device>) -> Result<(), PoolError> {
        let _turn = self.turns.change.take().await;
        let leaf = self.leaf_of(device)?;
        let name = leaf.name().to_owned();
        let label = self.label_of(&leaf).await.map_err(|status| self.failed(&name, status))?;
        let label = label.filter(|label| label.pool_uuid == self.shared.uuid).ok_or_else(|| {
            PoolError::Conflict(format!("{name} is no member of pool {}", self.shared.name))
        })?;
        let number = self.members.borrow().iter().position(|member| member.uuid == label.this);
        let spare = self.spares.borrow().iter().position(|(uuid, _)| *uuid == label.this);
        if let Some(spare) = spare {
            self.spares.borrow_mut()[spare].1 = Some(leaf);
            self.publish();
            return Ok(());
        }
        let number = number.and_then(|number| u16::try_from(number).ok()).ok_or_else(|| {
            PoolError::Conflict(format!(
                "{name} was a member of pool {} and has been replaced",
                self.shared.name
            ))
        })?;
        if self.mode_of(number) != Mode::Away {
            return Ok(());
        }
        self.bring_back(number, leaf, Some(&label))
            .await
            .map_err(|what| PoolError::Conflict(format!("{name}: {what}")))
    }

    fn leaf_of(&self, device: Arc<dyn Device>) -> Result<Leaf, PoolError> {
        let name = device.name().to_owned();
        Leaf::new(device).ok_or_else(|| PoolError::Failed(format!("{name} is not reached")))
    }

    /// A device that belongs to nobody and is large enough.
    async fn check_new(&self, leaf: &Leaf, data_bytes: u64, force: bool) -> Result<(), PoolError> {
        let name = leaf.name();
        let geometry =
            leaf.device.geometry().ok_or_else(|| PoolError::Failed(format!("{name} is not reached")))?;
        let (block_bytes, needed) = {
            let book = self.book.borrow();
            (book.block_bytes, book.layout.data_offset() + data_bytes)
        };
        if geometry.block_size.bytes() != block_bytes {
            return Err(PoolError::Wrong(format!(
                "{name} has blocks of {} bytes, want {block_bytes} as the pool",
                geometry.block_size.bytes()
            )));
        }
        if geometry.size_bytes() < needed {
            return Err(PoolError::Wrong(format!(
                "{name} has {} bytes, want at least {needed}",
                geometry.size_bytes()
            )));
        }
        let is_ours = self
            .members
            .borrow()
            .iter()
            .any(|member| member.leaf.as_ref().is_some_and(|other| other.same(leaf)))
            || self
                .spares
                .borrow()
                .iter()
                .any(|(_, spare)| spare.as_ref().is_some_and(|other| other.same(leaf)));
        if is_ours {
            return Err(PoolError::Conflict(format!(
                "{name} is a member of pool {} already",
                self.shared.name
            )));
        }
        let label = self.label_of(leaf).await.map_err(|status| self.failed(name, status))?;
        match label {
            Some(label) if !force => Err(PoolError::Conflict(format!(
                "{name} belongs to pool {}, want another device, or --force",
                label.name
            ))),
            _ => Ok(()),
        }
    }

    fn random_uuid(&self) -> Uuid {
        let mut uuid = [0; 16];
        uuid[..8].copy_from_slice(&self.runtime.random().to_le_bytes());
        uuid[8..].copy_from_slice(&self.runtime.random().to_le_bytes());
        uuid
    }

    pub(crate) async fn replace(
        self: Rc<Self>,
        old: String,
        device: Arc<dyn Device>,
        force: bool,
    ) -> Result<(), PoolError> {
        let _turn = self.turns.change.take().await;
        self.check_writable().map_err(|status| self.failed("cannot be changed", status))?;
        let by_name = self
            .members
            .borrow()
            .iter()
            .position(|member| member.leaf.as_ref().is_some_and(|leaf| leaf.name() == old));
        let number =
            by_name.or_else(|| old.parse().ok()).filter(|number| *number < self.members.borrow().len());
        let number = number.and_then(|number| u16::try_from(number).ok()).ok_or_else(|| {
            PoolError::Unknown(format!(
                "pool {} has no member {old}, want a device or a place",
                self.shared.name
            ))
        })?;
        let leaf = self.leaf_of(device)?;
        let data_bytes = self.book.borrow().members[usize::from(number)].data_bytes;
        self.check_new(&leaf, data_bytes, force).await?;
        self.put_in(number, leaf).await
    }

    /// Puts a device that has nothing in the place of a member.
    async fn put_in(self: &Rc<Self>, number: u16, leaf: Leaf) -> Result<(), PoolError> {
        let (set, index) = self.place_of(number);
        let name = leaf.name().to_owned();
        if !set.level().is_redundant() {
            return Err(PoolError::Conflict(format!(
                "pool {} has no second copy of what member {number} has",
                self.shared.name
            )));
        }
        if !self.put_out(number, "is being replaced").await {
            return Err(PoolError::Conflict(format!(
                "member {number} of pool {} is the last with some data",
                self.shared.name
            )));
        }
        let set_index = self.view().array.set_of_member(number).map_or(0, |(set, _)| set);
        // All of it is lacking: that is durable before anybody may take the new one for a member.
        self.mark_all(set_index).await.map_err(|status| self.failed(&name, status))?;
        {
            let _turn = self.turns.superblock.take().await;
            let uuid = self.random_uuid();
            {
                let mut members = self.members.borrow_mut();
                let member = &mut members[usize::from(number)];
                (member.uuid, member.leaf, member.is_recorded) = (uuid, Some(leaf.clone()), false);
            }
            self.record_members().await.map_err(|status| self.failed(&name, status))?;
            let own = Superblock { this: uuid, ..self.book.borrow().clone() };
            super::members::write_superblock(self, &leaf, &own)
                .await
                .map_err(|status| self.failed(&name, status))?;
        }
        self.watch(number);
        debug_assert!(set.mode(index) == Mode::Away);
        self.bring_back(number, leaf, None).await.map_err(|what| PoolError::Failed(format!("{name}: {what}")))
    }

    pub(crate) async fn add_spare(
        self: Rc<Self>,
        device: Arc<dyn Device>,
        force: bool,
    ) -> Result<(), PoolError> {
        let _turn = self.turns.change.take().await;
        self.check_writable().map_err(|status| self.failed("cannot be changed", status))?;
        let leaf = self.leaf_of(device)?;
        let data_bytes = self.book.borrow().members.iter().map(|member| member.data_bytes).min().unwrap_or(0);
        self.check_new(&leaf, data_bytes, force).await?;
        if self.spares.borrow().len() >= crate::format::superblock::SPARES_MAX {
            return Err(PoolError::Conflict(format!("pool {} has enough spares", self.shared.name)));
        }
        let name = leaf.name().to_owned();
        self.spares.borrow_mut().push((self.random_uuid(), Some(leaf)));
        let _turn = self.turns.superblock.take().await;
        self.record_members().await.map_err(|status| self.failed(&name, status))?;
        self.publish();
        Ok(())
    }

    /// A spare takes the place of a member that has been away for long.
    pub(crate) async fn use_spare(self: &Rc<Self>) {
        let now = self.runtime.now();
        let away = self.members.borrow().iter().position(|member| {
            member.away_since.is_some_and(|since| now >= since + self.options.spare_delay)
        });
        let spare = self.spares.borrow().iter().position(|(_, leaf)| leaf.is_some());
        let (Some(away), Some(spare)) = (away, spare) else { return };
        let number = u16::try_from(away).unwrap_or(0);
        if self.mode_of(number) != Mode::Away {
            return;
        }
        let _turn = self.turns.change.take().await;
        let (uuid, leaf) = self.spares.borrow_mut().remove(spare);
        let Some(leaf) = leaf else { return };
        log::warn!("pool {}: spare {} takes the place of member {number}", self.shared.name, leaf.name());
        if let Err(what) = self.put_in(number, leaf.clone()).await {
            log::error!("pool {}: {what:?}", self.shared.name);
            self.spares.borrow_mut().push((uuid, Some(leaf)));
        }
    }

    pub(crate) async fn grow(
        self: Rc<Self>,
        devices: Vec<Arc<dyn Device>>,
        force: bool,
    ) -> Result<(), PoolError> {
        let _turn = self.turns.change.take().await;
        self.check_writable().map_err(|status| self.failed("cannot be changed", status))?;
        let wanted = usize::from(self.book.borrow().sets[0].members);
        if devices.len() != wanted {
            return Err(PoolError::Wrong(format!(
                "pool {} grows by {wanted} members at a time, and {} are given",
                self.shared.name,
                devices.len()
            )));
        }
        let leaves = devices.into_iter().map(|device| self.leaf_of(device)).collect::<Result<Vec<_>, _>>()?;
        for (index, leaf) in leaves.iter().enumerate() {
            if leaves[..index].iter().any(|other| other.same(leaf)) {
                return Err(PoolError::Wrong(format!("{} is given twice", leaf.name())));
            }
            self.check_new(leaf, 1 << 20, force).await?;
        }
        let before = self.book.borrow().clone();
        let data_offset = before.layout.data_offset();
        let records: Vec<MemberRecord> = leaves
            .iter()
            .map(|leaf| {
                let bytes = leaf.device.geometry().map_or(0, |geometry| geometry.size_bytes()) - data_offset;
                MemberRecord { uuid: self.random_uuid(), in_sync: true, data_bytes: bytes }
            })
            .collect();
        let mut book = before.clone();
        let first = book.members.len();
        book.members.extend(records);
        let (set, record) = crate::pool::assemble::new_set(&book, first, wanted)
            .map_err(|what| PoolError::Wrong(format!("pool {}: {what}", self.shared.name)))?;
        book.sets.push(record);
        book.validate().map_err(|error| PoolError::Wrong(format!("pool {}: {error}", self.shared.name)))?;
        let mut sets = self.view().array.sets().to_vec();
        sets.push(Arc::clone(&set));
        let array = crate::raid::Array::new(sets).map_err(PoolError::Wrong)?;
        for index in 0..set.members() {
            set.set_mode(index, Mode::InSync);
        }
        {
            let _turn = self.turns.superblock.take().await;
            let now = self.runtime.now();
            let old_view = self.view();
            for (leaf, record) in leaves.iter().zip(&book.members[first..]) {
                let member = super::Member::new(record.uuid, Some(leaf.clone()), true, now);
                self.members.borrow_mut().push(member);
            }
            *self.book.borrow_mut() = Superblock { generation: self.book.borrow().generation, ..book };
            let all_leaves = self.members.borrow().iter().map(|member| member.leaf.clone()).collect();
            let thin = crate::thin::Thin { extents: array.extents(), ..old_view.thin };
            let table = Arc::clone(&old_view.table);
            self.shared.set_view(View { array, table, thin, leaves: all_leaves, ..*old_view });
            // The new ones first: nobody is told of them before they know of it.
            let (_, failed) = self.write_superblocks().await;
            if !failed.is_empty() {
                log::warn!(
                    "pool {}: superblocks of members {failed:?} could not be written",
                    self.shared.name
                );
            }
        }
        for number in first..self.members.borrow().len() {
            self.watch(u16::try_from(number).unwrap_or(0));
        }
        self.use_all_extents().await?;
        self.space.ring();
        Ok(())
    }

    pub(crate) async fn scrub(self: Rc<Self>, repair: bool) -> Result<(), PoolError> {
        if !self.view().is_redundant {
            return Err(PoolError::Wrong(format!("pool {} has nothing to compare", self.shared.name)));
        }
        let mut wanted = self.work.scrub_wanted.borrow_mut();
        if wanted.is_some() || self.work.running.get().is_some_and(|running| running.kind == SCRUB) {
            return Err(PoolError::Conflict(format!("pool {} is being scrubbed", self.shared.name)));
        }
        *wanted = Some(repair);
        // What is told of the last one is not told of this one.
        self.work.last[1].set(None);
        drop(wanted);
        self.publish();
        Ok(())
    }

    /// Compares the copies of everything that somebody can read.
    async fn scrub_all(self: &Rc<Self>, repair: bool) {
        let view = self.view();
        let extent_bytes = view.thin.extent_bytes;
        let volumes: Vec<u32> = self.meta.borrow().volumes().map(|(id, _)| id).collect();
        let total = self.meta.borrow().volumes().map(|(_, volume)| volume.mapped_extents()).sum::<u64>()
            * extent_bytes;
        self.work.begin(SCRUB, total, self.runtime.now());
        let mut seen = BTreeSet::new();
        for id in volumes {
            let mut at = Some(0);
            while let Some(index) = at.and_then(|at| self.meta.borrow().next_mapped(id, at)) {
                at = index.checked_add(1);
                if self.is_closing.get() || self.lost.borrow().is_some() {
                    break;
                }
                let began = self.runtime.now();
                let mismatches = self.scrub_extent(id, index, repair, &mut seen).await;
                self.work.add(extent_bytes, mismatches);
                self.throttle(began, extent_bytes * 2).await;
            }
        }
        self.work.end(self.runtime.now());
        self.publish();
    }

    async fn scrub_extent(
        self: &Rc<Self>,
        id: u32,
        index: u32,
        repair: bool,
        seen: &mut BTreeSet<u32>,
    ) -> u64 {
        let mapped = self.meta.borrow().entry(id, index);
        let (extent, bits) = match mapped {
            Mapped::None => return 0,
            Mapped::Full { extent, .. } => (extent, self.view().thin.full_bits()),
            Mapped::Partial { extent, bits, .. } => (extent, bits),
        };
        if !seen.insert(extent) {
            return 0;
        }
        let view = self.view();
        let (set, address) = view.array.locate(extent);
        let set = Arc::clone(view.array.set(set));
        let mut mismatches = 0;
        let parts: Vec<_> =
            crate::pool::resolve::runs(bits, view.thin.unit_shift(), 0, view.thin.extent_bytes)
                .filter(|(valid, ..)| *valid)
                .collect();
        for (_, within, len) in parts {
            for piece in set.pieces(address + within, len).collect::<Vec<_>>() {
                let work = self.compare(&view, &set, &piece, repair);
                mismatches += self.in_window(&set, window_of(&piece), work).await;
            }
        }
        mismatches
    }

    /// How many copies of a piece differ from the first.
    async fn compare(self: &Rc<Self>, view: &View, set: &Arc<Set>, piece: &Piece, repair: bool) -> u64 {
        let len = piece.len as usize;
        let first = Rc::new(self.place.spare.take(len));
        let Ok(from) = self.read_first(view, set, piece, &first, 0).await else { return 0 };
        let mut mismatches = 0;
        let mut has_bad = false;
        for copy in piece.copies.as_slice().iter().filter(|copy| copy.member != from.member) {
            let Some(leaf) = &view.leaves[usize::from(copy.member)] else { continue };
            if set.mode(copy.member - set.first_member()) != Mode::InSync {
                continue;
            }
            let other = Rc::new(self.place.spare.take(len));
            match self.lanes.read(leaf, view.data_offset + copy.offset, &other, 0, len).await {
                Ok(()) => mismatches += u64::from(other.bytes(0, len) != first.bytes(0, len)),
                Err(_) => has_bad = true,
            }
        }
        // A copy that could not be read counts where it is rewritten.
        if has_bad || (repair && mismatches > 0) {
            let _ = match repair && mismatches > 0 {
                true => self.copy_piece(view, set, piece, None).await,
                false => self.rewrite_bad(view, set, piece).await,
            };
        }
        mismatches
    }
}

/// The members' bytes that a piece's copies are in, and what is between.
fn window_of(piece: &Piece) -> Range<u64> {
    let starts = piece.copies.as_slice().iter().map(|copy| copy.offset);
    let start = starts.clone().min().unwrap_or(0);
    start..starts.max().unwrap_or(0) + u64::from(piece.len)
}

/// The window of rows that are copied: copies of them may be a strip before or behind.
fn wide_window(set: &Set, offset: u64, len: u64) -> Range<u64> {
    let strip = u64::from(set.strip_bytes());
    offset.saturating_sub(strip)..offset + len + strip
}
