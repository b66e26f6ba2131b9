//! How long `resolve()` takes, and what large tables cost. `cargo bench -p hawser-volume`; `cargo test` runs it for a moment.
//!
//! ```text
//!   warm       one volume of 4 GiB, every entry in the cache: the program's own arithmetic
//!   batches    32 requests at random addresses of 64 TiB, mapped in 1 MiB extents: the memory's latency, amortised
//!   snapshot   of those 64 TiB, as the owner carries it out
//!   load       of a checkpoint of them, by a process of its own, whose peak of memory is looked at
//! ```
//!
//! Times are of the best of many rounds: whatever else the machine does only adds to them. The middle one is printed beside it.
//!
//! Invariants: asserts no time; nothing is measured that was not checked to have been planned.

use hawser_block::{BlockCount, Buffers, Lba, Operation, Request, Token};
use hawser_volume::format::{NONE, NewSnapshot, PAGE_BYTES, Record, Root};
use hawser_volume::pool::View;
use hawser_volume::pool::resolve::{Plan, Resolved, prefetch, resolve};
use hawser_volume::raid::{Array, Level, Mode, Set, SetConfig};
use hawser_volume::thin::{Loader, Metadata, Thin, VolumeMap};
use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

const EXTENT_BYTES: u64 = 1 << 20;
const STRIP_BYTES: u32 = 64 << 10;
const BLOCK_SHIFT: u32 = 9;
const REQUEST_BYTES: u64 = 4096;
const DATA_OFFSET: u64 = 64 << 20;
/// What one drain of a ring brings.
const BATCH: usize = 32;
const VOLUME: u32 = 1;
const POOL: [u8; 16] = [7; 16];
/// Says that this process is the one that loads.
const LOADS: &str = "--loads";

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
    if let Some(at) = arguments.iter().position(|argument| argument == LOADS) {
        loads(Path::new(&arguments[at + 1]), &arguments[at + 2..]);
        return;
    }
    // `cargo bench` says so; `cargo test` does not.
    let scale =
        if arguments.iter().any(|argument| argument == "--bench") { Scale::FULL } else { Scale::TINY };
    println!("{:52}{:>14}{:>14}{:>14}", "", "best", "middle", "goal");
    warm(&scale);
    large(&scale);
}

/// A line of the table; `goal` is the most that is good.
fn line(name: &str, best: f64, middle: Option<f64>, unit: &str, goal: Option<f64>) {
    let number = |value: f64| match value {
        10.0.. => format!("{value:.1} {unit}"),
        _ => format!("{value:.3} {unit}"),
    };
    let verdict = match goal {
        Some(goal) if best <= goal => format!("≤ {goal} {unit}, reached"),
        Some(goal) => format!("≤ {goal} {unit}, MISSED"),
        None => String::new(),
    };
    println!("{name:52}{:>14}{:>14}   {verdict}", number(best), middle.map(number).unwrap_or_default());
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
    load(&mut metadata, thin, &tib);
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

/// Removes a file when it goes.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Writes a checkpoint to a file, which stays in the page cache, and has another process load it.
fn load(metadata: &mut Metadata, thin: Thin, tib: &str) {
    let scratch =
        Scratch(Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("checkpoint-{}", std::process::id())));
    let file = File::create(&scratch.0).expect("a scratch file");
    let begin = Instant::now();
    metadata.begin_checkpoint(true);
    let mut pages = 0_u64;
    loop {
        let some = metadata.checkpoint_step(256).expect("there is room");
        if some.is_empty() {
            break;
        }
        for (page, bytes) in some {
            file.write_all_at(&bytes, u64::from(page) * PAGE_BYTES as u64).expect("a scratch file");
            pages += 1;
        }
    }
    let root = metadata.checkpoint_root(POOL, 0, 0, 0);
    file.write_all_at(&root.encode(), 0).expect("a scratch file");
    metadata.end_checkpoint(true);
    line(&format!("checkpoint of {tib}, {pages} pages"), begin.elapsed().as_secs_f64(), None, "s", None);
    let numbers = [
        u64::from(thin.extents),
        u64::from(metadata.metadata_pages_used()),
        metadata.volume(VOLUME).map_or(0, |v| v.mapped_extents()),
    ];
    let this = std::env::current_exe().expect("this program");
    let child =
        Command::new(this).arg(LOADS).arg(&scratch.0).args(numbers.map(|number| number.to_string())).output();
    let child = child.expect("it starts");
    let text = String::from_utf8_lossy(&child.stdout).into_owned();
    let found: Vec<f64> = text.split_whitespace().filter_map(|number| number.parse().ok()).collect();
    let [seconds, peak_mib] = found[..] else { panic!("{text} {}", String::from_utf8_lossy(&child.stderr)) };
    line(&format!("load of a checkpoint of {tib}"), seconds, None, "s", Some(10.0));
    line(&format!("load of a checkpoint of {tib}: peak of memory"), peak_mib, None, "MiB", Some(1024.0));
}

/// The process that loads: prints the time, and its peak of memory in MiB.
fn loads(path: &Path, numbers: &[String]) {
    let number = |at: usize| numbers[at].parse::<u64>().expect("a number");
    let narrow = |number: u64| u32::try_from(number).expect("a u32");
    let file = File::open(path).expect("the checkpoint");
    let mut bytes = vec![0; PAGE_BYTES];
    file.read_exact_at(&mut bytes, 0).expect("the root");
    let root = Root::decode(&bytes, &POOL).expect("the root");
    let thin = Thin { extents: narrow(number(0)), extent_bytes: EXTENT_BYTES, unit_bytes: 4096 };
    let begin = Instant::now();
    let mut loader = Loader::new(thin, narrow(number(1)) * 3, &root);
    loop {
        let wanted = loader.wanted(256);
        if wanted.is_empty() {
            break;
        }
        for page in wanted {
            file.read_exact_at(&mut bytes, u64::from(page) * PAGE_BYTES as u64).expect("a page");
            loader.give(page, &bytes).expect("it is whole");
        }
    }
    let metadata = loader.finish().expect("it is whole");
    let seconds = begin.elapsed().as_secs_f64();
    assert_eq!(metadata.volume(VOLUME).map(|volume| volume.mapped_extents()), Some(number(2)));
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse::<f64>().ok());
    println!("{seconds} {}", peak.expect("Linux says it") / 1024.0);
}
