//! `hawser device list|discover`

use crate::assemble::host;
use crate::cli::table::{self, Align, Table};
use crate::cli::{ApiArgs, Failure, print_json, say};
use crate::daemon::api::view::DeviceView;
use clap::{Args, Subcommand};
use hawser_config::DaemonConfig;
use hawser_fabric::initiator::{self, HostIdentity};
use hawser_fabric::nvme::discovery::{self, TransportType};
use hawser_fabric::uri::TcpAddress;
use serde::Serialize;

#[derive(Subcommand)]
pub(super) enum DeviceCommand {
    /// Show all devices
    List(ApiArgs),
    /// Ask a discovery service what it offers
    Discover(DiscoverArgs),
}

#[derive(Args)]
pub(super) struct DiscoverArgs {
    /// Where it listens: tcp://HOST:PORT (port 8009 if not said)
    address: String,
    /// Print JSON for scripts instead of a table for people
    #[arg(long)]
    json: bool,
}

/// One thing that a discovery service knows, as `--json` shows it.
#[derive(Serialize)]
struct Offer {
    kind: &'static str,
    transport: String,
    address: String,
    port: String,
    nqn: String,
}

pub(super) fn run(command: &DeviceCommand) -> Result<(), Failure> {
    match command {
        DeviceCommand::List(api) => {
            let devices: Vec<DeviceView> = api.client().get("/v1/devices")?;
            if api.json {
                return print_json(&devices);
            }
            say(&table_of(&devices));
            Ok(())
        }
        DeviceCommand::Discover(args) => discover(args),
    }
}

fn discover(args: &DiscoverArgs) -> Result<(), Failure> {
    let address = TcpAddress::parse_discovery(&args.address).map_err(Failure::Usage)?;
    let host = host::passing(&DaemonConfig::default().state_dir).map_err(Failure::Failed)?;
    let host = HostIdentity { nqn: host.nqn.to_string(), id: host.id.0 };
    let offers: Vec<Offer> = initiator::discover(&address, &host)
        .map_err(Failure::Failed)?
        .into_iter()
        .map(|entry| Offer {
            kind: match entry.subtype {
                discovery::SUBTYPE_REFERRAL => "referral",
                discovery::SUBTYPE_NVM => "subsystem",
                discovery::SUBTYPE_CURRENT => "this service",
                _ => "unknown",
            },
            transport: match entry.transport {
                TransportType::TCP => "tcp".to_owned(),
                TransportType::RDMA => "rdma".to_owned(),
                TransportType(other) => other.to_string(),
            },
            address: entry.address,
            port: entry.service,
            nqn: entry.subsystem_nqn,
        })
        .collect();
    if args.json {
        return print_json(&offers);
    }
    let columns = ["KIND", "TRANSPORT", "ADDRESS", "PORT", "NQN"].map(|name| (name, Align::Left));
    let mut table = Table::new(&columns);
    for offer in offers {
        table.row(vec![offer.kind.to_owned(), offer.transport, offer.address, offer.port, offer.nqn]);
    }
    say(&table.text());
    Ok(())
}

pub(super) fn table_of(devices: &[DeviceView]) -> String {
    let mut table = Table::new(&[
        ("DEVICE", Align::Left),
        ("STATE", Align::Left),
        ("SIZE", Align::Right),
        ("BLOCK", Align::Right),
        ("URI", Align::Left),
    ]);
    for device in devices {
        table.row(vec![
            device.name.clone(),
            device.state.clone(),
            device.size_bytes.map_or("-".to_owned(), table::bytes),
            device.block_size.map_or("-".to_owned(), |bytes| bytes.to_string()),
            device.uri.join(" "),
        ]);
    }
    let mut text = table.text();
    for device in devices {
        if let Some(trouble) = &device.trouble {
            text.push_str(&format!("device {}: {trouble}\n", device.name));
        }
    }
    text
}
