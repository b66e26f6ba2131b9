//! The command line: what people type, and what comes back.
//!
//! Owns: arguments, tables, exit codes. Everything about a running daemon goes through its API (`client`).
//!
//! Exit codes: 0 done; 1 failed; 2 usage or configuration. Errors are one line on stderr that begins with `hawser: `.

mod client;
mod device;
mod device_show;
mod disk;
mod image;
mod offline;
mod pool;
mod pool_show;
mod progress;
mod reservation;
mod serve;
mod status;
mod subsystem;
mod table;
mod unfinished;
mod volume;

use clap::{Args, Parser, Subcommand};
use hawser_config::ConfigError;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

/// Why a command did not do what it was asked to. One line each.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The asker's mistake: exit code 2.
    Usage(String),
    /// Anything else: exit code 1.
    Failed(String),
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Failure {
        Failure::Usage(error.to_string())
    }
}

/// Moors virtual machines to remote disks.
#[derive(Parser)]
#[command(name = "hawser", version, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run what a configuration file describes, in the foreground
    Serve(serve::ServeArgs),
    /// Show how a running daemon is doing
    Status(status::StatusArgs),
    /// Disks of a running daemon
    #[command(subcommand)]
    Disk(disk::DiskCommand),
    /// Devices of a running daemon, and what a target offers
    #[command(subcommand)]
    Device(device::DeviceCommand),
    /// Subsystems that a running daemon is the target of
    #[command(subcommand)]
    Subsystem(subsystem::SubsystemCommand),
    /// Pools: of a running daemon, or with --config of a file's devices without one
    #[command(subcommand)]
    Pool(pool::PoolCommand),
    /// Volumes in pools, in the same two ways
    #[command(subcommand)]
    Volume(volume::VolumeCommand),
    /// Disk images
    #[command(subcommand)]
    Image(image::ImageCommand),
}

/// Which daemon.
#[derive(Args)]
struct ApiArgs {
    /// The daemon's API socket
    #[arg(long, value_name = "SOCK", env = "HAWSER_API", default_value = hawser_config::DEFAULT_API)]
    api: PathBuf,
    /// Print JSON for scripts instead of a table for people
    #[arg(long)]
    json: bool,
}

impl ApiArgs {
    fn client(&self) -> client::Client {
        client::Client::new(&self.api)
    }
}

/// Parses the process's arguments, does what they say, and gives the exit code.
#[must_use]
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    let done = match &cli.command {
        Command::Serve(args) => serve::run(args),
        Command::Status(args) => status::run(args),
        Command::Disk(command) => disk::run(command),
        Command::Device(command) => device::run(command),
        Command::Subsystem(command) => subsystem::run(command),
        Command::Pool(command) => pool::run(command),
        Command::Volume(command) => volume::run(command),
        Command::Image(command) => image::run(command),
    };
    let (line, code) = match done {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Failure::Usage(line)) => (line, 2),
        Err(Failure::Failed(line)) => (line, 1),
    };
    warn(&format!("hawser: {line}"));
    ExitCode::from(code)
}

/// Writes to stdout. A reader that has seen enough (`| head`) ends us without a word.
fn say(text: &str) {
    let mut stdout = std::io::stdout().lock();
    if stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).is_err() {
        std::process::exit(1);
    }
}

/// Whoever looks at a list learns from the exit code that it lacks something.
fn all_is_shown(left_out: &[String]) -> Result<(), Failure> {
    match left_out {
        [] => Ok(()),
        left_out => Err(Failure::Failed(format!("not all is shown, it lacks {}", left_out.join(", ")))),
    }
}

/// Writes a line to stderr, if anybody reads it.
fn warn(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

fn print_json(value: &impl serde::Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value).map_err(|error| Failure::Failed(error.to_string()))?;
    say(&format!("{text}\n"));
    Ok(())
}
