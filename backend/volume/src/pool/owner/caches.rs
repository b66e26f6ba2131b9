//! Members' volatile caches: what becomes of a member that has lost its own. Where the others have what was in it, it is put out, and brought up to
//! date again; else it stays, with what it has.

use super::Owner;
use super::members::{Member, groups, survives};
use crate::pool::lanes::Leaf;
use crate::pool::shared::{Shared, lock};
use crate::raid::{Mode, Parity, Set};
use crate::simulated::is_broken;
use hawser_block::{Device, Outcome, Status};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// A member's volatile cache, as it was seen last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cache {
    /// What names it, where that is known.
    pub(crate) name: Option<[u8; 16]>,
    /// [`Device::cache_losses`]; `None`: of another device.
    pub(crate) losses: Option<u64>,
}

impl Cache {
    pub(crate) fn of(device: &dyn Device) -> Cache {
        Cache { name: device.cache_identity(), losses: Some(device.cache_losses()) }
    }
}

impl Owner {
    /// From now on a loss of the member's cache puts it out at once.
    pub(crate) fn watch(self: &Rc<Self>, member: u16) {
        let (set, index) = self.place_of(member);
        let members = self.members.borrow();
        let entry = &members[usize::from(member)];
        let Some(leaf) = entry.leaf.clone() else { return };
        if set.level().is_redundant() {
            // The others can go on without it.
            leaf.device.fail_after(self.options.member_timeout);
        }
        // Gone when another device has taken the place.
        let (cache, doubted) = (Arc::downgrade(&entry.cache), Arc::downgrade(&entry.is_doubted));
        let device = Arc::downgrade(&leaf.device);
        let shared = Arc::downgrade(&self.shared);
        let look = Arc::new(move || {
            let (Some(device), Some(shared)) = (device.upgrade(), shared.upgrade()) else { return };
            let (Some(cache), Some(doubted)) = (cache.upgrade(), doubted.upgrade()) else { return };
            look_at(&shared, (&set, index), device.as_ref(), (&cache, &doubted));
            drop(shared.ask(|owner| async move { owner.look_after_members().await }));
        });
        let again = Arc::clone(&look);
        leaf.device.subscribe(Box::new(move || again()));
        // What has happened since its identity was taken.
        look();
    }

    /// Before a member's FLUSH: how often its device has lost a cache, and whether it has yet to tell one that was seen to.
    pub(super) fn loss_of(&self, member: u16, leaf: &Leaf) -> (u64, bool) {
        (leaf.device.cache_losses(), self.members.borrow()[usize::from(member)].owes_a_loss)
    }

    /// A member's FLUSH has ended: whether it tells that a cache was lost, or one was meanwhile, which is seen to.
    pub(super) fn has_flushed(
        &self,
        member: u16,
        leaf: &Leaf,
        before: (u64, bool),
        outcome: Outcome,
    ) -> bool {
        let (set, index) = self.place_of(member);
        let mut members = self.members.borrow_mut();
        let entry = &mut members[usize::from(member)];
        if !entry.leaf.as_ref().is_some_and(|now| now.same(leaf)) {
            return false;
        }
        let (losses, owed) = before;
        let is_news =
            look_at(&self.shared, (&set, index), leaf.device.as_ref(), (&entry.cache, &entry.is_doubted));
        let is_same = leaf.device.cache_losses() == losses && !is_news;
        if is_same && owed && outcome == Ok(()) {
            // Not before: it tells a loss again for what was written while the first FLUSH that failed was under way.
            entry.owes_a_loss = false;
        }
        is_news || outcome == Err(Status::Media) && (owed || !is_same)
    }

    /// A member whose cache was lost is not what the superblocks call it: that is mended before anybody relies on them.
    pub(crate) async fn put_out_doubted(self: &Rc<Self>) -> Outcome {
        loop {
            // Whoever is just writing it down may have the turn: that counts when it is done.
            drop(self.turns.superblock.take().await);
            let seen = self.shared.lost_caches.look();
            let mut outcome = Ok(());
            for set in self.view().array.sets().to_vec() {
                // One that cannot be seen to now keeps none of the others.
                outcome = self.see_to_caches(&set).await.and(outcome);
            }
            outcome?;
            if seen.is_open() && self.shared.lost_caches.is_seen_to(seen) {
                // Who reads and writes has waited for it.
                self.bell.ring();
            }
            if !self.shared.lost_caches.look().is_open() {
                return Ok(());
            }
        }
    }

    async fn see_to_caches(self: &Rc<Self>, set: &Arc<Set>) -> Outcome {
        let going = loop {
            if let Some(going) = self.after_lost_caches(set).await? {
                break going;
            }
        };
        for place in going {
            let member = set.first_member() + place;
            if !self.put_out(member, "lost its volatile cache").await {
                return Err(Status::Path);
            }
            self.members.borrow()[usize::from(member)].is_doubted.store(false, Ordering::Release);
        }
        Ok(())
    }

    /// A volume's users were told what it has lost, which the next process need not do again; or there is more to tell.
    pub(crate) fn losses_have_changed(&self) {
        if !self.is_read_only && !self.is_closing.get() {
            self.begin_tail();
        }
    }

    /// A cache was lost that had what the process before us had written, and that its tail says to be there.
    pub(crate) fn has_lost_while_opening(&self) -> bool {
        let has_lost =
            self.shared.lost_caches.look().number() > 0 && !is_broken("loss_at_opening_overlooked");
        has_lost && !self.is_ready.get()
    }

    /// Waits while it is not known what a lost cache has taken with it.
    pub(crate) async fn caches_seen_to(&self) -> Outcome {
        let is_open = || self.shared.lost_caches.look().is_open();
        let look = || match (self.lost.borrow().is_some(), self.is_closing.get()) {
            (true, _) => Some(Err(Status::Conflict)),
            (_, true) => Some(Err(Status::ReadOnly)),
            _ => (!is_open()).then_some(Ok(())),
        };
        self.bell.until(look).await
    }

    /// Whoever was taken out of those that are read, and is not put out, was doubted by somebody.
    fn has_lost_cache(&self, member: &Member, number: u16) -> bool {
        let (set, index) = self.place_of(number);
        let is_behind = set.parity().is_some_and(|parity| parity.is_member_behind(index));
        let is_told = member.is_doubted.load(Ordering::Acquire);
        member.is_recorded && (is_told || is_behind || set.mode(index) == Mode::Syncing)
    }

    /// Places of a set whose members have lost their caches, and are not put out yet.
    fn doubted_of(&self, set: &Set) -> Vec<u16> {
        let members = self.members.borrow();
        let number = |place: u16| set.first_member() + place;
        let has_lost =
            |place: &u16| self.has_lost_cache(&members[usize::from(number(*place))], number(*place));
        (0..set.members()).filter(has_lost).collect()
    }

    /// Of members of a set that have lost their caches those that are put out, since the others have all that they have; and those that stay.
    fn going_and_staying(set: &Set, doubted: Vec<u16>) -> (Vec<u16>, Vec<u16>) {
        let bits = |places: &[u16]| places.iter().fold(0u64, |bits, place| bits | 1 << place);
        if set.parity().is_some() {
            // All or none: of what is computed none of them can lack.
            return match survives(set, bits(&doubted)) {
                true => (doubted, Vec::new()),
                false => (Vec::new(), doubted),
            };
        }
        let has_it = |other: &u16| !doubted.contains(other) && set.mode(*other) == Mode::InSync;
        let can_go = |place: &u16| groups(set, *place).iter().all(|group| group.iter().any(has_it));
        doubted.iter().partition(|place| can_go(place))
    }

    /// Members of a set have lost their caches: says who is to be put out. Where not all of them can go, some stay: what they have lost is lost, but for
    /// what the parity log has. Each volume's FLUSH tells it. `None`: once more.
    async fn after_lost_caches(self: &Rc<Self>, set: &Arc<Set>) -> Result<Option<Vec<u16>>, Status> {
        let (going, staying) = Self::going_and_staying(set, self.doubted_of(set));
        if staying.is_empty() {
            return Ok(Some(going));
        }
        let _turn = self.turns.again.take().await;
        let leaf_of =
            |place: u16| self.members.borrow()[usize::from(set.first_member() + place)].leaf.clone();
        let (going, doubted, seen) = {
            let _one = lock(&self.shared.modes);
            let (going, doubted) = Self::going_and_staying(set, self.doubted_of(set));
            if doubted.is_empty() {
                return Ok(Some(going));
            }
            let mut seen = self.shared.lost_caches.look();
            if !seen.is_open() && !is_broken("computed_with_lost_cache") {
                // The others could do without it when it was told.
                seen = self.shared.lost_caches.one_more();
            }
            if let Some(parity) = set.parity().filter(|_| !is_broken("computed_with_lost_cache")) {
                doubted.iter().for_each(|place| parity.set_behind(*place, true));
            }
            (going, doubted, seen)
        };
        let mut leaves = Vec::with_capacity(doubted.len());
        for place in &doubted {
            let leaf = leaf_of(*place).ok_or(Status::Path)?;
            leaves.push((*place, Cache::of(leaf.device.as_ref()), leaf));
        }
        let there = (0..set.members()).filter(|place| set.mode(*place) != Mode::Away).count();
        if set.level().is_redundant()
            && set.parity().is_none()
            && there > 1
            && !is_broken("lost_copies_differ")
        {
            // Each has lost something else. One that is being brought up to date may have been given what is lost. And where strips go round they are
            // shared with a neighbour who has lost nothing.
            self.shared.mark_unsynced();
            set.intents.iter_set().for_each(|region| set.unsynced.set(region));
        }
        if let Some(parity) = set.parity() {
            self.see_to_stripes(set, parity, &leaves).await?;
        }
        // Its replacement may have what it has lost.
        leaves.iter().filter_map(|(_, _, leaf)| leaf.twin.as_ref()).for_each(|twin| twin.switch_off());
        {
            let _one = lock(&self.shared.modes);
            if leaves.iter().any(|(_, cache, leaf)| Cache::of(leaf.device.as_ref()) != *cache) {
                return Ok(None);
            }
            for (place, cache, _) in &leaves {
                let entry = &mut self.members.borrow_mut()[usize::from(set.first_member() + place)];
                if !entry.is_recorded {
                    // It has failed meanwhile, and is out.
                    continue;
                }
                entry.is_doubted.store(false, Ordering::Release);
                (entry.whole_cache, entry.owes_a_loss) = (cache.name, true);
                set.set_mode(*place, Mode::InSync);
                if let Some(parity) = set.parity() {
                    parity.set_behind(*place, false);
                }
            }
        }
        self.take_back(set, &doubted, seen.number());
        // At once with what names the caches now: a process after us would take the records for what was written into them.
        self.shared.has_lost();
        self.begin_tail();
        Ok(Some(going))
    }

    /// The same of stripes, of which these members, by place, have lost something: what the log has is put in place, and where that is not all parity is made again.
    async fn see_to_stripes(
        self: &Rc<Self>,
        set: &Arc<Set>,
        parity: &Parity,
        lost: &[(u16, Cache, Leaf)],
    ) -> Outcome {
        let is_there =
            |place: u16| lost.iter().any(|(it, ..)| *it == place) || set.mode(place) == Mode::InSync;
        let is_lacking = !(0..set.members()).all(is_there);
        // All that was begun and not flushed is in the log, then; else some of it. An opening would put it in place: it is not shown to be lost.
        let mut is_all_again = is_lacking && !parity.ring().is_unlogged_known;
        for (place, _, leaf) in lost {
            match self.put_in_place_again(set, *place, leaf, is_there).await {
                Ok(()) => {}
                Err(status @ (Status::Path | Status::Timeout | Status::Aborted)) => return Err(status),
                Err(_) => is_all_again = false,
            }
        }
        if !is_all_again {
            // Parity is not known to be right: it is made again from what there is now.
            self.shared.mark_unsynced();
            for region in set.intents.iter_set().collect::<Vec<_>>() {
                set.unsynced.set(region);
                parity.doubtful.set(region);
            }
        }
        Ok(())
    }

    /// A member of this set has lost its cache, and is not put out yet.
    pub(super) fn is_doubted(&self, set: &Set) -> bool {
        let members = self.members.borrow();
        let of_set = usize::from(set.first_member())..usize::from(set.first_member() + set.members());
        members[of_set].iter().any(|member| member.is_doubted.load(Ordering::Acquire))
    }
}

/// Looks at a member's cache; whether it is another one than at the last look.
fn look_at(
    shared: &Shared,
    (set, index): (&Set, u16),
    device: &dyn Device,
    (cache, doubted): (&Mutex<Cache>, &AtomicBool),
) -> bool {
    let now = Cache::of(device);
    let mut before = lock(cache);
    let is_another = matches!((before.name, now.name), (Some(old), Some(new)) if old != new);
    let is_lost = is_another || before.losses.is_some() && before.losses < now.losses;
    if is_lost {
        let _one = lock(&shared.modes);
        doubted.store(true, Ordering::Release);
        if set.mode(index) == Mode::InSync && survives(set, 1 << index) {
            // Nobody reads from it any more, and it still gets all writes; the owner writes it down, and brings it back.
            set.set_mode(index, Mode::Syncing);
        } else if set.mode(index) == Mode::InSync
            && !shared.is_read_only
            && !is_broken("computed_with_lost_cache")
        {
            if let Some(parity) = set.parity() {
                // Nothing is computed with what it says.
                parity.set_behind(index, true);
            }
            shared.lost_caches.one_more();
        }
    }
    *before = Cache { name: now.name.or(before.name), ..now };
    is_lost
}
