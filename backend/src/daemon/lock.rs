//! One daemon for each API socket: the lock file in the run state's folder.
//!
//! The lock is the kernel's (`flock`), so it ends with its process, however that ends. A predecessor that is already on its
//! way out (killed, or writing its core) is waited for; one that lives is respected.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::Path;
use std::time::{Duration, Instant};

/// Held as long as the daemon lives.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

/// A process that is killed gives its memory back before its locks, and a core may be gigabytes.
pub(super) const DYING_MAX: Duration = Duration::from_secs(60);
/// Between a process's death in `/proc` and the end of its lock lies next to nothing.
pub(super) const DEAD_MAX: Duration = Duration::from_secs(5);

impl Lock {
    /// Takes the lock at `path`.
    ///
    /// # Errors
    /// When another process has it, or it cannot be had: one line.
    pub(crate) fn take(path: &Path) -> Result<Lock, String> {
        Lock::attempt(path).map_err(|locked| match locked {
            Locked::Other(what) => what,
            Locked::By { pid, what } => match command_of(&pid) {
                None => what,
                Some(command) => {
                    format!("`{command}`, pid {pid}, works without a daemon: {} is locked", path.display())
                }
            },
        })
    }

    /// The same, for whoever wants to know who has it.
    pub(crate) fn attempt(path: &Path) -> Result<Lock, Locked> {
        let cannot =
            |error: io::Error| Locked::Other(format!("{}: cannot be locked: {error}", path.display()));
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(cannot)?;
        let since = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::Error(error)) => return Err(cannot(error)),
                Err(TryLockError::WouldBlock) => {}
            }
            let mut pid = String::new();
            file.rewind().and_then(|()| file.read_to_string(&mut pid)).map_err(cannot)?;
            let pid = pid.trim();
            let patience = match life_of(pid) {
                Life::Lives => Duration::ZERO,
                Life::Dying => DYING_MAX,
                Life::Gone => DEAD_MAX,
            };
            if since.elapsed() >= patience {
                let what = format!("already running, pid {pid}: {} is locked", path.display());
                return Err(Locked::By { pid: pid.to_owned(), what });
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        file.set_len(0).and_then(|()| file.rewind()).map_err(cannot)?;
        writeln!(file, "{}", std::process::id()).map_err(cannot)?;
        Ok(Lock { _file: file })
    }
}

/// Why there is no lock.
pub(crate) enum Locked {
    /// Another process has it.
    By { pid: String, what: String },
    /// It cannot be had.
    Other(String),
}

/// The command line of a process that is no daemon: a command that works without one.
pub(crate) fn command_of(pid: &str) -> Option<String> {
    let bytes = std::fs::read(format!("/proc/{}/cmdline", pid.parse::<u32>().ok()?)).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    command_in(&text)
}

/// `hawser pool create …`: its name and two words.
fn command_in(line: &str) -> Option<String> {
    let words: Vec<&str> = line.split('\0').filter(|word| !word.is_empty()).collect();
    let [program, what, ..] = words.as_slice() else { return None };
    if !matches!(*what, "pool" | "volume" | "image") {
        return None;
    }
    let program = Path::new(program).file_name()?.to_string_lossy();
    let words: Vec<&str> = words[1..].iter().take(2).copied().collect();
    Some(format!("{program} {}", words.join(" ")))
}

pub(super) enum Life {
    Lives,
    Dying,
    Gone,
}

pub(super) fn life_of(pid: &str) -> Life {
    let Ok(pid) = pid.parse::<u32>() else { return Life::Gone };
    std::fs::read_to_string(format!("/proc/{pid}/status")).map_or(Life::Gone, |status| life_in(&status))
}

/// What `/proc/PID/status` says: a zombie, a pending SIGKILL, or a core being written mean that the end is near.
fn life_in(status: &str) -> Life {
    let field = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::trim))
            .unwrap_or("")
    };
    let killed = |mask: &str| u64::from_str_radix(mask, 16).is_ok_and(|mask| mask & (1 << 8) != 0);
    let dying = field("State").starts_with(['Z', 'X'])
        || killed(field("SigPnd"))
        || killed(field("ShdPnd"))
        || field("CoreDumping") == "1";
    if dying { Life::Dying } else { Life::Lives }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_that_is_held_names_the_process() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let held = Lock::take(&path).unwrap();
        let error = Lock::take(&path).unwrap_err();
        assert!(error.starts_with(&format!("already running, pid {}: ", std::process::id())), "{error}");
        drop(held);
        Lock::take(&path).unwrap();
    }

    #[test]
    fn a_command_is_told_from_a_daemon() {
        assert_eq!(command_in("/bin/hawser\0pool\0replace\0p0\0").as_deref(), Some("hawser pool replace"));
        assert_eq!(command_in("hawser\0serve\0--config\0x\0"), None);
        assert_eq!(command_in(""), None);
    }

    #[test]
    fn a_process_on_its_way_out_is_told_from_a_living_one() {
        let lives = "Name:\thawser\nState:\tS (sleeping)\nSigPnd:\t0000000000000000\nShdPnd:\t0000000000000000\nCoreDumping:\t0\n";
        assert!(matches!(life_in(lives), Life::Lives));
        for (from, to) in [
            ("S (sleeping)", "Z (zombie)"),
            ("ShdPnd:\t0000000000000000", "ShdPnd:\t0000000000000100"),
            ("CoreDumping:\t0", "CoreDumping:\t1"),
        ] {
            assert!(matches!(life_in(&lives.replace(from, to)), Life::Dying), "{to}");
        }
        assert!(matches!(life_of("999999999"), Life::Gone));
        assert!(matches!(life_of(&std::process::id().to_string()), Life::Lives));
    }
}
