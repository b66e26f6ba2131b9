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
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// A socket's address holds a path of so many bytes and a zero.
const PATH_BYTES_MAX: usize = 107;
/// Clients that wait to be accepted. One more is told to try again, which not all do.
const BACKLOG: i32 = 128;

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
        if socket.as_os_str().len() > PATH_BYTES_MAX {
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
        BoundSocket::listen(&self.socket, access)
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
pub struct BoundSocket {
    listener: UnixListener,
    path: PathBuf,
    id: (u64, u64),
}

impl BoundSocket {
    /// Makes a socket at `path`, in the place of one that nobody listens at, and listens. The caller holds the lock that goes
    /// with the path.
    ///
    /// # Errors
    /// When it cannot be had; then it is not there.
    pub fn listen(path: &Path, access: &SocketAccess) -> Result<BoundSocket, SocketError> {
        let bound = BoundSocket::bind(path, access)?;
        // SAFETY: plain system call on our own descriptor.
        if unsafe { libc::listen(bound.listener.as_raw_fd(), BACKLOG) } != 0 {
            return Err(bound.io("listen", io::Error::last_os_error()));
        }
        bound.listener.set_nonblocking(true).map_err(|error| bound.io("listen", error))?;
        Ok(bound)
    }

    /// All of it but listening: nobody gets in before mode and owner are right.
    fn bind(path: &Path, access: &SocketAccess) -> Result<BoundSocket, SocketError> {
        let io = |doing, error| SocketError::Io { path: path.to_owned(), doing, error };
        // Names are looked up before anything is made.
        let user = access.user.as_deref().map(user_id).transpose()?;
        let group = access.group.as_deref().map(group_id).transpose()?;
        remove_stale(path)?;
        let listener = unix_socket(0).map_err(|error| io("socket", error))?;
        let (address, len) = address_of(path);
        // SAFETY: plain system call on our own descriptor; the address lives until it returns.
        if unsafe { libc::bind(listener.as_raw_fd(), (&raw const address).cast(), len) } != 0 {
            return Err(io("bind", io::Error::last_os_error()));
        }
        let id = std::fs::symlink_metadata(path).map_err(|error| io("bind", error))?;
        let bound = BoundSocket {
            listener: UnixListener::from(listener),
            path: path.to_owned(),
            id: (id.dev(), id.ino()),
        };
        // From here on `bound` removes it if something goes wrong.
        if let Some(mode) = access.mode {
            let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
            std::fs::set_permissions(path, mode).map_err(|error| io("chmod", error))?;
        }
        if user.is_some() || group.is_some() {
            std::os::unix::fs::lchown(path, user, group).map_err(|error| io("chown", error))?;
        }
        Ok(bound)
    }

    fn io(&self, doing: &'static str, error: io::Error) -> SocketError {
        SocketError::Io { path: self.path.clone(), doing, error }
    }

    /// What clients are taken from; it does not block.
    #[must_use]
    pub fn listener(&self) -> &UnixListener {
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

fn unix_socket(flags: i32) -> io::Result<OwnedFd> {
    // SAFETY: plain system call without pointers.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC | flags, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: we just made it and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The address of a path, which has at most 107 bytes; what is longer is cut.
fn address_of(path: &Path) -> (libc::sockaddr_un, libc::socklen_t) {
    // SAFETY: plain data, for which all zero is valid; the last byte stays zero.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::sa_family_t::try_from(libc::AF_UNIX).unwrap_or(1);
    let room = address.sun_path.len() - 1;
    for (to, from) in address.sun_path[..room].iter_mut().zip(path.as_os_str().as_bytes()) {
        *to = from.cast_signed();
    }
    (address, libc::socklen_t::try_from(size_of::<libc::sockaddr_un>()).unwrap_or(0))
}

/// Removes a socket that nobody listens at. One that is in use, or of which that cannot be told, is left alone, as is what is
/// no socket; where nothing is there is nothing to do. The caller holds the lock that goes with the path.
///
/// # Errors
/// When something is there after all.
pub fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let io = |doing, error| SocketError::Io { path: path.to_owned(), doing, error };
    if path.as_os_str().len() > PATH_BYTES_MAX {
        return Err(SocketError::TooLong(path.to_owned()));
    }
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io("look for a stale socket", error)),
        Ok(found) if !found.file_type().is_socket() => return Err(SocketError::NotASocket(path.to_owned())),
        Ok(_) => {}
    }
    let probe = unix_socket(libc::SOCK_NONBLOCK).map_err(|error| io("socket", error))?;
    let (address, len) = address_of(path);
    // SAFETY: plain system call on our own descriptor; the address lives until it returns.
    let connected = unsafe { libc::connect(probe.as_raw_fd(), (&raw const address).cast(), len) } == 0;
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        _ if connected => Err(SocketError::Live(path.to_owned())),
        // Somebody listens, and has as many clients waiting as there may be.
        Some(libc::EAGAIN) => Err(SocketError::Live(path.to_owned())),
        Some(libc::ECONNREFUSED) => {
            std::fs::remove_file(path).map_err(|error| io("remove the stale socket", error))
        }
        // It has gone meanwhile.
        Some(libc::ENOENT) => Ok(()),
        // Not allowed to connect, another kind of socket: whose it is cannot be told.
        _ => Err(io("connect, to see whether anybody listens", error)),
    }
}

/// Room for a user's or group's entry, with all members of a group.
const ENTRY_BYTES_MAX: usize = 64 << 10;

/// `getpwnam_r` or `getgrnam_r`.
type LookUp<T> =
    unsafe extern "C" fn(*const libc::c_char, *mut T, *mut libc::c_char, libc::size_t, *mut *mut T) -> i32;

/// A user's or group's number: `name` itself if it is one, else what `look_up` finds.
fn id_of<T>(name: &str, look_up: LookUp<T>, id: fn(&T) -> u32) -> Option<u32> {
    if let Ok(id) = name.parse() {
        return Some(id);
    }
    let name = CString::new(name).ok()?;
    let mut entry = MaybeUninit::<T>::zeroed();
    let mut buffer: Vec<libc::c_char> = vec![0; ENTRY_BYTES_MAX];
    let mut found = std::ptr::null_mut();
    // SAFETY: name, entry and buffer, of the length that is told, live until the last use of `found`, which then points to the
    // entry that was filled.
    unsafe {
        look_up(name.as_ptr(), entry.as_mut_ptr(), buffer.as_mut_ptr(), buffer.len(), &raw mut found);
        found.as_ref().map(id)
    }
}

fn user_id(name: &str) -> Result<u32, SocketError> {
    let id = id_of(name, libc::getpwnam_r, |entry: &libc::passwd| entry.pw_uid);
    id.ok_or_else(|| SocketError::User(name.to_owned()))
}

fn group_id(name: &str) -> Result<u32, SocketError> {
    let id = id_of(name, libc::getgrnam_r, |entry: &libc::group| entry.gr_gid);
    id.ok_or_else(|| SocketError::Group(name.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    /// The API's socket listened before it had its mode: whoever was quick enough was in.
    #[test]
    fn a_socket_has_its_mode_before_anybody_gets_in() {
        let folder = tempfile::Builder::new().prefix("hvs").tempdir_in("/tmp").unwrap();
        let path = folder.path().join("s");
        let access = SocketAccess { mode: Some(0o600), ..SocketAccess::default() };
        let bound = BoundSocket::bind(&path, &access).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(UnixStream::connect(&path).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        drop(bound);
        assert!(!path.exists());
        let bound = BoundSocket::listen(&path, &access).unwrap();
        UnixStream::connect(&path).unwrap();
        drop(bound);
        assert!(!path.exists());
    }
}
