//! Two hosts that each believe the other one gone take a pool from each other, again and again, while both write to it.
//!
//! To who takes it the other host is as after a loss of its power: what it had not flushed of the mapping was in its own memory. So each
//! block is written and flushed once; from then on each acknowledged write to it is where both look.

use crate::common::until;
use crate::frontend::{DATA, Guest, T_FLUSH, T_IN, T_OUT};
use crate::two_hosts::{config, host, storage, wish};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

const ROUNDS: u64 = 6;
/// How many writes of a host are acknowledged before the other one comes.
const WRITES: u64 = 200;
const BLOCKS: usize = 48;
/// Several blocks to an extent.
const APART: u64 = 300 << 10;
const BLOCK: usize = 4096;

/// What a block may hold: the number of the last write to it that was acknowledged, or that of one that failed after it.
#[derive(Clone, Copy, Default)]
struct Expected {
    acknowledged: u64,
    failed: Option<u64>,
}

fn content(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(BLOCK / 8)
}

fn sector(block: usize) -> u64 {
    block as u64 * APART / 512
}

/// What a block holds, which must be of one write.
fn read(guest: &mut Guest, block: usize) -> u64 {
    let (status, data) = guest.request(T_IN, sector(block), &[], u32::try_from(BLOCK).unwrap());
    assert_eq!(status, 0, "block {block}");
    let number = u64::from_le_bytes(data[..8].try_into().unwrap());
    assert!(data == content(number), "block {block} is torn");
    number
}

/// All blocks hold what they may, and that is what they hold from now on.
fn look(guest: &mut Guest, expected: &mut [Expected]) {
    for (block, expected) in expected.iter_mut().enumerate() {
        let found = read(guest, block);
        let is_good = found == expected.acknowledged || Some(found) == expected.failed;
        assert!(is_good, "block {block}: {found}, not {} or {:?}", expected.acknowledged, expected.failed);
        *expected = Expected { acknowledged: found, failed: None };
    }
}

/// Looks at all blocks, then writes to them in turn until a write fails: somebody else has the pool.
fn fight(socket: &Path, mut expected: Vec<Expected>, first: u64, written: &AtomicU64) -> Vec<Expected> {
    let mut guest = Guest::connect(socket, &wish());
    look(&mut guest, &mut expected);
    for (number, block) in (first..).zip((0..BLOCKS).cycle()) {
        if !end(&mut guest, T_OUT, sector(block), &content(number)) {
            expected[block].failed = Some(number);
            break;
        }
        expected[block].acknowledged = number;
        if number - first == BLOCKS as u64 {
            assert!(end(&mut guest, T_FLUSH, 0, &[]), "it has the pool alone");
        }
        written.fetch_add(1, Ordering::Relaxed);
    }
    expected
}

/// Whether a request succeeds. Patient: a write of unknown outcome ends when its target cannot carry it out any more.
fn end(guest: &mut Guest, kind: u32, sector: u64, data: &[u8]) -> bool {
    let parts = guest.plain(kind, sector, data, 0, DATA);
    guest.submit(0, &parts);
    until("the request ends", || guest.rings[0].used_idx(&guest.ram) != guest.rings[0].last_used);
    guest.rings[0].wait_used(&guest.ram);
    guest.ram.read(DATA + 16, 1) == [0]
}

#[test]
fn hosts_that_take_a_pool_from_each_other_while_both_write_lose_no_acknowledged_write() {
    let (_storage, target, listen) = storage();
    let more = "[[pool]]\nname = \"p0\"\nassume_exclusive = true\n";
    let hosts = [host(&listen, more), host(&listen, more)];
    let files = [config(&hosts[0]), config(&hosts[1])];
    hosts[0].ok(&["pool", "create", "p0", "--config", &files[0], "--raid", "raid1", "n1", "n2"]);
    hosts[0].ok(&["volume", "create", "p0/v", "--config", &files[0], "--size", "1GiB"]);
    let mut expected = vec![Expected::default(); BLOCKS];
    let mut serving = hosts[0].serve();
    until("the first has it", || serving.disk("v").0 == "listening");
    for round in 0..ROUNDS {
        let (here, there) = (usize::from(round % 2 == 1), usize::from(round % 2 == 0));
        let socket = hosts[here].path("v.sock");
        let written = AtomicU64::new(0);
        let (next, after) = thread::scope(|scope| {
            // No number comes twice.
            let fighting = scope.spawn(|| fight(&socket, expected, (round + 1) << 32, &written));
            until("it writes", || written.load(Ordering::Relaxed) >= WRITES || fighting.is_finished());
            let next = hosts[there].serve();
            until("the other has it", || next.disk("v").0 == "listening");
            (next, fighting.join().unwrap())
        });
        expected = after;
        assert!(written.load(Ordering::Relaxed) >= WRITES, "round {round}: {}", hosts[here].log());
        until("it knows", || serving.status()["pools"][0]["state"] == "failed");
        // Nobody would come to it, and who waits would wait for ever.
        let line = hosts[here].fails(&["pool", "scrub", "p0", "--wait"], 1);
        assert!(line.starts_with("pool p0: cannot be scrubbed: another host has "), "{line}");
        serving.kill();
        serving = next;
    }
    let last = &hosts[usize::from(ROUNDS % 2 == 1)];
    let mut guest = Guest::connect(&last.path("v.sock"), &wish());
    look(&mut guest, &mut expected);
    drop(guest);
    last.ok(&["pool", "scrub", "p0", "--wait"]);
    assert_eq!(serving.end(), Some(0));
    last.ok(&["pool", "check", "p0", "--config", &config(last)]);
    assert_eq!(target.end(), Some(0));
}
