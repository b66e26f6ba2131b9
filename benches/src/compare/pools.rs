//! Thin volumes in pools beside a bare device of the same kind, all in one process: what the table and the array cost.
//!
//! ```text
//!   bare ── mem:                     r0/v ── thin, RAID 0 ── mem:, mem:         r1/v ── thin, RAID 1 ── mem:, mem:
//!
//! loads           IOPS of a filled volume over the bare device's, in turns
//! first write     latency of a 4 KiB write to an extent that is not there over that of an overwrite
//! after snapshot  latency of a 4 KiB write to what a snapshot shares over that of reading a block and writing it to a new extent
//! ```
//!
//! Latencies are of one front end with one request in flight, and of all four kinds in turns, so that they sleep and wake alike. The
//! members' memory has been written before: what is measured is the pool, and not the kernel's giving memory.
//!
//! Owns: these cases, their goals, the requests whose latency is taken. Must not know: how a sample of a load is taken.

use std::path::Path;
use std::time::{Duration, Instant};

use super::cases::Shape;
use super::results::{Series, Spread};
use crate::client::options::Mix;
use crate::frontend::{Config, Op, STATUS_OK, Session};
use crate::{sys, to_f64};

/// The unit of allocation.
const EXTENT_BYTES: u64 = 1 << 20;
/// What is read and written.
const BLOCK_BYTES: usize = 4096;

/// One line of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Case {
    /// A load on a volume on RAID 0, and on the bare device.
    Raid0(Mix),
    /// The same on RAID 1.
    Raid1(Mix),
    /// A write to a new extent, and an overwrite.
    FirstWrite,
    /// A write to an extent that a snapshot shares; a read and a write to a new extent.
    AfterSnapshot,
}

impl Case {
    /// All of them, in the order of the table.
    pub const ALL: [Case; 6] = [
        Case::Raid0(Mix::RandRead),
        Case::Raid0(Mix::RandWrite),
        Case::Raid1(Mix::RandRead),
        Case::Raid1(Mix::RandWrite),
        Case::FirstWrite,
        Case::AfterSnapshot,
    ];

    /// What `--only` is matched against.
    pub fn name(self) -> &'static str {
        match self {
            Case::Raid0(Mix::RandRead) => "pool/raid0/randread-4k/qd32",
            Case::Raid0(_) => "pool/raid0/randwrite-4k/qd32",
            Case::Raid1(Mix::RandRead) => "pool/raid1/randread-4k/qd32",
            Case::Raid1(_) => "pool/raid1/randwrite-4k/qd32",
            Case::FirstWrite => "pool/first-write/qd1",
            Case::AfterSnapshot => "pool/after-snapshot/qd1",
        }
    }

    /// The load, where it is one.
    pub fn shape(self) -> Option<Shape> {
        match self {
            Case::Raid0(mix) | Case::Raid1(mix) => Some(Shape { mix, kib: 4, depth: 32 }),
            Case::FirstWrite | Case::AfterSnapshot => None,
        }
    }

    /// What is compared with the goal, and the goal's sign: `true` where more is better.
    pub fn goal(self) -> Option<(f64, bool)> {
        match self {
            Case::Raid0(Mix::RandRead) => Some((0.9, true)),
            Case::Raid0(_) => None,
            Case::Raid1(Mix::RandRead) => Some((0.85, true)),
            Case::Raid1(_) => Some((0.45, true)),
            Case::FirstWrite => Some((1.5, false)),
            Case::AfterSnapshot => Some((1.0, false)),
        }
    }
}

/// What a case has found.
#[derive(Clone, Debug)]
pub enum Found {
    /// A load on the bare device and on the volume.
    Loads {
        /// The bare device's.
        bare: Series,
        /// The volume's.
        thin: Series,
    },
    /// Medians of latencies, one from each round.
    Latencies(Vec<Latencies>),
}

/// Median latencies in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Latencies {
    /// Of a write where one was before.
    pub overwrite: f64,
    /// Of a write to an extent that was not there.
    pub first_write: f64,
    /// Of a read.
    pub read: f64,
    /// Of a write to an extent that a snapshot has too.
    pub after_snapshot: f64,
}

/// One case with what it has found.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The case.
    pub case: Case,
    /// The numbers.
    pub found: Found,
    /// Attempts that were thrown away because of other load.
    pub repeated: u32,
    /// Reasons why kept samples are doubtful.
    pub disturbed: Vec<String>,
}

impl Outcome {
    fn spread(&self, pick: impl Fn(&Latencies) -> f64) -> Spread {
        match &self.found {
            Found::Latencies(rounds) => Spread::of(rounds.iter().map(pick)),
            Found::Loads { .. } => Spread::default(),
        }
    }

    /// What the goal is about.
    pub fn value(&self) -> f64 {
        let over = |a: f64, b: f64| if b > 0.0 { a / b } else { 0.0 };
        match (&self.found, self.case) {
            (Found::Loads { bare, thin }, _) => over(thin.iops().median, bare.iops().median),
            (Found::Latencies(_), Case::FirstWrite) => {
                self.spread(|l| over(l.first_write, l.overwrite)).median
            }
            (Found::Latencies(_), _) => {
                self.spread(|l| over(l.after_snapshot, l.read + l.first_write)).median
            }
        }
    }

    /// Whether the goal was reached, if there is one.
    pub fn reached(&self) -> Option<bool> {
        let (goal, more) = self.case.goal()?;
        Some(if more { self.value() >= goal } else { self.value() <= goal })
    }

    /// What was measured, in words: what it is compared with, itself, and what the value means.
    pub fn words(&self) -> [String; 3] {
        let iops = |series: &Series| {
            let iops = series.iops();
            format!("{:.1} k/s ±{:.0}%", iops.median / 1000.0, iops.percent())
        };
        let time = |pick: fn(&Latencies) -> f64| {
            let spread = self.spread(pick);
            format!("{:.1} µs ±{:.0}%", spread.median, spread.percent())
        };
        match (&self.found, self.case) {
            (Found::Loads { bare, thin }, _) => {
                [format!("bare {}", iops(bare)), format!("volume {}", iops(thin)), "IOPS".to_owned()]
            }
            (Found::Latencies(_), Case::FirstWrite) => [
                format!("overwrite {}", time(|l| l.overwrite)),
                format!("first write {}", time(|l| l.first_write)),
                "median latency".to_owned(),
            ],
            (Found::Latencies(_), _) => [
                format!("read {} and first write {}", time(|l| l.read), time(|l| l.first_write)),
                format!("write {}", time(|l| l.after_snapshot)),
                "median latency".to_owned(),
            ],
        }
    }
}

/// Takes latencies of requests to two volumes of one pool: `empty`, where nothing is mapped yet, and `shared`, which is full, and of
/// which there is a snapshot. Each extent serves once.
pub struct Prober {
    empty: Session,
    shared: Session,
    cpu: usize,
    next: u64,
    extents: u64,
}

impl Prober {
    /// Connects to both; they have at least `extents` extents.
    pub fn new(empty: &Path, shared: &Path, extents: u64, cpu: usize) -> Result<Prober, String> {
        let connect = |socket| Session::connect(Config::new(socket)).map_err(|e| e.to_string());
        let mut prober = Prober { empty: connect(empty)?, shared: connect(shared)?, cpu, next: 0, extents };
        // The extent for overwrites.
        write(&mut prober.empty, 0)?;
        prober.next = 1;
        Ok(prober)
    }

    /// Medians of `count` requests of each kind.
    pub fn probe(&mut self, count: u64) -> Result<Latencies, String> {
        let first = self.next;
        if first + count > self.extents {
            return Err(format!("{} extents are too few for so many disturbed samples", self.extents));
        }
        self.next += count;
        std::thread::scope(|scope| {
            let probing = scope.spawn(|| {
                sys::pin_to(self.cpu).map_err(|e| format!("CPU {}: {e}", self.cpu))?;
                self.probe_extents(first..first + count)
            });
            probing.join().map_err(|_| "the thread that probes has panicked".to_owned())?
        })
    }

    fn probe_extents(&mut self, extents: std::ops::Range<u64>) -> Result<Latencies, String> {
        let mut times: [Vec<Duration>; 4] = Default::default();
        for extent in extents {
            times[0].push(write(&mut self.empty, 0)?);
            times[1].push(write(&mut self.empty, extent)?);
            times[2].push(read(&mut self.shared, extent)?);
            times[3].push(write(&mut self.shared, extent)?);
        }
        let [overwrite, first_write, read, after_snapshot] = times.map(|times| {
            let nanoseconds = times.iter().map(|time| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
            Spread::of(nanoseconds.map(to_f64)).median / 1000.0
        });
        Ok(Latencies { overwrite, first_write, read, after_snapshot })
    }
}

fn write(session: &mut Session, extent: u64) -> Result<Duration, String> {
    timed(session, Op::Write, extent)
}

fn read(session: &mut Session, extent: u64) -> Result<Duration, String> {
    timed(session, Op::Read, extent)
}

/// A request for the first block of an extent.
fn timed(session: &mut Session, op: Op, extent: u64) -> Result<Duration, String> {
    let begin = Instant::now();
    let ended = session.request(0, op, extent * EXTENT_BYTES / 512, &mut [7; BLOCK_BYTES]);
    let time = begin.elapsed();
    match ended.map_err(|e| e.to_string())?.status {
        STATUS_OK => Ok(time),
        status => Err(format!("{op:?} of extent {extent}: status {status}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::load::Measured;

    fn series(iops: f64) -> Series {
        Series { samples: vec![Measured { iops, ..Measured::default() }], ..Series::default() }
    }

    #[test]
    fn values_are_what_the_goals_are_about() {
        let outcome = |case, found| Outcome { case, found, repeated: 0, disturbed: Vec::new() };
        let loads = |bare, thin| Found::Loads { bare: series(bare), thin: series(thin) };
        let reads = outcome(Case::Raid0(Mix::RandRead), loads(100e3, 91e3));
        assert!((reads.value() - 0.91).abs() < 1e-9 && reads.reached() == Some(true));
        let reads = outcome(Case::Raid1(Mix::RandRead), loads(100e3, 84e3));
        assert_eq!(reads.reached(), Some(false));
        assert_eq!(outcome(Case::Raid0(Mix::RandWrite), loads(1.0, 0.1)).reached(), None);
        let round = Latencies { overwrite: 20.0, first_write: 32.0, read: 18.0, after_snapshot: 40.0 };
        let first = outcome(Case::FirstWrite, Found::Latencies(vec![round]));
        assert!((first.value() - 1.6).abs() < 1e-9 && first.reached() == Some(false), "{:?}", first.words());
        let after = outcome(Case::AfterSnapshot, Found::Latencies(vec![round]));
        assert!((after.value() - 0.8).abs() < 1e-9 && after.reached() == Some(true));
    }

    #[test]
    fn names_are_unique() {
        let mut names = Case::ALL.map(Case::name).to_vec();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Case::ALL.len());
    }
}
