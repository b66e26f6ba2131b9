//! `hawser image import`

use crate::assemble::device::{self, OpenError, Opening};
use crate::assemble::host;
use crate::assemble::reactors::Reactors;
use crate::cli::client::Client;
use crate::cli::offline::{Offline, Purpose, WhereArgs};
use crate::cli::progress::Bar;
use crate::cli::unfinished::Unfinished;
use crate::cli::{Failure, say, table, warn};
use crate::daemon::api::view::StatusView;
use crate::daemon::host_lock::HostLock;
use crate::image::{self, Image};
use clap::{Args, Subcommand};
use hawser_config::value::{Uris, VolumePath};
use hawser_config::{Config, DeviceConfig, Placed};
use hawser_volume::pool::{self, Pool};
use std::path::{Path, PathBuf};
use std::sync::Arc;

#[derive(Subcommand)]
pub(super) enum ImageCommand {
    /// Copy a raw or qcow2 image to a device or volume
    Import(ImportArgs),
}

#[derive(Args)]
pub(super) struct ImportArgs {
    /// The image
    image: PathBuf,
    /// The device, by its name in the configuration; or a volume, which is made if it is not there
    #[arg(value_name = "DEVICE or POOL/VOLUME")]
    name: String,
    /// The configuration file
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Read the device back and compare
    #[arg(long)]
    verify: bool,
    /// Write even where a running daemon lets others write to the device, or a pool has it
    #[arg(long)]
    force: bool,
    /// The API socket of the daemon that is asked for that, instead of the file's `[daemon] api`
    #[arg(long, value_name = "SOCK")]
    api: Option<PathBuf>,
}

pub(super) fn run(command: &ImageCommand) -> Result<(), Failure> {
    let ImageCommand::Import(args) = command;
    if args.name.contains('/') {
        let path = args.name.parse().map_err(Failure::Usage)?;
        return import_to_volume(args, &path);
    }
    let config = Config::load(&args.config)?;
    device::check(&config)?;
    let Some(placed) = config.device(&args.name) else {
        let what =
            format!("{}: {:?} is no [[device]], {}", args.config.display(), args.name, config.device_names());
        return Err(Failure::Usage(what));
    };
    let image = Image::open(&args.image)
        .map_err(|what| Failure::Failed(format!("{}: {what}", args.image.display())))?;
    let api = args.api.as_deref().unwrap_or(config.daemon.api.as_path());
    let daemon_answers = !args.force && refuse_what_is_in_use(&Client::new(api), api, placed)?;
    // To a target, we are the same host as a daemon that was not asked.
    let is_remote = matches!(device::Kind::parse(&placed.value.uri), Ok(device::Kind::Nvme { .. }));
    let _host_lock = match is_remote && !daemon_answers && !args.force {
        true => {
            let identity = host::identity(&config.host, &config.daemon.state_dir).map_err(Failure::Failed)?;
            Some(HostLock::take(&identity).map_err(Failure::Failed)?)
        }
        false => None,
    };
    let unfinished = Unfinished::begin(&config, placed);
    let reactors = Reactors::start(&[None], config.daemon.poll_us).map_err(Failure::Failed)?;
    let opening = Opening { had_predecessor: unfinished.had_predecessor, offline: true, in_run_state: false };
    let device = device::open(placed, &config, opening, reactors.handles()).map_err(|error| match error {
        OpenError::Config(error) => Failure::from(error),
        OpenError::Failed(line) => Failure::Failed(line),
    })?;
    if let Err(what) = image::reach(&device) {
        let what = format!("{}: {what}", placed.value.uri.0.join(", "));
        give_up(&placed.error("uri", what).to_string());
    }
    if !args.force {
        let label = pool::probe(&reactors.handles()[0], Arc::clone(&device)).wait();
        // What cannot be read, or is damaged, is said by who imports to it, or by nobody.
        if let Ok(Some(label)) = label {
            device::close(vec![device]);
            unfinished.end();
            return Err(Failure::Failed(format!(
                "device {} ({}) is a member of pool {}, want one of its volumes, or --force",
                args.name,
                placed.value.uri.0.join(", "),
                label.pool
            )));
        }
    }
    let progress = Bar::new();
    let done = image::import(&image, &device, &reactors.handles()[0], args.verify, &progress);
    progress.clear();
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

/// A volume that is not there is made as large as the image.
fn import_to_volume(args: &ImportArgs, path: &VolumePath) -> Result<(), Failure> {
    let image = Image::open(&args.image)
        .map_err(|what| Failure::Failed(format!("{}: {what}", args.image.display())))?;
    let at = WhereArgs::offline(&args.config, args.api.clone());
    let offline = Offline::begin(&at, &args.config, Purpose::Change)?;
    let done = offline.with_pool(path.pool.as_str(), |offline, pool| {
        let is_there = |pool: &Pool| pool.volumes().iter().any(|volume| volume.name == path.volume.as_str());
        let made = !is_there(pool);
        if !made
            && !args.force
            && offline.after_death()
            && let Some(user) = offline.user_of(path)
        {
            let what = format!(
                "volume {path} is {user}'s, whose daemon did not end in order: its VM may wait; want --force"
            );
            return Err(Failure::Failed(what));
        }
        if made {
            pool.create_volume(path.volume.as_str(), image.size_bytes().next_multiple_of(VOLUME_UNIT))
                .wait()?;
        }
        let device = pool.device(path.volume.as_str());
        let device = device.ok_or_else(|| Failure::Failed(format!("volume {path} is not there")))?;
        let progress = Bar::new();
        let done = image::import(&image, &device, offline.reactor(), args.verify, &progress);
        progress.clear();
        drop(device);
        done.map_err(|what| {
            let kept = match made {
                // Nothing half-created.
                true => pool.delete_volume(path.volume.as_str()).wait().err(),
                false => None,
            };
            let kept = kept
                .map_or_else(String::new, |error| format!("; it is left, with a part of the image: {error}"));
            Failure::Failed(format!("volume {path}: {what}{kept}"))
        })
    });
    offline.end(done);
    let verified = if args.verify { ", verified" } else { "" };
    say(&format!(
        "{} imported to {path}: {}{verified}\n",
        args.image.display(),
        table::bytes(image.size_bytes())
    ));
    Ok(())
}

/// A volume has whole blocks, of whatever size its pool's are.
const VOLUME_UNIT: u64 = 4096;

/// Ends the process: a reactor that waits for a lost target would keep it.
fn give_up(line: &str) -> ! {
    warn(&format!("hawser: {line}"));
    std::process::exit(1);
}

/// An import writes to what a VM has mounted as gladly as to what nobody uses.
/// Whether there is a daemon that answers.
fn refuse_what_is_in_use(
    daemon: &Client,
    api: &Path,
    placed: &Placed<DeviceConfig>,
) -> Result<bool, Failure> {
    // Whoever does not answer cannot be asked, and a daemon is not needed.
    let Ok(status) = daemon.get::<StatusView>("/v1/status") else { return Ok(false) };
    let devices = status.devices.iter();
    let same = devices.filter(|device| device::are_the_same(&placed.value.uri, &Uris(device.uri.clone())));
    for device in same {
        let disk =
            status.disks.iter().find(|disk| disk.device.as_ref() == Some(&device.name) && !disk.read_only);
        let subsystem = status.subsystems.iter().find(|subsystem| {
            subsystem.namespaces.iter().any(|namespace| namespace.device.as_ref() == Some(&device.name))
        });
        let (user, end) = match (disk, subsystem) {
            (Some(disk), _) => (format!("disk {}", disk.name), "`hawser disk remove` first"),
            (None, Some(subsystem)) => (format!("subsystem {}", subsystem.nqn), "the daemon ended"),
            (None, None) => match &device.pool {
                Some(pool) => (format!("pool {pool}"), "one of its volumes"),
                None => continue,
            },
        };
        return Err(Failure::Failed(format!(
            "device {} ({}) is {user}'s in the daemon at {}, want {end}, or --force",
            placed.value.name,
            placed.value.uri.0.join(", "),
            api.display()
        )));
    }
    Ok(true)
}
