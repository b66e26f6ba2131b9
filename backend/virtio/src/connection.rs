//! One front end's socket: whole messages with their descriptors in, replies out.
//!
//! Never blocks: the session's thread waits in one place for everything ([`wait_readable`]), so that a front end that
//! sends half a message stalls nobody, not even the end of its own session.

use crate::message::{self, HEADER_BYTES, Header, MessageError};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

/// A message as it came: header, payload, descriptors.
#[derive(Debug)]
pub(crate) struct RawMessage {
    pub(crate) header: Header,
    pub(crate) payload: Vec<u8>,
    pub(crate) descriptors: Vec<OwnedFd>,
}

/// Why nothing more comes.
#[derive(Debug)]
pub(crate) enum ReceiveError {
    /// The front end closed its side.
    Closed,
    Io(io::Error),
    Message(MessageError),
}

impl fmt::Display for ReceiveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ReceiveError::Closed => f.write_str("the front end closed the connection"),
            ReceiveError::Io(error) => write!(f, "connection: {error}"),
            ReceiveError::Message(error) => error.fmt(f),
        }
    }
}

/// A connection, with what has come of the next message.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: UnixStream,
    header: [u8; HEADER_BYTES],
    parsed: Option<Header>,
    payload: Vec<u8>,
    filled: usize,
    descriptors: Vec<OwnedFd>,
}

impl Connection {
    pub(crate) fn new(socket: UnixStream) -> Connection {
        Connection {
            socket,
            header: [0; HEADER_BYTES],
            parsed: None,
            payload: Vec::new(),
            filled: 0,
            descriptors: Vec::new(),
        }
    }

    pub(crate) fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// [`is_closed`].
    pub(crate) fn is_closed(&self) -> bool {
        is_closed(self.socket.as_fd())
    }

    /// Takes what has come; the next whole message, or `None` when more must come first.
    pub(crate) fn receive(&mut self) -> Result<Option<RawMessage>, ReceiveError> {
        loop {
            let Some(header) = self.parsed else {
                if self.filled < HEADER_BYTES {
                    let mut rest = [0; HEADER_BYTES];
                    let want = HEADER_BYTES - self.filled;
                    let Some(got) = self.receive_into(&mut rest[..want])? else { return Ok(None) };
                    self.header[self.filled..self.filled + got].copy_from_slice(&rest[..got]);
                    self.filled += got;
                    continue;
                }
                let header = Header::parse(&self.header).map_err(ReceiveError::Message)?;
                self.payload = vec![0; header.payload_bytes];
                self.parsed = Some(header);
                self.filled = 0;
                continue;
            };
            if self.filled < header.payload_bytes {
                let mut payload = std::mem::take(&mut self.payload);
                let got = self.receive_into(&mut payload[self.filled..]);
                self.payload = payload;
                let Some(got) = got? else { return Ok(None) };
                self.filled += got;
                continue;
            }
            self.parsed = None;
            self.filled = 0;
            return Ok(Some(RawMessage {
                header,
                payload: std::mem::take(&mut self.payload),
                descriptors: std::mem::take(&mut self.descriptors),
            }));
        }
    }

    /// One `recvmsg`: the number of bytes, or `None` when it would block.
    fn receive_into(&mut self, buffer: &mut [u8]) -> Result<Option<usize>, ReceiveError> {
        // Room for the most descriptors that the kernel passes at once (SCM_MAX_FD = 253), aligned as cmsghdr wants.
        let mut control = [0u64; 16 / 8 + 256 * 4 / 8];
        let mut iovec = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        // SAFETY: msghdr is plain data; all zero is an empty one.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_iov = &raw mut iovec;
        header.msg_iovlen = 1;
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = size_of_val(&control);
        // SAFETY: `header` names one buffer and a control area that both live until the call returns.
        let got = unsafe {
            libc::recvmsg(
                self.socket.as_raw_fd(),
                &raw mut header,
                libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC,
            )
        };
        if got < 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                io::ErrorKind::ConnectionReset => Err(ReceiveError::Closed),
                _ => Err(ReceiveError::Io(error)),
            };
        }
        self.take_descriptors(&header);
        if header.msg_flags & libc::MSG_CTRUNC != 0 || self.descriptors.len() > message::DESCRIPTORS_MAX {
            let what = format!("more than {} descriptors in one message", message::DESCRIPTORS_MAX);
            return Err(ReceiveError::Message(MessageError(what)));
        }
        match usize::try_from(got).unwrap_or(0) {
            0 => Err(ReceiveError::Closed),
            got => Ok(Some(got)),
        }
    }

    fn take_descriptors(&mut self, header: &libc::msghdr) {
        // SAFETY: `header` was filled by recvmsg and its control area is alive; the macros walk within it.
        unsafe {
            let mut control = libc::CMSG_FIRSTHDR(header);
            while !control.is_null() {
                if (*control).cmsg_level == libc::SOL_SOCKET && (*control).cmsg_type == libc::SCM_RIGHTS {
                    let bytes = (*control).cmsg_len - usize::try_from(libc::CMSG_LEN(0)).unwrap_or(0);
                    let data = libc::CMSG_DATA(control);
                    for index in 0..bytes / size_of::<RawFd>() {
                        let fd = data.add(index * size_of::<RawFd>()).cast::<RawFd>().read_unaligned();
                        // The kernel made this descriptor for us.
                        self.descriptors.push(OwnedFd::from_raw_fd(fd));
                    }
                }
                control = libc::CMSG_NXTHDR(header, control);
            }
        }
    }

    /// Sends a reply, with at most one descriptor.
    pub(crate) fn send(&self, bytes: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        send(&self.socket, bytes, descriptor)
    }
}

/// Whether a front end has closed its side, or is dead. What it may have sent before is not looked at.
pub(crate) fn is_closed(socket: BorrowedFd<'_>) -> bool {
    let mut poll = libc::pollfd { fd: socket.as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
    // SAFETY: one valid entry.
    let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
    ready == 1 && poll.revents != 0
}

/// Sends a whole message without waiting. A front end that leaves a socket's worth of replies unread is broken.
pub(crate) fn send(socket: &UnixStream, bytes: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut control = [0u64; 3];
    let mut iovec = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: msghdr is plain data; all zero is an empty one.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut iovec;
    header.msg_iovlen = 1;
    if let Some(descriptor) = descriptor {
        header.msg_control = control.as_mut_ptr().cast();
        let fd_bytes = u32::try_from(size_of::<RawFd>()).unwrap_or(0);
        // SAFETY: the control area holds one header and one descriptor (CMSG_SPACE(4) = 24 bytes) and is aligned.
        unsafe {
            header.msg_controllen = usize::try_from(libc::CMSG_SPACE(fd_bytes)).unwrap_or(0);
            let first = libc::CMSG_FIRSTHDR(&raw const header);
            (*first).cmsg_level = libc::SOL_SOCKET;
            (*first).cmsg_type = libc::SCM_RIGHTS;
            (*first).cmsg_len = usize::try_from(libc::CMSG_LEN(fd_bytes)).unwrap_or(0);
            libc::CMSG_DATA(first).cast::<RawFd>().write_unaligned(descriptor.as_raw_fd());
        }
    }
    // SAFETY: `header` names buffers that live until the call returns; the kernel only reads them.
    let sent = unsafe {
        libc::sendmsg(socket.as_raw_fd(), &raw const header, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
    };
    match usize::try_from(sent) {
        Ok(sent) if sent == bytes.len() => Ok(()),
        Ok(_) => Err(io::Error::other("the front end does not read its replies")),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// Waits until one of the descriptors (-1: none) is readable (or broken), or the time is over; says which are.
pub(crate) fn wait_readable<const N: usize>(fds: [RawFd; N], timeout_ms: i32) -> [bool; N] {
    let mut polls = fds.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
    // SAFETY: `polls` is an array of N entries.
    let ready = unsafe { libc::poll(polls.as_mut_ptr(), N as libc::nfds_t, timeout_ms) };
    polls.map(|poll| ready > 0 && poll.revents != 0)
}

/// A new eventfd, for threads to wake each other.
pub(crate) fn eventfd() -> io::Result<OwnedFd> {
    // SAFETY: plain system call without pointers.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: we just made it and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Whether a write to a descriptor of the front end's would be taken at once: its file may be blocking.
pub(crate) fn is_writable(fd: BorrowedFd<'_>) -> bool {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // SAFETY: one valid entry.
    let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
    ready == 1 && poll.revents & libc::POLLOUT != 0
}

/// Adds 1 to an eventfd. One that is full wakes its reader just as well.
pub(crate) fn signal(fd: BorrowedFd<'_>) {
    let one = 1u64;
    // SAFETY: `one` is 8 readable bytes; `fd` is open while it is borrowed.
    unsafe { libc::write(fd.as_raw_fd(), (&raw const one).cast(), 8) };
}

/// Takes what an eventfd of ours has counted.
pub(crate) fn clear(fd: BorrowedFd<'_>) {
    let mut count = 0u64;
    // SAFETY: `count` is 8 writable bytes; `fd` is open while it is borrowed.
    unsafe { libc::read(fd.as_raw_fd(), (&raw mut count).cast(), 8) };
}

/// Whether a descriptor that a front end gave us is an eventfd, and so safe to poll and to write to.
pub(crate) fn is_eventfd(fd: BorrowedFd<'_>) -> bool {
    std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        .is_ok_and(|target| target.as_os_str() == "anon_inode:[eventfd]")
}
