//! One connection of rdma_cm's with its queue pair: what it is made of, and how it ends.
//!
//! Owns: the id and its event channel, the queue pair, memory of the connection's own, memory windows. Must not know: NVMe.
//!
//! Invariants:
//! - Dropping it puts the queue pair into error, ends the windows (no key leads anywhere), then the queue pair (nothing uses memory any
//!   more), the registration of the memory, the memory. It waits for no peer, but for the device: [`dispose`] does it elsewhere than on
//!   a reactor.
//! - What its requests name is kept by whoever posts them until they have completed, or it was dropped.

use super::domain::Domain;
use super::words;
use hawser_runtime::Runtime;
use hawser_runtime::buffers::AlignedBuffer;
use hawser_verbs_abi::{
    CmEvent, ConnectParameters, Device, EventChannel, Id, Keys, Queue, QueueSize, ReceiveRequest, Region,
    SendRequest, Table, Window, WorkCompletion,
};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long what was under way may take to complete as flushed, before the queue pair is taken away all the same.
const FLUSH_MAX: Duration = Duration::from_secs(2);
const FLUSH_STEP: Duration = Duration::from_micros(200);

/// A socket address as rdma_cm takes it.
pub(crate) union RawAddress {
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

impl RawAddress {
    pub(crate) fn new(address: &SocketAddr) -> RawAddress {
        // SAFETY: all zeroes is an address of no family.
        let mut raw: RawAddress = unsafe { std::mem::zeroed() };
        match address {
            SocketAddr::V4(v4) => {
                raw.v4 = libc::sockaddr_in {
                    sin_family: libc::sa_family_t::try_from(libc::AF_INET).unwrap_or_default(),
                    sin_port: v4.port().to_be(),
                    sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(v4.ip().octets()) },
                    sin_zero: [0; 8],
                };
            }
            SocketAddr::V6(v6) => {
                raw.v6 = libc::sockaddr_in6 {
                    sin6_family: libc::sa_family_t::try_from(libc::AF_INET6).unwrap_or_default(),
                    sin6_port: v6.port().to_be(),
                    sin6_flowinfo: v6.flowinfo(),
                    sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                    sin6_scope_id: v6.scope_id(),
                };
            }
        }
        raw
    }

    fn pointer(&self) -> *const std::ffi::c_void {
        (&raw const *self).cast()
    }
}

fn result(code: i32) -> Result<(), i32> {
    if code < 0 { Err(code) } else { Ok(()) }
}

/// Where events come up; closed after what uses it.
pub(crate) struct Channel {
    table: &'static Table,
    raw: *mut EventChannel,
    fd: i32,
}

// SAFETY: a handle, used by whoever owns this: one thread at a time.
unsafe impl Send for Channel {}

impl Channel {
    pub(crate) fn open(table: &'static Table) -> Result<Channel, i32> {
        let (mut raw, mut fd) = (std::ptr::null_mut(), -1);
        // SAFETY: room for both.
        result(unsafe { (table.channel_open)(&raw mut raw, &raw mut fd) })?;
        Ok(Channel { table, raw, fd })
    }

    pub(crate) fn fd(&self) -> i32 {
        self.fd
    }

    /// The next event, if there is one.
    pub(crate) fn event(&mut self) -> Result<Option<CmEvent>, i32> {
        let mut event = CmEvent::NONE;
        // SAFETY: a handle of ours, and room for an event.
        let count = unsafe { (self.table.channel_event)(self.raw, &raw mut event) };
        result(count)?;
        Ok((count > 0).then_some(event))
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // SAFETY: ours; its owner has closed the ids on it.
        unsafe { (self.table.channel_close)(self.raw) };
    }
}

/// One end without a queue: on its way to become a [`Link`], or a listener. Field order is drop order.
pub(crate) struct End {
    id: OwnId,
    pub(crate) channel: Channel,
}

struct OwnId {
    table: &'static Table,
    raw: *mut Id,
}

// SAFETY: a handle, used by whoever owns this: one thread at a time.
unsafe impl Send for OwnId {}

impl Drop for OwnId {
    fn drop(&mut self) {
        // SAFETY: ours, and without a queue: that goes before.
        unsafe { (self.table.id_close)(self.raw) };
    }
}

impl End {
    /// A new end on a channel of its own.
    pub(crate) fn open(table: &'static Table) -> Result<End, i32> {
        let channel = Channel::open(table)?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: a channel of ours, and room for a handle.
        result(unsafe { (table.id_open)(channel.raw, &raw mut raw) })?;
        Ok(End { id: OwnId { table, raw }, channel })
    }

    /// Takes over the new end of a request to connect, onto a channel of its own.
    ///
    /// # Safety
    /// `id` is from such an event, and nobody else has it.
    pub(crate) unsafe fn adopt(table: &'static Table, id: *mut Id) -> Result<End, i32> {
        let id = OwnId { table, raw: id };
        let channel = Channel::open(table)?;
        // SAFETY: both are ours.
        result(unsafe { (table.id_migrate)(id.raw, channel.raw) })?;
        Ok(End { id, channel })
    }

    fn table(&self) -> &'static Table {
        self.id.table
    }

    pub(crate) fn resolve_address(&mut self, address: &SocketAddr, timeout: Duration) -> Result<(), i32> {
        let raw = RawAddress::new(address);
        let ms = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: a handle of ours; the address is as long as its family's.
        result(unsafe { (self.table().resolve_address)(self.id.raw, raw.pointer(), ms) })
    }

    pub(crate) fn resolve_route(&mut self, timeout: Duration) -> Result<(), i32> {
        let ms = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: a handle of ours.
        result(unsafe { (self.table().resolve_route)(self.id.raw, ms) })
    }

    /// Waits for requests to connect at this address; returns the port.
    pub(crate) fn listen(&mut self, address: &SocketAddr, backlog: i32) -> Result<u16, i32> {
        let raw = RawAddress::new(address);
        // SAFETY: a handle of ours; the address is as long as its family's.
        unsafe {
            result((self.table().bind)(self.id.raw, raw.pointer()))?;
            result((self.table().listen)(self.id.raw, backlog))?;
            Ok((self.table().port)(self.id.raw))
        }
    }

    /// The device that it is on.
    pub(crate) fn device(&self) -> *mut Device {
        // SAFETY: a handle of ours.
        unsafe { (self.table().device)(self.id.raw) }
    }

    /// Does not let the other end in.
    pub(crate) fn reject(&mut self, private: &[u8]) {
        let len = u8::try_from(private.len()).unwrap_or(u8::MAX);
        // SAFETY: a handle of ours, and `len` bytes. Whether it is heard does not matter: the id is closed next.
        unsafe { (self.table().reject)(self.id.raw, private.as_ptr(), len) };
    }

    /// Gives it its queue, memory and windows. Slow: never on a reactor's thread.
    pub(crate) fn furnish(
        self,
        domain: Arc<Domain>,
        size: QueueSize,
        memory_len: usize,
        windows: usize,
    ) -> Result<Link, String> {
        let table = self.table();
        let (mut queue, mut queue_fd) = (std::ptr::null_mut(), -1);
        // SAFETY: handles of ours, and room for the results.
        let opened = unsafe {
            (table.queue_open)(self.id.raw, domain.raw(), &raw const size, &raw mut queue, &raw mut queue_fd)
        };
        if opened < 0 {
            let how = match -opened {
                libc::ENOMEM | libc::ENOSPC | libc::EAGAIN => {
                    format!(", want fewer reactors or paths (it has {})", domain.attributes.queues_max)
                }
                _ => String::new(),
            };
            return Err(format!(
                "RDMA device {} has no queue pair left: {}{how}",
                domain.name,
                words::errno(opened)
            ));
        }
        let memory = Arc::new(AlignedBuffer::new(memory_len));
        // From here on all that there is goes with the link.
        let mut link = Link {
            queue,
            queue_fd,
            windows: Vec::with_capacity(windows),
            region: std::ptr::null_mut(),
            keys: Keys::default(),
            memory,
            end: self,
            domain,
        };
        (link.region, link.keys) = link.domain.register(link.memory.as_ptr() as usize, link.memory.len())?;
        for _ in 0..windows {
            let (mut window, mut key) = (std::ptr::null_mut(), 0);
            // SAFETY: a domain of ours, and room for the results.
            let made = unsafe { (table.window_open)(link.domain.raw(), &raw mut window, &raw mut key) };
            if made < 0 {
                return Err(format!(
                    "RDMA device {} has no memory window left: {}, want fewer reactors or paths (it has {})",
                    link.domain.name,
                    words::errno(made),
                    link.domain.attributes.windows_max
                ));
            }
            link.windows.push((window, key));
        }
        Ok(link)
    }
}

/// See the module's text. Field order is drop order, after what `drop` itself does.
pub(crate) struct Link {
    queue: *mut Queue,
    queue_fd: i32,
    /// And their first names.
    pub(crate) windows: Vec<(*mut Window, u32)>,
    pub(crate) region: *mut Region,
    pub(crate) keys: Keys,
    pub(crate) memory: Arc<AlignedBuffer>,
    pub(crate) end: End,
    pub(crate) domain: Arc<Domain>,
}

// SAFETY: handles, used by whoever owns this: one thread at a time.
unsafe impl Send for Link {}

impl Link {
    fn table(&self) -> &'static Table {
        self.end.table()
    }

    /// Readable when [`Link::arm`] was called and something has completed since.
    pub(crate) fn queue_fd(&self) -> i32 {
        self.queue_fd
    }

    pub(crate) fn connect(&mut self, parameters: &ConnectParameters) -> Result<(), i32> {
        // SAFETY: a handle of ours; the parameters name bytes that are there.
        result(unsafe { (self.table().connect)(self.end.id.raw, &raw const *parameters) })
    }

    pub(crate) fn accept(&mut self, parameters: &ConnectParameters) -> Result<(), i32> {
        // SAFETY: as in `connect`.
        result(unsafe { (self.table().accept)(self.end.id.raw, &raw const *parameters) })
    }

    /// Posts requests with one doorbell. On an error, how many were posted.
    ///
    /// # Safety
    /// What they name is valid until they have completed, or the link was dropped.
    pub(crate) unsafe fn post_sends(&mut self, requests: &[SendRequest]) -> Result<(), (usize, i32)> {
        let (mut posted, len) = (0, u32::try_from(requests.len()).unwrap_or(0));
        // SAFETY: a handle of ours, requests, and room for a number; the caller keeps what they name.
        let code = unsafe { (self.table().post_send)(self.queue, requests.as_ptr(), len, &raw mut posted) };
        result(code).map_err(|code| (posted as usize, code))
    }

    /// The same for receives.
    ///
    /// # Safety
    /// As there.
    pub(crate) unsafe fn post_receives(&mut self, requests: &[ReceiveRequest]) -> Result<(), (usize, i32)> {
        let (mut posted, len) = (0, u32::try_from(requests.len()).unwrap_or(0));
        // SAFETY: as in `post_sends`.
        let code =
            unsafe { (self.table().post_receive)(self.queue, requests.as_ptr(), len, &raw mut posted) };
        result(code).map_err(|code| (posted as usize, code))
    }

    /// Takes completions; returns how many.
    pub(crate) fn poll(&mut self, out: &mut [WorkCompletion]) -> Result<usize, i32> {
        let len = u32::try_from(out.len()).unwrap_or(u32::MAX);
        // SAFETY: a handle of ours, and room for as many.
        let count = unsafe { (self.table().poll)(self.queue, out.as_mut_ptr(), len) };
        result(count)?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// Asks for a wake-up by the next completion. Whoever asks polls once more.
    pub(crate) fn arm(&mut self) -> Result<(), i32> {
        // SAFETY: a handle of ours.
        result(unsafe { (self.table().arm)(self.queue) })
    }

    /// Ends what is under way: it completes as flushed, and peers reach nothing any more. The other end is told, and not waited for.
    pub(crate) fn fail(&mut self) {
        // SAFETY: handles of ours. A queue pair that cannot be told so is taken away next; an end that is not connected has nobody
        // to tell.
        unsafe {
            (self.table().queue_error)(self.queue);
            (self.table().disconnect)(self.end.id.raw);
        }
    }

    /// Ends it, and gives what still completed: `is_last` says of each whether it was the last to come. Slow: never on a reactor's
    /// thread.
    pub(crate) fn close(mut self, mut is_last: impl FnMut(&WorkCompletion) -> bool) -> Vec<WorkCompletion> {
        self.fail();
        let mut last = Vec::new();
        let since = Instant::now();
        let mut room = [WorkCompletion::NONE; 32];
        let mut done = false;
        while !done && since.elapsed() < FLUSH_MAX {
            match self.poll(&mut room) {
                Err(_) => break,
                Ok(0) => std::thread::sleep(FLUSH_STEP),
                Ok(count) => {
                    for completion in &room[..count] {
                        done = is_last(completion);
                        last.push(*completion);
                    }
                }
            }
        }
        if !done {
            log::debug!(
                "RDMA device {}: a queue pair was taken away before it was flushed",
                self.domain.name
            );
        }
        last
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let table = self.table();
        self.fail();
        // SAFETY: all of these are ours, once. The queue pair is in error, so that no peer comes through a window; a window that is
        // bound holds on to its queue pair (Soft-RoCE waits for them), so windows go first. The queue pair's end is the end of every
        // use of memory.
        unsafe {
            for (window, _) in self.windows.drain(..) {
                (table.window_close)(window);
            }
            (table.queue_close)(self.queue);
            if !self.region.is_null() && (table.deregister)(self.region) < 0 {
                // The device may still know it: its memory must not become something else's.
                std::mem::forget(Arc::clone(&self.memory));
            }
        }
    }
}

/// Drops what takes its time elsewhere than on this reactor.
pub(crate) fn dispose<T: Send + 'static>(runtime: &Runtime, what: T) {
    let held = Arc::new(std::sync::Mutex::new(Some(what)));
    let job = Arc::clone(&held);
    let dispose = move || drop(job.lock().map(|mut what| what.take()));
    if runtime.on_thread("rdma-close", dispose).is_err() {
        // No thread to be had: better late than never.
        drop(held.lock().map(|mut what| what.take()));
    }
}
