//! The driver that is real: one io_uring, entered by its reactor's thread only.

use crate::op::{Completed, Driver, Fd, Op, Wait};
use crate::time::Instant;
use io_uring::{IoUring, opcode, squeue, types};
use std::io;

/// Completions that nobody waits for (cancellations) carry this.
const NOBODY: u64 = u64::MAX;
/// Submissions between two enters; more only cost another enter.
const SQ_ENTRIES: u32 = 1024;
/// Room for completions: a full send, receive and poll for every queue of a busy host. The kernel keeps what overflows.
const CQ_ENTRIES: u32 = 8192;

/// One io_uring with `SINGLE_ISSUER | DEFER_TASKRUN`: completions are made when the reactor enters, never under its feet.
pub struct Uring {
    ring: IoUring,
    random: u64,
    /// Operations that are not terminal yet.
    in_flight: u64,
}

impl Uring {
    /// Makes a ring for the calling thread; only that thread may use it.
    ///
    /// # Errors
    /// When the kernel has no io_uring (it is off, or older than 6.1), or memory is short.
    pub fn new() -> io::Result<Uring> {
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all()
            .setup_cqsize(CQ_ENTRIES)
            .setup_clamp()
            .dontfork()
            .build(SQ_ENTRIES)?;
        let mut seed = [0u8; 8];
        // SAFETY: `seed` is 8 writable bytes.
        let got = unsafe { libc::getrandom(seed.as_mut_ptr().cast(), seed.len(), 0) };
        if got != 8 {
            return Err(io::Error::last_os_error());
        }
        Ok(Uring { ring, random: u64::from_ne_bytes(seed) | 1, in_flight: 0 })
    }

    fn push(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: everything the entry points to stays valid until it completes: the contract of `Op`.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return;
            }
            self.enter(Wait::No);
        }
    }
}

impl Driver for Uring {
    unsafe fn submit(&mut self, user: u64, op: &Op) {
        let entry = match *op {
            Op::Nop => opcode::Nop::new().build(),
            Op::Readv { fd, iovecs, count, offset } => {
                opcode::Readv::new(types::Fd(fd.0), iovecs, count).offset(offset).build()
            }
            Op::Writev { fd, iovecs, count, offset, durable } => {
                opcode::Writev::new(types::Fd(fd.0), iovecs, count)
                    .offset(offset)
                    .rw_flags(if durable { libc::RWF_DSYNC } else { 0 })
                    .build()
            }
            Op::Fdatasync { fd } => {
                opcode::Fsync::new(types::Fd(fd.0)).flags(types::FsyncFlags::DATASYNC).build()
            }
            Op::Fallocate { fd, mode, offset, len } => {
                opcode::Fallocate::new(types::Fd(fd.0), len).offset(offset).mode(mode).build()
            }
            Op::PollReadable { fd } => {
                opcode::PollAdd::new(types::Fd(fd.0), u32::from(libc::POLLIN.unsigned_abs()))
                    .multi(true)
                    .build()
            }
            Op::Recv { fd, buffer, len } => opcode::Recv::new(types::Fd(fd.0), buffer, len).build(),
            Op::Recvmsg { fd, message } => opcode::RecvMsg::new(types::Fd(fd.0), message).build(),
            Op::Send { fd, buffer, len } => opcode::Send::new(types::Fd(fd.0), buffer, len)
                .flags(libc::MSG_WAITALL | libc::MSG_NOSIGNAL)
                .build(),
            Op::Sendmsg { fd, message } => opcode::SendMsg::new(types::Fd(fd.0), message)
                .flags((libc::MSG_WAITALL | libc::MSG_NOSIGNAL).unsigned_abs())
                .build(),
            Op::Accept { fd } => {
                opcode::Accept::new(types::Fd(fd.0), std::ptr::null_mut(), std::ptr::null_mut())
                    .flags(libc::SOCK_CLOEXEC)
                    .build()
            }
            Op::Connect { fd, address, len } => opcode::Connect::new(types::Fd(fd.0), address, len).build(),
        };
        self.in_flight += 1;
        self.push(&entry.user_data(user));
    }

    fn cancel(&mut self, user: u64) {
        self.push(
            &opcode::AsyncCancel::new(user).build().flags(squeue::Flags::SKIP_SUCCESS).user_data(NOBODY),
        );
    }

    fn enter(&mut self, wait: Wait) {
        let entered = match wait {
            Wait::No => {
                let sq = self.ring.submission();
                if sq.is_empty() && !sq.taskrun() && !sq.cq_overflow() {
                    return;
                }
                drop(sq);
                // SAFETY: no argument is passed; GETEVENTS runs the deferred task work.
                unsafe {
                    let pending = u32::try_from(self.ring.submission().len()).unwrap_or(u32::MAX);
                    self.ring.submitter().enter::<libc::sigset_t>(pending, 0, IORING_ENTER_GETEVENTS, None)
                }
            }
            Wait::Until(deadline) => {
                let ns = if deadline == Instant::NEVER {
                    None
                } else {
                    Some(deadline.ns_since(Instant::monotonic()))
                };
                match ns {
                    None => self.ring.submitter().submit_and_wait(1),
                    Some(ns) => {
                        let ts = types::Timespec::from(std::time::Duration::from_nanos(ns));
                        self.ring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&ts))
                    }
                }
            }
        };
        if let Err(error) = entered {
            // ETIME: the wait is over. EINTR: a signal. EBUSY, EAGAIN: completions must be reaped first.
            let harmless = [libc::ETIME, libc::EINTR, libc::EBUSY, libc::EAGAIN];
            assert!(error.raw_os_error().is_some_and(|e| harmless.contains(&e)), "io_uring_enter: {error}");
        }
    }

    fn reap(&mut self, out: &mut Vec<(u64, Completed)>) {
        for cqe in self.ring.completion() {
            if cqe.user_data() == NOBODY {
                continue;
            }
            let more = io_uring::cqueue::more(cqe.flags());
            self.in_flight -= u64::from(!more);
            out.push((cqe.user_data(), Completed { result: cqe.result(), more }));
        }
    }

    fn quiesce(&mut self) -> bool {
        let deadline = Instant::monotonic() + QUIESCE;
        let mut ended = Vec::new();
        while self.in_flight > 0 && Instant::monotonic() < deadline {
            let all = types::CancelBuilder::any().all();
            let cancel = opcode::AsyncCancel2::new(all).build().flags(squeue::Flags::SKIP_SUCCESS);
            self.push(&cancel.user_data(NOBODY));
            self.enter(Wait::Until(Instant::monotonic() + QUIESCE_STEP));
            self.reap(&mut ended);
            ended.clear();
        }
        self.in_flight == 0
    }

    fn now(&self) -> Instant {
        Instant::monotonic()
    }

    fn random(&mut self) -> u64 {
        // xorshift64*: jitter and identifiers, never secrets.
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn tcp_socket(&mut self, ipv6: bool) -> io::Result<Fd> {
        let family = if ipv6 { libc::AF_INET6 } else { libc::AF_INET };
        // SAFETY: plain system call without pointers.
        let fd = unsafe { libc::socket(family, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // We send whole batches: a last short segment must not wait for the answer to the one before.
        let on = 1i32;
        // SAFETY: `on` is a readable int of the size given; failing leaves a socket that is slower, nothing else.
        unsafe { libc::setsockopt(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, (&raw const on).cast(), 4) };
        Ok(Fd(fd))
    }

    fn close(&mut self, fd: Fd) {
        // SAFETY: the caller owns `fd` (from `tcp_socket` or an accept) and gives it up here.
        unsafe { libc::close(fd.0) };
    }

    fn shutdown(&mut self, fd: Fd) {
        // SAFETY: plain system call without pointers; a descriptor that is not a connected socket is an error we ignore.
        unsafe { libc::shutdown(fd.0, libc::SHUT_RDWR) };
    }
}

/// How long the end of a reactor waits for operations that the kernel does not give up: then their memory is leaked.
const QUIESCE: std::time::Duration = std::time::Duration::from_secs(5);
const QUIESCE_STEP: std::time::Duration = std::time::Duration::from_millis(20);
const IORING_ENTER_GETEVENTS: u32 = 1;

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{File, OpenOptions};
    use std::io::Write;
    use std::os::fd::{AsRawFd, IntoRawFd};

    /// Tries for an open-file-description lock on the whole file.
    fn lock(fd: i32) -> bool {
        // SAFETY: an all-zero flock is a lock from the start of the file to its end, with l_pid 0, as it must be.
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        lock.l_type = libc::c_short::try_from(libc::F_WRLCK).unwrap();
        // SAFETY: `lock` is a valid flock.
        unsafe { libc::fcntl(fd, libc::F_OFD_SETLK, &raw const lock) == 0 }
    }

    /// What `file:` rests on when its process is killed: the kernel lets go of an open-file-description lock when the last
    /// operation on that description has ended, whoever has closed it. Shown with an operation that lasts, on a FIFO.
    #[test]
    fn a_lock_lasts_as_long_as_the_last_operation_on_its_description() {
        let path = std::env::temp_dir().join(format!("hawser-fifo-{}", std::process::id()));
        let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
        // SAFETY: plain system call with a C string.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        let open = || -> File { OpenOptions::new().read(true).write(true).open(&path).unwrap() };
        let (holder, mut other) = (open(), open());
        std::fs::remove_file(&path).unwrap();
        assert!(lock(holder.as_raw_fd()));
        assert!(!lock(other.as_raw_fd()));
        let mut uring = Uring::new().unwrap();
        let mut byte = [0u8];
        let iovec = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
        let fd = holder.into_raw_fd();
        let read = Op::Readv { fd: Fd(fd), iovecs: &raw const iovec, count: 1, offset: u64::MAX };
        // SAFETY: `byte` and `iovec` outlive the operation, which is reaped below.
        unsafe { uring.submit(1, &read) };
        uring.enter(Wait::No);
        uring.close(Fd(fd));
        assert!(!lock(other.as_raw_fd()), "the operation has not ended");
        other.write_all(&[7]).unwrap();
        let mut ended = Vec::new();
        while ended.is_empty() {
            uring.enter(Wait::Until(Instant::NEVER));
            uring.reap(&mut ended);
        }
        assert_eq!((ended[0].1.result, byte), (1, [7]));
        // The ring lets go of the description when it is entered again.
        while !lock(other.as_raw_fd()) {
            uring.enter(Wait::No);
        }
    }
}
