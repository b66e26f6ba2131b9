//! Runs seeds, on all cores, and says what became of them: the same for every kind of history.
//!
//! Owns: the command line, threads, processes of their own for long runs, sums, and the lines that people see. Must not know:
//! what a history is.
//!
//! A seed that fails is named, with the command that runs it again.

mod sums;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use sums::{Sums, Total};

/// What a history was.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    /// The same for the same seed.
    pub(crate) trace: u64,
    /// What is summed up over all of them, by name; without blanks.
    pub(crate) counts: BTreeMap<&'static str, u64>,
}

/// A promise that is broken on purpose, and which histories find it out.
pub(crate) struct Mutation {
    pub(crate) name: &'static str,
    pub(crate) scenario: &'static str,
    /// Within so many of them.
    pub(crate) seeds: u64,
}

/// See [`Mutation`].
pub(crate) const fn mutation(name: &'static str, scenario: &'static str, seeds: u64) -> Mutation {
    Mutation { name, scenario, seeds }
}

/// One kind of histories.
pub(crate) struct Suite {
    pub(crate) name: &'static str,
    /// What follows `cargo xtask sim` to run it.
    pub(crate) command: &'static str,
    /// What is proved when no seed fails.
    pub(crate) promise: &'static str,
    pub(crate) scenarios: &'static [&'static str],
    /// Of this seed: its scenario's name, unless one is given.
    pub(crate) scenario_of: fn(u64) -> &'static str,
    /// Lets a seed's history happen, in the scenario of this name or the seed's own.
    pub(crate) happen: fn(u64, Option<&str>) -> Result<Seen, String>,
    /// Says more of a seed that has failed: what is shortest.
    pub(crate) shrink: Option<fn(u64, Option<&str>) -> String>,
    /// What this process has counted so far besides, of all its histories.
    pub(crate) totals: fn() -> Vec<(&'static str, u64)>,
    /// What a run of many histories of all scenarios has to have seen: none of these counts is 0 then, and none of `totals`.
    pub(crate) wanted: &'static [&'static str],
    /// A line about all that was counted.
    pub(crate) tell: fn(&BTreeMap<String, u64>) -> String,
    pub(crate) mutations: &'static [Mutation],
    /// Promises that histories of their own break, which are elsewhere: `--mutation` knows them too.
    pub(crate) other_mutations: &'static [&'static str],
    pub(crate) break_promise: fn(Option<&str>),
    /// Seeds when nothing says how many.
    pub(crate) seeds: u64,
    /// Options of its own: takes one with its value, and says whether it knows it.
    pub(crate) option: fn(&str, &mut dyn Iterator<Item = String>) -> Result<bool, String>,
    pub(crate) usage: &'static str,
}

const USAGE: &str = "\
--seeds N --from SEED   so many histories, from this one on
--scenario NAME         all of one kind
--jobs N                at a time; else one for each CPU
--sums FILE             adds what was seen to FILE, every 10000 seeds and at the end; without --from, goes on where FILE ends
--mutation NAME         with this promise broken
--mutations             every mutation, each until it is found out
--traces                with --part: each seed's trace, which stays the same when only the cost of a history changes
";

#[derive(Clone, Default)]
struct Options {
    seeds: u64,
    from: u64,
    scenario: Option<String>,
    jobs: Option<usize>,
    sums: Option<PathBuf>,
    mutation: Option<String>,
    mutations: bool,
    /// Told by `cargo xtask sim`, which wants more lines.
    is_run: bool,
    /// One of the processes of a long run: its last line is for the first.
    is_part: bool,
    /// Each history's trace is printed.
    traces: bool,
}

fn options(suite: &Suite) -> Result<Options, String> {
    let seeds = std::env::var("HAWSER_SIM_SEEDS").ok().and_then(|text| text.parse().ok());
    let mut options = Options { seeds: seeds.unwrap_or(suite.seeds), ..Options::default() };
    let mut args = std::env::args().skip(1);
    let mut has_from = false;
    while let Some(arg) = args.next() {
        if (suite.option)(&arg, &mut args)? {
            continue;
        }
        let mut number = || {
            let value = args.next().ok_or_else(|| format!("{arg} wants a number"))?;
            value.parse::<u64>().map_err(|error| format!("{arg} {value}: {error}"))
        };
        match arg.as_str() {
            "--seeds" => (options.seeds, options.is_run) = (number()?, true),
            "--from" => (options.from, options.is_run, has_from) = (number()?, true, true),
            "--sums" => (options.sums, options.is_run) = (args.next().map(PathBuf::from), true),
            "--jobs" => options.jobs = usize::try_from(number()?).ok(),
            "--scenario" => options.scenario = args.next(),
            "--mutation" => (options.mutation, options.is_run) = (args.next(), true),
            "--mutations" => (options.mutations, options.is_run) = (true, true),
            "--part" => options.is_part = true,
            "--traces" => options.traces = true,
            // What cargo gives to every test binary.
            _ => {}
        }
    }
    if let Some(path) = options.sums.as_deref().filter(|_| !has_from) {
        options.from = Total::read(path)?.next.unwrap_or_default();
    }
    if let Some(name) = options.scenario.as_deref().filter(|name| !suite.scenarios.contains(name)) {
        return Err(format!("there is no scenario {name}: {}", suite.scenarios.join(" ")));
    }
    if let Some(name) = options.mutation.as_deref()
        && suite.mutations.iter().all(|mutation| mutation.name != name)
        && !suite.other_mutations.contains(&name)
    {
        return Err(format!("there is no mutation {name}"));
    }
    Ok(options)
}

fn jobs(options: &Options) -> usize {
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    options.jobs.unwrap_or_else(cores).max(1)
}

fn rate(done: u64, began: Instant) -> u64 {
    done * 1000 / u64::try_from(began.elapsed().as_millis()).unwrap_or(1).max(1)
}

/// Runs seeds on all cores until `enough` have failed.
fn run(suite: &Suite, options: &Options, enough: usize) -> Sums {
    let (next, failed) = (AtomicU64::new(0), AtomicUsize::new(0));
    let sums = Mutex::new(Sums::default());
    let (began, before) = (Instant::now(), (suite.totals)());
    let work = || {
        (suite.break_promise)(options.mutation.as_deref());
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at >= options.seeds || failed.load(Ordering::Relaxed) >= enough {
                return;
            }
            let seed = options.from + at;
            let named = options.scenario.as_deref();
            let scenario = named.and_then(|name| suite.scenarios.iter().find(|other| **other == name));
            let scenario = scenario.copied().unwrap_or_else(|| (suite.scenario_of)(seed));
            let happened = (suite.happen)(seed, named);
            if let (true, Ok(seen)) = (options.traces, &happened) {
                println!("trace {seed} {:016x}", seen.trace);
            }
            if let (Err(why), None) = (&happened, &options.mutation) {
                let named = named.map(|name| format!(" --scenario {name}")).unwrap_or_default();
                let more = suite.shrink.map(|shrink| shrink(seed, options.scenario.as_deref()));
                println!(
                    "seed {seed} ({scenario}) FAILED: {why}\n  again: cargo xtask {} --from {seed} --seeds 1{named}{}",
                    suite.command,
                    more.unwrap_or_default()
                );
            }
            let mut sums = sums.lock().unwrap();
            sums.histories += 1;
            *sums.scenarios.entry(scenario.to_owned()).or_default() += 1;
            match happened {
                Ok(seen) => {
                    for (name, count) in seen.counts {
                        *sums.counts.entry(name.to_owned()).or_default() += count;
                    }
                }
                Err(why) => {
                    failed.fetch_add(1, Ordering::Relaxed);
                    sums.failed.push((seed, scenario.to_owned(), why));
                }
            }
            let done = sums.histories;
            if options.is_run && !options.is_part && options.mutation.is_none() && done.is_multiple_of(1000) {
                let rate = rate(done, began);
                println!("{done} of {} seeds, {rate}/s, {} failed", options.seeds, sums.failed.len());
            }
        }
    };
    match jobs(options) {
        // Memory is cheaper to get where there is one thread only.
        1 => work(),
        jobs => std::thread::scope(|scope| (0..jobs).for_each(|_| _ = scope.spawn(work))),
    }
    let mut sums = sums.into_inner().unwrap();
    for ((name, after), (_, before)) in (suite.totals)().into_iter().zip(before) {
        *sums.counts.entry(name.replace(' ', "_")).or_default() += after - before;
    }
    sums
}

/// The whole program.
pub(crate) fn main(suite: &Suite) -> ExitCode {
    let options = match options(suite) {
        Ok(options) => options,
        Err(what) => {
            eprintln!("{what}\n\n{USAGE}{}", suite.usage);
            return ExitCode::from(2);
        }
    };
    if std::env::args().any(|arg| arg == "--list") {
        println!("{}: test", suite.name);
        return ExitCode::SUCCESS;
    }
    std::panic::set_hook(Box::new(|panic| {
        // Told with its seed; of a mutation it is what is looked for.
        if std::env::var_os("HAWSER_SIM_TELL").is_some() {
            eprintln!("{panic}\n{}", std::backtrace::Backtrace::force_capture());
        }
    }));
    if options.is_part {
        let enough = if options.mutation.is_some() { 1 } else { ENOUGH };
        let sums = run(suite, &options, enough);
        if options.mutation.is_some() {
            for (seed, scenario, why) in &sums.failed {
                println!("seed {seed} ({scenario}) FAILED: {}", why.lines().next().unwrap_or_default());
            }
        }
        let words = |counts: &BTreeMap<String, u64>, mark: &str| {
            counts.iter().map(|(name, count)| format!(" {mark}{name}={count}")).collect::<String>()
        };
        println!("part{}{}", words(&sums.scenarios, ":"), words(&sums.counts, ""));
        return ExitCode::SUCCESS;
    }
    let began = Instant::now();
    let (passed, failed) =
        if options.mutations { all_mutations(suite, &options) } else { all_seeds(suite, &options) };
    let ok = if failed == 0 { "ok" } else { "FAILED" };
    let seconds = began.elapsed().as_secs_f32();
    println!(
        "test result: {ok}. {passed} passed; {failed} failed; 0 ignored; 0 measured; finished in {seconds:.1}s"
    );
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// A run ends when so many have failed.
const ENOUGH: usize = 20;
/// So many histories of all scenarios have to have seen everything.
const MANY: u64 = 1000;
/// Histories of one process: what dies in them is not cleaned up.
const PART: u64 = 250;

/// What is lost at most when a run that adds up is interrupted.
const STRETCH: u64 = 10_000;

/// Runs seeds in stretches, each of which is added to the file.
fn run_in_stretches(suite: &Suite, options: &Options, path: &Path) -> Result<Sums, String> {
    let (mut sums, mut at) = (Sums::default(), 0);
    while at < options.seeds && sums.failed.len() < ENOUGH {
        let seeds = STRETCH.min(options.seeds - at);
        let stretch = run_in_parts(&Options { from: options.from + at, seeds, ..options.clone() });
        let done = stretch.histories;
        let mut total = Total::read(path)?;
        total.add(stretch.clone(), options.from + at + done);
        total.write(path, suite.command)?;
        println!("{} seeds in {}, {} failed", total.sums.histories, path.display(), total.sums.failed.len());
        sums.add(stretch);
        at += seeds;
    }
    Ok(sums)
}

/// Runs seeds in processes of their own, one for each core at a time.
fn run_in_parts(options: &Options) -> Sums {
    let (next, failed) = (AtomicU64::new(0), AtomicUsize::new(0));
    let sums = Mutex::new(Sums::default());
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..jobs(options) {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(PART, Ordering::Relaxed);
                    if at >= options.seeds || failed.load(Ordering::Relaxed) >= ENOUGH {
                        return;
                    }
                    let (from, count) = (options.from + at, PART.min(options.seeds - at));
                    let part = part(from, count, options.scenario.as_deref());
                    let mut sums = sums.lock().unwrap();
                    failed.fetch_add(part.failed.len(), Ordering::Relaxed);
                    sums.add(part);
                    if sums.histories.is_multiple_of(4 * PART) {
                        let (done, failed) = (sums.histories, sums.failed.len());
                        let rate = rate(done, began);
                        println!("{done} of {} seeds, {rate}/s, {failed} failed", options.seeds);
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
        if let Some(rest) = line.strip_prefix("part") {
            ended = true;
            for (name, count) in rest.split_whitespace().filter_map(|word| word.split_once('=')) {
                let count = count.parse::<u64>().unwrap_or_default();
                let (sums, name) = match name.strip_prefix(':') {
                    Some(name) => (&mut sums.scenarios, name),
                    None => (&mut sums.counts, name),
                };
                *sums.entry(name.to_owned()).or_default() += count;
            }
        } else {
            println!("{line}");
            if line.contains(" FAILED: ") {
                let seed = line.split_whitespace().nth(1).and_then(|seed| seed.parse().ok());
                sums.failed.push((seed.unwrap_or(from), String::new(), line.to_owned()));
            }
        }
    }
    if !ended {
        let what =
            format!("the process for seeds {from} to {} ends with {}", from + count - 1, output.status);
        println!("{what}\n{}", String::from_utf8_lossy(&output.stderr));
        sums.failed.push((from, String::new(), what));
    }
    sums
}

/// The seeds that were asked for; some of them twice.
fn all_seeds(suite: &Suite, options: &Options) -> (usize, usize) {
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
    let sums = match options.sums.as_deref() {
        Some(path) => run_in_stretches(suite, options, path).unwrap_or_else(|why| {
            let failed = vec![(options.from, String::new(), why)];
            Sums { failed, ..Sums::default() }
        }),
        None if is_long => run_in_parts(options),
        None => run(suite, options, ENOUGH),
    };
    let elapsed = began.elapsed().max(Duration::from_millis(1));
    let rate = f64::from(u32::try_from(sums.histories).unwrap_or(u32::MAX)) / elapsed.as_secs_f64();
    let scenarios = suite.scenarios.iter().filter_map(|name| sums.scenarios.get_key_value(*name));
    println!(
        "{} histories ({}), {}; {rate:.0} histories/s",
        sums.histories,
        scenarios.map(|(name, count)| format!("{name} {count}")).collect::<Vec<_>>().join(", "),
        (suite.tell)(&sums.counts),
    );
    let result = match sums.failed.len() {
        0 => Ok(()),
        count => Err(format!("{count} seeds")),
    };
    tell(suite.promise, result);
    // Without what `cargo xtask sim` builds with, no request is long enough to go out in parts.
    let is_all = options.mutation.is_none() && options.scenario.is_none() && cfg!(hawser_mutations);
    if is_all && sums.histories >= MANY {
        tell("everything_that_is_counted_was_seen", has_seen_all(suite, &sums.counts));
    }
    if options.mutation.is_none() {
        (suite.break_promise)(None);
        let mut twice = options.from..options.from + options.seeds.min(20);
        let replayed = twice.try_for_each(|seed| {
            let replayed = replays_exactly(suite, seed, options.scenario.as_deref());
            replayed.map_err(|why| format!("seed {seed}: {why}"))
        });
        tell("a_seed_replays_exactly", replayed);
    }
    (passed, failed)
}

/// None of what many histories have to see is missing.
fn has_seen_all(suite: &Suite, counts: &BTreeMap<String, u64>) -> Result<(), String> {
    let totals = (suite.totals)();
    let wanted = suite.wanted.iter().copied().chain(totals.iter().map(|(name, _)| *name));
    let is_missing = |name: &&str| counts.get(&name.replace(' ', "_")).is_none_or(|count| *count == 0);
    let missing: Vec<&str> = wanted.filter(is_missing).collect();
    if missing.is_empty() { Ok(()) } else { Err(format!("none of: {}", missing.join(", "))) }
}

/// Two runs of a seed are the same.
fn replays_exactly(suite: &Suite, seed: u64, scenario: Option<&str>) -> Result<(), String> {
    let (first, second) = ((suite.happen)(seed, scenario)?, (suite.happen)(seed, scenario)?);
    if first == second { Ok(()) } else { Err(format!("{first:?} and {second:?}")) }
}

/// What a process of its own makes of a mutation, from this history on.
fn mutated_part(options: &Options, mutation: &Mutation, from: u64) -> Sums {
    let count = PART.min(mutation.seeds - from);
    let numbers = [jobs(options) as u64, from, count].map(|number| number.to_string());
    let mut command =
        std::process::Command::new(std::env::current_exe().expect("we were started from a file"));
    command.args(["--part", "--mutation", mutation.name, "--scenario", mutation.scenario]);
    command.args(["--jobs", &numbers[0], "--from", &numbers[1], "--seeds", &numbers[2]]);
    let output = command.output().expect("we can be started again");
    let text = String::from_utf8_lossy(&output.stdout);
    let found = text.lines().find_map(|line| {
        let (seed, why) = line.strip_prefix("seed ")?.split_once(" FAILED: ")?;
        Some((seed.split_whitespace().next()?.parse().ok()?, String::new(), why.to_owned()))
    });
    Sums { histories: count, failed: found.into_iter().collect(), ..Sums::default() }
}

/// Each mutation, until a history finds it out.
fn all_mutations(suite: &Suite, options: &Options) -> (usize, usize) {
    let (mut passed, mut failed) = (0, 0);
    for mutation in suite.mutations {
        let (name, scenario, most) = (mutation.name, mutation.scenario, mutation.seeds);
        let mut sums = Sums::default();
        while sums.failed.is_empty() && sums.histories < most {
            sums.add(mutated_part(options, mutation, sums.histories));
        }
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
