//! Sessions: coming and going, broken rings, garbage, slow front ends, news for the driver.

mod support;

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
