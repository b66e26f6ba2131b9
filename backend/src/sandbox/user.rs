//! Root is given up: `[daemon] user` and `group`.
//!
//! Owns: what only root can do for the daemon before, in what order it becomes somebody else, and that there is no way back.
//! Must not know: what the rest of the sandbox takes away.
//!
//! Invariant: called while there is one thread, before anything is made, opened or listened to; afterwards the process is what
//! the unit's `User=` would have made of it.

use crate::durable::{self, Machine};
use hawser_config::{Config, ConfigError};
use std::ffi::{CStr, CString};
use std::fs::OpenOptions;
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

/// Room for a user's or group's entry, with all members of a group.
const ENTRY_BYTES_MAX: usize = 64 << 10;

/// Whom the daemon becomes.
struct Identity {
    name: CString,
    uid: u32,
    gid: u32,
}

/// Becomes `[daemon] user`, if there is such a key.
///
/// # Errors
/// When that cannot be done, or the daemon could not do then what the configuration wants: one line.
pub(crate) fn become_configured(config: &Config) -> Result<(), ConfigError> {
    let Some(name) = &config.daemon.user else { return Ok(()) };
    let wrong = |key, what: String| Err(config.daemon_error(key, what));
    let Some((wanted, own_gid)) = user(name) else {
        return wrong("user", format!("{name:?} is no user of this machine, want the name of one"));
    };
    let (key, gid) = match &config.daemon.group {
        None => ("user", Some(own_gid)),
        Some(group) => ("group", group_id(group)),
    };
    let Some(gid) = gid else {
        let group = config.daemon.group.as_deref().unwrap_or_default();
        return wrong("group", format!("{group:?} is no group of this machine, want the name of one"));
    };
    let identity = Identity { gid, ..wanted };
    if identity.uid == 0 || identity.gid == 0 {
        return wrong(key, "is root's, want one that may do less".to_owned());
    }
    // SAFETY: plain system calls.
    let (own, own_group) = unsafe { (libc::geteuid(), libc::getegid()) };
    for disk in &config.disks {
        let Some(owner) = &disk.value.socket_user else { continue };
        let uid = owner.parse().ok().or_else(|| Some(user(owner)?.0.uid));
        if uid.is_some_and(|uid| uid != identity.uid) {
            let what =
                format!("{owner:?} cannot be given a socket by {name:?} ([daemon] user), want socket_group");
            return Err(disk.error("socket_user", what));
        }
    }
    if own == identity.uid {
        if config.daemon.group.is_some() && own_group != identity.gid {
            let what =
                format!("want a start in that group, or no such key: this is group {own_group} already");
            return wrong("group", what);
        }
        // A service manager has done it.
        return Ok(());
    }
    if own != 0 {
        return wrong(
            "user",
            format!(
                "only root can become {name:?}, and this is user {own}: want a start as root, or no such key"
            ),
        );
    }
    let run = config.daemon.api.as_path().parent().unwrap_or(Path::new(""));
    let state = super::uses_state(config).then_some(config.daemon.state_dir.as_path());
    for (key, folder) in [Some(("api", run)), state.map(|folder| ("state_dir", folder))].into_iter().flatten()
    {
        if let Err(error) = hand_over(folder, &identity) {
            return wrong(key, format!("{}: cannot be made for {name:?}: {error}", folder.display()));
        }
    }
    raise_memlock();
    if let Err((doing, error)) = give_up_root(&identity) {
        return wrong("user", format!("cannot become {name:?}: {doing}: {error}"));
    }
    log::info!("root is given up: user {name} ({}), group {}", identity.uid, identity.gid);
    Ok(())
}

/// Makes a folder for the daemon. One that is there stays whose it is.
fn hand_over(folder: &Path, to: &Identity) -> io::Result<()> {
    if folder.as_os_str().is_empty() || folder.symlink_metadata().is_ok() {
        return Ok(());
    }
    durable::make_folder(&Machine, folder, 0o755)?;
    // What we have made, and not what somebody has put in its place.
    let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
    let made = OpenOptions::new().read(true).custom_flags(flags).open(folder)?;
    if made.metadata()?.uid() != 0 {
        return Err(io::Error::other("somebody else has put another folder there"));
    }
    std::os::unix::fs::fchown(&made, Some(to.uid), Some(to.gid))
}

/// As the unit's `LimitMEMLOCK=infinity`; without it an older kernel counts rings against a small limit.
fn raise_memlock() {
    let limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: `limit` is readable.
    if unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) } != 0 {
        let error = io::Error::last_os_error();
        log::warn!("the memlock limit stays as it is: {error}; reactors may not start with a small one");
    }
}

fn give_up_root(to: &Identity) -> Result<(), (&'static str, io::Error)> {
    let done = |doing, result: libc::c_int| match result {
        0 => Ok(()),
        _ => Err((doing, io::Error::last_os_error())),
    };
    // As `CapabilityBoundingSet=`: nothing that is ever executed gets one. The kernel refuses the first that it does not know.
    for capability in 0..64 {
        // SAFETY: plain system call.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0 {
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EINVAL) => break,
                _ => return Err(("capabilities", error)),
            }
        }
    }
    // SAFETY: the name is a string that ends; the others are plain system calls. There is one thread.
    unsafe {
        done("initgroups", libc::initgroups(to.name.as_ptr(), to.gid))?;
        done("setgid", libc::setresgid(to.gid, to.gid, to.gid))?;
        done("setuid", libc::setresuid(to.uid, to.uid, to.uid))?;
        done("no_new_privs", libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        // Who changes its user is no longer asked for cores, and its /proc files are root's: not so after an exec.
        done("dumpable", libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0))?;
        assert!(libc::setresuid(0, 0, 0) != 0 && libc::geteuid() == to.uid, "there is no way back to root");
    }
    Ok(())
}

/// A user by name, with its group.
fn user(name: &str) -> Option<(Identity, u32)> {
    let name = CString::new(name).ok()?;
    let (uid, gid) = entry(&name, libc::getpwnam_r, |entry: &libc::passwd| (entry.pw_uid, entry.pw_gid))?;
    Some((Identity { name, uid, gid }, gid))
}

fn group_id(name: &str) -> Option<u32> {
    entry(&CString::new(name).ok()?, libc::getgrnam_r, |entry: &libc::group| entry.gr_gid)
}

/// `getpwnam_r` or `getgrnam_r`.
type LookUp<T> =
    unsafe extern "C" fn(*const libc::c_char, *mut T, *mut libc::c_char, libc::size_t, *mut *mut T) -> i32;

fn entry<T, R>(name: &CStr, look_up: LookUp<T>, pick: fn(&T) -> R) -> Option<R> {
    let mut entry = MaybeUninit::<T>::zeroed();
    let mut buffer: Vec<libc::c_char> = vec![0; ENTRY_BYTES_MAX];
    let mut found = std::ptr::null_mut();
    // SAFETY: name, entry and buffer, of the length that is told, live until the last use of `found`, which then points to the
    // entry that was filled.
    unsafe {
        look_up(name.as_ptr(), entry.as_mut_ptr(), buffer.as_mut_ptr(), buffer.len(), &raw mut found);
        found.as_ref().map(pick)
    }
}
