//! What a VM needs that migrates: a log of dirty pages that misses none, and a disk that takes two front ends and serves one.

mod support;

use hawser_block::{DiscardLimits, Geometry, WriteZeroesLimits};
use hawser_virtio::SessionView;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};
use support::frontend::*;
use support::{Served, eventually, small};
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VringConfigData};

const PAGE: u64 = 4096;
/// Pages of guest memory that the model looks at: the rings, and the tests' own first megabytes.
const PAGES: u64 = 0x60_0000 / PAGE;

struct Random(u64);

impl Random {
    fn below(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }
}

/// A front end's log of dirty pages, not aligned to anything in its file.
struct Log {
    file: File,
    bytes: u64,
}

const LOG_AT: u64 = 0x1005;

impl Log {
    fn new(name: &std::ffi::CStr) -> Log {
        Log::of(name, (RAM_GUEST + RAM_BYTES as u64) / PAGE / 8)
    }

    fn of(name: &std::ffi::CStr, bytes: u64) -> Log {
        // SAFETY: a C string and a plain system call; the descriptor is ours.
        let file = unsafe {
            let fd = libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC);
            assert!(fd >= 0);
            File::from_raw_fd(fd)
        };
        file.set_len(LOG_AT + bytes).unwrap();
        Log { file, bytes }
    }

    fn region(&self) -> VhostUserDirtyLogRegion {
        VhostUserDirtyLogRegion {
            mmap_size: self.bytes,
            mmap_offset: LOG_AT,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    /// Whether the page at this guest address is marked.
    fn is_marked(&self, address: u64) -> bool {
        let (page, mut byte) = (address / PAGE, [0]);
        self.file.read_exact_at(&mut byte, LOG_AT + page / 8).unwrap();
        byte[0] & (1 << (page % 8)) != 0
    }

    /// Takes all marks of the model's pages away.
    fn clear(&self) {
        let zeroes = vec![0; usize::try_from(PAGES / 8).unwrap()];
        self.file.write_all_at(&zeroes, LOG_AT + RAM_GUEST / PAGE / 8).unwrap();
    }
}

fn logged(ring: &Ring, log: Option<u64>) -> VringConfigData {
    let config = Guest::vring_config(ring);
    VringConfigData { flags: u32::from(log.is_some()), log_addr: log.or(Some(0)), ..config }
}

/// As QEMU turns logging on, or off: the log, then the feature, then each ring.
fn set_logging(guest: &mut Guest, log: Option<&Log>) {
    if let Some(log) = log {
        guest.frontend.set_log_base(0, Some(log.region())).unwrap();
    }
    let features = guest.features | if log.is_some() { F_LOG_ALL } else { 0 };
    guest.frontend.set_features(features).unwrap();
    for ring in &guest.rings {
        let config = logged(ring, log.map(|_| ring.used_at()));
        guest.frontend.set_vring_addr(ring.index, &config).unwrap();
    }
}

fn all_kinds() -> Geometry {
    let mut geometry = small();
    geometry.discard = Some(DiscardLimits { blocks_max: 100, granularity_blocks: 1, reads_zeroes: true });
    geometry.write_zeroes = Some(WriteZeroesLimits { blocks_max: 100, may_unmap: true });
    geometry.transfer_blocks_max = 16;
    geometry
}

/// A request of any kind, right or wrong, whose data and status byte are in pages that only the device writes. Returns its
/// parts and the pages that it may write.
fn any_request(guest: &Guest, random: &mut Random, slot: u64) -> (Vec<Part>, Vec<u64>) {
    // Eight slots of 256 KiB: a page of headers, two for the status byte, then data.
    let at = DATA + 0x4_0000 * slot;
    let status = at + PAGE + random.below(2 * PAGE);
    let mut parts = vec![readable(at, 16)];
    let mut pages = vec![status / PAGE];
    let data = at + 3 * PAGE + random.below(PAGE);
    let sector = random.below(8000);
    guest.ram.write(status, &[0xff]);
    let (kind, range_bytes) = match random.below(8) {
        0 => (T_FLUSH, 0),
        1 => (T_DISCARD, 16),
        2 => (T_WRITE_ZEROES, 16),
        3 => (99, 0),
        4 => (T_GET_ID, 0),
        5 => (T_OUT, 0),
        _ => (T_IN, 0),
    };
    guest.ram.write(at, &header(kind, sector));
    if range_bytes > 0 {
        guest.ram.write(at + 32, &range(sector, 8, 0));
        parts.push(readable(at + 32, range_bytes));
    }
    match kind {
        T_OUT => parts.push(readable(data, 512)),
        T_GET_ID | T_IN => {
            // In pieces that begin anywhere; more than lie in a slot now and then, more than the device takes at once too.
            let mut left = if kind == T_GET_ID { 20 } else { 512 * (1 + random.below(40)) };
            // Reads past the end are mistakes: nothing is written but the status.
            guest.ram.write(data, &vec![0xee; 0x8000]);
            let mut from = data;
            while left > 0 {
                let len = (1 + random.below(2500)).min(left);
                parts.push(writable(from, u32::try_from(len).unwrap()));
                pages.extend(from / PAGE..=(from + len - 1) / PAGE);
                from += len;
                left -= len;
            }
        }
        _ => {}
    }
    parts.push(writable(status, 1));
    (parts, pages)
}

/// The model: what has changed is marked, and nothing is that no request may have written.
#[test]
fn every_page_that_changes_is_marked_and_no_other_is() {
    for event_idx in [true, false] {
        let served = Served::new(all_kinds());
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        for (index, byte) in served.device.fake.state().content.iter_mut().enumerate() {
            *byte = u8::try_from(index / 512 % 200 + 1).unwrap();
        }
        let mut wish = Wish { rings: 2, size: 256, inflight: true, ..Wish::default() };
        if !event_idx {
            wish.features &= !F_EVENT_IDX;
        }
        let mut guest = Guest::connect(&served.socket, &wish);
        let mut logs = [Log::new(c"dirty-0"), Log::new(c"dirty-1")];
        let mut logging = false;
        for round in 0..300u64 {
            // 0: as before; 1: on, or another log, at once; 2: the same with all requests in flight; 3: off.
            let change = random.below(6);
            served.device.fake.state().hold = change == 2;
            if change == 1 {
                logs.swap(0, 1);
                set_logging(&mut guest, Some(&logs[0]));
                logging = true;
            } else if change == 3 {
                set_logging(&mut guest, None);
                logging = false;
            }
            let count = 1 + random.below(8);
            let requests: Vec<_> = (0..count).map(|slot| any_request(&guest, &mut random, slot)).collect();
            logs.iter().for_each(Log::clear);
            let snapshot = |guest: &Guest| guest.ram.read(RAM_GUEST, usize::try_from(PAGES * PAGE).unwrap());
            let mut before = snapshot(&guest);
            let mut may_change: Vec<u64> = guest
                .rings
                .iter()
                .flat_map(|ring| ring.used_at() / PAGE..=ring.used_at() / PAGE + 1)
                .collect();
            for (slot, (parts, pages)) in requests.iter().enumerate() {
                guest.submit(slot % 2, parts);
                may_change.extend(pages);
            }
            if change == 2 {
                let counters = served.disk.queue_counters();
                let seen = |queue: usize| counters[queue].requests.get();
                let all: u16 = guest.rings.iter().map(|ring| ring.next_available).sum();
                eventually("taken", || seen(0) + seen(1) >= u64::from(all));
                // What never reaches the device has ended already, with its marks in the log before: a round trip later all that is over.
                guest.frontend.set_features(guest.features | if logging { F_LOG_ALL } else { 0 }).unwrap();
                logs.swap(0, 1);
                logs.iter().for_each(Log::clear);
                before = snapshot(&guest);
                set_logging(&mut guest, Some(&logs[0]));
                logging = true;
                // The one before is not named by anything any more.
                let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
                assert!(maps.lines().filter(|line| line.contains("memfd:dirty-")).count() <= 1, "{maps}");
                served.device.release();
            }
            for slot in 0..requests.len() {
                guest.rings[slot % 2].wait_used(&guest.ram);
            }
            let device_pages = |page: &u64| {
                let offset = page * PAGE - RAM_GUEST;
                may_change.contains(page) || offset >= DATA - RAM_GUEST
            };
            let first = RAM_GUEST / PAGE;
            let changed: Vec<u64> = (first..first + PAGES)
                .filter(device_pages)
                .filter(|page| {
                    let offset = usize::try_from(page * PAGE - RAM_GUEST).unwrap();
                    guest.ram.read(page * PAGE, 4096) != before[offset..offset + 4096]
                })
                .collect();
            assert!(change == 2 || !changed.is_empty());
            let marked = |page: &u64| logs[0].is_marked(page * PAGE);
            if logging {
                // The driver may see used.idx before the mark of its page, which follows.
                eventually("every page that has changed is marked", || changed.iter().all(marked));
            }
            for page in first..first + PAGES {
                let wrong = marked(&page) && !(logging && may_change.contains(&page));
                assert!(!wrong, "round {round}: page {page:#x} is marked; {may_change:x?}");
                assert!(!logs[1].is_marked(page * PAGE), "round {round}: in a log that is not used");
            }
        }
    }
}

/// The used ring is logged where the front end says, which may be outside of memory, and only if it says so.
#[test]
fn the_used_ring_is_logged_at_its_own_address() {
    let served = Served::new(small());
    let mut guest = Guest::connect(&served.socket, &Wish::default());
    let elsewhere = RAM_GUEST + RAM_BYTES as u64 + 0x7000;
    let log = Log::of(c"dirty", (elsewhere + PAGE) / PAGE / 8 + 1);
    guest.frontend.set_log_base(0, Some(log.region())).unwrap();
    guest.frontend.set_features(guest.features | F_LOG_ALL).unwrap();
    works(&mut guest);
    assert!(log.is_marked(DATA) && !log.is_marked(elsewhere) && !log.is_marked(guest.rings[0].used_at()));
    guest.frontend.set_vring_addr(0, &logged(&guest.rings[0], Some(elsewhere))).unwrap();
    assert!(log.is_marked(elsewhere));
    works(&mut guest);
    assert!(!log.is_marked(guest.rings[0].used_at()));
}

#[test]
fn a_log_that_is_too_small_ends_the_session_and_says_so() {
    let served = Served::new(small());
    let whole = (RAM_GUEST + RAM_BYTES as u64) / PAGE / 8;
    for (bytes, file_bytes, error) in [
        (whole - 1, whole, "before the end of memory"),
        (whole, whole - 1, "past the end of the file"),
        (0, whole, "SET_LOG_BASE: 0x0 bytes"),
        (u64::MAX, whole, "SET_LOG_BASE"),
    ] {
        let mut guest = Guest::connect(&served.socket, &Wish::default());
        works(&mut guest);
        guest.frontend.set_features(guest.features | F_LOG_ALL).unwrap();
        let log = Log::of(c"dirty", file_bytes);
        let region = VhostUserDirtyLogRegion { mmap_size: bytes, ..log.region() };
        assert!(guest.frontend.set_log_base(0, Some(region)).is_err());
        assert!(guest.is_ended());
        assert!(served.disk.trouble().contains(error), "{}", served.disk.trouble());
    }
    // The used ring's place in the log is checked too, and so is memory that comes later.
    let mut guest = Guest::connect(&served.socket, &Wish { slots: true, ..Wish::default() });
    let log = Log::new(c"dirty");
    set_logging(&mut guest, Some(&log));
    let more = Ram::new(RAM_GUEST + RAM_BYTES as u64, 0x1000);
    assert!(VhostUserFrontend::add_mem_region(&mut guest.frontend, &more.region()).is_err());
    works(&mut guest);
    let beyond = RAM_GUEST + RAM_BYTES as u64;
    assert!(guest.frontend.set_vring_addr(0, &logged(&guest.rings[0], Some(beyond))).is_err());
    assert!(guest.is_ended());
    assert!(served.disk.trouble().contains("before the end of a used ring"), "{}", served.disk.trouble());
    // Not that of a ring that nobody has kicked.
    let mut guest = Guest::connect(&served.socket, &Wish::default());
    guest.frontend.set_vring_num(1, 128).unwrap();
    let idle = new_ring(1, &Wish::default());
    guest.frontend.set_vring_addr(1, &logged(&idle, Some(beyond))).unwrap();
    set_logging(&mut guest, Some(&log));
    works(&mut guest);
    drop(guest);
    // Nor are other settings of a running ring changed together with its logging.
    let guest = Guest::connect(&served.socket, &Wish::default());
    let mut config = logged(&guest.rings[0], Some(RAM_GUEST));
    config.used_ring_addr += 0x1000;
    assert!(guest.frontend.set_vring_addr(0, &config).is_err());
    assert!(guest.is_ended());
    works(&mut Guest::connect(&served.socket, &Wish::default()));
}

#[test]
fn a_truncated_log_of_dirty_pages_ends_its_session_and_nothing_else() {
    let served = Served::new(small());
    let mut guest = Guest::connect(&served.socket, &Wish::default());
    let log = Log::new(c"dirty");
    set_logging(&mut guest, Some(&log));
    works(&mut guest);
    log.file.set_len(0).unwrap();
    let parts = guest.plain(T_IN, 0, &[], 512, DATA);
    guest.submit(0, &parts);
    assert!(guest.is_ended());
    assert!(served.disk.trouble().contains("log of dirty pages"), "{}", served.disk.trouble());
    works(&mut Guest::connect(&served.socket, &Wish::default()));
}

fn stop(guest: &mut Guest) {
    for index in 0..guest.rings.len() {
        let base = guest.frontend.get_vring_base(index).unwrap();
        assert_eq!(base, u32::from(guest.rings[index].used_idx(&guest.ram)));
    }
}

fn views(served: &Served) -> Vec<bool> {
    served.disk.sessions().iter().map(|SessionView { serving, .. }| *serving).collect()
}

/// A request that is offered, and not to be begun yet.
fn offer(guest: &mut Guest) {
    let parts = guest.plain(T_IN, 5, &[], 512, DATA);
    guest.submit(0, &parts);
}

#[test]
fn a_second_front_end_is_heard_while_the_firsts_rings_run_and_serves_when_they_have_stopped() {
    let served = Served::new(small());
    let wish = Wish { rings: 2, inflight: true, ..Wish::default() };
    let mut first = Guest::connect(&served.socket, &wish);
    works(&mut first);
    // Features, memory, log and rings are set; the configuration is read.
    let mut second = Guest::connect(&served.socket, &wish);
    assert_eq!(second.config()[..8], 8192u64.to_le_bytes());
    assert_eq!(views(&served), [true, false]);
    offer(&mut second);
    for _ in 0..20 {
        works(&mut first);
    }
    assert_eq!(second.rings[0].take_used(&second.ram), None);
    // A driver that is not there yet does not change what the disk is.
    let flags = vhost::vhost_user::message::VhostUserConfigFlags::WRITABLE;
    assert!(VhostUserFrontend::set_config(&mut second.frontend, 32, flags, &[0]).is_err());
    // Its VM resets its disk: the turn stays its own, or anybody who waits would have the disk.
    stop(&mut first);
    assert_eq!(views(&served), [true, false]);
    (0..2).for_each(|index| first.start_ring(index));
    for _ in 0..20 {
        works(&mut first);
    }
    assert_eq!(second.rings[0].take_used(&second.ram), None);
    // It migrates. One ring of two is not all.
    let log = Log::new(c"dirty");
    set_logging(&mut first, Some(&log));
    first.frontend.get_vring_base(1).unwrap();
    works(&mut first);
    assert_eq!(second.rings[0].take_used(&second.ram), None);
    stop(&mut first);
    second.rings[0].wait_used(&second.ram);
    works(&mut second);
    assert_eq!(views(&served), [false, true]);
    // The migration has failed after all: the source's rings start, and wait for the end of the destination's.
    let stopped = first.ram.read(RAM_GUEST, 0x1_0000);
    (0..2).for_each(|index| first.start_ring(index));
    offer(&mut first);
    for _ in 0..20 {
        works(&mut second);
    }
    assert_eq!(first.rings[0].take_used(&first.ram), None);
    let used = usize::try_from(first.rings[0].used_at() - RAM_GUEST).unwrap();
    assert_eq!(first.ram.read(first.rings[0].used_at(), 0x1000), stopped[used..used + 0x1000]);
    drop(second);
    first.rings[0].wait_used(&first.ram);
    works(&mut first);
    eventually("one session", || views(&served) == [true]);
}

/// The destination has a log of an earlier life, with another word in it: the driver that runs is at the source.
#[test]
fn the_log_of_a_front_end_that_waits_does_not_say_what_writeback_is() {
    let served = Served::new(small());
    let wish = Wish { inflight: true, ..Wish::default() };
    let flags = vhost::vhost_user::message::VhostUserConfigFlags::WRITABLE;
    let mut old = Guest::connect(&served.socket, &wish);
    VhostUserFrontend::set_config(&mut old.frontend, 32, flags, &[0]).unwrap();
    stop(&mut old);
    old.stream.shutdown(std::net::Shutdown::Both).unwrap();
    eventually("gone", || served.disk.sessions().is_empty());
    let mut first = Guest::connect(&served.socket, &wish);
    VhostUserFrontend::set_config(&mut first.frontend, 32, flags, &[1]).unwrap();
    works(&mut first);
    let mut second = old.reconnect(&served.socket, &wish);
    assert_eq!(second.config()[32], 1);
    served.device.fake.state().log.clear();
    works(&mut first);
    let write = hawser_block::Operation::Write { fua: false };
    assert_eq!(served.device.fake.state().log[0].0, write);
    // It is right where the next process looks for it, too.
    drop(first);
    works(&mut second);
    drop(served);
    let served = Served::new(small());
    let mut third = second.reconnect(&served.socket, &wish);
    works(&mut third);
    assert_eq!(served.device.fake.state().log[0].0, write);
}

#[test]
fn a_third_front_end_is_refused_and_can_come_when_one_has_gone() {
    let served = Served::new(small());
    let mut first = Guest::connect(&served.socket, &Wish::default());
    let second = Guest::connect(&served.socket, &Wish::default());
    let third = std::os::unix::net::UnixStream::connect(&served.socket).unwrap();
    eventually("refused", || served.disk.counters().sessions_refused.load(Ordering::Relaxed) == 1);
    let mut byte = [0];
    assert_eq!(std::io::Read::read(&mut &third, &mut byte).unwrap(), 0);
    works(&mut first);
    // At once, though the first session may not have ended yet.
    drop(first);
    let mut third = Guest::connect(&served.socket, &Wish::default());
    drop(second);
    works(&mut third);
    assert_eq!(served.disk.counters().sessions.load(Ordering::Relaxed), 3);
}

/// Two front ends start and stop their rings as they like, for a while: the device sees the requests of one turn after the
/// other, never two mixed.
#[test]
fn two_front_ends_that_start_and_stop_at_will_are_never_served_at_once() {
    const REQUESTS: usize = 5;
    let served = Served::new(small());
    let stop_all = AtomicBool::new(false);
    let done = [AtomicU64::new(0), AtomicU64::new(0)];
    std::thread::scope(|scope| {
        let guests: Vec<_> = (0..2u64)
            .map(|who| {
                let (served, stop_all, turns) = (&served, &stop_all, &done[usize::try_from(who).unwrap()]);
                scope.spawn(move || {
                    let wish = Wish { inflight: true, ..Wish::default() };
                    let log = Log::new(c"dirty");
                    let connect = || {
                        let mut guest = Guest::connect(&served.socket, &wish);
                        set_logging(&mut guest, Some(&log));
                        guest
                    };
                    let mut guest = connect();
                    while !stop_all.load(Ordering::Acquire) {
                        for _ in 0..REQUESTS {
                            assert_eq!(guest.request(T_OUT, who, &[7; 512], 0).0, 0);
                        }
                        if turns.fetch_add(1, Ordering::AcqRel) % 7 == 6 {
                            // It vanishes, and another one comes.
                            drop(guest);
                            guest = connect();
                        } else {
                            stop(&mut guest);
                            guest.start_ring(0);
                        }
                    }
                    stop(&mut guest);
                })
            })
            .collect();
        let end = Instant::now() + Duration::from_secs(120);
        let enough = || done.iter().all(|turns| turns.load(Ordering::Acquire) > 50);
        while !enough() && Instant::now() < end && !guests.iter().any(ScopedJoinHandle::is_finished) {
            std::thread::sleep(Duration::from_millis(2));
        }
        stop_all.store(true, Ordering::Release);
        guests.into_iter().for_each(|guest| guest.join().unwrap());
        assert!(enough(), "{done:?}");
    });
    let log: Vec<u64> = served.device.fake.state().log.iter().map(|(_, lba, _)| *lba).collect();
    for turn in log.chunks(REQUESTS) {
        assert!(turn.iter().all(|lba| *lba == turn[0]), "two were served at once");
    }
}

/// A front end that migrates takes its in-flight log nowhere: while it logs, its rings stop when everything has ended, however
/// long that takes; when it goes, `drain_timeout` counts again.
#[test]
fn a_ring_that_stops_while_logging_waits_for_everything_in_flight() {
    let served = Served::with(small(), |config| config.drain_timeout = Duration::from_millis(20));
    let mut guest = Guest::connect(&served.socket, &Wish { inflight: true, ..Wish::default() });
    let log = Log::new(c"dirty");
    set_logging(&mut guest, Some(&log));
    assert!(served.disk.sessions()[0].logging);
    served.device.fake.state().hold = true;
    offer(&mut guest);
    eventually("taken", || served.disk.queue_counters()[0].requests.get() == 1);
    let device = Arc::clone(&served.device);
    let release = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(400));
        device.release();
    });
    stop(&mut guest);
    assert!(guest.rings[0].take_used(&guest.ram).is_some());
    assert_eq!(guest.ram.read(DATA + 16, 1), [0]);
    release.join().unwrap();
    // Nothing more is written from here on: what is marked now is all.
    assert!(log.is_marked(DATA) && log.is_marked(guest.rings[0].used_at()));
    guest.start_ring(0);
    works(&mut guest);
    // It goes in the middle: given up, and left in the log.
    served.device.fake.state().hold = true;
    offer(&mut guest);
    eventually("taken", || served.disk.queue_counters()[0].requests.get() == 4);
    let stream = guest.stream.try_clone().unwrap();
    let goes = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        stream.shutdown(std::net::Shutdown::Both).unwrap();
    });
    assert!(guest.frontend.get_vring_base(0).is_err());
    goes.join().unwrap();
    eventually("given up", || served.disk.sessions().is_empty());
    served.device.fake.state().hold = false;
    let mut guest = guest.reconnect(&served.socket, &Wish { inflight: true, ..Wish::default() });
    guest.rings[0].wait_used(&guest.ram);
    works(&mut guest);
}

/// A ring with three requests that an earlier session has left in the log, and a device that has the first of them again.
fn replaying() -> (Served, Guest, Log) {
    let served = Served::with(small(), |config| config.drain_timeout = Duration::from_millis(20));
    let wish = Wish { inflight: true, ..Wish::default() };
    let mut guest = Guest::connect(&served.socket, &wish);
    served.device.fake.state().hold = true;
    for number in 0..3 {
        let parts = guest.plain(T_IN, 5 + number, &[], 512, DATA + PAGE * number);
        guest.submit(0, &parts);
    }
    eventually("taken", || served.disk.queue_counters()[0].requests.get() == 3);
    guest.stream.shutdown(std::net::Shutdown::Both).unwrap();
    eventually("given up", || served.disk.sessions().is_empty());
    let mut guest = guest.reconnect(&served.socket, &wish);
    let log = Log::new(c"dirty");
    set_logging(&mut guest, Some(&log));
    eventually("the first", || served.disk.queue_counters()[0].replayed.get() == 1);
    (served, guest, log)
}

/// The daemon had died, and the VM migrates while its requests are executed again. GET_VRING_BASE was answered when the one at the
/// device had ended; the rest stayed in the in-flight log, which the destination does not have: they were lost.
#[test]
fn a_ring_that_stops_while_logging_replays_everything_first() {
    let (served, mut guest, log) = replaying();
    let device = Arc::clone(&served.device);
    let release = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        device.release();
    });
    assert_eq!(guest.frontend.get_vring_base(0).unwrap(), 3);
    assert_eq!(guest.rings[0].used_idx(&guest.ram), 3);
    assert!((0..3).all(|number| log.is_marked(DATA + PAGE * number)));
    release.join().unwrap();
    guest.start_ring(0);
    for _ in 0..3 {
        guest.rings[0].wait_used(&guest.ram);
    }
    works(&mut guest);
    // Where nothing is logged, one that is stopped in the middle leaves the rest, as ever.
    let (served, guest, _log) = replaying();
    guest.frontend.set_features(guest.features).unwrap();
    assert_eq!(guest.frontend.get_vring_base(0).unwrap(), 3);
    assert_eq!(guest.rings[0].used_idx(&guest.ram), 0);
    drop((guest, served));
}

/// The source's rings wait: for what an earlier stop has left at the device. The VM is stopped for its migration all the same:
/// the answer came at once, and the requests in the log were lost, and what the device still read was in no log.
#[test]
fn a_ring_that_waits_with_unfinished_requests_runs_before_it_stops_for_a_migration() {
    let served = Served::with(small(), |config| config.drain_timeout = Duration::from_millis(20));
    served.device.deaf.store(true, Ordering::Release);
    let mut guest = Guest::connect(&served.socket, &Wish { inflight: true, ..Wish::default() });
    works(&mut guest);
    served.device.fake.state().hold = true;
    offer(&mut guest);
    eventually("taken", || served.disk.queue_counters()[0].requests.get() == 3);
    assert_eq!(guest.frontend.get_vring_base(0).unwrap(), 3);
    guest.start_ring(0);
    let log = Log::new(c"dirty");
    set_logging(&mut guest, Some(&log));
    let device = Arc::clone(&served.device);
    let release = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        device.release();
    });
    // As QEMU stops a ring.
    guest.frontend.set_vring_enable(0, false).unwrap();
    assert_eq!(guest.frontend.get_vring_base(0).unwrap(), 3);
    assert_eq!((guest.rings[0].used_idx(&guest.ram), served.disk.queue_counters()[0].replayed.get()), (3, 1));
    assert!(log.is_marked(DATA));
    release.join().unwrap();
}

/// The process is told to end in the middle: the front end does not hear that its ring has stopped.
#[test]
fn a_ring_that_cannot_be_drained_for_a_migration_is_not_said_to_have_stopped() {
    let (served, guest, _log) = replaying();
    let frontend = guest.frontend.clone();
    let waits = std::thread::spawn(move || frontend.get_vring_base(0).is_err());
    std::thread::sleep(Duration::from_millis(200));
    assert!(!waits.is_finished());
    assert!(served.disk.stop(Duration::from_millis(20)).has_ended());
    assert!(waits.join().unwrap());
}
