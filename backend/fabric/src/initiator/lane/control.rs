//! What people and other layers ask a namespace for beside requests: reservations. Rare, and by whichever way is good.
//!
//! Owns: the memory of such commands. They go with a lane's requests ([`super::send`]) as a [`Held`] that belongs to no channel and
//! whose token names them here.
//!
//! - A change that was sent and not answered, because its connection was lost, is not sent again: a preemption that is carried out
//!   twice, or late, takes away what somebody else has meanwhile. Who asked decides.
//! - One that nobody waits for any more is not sent.

use super::{Held, Lane, Transfer};
use crate::initiator::queue::Answer;
use crate::nvme::reservation::{self, ReservationCommand};
use crate::nvme::{NvmeStatus, Sqe, StatusCode};
use hawser_block::reservation::ReserveError;
use hawser_block::{BlockCount, Buffers, Lba, Operation, Request, Token};
use hawser_runtime::buffers::AlignedBuffer;

/// The channel of a command that belongs to none.
const NO_CHANNEL: usize = usize::MAX;

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ask {
    /// A change.
    Change(ReservationCommand),
    /// A report of so many bytes.
    Report(u32),
}

/// The answer's data.
pub(crate) type Reply = Box<dyn FnOnce(Result<Vec<u8>, ReserveError>) + Send>;

/// One command.
pub(super) struct Control {
    ask: Ask,
    /// Where a report goes, and the iovec that names it. Kept until the command has ended, whoever waits.
    memory: Option<(AlignedBuffer, Box<libc::iovec>)>,
    /// `None`: nobody waits any more.
    reply: Option<Reply>,
}

impl Control {
    fn command(&self, nsid: u32) -> (Sqe, Transfer) {
        match (self.ask, &self.memory) {
            (Ask::Report(len), Some((_, iovec))) => {
                // SAFETY: memory and iovec are on the heap, and kept with the command until it has ended or was drained; the
                // iovec names `len` bytes of it.
                let buffers = unsafe { Buffers::new(&raw const **iovec, 1, len) };
                (reservation::report(nsid, len), Transfer::ToHost(buffers))
            }
            (Ask::Report(_), None) => unreachable!("a report has memory"),
            (Ask::Change(command), _) => {
                let (sqe, data) = reservation::to_sqe(&command, nsid);
                let mut bytes = [0; 16];
                bytes[..data.len()].copy_from_slice(&data);
                (sqe, Transfer::Inline(bytes, u8::try_from(data.len()).unwrap_or(16)))
            }
        }
    }
}

impl Held {
    /// Whether it is one of ours.
    pub(super) fn is_control(&self) -> bool {
        self.channel == NO_CHANNEL
    }
}

impl Lane {
    /// Asks the namespace for something by whichever way is good; `reply` hears how it ended. `name` is its own.
    pub(crate) fn control(&mut self, name: u64, ask: Ask, reply: Reply) {
        if self.failing || !self.ways.iter().any(super::Way::is_good) {
            return reply(Err(ReserveError::NotSent("no path is good".to_owned())));
        }
        let memory = match ask {
            Ask::Change(_) => None,
            Ask::Report(len) => {
                let memory = AlignedBuffer::new(len as usize);
                let iovec = libc::iovec { iov_base: memory.as_ptr().cast(), iov_len: len as usize };
                Some((memory, Box::new(iovec)))
            }
        };
        self.controls.insert(name, Control { ask, memory, reply: Some(reply) });
        let request = Request {
            operation: Operation::Read,
            lba: Lba(0),
            blocks: BlockCount(0),
            buffers: Buffers::EMPTY,
            token: Token(name),
        };
        let held = Held::new(request, NO_CHANNEL, self.sequence, self.runtime.now());
        self.sequence += 1;
        self.pending.push_front(held);
        self.wake();
    }

    /// Nobody waits for it any more.
    pub(crate) fn give_up_control(&mut self, name: u64) {
        let is_it = |held: &Held| held.is_control() && held.request.token.0 == name;
        let before = self.pending.len() + self.delayed.len();
        self.pending.retain(|held| !is_it(held));
        self.delayed.retain(|(_, held)| !is_it(held));
        if self.pending.len() + self.delayed.len() < before {
            self.controls.remove(&name);
        } else if let Some(control) = self.controls.get_mut(&name) {
            // Its command is under way, and names its memory.
            control.reply = None;
        }
    }

    /// Sends one on a way that has room.
    pub(super) fn send_control(&mut self, path: usize, held: Held) {
        let Some(control) = self.controls.get(&held.request.token.0) else { return };
        let Some(start) = self.ways[path].started else { unreachable!("only such a way is chosen") };
        let (sqe, transfer) = control.command(start.nsid);
        let connection = self.ways[path].connection.as_mut().expect("a way with room has a connection");
        connection.submit(sqe, transfer, held);
        self.runtime.add_outstanding(connection.unspun(1));
    }

    /// The connection that one was sent on is gone. True when it may go again, because it changes nothing.
    pub(super) fn control_lost(&mut self, held: &Held) -> bool {
        let control = self.controls.get(&held.request.token.0);
        if control.is_some_and(|it| matches!(it.ask, Ask::Report(_)) && it.reply.is_some()) {
            return true;
        }
        self.control_failed(held, ReserveError::Unanswered("the path was lost".to_owned()));
        false
    }

    /// The controller has answered one.
    pub(super) fn control_answered(&mut self, path: usize, mut held: Held, answer: Answer) {
        if answer.status.is_success() {
            let Some(control) = self.controls.remove(&held.request.token.0) else { return };
            let data = control.memory.map_or(Vec::new(), |(memory, _)| {
                // SAFETY: the command has ended: nothing writes to its memory any more.
                unsafe { memory.slice(0, memory.len()) }.to_vec()
            });
            if let Some(reply) = control.reply {
                reply(Ok(data));
            }
            return;
        }
        let is_awaited = self.controls.get(&held.request.token.0).is_some_and(|it| it.reply.is_some());
        if is_awaited && let Some(delay) = self.retry_after(path, &mut held, answer) {
            self.delayed.push((self.runtime.now() + delay, held));
            return;
        }
        self.control_failed(&held, refusal(answer.status));
    }

    /// One is over: its command has ended, or was taken back.
    pub(super) fn control_failed(&mut self, held: &Held, error: ReserveError) {
        let control = self.controls.remove(&held.request.token.0);
        if let Some(reply) = control.and_then(|control| control.reply) {
            reply(Err(error));
        }
    }
}

fn refusal(status: NvmeStatus) -> ReserveError {
    match status.code {
        StatusCode::RESERVATION_CONFLICT => ReserveError::Conflict,
        StatusCode::INVALID_OPCODE => ReserveError::Unsupported,
        _ => ReserveError::Refused(format!("the target refused: {status}")),
    }
}
