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
#[path = "../runner/mod.rs"]
mod runner;

use plan::{SCENARIOS, plan};
use runner::Suite;
use std::process::ExitCode;

const NAMES: [&str; SCENARIOS.len()] = {
    let mut names = [""; SCENARIOS.len()];
    let mut at = 0;
    while at < names.len() {
        names[at] = SCENARIOS[at].0;
        at += 1;
    }
    names
};

const SUITE: Suite = Suite {
    name: "histories",
    command: "sim",
    promise: "everything_ends_once_and_nothing_is_lost_or_repeated",
    scenarios: &NAMES,
    scenario_of: |seed| plan(seed, None).scenario,
    happen: |seed, scenario| history::happen(plan(seed, scenario)),
    shrink: None,
    totals: Vec::new,
    wanted: &["requests", "connects", "broken", "flushed", "ghosts"],
    tell: |counts| {
        let count = |name| counts.get(name).copied().unwrap_or(0);
        let (requests, connects, hours) = (count("requests"), count("connects"), count("seconds") / 3600);
        let (broken, flushed, ghosts) = (count("broken"), count("flushed"), count("ghosts"));
        format!(
            "{requests} requests, {connects} connections, {hours} simulated hours; over RDMA {broken} connections broken, \
             {flushed} requests flushed, {ghosts} messages that outlived their sender"
        )
    },
    mutations: mutations::ALL,
    other_mutations: &[],
    break_promise: mutations::set,
    seeds: 200,
    option: |_, _| Ok(false),
    usage: "",
};

fn main() -> ExitCode {
    // Each history makes buffers anew; the kernel need not.
    // SAFETY: plain calls, before there is another thread.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 1 << 30);
    }
    runner::main(&SUITE)
}
