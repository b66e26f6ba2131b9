//! A part of a file of the front end's, mapped and watched: guest memory, or the in-flight log.
//!
//! The kernel maps whole blocks: pages, or on hugetlbfs huge pages, of which begin, end and length of a mapping must be
//! multiples. So a mapping is a bit larger than what is wanted of it.

use crate::fault;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// Why there is no mapping.
#[derive(Debug)]
pub(crate) enum MappingError {
    /// It lies past the end of its file: touching it would be SIGBUS.
    PastEnd {
        file_bytes: u64,
    },
    /// No more mappings can be watched.
    Full,
    Map(io::Error),
}

/// Mapped until it is dropped.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: usize,
    bytes: usize,
    /// Where what was wanted begins.
    wanted: usize,
    guard: fault::Guard,
}

/// The whole blocks around `bytes` bytes from `offset` on: where they begin, and how many bytes they are.
fn blocks_around(offset: u64, bytes: u64, block_bytes: u64) -> Option<(u64, u64)> {
    let before = offset % block_bytes;
    Some((offset - before, before.checked_add(bytes)?.checked_next_multiple_of(block_bytes)?))
}

/// File systems whose pages come from another program or machine, when that likes to. The numbers are those of `linux/magic.h`
/// and of the file systems' own headers; libc does not have all of them.
const NOT_LOCAL: [u32; 9] = [
    0x6573_5546, // FUSE, and virtiofs
    0x0000_6969, // NFS
    0x00c3_6400, // Ceph
    0x0102_1997, // 9p
    0xff53_4d42, // CIFS
    0xfe53_4d42, // SMB2
    0x0000_517b, // SMB
    0x5346_414f, // AFS
    0x7375_7245, // Coda
];

/// Whether the pages of this file are there without anybody's help.
fn is_local(file: &OwnedFd) -> io::Result<bool> {
    // SAFETY: all-zero is a valid `statfs`, and fstatfs fills it.
    let stat = unsafe {
        let mut stat: libc::statfs = std::mem::zeroed();
        if libc::fstatfs(file.as_raw_fd(), &raw mut stat) != 0 {
            return Err(io::Error::last_os_error());
        }
        stat
    };
    // Its type differs between architectures; the number is one of 32 bits.
    Ok(!NOT_LOCAL.iter().any(|magic| i64::from(*magic) == (stat.f_type & 0xffff_ffff)))
}

fn page_bytes() -> u64 {
    // SAFETY: plain call without pointers.
    u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

impl Mapping {
    /// Maps `bytes` bytes of `file` from `offset` on, to read and write.
    pub(crate) fn new(file: &OwnedFd, offset: u64, bytes: u64) -> Result<Mapping, MappingError> {
        // Whoever touches a page waits until it is there: a reactor would, for all its disks.
        if !is_local(file).map_err(MappingError::Map)? {
            return Err(MappingError::Map(io::Error::other(
                "pages of FUSE and of network file systems may never come",
            )));
        }
        // SAFETY: all-zero is a valid `stat`, and fstat fills it.
        let stat = unsafe {
            let mut stat: libc::stat = std::mem::zeroed();
            if libc::fstat(file.as_raw_fd(), &raw mut stat) != 0 {
                return Err(MappingError::Map(io::Error::last_os_error()));
            }
            stat
        };
        // Only files have an end that can be passed; a memory device has none.
        let is_file = stat.st_mode & libc::S_IFMT == libc::S_IFREG;
        let file_bytes = if is_file { stat.st_size.unsigned_abs() } else { u64::MAX };
        if offset.checked_add(bytes).is_none_or(|end| end > file_bytes) {
            return Err(MappingError::PastEnd { file_bytes });
        }
        // On hugetlbfs this is the huge page; elsewhere, where it may be anything, a larger mapping does no harm.
        let block_bytes = stat.st_blksize.unsigned_abs();
        let page_bytes = page_bytes();
        let block_bytes =
            if block_bytes.is_power_of_two() { block_bytes.max(page_bytes) } else { page_bytes };
        let too_long = || MappingError::Map(io::Error::from_raw_os_error(libc::ENOMEM));
        let (from, len) = blocks_around(offset, bytes, block_bytes).ok_or_else(too_long)?;
        let len =
            usize::try_from(len).ok().filter(|len| *len <= isize::MAX.unsigned_abs()).ok_or_else(too_long)?;
        let file_from = i64::try_from(from).map_err(|_| too_long())?;
        // SAFETY: a fresh shared mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                file_from,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(MappingError::Map(io::Error::last_os_error()));
        }
        // A core dump of ours shall not hold guests' memory. A failure costs nothing but that.
        // SAFETY: advises on the mapping just made.
        unsafe { libc::madvise(start, len, libc::MADV_DONTDUMP) };
        let start = start as usize;
        let Some(guard) = fault::Guard::new(start, len) else {
            // SAFETY: made above; nobody knows of it.
            unsafe { libc::munmap(start as *mut libc::c_void, len) };
            return Err(MappingError::Full);
        };
        // Less than a block, which is less than the mapping.
        let wanted = start + usize::try_from(offset - from).unwrap_or(0);
        Ok(Mapping { start, bytes: len, wanted, guard })
    }

    /// Where the first wanted byte is in our address space.
    pub(crate) fn wanted(&self) -> usize {
        self.wanted
    }

    /// Whether the front end took it away under us.
    pub(crate) fn faulted(&self) -> bool {
        self.guard.faulted()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.guard.release();
        // SAFETY: mapped in `new`; whoever has pointers into it owns it, and the last owner is gone.
        unsafe { libc::munmap(self.start as *mut libc::c_void, self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::FromRawFd;

    #[test]
    fn whole_blocks_are_mapped() {
        const HUGE: u64 = 2 << 20;
        assert_eq!(blocks_around(0, HUGE, HUGE), Some((0, HUGE)));
        assert_eq!(blocks_around(0x1000, HUGE, HUGE), Some((0, 2 * HUGE)));
        assert_eq!(blocks_around(HUGE + 1, 1, HUGE), Some((HUGE, HUGE)));
        assert_eq!(blocks_around(HUGE + 1, 1, 4096), Some((HUGE, 4096)));
        assert_eq!(blocks_around(1, u64::MAX - 1, HUGE), None);
        assert_eq!(blocks_around(HUGE - 1, u64::MAX - HUGE + 1, HUGE), None);
    }

    /// A part of a file of huge pages that is not cut at them could not be mapped, and one that could was never unmapped, for
    /// the length of that must be whole pages too.
    #[test]
    fn any_part_of_a_file_of_huge_pages_is_mapped_survives_and_is_unmapped() {
        fault::install();
        // SAFETY: a literal C string and plain system calls; the descriptor is ours.
        let file = unsafe {
            let fd = libc::memfd_create(c"huge".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_HUGETLB);
            if fd < 0 {
                skips::skip(format_args!("no file of huge pages: {}", io::Error::last_os_error()));
                return;
            }
            OwnedFd::from_raw_fd(fd)
        };
        // Up to 16 huge pages of 2 MiB; an architecture or kernel with larger ones says no.
        // SAFETY: plain system call on our own descriptor.
        if unsafe { libc::ftruncate(file.as_raw_fd(), 32 << 20) } != 0 {
            skips::skip(format_args!("32 MiB of huge pages: {}", io::Error::last_os_error()));
            return;
        }
        for (offset, bytes) in [(0, 0x1000), (0x1000, 0x1000), (0x1ff_f000, 0x1000), (0x123, 0x40_0000)] {
            let mapping = Mapping::new(&file, offset, bytes).expect("mapped");
            let at = mapping.wanted() as *mut u8;
            // SAFETY: within the mapping. Without huge pages in the machine's pool this is a SIGBUS, which is survived by a
            // page of zeroes in place of the whole mapping.
            let read = unsafe {
                at.add(usize::try_from(bytes).unwrap() - 1).write_volatile(7);
                at.add(usize::try_from(bytes).unwrap() - 1).read_volatile()
            };
            assert_eq!(read, 7);
            if mapping.faulted() {
                skips::skip(format_args!(
                    "no huge page was free: at {offset:#x} only surviving that was seen"
                ));
            }
            let (start, end) = (mapping.start, mapping.start + mapping.bytes);
            drop(mapping);
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            assert!(!maps.lines().any(|line| line.contains("memfd:huge")), "{start:x}-{end:x}\n{maps}");
        }
    }
    /// A file of a program's own (FUSE) was mapped like any other. Whoever touched a page that the program never gave waited for
    /// it: a reactor, with all its disks.
    #[test]
    fn a_file_whose_pages_may_never_come_is_refused() {
        let folder = std::env::temp_dir().join(format!("hv-fuse-{}", std::process::id()));
        std::fs::create_dir(&folder).unwrap();
        let at = std::ffi::CString::new(folder.to_str().unwrap()).unwrap();
        // A thread with mounts of its own, which end with it. Nobody answers for this file system; it says what it is without
        // an answer, for it is another user's.
        let refused = std::thread::spawn(move || {
            let server = std::fs::File::options().read(true).write(true).open("/dev/fuse")?;
            let options = format!("fd={},rootmode=40000,user_id=65534,group_id=65534\0", server.as_raw_fd());
            // SAFETY: system calls with literal C strings and ones that live until they return; the descriptor is ours.
            let root = unsafe {
                let private = libc::MS_REC | libc::MS_PRIVATE;
                let none = std::ptr::null();
                if libc::unshare(libc::CLONE_FS | libc::CLONE_NEWNS) != 0
                    || libc::mount(none, c"/".as_ptr(), none, private, none.cast()) != 0
                    || libc::mount(c"hv".as_ptr(), at.as_ptr(), c"fuse".as_ptr(), 0, options.as_ptr().cast())
                        != 0
                {
                    return Err(io::Error::last_os_error());
                }
                let root = libc::open(at.as_ptr(), libc::O_PATH | libc::O_CLOEXEC);
                if root < 0 {
                    return Err(io::Error::last_os_error());
                }
                OwnedFd::from_raw_fd(root)
            };
            Ok(Mapping::new(&root, 0, 4096).map(drop))
        })
        .join();
        std::fs::remove_dir(&folder).unwrap();
        match refused.unwrap() {
            Err(error) => skips::skip(format_args!("no mount of our own: {error}")),
            Ok(Err(MappingError::Map(error))) => assert!(error.to_string().contains("FUSE"), "{error}"),
            Ok(other) => panic!("{other:?}"),
        }
        // SAFETY: plain system calls; the descriptor is ours.
        let memory = unsafe {
            let fd = libc::memfd_create(c"local".as_ptr(), libc::MFD_CLOEXEC);
            assert!(fd >= 0 && libc::ftruncate(fd, 4096) == 0);
            OwnedFd::from_raw_fd(fd)
        };
        assert!(Mapping::new(&memory, 0, 4096).is_ok());
    }
}
