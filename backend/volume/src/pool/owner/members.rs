//! Who has the data, and where that is written down.
//!
//! A member that failed a write is out when the superblocks of the others say so; only then does the write end. Whoever is the last to have some
//! data is not put out: then the write fails.

use super::caches::Cache;
use super::{Owner, Replacing};
use crate::format::{Layout, PAGE_BYTES, Superblock, Uuid};
use crate::pool::bounce::Bounce;
use crate::pool::coverage;
use crate::pool::lanes::Leaf;
use crate::pool::place::Place;
use crate::pool::shared::{View, lock};
use crate::pool::wait::all;
use crate::pool::{MemberState, MemberView};
use crate::raid::{Level, Mode, Set};
use crate::simulated::is_broken;
use hawser_block::{DeviceState, Outcome, Status};
use hawser_runtime::Instant;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// A member, by its number.
pub(crate) struct Member {
    pub(crate) uuid: Uuid,
    pub(crate) leaf: Option<Leaf>,
    /// The superblocks say that it has all the data.
    pub(crate) is_recorded: bool,
    /// Why it does not, or empty.
    pub(crate) why: String,
    /// How many wait for it with what it fails, since it cannot be done without, and how it failed the first of them.
    pub(crate) fails: (u32, Status),
    /// Read errors that were repaired.
    pub(crate) repaired: u64,
    /// Units that a scrub has found to be wrong on it.
    pub(crate) wrong: u64,
    pub(crate) away_since: Option<Instant>,
    /// Since when its device keeps writes of unknown outcome, as far as it was looked at.
    keeps_since: Option<Instant>,
    /// When it was last tried to bring it back.
    pub(crate) tried: Instant,
    /// What named its volatile cache when it was last known to have all that was written.
    pub(crate) whole_cache: Option<[u8; 16]>,
    /// The volatile cache that its writes are in.
    pub(crate) cache: Arc<Mutex<Cache>>,
    /// It has lost one that was seen to, and which no FLUSH of it has told.
    pub(crate) owes_a_loss: bool,
    /// It was put in, and does not say so itself yet.
    pub(crate) is_unlabelled: bool,
    /// It gets all writes, and is not ready to be taken for whole.
    pub(crate) is_joining: bool,
    /// The pool's count of members that came back, when this one last did.
    pub(crate) joined: u64,
    /// It has lost its cache, or may have: its data is not what was written.
    pub(crate) is_doubted: Arc<AtomicBool>,
}

impl Member {
    pub(crate) fn new(uuid: Uuid, leaf: Option<Leaf>, is_recorded: bool, now: Instant) -> Member {
        let cache = leaf.as_ref().map_or_else(Cache::default, |leaf| Cache::of(leaf.device.as_ref()));
        Member {
            uuid,
            leaf,
            is_recorded,
            why: String::new(),
            fails: (0, Status::Path),
            repaired: 0,
            wrong: 0,
            away_since: (!is_recorded).then_some(now),
            keeps_since: None,
            tried: now,
            whole_cache: cache.name.filter(|_| is_recorded),
            cache: Arc::new(Mutex::new(cache)),
            owes_a_loss: false,
            is_unlabelled: false,
            is_joining: false,
            joined: 0,
            is_doubted: Arc::default(),
        }
    }
}

/// How often in a row something is lost before a member is taken for one that cannot flush.
const LOSSES_MAX: usize = 4;

/// Members of a set that hold the same data as `member`, each group with it.
pub(super) fn groups(set: &Set, member: u16) -> Vec<Vec<u16>> {
    let count = set.members();
    match set.level() {
        Level::Raid1 => vec![(0..count).collect()],
        Level::Raid10 if count.is_multiple_of(2) => vec![vec![member & !1, member | 1]],
        // Strips go round: each member shares with both neighbours.
        Level::Raid10 => vec![vec![(member + count - 1) % count, member], vec![member, (member + 1) % count]],
        _ => vec![vec![member]],
    }
}

/// A member that answers so has understood, and does not do it: another time it may.
fn is_refusal(status: Status) -> bool {
    matches!(status, Status::Invalid | Status::Unsupported | Status::NoSpace)
}

/// Whether all data is still there without these members of a set, given as bits.
pub(crate) fn survives(set: &Set, without: u64) -> bool {
    if let Some(parity) = set.parity() {
        // What is lost could not be computed, and a member that comes back could not be given it.
        let is_needed = |member: u16| without & 1 << member != 0 && set.mode(member) == Mode::InSync;
        if parity.doubtful.any() && (0..set.members()).any(is_needed) && !is_broken("doubtful_members_lost") {
            return false;
        }
        let left = (0..set.members()).filter(|member| without & 1 << member == 0);
        let left = left.filter(|member| set.mode(*member) == Mode::InSync).count();
        return left >= usize::from(set.members() - set.level().parities());
    }
    (0..set.members()).filter(|member| without & 1 << member != 0).all(|member| {
        let has_it = |other: &u16| without & 1 << other == 0 && set.mode(*other) == Mode::InSync;
        groups(set, member).iter().all(|group| group.iter().any(has_it))
    })
}

impl Owner {
    /// Where a member is: its set, and its place there.
    pub(crate) fn place_of(&self, member: u16) -> (Arc<Set>, u16) {
        let view = self.view();
        let (set, index) = view.array.set_of_member(member).expect("every member is in a set");
        (Arc::clone(view.array.set(set)), index)
    }

    pub(crate) fn mode_of(&self, member: u16) -> Mode {
        let (set, index) = self.place_of(member);
        set.mode(index)
    }

    /// The members that are written to.
    pub(crate) fn targets(&self) -> Vec<(u16, Leaf)> {
        let members = self.members.borrow();
        let numbered = (0u16..).zip(members.iter());
        let there = numbered.filter_map(|(number, member)| Some((number, member.leaf.clone()?)));
        there.filter(|(number, _)| self.mode_of(*number) != Mode::Away).collect()
    }

    /// Those of them that have metadata.
    fn metadata_targets(&self) -> Vec<(u16, Leaf)> {
        let count = self.book.borrow().metadata_members();
        self.targets().into_iter().filter(|(member, _)| *member < count).collect()
    }

    /// Writes metadata to all who have it.
    pub(crate) async fn write_everywhere(
        self: &Rc<Self>,
        offset: u64,
        bounce: &Rc<Bounce>,
        len: usize,
        fua: bool,
    ) -> Outcome {
        self.check_ours()?;
        let (targets, since) = (self.metadata_targets(), self.shared.joins());
        let results = self.lanes.write_to_all(&targets, offset, bounce, len, fua).await;
        self.all_or_failed(results, since).await
    }

    /// Those who failed what others did are out when it ends.
    async fn all_or_failed(self: &Rc<Self>, results: Vec<(u16, Outcome)>, since: u64) -> Outcome {
        let (mut failed, mut status, mut is_done) = (0u64, Status::Path, false);
        for (member, outcome) in results {
            match outcome {
                Ok(()) => is_done |= self.mode_of(member) == Mode::InSync,
                Err(why) => (failed, status) = (failed | 1 << member, why),
            }
        }
        match (failed, is_done) {
            (0, true) => Ok(()),
            (_, false) => {
                if status == Status::Conflict {
                    self.lose("another host has reserved it");
                }
                Err(status)
            }
            (failed, true) => self.report_beside(failed, status, since).await,
        }
    }

    /// Makes what members have durable. Where something was lost before, that is what it does not say: each volume's FLUSH does.
    pub(crate) async fn flush_members(self: &Rc<Self>) -> Outcome {
        if is_broken("skip_member_flush") {
            return Ok(());
        }
        for _ in 0..LOSSES_MAX {
            if self.flush_members_once().await? {
                return Ok(());
            }
        }
        Err(Status::Media)
    }

    /// Whether all that was there before is durable; not, where a cache was lost.
    async fn flush_members_once(self: &Rc<Self>) -> Result<bool, Status> {
        let (logged, seen) = (self.stripes_placed(), self.shared.lost_caches.look());
        let (targets, since) = (self.targets(), self.shared.joins());
        let flushes = targets.iter().map(|(member, leaf)| async move {
            let before = self.loss_of(*member, leaf);
            let outcome = self.lanes.flush(leaf).await;
            // It tells each loss to all who were flushing then; and not always somebody else before.
            let is_of_cache = self.has_flushed(*member, leaf, before, outcome);
            (*member, outcome, is_of_cache)
        });
        let (mut failed, mut is_whole) = (Vec::new(), true);
        for (member, outcome, is_of_cache) in all(flushes).await {
            is_whole &= !is_of_cache;
            match outcome {
                Err(status) if !is_of_cache => failed.push((member, status)),
                _ => {}
            }
        }
        let mut outcome = Ok(());
        for (member, status) in failed {
            // What it had not made durable may be lost: it has not got all the data any more.
            if let Err(why) = self.report(1 << member, status, since).await {
                if status == Status::Media {
                    self.shared.has_lost();
                    self.begin_tail();
                }
                outcome = outcome.and(Err(why));
            }
        }
        outcome?;
        // A flush of another cache than the one that was written to is no flush.
        self.put_out_doubted().await?;
        is_whole &= self.shared.lost_caches.look().number() == seen.number();
        if is_whole {
            self.stripes_flushed(&logged);
        }
        Ok(is_whole)
    }

    /// Members have failed what others may have done: they are out when it ends, or it has failed. `since`: `Shared::joins` when it
    /// began. One that came back after that was out in between, and is given what it lacked then.
    pub(crate) async fn report(self: &Rc<Self>, failed: u64, status: Status, since: u64) -> Outcome {
        if is_refusal(status) {
            // Not the member's fault, or all of them have it.
            return Err(status);
        }
        self.report_whatever(failed, status, since).await
    }

    /// The same of one of several copies: where another member has done what these refuse, it is they who lack something.
    pub(crate) async fn report_beside(self: &Rc<Self>, failed: u64, status: Status, since: u64) -> Outcome {
        match is_refusal(status) && !is_broken("full_copy_kept") {
            true => self.report_together(failed, status, since).await,
            false => self.report(failed, status, since).await,
        }
    }

    /// The same, whatever the reason is: others have done their part of what must not stay half done.
    pub(crate) async fn report_whatever(self: &Rc<Self>, failed: u64, status: Status, since: u64) -> Outcome {
        if status == Status::Conflict {
            self.lose("another host has reserved it");
            return Err(status);
        }
        for member in (0..64).filter(|member| failed & 1 << member != 0) {
            let joined = self.members.borrow()[usize::from(member)].joined;
            if joined > since && !is_broken("late_failure_counts") {
                continue;
            }
            if !self.put_out(member, status.name()).await {
                return Err(status);
            }
        }
        Ok(())
    }

    /// A member does not take what would make it the same as the others: who has no room for it is not.
    pub(crate) async fn report_lacking(self: &Rc<Self>, member: u16, status: Status, since: u64) -> Outcome {
        match status {
            Status::NoSpace => self.report_whatever(1 << member, status, since).await,
            _ => self.report(1 << member, status, since).await,
        }
    }

    /// The same of members that have failed at once: all of them are out, or none is.
    pub(crate) async fn report_together(self: &Rc<Self>, failed: u64, status: Status, since: u64) -> Outcome {
        let view = self.view();
        let can_go = |set: &Arc<Set>| {
            let of_set = (0..set.members()).filter(|place| failed & 1 << (set.first_member() + place) != 0);
            survives(set, of_set.fold(0, |bits, place| bits | 1 << place))
        };
        match status == Status::Conflict || view.array.sets().iter().all(can_go) {
            true => self.report_whatever(failed, status, since).await,
            false => Err(status),
        }
    }

    /// Members that have everything, and what names their caches.
    pub(crate) fn whole_caches(&self) -> Vec<(Uuid, [u8; 16])> {
        let members = self.members.borrow();
        let whole = members.iter().filter(|member| member.is_recorded);
        let mut caches: Vec<_> =
            whole.filter_map(|member| Some((member.uuid, member.whole_cache?))).collect();
        caches.extend(self.replacing.borrow().as_ref().and_then(Replacing::old_cache));
        caches
    }

    /// Goes on without a member; `false` when that cannot be.
    pub(crate) async fn put_out(self: &Rc<Self>, member: u16, why: &str) -> bool {
        if self.is_read_only {
            return false;
        }
        let _turn = self.turns.superblock.take().await;
        let (set, index) = self.place_of(member);
        if !self.members.borrow()[usize::from(member)].is_recorded {
            // The superblocks say it already.
            self.away(&set, index, member, why);
            return true;
        }
        {
            // A cache that is lost at this moment takes another member out of those that are read.
            let _one = lock(&self.shared.modes);
            if !survives(&set, 1 << index) {
                return false;
            }
            set.set_mode(index, Mode::Syncing);
        }
        let mut out = BTreeSet::from([member]);
        loop {
            for member in &out {
                // It still gets all writes: who ends one without it has waited until that is written down.
                let (set, index) = self.place_of(*member);
                set.set_mode(index, Mode::Syncing);
                self.members.borrow_mut()[usize::from(*member)].is_recorded = false;
            }
            let (written, failed) = self.write_superblocks(&out).await;
            let also = self.can_go_too(&out, &failed);
            let first = set.first_member();
            let is_of_set = |member: &u16| (first..first + set.members()).contains(member);
            let is_stuck = failed.iter().any(|other| is_of_set(other) && !also.contains(other));
            if !written.iter().any(is_of_set) || is_stuck {
                break;
            }
            if also.is_empty() {
                for member in &out {
                    let (set, index) = self.place_of(*member);
                    self.away(&set, index, *member, why);
                    self.after_loss(&set);
                    coverage::count(coverage::Event::Stale);
                    log::error!(
                        "pool {}: member {member} ({}) is out: {why}; the others go on without it",
                        self.shared.name,
                        self.device_name(*member)
                    );
                }
                self.publish();
                return true;
            }
            out.extend(also);
        }
        // Nobody could write it down, so it is not so. What was written meanwhile was written to it too, or has failed.
        for member in &out {
            let (set, index) = self.place_of(*member);
            self.members.borrow_mut()[usize::from(*member)].is_recorded = true;
            self.shared.mark_unsynced();
            for region in set.intents.iter_set().collect::<Vec<_>>() {
                set.unsynced.set(region);
            }
            let is_doubted = self.members.borrow()[usize::from(*member)].is_doubted.load(Ordering::Acquire);
            if !is_doubted {
                set.set_mode(index, Mode::InSync);
            }
        }
        false
    }

    /// Of members that failed, those without whom all data is still there when the others that are out are out too.
    fn can_go_too(&self, out: &BTreeSet<u16>, failed: &[u16]) -> Vec<u16> {
        let mut gone = out.clone();
        let mut also = Vec::new();
        for member in failed {
            let (set, _) = self.place_of(*member);
            let first = set.first_member();
            let of_set =
                gone.iter().chain([member]).filter(|other| (first..first + set.members()).contains(other));
            let without = of_set.fold(0u64, |bits, other| bits | 1 << (other - first));
            if survives(&set, without) {
                gone.insert(*member);
                also.push(*member);
            }
        }
        also
    }

    /// A member is written to no more, and that is written down. What waits for its answer is not waited for: what it may still do is undone
    /// when it is brought back, which is not before it cannot do it any more ([`Owner::has_left_behind`]).
    fn away(&self, set: &Set, index: u16, number: u16, why: &str) {
        {
            let _one = lock(&self.shared.modes);
            set.set_mode(index, Mode::Away);
            if let Some(parity) = set.parity() {
                parity.set_behind(index, false);
            }
        }
        let leaf = {
            let member = &mut self.members.borrow_mut()[usize::from(number)];
            why.clone_into(&mut member.why);
            member.away_since.get_or_insert(self.runtime.now());
            member.tried = self.runtime.now();
            member.leaf.clone()
        };
        if set.parity().is_some() {
            // Who changes a stripe does not wait for it any more.
            for reactor in self.shared.reactors() {
                let shared = Arc::clone(&self.shared);
                reactor.run(move |runtime| {
                    if let Some(place) = Place::find(runtime, &shared) {
                        place.bell.ring();
                    }
                });
            }
        }
        let is_waited_for =
            |leaf: &Leaf| leaf.device.state() != DeviceState::Ready || leaf.device.has_unknown_writes();
        if let Some(leaf) = leaf.filter(is_waited_for) {
            self.give_up(number, &leaf);
        }
    }

    /// Ends what is under way at a member that is away, on all reactors, though its writes may still be carried out.
    fn give_up(&self, number: u16, leaf: &Leaf) {
        self.lanes.leave(leaf);
        self.shared.given_up[usize::from(number)].fetch_add(1, Ordering::Release);
        for reactor in self.shared.reactors() {
            let (shared, leaf) = (Arc::clone(&self.shared), leaf.clone());
            reactor.run(move |runtime| {
                if let Some(place) = Place::find(runtime, &shared) {
                    place.lanes.leave(&leaf);
                    place.wake_users(runtime);
                }
            });
        }
    }

    /// Puts out members whose devices keep a write longer than a member is waited for, because nobody knows what becomes of it. When that
    /// is all that is asked of them, nothing else fails; and a device that is ready again goes on to keep it.
    pub(crate) async fn put_out_keepers(self: &Rc<Self>) {
        if self.is_read_only || is_broken("kept_writes_waited_for") {
            return;
        }
        let now = self.runtime.now();
        let is_due = |(number, member): (u16, &mut Member)| {
            let leaf = member.leaf.as_ref().filter(|leaf| leaf.device.has_unknown_writes());
            let Some(leaf) = leaf.cloned() else {
                member.keeps_since = None;
                return None;
            };
            let since = *member.keeps_since.get_or_insert(now);
            let is_failed = leaf.device.state() == DeviceState::Failed;
            (is_failed || now >= since + self.options.member_timeout).then_some((number, leaf))
        };
        let due: Vec<_> = (0u16..).zip(self.members.borrow_mut().iter_mut()).filter_map(is_due).collect();
        for (number, leaf) in due {
            let (set, index) = self.place_of(number);
            if set.mode(index) == Mode::Away {
                self.give_up(number, &leaf);
                continue;
            }
            let is_ready = |place: u16| {
                let members = self.members.borrow();
                let leaf = members[usize::from(set.first_member() + place)].leaf.as_ref();
                leaf.is_some_and(|leaf| leaf.device.state() == DeviceState::Ready)
            };
            // Where nobody could write it down it is not tried.
            let mut others = (0..set.members()).filter(|place| *place != index);
            if others.any(|place| set.mode(place) == Mode::InSync && is_ready(place)) {
                self.put_out(number, Status::Timeout.name()).await;
            }
        }
    }

    /// Something is written to a member again and again, since it fails that and cannot be done without.
    pub(crate) fn waits_for(&self, member: u16, status: Status) {
        let is_first = {
            let fails = &mut self.members.borrow_mut()[usize::from(member)].fails;
            let is_first = fails.0 == 0;
            *fails = (fails.0 + 1, if is_first { status } else { fails.1 });
            is_first
        };
        if is_first {
            log::warn!(
                "pool {}: {} (member {member}) fails a write with {}, and cannot be done without: it waits",
                self.shared.name,
                self.device_name(member),
                status.name()
            );
            self.publish();
        }
    }

    /// It has taken that, or is out, or it is not waited for any more.
    pub(crate) async fn waits_no_more(self: Rc<Self>, member: u16) {
        let left = {
            let fails = &mut self.members.borrow_mut()[usize::from(member)].fails;
            fails.0 = fails.0.saturating_sub(1);
            fails.0
        };
        if left == 0 {
            let (pool, device) = (&self.shared.name, self.device_name(member));
            log::info!("pool {pool}: nothing waits for {device} (member {member}) any more");
            self.publish();
        }
    }

    pub(crate) fn device_name(&self, member: u16) -> String {
        let members = self.members.borrow();
        members[usize::from(member)]
            .leaf
            .as_ref()
            .map_or_else(|| "missing".to_owned(), |leaf| leaf.name().to_owned())
    }

    /// What the superblocks shall say now.
    fn next_superblock(&self) -> Superblock {
        let mut book = self.book.borrow_mut();
        book.generation += 1;
        let members = self.members.borrow();
        for (record, member) in book.members.iter_mut().zip(members.iter()) {
            (record.uuid, record.in_sync) = (member.uuid, member.is_recorded);
        }
        drop(members);
        book.spares = self.spares.borrow().iter().map(|(uuid, _)| *uuid).collect();
        book.replacement = self.replacement();
        book.scrub = self.work.scrub.get();
        book.clone()
    }

    /// Looks whether another host has opened the pool over us: then it is not ours to write any more. Where members know reservations, they
    /// refuse us before that.
    pub(crate) async fn check_owner(self: &Rc<Self>) {
        // One that answers: nobody waits here.
        let is_there = |(member, leaf): &(u16, Leaf)| {
            self.mode_of(*member) == Mode::InSync && leaf.device.state() == DeviceState::Ready
        };
        let Some((_, leaf)) = self.targets().into_iter().find(is_there) else {
            return;
        };
        let Ok(Some(label)) = self.label_of(&leaf).await else { return };
        let book = self.book.borrow();
        // Another host would count on from what it has found.
        let is_ours = label.epoch == book.epoch || label.openings() < book.openings();
        if label.pool_uuid != self.shared.uuid || !is_ours {
            self.lose("another host has opened it");
        }
    }

    /// Writes the superblocks of all members that are written to, but for some, and of spares: who has them now, and who failed.
    /// The turn is the caller's.
    pub(crate) async fn write_superblocks(self: &Rc<Self>, without: &BTreeSet<u16>) -> (Vec<u16>, Vec<u16>) {
        assert!(!self.is_read_only, "nothing is written to a pool that is only looked at");
        if self.is_open.get() {
            self.check_owner().await;
        }
        if self.check_ours().is_err() {
            return (Vec::new(), self.targets().into_iter().map(|(member, _)| member).collect());
        }
        let book = self.next_superblock();
        let mut targets = self.targets();
        targets.retain(|(member, _)| !without.contains(member));
        let uuids: Vec<Uuid> = self.members.borrow().iter().map(|member| member.uuid).collect();
        let spares: Vec<(Uuid, Leaf)> =
            self.spares.borrow().iter().filter_map(|(uuid, leaf)| Some((*uuid, leaf.clone()?))).collect();
        // One that was something else before is told later.
        let spares = spares.into_iter().filter(|(_, leaf)| !leaf.device.has_left_behind());
        let writes = targets.iter().map(|(member, leaf)| {
            let own = Superblock { this: uuids[usize::from(*member)], ..book.clone() };
            async move { (*member, write_superblock(self, leaf, &own).await) }
        });
        let results = all(writes).await;
        for (uuid, leaf) in spares {
            let own = Superblock { this: uuid, ..book.clone() };
            if let Err(status) = write_superblock(self, &leaf, &own).await {
                log::warn!("pool {}: spare {}: {}", self.shared.name, leaf.name(), status.name());
            }
        }
        if let Err(status) = self.label_replacement(&book).await {
            log::warn!("pool {}: the replacement of a member: {}", self.shared.name, status.name());
        }
        let (mut written, mut failed) = (Vec::new(), Vec::new());
        for (member, outcome) in results {
            match outcome {
                Ok(()) if self.mode_of(member) == Mode::InSync => written.push(member),
                Ok(()) => {}
                Err(status) => {
                    if status == Status::Conflict {
                        self.lose("another host has reserved it");
                    }
                    failed.push(member);
                }
            }
        }
        (written, failed)
    }

    /// Writes down a change of members that is not a failure. The turn is the caller's.
    pub(crate) async fn record_members(self: &Rc<Self>) -> Outcome {
        let (written, failed) = self.write_superblocks(&BTreeSet::new()).await;
        match written.is_empty() {
            true => Err(Status::Path),
            false if failed.is_empty() => Ok(()),
            false => {
                // They are found out by the next write to them; what was recorded is on the others.
                log::warn!(
                    "pool {}: superblocks of members {failed:?} could not be written",
                    self.shared.name
                );
                let sets = self.view().array.sets().to_vec();
                let all_sets = sets.iter().all(|set| {
                    let range = set.first_member()..set.first_member() + set.members();
                    written.iter().any(|member| range.contains(member))
                });
                if all_sets { Ok(()) } else { Err(Status::Path) }
            }
        }
    }

    /// The array as all see it, with the members' devices as they are now.
    pub(crate) fn new_view(&self) {
        let old = self.view();
        let leaves: Vec<Option<Leaf>> =
            self.members.borrow().iter().map(|member| member.leaf.clone()).collect();
        let is_copied = is_copied(old.is_redundant, &leaves);
        self.shared.set_view(View { is_copied, leaves, ..View::clone(&old) });
    }

    /// For people.
    pub(crate) fn member_views(&self) -> Vec<MemberView> {
        let members = self.members.borrow();
        let numbered = (0u16..).zip(members.iter());
        let views = numbered.map(|(number, member)| {
            let state = match (self.mode_of(number), &member.leaf) {
                (_, None) => MemberState::Missing,
                (Mode::InSync, _) => MemberState::InSync,
                (Mode::Syncing, _) => MemberState::Syncing,
                (Mode::Away, _) => MemberState::Stale,
            };
            MemberView {
                place: Some(number),
                device: member.leaf.as_ref().map(|leaf| leaf.name().to_owned()),
                state,
                why: match (&member.leaf, member.fails) {
                    (Some(_), (1.., status)) if self.mode_of(number) == Mode::InSync => {
                        format!(
                            "fails writes with {}, which wait, since it cannot be done without",
                            status.name()
                        )
                    }
                    (Some(leaf), _) if member.why.is_empty() => leaf.device.trouble(),
                    _ => member.why.clone(),
                },
                repaired: member.repaired,
                wrong: member.wrong,
            }
        });
        let mut views: Vec<MemberView> = views.collect();
        views.extend(self.replacement_view().map(|(member, device, why)| MemberView {
            place: Some(member),
            device,
            state: MemberState::Replacing,
            why,
            repaired: 0,
            wrong: 0,
        }));
        views.extend(self.spares.borrow().iter().map(|(_, leaf)| MemberView {
            place: None,
            device: leaf.as_ref().map(|leaf| leaf.name().to_owned()),
            state: MemberState::Spare,
            why: String::new(),
            repaired: 0,
            wrong: 0,
        }));
        views
    }
}

/// Whether writes go to several devices.
pub(crate) fn is_copied(is_redundant: bool, leaves: &[Option<Leaf>]) -> bool {
    is_redundant || leaves.iter().flatten().any(|leaf| leaf.twin.is_some())
}

/// One copy after the other, so that one is whole at any time.
pub(crate) async fn write_superblock(owner: &Rc<Owner>, leaf: &Leaf, superblock: &Superblock) -> Outcome {
    let bounce = Rc::new(Bounce::holding(&superblock.encode()));
    for offset in Layout::SUPERBLOCKS {
        owner.lanes.write(leaf, offset, &bounce, 0, PAGE_BYTES, true).await?;
    }
    Ok(())
}
