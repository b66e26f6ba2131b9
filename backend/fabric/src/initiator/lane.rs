//! A reactor's share of a device: the requests of all its channels here, and the I/O queues that carry them, one for
//! each path.
//!
//! Owns: requests from submission to end, their order, which path they take, what may be sent again and when. Must not know:
//! how an association is made; each path's task ([`super::controller`]) does that and tells the lane.
//!
//! ```text
//!  Channel::submit ─► pending ─► choose a way ─► its queue pair ─► ended ─► Channel::reap
//!                        ▲                           │
//!                        └───────── drained ─────────┘ association lost, all operations terminal
//! ```
//!
//! Invariants:
//! - A request is in exactly one place: pending, delayed, a slot of a connection, or ended.
//! - **No ghost writes.** A write that may have reached a controller whose association was lost (`unknown`) is neither sent
//!   again nor ended before that association is quiet: its time is over (`ghosts`), or a task says so. While it waits,
//!   writes to any of its blocks wait behind it, in the order in which they came; what a process before us wrote to is not
//!   known, so then all writes wait. Reads are sent again at once.
//! - One that its user has left ends before that. Where it would have been written is forgotten then, so all writes of all lanes wait
//!   until its association is quiet.
//! - Nothing is given back to a channel while an operation names its buffers.

mod control;
mod send;

use super::cache::Caches;
use super::config::{CacheDoubt, IoPolicy, NvmeConfig, PathTimers};
use super::held::{Held, Wholes, widest};
use super::meter::{LaneNumbers, Loss};
use super::probe;
use super::queue::{Answer, Ended, Transfer};
use super::signal::Mailbox;
use super::socket::ConnectedQueue;
use super::transport::Connection;
use super::unknown::Unknown;
pub(crate) use super::way::Start;
use super::way::Way;
use crate::leaf;
use crate::nvme::ana::AnaState;
use crate::nvme::{NvmeStatus, StatusCode};
use crate::simulated::is_broken;
use control::Control;
pub(crate) use control::{Ask, Reply};
use hawser_block::reservation::ReserveError;
use hawser_block::{Channel, Completion, Geometry, IoKind, IoStats, Operation, Outcome, Request, Status};
use hawser_runtime::{Event, Instant, Runtime, Slab, Source, SourceId, TimerId};
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// Key of the lane's one timer.
const KEY_TICK: u32 = 0;
/// How often it is looked whether what another lane has left is over.
const LEFT_CHECK: Duration = Duration::from_millis(50);
/// How often commands under way are looked at for `io_timeout`.
const TIMEOUT_CHECK: Duration = Duration::from_secs(1);
/// How often a command that the controller refused for now is tried again; as Linux's nvme_max_retries.
const TRIES_MAX: u8 = 5;
/// How long to wait before that, times the number of the try, where the controller does not say.
const RETRY_DELAY: Duration = Duration::from_millis(100);
/// SCT of statuses that are about the way to the namespace.
const CODE_TYPE_PATH: u8 = 3;

/// What a lane tells a path's task.
#[derive(PartialEq, Eq)]
pub(crate) enum Notice {
    /// The association with this number cannot go on.
    Lost { association: u64, loss: Loss, why: String },
    /// Its controller refuses commands because of the namespace's asymmetric access.
    Asymmetric,
    /// Nobody uses the device any more.
    Closed,
}

/// An association that is over, and whose commands may still be executed.
struct Ghosts {
    association: u64,
    until: Instant,
    /// It was another process's: we do not know what it wrote to.
    anywhere: bool,
    /// Writes in it that have ended, since nobody waits for them.
    left: u64,
}

struct ChannelState {
    user: SourceId,
    ended: Vec<Completion>,
    /// Requests that were submitted and not reaped.
    outstanding: usize,
}

/// The lanes of one reactor, by device.
#[derive(Default)]
pub(crate) struct Lanes(pub(crate) RefCell<HashMap<u64, Rc<RefCell<Lane>>>>);

/// See the module's text.
pub(crate) struct Lane {
    runtime: Runtime,
    /// The device's.
    name: String,
    id: Option<SourceId>,
    stats: Arc<IoStats>,
    caches: Arc<Caches>,
    unknown: Arc<Unknown>,
    /// Which lane of the device this is.
    index: usize,
    write_through: bool,
    timers: PathTimers,
    policy: IoPolicy,
    geometry: Option<Geometry>,
    /// With the widest limits that were ever offered: what users may ask for.
    offered: Option<Geometry>,
    /// One for each path.
    ways: Vec<Way>,
    /// The way that was taken last.
    current: usize,
    /// Bytes that it may have before it is another's turn, in a round-robin.
    turn: u32,
    /// No path is expected to come back in time: requests fail instead of waiting.
    failing: bool,
    ghosts: Vec<Ghosts>,
    /// How many of `pending` wait for one of them, as was told last.
    kept: u64,
    pending: VecDeque<Held>,
    /// Blocks that writes of unknown outcome may still change: kept to be filled anew without allocating.
    held_back: Vec<Range<u64>>,
    delayed: Vec<(Instant, Held)>,
    sequence: u64,
    /// Flushes wait, at most until then; or none does.
    flushes_wait_until: Instant,
    /// The same of writes, for what another lane has left.
    writes_wait_until: Instant,
    wholes: Wholes,
    channels: Slab<ChannelState>,
    controls: BTreeMap<u64, Control>,
    tick: Option<(Instant, TimerId)>,
}

impl Lane {
    /// A lane without connections. `predecessors`: associations of a process before us, and until when they are not quiet.
    pub(crate) fn add(
        runtime: &Runtime,
        paths: Vec<(Arc<Mailbox<Notice>>, Arc<LaneNumbers>)>,
        stats: Arc<IoStats>,
        (caches, unknown, index): (Arc<Caches>, Arc<Unknown>, usize),
        config: &NvmeConfig,
        predecessors: &[(u64, Instant)],
    ) -> Rc<RefCell<Lane>> {
        let (timers, policy) = (config.timers, config.policy);
        let lives = timers.expiry() + timers.quiesce_tmo;
        let ghosts = |(association, until): &(u64, Instant)| Ghosts {
            association: *association,
            until: *until,
            anywhere: true,
            left: 0,
        };
        let lane = Rc::new(RefCell::new(Lane {
            runtime: runtime.clone(),
            name: config.name.clone(),
            id: None,
            stats,
            caches,
            unknown,
            index,
            write_through: config.on_cache_doubt == CacheDoubt::WriteThrough,
            timers,
            policy,
            geometry: None,
            offered: None,
            ways: paths.into_iter().map(|(notices, numbers)| Way::new(notices, numbers, lives)).collect(),
            current: 0,
            turn: 0,
            failing: false,
            ghosts: predecessors.iter().map(ghosts).collect(),
            kept: 0,
            pending: VecDeque::with_capacity(1024),
            held_back: Vec::with_capacity(1024),
            delayed: Vec::new(),
            sequence: 0,
            flushes_wait_until: Instant::NEVER,
            writes_wait_until: Instant::NEVER,
            wholes: Wholes::default(),
            channels: Slab::default(),
            controls: BTreeMap::new(),
            tick: None,
        }));
        let id = runtime.add_source(Rc::clone(&lane) as Rc<RefCell<dyn Source>>);
        lane.borrow_mut().id = Some(id);
        lane
    }

    fn id(&self) -> SourceId {
        self.id.expect("set where the lane is made")
    }

    /// Ends the lane's life as a source.
    pub(crate) fn remove(&mut self) {
        if let Some((_, timer)) = self.tick.take() {
            self.runtime.cancel_timer(timer);
        }
        // Nobody asks this device any more. A later one knows from the record.
        self.unknown.are_over(self.ghosts.drain(..).map(|ghosts| ghosts.left).sum());
        self.runtime.remove_source(self.id());
    }

    /// From now on this is the path's association whose queue may be installed.
    pub(crate) fn expect(&mut self, path: usize, association: u64) {
        self.ways[path].association = association;
    }

    /// Takes over a connected queue, unless it comes too late.
    pub(crate) fn install(
        &mut self,
        path: usize,
        association: u64,
        queue: ConnectedQueue,
        (depth, distance): (u16, u32),
    ) {
        let id = self.id();
        let way = &mut self.ways[path];
        if association != way.association || way.connection.is_some() {
            return;
        }
        way.told_loss = false;
        way.distance = distance;
        way.connection = Some(Connection::new(&self.runtime, id, key_base(path), queue, depth));
    }

    /// The path's queue may be used.
    pub(crate) fn start(&mut self, path: usize, start: &Start) {
        let way = &mut self.ways[path];
        if start.association != way.association {
            return;
        }
        let Some(connection) = &way.connection else { return };
        if let Some(error) = connection.error().map(str::to_owned) {
            let loss = connection.loss();
            // Lost before it began. Nobody listened when that was told.
            way.told_loss = false;
            return way.lost(loss, error);
        }
        way.started = Some(*start);
        way.has_cache = start.limits.volatile_cache;
        way.lives = start.lives;
        self.failing = false;
        self.wake();
    }

    /// How the namespace can be reached through the path's controller has changed.
    pub(crate) fn set_ana(&mut self, path: usize, association: u64, ana: AnaState) {
        if let Some(start) = self.ways[path].started.as_mut().filter(|start| start.association == association)
        {
            start.ana = Some(ana);
            self.failing &= ana.refusal().is_some();
            self.wake();
        }
    }

    /// Takes paths by `policy` from now on.
    pub(crate) fn set_policy(&mut self, policy: IoPolicy) {
        self.policy = policy;
        self.wake();
    }

    /// What the device is now.
    pub(crate) fn set_geometry(&mut self, geometry: Geometry) {
        self.offered = Some(widest(self.offered.as_ref(), &geometry));
        self.geometry = Some(geometry);
    }

    /// Gives the path's connection up, if there is one; `done` hears when its operations are terminal and its commands are
    /// back.
    pub(crate) fn tear_down(&mut self, path: usize, done: Arc<Mailbox<()>>) {
        let way = &mut self.ways[path];
        way.started = None;
        way.told_loss = true;
        way.torn_down = Some(done);
        if let Some(connection) = &mut way.connection {
            connection.close();
        }
        self.finish_tear_down(path);
    }

    fn finish_tear_down(&mut self, path: usize) {
        let way = &mut self.ways[path];
        if way.connection.as_ref().is_some_and(|connection| !connection.is_quiet()) {
            return;
        }
        let Some(done) = way.torn_down.take() else { return };
        let association = std::mem::take(&mut way.association);
        let lives = way.lives;
        if let Some(mut connection) = way.connection.take() {
            // Answers that came in before the end are answers.
            let unspun = connection.unspun(1);
            for ended in connection.ended().collect::<Vec<_>>() {
                self.runtime.sub_outstanding(unspun);
                self.answered(path, ended);
            }
            let mut ghosts = false;
            let may_be_fault = connection.may_be_fault();
            for (mut held, begun) in connection.drain() {
                self.runtime.sub_outstanding(unspun);
                if held.is_control() {
                    if !begun || self.control_lost(&held) {
                        self.pending.push_back(held);
                    }
                    continue;
                }
                self.ways[path].numbers.requeued.add(1);
                held.unknown = (begun && !is_broken("resend_before_quiet")).then_some(association);
                // Sent again it would end the next association too, for all users of this lane.
                held.aborted |= may_be_fault && !probe::is_there(&held.request.buffers);
                ghosts |= held.is_unknown_write();
                self.pending.push_back(held);
            }
            if is_broken("lose_unanswered") {
                self.pending.pop_back();
            }
            self.pending.make_contiguous().sort_by_key(|held| held.sequence);
            if ghosts {
                let until = self.runtime.refresh_now() + lives;
                self.ghosts.push(Ghosts { association, until, anywhere: false, left: 0 });
            }
        }
        self.settle();
        done.post(());
        self.wake();
    }

    /// Requests fail from now on instead of waiting, until the next start.
    pub(crate) fn fail_waiting(&mut self) {
        self.failing = true;
        // However long a controller that is gone wanted them to wait.
        self.pending.extend(self.delayed.drain(..).map(|(_, held)| held));
        self.settle();
        self.wake();
    }

    /// The commands of this association have ended: its writes of unknown outcome may be sent again.
    pub(crate) fn quiet(&mut self, association: u64) {
        let over = self.ghosts.extract_if(.., |ghosts| ghosts.association == association);
        let left = over.map(|ghosts| ghosts.left).sum();
        self.unknown.are_over(left);
        for held in self.pending.iter_mut().filter(|held| held.unknown == Some(association)) {
            held.unknown = None;
        }
        self.settle();
        self.wake();
    }

    /// A controller has said how long the commands of a process before us may live.
    pub(crate) fn quiet_from(&mut self, association: u64, until: Instant) {
        for ghosts in self.ghosts.iter_mut().filter(|ghosts| ghosts.association == association) {
            ghosts.until = until;
        }
        self.wake();
    }

    /// Ends what shall end and may.
    fn settle(&mut self) {
        let mut kept = 0;
        for _ in 0..self.pending.len() {
            let Some(mut held) = self.pending.pop_front() else { break };
            let status = match held.aborted {
                true => Status::Aborted,
                false => Status::Path,
            };
            let is_unknown = held.is_unknown_write();
            let may_end = !is_unknown || self.is_left_to_ghosts(&mut held);
            if (held.aborted || self.failing) && may_end {
                self.end(&held, Err(status));
            } else {
                kept += u64::from(is_unknown);
                self.pending.push_back(held);
            }
        }
        self.unknown.keeps(kept, self.kept);
        self.kept = kept;
    }

    /// A write of unknown outcome that was left counts for its lost association from now on; false when it was not.
    fn is_left_to_ghosts(&mut self, held: &mut Held) -> bool {
        let ghosts = self.ghosts.iter_mut().find(|ghosts| Some(ghosts.association) == held.unknown);
        let Some(ghosts) = ghosts.filter(|_| held.left && held.aborted) else { return false };
        ghosts.left += 1;
        held.left = false;
        true
    }

    fn wake(&self) {
        self.runtime.wake(self.id());
    }

    /// Takes a way in for `user`.
    pub(crate) fn open(&mut self, user: SourceId, geometry: Option<Geometry>) -> usize {
        if let (None, Some(geometry)) = (&self.geometry, geometry) {
            self.set_geometry(geometry);
        }
        self.channels.insert(ChannelState { user, ended: Vec::with_capacity(256), outstanding: 0 })
    }

    fn submit(&mut self, channel: usize, batch: &mut Vec<Request>) {
        let now = self.runtime.now();
        if let Some(channel) = self.channels.get_mut(channel) {
            channel.outstanding += batch.len();
        }
        for request in batch.drain(..) {
            let mut held = Held::new(request, channel, self.sequence, now);
            if request.operation == Operation::Flush {
                held.came = self.caches.came();
            }
            self.sequence += 1;
            let checked = match &self.offered {
                None => Err(Status::Path),
                Some(geometry) => leaf::check(geometry, &request).map(|()| {
                    // Nothing to flush: everything that ended is durable.
                    request.operation == Operation::Flush
                        && !geometry.volatile_cache
                        && !self.caches.has_to_tell()
                }),
            };
            match checked {
                Err(status) => self.end(&held, Err(status)),
                Ok(true) => self.end(&held, Ok(())),
                Ok(false) if self.failing => self.end(&held, Err(Status::Path)),
                Ok(false) => self.pending.push_back(held),
            }
        }
        // All channels of this pass go out in one send.
        self.wake();
    }

    fn abort(&mut self, channel: usize) {
        for way in &mut self.ways {
            let mut under_way = false;
            for held in way.connection.iter_mut().flat_map(Connection::users_mut) {
                if held.channel == channel {
                    held.aborted = true;
                    under_way = true;
                }
            }
            if under_way {
                way.lost(Loss::GivenUp, "requests were given up by their user".to_owned());
            }
        }
        let delayed = std::mem::take(&mut self.delayed);
        self.pending.extend(delayed.into_iter().map(|(_, held)| held));
        for held in self.pending.iter_mut().filter(|held| held.channel == channel) {
            held.aborted = true;
        }
        self.settle();
        self.wake();
    }

    /// The same, and writes of unknown outcome are not waited for.
    fn leave(&mut self, channel: usize) {
        let under_way = self.ways.iter_mut().flat_map(|way| way.connection.iter_mut());
        let under_way = under_way.flat_map(Connection::users_mut);
        let delayed = self.delayed.iter_mut().map(|(_, held)| held);
        let mut left = 0;
        for held in under_way.chain(&mut self.pending).chain(delayed) {
            if held.channel == channel && held.request.operation.is_write() && !held.left {
                held.left = true;
                left += 1;
            }
        }
        // Before any of them ends.
        self.unknown.leave(left);
        self.abort(channel);
    }

    fn answered(&mut self, path: usize, ended: Ended<Held>) {
        let mut held = ended.user;
        if held.is_control() {
            return self.control_answered(path, held, ended.answer);
        }
        self.count(path, &held, ended.answer.status);
        if ended.answer.status.is_success() {
            if is_broken("end_twice") && self.sequence.is_multiple_of(64) {
                self.end(&held, Ok(()));
            }
            let volatile = match held.request.operation {
                Operation::Read => false,
                Operation::Flush => {
                    self.caches.flushed(path, held.written);
                    self.caches.flushed_too(held.lost_paths);
                    false
                }
                Operation::Write { fua } | Operation::WriteZeroes { fua, .. } => !fua && !self.write_through,
                Operation::Discard => true,
            };
            if volatile && self.ways[path].has_cache && !is_broken("forget_dirty_caches") {
                self.caches.wrote(path, self.index);
            }
            return self.end(&held, Ok(()));
        }
        if held.aborted {
            return self.end(&held, Err(Status::Aborted));
        }
        match self.retry_after(path, &mut held, ended.answer) {
            Some(delay) => {
                self.ways[path].numbers.retries.add(1);
                self.delayed.push((self.runtime.now() + delay, held));
            }
            None => {
                let status = ended.answer.status.to_block_status().unwrap_or(Status::Media);
                self.end(&held, Err(status));
            }
        }
    }

    /// How long to wait before a refused command is tried again, if it makes sense.
    fn retry_after(&mut self, path: usize, held: &mut Held, answer: Answer) -> Option<Duration> {
        let NvmeStatus { code, retry_delay, do_not_retry, .. } = answer.status;
        if do_not_retry || code == StatusCode::RESERVATION_CONFLICT {
            // Nor would another controller of the subsystem do it (base 3.3.3.2.1).
            return None;
        }
        // A namespace that moves between controllers is not a failure: another path is taken, or it is waited for.
        let ana = AnaState::ALL.into_iter().find(|state| state.refusal() == Some(code));
        if let Some(state) = ana.filter(|_| !is_broken("fail_where_inaccessible")) {
            let way = &mut self.ways[path];
            if let Some(start) = way.started.as_mut().filter(|start| start.ana.is_some()) {
                start.ana = Some(state);
                way.notices.post_once(Notice::Asymmetric);
            }
            held.moves = held.moves.saturating_add(1);
            return Some(RETRY_DELAY * u32::from(held.moves.min(11) - 1));
        }
        if held.tries >= TRIES_MAX || is_broken("give_up_at_once") {
            return None;
        }
        held.tries += 1;
        // It may be the way and not the namespace: another way is taken at once, and each once before it is waited.
        held.avoid = (code.code_type() == CODE_TYPE_PATH).then_some(path);
        if held.avoid.is_some()
            && usize::from(held.tries) < self.ways.iter().filter(|way| way.is_good()).count()
        {
            return Some(Duration::ZERO);
        }
        let delays = self.ways[path].started.map_or([0; 3], |start| start.retry_delays);
        let said = retry_delay.checked_sub(1).and_then(|index| delays.get(usize::from(index)));
        match said {
            Some(delay) if *delay > 0 => Some(Duration::from_millis(100) * u32::from(*delay)),
            _ => Some(RETRY_DELAY * u32::from(held.tries)),
        }
    }

    /// Counts a command that was answered on this path.
    fn count(&self, path: usize, held: &Held, status: NvmeStatus) {
        let outcome = match status.is_success() {
            true => Ok(()),
            false => Err(status.to_block_status().unwrap_or(Status::Media)),
        };
        let shift = self.geometry.map_or(0, |geometry| geometry.block_size.shift());
        let bytes = u64::from(held.request.blocks.0) << shift;
        let latency_ns = self.runtime.now().ns_since(held.sent);
        let kind = IoKind::from(held.request.operation);
        self.ways[path].numbers.io.record(kind, bytes, latency_ns, outcome);
    }

    fn end(&mut self, held: &Held, outcome: Outcome) {
        if held.is_control() {
            return self.control_failed(held, ReserveError::NotSent("no path is good".to_owned()));
        }
        if held.left {
            self.unknown.are_over(1);
        }
        let (held, outcome) = match held.whole.map(|whole| self.wholes.piece_ended(whole, outcome)) {
            None => (*held, outcome),
            Some(None) => return,
            Some(Some(whole)) => whole,
        };
        let kind = IoKind::from(held.request.operation);
        let shift = self.geometry.map_or(0, |geometry| geometry.block_size.shift());
        let bytes = u64::from(held.request.blocks.0) << shift;
        self.stats.record(kind, bytes, self.runtime.now().ns_since(held.submitted), outcome);
        if let Some(channel) = self.channels.get_mut(held.channel) {
            channel.ended.push(Completion { token: held.request.token, outcome });
            self.runtime.wake(channel.user);
        }
    }

    /// Does what is due.
    fn due(&mut self) {
        let now = self.runtime.now();
        while let Some(ghosts) = self.ghosts.iter().find(|ghosts| ghosts.until <= now) {
            self.quiet(ghosts.association);
        }
        if self.delayed.iter().any(|(at, _)| *at <= now) {
            let (due, later): (Vec<_>, Vec<_>) = self.delayed.drain(..).partition(|(at, _)| *at <= now);
            self.delayed = later;
            for (_, held) in due.into_iter().rev() {
                self.pending.push_front(held);
            }
            if self.failing {
                self.settle();
            }
        }
    }

    /// Says when to look again.
    fn schedule(&mut self) {
        let ghosts = if is_broken("never_wake_again") { &[][..] } else { &self.ghosts };
        let waits = self.delayed.iter().map(|(at, _)| *at).chain(ghosts.iter().map(|ghosts| ghosts.until));
        let mut next = waits.fold(self.flushes_wait_until.min(self.writes_wait_until), Instant::min);
        if self.ways.iter().any(|way| way.outstanding() > 0) {
            next = next.min(self.runtime.now() + TIMEOUT_CHECK);
        }
        self.set_tick(next);
    }

    fn set_tick(&mut self, next: Instant) {
        match self.tick {
            Some((at, _)) if at <= next => {}
            _ if next == Instant::NEVER => {}
            old => {
                if let Some((_, timer)) = old {
                    self.runtime.cancel_timer(timer);
                }
                self.tick = Some((next, self.runtime.timer(self.id(), next, KEY_TICK)));
            }
        }
    }

    fn check_timeout(&mut self) {
        let now = self.runtime.now();
        let limit = self.timers.io_timeout;
        for way in &mut self.ways {
            let mut under_way = way.connection.iter_mut().flat_map(Connection::users_mut);
            if under_way.any(|held| !held.is_control() && held.sent + limit <= now) {
                drop(under_way);
                way.lost(Loss::IoTimeout, format!("a command was not answered in {} s", limit.as_secs_f32()));
            }
        }
    }
}

impl Source for Lane {
    fn poll(&mut self, _: &Runtime, events: &mut Vec<Event>) {
        let mut ticked = false;
        for event in events.drain(..) {
            match event {
                Event::Op { key, completed } => {
                    let way = usize::try_from(key / KEYS).ok().and_then(|path| self.ways.get_mut(path));
                    if let Some(connection) = way.and_then(|way| way.connection.as_mut()) {
                        connection.handle(key, completed);
                    }
                }
                Event::Timer { key: KEY_TICK } => {
                    self.tick = None;
                    ticked = true;
                }
                _ => {}
            }
        }
        for path in 0..self.ways.len() {
            let Some(mut connection) = self.ways[path].connection.take() else { continue };
            connection.progress();
            let unspun = connection.unspun(1);
            for ended in connection.ended() {
                self.runtime.sub_outstanding(unspun);
                self.answered(path, ended);
            }
            let error = connection.error().map(|error| (connection.loss(), error.to_owned()));
            let moved = connection.take_moved();
            let way = &mut self.ways[path];
            way.numbers.add(&moved);
            way.connection = Some(connection);
            if let Some((loss, error)) = error {
                way.started = None;
                way.lost(loss, error);
            }
            if way.torn_down.is_some() {
                self.finish_tear_down(path);
            }
        }
        if ticked {
            self.check_timeout();
        }
        self.due();
        self.pump();
        self.schedule();
    }

    fn peek(&mut self) -> bool {
        // All of them: each looks at its own.
        self.ways.iter_mut().filter_map(|way| way.connection.as_mut()).fold(false, |any, it| it.peek() | any)
    }

    fn arm(&mut self) -> bool {
        self.ways.iter_mut().filter_map(|way| way.connection.as_mut()).fold(false, |any, it| it.arm() | any)
    }
}

/// Keys of one way's operations, from this number of its path on.
const KEYS: u32 = 4;

fn key_base(path: usize) -> u32 {
    KEYS * u32::try_from(path).unwrap_or(0)
}

/// One user's way in.
pub(crate) struct LaneChannel {
    pub(crate) lane: Rc<RefCell<Lane>>,
    pub(crate) channel: usize,
}

impl Channel for LaneChannel {
    fn submit(&mut self, batch: &mut Vec<Request>) {
        self.lane.borrow_mut().submit(self.channel, batch);
    }

    fn reap(&mut self, ended: &mut Vec<Completion>) {
        if let Some(channel) = self.lane.borrow_mut().channels.get_mut(self.channel) {
            channel.outstanding -= channel.ended.len();
            ended.append(&mut channel.ended);
        }
    }

    fn abort(&mut self) {
        self.lane.borrow_mut().abort(self.channel);
    }

    fn leave(&mut self) {
        self.lane.borrow_mut().leave(self.channel);
    }
}

impl Drop for LaneChannel {
    fn drop(&mut self) {
        let mut lane = self.lane.borrow_mut();
        let channel = lane.channels.remove(self.channel);
        // The end of a reactor ends everything on it at once.
        let idle = channel.is_none_or(|channel| channel.outstanding == 0);
        assert!(idle || lane.runtime.is_stopping(), "a channel is dropped when it is idle");
    }
}
