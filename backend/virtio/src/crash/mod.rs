//! The crash record: which request each reactor was working on, kept in a file that outlives the process.
//!
//! A request that kills us would be replayed by the next process, kill that too, and so on for ever. So each reactor notes
//! what it works on (plain stores into a shared mapping), and only the handler of our own fatal signals
//! (SIGSEGV, SIGBUS, SIGILL, SIGABRT; a panic aborts) marks the note. SIGKILL, SIGTERM and the OOM killer mark nothing, nor
//! does a signal that another process sends. The next process reads the mark: the same request twice sets its disk aside.
//!
//! A request is known by disk, queue, in-flight log, head and the log's counter for it, which a replay keeps. What a crash is
//! blamed on:
//! - in a queue's turn: the request of its note, or while a batch is handed to the device all of that batch. A replay hands
//!   over one by one, so that the second crash is exact.
//! - elsewhere on a reactor (a device's own work): the request that is being replayed there, if it is one alone. If none is,
//!   nobody knows; but what is replayed next was in flight then, so that a crash during its replay is its second. With several
//!   nobody knows either: a replay stands for as long as its device is away, so most of them are innocent.
//!
//! The last is a heuristic. A lone replay that waits for its device is blamed for what else crashes twice on its reactor; a
//! request that kills us outside of its queue's turn, always while others are replayed beside it, is never found.
//!
//! What lies where is [`layout`]'s.

mod layout;

pub(crate) use layout::{Recorder, Replay, mark};

use layout::{CURRENT, FILE_BYTES, Layout, MAGIC, Noted, VERSION};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};
use std::{fmt, ptr};

/// The longest name that a disk can have here, in bytes.
pub const NAME_BYTES_MAX: usize = layout::NAME_BYTES_MAX;

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

    /// Takes all notes, and judges.
    fn classify(&self) -> Option<Crash> {
        let layout = self.layout;
        let mut crashed = None;
        for (reactor, note) in (0u32..).zip(&layout.reactors) {
            let signal = note.signal.swap(0, Ordering::AcqRel);
            let noted = note.take();
            if signal != 0 && crashed.is_none() {
                crashed = Some((signal, reactor, noted));
            }
        }
        let replays: Vec<(u32, Noted)> =
            layout.replays.iter().filter_map(|note| note.take_replay()).collect();
        let unknown = layout.unknown.swap(0, Ordering::AcqRel);
        let other = layout.other_signal.swap(0, Ordering::AcqRel);
        let Some((signal, reactor, noted)) = crashed else {
            return (other != 0).then_some(Crash { signal: other, request: None });
        };
        let here: Vec<Noted> =
            replays.into_iter().filter(|(at, _)| *at == reactor).map(|(_, noted)| noted).collect();
        // Of several replays most only wait for their devices: to blame one of them would be a guess.
        let alone = if let [replayed] = here[..] { Some(replayed) } else { None };
        let Some(suspect) = noted.or(alone) else {
            layout.unknown.store(reactor + 1, Ordering::Release);
            return Some(Crash { signal, request: None });
        };
        let was_in_flight = unknown == reactor + 1 && here.iter().any(|replayed| replayed.is_same(&suspect));
        let again = was_in_flight || layout.last.take().is_some_and(|last| last.is_same(&suspect));
        layout.last.put(&suspect);
        let request = self.crashed_request(&suspect, again);
        if again && request.is_some() {
            let disk = usize::try_from(suspect.disk).ok().and_then(|disk| layout.disks.get(disk));
            disk.inspect(|disk| disk.set_aside.store(1, Ordering::Release));
        }
        Some(Crash { signal, request })
    }

    fn crashed_request(&self, noted: &Noted, again: bool) -> Option<CrashedRequest> {
        let disk = self.name(usize::try_from(noted.disk).ok()?)?;
        Some(CrashedRequest { disk, queue: noted.queue, head: noted.head, counters: noted.counters, again })
    }

    /// Makes room in the table: only disks that are set aside, and the last crash's, need their names kept.
    fn forget_names(&self) {
        let kept = self.layout.last.get().map(|last| last.disk);
        for (index, entry) in (0u32..).zip(&self.layout.disks) {
            if entry.set_aside.load(Ordering::Relaxed) == 0 && kept != Some(index) {
                entry.name_bytes.store(0, Ordering::Relaxed);
            }
        }
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
        (0..layout::DISKS_MAX).find(|index| self.name(*index).as_deref() == Some(name))
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
            let free = (0..layout::DISKS_MAX).find(|index| self.name(*index).is_none())?;
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
        (0..layout::DISKS_MAX)
            .filter(|index| self.layout.disks[*index].set_aside.load(Ordering::Acquire) != 0)
            .filter_map(|index| self.name(index))
            .collect()
    }

    /// Lets a disk be served again, and forgets the crash that it was set aside for.
    pub fn resume(&self, name: &str) {
        let _table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(index) = self.find(name) else { return };
        self.layout.disks[index].set_aside.store(0, Ordering::Release);
        let last = &self.layout.last;
        if last.get().is_some_and(|last| usize::try_from(last.disk) == Ok(index)) {
            last.take();
        }
    }

    /// Forgets earlier crashes: this process has ended in order, so none of their requests is left to kill the next one.
    pub fn end_in_order(&self) {
        self.layout.last.take();
        self.layout.unknown.store(0, Ordering::Release);
    }

    /// The pen of one queue, for the reactor of this number in the daemon. `log` names the in-flight log.
    pub(crate) fn recorder(&self, reactor: usize, disk: u32, queue: u16, log: u64) -> Recorder {
        Recorder::new(self.layout, reactor, disk, queue, log)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A process that replays a request of each of these disks (each as: its name, its reactor, the request's counter), and is
    /// killed by a crash of reactor 0 outside of any queue's turn, or from outside. What was found at its start.
    fn life(path: &Path, replays: &[(&str, usize, u64)], crash: bool) -> (Option<Crash>, Vec<String>) {
        let (file, found) = CrashFile::open(path).unwrap();
        for (name, reactor, counter) in replays {
            let recorder = file.recorder(*reactor, file.disk(name).unwrap(), 0, 77);
            // Two turns of its queue: the note of the second stays, that of the turn does not.
            let replay = recorder.replay();
            for counter in [counter - 1, *counter] {
                recorder.queue();
                recorder.request(3, counter);
                replay.begin(3, counter);
                recorder.idle();
            }
            std::mem::forget(replay);
        }
        if crash {
            file.layout.reactors[0].signal.store(11, Ordering::Release);
        }
        (found, file.set_aside())
    }

    /// Two crashes that were not theirs set all disks aside whose replays only waited for a device that was away.
    #[test]
    fn of_several_replays_nobody_is_blamed_and_at_most_one_disk_is_set_aside_by_a_crash() {
        struct Removed(PathBuf);
        impl Drop for Removed {
            fn drop(&mut self) {
                let _ = std::fs::remove_file(&self.0);
            }
        }
        let removed = Removed(std::env::temp_dir().join(format!("hv-crash-{}", std::process::id())));
        let path = removed.0.clone();
        let several = [("a", 0, 5), ("b", 0, 8), ("c", 1, 9)];
        assert_eq!(life(&path, &several, true), (None, vec![]));
        for _ in 0..4 {
            let (found, aside) = life(&path, &several, true);
            assert_eq!((found.unwrap().request, aside), (None, vec![]));
        }
        // a has ended: b is alone on the reactor of the crash, and was in flight at the last one.
        let (found, aside) = life(&path, &[("b", 0, 8), ("c", 1, 9)], true);
        assert_eq!((found.unwrap().request, aside), (None, vec![]));
        let (found, aside) = life(&path, &[("a", 0, 6)], true);
        let request = found.unwrap().request.unwrap();
        assert_eq!((request.disk.as_str(), request.counters, request.again), ("b", (8, 8), true));
        assert_eq!(aside, ["b"]);
        // The crash before was in b: for a this was the first.
        let (found, aside) = life(&path, &[], false);
        let request = found.unwrap().request.unwrap();
        assert_eq!((request.disk.as_str(), request.again), ("a", false));
        assert_eq!(aside, ["b"]);
        // A kill from outside says nothing, and leaves no replay behind.
        assert_eq!(life(&path, &[], false), (None, vec!["b".to_owned()]));
    }
}
