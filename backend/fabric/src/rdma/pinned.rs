//! Memory that is taken away while a device has it.
//!
//! A device keeps the pages that it was given. A balloon, or free-page reporting, has the VMM punch holes into a VM's memory, and the pages
//! that come there later are others: what the device reads and writes is then not the VM's. A back end is not told of that. But pages that
//! are pinned stay in the mapping, so that one which is missing was taken away.
//!
//! Owns: the look at a mapping, and the thread that looks at all. Must not know: devices.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The shortest time from one look to the next.
const PAUSE_MIN: Duration = Duration::from_secs(2);
/// Looking takes at most one part in so many of a CPU.
const SHARE: u32 = 100;
/// Pages that are looked at with one system call.
const PAGES: usize = 4096;

static WANTED: AtomicBool = AtomicBool::new(false);

/// From now on memory that devices have is looked at, as soon as there is any: for the daemon.
pub fn watch_memory() {
    WANTED.store(true, Ordering::Relaxed);
}

/// Looks again and again, on a thread that lives as long as the process. It has the CPUs of whoever starts it, which is no reactor
/// (`Runtime::on_thread`).
pub(super) fn start(look: impl Fn() + Send + 'static) {
    if !WANTED.swap(false, Ordering::Relaxed) {
        return;
    }
    let watch = move || {
        let mut pause = PAUSE_MIN;
        loop {
            std::thread::sleep(pause);
            let began = Instant::now();
            look();
            pause = PAUSE_MIN.max(began.elapsed() * SHARE);
        }
    };
    if let Err(error) = std::thread::Builder::new().name("rdma-memory".to_owned()).spawn(watch) {
        log::warn!("RDMA: whether memory is taken away from VMs is not looked at: {error}");
    }
}

/// Bytes of a page.
fn page_size() -> usize {
    // SAFETY: plain call.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

/// Whether every page of this memory is there. Memory of which nothing can be said is whole.
pub(super) fn is_whole(start: usize, len: usize) -> bool {
    let mut there = [0u8; PAGES];
    let page = page_size();
    let (start, end) = (start - start % page, start + len);
    (start..end).step_by(PAGES * page).all(|from| {
        let bytes = (end - from).min(PAGES * page);
        // SAFETY: room for a byte for each page. That the memory is mapped is not needed: it is looked at by the kernel.
        let result = unsafe { libc::mincore(from as *mut _, bytes, there.as_mut_ptr()) };
        result < 0 || there[..bytes.div_ceil(page)].iter().all(|there| there & 1 == 1)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{FromRawFd, OwnedFd};

    #[test]
    fn a_hole_in_a_mapping_is_seen_and_its_end_is_not_looked_behind() {
        let page = page_size();
        let len = 3 * PAGES * page;
        // SAFETY: plain system calls; the descriptor is new, and the mapping is taken away at the end.
        unsafe {
            let fd = OwnedFd::from_raw_fd(libc::memfd_create(c"pinned".as_ptr(), libc::MFD_CLOEXEC));
            let raw = std::os::fd::AsRawFd::as_raw_fd(&fd);
            assert_eq!(libc::ftruncate(raw, len.try_into().unwrap()), 0);
            let access = libc::PROT_READ | libc::PROT_WRITE;
            let mapped =
                libc::mmap(std::ptr::null_mut(), len, access, libc::MAP_SHARED | libc::MAP_POPULATE, raw, 0);
            let start = mapped as usize;
            assert!(is_whole(start, len) && is_whole(start + 100, len - 5000));
            let at = 2 * PAGES + 7;
            let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            assert_eq!(
                libc::fallocate(raw, punch, (at * page).try_into().unwrap(), page.try_into().unwrap()),
                0
            );
            assert!(
                !is_whole(start, len)
                    && is_whole(start, at * page)
                    && is_whole(start + (at + 1) * page, 9 * page)
            );
            libc::munmap(mapped, len);
            assert!(is_whole(start, len), "nothing can be said of what is not mapped");
        }
    }
}
