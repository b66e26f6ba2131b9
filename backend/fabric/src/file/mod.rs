//! `file:///path`, a regular file or a block device as a device.
//!
//! Owns: opening and locking (`backing`), following the size, and the channels that do the I/O (`channel`). Must not
//! know: who uses it.
//!
//! - A writer holds an open-file-description lock on the descriptor that its I/O goes through. The kernel lets go of it
//!   when the last reference to that description ends, and an operation in an io_uring is such a reference: a successor
//!   that has got the lock sees no write of a dead process land after its own.
//! - I/O is `O_DIRECT` where the file system can do it in units of the block size. Payload that direct I/O cannot take
//!   where it lies goes through a pooled bounce buffer, and is counted.
//! - Files on tmpfs and ramfs are read and written by plain system calls on the reactor's thread: there is no device to
//!   wait for, and io_uring would hand each request to a kernel thread, because these file systems do not promise not to
//!   block. Measured on Linux 6.18 with fio, 4k random reads, queue depth 32: 188k IOPS through io_uring, 410k and more by
//!   plain calls; 128k at depth 8: 10.9k against 23k. Copying through a mapping of the file would be faster still (4k: 0.29
//!   against 1.04 µs, 128k: 10 against 28 µs), but a file that somebody else truncates, or a full tmpfs, would then be a
//!   SIGBUS instead of an error, and reading a hole would allocate it.
//! - Growth is followed ([`FileDevice::refresh`], once a second by itself); a file that shrank fails until it is opened
//!   again.

mod backing;
mod channel;
#[cfg(test)]
mod tests;

use backing::Backing;
use channel::FileChannel;
use hawser_block::{
    BlockSize, Channel, Counter, Device, DeviceState, DiscardLimits, Geometry, StatsSet, WriteZeroesLimits,
};
use hawser_runtime::{Runtime, SourceId};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::Duration;

/// How long a writer waits for the writer before it: a process that was killed is gone when its last I/O has ended.
const LOCK_WAIT: Duration = Duration::from_secs(30);
/// How often the size is looked at.
const REFRESH_INTERVAL: Duration = Duration::from_secs(1);
/// The most that one discard or write-zeroes covers. They run on kernel threads; bounded so that they end.
const ZERO_BYTES_MAX: u64 = 1 << 30;

/// How to open a file.
#[derive(Clone, Copy, Debug)]
pub struct FileOptions {
    /// The unit of addressing.
    pub block_size: BlockSize,
    /// Refuse writes, and take no lock.
    pub read_only: bool,
}

/// A file, or a block device, as a device.
pub struct FileDevice {
    name: String,
    shared: Arc<Shared>,
    stats: Arc<StatsSet>,
    /// Its end tells the watching thread to end.
    _watch: mpsc::Sender<()>,
}

/// What the device, its channels and the watching thread share.
struct Shared {
    path: PathBuf,
    backing: Backing,
    /// Everything but the size, which is `blocks`.
    geometry: Geometry,
    blocks: AtomicU64,
    /// The file shrank: nothing on it can be trusted.
    failed: AtomicBool,
    trouble: RwLock<String>,
    listeners: Mutex<Vec<Box<dyn Fn() + Send + Sync>>>,
    bounced: Counter,
    bounced_bytes: Counter,
}

impl FileDevice {
    /// Opens `path`. A writer waits up to 30 s for the lock of the writer before it: not to be called on a reactor.
    ///
    /// # Errors
    /// When it cannot be opened or locked, is neither a file nor a block device, or its size is not a multiple of the
    /// block size: one line for people that names the path.
    pub fn open(name: &str, path: &Path, options: FileOptions) -> Result<FileDevice, String> {
        FileDevice::open_waiting(name, path, options, LOCK_WAIT)
    }

    fn open_waiting(
        name: &str,
        path: &Path,
        options: FileOptions,
        wait: Duration,
    ) -> Result<FileDevice, String> {
        let block_size = options.block_size;
        let named = |trouble: String| format!("{}: {trouble}", path.display());
        let (backing, size) = Backing::open(path, options, wait).map_err(named)?;
        let blocks = crate::leaf::blocks_of(size, block_size).map_err(named)?;
        let mut geometry = Geometry::new(block_size, blocks);
        geometry.physical_block_bytes = backing.physical_block_bytes.max(block_size.bytes());
        geometry.read_only = options.read_only;
        geometry.volatile_cache = !options.read_only;
        let blocks_max = u32::try_from(ZERO_BYTES_MAX >> block_size.shift()).unwrap_or(u32::MAX);
        if backing.can_punch && !options.read_only {
            let granularity_blocks = geometry.physical_block_bytes >> block_size.shift();
            geometry.discard = Some(DiscardLimits { blocks_max, granularity_blocks, reads_zeroes: true });
        }
        if (backing.can_punch || backing.can_zero) && !options.read_only {
            geometry.write_zeroes = Some(WriteZeroesLimits { blocks_max, may_unmap: backing.can_punch });
        }
        let shared = Arc::new(Shared {
            path: path.to_owned(),
            backing,
            geometry,
            blocks: AtomicU64::new(blocks),
            failed: AtomicBool::new(false),
            trouble: RwLock::default(),
            listeners: Mutex::default(),
            bounced: Counter::default(),
            bounced_bytes: Counter::default(),
        });
        let (watch, stop) = mpsc::channel();
        let watched = Arc::downgrade(&shared);
        std::thread::Builder::new()
            .name("file-size".to_owned())
            .spawn(move || {
                while stop.recv_timeout(REFRESH_INTERVAL) == Err(RecvTimeoutError::Timeout) {
                    let Some(shared) = watched.upgrade() else { return };
                    shared.refresh();
                }
            })
            .map_err(|error| named(format!("no thread to watch its size: {error}")))?;
        Ok(FileDevice { name: name.to_owned(), shared, stats: Arc::default(), _watch: watch })
    }

    /// Looks at the size now: growth is taken over, shrinkage fails the device.
    pub fn refresh(&self) {
        self.shared.refresh();
    }

    /// Whether I/O bypasses the page cache.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.shared.backing.direct.is_some()
    }

    /// How many requests went through a bounce buffer.
    #[must_use]
    pub fn bounced_requests(&self) -> u64 {
        self.shared.bounced.get()
    }
}

impl Shared {
    fn geometry_now(&self) -> Geometry {
        Geometry { blocks: self.blocks.load(Ordering::Relaxed), ..self.geometry }
    }

    fn refresh(&self) {
        let blocks = self.blocks.load(Ordering::Relaxed);
        let shift = self.geometry.block_size.shift();
        let trouble = match self.backing.size() {
            Ok(size) if size >> shift < blocks => {
                self.failed.store(true, Ordering::Relaxed);
                format!("shrank from {} to {size} bytes; it fails until it is opened again", blocks << shift)
            }
            Ok(size) => {
                let broken = size != size >> shift << shift;
                self.blocks.store(size >> shift, Ordering::Relaxed);
                match (broken, self.failed.load(Ordering::Relaxed)) {
                    (_, true) => return,
                    (true, _) => format!(
                        "grew to {size} bytes, not a multiple of the block size {}: the rest is not used",
                        self.geometry.block_size.bytes()
                    ),
                    (false, _) => String::new(),
                }
            }
            Err(error) => format!("its size cannot be read: {error}"),
        };
        let mut current = self.trouble.write().unwrap_or_else(PoisonError::into_inner);
        let news = *current != trouble;
        if news && !trouble.is_empty() {
            log::warn!("device {}: {trouble}", self.path.display());
        }
        *current = trouble;
        drop(current);
        if news || self.blocks.load(Ordering::Relaxed) != blocks {
            for listener in self.listeners.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                listener();
            }
        }
    }
}

/// The kernel's name for its boot: a UUID as text.
fn boot_id(text: &str) -> Option<[u8; 16]> {
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    u128::from_str_radix(&digits, 16).ok().filter(|_| digits.len() == 32).map(u128::to_be_bytes)
}

impl Device for FileDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn geometry(&self) -> Option<Geometry> {
        Some(self.shared.geometry_now())
    }

    fn state(&self) -> DeviceState {
        if self.shared.failed.load(Ordering::Relaxed) { DeviceState::Failed } else { DeviceState::Ready }
    }

    fn trouble(&self) -> String {
        if self.state() == DeviceState::Ready {
            return String::new();
        }
        let trouble = self.shared.trouble.read().unwrap_or_else(PoisonError::into_inner);
        format!("{}: {trouble}", self.shared.path.display())
    }

    /// Not known: a file carries no identity of its own.
    fn uuid(&self) -> [u8; 16] {
        [0; 16]
    }

    /// The kernel's page cache and the disk's own: what we wrote outlives this process, not the host's next boot.
    fn cache_identity(&self) -> Option<[u8; 16]> {
        static BOOT: OnceLock<Option<[u8; 16]>> = OnceLock::new();
        *BOOT.get_or_init(|| boot_id(&std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?))
    }

    fn subscribe(&self, listener: Box<dyn Fn() + Send + Sync>) {
        self.shared.listeners.lock().unwrap_or_else(PoisonError::into_inner).push(listener);
    }

    fn channel(&self, runtime: &Runtime, user: SourceId) -> Box<dyn Channel> {
        Box::new(FileChannel::open(Arc::clone(&self.shared), self.stats.writer(runtime), runtime, user))
    }

    fn stats(&self) -> Arc<StatsSet> {
        Arc::clone(&self.stats)
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![("bounced_requests", self.bounced_requests())]
    }

    fn copied_bytes(&self) -> Vec<(&'static str, u64)> {
        vec![("unaligned", self.shared.bounced_bytes.get())]
    }
}
