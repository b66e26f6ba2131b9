//! `hawser device reservation report|register|acquire|preempt|release`: names and keys as with nvme-cli's `resv-*`.

use crate::cli::table::{Align, Table};
use crate::cli::{ApiArgs, Failure, print_json, say};
use crate::daemon::api::view::{ChangeReservation, Key, ReservationView};
use clap::{Args, Subcommand};

#[derive(Subcommand)]
pub(super) enum ReservationCommand {
    /// Show who is registered with a device and who has it
    Report(Where),
    /// Register this host, change its key, or end its registration
    Register(RegisterArgs),
    /// Take the reservation, if nobody has it
    Acquire(AcquireArgs),
    /// Take the reservation from the hosts with another key, whose registrations end
    Preempt(PreemptArgs),
    /// Give the reservation back, or end it and all registrations
    Release(ReleaseArgs),
}

#[derive(Args)]
pub(super) struct Where {
    /// The device
    name: String,
    #[command(flatten)]
    api: ApiArgs,
}

#[derive(Args)]
pub(super) struct RegisterArgs {
    #[command(flatten)]
    device: Where,
    /// The key to register
    #[arg(long, value_name = "KEY", required_unless_present = "unregister", conflicts_with = "unregister")]
    nrkey: Option<Key>,
    /// The key that is registered, to be replaced or unregistered
    #[arg(long, value_name = "KEY")]
    crkey: Option<Key>,
    /// Replace whatever key is registered, or unregister it
    #[arg(long)]
    iekey: bool,
    /// End the registration
    #[arg(long)]
    unregister: bool,
    /// Whether registrations and reservation outlive a power loss of the target
    #[arg(long, value_name = "true|false", conflicts_with = "unregister")]
    cptpl: Option<bool>,
}

#[derive(Args)]
pub(super) struct AcquireArgs {
    #[command(flatten)]
    device: Where,
    /// The key that is registered
    #[arg(long, value_name = "KEY")]
    crkey: Key,
    /// 1 to 6 or a word: write-exclusive, exclusive-access, and both with -registrants-only or -all-registrants
    #[arg(long, value_name = "TYPE")]
    rtype: String,
}

#[derive(Args)]
pub(super) struct PreemptArgs {
    #[command(flatten)]
    acquire: AcquireArgs,
    /// The key of the hosts that are preempted; 0: of all others, where all registrants hold it
    #[arg(long, value_name = "KEY")]
    prkey: Key,
    /// Also wait until their commands have ended
    #[arg(long)]
    abort: bool,
}

#[derive(Args)]
pub(super) struct ReleaseArgs {
    #[command(flatten)]
    device: Where,
    /// The key that is registered
    #[arg(long, value_name = "KEY")]
    crkey: Key,
    /// The type that is held, as for `acquire`
    #[arg(long, value_name = "TYPE", required_unless_present = "clear", conflicts_with = "clear")]
    rtype: Option<String>,
    /// End the reservation, whoever has it, and all registrations
    #[arg(long)]
    clear: bool,
}

pub(super) fn run(command: &ReservationCommand) -> Result<(), Failure> {
    let (device, change) = match command {
        ReservationCommand::Report(device) => (device, None),
        ReservationCommand::Register(args) => (&args.device, Some(register(args))),
        ReservationCommand::Acquire(AcquireArgs { device, crkey, rtype }) => {
            (device, Some(ChangeReservation::Acquire { crkey: *crkey, rtype: rtype.clone() }))
        }
        ReservationCommand::Preempt(PreemptArgs { acquire, prkey, abort }) => {
            let AcquireArgs { device, crkey, rtype } = acquire;
            let (crkey, prkey, rtype, abort) = (*crkey, *prkey, rtype.clone(), *abort);
            (device, Some(ChangeReservation::Preempt { crkey, prkey, rtype, abort }))
        }
        ReservationCommand::Release(ReleaseArgs { device, crkey, rtype, .. }) => {
            let change = match rtype {
                Some(rtype) => ChangeReservation::Release { crkey: *crkey, rtype: rtype.clone() },
                None => ChangeReservation::Clear { crkey: *crkey },
            };
            (device, Some(change))
        }
    };
    let (client, path) = (device.api.client(), format!("/v1/devices/{}/reservation", device.name));
    let view: ReservationView = match &change {
        None => client.ask(&path)?,
        Some(change) => client.post(&path, Some(change))?,
    };
    if device.api.json {
        return print_json(&view);
    }
    say(&text_of(&view));
    Ok(())
}

fn register(args: &RegisterArgs) -> ChangeReservation {
    let RegisterArgs { nrkey, crkey, iekey, cptpl, .. } = args;
    match (*nrkey, *crkey, *iekey) {
        (None, crkey, iekey) => ChangeReservation::Unregister { crkey, iekey },
        (Some(nrkey), None, false) => ChangeReservation::Register { nrkey, cptpl: *cptpl },
        (Some(nrkey), crkey, iekey) => ChangeReservation::Replace { nrkey, crkey, iekey, cptpl: *cptpl },
    }
}

fn text_of(view: &ReservationView) -> String {
    let rtype = view.rtype.as_deref().unwrap_or("none");
    let ptpl = if view.ptpl { ", outlives a power loss" } else { "" };
    let mut text = format!("reservation: {rtype}{ptpl}; generation {}\n", view.generation);
    if view.registrants.is_empty() {
        return text;
    }
    let mut table = Table::new(&[("HOSTID", Align::Left), ("RKEY", Align::Right), ("HOLDS", Align::Left)]);
    for registrant in &view.registrants {
        let holds = if registrant.holds { "yes" } else { "no" };
        let key = format!("{:#x}", registrant.rkey.0);
        table.row(vec![registrant.hostid.clone(), key, holds.to_owned()]);
    }
    text.push_str(&table.text());
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::api::view::RegistrantView;

    #[test]
    fn a_report_names_its_hosts() {
        let mut view = ReservationView { generation: 3, rtype: None, ptpl: false, registrants: Vec::new() };
        assert_eq!(text_of(&view), "reservation: none; generation 3\n");
        view.rtype = Some("write-exclusive".to_owned());
        view.ptpl = true;
        view.registrants = vec![RegistrantView { hostid: "u".to_owned(), rkey: Key(0x1a), holds: true }];
        let text = text_of(&view);
        let want = "reservation: write-exclusive, outlives a power loss; generation 3\nHOSTID  RKEY  HOLDS\nu       0x1a  yes\n";
        assert_eq!(text, want);
    }
}
