//! hawser beside itself over the fabric: what digests cost, what a second path costs, and how near large reads come to a copy
//! in memory.
//!
//! ```text
//! digests     CPU per byte with = without + cost × 2 × CRC32C's: the side that sends a byte and the side that receives it
//!             digest it, and the CPU time of both is counted
//! two paths   IOPS in round-robin over one path's
//! large reads bytes per second over those of copying 128 KiB pieces out of 512 MiB, as the target's
//!             disk does not fit a cache either
//! in place    share of the payload of 1 MiB reads that the kernel put into the client's pages, by the daemon's counters
//! ```
//!
//! Owns: these cases, their goals and the machine's rates. Must not know: how a sample is taken.

use std::hint::black_box;
use std::time::{Duration, Instant};

use super::cases::Shape;
use super::results::{Series, Spread};
use crate::client::options::Mix;
use crate::{sys, to_f64};

/// The pieces in which the machine's rates are measured, and the size of the large reads beside them.
const PIECE: usize = 128 << 10;
/// What is copied from, piece by piece: no cache holds it.
const WORKING_SET: usize = 512 << 20;
/// How long a rate is measured.
const RATE_TIME: Duration = Duration::from_millis(200);

/// How the disk's device reaches its target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Header and data digests.
    pub digests: bool,
    /// Two paths taken in turns.
    pub two_paths: bool,
}

/// One line of the table: a load on two links in turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Case {
    /// Without and with digests.
    Digests(Mix),
    /// Over one path and over two.
    TwoPaths,
    /// Large reads and a copy in memory.
    LargeReads,
    /// Where the payload of large reads lands.
    InPlace,
}

impl Case {
    /// All of them, in the order of the table.
    pub const ALL: [Case; 5] = [
        Case::Digests(Mix::Read),
        Case::Digests(Mix::Write),
        Case::TwoPaths,
        Case::LargeReads,
        Case::InPlace,
    ];

    /// What `--only` is matched against.
    pub fn name(self) -> &'static str {
        match self {
            Case::Digests(Mix::Write) => "fabric/digests/write-128k/qd8",
            Case::Digests(_) => "fabric/digests/read-128k/qd8",
            Case::TwoPaths => "fabric/two-paths/randread-4k/qd32",
            Case::LargeReads => "fabric/memcpy/read-128k/qd8",
            Case::InPlace => "fabric/in-place/read-1024k/qd4",
        }
    }

    /// The load.
    pub fn shape(self) -> Shape {
        match self {
            Case::Digests(mix) => Shape { mix, kib: 128, depth: 8 },
            Case::LargeReads => Shape { mix: Mix::Read, kib: 128, depth: 8 },
            Case::TwoPaths => Shape { mix: Mix::RandRead, kib: 4, depth: 32 },
            Case::InPlace => Shape { mix: Mix::Read, kib: 1024, depth: 4 },
        }
    }

    /// The link that is measured beside a plain one.
    pub fn link(self) -> Option<Link> {
        match self {
            Case::Digests(_) => Some(Link { digests: true, two_paths: false }),
            Case::TwoPaths => Some(Link { digests: false, two_paths: true }),
            Case::LargeReads | Case::InPlace => None,
        }
    }

    /// What is compared with the goal, and the goal's sign: `true` where more is better.
    pub fn goal(self) -> (f64, bool) {
        match self {
            Case::Digests(_) => (1.15, false),
            Case::TwoPaths => (0.95, true),
            Case::LargeReads => (0.15, true),
            Case::InPlace => (0.99, true),
        }
    }
}

/// Bytes per second of this machine, of one thread on the server's CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rates {
    /// CRC32C over 128 KiB.
    pub crc: f64,
    /// Copying 128 KiB pieces out of 512 MiB.
    pub copy: f64,
    /// Copying the same 128 KiB again and again, within the second-level cache.
    pub copy_cached: f64,
}

impl Rates {
    /// Measures both.
    pub fn measure(cpu: usize) -> Result<Self, String> {
        std::thread::scope(|scope| {
            let measured = scope.spawn(|| {
                sys::pin_to(cpu).map_err(|e| format!("cpu {cpu}: {e}"))?;
                let from = vec![0x5a_u8; WORKING_SET];
                let mut to = vec![0_u8; PIECE];
                let piece = &from[..PIECE];
                let crc = rate(|| _ = black_box(crc32c::crc32c(black_box(piece))));
                let copy_cached = rate(|| black_box(&mut to).copy_from_slice(black_box(piece)));
                let mut pieces = from.chunks_exact(PIECE).cycle();
                let copy =
                    rate(|| black_box(&mut to).copy_from_slice(black_box(pieces.next().unwrap_or(piece))));
                Ok(Rates { crc, copy, copy_cached })
            });
            measured.join().map_err(|_| "a thread of the measurement died".to_owned())?
        })
    }
}

/// The best of three: other load only makes it slower.
fn rate(mut piece: impl FnMut()) -> f64 {
    let mut best = 0.0_f64;
    for _ in 0..3 {
        let start = Instant::now();
        let mut bytes = 0;
        while start.elapsed() < RATE_TIME / 3 {
            for _ in 0..16 {
                piece();
                bytes += PIECE as u64;
            }
        }
        best = best.max(to_f64(bytes) / start.elapsed().as_secs_f64());
    }
    best
}

/// Payload of reads by where it landed first, in bytes since the daemon started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Landed {
    /// In the client's pages.
    pub in_place: u64,
    /// In the daemon's memory.
    pub copied: u64,
}

impl Landed {
    /// Out of `hawser device show NAME --json`.
    pub fn read(device: &str) -> Result<Self, String> {
        let value: serde_json::Value =
            serde_json::from_str(device).map_err(|e| format!("device show: {e}"))?;
        let number = |pointer: &str| {
            let found = value.pointer(pointer).and_then(serde_json::Value::as_u64);
            found.ok_or_else(|| format!("device show: no {pointer}"))
        };
        let copied = number("/copied_bytes/small_read")? + number("/copied_bytes/large_read_start")?;
        Ok(Landed { in_place: number("/counters/received_in_place_bytes")?, copied })
    }

    /// The share that landed in the client's pages between `before` and this.
    fn share_since(self, before: Landed) -> f64 {
        let (in_place, copied) = (self.in_place - before.in_place, self.copied - before.copied);
        let all = to_f64(in_place + copied);
        if all > 0.0 { to_f64(in_place) / all } else { 0.0 }
    }
}

/// A case with what was measured.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The case.
    pub case: Case,
    /// Over the plain link.
    pub plain: Series,
    /// Over [`Case::link`]; empty without one.
    pub other: Series,
    /// The machine's, in the same run.
    pub rates: Rates,
    /// Of the plain link's device, before and after.
    pub landed: [Landed; 2],
}

impl Outcome {
    fn bytes(&self) -> f64 {
        to_f64(self.case.shape().kib * 1024)
    }

    /// CPU nanoseconds per byte.
    fn cpu(&self, series: &Series) -> f64 {
        series.cpu().median * 1000.0 / self.bytes()
    }

    /// What the goal is about.
    pub fn value(&self) -> f64 {
        let over = |a: f64, b: f64| if b > 0.0 { a / b } else { 0.0 };
        match self.case {
            Case::Digests(_) => {
                let added = self.cpu(&self.other) - self.cpu(&self.plain);
                over(added, 2.0 * over(1e9, self.rates.crc))
            }
            Case::TwoPaths => over(self.other.iops().median, self.plain.iops().median),
            Case::LargeReads => over(self.plain.iops().median * self.bytes(), self.rates.copy),
            Case::InPlace => self.landed[1].share_since(self.landed[0]),
        }
    }

    /// Whether the goal was reached.
    pub fn reached(&self) -> bool {
        let (goal, more) = self.case.goal();
        if more { self.value() >= goal } else { self.value() <= goal }
    }

    /// What was measured, in words: the plain link, the other one, the machine, and what the value means.
    pub fn words(&self) -> [String; 4] {
        let spread =
            |spread: Spread, value: f64, unit: &str| format!("{value:.3} {unit} ±{:.0}%", spread.percent());
        let giga = |rate: f64| format!("{:.2} GB/s", rate / 1e9);
        let cpu = |series: &Series| spread(series.cpu(), self.cpu(series), "ns/B");
        let iops = |series: &Series| spread(series.iops(), series.iops().median / 1000.0, "k/s");
        match self.case {
            Case::Digests(_) => [
                format!("without {}", cpu(&self.plain)),
                format!("with {}", cpu(&self.other)),
                format!("CRC32C {:.3} ns/B", 1e9 / self.rates.crc.max(1.0)),
                "added CPU / 2 × CRC32C's".to_owned(),
            ],
            Case::TwoPaths => [
                format!("one {}", iops(&self.plain)),
                format!("two {}", iops(&self.other)),
                String::new(),
                "IOPS, two / one".to_owned(),
            ],
            Case::InPlace => [
                format!(
                    "{:.0} MiB in place",
                    to_f64(self.landed[1].in_place - self.landed[0].in_place) / 1048576.0
                ),
                format!(
                    "{:.0} MiB copied",
                    to_f64(self.landed[1].copied - self.landed[0].copied) / 1048576.0
                ),
                String::new(),
                "share in place".to_owned(),
            ],
            Case::LargeReads => [
                format!(
                    "{} ±{:.0}%",
                    giga(self.plain.iops().median * self.bytes()),
                    self.plain.iops().percent()
                ),
                String::new(),
                format!("memcpy {}, cached {}", giga(self.rates.copy), giga(self.rates.copy_cached)),
                "bytes / memcpy's".to_owned(),
            ],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::load::Measured;

    fn series(iops: f64, cpu_per_million: f64) -> Series {
        let sample = Measured { iops, cpu_per_million, ..Measured::default() };
        Series { samples: vec![sample], ..Series::default() }
    }

    #[test]
    fn values_are_what_the_goals_are_about() {
        let rates = Rates { crc: 10e9, copy: 16e9, copy_cached: 32e9 };
        let case = Case::Digests(Mix::Read);
        // 128 KiB: 26.2 µs without, and 0.2 ns per byte for two digests is as much again.
        let one = 131_072.0 * 0.2 / 1000.0;
        let landed = [Landed::default(); 2];
        let mut outcome =
            Outcome { case, plain: series(1.0, one), other: series(1.0, 2.0 * one), rates, landed };
        assert!((outcome.value() - 1.0).abs() < 1e-9 && outcome.reached());
        outcome.other = series(1.0, 2.2 * one);
        assert!(!outcome.reached());
        outcome =
            Outcome { case: Case::TwoPaths, plain: series(100e3, 1.0), other: series(96e3, 1.0), ..outcome };
        assert!((outcome.value() - 0.96).abs() < 1e-9 && outcome.reached());
        outcome.case = Case::LargeReads;
        outcome.plain = series(16e9 * 0.14 / 131_072.0, 1.0);
        assert!((outcome.value() - 0.14).abs() < 1e-9 && !outcome.reached());
        outcome.case = Case::InPlace;
        let show = r#"{"counters":{"received_in_place_bytes":98},"copied_bytes":{"small_read":1,"large_read_start":1}}"#;
        outcome.landed[1] = Landed::read(show).expect("all numbers");
        assert!((outcome.value() - 0.98).abs() < 1e-9 && !outcome.reached());
    }

    #[test]
    fn the_machine_has_rates() {
        let rates = Rates::measure(0).expect("CPU 0");
        assert!(rates.crc > 0.0 && rates.copy > 0.0);
    }
}
