//! rdma-core behind [`Table`]: the library that the daemon opens when RDMA is asked for.
//!
//! Owns: translation between the table's structs and those of verbs and rdma_cm, and nothing else: no policy, no NVMe, no memory of
//! the daemon's. Invariants: what the table says of each function; every descriptor is non-blocking, so that no call waits for a peer.

mod cm;
mod device;
mod queue;

use hawser_verbs_abi::{BUILD, Table};

static TABLE: Table = Table {
    devices: device::devices,
    channel_open: cm::channel_open,
    channel_close: cm::channel_close,
    channel_event: cm::channel_event,
    id_open: cm::id_open,
    id_close: cm::id_close,
    id_migrate: cm::id_migrate,
    resolve_address: cm::resolve_address,
    resolve_route: cm::resolve_route,
    bind: cm::bind,
    listen: cm::listen,
    port: cm::port,
    connect: cm::connect,
    accept: cm::accept,
    reject: cm::reject,
    disconnect: cm::disconnect,
    device: cm::device,
    device_attributes: device::attributes,
    domain_open: device::domain_open,
    register: device::register,
    deregister: device::deregister,
    window_open: device::window_open,
    window_close: device::window_close,
    queue_open: queue::open,
    queue_error: queue::error,
    queue_close: queue::close,
    post_send: queue::post_send,
    post_receive: queue::post_receive,
    poll: queue::poll,
    arm: queue::arm,
};

/// See [`hawser_verbs_abi::Entry`].
///
/// # Safety
/// Both pointers are to 16 bytes, the first readable and the second writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hawser_verbs_entry(build: *const [u8; 16], own: *mut [u8; 16]) -> *const Table {
    let mut name = [0; 16];
    name.copy_from_slice(&BUILD.as_bytes()[..16]);
    // SAFETY: the caller's promise.
    unsafe {
        *own = name;
        if *build == name { &raw const TABLE } else { std::ptr::null() }
    }
}

/// The errno of the call before, negated.
fn last_errno() -> i32 {
    -std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

/// For calls that return 0, or -1 and set errno.
fn checked(result: i32) -> i32 {
    if result == 0 { 0 } else { last_errno() }
}

/// For calls that return 0 or an errno.
fn negated(result: i32) -> i32 {
    if result == 0 { 0 } else { -result.abs() }
}

/// A device's number as ours: what is not positive is none.
fn unsigned(value: i32) -> u32 {
    u32::try_from(value).unwrap_or(0)
}

/// Descriptors are waited on elsewhere: reading one must not block.
fn non_blocking(fd: i32) -> i32 {
    // SAFETY: plain system calls on a descriptor of ours.
    unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        if flags < 0 || libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) < 0 {
            return last_errno();
        }
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_daemon_of_this_build_gets_the_table() {
        let mut own = [0; 16];
        // SAFETY: 16 bytes each.
        let table = unsafe { hawser_verbs_entry(b"0123456789abcdef", &raw mut own) };
        assert!(table.is_null() && own == BUILD.as_bytes()[..16]);
        let ours = own;
        // SAFETY: as above.
        assert!(!unsafe { hawser_verbs_entry(&raw const ours, &raw mut own) }.is_null());
    }
}
