//! A reactor's share of a device: the requests of all its channels here, and the one I/O queue that carries them.
//!
//! Owns: requests from submission to end, their order, what may be sent again and when. Must not know: how an
//! association is made; the owner reactor's task ([`super::controller`]) does that and tells the lane.
//!
//! ```text
//!  Channel::submit ─► pending ─► queue pair ─► ended ─► Channel::reap
//!                        ▲           │
//!                        └── drained ┘ association lost, all operations terminal
//! ```
//!
//! Invariants:
//! - A request is in exactly one place: pending, delayed, a slot of the connection, or ended.
//! - **No ghost writes.** A write that may have reached a controller whose association was lost (`unknown`) is neither sent
//!   again nor ended before the old association is provably quiet: `writes_from`, or a start that says so. While it
//!   waits, everything that is not a read waits behind it, so that writes go out in the order in which they came.
//!   Reads are sent again at once.
//! - Nothing is given back to a channel while an operation names its buffers.

use super::config::PathTimers;
use super::connection::{Connection, KEY_RECEIVE, KEY_SEND};
use super::held::{Fit, Held, Wholes, fit, widest};
use super::probe;
use super::queue::{Answer, Ended, Transfer};
use super::signal::Mailbox;
use super::socket::ConnectedQueue;
use crate::leaf;
use crate::nvme::command::DsmRange;
use crate::nvme::{NvmeStatus, Sgl, Sqe, StatusCode};
use hawser_block::{Channel, Completion, Geometry, IoKind, IoStats, Operation, Outcome, Request, Status};
use hawser_runtime::{Event, Instant, Runtime, Slab, Source, SourceId, TimerId};
use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// Key of the lane's one timer.
const KEY_TICK: u32 = 3;
/// How often commands under way are looked at for `io_timeout`.
const TIMEOUT_CHECK: Duration = Duration::from_secs(1);
/// How often a command that the controller refused for now is tried again; as Linux's nvme_max_retries.
const TRIES_MAX: u8 = 5;
/// How long to wait before that, times the number of the try, where the controller does not say.
const RETRY_DELAY: Duration = Duration::from_millis(100);

/// What a lane tells the device's owner.
pub(crate) enum Notice {
    /// The association with this number cannot go on.
    Lost { association: u64, why: String },
    /// Nobody uses the device any more.
    Closed,
}

/// What the owner tells a lane when its queue may be used.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Start {
    pub(crate) association: u64,
    pub(crate) geometry: Geometry,
    pub(crate) nsid: u32,
    /// The commands of all earlier associations have ended.
    pub(crate) earlier_are_quiet: bool,
    /// How long after its keep-alive timeout the controller may still execute commands of a lost association.
    pub(crate) quiesce: Duration,
    /// CRDT1 to CRDT3, in 100 ms.
    pub(crate) retry_delays: [u16; 3],
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
    id: Option<SourceId>,
    notices: Arc<Mailbox<Notice>>,
    stats: Arc<IoStats>,
    timers: PathTimers,
    geometry: Option<Geometry>,
    /// With the widest limits that were ever offered: what users may ask for.
    offered: Option<Geometry>,
    nsid: u32,
    quiesce: Duration,
    retry_delays: [u16; 3],
    association: u64,
    connection: Option<Connection<Held>>,
    /// Commands may be sent on `connection`.
    started: bool,
    /// The owner waits until the connection is gone.
    torn_down: Option<Arc<Mailbox<()>>>,
    told_loss: bool,
    /// `ctrl_loss_tmo` is over: requests fail instead of waiting.
    failing: bool,
    writes_from: Option<Instant>,
    /// When a predecessor's association was lost at the latest, until a controller has said how long its commands may live.
    predecessor: Option<Instant>,
    pending: VecDeque<Held>,
    delayed: Vec<(Instant, Held)>,
    sequence: u64,
    wholes: Wholes,
    channels: Slab<ChannelState>,
    tick: Option<(Instant, TimerId)>,
}

impl Lane {
    /// A lane without a connection. `had_predecessor`: writes wait for the commands of a process before us, until a start says
    /// that all is quiet.
    pub(crate) fn add(
        runtime: &Runtime,
        notices: Arc<Mailbox<Notice>>,
        stats: Arc<IoStats>,
        timers: PathTimers,
        had_predecessor: bool,
    ) -> Rc<RefCell<Lane>> {
        let predecessor = had_predecessor.then(|| runtime.now());
        let lane = Rc::new(RefCell::new(Lane {
            runtime: runtime.clone(),
            id: None,
            notices,
            stats,
            timers,
            geometry: None,
            offered: None,
            nsid: 0,
            quiesce: timers.quiesce_tmo,
            retry_delays: [0; 3],
            association: 0,
            connection: None,
            started: false,
            torn_down: None,
            told_loss: false,
            failing: false,
            writes_from: predecessor.map(|since| since + timers.expiry() + timers.quiesce_tmo),
            predecessor,
            pending: VecDeque::with_capacity(1024),
            delayed: Vec::new(),
            sequence: 0,
            wholes: Wholes::default(),
            channels: Slab::default(),
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
        self.runtime.remove_source(self.id());
    }

    /// From now on this is the association whose queue may be installed.
    pub(crate) fn expect(&mut self, association: u64) {
        self.association = association;
    }

    /// Takes over a connected queue, unless it comes too late.
    pub(crate) fn install(&mut self, association: u64, queue: ConnectedQueue, depth: u16) {
        if association != self.association || self.connection.is_some() {
            return;
        }
        self.told_loss = false;
        self.connection = Some(Connection::new(&self.runtime, self.id(), queue, depth));
    }

    /// The queue may be used.
    pub(crate) fn start(&mut self, start: &Start) {
        if start.association != self.association {
            return;
        }
        let Some(connection) = &self.connection else { return };
        if let Some(error) = connection.error().map(str::to_owned) {
            // Lost before it began. Nobody listened when that was told.
            self.told_loss = false;
            return self.lost(error);
        }
        self.set_geometry(start.geometry);
        self.nsid = start.nsid;
        self.quiesce = start.quiesce;
        self.retry_delays = start.retry_delays;
        self.started = true;
        self.failing = false;
        if let Some(since) = self.predecessor.take() {
            self.writes_from = Some(since + self.timers.expiry() + self.quiesce);
        }
        if start.earlier_are_quiet {
            self.quiet();
        }
        self.wake();
    }

    /// What the device is now.
    pub(crate) fn set_geometry(&mut self, geometry: Geometry) {
        self.offered = Some(widest(self.offered.as_ref(), &geometry));
        self.geometry = Some(geometry);
    }

    /// Gives the connection up, if there is one; `done` hears when its operations are terminal and its commands are back.
    pub(crate) fn tear_down(&mut self, done: Arc<Mailbox<()>>) {
        self.association = 0;
        self.started = false;
        self.torn_down = Some(done);
        if let Some(connection) = &mut self.connection {
            connection.close();
        }
        self.finish_tear_down();
    }

    fn finish_tear_down(&mut self) {
        if self.connection.as_ref().is_some_and(|connection| !connection.is_quiet()) {
            return;
        }
        let Some(done) = self.torn_down.take() else { return };
        if let Some(mut connection) = self.connection.take() {
            // Answers that came in before the end are answers.
            for ended in connection.ended().collect::<Vec<_>>() {
                self.runtime.sub_outstanding(1);
                self.answered(ended);
            }
            let mut ghosts = false;
            let may_be_fault = connection.may_be_fault();
            for (mut held, begun) in connection.drain() {
                self.runtime.sub_outstanding(1);
                held.unknown |= begun;
                // Sent again it would end the next association too, for all users of this lane.
                held.aborted |= may_be_fault && !probe::is_there(&held.request.buffers);
                ghosts |= held.is_unknown_write();
                self.pending.push_back(held);
            }
            let delayed = std::mem::take(&mut self.delayed);
            self.pending.extend(delayed.into_iter().map(|(_, held)| held));
            self.pending.make_contiguous().sort_by_key(|held| held.sequence);
            if ghosts {
                let now = self.runtime.refresh_now();
                self.writes_from = Some(now + self.timers.expiry() + self.quiesce);
            }
        }
        self.settle();
        done.post(());
        self.wake();
    }

    /// Requests fail from now on instead of waiting, until the next start.
    pub(crate) fn fail_waiting(&mut self) {
        self.failing = true;
        self.settle();
        self.wake();
    }

    /// The commands of earlier associations have ended: writes of unknown outcome may be sent again.
    fn quiet(&mut self) {
        self.writes_from = None;
        for held in &mut self.pending {
            held.unknown = false;
        }
        self.settle();
    }

    /// Ends what shall end and may.
    fn settle(&mut self) {
        for _ in 0..self.pending.len() {
            let Some(held) = self.pending.pop_front() else { return };
            let status = match held.aborted {
                true => Status::Aborted,
                false => Status::Path,
            };
            if (held.aborted || self.failing) && !held.is_unknown_write() {
                self.end(&held, Err(status));
            } else {
                self.pending.push_back(held);
            }
        }
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
            let held = Held {
                request,
                channel,
                sequence: self.sequence,
                submitted: now,
                sent: now,
                tries: 0,
                unknown: false,
                aborted: false,
                whole: None,
            };
            self.sequence += 1;
            let checked = match &self.offered {
                None => Err(Status::Path),
                Some(geometry) => leaf::check(geometry, &request).map(|()| {
                    // Nothing to flush: everything that ended is durable.
                    request.operation == Operation::Flush && !geometry.volatile_cache
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
        let mut under_way = false;
        if let Some(connection) = &mut self.connection {
            for held in connection.users_mut().filter(|held| held.channel == channel) {
                held.aborted = true;
                under_way = true;
            }
        }
        let delayed = std::mem::take(&mut self.delayed);
        self.pending.extend(delayed.into_iter().map(|(_, held)| held));
        for held in self.pending.iter_mut().filter(|held| held.channel == channel) {
            held.aborted = true;
        }
        self.settle();
        if under_way {
            self.lost("requests were given up by their user".to_owned());
        }
        self.wake();
    }

    fn lost(&mut self, why: String) {
        if !self.told_loss && self.association != 0 {
            self.told_loss = true;
            self.notices.post(Notice::Lost { association: self.association, why });
        }
    }

    /// Sends what may be sent.
    fn pump(&mut self) {
        if !self.started {
            return;
        }
        let Some(geometry) = self.geometry else { return };
        let Some(mut connection) = self.connection.take() else { return };
        let now = self.runtime.now();
        let mut passed_over = 0;
        while connection.room() > 0 {
            // While writes of unknown outcome wait, only reads pass.
            let mut held = if self.writes_from.is_none() {
                let Some(held) = self.pending.pop_front() else { break };
                held
            } else {
                let later = self.pending.iter().skip(passed_over);
                let Some(found) =
                    later.into_iter().position(|held| held.request.operation == Operation::Read)
                else {
                    break;
                };
                passed_over += found;
                let Some(held) = self.pending.remove(passed_over) else { break };
                held
            };
            held.sent = now;
            held.unknown = false;
            match fit(&held.request, &geometry) {
                Fit::Whole => {}
                Fit::Pieces(blocks_max) => {
                    let pieces = self.wholes.split(&held, blocks_max, geometry.block_size.shift());
                    for (index, piece) in pieces.enumerate() {
                        self.pending.insert(passed_over + index, piece);
                    }
                    continue;
                }
                Fit::Never(status) => {
                    self.end(&held, Err(status));
                    continue;
                }
            }
            let (sqe, transfer) = command(&held.request, self.nsid, &geometry);
            connection.submit(sqe, transfer, held);
            self.runtime.add_outstanding(1);
        }
        connection.flush();
        self.connection = Some(connection);
    }

    fn answered(&mut self, ended: Ended<Held>) {
        let mut held = ended.user;
        if ended.answer.status.is_success() {
            return self.end(&held, Ok(()));
        }
        if held.aborted {
            return self.end(&held, Err(Status::Aborted));
        }
        match self.retry_after(&held, ended.answer) {
            Some(delay) => {
                held.tries = held.tries.saturating_add(1);
                self.delayed.push((self.runtime.now() + delay, held));
            }
            None => {
                let status = ended.answer.status.to_block_status().unwrap_or(Status::Media);
                self.end(&held, Err(status));
            }
        }
    }

    /// How long to wait before a refused command is tried again, if it makes sense.
    fn retry_after(&self, held: &Held, answer: Answer) -> Option<Duration> {
        let NvmeStatus { code, retry_delay, do_not_retry, .. } = answer.status;
        // A namespace that is moving between controllers is not a failure: it is waited for.
        if matches!(code, StatusCode::ANA_INACCESSIBLE | StatusCode::ANA_TRANSITION) {
            return Some(RETRY_DELAY * u32::from(held.tries.clamp(1, 10)));
        }
        if do_not_retry || held.tries >= TRIES_MAX {
            return None;
        }
        let said = retry_delay.checked_sub(1).and_then(|index| self.retry_delays.get(usize::from(index)));
        match said {
            Some(delay) if *delay > 0 => Some(Duration::from_millis(100) * u32::from(*delay)),
            _ => Some(RETRY_DELAY * u32::from(held.tries + 1)),
        }
    }

    fn end(&mut self, held: &Held, outcome: Outcome) {
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
        if self.writes_from.is_some_and(|from| from <= now) {
            self.quiet();
        }
        if self.delayed.iter().any(|(at, _)| *at <= now) {
            let (due, later): (Vec<_>, Vec<_>) = self.delayed.drain(..).partition(|(at, _)| *at <= now);
            self.delayed = later;
            for (_, held) in due.into_iter().rev() {
                self.pending.push_front(held);
            }
        }
    }

    /// Says when to look again.
    fn schedule(&mut self) {
        let waits = self.writes_from.unwrap_or(Instant::NEVER);
        let mut next = self.delayed.iter().map(|(at, _)| *at).fold(waits, Instant::min);
        if self.connection.as_ref().is_some_and(|connection| connection.outstanding() > 0) {
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
        let Some(connection) = &mut self.connection else { return };
        if connection.users_mut().any(|held| held.sent + limit <= now) {
            self.lost(format!("a command was not answered in {} s", limit.as_secs_f32()));
        }
    }
}

impl Source for Lane {
    fn poll(&mut self, _: &Runtime, events: &mut Vec<Event>) {
        let mut ticked = false;
        for event in events.drain(..) {
            match event {
                Event::Op { key: key @ (KEY_SEND | KEY_RECEIVE), completed } => {
                    if let Some(connection) = &mut self.connection {
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
        if let Some(mut connection) = self.connection.take() {
            for ended in connection.ended() {
                self.runtime.sub_outstanding(1);
                self.answered(ended);
            }
            let error = connection.error().map(str::to_owned);
            self.connection = Some(connection);
            if let Some(error) = error {
                self.started = false;
                self.lost(error);
            }
        }
        if ticked {
            self.check_timeout();
        }
        if self.torn_down.is_some() {
            self.finish_tear_down();
        }
        self.due();
        self.pump();
        self.schedule();
    }
}

/// A request as a command.
fn command(request: &Request, nsid: u32, geometry: &Geometry) -> (Sqe, Transfer) {
    let (lba, blocks) = (request.lba.0, request.blocks.0);
    match request.operation {
        Operation::Read => (Sqe::read(nsid, lba, blocks, Sgl::NONE), Transfer::ToHost(request.buffers)),
        Operation::Write { fua } => {
            (Sqe::write(nsid, lba, blocks, fua, Sgl::NONE), Transfer::FromHost(request.buffers))
        }
        Operation::Flush => (Sqe::flush(nsid), Transfer::None),
        Operation::Discard => {
            let range = DsmRange { attributes: 0, blocks, lba };
            (Sqe::deallocate(nsid, 1, Sgl::NONE), Transfer::Inline(range.to_bytes()))
        }
        Operation::WriteZeroes { unmap, fua } => {
            let deallocate = unmap && geometry.write_zeroes.is_some_and(|limits| limits.may_unmap);
            (Sqe::write_zeroes(nsid, lba, blocks, deallocate, fua), Transfer::None)
        }
    }
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
