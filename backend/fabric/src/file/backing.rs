//! The open file: its lock, its size, and what its file system can do, found out without changing a byte of it.

use super::FileOptions;
use hawser_runtime::Fd;
use hawser_runtime::buffers::AlignedBuffer;
use std::fs::{File, OpenOptions};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

/// Between two tries for a lock.
const LOCK_RETRY: Duration = Duration::from_millis(20);
/// `BLKGETSIZE64`, `BLKPBSZGET`, `BLKROGET`: linux/fs.h; libc does not have them all.
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;
const BLKPBSZGET: libc::Ioctl = 0x127b;
const BLKROGET: libc::Ioctl = 0x125e;
/// linux/magic.h.
const RAMFS_MAGIC: u64 = 0x8584_58f6;

/// What direct I/O asks of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alignment {
    /// Of each payload segment's address, in bytes.
    pub(super) memory: usize,
    /// Of offsets and segment lengths, in bytes; at most the block size.
    pub(super) offset: usize,
}

/// An open file or block device.
pub(super) struct Backing {
    /// All I/O goes through this description; it holds the lock.
    file: OwnedFd,
    is_block_device: bool,
    /// `None`: through the page cache.
    pub(super) direct: Option<Alignment>,
    /// The file system is memory: system calls do not wait for a device.
    pub(super) in_memory: bool,
    /// Holes can be punched.
    pub(super) can_punch: bool,
    /// Ranges can be zeroed and stay allocated.
    pub(super) can_zero: bool,
    pub(super) physical_block_bytes: u32,
}

impl Backing {
    /// Opens, locks and examines `path`; its size in bytes comes along.
    ///
    /// # Errors
    /// One line without the path.
    pub(super) fn open(path: &Path, options: FileOptions, wait: Duration) -> Result<(Backing, u64), String> {
        let file = OpenOptions::new()
            .read(true)
            .write(!options.read_only)
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open(path)
            .map_err(|error| format!("cannot be opened: {error}"))?;
        let metadata = file.metadata().map_err(|error| format!("cannot be examined: {error}"))?;
        let is_block_device = metadata.file_type().is_block_device();
        if !is_block_device && !metadata.is_file() {
            return Err("is neither a regular file nor a block device".to_owned());
        }
        let mut backing = Backing {
            file: OwnedFd::from(file),
            is_block_device,
            direct: None,
            in_memory: false,
            can_punch: false,
            can_zero: false,
            physical_block_bytes: u32::try_from(metadata.blksize()).unwrap_or(4096),
        };
        // O_NONBLOCK was for opening what may be a pipe; io_uring would give up where it should wait.
        backing.set_direct(false).map_err(|error| format!("cannot be set up: {error}"))?;
        if !options.read_only {
            if is_block_device && backing.ioctl_int(BLKROGET).unwrap_or(0) != 0 {
                return Err("is a read-only block device; read_only = true would be right".to_owned());
            }
            backing.lock(path, wait)?;
        }
        // Only now: the writer before us may have changed it.
        let size = backing.size().map_err(|error| format!("its size cannot be read: {error}"))?;
        backing.examine(path, options, size)?;
        Ok((backing, size))
    }

    /// The descriptor for I/O.
    pub(super) fn fd(&self) -> Fd {
        Fd(self.file.as_raw_fd())
    }

    /// The size now, in bytes.
    pub(super) fn size(&self) -> io::Result<u64> {
        if self.is_block_device {
            let mut size = 0u64;
            // SAFETY: BLKGETSIZE64 writes a u64.
            let result = unsafe { libc::ioctl(self.file.as_raw_fd(), BLKGETSIZE64, &raw mut size) };
            return if result < 0 { Err(io::Error::last_os_error()) } else { Ok(size) };
        }
        let mut stat = MaybeUninit::<libc::stat>::uninit();
        // SAFETY: fstat fills `stat`, or fails.
        let stat = unsafe {
            if libc::fstat(self.file.as_raw_fd(), stat.as_mut_ptr()) < 0 {
                return Err(io::Error::last_os_error());
            }
            stat.assume_init()
        };
        Ok(u64::try_from(stat.st_size).unwrap_or(0))
    }

    /// An ioctl that fills an int.
    fn ioctl_int(&self, request: libc::Ioctl) -> Option<u32> {
        let mut value = 0;
        // SAFETY: the requests that are passed here write one int.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), request, &raw mut value) };
        if result < 0 { None } else { u32::try_from(value).ok() }
    }

    fn lock(&self, path: &Path, wait: Duration) -> Result<(), String> {
        let begin = Instant::now();
        let mut said = false;
        loop {
            // SAFETY: an all-zero flock is a lock from the start of the file (SEEK_SET) to its end (length 0).
            let mut lock: libc::flock = unsafe { std::mem::zeroed() };
            lock.l_type = libc::c_short::try_from(libc::F_WRLCK).unwrap_or_default();
            // SAFETY: `lock` is a valid flock; l_pid is 0, as an OFD lock must have it.
            if unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES | libc::EINTR)) {
                return Err(format!("cannot be locked: {error}"));
            }
            if begin.elapsed() >= wait {
                let waited = wait.as_secs();
                return Err(format!("another process writes to it, and did not end within {waited} s"));
            }
            if !said {
                said = true;
                log::info!("{}: waiting for the process that writes to it", path.display());
            }
            std::thread::sleep(LOCK_RETRY);
        }
    }

    /// Finds out what can be done with the file.
    fn examine(&mut self, path: &Path, options: FileOptions, size: u64) -> Result<(), String> {
        let mut statfs = MaybeUninit::<libc::statfs>::uninit();
        // SAFETY: fstatfs fills `statfs`, or fails.
        let magic = unsafe {
            if libc::fstatfs(self.file.as_raw_fd(), statfs.as_mut_ptr()) < 0 {
                return Err(format!("its file system cannot be examined: {}", io::Error::last_os_error()));
            }
            u64::try_from(statfs.assume_init().f_type).unwrap_or(0)
        };
        let memory_magics = [u64::try_from(libc::TMPFS_MAGIC).unwrap_or(0), RAMFS_MAGIC];
        // A block device's node may lie on a tmpfs; its content does not.
        self.in_memory = !self.is_block_device && memory_magics.contains(&magic);
        if self.is_block_device {
            self.physical_block_bytes = self.ioctl_int(BLKPBSZGET).unwrap_or(self.physical_block_bytes);
        }
        self.physical_block_bytes = self.physical_block_bytes.clamp(512, 1 << 20);
        if !self.in_memory {
            self.direct = self.try_direct(options);
        }
        if !options.read_only {
            self.probe_zeroing(path, size);
        }
        Ok(())
    }

    /// Switches to direct I/O if the file can be reached so in units of the block size.
    fn try_direct(&self, options: FileOptions) -> Option<Alignment> {
        self.set_direct(true).ok()?;
        let block = options.block_size.bytes() as usize;
        let found = self.stated_alignment().or_else(|| self.tried_alignment());
        let usable = found.filter(|alignment| {
            alignment.offset.is_power_of_two()
                && alignment.memory.is_power_of_two()
                && alignment.offset <= block
        });
        if usable.is_none() && self.set_direct(false).is_err() {
            log::warn!(
                "a file cannot be used with direct I/O, nor be switched back: requests to it may fail"
            );
        }
        usable
    }

    fn set_direct(&self, on: bool) -> io::Result<()> {
        let fd = self.file.as_raw_fd();
        // SAFETY: plain system calls without pointers.
        let result = unsafe {
            let flags = libc::fcntl(fd, libc::F_GETFL) & !libc::O_NONBLOCK;
            let flags = if on { flags | libc::O_DIRECT } else { flags & !libc::O_DIRECT };
            libc::fcntl(fd, libc::F_SETFL, flags)
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// What the kernel says (6.1 and newer, most file systems).
    fn stated_alignment(&self) -> Option<Alignment> {
        let mut statx = MaybeUninit::<libc::statx>::zeroed();
        // SAFETY: the path is an empty C string, as AT_EMPTY_PATH asks; statx fills `statx`, which was zeroed before.
        let statx = unsafe {
            let fd = self.file.as_raw_fd();
            if libc::statx(fd, c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, statx.as_mut_ptr())
                < 0
            {
                return None;
            }
            statx.assume_init()
        };
        let alignment = Alignment {
            memory: statx.stx_dio_mem_align as usize,
            offset: statx.stx_dio_offset_align as usize,
        };
        (statx.stx_mask & libc::STATX_DIOALIGN != 0 && alignment.memory > 0 && alignment.offset > 0)
            .then_some(alignment)
    }

    /// The smallest unit that can be read, where the kernel does not say.
    fn tried_alignment(&self) -> Option<Alignment> {
        let buffer = AlignedBuffer::new(8192);
        [512usize, 4096].into_iter().find_map(|unit| {
            // SAFETY: `buffer` has 8192 bytes, of which `unit` from `unit` on are written to.
            let got = unsafe {
                let to = buffer.as_ptr().add(unit);
                libc::pread(self.file.as_raw_fd(), to.cast(), unit, 0)
            };
            (usize::try_from(got) == Ok(unit)).then_some(Alignment { memory: unit, offset: unit })
        })
    }

    /// Whether the block device, or the disk that it is a part of, has a command that zeroes.
    fn zeroes_by_command(&self) -> bool {
        let mut stat = MaybeUninit::<libc::stat>::uninit();
        // SAFETY: fstat fills `stat`, or fails.
        let device = unsafe {
            if libc::fstat(self.file.as_raw_fd(), stat.as_mut_ptr()) < 0 {
                return false;
            }
            stat.assume_init().st_rdev
        };
        let node = format!("/sys/dev/block/{}:{}", libc::major(device), libc::minor(device));
        ["queue", "../queue"].iter().any(|queue| {
            let limit = std::fs::read_to_string(format!("{node}/{queue}/write_zeroes_max_bytes"));
            limit.is_ok_and(|limit| limit.trim() != "0")
        })
    }

    /// Tries a nameless file next to this one; where none may be made (the daemon's sandbox, a folder of somebody else's), a
    /// block of this one that lies past the end: nothing is lost, but the time of its last change.
    fn probe_zeroing(&mut self, path: &Path, size: u64) {
        if self.is_block_device {
            // The kernel zeroes a block device by writing where it has no command for it; a hole needs the command.
            self.can_zero = true;
            self.can_punch = self.zeroes_by_command();
            return;
        }
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let nameless = OpenOptions::new().write(true).custom_flags(libc::O_TMPFILE).open(folder);
        let nameless = nameless.and_then(|file: File| file.set_len(8192).map(|()| file)).ok();
        let (fd, offset) = match &nameless {
            Some(file) => (file.as_raw_fd(), 0),
            None => (self.file.as_raw_fd(), size.next_multiple_of(4096)),
        };
        self.can_zero = fallocate(fd, ZERO, offset, 4096);
        // Also gives back what zeroing took (ext4 keeps it, at most one block, until the file grows into it).
        self.can_punch = fallocate(fd, PUNCH, offset, 4096);
    }
}

/// Gives space back; the range reads as zeroes.
pub(super) const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
/// Zeroes a range and keeps, or takes, space for it.
pub(super) const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
/// Takes space for what has none.
pub(super) const ALLOCATE: i32 = libc::FALLOC_FL_KEEP_SIZE;

fn fallocate(fd: i32, mode: i32, offset: u64, len: u64) -> bool {
    let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) else { return false };
    // SAFETY: plain system call without pointers.
    unsafe { libc::fallocate(fd, mode, offset, len) == 0 }
}
