//! Requests of every kind and layout, through a real session, queue and reactor.

mod support;

use hawser_block::{
    BlockSize, Device, DiscardLimits, Geometry, IoKind, Operation, Status, WriteZeroesLimits,
};
use support::frontend::*;
use support::{Served, eventually, small};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// Where a sector is in the fake device's content.
fn place(sector: u64) -> usize {
    usize::try_from(sector * 512).unwrap()
}

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|at| ((seed * 31 + at) ^ (at >> 7)).to_le_bytes()[0]).collect()
}

#[test]
fn what_is_written_is_read_back_and_get_id_answers_the_serial() {
    let served = Served::new(small());
    let mut guest = Guest::connect(&served.socket, &Wish::default());
    for (sector, sectors) in [(0u64, 1usize), (7, 8), (8191, 1), (100, 256)] {
        let data = pattern(sector, sectors * 512);
        assert_eq!(guest.request(T_OUT, sector, &data, 0).0, OK);
        let (status, read) = guest.request(T_IN, sector, &[], u32::try_from(data.len()).unwrap());
        assert_eq!(status, OK);
        assert_eq!(read, data);
        assert_eq!(served.device.fake.state().content[place(sector)..][..data.len()], data);
    }
    assert_eq!(guest.request(T_FLUSH, 0, &[], 0).0, OK);
    assert_eq!(guest.request(T_GET_ID, 0, &[], 20), (OK, b"serial-0123456789-xy".to_vec()));
    assert_eq!(guest.request(T_GET_ID, 0, &[], 5), (OK, b"seria".to_vec()));
    assert_eq!(guest.request(T_GET_ID, 0, &[], 0).0, IOERR);
    let read = served.disk.stats().kind(IoKind::Read);
    assert_eq!((read.requests, read.bytes, read.latency.count()), (4, 266 * 512, 4));
}

#[test]
fn mistakes_in_requests_get_a_status_and_the_session_goes_on() {
    let served = Served::new(small());
    let mut guest = Guest::connect(&served.socket, &Wish::default());
    for (kind, sector, write_bytes, read_bytes, right) in [
        (T_IN, 8192, 0, 512, IOERR),
        (T_IN, 8191, 0, 1024, IOERR),
        (T_IN, u64::MAX, 0, 512, IOERR),
        (T_IN, u64::MAX / 512, 0, 512, IOERR),
        (T_IN, 0, 0, 0, IOERR),
        (T_IN, 0, 0, 100, IOERR),
        (T_OUT, 0, 0, 0, IOERR),
        (T_OUT, 0, 513, 0, IOERR),
        (T_OUT, 8192, 512, 0, IOERR),
        (T_DISCARD, 0, 16, 0, UNSUPP),
        (T_WRITE_ZEROES, 0, 16, 0, UNSUPP),
        (2, 0, 0, 512, UNSUPP),
        (14, 0, 16, 0, UNSUPP),
        (u32::MAX, 0, 0, 0, UNSUPP),
    ] {
        let data = vec![1; write_bytes];
        assert_eq!(guest.request(kind, sector, &data, read_bytes).0, right, "{kind} at {sector}");
    }
    assert!(served.device.fake.state().log.is_empty());
    assert_eq!(served.disk.queue_counters()[0].mistakes.get(), 14);
    // Too short for a header.
    guest.ram.write(DATA + 16, &[0xff]);
    guest.submit(0, &[readable(DATA, 15), writable(DATA + 16, 1)]);
    assert_eq!(guest.rings[0].wait_used(&guest.ram).1, 1);
    assert_eq!(guest.ram.read(DATA + 16, 1), [IOERR]);
    // Data, then header, that is not in memory.
    let header_at = DATA;
    guest.ram.write(header_at, &header(T_IN, 0));
    for far in [0, RAM_GUEST - 256, RAM_GUEST + RAM_BYTES as u64 - 511, u64::MAX - 511, u64::MAX] {
        guest.ram.write(DATA + 16, &[0xff]);
        guest.submit(0, &[readable(header_at, 16), writable(far, 512), writable(DATA + 16, 1)]);
        guest.rings[0].wait_used(&guest.ram);
        assert_eq!(guest.ram.read(DATA + 16, 1), [IOERR], "{far:#x}");
        guest.ram.write(DATA + 16, &[0xff]);
        guest.submit(0, &[readable(far, 16), writable(DATA + 512, 512), writable(DATA + 16, 1)]);
        guest.rings[0].wait_used(&guest.ram);
        assert!(guest.ram.read(DATA + 16, 1) == [IOERR] || far == RAM_GUEST + RAM_BYTES as u64 - 511);
    }
    assert_eq!(guest.request(T_FLUSH, 0, &[], 0).0, OK);
}

#[test]
fn every_device_status_becomes_the_right_answer() {
    let served = Served::new(small());
    let mut guest = Guest::connect(&served.socket, &Wish::default());
    for status in Status::ALL {
        served.device.fake.state().outcomes.push_back(Err(status));
        let right = if status == Status::Unsupported { UNSUPP } else { IOERR };
        assert_eq!(guest.request(T_IN, 0, &[], 512).0, right, "{}", status.name());
        assert_eq!(served.disk.stats().failures(status), 1);
    }
}

#[test]
fn blocks_of_4096_bytes_take_whole_blocks_in_sectors_of_512() {
    let served = Served::new(Geometry::new(BlockSize::B4096, 100));
    let mut guest = Guest::connect(&served.socket, &Wish::default());
    let config = guest.config();
    assert_eq!(config[..8], 800u64.to_le_bytes());
    assert_eq!(config[20..24], 4096u32.to_le_bytes());
    let data = pattern(1, 8192);
    assert_eq!(guest.request(T_OUT, 16, &data, 0).0, OK);
    assert_eq!(guest.request(T_IN, 16, &[], 8192), (OK, data));
    assert_eq!(served.device.fake.state().log[0], (Operation::Write { fua: false }, 2, 2));
    for (sector, bytes) in [(1, 4096), (8, 512), (792, 8192), (800, 4096)] {
        assert_eq!(guest.request(T_IN, sector, &[], bytes).0, IOERR, "{sector} {bytes}");
    }
}

fn with_discard() -> Geometry {
    let mut geometry = small();
    geometry.discard = Some(DiscardLimits { blocks_max: 1000, granularity_blocks: 8, reads_zeroes: true });
    geometry.write_zeroes = Some(WriteZeroesLimits { blocks_max: 500, may_unmap: true });
    geometry
}

#[test]
fn discards_and_zeroes_reach_the_device_range_by_range() {
    let served = Served::new(with_discard());
    let mut guest = Guest::connect(&served.socket, &Wish::default());
    served.device.fake.state().content.fill(7);
    let ranges = [range(8, 8, 0), range(100, 1, 0), range(8191, 1, 0)].concat();
    assert_eq!(guest.request(T_DISCARD, 0, &ranges, 0).0, OK);
    assert_eq!(guest.request(T_WRITE_ZEROES, 0, &range(500, 2, 1), 0).0, OK);
    assert_eq!(guest.request(T_WRITE_ZEROES, 0, &range(600, 2, 0), 0).0, OK);
    let zeroes = |unmap| Operation::WriteZeroes { unmap, fua: false };
    let right = vec![
        (Operation::Discard, 8, 8),
        (Operation::Discard, 100, 1),
        (Operation::Discard, 8191, 1),
        (zeroes(true), 500, 2),
        (zeroes(false), 600, 2),
    ];
    assert_eq!(served.device.fake.state().log, right);
    for (kind, ranges, status) in [
        (T_DISCARD, range(0, 8, 1).to_vec(), UNSUPP),
        (T_DISCARD, range(0, 8, 2).to_vec(), UNSUPP),
        (T_WRITE_ZEROES, range(0, 8, 2).to_vec(), UNSUPP),
        (T_DISCARD, range(0, 1001, 0).to_vec(), IOERR),
        (T_WRITE_ZEROES, range(0, 501, 0).to_vec(), IOERR),
        (T_DISCARD, range(0, 0, 0).to_vec(), IOERR),
        (T_DISCARD, range(u64::MAX, 8, 0).to_vec(), IOERR),
        (T_DISCARD, range(8191, 2, 0).to_vec(), IOERR),
        (T_DISCARD, vec![0; 15], IOERR),
        (T_DISCARD, Vec::new(), IOERR),
        (T_DISCARD, range(0, 1, 0).repeat(33), IOERR),
        // One range that is wrong: none of the others is carried out.
        (T_DISCARD, [range(0, 1, 0), range(9000, 1, 0)].concat(), IOERR),
    ] {
        assert_eq!(guest.request(kind, 0, &ranges, 0).0, status, "{kind} {ranges:?}");
    }
    assert_eq!(served.device.fake.state().log, right);
    assert_eq!(guest.request(T_DISCARD, 0, &range(0, 1, 0).repeat(32), 0).0, OK);
    assert_eq!(served.device.fake.state().log.len(), right.len() + 32);
}

#[test]
fn a_read_only_disk_says_so_and_takes_no_change() {
    let served = Served::with(with_discard(), |config| config.read_only = true);
    let mut guest = Guest::connect(&served.socket, &Wish::default());
    let offered = vhost::VhostBackend::get_features(&guest.frontend).unwrap();
    assert_eq!(offered & (1 << 5 | 1 << 13 | 1 << 14), 1 << 5);
    assert_eq!(guest.request(T_OUT, 0, &[1; 512], 0).0, IOERR);
    assert_eq!(guest.request(T_DISCARD, 0, &range(0, 8, 0), 0).0, UNSUPP);
    assert_eq!(guest.request(T_WRITE_ZEROES, 0, &range(0, 8, 0), 0).0, UNSUPP);
    assert_eq!(guest.request(T_FLUSH, 0, &[], 0).0, OK);
    assert_eq!(guest.request(T_IN, 0, &[], 512), (OK, vec![0; 512]));
}

#[test]
fn writes_are_durable_without_flush_and_with_writeback_off() {
    let served = Served::new(with_discard());
    let no_flush = Wish { features: F_PROTOCOL | F_VERSION_1 | F_EVENT_IDX, ..Wish::default() };
    let mut guest = Guest::connect(&served.socket, &no_flush);
    assert_eq!(guest.request(T_OUT, 0, &[1; 512], 0).0, OK);
    drop(guest);
    let mut guest = Guest::connect(&served.socket, &Wish::default());
    assert_eq!(guest.config()[32], 1);
    assert_eq!(guest.request(T_OUT, 1, &[1; 512], 0).0, OK);
    guest.frontend.set_config(32, VhostUserConfigFlags::WRITABLE, &[0]).unwrap();
    assert_eq!(guest.config()[32], 0);
    assert_eq!(guest.request(T_OUT, 2, &[1; 512], 0).0, OK);
    assert_eq!(guest.request(T_WRITE_ZEROES, 0, &range(3, 1, 0), 0).0, OK);
    // The driver's wish outlives a reconnect: the guest still relies on it.
    drop(guest);
    let mut guest = Guest::connect(&served.socket, &Wish::default());
    assert_eq!(guest.config()[32], 0);
    assert_eq!(guest.request(T_OUT, 4, &[1; 512], 0).0, OK);
    guest.frontend.set_config(32, VhostUserConfigFlags::WRITABLE, &[1]).unwrap();
    assert_eq!(guest.request(T_OUT, 5, &[1; 512], 0).0, OK);
    assert!(guest.frontend.set_config(0, VhostUserConfigFlags::WRITABLE, &[1; 8]).is_err());
    let write = |fua, lba| (Operation::Write { fua }, lba, 1);
    assert_eq!(
        served.device.fake.state().log,
        [
            write(true, 0),
            write(false, 1),
            (Operation::Flush, 0, 0),
            write(true, 2),
            (Operation::WriteZeroes { unmap: false, fua: true }, 3, 1),
            write(true, 4),
            write(false, 5)
        ]
    );
}

/// A driver that switches to write-through relies on what it wrote before, too: that was in the device's cache, and writes
/// under way ended there.
#[test]
fn writeback_is_off_once_everything_written_before_is_durable() {
    let served = Served::new(small());
    let mut guest = Guest::connect(&served.socket, &Wish { inflight: true, ..Wish::default() });
    served.device.fake.state().outcomes.extend([Ok(()), Err(Status::Media)]);
    assert_eq!(guest.request(T_OUT, 1, &[1; 512], 0).0, OK);
    // A flush that fails leaves everything as it was.
    assert!(guest.frontend.set_config(32, VhostUserConfigFlags::WRITABLE, &[0]).is_err());
    assert_eq!(guest.config()[32], 1);
    served.device.fake.state().hold = true;
    let parts = guest.plain(T_OUT, 2, &[2; 512], 0, DATA);
    guest.submit(0, &parts);
    eventually("taken", || served.disk.queue_counters()[0].requests.get() == 2);
    let device = std::sync::Arc::clone(&served.device);
    let release = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(30));
        device.release();
    });
    guest.frontend.set_config(32, VhostUserConfigFlags::WRITABLE, &[0]).unwrap();
    release.join().unwrap();
    let write = |fua, lba| (Operation::Write { fua }, lba, 1);
    let flush = (Operation::Flush, 0, 0);
    assert_eq!(served.device.fake.state().log, [write(false, 1), flush, write(false, 2), flush]);
    guest.rings[0].wait_used(&guest.ram);
    assert_eq!(guest.request(T_OUT, 3, &[3; 512], 0).0, OK);
    assert_eq!(served.device.fake.state().log[4..], [write(true, 3)]);
}

#[test]
fn requests_of_4_mib_and_more_are_split_at_the_devices_limit() {
    let mut geometry = Geometry::new(BlockSize::B512, 32768);
    geometry.transfer_blocks_max = 3000;
    let served = Served::new(geometry);
    let mut guest = Guest::connect(&served.socket, &Wish::default());
    for bytes in [4usize << 20, (4 << 20) + 512, 8 << 20] {
        served.device.fake.state().log.clear();
        let data = pattern(3, bytes);
        assert_eq!(guest.request(T_OUT, 77, &data, 0).0, OK);
        assert_eq!(served.device.fake.state().log.len(), bytes.div_ceil(3000 * 512));
        let (status, read) = guest.request(T_IN, 77, &[], u32::try_from(bytes).unwrap());
        assert_eq!(status, OK);
        assert!(read == data);
    }
    // One piece of several fails: the request fails.
    served.device.fake.state().outcomes.extend([Ok(()), Err(Status::Media), Ok(())]);
    assert_eq!(guest.request(T_IN, 0, &[], 4 << 20).0, IOERR);
    assert_eq!(guest.request(T_IN, 0, &[], 4 << 20).0, OK);
}

/// Cuts `bytes` at `address` into descriptors of these lengths; what they do not cover is one more.
fn cut(address: u64, bytes: u32, lengths: &[u32], write: bool) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut done = 0;
    for len in lengths.iter().copied().chain([bytes]) {
        let len = len.min(bytes - done);
        if len > 0 {
            parts.push(Part { address: address + u64::from(done), len, write });
        }
        done += len;
    }
    parts
}

#[test]
fn any_layout_of_any_request_does_what_a_plain_one_does() {
    let served = Served::new(small());
    let mut seed = 0x1234_5678_9abc_def1u64;
    let mut random = move |below: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % below
    };
    let mut model = vec![0u8; 8192 * 512];
    for size in [4u16, 16, 128, 1024] {
        let mut guest = Guest::connect(&served.socket, &Wish { size, ..Wish::default() });
        for round in 0..400u64 {
            let sectors = random(20) + 1;
            let sector = random(8192 - sectors);
            let bytes = u32::try_from(sectors * 512).unwrap();
            let is_write = random(2) == 0;
            let at = DATA + random(4096);
            // One run of bytes to read and one to write, each cut anywhere: header and data may share a descriptor, be
            // torn apart, and so may data and status.
            let readable_bytes = if is_write { 16 + bytes } else { 16 };
            let writable_bytes = if is_write { 1 } else { bytes + 1 };
            let writable_at = at + 0x10_0000;
            let data = pattern(round, bytes as usize);
            guest.ram.write(at, &header(if is_write { T_OUT } else { T_IN }, sector));
            if is_write {
                guest.ram.write(at + 16, &data);
            }
            guest.ram.write(writable_at, &vec![0xee; writable_bytes as usize]);
            let indirect = random(3);
            let most = if indirect == 0 { u64::from(size / 2).min(60) } else { 60 };
            let mut lengths = |most: u64| -> Vec<u32> {
                let count = random(most.max(1));
                (0..count).map(|_| u32::try_from(random(3).pow(7) + random(40) + 1).unwrap()).collect()
            };
            let mut parts = cut(at, readable_bytes, &lengths(most), false);
            parts.extend(cut(writable_at, writable_bytes, &lengths(most), true));
            let ring = &mut guest.rings[0];
            let table = DATA + 0x20_0000 + random(5);
            let direct = match indirect {
                0 => parts.len(),
                1 => 0,
                _ => usize::try_from(random((parts.len() as u64).min(u64::from(size)))).unwrap(),
            };
            let head = if direct == parts.len() {
                if parts.len() > usize::from(size) {
                    continue;
                }
                ring.put_chain(&guest.ram, &parts)
            } else {
                ring.put_indirect_chain(&guest.ram, &parts, direct, table)
            };
            let old = ring.next_available;
            ring.offer(&guest.ram, head);
            ring.kick_if_wanted(&guest.ram, old);
            let (used, len) = ring.wait_used(&guest.ram);
            assert_eq!(used, head);
            let result = guest.ram.read(writable_at, writable_bytes as usize);
            assert_eq!(result.last(), Some(&OK), "{parts:?}");
            assert_eq!(len, writable_bytes);
            let place = &mut model[place(sector)..][..bytes as usize];
            if is_write {
                place.copy_from_slice(&data);
            } else {
                assert!(result[..bytes as usize] == *place, "{parts:?}");
            }
        }
        assert!(served.device.fake.state().content == model);
    }
}

#[test]
fn chains_longer_than_seg_max_get_an_error_and_nothing_else() {
    let served = Served::new(small());
    let mut guest = Guest::connect(&served.socket, &Wish { size: 1024, ..Wish::default() });
    guest.ram.write(DATA, &header(T_IN, 0));
    for (segments, right) in [(126u64, OK), (131, OK), (132, IOERR), (254, IOERR)] {
        let mut parts = vec![readable(DATA, 16)];
        // Not adjacent, so that they stay apart.
        parts.extend((0..segments).map(|index| writable(DATA + 4096 + 1024 * index, 512)));
        parts.push(writable(DATA + 16, 1));
        guest.ram.write(DATA + 16, &[0xff]);
        guest.submit(0, &parts);
        guest.rings[0].wait_used(&guest.ram);
        assert_eq!(guest.ram.read(DATA + 16, 1), [right], "{segments}");
    }
    // More than twice what seg_max allows: no driver's mistake, but somebody who wants to keep us walking.
    let mut parts = vec![readable(DATA, 16); 256];
    parts.push(writable(DATA + 16, 1));
    guest.submit(0, &parts);
    assert!(guest.is_ended());
    eventually("it is told", || served.disk.trouble().contains("more than 256 descriptors; seg_max is 126"));
}

/// A ring of 1024 requests of 16 MiB each was taken as it came: 16 GiB in pieces at the device.
#[test]
fn a_queue_takes_nothing_more_with_64_mib_in_flight_until_something_ends() {
    let served = Served::new(Geometry::new(BlockSize::B512, 32768));
    let mut guest = Guest::connect(&served.socket, &Wish::default());
    served.device.fake.state().hold = true;
    let parts = guest.plain(T_IN, 0, &[], 8 << 20, DATA);
    for _ in 0..20 {
        guest.submit(0, &parts);
    }
    let requests = || served.disk.queue_counters()[0].requests.get();
    eventually("taken", || requests() == 8);
    std::thread::sleep(std::time::Duration::from_millis(30));
    assert_eq!(requests(), 8);
    served.device.release();
    for _ in 0..20 {
        guest.rings[0].wait_used(&guest.ram);
    }
    assert_eq!(guest.request(T_IN, 0, &[], 512).0, OK);
}

#[test]
fn a_full_ring_of_requests_at_once_with_and_without_event_idx() {
    for features in [F_PROTOCOL | F_VERSION_1 | F_INDIRECT, Wish::default().features] {
        for size in [4u16, 64, 1024] {
            let served = Served::new(small());
            let mut guest = Guest::connect(&served.socket, &Wish { size, features, ..Wish::default() });
            let mut done = 0u32;
            for round in 0..20u64 {
                let chains = u64::from(size) / 3;
                let old = guest.rings[0].next_available;
                for index in 0..chains {
                    let at = DATA + 2048 * index;
                    let sector = (round * 13 + index) % 8192;
                    let parts = guest.plain(T_OUT, sector, &pattern(index, 512), 0, at);
                    let head = guest.rings[0].put_chain(&guest.ram, &parts);
                    guest.rings[0].offer(&guest.ram, head);
                }
                guest.rings[0].kick_if_wanted(&guest.ram, old);
                for _ in 0..chains {
                    guest.rings[0].wait_used(&guest.ram);
                    done += 1;
                }
            }
            let write = served.disk.stats().kind(IoKind::Write);
            assert_eq!(write.requests, u64::from(done));
            eventually("the counters agree", || {
                let counters = &served.disk.queue_counters()[0];
                counters.requests.get() == u64::from(done) && counters.mistakes.get() == 0
            });
            assert_eq!(served.device.geometry(), Some(small()));
        }
    }
}

#[test]
fn indices_wrap_around_and_no_interrupt_or_kick_is_lost() {
    for features in [F_PROTOCOL | F_VERSION_1, Wish::default().features] {
        let served = Served::new(small());
        let mut guest = Guest::connect(&served.socket, &Wish { size: 128, features, ..Wish::default() });
        let parts = guest.plain(T_FLUSH, 0, &[], 0, DATA);
        let mut done = 0u32;
        // More than 65536 in all, in batches of changing size.
        for round in 0..2300u32 {
            let batch = 1 + round % 60;
            let old = guest.rings[0].next_available;
            for _ in 0..batch {
                let head = guest.rings[0].put_chain(&guest.ram, &parts);
                guest.rings[0].offer(&guest.ram, head);
            }
            guest.rings[0].kick_if_wanted(&guest.ram, old);
            for _ in 0..batch {
                guest.rings[0].wait_used(&guest.ram);
                done += 1;
            }
        }
        assert!(done > 66_000);
        assert_eq!(served.disk.queue_counters()[0].requests.get(), u64::from(done));
    }
}

#[test]
fn a_driver_that_does_not_want_interrupts_gets_none() {
    for event_idx in [false, true] {
        let served = Served::new(small());
        let mut wish = Wish::default();
        if !event_idx {
            wish.features &= !F_EVENT_IDX;
        }
        let mut guest = Guest::connect(&served.socket, &wish);
        let quiet = |guest: &Guest| {
            let ring = &guest.rings[0];
            // Interrupt at used.idx 30000; or flags NO_INTERRUPT.
            let event = ring.available_at() + 4 + 2 * u64::from(ring.size);
            guest.ram.u16(event).store(30_000, std::sync::atomic::Ordering::Release);
            guest.ram.u16(ring.available_at()).store(1, std::sync::atomic::Ordering::Release);
        };
        quiet(&guest);
        let interrupts = || served.disk.queue_counters()[0].interrupts.get();
        for round in 1..50u16 {
            let parts = guest.plain(T_FLUSH, 0, &[], 0, DATA);
            guest.submit(0, &parts);
            eventually("shown", || guest.rings[0].used_idx(&guest.ram) == round);
            guest.rings[0].take_used(&guest.ram);
        }
        assert_eq!(interrupts(), 0);
        assert!(guest.rings[0].call.read().is_err());
        // And one that wants them again gets them.
        guest.ram.u16(guest.rings[0].available_at()).store(0, std::sync::atomic::Ordering::Release);
        let parts = guest.plain(T_FLUSH, 0, &[], 0, DATA);
        guest.submit(0, &parts);
        guest.rings[0].wait_used(&guest.ram);
        eventually("interrupted", || interrupts() > 0 || event_idx);
    }
}
