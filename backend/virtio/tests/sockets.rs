//! A disk's socket: when it listens, whose it is, who waits, and how it goes.

mod support;

use hawser_block::{Device, Geometry};
use hawser_virtio::{DiskError, DiskState, SocketError, VhostDisk, remove_stale};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use support::frontend::*;
use support::{Folder, Served, config, eventually, reactor, small};

#[test]
fn a_disk_waits_for_its_devices_size_before_it_listens() {
    struct Late(support::TestDevice, std::sync::atomic::AtomicBool);
    impl Device for Late {
        fn name(&self) -> &str {
            self.0.name()
        }
        fn geometry(&self) -> Option<Geometry> {
            self.1.load(Ordering::Acquire).then(|| self.0.geometry()).flatten()
        }
        fn state(&self) -> hawser_block::DeviceState {
            self.0.state()
        }
        fn uuid(&self) -> [u8; 16] {
            self.0.uuid()
        }
        fn subscribe(&self, listener: Box<dyn Fn() + Send + Sync>) {
            self.0.subscribe(listener);
        }
        fn channel(
            &self,
            runtime: &hawser_runtime::Runtime,
            user: hawser_runtime::SourceId,
        ) -> Box<dyn hawser_block::Channel> {
            self.0.channel(runtime, user)
        }
        fn stats(&self) -> Arc<hawser_block::StatsSet> {
            self.0.stats()
        }
    }
    let folder = Folder::new();
    let reactor = reactor();
    let device = Arc::new(Late(support::TestDevice::new(small()), false.into()));
    let config = config(&folder.path("s"));
    let disk =
        VhostDisk::start(config, Arc::clone(&device) as Arc<dyn Device>, vec![reactor.handle().clone()])
            .unwrap();
    assert_eq!(disk.state(), DiskState::Waiting);
    assert!(!folder.path("s").exists());
    assert_eq!(disk.geometry(), None);
    device.1.store(true, Ordering::Release);
    device.0.grow(8192);
    eventually("it listens", || disk.state() == DiskState::Listening);
    works(&mut Guest::connect(&folder.path("s"), &Wish::default()));
}

#[test]
fn a_socket_has_its_mode_and_owner_and_respects_what_lives_there() {
    let folder = Folder::new();
    let reactor = reactor();
    let path = folder.path("s");
    let start = |change: fn(&mut hawser_virtio::DiskConfig)| {
        let mut config = config(&folder.path("s"));
        change(&mut config);
        let device = Arc::new(support::TestDevice::new(small()));
        VhostDisk::start(config, device as Arc<dyn Device>, vec![reactor.handle().clone()])
    };
    let refused = |result: Result<VhostDisk, DiskError>| match result {
        Ok(_) => panic!("started"),
        Err(error) => error,
    };
    let disk = start(|config| config.access.mode = Some(0o640)).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
    // Served by a hawser: its lock says so, and the one that lives is not disturbed.
    let error = refused(start(|_| {}));
    assert!(matches!(error, DiskError::Socket(SocketError::Locked(_))), "{error}");
    assert_eq!(disk.counters().sessions.load(Ordering::Relaxed), 0);
    works(&mut Guest::connect(&path, &Wish::default()));
    assert!(disk.stop(Duration::from_secs(1)).has_ended());
    assert!(!path.exists() && !folder.path("s.lock").exists());
    // Another program listens.
    let other = UnixListener::bind(&path).unwrap();
    let error = refused(start(|_| {}));
    assert!(matches!(error, DiskError::Socket(SocketError::Live(_))), "{error}");
    assert!(path.exists());
    // It has died: its socket is stale.
    drop(other);
    let disk = start(|_| {}).unwrap();
    works(&mut Guest::connect(&path, &Wish::default()));
    // Somebody has put another socket there meanwhile: it is not ours to remove.
    std::fs::remove_file(&path).unwrap();
    let other = UnixListener::bind(&path).unwrap();
    drop(disk);
    assert!(path.exists());
    drop(other);
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "a file").unwrap();
    let error = refused(start(|_| {}));
    assert!(matches!(error, DiskError::Socket(SocketError::NotASocket(_))), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"a file");
    std::fs::remove_file(&path).unwrap();
    for (change, text) in [
        ((|config| config.serial = "x".repeat(21)) as fn(&mut hawser_virtio::DiskConfig), "longer than 20"),
        (|config| config.queues = 0, "queues = 0"),
        (|config| config.queues = 65, "1 to 64"),
        (|config| config.access.user = Some("no-such-user".into()), "no user \"no-such-user\""),
        (|config| config.access.group = Some("no-such-group".into()), "no group"),
        (|config| config.socket = "/no/such/folder/s".into(), "No such file"),
        (|config| config.socket = "x".repeat(108).into(), "107 bytes"),
    ] {
        let error = refused(start(change)).to_string();
        assert!(error.contains(text), "{error}");
        assert_eq!(
            std::fs::read_dir(path.parent().unwrap()).unwrap().count(),
            0,
            "{text}: something is left"
        );
    }
}

/// Root gives a socket to root, which it was anyway: the test of owners held without any code behind it.
#[test]
fn a_socket_has_the_owner_and_the_group_that_it_is_given() {
    let folder = Folder::new();
    let path = folder.path("s");
    let own = std::fs::metadata(path.parent().unwrap()).unwrap();
    let reactor = reactor();
    let owners = |user: Option<u32>, group: Option<u32>| {
        let mut config = config(&path);
        config.access.user = user.map(|user| user.to_string());
        config.access.group = group.map(|group| group.to_string());
        let device = Arc::new(support::TestDevice::new(small()));
        let disk =
            VhostDisk::start(config, device as Arc<dyn Device>, vec![reactor.handle().clone()]).unwrap();
        let found = std::fs::metadata(&path).unwrap();
        works(&mut Guest::connect(&path, &Wish::default()));
        assert!(disk.stop(Duration::from_secs(1)).has_ended());
        (found.uid(), found.gid())
    };
    assert_eq!(owners(None, None), (own.uid(), own.gid()));
    // SAFETY: plain system call.
    if unsafe { libc::geteuid() } == 0 {
        assert_eq!(owners(Some(65533), Some(65534)), (65533, 65534));
        assert_eq!(owners(Some(65533), None), (65533, own.gid()));
        assert_eq!(owners(None, Some(65534)), (own.uid(), 65534));
        return;
    }
    let mut groups = [0; 64];
    // SAFETY: there is room for as many groups as are asked for.
    let count = unsafe { libc::getgroups(64, groups.as_mut_ptr()) };
    let groups = &groups[..usize::try_from(count).unwrap_or(0)];
    match groups.iter().find(|group| **group != own.gid()) {
        Some(group) => assert_eq!(owners(Some(own.uid()), Some(*group)), (own.uid(), *group)),
        None => skips::skip("an ordinary user in one group only has no other to give a socket to"),
    }
}

/// Whoever could not be connected to was taken for dead, and its socket was removed: a program with a full backlog (which the
/// connect waited for, without end), and what is no stream socket.
#[test]
fn only_a_refused_connection_means_that_a_socket_is_stale() {
    let folder = Folder::new();
    let path = folder.path("s");
    assert!(remove_stale(&path).is_ok(), "nothing is there");
    let listener = UnixListener::bind(&path).unwrap();
    // SAFETY: plain system call on our own descriptor: one client may wait, and the next one finds no place.
    unsafe { libc::listen(listener.as_raw_fd(), 0) };
    let _waiting = UnixStream::connect(&path).unwrap();
    for _ in 0..2 {
        let error = remove_stale(&path).unwrap_err();
        assert!(matches!(error, SocketError::Live(_)), "{error}");
    }
    drop(listener);
    remove_stale(&path).unwrap();
    assert!(!path.exists());
    let _datagrams = UnixDatagram::bind(&path).unwrap();
    let error = remove_stale(&path).unwrap_err().to_string();
    assert!(error.contains("connect, to see whether anybody listens: Protocol wrong type"), "{error}");
    assert!(path.exists());
}

#[test]
fn a_stopped_disk_has_ended_its_requests_and_closed_its_socket() {
    let served = Served::new(small());
    let mut guest = Guest::connect(&served.socket, &Wish::default());
    served.device.fake.state().hold = true;
    let parts = guest.plain(T_OUT, 9, &[9; 512], 0, DATA);
    guest.submit(0, &parts);
    eventually("taken", || served.disk.queue_counters()[0].requests.get() == 1);
    let device = Arc::clone(&served.device);
    let release = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        device.release();
    });
    assert!(served.disk.stop(Duration::from_secs(20)).has_ended());
    assert!(guest.rings[0].take_used(&guest.ram).is_some());
    assert!(guest.is_ended());
    assert!(!served.socket.exists());
    release.join().unwrap();
}

#[test]
fn a_second_front_end_waits_for_the_first_and_half_a_message_stops_nobody() {
    let served = Served::new(small());
    let mut first = Guest::connect(&served.socket, &Wish::default());
    let socket = served.socket.clone();
    let second = std::thread::spawn(move || {
        let mut guest = Guest::connect(&socket, &Wish::default());
        works(&mut guest);
        guest
    });
    for _ in 0..20 {
        works(&mut first);
    }
    assert!(!second.is_finished());
    drop(first);
    drop(second.join().unwrap());
    let mut half = UnixStream::connect(&served.socket).unwrap();
    half.write_all(&message(2, 1, &[0; 8])[..15]).unwrap();
    eventually("accepted", || served.disk.state() == DiskState::Connected);
    assert!(served.disk.stop(Duration::from_secs(20)).has_ended());
    assert!(!served.socket.exists());
}

/// A disk that was removed while its device did not answer was served again, at the same socket with the same log. When the
/// device answered at last, the old queue wrote a second used element for requests that the new one had executed.
#[test]
fn what_a_removed_disk_left_at_its_device_does_not_touch_its_successors_ring() {
    let Served { disk, reactor, device, socket, folder, .. } =
        Served::with(small(), |config| config.drain_timeout = Duration::from_millis(100));
    let wish = Wish { inflight: true, ..Wish::default() };
    device.deaf.store(true, Ordering::Release);
    let mut guest = Guest::connect(&socket, &wish);
    works(&mut guest);
    device.fake.state().hold = true;
    for number in [1, 2] {
        let parts = guest.plain(T_OUT, number, &[9; 512], 0, DATA + 4096 * number);
        guest.submit(0, &parts);
    }
    eventually("taken", || disk.queue_counters()[0].requests.get() == 4);
    let left = disk.stop(Duration::from_millis(100));
    assert!(!left.has_ended());
    assert!(guest.is_ended() && guest.rings[0].take_used(&guest.ram).is_none());

    // Its successor, on another device, executes what is in the log.
    let second = Arc::new(support::TestDevice::new(small()));
    let disk = VhostDisk::start(
        config(&socket),
        Arc::clone(&second) as Arc<dyn Device>,
        vec![reactor.handle().clone()],
    )
    .unwrap();
    let mut guest = guest.reconnect(&socket, &wish);
    for _ in 0..2 {
        guest.rings[0].wait_used(&guest.ram);
    }
    assert_eq!(disk.queue_counters()[0].replayed.get(), 2);
    works(&mut guest);
    // One is under way in the new session.
    second.fake.state().hold = true;
    let parts = guest.plain(T_OUT, 3, &[9; 512], 0, DATA + 4096 * 3);
    guest.submit(0, &parts);
    eventually("taken", || disk.queue_counters()[0].requests.get() == 3);
    let (ring, log) = (guest.ram.read(RAM_GUEST, 0x8000), log_bytes(&guest));
    let _ = guest.rings[0].call.read();
    device.release();
    eventually("the old requests end", || left.has_ended());
    assert!(guest.ram.read(RAM_GUEST, 0x8000) == ring, "the ring changed");
    assert!(log_bytes(&guest) == log, "the log changed");
    assert!(guest.rings[0].call.read().is_err(), "interrupted");
    second.release();
    guest.rings[0].wait_used(&guest.ram);
    works(&mut guest);
    drop((disk, reactor, folder));
}

fn log_bytes(guest: &Guest) -> Vec<u8> {
    let (description, file) = guest.inflight.as_ref().unwrap();
    let mut bytes = vec![0; usize::try_from(description.mmap_size).unwrap()];
    std::os::unix::fs::FileExt::read_exact_at(file, &mut bytes, description.mmap_offset).unwrap();
    bytes
}
