//! `hawser disk list|add|remove|resume`

use crate::cli::table::{self, Align, Table};
use crate::cli::{ApiArgs, Failure, print_json, say};
use crate::daemon::api::view::{AddDisk, DiskView};
use clap::{Args, Subcommand};
use hawser_config::DiskConfig;
use hawser_config::value::{Name, Serial, SocketMode, SocketPath, VolumePath};
use std::path::PathBuf;

#[derive(Subcommand)]
pub(super) enum DiskCommand {
    /// Show all disks
    List(ApiArgs),
    /// Offer a device or volume to a VM
    Add(AddArgs),
    /// End a disk's session and remove its socket
    Remove(RemoveArgs),
    /// Return a disk that was set aside after crashes
    Resume(ResumeArgs),
}

#[derive(Args)]
pub(super) struct AddArgs {
    /// The new disk's name
    name: Name,
    /// The device behind it, by its name in the configuration
    #[arg(long, value_name = "DEV", required_unless_present = "volume", conflicts_with = "volume")]
    device: Option<Name>,
    /// The volume behind it, instead of a device
    #[arg(long, value_name = "POOL/VOLUME")]
    volume: Option<VolumePath>,
    /// The vhost-user socket to listen at
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// The socket's permissions, such as 0660
    #[arg(long, value_name = "MODE")]
    socket_mode: Option<SocketMode>,
    /// The socket's owner
    #[arg(long, value_name = "USER")]
    socket_user: Option<String>,
    /// The socket's group
    #[arg(long, value_name = "GROUP")]
    socket_group: Option<String>,
    /// What the guest sees as serial number, at most 20 bytes [default: the name]
    #[arg(long, value_name = "S")]
    serial: Option<Serial>,
    /// The most queues that the VM may use
    #[arg(long, value_name = "N", default_value_t = 1)]
    queues: u16,
    /// The VM may not write
    #[arg(long)]
    read_only: bool,
    /// Other disks of the device or volume may write too: the VMs know how to share it
    #[arg(long)]
    shared: bool,
    /// Keep it in conf.d for the next start
    #[arg(long)]
    save: bool,
    #[command(flatten)]
    api: ApiArgs,
}

#[derive(Args)]
pub(super) struct RemoveArgs {
    /// The disk
    name: Name,
    /// Remove it from conf.d too
    #[arg(long)]
    save: bool,
    #[command(flatten)]
    api: ApiArgs,
}

#[derive(Args)]
pub(super) struct ResumeArgs {
    /// The disk
    name: Name,
    #[command(flatten)]
    api: ApiArgs,
}

pub(super) fn run(command: &DiskCommand) -> Result<(), Failure> {
    match command {
        DiskCommand::List(api) => {
            let disks: Vec<DiskView> = api.client().get("/v1/disks")?;
            if api.json {
                return print_json(&disks);
            }
            say(&table_of(&disks));
            Ok(())
        }
        DiskCommand::Add(args) => {
            let disk = args.api.client().post("/v1/disks", Some(&args.body()?))?;
            show(&args.api, &disk, "added")
        }
        DiskCommand::Remove(args) => {
            let disk = args.api.client().delete(&format!("/v1/disks/{}?save={}", args.name, args.save))?;
            show(&args.api, &disk, "removed")
        }
        DiskCommand::Resume(args) => {
            let path = format!("/v1/disks/{}/resume", args.name);
            let disk = args.api.client().post(&path, None::<&AddDisk>)?;
            show(&args.api, &disk, "resumed")
        }
    }
}

impl AddArgs {
    fn body(&self) -> Result<AddDisk, Failure> {
        // The daemon has another working directory than we.
        let socket = std::path::absolute(&self.socket)
            .map_err(|error| Failure::Usage(format!("--socket {}: {error}", self.socket.display())))?;
        let socket: SocketPath =
            socket.to_string_lossy().parse().map_err(|what| Failure::Usage(format!("--socket: {what}")))?;
        let disk = DiskConfig {
            name: self.name.clone(),
            device: self.device.clone(),
            volume: self.volume.clone(),
            socket,
            socket_mode: self.socket_mode,
            socket_user: self.socket_user.clone(),
            socket_group: self.socket_group.clone(),
            serial: self.serial.clone(),
            queues: self.queues,
            read_only: self.read_only,
            shared: self.shared,
        };
        Ok(AddDisk { disk, save: self.save })
    }
}

fn show(api: &ApiArgs, disk: &DiskView, what: &str) -> Result<(), Failure> {
    if api.json {
        return print_json(disk);
    }
    say(&format!("disk {} {what}\n", disk.name));
    Ok(())
}

pub(super) fn table_of(disks: &[DiskView]) -> String {
    let mut table = Table::new(&[
        ("DISK", Align::Left),
        ("DEVICE", Align::Left),
        ("STATE", Align::Left),
        ("SIZE", Align::Right),
        ("QUEUES", Align::Right),
        ("READS", Align::Right),
        ("P99", Align::Right),
        ("WRITES", Align::Right),
        ("P99", Align::Right),
        ("ERRORS", Align::Right),
        ("SOCKET", Align::Left),
    ]);
    for disk in disks {
        let io = &disk.io;
        let requests =
            |kind: &str| io.requests.get(kind).map_or("-".to_owned(), |count| table::count(*count));
        let p99 = |kind: &str| {
            io.latency_ns.get(kind).map_or("-".to_owned(), |latency| table::duration_ns(latency.p99))
        };
        table.row(vec![
            disk.name.clone(),
            disk.backing().to_owned(),
            match disk.front_ends.len() {
                0 | 1 => disk.state.name().to_owned(),
                count => format!("{} by {count}", disk.state.name()),
            },
            disk.size_bytes.map_or("-".to_owned(), table::bytes),
            disk.queues.to_string(),
            requests("read"),
            p99("read"),
            requests("write"),
            p99("write"),
            table::count(io.failures.values().sum()),
            disk.socket.clone(),
        ]);
    }
    let mut text = table.text();
    for disk in disks {
        if let Some(trouble) = &disk.trouble {
            text.push_str(&format!("disk {}: {trouble}\n", disk.name));
        }
    }
    text
}
