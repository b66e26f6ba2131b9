//! What may be changed while a target runs: which hosts may connect, how well namespaces can be reached where, whom discovery
//! points to.

use super::Target;
use super::driver::{self, Driver};
use crate::nvme::ana::AnaState;
use crate::nvme::features::EVENT_ANA_CHANGE;
use std::net::SocketAddr;

impl Target {
    /// Other discovery services that ours points to. Hosts that stay connected to it (persistent discovery) are told.
    pub fn set_referrals(&self, referrals: Vec<SocketAddr>) {
        *self.shared.referrals() = referrals;
        self.tell_discovery();
    }

    /// What [`Target::set_referrals`] was told.
    #[must_use]
    pub fn referrals(&self) -> Vec<SocketAddr> {
        self.shared.referrals().clone()
    }

    /// The hosts that may connect to a subsystem; `None`: any, or there is no such subsystem.
    #[must_use]
    pub fn allowed_hosts(&self, nqn: &str) -> Option<Vec<String>> {
        self.subsystem(nqn).and_then(|subsystem| subsystem.allowed_hosts())
    }

    /// Lets a host connect to a subsystem that names its hosts, from now on. False when it may already, or any may.
    #[must_use]
    pub fn allow_host(&self, nqn: &str, host: &str) -> bool {
        let allowed = self.subsystem(nqn).is_some_and(|subsystem| subsystem.allow(host));
        if allowed {
            log::info!("{nqn}: {host} may connect from now on");
            self.tell_discovery();
        }
        allowed
    }

    /// Lets a host connect to a subsystem no more, and ends its associations. False when it was not named.
    #[must_use]
    pub fn forbid_host(&self, nqn: &str, host: &str) -> bool {
        let Some(connections) = self.subsystem(nqn).and_then(|subsystem| subsystem.forbid(host)) else {
            return false;
        };
        log::info!("{nqn}: {host} may not connect any more; it has {} connections", connections.len());
        for connection in connections {
            driver::tell(&connection, |driver, runtime| {
                driver.end(runtime, "its host is not allowed any more");
            });
        }
        self.tell_discovery();
        true
    }

    /// What the discovery log says may have changed.
    fn tell_discovery(&self) {
        for connection in self.shared.connection_refs() {
            driver::tell(&connection, Driver::discovery_changed);
        }
    }

    /// The ANA groups at each of a subsystem's addresses, in the order of [`Target::addresses`], with their states.
    #[must_use]
    pub fn ana_groups(&self, nqn: &str) -> Vec<Vec<(u32, AnaState)>> {
        let ports = self.subsystem(nqn).map_or(&[][..], |subsystem| &subsystem.ports);
        ports.iter().map(|port| port.groups.iter().map(|group| (group.id, group.state())).collect()).collect()
    }

    /// Sets the ANA state of all groups at one of a subsystem's addresses, counted from 0, and tells the hosts that came in
    /// there. False when there is no such subsystem or address.
    #[must_use]
    pub fn set_ana_state(&self, nqn: &str, port: usize, state: AnaState) -> bool {
        let groups = self.ana_groups(nqn).into_iter().nth(port).unwrap_or_default();
        let set = |(group, _): &(u32, AnaState)| self.set_ana_group_state(nqn, port, *group, state);
        !groups.is_empty() && groups.iter().all(set)
    }

    /// The same for one group. False when there is no such one.
    #[must_use]
    pub fn set_ana_group_state(&self, nqn: &str, port: usize, group: u32, state: AnaState) -> bool {
        let port = self.subsystem(nqn).and_then(|it| Some((it, it.ports.get(port)?)));
        let Some((subsystem, port, group)) = port.and_then(|(it, port)| Some((it, port, port.group(group)?)))
        else {
            return false;
        };
        log::info!("{nqn}: group {} is {state} at {} now", group.id, port.address);
        for admin in subsystem.set_ana_state(port, group, state) {
            driver::tell(&admin, |driver, runtime| driver.notify(runtime, EVENT_ANA_CHANGE));
        }
        true
    }
}
