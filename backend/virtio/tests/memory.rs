//! Guest memory that changes under load, or is taken away.

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use support::frontend::*;
use support::{Served, eventually, small};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

#[test]
fn memory_comes_and_goes_under_load_and_a_removal_waits_for_its_requests() {
    let served = Served::new(small());
    let mut guest = Guest::connect(&served.socket, &Wish { slots: true, ..Wish::default() });
    for round in 0..20u64 {
        // An unaligned region that ends where another begins: a request crosses from one into the other.
        let (first, second) = (Ram::new(0x7f00_0000_0321, 0x1801), Ram::new(0x7f00_0000_1b22, 0x2000));
        for ram in [&first, &second] {
            guest.frontend.add_mem_region(&ram.region()).unwrap();
        }
        served.device.fake.state().content[..4096].fill(u8::try_from(round + 1).unwrap());
        guest.ram.write(DATA, &header(T_IN, 0));
        guest.ram.write(DATA + 16, &[0xff]);
        let crossing = 0x7f00_0000_1b22 - 1000;
        served.device.fake.state().hold = round % 2 == 1;
        guest.submit(0, &[readable(DATA, 16), writable(crossing, 4096), writable(DATA + 16, 1)]);
        if round % 2 == 1 {
            // The request names both regions; the removal of the second waits for it.
            eventually("taken", || served.disk.queue_counters()[0].requests.get() == 3 * round + 1);
            let device = Arc::clone(&served.device);
            let release = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(30));
                device.release();
            });
            guest.frontend.remove_mem_region(&second.region()).unwrap();
            assert!(!served.device.fake.state().hold, "the removal was answered with a request under way");
            assert!(guest.rings[0].take_used(&guest.ram).is_some());
            release.join().unwrap();
        } else {
            guest.rings[0].wait_used(&guest.ram);
            guest.frontend.remove_mem_region(&second.region()).unwrap();
        }
        assert_eq!(guest.ram.read(DATA + 16, 1), [0]);
        assert_eq!(first.read(crossing, 1000), vec![u8::try_from(round + 1).unwrap(); 1000]);
        assert_eq!(second.read(0x7f00_0000_1b22, 3096), vec![u8::try_from(round + 1).unwrap(); 3096]);
        // What is not there any more cannot be read into.
        guest.ram.write(DATA + 16, &[0xff]);
        guest.submit(0, &[readable(DATA, 16), writable(crossing, 4096), writable(DATA + 16, 1)]);
        guest.rings[0].wait_used(&guest.ram);
        assert_eq!(guest.ram.read(DATA + 16, 1), [1]);
        guest.frontend.remove_mem_region(&first.region()).unwrap();
        served.device.fake.state().log.clear();
        guest.ram.write(DATA + 16, &[0xff]);
        guest.submit(0, &[readable(DATA, 16), writable(crossing, 512), writable(DATA + 16, 1)]);
        guest.rings[0].wait_used(&guest.ram);
        assert_eq!(guest.ram.read(DATA + 16, 1), [1]);
        assert!(served.device.fake.state().log.is_empty());
    }
    // The region with the ring of a running queue stays.
    assert!(guest.frontend.remove_mem_region(&guest.ram.region()).is_err());
    // Overlap, and past the end of the file.
    assert!(guest.frontend.add_mem_region(&guest.ram.region()).is_err());
    let small_file = Ram::new(0x7f00_0000_0000, 4096);
    let mut region = small_file.region();
    region.memory_size = 4097;
    assert!(guest.frontend.add_mem_region(&region).is_err());
    works(&mut guest);
    // A new table under a running ring: the same memory, mapped anew.
    guest.frontend.set_mem_table(&[guest.ram.region()]).unwrap();
    works(&mut guest);
}

/// All sessions shared 8192 mappings. One that changed its table under requests that its device held had them all, and no
/// other VM could connect.
#[test]
fn a_front_end_that_piles_up_tables_uses_up_its_own_share_only() {
    let (greedy, other) = (Served::new(small()), Served::new(small()));
    let mut guest = Guest::connect(&greedy.socket, &Wish { size: 1024, ..Wish::default() });
    greedy.device.fake.state().hold = true;
    let pieces: Vec<_> = (0..31).map(|index| Ram::new(0x7f00_0000_0000 + index * 0x2000, 0x1000)).collect();
    let table: Vec<_> = std::iter::once(guest.ram.region()).chain(pieces.iter().map(Ram::region)).collect();
    let mut refused = None;
    for round in 1..=300u64 {
        let parts = guest.plain(T_IN, 0, &[], 512, DATA);
        guest.submit(0, &parts);
        eventually("taken", || greedy.disk.queue_counters()[0].requests.get() == round);
        if guest.frontend.set_mem_table(&table).is_err() {
            refused = Some(round);
            break;
        }
    }
    // 2036 = 4 x 509 regions, 32 in each table but the first.
    assert_eq!(refused, Some(64));
    works(&mut Guest::connect(&other.socket, &Wish::default()));
    // When the requests have ended, so have the old tables.
    greedy.device.release();
    for _ in 0..64 {
        guest.rings[0].wait_used(&guest.ram);
    }
    eventually("let go", || guest.frontend.set_mem_table(&table).is_ok());
    works(&mut guest);
}

#[test]
fn truncated_memory_ends_its_session_and_nothing_else() {
    let served = Served::new(small());
    let mut guest = Guest::connect(&served.socket, &Wish::default());
    works(&mut guest);
    // Beyond the first half a megabyte, which holds the ring and what the test itself writes.
    guest.ram.file.set_len(DATA - RAM_GUEST + 0x10_0000).unwrap();
    guest.ram.write(DATA, &header(T_IN, 0));
    let far = DATA + 0x40_0000;
    guest.submit(0, &[readable(DATA, 16), writable(far, 4096), writable(DATA + 16, 1)]);
    assert!(guest.is_ended());
    eventually("it is told", || served.disk.trouble().contains("truncated its memory"));
    works(&mut Guest::connect(&served.socket, &Wish::default()));
}

/// A log that we made is sealed, but a front end may hand in any file.
#[test]
fn a_truncated_in_flight_log_ends_its_session_and_nothing_else() {
    let served = Served::new(small());
    let wish = Wish { inflight: true, ..Wish::default() };
    let mut guest = Guest::connect(&served.socket, &wish);
    let (description, _) = guest.inflight.take().unwrap();
    let bytes = usize::try_from(description.mmap_offset + description.mmap_size).unwrap();
    let log = Ram::new(0, bytes).file.try_clone().unwrap();
    guest.inflight = Some((description, log.try_clone().unwrap()));
    let mut guest = guest.reconnect(&served.socket, &wish);
    works(&mut guest);
    log.set_len(0).unwrap();
    let parts = guest.plain(T_IN, 0, &[], 512, DATA);
    guest.submit(0, &parts);
    assert!(guest.is_ended());
    eventually("it is told", || served.disk.trouble().contains("truncated the in-flight log"));
    works(&mut Guest::connect(&served.socket, &wish));
}

/// Hot-plug while the guest works: tables are replaced, and regions come and go, under requests that a slow device has. What
/// lies in memory that stays is carried out, and every request ends once.
#[test]
fn tables_are_replaced_under_load() {
    tables_under_load(1, 1);
}

#[test]
fn tables_are_replaced_under_load_with_queues_on_several_reactors() {
    tables_under_load(2, 4);
}

fn tables_under_load(reactors: usize, rings: usize) {
    let served = Served::on(reactors, small(), |_| {});
    let mut guest = Guest::connect(&served.socket, &Wish { rings, size: 256, ..Wish::default() });
    let done = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let tables = std::thread::spawn({
        let (mut frontend, done) = (guest.frontend.clone(), Arc::clone(&done));
        let (device, main) = (Arc::clone(&served.device), guest.ram.region());
        move || {
            let pieces: Vec<_> =
                (0..8).map(|index| Ram::new(0x7f00_0000_0000 + index * 0x1_0000, 0x8000)).collect();
            let mut table = vec![main];
            for round in 0..400usize {
                device.fake.state().hold = true;
                std::thread::sleep(Duration::from_micros(200));
                let piece = pieces[round % 8].region();
                match round % 4 {
                    0 | 1 => {
                        table = vec![main];
                        table.extend(pieces[..round % 9].iter().map(Ram::region));
                        frontend.set_mem_table(&table).unwrap();
                    }
                    _ if table.iter().any(|one| one.guest_phys_addr == piece.guest_phys_addr) => {
                        // Its removal may wait for requests.
                        device.release();
                        frontend.remove_mem_region(&piece).unwrap();
                        table.retain(|one| one.guest_phys_addr != piece.guest_phys_addr);
                    }
                    _ => {
                        frontend.add_mem_region(&piece).unwrap();
                        table.push(piece);
                    }
                }
                device.release();
            }
            done.store(true, Ordering::Release);
        }
    });
    let (mut written, mut rounds) = ([0u8; 16], 0u64);
    while !done.load(Ordering::Acquire) || rounds < 10 {
        rounds += 1;
        // Sixteen writes of a page each, then all are read back.
        for kind in [T_OUT, T_IN] {
            for (slot, byte) in (0..16u64).zip(&mut written) {
                let at = DATA + 0x4000 * slot;
                let parts = if kind == T_OUT {
                    *byte = u8::try_from((rounds + slot) % 251).unwrap();
                    guest.plain(T_OUT, 8 * slot, &[*byte; 4096], 0, at)
                } else {
                    guest.ram.zero(at + 64, 4096);
                    guest.plain(T_IN, 8 * slot, &[], 4096, at)
                };
                guest.submit(usize::try_from(slot).unwrap() % rings, &parts);
            }
            for slot in 0..16 {
                guest.rings[slot % rings].wait_used(&guest.ram);
            }
            for (slot, byte) in (0..16u64).zip(&written) {
                let at = DATA + 0x4000 * slot;
                assert_eq!(guest.ram.read(at + 16, 1), [0]);
                assert!(guest.ram.read(at + 64, 4096) == [*byte; 4096], "slot {slot} in round {rounds}");
            }
        }
    }
    tables.join().unwrap();
    assert!(guest.rings.iter_mut().all(|ring| ring.take_used(&guest.ram).is_none()));
    works(&mut guest);
    assert_eq!(served.disk.counters().sessions_failed.load(Ordering::Relaxed), 0);
}

/// Queues on several reactors, all with requests at the device, when their front end shortens its memory, or dies. Nobody else
/// notices; whoever comes next, with the same memory and log or with new ones, finds everything done or does it again.
#[test]
fn front_ends_that_truncate_their_memory_or_vanish_under_load_on_several_reactors() {
    let served = Served::on(2, small(), |config| config.drain_timeout = Duration::from_millis(50));
    let wish = Wish { rings: 4, inflight: true, ..Wish::default() };
    for round in 0..12u64 {
        let mut guest = Guest::connect(&served.socket, &wish);
        works(&mut guest);
        served.device.fake.state().hold = true;
        let taken = || served.disk.queue_counters().iter().map(|queue| queue.requests.get()).sum::<u64>();
        let before = taken();
        for slot in 0..16u64 {
            let at = DATA + 0x4000 * slot;
            let parts = guest.plain(T_OUT, 8 * slot, &[u8::try_from(round).unwrap(); 4096], 0, at);
            guest.submit(usize::try_from(slot).unwrap() % 4, &parts);
        }
        eventually("taken", || taken() == before + 16);
        if round % 2 == 0 {
            guest.ram.file.set_len(DATA - RAM_GUEST).unwrap();
            served.device.release();
            assert!(guest.is_ended());
            assert!(served.disk.trouble().contains("truncated its memory"), "{}", served.disk.trouble());
        } else {
            // Given up: they stay in the log.
            guest.stream.shutdown(std::net::Shutdown::Both).unwrap();
            eventually("the session ends", || served.disk.sessions().is_empty());
            served.device.fake.state().hold = false;
            let mut guest = guest.reconnect(&served.socket, &wish);
            for slot in 0..16 {
                guest.rings[slot % 4].wait_used(&guest.ram);
            }
            works(&mut guest);
        }
    }
    works(&mut Guest::connect(&served.socket, &wish));
    assert_eq!(served.disk.counters().sessions_failed.load(Ordering::Relaxed), 6);
}
