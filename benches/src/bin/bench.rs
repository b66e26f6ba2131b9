//! `bench`: `hawser` beside qemu-storage-daemon at a vhost-user socket, without a VM. See `hawser_benches::compare`.
//!
//! Owns: the options and the report's frame. Must not know: how a case is run.
#![forbid(unsafe_code)]

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use clap::Parser;
use hawser_benches::client::options::{parse_size, parse_time};
use hawser_benches::compare::hot_path;
use hawser_benches::compare::load::Maker;
use hawser_benches::compare::results::Results;
use hawser_benches::compare::runner::Plan;
use hawser_benches::sys;
use hawser_benches::wakeup::wake_up;

/// Measures hawser and qemu-storage-daemon in alternation and writes benches/RESULTS.md.
#[derive(Debug, Parser)]
#[command(name = "bench", version)]
struct Options {
    /// The binary to measure (default: beside this one; built in release mode if it is not there).
    #[arg(long)]
    hawser: Option<PathBuf>,
    /// Runs everything once and briefly, to see that it works; writes no file.
    #[arg(long)]
    quick: bool,
    /// Runs only cases whose name contains this, such as null/ or qd32; writes no file unless --out is given.
    #[arg(long)]
    only: Option<String>,
    /// Runs only cases that have a goal; writes no file unless --out is given.
    #[arg(long)]
    goals: bool,
    /// Samples of each server per case.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Length of a sample.
    #[arg(long, value_parser = parse_time, default_value = "1")]
    runtime: Duration,
    /// `poll_us` of the cases in which it is on; of use if it is longer than the machine takes to wake a thread.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    poll_us: u32,
    /// How the client waits for completions.
    #[arg(long, default_value = "eventfd", value_parser = ["eventfd", "block", "loop"])]
    wait_mode: String,
    /// The servers' CPU.
    #[arg(long, default_value_t = 0)]
    server_cpu: usize,
    /// The client's CPU.
    #[arg(long, default_value_t = 1)]
    client_cpu: usize,
    /// Bytes of each disk.
    #[arg(long, value_parser = parse_size, default_value = "1g")]
    size: u64,
    /// A folder on a tmpfs for the image.
    #[arg(long, default_value = "/dev/shm")]
    tmpfs: PathBuf,
    /// How often a disturbed sample is measured again.
    #[arg(long, default_value_t = 5)]
    retries: u32,
    /// Longest time to wait for a quiet machine, for all samples together.
    #[arg(long, value_parser = parse_time, default_value = "10m")]
    patience: Duration,
    /// What Linux md does for a small write, `ARRAY: COUNTS`, to be shown beside what pools do; `cargo xtask bench` finds it out in a guest.
    #[arg(long, value_name = "LINE")]
    md: Vec<String>,
    /// Where the report goes (default: RESULTS.md in the package's folder).
    #[arg(long)]
    out: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<bool, String> {
    let beside = std::env::current_exe().map_err(|e| format!("own path: {e}"))?;
    let beside = beside.parent().ok_or("own path: has no folder")?.to_owned();
    if options.server_cpu == options.client_cpu || sys::cpus() < 2 {
        return Err("--client_cpu: server and client need a CPU each".into());
    }
    sibling(&beside, "blkclient")?;
    sibling(&beside, "inflight_client")?;
    let hawser = match &options.hawser {
        Some(path) if path.is_file() => path.clone(),
        Some(path) => return Err(format!("--hawser {}: not there", path.display())),
        None => build_if_absent(&beside)?,
    };
    let mut plan = Plan {
        maker: Maker::find(&beside)?,
        hawser,
        beside,
        cpus: [options.server_cpu, options.client_cpu],
        rounds: options.rounds,
        runtime: options.runtime,
        ramp: Duration::from_millis(200),
        wait_mode: options.wait_mode.clone(),
        poll_us: options.poll_us,
        only: options.only.clone(),
        goals: options.goals,
        bytes: options.size,
        tmpfs: options.tmpfs.clone(),
        retries: options.retries,
        patience: options.patience,
        scout: true,
    };
    if options.quick {
        plan.rounds = 1;
        plan.runtime = Duration::from_millis(100);
        plan.ramp = Duration::from_millis(20);
        plan.bytes = plan.bytes.min(16 << 20);
        plan.retries = 0;
        plan.scout = false;
    }
    if hot_path::BENCHES.iter().any(|bench| plan.wants_hot_path(bench)) {
        hot_path::build()?;
    }
    // After what may be built, which may need the machine's network.
    if let Err(error) = sys::own_network() {
        eprintln!("bench: no network of its own ({error}): the machine's settings are what is measured");
    }
    let mut results = plan.run()?;
    results.md.clone_from(&options.md);
    println!("{}", results.tables());
    let report = report(&plan, &results);
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("RESULTS.md");
    let whole = !options.quick && !options.goals && options.only.is_none();
    if let Some(path) = options.out.clone().or(whole.then_some(default)) {
        std::fs::write(&path, report).map_err(|e| format!("{}: {e}", path.display()))?;
        println!("written to {}", path.display());
    } else {
        println!("{}", results.details());
    }
    let (reached, all) = results.score();
    println!("{reached} of {all} goals reached, {} cases did not run", results.failures.len());
    Ok(results.failures.is_empty())
}

fn sibling(beside: &Path, name: &str) -> Result<(), String> {
    let path = beside.join(name);
    if path.is_file() {
        return Ok(());
    }
    build(&["--package", "hawser-benches", "--bin", name], beside)?;
    if path.is_file() { Ok(()) } else { Err(format!("{}: not there", path.display())) }
}

fn build_if_absent(beside: &Path) -> Result<PathBuf, String> {
    let path = beside.join("hawser");
    if !path.is_file() {
        build(&["--package", "hawser"], beside)?;
    }
    if path.is_file() { Ok(path) } else { Err(format!("{}: not there; give --hawser PATH", path.display())) }
}

/// Builds in the profile that this program was built in, so that the result lands beside it.
fn build(what: &[&str], beside: &Path) -> Result<(), String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.arg("build").args(what).current_dir(env!("CARGO_MANIFEST_DIR"));
    if let Some(target) = beside.parent() {
        command.arg("--target-dir").arg(target);
    }
    if beside.ends_with("release") {
        command.arg("--release");
    }
    let status = command.status().map_err(|e| format!("cargo: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("cargo build {}: {status}", what.join(" "))) }
}

fn version_of(program: &Path) -> String {
    let output = Command::new(program).arg("--version").output();
    let text =
        output.map(|o| String::from_utf8_lossy(&o.stdout).lines().next().unwrap_or_default().to_owned());
    text.unwrap_or_else(|_| "unknown".to_owned())
}

/// The commit that the sources are at, and whether they differ from it.
fn commit() -> String {
    let mut git = Command::new("git");
    git.args(["describe", "--always", "--dirty", "--exclude=*"]).current_dir(env!("CARGO_MANIFEST_DIR"));
    let text = git.output().map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned()).unwrap_or_default();
    if text.is_empty() { "unknown".to_owned() } else { text }
}

fn report(plan: &Plan, results: &Results) -> String {
    let mut text = String::from("# Results\n\nMade by a program; do not edit. The command:\n\n");
    let mut arguments = vec!["cargo xtask bench".to_owned()];
    let mut given = std::env::args().skip(1);
    while let Some(argument) = given.next() {
        // What cargo xtask found out.
        match argument == "--md" {
            true => drop(given.next()),
            false => arguments.push(argument),
        }
    }
    let rival = sys::find_program("qemu-storage-daemon").map_or_else(String::new, |path| version_of(&path));
    let (reached, all) = results.score();
    let _ = writeln!(text, "```sh\n{}\n```\n", arguments.join(" "));
    let wake_up = wake_up(plan.cpus).map_or_else(|e| e.to_string(), |time| format!("{time:.1?}"));
    let _ = writeln!(
        text,
        "- machine: {}; a thread asleep on the other CPU is awake after {wake_up}",
        sys::machine()
    );
    let _ = writeln!(
        text,
        "- hawser: {}, commit {}, poll_us {} or 0 as in the case's name",
        version_of(&plan.hawser),
        commit(),
        plan.poll_us
    );
    let _ = writeln!(text, "- rival: {rival}");
    let _ = writeln!(
        text,
        "- load: {}, completions by {}; servers on CPU {}, client on CPU {}; TCP over loopback, {}",
        plan.maker.describe(),
        plan.wait_mode,
        plan.cpus[0],
        plan.cpus[1],
        sys::congestion_control()
    );
    let _ = writeln!(
        text,
        "- {} samples of {:?} per server and case, taken in turns (loads on volumes: twenty times as many, of a fifth each, and the ratio is the median of the turns' ratios); medians, ± half of the range",
        plan.rounds, plan.runtime
    );
    let _ = writeln!(
        text,
        "- **{reached} of {all} goals reached**, {} cases did not run\n",
        results.failures.len()
    );
    text.push_str(
        "Ratios are hawser over qemu-storage-daemon (qsd): IOPS, higher is better, and CPU seconds of the server per\n\
         million requests (s/M), lower is better. `null` is compared with qsd's null-co, everything else with its raw\n\
         file on tmpfs (`cache.direct=on`), with the aio and the way to reap that were fastest for it; hawser with the\n\
         way to reap that was fastest for it. In `nvme-own-process` the CPU time is that of both processes.\n\n",
    );
    text.push_str(&results.tables());
    text.push_str(
        "\n## Latencies and configurations\n\n`repeated` counts samples that were thrown away because other load \
         disturbed them.\n\n",
    );
    text.push_str(&results.details());
    text
}
