//! Runs the cases of pools: a daemon for those on mirrors and stripes, one for those with parity, one that rebuilds.
//!
//! Owns: their order, and which volumes they need. Must not know: how a table looks.

use std::time::{Duration, Instant};

use super::prober::Prober;
use super::server::{Numbers, PoolServer};
use super::{Case, Counts, Found, Outcome, Pool};
use super::{far, rebuild};
use crate::compare::load::Load;
use crate::compare::quiet::Guard;
use crate::compare::results::{Results, Series};
use crate::compare::runner::{Candidate, Plan};
use crate::compare::servers::Place;

/// What the pool counts is told that often, and a little.
const TOLD: Duration = Duration::from_millis(1500);
/// Of volumes that are only counted on.
const WIDE_BYTES: u64 = 256 << 20;
/// In how many turns a round of a load on a volume is taken, and how many of them are as long as a sample elsewhere.
const TURNS: u32 = 20;
const TURNS_A_SAMPLE: u32 = 5;

impl Plan {
    /// Runs those of `cases` that are wanted here.
    pub(in crate::compare) fn run_pools(
        &self,
        cases: &[Case],
        place: &Place<'_>,
        guard: &mut Guard,
        results: &mut Results,
    ) -> Result<(), String> {
        let of = |is: fn(&Case) -> bool| cases.iter().copied().filter(is).collect::<Vec<_>>();
        let plain = of(|case| {
            matches!(
                case,
                Case::Random(Pool::Raid0 | Pool::Raid1, _) | Case::FirstWrite | Case::AfterSnapshot
            )
        });
        let rebuilding = of(|case| {
            matches!(case, Case::Rebuild | Case::RebuildFar | Case::RebuildRate | Case::ReadsDuringRebuild)
        });
        let far = of(|case| matches!(case, Case::SequentialFar(_)));
        let parity: Vec<Case> = cases
            .iter()
            .copied()
            .filter(|case| ![&plain, &rebuilding, &far].into_iter().any(|others| others.contains(case)))
            .collect();
        let mut first_failure = Ok(());
        let mut note = |outcome: Result<(), String>| {
            if first_failure.is_ok() {
                first_failure = outcome;
            }
        };
        if !plain.is_empty() {
            note(self.run_plain(&plain, place, guard, results));
        }
        if !parity.is_empty() {
            note(self.run_parity(&parity, place, guard, results));
        }
        if !far.is_empty() {
            note(far::writes(self, &far, place, guard).map(|found| {
                found.into_iter().for_each(|outcome| say(results, outcome));
            }));
        }
        if !rebuilding.is_empty() {
            let near = rebuilding.iter().any(|case| *case != Case::RebuildFar);
            let is_far = rebuilding.contains(&Case::RebuildFar);
            let all = [
                near.then(|| rebuild::measure(self, place, guard)),
                is_far.then(|| far::rebuild(self, place)),
            ];
            for found in all.into_iter().flatten() {
                note(found.map(|found| {
                    for (case, found, disturbed) in found {
                        if rebuilding.contains(&case) {
                            say(results, Outcome { case, found, repeated: 0, disturbed });
                        }
                    }
                }));
            }
        }
        first_failure
    }

    fn run_plain(
        &self,
        cases: &[Case],
        place: &Place<'_>,
        guard: &mut Guard,
        results: &mut Results,
    ) -> Result<(), String> {
        // Each attempt to take latencies has extents of its own, of the full volume and of the empty one.
        let extents = (place.bytes >> 20).min(512);
        let pools = PoolServer::start(
            &self.hawser,
            self.poll_us,
            place,
            &[Pool::Raid0, Pool::Raid1],
            (3 * extents) << 20,
        )?;
        let failed = |e: String| format!("{e}: {}", pools.server.complaint());
        let bare = pools.server.socket().to_owned();
        let (r0, r1) = (pools.add_volume("r0", "v", place.bytes)?, pools.add_volume("r1", "v", place.bytes)?);
        for socket in [&bare, &r0, &r1] {
            self.fill_socket(&pools.server, socket).map_err(failed)?;
        }
        for &case in cases {
            let Case::Random(pool, _) = case else { continue };
            let volume = if pool == Pool::Raid0 { &r0 } else { &r1 };
            say(results, self.loads(case, &pools, [&bare, volume], guard)?);
        }
        let latencies: Vec<Case> = cases.iter().copied().filter(|case| case.shape().is_none()).collect();
        if latencies.is_empty() {
            return Ok(());
        }
        // All that is free (as of a second ago) is written once, so that its memory is there, and is free again.
        std::thread::sleep(TOLD);
        let free = pools.free_bytes("r1")?;
        let socket = pools.add_volume("r1", "t", free)?;
        self.fill_socket(&pools.server, &socket).map_err(failed)?;
        pools.remove_volume("r1", "t")?;
        let begin = Instant::now();
        while pools.free_bytes("r1")? < free {
            if begin.elapsed() > Duration::from_secs(30) {
                return Err(failed("what a volume had is not free after 30 s".to_owned()));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let empty = pools.add_volume("r1", "w", (2 * extents) << 20)?;
        pools.snapshot("r1", "v", "s")?;
        let mut prober = Prober::new(&empty, &r1, extents, self.cpus[1])?;
        let attempts = u64::from(self.rounds) * (u64::from(self.retries) + 1);
        let count = (extents / attempts).clamp(1, 100);
        let (mut rounds, mut repeated, mut disturbed) = (Vec::new(), 0, Vec::new());
        for _ in 0..self.rounds {
            let sample = guard.run(&pools.server.pids(), || prober.probe(count), |_| None).map_err(failed)?;
            rounds.push(sample.value);
            repeated += sample.repeated;
            disturbed.extend(sample.disturbed);
        }
        for case in latencies {
            let found = Found::Latencies(rounds.clone());
            say(results, Outcome { case, found, repeated, disturbed: disturbed.clone() });
        }
        Ok(())
    }

    fn run_parity(
        &self,
        cases: &[Case],
        place: &Place<'_>,
        guard: &mut Guard,
        results: &mut Results,
    ) -> Result<(), String> {
        let mut wanted = Vec::new();
        for case in cases {
            let (Case::Random(pool, _) | Case::Sequential(pool) | Case::Counts(pool)) = *case else {
                continue;
            };
            let beside = matches!(case, Case::Sequential(_)).then_some(Pool::Raid0);
            for pool in [Some(pool), beside].into_iter().flatten() {
                if !wanted.contains(&pool) {
                    wanted.push(pool);
                }
            }
        }
        let pools = PoolServer::start(&self.hawser, self.poll_us, place, &wanted, 0)?;
        let failed = |e: String| format!("{e}: {}", pools.server.complaint());
        let bare = pools.server.socket().to_owned();
        self.fill_socket(&pools.server, &bare).map_err(failed)?;
        let mut volumes = Vec::new();
        for pool in wanted {
            let is_wide = matches!(pool, Pool::Wide5 | Pool::Wide6);
            let bytes = if is_wide { place.bytes.min(WIDE_BYTES) } else { place.bytes };
            let socket = pools.add_volume(pool.name(), "v", bytes)?;
            self.fill_socket(&pools.server, &socket).map_err(failed)?;
            volumes.push((pool, socket));
        }
        let volume = |wanted: Pool| {
            let found = volumes.iter().find(|(pool, _)| *pool == wanted).map(|(_, socket)| socket);
            found.ok_or_else(|| format!("no volume on {}", wanted.name()))
        };
        for &case in cases {
            let sockets = match case {
                Case::Random(pool, _) => [&bare, volume(pool)?],
                Case::Sequential(pool) => [volume(Pool::Raid0)?, volume(pool)?],
                _ => continue,
            };
            say(results, self.loads(case, &pools, sockets, guard)?);
        }
        // Last: what they leave in the log is in the way of whole stripes for a while.
        let counted: Vec<(Case, Pool)> = cases
            .iter()
            .filter_map(|case| match case {
                Case::Counts(pool) => Some((*case, *pool)),
                _ => None,
            })
            .collect();
        if counted.is_empty() {
            return Ok(());
        }
        std::thread::sleep(TOLD);
        let before = pools.numbers()?;
        for (case, pool) in &counted {
            let shape = case.shape().ok_or("no load")?;
            let way = Candidate { server: &pools.server, batch: shape.depth, configuration: String::new() };
            let load = Load { socket: volume(*pool)?.clone(), ..self.load(shape, &way) };
            // Whatever else the machine does, the counts are the same.
            self.maker.run(&load).map_err(failed)?;
        }
        std::thread::sleep(TOLD);
        let after = pools.numbers()?;
        for (case, pool) in counted {
            let found = Found::Counted(counts(pool, &before, &after));
            say(results, Outcome { case, found, repeated: 0, disturbed: Vec::new() });
        }
        Ok(())
    }

    /// A load on what it is compared with and on a volume, in turns.
    pub(super) fn loads(
        &self,
        case: Case,
        pools: &PoolServer,
        sockets: [&std::path::PathBuf; 2],
        guard: &mut Guard,
    ) -> Result<Outcome, String> {
        let shape = case.shape().ok_or("no load")?;
        let way = Candidate { server: &pools.server, batch: shape.depth, configuration: String::new() };
        let (turns, parts) = match case {
            Case::Random(..) | Case::Sequential(_) => (TURNS, TURNS_A_SAMPLE),
            _ => (1, 1),
        };
        let mut both = [Series::default(), Series::default()];
        for turn in 0..self.rounds * turns {
            for side in 0..2 {
                // Who was second is first in the next turn.
                let side = usize::from((turn + side) % 2 == 1);
                let series = &mut both[side];
                let load = self.load(shape, &way);
                let (runtime, ramp) = (load.runtime / parts, load.ramp / parts);
                let load = Load { socket: sockets[side].clone(), runtime, ramp, ..load };
                let sample = self.sample_load(&load, guard, &pools.server.pids());
                let sample = sample.map_err(|e| format!("{e}: {}", pools.server.complaint()))?;
                series.samples.push(sample.value);
                series.repeated += sample.repeated;
                series.disturbed.extend(sample.disturbed);
            }
        }
        let repeated = both[0].repeated + both[1].repeated;
        let disturbed = both.iter().flat_map(|series| series.disturbed.clone()).collect();
        let [beside, volume] = both;
        Ok(Outcome { case, found: Found::Loads { beside, volume }, repeated, disturbed })
    }
}

fn counts(pool: Pool, before: &Numbers, after: &Numbers) -> Counts {
    let name = pool.name();
    let more = |start: String| after.sum(&start) - before.sum(&start);
    let guest = more(format!("hawser_disk_requests_total{{disk=\"{name}-v\",kind=\"write\"}}")).max(1.0);
    let log_writes = more(format!("hawser_pool_parity_log_writes_total{{pool=\"{name}\"}}"));
    let log_bytes = more(format!("hawser_pool_parity_log_bytes_total{{pool=\"{name}\"}}"));
    let (now, then) = (after.of_members(pool, "requests"), before.of_members(pool, "requests"));
    Counts {
        reads: (now[0] - then[0]) / guest,
        writes: (now[1] - then[1] - log_writes) / guest,
        log_writes: log_writes / guest,
        log_bytes: log_bytes / guest,
    }
}

fn say(results: &mut Results, outcome: Outcome) {
    let [beside, itself, meaning] = outcome.words();
    let cpu = match &outcome.found {
        Found::Loads { beside, volume } => {
            format!("; CPU ratio {:.2}", volume.cpu().median / beside.cpu().median)
        }
        _ => String::new(),
    };
    eprintln!("{:42} {itself}; {beside}; {meaning}: {:.2}{cpu}", outcome.case.name(), outcome.value());
    results.pools.push(outcome);
}
