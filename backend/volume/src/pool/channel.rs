//! A queue's way to a volume: the hot path.
//!
//! A batch is resolved whole, then each member gets its part with one call. What resolves as slow becomes a task on the same reactor
//! ([`super::slow`]), which delays nobody. A write to several members goes out from a copy of our own: the guest may change its pages
//! between the first and the last of them.

mod parts;

use super::bounce::{Bounce, zero_payload};
use super::failure;
use super::lanes::Leaf;
use super::lost_caches::Seen;
use super::place::Place;
use super::resolve::{Plan, Resolved, Step, Stripe, prefetch, resolve_one, resolve_parts};
use super::shared::{Class, Counted, Shared, View, VolumeShared};
use super::slow;
use super::stripes::{Begun, Held, Ways};
use crate::raid::{Mode, Parity};
use crate::simulated::is_broken;
use crate::thin::VolumeMap;
use hawser_block::{
    BlockCount, Channel, Completion, Device, Lba, Operation, Outcome, Request, Status, Token,
};
use hawser_runtime::{Runtime, Slab, SourceId};
use parts::Whole;
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

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

    /// A write has ended that was under way when a cache was lost, and may have gone with it.
    #[cold]
    fn has_lost(&self) {
        self.volume.has_lost();
        drop(self.shared.ask(|owner| async move { owner.losses_have_changed() }));
    }

    fn end(&self, token: Token, outcome: Outcome) {
        self.ended.borrow_mut().push(Completion { token, outcome });
        self.runtime.wake(self.user);
    }
}

/// A request whose plan is being carried out: a cache line, since most reads need no more.
struct Slot {
    request: Request,
    /// Members that have a part of it, by bits.
    members: u64,
    left: u32,
    turn: u8,
    has_more: bool,
    /// A cache was lost while it was under way: a read may be of the time before, and is done again.
    is_again: bool,
}

/// What there is to a request that is not a read that goes well.
#[derive(Default)]
struct More {
    /// [`Shared::joins`] when its members were known.
    since: u64,
    /// Members that failed, and those that were given up, by bits.
    failed: u64,
    aborted: u64,
    status: Option<Status>,
    copy: Option<Bounce>,
    /// Stripes that are ours until it has ended.
    stripes: Vec<Stripe>,
}

impl Slot {
    fn new(request: Request, turn: usize, left: u32) -> Slot {
        Slot { request, members: 0, left, turn: u8::from(turn != 0), has_more: false, is_again: false }
    }

    fn turn(&self) -> usize {
        usize::from(self.turn)
    }

    /// What there is to it, at its key.
    fn more<'a>(&mut self, more: &'a mut Vec<More>, key: usize) -> &'a mut More {
        self.has_more = true;
        if more.len() <= key {
            more.resize_with(key + 1, More::default);
        }
        &mut more[key]
    }
}

struct Lane {
    leaf: Leaf,
    /// How often the member had been given up when the first of what is under way was sent.
    given_up: u64,
    channel: Box<dyn Channel>,
    batch: Vec<Request>,
    outstanding: usize,
}

impl Lane {
    /// It gets one more.
    #[inline]
    fn begin(&mut self, core: &Core, member: u16) {
        if self.outstanding == 0 {
            self.given_up = core.shared.given_up[usize::from(member)].load(Ordering::Acquire);
        }
        self.outstanding += 1;
    }

    #[inline]
    fn is_working(&self) -> bool {
        self.outstanding > 0 && self.channel.is_working()
    }
}

/// A lane that gets nothing new.
struct Retired {
    /// The member that it still is a part of.
    member: Option<usize>,
    lane: Lane,
}

pub(super) struct VolumeChannel {
    core: Rc<Core>,
    version: u64,
    view: Arc<View>,
    map: Arc<VolumeMap>,
    /// By the member's number.
    lanes: Vec<Option<Lane>>,
    /// With requests under way: of devices that are members no more, and of those that members were alone until now.
    retired: Vec<Retired>,
    slots: Slab<Slot>,
    /// Of those slots that have more, by their keys.
    more: Vec<More>,
    plan: Plan,
    rotor: u32,
    lost_caches: Seen,
    /// The lane that is looked at first.
    turn: usize,
    /// Requests that went out in parts.
    wholes: Slab<Whole>,
    reaped: Vec<Completion>,
    ended_early: Vec<Completion>,
    /// Lists of stripes that nobody uses now.
    lists: Vec<Vec<Stripe>>,
}

impl VolumeChannel {
    pub(super) fn new(
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
            more: Vec::with_capacity(256),
            plan: Plan::new(),
            rotor: 0,
            lost_caches: shared.lost_caches.look(),
            turn: 0,
            wholes: Slab::with_capacity(64),
            reaped: Vec::with_capacity(64),
            ended_early: Vec::with_capacity(64),
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
                    // Nobody waits for a device that is no member any more; it was out before it was that.
                    lane.channel.leave();
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

    /// Whether a cache was lost since the last look.
    #[inline]
    fn look_for_losses(&mut self) {
        let seen = self.core.shared.lost_caches.look();
        if seen != self.lost_caches {
            self.have_met_loss(seen);
        }
    }

    #[cold]
    #[inline(never)]
    fn have_met_loss(&mut self, seen: Seen) {
        if seen.number() != self.lost_caches.number() && !is_broken("lost_cache_read_on") {
            self.slots.iter_mut().for_each(|(_, slot)| slot.is_again = true);
            self.wholes.iter_mut().for_each(|(_, whole)| whole.has_met_loss());
        }
        self.lost_caches = seen;
    }

    fn take(&mut self, request: Request) {
        let core = &self.core;
        if request.operation == Operation::Flush {
            // There is no other way for it.
            self.spawn_slow(request, Counted::default());
            return;
        }
        if self.view.is_lost && request.operation == Operation::Read {
            core.end(request.token, Err(Status::Conflict));
            return;
        }
        if self.lost_caches.is_open() {
            self.slowly(request, Class::Degraded);
            return;
        }
        let turn = core.place.enter();
        if request.operation == Operation::Read
            && let Some(step) = resolve_one(&self.view, &self.map, &request, &mut self.rotor)
        {
            return self.start_read(request, turn, step);
        }
        let resolved = resolve_parts(&self.view, &self.map, &request, &mut self.rotor, &mut self.plan);
        let is_late = matches!(request.operation, Operation::Write { fua: true })
            && core.shared.pending.load(Ordering::Acquire) > 0;
        match resolved {
            Resolved::Plan if !is_late => self.start(request, turn),
            Resolved::Plan => {
                core.place.leave(turn);
                self.slowly(request, Class::Fua);
            }
            Resolved::Slow(class) => {
                core.place.leave(turn);
                self.slowly(request, class);
            }
            Resolved::Refused(status) => {
                core.place.leave(turn);
                core.end(request.token, Err(status));
            }
        }
    }

    #[cold]
    #[inline(never)]
    fn slowly(&mut self, request: Request, class: Class) {
        self.core.volume.count(class);
        self.spawn_slow(request, Counted::under(class));
    }

    #[cold]
    #[inline(never)]
    fn spawn_slow(&mut self, request: Request, counted: Counted) {
        let changes = !matches!(request.operation, Operation::Read | Operation::Flush);
        let work = slow::carry_out(Rc::clone(&self.core), request, counted);
        spawn(&self.core, (request.token, changes), work);
    }

    /// Carries out a plan that is one read of one member: most are.
    fn start_read(&mut self, request: Request, turn: usize, step: Step) {
        let core = &self.core;
        let Some(lane) = self.lanes.get_mut(usize::from(step.member)).and_then(Option::as_mut) else {
            core.place.leave(turn);
            self.slowly(request, Class::Degraded);
            return;
        };
        let members = 1 << step.member;
        let key = self.slots.insert(Slot { members, ..Slot::new(request, turn, 1) });
        lane.begin(core, step.member);
        let shift = self.view.block_shift;
        let (lba, token) = (Lba(step.offset >> shift), Token(key as u64));
        lane.batch.push(Request { lba, token, ..request });
    }

    /// Carries out the plan that has been made.
    fn start(&mut self, request: Request, turn: usize) {
        let core = &self.core;
        let has_lane = |member: u16| self.lanes.get(usize::from(member)).is_some_and(Option::is_some);
        if !self.plan.steps.iter().all(|step| has_lane(step.member)) {
            // A member has come since we looked.
            core.place.leave(turn);
            self.slowly(request, Class::Degraded);
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
                self.slowly(request, Class::CopyLimit);
                return;
            }
            if !self.take_stripes() {
                core.place.end_copy(len);
                core.place.leave(turn);
                self.slowly(request, Class::PartialStripe);
                return;
            }
            if !self.plan.stripes.is_empty() {
                self.start_stripes(request, turn);
                return;
            }
            let bounce = core.place.spare.take(len);
            bounce.copy_payload(0, &request.buffers);
            core.volume.count_copied(len);
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
        let key = self.slots.insert(Slot::new(request, turn, left));
        let slot = self.slots.get_mut(key).expect("just inserted");
        if self.view.is_copied && is_write {
            let more = slot.more(&mut self.more, key);
            (more.since, more.copy) = (since, copy);
        }
        let copy = self.more.get(key).filter(|_| slot.has_more).and_then(|more| more.copy.as_ref());
        let shift = self.view.block_shift;
        for step in &self.plan.steps {
            slot.members |= 1 << step.member;
            let (start, len) = (step.start as usize, step.len as usize);
            let buffers = match copy {
                Some(copy) => copy.buffers(start, len),
                None => request.buffers.slice(start, len),
            };
            let lane = self.lanes[usize::from(step.member)].as_mut();
            let lane = lane.expect("plans are made for members that are there");
            lane.begin(core, step.member);
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

    /// What the members' lanes have ended; says which members were found to be given up, by bits.
    ///
    /// Of members that do their work in this thread one has its turn, so that what it has done is shown while the others are at it: with all of
    /// them the first of a batch was shown as late as two or three portions, and a RAID 0 in memory read 0.7 as fast as its bare member.
    fn reap_lanes(&mut self, ended: &mut Vec<Completion>) -> u64 {
        let mut aborted = 0;
        let mut reaped = std::mem::take(&mut self.reaped);
        let (lanes, first) = (self.lanes.len(), self.turn);
        let mut is_shown = false;
        for step in 0..lanes {
            let member = if first + step < lanes { first + step } else { first + step - lanes };
            let Some(lane) = self.lanes[member].as_mut().filter(|lane| lane.outstanding > 0) else {
                continue;
            };
            if is_shown && lane.is_working() {
                self.core.runtime.wake(self.core.user);
                continue;
            }
            let given_up = self.core.shared.given_up[member].load(Ordering::Acquire);
            if given_up != lane.given_up {
                lane.given_up = given_up;
                lane.channel.leave();
                aborted |= 1 << member;
            }
            lane.channel.reap(&mut reaped);
            lane.outstanding -= reaped.len();
            let before = ended.len();
            self.look_for_losses();
            for completion in reaped.drain(..) {
                self.ended(1 << member, completion, ended);
            }
            let is_working = |lanes: &[Option<Lane>]| lanes[member].as_ref().is_some_and(Lane::is_working);
            if ended.len() > before && !is_shown && is_working(&self.lanes) {
                (is_shown, self.turn) = (true, member + 1);
            }
        }
        self.reaped = reaped;
        aborted
    }

    /// What the lanes have ended that get nothing new.
    #[cold]
    #[inline(never)]
    fn reap_retired(&mut self, ended: &mut Vec<Completion>) {
        let mut reaped = std::mem::take(&mut self.reaped);
        let mut retired = std::mem::take(&mut self.retired);
        for Retired { member, lane } in &mut retired {
            if let Some(member) = *member {
                let given_up = self.core.shared.given_up[member].load(Ordering::Acquire);
                if given_up != lane.given_up {
                    lane.given_up = given_up;
                    lane.channel.leave();
                }
            }
            lane.channel.reap(&mut reaped);
            lane.outstanding -= reaped.len();
            self.look_for_losses();
            for completion in reaped.drain(..) {
                // Else whose number it had may be another's now; the answer counts all the same.
                self.ended(member.map_or(0, |member| 1 << member), completion, ended);
            }
        }
        retired.retain(|retired| retired.lane.outstanding > 0);
        self.retired = retired;
        self.reaped = reaped;
    }

    fn submit_lanes(&mut self) {
        for lane in self.lanes.iter_mut().flatten().filter(|lane| !lane.batch.is_empty()) {
            lane.channel.submit(&mut lane.batch);
        }
    }

    /// A part of a request has ended; if it was the last, and all is well, the request is among `ended`.
    fn ended(&mut self, member: u64, completion: Completion, ended: &mut Vec<Completion>) {
        let key = usize::try_from(completion.token.0).expect("a token of ours");
        let slot = self.slots.get_mut(key).expect("a request ends once");
        slot.left -= 1;
        if let Err(status) = completion.outcome {
            let more = slot.more(&mut self.more, key);
            match status {
                Status::Aborted => more.aborted |= member,
                _ => more.failed |= member,
            }
            // One that says "given up" says less than any other.
            if matches!(more.status, None | Some(Status::Aborted)) {
                more.status = Some(status);
            }
        }
        if slot.left > 0 {
            return;
        }
        let (turn, is_write, members, token) =
            (slot.turn(), slot.request.operation.is_write(), slot.members, slot.request.token);
        let is_again = slot.is_again;
        if slot.has_more {
            let more = &mut self.more[key];
            if let Some(status) = more.status {
                return self.fail(key, status);
            }
            let len = slot.request.buffers.len();
            let stripes = std::mem::take(&mut more.stripes);
            if more.copy.take().is_some() {
                self.core.place.end_copy(len);
            }
            if stripes.capacity() > 0 {
                self.give_back(stripes);
            }
        }
        if is_write {
            self.core.volume.unflushed.has_written();
            if is_again {
                self.core.has_lost();
            }
        }
        // What was read from a member that has been found to lack something meanwhile may be old.
        let is_old = !is_write && self.view.is_redundant && !self.are_in_sync(members);
        self.core.place.leave(turn);
        if !is_write && self.view.is_lost {
            // It may be another volume's data.
            self.slots.remove(key);
            let outcome = Err(Status::Conflict);
            Self::has_ended((&mut self.wholes, &self.core), Completion { token, outcome }, ended);
        } else if is_again && !is_write || is_old && !is_broken("stale_member_read") {
            let request = self.slots.remove(key).expect("looked up just now").request;
            self.slowly(request, Class::Degraded);
        } else {
            self.slots.remove(key);
            Self::has_ended((&mut self.wholes, &self.core), Completion { token, outcome: Ok(()) }, ended);
        }
    }

    #[cold]
    #[inline(never)]
    fn fail(&mut self, key: usize, status: Status) {
        let slot = self.slots.remove(key).expect("it has just ended");
        let more = std::mem::take(&mut self.more[key]);
        let (request, turn) = (slot.request, slot.turn());
        let More { since, failed, aborted, copy, stripes, .. } = more;
        let core = &self.core;
        let copied = copy.as_ref().map(|_| core.place.copied(request.buffers.len()));
        if !self.view.is_redundant {
            core.place.leave(turn);
            core.end(request.token, Err(status));
            return;
        }
        // Of a request that went out in parts it is the first that counts.
        if Whole::fails_first(&mut self.wholes, request.token) {
            core.volume.count(Class::DeviceFailure);
        }
        if !request.operation.is_write() {
            core.place.leave(turn);
            match status {
                Status::Aborted if core.is_given_up.load(Ordering::Relaxed) => {
                    core.end(request.token, Err(status));
                }
                _ => self.spawn_slow(request, Counted::under(Class::DeviceFailure)),
            }
            return;
        }
        // Its copies may differ; and it is under way until that is written down, so that nobody makes them the same before.
        slow::mark_unsynced(core, &request);
        let under_way = core.place.still_under_way(turn);
        let (core, members, token) = (Rc::clone(core), (failed, aborted), request.token);
        let Some(copy) = copy.filter(|_| !stripes.is_empty()) else {
            drop(copied);
            let ended = failure::after_failure(core, request, members, (status, since), under_way);
            return spawn(&self.core, (token, true), ended);
        };
        // Kept until the failure is written down, or the stripes are whole: who changes them before would take for right what a member does
        // not have.
        let held = |stripe: &Stripe| Held::taken(self.view.array.set(stripe.set as usize), stripe.row);
        let begun = Begun {
            view: Arc::clone(&self.view),
            _held: stripes.iter().map(held).collect(),
            stripes,
            copy,
            data_bytes: request.buffers.len(),
            since,
            _copied: copied.expect("it is copied"),
            _under_way: under_way,
        };
        spawn(
            &self.core,
            (token, true),
            failure::after_stripes_failed(core, request, members, status, begun),
        );
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

/// Runs a slow request as a task. `changes`: it is no read, and no FLUSH.
fn spawn(core: &Rc<Core>, (token, changes): (Token, bool), work: impl Future<Output = Outcome> + 'static) {
    core.slow.set(core.slow.get() + 1);
    if changes {
        core.volume.unflushed.has_written();
    }
    let core = Rc::clone(core);
    let runtime = core.runtime.clone();
    let lost = core.shared.lost_caches.look().number();
    runtime.spawn(async move {
        let outcome = work.await;
        if changes {
            core.volume.unflushed.has_written();
            if core.shared.lost_caches.look().number() != lost {
                core.has_lost();
            }
        }
        core.slow.set(core.slow.get() - 1);
        core.end(token, outcome);
    });
}

impl Channel for VolumeChannel {
    fn submit(&mut self, batch: &mut Vec<Request>) {
        self.refresh();
        self.look_for_losses();
        if self.slots.is_empty() && self.core.slow.get() == 0 {
            // Nothing is left of what was given up.
            self.core.is_given_up.store(false, Ordering::Relaxed);
        }
        // At random across a large table each look-up waits for memory. All of a batch wait at once: of 32 reads in 64 TiB each takes
        // 50 ns instead of 167 (benches/resolve.rs).
        if batch.len() > 1 && self.map.is_large() {
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
        self.reap_lanes(ended);
        if !self.retired.is_empty() {
            self.reap_retired(ended);
        }
        for completion in self.core.ended.borrow_mut().drain(..) {
            Self::has_ended((&mut self.wholes, &self.core), completion, ended);
        }
    }

    fn is_working(&self) -> bool {
        self.lanes.iter().flatten().any(Lane::is_working)
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
