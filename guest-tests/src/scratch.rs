//! Temporary folders and the lock that keeps guests one at a time.
//!
//! Owns: `/tmp/hawser-guest.*` (short, because a Unix socket's path holds 108 bytes) and the machine-wide guest lock.
//! Invariants: a folder is locked for as long as its owner lives; an unlocked one is stale, whatever ended its owner, and
//! is swept when the next run starts.

use crate::process::Deadline;
use crate::{Result, progress};
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

const PREFIX: &str = "hawser-guest.";
static NEXT: AtomicU32 = AtomicU32::new(0);

fn try_lock(file: &File) -> bool {
    // SAFETY: flock() takes a descriptor, which `file` keeps open for the call, and plain flags.
    unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) == 0 }
}

fn base() -> PathBuf {
    // Not TMPDIR: it may be long, and a socket's path may not be.
    PathBuf::from("/tmp")
}

/// A temporary folder that is removed when dropped.
pub struct Scratch {
    path: PathBuf,
    _lock: File,
}

impl Scratch {
    /// Makes a new empty folder.
    pub fn new() -> Result<Self> {
        // Two containers may share /tmp and not their process ids: then a name may be taken.
        let path = loop {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = base().join(format!("{PREFIX}{}.{number}", std::process::id()));
            match fs::create_dir(&path) {
                Ok(()) => break path,
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                Err(e) => return Err(format!("{}: {e}", path.display())),
            }
        };
        let explain = |e: std::io::Error| format!("{}: {e}", path.display());
        let lock = File::create(path.join("lock")).map_err(explain)?;
        if !try_lock(&lock) {
            return Err(format!("{}: a new folder is locked by somebody else", path.display()));
        }
        Ok(Self { path, _lock: lock })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path in the folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_dir_all(&self.path) {
            eprintln!("{}: not removed: {e}", self.path.display());
        }
    }
}

/// Removes the folders of runs that died; returns how many there were.
pub fn sweep() -> usize {
    sweep_in(&base())
}

fn sweep_in(base: &Path) -> usize {
    let mut swept = 0;
    for entry in fs::read_dir(base).into_iter().flatten().flatten() {
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let stale = match File::open(entry.path().join("lock")) {
            Ok(lock) => try_lock(&lock),
            // No lock yet: either its owner died in between, or it is being made right now.
            Err(_) => entry
                .metadata()
                .and_then(|m| m.modified())
                .is_ok_and(|t| t.elapsed().is_ok_and(|a| a.as_secs() > 60)),
        };
        if stale && fs::remove_dir_all(entry.path()).is_ok() {
            swept += 1;
        }
    }
    swept
}

/// Held while guests run: two runs on one machine take turns, whichever user or target folder they have, in a chroot too.
///
/// The lock is a Unix socket in the abstract namespace: it leaves no file, and ends with its owner.
pub struct GuestLock {
    _socket: UnixListener,
}

impl GuestLock {
    /// Waits up to an hour for another run to finish.
    pub fn take() -> Result<Self> {
        let name =
            SocketAddr::from_abstract_name(b"hawser-guests").map_err(|e| format!("guest lock: {e}"))?;
        let deadline = Deadline::new(3600, "another run's guests to end");
        let mut said = false;
        loop {
            match UnixListener::bind_addr(&name) {
                Ok(socket) => return Ok(Self { _socket: socket }),
                Err(e) if e.kind() == ErrorKind::AddrInUse => {}
                Err(e) => return Err(format!("guest lock: {e}")),
            }
            if !said {
                progress("waiting for another run's guests to end");
                said = true;
            }
            deadline.nap()?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sweep_removes_the_dead_and_keeps_the_living() {
        let home = Scratch::new().unwrap();
        let dead = home.file(&format!("{PREFIX}dead"));
        let alive = home.file(&format!("{PREFIX}alive"));
        for folder in [&dead, &alive] {
            fs::create_dir(folder).unwrap();
            fs::write(folder.join("lock"), "").unwrap();
        }
        let held = File::open(alive.join("lock")).unwrap();
        assert!(try_lock(&held));
        assert_eq!(sweep_in(home.path()), 1);
        assert!(alive.exists() && !dead.exists());
    }
}
