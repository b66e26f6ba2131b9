//! Eight disks on two reactors: what one front end does is not noticed by the others.

mod support;

use hawser_block::Device;
use hawser_virtio::VhostDisk;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use support::frontend::*;
use support::{Folder, TestDevice, config, eventually, reactor, small};

/// Writes and reads back with a pattern of its own until it is told to stop; panics at the first wrong byte.
fn verify(socket: PathBuf, disk: u64, stop: &AtomicBool, rounds: &AtomicU64) {
    let mut guest = Guest::connect(&socket, &Wish { rings: 2, ..Wish::default() });
    let mut round = 0u64;
    while !stop.load(Ordering::Relaxed) {
        let sector = (round * 37 + disk) % 8000;
        let byte = u8::try_from((round ^ disk) & 0xff).unwrap();
        let data = vec![byte; 4096];
        assert_eq!(guest.request(T_OUT, sector, &data, 0).0, 0, "disk {disk}");
        let (status, read) = guest.request(T_IN, sector, &[], 4096);
        assert_eq!(status, 0, "disk {disk}");
        assert!(read == data, "disk {disk}: another disk's bytes?");
        round += 1;
        rounds.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn garbage_malformed_rings_and_sudden_deaths_of_one_are_not_noticed_by_seven() {
    let folder = Folder::new();
    let reactors = [reactor(), reactor()];
    let handles: Vec<_> = reactors.iter().map(|reactor| reactor.handle().clone()).collect();
    let disks: Vec<VhostDisk> = (0..8)
        .map(|index| {
            let mut config = config(&folder.path(&format!("s{index}")));
            config.index = index;
            let device = Arc::new(TestDevice::new(small()));
            VhostDisk::start(config, device as Arc<dyn Device>, handles.clone()).unwrap()
        })
        .collect();
    let stop = AtomicBool::new(false);
    let rounds: Vec<AtomicU64> = (0..7).map(|_| AtomicU64::new(0)).collect();
    std::thread::scope(|scope| {
        for (disk, rounds) in rounds.iter().enumerate() {
            let socket = folder.path(&format!("s{disk}"));
            let stop = &stop;
            scope.spawn(move || verify(socket, disk as u64, stop, rounds));
        }
        let bad = folder.path("s7");
        let mut turn = 0u64;
        // Until everybody has gone on for a while beside every kind of mischief.
        while turn < 60 || rounds.iter().any(|rounds| rounds.load(Ordering::Relaxed) < 50) {
            turn += 1;
            if turn % 6 == 5 {
                UnixStream::connect(&bad).unwrap().write_all(&[0xff; 100]).unwrap();
                continue;
            }
            let mut guest = Guest::connect(&bad, &Wish { rings: 4, ..Wish::default() });
            match turn % 6 {
                0 => {
                    let at = guest.rings[0].available_at() + 2;
                    guest.ram.u16(at).store(40_000, Ordering::Release);
                }
                1 => {
                    let at = guest.rings[0].descriptor_at(0);
                    guest.rings[0].put_descriptor(&guest.ram, at, u64::MAX, u32::MAX, 0xffff, u16::MAX);
                    guest.rings[0].offer(&guest.ram, 0);
                }
                2 => guest.ram.file.set_len(0x2000).unwrap(),
                3 => {
                    // Death with a ring full of requests.
                    for index in 0..40 {
                        let parts = guest.plain(T_OUT, index, &[1; 512], 0, DATA + 2048 * index);
                        let head = guest.rings[1].put_chain(&guest.ram, &parts);
                        guest.rings[1].offer(&guest.ram, head);
                    }
                    guest.rings[1].kick.write(1).unwrap();
                    continue;
                }
                _ => {
                    guest.stream.write_all(&[0xa5; 64]).unwrap();
                }
            }
            for ring in &guest.rings {
                ring.kick.write(1).unwrap();
            }
            assert!(guest.is_ended());
        }
        stop.store(true, Ordering::Relaxed);
    });
    for disk in &disks[..7] {
        assert_eq!(disk.counters().sessions_failed.load(Ordering::Relaxed), 0, "{}", disk.trouble());
        assert_eq!(disk.counters().sessions.load(Ordering::Relaxed), 1);
    }
    assert!(disks[7].counters().sessions_failed.load(Ordering::Relaxed) > 30);
    // The queues of a disk are on both reactors.
    for reactor in &handles {
        assert!(reactor.stats().passes.load(Ordering::Relaxed) > 100);
    }
    drop(disks);
}

#[test]
fn eight_connected_disks_that_do_nothing_cost_nothing() {
    let folder = Folder::new();
    let reactors = [reactor(), reactor()];
    let handles: Vec<_> = reactors.iter().map(|reactor| reactor.handle().clone()).collect();
    let mut disks = Vec::new();
    let mut guests = Vec::new();
    for index in 0..8 {
        let socket = folder.path(&format!("s{index}"));
        let mut config = config(&socket);
        config.index = index;
        let device = Arc::new(TestDevice::new(small()));
        disks.push(VhostDisk::start(config, device as Arc<dyn Device>, handles.clone()).unwrap());
        let mut guest = Guest::connect(&socket, &Wish { rings: 4, ..Wish::default() });
        assert_eq!(guest.request(T_FLUSH, 0, &[], 0).0, 0);
        guests.push(guest);
    }
    let passes =
        || -> u64 { handles.iter().map(|reactor| reactor.stats().passes.load(Ordering::Relaxed)).sum() };
    let mut last = passes();
    eventually("the reactors sleep", || {
        std::thread::sleep(std::time::Duration::from_millis(100));
        let now = passes();
        now == std::mem::replace(&mut last, now)
    });
    drop(guests);
    drop(disks);
}
