//! Sessions: coming and going, broken rings, garbage, memory that changes, drains, reconnects.

mod support;

use hawser_block::{Operation, Status};
use hawser_virtio::DiskState;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use support::frontend::*;
use support::{Served, eventually, small};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

#[test]
fn a_vm_comes_and_goes_a_hundred_times_with_rings_of_all_sizes() {
    let served = Served::new(small());
    let mut wish = Wish::default();
    let mut guest = Guest::connect(&served.socket, &wish);
    for round in 0..100usize {
        let bits = u32::try_from(round % 11).unwrap();
        wish.size = 1 << bits;
        wish.rings = 1 + round % 4;
        wish.inflight = round % 3 == 0;
        wish.slots = round % 2 == 0;
        wish.features = F_PROTOCOL | F_VERSION_1 | F_FLUSH | F_INDIRECT;
        if round % 5 < 3 {
            wish.features |= F_EVENT_IDX;
        }
        match round % 4 {
            // The connection ends with everything running, mid-way, or after an orderly stop; or only the device is reset.
            0 => {}
            1 => {
                for index in 0..guest.rings.len() {
                    let base = guest.frontend.get_vring_base(index).unwrap();
                    assert_eq!(base, u32::from(guest.rings[index].next_available));
                }
            }
            2 => guest.frontend.reset_device().unwrap(),
            _ => {
                for index in (0..guest.rings.len()).rev() {
                    guest.frontend.set_vring_enable(index, false).unwrap();
                }
            }
        }
        guest = if round % 4 == 0 {
            // Another process: the old one's rings run on in memory of their own until the end of its session.
            drop(guest);
            Guest::connect(&served.socket, &wish)
        } else {
            guest.renew(&served.socket, &wish)
        };
        for index in 0..wish.rings {
            let parts = guest.plain(T_OUT, index as u64, &[7; 512], 0, DATA);
            let ring = &mut guest.rings[index];
            // Rings of 1 and 2 have no room for a chain of three.
            let head = ring.put_indirect_chain(&guest.ram, &parts, 0, DATA + 4096);
            let old = ring.next_available;
            ring.offer(&guest.ram, head);
            ring.kick_if_wanted(&guest.ram, old);
            assert_eq!(ring.wait_used(&guest.ram), (head, 1));
            assert_eq!(guest.ram.read(DATA + 16, 1), [0]);
        }
    }
    assert_eq!(served.disk.counters().sessions.load(Ordering::Relaxed), 101);
    assert_eq!(served.disk.counters().sessions_failed.load(Ordering::Relaxed), 0);
}

#[test]
fn the_order_of_a_rings_messages_does_not_matter() {
    let served = Served::new(small());
    for order in 0..6 {
        let wish = Wish { rings: 0, ..Wish::default() };
        let mut guest = Guest::connect(&served.socket, &wish);
        guest.rings.push(new_ring(0, &wish));
        let frontend = &mut guest.frontend;
        let ring = &guest.rings[0];
        let settings = Guest::vring_config(ring);
        // What must come before the kick may come in any order; enabling before or after it; the call whenever.
        if order % 2 == 0 {
            frontend.set_vring_enable(0, true).unwrap();
        }
        if order % 3 == 0 {
            frontend.set_vring_call(0, &ring.call).unwrap();
        }
        frontend.set_vring_addr(0, &settings).unwrap();
        frontend.set_vring_base(0, 0).unwrap();
        frontend.set_vring_num(0, ring.size).unwrap();
        if order % 3 == 1 {
            frontend.set_vring_call(0, &ring.call).unwrap();
        }
        frontend.set_vring_kick(0, &ring.kick).unwrap();
        if order % 2 == 1 {
            frontend.set_vring_enable(0, true).unwrap();
        }
        if order % 3 == 2 {
            frontend.set_vring_call(0, &ring.call).unwrap();
        }
        works(&mut guest);
    }
}

#[test]
fn a_ring_stopped_and_started_goes_on_where_it_was() {
    let served = Served::new(small());
    let mut guest = Guest::connect(&served.socket, &Wish::default());
    works(&mut guest);
    for _ in 0..3 {
        let base = guest.frontend.get_vring_base(0).unwrap();
        assert_eq!(base, u32::from(guest.rings[0].next_available));
        guest.start_ring(0);
        works(&mut guest);
        // Disabled, a ring takes nothing; enabled again, it takes what has come.
        guest.frontend.set_vring_enable(0, false).unwrap();
        let parts = guest.plain(T_FLUSH, 0, &[], 0, DATA);
        let head = guest.rings[0].put_chain(&guest.ram, &parts);
        guest.rings[0].offer(&guest.ram, head);
        guest.rings[0].kick.write(1).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(guest.rings[0].take_used(&guest.ram), None);
        guest.frontend.set_vring_enable(0, true).unwrap();
        assert_eq!(guest.rings[0].wait_used(&guest.ram).0, head);
    }
}

/// Each breaks its ring; the session must end and name the field.
#[test]
fn a_malformed_ring_ends_its_session_with_the_field_in_the_error() {
    type Break = fn(&mut Guest);
    let cases: [(&str, Break); 14] = [
        ("avail.idx is 129 beyond", |guest| {
            let at = guest.rings[0].available_at() + 2;
            guest.ram.u16(at).store(129, Ordering::Release);
        }),
        ("avail.idx is 65535 beyond", |guest| {
            let at = guest.rings[0].available_at() + 2;
            guest.ram.u16(at).store(u16::MAX, Ordering::Release);
        }),
        ("avail.ring names descriptor 128", |guest| guest.rings[0].offer(&guest.ram, 128)),
        ("avail.ring names descriptor 65535", |guest| guest.rings[0].offer(&guest.ram, u16::MAX)),
        ("descriptor.next 200 with a table of 128", |guest| {
            let at = guest.rings[0].descriptor_at(0);
            guest.rings[0].put_descriptor(&guest.ram, at, DATA, 16, 1, 200);
            guest.rings[0].offer(&guest.ram, 0);
        }),
        ("descriptor.next: the chain does not end", |guest| {
            let at = guest.rings[0].descriptor_at(0);
            guest.rings[0].put_descriptor(&guest.ram, at, DATA, 16, 1, 0);
            guest.rings[0].offer(&guest.ram, 0);
        }),
        ("descriptor.flags: device-readable after", |guest| {
            guest.submit(0, &[readable(DATA, 16), writable(DATA, 16), readable(DATA, 16), writable(DATA, 1)]);
        }),
        ("descriptor.flags: no device-writable byte", |guest| {
            guest.submit(0, &[readable(DATA, 16), readable(DATA, 512)]);
        }),
        ("the status byte at", |guest| {
            guest.submit(0, &[readable(DATA, 16), writable(RAM_GUEST - 1, 1)]);
        }),
        ("descriptor.flags: INDIRECT together with NEXT", |guest| {
            let at = guest.rings[0].descriptor_at(0);
            guest.rings[0].put_descriptor(&guest.ram, at, DATA, 32, 5, 1);
            guest.rings[0].offer(&guest.ram, 0);
        }),
        ("descriptor.flags: INDIRECT within", |guest| {
            guest.rings[0].put_descriptor(&guest.ram, DATA, DATA, 16, 4, 0);
            let at = guest.rings[0].descriptor_at(0);
            guest.rings[0].put_descriptor(&guest.ram, at, DATA, 16, 4, 0);
            guest.rings[0].offer(&guest.ram, 0);
        }),
        ("descriptor.len 17 of an indirect table", |guest| {
            let at = guest.rings[0].descriptor_at(0);
            guest.rings[0].put_descriptor(&guest.ram, at, DATA, 17, 4, 0);
            guest.rings[0].offer(&guest.ram, 0);
        }),
        ("of an indirect table is not in memory", |guest| {
            let at = guest.rings[0].descriptor_at(0);
            guest.rings[0].put_descriptor(&guest.ram, at, u64::MAX - 7, 16, 4, 0);
            guest.rings[0].offer(&guest.ram, 0);
        }),
        ("descriptor.next 7 with a table of 2", |guest| {
            guest.rings[0].put_descriptor(&guest.ram, DATA, DATA, 16, 1, 7);
            let at = guest.rings[0].descriptor_at(0);
            guest.rings[0].put_descriptor(&guest.ram, at, DATA, 32, 4, 0);
            guest.rings[0].offer(&guest.ram, 0);
        }),
    ];
    let served = Served::new(small());
    for (index, (error, broken)) in cases.into_iter().enumerate() {
        let mut guest = Guest::connect(&served.socket, &Wish::default());
        let err = EventFd::new(EFD_NONBLOCK).unwrap();
        guest.frontend.set_vring_err(0, &err).unwrap();
        broken(&mut guest);
        guest.rings[0].kick.write(1).unwrap();
        assert!(guest.is_ended(), "{error}");
        eventually(error, || served.disk.trouble().contains(error));
        assert_eq!(err.read().unwrap(), 1, "{error}");
        assert_eq!(served.disk.counters().sessions_failed.load(Ordering::Relaxed), index as u64 + 1);
    }
    // A head that is in flight.
    let mut guest = Guest::connect(&served.socket, &Wish::default());
    served.device.fake.state().hold = true;
    let parts = guest.plain(T_FLUSH, 0, &[], 0, DATA);
    let head = guest.submit(0, &parts);
    guest.rings[0].offer(&guest.ram, head);
    guest.rings[0].kick.write(1).unwrap();
    eventually("in flight twice", || served.disk.trouble().contains("descriptor 0, which is in flight"));
    served.device.release();
    assert!(guest.is_ended());
    // And the next one is served.
    works(&mut Guest::connect(&served.socket, &Wish::default()));
}

#[test]
fn garbage_messages_end_their_session_only() {
    let served = Served::new(small());
    let vring = |request, index: u32, value: u32| {
        message(request, 1, &[index.to_ne_bytes(), value.to_ne_bytes()].concat())
    };
    for bytes in [
        message(1, 0, &[]),
        message(1, 2, &[]),
        message(1, 5, &[]),
        vec![0xff; 12],
        [1u32.to_ne_bytes(), 1u32.to_ne_bytes(), u32::MAX.to_ne_bytes()].concat(),
        message(2, 1, &[0; 4]),
        message(2, 1, &u64::MAX.to_ne_bytes()),
        message(16, 1, &u64::MAX.to_ne_bytes()),
        message(5, 1, &[0; 8]),
        message(5, 1, &[0xff; 72]),
        message(37, 1, &[0; 40]),
        message(38, 1, &[0xff; 40]),
        vring(8, 0, 0),
        vring(8, 0, 3),
        vring(8, 0, 2048),
        vring(8, 4, 128),
        vring(8, u32::MAX, 128),
        vring(10, 0, 0x1_0000),
        vring(11, 99, 0),
        vring(18, 99, 1),
        vring(18, 0, 2),
        message(12, 1, &0u64.to_ne_bytes()),
        message(13, 1, &0xffu64.to_ne_bytes()),
        message(24, 1, &[0xff; 12]),
        message(25, 1, &[0; 12]),
        message(32, 1, &[0; 24]),
        message(31, 1, &[0xff; 24]),
        message(21, 1, &[]),
        message(99, 1, &[]),
        message(6, 1, &[0; 16]),
    ] {
        let mut stream = UnixStream::connect(&served.socket).unwrap();
        stream.write_all(&bytes).unwrap();
        let mut end = Vec::new();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.read_to_end(&mut end).unwrap_or_else(|error| panic!("{bytes:?}: {error}"));
    }
    // Half a message, and sudden death.
    for len in [1, 11, 13] {
        UnixStream::connect(&served.socket).unwrap().write_all(&message(2, 1, &[0; 8])[..len]).unwrap();
    }
    works(&mut Guest::connect(&served.socket, &Wish::default()));
}

#[test]
fn an_unknown_message_is_refused_where_the_front_end_can_hear_it() {
    let served = Served::new(small());
    let mut guest = Guest::connect(&served.socket, &Wish::default());
    let mut stream = guest.stream.try_clone().unwrap();
    stream.write_all(&message(99, 9, &[1, 2, 3])).unwrap();
    let mut reply = [0; 20];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(reply[12..], 1u64.to_ne_bytes());
    works(&mut guest);
}

#[test]
fn rings_outside_of_memory_or_misaligned_end_the_session() {
    let served = Served::new(small());
    for change in [
        (|settings| settings.desc_table_addr = 0) as fn(&mut vhost::VringConfigData),
        |settings| settings.used_ring_addr -= RAM_GUEST,
        |settings| settings.avail_ring_addr = settings.desc_table_addr + RAM_BYTES as u64 - 8,
        |settings| settings.avail_ring_addr = u64::MAX - 1,
        |settings| settings.avail_ring_addr += 1,
        |settings| settings.used_ring_addr += 2,
    ] {
        let wish = Wish { rings: 0, ..Wish::default() };
        let mut guest = Guest::connect(&served.socket, &wish);
        let ring = new_ring(0, &wish);
        let mut settings = Guest::vring_config(&ring);
        change(&mut settings);
        guest.frontend.set_vring_num(0, ring.size).unwrap();
        let _ = guest.frontend.set_vring_addr(0, &settings);
        let _ = guest.frontend.set_vring_kick(0, &ring.kick);
        let _ = guest.frontend.set_vring_enable(0, true);
        drop(guest.frontend);
        assert!({
            let mut end = Vec::new();
            guest.stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            guest.stream.read_to_end(&mut end).is_ok()
        });
    }
    works(&mut Guest::connect(&served.socket, &Wish::default()));
}

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
fn a_larger_device_is_told_to_the_guest_at_once_or_after_a_reconnect() {
    let served = Served::new(small());
    let wish = Wish { rings: 0, ..Wish::default() };
    let told = |ours: &UnixStream| {
        ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut bytes = [0; 12];
        (&*ours).read_exact(&mut bytes).unwrap();
        assert_eq!(bytes[..], message(2, 1, &[]));
    };
    let mut guest = Guest::connect(&served.socket, &wish);
    assert_eq!(guest.config()[..8], 8192u64.to_le_bytes());
    let (ours, theirs) = UnixStream::pair().unwrap();
    guest.frontend.set_backend_request_fd(&theirs).unwrap();
    guest.rings.push(new_ring(0, &wish));
    guest.start_ring(0);
    works(&mut guest);
    // It has read the size: nothing is told.
    ours.set_nonblocking(true).unwrap();
    assert_eq!((&ours).read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    ours.set_nonblocking(false).unwrap();
    served.device.grow(10_000);
    told(&ours);
    assert_eq!(guest.config()[..8], 10_000u64.to_le_bytes());
    assert_eq!(served.disk.geometry().unwrap().blocks, 10_000);
    // A front end that reconnects does not read the size again by itself (QEMU): it is told that it should.
    drop(guest);
    let mut guest = Guest::connect(&served.socket, &wish);
    let (ours, theirs) = UnixStream::pair().unwrap();
    guest.frontend.set_backend_request_fd(&theirs).unwrap();
    guest.rings.push(new_ring(0, &wish));
    guest.start_ring(0);
    told(&ours);
    works(&mut guest);
}

#[test]
fn a_new_call_descriptor_is_signalled_at_once_and_from_then_on() {
    let served = Served::new(small());
    let mut guest = Guest::connect(&served.socket, &Wish::default());
    works(&mut guest);
    for _ in 0..5 {
        let call = EventFd::new(EFD_NONBLOCK).unwrap();
        guest.frontend.set_vring_call(0, &call).unwrap();
        // What was signalled on the old one may have been missed.
        eventually("signalled", || call.read().is_ok());
        guest.rings[0].call = call;
        works(&mut guest);
    }
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

/// The front end sets the error descriptor once; after RESET_DEVICE a broken ring ended the session without a word.
#[test]
fn the_error_descriptor_outlives_a_reset_of_the_device() {
    let served = Served::new(small());
    let wish = Wish::default();
    let mut guest = Guest::connect(&served.socket, &wish);
    let err = EventFd::new(EFD_NONBLOCK).unwrap();
    guest.frontend.set_vring_err(0, &err).unwrap();
    guest.frontend.reset_device().unwrap();
    guest.ram.zero(RAM_GUEST, usize::try_from(DATA - RAM_GUEST).unwrap());
    guest.rings[0] = new_ring(0, &wish);
    guest.start_ring(0);
    works(&mut guest);
    guest.rings[0].offer(&guest.ram, 999);
    guest.rings[0].kick.write(1).unwrap();
    assert!(guest.is_ended());
    assert_eq!(err.read().unwrap(), 1);
}

/// A front end that sends a byte now and then is in the middle of a message for a long time. Its rings, its reactor's other
/// disks and the end of its own disk do not wait for the rest.
#[test]
fn a_message_that_comes_byte_by_byte_holds_nobody_up() {
    let (slow, other) = (Served::new(small()), Served::new(small()));
    let wish = Wish { rings: 2, ..Wish::default() };
    let mut guest = Guest::connect(&slow.socket, &wish);
    let mut busy = Guest::connect(&other.socket, &wish);
    let table = message(2, 9, &wish.features.to_ne_bytes());
    let mut stream = guest.stream.try_clone().unwrap();
    for byte in &table[..table.len() - 1] {
        stream.write_all(&[*byte]).unwrap();
        works(&mut guest);
        works(&mut busy);
    }
    // The rest of it makes a whole message.
    stream.write_all(&table[table.len() - 1..]).unwrap();
    let mut reply = [0; 20];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(reply[12..], 0u64.to_ne_bytes());
    works(&mut guest);
    // In the middle of a message again, its disk is removed: at once, and long before the last byte.
    let stalled = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let drips = std::thread::spawn({
        let stalled = Arc::clone(&stalled);
        move || {
            for byte in table.iter().cycle().take(4000) {
                if stream.write_all(&[*byte]).is_err() || !stalled.load(Ordering::Acquire) {
                    return true;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            false
        }
    });
    eventually("it has begun", || !drips.is_finished());
    assert!(slow.disk.stop(Duration::from_secs(600)).has_ended());
    stalled.store(false, Ordering::Release);
    assert!(drips.join().unwrap(), "the stop waited for 4000 bytes");
    works(&mut busy);
}

/// One that asks and does not read what is answered is not waited for either.
#[test]
fn a_front_end_that_does_not_read_its_replies_is_let_go() {
    let served = Served::new(small());
    let stream = UnixStream::connect(&served.socket).unwrap();
    stream.set_nonblocking(true).unwrap();
    let question = message(1, 1, &[]);
    eventually("let go", || {
        while matches!((&stream).write(&question), Ok(sent) if sent == question.len()) {}
        served.disk.counters().sessions_failed.load(Ordering::Relaxed) == 1
    });
    drop(stream);
    works(&mut Guest::connect(&served.socket, &Wish::default()));
}

/// Hot-plug while the guest works: tables are replaced, and regions come and go, under requests that a slow device has. What
/// lies in memory that stays is carried out, and every request ends once.
#[test]
fn tables_are_replaced_under_load() {
    let served = Served::new(small());
    let mut guest = Guest::connect(&served.socket, &Wish { size: 256, ..Wish::default() });
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
                guest.submit(0, &parts);
            }
            for _ in 0..16 {
                guest.rings[0].wait_used(&guest.ram);
            }
            for (slot, byte) in (0..16u64).zip(&written) {
                let at = DATA + 0x4000 * slot;
                assert_eq!(guest.ram.read(at + 16, 1), [0]);
                assert!(guest.ram.read(at + 64, 4096) == [*byte; 4096], "slot {slot} in round {rounds}");
            }
        }
    }
    tables.join().unwrap();
    assert_eq!(guest.rings[0].take_used(&guest.ram), None);
    works(&mut guest);
    assert_eq!(served.disk.counters().sessions_failed.load(Ordering::Relaxed), 0);
}
