//! A queue pair on a socket: moves its bytes with one send and one receive at a time.
//!
//! Owns: the staging buffer, message headers and iovecs of the operations under way. Must not know: what commands are
//! for, or what happens after a connection is lost.
//!
//! Invariants:
//! - Everything that an operation names is kept until the operation is terminal; [`TcpConnection::is_quiet`] says when. A
//!   connection that is dropped before (our bug) leaks that memory rather than free it.
//! - After the first error nothing more is sent or received; `error` says what happened.

use super::batch::SEND_IOVECS_MAX;
use super::meter::{Loss, Moved};
use super::queue::{Ended, QueueError, QueuePair, Transfer};
use super::socket::{Socket, TcpQueue, plain};
use crate::nvme::Sqe;
use crate::nvme::bytes::low32;
use crate::tcp::{FatalStatus, PduError, Receiver, TermRequest};
use hawser_runtime::buffers::AlignedBuffer;
use hawser_runtime::{Completed, Op, Runtime, SourceId};
use std::rc::Rc;

/// Key of the one send under way, from the connection's first key on.
const KEY_SEND: u32 = 1;
/// Key of the one receive under way, likewise.
const KEY_RECEIVE: u32 = 2;

/// What is received at once at most: 32 reads of 4 KiB with their headers (32 * (24 + 4096 + 24) = 130 KiB) and as much
/// again, small enough to stay in the second-level cache while it is parsed.
const STAGING_LEN: usize = 256 << 10;
/// Segments of one receive in place, besides the staging buffer; the rest of a more scattered request comes with the next.
const RECEIVE_SEGMENTS_MAX: usize = 63;

/// What the operations under way name. On the heap, so that it stays in place.
struct Memory {
    send_message: libc::msghdr,
    send_iovecs: Vec<libc::iovec>,
    receive_message: libc::msghdr,
    receive_iovecs: [libc::iovec; RECEIVE_SEGMENTS_MAX + 1],
    staging: AlignedBuffer,
    term: Vec<u8>,
}

/// A queue pair on a socket.
pub(crate) struct TcpConnection<T: Copy> {
    runtime: Runtime,
    source: SourceId,
    first_key: u32,
    socket: Rc<Socket>,
    pair: Option<Box<QueuePair<T>>>,
    memory: Option<Box<Memory>>,
    sending: bool,
    receiving: bool,
    /// Bytes of the receive under way that go to a request's own buffers.
    in_place: u32,
    error: Option<String>,
    loss: Loss,
    /// The target ended it, and said so. All else (our own time-out or close, its breach of the protocol, silence) says
    /// nothing of what it does with what it has of us.
    ended_by_target: bool,
    /// The error may come from memory of a request that is not there any more.
    fault: bool,
}

impl<T: Copy> TcpConnection<T> {
    /// Takes over a connected queue of which `source` will get the events, with keys from `first_key` to 3 beyond.
    pub(crate) fn new(
        runtime: &Runtime,
        source: SourceId,
        first_key: u32,
        queue: TcpQueue,
        depth: u16,
    ) -> TcpConnection<T> {
        // SAFETY: an all-zero msghdr is an empty message.
        let message: libc::msghdr = unsafe { std::mem::zeroed() };
        let nothing = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        let memory = Memory {
            send_message: message,
            send_iovecs: Vec::with_capacity(SEND_IOVECS_MAX),
            receive_message: message,
            receive_iovecs: [nothing; RECEIVE_SEGMENTS_MAX + 1],
            staging: AlignedBuffer::new(STAGING_LEN),
            term: Vec::new(),
        };
        let mut connection = TcpConnection {
            runtime: runtime.clone(),
            source,
            first_key,
            socket: queue.socket,
            pair: Some(Box::new(QueuePair::new(depth, queue.limits))),
            memory: Some(Box::new(memory)),
            sending: false,
            receiving: false,
            in_place: 0,
            error: None,
            loss: Loss::default(),
            ended_by_target: false,
            fault: false,
        };
        connection.receive();
        connection
    }

    fn pair(&mut self) -> &mut QueuePair<T> {
        self.pair.as_mut().expect("only a drop takes it out")
    }

    fn memory(&mut self) -> &mut Memory {
        self.memory.as_mut().expect("only a drop takes it out")
    }

    /// How many more commands can be taken; none after an error.
    pub(crate) fn room(&self) -> usize {
        match &self.pair {
            Some(pair) if self.error.is_none() => pair.room(),
            _ => 0,
        }
    }

    /// How many commands are under way.
    pub(crate) fn outstanding(&self) -> usize {
        self.pair.as_ref().map_or(0, |pair| pair.outstanding())
    }

    /// Takes a command, to be sent with the next [`TcpConnection::flush`]. What `transfer` names must stay valid until it
    /// ended or was drained.
    pub(crate) fn submit(&mut self, sqe: Sqe, transfer: Transfer, user: T) {
        self.pair().submit(sqe, transfer, user);
    }

    /// Sends what was submitted, unless a send is under way, whose end will call this.
    pub(crate) fn flush(&mut self) {
        if self.sending || self.error.is_some() || !self.pair().wants_to_send() {
            return;
        }
        let (Some(pair), Some(memory)) = (&mut self.pair, &mut self.memory) else { return };
        pair.poll_transmit(&mut memory.send_iovecs);
        let op = match memory.send_iovecs.as_slice() {
            [] => return,
            [one] => {
                Op::Send { fd: self.socket.fd(), buffer: one.iov_base.cast(), len: low32(one.iov_len as u64) }
            }
            several => {
                memory.send_message.msg_iov = several.as_ptr().cast_mut();
                memory.send_message.msg_iovlen = several.len();
                Op::Sendmsg { fd: self.socket.fd(), message: &raw const memory.send_message }
            }
        };
        self.sending = true;
        // SAFETY: `memory`, the socket and what the pair's commands name are kept until the operation has ended (`is_quiet`).
        unsafe { self.runtime.submit(self.source, self.first_key + KEY_SEND, &op) };
    }

    fn receive(&mut self) {
        let fd = self.socket.fd();
        let (Some(pair), Some(memory)) = (&mut self.pair, &mut self.memory) else { return };
        let staging = memory.staging.as_ptr();
        let staging_len = pair.staging_len(memory.staging.len());
        let op = match pair.receive_into() {
            None => {
                self.in_place = 0;
                Op::Recv { fd, buffer: staging, len: low32(staging_len as u64) }
            }
            Some(place) => {
                let mut used = 0;
                let mut in_place = 0;
                for segment in place.segments().take(RECEIVE_SEGMENTS_MAX) {
                    memory.receive_iovecs[used] =
                        libc::iovec { iov_base: segment.start.cast(), iov_len: segment.len };
                    used += 1;
                    in_place += segment.len;
                }
                if in_place == place.len() {
                    memory.receive_iovecs[used] =
                        libc::iovec { iov_base: staging.cast(), iov_len: staging_len };
                    used += 1;
                }
                self.in_place = low32(in_place as u64);
                memory.receive_message.msg_iov = memory.receive_iovecs.as_mut_ptr();
                memory.receive_message.msg_iovlen = used;
                Op::Recvmsg { fd, message: &raw mut memory.receive_message }
            }
        };
        self.receiving = true;
        // SAFETY: `memory`, the socket and what the pair's commands name are kept until the operation has ended (`is_quiet`).
        unsafe { self.runtime.submit(self.source, self.first_key + KEY_RECEIVE, &op) };
    }

    /// Takes the end of the operation `key`.
    pub(crate) fn handle(&mut self, key: u32, completed: Completed) {
        match key - self.first_key {
            KEY_SEND => {
                self.sending = false;
                self.pair().transmitted();
                let wanted: usize = self.memory().send_iovecs.iter().map(|iovec| iovec.iov_len).sum();
                if self.error.is_some() {
                    // A terminate request, or what was under way when the connection was given up.
                    return;
                }
                match completed.into_result() {
                    Err(error) => self.fail_io(&error),
                    Ok(sent) if sent as usize != wanted => {
                        self.fault = true;
                        self.fail(Loss::Network, "a send ended early".to_owned());
                    }
                    Ok(_) => self.flush(),
                }
            }
            KEY_RECEIVE => {
                self.receiving = false;
                if self.error.is_some() {
                    return;
                }
                match completed.into_result() {
                    Err(error) => self.fail_io(&error),
                    Ok(0) => {
                        self.ended_by_target = true;
                        self.fail(Loss::Closed, "the target closed the connection".to_owned());
                    }
                    Ok(len) => match self.take_received(len) {
                        Ok(()) => self.receive(),
                        Err(error) => self.fail_protocol(&error),
                    },
                }
            }
            _ => {}
        }
    }

    fn take_received(&mut self, len: u32) -> Result<(), QueueError> {
        let in_place = len.min(self.in_place);
        let (Some(pair), Some(memory)) = (&mut self.pair, &self.memory) else { return Ok(()) };
        if in_place > 0 {
            pair.handle_in_place(in_place)?;
        }
        // SAFETY: the receive that wrote to the staging buffer has ended, and the next one is submitted after this.
        let staged = unsafe { memory.staging.slice(0, (len - in_place) as usize) };
        pair.handle_bytes(staged)
    }

    fn fail(&mut self, loss: Loss, error: String) {
        if self.error.is_none() {
            self.loss = loss;
            self.error = Some(error);
        }
    }

    fn fail_io(&mut self, error: &std::io::Error) {
        let heard = [libc::ECONNRESET, libc::EPIPE];
        self.fault |= error.raw_os_error() == Some(libc::EFAULT);
        self.ended_by_target |=
            self.error.is_none() && error.raw_os_error().is_some_and(|code| heard.contains(&code));
        let loss = if self.ended_by_target { Loss::Closed } else { Loss::Network };
        self.fail(loss, plain(error));
    }

    /// Tells the target why, if the line is free, before the connection is given up.
    fn fail_protocol(&mut self, error: &QueueError) {
        self.ended_by_target |= self.error.is_none() && matches!(error, QueueError::Terminated(_));
        let loss = match error {
            QueueError::Protocol(PduError { status: FatalStatus::HEADER_DIGEST_ERROR, .. })
            | QueueError::Corrupted { .. } => Loss::Corrupted,
            QueueError::Protocol(_) | QueueError::Terminated(_) => Loss::Protocol,
        };
        self.fail(loss, error.to_string());
        let QueueError::Protocol(pdu) = error else { return };
        if self.sending {
            return;
        }
        let fd = self.socket.fd();
        let memory = self.memory();
        memory.send_iovecs.clear();
        memory.term = TermRequest::new(pdu).to_bytes(Receiver::Controller, &[]);
        let (buffer, len) = (memory.term.as_ptr(), low32(memory.term.len() as u64));
        self.sending = true;
        // SAFETY: `memory`, the socket and what the pair's commands name are kept until the operation has ended (`is_quiet`).
        unsafe { self.runtime.submit(self.source, self.first_key + KEY_SEND, &Op::Send { fd, buffer, len }) };
    }

    /// Why the connection is of no use any more.
    pub(crate) fn error(&self) -> Option<&str> {
        self.error.as_deref()
    }

    /// The kind of that.
    pub(crate) fn loss(&self) -> Loss {
        self.loss
    }

    /// How payload was moved since this was asked last.
    pub(crate) fn take_moved(&mut self) -> Moved {
        self.pair().take_moved()
    }

    /// Whether it may be that the memory of a request is gone.
    pub(crate) fn may_be_fault(&self) -> bool {
        self.fault
    }

    /// Whether the target ended it, and so knows that it is over.
    pub(crate) fn was_ended_by_target(&self) -> bool {
        self.ended_by_target
    }

    /// Moves out the commands that have ended.
    pub(crate) fn ended(&mut self) -> std::vec::Drain<'_, Ended<T>> {
        self.pair().ended()
    }

    /// Gives the connection up: its operations become terminal soon, and what was not sent yet never is.
    pub(crate) fn close(&mut self) {
        self.fail(Loss::GivenUp, "given up".to_owned());
        // Not shut down: that would send the rest. The operations end by cancellation, and closing is a reset.
        if self.sending {
            self.runtime.cancel(self.source, self.first_key + KEY_SEND);
        }
        if self.receiving {
            self.runtime.cancel(self.source, self.first_key + KEY_RECEIVE);
        }
    }

    /// Whether no operation is under way: what requests name is ours again.
    pub(crate) fn is_quiet(&self) -> bool {
        !self.sending && !self.receiving
    }

    /// Takes out all commands that did not end, in order, each with whether any of it may have reached the controller.
    ///
    /// # Panics
    /// While operations are under way.
    pub(crate) fn drain(&mut self) -> Vec<(T, bool)> {
        assert!(self.is_quiet(), "operations still name these commands' buffers");
        self.pair().drain()
    }

    /// What is under way, to look at or to mark.
    pub(crate) fn users_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.pair().users_mut()
    }
}

impl<T: Copy> Drop for TcpConnection<T> {
    fn drop(&mut self) {
        if !self.is_quiet() {
            // The reactor has ended, and nobody told us of our operations; or a bug of ours. A leak is safe in both cases.
            std::mem::forget((self.pair.take(), self.memory.take(), Rc::clone(&self.socket)));
        }
    }
}
