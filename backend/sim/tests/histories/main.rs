//! Our initiator and our target in a seeded world with all faults: histories, each a seed, and what they prove.
//!
//! ```text
//!   guest ─ model          what a guest may rely on: reads, FLUSHes, that everything ends, once
//!   cast ── plan           processes on a simulated network and disk; which of them there are, and what happens
//!   history                lets it happen, mends everything, and sees it come to its end
//!   mutations              promises that are broken on purpose: each is found out
//! ```
//!
//! `cargo xtask sim` runs as many as asked for. As a test it runs some: `HAWSER_SIM_SEEDS` says how many.

mod cast;
mod guest;
mod history;
mod model;
mod mutations;
mod plan;

use history::Seen;
use plan::{SCENARIOS, plan};
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const USAGE: &str = "\
--seeds N --from SEED   so many histories, from this one on
--scenario NAME         all of one kind: calm links ghosts disk digests restarts successor ana all
--jobs N                at a time; else one for each CPU
--mutation NAME         with this promise broken
--mutations             every mutation, each until it is found out
";

#[derive(Clone, Default)]
struct Options {
    seeds: u64,
    from: u64,
    scenario: Option<String>,
    jobs: Option<usize>,
    mutation: Option<String>,
    mutations: bool,
    /// Told by `cargo xtask sim`, which wants more lines.
    is_run: bool,
    /// One of the processes of a long run: its last line is for the first.
    is_part: bool,
}

fn options() -> Result<Options, String> {
    let mut options = Options {
        seeds: std::env::var("HAWSER_SIM_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(200),
        ..Options::default()
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut number = || {
            let value = args.next().ok_or_else(|| format!("{arg} wants a number"))?;
            value.parse::<u64>().map_err(|error| format!("{arg} {value}: {error}"))
        };
        match arg.as_str() {
            "--seeds" => (options.seeds, options.is_run) = (number()?, true),
            "--from" => (options.from, options.is_run) = (number()?, true),
            "--jobs" => options.jobs = usize::try_from(number()?).ok(),
            "--scenario" => options.scenario = args.next(),
            "--mutation" => (options.mutation, options.is_run) = (args.next(), true),
            "--mutations" => (options.mutations, options.is_run) = (true, true),
            "--part" => options.is_part = true,
            // What cargo gives to every test binary.
            _ => {}
        }
    }
    if let Some(name) =
        options.scenario.as_deref().filter(|name| SCENARIOS.iter().all(|(other, _)| other != name))
    {
        return Err(format!("there is no scenario {name}"));
    }
    Ok(options)
}

/// What became of many.
#[derive(Default)]
struct Sums {
    histories: u64,
    requests: u64,
    seconds: u64,
    connects: u64,
    scenarios: BTreeMap<&'static str, u64>,
    failed: Vec<(u64, &'static str, String)>,
}

impl Sums {
    fn add(&mut self, other: Sums) {
        self.histories += other.histories;
        self.requests += other.requests;
        self.seconds += other.seconds;
        self.connects += other.connects;
        self.failed.extend(other.failed);
        for (name, count) in other.scenarios {
            *self.scenarios.entry(name).or_default() += count;
        }
    }
}

/// Runs seeds on all cores until `enough` have failed.
fn run(options: &Options, enough: usize) -> Sums {
    let (next, failed, done) = (AtomicU64::new(0), AtomicUsize::new(0), AtomicU64::new(0));
    let sums = Mutex::new(Sums::default());
    let jobs = options.jobs.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(|| {
                mutations::set(options.mutation.as_deref());
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    if at >= options.seeds || failed.load(Ordering::Relaxed) >= enough {
                        return;
                    }
                    let seed = options.from + at;
                    let plan = plan(seed, options.scenario.as_deref());
                    let scenario = plan.scenario;
                    let happened = history::happen(plan);
                    let mut sums = sums.lock().unwrap();
                    sums.histories += 1;
                    *sums.scenarios.entry(scenario).or_default() += 1;
                    match happened {
                        Ok(Seen { requests, seconds, connects, .. }) => {
                            sums.requests += requests;
                            sums.seconds += seconds;
                            sums.connects += connects;
                        }
                        Err(why) => {
                            failed.fetch_add(1, Ordering::Relaxed);
                            if options.mutation.is_none() {
                                println!("seed {seed} ({scenario}) FAILED: {why}");
                                let named = options.scenario.as_ref();
                                let named =
                                    named.map(|name| format!(" --scenario {name}")).unwrap_or_default();
                                println!("  again: cargo xtask sim --from {seed} --seeds 1{named}");
                            }
                            sums.failed.push((seed, scenario, why));
                        }
                    }
                    let done = done.fetch_add(1, Ordering::Relaxed) + 1;
                    if options.is_run && options.mutation.is_none() && done.is_multiple_of(1000) {
                        let rate =
                            done * 1000 / u64::try_from(began.elapsed().as_millis()).unwrap_or(1).max(1);
                        println!("{done} of {} seeds, {rate}/s, {} failed", options.seeds, sums.failed.len());
                    }
                }
            });
        }
    });
    sums.into_inner().unwrap()
}

fn main() -> ExitCode {
    let options = match options() {
        Ok(options) => options,
        Err(what) => {
            eprintln!("{what}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    if std::env::args().any(|arg| arg == "--list") {
        println!("histories: test");
        return ExitCode::SUCCESS;
    }
    // Each history makes buffers anew; the kernel need not.
    // SAFETY: plain calls, before there is another thread.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 1 << 30);
    }
    std::panic::set_hook(Box::new(|panic| {
        // Told with its seed; of a mutation it is what is looked for.
        if std::env::var_os("HAWSER_SIM_TELL").is_some() {
            eprintln!("{panic}\n{}", std::backtrace::Backtrace::force_capture());
        }
    }));
    if options.is_part {
        let sums = run(&options, 20);
        let scenarios = SCENARIOS.map(|(name, _)| sums.scenarios.get(name).copied().unwrap_or(0).to_string());
        println!("part {} {} {} {}", sums.requests, sums.seconds, sums.connects, scenarios.join(" "));
        return ExitCode::SUCCESS;
    }
    let began = Instant::now();
    let (passed, failed) = if options.mutations { all_mutations(&options) } else { all_seeds(&options) };
    let ok = if failed == 0 { "ok" } else { "FAILED" };
    let seconds = began.elapsed().as_secs_f32();
    println!(
        "test result: {ok}. {passed} passed; {failed} failed; 0 ignored; 0 measured; finished in {seconds:.1}s"
    );
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Histories of one process: what dies in them is not cleaned up.
const PART: u64 = 250;

/// Runs seeds in processes of their own, one for each core at a time.
fn run_in_parts(options: &Options) -> Sums {
    let (next, failed) = (AtomicU64::new(0), AtomicUsize::new(0));
    let sums = Mutex::new(Sums::default());
    let jobs = options.jobs.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(PART, Ordering::Relaxed);
                    if at >= options.seeds || failed.load(Ordering::Relaxed) >= 20 {
                        return;
                    }
                    let (from, count) = (options.from + at, PART.min(options.seeds - at));
                    let part = part(from, count, options.scenario.as_deref());
                    let mut sums = sums.lock().unwrap();
                    failed.fetch_add(part.failed.len(), Ordering::Relaxed);
                    sums.add(part);
                    let rate = sums.histories * 1000
                        / u64::try_from(began.elapsed().as_millis()).unwrap_or(1).max(1);
                    if sums.histories.is_multiple_of(4 * PART) {
                        println!(
                            "{} of {} seeds, {rate}/s, {} failed",
                            sums.histories,
                            options.seeds,
                            sums.failed.len()
                        );
                    }
                }
            });
        }
    });
    sums.into_inner().unwrap()
}

/// What a process of its own makes of these seeds.
fn part(from: u64, count: u64, scenario: Option<&str>) -> Sums {
    let mut sums = Sums { histories: count, ..Sums::default() };
    let (from_text, count_text) = (from.to_string(), count.to_string());
    let mut command =
        std::process::Command::new(std::env::current_exe().expect("we were started from a file"));
    command.args(["--part", "--jobs", "1", "--from", &from_text, "--seeds", &count_text]);
    if let Some(scenario) = scenario {
        command.args(["--scenario", scenario]);
    }
    let output = command.output().expect("we can be started again");
    let text = String::from_utf8_lossy(&output.stdout);
    let mut ended = false;
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("part ") {
            ended = true;
            let mut numbers = rest.split(' ').map(|word| word.parse::<u64>().unwrap_or_default());
            let mut next = || numbers.next().unwrap_or_default();
            (sums.requests, sums.seconds, sums.connects) = (next(), next(), next());
            for (name, _) in SCENARIOS {
                *sums.scenarios.entry(name).or_default() += next();
            }
        } else {
            println!("{line}");
            if line.contains(" FAILED: ") {
                sums.failed.push((from, "", line.to_owned()));
            }
        }
    }
    if !ended {
        let what =
            format!("the process for seeds {from} to {} ends with {}", from + count - 1, output.status);
        println!("{what}\n{}", String::from_utf8_lossy(&output.stderr));
        sums.failed.push((from, "", what));
    }
    sums
}

/// The seeds that were asked for; some of them twice.
fn all_seeds(options: &Options) -> (usize, usize) {
    let (mut passed, mut failed) = (0, 0);
    let mut tell = |name: &str, result: Result<(), String>| match result {
        Ok(()) => {
            passed += 1;
            println!("test {name} ... ok");
        }
        Err(why) => {
            failed += 1;
            println!("test {name} ... FAILED: {why}");
        }
    };
    let began = Instant::now();
    let is_long = options.is_run && options.mutation.is_none() && options.seeds > PART;
    let sums = if is_long { run_in_parts(options) } else { run(options, 20) };
    let elapsed = began.elapsed().max(Duration::from_millis(1));
    let rate = f64::from(u32::try_from(sums.histories).unwrap_or(u32::MAX)) / elapsed.as_secs_f64();
    println!(
        "{} histories ({}), {} requests, {} connections, {} simulated hours; {rate:.0} histories/s",
        sums.histories,
        sums.scenarios.iter().map(|(name, count)| format!("{name} {count}")).collect::<Vec<_>>().join(", "),
        sums.requests,
        sums.connects,
        sums.seconds / 3600,
    );
    let result = match sums.failed.len() {
        0 => Ok(()),
        count => Err(format!("{count} seeds")),
    };
    tell("everything_ends_once_and_nothing_is_lost_or_repeated", result);
    if options.mutation.is_none() {
        mutations::set(None);
        let mut twice = options.from..options.from + options.seeds.min(20);
        let replayed = twice.try_for_each(|seed| {
            let replayed = history::replays_exactly(|| plan(seed, options.scenario.as_deref()));
            replayed.map_err(|why| format!("seed {seed}: {why}"))
        });
        tell("a_seed_replays_exactly", replayed);
    }
    (passed, failed)
}

/// Each mutation, until a history finds it out.
fn all_mutations(options: &Options) -> (usize, usize) {
    let (mut passed, mut failed) = (0, 0);
    for mutation in mutations::ALL {
        let (name, scenario, most) = (mutation.name, mutation.scenario, mutation.seeds);
        let options = Options {
            mutation: Some(name.to_owned()),
            scenario: Some(scenario.to_owned()),
            seeds: most,
            ..options.clone()
        };
        let sums = run(&options, 1);
        match sums.failed.iter().min() {
            Some((seed, _, why)) => {
                passed += 1;
                let why = why.lines().next().unwrap_or_default();
                let count = sums.histories;
                println!(
                    "test mutation {name} ... ok ({scenario} {seed}, after {count} histories: {why:.120})"
                );
            }
            None => {
                failed += 1;
                println!("test mutation {name} ... FAILED: not found out by {most} histories of {scenario}");
            }
        }
    }
    (passed, failed)
}
