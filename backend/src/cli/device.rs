//! `hawser device list|discover`

use crate::cli::table::{self, Align, Table};
use crate::cli::{ApiArgs, Failure, print_json};
use crate::daemon::api::view::DeviceView;
use clap::Subcommand;

#[derive(Subcommand)]
pub(super) enum DeviceCommand {
    /// Show all devices
    List(ApiArgs),
}

pub(super) fn run(command: &DeviceCommand) -> Result<(), Failure> {
    match command {
        DeviceCommand::List(api) => {
            let devices: Vec<DeviceView> = api.client().get("/v1/devices")?;
            if api.json {
                return print_json(&devices);
            }
            print_table(&devices);
            Ok(())
        }
    }
}

pub(super) fn print_table(devices: &[DeviceView]) {
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
    table.print();
    for device in devices {
        if let Some(trouble) = &device.trouble {
            println!("device {}: {trouble}", device.name);
        }
    }
}
