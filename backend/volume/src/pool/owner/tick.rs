//! What has to be done from time to time, and what people see.

use super::Owner;
use crate::pool::shared::{Told, lock};
use crate::pool::{PoolView, TaskView};
use crate::raid::Mode;
use hawser_block::DeviceState;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

/// How often it looks.
const TICK: Duration = Duration::from_secs(1);
/// How long a member is left alone after it could not be brought back.
const REJOIN_AFTER: Duration = Duration::from_secs(2);

impl Owner {
    /// Waits so long, or until the pool is being closed.
    pub(crate) async fn rest(&self, duration: Duration) {
        let mut sleep = self.runtime.sleep(duration);
        self.bell.until_or(&mut sleep, || self.is_closing.get()).await;
    }

    /// Runs until the pool is closed: looks after the members, and tells people.
    pub(crate) async fn tick(self: Rc<Self>) {
        let [is_at_it, is_looking] = [(); 2].map(|()| Rc::new(Cell::new(false)));
        while !self.is_closing.get() {
            self.rest(TICK).await;
            if self.lost.borrow().is_none() && !self.is_closing.get() {
                self.check_owner().await;
                // Who is just brought back may be the one that keeps a write.
                if !is_looking.replace(true) {
                    let (owner, is_looking) = (Rc::clone(&self), Rc::clone(&is_looking));
                    self.runtime.spawn(async move {
                        owner.put_out_keepers().await;
                        is_looking.set(false);
                    });
                }
                // Who comes back may have to wait for a write that no member takes: whose the pool is, and how it is, is looked at all the same.
                if !is_at_it.replace(true) {
                    let (owner, is_at_it) = (Rc::clone(&self), Rc::clone(&is_at_it));
                    self.runtime.spawn(async move {
                        owner.look_after_members().await;
                        is_at_it.set(false);
                    });
                }
            }
            self.publish();
        }
    }

    /// Runs until the pool is closed: makes durable what nobody flushes, clears marks, finds space. What fails is tried again; a member that
    /// fails it is put out, and one that does not answer holds up nobody else.
    pub(crate) async fn housekeeping(self: Rc<Self>) {
        let mut due = self.runtime.now() + self.options.intent_idle;
        while !self.is_closing.get() {
            self.rest(TICK).await;
            if self.lost.borrow().is_some() || self.is_closing.get() {
                continue;
            }
            if self.runtime.now() >= due {
                due = self.runtime.now() + self.options.intent_idle;
                let has_old = !self.pending.borrow().is_empty();
                if has_old && let Err(status) = self.flush().await {
                    log::warn!("pool {}: cannot make changes durable: {}", self.shared.name, status.name());
                }
                if self.stopped.borrow().is_some() {
                    // The rest is for who goes on writing.
                    continue;
                }
                let _ = self.release_all_stripes().await;
                let _ = self.clear_idle_intents(false).await;
                let _ = self.end_idle_unlogged(false).await;
            }
            if self.has_garbage() && self.stopped.borrow().is_none() {
                let _ = self.reclaim().await;
            }
        }
    }

    /// Puts out who has lost something, and brings back who is there again.
    pub(crate) async fn look_after_members(self: &Rc<Self>) {
        if self.is_closing.get() || self.is_read_only || self.lost.borrow().is_some() {
            return;
        }
        // What fails is tried again. Who reads waits for it.
        let _ = self.put_out_doubted().await;
        self.put_out_keepers().await;
        if self.stopped.borrow().is_some() {
            return;
        }
        // A replacement may be under way.
        let turn = self.turns.change.take().await;
        if self.is_closing.get() || self.ended().is_some() {
            return;
        }
        let count = self.members.borrow().len();
        for member in 0..u16::try_from(count).unwrap_or(0) {
            let (leaf, is_recorded, tried) = {
                let members = self.members.borrow();
                let entry = &members[usize::from(member)];
                (entry.leaf.clone(), entry.is_recorded, entry.tried)
            };
            let Some(leaf) = leaf else { continue };
            let is_due = self.runtime.now() >= tried + REJOIN_AFTER;
            if !is_recorded
                && self.mode_of(member) == Mode::Away
                && is_due
                && leaf.device.state() == DeviceState::Ready
            {
                self.members.borrow_mut()[usize::from(member)].tried = self.runtime.now();
                self.rejoin(member).await;
            }
        }
        drop(turn);
        self.use_spare().await;
    }

    /// Tells people how things are.
    pub(crate) fn publish(&self) {
        let view = self.view();
        let meta = self.meta.borrow();
        let book = self.book.borrow();
        let extent_bytes = view.thin.extent_bytes;
        let size_bytes = u64::from(meta.thin().extents) * extent_bytes;
        let free_bytes = u64::from(meta.free_extents()) * extent_bytes;
        let members = self.member_views();
        // It may not have been asked for anything since.
        let is_out_of_reach =
            self.members.borrow().iter().any(|member| {
                member.leaf.as_ref().is_some_and(|leaf| leaf.device.state() != DeviceState::Ready)
            });
        let is_lacking = view
            .array
            .sets()
            .iter()
            .any(|set| (0..set.members()).any(|member| set.mode(member) != Mode::InSync));
        let is_degraded = is_lacking || is_out_of_reach || self.stopped.borrow().is_some();
        let mut troubles = Vec::new();
        if let Some(why) = &*self.lost.borrow() {
            troubles.push(format!("nothing is read or written any more: {why}"));
        }
        troubles.extend(self.stopped.borrow().clone());
        for member in members.iter().filter(|member| !member.why.is_empty()) {
            let place = member.place.map_or_else(|| "spare".to_owned(), |place| format!("member {place}"));
            let device = member.device.as_deref().unwrap_or("missing");
            troubles.push(format!("{place} ({device}): {}: {}", member.state.name(), member.why));
        }
        let is_low = |free: u64, size: u64| {
            size > 0 && free * 1000 / size < u64::from(self.options.low_water_permille)
        };
        let is_space_low = is_low(free_bytes, size_bytes);
        if is_space_low {
            let what = format!("{} % of its space is free", free_bytes / (size_bytes / 100).max(1));
            if !self.is_low.get() {
                log::warn!(
                    "pool {}: {what}: add members (hawser pool grow), or delete what is not needed",
                    book.name
                );
            }
            troubles.push(what);
        }
        self.is_low.set(is_space_low);
        let (needed, limit) = (meta.pages_needed(), u64::from(meta.pages_limit()));
        let room = limit.saturating_sub(needed);
        let is_metadata_low = is_low(room, limit);
        if is_metadata_low {
            // Members that are added have data only.
            let what = format!(
                "{} % of its room for mappings is free, and without any it takes no first writes: delete snapshots or volumes; a new pool has as much as \
                 --metadata-size says",
                room * 100 / limit
            );
            if !self.is_metadata_low.get() {
                log::warn!("pool {}: {what}", book.name);
            }
            troubles.push(what);
        }
        self.is_metadata_low.set(is_metadata_low);
        let pool = PoolView {
            name: book.name.clone(),
            uuid: book.pool_uuid,
            level: book.level,
            generation: book.generation,
            openings: book.openings(),
            strip_bytes: book.strip_bytes,
            extent_bytes,
            size_bytes,
            free_bytes,
            metadata_bytes: limit * 4096,
            metadata_used_bytes: needed.min(limit) * 4096,
            parity_log: view
                .array
                .sets()
                .iter()
                .filter_map(|set| set.parity())
                .map(|parity| parity.log_writes())
                .fold((0, 0), |(writes, bytes), (more, more_bytes)| (writes + more, bytes + more_bytes)),
            troubles,
            unsynced_regions: view
                .array
                .sets()
                .iter()
                .map(|set| set.unsynced.iter_set().count() as u64)
                .sum(),
            is_degraded,
            is_failed: self.lost.borrow().is_some(),
            members,
            tasks: self.work.views(self.runtime.now()).into_iter().collect::<Vec<TaskView>>(),
        };
        let volumes: BTreeMap<u32, (u64, Option<String>)> = meta
            .volumes()
            .map(|(id, volume)| {
                let origin = meta.volume(volume.origin()).map(|origin| origin.name().to_owned());
                (id, (volume.mapped_extents() * extent_bytes, origin))
            })
            .collect();
        *lock(&self.shared.told) = Told { pool, volumes };
    }
}
