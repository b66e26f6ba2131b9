//! Death at every store: whatever store is our last, our successor finds every request either shown as used or in the
//! in-flight log, executes the unfinished ones first and in order, and none twice.
//!
//! The real queue runs on a reactor of the test's own thread. Its stores into shared memory end after the k-th
//! ([`crate::shared::test`]): what then is in memory is what a kill at that moment leaves. A second queue recovers from it.

use crate::dirty::{DirtyLog, Marks};
use crate::harness::{AVAILABLE, BYTES, DATA, GUEST, Harness, USED, memfd};
use crate::inflight::{InflightArea, LogError};
use crate::message::{InflightDescription, LogDescription};
use crate::shared::test::{die_after, left};
use hawser_block::Operation;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

const SIZE: u16 = 8;

/// The driver's side: one write of one block per head, each with a number of its own.
struct Driver {
    next_available: u16,
    last_used: u16,
    /// The request that each head carries, while it is out.
    out: [Option<u64>; SIZE as usize],
    /// Requests in the order in which they were offered.
    offered: Vec<u64>,
    done: BTreeSet<u64>,
}

impl Driver {
    fn new() -> Driver {
        Driver {
            next_available: 0,
            last_used: 0,
            out: [None; SIZE as usize],
            offered: Vec::new(),
            done: BTreeSet::new(),
        }
    }

    /// Offers request `number`: a write of its number to block `number`. Each request has one indirect table.
    fn offer(&mut self, harness: &Harness, head: u16) -> u64 {
        let number = self.offered.len() as u64;
        let at = DATA + 0x800 * u64::from(head);
        assert_eq!(self.out[usize::from(head)].replace(number), None);
        let descriptor = |address: u64, len: u32, flags: u16, next: u16| {
            let value = u128::from(GUEST + address)
                | u128::from(len) << 64
                | u128::from(flags) << 96
                | u128::from(next) << 112;
            value.to_le_bytes()
        };
        harness.write(16 * u64::from(head), &descriptor(at, 48, 4, 0));
        let table =
            [descriptor(at + 64, 16, 1, 1), descriptor(at + 0x100, 512, 1, 2), descriptor(at + 80, 1, 2, 0)];
        harness.write(at, &table.concat());
        harness.write(at + 64, &(1u128 | u128::from(number) << 64).to_le_bytes());
        harness.write(at + 80, &[0xff]);
        harness.write(at + 0x100, &[u8::try_from(number + 1).unwrap(); 512]);
        harness.write(AVAILABLE + 4 + 2 * u64::from(self.next_available % SIZE), &head.to_le_bytes());
        self.next_available = self.next_available.wrapping_add(1);
        harness.write(AVAILABLE + 2, &self.next_available.to_le_bytes());
        self.offered.push(number);
        number
    }

    /// Takes what is shown as used: heads that are out, each with its status.
    fn take_used(&mut self, harness: &Harness) {
        let used_idx = u16::from_le_bytes(harness.read(USED + 2, 2).try_into().unwrap());
        let new = used_idx.wrapping_sub(self.last_used);
        assert!(new <= SIZE, "used.idx jumped by {new}");
        for _ in 0..new {
            let at = USED + 4 + 8 * u64::from(self.last_used % SIZE);
            let head = u32::from_le_bytes(harness.read(at, 4).try_into().unwrap());
            let number = self.out[head as usize].take().expect("a head is shown as used once");
            assert_eq!(harness.read(DATA + 0x800 * u64::from(head) + 80, 1), [0], "request {number}");
            assert!(self.done.insert(number));
            self.last_used = self.last_used.wrapping_add(1);
        }
    }

    fn free_head(&self) -> Option<u16> {
        (0..SIZE).find(|head| self.out[usize::from(*head)].is_none())
    }
}

struct Log {
    file: OwnedFd,
    description: InflightDescription,
}

impl Log {
    fn new() -> Log {
        let (_, file, description) = InflightArea::create(1, SIZE).unwrap();
        Log { file, description }
    }

    fn map(&self) -> Arc<InflightArea> {
        InflightArea::map(self.description, &self.file).unwrap()
    }
}

/// The destination of a migration: gets every page that is marked, and what the driver writes.
struct Destination {
    log: Arc<DirtyLog>,
    bits: File,
    memory: Vec<u8>,
}

impl Destination {
    fn new() -> Destination {
        let file = memfd(4096);
        let log = DirtyLog::map(LogDescription { bytes: 4096, file_offset: 0 }, &file).unwrap();
        Destination { log, bits: file.into(), memory: vec![0; usize::try_from(BYTES).unwrap()] }
    }

    fn marks(&self) -> Marks {
        Marks { log: Arc::clone(&self.log), used: Some(GUEST + USED) }
    }

    /// Takes the marks away and copies their pages.
    fn copy(&mut self, harness: &Harness) {
        let mut bits = [0u8; 4096];
        self.bits.read_exact_at(&mut bits, 0).unwrap();
        self.bits.write_all_at(&[0; 4096], 0).unwrap();
        for page in 0..BYTES >> 12 {
            let number = usize::try_from((GUEST >> 12) + page).unwrap();
            if bits[number / 8] & 1 << (number % 8) != 0 {
                let from = usize::try_from(page << 12).unwrap();
                self.memory[from..from + 4096].copy_from_slice(&harness.read(page << 12, 4096));
            }
        }
    }

    /// What the driver writes where the device writes too: the status byte of a request that it offers.
    fn offered(&mut self, head: u16) {
        self.memory[usize::try_from(status_at(head)).unwrap()] = 0xff;
    }

    /// Everything that the device writes here is there too.
    fn expect_all(&self, harness: &Harness, stores: Option<u64>) {
        let there =
            |at: u64, len: usize| self.memory[usize::try_from(at).unwrap()..][..len] == harness.read(at, len);
        assert!(there(USED, 6 + 8 * usize::from(SIZE)), "death after {stores:?} stores: the used ring");
        for head in 0..SIZE {
            assert!(there(status_at(head), 1), "death after {stores:?} stores: the status at {head}");
        }
    }
}

fn status_at(head: u16) -> u64 {
    DATA + 0x800 * u64::from(head) + 80
}

/// A life with death after `stores` stores (`None`: none), then the next life. Returns how many stores were made. With a
/// destination, the VM migrates all the while.
fn two_lives(harness: &mut Harness, stores: Option<u64>, mut destination: Option<Destination>) -> u64 {
    harness.write(0, &vec![0; usize::try_from(BYTES).unwrap()]);
    harness.device.state().content.fill(0);
    let log = Log::new();
    let mut driver = Driver::new();

    const MANY: u64 = 1 << 40;
    die_after(Some(stores.unwrap_or(MANY)));
    let marks = || destination.as_ref().map(Destination::marks);
    let first = harness.start_marking(SIZE, true, log.map().queue(0), marks()).unwrap();
    // Batches of several sizes; some end while others are held, out of order.
    for round in 0..12u16 {
        harness.device.state().hold = round % 3 == 1;
        for _ in 0..=(round % 5) {
            if let Some(head) = driver.free_head() {
                driver.offer(harness, head);
                destination.iter_mut().for_each(|destination| destination.offered(head));
            }
        }
        harness.steps(3);
        driver.take_used(harness);
        destination.iter_mut().for_each(|destination| destination.copy(harness));
    }
    harness.device.state().hold = false;
    let made = MANY - left().unwrap();
    // Death: nothing of what this queue still does is seen by anyone.
    die_after(Some(0));
    harness.stop(&first);
    assert_eq!(first.session.error(), None);
    die_after(None);

    // The next life: same memory, same log.
    harness.device.state().log.clear();
    driver.take_used(harness);
    let unfinished: Vec<u64> =
        driver.offered.iter().copied().filter(|one| !driver.done.contains(one)).collect();
    let marks = destination.as_ref().map(Destination::marks);
    let second = harness.start_marking(SIZE, true, log.map().queue(0), marks).unwrap();
    // Nothing new while the VM migrates: what is marked is marked by the start alone, where nothing is unfinished.
    let head = driver.free_head().filter(|_| destination.is_none());
    let fresh = head.map(|head| driver.offer(harness, head));
    harness.steps(30);
    driver.take_used(harness);
    if let Some(destination) = &mut destination {
        destination.copy(harness);
        destination.expect_all(harness, stores);
    }
    assert_eq!(second.session.error(), None);
    let right: Vec<u64> = unfinished.iter().copied().chain(fresh).collect();
    let executed: Vec<u64> = harness
        .device
        .state()
        .log
        .iter()
        .map(|(operation, lba, _)| {
            assert_eq!(*operation, Operation::Write { fua: false });
            *lba
        })
        .collect();
    // Each unfinished one once, in the order in which they were offered, before anything new.
    assert_eq!(executed, right, "death after {stores:?} stores");
    assert_eq!(driver.done.len(), driver.offered.len(), "death after {stores:?} stores");
    for number in &driver.offered {
        let content = &harness.device.state().content[usize::try_from(number * 512).unwrap()..][..512];
        assert!(content.iter().all(|byte| u64::from(*byte) == number + 1), "request {number}");
    }
    let stopped = harness.stop(&second);
    assert!(!stopped.left_in_log);
    assert!(!log.map().queue(0).unwrap().may_have_unfinished());
    made
}

#[test]
fn death_at_every_store_loses_nothing_and_repeats_nothing() {
    let mut harness = Harness::new();
    let stores = two_lives(&mut harness, None, None);
    assert!(stores > 200, "{stores} stores: does the script still do anything?");
    for k in 0..stores {
        two_lives(&mut harness, Some(k), None);
    }
}

/// The front end keeps the log of dirty pages when we die, as it keeps the in-flight log: between them nothing is lost that the
/// destination has to have.
#[test]
fn death_at_every_store_while_the_vm_migrates_loses_no_page() {
    let mut harness = Harness::new();
    let without = two_lives(&mut harness, None, None);
    let stores = two_lives(&mut harness, None, Some(Destination::new()));
    assert!(stores > without, "marks are stores too");
    for k in 0..stores {
        two_lives(&mut harness, Some(k), Some(Destination::new()));
    }
}

#[test]
fn death_during_recovery_is_recovered_from() {
    // A last batch of three whose marks still stand: used.idx is 3, the log's used_idx 0; head 5 is really unfinished.
    let prepare = |log: &Log| {
        let area = log.map();
        let mut queue = area.queue(0).unwrap();
        queue.recover(0, 8, SIZE).unwrap();
        for head in [4, 2, 7, 5] {
            queue.begin(head);
        }
        for head in [2, 7, 4] {
            queue.end(head);
        }
    };
    let log = Log::new();
    prepare(&log);
    die_after(Some(1 << 40));
    let found = log.map().queue(0).unwrap().recover(3, 8, SIZE).unwrap();
    let stores = (1 << 40) - left().unwrap();
    die_after(None);
    assert_eq!(found.iter().map(|one| (one.head, one.counter)).collect::<Vec<_>>(), [(5, 3)]);
    assert_eq!(stores, 4);
    for k in 0..stores {
        let log = Log::new();
        prepare(&log);
        die_after(Some(k));
        let _ = log.map().queue(0).unwrap().recover(3, 8, SIZE);
        die_after(None);
        let again = log.map().queue(0).unwrap().recover(3, 8, SIZE).unwrap();
        assert_eq!(again, found, "death after {k} stores of the recovery");
    }
}

#[test]
fn logs_that_are_not_this_rings_are_refused_or_emptied() {
    let log = Log::new();
    let area = log.map();
    let begun = |heads: &[u16]| {
        let mut queue = area.queue(0).unwrap();
        queue.clear();
        queue.recover(0, 8, SIZE).unwrap();
        heads.iter().for_each(|head| {
            queue.begin(*head);
        });
    };
    // A ring that has begun afresh: more in flight than was ever made available.
    begun(&[1, 2, 3]);
    assert_eq!(area.queue(0).unwrap().recover(0, 2, SIZE).unwrap(), []);
    // A smaller ring.
    begun(&[1, 6]);
    assert_eq!(area.queue(0).unwrap().recover(0, 4, 4).unwrap(), []);
    // used.idx went back.
    begun(&[1]);
    assert_eq!(area.queue(0).unwrap().recover(100, 108, SIZE).unwrap(), []);
    // What fits is kept.
    begun(&[6, 1]);
    let kept = area.queue(0).unwrap().recover(100, 108, SIZE).unwrap();
    assert_eq!(kept, []);
    let file = std::fs::File::from(log.file.try_clone().unwrap());
    let store =
        |at: u64, value: u16| std::os::unix::fs::FileExt::write_at(&file, &value.to_ne_bytes(), at).unwrap();
    store(8, 2);
    let error = area.queue(0).unwrap().recover(0, 8, SIZE).unwrap_err();
    assert!(matches!(error, LogError::UnknownVersion { queue: 0, version: 2 }));
    store(8, 1);
    store(10, 4);
    let error = area.queue(0).unwrap().recover(0, 8, SIZE).unwrap_err();
    assert!(matches!(error, LogError::DescNum { found: 4, right: SIZE, .. }));
    store(10, SIZE);
    // A list of the last batch that leaves the table, or goes round, ends.
    for (head, next) in [(200, 0), (3, 200), (3, 3)] {
        store(12, head);
        store(16 + 16 * 3 + 6, next);
        store(14, 0);
        area.queue(0).unwrap().recover(6, 8, SIZE).unwrap();
    }
}

#[test]
fn the_counter_goes_on_after_a_recovery() {
    let log = Log::new();
    let area = log.map();
    let mut queue = area.queue(0).unwrap();
    queue.recover(0, 0, SIZE).unwrap();
    assert_eq!((queue.begin(3), queue.begin(1)), (0, 1));
    let mut next = area.queue(0).unwrap();
    let unfinished = next.recover(0, 5, SIZE).unwrap();
    assert_eq!(unfinished.iter().map(|one| one.head).collect::<Vec<_>>(), [3, 1]);
    assert_eq!(next.begin(2), 2);
}

/// A queue with nothing unfinished once began to count at 0 again, with the same log: crashes in two requests early in its
/// lives looked like the same one twice, and the disk was set aside for nothing.
#[test]
fn the_counter_goes_on_where_nothing_is_unfinished() {
    let log = Log::new();
    let area = log.map();
    let mut queue = area.queue(0).unwrap();
    queue.recover(0, 0, SIZE).unwrap();
    for head in [3, 1] {
        queue.begin(head);
        queue.end(head);
    }
    queue.published(&[3, 1], 2);
    let mut next = area.queue(0).unwrap();
    assert!(next.recover(2, 2, SIZE).unwrap().is_empty());
    assert_eq!(next.begin(3), 2);
}
