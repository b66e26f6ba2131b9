//! A volume as a device, and a queue's way to it: the hot path.
//!
//! A batch is resolved whole, then each member gets its part with one call. What resolves as slow becomes a task on the same reactor
//! ([`super::slow`]), which delays nobody. A write to several members goes out from a copy of our own: the guest may change its pages
//! between the first and the last of them.

use super::bounce::{Bounce, zero_payload};
use super::lanes::Leaf;
use super::place::Place;
use super::resolve::{Plan, Resolved, Stripe, prefetch, resolve};
use super::shared::{Class, Shared, View, VolumeShared, lock};
use super::slow;
use super::stripes::{Held, Ways};
use crate::raid::{Mode, Parity};
use crate::simulated::is_broken;
use crate::thin::VolumeMap;
use hawser_block::{
    BlockCount, BlockSize, Channel, Completion, Device, DeviceState, DiscardLimits, Geometry, Lba, Operation,
    Outcome, Request, StatsSet, Status, Token, WriteZeroesLimits, channel,
};
use hawser_runtime::{Runtime, Slab, SourceId};
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The most that one discard covers.
const DISCARD_BYTES_MAX: u64 = 1 << 30;
/// The most that one write-zeroes covers: it may have to be written.
const ZERO_BYTES_MAX: u64 = 32 << 20;

/// A volume, offered like any device.
pub(crate) struct VolumeDevice {
    name: String,
    shared: Arc<Shared>,
    volume: Arc<VolumeShared>,
}

impl VolumeDevice {
    pub(crate) fn new(shared: Arc<Shared>, volume: Arc<VolumeShared>) -> VolumeDevice {
        VolumeDevice { name: format!("{}/{}", shared.name, volume.name), shared, volume }
    }
}

impl Device for VolumeDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn geometry(&self) -> Option<Geometry> {
        let view = self.shared.view();
        let shift = view.block_shift;
        let blocks = |bytes: u64| u32::try_from(bytes >> shift).unwrap_or(u32::MAX);
        let size_bytes = self.volume.map().size_bytes();
        let unit_bytes = u64::from(view.thin.unit_bytes);
        Some(Geometry {
            physical_block_bytes: 4096.max(1 << shift),
            optimal_io_bytes: 0,
            read_only: self.shared.is_read_only || self.volume.is_snapshot,
            volatile_cache: true,
            discard: Some(DiscardLimits {
                blocks_max: blocks(DISCARD_BYTES_MAX),
                granularity_blocks: blocks(unit_bytes),
                reads_zeroes: false,
            }),
            write_zeroes: Some(WriteZeroesLimits { blocks_max: blocks(ZERO_BYTES_MAX), may_unmap: true }),
            ..Geometry::new(BlockSize::new(1 << shift)?, size_bytes >> shift)
        })
    }

    fn state(&self) -> DeviceState {
        let is_reading = self.shared.is_read_only || self.volume.is_snapshot;
        match self.shared.is_writable.load(Ordering::Acquire) || is_reading {
            true => DeviceState::Ready,
            false => DeviceState::Failed,
        }
    }

    fn trouble(&self) -> String {
        lock(&self.shared.told).pool.troubles.join("; ")
    }

    fn uuid(&self) -> [u8; 16] {
        self.volume.uuid
    }

    fn subscribe(&self, listener: Box<dyn Fn() + Send + Sync>) {
        lock(&self.volume.listeners).push(listener);
    }

    fn channel(&self, runtime: &Runtime, user: SourceId) -> Box<dyn channel::Channel> {
        Box::new(VolumeChannel::new(runtime, user, &self.shared, &self.volume))
    }

    fn stats(&self) -> Arc<StatsSet> {
        Arc::clone(&self.volume.stats)
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.volume.slow_counts()
    }

    fn copied_bytes(&self) -> Vec<(&'static str, u64)> {
        let has_parity = self.shared.view().array.sets().iter().any(|set| set.parity().is_some());
        vec![(if has_parity { "parity" } else { "mirror" }, self.volume.copied_bytes.load(Ordering::Relaxed))]
    }
}

/// What a channel's slow requests need of it.
pub(crate) struct Core {
    pub(crate) runtime: Runtime,
    pub(crate) shared: Arc<Shared>,
    pub(crate) volume: Arc<VolumeShared>,
    pub(crate) place: Rc<Place>,
    /// Its user has waited long enough: who waits for space, or tries again, gives up.
    pub(crate) is_given_up: Arc<AtomicBool>,
    user: SourceId,
    ended: RefCell<Vec<Completion>>,
    slow: Cell<usize>,
}

impl Core {
    /// The ways of tasks.
    pub(crate) fn ways(&self) -> Ways {
        Ways {
            runtime: self.runtime.clone(),
            shared: Arc::clone(&self.shared),
            place: Rc::clone(&self.place),
            lanes: Rc::clone(&self.place.lanes),
        }
    }

    fn end(&self, token: Token, outcome: Outcome) {
        self.ended.borrow_mut().push(Completion { token, outcome });
        self.runtime.wake(self.user);
    }
}

/// A request whose plan is being carried out.
struct Slot {
    request: Request,
    turn: usize,
    /// [`Shared::joins`] when its members were known.
    since: u64,
    left: u32,
    /// Members that have a part of it, those that failed, and those that were given up, by bits.
    members: u64,
    failed: u64,
    aborted: u64,
    status: Option<Status>,
    copy: Option<Bounce>,
    /// Stripes that are ours until it has ended.
    stripes: Vec<Stripe>,
}

struct Lane {
    leaf: Leaf,
    /// How often the member had been given up when the first of what is under way was sent.
    given_up: u64,
    channel: Box<dyn Channel>,
    batch: Vec<Request>,
    outstanding: usize,
}

/// A lane that gets nothing new.
struct Retired {
    /// The member that it still is a part of.
    member: Option<usize>,
    lane: Lane,
}

struct VolumeChannel {
    core: Rc<Core>,
    version: u64,
    view: Arc<View>,
    map: Arc<VolumeMap>,
    /// By the member's number.
    lanes: Vec<Option<Lane>>,
    /// With requests under way: of devices that are members no more, and of those that members were alone until now.
    retired: Vec<Retired>,
    slots: Slab<Slot>,
    plan: Plan,
    rotor: u32,
    reaped: Vec<Completion>,
    /// Lists of stripes that nobody uses now.
    lists: Vec<Vec<Stripe>>,
}

impl VolumeChannel {
    fn new(
        runtime: &Runtime,
        user: SourceId,
        shared: &Arc<Shared>,
        volume: &Arc<VolumeShared>,
    ) -> VolumeChannel {
        let place = Place::of(runtime, shared);
        volume.users.fetch_add(1, Ordering::SeqCst);
        place.add_user(user);
        let core = Rc::new(Core {
            runtime: runtime.clone(),
            shared: Arc::clone(shared),
            volume: Arc::clone(volume),
            place,
            is_given_up: Arc::default(),
            user,
            ended: RefCell::new(Vec::with_capacity(64)),
            slow: Cell::new(0),
        });
        let mut channel = VolumeChannel {
            version: 0,
            view: shared.view(),
            map: volume.map(),
            core,
            lanes: Vec::new(),
            retired: Vec::new(),
            slots: Slab::with_capacity(256),
            plan: Plan::new(),
            rotor: 0,
            reaped: Vec::with_capacity(64),
            lists: Vec::with_capacity(64),
        };
        channel.refresh();
        channel
    }

    /// Looks at the pool again if it has changed.
    fn refresh(&mut self) {
        let version = self.core.shared.version.load(Ordering::Acquire);
        if version == self.version {
            return;
        }
        self.version = version;
        self.view = self.core.shared.view();
        self.map = self.core.volume.map();
        for (member, leaf) in self.view.leaves.iter().enumerate() {
            if self.lanes.len() == member {
                self.lanes.push(None);
            }
            let place = &mut self.lanes[member];
            let is_same = match (&*place, leaf) {
                (Some(lane), Some(leaf)) => lane.leaf.same(leaf),
                (None, None) => true,
                _ => false,
            };
            if is_same {
                continue;
            }
            let retired = place.take().filter(|lane| lane.outstanding > 0);
            self.retired.extend(retired.map(|mut lane| {
                let is_kin = leaf.as_ref().is_some_and(|leaf| leaf.is_kin(&lane.leaf));
                if !is_kin {
                    // Nobody waits for a device that is no member any more.
                    lane.channel.abort();
                }
                Retired { member: is_kin.then_some(member), lane }
            }));
            *place = leaf.as_ref().map(|leaf| Lane {
                leaf: leaf.clone(),
                given_up: 0,
                channel: leaf.whole.channel(&self.core.runtime, self.core.user),
                batch: Vec::with_capacity(64),
                outstanding: 0,
            });
        }
    }

    fn take(&mut self, request: Request) {
        let core = &self.core;
        if request.operation == Operation::Flush {
            self.slowly(request, None);
            return;
        }
        let turn = core.place.enter();
        let resolved = resolve(&self.view, &self.map, &request, &mut self.rotor, &mut self.plan);
        let is_late = matches!(request.operation, Operation::Write { fua: true })
            && core.shared.pending.load(Ordering::Acquire) > 0;
        match resolved {
            Resolved::Plan if !is_late => self.start(request, turn),
            Resolved::Plan => {
                core.place.leave(turn);
                self.slowly(request, None);
            }
            Resolved::Slow(class) => {
                core.place.leave(turn);
                self.slowly(request, Some(class));
            }
            Resolved::Refused(status) => {
                core.place.leave(turn);
                core.end(request.token, Err(status));
            }
        }
    }

    fn slowly(&mut self, request: Request, class: Option<Class>) {
        if let Some(class) = class {
            self.core.volume.count(class);
        }
        spawn(&self.core, request.token, slow::carry_out(Rc::clone(&self.core), request));
    }

    /// Carries out the plan that `resolve` has made.
    fn start(&mut self, request: Request, turn: usize) {
        let core = &self.core;
        let has_lane = |member: u16| self.lanes.get(usize::from(member)).is_some_and(Option::is_some);
        if !self.plan.steps.iter().all(|step| has_lane(step.member)) {
            // A member has come since we looked.
            core.place.leave(turn);
            self.slowly(request, Some(Class::Degraded));
            return;
        }
        let is_write = request.operation.is_write();
        if is_write && !core.shared.is_writable.load(Ordering::Relaxed) {
            core.place.leave(turn);
            core.end(request.token, Err(Status::ReadOnly));
            return;
        }
        let mut copy = None;
        let len = request.buffers.len();
        if is_write && self.view.is_copied {
            if !core.place.begin_copy(len) {
                core.place.leave(turn);
                self.slowly(request, None);
                return;
            }
            if !self.take_stripes() {
                core.place.end_copy(len);
                core.place.leave(turn);
                self.slowly(request, Some(Class::PartialStripe));
                return;
            }
            let mut bounce = core.place.spare.take(len + self.plan.parity_bytes as usize);
            if self.plan.stripes.is_empty() {
                bounce.copy_payload(0, &request.buffers);
            }
            // One after the other: what was just copied is still in the cache.
            for stripe in &self.plan.stripes {
                let stripes = &parity_of(&self.view, stripe).stripes;
                let strip = usize::try_from(stripes.strip_bytes()).expect("a strip is small");
                let (start, data) = (stripe.start as usize, usize::from(stripes.data_strips()));
                bounce.copy_payload(start, &request.buffers.slice(start, data * strip));
                let p = stripe.parity as usize;
                let q = (stripes.parities() == 2).then_some(p + strip);
                bounce.sums(start, strip, data, p, q);
            }
            core.volume.copied_bytes.fetch_add(len as u64, Ordering::Relaxed);
            copy = Some(bounce);
        }
        for (start, len) in &self.plan.zeroes {
            zero_payload(&request.buffers.slice(*start as usize, *len as usize));
        }
        if self.plan.steps.is_empty() {
            core.place.leave(turn);
            core.end(request.token, Ok(()));
            return;
        }
        let left = u32::try_from(self.plan.steps.len()).expect("a plan has few steps");
        let since = core.shared.joins();
        let stripes = match self.plan.stripes.is_empty() {
            true => Vec::new(),
            false => std::mem::replace(&mut self.plan.stripes, self.lists.pop().unwrap_or_default()),
        };
        let slot = Slot {
            request,
            turn,
            since,
            left,
            members: 0,
            failed: 0,
            aborted: 0,
            status: None,
            copy,
            stripes,
        };
        let key = self.slots.insert(slot);
        let slot = self.slots.get_mut(key).expect("just inserted");
        let shift = self.view.block_shift;
        for step in &self.plan.steps {
            slot.members |= 1 << step.member;
            let (start, len) = (step.start as usize, step.len as usize);
            let buffers = match &slot.copy {
                Some(copy) => copy.buffers(start, len),
                None => request.buffers.slice(start, len),
            };
            let lane = self.lanes[usize::from(step.member)].as_mut();
            let lane = lane.expect("plans are made for members that are there");
            if lane.outstanding == 0 {
                let given_up = &core.shared.given_up[usize::from(step.member)];
                lane.given_up = given_up.load(Ordering::Acquire);
            }
            lane.outstanding += 1;
            lane.batch.push(Request {
                operation: request.operation,
                lba: Lba(step.offset >> shift),
                blocks: BlockCount(step.len >> shift),
                buffers,
                token: Token(key as u64),
            });
        }
    }

    /// Takes all stripes of the plan, or none.
    fn take_stripes(&self) -> bool {
        let is_taken = |stripe: &Stripe| parity_of(&self.view, stripe).guards.take_unlogged(stripe.row);
        let Some(other) = self.plan.stripes.iter().position(|stripe| !is_taken(stripe)) else { return true };
        for stripe in &self.plan.stripes[..other] {
            parity_of(&self.view, stripe).guards.give_back(stripe.row);
        }
        false
    }

    /// Gives a request's stripes back.
    fn give_back(&mut self, mut stripes: Vec<Stripe>) {
        for stripe in stripes.drain(..) {
            parity_of(&self.view, &stripe).guards.give_back(stripe.row);
        }
        if stripes.capacity() > 0 {
            self.lists.push(stripes);
        }
    }

    fn submit_lanes(&mut self) {
        for lane in self.lanes.iter_mut().flatten().filter(|lane| !lane.batch.is_empty()) {
            lane.channel.submit(&mut lane.batch);
        }
    }

    fn ended(&mut self, member: u64, completion: Completion) {
        let key = usize::try_from(completion.token.0).expect("a token of ours");
        let slot = self.slots.get_mut(key).expect("a request ends once");
        slot.left -= 1;
        if let Err(status) = completion.outcome {
            match status {
                Status::Aborted => slot.aborted |= member,
                _ => slot.failed |= member,
            }
            // One that says "given up" says less than any other.
            if matches!(slot.status, None | Some(Status::Aborted)) {
                slot.status = Some(status);
            }
        }
        if slot.left == 0 {
            let slot = self.slots.remove(key).expect("looked up just now");
            self.finish(slot);
        }
    }

    fn finish(&mut self, slot: Slot) {
        let Slot { request, turn, since, members, failed, aborted, status, copy, stripes, .. } = slot;
        // Kept until a failure is written down: who changes them before would take for right what the member does not have.
        let held = match status {
            None => {
                self.give_back(stripes);
                Vec::new()
            }
            Some(_) => {
                let held =
                    |stripe: &Stripe| Held::taken(self.view.array.set(stripe.set as usize), stripe.row);
                stripes.iter().map(held).collect()
            }
        };
        let core = &self.core;
        if copy.is_some() {
            core.place.end_copy(request.buffers.len());
        }
        let is_write = request.operation.is_write();
        let Some(status) = status else {
            // What was read from a member that has been found to lack something meanwhile may be old.
            let is_old = !is_write && self.view.is_redundant && !self.are_in_sync(members);
            let is_good = !is_old || is_broken("stale_member_read");
            core.place.leave(turn);
            match is_good {
                true => core.end(request.token, Ok(())),
                false => self.slowly(request, Some(Class::Degraded)),
            }
            return;
        };
        if !self.view.is_redundant {
            core.place.leave(turn);
            core.end(request.token, Err(status));
            return;
        }
        core.volume.count(Class::DeviceFailure);
        if !is_write {
            core.place.leave(turn);
            match status {
                Status::Aborted if core.is_given_up.load(Ordering::Relaxed) => {
                    core.end(request.token, Err(status));
                }
                _ => self.slowly(request, None),
            }
            return;
        }
        // Its copies may differ; and it is under way until that is written down, so that nobody makes them the same before.
        slow::mark_unsynced(core, &request);
        let under_way = core.place.still_under_way(turn);
        let failure = slow::after_failure(
            Rc::clone(core),
            request,
            (failed, aborted),
            (status, since),
            (under_way, held),
        );
        spawn(core, request.token, failure);
    }

    fn are_in_sync(&self, members: u64) -> bool {
        let mut members = members;
        while members != 0 {
            let member = u16::try_from(members.trailing_zeros()).unwrap_or(0);
            members &= members - 1;
            let found = self.view.array.set_of_member(member);
            if found.is_none_or(|(set, index)| self.view.array.set(set).mode(index) != Mode::InSync) {
                return false;
            }
        }
        true
    }
}

fn parity_of<'a>(view: &'a View, stripe: &Stripe) -> &'a Parity {
    view.array.set(stripe.set as usize).parity().expect("only sets with parity have stripes")
}

/// Runs a slow request as a task.
fn spawn(core: &Rc<Core>, token: Token, work: impl Future<Output = Outcome> + 'static) {
    core.slow.set(core.slow.get() + 1);
    let core = Rc::clone(core);
    let runtime = core.runtime.clone();
    runtime.spawn(async move {
        let outcome = work.await;
        core.slow.set(core.slow.get() - 1);
        core.end(token, outcome);
    });
}

impl Channel for VolumeChannel {
    fn submit(&mut self, batch: &mut Vec<Request>) {
        self.refresh();
        if self.slots.is_empty() && self.core.slow.get() == 0 {
            // Nothing is left of what was given up.
            self.core.is_given_up.store(false, Ordering::Relaxed);
        }
        // At random across a large table each look-up waits for memory. All of a batch wait at once: of 32 reads in 64 TiB each takes
        // 50 ns instead of 167 (benches/resolve.rs).
        if batch.len() > 1 {
            for request in batch.iter() {
                prefetch(&self.view, &self.map, request);
            }
        }
        for request in batch.drain(..) {
            self.take(request);
        }
        self.submit_lanes();
    }

    fn reap(&mut self, ended: &mut Vec<Completion>) {
        self.refresh();
        let mut reaped = std::mem::take(&mut self.reaped);
        for member in 0..self.lanes.len() {
            let Some(lane) = self.lanes[member].as_mut().filter(|lane| lane.outstanding > 0) else {
                continue;
            };
            let given_up = self.core.shared.given_up[member].load(Ordering::Acquire);
            if given_up != lane.given_up {
                lane.given_up = given_up;
                lane.channel.abort();
            }
            lane.channel.reap(&mut reaped);
            lane.outstanding -= reaped.len();
            for completion in reaped.drain(..) {
                self.ended(1 << member, completion);
            }
        }
        let mut retired = std::mem::take(&mut self.retired);
        for Retired { member, lane } in &mut retired {
            if let Some(member) = *member {
                let given_up = self.core.shared.given_up[member].load(Ordering::Acquire);
                if given_up != lane.given_up {
                    lane.given_up = given_up;
                    lane.channel.abort();
                }
            }
            lane.channel.reap(&mut reaped);
            lane.outstanding -= reaped.len();
            for completion in reaped.drain(..) {
                // Else whose number it had may be another's now; the answer counts all the same.
                self.ended(member.map_or(0, |member| 1 << member), completion);
            }
        }
        retired.retain(|retired| retired.lane.outstanding > 0);
        self.retired = retired;
        self.reaped = reaped;
        ended.append(&mut self.core.ended.borrow_mut());
    }

    fn is_working(&self) -> bool {
        self.lanes.iter().flatten().any(|lane| lane.outstanding > 0 && lane.channel.is_working())
    }

    fn abort(&mut self) {
        self.core.is_given_up.store(true, Ordering::Relaxed);
        self.core.place.bell.ring();
        let retired = self.retired.iter_mut().map(|retired| &mut retired.lane);
        for lane in self.lanes.iter_mut().flatten().chain(retired) {
            lane.channel.abort();
        }
        if self.core.slow.get() > 0 {
            // Tasks of others try again.
            for leaf in self.view.leaves.iter().flatten() {
                self.core.place.lanes.abort(leaf);
            }
        }
    }
}

impl Drop for VolumeChannel {
    fn drop(&mut self) {
        self.core.place.remove_user(self.core.user);
        self.core.volume.users.fetch_sub(1, Ordering::SeqCst);
    }
}
