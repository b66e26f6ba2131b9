//! How near a path's network interface is to the reactor that uses it: `io_policy = "numa"`.
//!
//! Owns: what sysfs says of nodes. Must not know: what is made of it. Nothing here is an error: what is not known is as near as
//! can be, as in Linux.

use super::signal::Mailbox;
use hawser_runtime::Fd;
use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The distance within a node, as firmware and Linux give it (LOCAL_DISTANCE).
pub(crate) const LOCAL: u32 = 10;

/// The distance from this reactor to the interface that carries a connection. Files and netlink are read on a thread of their own,
/// which has the reactor's CPUs.
pub(crate) async fn distance(sysfs: PathBuf, fd: Fd) -> u32 {
    let Some(address) = local_address(fd) else { return LOCAL };
    let answer = Arc::new(Mailbox::default());
    let post = Arc::clone(&answer);
    let look = move || {
        let found = interface_of(address).and_then(|name| distance_to(&sysfs, &own_cpus(), &name));
        post.post(found.unwrap_or(LOCAL));
    };
    match std::thread::Builder::new().name("numa".into()).spawn(look) {
        Ok(_) => answer.next().await,
        Err(_) => LOCAL,
    }
}

/// From the node that has all of `cpus` to that of the interface.
fn distance_to(sysfs: &Path, cpus: &[usize], interface: &str) -> Option<u32> {
    let text = |path: PathBuf| std::fs::read_to_string(path).ok();
    // -1: none. Loopback, bridges and bonds have no such file.
    let there = text(sysfs.join("class/net").join(interface).join("device/numa_node"))?;
    let there: usize = there.trim().parse().ok()?;
    let nodes = sysfs.join("devices/system/node");
    let online = list(&text(nodes.join("online"))?);
    let has_all = |node: &usize| {
        let here = text(nodes.join(format!("node{node}/cpulist"))).map(|text| list(&text));
        here.is_some_and(|here| !cpus.is_empty() && cpus.iter().all(|cpu| here.contains(cpu)))
    };
    let here = *online.iter().find(|node| has_all(node))?;
    let distances = text(nodes.join(format!("node{here}/distance")))?;
    // One for each node that is online, in their order.
    distances.split_whitespace().nth(online.iter().position(|node| *node == there)?)?.parse().ok()
}

/// A list as the kernel prints it, such as `0-3,8`.
fn list(text: &str) -> Vec<usize> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse().ok()?..=last.parse::<usize>().ok()?.min(1 << 16))
    };
    text.trim().split(',').filter_map(range).flatten().collect()
}

/// The CPUs that this thread may run on.
fn own_cpus() -> Vec<usize> {
    let mut set = MaybeUninit::<libc::cpu_set_t>::zeroed();
    // SAFETY: the kernel fills the set, of the length that is told; a set of zeroes is a valid one, so that it may be read also
    // when the kernel did not.
    let set = unsafe {
        libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), set.as_mut_ptr());
        set.assume_init()
    };
    // SAFETY: below the number of bits of the set.
    (0..8 * size_of::<libc::cpu_set_t>()).filter(|cpu| unsafe { libc::CPU_ISSET(*cpu, &set) }).collect()
}

/// Where a connection ends on our side.
fn local_address(fd: Fd) -> Option<IpAddr> {
    let mut storage = MaybeUninit::<libc::sockaddr_storage>::zeroed();
    let mut len = libc::socklen_t::try_from(size_of::<libc::sockaddr_storage>()).ok()?;
    // SAFETY: the kernel fills at most `len` bytes of the storage, which is as long.
    if unsafe { libc::getsockname(fd.0, storage.as_mut_ptr().cast(), &raw mut len) } != 0 {
        return None;
    }
    // SAFETY: the storage is initialized, as long as any address, and aligned for each.
    unsafe { ip(storage.as_ptr().cast()) }
}

/// # Safety
/// `address` is null, or points to a socket address that is whole for its family.
unsafe fn ip(address: *const libc::sockaddr) -> Option<IpAddr> {
    // SAFETY: as the caller says. The family comes first in each.
    let family = unsafe { address.as_ref() }?.sa_family;
    match libc::c_int::from(family) {
        libc::AF_INET => {
            // SAFETY: the family says what it is.
            let raw = unsafe { address.cast::<libc::sockaddr_in>().read_unaligned() };
            Some(IpAddr::from(raw.sin_addr.s_addr.to_ne_bytes()))
        }
        libc::AF_INET6 => {
            // SAFETY: the family says what it is.
            let raw = unsafe { address.cast::<libc::sockaddr_in6>().read_unaligned() };
            Some(IpAddr::from(raw.sin6_addr.s6_addr).to_canonical())
        }
        _ => None,
    }
}

/// The interface that has an address.
fn interface_of(wanted: IpAddr) -> Option<String> {
    let mut first = std::ptr::null_mut();
    // SAFETY: `first` is where the list is put, which is freed below.
    if unsafe { libc::getifaddrs(&raw mut first) } != 0 {
        return None;
    }
    let mut next: *mut libc::ifaddrs = first;
    let mut found = None;
    // SAFETY: the C library's list ends with a null pointer; its entries, names and addresses live until it is freed.
    while let Some(entry) = unsafe { next.as_ref() } {
        // SAFETY: as above; an address may be null.
        if unsafe { ip(entry.ifa_addr) } == Some(wanted) {
            // SAFETY: as above; a name is a string that ends.
            found = unsafe { CStr::from_ptr(entry.ifa_name) }.to_str().ok().map(str::to_owned);
            break;
        }
        next = entry.ifa_next;
    }
    // SAFETY: the list is not used any more.
    unsafe { libc::freeifaddrs(first) };
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd;

    /// A made-up sysfs, removed at the end.
    struct Machine(PathBuf);

    impl Drop for Machine {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    /// Two nodes with a gap between their numbers, cards on both, and one of which nothing is known.
    fn machine() -> Machine {
        let name = format!("hawser-numa-{}", std::process::id());
        let sysfs = Machine(std::env::temp_dir().join(name));
        let put = |path: &str, text: &str| {
            let path = sysfs.0.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        put("devices/system/node/online", "0,2\n");
        put("devices/system/node/node0/cpulist", "0-3,8\n");
        put("devices/system/node/node0/distance", "10 21\n");
        put("devices/system/node/node2/cpulist", "4-7\n");
        put("devices/system/node/node2/distance", "31 10\n");
        put("class/net/near/device/numa_node", "0\n");
        put("class/net/far/device/numa_node", "2\n");
        put("class/net/card/device/numa_node", "-1\n");
        put("class/net/bond/operstate", "up\n");
        sysfs
    }

    #[test]
    fn the_distance_is_that_between_the_reactors_and_the_cards_nodes() {
        let sysfs = machine();
        let of = |cpus: &[usize], interface| distance_to(&sysfs.0, cpus, interface);
        assert_eq!([of(&[0], "near"), of(&[1, 8], "far")], [Some(10), Some(21)]);
        assert_eq!([of(&[5], "near"), of(&[4, 5, 6, 7], "far")], [Some(31), Some(10)]);
        // On no node alone, nowhere, and nothing known of the card.
        assert_eq!([of(&[3, 4], "near"), of(&[9], "near"), of(&[], "near")], [None; 3]);
        assert_eq!([of(&[0], "card"), of(&[0], "bond"), of(&[0], "none")], [None; 3]);
    }

    #[test]
    fn a_connections_interface_is_found() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let address = local_address(Fd(stream.as_raw_fd())).unwrap();
        assert_eq!(interface_of(address).as_deref(), Some("lo"));
        assert!(!own_cpus().is_empty());
        assert_eq!(local_address(Fd(-1)), None);
    }
}
