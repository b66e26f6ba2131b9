//! `hawser device list|discover|reservation`

use crate::assemble::host;
use crate::cli::reservation::{self, ReservationCommand};
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
    /// Who may write to a device that several hosts share
    #[command(subcommand)]
    Reservation(ReservationCommand),
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
        DeviceCommand::Reservation(command) => reservation::run(command),
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
            if device.paths.len() > 1 { String::new() } else { device.uri.join(" ") },
        ]);
        // The state of a single path is the device's.
        for path in device.paths.iter().filter(|_| device.paths.len() > 1) {
            let ana = path.ana.iter().map(|ana| format!(", {ana}"));
            let state = std::iter::once(path.state.clone()).chain(ana).collect();
            table.row(vec!["  path".to_owned(), state, String::new(), String::new(), path.uri.clone()]);
        }
    }
    let mut text = table.text();
    for device in devices {
        for path in device.paths.iter().filter(|_| device.paths.len() > 1) {
            if let Some(trouble) = &path.trouble {
                text.push_str(&format!("device {}: {}: {trouble}\n", device.name, path.uri));
            }
        }
        if let Some(trouble) = &device.trouble {
            text.push_str(&format!("device {}: {trouble}\n", device.name));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::api::view::{IoView, PathView};
    use std::collections::BTreeMap;

    #[test]
    fn several_paths_are_listed_below_their_device() {
        let path = |host: &str, state: &str, trouble: Option<&str>| PathView {
            uri: format!("nvme+tcp://{host}/nqn.x"),
            state: state.to_owned(),
            ana: (state == "live").then(|| "optimized".to_owned()),
            trouble: trouble.map(str::to_owned),
        };
        let device = |name: &str, paths: Vec<PathView>| DeviceView {
            name: name.to_owned(),
            uri: paths.iter().map(|path| path.uri.clone()).collect(),
            state: "ready".to_owned(),
            trouble: None,
            size_bytes: Some(1 << 30),
            block_size: Some(512),
            uuid: None,
            paths,
            counters: BTreeMap::new(),
            io: IoView {
                requests: BTreeMap::new(),
                bytes: BTreeMap::new(),
                failures: BTreeMap::new(),
                latency_ns: BTreeMap::new(),
            },
        };
        let two = vec![path("a", "live", None), path("b", "connecting", Some("connection refused"))];
        let text = table_of(&[device("two", two), device("one", vec![path("c", "live", None)])]);
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[1], ["two", "ready", "1", "GiB", "512"]);
        assert_eq!(lines[2], ["path", "live,", "optimized", "nvme+tcp://a/nqn.x"]);
        assert_eq!(lines[3], ["path", "connecting", "nvme+tcp://b/nqn.x"]);
        assert_eq!(lines[4], ["one", "ready", "1", "GiB", "512", "nvme+tcp://c/nqn.x"]);
        assert!(text.ends_with("device two: nvme+tcp://b/nqn.x: connection refused\n"), "{text}");
    }
}
