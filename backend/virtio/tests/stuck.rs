//! A device that does not end what it has, whatever it is told, and answers long after everybody has stopped waiting: no
//! request is completed, repeated or forgotten, no ring is started, and no memory unmapped, before it has.
//!
//! The device is the test's own and answers when the test says so: "minutes later" is after everything else that can happen.

mod support;

use hawser_block::Operation;
use hawser_virtio::DiskState;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use support::frontend::*;
use support::{Served, eventually, small};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

/// Longer than `drain_timeout` and what a stop waits for requests that were given up; much shorter than for ever.
const BOUND: Duration = Duration::from_secs(25);

fn wish() -> Wish {
    Wish { rings: 2, inflight: true, slots: true, ..Wish::default() }
}

/// Where the read of [`stuck`] goes: a region of its own.
const OTHER: u64 = 1 << 41;

/// A disk whose device has two writes and a read of ring 0 and does not end them.
fn stuck() -> (Served, Guest, Ram) {
    let served = Served::with(small(), |config| config.drain_timeout = Duration::from_millis(100));
    served.device.deaf.store(true, Ordering::Release);
    let mut guest = Guest::connect(&served.socket, &wish());
    let other = Ram::new(OTHER, 1 << 20);
    guest.frontend.add_mem_region(&other.region()).unwrap();
    works(&mut guest);
    served.device.fake.state().hold = true;
    for number in [1, 2] {
        let parts = guest.plain(T_OUT, number, &[9; 512], 0, DATA + 4096 * number);
        guest.submit(0, &parts);
    }
    guest.ram.write(DATA, &header(T_IN, 5));
    guest.ram.write(DATA + 16, &[0xff]);
    other.write(OTHER, &[0xee; 512]);
    guest.submit(0, &[readable(DATA, 16), writable(OTHER, 512), writable(DATA + 16, 1)]);
    eventually("taken", || requests(&served) == 5);
    (served, guest, other)
}

fn requests(served: &Served) -> u64 {
    served.disk.queue_counters()[0].requests.get()
}

fn log_bytes(guest: &Guest) -> Vec<u8> {
    let (description, file) = guest.inflight.as_ref().unwrap();
    let mut bytes = vec![0; usize::try_from(description.mmap_size).unwrap()];
    std::os::unix::fs::FileExt::read_exact_at(file, &mut bytes, description.mmap_offset).unwrap();
    bytes
}

/// How many mappings of this piece of guest memory there are besides our own.
fn mappings(ram: &Ram) -> usize {
    use std::os::unix::fs::MetadataExt;
    let inode = ram.file.metadata().unwrap().ino().to_string();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.split_whitespace().nth(4) == Some(&inode)).count() - 1
}

/// What the driver sees of its ring and its requests.
fn seen(guest: &Guest) -> (Vec<u8>, Vec<u8>, Vec<u8>) {
    let statuses = [0, 1, 2].iter().flat_map(|number| guest.ram.read(DATA + 4096 * number + 16, 1)).collect();
    (guest.ram.read(guest.rings[0].used_at(), 0x1000), statuses, log_bytes(guest))
}

/// The device answers at last: nobody sees that, and then everything is executed once more, in order, before what is new.
fn ends(served: &Served, guest: &mut Guest, before: &(Vec<u8>, Vec<u8>, Vec<u8>)) {
    served.device.fake.state().log.clear();
    assert!(seen(guest) == *before, "something was shown while the device had the requests");
    served.device.release();
    for _ in 0..4 {
        guest.rings[0].wait_used(&guest.ram);
    }
    let log: Vec<_> = served.device.fake.state().log.iter().map(|(what, lba, _)| (*what, *lba)).collect();
    let (write, read) = (|lba| (Operation::Write { fua: false }, lba), (Operation::Read, 5));
    // The old ones, late; then all of them again; then the new one.
    assert_eq!(log, [write(1), write(2), read, write(1), write(2), read, write(3)]);
    for number in 0..4 {
        assert_eq!(guest.ram.read(DATA + 4096 * number + 16, 1), [0]);
    }
    assert_eq!(guest.rings[0].take_used(&guest.ram), None);
}

fn offer_new(guest: &mut Guest) {
    let parts = guest.plain(T_OUT, 3, &[9; 512], 0, DATA + 4096 * 3);
    guest.submit(0, &parts);
}

/// GET_VRING_BASE waited for as long as the device was away, and with it the front end, which stops its VM, its monitor and its
/// other disks for that.
#[test]
fn a_ring_is_stopped_in_time_and_starts_when_the_device_has_ended_what_it_had() {
    let (served, mut guest, other) = stuck();
    let before = seen(&guest);
    let began = Instant::now();
    // All five were taken.
    assert_eq!(guest.frontend.get_vring_base(0).unwrap(), 5);
    assert!(began.elapsed() < BOUND);
    assert!(seen(&guest) == before, "something was shown");
    // The other ring has not noticed anything, but a ring that starts now waits, whichever it is.
    guest.frontend.get_vring_base(1).unwrap();
    guest.start_ring(1);
    guest.start_ring(0);
    offer_new(&mut guest);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(requests(&served), 5);
    // What reads land in is mapped for as long as they may, also when the front end takes it away: nobody hears that it has.
    let mut frontend = guest.frontend.clone();
    let region = other.region();
    let removal = std::thread::spawn(move || frontend.remove_mem_region(&region));
    // Long enough for the message to be there, also on a busy machine.
    std::thread::sleep(Duration::from_secs(1));
    assert!(!removal.is_finished());
    assert_eq!(mappings(&other), 1);
    assert_eq!(other.read(OTHER, 512), [0xee; 512]);
    // It is held in the message; the ring waits with it. The device answers: both go on.
    served.device.fake.state().log.clear();
    served.device.release();
    removal.join().unwrap().unwrap();
    assert_eq!(other.read(OTHER, 512), [0x5a; 512]);
    // The read is executed again, into memory that is not there any more.
    for _ in 0..4 {
        guest.rings[0].wait_used(&guest.ram);
    }
    assert_eq!(guest.ram.read(DATA + 16, 1), [1]);
    eventually("unmapped", || mappings(&other) == 0);
    assert_eq!(served.device.fake.state().log.len(), 3 + 2 + 1);
    works(&mut guest);
}

#[test]
fn a_ring_that_was_stopped_in_time_executes_what_it_left_once_and_in_order() {
    let (served, mut guest, other) = stuck();
    let before = seen(&guest);
    guest.frontend.get_vring_base(0).unwrap();
    guest.start_ring(0);
    offer_new(&mut guest);
    ends(&served, &mut guest, &before);
    assert_eq!(other.read(OTHER, 512), [0x5a; 512]);
    assert_eq!(served.disk.queue_counters()[0].replayed.get(), 3);
    works(&mut guest);
}

/// The front end goes and comes again: it is heard at once, and its rings wait. Its old memory, another mapping of the same
/// file, stays until the device has let go.
#[test]
fn a_session_that_ends_with_requests_stuck_is_followed_by_one_whose_rings_wait() {
    let (served, guest, other) = stuck();
    let before = seen(&guest);
    guest.stream.shutdown(std::net::Shutdown::Both).unwrap();
    eventually("the session ends", || served.disk.state() == DiskState::Listening);
    let mut guest = guest.reconnect(&served.socket, &wish());
    guest.frontend.add_mem_region(&other.region()).unwrap();
    assert_eq!(guest.config()[..8], 8192u64.to_le_bytes());
    offer_new(&mut guest);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!((requests(&served), mappings(&other), mappings(&guest.ram)), (5, 2, 2));
    ends(&served, &mut guest, &before);
    eventually("unmapped", || (mappings(&other), mappings(&guest.ram)) == (1, 1));
    works(&mut guest);
}

/// Another front end, with other memory: a late write of the first one's would land on what this one writes.
#[test]
fn another_front_ends_rings_wait_too() {
    let (served, guest, _other) = stuck();
    let mut second = Guest::connect(&served.socket, &wish());
    let parts = second.plain(T_OUT, 1, &[1; 512], 0, DATA);
    second.submit(0, &parts);
    guest.frontend.get_vring_base(0).unwrap();
    guest.frontend.get_vring_base(1).unwrap();
    drop(guest);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(second.rings[0].take_used(&second.ram), None);
    served.device.release();
    second.rings[0].wait_used(&second.ram);
    assert_eq!(served.device.fake.state().content[512..1024], [1; 512]);
}

/// A front end stops ring after ring: `drain_timeout`, and what a stop waits for what was given up, were waited for each of them.
#[test]
fn what_was_waited_for_one_ring_is_not_waited_for_the_next() {
    let (served, mut guest, _other) = stuck();
    let parts = guest.plain(T_OUT, 4, &[9; 512], 0, DATA + 4096 * 4);
    guest.submit(1, &parts);
    eventually("taken", || served.disk.queue_counters()[1].requests.get() == 1);
    guest.frontend.get_vring_base(0).unwrap();
    let began = Instant::now();
    guest.frontend.get_vring_base(1).unwrap();
    // Another 5 s before.
    assert!(began.elapsed() < Duration::from_millis(4500), "{:?}", began.elapsed());
    served.device.release();
    (0..2).for_each(|index| guest.start_ring(index));
    guest.rings[1].wait_used(&guest.ram);
    for _ in 0..3 {
        guest.rings[0].wait_used(&guest.ram);
    }
    // A ring has started: the next stop waits again.
    works(&mut guest);
}

/// A front end dials again while its old session drains: it was told that its ring had stopped, its device was reset, its memory
/// removed, while the old session's queues still read into that memory.
#[test]
fn who_dials_again_is_not_told_that_rings_have_stopped_that_an_old_session_still_drains() {
    let served = Served::new(small());
    let mut guest = Guest::connect(&served.socket, &wish());
    works(&mut guest);
    served.device.fake.state().hold = true;
    for number in 1..=4 {
        let parts = guest.plain(T_IN, number, &[], 512, DATA + 4096 * number);
        guest.submit(0, &parts);
    }
    eventually("taken", || requests(&served) == 6);
    for what in 0..4 {
        guest = guest.reconnect(&served.socket, &wish());
        if what == 0 {
            assert_eq!(served.disk.sessions().len(), 2);
        }
        let region = guest.ram.region();
        let mut frontend = guest.frontend.clone();
        let waits = std::thread::spawn(move || match what {
            0 => assert!(frontend.get_vring_base(0).is_ok()),
            1 => frontend.set_vring_enable(0, false).unwrap(),
            2 => frontend.reset_device().unwrap(),
            _ => frontend.remove_mem_region(&region).unwrap(),
        });
        std::thread::sleep(Duration::from_millis(200));
        assert!(!waits.is_finished(), "answered while requests are in flight: {what}");
        served.device.release();
        waits.join().unwrap();
        // All that the old one had taken is shown.
        assert_eq!(guest.rings[0].used_idx(&guest.ram), guest.rings[0].next_available);
        drop(guest);
        eventually("gone", || served.disk.sessions().is_empty());
        served.device.fake.state().hold = false;
        guest = Guest::connect(&served.socket, &wish());
        works(&mut guest);
        served.device.fake.state().hold = true;
        let taken = requests(&served);
        let parts = guest.plain(T_IN, 1, &[], 512, DATA + 4096);
        guest.submit(0, &parts);
        eventually("taken", || requests(&served) == taken + 1);
    }
    served.device.release();
}

/// A device reset forgets what was in flight: it is not executed again. The new driver's rings wait all the same.
#[test]
fn a_reset_with_requests_stuck_is_answered_and_nothing_is_executed_again() {
    let (served, mut guest, _other) = stuck();
    let began = Instant::now();
    guest.frontend.reset_device().unwrap();
    assert!(began.elapsed() < BOUND);
    guest.ram.zero(RAM_GUEST, usize::try_from(2 * RING_BYTES).unwrap());
    guest.rings = (0..2).map(|index| new_ring(index, &wish())).collect();
    (0..2).for_each(|index| guest.start_ring(index));
    offer_new(&mut guest);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(guest.rings[0].take_used(&guest.ram), None);
    served.device.fake.state().log.clear();
    served.device.release();
    guest.rings[0].wait_used(&guest.ram);
    assert_eq!(served.device.fake.state().log.len(), 3 + 1);
    assert_eq!(guest.rings[0].take_used(&guest.ram), None);
    works(&mut guest);
}

/// The process is told to end while a ring is being stopped, and nothing ends: it does not wait for ever, and it shows nothing.
#[test]
fn the_end_of_the_disk_bounds_a_stop_that_waits_for_what_no_log_remembers() {
    let served = Served::with(small(), |config| config.drain_timeout = Duration::from_millis(100));
    served.device.deaf.store(true, Ordering::Release);
    let mut guest = Guest::connect(&served.socket, &Wish::default());
    works(&mut guest);
    served.device.fake.state().hold = true;
    let parts = guest.plain(T_IN, 5, &[], 512, DATA);
    guest.submit(0, &parts);
    eventually("taken", || requests(&served) == 3);
    let before = guest.ram.read(guest.rings[0].used_at(), 0x1000);
    let frontend = guest.frontend.clone();
    let waits = std::thread::spawn(move || frontend.get_vring_base(0).is_err());
    // Longer than a stop waits for a ring that has a log.
    std::thread::sleep(Duration::from_millis(5500));
    assert!(!waits.is_finished());
    let Served { disk, reactor, device, folder, .. } = served;
    let began = Instant::now();
    let left = disk.stop(Duration::from_millis(100));
    assert!(began.elapsed() < BOUND && !left.has_ended());
    let _ = waits.join().unwrap();
    assert_eq!((guest.ram.read(guest.rings[0].used_at(), 0x1000), mappings(&guest.ram)), (before.clone(), 1));
    device.release();
    eventually("ended", || left.has_ended());
    assert_eq!(guest.ram.read(guest.rings[0].used_at(), 0x1000), before);
    eventually("unmapped", || mappings(&guest.ram) == 0);
    drop((reactor, folder));
}
