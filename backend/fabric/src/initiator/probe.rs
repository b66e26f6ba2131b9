//! Whether the memory of a request is still there: a front end may take it away under us. Asked only after a send or receive
//! failed in a way that this would explain.

use hawser_block::Buffers;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const PAGE: usize = 4096;

/// Whether the kernel can read every page of `buffers`. `true` also when that cannot be found out.
pub(crate) fn is_there(buffers: &Buffers) -> bool {
    let mut ends = [0i32; 2];
    // SAFETY: room for two descriptors.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK) } != 0 {
        return true;
    }
    // SAFETY: both descriptors are new and ours.
    let (reader, writer) = unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) };
    buffers.segments().all(|segment| {
        // One byte of each page, and the last of all.
        let last = segment.len.saturating_sub(1);
        (0..segment.len).step_by(PAGE).chain([last]).all(|at| {
            // SAFETY: the kernel reads one byte at an address that may not be mapped, and says so if it is not.
            let written =
                unsafe { libc::write(writer.as_raw_fd(), segment.start.wrapping_add(at).cast(), 1) };
            if written < 0 {
                return io::Error::last_os_error().raw_os_error() != Some(libc::EFAULT);
            }
            let mut byte = 0u8;
            // SAFETY: room for one byte.
            unsafe { libc::read(reader.as_raw_fd(), (&raw mut byte).cast(), 1) };
            true
        })
    })
}
