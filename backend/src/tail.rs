//! The tail of a pool in a file of the run state: what is acknowledged and not yet durable on the members outlives the process.
//!
//! ```text
//!   0      magic · version · boot · pool       written when the file is made, or used in another boot
//!   64     which half is valid                 one word: storing it is what `replace` does last
//!   72,80  how many bytes are in each half     stored after the bytes
//!   4096   half 0, 2 MiB
//!   ..     half 1, 2 MiB
//! ```
//!
//! Owns: the mapped file. Must not know: what the bytes mean.
//!
//! Invariants:
//! - The file is mapped shared, so that a store is in the page cache at once and no death of the process takes it back. Another
//!   boot may have any mixture of old and new on the disk: there it counts as empty, as what was not flushed may.
//! - All blocks of the file are allocated before anything relies on it: a full file system is an error at the start.
//! - One process has it at a time: whoever opens it holds the daemon's lock.

use hawser_volume::pool::Tail;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

/// Twice the log records of what a busy pool acknowledges between two flushes.
const HALF_BYTES: usize = 2 << 20;
const HEADER_BYTES: usize = 4096;
const FILE_BYTES: usize = HEADER_BYTES + 2 * HALF_BYTES;
/// `hwtail` and the version.
const MAGIC: u64 = u64::from_le_bytes(*b"hwtail\x00\x01");

/// Words of the header.
const WORD_MAGIC: usize = 0;
const WORD_BOOT: usize = 1;
const WORD_POOL: usize = 3;
const WORD_HALF: usize = 8;
const WORD_LEN: [usize; 2] = [9, 10];

/// A tail that outlives the process.
pub(crate) struct FileTail {
    base: NonNull<AtomicU64>,
}

// SAFETY: the mapping belongs to this value alone and does not care which thread touches it.
unsafe impl Send for FileTail {}

/// Where the tail of a pool is.
pub(crate) fn file_of(folder: &Path, pool: &[u8; 16]) -> PathBuf {
    folder.join(format!("pool-{}.tail", hawser_config::value::Uuid(*pool)))
}

/// The kernel's boot, as two words; zeroes where it does not say.
fn boot() -> [u64; 2] {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    text.trim().parse::<hawser_config::value::Uuid>().map_or([0, 0], |uuid| words(&uuid.0))
}

fn words(bytes: &[u8; 16]) -> [u64; 2] {
    let word = |at: usize| {
        let mut word = [0; 8];
        word.copy_from_slice(&bytes[at..at + 8]);
        u64::from_le_bytes(word)
    };
    [word(0), word(8)]
}

impl FileTail {
    /// Opens the tail of `pool`, or makes an empty one, for us alone to read.
    ///
    /// # Errors
    /// When it cannot be had, or is something else: one line.
    pub(crate) fn open(path: &Path, pool: &[u8; 16]) -> Result<FileTail, String> {
        FileTail::open_in(path, pool, boot())
    }

    fn open_in(path: &Path, pool: &[u8; 16], boot: [u64; 2]) -> Result<FileTail, String> {
        let named = |what: &dyn std::fmt::Display| format!("{}: {what}", path.display());
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(|error| named(&format_args!("cannot be opened: {error}")))?;
        let found = file.metadata().map_err(|error| named(&error))?.len();
        // A process may have died, or found the file system full, before all of it was allocated: the magic is put in after that.
        let is_new = found < FILE_BYTES as u64 && has_no_magic(&file).map_err(|error| named(&error))?;
        if !is_new && found != FILE_BYTES as u64 {
            return Err(named(&format_args!(
                "has {found} bytes and is no tail of this program; start the binary that made it, or remove it if what was not \
                 flushed may be lost"
            )));
        }
        allocate(&file).map_err(|error| {
            if is_new {
                // Gives back what it has got; if that fails too, it counts as new all the same.
                let _ = file.set_len(0);
            }
            named(&format_args!("no room for {FILE_BYTES} bytes: {error}"))
        })?;
        let base = map(&file).map_err(|error| named(&format_args!("cannot be mapped: {error}")))?;
        let mut tail = FileTail { base };
        match tail.word(WORD_MAGIC).load(Ordering::Acquire) {
            MAGIC => tail.check(pool).map_err(|what| named(&what))?,
            // Made just now, or by a process that died before it used it.
            0 => {}
            other => return Err(named(&format_args!("is no tail of this program (magic {other:#x})"))),
        }
        tail.begin(pool, boot);
        Ok(tail)
    }

    /// What a tail holds that nobody is to change; empty when there is none.
    ///
    /// # Errors
    /// When it cannot be read, or is something else: one line.
    pub(crate) fn look(path: &Path, pool: &[u8; 16]) -> Result<Vec<u8>, String> {
        let named = |what: &dyn std::fmt::Display| format!("{}: {what}", path.display());
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(named(&format_args!("cannot be opened: {error}"))),
        };
        let mut bytes = vec![0; FILE_BYTES];
        match file.read_exact_at(&mut bytes, 0) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(Vec::new()),
            Err(error) => return Err(named(&format_args!("cannot be read: {error}"))),
        }
        let word = |index: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[8 * index..8 * index + 8]);
            u64::from_le_bytes(word)
        };
        let is_ours = word(WORD_MAGIC) == MAGIC && [word(WORD_POOL), word(WORD_POOL + 1)] == words(pool);
        let now = boot();
        if !is_ours || [word(WORD_BOOT), word(WORD_BOOT + 1)] != now || now == [0, 0] {
            return Ok(Vec::new());
        }
        let half = usize::from(word(WORD_HALF) == 1);
        let len = usize::try_from(word(WORD_LEN[half])).unwrap_or(usize::MAX);
        if len > HALF_BYTES {
            return Err(named(&format_args!("is damaged: {len} bytes in a half of {HALF_BYTES}")));
        }
        let from = HEADER_BYTES + half * HALF_BYTES;
        Ok(bytes[from..from + len].to_vec())
    }

    fn check(&self, pool: &[u8; 16]) -> Result<(), String> {
        let found = [0, 1].map(|at| self.word(WORD_POOL + at).load(Ordering::Acquire));
        if found != words(pool) {
            return Err("is another pool's".to_owned());
        }
        let half = self.word(WORD_HALF).load(Ordering::Acquire);
        let len = WORD_LEN.map(|word| self.word(word).load(Ordering::Acquire));
        if half > 1 || len.iter().any(|len| *len > HALF_BYTES as u64) {
            return Err(format!("is damaged: half {half}, with {} and {} bytes", len[0], len[1]));
        }
        Ok(())
    }

    /// Takes the file over, with what it holds if that is of this boot.
    fn begin(&mut self, pool: &[u8; 16], boot: [u64; 2]) {
        let is_same = [0, 1].map(|at| self.word(WORD_BOOT + at).load(Ordering::Acquire)) == boot;
        // A kernel that does not say which boot it is may be another one.
        let is_same = is_same && boot != [0, 0];
        if self.word(WORD_MAGIC).load(Ordering::Acquire) == MAGIC && is_same {
            return;
        }
        // In this order: without its magic it counts as new, whatever else is there.
        self.word(WORD_MAGIC).store(0, Ordering::Release);
        for word in WORD_LEN.into_iter().chain([WORD_HALF]) {
            self.word(word).store(0, Ordering::Release);
        }
        for (first, value) in [(WORD_BOOT, boot), (WORD_POOL, words(pool))] {
            for (at, value) in value.into_iter().enumerate() {
                self.word(first + at).store(value, Ordering::Release);
            }
        }
        self.word(WORD_MAGIC).store(MAGIC, Ordering::Release);
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        assert!(8 * index < HEADER_BYTES, "a word of the header");
        // SAFETY: the header is mapped as long as `self` lives, page-aligned, and touched by atomic operations only; the index is
        // one of the constants above.
        unsafe { self.base.add(index).as_ref() }
    }

    fn half(&self) -> usize {
        usize::from(self.word(WORD_HALF).load(Ordering::Acquire) == 1)
    }

    fn len(&self, half: usize) -> usize {
        let len = usize::try_from(self.word(WORD_LEN[half]).load(Ordering::Acquire));
        len.unwrap_or(HALF_BYTES).min(HALF_BYTES)
    }

    /// Puts `bytes` into a half at `at`, and then says that they are there.
    fn put(&mut self, half: usize, at: usize, bytes: &[u8]) {
        assert!(bytes.len() <= HALF_BYTES - at, "{} bytes behind {at} do not fit into the tail", bytes.len());
        // SAFETY: the range lies in this half (asserted), which is mapped as long as `self` lives; nobody else has the mapping, and
        // `&mut self` means that nobody reads it now. `bytes` is not part of it: `content` gives copies.
        unsafe {
            let to = self.base.cast::<u8>().add(HEADER_BYTES + half * HALF_BYTES + at);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.as_ptr(), bytes.len());
        }
        self.word(WORD_LEN[half]).store((at + bytes.len()) as u64, Ordering::Release);
    }
}

impl Tail for FileTail {
    fn capacity(&self) -> usize {
        HALF_BYTES
    }

    fn content(&self) -> Vec<u8> {
        let half = self.half();
        let mut content = vec![0; self.len(half)];
        // SAFETY: as in `put`; a length is at most that of a half.
        unsafe {
            let from = self.base.cast::<u8>().add(HEADER_BYTES + half * HALF_BYTES);
            std::ptr::copy_nonoverlapping(from.as_ptr(), content.as_mut_ptr(), content.len());
        }
        content
    }

    fn append(&mut self, bytes: &[u8]) {
        let half = self.half();
        self.put(half, self.len(half), bytes);
    }

    fn replace(&mut self, bytes: &[u8]) {
        let other = 1 - self.half();
        self.put(other, 0, bytes);
        self.word(WORD_HALF).store(other as u64, Ordering::Release);
    }
}

impl Drop for FileTail {
    fn drop(&mut self) {
        // SAFETY: made by `map` with this length; nothing of it is used any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), FILE_BYTES) };
    }
}

/// Whether nothing was ever kept in a file that is too short.
fn has_no_magic(file: &File) -> io::Result<bool> {
    let mut magic = [0; 8];
    match file.read_exact_at(&mut magic, 0) {
        Ok(()) => Ok(magic == [0; 8]),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(file.metadata()?.len() == 0),
        Err(error) => Err(error),
    }
}

/// Without its blocks, a store into a mapped file on a full file system is SIGBUS.
fn allocate(file: &File) -> io::Result<()> {
    let bytes = libc::off_t::try_from(FILE_BYTES).map_err(io::Error::other)?;
    // SAFETY: a plain system call without pointers.
    match unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, bytes) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

fn map(file: &File) -> io::Result<NonNull<AtomicU64>> {
    // SAFETY: a fresh shared mapping at an address of the kernel's choice touches nothing that exists.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            FILE_BYTES,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mapped at 0"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const POOL: [u8; 16] = *b"a pool's number.";

    fn place() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = file_of(folder.path(), &POOL);
        (folder, path)
    }

    #[test]
    fn what_was_put_in_is_there_when_it_is_opened_again() {
        let (_folder, path) = place();
        let mut want: Vec<u8> = Vec::new();
        let mut seed = 1u64;
        for round in 0..200u32 {
            let mut tail = FileTail::open(&path, &POOL).unwrap();
            assert_eq!(tail.content(), want, "round {round}");
            assert_eq!(FileTail::look(&path, &POOL).unwrap(), want);
            for _ in 0..3 {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let bytes = vec![seed.to_le_bytes()[6]; usize::try_from(seed >> 48).unwrap() % 5000];
                if seed >> 40 & 3 == 0 || want.len() + bytes.len() > tail.capacity() {
                    tail.replace(&bytes);
                    want = bytes;
                } else {
                    tail.append(&bytes);
                    want.extend(&bytes);
                }
            }
        }
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn it_takes_as_much_as_it_says_and_not_more() {
        let (_folder, path) = place();
        let mut tail = FileTail::open(&path, &POOL).unwrap();
        tail.replace(&vec![7; tail.capacity()]);
        assert_eq!(tail.content(), vec![7; tail.capacity()]);
        let more = std::panic::AssertUnwindSafe(|| tail.append(&[1]));
        assert!(std::panic::catch_unwind(more).is_err());
    }

    #[test]
    fn another_boots_content_does_not_count() {
        let (_folder, path) = place();
        FileTail::open_in(&path, &POOL, [1, 2]).unwrap().replace(b"old");
        assert_eq!(FileTail::open_in(&path, &POOL, [1, 2]).unwrap().content(), b"old");
        assert!(FileTail::look(&path, &POOL).unwrap().is_empty());
        assert!(FileTail::open_in(&path, &POOL, [1, 3]).unwrap().content().is_empty());
        assert!(FileTail::open_in(&path, &POOL, [1, 2]).unwrap().content().is_empty(), "and is gone");
    }

    #[test]
    fn one_that_was_not_allocated_whole_is_new() {
        let (_folder, path) = place();
        for len in [8, 4096, 1 << 20, FILE_BYTES - 1] {
            std::fs::write(&path, vec![0; len]).unwrap();
            let mut tail = FileTail::open(&path, &POOL).unwrap();
            assert!(tail.content().is_empty());
            tail.append(b"kept");
            drop(tail);
            assert_eq!(FileTail::open(&path, &POOL).unwrap().content(), b"kept");
            std::fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn without_a_boots_name_nothing_is_of_this_boot() {
        let (_folder, path) = place();
        FileTail::open_in(&path, &POOL, [0, 0]).unwrap().append(b"old");
        assert!(FileTail::open_in(&path, &POOL, [0, 0]).unwrap().content().is_empty());
    }

    #[test]
    fn something_else_is_refused_and_left_as_it_is() {
        let (_folder, path) = place();
        for (content, want) in [
            (b"x".to_vec(), "has 1 bytes and is no tail of this program"),
            (vec![1; FILE_BYTES], "is no tail of this program (magic 0x101010101010101)"),
        ] {
            std::fs::write(&path, &content).unwrap();
            let error = FileTail::open(&path, &POOL).err().unwrap();
            assert!(error.contains(want) && error.starts_with(&path.display().to_string()), "{error}");
            assert_eq!(std::fs::read(&path).unwrap(), content);
            std::fs::remove_file(&path).unwrap();
        }
        drop(FileTail::open(&path, &POOL).unwrap());
        let error = FileTail::open(&path, &[0; 16]).err().unwrap();
        assert!(error.ends_with("is another pool's"), "{error}");
        let tail = FileTail::open(&path, &POOL).unwrap();
        tail.word(WORD_LEN[1]).store(HALF_BYTES as u64 + 1, Ordering::Relaxed);
        drop(tail);
        let error = FileTail::open(&path, &POOL).err().unwrap();
        assert!(error.contains("is damaged: half 0, with 0 and 2097153 bytes"), "{error}");
    }

    /// Whatever a process was doing when SIGKILL came, the tail holds a state that it had.
    #[test]
    fn a_process_that_is_killed_leaves_a_whole_tail() {
        let (_folder, path) = place();
        for round in 0..20u64 {
            let mut tail = FileTail::open(&path, &POOL).unwrap();
            tail.replace(&[]);
            // SAFETY: the child only stores into memory that is mapped already, until it is killed.
            let child = unsafe { libc::fork() };
            if child == 0 {
                // Each content is one byte value, repeated: first so many, then as many again, then the next value.
                let bytes = [[1u8; 4096], [2; 4096], [3; 4096]];
                loop {
                    for bytes in &bytes {
                        tail.replace(bytes);
                        tail.append(bytes);
                    }
                }
            }
            assert!(child > 0);
            drop(tail);
            std::thread::sleep(std::time::Duration::from_micros(500 + 137 * round));
            // SAFETY: our own child.
            unsafe {
                assert_eq!(libc::kill(child, libc::SIGKILL), 0);
                assert_eq!(libc::waitpid(child, std::ptr::null_mut(), 0), child);
            }
            let content = FileTail::open(&path, &POOL).unwrap().content();
            assert!(matches!(content.len(), 0 | 4096 | 8192), "{} bytes", content.len());
            assert!(content.windows(2).all(|pair| pair[0] == pair[1]), "a mixture");
        }
    }
}
