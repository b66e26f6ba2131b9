//! The few system interfaces that std does not have: an inherited descriptor, and where a file's holes are.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};

/// Takes over a descriptor that the parent process left open for us. Called once, before anything else is opened.
///
/// # Errors
/// When there is none of this number: one line.
pub(crate) fn inherited(fd: RawFd) -> Result<File, String> {
    // SAFETY: a plain system call without pointers.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    if fd <= libc::STDERR_FILENO || flags < 0 {
        return Err(format!("{fd} is no open descriptor above 2, want one that the caller left open"));
    }
    // SAFETY: the descriptor is open (checked), and ours alone: nothing has been opened yet, so it came from our parent.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Where the next data of a file is, from `offset` on; `None`: only a hole follows, or nothing.
///
/// # Errors
/// As `lseek(2)`.
pub(crate) fn next_data(file: &File, offset: u64) -> io::Result<Option<u64>> {
    let offset =
        libc::off64_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
    // SAFETY: a plain system call without pointers. Nobody else uses the file's position.
    let found = unsafe { libc::lseek64(file.as_raw_fd(), offset, libc::SEEK_DATA) };
    match u64::try_from(found) {
        Ok(found) => Ok(Some(found)),
        Err(_) => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_that_is_not_there_is_refused() {
        for fd in [-1, 0, 2, 9999] {
            assert!(inherited(fd).unwrap_err().contains("no open descriptor"), "{fd}");
        }
    }
}
