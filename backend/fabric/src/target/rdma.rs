//! A connection's queue pair: moves to work requests, completions back; and how connections come in.
//!
//! Owns: receives, answers, the queue pair and its end. Must not know: commands.
//!
//! Invariants:
//! - What a work request names (parts of the connection's own memory, which goes with the link) stays until it has completed, or the
//!   queue pair is not there any more.
//! - Closing waits for no peer: the queue pair is taken away on a thread of its own, and [`RdmaWire::is_idle`] says when.

use super::connection::{Connection, Move};
use super::{IN_CAPSULE_BYTES_MAX, QUEUE_ENTRIES_MAX};
use crate::nvme::bytes::low32;
use crate::nvme::{Cqe, Sqe};
use crate::rdma::arena::Arena;
use crate::rdma::domain::{Domain, Purpose};
use crate::rdma::link::{End, Link, dispose};
use crate::rdma::private::{Accept, Reject, Request};
use crate::rdma::words;
use crate::simulated::is_broken;
use hawser_runtime::{Completed, Fd, Instant, Runtime, SourceId};
use hawser_verbs_abi::{
    CmEvent, ConnectParameters, QueueSize, ReceiveRequest, Segment, SendRequest, Table, WorkCompletion,
    event, operation,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Keys of the two waits.
pub(super) const KEY_EVENTS: u32 = 16;
pub(super) const KEY_COMPLETIONS: u32 = 17;

/// Data in a capsule over RDMA: a page, as Linux's target takes, for each receive has room for it all the time.
pub(super) const IN_CAPSULE: u32 = 4096;
const _: () = assert!(IN_CAPSULE <= IN_CAPSULE_BYTES_MAX);
/// Bytes between receives.
const RECEIVE_STRIDE: usize = 8192;
/// Bytes between answers: a cache line.
const ANSWER_STRIDE: usize = 64;
/// Commands that a host may have sent, and answers that may be on their way.
const RECEIVES: u16 = QUEUE_ENTRIES_MAX + 1;
const ANSWERS: u16 = 2 * QUEUE_ENTRIES_MAX;
/// Payload of an I/O queue, and of an admin queue.
const ARENA: usize = 4 << 20;
const ARENA_ADMIN: usize = 512 << 10;
/// Completions that are taken at once.
const POLLED: usize = 32;

mod kind {
    pub(super) const RECEIVE: u64 = 1;
    pub(super) const READ: u64 = 2;
    pub(super) const WRITE: u64 = 3;
    pub(super) const ANSWER: u64 = 4;
}

fn receive_at(index: u16) -> usize {
    usize::from(index) * RECEIVE_STRIDE
}

fn answer_at(index: u16) -> usize {
    receive_at(RECEIVES) + usize::from(index) * ANSWER_STRIDE
}

fn arena_at() -> usize {
    answer_at(ANSWERS).next_multiple_of(4096)
}

/// A host that asks to be let in.
pub(super) struct Incoming {
    pub(super) end: End,
    request: Request,
    reads_answered: u8,
    reads: u8,
}

impl Incoming {
    /// Takes a request to connect over, or refuses it. Slow: never on a reactor's thread.
    ///
    /// # Safety
    /// `event` is such a request, which nobody else has taken over.
    pub(super) unsafe fn take(table: &'static Table, event: &CmEvent) -> Result<Incoming, String> {
        // SAFETY: the caller's promise.
        let end = unsafe { End::adopt(table, event.id) };
        let mut end =
            end.map_err(|code| format!("a connection cannot be taken over: {}", words::errno(code)))?;
        let private = &event.private[..usize::from(event.private_len)];
        let request = Request::from_bytes(private).and_then(|request| match request {
            // HSQSIZE counts from 0 (and Linux's hosts leave one entry free).
            Request { sends, .. } if sends == 0 || sends >= QUEUE_ENTRIES_MAX => Err(Reject::Sends),
            Request { receives: 0, .. } => Err(Reject::Receives),
            request => Ok(request),
        });
        match request {
            Ok(request) => Ok(Incoming {
                end,
                request,
                reads_answered: event.responder_resources,
                reads: event.initiator_depth,
            }),
            Err(reject) => {
                end.reject(&reject.to_bytes());
                Err(format!("a host was refused: {reject}"))
            }
        }
    }

    /// Does not let it in after all.
    pub(super) fn reject(mut self, reject: Reject) {
        self.end.reject(&reject.to_bytes());
    }

    /// Gives it its queue, and lets it in. Slow: never on a reactor's thread.
    pub(super) fn accept(self, table: &'static Table) -> Result<RdmaWire, String> {
        let Incoming { mut end, request, reads_answered, reads } = self;
        let device = end.device();
        let domain = match Domain::of(table, device, Purpose::Target) {
            Ok(domain) => domain,
            Err(why) => {
                end.reject(&Reject::Resources.to_bytes());
                return Err(why);
            }
        };
        let attributes = domain.attributes;
        // A read, or a write and an answer, for each.
        let sends = (2 * u32::from(ANSWERS)).min(attributes.requests_max);
        let size = QueueSize { sends, receives: u32::from(RECEIVES), segments: 1 };
        let arena = if request.queue_id == 0 { ARENA_ADMIN } else { ARENA };
        let mut link = end.furnish(domain, size, arena_at() + arena, 0)?;
        let receives: Vec<ReceiveRequest> = (0..RECEIVES).map(|index| receive(&link, index)).collect();
        // SAFETY: the link's own memory.
        let posted = unsafe { link.post_receives(&receives) };
        posted.map_err(|(_, code)| format!("receives cannot be posted: {}", words::errno(code)))?;
        let private = Accept { receives: RECEIVES }.to_bytes();
        let most = |max: u32| u8::try_from(max).unwrap_or(u8::MAX);
        let parameters = ConnectParameters {
            private: private.as_ptr(),
            private_len: low8(private.len()),
            responder_resources: reads_answered.min(most(attributes.reads_answered_max)),
            initiator_depth: reads.min(most(attributes.reads_max)),
        };
        link.accept(&parameters)
            .map_err(|code| format!("a host cannot be let in: {}", words::errno(code)))?;
        Ok(RdmaWire {
            arena: Some(Arena::new(&link.memory, arena_at(), arena)),
            link: Some(Box::new(link)),
            sends: Vec::with_capacity(sends as usize),
            segments: Vec::with_capacity(sends as usize),
            room: sends as usize,
            free_answers: (0..ANSWERS).collect(),
            answers: vec![Answer::default(); usize::from(ANSWERS)].into_boxed_slice(),
            unposted: Vec::with_capacity(usize::from(RECEIVES)),
            receives: Vec::with_capacity(usize::from(RECEIVES)),
            held: None,
            polled: [WorkCompletion::NONE; POLLED],
            have: 0,
            waits_for_events: false,
            waits_for_completions: false,
            closed: None,
        })
    }
}

fn low8(value: usize) -> u8 {
    u8::try_from(value).unwrap_or(u8::MAX)
}

fn receive(link: &Link, index: u16) -> ReceiveRequest {
    let address = (link.memory.as_ptr() as usize + receive_at(index)) as u64;
    let len = low32(Sqe::LEN as u64) + IN_CAPSULE;
    let segment = Segment { address, len, key: link.keys.local };
    ReceiveRequest { user: kind::RECEIVE << 32 | u64::from(index), segment }
}

/// An answer on its way.
#[derive(Clone, Copy, Debug, Default)]
struct Answer {
    /// The slot that it ends.
    slot: Option<usize>,
    /// A write went before it, whose completion is told only if it fails.
    written: bool,
}

/// A queue pair on its connection. Made on a thread, lives on a reactor.
pub(super) struct RdmaWire {
    arena: Option<Arena>,
    link: Option<Box<Link>>,
    sends: Vec<SendRequest>,
    /// What `sends` name, by index until they are posted.
    segments: Vec<Segment>,
    /// Work requests that the queue has room for.
    room: usize,
    free_answers: Vec<u16>,
    answers: Box<[Answer]>,
    /// Receives that are to be posted again.
    unposted: Vec<u16>,
    receives: Vec<ReceiveRequest>,
    /// What there was no room for.
    held: Option<Move>,
    polled: [WorkCompletion; POLLED],
    have: usize,
    waits_for_events: bool,
    waits_for_completions: bool,
    /// The queue pair is being taken away; true when it is not there any more.
    closed: Option<Arc<AtomicBool>>,
}

// SAFETY: made on one thread and moved to another; from then on only that one has it. What is not `Send` in it are pointers of
// requests that are not posted, of which there are none while it moves.
unsafe impl Send for RdmaWire {}

impl RdmaWire {
    /// Where the connection's payload is; once.
    pub(super) fn take_arena(&mut self) -> Option<Arena> {
        self.arena.take()
    }

    /// From now on `source` hears of what happens.
    pub(super) fn start(&mut self, runtime: &Runtime, source: SourceId) {
        let Some(link) = &self.link else { return };
        runtime.poll_readable(source, KEY_EVENTS, Fd(link.end.channel.fd()));
        runtime.poll_readable(source, KEY_COMPLETIONS, Fd(link.queue_fd()));
        (self.waits_for_events, self.waits_for_completions) = (true, true);
        runtime.watch(source);
    }

    /// Takes an event of one of the waits. `Err`: the connection is over, for this reason, or none that is worth a word.
    pub(super) fn handle(
        &mut self,
        runtime: &Runtime,
        source: SourceId,
        key: u32,
        completed: Completed,
    ) -> Result<(), String> {
        let is_events = key == KEY_EVENTS;
        *(if is_events { &mut self.waits_for_events } else { &mut self.waits_for_completions }) =
            completed.more;
        let Some(link) = &self.link else { return Ok(()) };
        if !completed.more {
            let fd = if is_events { link.end.channel.fd() } else { link.queue_fd() };
            runtime.poll_readable(source, key, Fd(fd));
            *(if is_events { &mut self.waits_for_events } else { &mut self.waits_for_completions }) = true;
        }
        if is_events { self.take_events() } else { Ok(()) }
    }

    fn take_events(&mut self) -> Result<(), String> {
        while let Some(link) = &mut self.link {
            match link.end.channel.event() {
                Ok(None) => break,
                Err(code) => return Err(format!("rdma_cm: {}", words::errno(code))),
                Ok(Some(event)) => match event.kind {
                    event::ESTABLISHED | event::TIMEWAIT_EXIT => {}
                    event::DISCONNECTED => return Err(String::new()),
                    event::DEVICE_REMOVAL => {
                        link.domain.device_is_gone();
                        return Err(words::event(&event));
                    }
                    _ => return Err(words::event(&event)),
                },
            }
        }
        Ok(())
    }

    /// Whether the host is known to have ended it, whatever of it is still to be looked at.
    pub(super) fn peer_has_closed(&mut self) -> bool {
        self.take_events().is_err()
    }

    pub(super) fn peek(&mut self) -> bool {
        if self.have == 0
            && let Some(link) = &mut self.link
        {
            self.have = link.poll(&mut self.polled).unwrap_or(0);
        }
        self.have > 0
    }

    pub(super) fn arm(&mut self) -> bool {
        if let Some(link) = &mut self.link {
            // What cannot be armed has failed, which the events tell.
            let _ = link.arm();
        }
        self.peek()
    }

    /// Takes what has completed to the connection.
    pub(super) fn progress(&mut self, connection: &mut Connection, now: Instant) -> Result<(), String> {
        while self.peek() {
            for index in 0..std::mem::take(&mut self.have) {
                let completion = self.polled[index];
                self.completed(connection, &completion, now)?;
            }
        }
        Ok(())
    }

    fn completed(
        &mut self,
        connection: &mut Connection,
        completion: &WorkCompletion,
        now: Instant,
    ) -> Result<(), String> {
        let Some(link) = &self.link else { return Ok(()) };
        let index = low32(completion.user) as usize;
        match completion.user >> 32 {
            kind::READ => self.room += 1,
            kind::ANSWER => self.room += 1 + usize::from(self.answers[index].written),
            _ => {}
        }
        if completion.status != 0 {
            return Err(words::host_completion(completion.status));
        }
        match completion.user >> 32 {
            kind::RECEIVE => {
                let number = u16::try_from(index).unwrap_or(0);
                let len = (completion.len as usize).min(Sqe::LEN + IN_CAPSULE as usize);
                // SAFETY: a receive's place within the link's memory, where `len` bytes have come; it is posted again after this.
                unsafe {
                    let capsule = link.memory.as_ptr().add(receive_at(number));
                    connection.handle_capsule(capsule, len, now);
                }
                self.unposted.push(number);
            }
            kind::READ => connection.data_is_here(index, now),
            kind::ANSWER => {
                if let Some(slot) = std::mem::take(&mut self.answers[index]).slot {
                    connection.answered(slot);
                }
                self.free_answers.push(u16::try_from(index).unwrap_or(0));
            }
            _ => {}
        }
        Ok(())
    }

    /// Posts what the connection wants moved, and receives, each with one doorbell.
    pub(super) fn transmit(&mut self, connection: &mut Connection) -> Result<(), String> {
        while let Some(next) = self.held.take().or_else(|| connection.next_move()) {
            if self.room < 2 || self.free_answers.is_empty() {
                self.held = Some(next);
                break;
            }
            self.write(&next);
            if let Move::Answer { data: Some(payload), .. } = &next
                && is_broken("rdma_reuse_before_sent")
            {
                self.answers
                    .iter_mut()
                    .filter(|it| it.slot == Some(payload.slot))
                    .for_each(|it| it.slot = None);
                connection.answered(payload.slot);
            }
        }
        if !connection.is_congested() {
            let Some(link) = &self.link else { return Ok(()) };
            self.receives.extend(self.unposted.drain(..).map(|index| receive(link, index)));
        }
        for (send, segment) in self.sends.iter_mut().zip(&self.segments) {
            send.segments = segment;
        }
        let Some(link) = &mut self.link else { return Ok(()) };
        // SAFETY: all that these name are parts of the link's memory, which stay until they have completed (the connection's slots,
        // receives and answers), or the link is gone.
        let posted = unsafe {
            let received = if self.receives.is_empty() { Ok(()) } else { link.post_receives(&self.receives) };
            let sent = if self.sends.is_empty() { Ok(()) } else { link.post_sends(&self.sends) };
            received.and(sent)
        };
        self.receives.clear();
        self.sends.clear();
        self.segments.clear();
        posted.map_err(|(_, code)| format!("the RDMA device takes no work: {}", words::errno(code)))
    }

    /// Makes work requests of a move, for which there is room.
    fn write(&mut self, next: &Move) {
        let Some(link) = &self.link else { return };
        let key = link.keys.local;
        let base = SendRequest { segments_len: 1, ..SendRequest::NONE };
        let segment = |start: *const u8, len: u32| Segment { address: start as u64, len, key };
        match next {
            Move::Read(payload) => {
                self.segments.push(segment(payload.start, payload.len));
                self.sends.push(SendRequest {
                    user: kind::READ << 32 | payload.slot as u64,
                    operation: operation::READ,
                    address: payload.address,
                    key: payload.key,
                    ..base
                });
                self.room -= 1;
            }
            Move::Answer { cqe, invalidate, data } => {
                let Some(number) = self.free_answers.pop() else { unreachable!("the caller has looked") };
                if let Some(payload) = data {
                    self.segments.push(segment(payload.start, payload.len));
                    self.sends.push(SendRequest {
                        user: kind::WRITE << 32 | u64::from(number),
                        operation: operation::WRITE,
                        signalled: false,
                        address: payload.address,
                        key: payload.key,
                        ..base
                    });
                    self.room -= 1;
                }
                // SAFETY: an answer's place within the link's memory, which no send names: it was free.
                let place = unsafe {
                    let place = link.memory.as_ptr().add(answer_at(number));
                    std::ptr::copy_nonoverlapping(cqe.as_ptr(), place, Cqe::LEN);
                    place
                };
                self.answers[usize::from(number)] =
                    Answer { slot: data.map(|payload| payload.slot), written: data.is_some() };
                self.segments.push(segment(place, low32(Cqe::LEN as u64)));
                self.sends.push(SendRequest {
                    user: kind::ANSWER << 32 | u64::from(number),
                    operation: if invalidate.is_some() {
                        operation::SEND_INVALIDATE
                    } else {
                        operation::SEND
                    },
                    key: invalidate.unwrap_or(0),
                    ..base
                });
                self.room -= 1;
            }
        }
    }

    /// Ends the connection: nothing more comes or goes.
    pub(super) fn close(&mut self, runtime: &Runtime, source: SourceId) {
        let Some(link) = self.link.take() else { return };
        if self.waits_for_events {
            runtime.cancel(source, KEY_EVENTS);
        }
        if self.waits_for_completions {
            runtime.cancel(source, KEY_COMPLETIONS);
        }
        self.have = 0;
        let closed = Arc::new(AtomicBool::new(false));
        self.closed = Some(Arc::clone(&closed));
        dispose(runtime, Ending { link: Some(link), closed, reactor: runtime.handle(), source });
    }

    /// Whether the device has nothing of it any more.
    pub(super) fn is_idle(&self) -> bool {
        let gone = self.closed.as_ref().is_some_and(|closed| closed.load(Ordering::Acquire));
        gone && !self.waits_for_events && !self.waits_for_completions
    }
}

/// A link that is dropped elsewhere; then its connection hears of it.
struct Ending {
    link: Option<Box<Link>>,
    closed: Arc<AtomicBool>,
    reactor: hawser_runtime::ReactorHandle,
    source: SourceId,
}

impl Drop for Ending {
    fn drop(&mut self) {
        drop(self.link.take());
        self.closed.store(true, Ordering::Release);
        let source = self.source;
        self.reactor.run(move |runtime| runtime.wake(source));
    }
}
