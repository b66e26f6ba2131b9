//! The in-flight log: which requests a queue has begun and not shown as used, in memory that the front end keeps for us.
//!
//! The layout is the vhost-user specification's ("Inflight I/O tracking", split virtqueue), one region per queue, each
//! rounded up to 64 bytes, then 64 bytes of our own that the front end does not look at:
//!
//! ```text
//! 0  features u64   8 version u16   10 desc_num u16   12 last_batch_head u16   14 used_idx u16
//! 16 + 16 i:  inflight u8, 5 bytes, next u16, counter u64
//! behind the last queue:  magic u64, version u32, write_through u32, the log's own number u64
//! ```
//!
//! Order of stores. A request begins: counter, inflight = 1. A batch ends: for each, next = last_batch_head and
//! last_batch_head = head; used.idx; for each, inflight = 0; used_idx. Whatever store is the last before our death, the
//! successor finds every request either shown as used or marked, and none twice ([`QueueLog::recover`]).
//!
//! The front end could write here: all of it is checked before it is used.

use crate::mapping::{Mapping, MappingError};
use crate::message::InflightDescription;
use crate::ring::SIZE_MAX;
use crate::shared;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

const VERSION: u16 = 1;
const HEAD_BYTES: usize = 16;
const ENTRY_BYTES: usize = 16;
const ALIGNMENT: usize = 64;

const OWN_BYTES: usize = 64;
const OWN_MAGIC: u64 = u64::from_le_bytes(*b"hawserIF");
const OWN_VERSION: u32 = 1;

/// Why a log cannot be used.
#[derive(Debug)]
pub(crate) enum LogError {
    Dimensions { queues: u16, queue_size: u16 },
    TooSmall { bytes: u64, needed: u64 },
    PastEnd { file_bytes: u64 },
    Map(io::Error),
    UnknownVersion { queue: u16, version: u16 },
    DescNum { queue: u16, found: u16, right: u16 },
}

impl fmt::Display for LogError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LogError::Dimensions { queues, queue_size } => write!(
                f,
                "in-flight log: {queues} queues of {queue_size}; sizes up to {SIZE_MAX} would be right"
            ),
            LogError::TooSmall { bytes, needed } => {
                write!(f, "in-flight log: mmap size {bytes}; {needed} are needed")
            }
            LogError::PastEnd { file_bytes } => {
                write!(f, "in-flight log: it is past the end of its file ({file_bytes} bytes)")
            }
            LogError::Map(error) => write!(f, "in-flight log: {error}"),
            LogError::UnknownVersion { queue, version } => {
                write!(f, "in-flight log of queue {queue}: version {version}; this program knows {VERSION}")
            }
            LogError::DescNum { queue, found, right } => {
                write!(f, "in-flight log of queue {queue}: desc_num {found}; {right} would be right")
            }
        }
    }
}

/// The mapped log of all queues.
#[derive(Debug)]
pub(crate) struct InflightArea {
    mapping: Mapping,
    start: usize,
    queues: u16,
    queue_size: u16,
    has_own: bool,
    id: u64,
}

/// A random number that is not 0.
pub(crate) fn random() -> u64 {
    loop {
        let mut bytes = [0u8; 8];
        // SAFETY: 8 writable bytes. A call that failed is tried again.
        let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        let number = u64::from_ne_bytes(bytes);
        if got == 8 && number != 0 {
            return number;
        }
    }
}

fn queue_bytes(queue_size: u16) -> usize {
    (HEAD_BYTES + ENTRY_BYTES * usize::from(queue_size)).next_multiple_of(ALIGNMENT)
}

impl InflightArea {
    /// Makes a new log and its file.
    pub(crate) fn create(
        queues: u16,
        queue_size: u16,
    ) -> Result<(Arc<InflightArea>, OwnedFd, InflightDescription), LogError> {
        let bytes = queue_bytes(queue_size) * usize::from(queues) + OWN_BYTES;
        let os_error = || LogError::Map(io::Error::last_os_error());
        // SAFETY: a literal C string and plain system calls; the descriptor is ours from here on.
        let file = unsafe {
            let fd =
                libc::memfd_create(c"hawser-inflight".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
            if fd < 0 {
                return Err(os_error());
            }
            OwnedFd::from_raw_fd(fd)
        };
        let size = i64::try_from(bytes).unwrap_or(i64::MAX);
        // SAFETY: plain system calls on our own descriptor. Nobody shall truncate the log under us.
        unsafe {
            if libc::ftruncate(file.as_raw_fd(), size) != 0
                || libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW)
                    != 0
            {
                return Err(os_error());
            }
        }
        let description = InflightDescription { bytes: bytes as u64, file_offset: 0, queues, queue_size };
        let area = InflightArea::map(description, &file)?;
        Ok((area, file, description))
    }

    /// Maps a log that a front end gives us back.
    pub(crate) fn map(
        description: InflightDescription,
        file: &OwnedFd,
    ) -> Result<Arc<InflightArea>, LogError> {
        let InflightDescription { bytes, file_offset, queues, queue_size } = description;
        if queues == 0 || queue_size == 0 || queue_size > SIZE_MAX {
            return Err(LogError::Dimensions { queues, queue_size });
        }
        // A log of ours has room for the largest ring, whatever queue size the front end remembers with it.
        let ours = queue_bytes(SIZE_MAX) * usize::from(queues) + OWN_BYTES;
        let queue_size = if bytes == ours as u64 { SIZE_MAX } else { queue_size };
        let needed = queue_bytes(queue_size) * usize::from(queues);
        if bytes < needed as u64 {
            return Err(LogError::TooSmall { bytes, needed: needed as u64 });
        }
        if !file_offset.is_multiple_of(8) {
            return Err(LogError::Map(io::Error::from_raw_os_error(libc::EINVAL)));
        }
        let mapping = Mapping::new(file, file_offset, bytes).map_err(|error| match error {
            MappingError::PastEnd { file_bytes } => LogError::PastEnd { file_bytes },
            MappingError::Full => LogError::Map(io::Error::from_raw_os_error(libc::ENOSPC)),
            MappingError::Map(error) => LogError::Map(error),
        })?;
        let start = mapping.wanted();
        let has_own = bytes >= (needed + OWN_BYTES) as u64;
        let mut area = InflightArea { mapping, start, queues, queue_size, has_own, id: 0 };
        area.id = area.number();
        Ok(Arc::new(area))
    }

    /// Whether the front end took the log away under us.
    pub(crate) fn faulted(&self) -> bool {
        self.mapping.faulted()
    }

    /// The log of one queue, as it is. `None` when the log has no such queue.
    pub(crate) fn queue(self: &Arc<Self>, queue: u16) -> Option<QueueLog> {
        let start = self.start + queue_bytes(self.queue_size) * usize::from(queue);
        (queue < self.queues).then(|| QueueLog {
            area: Arc::clone(self),
            start: start as *mut u8,
            queue,
            size: self.queue_size,
            counter: 0,
        })
    }

    /// How many queues it has room for.
    pub(crate) fn queues(&self) -> u16 {
        self.queues
    }

    fn own(&self) -> *mut u8 {
        (self.start + queue_bytes(self.queue_size) * usize::from(self.queues)) as *mut u8
    }

    /// Whether our predecessor was told to write through; `None` when it left no word.
    pub(crate) fn write_through(&self) -> Option<bool> {
        // SAFETY: our own part is mapped when `has_own` says so, and aligned to 8 bytes.
        let (magic, version, value) = unsafe {
            if !self.has_own {
                return None;
            }
            let own = self.own();
            (
                shared::load_u64(own.cast()),
                shared::load_u32(own.add(8).cast()),
                shared::load_u32(own.add(12).cast()),
            )
        };
        (magic == OWN_MAGIC && version == OWN_VERSION).then_some(value != 0)
    }

    /// The log's own number, by which a request is told from one with the same counter in another log: 0 where there is no
    /// room for it. A new log gets one.
    fn number(&self) -> u64 {
        if !self.has_own {
            return 0;
        }
        let at = self.own().wrapping_add(16).cast();
        // SAFETY: within our own part, which is mapped when `has_own` says so, and aligned to 8 bytes.
        unsafe {
            if shared::load_u64(at) == 0 {
                shared::store_u64(at, random());
            }
            shared::load_u64(at)
        }
    }

    /// Leaves word for our successor.
    pub(crate) fn set_write_through(&self, value: bool) {
        if self.has_own {
            // SAFETY: as above.
            unsafe {
                let own = self.own();
                shared::store_u32(own.add(12).cast(), u32::from(value));
                shared::store_u32(own.add(8).cast(), OWN_VERSION);
                shared::store_u64(own.cast(), OWN_MAGIC);
            }
        }
    }
}

/// The log of one queue. Used by one thread at a time.
#[derive(Debug)]
pub(crate) struct QueueLog {
    area: Arc<InflightArea>,
    start: *mut u8,
    queue: u16,
    size: u16,
    counter: u64,
}

// SAFETY: the pointer goes into a mapping that `area` keeps; a log is moved between threads, not shared.
unsafe impl Send for QueueLog {}

/// A request that our predecessor began and did not end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unfinished {
    pub(crate) head: u16,
    pub(crate) counter: u64,
}

impl QueueLog {
    fn version(&self) -> *mut u16 {
        self.start.wrapping_add(8).cast()
    }

    fn desc_num(&self) -> *mut u16 {
        self.start.wrapping_add(10).cast()
    }

    #[inline]
    fn last_batch_head(&self) -> *mut u16 {
        self.start.wrapping_add(12).cast()
    }

    #[inline]
    fn used_idx(&self) -> *mut u16 {
        self.start.wrapping_add(14).cast()
    }

    #[inline]
    fn entry(&self, head: u16) -> *mut u8 {
        assert!(head < self.size, "the queue checks heads against its size, and that against the log's");
        self.start.wrapping_add(HEAD_BYTES + ENTRY_BYTES * usize::from(head))
    }

    /// The log's own number.
    pub(crate) fn id(&self) -> u64 {
        self.area.id
    }

    /// The number of entries.
    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    /// Whether the front end took the log away under us.
    pub(crate) fn faulted(&self) -> bool {
        self.area.faulted()
    }

    /// Whether any request may be unfinished, before the ring is known.
    pub(crate) fn may_have_unfinished(&self) -> bool {
        // SAFETY: fields and entries of this queue, mapped by `area`; aligned.
        unsafe {
            shared::load_u16(self.version()) == VERSION
                && (0..self.size).any(|head| shared::load_u8(self.entry(head)) == 1)
        }
    }

    /// Makes the log fit the ring as it is found, and says what is to be executed again, in order of the counters.
    /// `used_idx` and `available_idx` are the ring's, `ring_size` at most the log's size.
    ///
    /// A log that cannot be this ring's (the driver has begun afresh without a reset of the log) is emptied.
    pub(crate) fn recover(
        &mut self,
        used_idx: u16,
        available_idx: u16,
        ring_size: u16,
    ) -> Result<Vec<Unfinished>, LogError> {
        // SAFETY: fields of this queue, mapped by `area`; aligned.
        let (version, desc_num) =
            unsafe { (shared::load_u16(self.version()), shared::load_u16(self.desc_num())) };
        match version {
            0 => {
                // SAFETY: as above. The version comes last: without it nothing else counts.
                unsafe {
                    for head in 0..self.size {
                        shared::store_u8(self.entry(head), 0);
                    }
                    shared::store_u16(self.desc_num(), self.size);
                    shared::store_u16(self.last_batch_head(), 0);
                    shared::store_u16(self.used_idx(), used_idx);
                    shared::store_u16(self.version(), VERSION);
                }
                return Ok(Vec::new());
            }
            VERSION if desc_num != self.size => {
                return Err(LogError::DescNum { queue: self.queue, found: desc_num, right: self.size });
            }
            VERSION => {}
            version => return Err(LogError::UnknownVersion { queue: self.queue, version }),
        }
        // SAFETY: as above; heads that are read from the log are checked before they are used.
        unsafe {
            let last_batch = used_idx.wrapping_sub(shared::load_u16(self.used_idx()));
            if last_batch != 0 {
                // used.idx was stored and used_idx was not: the last batch's marks may still stand.
                if last_batch <= self.size {
                    let mut head = shared::load_u16(self.last_batch_head());
                    for _ in 0..last_batch {
                        if head >= self.size {
                            break;
                        }
                        shared::store_u8(self.entry(head), 0);
                        head = shared::load_u16(self.entry(head).add(6).cast());
                    }
                } else {
                    self.clear();
                }
                shared::store_u16(self.used_idx(), used_idx);
            }
            let mut unfinished: Vec<Unfinished> = (0..self.size)
                .filter(|head| shared::load_u8(self.entry(*head)) == 1)
                .map(|head| Unfinished { head, counter: shared::load_u64(self.entry(head).add(8).cast()) })
                .collect();
            let fits = unfinished.iter().all(|one| one.head < ring_size)
                && unfinished.len() <= usize::from(available_idx.wrapping_sub(used_idx));
            if !fits {
                self.clear();
                unfinished.clear();
            }
            unfinished.sort_by_key(|one| one.counter);
            // Beyond everything that was ever counted here, finished or not: a request that crashes us must not look like an
            // earlier one that did.
            let counters = (0..self.size).map(|head| shared::load_u64(self.entry(head).add(8).cast()));
            self.counter = counters
                .max()
                .filter(|most| *most != 0 || !unfinished.is_empty())
                .map_or(0, |most| most.wrapping_add(1));
            Ok(unfinished)
        }
    }

    /// Forgets all requests: the device was reset.
    pub(crate) fn clear(&self) {
        for head in 0..self.size {
            // SAFETY: an entry of this queue, mapped by `area`.
            unsafe { shared::store_u8(self.entry(head), 0) };
        }
    }

    /// The counter of the next request.
    #[inline]
    pub(crate) fn next_counter(&self) -> u64 {
        self.counter
    }

    /// A request begins, in the order in which the driver made it available. Returns its counter.
    #[inline]
    pub(crate) fn begin(&mut self, head: u16) -> u64 {
        let counter = self.counter;
        self.counter = counter.wrapping_add(1);
        let entry = self.entry(head);
        // SAFETY: an entry of this queue, mapped by `area`; its counter is aligned.
        unsafe {
            shared::store_u64(entry.add(8).cast(), counter);
            shared::store_u8(entry, 1);
        }
        counter
    }

    /// A request of the batch has ended; used.idx does not show it yet.
    #[inline]
    pub(crate) fn end(&self, head: u16) {
        let entry = self.entry(head);
        // SAFETY: as above; `last_batch_head` is aligned.
        unsafe {
            shared::store_u16(entry.add(6).cast(), shared::load_u16(self.last_batch_head()));
            shared::store_u16(self.last_batch_head(), head);
        }
    }

    /// used.idx is now `used_idx` and shows these requests.
    #[inline]
    pub(crate) fn published(&self, batch: &[u16], used_idx: u16) {
        for head in batch {
            // SAFETY: as above.
            unsafe { shared::store_u8(self.entry(*head), 0) };
        }
        // SAFETY: as above.
        unsafe { shared::store_u16(self.used_idx(), used_idx) };
    }
}
