//! Thin volumes in pools beside a bare device of the same kind, all in one process: what the table and the array cost.
//!
//! ```text
//!   bare ── mem:        r0/v ── thin, RAID 0 ── mem:, mem:      r5/v ── thin, RAID 5 ── mem:, mem:, mem:      …
//!
//! loads           IOPS of a filled volume over the bare device's, or over those of a volume on RAID 0, in turns
//! counts          what members are asked for, for each block of 4 KiB that is written at random: I/Os, and their log
//! first write     latency of a 4 KiB write to an extent that is not there over that of an overwrite
//! after snapshot  latency of a 4 KiB write to what a snapshot shares over that of reading a block and writing it to a new extent
//! rebuild         how fast a member is made anew, and what reads meet meanwhile
//! ```
//!
//! A round of a load is some short turns: other work on the host, which takes memory's bandwidth for seconds, is in both samples of a turn
//! or in none. The ratio is the median of the turns' ratios.
//!
//! The members' memory has been written before: what is measured is the pool, and not the kernel's giving memory.
//!
//! Owns: these cases and their goals. Must not know: how a sample of a load is taken.

mod far;
mod link;
mod prober;
mod rebuild;
mod run;
mod server;

use super::cases::Shape;
use super::results::{Series, Spread};
use crate::client::options::Mix;

/// A pool of the benches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pool {
    /// RAID 0 on two members.
    Raid0,
    /// RAID 1 on two.
    Raid1,
    /// RAID 5 on three: a part of a stripe is written with what is read of the rest.
    Raid5,
    /// RAID 6 on four, likewise.
    Raid6,
    /// RAID 5 on five: parity is changed by the difference.
    Wide5,
    /// RAID 6 on seven, likewise.
    Wide6,
}

impl Pool {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Pool::Raid0 => "r0",
            Pool::Raid1 => "r1",
            Pool::Raid5 => "r5",
            Pool::Raid6 => "r6",
            Pool::Wide5 => "w5",
            Pool::Wide6 => "w6",
        }
    }

    /// Its level, as the configuration says it.
    pub fn level(self) -> &'static str {
        match self {
            Pool::Raid0 => "raid0",
            Pool::Raid1 => "raid1",
            Pool::Raid5 | Pool::Wide5 => "raid5",
            Pool::Raid6 | Pool::Wide6 => "raid6",
        }
    }

    /// How many members it has.
    pub fn members(self) -> usize {
        match self {
            Pool::Raid0 | Pool::Raid1 => 2,
            Pool::Raid5 => 3,
            Pool::Raid6 => 4,
            Pool::Wide5 => 5,
            Pool::Wide6 => 7,
        }
    }
}

/// One line of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Case {
    /// 4 KiB at random on a volume, and on the bare device.
    Random(Pool, Mix),
    /// 1 MiB after the other written to a volume, and to one on RAID 0.
    Sequential(Pool),
    /// The same where members are slower than our CPU.
    SequentialFar(Pool),
    /// What members get for a write of 4 KiB.
    Counts(Pool),
    /// A write to a new extent, and an overwrite.
    FirstWrite,
    /// A write to an extent that a snapshot shares; a read and a write to a new extent.
    AfterSnapshot,
    /// A member made anew as fast as it goes, and what the devices can do.
    Rebuild,
    /// The same where members are slower than our CPU.
    RebuildFar,
    /// At half of what goes, as configured: is it kept?
    RebuildRate,
    /// Reads meanwhile, and reads of the healthy pool.
    ReadsDuringRebuild,
}

impl Case {
    /// All of them, in the order of the table.
    pub const ALL: [Case; 22] = [
        Case::Random(Pool::Raid0, Mix::RandRead),
        Case::Random(Pool::Raid0, Mix::RandWrite),
        Case::Random(Pool::Raid1, Mix::RandRead),
        Case::Random(Pool::Raid1, Mix::RandWrite),
        Case::FirstWrite,
        Case::AfterSnapshot,
        Case::Random(Pool::Raid5, Mix::RandRead),
        Case::Random(Pool::Raid6, Mix::RandRead),
        // Before any small write: what is in the log of those, is written through the log until that is released.
        Case::Sequential(Pool::Raid5),
        Case::Sequential(Pool::Raid6),
        Case::SequentialFar(Pool::Raid5),
        Case::SequentialFar(Pool::Raid6),
        Case::Random(Pool::Raid5, Mix::RandWrite),
        Case::Random(Pool::Raid6, Mix::RandWrite),
        Case::Counts(Pool::Raid5),
        Case::Counts(Pool::Wide5),
        Case::Counts(Pool::Raid6),
        Case::Counts(Pool::Wide6),
        Case::Rebuild,
        Case::RebuildFar,
        Case::RebuildRate,
        Case::ReadsDuringRebuild,
    ];

    /// What `--only` is matched against.
    pub fn name(self) -> String {
        let of = |pool: Pool, what: &str| {
            let members = match pool {
                Pool::Wide5 | Pool::Wide6 => format!("-on-{}", pool.members()),
                _ => String::new(),
            };
            format!("pool/{}{members}/{what}", pool.level())
        };
        match self {
            Case::Random(pool, Mix::RandRead) => of(pool, "randread-4k/qd32"),
            Case::Random(pool, _) => of(pool, "randwrite-4k/qd32"),
            Case::Sequential(pool) => of(pool, "write-1024k/qd4"),
            Case::SequentialFar(pool) => of(pool, "write-1024k/qd4/slow-members"),
            Case::Counts(pool) => of(pool, "small-writes"),
            Case::FirstWrite => "pool/first-write/qd1".to_owned(),
            Case::AfterSnapshot => "pool/after-snapshot/qd1".to_owned(),
            Case::Rebuild => "pool/rebuild/rate-max".to_owned(),
            Case::RebuildFar => "pool/rebuild/slow-members".to_owned(),
            Case::RebuildRate => "pool/rebuild/rate-half".to_owned(),
            Case::ReadsDuringRebuild => "pool/rebuild/randread-4k/qd1".to_owned(),
        }
    }

    /// The load, where it is one.
    pub fn shape(self) -> Option<Shape> {
        match self {
            Case::Random(_, mix) => Some(Shape { mix, kib: 4, depth: 32 }),
            Case::Sequential(_) | Case::SequentialFar(_) => {
                Some(Shape { mix: Mix::Write, kib: 1024, depth: 4 })
            }
            Case::Counts(_) => Some(Shape { mix: Mix::RandWrite, kib: 4, depth: 32 }),
            Case::ReadsDuringRebuild => Some(Shape { mix: Mix::RandRead, kib: 4, depth: 1 }),
            _ => None,
        }
    }

    /// What is compared with the goal, and the goal's sign: `true` where more is better. What a pool makes of its members' speed has its goal where
    /// members are slower than our CPU, as remote ones are: where they are memory, it is the CPU's copying that is compared.
    pub fn goal(self) -> Option<(f64, bool)> {
        match self {
            Case::Random(Pool::Raid0, Mix::RandRead) => Some((0.9, true)),
            Case::Random(Pool::Raid1 | Pool::Raid5, Mix::RandRead) => Some((0.85, true)),
            Case::Random(Pool::Raid1, _) => Some((0.45, true)),
            Case::SequentialFar(Pool::Raid5) => Some((0.6, true)),
            Case::SequentialFar(Pool::Raid6) => Some((0.5, true)),
            Case::Counts(Pool::Raid5 | Pool::Wide5) => Some((4.0, false)),
            Case::Counts(_) => Some((6.0, false)),
            Case::FirstWrite => Some((1.5, false)),
            Case::AfterSnapshot => Some((1.0, false)),
            Case::RebuildFar => Some((0.9, true)),
            Case::RebuildRate => Some((0.95, true)),
            Case::ReadsDuringRebuild => Some((2.0, false)),
            Case::Random(..) | Case::Sequential(_) | Case::SequentialFar(_) | Case::Rebuild => None,
        }
    }
}

/// What a case has found.
#[derive(Clone, Debug)]
pub enum Found {
    /// A load on the volume, and on what it is compared with.
    Loads {
        /// The bare device's, or that of the volume on RAID 0.
        beside: Series,
        /// The volume's.
        volume: Series,
    },
    /// What members were asked for.
    Counted(Counts),
    /// Medians of latencies, one from each round.
    Latencies(Vec<Latencies>),
    /// Bytes of all members that a rebuild reads and writes in a second, and what it could at most.
    Rate {
        /// What it did.
        rebuild: f64,
        /// What the devices can do, or what was configured.
        most: f64,
    },
}

/// What members got for each block that was written.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counts {
    /// Reads.
    pub reads: f64,
    /// Writes where data and parity stand.
    pub writes: f64,
    /// Writes to their logs.
    pub log_writes: f64,
    /// Bytes of these.
    pub log_bytes: f64,
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
    /// The first two, as a client sees them that polls: without what it takes to wake it.
    pub polled: (f64, f64),
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
            _ => Spread::default(),
        }
    }

    /// What the goal is about.
    pub fn value(&self) -> f64 {
        let over = |a: f64, b: f64| if b > 0.0 { a / b } else { 0.0 };
        match (&self.found, self.case) {
            (Found::Loads { beside, volume }, Case::ReadsDuringRebuild) => {
                over(p99(volume).median, p99(beside).median)
            }
            (Found::Loads { beside, volume }, _) => {
                let turns = volume.samples.iter().zip(&beside.samples);
                Spread::of(turns.map(|(volume, beside)| over(volume.iops, beside.iops))).median
            }
            (Found::Counted(counts), _) => counts.reads + counts.writes,
            (Found::Rate { rebuild, most }, _) => over(*rebuild, *most),
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
        // A few I/Os of the pool's own are among those that are counted, such as marks of regions.
        let most = if matches!(self.case, Case::Counts(_)) { goal * 1.01 } else { goal };
        Some(if more { self.value() >= goal } else { self.value() <= most })
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
        let rate = |bytes: f64| format!("{:.0} MB/s", bytes / 1e6);
        match (&self.found, self.case) {
            (Found::Loads { beside, volume }, Case::ReadsDuringRebuild) => [
                format!("healthy {:.1} µs ±{:.0}%", p99(beside).median, p99(beside).percent()),
                format!("meanwhile {:.1} µs ±{:.0}%", p99(volume).median, p99(volume).percent()),
                "p99 of the latency".to_owned(),
            ],
            (Found::Loads { beside, volume }, Case::Sequential(_) | Case::SequentialFar(_)) => {
                let what = if matches!(self.case, Case::SequentialFar(_)) {
                    "IOPS"
                } else {
                    "IOPS (our CPU's copying)"
                };
                [format!("RAID 0 {}", iops(beside)), format!("volume {}", iops(volume)), what.to_owned()]
            }
            (Found::Loads { beside, volume }, _) => {
                [format!("bare {}", iops(beside)), format!("volume {}", iops(volume)), "IOPS".to_owned()]
            }
            (Found::Counted(counts), _) => [
                format!("log: {:.2} writes, {:.1} KiB", counts.log_writes, counts.log_bytes / 1024.0),
                format!("{:.2} reads, {:.2} writes", counts.reads, counts.writes),
                "member I/Os for a write".to_owned(),
            ],
            (Found::Rate { rebuild, most }, Case::Rebuild | Case::RebuildFar) => [
                format!("devices {}", rate(*most)),
                format!("rebuild {}", rate(*rebuild)),
                match self.case {
                    Case::Rebuild => "bytes read and written (our CPU's copying)".to_owned(),
                    _ => "bytes read and written".to_owned(),
                },
            ],
            (Found::Rate { rebuild, most }, _) => [
                format!("configured {}", rate(*most)),
                format!("rebuild {}", rate(*rebuild)),
                "bytes read and written".to_owned(),
            ],
            (Found::Latencies(_), Case::FirstWrite) => [
                format!("overwrite {}", time(|l| l.overwrite)),
                format!("first write {}", time(|l| l.first_write)),
                format!(
                    "median latency (polled: {:.1} and {:.1} µs)",
                    self.spread(|l| l.polled.0).median,
                    self.spread(|l| l.polled.1).median
                ),
            ],
            (Found::Latencies(_), _) => [
                format!("read {} and first write {}", time(|l| l.read), time(|l| l.first_write)),
                format!("write {}", time(|l| l.after_snapshot)),
                "median latency".to_owned(),
            ],
        }
    }
}

/// In microseconds.
fn p99(series: &Series) -> Spread {
    Spread::of(series.samples.iter().map(|sample| crate::to_f64(sample.p99) / 1000.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::load::Measured;

    fn series(iops: f64) -> Series {
        Series { samples: vec![Measured { iops, p99: 40_000, ..Measured::default() }], ..Series::default() }
    }

    #[test]
    fn values_are_what_the_goals_are_about() {
        let outcome = |case, found| Outcome { case, found, repeated: 0, disturbed: Vec::new() };
        let loads = |beside, volume| Found::Loads { beside: series(beside), volume: series(volume) };
        let reads = outcome(Case::Random(Pool::Raid0, Mix::RandRead), loads(100e3, 91e3));
        assert!((reads.value() - 0.91).abs() < 1e-9 && reads.reached() == Some(true));
        let reads = outcome(Case::Random(Pool::Raid5, Mix::RandRead), loads(100e3, 84e3));
        assert_eq!(reads.reached(), Some(false));
        let writes = outcome(Case::Random(Pool::Raid0, Mix::RandWrite), loads(1.0, 0.1));
        assert_eq!(writes.reached(), None);
        let round = Latencies {
            overwrite: 20.0,
            first_write: 32.0,
            read: 18.0,
            after_snapshot: 40.0,
            polled: (2.0, 4.0),
        };
        let first = outcome(Case::FirstWrite, Found::Latencies(vec![round]));
        assert!((first.value() - 1.6).abs() < 1e-9 && first.reached() == Some(false), "{:?}", first.words());
        let after = outcome(Case::AfterSnapshot, Found::Latencies(vec![round]));
        assert!((after.value() - 0.8).abs() < 1e-9 && after.reached() == Some(true));
        // The log is not counted, and is said.
        let counts = Counts { reads: 2.0, writes: 2.1, log_writes: 2.0, log_bytes: 24576.0 };
        let counted = outcome(Case::Counts(Pool::Raid5), Found::Counted(counts));
        assert!((counted.value() - 4.1).abs() < 1e-9 && counted.reached() == Some(false));
        assert_eq!(counted.words()[0], "log: 2.00 writes, 24.0 KiB");
        // Latencies, not how many.
        let meanwhile = outcome(Case::ReadsDuringRebuild, loads(1.0, 9.0));
        assert!((meanwhile.value() - 1.0).abs() < 1e-9 && meanwhile.words()[1] == "meanwhile 40.0 µs ±0%");
    }

    #[test]
    fn names_are_unique() {
        let mut names = Case::ALL.map(Case::name).to_vec();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Case::ALL.len());
    }
}
