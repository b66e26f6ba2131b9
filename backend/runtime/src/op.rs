//! What can be asked of the world, and who carries it out.

use crate::time::Instant;
use std::os::fd::RawFd;

/// A file descriptor as a driver knows it: the kernel's number, or the simulator's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fd(pub RawFd);

/// One asynchronous operation.
///
/// Whoever submits it promises that everything it points to (buffers, iovecs, message headers, addresses) stays valid
/// and in place until the operation's completion event has been delivered, whatever happens in between. That is what
/// makes a request's memory safe to hand to the kernel.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the fields are the system call's own arguments")]
pub enum Op {
    /// Completes at once with 0.
    Nop,
    /// `preadv2` at `offset`.
    Readv { fd: Fd, iovecs: *const libc::iovec, count: u32, offset: u64 },
    /// `pwritev2` at `offset`; `durable` adds `RWF_DSYNC`.
    Writev { fd: Fd, iovecs: *const libc::iovec, count: u32, offset: u64, durable: bool },
    /// `fdatasync`.
    Fdatasync { fd: Fd },
    /// `fallocate` with `mode`, over `len` bytes from `offset`.
    Fallocate { fd: Fd, mode: i32, offset: u64, len: u64 },
    /// An event for each time that `fd` becomes readable. Its events carry [`Completed::more`]; one without ends it: by
    /// cancellation (a negative result), or by the kernel's choice (a positive one: submit it again).
    PollReadable { fd: Fd },
    /// `recv` into one buffer.
    Recv { fd: Fd, buffer: *mut u8, len: u32 },
    /// `recvmsg` (its `msg_control` must be empty).
    Recvmsg { fd: Fd, message: *mut libc::msghdr },
    /// `send` from one buffer; completes when all is taken or the socket fails.
    Send { fd: Fd, buffer: *const u8, len: u32 },
    /// `sendmsg`; completes when all is taken or the socket fails.
    Sendmsg { fd: Fd, message: *const libc::msghdr },
    /// One connection accepted: the result is its descriptor.
    Accept { fd: Fd },
    /// `connect`.
    Connect { fd: Fd, address: *const libc::sockaddr, len: u32 },
}

/// How an operation ended, or one event of an operation that goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completed {
    /// What the system call would have returned: a count or descriptor, or a negated errno.
    pub result: i32,
    /// More events of the same operation will follow.
    pub more: bool,
}

impl Completed {
    /// The result as `io::Result`.
    ///
    /// # Errors
    /// The operation's errno.
    pub fn into_result(self) -> std::io::Result<u32> {
        u32::try_from(self.result).map_err(|_| std::io::Error::from_raw_os_error(-self.result))
    }
}

/// How long [`Driver::enter`] may sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Not at all.
    No,
    /// Until something completes, or until this time.
    Until(Instant),
}

/// Carries out operations for one reactor: the kernel through io_uring, or the simulator.
pub trait Driver {
    /// Takes an operation. `user` comes back with each of its events.
    ///
    /// # Safety
    /// What [`Op`] says.
    unsafe fn submit(&mut self, user: u64, op: &Op);
    /// Asks to cancel the operation that was submitted with `user`.
    fn cancel(&mut self, user: u64);
    /// Starts what was submitted, and waits as told for something to complete.
    fn enter(&mut self, wait: Wait);
    /// Moves out what has completed.
    fn reap(&mut self, out: &mut Vec<(u64, Completed)>);
    /// Cancels every operation and waits until all are terminal. Returns whether they are: if not, nothing that they
    /// name may ever be freed.
    fn quiesce(&mut self) -> bool;
    /// The time now.
    fn now(&self) -> Instant;
    /// The next random number: seeded in the simulator. Not for secrets.
    fn random(&mut self) -> u64;
    /// In the simulator: how long a thread takes to do what was given to it ([`crate::Runtime::on_thread`]).
    fn thread_takes(&mut self) -> std::time::Duration {
        std::time::Duration::ZERO
    }
    /// A new TCP socket (blocking: io_uring would not wait on a non-blocking one) for [`Op::Connect`], as `socket(2)`; `ipv6` chooses the family.
    ///
    /// # Errors
    /// As `socket(2)`.
    fn tcp_socket(&mut self, ipv6: bool) -> std::io::Result<Fd>;
    /// Closes a descriptor that [`Driver::tcp_socket`] or [`Op::Accept`] made.
    fn close(&mut self, fd: Fd);
    /// Ends both directions of a connection, so that operations on it become terminal.
    fn shutdown(&mut self, fd: Fd);
}
