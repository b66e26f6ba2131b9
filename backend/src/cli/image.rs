//! `hawser image import`

use crate::assemble::device::{self, Kind, OpenError, Opening};
use crate::assemble::reactors::Reactors;
use crate::cli::client::Client;
use crate::cli::{Failure, say, table, warn};
use crate::daemon::api::view::StatusView;
use crate::durable::{self, Machine};
use crate::image::{self, Image, Progress};
use clap::{Args, Subcommand};
use hawser_config::value::Uris;
use hawser_config::{Config, DeviceConfig, Placed};
use indicatif::{ProgressBar, ProgressStyle};
use std::cell::Cell;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

#[derive(Subcommand)]
pub(super) enum ImageCommand {
    /// Copy a raw or qcow2 image to a device
    Import(ImportArgs),
}

#[derive(Args)]
pub(super) struct ImportArgs {
    /// The image
    image: PathBuf,
    /// The device, by its name in the configuration
    name: String,
    /// The configuration file
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Read the device back and compare
    #[arg(long)]
    verify: bool,
    /// Write even where a running daemon lets others write to the device
    #[arg(long)]
    force: bool,
    /// The API socket of the daemon that is asked for that, instead of the file's `[daemon] api`
    #[arg(long, value_name = "SOCK", env = "HAWSER_API")]
    api: Option<PathBuf>,
}

pub(super) fn run(command: &ImageCommand) -> Result<(), Failure> {
    let ImageCommand::Import(args) = command;
    let config = Config::load(&args.config)?;
    device::check(&config)?;
    let Some(placed) = config.device(&args.name) else {
        let what =
            format!("{}: {:?} is no [[device]], {}", args.config.display(), args.name, config.device_names());
        return Err(Failure::Usage(what));
    };
    let image = Image::open(&args.image)
        .map_err(|what| Failure::Failed(format!("{}: {what}", args.image.display())))?;
    if !args.force {
        let api = args.api.as_deref().unwrap_or(config.daemon.api.as_path());
        refuse_what_is_in_use(&Client::new(api), api, placed)?;
    }
    let unfinished = Unfinished::begin(&config, placed);
    let reactors = Reactors::start(&[None], config.daemon.poll_us).map_err(Failure::Failed)?;
    let opening = Opening { had_predecessor: unfinished.had_predecessor, offline: true };
    let device = device::open(placed, &config, opening, &reactors).map_err(|error| match error {
        OpenError::Config(error) => Failure::from(error),
        OpenError::Failed(line) => Failure::Failed(line),
    })?;
    if let Err(what) = image::reach(&device) {
        let what = format!("{}: {what}", placed.value.uri.0.join(", "));
        give_up(&placed.error("uri", what).to_string());
    }
    let progress = Bar::new();
    let done = image::import(&image, &device, &reactors.handles()[0], args.verify, &progress);
    progress.bar.finish_and_clear();
    if let Err(what) = done {
        // In order where that is possible, so that the next one need not wait for what this one has asked for.
        device::close(vec![device]);
        give_up(&format!("device {} ({}): {what}", args.name, placed.value.uri.0.join(", ")));
    }
    device::close(vec![device]);
    unfinished.end();
    let verified = if args.verify { ", verified" } else { "" };
    say(&format!(
        "{} imported to {}: {}{verified}\n",
        args.image.display(),
        args.name,
        table::bytes(image.size_bytes())
    ));
    Ok(())
}

/// Ends the process: a reactor that waits for a lost target would keep it.
fn give_up(line: &str) -> ! {
    warn(&format!("hawser: {line}"));
    std::process::exit(1);
}

/// An import writes to what a VM has mounted as gladly as to what nobody uses.
fn refuse_what_is_in_use(daemon: &Client, api: &Path, placed: &Placed<DeviceConfig>) -> Result<(), Failure> {
    // Whoever does not answer cannot be asked, and a daemon is not needed.
    let Ok(status) = daemon.get::<StatusView>("/v1/status") else { return Ok(()) };
    let devices = status.devices.iter();
    let same = devices.filter(|device| device::are_the_same(&placed.value.uri, &Uris(device.uri.clone())));
    for device in same {
        let disk = status.disks.iter().find(|disk| disk.device == device.name && !disk.read_only);
        let subsystem = status
            .subsystems
            .iter()
            .find(|subsystem| subsystem.namespaces.iter().any(|namespace| namespace.device == device.name));
        let (user, end) = match (disk, subsystem) {
            (Some(disk), _) => (format!("disk {}", disk.name), "`hawser disk remove` first"),
            (None, Some(subsystem)) => (format!("subsystem {}", subsystem.nqn), "the daemon ended"),
            (None, None) => continue,
        };
        return Err(Failure::Failed(format!(
            "device {} ({}) is {user}'s in the daemon at {}, want {end}, or --force",
            placed.value.name,
            placed.value.uri.0.join(", "),
            api.display()
        )));
    }
    Ok(())
}

/// What an import to a target has begun, kept until it has ended in order: what one that failed, or was killed, has asked for
/// may still be carried out when the next one writes.
struct Unfinished {
    /// `None`: nobody needs to know. A file's lock does the same.
    record: Option<PathBuf>,
    had_predecessor: bool,
}

impl Unfinished {
    fn begin(config: &Config, placed: &Placed<DeviceConfig>) -> Unfinished {
        if !matches!(Kind::parse(&placed.value.uri), Ok(Kind::Nvme { .. })) {
            return Unfinished { record: None, had_predecessor: false };
        }
        let record = device::import_record(config, &placed.value.name);
        // Who may not make it is told when the record cannot be written.
        let _ = durable::make_folder(&Machine, &config.daemon.state_dir, 0o755);
        let had_predecessor = record.exists();
        Unfinished { record: Some(record), had_predecessor }
    }

    fn end(self) {
        // It may never have come to be.
        let _ = self.record.map(std::fs::remove_file);
    }
}

/// A bar on a terminal, a line every tenth elsewhere.
struct Bar {
    bar: ProgressBar,
    plain: bool,
    part: Cell<&'static str>,
    tenths: Cell<u64>,
}

impl Bar {
    fn new() -> Bar {
        let plain = !std::io::stderr().is_terminal();
        Bar { bar: ProgressBar::hidden(), plain, part: Cell::new(""), tenths: Cell::new(0) }
    }
}

impl Progress for Bar {
    fn begin(&self, part: &'static str, bytes: u64) {
        self.part.set(part);
        self.tenths.set(0);
        self.bar.reset();
        self.bar.set_length(bytes);
        self.bar.set_message(part);
        if !self.plain {
            self.bar.set_draw_target(indicatif::ProgressDrawTarget::stderr());
            if let Ok(style) = ProgressStyle::with_template(
                "{msg:>9} {wide_bar} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left",
            ) {
                self.bar.set_style(style);
            }
        }
    }

    fn done(&self, bytes: u64) {
        self.bar.inc(bytes);
        let all = self.bar.length().unwrap_or(0).max(1);
        let tenths = self.bar.position() * 10 / all;
        if self.plain && tenths > self.tenths.get() {
            self.tenths.set(tenths);
            warn(&format!("{} {}0 % of {}", self.part.get(), tenths, table::bytes(all)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each import took itself for the first: writes of one that was killed, still under way at the target, landed on those of
    /// the next.
    #[test]
    fn an_import_that_did_not_end_is_known_to_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let text = "[daemon]\nstate_dir = \"@/lib\"\n[[device]]\nname = \"r\"\nuri = \"nvme+tcp://h/nqn.x\"\n\
                    [[device]]\nname = \"m\"\nuri = \"mem:?size=1MiB\"\n";
        let text = text.replace('@', &folder.path().display().to_string());
        let config = Config::parse(&[(folder.path().join("h.toml"), text)]).unwrap();
        let begin = |name: &str| Unfinished::begin(&config, config.device(name).unwrap());
        assert!(!begin("r").had_predecessor && !begin("r").had_predecessor, "none has reached its target");
        std::fs::write(folder.path().join("lib/import-r"), "of an association").unwrap();
        let second = begin("r");
        assert!(second.had_predecessor && !begin("m").had_predecessor);
        second.end();
        assert!(!begin("r").had_predecessor);
    }
}
