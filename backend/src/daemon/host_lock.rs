//! One initiator for each host identity on a machine: to targets, two with the same are one host, and reservations keep neither
//! of them from the other's blocks.
//!
//! The lock is a socket address without a file (abstract, so of this network namespace) with the identity in its name: the kernel
//! gives it to one process at a time and takes it back with that process, however it ends. Nothing is said over it.

use super::lock::{self, DEAD_MAX, DYING_MAX, Life};
use crate::assemble::device::Kind;
use crate::assemble::host::HostIdentity;
use hawser_config::Config;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::time::{Duration, Instant};

/// A command without a daemon ends soon, most of them.
const COMMAND_MAX: Duration = Duration::from_secs(5);

/// Held as long as the process reaches targets.
#[derive(Debug)]
pub(crate) struct HostLock {
    _socket: UnixListener,
}

/// Whether a configuration makes us an initiator.
pub(crate) fn is_needed(config: &Config) -> bool {
    config.devices.iter().any(|device| matches!(Kind::parse(&device.value.uri), Ok(Kind::Nvme { .. })))
}

/// FNV-1a: an NQN has up to 223 bytes, an address's name 107.
fn name_of(identity: &HostIdentity) -> String {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    let hash = identity.nqn.as_str().bytes().fold(0xcbf2_9ce4_8422_2325, step);
    format!("hawser/host/{}/{hash:016x}", identity.id)
}

impl HostLock {
    /// Takes the identity for this process.
    ///
    /// # Errors
    /// When another process has it: one line that names it.
    pub(crate) fn take(identity: &HostIdentity) -> Result<HostLock, String> {
        let name = name_of(identity);
        let address = SocketAddr::from_abstract_name(&name).map_err(|error| error.to_string())?;
        let since = Instant::now();
        let mut last = None;
        loop {
            match UnixListener::bind_addr(&address) {
                Ok(socket) => return Ok(HostLock { _socket: socket }),
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
                Err(error) => return Err(format!("the host's identity cannot be locked: {error}")),
            }
            // Who is asked too often says nothing any more.
            last = holder(name.as_bytes()).or(last);
            let pid = last;
            let command = pid.and_then(|pid| lock::command_of(&pid.to_string()));
            let patience = match pid.map(|pid| lock::life_of(&pid.to_string())) {
                Some(Life::Lives) if command.is_some() => COMMAND_MAX,
                Some(Life::Lives) | None => Duration::ZERO,
                Some(Life::Dying) => DYING_MAX,
                Some(Life::Gone) => DEAD_MAX,
            };
            if since.elapsed() >= patience {
                let pid = pid.map_or_else(String::new, |pid| format!(", pid {pid},"));
                if let Some(command) = command {
                    return Err(format!("`{command}`{pid} works as this host, want it ended"));
                }
                return Err(format!(
                    "another process{pid} is host {} with identifier {} already, want it ended, or another nqn and id in [host]",
                    identity.nqn, identity.id
                ));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Whose socket has this name: who listens says so to everybody that connects.
fn holder(name: &[u8]) -> Option<i32> {
    // SAFETY: a plain system call without pointers.
    let fd = unsafe {
        libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC, 0)
    };
    if fd < 0 {
        return None;
    }
    // SAFETY: a new descriptor, ours alone.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all-zero is a valid address of no name.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::sa_family_t::try_from(libc::AF_UNIX).ok()?;
    // The zero byte in front makes it abstract.
    for (to, from) in address.sun_path[1..].iter_mut().zip(name) {
        *to = from.cast_signed();
    }
    let bytes = std::mem::offset_of!(libc::sockaddr_un, sun_path) + 1 + name.len();
    let len = libc::socklen_t::try_from(bytes).ok()?;
    // SAFETY: the address has `len` readable bytes: a name has at most 107 - 1.
    if unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), len) } != 0 {
        return None;
    }
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = libc::socklen_t::try_from(size_of::<libc::ucred>()).ok()?;
    // SAFETY: `peer` is writable for `len` bytes, and both live through the call.
    let got = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut len,
        )
    };
    // 0: of a process that this one's namespace does not see.
    (got == 0 && peer.pid > 0).then_some(peer.pid)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(nqn: &str) -> HostIdentity {
        let id = format!("00000000-0000-4000-8000-{:012x}", std::process::id());
        HostIdentity { nqn: nqn.parse().unwrap(), id: id.parse().unwrap() }
    }

    #[test]
    fn an_identity_is_one_process_s_and_free_when_that_ends() {
        let held = HostLock::take(&identity("nqn.a")).unwrap();
        let other = HostLock::take(&identity("nqn.b")).unwrap();
        for _ in 0..300 {
            let error = HostLock::take(&identity("nqn.a")).unwrap_err();
            assert!(error.contains(" is host nqn.a with identifier 00000000-"), "{error}");
        }
        drop(held);
        HostLock::take(&identity("nqn.a")).unwrap();
        drop(other);
    }

    #[test]
    fn the_holder_is_named() {
        let _held = HostLock::take(&identity("nqn.c")).unwrap();
        let error = HostLock::take(&identity("nqn.c")).unwrap_err();
        assert!(error.starts_with(&format!("another process, pid {}, is", std::process::id())), "{error}");
    }
}
