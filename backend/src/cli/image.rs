//! `hawser image import`

use crate::assemble::device::{self, OpenError};
use crate::assemble::reactors::Reactors;
use crate::cli::{Failure, say, table, warn};
use crate::image::{self, Image, Progress};
use clap::{Args, Subcommand};
use hawser_config::Config;
use indicatif::{ProgressBar, ProgressStyle};
use std::cell::Cell;
use std::io::IsTerminal;
use std::path::PathBuf;

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
    let reactors = Reactors::start(&[None], config.daemon.poll_us).map_err(Failure::Failed)?;
    let device = device::open(placed, &config, false, &reactors).map_err(|error| match error {
        OpenError::Config(error) => Failure::from(error),
        OpenError::Failed(line) => Failure::Failed(line),
    })?;
    let progress = Bar::new();
    let done = image::import(&image, &device, &reactors.handles()[0], args.verify, &progress);
    progress.bar.finish_and_clear();
    if let Err(what) = done {
        // A reactor that waits for a lost target would keep the process: it ends without it.
        warn(&format!("hawser: device {} ({}): {what}", args.name, placed.value.uri.0.join(", ")));
        std::process::exit(1);
    }
    device::close(vec![device]);
    let verified = if args.verify { ", verified" } else { "" };
    say(&format!(
        "{} imported to {}: {}{verified}\n",
        args.image.display(),
        args.name,
        table::bytes(image.size_bytes())
    ));
    Ok(())
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
