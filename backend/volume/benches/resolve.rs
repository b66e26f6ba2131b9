//! How long `resolve()` takes, and what large tables cost. `cargo bench -p hawser-volume`; `cargo test` runs it for a moment.
//!
//! ```text
//!   warm       one volume of 4 GiB, every entry in the cache: the program's own arithmetic
//!   batches    32 requests at random addresses of 64 TiB, mapped in 1 MiB extents: the memory's latency, amortised
//!   snapshot   of those 64 TiB, as the owner carries it out
//! ```
//!
//! Times are of the best of many rounds: whatever else the machine does only adds to them. The middle one is printed beside it.
//!
//! Invariants: asserts no time; nothing is measured that was not checked to have been planned.

mod table;

use hawser_block::{BlockCount, Buffers, Lba, Operation, Request, Token};
use hawser_volume::format::{NONE, NewSnapshot, Record};
use hawser_volume::pool::View;
use hawser_volume::pool::resolve::{Plan, Resolved, prefetch, resolve};
use hawser_volume::raid::{Array, Level, Mode, Set, SetConfig};
use hawser_volume::thin::{Metadata, Thin, VolumeMap};
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};
use table::line;

const EXTENT_BYTES: u64 = 1 << 20;
const STRIP_BYTES: u32 = 64 << 10;
const BLOCK_SHIFT: u32 = 9;
const REQUEST_BYTES: u64 = 4096;
const DATA_OFFSET: u64 = 64 << 20;
/// What one drain of a ring brings.
const BATCH: usize = 32;
const VOLUME: u32 = 1;

/// How much is done.
struct Scale {
    small_bytes: u64,
    large_bytes: u64,
    /// In a round, which is short, so that many are not interrupted.
    requests: usize,
    /// No two rounds at random name the same entries: a million of them are more cache lines than any cache holds.
    rounds: usize,
}

impl Scale {
    const FULL: Scale = Scale { small_bytes: 4 << 30, large_bytes: 64 << 40, requests: 1 << 14, rounds: 64 };
    const TINY: Scale = Scale { small_bytes: 64 << 20, large_bytes: 64 << 30, requests: 1 << 10, rounds: 3 };
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    // `cargo bench` says so; `cargo test` does not.
    let scale =
        if arguments.iter().any(|argument| argument == "--bench") { Scale::FULL } else { Scale::TINY };
    println!("{:52}{:>14}{:>14}{:>14}", "", "best", "middle", "goal");
    warm(&scale);
    large(&scale);
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 8) % limit
    }
}

fn extents(bytes: u64) -> u32 {
    u32::try_from(bytes / EXTENT_BYTES).expect("a bench's volume is small enough")
}

/// A volume of so many bytes, mapped whole, and a few free extents.
fn mapped(bytes: u64) -> (Metadata, Thin) {
    let count = extents(bytes);
    let thin = Thin { extents: count + 1000, extent_bytes: EXTENT_BYTES, unit_bytes: 4096 };
    let mut metadata = Metadata::new(thin, count / 448 * 3 + 1000);
    let create = Record::CreateVolume { id: VOLUME, uuid: [1; 16], name: "v".to_owned(), size_bytes: bytes };
    metadata.apply(&create).expect("good");
    let bits = thin.full_bits();
    for index in 0..count {
        let extent = metadata.allocate().expect("there are enough");
        let map = Record::Map { volume: VOLUME, index, birth: 1, extent, fallback: NONE, bits };
        metadata.apply(&map).expect("good");
    }
    (metadata, thin)
}

/// The pool as a reactor sees it: all members in sync, all regions marked.
fn view(metadata: &Metadata, thin: Thin, level: Level, members: u64) -> View {
    let data = u64::from(thin.extents) * thin.extent_bytes;
    let member_bytes = match level {
        Level::Raid1 => data,
        Level::Raid10 => data * 2 / members,
        _ => data / (members - u64::from(level.parities())),
    };
    let strip = u64::from(STRIP_BYTES);
    let members = usize::try_from(members).expect("few");
    let set = Set::new(SetConfig {
        level,
        first_member: 0,
        member_bytes: vec![member_bytes.next_multiple_of(strip) + strip; members],
        strip_bytes: STRIP_BYTES,
        extent_bytes: EXTENT_BYTES,
        region_bytes: 64 << 20,
        data_offset: DATA_OFFSET,
        parity_log: (0, 1024),
    });
    let set = set.expect("good");
    for member in 0..set.members() {
        set.set_mode(member, Mode::InSync);
    }
    set.intents.set_all();
    let array = Array::new(vec![Arc::new(set)]).expect("good");
    View::without_devices(array, metadata.table(), thin, DATA_OFFSET, BLOCK_SHIFT)
}

fn requests(
    random: &mut Random,
    bytes: u64,
    count: usize,
    operation: Operation,
    payload: Buffers,
) -> Vec<Request> {
    let request = |_| Request {
        operation,
        lba: Lba(random.below(bytes / REQUEST_BYTES) * (REQUEST_BYTES >> BLOCK_SHIFT)),
        blocks: BlockCount(u32::try_from(REQUEST_BYTES >> BLOCK_SHIFT).expect("small")),
        buffers: payload,
        token: Token(0),
    };
    (0..count).map(request).collect()
}

/// Best and middle time of a round, in nanoseconds for each of its `count`.
fn measure(rounds: usize, count: usize, mut round: impl FnMut(usize)) -> (f64, f64) {
    round(rounds);
    let mut times: Vec<Duration> = (0..rounds)
        .map(|number| {
            let begin = Instant::now();
            round(number);
            begin.elapsed()
        })
        .collect();
    times.sort_unstable();
    let each = |time: Duration| time.as_secs_f64() * 1e9 / count as f64;
    (each(times[0]), each(times[times.len() / 2]))
}

fn one(view: &View, map: &VolumeMap, request: &Request, rotor: &mut u32, plan: &mut Plan, steps: usize) {
    let resolved = resolve(view, map, request, rotor, plan);
    assert!(resolved == Resolved::Plan && plan.steps.len() == steps, "{resolved:?} {plan:?}");
    black_box(&plan.steps);
}

const LEVELS: [(Level, u64); 5] =
    [(Level::Raid10, 4), (Level::Raid1, 2), (Level::Raid0, 4), (Level::Raid5, 3), (Level::Raid6, 4)];

/// The payload that all requests name; nothing looks at it.
struct Payload(Vec<u8>, libc::iovec);

impl Payload {
    fn new() -> Box<Payload> {
        let mut bytes = vec![0; 4096];
        let iovec = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        Box::new(Payload(bytes, iovec))
    }

    fn buffers(&self) -> Buffers {
        // SAFETY: `main`'s functions keep the payload until the last request that names it is gone.
        unsafe { Buffers::new(&raw const self.1, 1, u32::try_from(self.0.len()).expect("small")) }
    }
}

fn warm(scale: &Scale) {
    let payload = Payload::new();
    let (metadata, thin) = mapped(scale.small_bytes);
    let map = Arc::clone(metadata.volume(VOLUME).expect("made").map());
    let mut plan = Plan::new();
    for (level, members) in LEVELS {
        let view = view(&metadata, thin, level, members);
        for operation in [Operation::Read, Operation::Write { fua: false }] {
            if operation.is_write() && level.parities() > 0 {
                // A part of a stripe is not planned.
                continue;
            }
            let requests =
                requests(&mut Random(1), scale.small_bytes, scale.requests, operation, payload.buffers());
            let copies = if level.is_redundant() { 2 } else { 1 };
            let steps = if operation == Operation::Read { 1 } else { copies };
            let mut rotor = 0;
            let (best, middle) = measure(scale.rounds, requests.len(), |_| {
                for request in &requests {
                    one(&view, &map, request, &mut rotor, &mut plan, steps);
                }
            });
            let what = if operation == Operation::Read { "read" } else { "write" };
            let is_promised = matches!(level, Level::Raid10 | Level::Raid5);
            let goal = (is_promised && operation == Operation::Read).then_some(40.0);
            line(
                &format!("resolve, 4k {what}, thin + {level} on {members}, warm"),
                best,
                Some(middle),
                "ns",
                goal,
            );
        }
    }
}

fn large(scale: &Scale) {
    let tib = format!("{} GiB", scale.large_bytes >> 30);
    let payload = Payload::new();
    let begin = Instant::now();
    let (mut metadata, thin) = mapped(scale.large_bytes);
    let each = begin.elapsed().as_secs_f64() * 1e9 / f64::from(extents(scale.large_bytes));
    line(&format!("apply one mapping of {tib}"), each, None, "ns", None);
    let map = Arc::clone(metadata.volume(VOLUME).expect("made").map());
    let mut plan = Plan::new();
    for (level, members) in LEVELS {
        let view = view(&metadata, thin, level, members);
        for prefetches in [false, true] {
            let count = scale.requests * (scale.rounds + 1);
            let requests =
                requests(&mut Random(2), scale.large_bytes, count, Operation::Read, payload.buffers());
            let mut rotor = 0;
            let (best, middle) = measure(scale.rounds, scale.requests, |round| {
                for batch in requests[round * scale.requests..][..scale.requests].chunks(BATCH) {
                    if prefetches {
                        for request in batch {
                            prefetch(&view, &map, request);
                        }
                    }
                    for request in batch {
                        one(&view, &map, request, &mut rotor, &mut plan, 1);
                    }
                }
            });
            let how = if prefetches { "prefetched" } else { "plain" };
            let goal = (level == Level::Raid10 && prefetches).then_some(100.0);
            let name = format!("resolve, 4k read, {level} on {members}, {BATCH} at random of {tib}, {how}");
            line(&name, best, Some(middle), "ns", goal);
        }
    }
    snapshot(&mut metadata, &tib);
}

fn snapshot(metadata: &mut Metadata, tib: &str) {
    let mut times = Vec::new();
    for id in 2..9 {
        let item = NewSnapshot { origin: VOLUME, id, uuid: [1; 16], name: format!("s{id}") };
        let begin = Instant::now();
        metadata.apply(&Record::Snapshot { items: vec![item] }).expect("good");
        times.push(begin.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    line(&format!("snapshot of {tib}"), times[0], Some(times[times.len() / 2]), "ms", Some(10.0));
    for id in 2..9 {
        metadata.apply(&Record::Delete { id }).expect("good");
    }
    metadata.settle();
}
