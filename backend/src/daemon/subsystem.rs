//! The running target: what it shows, and what can be changed while it runs.

use super::api::view::SubsystemView;
use super::{ChangeError, Daemon};
use crate::assemble::{ana, target as assemble_target};
use hawser_config::DiscoveryConfig;
use hawser_config::value::{Nqn, Referral};
use hawser_fabric::nvme::ana::AnaState;
use hawser_fabric::target::{AnaSetting, Target};
use std::sync::PoisonError;

impl Daemon {
    /// All subsystems.
    #[must_use]
    pub fn subsystem_views(&self) -> Vec<SubsystemView> {
        let target = self.target.lock().unwrap_or_else(PoisonError::into_inner);
        target.as_ref().map_or_else(Vec::new, |target| assemble_target::views(&self.config, target))
    }

    /// Sets how well a subsystem's namespaces can be reached at one of its addresses, and tells its hosts.
    ///
    /// # Errors
    /// When there is no such subsystem, address or group, or no such state.
    pub fn set_ana_state(
        &self,
        nqn: &str,
        port: &str,
        grpid: &str,
        state: &str,
    ) -> Result<SubsystemView, ChangeError> {
        let state: AnaState = state.parse().map_err(ChangeError::Wrong)?;
        let _one = self.ana_changes.lock().unwrap_or_else(PoisonError::into_inner);
        // Once: of a target that stops there are none, and a file written from that would forget every state.
        let views = self.subsystem_views();
        let before = views.iter().find(|view| view.nqn == nqn);
        let before = before.ok_or_else(|| ChangeError::Unknown(format!("there is no subsystem {nqn}")))?;
        let index =
            port.parse().ok().filter(|index: &usize| *index < before.ports.len()).ok_or_else(|| {
                let last = before.ports.len() - 1;
                ChangeError::Unknown(format!("{nqn} has no port {port}, want one from 0 to {last}"))
            })?;
        let there = &before.ports[index].ana_groups;
        let group = grpid.parse().ok().filter(|group: &u32| there.iter().any(|it| it.grpid == *group));
        let group = group.ok_or_else(|| {
            let groups = there.iter().map(|group| group.grpid.to_string()).collect::<Vec<_>>().join(", ");
            ChangeError::Unknown(format!("{nqn} has no ANA group {grpid}, want one of {groups}"))
        })?;
        let setting = AnaSetting { nqn: nqn.to_owned(), port: index, group, state };
        ana::write(&self.config, &views, &setting).map_err(ChangeError::Failed)?;
        let target = self.target.lock().unwrap_or_else(PoisonError::into_inner);
        if !target.as_ref().is_some_and(|target| target.set_ana_group_state(nqn, index, group, state)) {
            return Err(ChangeError::Failed("the target stops".to_owned()));
        }
        drop(target);
        let view = self.subsystem_views().into_iter().find(|view| view.nqn == nqn);
        view.ok_or_else(|| ChangeError::Failed("the target stops".to_owned()))
    }

    /// Lets a host connect to a subsystem from now on, or no more, until the next start: then the configuration counts again.
    ///
    /// # Errors
    /// When there is no such subsystem, or it lets any host in, or it is so already.
    pub fn set_allowed(&self, nqn: &str, host: &str, allowed: bool) -> Result<SubsystemView, ChangeError> {
        let host: Nqn = host.parse().map_err(|what: String| ChangeError::Wrong(format!("host: {what}")))?;
        let view = || self.subsystem_views().into_iter().find(|view| view.nqn == nqn);
        let before = view().ok_or_else(|| ChangeError::Unknown(format!("there is no subsystem {nqn}")))?;
        if before.allowed_hosts.is_none() {
            let what = format!("{nqn} lets any host in, want allowed_hosts in its [[subsystem]]");
            return Err(ChangeError::Conflict(what));
        }
        let target = self.target.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = target.as_ref().is_some_and(|target| match allowed {
            true => target.allow_host(nqn, host.as_str()),
            false => target.forbid_host(nqn, host.as_str()),
        });
        drop(target);
        match (changed, allowed) {
            (true, _) => view().ok_or_else(|| ChangeError::Failed("the target stops".to_owned())),
            (false, true) => Err(ChangeError::Conflict(format!("{host} may connect to {nqn} already"))),
            (false, false) => Err(ChangeError::Unknown(format!("{host} is not among {nqn}'s allowed hosts"))),
        }
    }

    /// Other discovery services that ours points to.
    #[must_use]
    pub fn discovery(&self) -> DiscoveryConfig {
        let target = self.target.lock().unwrap_or_else(PoisonError::into_inner);
        let referrals = target.as_ref().map_or_else(Vec::new, Target::referrals);
        DiscoveryConfig { referrals: referrals.into_iter().map(Referral).collect() }
    }

    /// Points to other discovery services from now on, and tells the hosts that stay connected to ours.
    ///
    /// # Errors
    /// When there is no subsystem, and so nobody who could be told.
    pub fn set_discovery(&self, discovery: &DiscoveryConfig) -> Result<DiscoveryConfig, ChangeError> {
        {
            let target = self.target.lock().unwrap_or_else(PoisonError::into_inner);
            let target = target.as_ref().ok_or_else(|| {
                ChangeError::Conflict("there is no [[subsystem]], so nobody asks for referrals".to_owned())
            })?;
            target.set_referrals(discovery.referrals.iter().map(|referral| referral.0).collect());
        }
        Ok(self.discovery())
    }
}
