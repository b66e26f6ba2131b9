//! The crash record: which request each reactor was working on, kept in a file that outlives the process.
//!
//! A request that kills us would be replayed by the next process, kill that too, and so on for ever. So each reactor notes
//! what it works on (plain stores into a shared mapping), and only the handler of our own fatal signals
//! (SIGSEGV, SIGBUS, SIGILL, SIGABRT; a panic aborts) marks the note. SIGKILL, SIGTERM and the OOM killer mark nothing, nor
//! does a signal that another process sends. The next process reads the mark: the same request twice sets its disk aside.
//!
//! ```text
//! 0        magic, version, signal of a thread that is no reactor, the request of the last crash
//! 4096     disks:    128 x 1024 bytes: set aside, length of the name, name
//! 135168   reactors:  64 x  128 bytes: signal, busy, disk, queue, head, counters from..=to
//! ```
//!
//! A request is known by disk, queue, head and the counter of the in-flight log, which a replay keeps. While a batch is
//! handed to the device the note names all of its counters; a replay hands over one by one, so that the second crash is exact.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicPtr, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::{cell::Cell, fmt, ptr};

const MAGIC: u64 = u64::from_le_bytes(*b"hawserCR");
/// Changes with the layout. A file of another version is refused and left as it is.
const VERSION: u32 = 1;
const DISKS_MAX: usize = 1024;
const REACTORS_MAX: usize = 128;
/// The longest name that a disk can have here, in bytes.
pub const NAME_BYTES_MAX: usize = 120;

#[repr(C)]
struct Layout {
    magic: AtomicU64,
    version: AtomicU32,
    /// The signal that killed us on a thread that is no reactor.
    other_signal: AtomicU32,
    /// The request of the last crash, for comparison with the next.
    last: Note,
    _pad: [u8; 4096 - 16 - 64],
    disks: [DiskEntry; DISKS_MAX],
    reactors: [Note; REACTORS_MAX],
}

#[repr(C)]
struct DiskEntry {
    set_aside: AtomicU32,
    name_bytes: AtomicU32,
    name: [AtomicU8; NAME_BYTES_MAX],
}

#[repr(C)]
struct Note {
    signal: AtomicU32,
    /// 1 while a request is being worked on.
    busy: AtomicU32,
    disk: AtomicU32,
    queue: AtomicU32,
    head: AtomicU32,
    _pad: u32,
    counter_from: AtomicU64,
    counter_to: AtomicU64,
    _pad2: [u64; 3],
}

const _: () = assert!(size_of::<Note>() == 64 && size_of::<DiskEntry>() == 128);
const FILE_BYTES: usize = size_of::<Layout>();

/// Why the record cannot be used.
#[derive(Debug)]
pub enum CrashError {
    /// Written by a version that we do not know. It was not touched.
    UnknownVersion {
        /// The file.
        path: PathBuf,
        /// Its version, or 0 when it is no crash record at all.
        found: u32,
    },
    /// The file cannot be had.
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

impl fmt::Display for CrashError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CrashError::UnknownVersion { path, found } => write!(
                f,
                "{}: run state of version {found}; this program knows version {VERSION}; \
                 start the version that wrote it, or move the file away",
                path.display()
            ),
            CrashError::Io { path, error } => write!(f, "{}: {error}", path.display()),
        }
    }
}

impl std::error::Error for CrashError {}

/// How the last process died, if it was by a fault of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Crash {
    /// The signal that killed it.
    pub signal: u32,
    /// What it was working on; `None`: no request.
    pub request: Option<CrashedRequest>,
}

/// The request that a crash happened in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CrashedRequest {
    /// The disk's name.
    pub disk: String,
    /// The queue on that disk.
    pub queue: u32,
    /// The head of its descriptor chain (of a batch: the last one's).
    pub head: u32,
    /// Its counter, or its batch's counters, from..=to.
    pub counters: (u64, u64),
    /// The crash before was in the same request: the disk has been set aside.
    pub again: bool,
}

/// The record's file, mapped. It stays mapped until the process ends, for the signal handler.
pub struct CrashFile {
    layout: &'static Layout,
    /// Serialises changes to the table of disks.
    table: Mutex<()>,
    _file: File,
}

/// Where a thread that is no reactor leaves its signal.
static CURRENT: AtomicPtr<Layout> = AtomicPtr::new(ptr::null_mut());

thread_local! {
    /// The note of the reactor that runs on this thread. No destructor: the handler may read it at any time.
    static NOTE: Cell<*const Note> = const { Cell::new(ptr::null()) };
}

/// In the signal handler: the death that follows is our own fault.
pub(crate) fn mark(signal: i32) {
    let signal = signal.unsigned_abs();
    let note = NOTE.with(Cell::get);
    if !note.is_null() {
        // SAFETY: points into a mapping that is never unmapped.
        unsafe { &*note }.signal.store(signal, Ordering::Release);
        return;
    }
    let layout = CURRENT.load(Ordering::Acquire);
    if !layout.is_null() {
        // SAFETY: as above.
        unsafe { &*layout }.other_signal.store(signal, Ordering::Release);
    }
}

impl CrashFile {
    /// Opens or makes the record at `path`, says how the last process died, and starts afresh. A disk whose request crashed
    /// twice is set aside here.
    ///
    /// The caller makes sure that only one process uses the file.
    ///
    /// # Errors
    /// A record of an unknown version, which is left as it is; or the file cannot be had.
    pub fn open(path: &Path) -> Result<(CrashFile, Option<Crash>), CrashError> {
        let io = |error| CrashError::Io { path: path.to_owned(), error };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_CLOEXEC)
            .open(path)
            .map_err(io)?;
        let found_bytes = file.metadata().map_err(io)?.len();
        let fresh = found_bytes == 0;
        if fresh {
            file.set_len(FILE_BYTES as u64).map_err(io)?;
        } else if found_bytes < 4096 {
            return Err(CrashError::UnknownVersion { path: path.to_owned(), found: 0 });
        }
        // Only the first page is looked at before the version is known.
        // SAFETY: a fresh shared mapping at an address of the kernel's choice.
        let mapped = unsafe {
            libc::mmap(
                ptr::null_mut(),
                FILE_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io(io::Error::last_os_error()));
        }
        // SAFETY: mapped above, page-aligned, never unmapped; only atomics and padding, valid for any bytes.
        let layout = unsafe { &*mapped.cast::<Layout>() };
        let (magic, version) = (layout.magic.load(Ordering::Acquire), layout.version.load(Ordering::Acquire));
        // All zero: a process was killed while it made the file.
        let fresh = fresh || (magic == 0 && version == 0 && found_bytes == FILE_BYTES as u64);
        if !fresh && (magic != MAGIC || version != VERSION || found_bytes != FILE_BYTES as u64) {
            let found = if magic == MAGIC { version } else { 0 };
            // SAFETY: mapped above; the reference is not used again.
            unsafe { libc::munmap(mapped, FILE_BYTES) };
            return Err(CrashError::UnknownVersion { path: path.to_owned(), found });
        }
        let file = CrashFile { layout, table: Mutex::default(), _file: file };
        let crash = if fresh { None } else { file.classify() };
        file.forget_names();
        layout.version.store(VERSION, Ordering::Release);
        layout.magic.store(MAGIC, Ordering::Release);
        CURRENT.store(mapped.cast(), Ordering::Release);
        crate::fault::install();
        Ok((file, crash))
    }

    fn classify(&self) -> Option<Crash> {
        let mut crash = None;
        for note in &self.layout.reactors {
            let signal = note.signal.swap(0, Ordering::AcqRel);
            let busy = note.busy.swap(0, Ordering::AcqRel) != 0;
            if signal != 0 && crash.is_none() {
                crash = Some(Crash { signal, request: busy.then(|| self.compare(note)).flatten() });
            }
        }
        let other = self.layout.other_signal.swap(0, Ordering::AcqRel);
        crash.or_else(|| (other != 0).then_some(Crash { signal: other, request: None }))
    }

    /// Makes room in the table: only disks that are set aside, and the last crash's, need their names kept.
    fn forget_names(&self) {
        let last = &self.layout.last;
        let kept = (last.busy.load(Ordering::Relaxed) != 0).then(|| last.disk.load(Ordering::Relaxed));
        for (index, entry) in (0u32..).zip(&self.layout.disks) {
            if entry.set_aside.load(Ordering::Relaxed) == 0 && kept != Some(index) {
                entry.name_bytes.store(0, Ordering::Relaxed);
            }
        }
    }

    /// The request of `note`, compared with the last crash's, whose place it takes.
    fn compare(&self, note: &Note) -> Option<CrashedRequest> {
        let get = |field: &AtomicU32| field.load(Ordering::Relaxed);
        let counters = |note: &Note| {
            (note.counter_from.load(Ordering::Relaxed), note.counter_to.load(Ordering::Relaxed))
        };
        let last = &self.layout.last;
        let index = usize::try_from(get(&note.disk)).unwrap_or(usize::MAX);
        let disk = self.name(index)?;
        let (from, to) = counters(note);
        let (last_from, last_to) = counters(last);
        let again = get(&last.busy) != 0
            && get(&last.disk) == get(&note.disk)
            && get(&last.queue) == get(&note.queue)
            && from <= last_to
            && last_from <= to
            && (from != to || last_from != last_to || get(&last.head) == get(&note.head));
        if again {
            self.layout.disks[index].set_aside.store(1, Ordering::Release);
        }
        for (to, from) in [(&last.disk, &note.disk), (&last.queue, &note.queue), (&last.head, &note.head)] {
            to.store(get(from), Ordering::Relaxed);
        }
        last.counter_from.store(from, Ordering::Relaxed);
        last.counter_to.store(to, Ordering::Relaxed);
        last.busy.store(1, Ordering::Release);
        Some(CrashedRequest {
            disk,
            queue: get(&note.queue),
            head: get(&note.head),
            counters: (from, to),
            again,
        })
    }

    fn name(&self, index: usize) -> Option<String> {
        let entry = self.layout.disks.get(index)?;
        let len = usize::try_from(entry.name_bytes.load(Ordering::Acquire)).ok()?;
        if len == 0 {
            return None;
        }
        let bytes: Vec<u8> = entry.name.get(..len)?.iter().map(|byte| byte.load(Ordering::Relaxed)).collect();
        String::from_utf8(bytes).ok()
    }

    fn find(&self, name: &str) -> Option<usize> {
        (0..DISKS_MAX).find(|index| self.name(*index).as_deref() == Some(name))
    }

    /// The place of a disk in the record, the same for the same name as long as it matters. `None` when the table is full
    /// (1024 disks), or the name is too long: such a disk is not recorded.
    #[must_use]
    pub fn disk(&self, name: &str) -> Option<u32> {
        let _table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            return None;
        }
        let index = self.find(name).or_else(|| {
            let free = (0..DISKS_MAX).find(|index| self.name(*index).is_none())?;
            let entry = &self.layout.disks[free];
            for (to, from) in entry.name.iter().zip(name.bytes()) {
                to.store(from, Ordering::Relaxed);
            }
            entry.set_aside.store(0, Ordering::Relaxed);
            entry.name_bytes.store(u32::try_from(name.len()).unwrap_or(0), Ordering::Release);
            Some(free)
        })?;
        u32::try_from(index).ok()
    }

    /// Whether this disk was set aside and has not been resumed.
    #[must_use]
    pub fn is_set_aside(&self, name: &str) -> bool {
        self.find(name).is_some_and(|index| self.layout.disks[index].set_aside.load(Ordering::Acquire) != 0)
    }

    /// All disks that are set aside.
    #[must_use]
    pub fn set_aside(&self) -> Vec<String> {
        (0..DISKS_MAX)
            .filter(|index| self.layout.disks[*index].set_aside.load(Ordering::Acquire) != 0)
            .filter_map(|index| self.name(index))
            .collect()
    }

    /// Lets a disk be served again, and forgets the crash that it was set aside for.
    pub fn resume(&self, name: &str) {
        let _table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(index) = self.find(name) else { return };
        self.layout.disks[index].set_aside.store(0, Ordering::Release);
        if usize::try_from(self.layout.last.disk.load(Ordering::Relaxed)) == Ok(index) {
            self.layout.last.busy.store(0, Ordering::Release);
        }
    }

    /// The pen of a reactor, by its number in the daemon.
    pub(crate) fn recorder(&self, reactor: usize) -> Recorder {
        Recorder { note: self.layout.reactors.get(reactor) }
    }
}

/// Writes one reactor's note. Plain stores: the process that reads them comes after this one's death.
#[derive(Clone, Copy)]
pub(crate) struct Recorder {
    note: Option<&'static Note>,
}

impl Recorder {
    /// A pen for a disk that is not recorded.
    pub(crate) fn none() -> Recorder {
        Recorder { note: None }
    }

    /// From now on a fatal signal on this thread marks this note.
    pub(crate) fn adopt_thread(self) {
        if let Some(ours) = self.note {
            NOTE.with(|note| note.set(ours));
        }
    }

    /// A queue begins to work: everything noted until [`Recorder::idle`] is its.
    #[inline]
    pub(crate) fn queue(self, disk: u32, queue: u16) {
        let Some(note) = self.note else { return };
        // What another queue left noted is not this one's.
        note.busy.store(0, Ordering::Relaxed);
        note.disk.store(disk, Ordering::Relaxed);
        note.queue.store(u32::from(queue), Ordering::Relaxed);
    }

    /// It works on this request.
    #[inline]
    pub(crate) fn request(self, head: u16, counter: u64) {
        let Some(note) = self.note else { return };
        note.head.store(u32::from(head), Ordering::Relaxed);
        note.counter_from.store(counter, Ordering::Relaxed);
        note.counter_to.store(counter, Ordering::Relaxed);
        note.busy.store(1, Ordering::Relaxed);
    }

    /// It hands the requests with these counters to the device.
    #[inline]
    pub(crate) fn batch(self, from: u64, to: u64) {
        let Some(note) = self.note else { return };
        note.counter_from.store(from, Ordering::Relaxed);
        note.counter_to.store(to, Ordering::Relaxed);
    }

    /// It works on no request any more.
    #[inline]
    pub(crate) fn idle(self) {
        let Some(note) = self.note else { return };
        note.busy.store(0, Ordering::Relaxed);
    }
}
