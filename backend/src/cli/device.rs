//! `hawser device list|discover|reservation`

use crate::assemble::host;
use crate::cli::reservation::{self, ReservationCommand};
use crate::cli::table::{self, Align, Table};
use crate::cli::{ApiArgs, Failure, print_json, say};
use crate::daemon::api::view::{DeviceView, IoView, SetDevice};
use clap::{Args, Subcommand};
use hawser_config::DaemonConfig;
use hawser_config::value::Name;
use hawser_fabric::initiator::{self, HostIdentity};
use hawser_fabric::nvme::discovery::{self, TransportType};
use hawser_fabric::uri::TcpAddress;
use serde::Serialize;

#[derive(Subcommand)]
pub(super) enum DeviceCommand {
    /// Show all devices
    List(ApiArgs),
    /// Show all that is known of one device and its paths
    Show(ShowArgs),
    /// Change a device of the running daemon, until that ends
    Set(SetArgs),
    /// Ask a discovery service what it offers
    Discover(DiscoverArgs),
    /// Who may write to a device that several hosts share
    #[command(subcommand)]
    Reservation(ReservationCommand),
}

#[derive(Args)]
pub(super) struct ShowArgs {
    /// The device
    name: Name,
    #[command(flatten)]
    api: ApiArgs,
}

#[derive(Args)]
pub(super) struct SetArgs {
    /// The device
    name: Name,
    /// Which of several good paths is taken: numa, round-robin or queue-depth
    #[arg(long, value_name = "POLICY")]
    io_policy: String,
    #[command(flatten)]
    api: ApiArgs,
}

#[derive(Args)]
pub(super) struct DiscoverArgs {
    /// Where it listens: tcp://HOST:PORT (port 8009 if not said), or rdma://HOST:PORT (4420)
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
        DeviceCommand::Show(args) => {
            let device: DeviceView = args.api.client().get(&format!("/v1/devices/{}", args.name))?;
            if args.api.json {
                return print_json(&device);
            }
            say(&super::device_show::text_of(&device));
            Ok(())
        }
        DeviceCommand::Set(args) => {
            let body = SetDevice { io_policy: args.io_policy.clone() };
            let device: DeviceView = args.api.client().patch(&format!("/v1/devices/{}", args.name), &body)?;
            if args.api.json {
                return print_json(&device);
            }
            say(&format!("device {}: io_policy {}\n", device.name, args.io_policy));
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

fn requests(io: &IoView, kind: &str) -> String {
    io.requests.get(kind).map_or("-".to_owned(), |count| table::count(*count))
}

/// That of reads or of writes, whichever is longer.
fn p99(io: &IoView) -> String {
    let of = |kind: &str| io.latency_ns.get(kind).map_or(0, |latency| latency.p99);
    table::duration_ns(of("read").max(of("write")))
}

pub(super) fn table_of(devices: &[DeviceView]) -> String {
    let mut table = Table::new(&[
        ("DEVICE", Align::Left),
        ("STATE", Align::Left),
        ("SIZE", Align::Right),
        ("BLOCK", Align::Right),
        ("READS", Align::Right),
        ("WRITES", Align::Right),
        ("P99", Align::Right),
        ("LOST", Align::Right),
        ("URI", Align::Left),
    ]);
    for device in devices {
        table.row(vec![
            device.name.clone(),
            device.state.clone(),
            device.size_bytes.map_or("-".to_owned(), table::bytes),
            device.block_size.map_or("-".to_owned(), |bytes| bytes.to_string()),
            requests(&device.io, "read"),
            requests(&device.io, "write"),
            p99(&device.io),
            table::count(device.paths.iter().flat_map(|path| path.losses.values()).sum()),
            if device.paths.len() > 1 { String::new() } else { device.uri.join(" ") },
        ]);
        // The state of a single path is the device's.
        for path in device.paths.iter().filter(|_| device.paths.len() > 1) {
            table.row(vec![
                "  path".to_owned(),
                super::device_show::state_of(path),
                String::new(),
                String::new(),
                requests(&path.io, "read"),
                requests(&path.io, "write"),
                p99(&path.io),
                table::count(path.losses.values().sum()),
                path.uri.clone(),
            ]);
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
    use crate::cli::device_show::text_of;
    use crate::daemon::api::view::{LatencyView, PathView};
    use std::collections::BTreeMap;

    fn io(reads: u64, p99: u64) -> IoView {
        let latency = LatencyView { p50: p99 / 2, p99, p999: p99 * 2, count: reads };
        IoView {
            requests: [("read".to_owned(), reads), ("write".to_owned(), 0)].into(),
            bytes: [("read".to_owned(), reads * 4096), ("write".to_owned(), 0)].into(),
            failures: [("media".to_owned(), 0), ("path".to_owned(), reads / 4)].into(),
            latency_ns: [("read".to_owned(), latency), ("write".to_owned(), LatencyView::default())].into(),
        }
    }

    fn path(host: &str, state: &str, trouble: Option<&str>) -> PathView {
        PathView {
            uri: format!("nvme+tcp://{host}/nqn.x"),
            state: state.to_owned(),
            ana: (state == "live").then(|| "optimized".to_owned()),
            trouble: trouble.map(str::to_owned),
            counters: [("connects".to_owned(), 2), ("retries".to_owned(), 0)].into(),
            losses: [("keep_alive".to_owned(), 1), ("closed".to_owned(), 0)].into(),
            state_seconds: [("live".to_owned(), 61), ("failed".to_owned(), 0)].into(),
            io: io(8, 85_000),
        }
    }

    fn device(name: &str, paths: Vec<PathView>) -> DeviceView {
        DeviceView {
            name: name.to_owned(),
            uri: paths.iter().map(|path| path.uri.clone()).collect(),
            state: "ready".to_owned(),
            trouble: None,
            size_bytes: Some(1 << 30),
            block_size: Some(512),
            pool: None,
            uuid: None,
            paths,
            settings: [("io_policy".to_owned(), "numa".to_owned())].into(),
            counters: BTreeMap::new(),
            copied_bytes: [("small_read".to_owned(), 4096), ("digest_read".to_owned(), 0)].into(),
            io: io(16, 90_000),
        }
    }

    #[test]
    fn several_paths_are_listed_below_their_device() {
        let two = vec![path("a", "live", None), path("b", "connecting", Some("connection refused"))];
        let text = table_of(&[device("two", two), device("one", vec![path("c", "live", None)])]);
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[1], ["two", "ready", "1", "GiB", "512", "16", "0", "90", "us", "2"]);
        let numbers = ["8", "0", "85", "us", "1"];
        assert_eq!(
            lines[2],
            [&["path", "live,", "optimized"], &numbers[..], &["nvme+tcp://a/nqn.x"]].concat()
        );
        assert_eq!(lines[3], [&["path", "connecting"], &numbers[..], &["nvme+tcp://b/nqn.x"]].concat());
        assert!(lines[4].starts_with(&["one", "ready"]) && lines[4].ends_with(&["1", "nvme+tcp://c/nqn.x"]));
        assert!(text.ends_with("device two: nvme+tcp://b/nqn.x: connection refused\n"), "{text}");
    }

    #[test]
    fn one_device_is_shown_without_what_is_zero() {
        let text = text_of(&device("two", vec![path("b", "connecting", Some("connection refused"))]));
        let want = "device two: ready, 1 GiB in blocks of 512 bytes
  settings: io_policy = numa
  copied: small_read 4 KiB
  KIND  REQUESTS   BYTES    P50    P99   P99.9
  read        16  64 KiB  45 us  90 us  180 us
  failed: path 4

path nvme+tcp://b/nqn.x: connecting
  trouble: connection refused
  was: live 1 min 1 s
  counted: connects 2
  lost by: keep_alive 1
  KIND  REQUESTS   BYTES      P50    P99   P99.9
  read         8  32 KiB  42.5 us  85 us  170 us
  failed: path 2
";
        assert_eq!(text, want);
    }
}
