//! Runs the cases: starts servers, finds each one's best way to be reaped, alternates, keeps what was not disturbed.
//!
//! Owns: the order of things and the image on tmpfs. Must not know: how a table looks.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::cases::{Backing, Case, Goal, Rival, Shape, all};
use super::fabric;
use super::hot_path;
use super::idle;
use super::load::{Load, Maker, Measured, run_json};
use super::pools;
use super::quiet::{Guard, Sample};
use super::results::{InflightOutcome, Outcome, Results, Series};
use super::servers::{Place, Server, hawser, linked_hawser, rival, show_device};
use crate::client::options::Mix;
use crate::sys::TempDir;
use crate::to_usize;

/// The case of a daemon that has nothing to do.
const IDLE: &str = "idle";
/// What `--only` is matched against.
fn hot_path_name(bench: &str) -> String {
    format!("hot-path/{bench}")
}

/// Share of the time for which a client may wait for its CPU.
const WAITED_MAX: f64 = 0.02;

/// How to run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The binary `hawser`.
    pub hawser: PathBuf,
    /// Where `blkclient` and `inflight_client` are.
    pub beside: PathBuf,
    /// What makes the load.
    pub maker: Maker,
    /// The servers' CPU and the client's.
    pub cpus: [usize; 2],
    /// Samples of each server per case.
    pub rounds: u32,
    /// Length of a sample.
    pub runtime: Duration,
    /// Time before a sample's measurement begins.
    pub ramp: Duration,
    /// `eventfd`, `block` or `loop`.
    pub wait_mode: String,
    /// `poll_us` where it is on.
    pub poll_us: u32,
    /// Runs only cases whose name contains this.
    pub only: Option<String>,
    /// Runs only cases that have a goal.
    pub goals: bool,
    /// Bytes of each disk.
    pub bytes: u64,
    /// Where the image lies: a tmpfs.
    pub tmpfs: PathBuf,
    /// How often a disturbed sample is repeated.
    pub retries: u32,
    /// Longest time to wait for a quiet machine, for all samples together.
    pub patience: Duration,
    /// Whether to look for the best configuration first.
    pub scout: bool,
}

/// A server together with the way to load it.
pub(super) struct Candidate<'a> {
    pub(super) server: &'a Server,
    pub(super) batch: u16,
    pub(super) configuration: String,
}

impl Plan {
    fn wants(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|only| name.contains(only.as_str()))
    }

    /// Whether a bench of the hot path alone is wanted; `cargo test` runs it for a moment, so nothing else does.
    pub fn wants_hot_path(&self, bench: &str) -> bool {
        self.scout && self.wants(&hot_path_name(bench))
    }

    /// Runs everything that is wanted. A case that cannot run is in [`Results::failures`].
    pub fn run(&self) -> Result<Results, String> {
        let failed = |e: std::io::Error| format!("{}: {e}", self.tmpfs.display());
        let folder = TempDir::new(Some(&self.tmpfs)).map_err(failed)?;
        let image = folder.path().join("disk");
        make_image(&image, self.bytes).map_err(failed)?;
        let place = Place { cpu: self.cpus[0], image: &image, bytes: self.bytes };
        let mut guard = Guard::new(self.cpus, self.retries, self.patience);
        let mut results = Results::default();
        let wanted =
            |case: &Case| self.wants(&case.name()) && (!self.goals || case.goal() != Goal::default());
        let cases: Vec<Case> = all(self.poll_us).into_iter().filter(wanted).collect();
        for backing in Backing::ALL {
            for poll_us in [self.poll_us, 0] {
                let group: Vec<Case> =
                    cases.iter().copied().filter(|c| (c.backing, c.poll_us) == (backing, poll_us)).collect();
                if group.is_empty() {
                    continue;
                }
                if let Err(reason) = self.run_group(&group, &place, &mut guard, &mut results) {
                    let left =
                        group.iter().filter(|c| !results.outcomes.iter().any(|o| o.case == **c)).count();
                    let name = format!("{}/…/poll{poll_us} ({left} cases)", backing.name());
                    eprintln!("{name}: {reason}");
                    results.failures.push((name, reason));
                }
            }
        }
        for case in fabric::Case::ALL.into_iter().filter(|case| self.wants(case.name())) {
            match self.run_fabric(case, &place, &mut guard) {
                Ok(outcome) => results.fabric.push(outcome),
                Err(reason) => {
                    eprintln!("{}: {reason}", case.name());
                    results.failures.push((case.name().to_owned(), reason));
                }
            }
        }
        let wanted: Vec<pools::Case> = pools::Case::ALL
            .into_iter()
            .filter(|case| self.wants(&case.name()) && (!self.goals || case.goal().is_some()))
            .collect();
        if !wanted.is_empty()
            && let Err(reason) = self.run_pools(&wanted, &place, &mut guard, &mut results)
        {
            let left = wanted.len() - results.pools.len();
            eprintln!("pool/… ({left} cases): {reason}");
            results.failures.push((format!("pool/… ({left} cases)"), reason));
        }
        for bench in hot_path::BENCHES.into_iter().filter(|bench| self.wants_hot_path(bench)) {
            match hot_path::run(bench, self.cpus[1]) {
                Ok(lines) => results.hot_path.extend(lines),
                Err(reason) => {
                    let name = hot_path_name(bench);
                    eprintln!("{name}: {reason}");
                    results.failures.push((name, reason));
                }
            }
        }
        for backing in [Backing::Null, Backing::Mem] {
            let name = format!("inflight/{}", backing.name());
            if self.wants(&name) {
                match self.run_inflight(&name, backing, &place, &mut guard) {
                    Ok(outcome) => results.inflight.push(outcome),
                    Err(reason) => {
                        eprintln!("{name}: {reason}");
                        results.failures.push((name, reason));
                    }
                }
            }
        }
        if self.wants(IDLE) {
            // The longer, the less a tick matters.
            let time = (self.runtime * 5).max(Duration::from_millis(500));
            match idle::measure(&self.hawser, self.poll_us, self.cpus, &place, time) {
                Ok(outcome) => {
                    eprintln!("{IDLE:42} {:.2} % of a CPU", outcome.percent());
                    results.idle = Some(outcome);
                }
                Err(reason) => {
                    eprintln!("{IDLE}: {reason}");
                    results.failures.push((IDLE.to_owned(), reason));
                }
            }
        }
        Ok(results)
    }

    fn run_group(
        &self,
        group: &[Case],
        place: &Place<'_>,
        guard: &mut Guard,
        results: &mut Results,
    ) -> Result<(), String> {
        let Some(first) = group.first() else { return Ok(()) };
        let ours = hawser(&self.hawser, first.backing, first.poll_us, place)?;
        self.fill(&ours).map_err(|e| format!("{e}: {}", ours.complaint()))?;
        let kind = first.backing.rival();
        let aios: &[&str] = match kind {
            Rival::NullCo => &["none"],
            Rival::TmpfsFile => &["native", "io_uring"],
        };
        let theirs = aios
            .iter()
            .map(|&aio| Ok((aio, rival(kind, aio, place)?)))
            .collect::<Result<Vec<_>, String>>()?;
        for &case in group {
            let our_ways = ways(case.shape, "", &ours);
            let their_ways = theirs.iter().flat_map(|(aio, server)| ways(case.shape, aio, server)).collect();
            let us = self.best(case.shape, our_ways).map_err(|e| format!("{e}: {}", ours.complaint()))?;
            let them = self.best(case.shape, their_ways)?;
            let pids: Vec<u32> =
                ours.pids().into_iter().chain(theirs.iter().flat_map(|(_, s)| s.pids())).collect();
            let series = |way: &Candidate<'_>| Series {
                configuration: way.configuration.clone(),
                ..Series::default()
            };
            let mut outcome = Outcome { case, ours: series(&us), theirs: series(&them) };
            for _ in 0..self.rounds {
                for (way, series) in [(&us, &mut outcome.ours), (&them, &mut outcome.theirs)] {
                    let sample = self.sample(case.shape, way, guard, &pids);
                    let sample = sample.map_err(|e| format!("{e}: {}", way.server.complaint()))?;
                    series.samples.push(sample.value);
                    series.repeated += sample.repeated;
                    series.disturbed.extend(sample.disturbed);
                }
            }
            eprintln!(
                "{:42} {:>9.0} against {:>9.0} IOPS, ratio {:.2}; CPU ratio {:.2}",
                case.name(),
                outcome.ours.iops().median,
                outcome.theirs.iops().median,
                outcome.iops_ratio(),
                outcome.cpu_ratio()
            );
            results.outcomes.push(outcome);
        }
        Ok(())
    }

    fn run_fabric(
        &self,
        case: fabric::Case,
        place: &Place<'_>,
        guard: &mut Guard,
    ) -> Result<fabric::Outcome, String> {
        let rates = fabric::Rates::measure(self.cpus[0])?;
        let links: Vec<fabric::Link> =
            [Some(fabric::Link::default()), case.link()].into_iter().flatten().collect();
        let (server, sockets) = linked_hawser(&self.hawser, &links, self.poll_us, place)?;
        self.fill(&server).map_err(|e| format!("{e}: {}", server.complaint()))?;
        let shape = case.shape();
        let way = Candidate { server: &server, batch: shape.depth, configuration: String::new() };
        let mut all = vec![Series::default(); sockets.len()];
        let landed = || fabric::Landed::read(&show_device(&self.hawser, &server, "d0")?);
        let before = landed()?;
        for _ in 0..self.rounds {
            for (socket, series) in sockets.iter().zip(&mut all) {
                let load = Load { socket: socket.clone(), ..self.load(shape, &way) };
                let sample = self.sample_load(&load, guard, &server.pids());
                let sample = sample.map_err(|e| format!("{e}: {}", server.complaint()))?;
                series.samples.push(sample.value);
                series.repeated += sample.repeated;
                series.disturbed.extend(sample.disturbed);
            }
        }
        let mut series = all.into_iter();
        let (plain, other) = (series.next().unwrap_or_default(), series.next().unwrap_or_default());
        let outcome = fabric::Outcome { case, plain, other, rates, landed: [before, landed()?] };
        let [plain, other, machine, meaning] = outcome.words();
        eprintln!("{:42} {plain}; {other}; {machine}; {meaning}: {:.2}", case.name(), outcome.value());
        Ok(outcome)
    }

    pub(super) fn load(&self, shape: Shape, way: &Candidate<'_>) -> Load {
        Load {
            socket: way.server.socket().to_owned(),
            shape,
            batch: way.batch,
            wait_mode: self.wait_mode.clone(),
            runtime: self.runtime,
            ramp: self.ramp,
            cpu: self.cpus[1],
            servers: way.server.pids(),
        }
    }

    fn sample(
        &self,
        shape: Shape,
        way: &Candidate<'_>,
        guard: &mut Guard,
        pids: &[u32],
    ) -> Result<Sample<Measured>, String> {
        self.sample_load(&self.load(shape, way), guard, pids)
    }

    pub(super) fn sample_load(
        &self,
        load: &Load,
        guard: &mut Guard,
        pids: &[u32],
    ) -> Result<Sample<Measured>, String> {
        let judge = |measured: &Measured| {
            let waited = measured.waited * 100.0;
            (measured.waited > WAITED_MAX)
                .then(|| format!("the client waited for its CPU {waited:.0} % of the time"))
        };
        guard.run(pids, || self.maker.run(load), judge)
    }

    /// The fastest of several ways, by the best of three short runs each: other load only makes a run slower.
    fn best<'a>(&self, shape: Shape, mut ways: Vec<Candidate<'a>>) -> Result<Candidate<'a>, String> {
        let mut best = vec![0.0_f64; ways.len()];
        if self.scout && ways.len() > 1 {
            for _ in 0..3 {
                for (way, best) in ways.iter().zip(&mut best) {
                    let runtime = (self.runtime / 5).max(Duration::from_millis(100));
                    let load = Load { runtime, ramp: self.ramp / 2, ..self.load(shape, way) };
                    *best = best.max(self.maker.run(&load)?.iops);
                }
            }
        }
        // The first of equals, so that without scouting it is the one in batches.
        let fastest = (0..ways.len()).rev().max_by(|&a, &b| best[a].total_cmp(&best[b]));
        let fastest = fastest.ok_or("nothing to choose from")?;
        Ok(ways.swap_remove(fastest))
    }

    /// Writes every block once, so that no device answers reads from holes.
    fn fill(&self, server: &Server) -> Result<(), String> {
        self.fill_socket(server, server.socket())
    }

    pub(super) fn fill_socket(&self, server: &Server, socket: &Path) -> Result<(), String> {
        let shape = Shape { mix: Mix::Write, kib: 128, depth: 8 };
        let way = Candidate { server, batch: 8, configuration: String::new() };
        let socket = socket.to_owned();
        let load = Load { socket, runtime: Duration::from_secs(60), ..self.load(shape, &way) };
        let arguments: Vec<String> = [
            format!("--path={}", load.socket.display()),
            format!("--rw={}", shape.rw()),
            "--bs=128k".into(),
            "--iodepth=8".into(),
            "--json".into(),
        ]
        .to_vec();
        run_json(&self.beside.join("blkclient"), &arguments, &load).map(drop)
    }

    fn run_inflight(
        &self,
        name: &str,
        backing: Backing,
        place: &Place<'_>,
        guard: &mut Guard,
    ) -> Result<InflightOutcome, String> {
        let server = hawser(&self.hawser, backing, self.poll_us, place)?;
        self.fill(&server).map_err(|e| format!("{e}: {}", server.complaint()))?;
        let mut outcome = InflightOutcome { name: name.to_owned(), ..InflightOutcome::default() };
        let shape = Shape { mix: Mix::RandRead, kib: 4, depth: 32 };
        let way = Candidate { server: &server, batch: 32, configuration: String::new() };
        // Both measurements of a round are in one run.
        let load = Load { runtime: (self.runtime + self.ramp) * 2, ..self.load(shape, &way) };
        let arguments: Vec<String> = [
            format!("--path={}", load.socket.display()),
            format!("--iodepth={}", shape.depth),
            format!("--runtime={}us", self.runtime.as_micros()),
            format!("--ramp_time={}us", self.ramp.as_micros()),
            "--rounds=1".into(),
            format!("--cpus_allowed={}", self.cpus[1]),
            "--json".into(),
        ]
        .to_vec();
        for _ in 0..self.rounds {
            let program = self.beside.join("inflight_client");
            let measure = || run_json(&program, &arguments, &load).and_then(|text| inflight_iops(&text));
            let sample = guard.run(&server.pids(), measure, |_| None);
            let sample = sample.map_err(|e| format!("{e}: {}", server.complaint()))?;
            outcome.with.push(sample.value.0);
            outcome.without.push(sample.value.1);
            outcome.disturbed.extend(sample.disturbed);
        }
        eprintln!("{name:42} ratio {:.2}", outcome.ratio());
        Ok(outcome)
    }
}

/// How a server's completions can be taken: all that are there, or one by one.
fn ways<'a>(shape: Shape, aio: &str, server: &'a Server) -> Vec<Candidate<'a>> {
    let aio = if aio.is_empty() || aio == "none" { String::new() } else { format!("aio={aio}, ") };
    let mut all = vec![Candidate { server, batch: shape.depth, configuration: format!("{aio}in batches") }];
    if shape.depth > 1 {
        all.push(Candidate { server, batch: 1, configuration: format!("{aio}one by one") });
    }
    all
}

fn inflight_iops(report: &str) -> Result<(f64, f64), String> {
    let value: serde_json::Value =
        serde_json::from_str(report).map_err(|e| format!("inflight_client: {e}"))?;
    let iops = |side: &str| {
        let found = value.pointer(&format!("/{side}/0/iops")).and_then(serde_json::Value::as_f64);
        found.ok_or_else(|| format!("inflight_client: no {side}/0/iops in its report"))
    };
    Ok((iops("with")?, iops("without")?))
}

/// A file without holes, whose blocks are not zero.
fn make_image(path: &Path, bytes: u64) -> std::io::Result<()> {
    let mut piece = vec![0_u8; 1 << 20];
    let mut x = 0x9e37_79b9_7f4a_7c15_u64;
    for chunk in piece.chunks_exact_mut(8) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        chunk.copy_from_slice(&x.to_le_bytes());
    }
    let mut file = std::fs::File::create(path)?;
    let mut left = bytes;
    while left > 0 {
        let len = left.min(1 << 20);
        file.write_all(&piece[..to_usize(len)])?;
        left -= len;
    }
    Ok(())
}
