//! How fast parity is made and undone, beside `memcpy`. `cargo bench -p hawser-volume --bench parity`; `cargo test` runs it for a
//! moment.
//!
//! ```text
//!   memory   strips of 64 KiB, 64 MiB of them, all touched in each round:  src dst | src dst | …        memcpy
//!                                                                           D  D  P | D  D  P | …        XOR
//!                                                                           D  D  P  Q | D  D  P  Q | …  P+Q, two lost
//! ```
//!
//! A rate is in bytes of sources: data for parities, what is left of a stripe for what is lost. A round measures everything once,
//! `memcpy` before each; the middle one of all rounds' ratios counts. Time is what this thread had of the processor: what others
//! have in between is none of it, and what they do to the caches slows both. It should be pinned: `taskset -c 1 cargo bench …`.
//!
//! Invariants: asserts no time; a kernel's results were checked before it is measured.

use hawser_volume::parity::{BLOCK_BYTES, Kernel, Shard, available, chosen};
use std::hint::black_box;
use std::time::Duration;

const STRIP_BYTES: usize = 64 << 10;
const PAGE_BYTES: usize = 4096;

/// How much is done.
struct Scale {
    memory_bytes: usize,
    rounds: usize,
}

impl Scale {
    const FULL: Scale = Scale { memory_bytes: 64 << 20, rounds: 31 };
    const TINY: Scale = Scale { memory_bytes: 4 << 20, rounds: 1 };
}

/// Page-aligned strips, one after the other.
struct Memory {
    bytes: Vec<u8>,
    first: usize,
    strips: usize,
}

impl Memory {
    fn new(len: usize) -> Memory {
        let mut state = 1_u64;
        let mut random = || {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            state.to_be_bytes()[0]
        };
        let bytes: Vec<u8> = (0..len + PAGE_BYTES).map(|_| random()).collect();
        let first = bytes.as_ptr().align_offset(PAGE_BYTES);
        Memory { bytes, first, strips: len / STRIP_BYTES }
    }

    /// Stripes of so many strips each, each stripe as its strips.
    fn each(&mut self, strips: usize, mut stripe: impl FnMut(&mut [&mut [u8]])) -> usize {
        let count = self.strips / strips;
        let used = &mut self.bytes[self.first..][..count * strips * STRIP_BYTES];
        let mut used = used.chunks_exact_mut(STRIP_BYTES);
        for _ in 0..count {
            let mut all: [&mut [u8]; 32] = std::array::from_fn(|_| &mut [][..]);
            all.iter_mut().take(strips).zip(&mut used).for_each(|(strip, bytes)| *strip = bytes);
            stripe(&mut all[..strips]);
        }
        count
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    Copy,
    Xor,
    Pq,
    /// The first and the last data strip are lost.
    Two,
    /// The last data strip and P are lost.
    DataAndP,
}

impl What {
    fn parities(self) -> usize {
        if matches!(self, What::Copy | What::Xor) { 1 } else { 2 }
    }

    fn name(self) -> &'static str {
        match self {
            What::Copy => "memcpy",
            What::Xor => "XOR",
            What::Pq => "P+Q",
            What::Two => "recovery of two data strips",
            What::DataAndP => "recovery of data and P",
        }
    }

    /// The least share of the rate of `memcpy` that is good.
    fn goal(self) -> Option<f64> {
        match self {
            What::Copy => None,
            What::Xor => Some(0.6),
            What::Pq => Some(0.4),
            What::Two | What::DataAndP => Some(0.2),
        }
    }

    fn run(self, kernel: &Kernel, strips: &mut [&mut [u8]]) {
        let data_count = strips.len() - self.parities();
        let (data, parities) = strips.split_at_mut(data_count);
        let mut known: [&[u8]; 32] = [&[]; 32];
        match (self, parities) {
            (What::Copy, [to]) => to.copy_from_slice(data[0]),
            (What::Xor, [p]) => {
                known.iter_mut().zip(&*data).for_each(|(known, data)| *known = data);
                kernel.xor(&known[..data_count], p);
            }
            (What::Pq, [p, q]) => {
                known.iter_mut().zip(&*data).for_each(|(known, data)| *known = data);
                kernel.pq(&known[..data_count], p, q);
            }
            (_, [p, q]) => {
                let last = data_count - 1;
                let mut shards: [Shard<'_>; 32] = std::array::from_fn(|_| Shard::Lost);
                for (index, strip) in data.iter_mut().enumerate() {
                    let lost = index == last || index == 0 && self == What::Two;
                    shards[index] = if lost { Shard::Wanted(strip) } else { Shard::Known(strip) };
                }
                shards[data_count] = if self == What::Two { Shard::Known(p) } else { Shard::Wanted(p) };
                shards[data_count + 1] = Shard::Known(q);
                kernel.recover(&mut shards[..data_count + 2], 2).expect("two may be lost");
            }
            _ => unreachable!("as many parities as `parities` says"),
        }
    }

    /// Source bytes per second.
    fn rate(self, kernel: &Kernel, memory: &mut Memory, data: usize) -> f64 {
        let begin = cpu_time();
        let stripes = memory.each(data + self.parities(), |strips| self.run(kernel, black_box(strips)));
        // Two lost leave as many strips as there are of data.
        (stripes * data * STRIP_BYTES) as f64 / (cpu_time() - begin).as_secs_f64()
    }
}

/// What this thread has had of the processor.
fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is there to be written.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(result, 0, "Linux has this clock");
    Duration::new(time.tv_sec.try_into().expect("positive"), time.tv_nsec.try_into().expect("below 10^9"))
}

/// The kernel does what the scalar one does, and undoes it.
fn check(kernel: &Kernel, data: usize) {
    let scalar = available().last().expect("the scalar one");
    let mut memory = Memory::new((data + 2) * STRIP_BYTES);
    memory.each(data + 2, |strips| {
        What::Pq.run(scalar, strips);
        let expected: Vec<Vec<u8>> = strips.iter().map(|strip| strip.to_vec()).collect();
        for (what, changes) in
            [(What::Pq, [data, data + 1]), (What::Two, [0, data - 1]), (What::DataAndP, [data - 1, data])]
        {
            changes.into_iter().for_each(|strip| strips[strip].fill(0));
            what.run(kernel, strips);
            assert!(
                strips.iter().zip(&expected).all(|(strip, expected)| **strip == **expected),
                "{kernel:?}"
            );
        }
    });
}

fn middle(values: &mut [f64]) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    // `cargo bench` says so; `cargo test` does not.
    let full = std::env::args().any(|argument| argument == "--bench");
    let scale = if full { Scale::FULL } else { Scale::TINY };
    assert!(STRIP_BYTES.is_multiple_of(BLOCK_BYTES));
    let mut memory = Memory::new(scale.memory_bytes);
    println!("{:62}{:>10}{:>10}   goal", "", "GB/s", "memcpy");
    for kernel in available() {
        let is_chosen = kernel.name() == chosen().name();
        for what in [What::Xor, What::Pq, What::Two, What::DataAndP] {
            // Kernels that are not used are here to be compared.
            let counts = if is_chosen { &[2, 4, 8, 16, 30][..] } else { &[2, 8] };
            for data in counts.iter().copied() {
                check(kernel, data);
                let (mut rates, mut ratios) = (Vec::new(), Vec::new());
                for _ in 0..scale.rounds {
                    let copied = What::Copy.rate(kernel, &mut memory, 1);
                    let rate = what.rate(kernel, &mut memory, data);
                    rates.push(rate / 1e9);
                    ratios.push(rate / copied);
                }
                let (rate, ratio) = (middle(&mut rates), middle(&mut ratios));
                let verdict = match what.goal().filter(|_| is_chosen) {
                    Some(goal) if ratio >= goal => format!("≥ {goal}, reached"),
                    Some(goal) => format!("≥ {goal}, MISSED"),
                    None => String::new(),
                };
                let name =
                    format!("{} on {} members, {}", what.name(), data + what.parities(), kernel.name());
                println!("{name:62}{rate:>10.2}{ratio:>9.2}×   {verdict}");
            }
        }
    }
}
