//! Members that come back: from the first write that they get again to the superblocks that say that they have everything.

use super::Owner;
use super::caches::Cache;
use crate::format::{PAGE_BYTES, Superblock};
use crate::pool::assemble::too_small;
use crate::pool::bounce::Bounce;
use crate::pool::coverage;
use crate::pool::lanes::Leaf;
use crate::pool::shared::lock;
use crate::raid::{Mode, Set};
use crate::simulated::is_broken;
use hawser_block::{Outcome, Status};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// What is zeroed at a time.
const ZEROES_BYTES: usize = 1 << 20;
/// Why a member that is there is not brought back yet.
const STILL_REACHED: &str = "writes of before it was lost may still reach it: tried again";

impl Owner {
    /// A member has everything: that is written down, and it is read from again.
    pub(super) async fn is_whole_again(self: &Rc<Self>, set: &Arc<Set>, member: u16) -> Outcome {
        let number = set.first_member() + member;
        if set.unsynced.any() {
            return Ok(());
        }
        // Before it may be taken for the first copy that is in sync.
        let leaf = self.members.borrow()[usize::from(number)].leaf.clone().ok_or(Status::Path)?;
        let cache = leaf.device.cache_identity();
        if !is_broken("joined_unflushed") {
            let flushed = self.lanes.flush(&leaf).await;
            if flushed == Err(Status::Media) {
                // It is told once that what it got may be lost: it begins again.
                self.put_out(number, "could not be flushed").await;
            }
            flushed?;
        }
        let turn = self.turns.superblock.take().await;
        let (is_ready, is_doubted) = {
            let members = self.members.borrow();
            let member = &members[usize::from(number)];
            let is_ready = !member.is_joining && !member.is_recorded;
            let is_doubted =
                member.is_doubted.load(Ordering::Acquire) && !is_broken("joined_with_lost_cache");
            (is_ready, is_ready && is_doubted)
        };
        if is_doubted {
            // It has lost its cache on the way: what was not flushed is lacking again, of the tables too. It begins again.
            drop(turn);
            self.put_out(number, "lost its volatile cache").await;
            return Ok(());
        }
        if !is_ready || set.mode(member) != Mode::Syncing || set.unsynced.any() {
            return Ok(());
        }
        {
            let member = &mut self.members.borrow_mut()[usize::from(number)];
            (member.is_recorded, member.whole_cache) = (true, cache);
        }
        // Before the superblocks call it whole, the next process can tell whether it still is.
        self.begin_tail();
        // It has everything, whoever of the others could write that down: those who could not are found out by the next write to them.
        let (_, failed) = self.write_superblocks(&BTreeSet::new()).await;
        if !failed.is_empty() {
            log::warn!("pool {}: superblocks of members {failed:?} could not be written", self.shared.name);
        }
        if set.mode(member) != Mode::Syncing || set.unsynced.any() || failed.contains(&number) {
            // It failed meanwhile, or lacks a write, and may be called in sync by some: that must not stay. Nor may what it says of itself,
            // which is of an earlier opening: it would be of no use alone, and looks like another host's.
            drop(turn);
            self.put_out(number, "failed when it had just come back").await;
            return Ok(());
        }
        {
            let member = &mut self.members.borrow_mut()[usize::from(number)];
            member.why.clear();
            member.away_since = None;
        }
        {
            let _one = lock(&self.shared.modes);
            let is_doubted = self.members.borrow()[usize::from(number)].is_doubted.load(Ordering::Acquire);
            if is_doubted && !is_broken("joined_with_lost_cache") {
                // It is found out by whoever looks for doubts.
                return Ok(());
            }
            set.set_mode(member, Mode::InSync);
        }
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
        if self.has_left_behind(number) {
            STILL_REACHED.clone_into(&mut self.members.borrow_mut()[usize::from(number)].why);
            return;
        }
        let (uuid, is_unlabelled) = {
            let members = self.members.borrow();
            (members[usize::from(number)].uuid, members[usize::from(number)].is_unlabelled)
        };
        if is_unlabelled {
            // It was put in, and could not be told.
            let labelled = {
                let _turn = self.turns.superblock.take().await;
                self.label(number).await
            };
            if labelled.is_ok()
                && let Err(what) = self.bring_back(number, leaf, None, false).await
            {
                self.members.borrow_mut()[usize::from(number)].why = what;
            }
            return;
        }
        match self.label_of(&leaf).await {
            Ok(Some(label)) if label.this == uuid => {
                if let Err(what) = self.bring_back(number, leaf, Some(&label), true).await {
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
    /// `is_same`: the one that it had.
    pub(crate) async fn bring_back(
        self: &Rc<Self>,
        number: u16,
        leaf: Leaf,
        label: Option<&Superblock>,
        is_same: bool,
    ) -> Result<(), String> {
        if let Some(label) = label {
            self.check_no_split(number, label)?;
        }
        // The same device, though it may be taken for a new one: what was sent to it before it was lost may still come there. Not even its
        // superblock is written before: an old one that comes later would call it whole.
        let (before, given) = (self.members.borrow()[usize::from(number)].leaf.clone(), leaf.clone());
        let has_left_behind = || {
            let before = before.iter().filter(|_| is_same);
            let devices = before.chain([&given]).any(|leaf| leaf.device.has_left_behind());
            (devices && !is_broken("left_writes_forgotten")) || is_same && self.has_left_behind(number)
        };
        if has_left_behind() {
            return Err(STILL_REACHED.to_owned());
        }
        let (set, index) = self.place_of(number);
        if set.mode(index) != Mode::Away {
            return Ok(());
        }
        let size = leaf.device.geometry().map_or(0, |geometry| geometry.size_bytes());
        let needed = {
            let book = self.book.borrow();
            book.layout.data_offset() + book.members[usize::from(number)].data_bytes
        };
        if size < needed {
            return Err(too_small(&leaf, size, usize::from(number), needed));
        }
        {
            let mut members = self.members.borrow_mut();
            let member = &mut members[usize::from(number)];
            // One that is being replaced stays a part of two.
            let twin = member.leaf.clone().filter(|before| before.twin.is_some() && before.is_kin(&leaf));
            let leaf = twin.unwrap_or(leaf);
            let is_new = member.leaf.as_ref().is_none_or(|before| !before.same(&leaf));
            if is_new {
                (member.cache, member.is_doubted) = (Arc::default(), Arc::default());
                member.owes_a_loss = false;
            }
            *lock(&member.cache) = Cache::of(leaf.device.as_ref());
            // Whatever it has lost before is marked.
            member.is_doubted.store(false, Ordering::Release);
            member.leaf = Some(leaf);
            drop(members);
            if is_new {
                self.watch(number);
            }
        }
        self.new_view();
        self.members.borrow_mut()[usize::from(number)].is_joining = true;
        // Before any of it is overwritten: from here on it is of no use alone, which it may not have been told yet.
        let told = match is_broken("not_told_before_overwritten") {
            true => Ok(()),
            false => self.tell(number).await,
        };
        let joined = match told {
            Ok(()) => self.join(number, &set, index).await,
            Err(status) => Err(status),
        };
        // Who was just leaving a write behind when this began has done so by now: a barrier has passed. What the member was given meanwhile is
        // marked, and its tables are made anew the next time.
        let joined = joined.and(if has_left_behind() { Err(Status::Path) } else { Ok(()) });
        self.members.borrow_mut()[usize::from(number)].is_joining = false;
        if let Err(status) = joined {
            set.set_mode(index, Mode::Away);
            return Err(status.name().to_owned());
        }
        self.publish();
        Ok(())
    }

    /// Whether this is the device that a member has, or had.
    pub(super) fn is_device_of(&self, number: u16, leaf: &Leaf) -> bool {
        self.members.borrow()[usize::from(number)].leaf.as_ref().is_some_and(|it| it.is_kin(leaf))
    }

    /// Writes of before a member was lost may still reach its device: tasks of ours are still at it, or it was left
    /// ([`hawser_block::Channel::leave`]) and says so. Until then nothing is written to it. The last of them may leave anything in
    /// the blocks that it named, and all of these are given to the member again when it is brought back: data is in marked regions,
    /// whose marks stay while a member of the set is out; tables, log and marks are written anew; of the two superblocks that are newer
    /// those of the others count. Of the parity log nothing is needed that was written before a member came back.
    pub(crate) fn has_left_behind(&self, number: u16) -> bool {
        let is_of_device = |leaf: &Leaf| leaf.device.has_left_behind() && !is_broken("left_writes_forgotten");
        self.have_tasks_left(number)
            || self.members.borrow()[usize::from(number)].leaf.as_ref().is_some_and(is_of_device)
    }

    /// Tasks of ours are still at writes to a member that nobody waits for.
    pub(super) fn have_tasks_left(&self, number: u16) -> bool {
        self.shared.left_behind[usize::from(number)].load(Ordering::Acquire) > 0
    }

    /// A member that is out learns from its own superblock that it is.
    pub(crate) async fn tell(self: &Rc<Self>, number: u16) -> Outcome {
        let _turn = self.turns.superblock.take().await;
        self.label(number).await
    }

    /// A member gets all writes from now on; what it lacks from before is marked, and its tables are made those of the others.
    async fn join(self: &Rc<Self>, number: u16, set: &Arc<Set>, index: u16) -> Outcome {
        // Also of one that was there before: this may not have come to its end when it was new.
        let leaf = self.members.borrow()[usize::from(number)].leaf.clone().ok_or(Status::Path)?;
        if number < self.book.borrow().metadata_members() {
            self.forget_tables(&leaf).await?;
        }
        self.members.borrow_mut()[usize::from(number)].joined = self.shared.joins_now();
        // Before the first write that goes to it, for those that did not; and after the last that did not know of it.
        self.mark_lacking(set);
        set.set_mode(index, Mode::Syncing);
        // Who is under way may take long.
        self.publish();
        self.barrier().await;
        let logged = set.parity().map(|parity| parity.ring().next());
        self.mark_lacking(set);
        self.repeat_parity_header(set, number).await?;
        // What was logged without it does not say what it has to have: that is not done again once it has been brought up to date.
        if let Some(logged) = logged.filter(|_| !is_broken("parity_log_kept_over_rejoin")) {
            self.release_stripes_before(set, logged).await?;
        }
        if number < self.book.borrow().metadata_members() && !is_broken("joined_without_tables") {
            self.checkpoint(true).await?;
            self.rewrite_intents().await?;
        }
        Ok(())
    }

    /// A device that is to be a member has no tables: it may have been this pool's in another life, with roots of higher numbers, and batches in its
    /// log that would fit behind ours. What is written there next is all that counts.
    pub(super) async fn forget_tables(self: &Rc<Self>, leaf: &Leaf) -> Outcome {
        if is_broken("old_tables_kept") {
            return Ok(());
        }
        let layout = self.book.borrow().layout;
        let log = layout.log_offset()..layout.log_offset() + layout.log_bytes;
        let roots = [0, 1].map(|page| layout.page_offset(page)..layout.page_offset(page) + PAGE_BYTES as u64);
        for range in roots.into_iter().chain([log]) {
            for at in (range.start..range.end).step_by(ZEROES_BYTES) {
                let len = usize::try_from((range.end - at).min(ZEROES_BYTES as u64)).expect("at most that");
                let nothing = Rc::new(Bounce::zeroed(len));
                self.lanes.write(leaf, at, &nothing, 0, len, false).await?;
            }
        }
        self.lanes.flush(leaf).await
    }

    /// Regions that are marked may lack something on a member that was away.
    fn mark_lacking(&self, set: &Arc<Set>) {
        self.shared.mark_unsynced();
        let first = self.first_region_of(set);
        for region in 0..set.regions() {
            if self.intents.borrow().is_durable(first + region) {
                set.unsynced.set(region);
            }
        }
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
                && label
                    .members
                    .get(other)
                    .is_some_and(|record| !record.in_sync && record.uuid == members[other].uuid)
        });
        // Who trusts somebody that we trust too was not used without him: he is behind. So is what this opening has written.
        let is_behind = members
            .iter()
            .filter(|member| member.is_recorded)
            .any(|member| label.members.iter().any(|record| record.in_sync && record.uuid == member.uuid));
        let is_rival = is_rival && !is_behind && label.epoch != self.book.borrow().epoch;
        match is_rival {
            true => Err("it was used without the others, and they without it: want it put in as a replacement, with --force".to_owned()),
            false => Ok(()),
        }
    }
}
