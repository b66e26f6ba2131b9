//! Pools in a seeded world with all faults: histories, each a seed, and what they prove.
//!
//! ```text
//!   guest ─ model          what a guest may rely on: what it reads, and what is left after a crash; and which volumes there are
//!   cast ── plan           everybody in a history: members, the process, guests; what there is, and what happens
//!   events                 how it happens
//!   history                lets it happen, mends everything, and sees that nothing is lost and mirrors agree
//!   mutations              promises that are broken on purpose: each is found out
//! ```
//!
//! `cargo xtask sim pools` runs as many as asked for. As a test it runs some: `HAWSER_SIM_SEEDS` says how many.

mod cast;
mod events;
mod guest;
mod history;
mod model;
mod mutations;
mod plan;
#[path = "../runner/mod.rs"]
mod runner;
mod tail;

use history::Limits;
use plan::{SCENARIOS, plan};
use runner::Suite;
use std::process::ExitCode;
use std::sync::{LazyLock, Mutex};

const NAMES: [&str; SCENARIOS.len()] = {
    let mut names = [""; SCENARIOS.len()];
    let mut at = 0;
    while at < names.len() {
        names[at] = SCENARIOS[at].0;
        at += 1;
    }
    names
};

/// What happens to pools from outside; what they do themselves is among the totals.
const WANTED: [&str; 23] = [
    "cuts",
    "kills",
    "crashes_at_steps",
    "torn_writes",
    "ghost_writes",
    "lost_blocks",
    "tails_found",
    "deaths",
    "deaths_at_crashes",
    "deaths_while_opening",
    "errors",
    "slow",
    "media_errors",
    "members_without_power",
    "caches_lost_for_good",
    "members_back",
    "members_back_empty",
    "new_disks",
    "splits",
    "grown",
    "scrubs",
    "checks",
    "no_space",
];

/// Which of a history's events are left out.
static LIMITS: Mutex<Limits> = Mutex::new(Limits { events: usize::MAX, skip: Vec::new() });

/// Whether to print what happens.
pub(crate) fn tells() -> bool {
    static TELLS: LazyLock<bool> = LazyLock::new(|| std::env::var_os("HAWSER_SIM_TELL").is_some());
    *TELLS
}

/// The write whose content is looked for on all disks when a history fails.
pub(crate) fn sought() -> Option<u64> {
    let text = std::env::var("HAWSER_SIM_FIND").ok()?;
    u64::from_str_radix(text.trim_start_matches("0x"), 16).ok()
}

const SUITE: Suite = Suite {
    name: "pools",
    command: "sim pools",
    promise: "nothing_is_lost_or_shown_to_others_and_mirrors_agree",
    scenarios: &NAMES,
    scenario_of: |seed| plan(seed, None).scenario,
    happen: |seed, scenario| history::happen(plan(seed, scenario), &LIMITS.lock().unwrap().clone()),
    shrink: Some(|seed, scenario| match tells() {
        // One is enough to read.
        true => String::new(),
        false => history::shrink(&plan(seed, scenario)),
    }),
    totals: hawser_volume::pool::coverage,
    wanted: &WANTED,
    tell: |counts| {
        counts.iter().map(|(name, count)| format!("{name} {count}")).collect::<Vec<_>>().join(", ")
    },
    mutations: mutations::ALL,
    other_mutations: mutations::OTHERS,
    break_promise: mutations::set,
    seeds: 100,
    option: |name, args| {
        let mut numbers = || {
            let text = args.next().unwrap_or_default();
            let numbers = text.split(',').map(|word| word.parse::<usize>()).collect::<Result<Vec<_>, _>>();
            numbers.map_err(|error| format!("{name} {text}: {error}"))
        };
        match name {
            "--events" => LIMITS.lock().unwrap().events = numbers()?[0],
            "--skip" => LIMITS.lock().unwrap().skip = numbers()?,
            _ => return Ok(false),
        }
        Ok(true)
    },
    usage: "\
--events N              only the first so many events of each history
--skip N,N              without these events of each history
HAWSER_SIM_TELL=1       tells every request and event
HAWSER_SIM_FIND=ID      where on the disks that write's content is, when a history fails
HAWSER_SIM_OVERLAPS=1   guests also write what is being written: mirrors differ then
",
};

/// Prints what the pool logs, among what happens.
struct Teller;

impl log::Log for Teller {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        println!("{}: {}", record.level(), record.args());
    }

    fn flush(&self) {}
}

fn main() -> ExitCode {
    if tells() && log::set_logger(&Teller).is_ok() {
        log::set_max_level(log::LevelFilter::Info);
    }
    // What is killed keeps its descriptors.
    // SAFETY: plain calls with a structure of our own, before there is another thread.
    unsafe {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
        limit.rlim_cur = limit.rlim_max;
        libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        // Each opening makes a table of its own and fills a few words of it: clearing a huge page each time costs more than the opening.
        libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0);
        // What a history gives back the next one asks for.
        libc::mallopt(libc::M_MMAP_THRESHOLD, 64 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 1 << 30);
        libc::mallopt(libc::M_TOP_PAD, 16 << 20);
    }
    runner::main(&SUITE)
}
