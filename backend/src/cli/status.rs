//! `hawser status`

use crate::cli::table::{self, Align, Table};
use crate::cli::{ApiArgs, Failure, device, disk, pool_show, print_json, say, volume};
use crate::daemon::api::view::{StatusView, SubsystemView};
use clap::Args;

#[derive(Args)]
pub(super) struct StatusArgs {
    #[command(flatten)]
    api: ApiArgs,
}

pub(super) fn run(args: &StatusArgs) -> Result<(), Failure> {
    let status: StatusView = args.api.client().get("/v1/status")?;
    if args.api.json {
        return print_json(&status);
    }
    let mut text = format!(
        "hawser {}, build {}, pid {}, up {}{}\n\n",
        status.version,
        status.build_id,
        status.pid,
        table::duration_seconds(status.uptime_seconds),
        if status.crashes == 0 { String::new() } else { format!(", {} crashes before", status.crashes) }
    );
    let mut reactors = Table::new(&[
        ("REACTOR", Align::Right),
        ("CPU", Align::Right),
        ("PASSES", Align::Right),
        ("BUSY", Align::Right),
        ("SLEEPS", Align::Right),
    ]);
    for (index, reactor) in status.reactors.iter().enumerate() {
        reactors.row(vec![
            index.to_string(),
            reactor.cpu.map_or("-".to_owned(), |cpu| cpu.to_string()),
            table::count(reactor.passes),
            table::count(reactor.busy_passes),
            table::count(reactor.sleeps),
        ]);
    }
    text.push_str(&reactors.text());
    if !status.disks.is_empty() {
        text.push('\n');
        text.push_str(&disk::table_of(&status.disks));
    }
    if !status.pools.is_empty() {
        text.push('\n');
        text.push_str(&pool_show::table_of(&status.pools));
    }
    if !status.volumes.is_empty() {
        text.push('\n');
        text.push_str(&volume::table_of(&status.volumes));
        text.push_str(&volume::slow_lines(&status.volumes));
    }
    if !status.devices.is_empty() {
        text.push('\n');
        text.push_str(&device::table_of(&status.devices));
    }
    if !status.subsystems.is_empty() {
        text.push('\n');
        text.push_str(&subsystems(&status.subsystems));
    }
    say(&text);
    Ok(())
}

fn subsystems(subsystems: &[SubsystemView]) -> String {
    let mut table =
        Table::new(&[("SUBSYSTEM", Align::Left), ("LISTEN", Align::Left), ("NAMESPACES", Align::Left)]);
    for subsystem in subsystems {
        let namespaces: Vec<String> = subsystem
            .namespaces
            .iter()
            .map(|namespace| format!("{}:{}", namespace.nsid, namespace.backing()))
            .collect();
        table.row(vec![subsystem.nqn.clone(), subsystem.listen.join(" "), namespaces.join(" ")]);
    }
    table.text()
}
