//! The listening socket of a disk: made with its owner and mode, removed by whoever made it.
//!
//! A lock file beside it says who serves it, and outlives neither a kill nor a clean end. With the lock in hand, a socket that
//! is there is either stale (nobody listens: replaced) or somebody else's program's (respected).
//!
//! Invariant: a client that can connect is served: mode and owner are set before the socket listens, and what is accepted
//! is not closed but by its session.

use std::ffi::CString;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Who may connect.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SocketAccess {
    /// Permission bits; as the umask has it when absent.
    pub mode: Option<u32>,
    /// The owner, by name or number.
    pub user: Option<String>,
    /// The group, by name or number.
    pub group: Option<String>,
}

/// Why a socket cannot be had.
#[derive(Debug)]
pub enum SocketError {
    /// Another hawser serves it.
    Locked(PathBuf),
    /// Another program listens there.
    Live(PathBuf),
    /// There is something that is no socket.
    NotASocket(PathBuf),
    /// Longer than a socket's address can be (107 bytes).
    TooLong(PathBuf),
    /// No such user.
    User(String),
    /// No such group.
    Group(String),
    /// The system said no.
    Io {
        /// The file that it was about.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// Why not.
        error: io::Error,
    },
}

impl fmt::Display for SocketError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SocketError::Locked(path) => {
                write!(
                    f,
                    "{}: another hawser serves this socket; stop it or choose another path",
                    path.display()
                )
            }
            SocketError::Live(path) => {
                write!(f, "{}: another program listens here; stop it or choose another path", path.display())
            }
            SocketError::NotASocket(path) => {
                write!(f, "{}: exists and is not a socket; remove it or choose another path", path.display())
            }
            SocketError::TooLong(path) => {
                write!(f, "{}: longer than 107 bytes; choose a shorter path", path.display())
            }
            SocketError::User(name) => write!(f, "no user {name:?}; a name or a number would be right"),
            SocketError::Group(name) => write!(f, "no group {name:?}; a name or a number would be right"),
            SocketError::Io { path, doing, error } => write!(f, "{}: {doing}: {error}", path.display()),
        }
    }
}

impl std::error::Error for SocketError {}

fn lock_path(socket: &Path) -> PathBuf {
    let mut name = socket.as_os_str().to_owned();
    name.push(".lock");
    PathBuf::from(name)
}

/// The right to serve at a path. Given back when dropped.
#[derive(Debug)]
pub(crate) struct SocketLock {
    socket: PathBuf,
    file: File,
}

impl SocketLock {
    /// Takes the lock, or says who has it.
    pub(crate) fn take(socket: &Path) -> Result<SocketLock, SocketError> {
        if socket.as_os_str().len() > 107 {
            return Err(SocketError::TooLong(socket.to_owned()));
        }
        let path = lock_path(socket);
        loop {
            let io = |error| SocketError::Io { path: path.clone(), doing: "open", error };
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)
                .map_err(io)?;
            // SAFETY: plain system call on our own descriptor.
            if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
                return Err(SocketError::Locked(socket.to_owned()));
            }
            // Its last owner may have removed it between our open and our lock.
            let ours = file.metadata().map_err(io)?;
            if std::fs::metadata(&path).is_ok_and(|now| now.ino() == ours.ino() && now.dev() == ours.dev()) {
                return Ok(SocketLock { socket: socket.to_owned(), file });
            }
        }
    }

    /// Makes the socket and listens.
    pub(crate) fn listen(&self, access: &SocketAccess) -> Result<BoundSocket, SocketError> {
        let path = &self.socket;
        let io = |doing, error| SocketError::Io { path: path.clone(), doing, error };
        // Names are looked up before anything is made.
        let user = access.user.as_deref().map(user_id).transpose()?;
        let group = access.group.as_deref().map(group_id).transpose()?;
        if let Ok(found) = std::fs::symlink_metadata(path) {
            if !found.file_type().is_socket() {
                return Err(SocketError::NotASocket(path.clone()));
            }
            if UnixStream::connect(path).is_ok() {
                return Err(SocketError::Live(path.clone()));
            }
            std::fs::remove_file(path).map_err(|error| io("remove the stale socket", error))?;
        }
        let bytes = path.as_os_str().as_bytes();
        // SAFETY: plain system calls; the address is zeroed and holds the path (at most 107 bytes) and its end.
        let listener = unsafe {
            let fd = libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
            if fd < 0 {
                return Err(io("socket", io::Error::last_os_error()));
            }
            let fd = OwnedFd::from_raw_fd(fd);
            let mut address: libc::sockaddr_un = std::mem::zeroed();
            address.sun_family = libc::sa_family_t::try_from(libc::AF_UNIX).unwrap_or(1);
            for (to, from) in address.sun_path.iter_mut().zip(bytes) {
                *to = from.cast_signed();
            }
            let len = libc::socklen_t::try_from(size_of::<libc::sockaddr_un>()).unwrap_or(0);
            if libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len) != 0 {
                return Err(io("bind", io::Error::last_os_error()));
            }
            fd
        };
        let id = std::fs::symlink_metadata(path).map_err(|error| io("bind", error))?;
        let bound = BoundSocket {
            listener: UnixListener::from(listener),
            path: path.clone(),
            id: (id.dev(), id.ino()),
        };
        // From here on `bound` removes it if something goes wrong. It does not listen yet: nobody gets in too early.
        if let Some(mode) = access.mode {
            let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
            std::fs::set_permissions(path, mode).map_err(|error| io("chmod", error))?;
        }
        if user.is_some() || group.is_some() {
            std::os::unix::fs::lchown(path, user, group).map_err(|error| io("chown", error))?;
        }
        // SAFETY: plain system call on our own descriptor.
        if unsafe { libc::listen(bound.listener.as_raw_fd(), 16) } != 0 {
            return Err(io("listen", io::Error::last_os_error()));
        }
        bound.listener.set_nonblocking(true).map_err(|error| io("listen", error))?;
        Ok(bound)
    }
}

impl Drop for SocketLock {
    fn drop(&mut self) {
        // Under the lock, so that nobody who has just opened it takes it for the living one (`take` looks again).
        let _ = std::fs::remove_file(lock_path(&self.socket));
        // SAFETY: plain system call on our own descriptor.
        unsafe { libc::flock(self.file.as_raw_fd(), libc::LOCK_UN) };
    }
}

/// A socket that listens. Removed when dropped, if it is still the one that was made here.
#[derive(Debug)]
pub(crate) struct BoundSocket {
    listener: UnixListener,
    path: PathBuf,
    id: (u64, u64),
}

impl BoundSocket {
    pub(crate) fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for BoundSocket {
    fn drop(&mut self) {
        if std::fs::symlink_metadata(&self.path).is_ok_and(|now| (now.dev(), now.ino()) == self.id) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn user_id(name: &str) -> Result<u32, SocketError> {
    let wrong = || SocketError::User(name.to_owned());
    if let Ok(id) = name.parse() {
        return Ok(id);
    }
    let name = CString::new(name).map_err(|_| wrong())?;
    let mut buffer = vec![0; 16384];
    let mut found = std::ptr::null_mut();
    // SAFETY: all buffers live until the call returns; all-zero is a valid `passwd` to be filled.
    unsafe {
        let mut entry: libc::passwd = std::mem::zeroed();
        libc::getpwnam_r(name.as_ptr(), &raw mut entry, buffer.as_mut_ptr(), buffer.len(), &raw mut found);
        if found.is_null() { Err(wrong()) } else { Ok(entry.pw_uid) }
    }
}

fn group_id(name: &str) -> Result<u32, SocketError> {
    let wrong = || SocketError::Group(name.to_owned());
    if let Ok(id) = name.parse() {
        return Ok(id);
    }
    let name = CString::new(name).map_err(|_| wrong())?;
    let mut buffer = vec![0; 16384];
    let mut found = std::ptr::null_mut();
    // SAFETY: all buffers live until the call returns; all-zero is a valid `group` to be filled.
    unsafe {
        let mut entry: libc::group = std::mem::zeroed();
        libc::getgrnam_r(name.as_ptr(), &raw mut entry, buffer.as_mut_ptr(), buffer.len(), &raw mut found);
        if found.is_null() { Err(wrong()) } else { Ok(entry.gr_gid) }
    }
}
