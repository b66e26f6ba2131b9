//! Requests in flight when a ring, a session or a process ends: drained, given up, found in the log by the next one.

mod support;

use hawser_block::{Operation, Status};
use hawser_virtio::DiskState;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use support::frontend::*;
use support::{Served, eventually, small};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

#[test]
fn a_stop_of_a_ring_waits_for_its_requests_and_gives_them_up_in_time() {
    let served = Served::with(small(), |config| config.drain_timeout = Duration::from_millis(300));
    let mut guest = Guest::connect(&served.socket, &Wish { rings: 2, ..Wish::default() });
    served.device.fake.state().hold = true;
    let parts = guest.plain(T_IN, 0, &[], 512, DATA);
    guest.submit(1, &parts);
    eventually("taken", || served.disk.queue_counters()[1].requests.get() == 1);
    // In time: it is answered, and shown before the ring is stopped.
    let device = Arc::clone(&served.device);
    let release = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        device.release();
    });
    assert_eq!(guest.frontend.get_vring_base(1).unwrap(), 1);
    assert!(guest.rings[1].take_used(&guest.ram).is_some());
    assert_eq!(guest.ram.read(DATA + 16, 1), [0]);
    release.join().unwrap();
    // Not in time, without a log: the request fails, and the other queue has not noticed anything.
    guest.start_ring(1);
    served.device.fake.state().hold = true;
    let parts = guest.plain(T_IN, 0, &[], 512, DATA);
    guest.submit(1, &parts);
    eventually("taken", || served.disk.queue_counters()[1].requests.get() == 2);
    assert_eq!(guest.frontend.get_vring_base(1).unwrap(), 2);
    assert!(guest.rings[1].take_used(&guest.ram).is_some());
    assert_eq!(guest.ram.read(DATA + 16, 1), [1]);
    assert_eq!(served.disk.stats().failures(Status::Aborted), 1);
    served.device.fake.state().hold = false;
    works(&mut guest);
}

#[test]
fn given_up_requests_stay_in_the_log_and_are_executed_before_anything_newer_of_any_queue() {
    let served = Served::with(small(), |config| config.drain_timeout = Duration::from_millis(100));
    let wish = Wish { rings: 3, size: 16, inflight: true, ..Wish::default() };
    let mut guest = Guest::connect(&served.socket, &wish);
    works(&mut guest);
    served.device.fake.state().hold = true;
    let write = |guest: &mut Guest, ring: usize, number: u64| {
        let parts =
            guest.plain(T_OUT, number, &[u8::try_from(number).unwrap(); 512], 0, DATA + 2048 * number);
        guest.submit(ring, &parts)
    };
    for number in [1, 2, 3] {
        write(&mut guest, 0, number);
    }
    for number in [11, 12] {
        write(&mut guest, 2, number);
    }
    let taken = |queue: usize| served.disk.queue_counters()[queue].requests.get();
    eventually("taken", || (taken(0), taken(2)) == (5, 2));
    // The connection is cut; the device does not answer; the disk goes on without the requests.
    guest.stream.shutdown(std::net::Shutdown::Both).unwrap();
    eventually("given up", || served.disk.state() == DiskState::Listening);
    served.device.fake.state().hold = false;
    served.device.fake.state().log.clear();
    for number in [21, 22] {
        let ring = &mut guest.rings[1];
        let _ = ring;
        let parts =
            guest.plain(T_OUT, number, &[u8::try_from(number).unwrap(); 512], 0, DATA + 2048 * number);
        let head = guest.rings[1].put_chain(&guest.ram, &parts);
        guest.rings[1].offer(&guest.ram, head);
    }
    let mut guest = guest.reconnect(&served.socket, &wish);
    write(&mut guest, 0, 4);
    for (ring, count) in [(0, 4), (1, 2), (2, 2)] {
        for _ in 0..count {
            guest.rings[ring].wait_used(&guest.ram);
        }
    }
    let log: Vec<u64> = served.device.fake.state().log.iter().map(|(_, lba, _)| *lba).collect();
    let place = |lba: u64| log.iter().position(|one| *one == lba).unwrap();
    assert_eq!(log.len(), 8, "{log:?}");
    assert!(place(1) < place(2) && place(2) < place(3) && place(11) < place(12), "{log:?}");
    for old in [1, 2, 3, 11, 12] {
        for new in [4, 21, 22] {
            assert!(place(old) < place(new), "{log:?}");
        }
        assert_eq!(guest.ram.read(DATA + 2048 * old + 16, 1), [0]);
    }
    assert_eq!(served.disk.queue_counters()[2].replayed.get(), 2);
    works(&mut guest);
}

/// A message that waits for requests in flight did not look at its connection. A front end that died meanwhile kept its
/// successor in the backlog for as long as the device was away.
#[test]
fn a_front_end_that_goes_while_its_message_waits_for_requests_does_not_keep_the_disk() {
    let served = Served::with(small(), |config| config.drain_timeout = Duration::from_millis(100));
    for set_config in [true, false] {
        let mut guest =
            Guest::connect(&served.socket, &Wish { slots: true, inflight: true, ..Wish::default() });
        let second = Ram::new(1 << 41, 1 << 20);
        guest.frontend.add_mem_region(&second.region()).unwrap();
        served.device.fake.state().hold = true;
        let before = served.disk.queue_counters()[0].requests.get();
        guest.ram.write(DATA, &header(T_IN, 0));
        guest.submit(0, &[readable(DATA, 16), writable(1 << 41, 512), writable(DATA + 16, 1)]);
        eventually("taken", || served.disk.queue_counters()[0].requests.get() == before + 1);
        let stream = guest.stream.try_clone().unwrap();
        let killer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(150));
            stream.shutdown(std::net::Shutdown::Both).unwrap();
        });
        if set_config {
            let flags = vhost::vhost_user::message::VhostUserConfigFlags::WRITABLE;
            assert!(guest.frontend.set_config(32, flags, &[0]).is_err());
        } else {
            assert!(guest.frontend.remove_mem_region(&second.region()).is_err());
        }
        killer.join().unwrap();
        eventually("served again", || served.disk.state() == DiskState::Listening);
        served.device.fake.state().hold = false;
        works(&mut Guest::connect(&served.socket, &Wish::default()));
    }
    assert_eq!(served.disk.counters().sessions_failed.load(Ordering::Relaxed), 0);
}

#[test]
fn a_disconnect_with_requests_in_flight_ends_them_first() {
    let served = Served::new(small());
    for inflight in [false, true] {
        let wish = Wish { inflight, ..Wish::default() };
        let mut guest = Guest::connect(&served.socket, &wish);
        served.device.fake.state().hold = true;
        let before = served.disk.queue_counters()[0].requests.get();
        let parts = guest.plain(T_OUT, 9, &[9; 512], 0, DATA);
        guest.submit(0, &parts);
        eventually("taken", || served.disk.queue_counters()[0].requests.get() == before + 1);
        guest.stream.shutdown(std::net::Shutdown::Both).unwrap();
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(guest.rings[0].take_used(&guest.ram), None);
        served.device.release();
        eventually("shown as used though nobody is connected", || {
            guest.rings[0].used_idx(&guest.ram) == guest.rings[0].next_available
        });
        served.device.fake.state().log.clear();
        // The front end comes back with the base that it remembers from before: nothing is executed twice.
        let mut guest = guest.reconnect(&served.socket, &wish);
        assert!(guest.rings[0].take_used(&guest.ram).is_some());
        works(&mut guest);
        assert_eq!(served.device.fake.state().log.len(), 2);
    }
}

#[test]
fn writeback_off_is_found_in_the_log_by_the_next_process() {
    let first = Served::new(small());
    let wish = Wish { inflight: true, ..Wish::default() };
    let mut guest = Guest::connect(&first.socket, &wish);
    let flags = vhost::vhost_user::message::VhostUserConfigFlags::WRITABLE;
    guest.frontend.set_config(32, flags, &[0]).unwrap();
    works(&mut guest);
    drop(first);
    let second = Served::new(small());
    let mut guest = guest.reconnect(&second.socket, &wish);
    works(&mut guest);
    assert_eq!(second.device.fake.state().log[0], (Operation::Write { fua: true }, 5, 1));
}

/// QEMU 10 asks for a log of the device's default size, 128, and Debian 13's SeaBIOS then sets up a ring of 256: the
/// session ended and the VM did not boot.
#[test]
fn a_ring_larger_than_what_the_log_was_asked_for_works_across_a_reconnect() {
    let first = Served::new(small());
    let wish = Wish { inflight: true, size: 256, log_size: Some(128), ..Wish::default() };
    let mut guest = Guest::connect(&first.socket, &wish);
    works(&mut guest);
    assert_eq!(guest.inflight.as_ref().unwrap().0.queue_size, 128);
    drop(first);
    let second = Served::new(small());
    let mut guest = guest.reconnect(&second.socket, &wish);
    works(&mut guest);
}

#[test]
fn a_log_of_an_unknown_version_is_refused_and_left_alone() {
    let served = Served::new(small());
    let wish = Wish { inflight: true, size: 16, ..Wish::default() };
    let guest = Guest::connect(&served.socket, &wish);
    guest.stream.shutdown(std::net::Shutdown::Both).unwrap();
    eventually("over", || served.disk.state() == DiskState::Listening);
    let (description, file) = guest.inflight.unwrap();
    use std::os::unix::fs::FileExt;
    file.write_at(&7u16.to_ne_bytes(), 8).unwrap();
    let mut before = vec![0; usize::try_from(description.mmap_size).unwrap()];
    file.read_at(&mut before, 0).unwrap();
    let wish_without = Wish { rings: 0, ..wish.clone() };
    let mut again = Guest::with(
        &served.socket,
        &wish_without,
        guest.ram,
        Vec::new(),
        Some((description, file.try_clone().unwrap())),
    );
    again.rings = guest.rings;
    let ring = &again.rings[0];
    again.frontend.set_vring_num(0, ring.size).unwrap();
    again.frontend.set_vring_addr(0, &Guest::vring_config(ring)).unwrap();
    again.frontend.set_vring_kick(0, &ring.kick).unwrap();
    assert!(again.frontend.set_vring_enable(0, true).is_err());
    eventually("told", || served.disk.trouble().contains("version 7; this program knows 1"));
    let mut after = vec![0; before.len()];
    file.read_at(&mut after, 0).unwrap();
    assert!(before == after);
}

#[test]
fn requests_in_flight_of_a_ring_that_is_broken_still_end() {
    let served = Served::new(small());
    let wish = Wish { inflight: true, ..Wish::default() };
    let mut guest = Guest::connect(&served.socket, &wish);
    served.device.fake.state().hold = true;
    let parts = guest.plain(T_OUT, 3, &[3; 512], 0, DATA);
    guest.submit(0, &parts);
    eventually("taken", || served.disk.queue_counters()[0].requests.get() == 1);
    guest.rings[0].offer(&guest.ram, 999);
    guest.rings[0].kick.write(1).unwrap();
    eventually("noticed", || served.disk.trouble().contains("descriptor 999"));
    served.device.release();
    assert!(guest.is_ended());
    assert!(guest.rings[0].take_used(&guest.ram).is_some());
    assert_eq!(guest.ram.read(DATA + 16, 1), [0]);
    assert_eq!(served.device.fake.state().content[3 * 512], 3);
}

/// A log of more queues than the disk has may have unfinished requests in a queue that nobody can start: all others waited for
/// that one, for ever. So they did after a new log was made in the place of an old one with unfinished requests.
#[test]
fn no_queue_waits_for_unfinished_requests_that_nobody_can_execute() {
    let served = Served::new(small());
    let wish = Wish { rings: 2, inflight: true, size: 16, ..Wish::default() };
    let guest = Guest::connect(&served.socket, &wish);
    let (mut description, file) = guest.inflight.unwrap();
    drop((guest.frontend, guest.stream));
    // A request of the second queue, whose part follows 16 bytes and 1024 entries of the first, is marked.
    use std::os::unix::fs::FileExt;
    file.write_at(&[1], (16u64 + 16 * 1024).next_multiple_of(64) + 16).unwrap();
    let none = Wish { rings: 0, ..wish.clone() };
    let mut guest = Guest::with(
        &served.socket,
        &none,
        guest.ram,
        Vec::new(),
        Some((description, file.try_clone().unwrap())),
    );
    let wanted = vhost::vhost_user::message::VhostUserInflight::new(0, 0, 1, 16);
    guest.inflight = Some(guest.frontend.get_inflight_fd(&wanted).unwrap());
    guest.ram.zero(RAM_GUEST, usize::try_from(DATA - RAM_GUEST).unwrap());
    guest.rings.push(new_ring(0, &wish));
    guest.start_ring(0);
    works(&mut guest);
    drop(guest);

    let file = Ram::new(0, 1 << 20).file.try_clone().unwrap();
    description.num_queues = 5;
    description.mmap_size = 1 << 20;
    let mut stream = UnixStream::connect(&served.socket).unwrap();
    let mut frontend = vhost::vhost_user::Frontend::from_stream(stream.try_clone().unwrap(), 64);
    frontend.set_owner().unwrap();
    frontend.get_features().unwrap();
    frontend.set_features(wish.features).unwrap();
    let protocol = frontend.get_protocol_features().unwrap();
    frontend.set_protocol_features(protocol).unwrap();
    let _ = frontend.set_inflight_fd(&description, std::os::fd::AsRawFd::as_raw_fd(&file));
    drop(frontend);
    let _ = stream.read_to_end(&mut Vec::new());
    eventually("told", || {
        served.disk.trouble().contains("SET_INFLIGHT_FD: a log of 5 queues; the disk has 4")
    });
}

/// A front end that comes again at once is heard while its old session still ends what it has. That stands in the log when the
/// log is handed in, and not any more when the rings start: a queue that is not started again held the others up for it.
#[test]
fn no_queue_waits_for_what_the_old_session_has_ended_meanwhile() {
    let served = Served::new(small());
    let wish = Wish { rings: 2, inflight: true, ..Wish::default() };
    let mut guest = Guest::connect(&served.socket, &wish);
    served.device.fake.state().hold = true;
    let parts = guest.plain(T_OUT, 1, &[1; 512], 0, DATA + 4096);
    guest.submit(1, &parts);
    eventually("taken", || served.disk.queue_counters()[1].requests.get() == 1);
    guest.stream.shutdown(std::net::Shutdown::Both).unwrap();
    let second_ring = guest.rings.pop().unwrap();
    let mut guest = guest.reconnect(&served.socket, &wish);
    assert_eq!(second_ring.used_idx(&guest.ram), 0, "the old session still has it");
    served.device.release();
    works(&mut guest);
    assert_eq!(second_ring.used_idx(&guest.ram), 1);
}
