//! `cargo xtask`: the one door to what people and CI run.
//!
//! Owns: the commands, and what each needs from Debian. Must not know: hawser's crates.
//! Invariants: it builds on a machine that has nothing but gcc and a Rust toolchain, in seconds.

#![forbid(unsafe_code)]

mod count;
mod demo;
mod fresh;
mod packages;
mod tools;

use guest_tests::{Result, lab, process, soak, suite};
use std::process::ExitCode;

const HELP: &str = "\
cargo xtask COMMAND [--yes]

  demo                        boot a VM from a clone in a pool over three targets, kill a target and its back end, print what happened
  test                        all tests: unit, documentation, guests
  guest [FILTER | list]       the guest tests whose names contain FILTER
  soak [--minutes N] [--seed S]
                              a VM and verifying clients under every fault that there is (2 minutes), then counts
  sim [pools] [--seeds N] [--from SEED] [--scenario NAME] | --mutations
                              our initiator and target, or pools, in the seeded simulator, on all cores; a seed that fails
                              is named
  bench [ARGS]                measure vhost-user sockets without a VM, and the hot path alone; ARGS go to the bench
  fresh --suite SUITE [COMMAND]
                              demo, or another COMMAND, in a new minimal Debian (bookworm, trixie); needs root
  ci-tools                    install cargo-deny and cargo-fuzz where they are missing

Debian packages that a command lacks are named, and installed if you agree; --yes agrees beforehand.
";

fn main() -> ExitCode {
    process::catch_interrupts();
    let all: Vec<String> = std::env::args().skip(1).collect();
    let (command, rest) = all.split_first().map_or(("help", &[][..]), |(first, rest)| (first.as_str(), rest));
    // These have options of their own.
    let has_options = ["bench", "sim"].contains(&command);
    let yes = !has_options && rest.iter().any(|arg| arg == "--yes");
    let args: Vec<&str> =
        rest.iter().map(String::as_str).filter(|arg| has_options || *arg != "--yes").collect();
    match dispatch(command, &args, yes) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(Failure::Usage(what)) => {
            eprintln!("xtask: {what}\n\n{HELP}");
            ExitCode::from(2)
        }
        Err(Failure::Failed(what)) => {
            eprintln!("xtask {command}: {what}");
            ExitCode::FAILURE
        }
    }
}

enum Failure {
    Usage(String),
    Failed(String),
}

impl From<String> for Failure {
    fn from(what: String) -> Self {
        Failure::Failed(what)
    }
}

/// Runs a command; `false` means that it ran and something it tested failed.
fn dispatch(command: &str, args: &[&str], yes: bool) -> std::result::Result<bool, Failure> {
    match (command, args) {
        ("demo", []) => {
            packages::ensure(&packages::GUESTS, yes)?;
            demo::run()?;
        }
        ("test", []) => {
            packages::ensure(&packages::GUESTS, yes)?;
            return Ok(count::all()?);
        }
        ("guest", ["list"]) => guest_tests::suite::TESTS.iter().for_each(|test| println!("{}", test.name)),
        ("guest", [] | [_]) => {
            packages::ensure(&packages::GUESTS, yes)?;
            return Ok(count::guests(args.first().copied().unwrap_or_default())?);
        }
        ("soak", args) => {
            let (minutes, seed) = soak_options(args).map_err(Failure::Usage)?;
            packages::ensure(&packages::GUESTS, yes)?;
            let counts = soak::soak(&lab::Lab::open()?, minutes, seed)?;
            println!("{counts}");
            return Ok(counts.is_good());
        }
        ("bench", args) => bench(args)?,
        ("sim", args) => sim(args)?,
        ("fresh", ["--suite", suite @ ("bookworm" | "trixie"), what @ ..]) => {
            packages::ensure(&packages::FRESH, yes)?;
            fresh::run_in(suite, if what.is_empty() { &["demo"] } else { what })?;
        }
        ("ci-tools", []) => {
            packages::ensure(&packages::CI, yes)?;
            tools::install()?;
        }
        ("help" | "--help" | "-h", _) => print!("{HELP}"),
        (command, args) => return Err(Failure::Usage(format!("{command} {}: unknown", args.join(" ")))),
    }
    Ok(true)
}

/// Minutes and seed.
fn soak_options(args: &[&str]) -> Result<(u32, u64)> {
    let (mut minutes, mut seed) = (2, soak::seed_of_now());
    for pair in args.chunks(2) {
        let wrong = || format!("soak {}: want --minutes N, --seed S", pair.join(" "));
        match pair {
            ["--minutes", number] => minutes = number.parse().map_err(|_| wrong())?,
            ["--seed", number] => seed = number.parse().map_err(|_| wrong())?,
            _ => return Err(wrong()),
        }
    }
    Ok((minutes, seed))
}

fn bench(args: &[&str]) -> Result<()> {
    // All that is measured, so that nothing older is.
    let mut cargo = lab::cargo();
    cargo.args(["build", "--release", "--quiet", "--package", "hawser", "--package", "hawser-benches"]);
    process::run(&mut cargo)?;
    let is_part = args.iter().any(|arg| *arg == "--quick" || *arg == "--help" || arg.starts_with("--only"));
    // Linux has the same case, in a guest; where there can be none, all else is measured.
    let md = match is_part {
        true => Vec::new(),
        false => lab::Lab::open().and_then(|lab| suite::md_small_writes(&lab)).unwrap_or_else(|error| {
            eprintln!("bench: Linux md is not counted: {error}");
            Vec::new()
        }),
    };
    let mut cargo = lab::cargo();
    cargo
        .args(["run", "--release", "--quiet", "--package", "hawser-benches", "--bin", "bench", "--"])
        .args(args);
    for line in &md {
        cargo.args(["--md", line]);
    }
    process::run(&mut cargo)
}

/// With what breaks promises on purpose built in, which costs nothing while none is broken.
fn sim(args: &[&str]) -> Result<()> {
    let (test, args) = match args {
        ["pools" | "--pools", rest @ ..] => ("pools", rest),
        all => ("histories", all),
    };
    let run = |test: &str, args: &[&str]| {
        let mut cargo = lab::cargo();
        let flags = std::env::var("RUSTFLAGS").unwrap_or_default();
        cargo
            .env("RUSTFLAGS", format!("{flags} --cfg hawser_mutations"))
            .args(["test", "--profile", "sim", "--quiet", "--package", "hawser-sim", "--test", test, "--"])
            .args(args);
        process::run(&mut cargo)
    };
    if test == "pools" && args.contains(&"--mutations") {
        // Those that take a history of their own.
        run("pool", &["orders", "joined", "a_stripe_that_is_given_up"])?;
    }
    run(test, args)
}
