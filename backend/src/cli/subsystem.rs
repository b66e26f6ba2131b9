//! `hawser subsystem list|ana|host`: the target's side of a daemon.

use crate::cli::table::{Align, Table};
use crate::cli::{ApiArgs, Failure, print_json, say};
use crate::daemon::api::view::{SetAnaState, SubsystemView};
use clap::{Args, Subcommand};

#[derive(Subcommand)]
pub(super) enum SubsystemCommand {
    /// Show all subsystems: addresses with their ANA states, namespaces, hosts
    List(ApiArgs),
    /// Set how well the namespaces can be reached at an address; hosts that came in there are told
    Ana(AnaArgs),
    /// Who may connect, where `allowed_hosts` names them
    #[command(subcommand)]
    Host(HostCommand),
}

#[derive(Subcommand)]
pub(super) enum HostCommand {
    /// Let a host connect, until the next start: then the configuration counts again
    Add(HostArgs),
    /// Let a host connect no more, and end its associations, until the next start
    Remove(HostArgs),
}

#[derive(Args)]
pub(super) struct HostArgs {
    /// The subsystem
    nqn: String,
    /// The host's NQN
    host: String,
    #[command(flatten)]
    api: ApiArgs,
}

#[derive(Args)]
pub(super) struct AnaArgs {
    /// The subsystem
    nqn: String,
    /// optimized, non-optimized, inaccessible, persistent-loss or change
    state: String,
    /// The address, as `hawser subsystem list` shows it; all of them if not said
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<String>,
    /// The ANA group; all of them if not said
    #[arg(long, value_name = "NUMBER")]
    group: Option<u32>,
    #[command(flatten)]
    api: ApiArgs,
}

pub(super) fn run(command: &SubsystemCommand) -> Result<(), Failure> {
    match command {
        SubsystemCommand::List(api) => {
            let subsystems: Vec<SubsystemView> = api.client().get("/v1/subsystems")?;
            if api.json {
                return print_json(&subsystems);
            }
            say(&text_of(&subsystems));
            Ok(())
        }
        SubsystemCommand::Ana(args) => set_ana(args),
        SubsystemCommand::Host(command) => {
            let (HostCommand::Add(args) | HostCommand::Remove(args)) = command;
            let HostArgs { nqn, host, api } = args;
            let path = format!("/v1/subsystems/{nqn}/hosts/{host}");
            let subsystem: SubsystemView = match command {
                HostCommand::Add(_) => api.client().put(&path, None::<&()>)?,
                HostCommand::Remove(_) => api.client().delete(&path)?,
            };
            if api.json {
                return print_json(&subsystem);
            }
            say(&text_of(&[subsystem]));
            Ok(())
        }
    }
}

/// One of a daemon's subsystems.
fn find(api: &ApiArgs, nqn: &str) -> Result<SubsystemView, Failure> {
    let subsystems: Vec<SubsystemView> = api.client().get("/v1/subsystems")?;
    let names = subsystems.iter().map(|subsystem| subsystem.nqn.as_str()).collect::<Vec<_>>().join(", ");
    let found = subsystems.iter().find(|subsystem| subsystem.nqn == nqn).cloned();
    found.ok_or_else(|| match names.as_str() {
        "" => Failure::Failed(format!("there is no subsystem {nqn}; there is none")),
        _ => Failure::Failed(format!("there is no subsystem {nqn}; there are {names}")),
    })
}

fn set_ana(args: &AnaArgs) -> Result<(), Failure> {
    let AnaArgs { nqn, state, listen, group, api } = args;
    let mut subsystem = find(api, nqn)?;
    let is_meant = |address: &str| listen.as_ref().is_none_or(|listen| listen == address);
    if !subsystem.listen.iter().any(|address| is_meant(address)) {
        let addresses = subsystem.listen.join(", ");
        let listen = listen.as_deref().unwrap_or_default();
        return Err(Failure::Failed(format!("{nqn} is not reached at {listen}; want one of {addresses}")));
    }
    let ports: Vec<_> =
        subsystem.ports.drain(..).enumerate().filter(|(_, port)| is_meant(&port.listen)).collect();
    for (index, port) in ports {
        let groups = port.ana_groups.iter().map(|group| group.grpid);
        for grpid in
            groups.filter(|grpid| group.is_none_or(|group| group == *grpid)).chain(unknown(&port, *group))
        {
            let path = format!("/v1/subsystems/{nqn}/ports/{index}/ana_groups/{grpid}");
            subsystem = api.client().put(&path, Some(&SetAnaState { ana_state: state.clone() }))?;
        }
    }
    if api.json {
        return print_json(&subsystem);
    }
    say(&text_of(&[subsystem]));
    Ok(())
}

/// A group that is not there: the daemon says so.
fn unknown(port: &crate::daemon::api::view::PortView, group: Option<u32>) -> Option<u32> {
    group.filter(|group| port.ana_groups.iter().all(|there| there.grpid != *group))
}

fn text_of(subsystems: &[SubsystemView]) -> String {
    let mut text = String::new();
    for subsystem in subsystems {
        text.push_str(&format!("{}\n", subsystem.nqn));
        let mut table = Table::new(&[("  ", Align::Left), ("", Align::Left)]);
        for port in &subsystem.ports {
            let states = match port.ana_groups.as_slice() {
                [one] => one.ana_state.clone(),
                groups => {
                    let each =
                        groups.iter().map(|group| format!("group {}: {}", group.grpid, group.ana_state));
                    each.collect::<Vec<_>>().join(", ")
                }
            };
            table.row(vec!["  listen".to_owned(), format!("{}, {states}", port.listen)]);
        }
        for namespace in &subsystem.namespaces {
            table.row(vec!["  namespace".to_owned(), format!("{}: {}", namespace.nsid, namespace.backing())]);
        }
        let allowed = match &subsystem.allowed_hosts {
            None => "any".to_owned(),
            Some(hosts) if hosts.is_empty() => "none".to_owned(),
            Some(hosts) => hosts.join(", "),
        };
        table.row(vec!["  allowed hosts".to_owned(), allowed]);
        let mut hosts: Vec<(&String, usize)> = Vec::new();
        for host in &subsystem.hosts {
            match hosts.iter_mut().find(|(name, _)| *name == host) {
                Some((_, count)) => *count += 1,
                None => hosts.push((host, 1)),
            }
        }
        for (host, count) in hosts {
            let times = if count > 1 { format!(", {count} times") } else { String::new() };
            table.row(vec!["  connected".to_owned(), format!("{host}{times}")]);
        }
        // Without the header, which says nothing.
        text.extend(table.text().lines().skip(1).map(|line| format!("{line}\n")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::api::view::{AnaGroupView, NamespaceView, PortView};

    #[test]
    fn a_subsystem_is_a_name_and_what_belongs_to_it() {
        let group = |grpid, state: &str| AnaGroupView { grpid, ana_state: state.to_owned() };
        let port = |listen: &str, ana_groups| PortView { listen: listen.to_owned(), ana_groups };
        let view = SubsystemView {
            nqn: "nqn.a".to_owned(),
            listen: vec!["tcp://a:1".to_owned(), "tcp://b:1".to_owned()],
            ports: vec![
                port("tcp://a:1", vec![group(1, "optimized")]),
                port("tcp://b:1", vec![group(1, "change"), group(2, "inaccessible")]),
            ],
            allowed_hosts: Some(vec!["nqn.h".to_owned(), "nqn.i".to_owned()]),
            hosts: vec!["nqn.h".to_owned(), "nqn.h".to_owned()],
            namespaces: vec![NamespaceView { nsid: 1, device: Some("d".to_owned()), volume: None }],
        };
        let want = "nqn.a\n\
                    \x20 listen         tcp://a:1, optimized\n\
                    \x20 listen         tcp://b:1, group 1: change, group 2: inaccessible\n\
                    \x20 namespace      1: d\n\
                    \x20 allowed hosts  nqn.h, nqn.i\n\
                    \x20 connected      nqn.h, 2 times\n";
        assert_eq!(text_of(&[view]), want);
    }
}
