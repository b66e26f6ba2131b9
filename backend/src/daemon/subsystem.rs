//! The running target: what it shows, and what can be changed while it runs.

use super::api::view::SubsystemView;
use super::{ChangeError, Daemon};
use crate::assemble::target as assemble_target;
use hawser_config::DiscoveryConfig;
use hawser_config::value::Listen;
use hawser_fabric::nvme::ana::AnaState;
use hawser_fabric::target::{ANA_GROUP, Target};
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
        let view = || self.subsystem_views().into_iter().find(|view| view.nqn == nqn);
        let before = view().ok_or_else(|| ChangeError::Unknown(format!("there is no subsystem {nqn}")))?;
        let index =
            port.parse().ok().filter(|index: &usize| *index < before.ports.len()).ok_or_else(|| {
                let last = before.ports.len() - 1;
                ChangeError::Unknown(format!("{nqn} has no port {port}, want one from 0 to {last}"))
            })?;
        if grpid.parse() != Ok(ANA_GROUP) {
            let what = format!("{nqn} has no ANA group {grpid}, want {ANA_GROUP}");
            return Err(ChangeError::Unknown(what));
        }
        let target = self.target.lock().unwrap_or_else(PoisonError::into_inner);
        if !target.as_ref().is_some_and(|target| target.set_ana_state(nqn, index, state)) {
            return Err(ChangeError::Failed("the target stops".to_owned()));
        }
        drop(target);
        view().ok_or_else(|| ChangeError::Failed("the target stops".to_owned()))
    }

    /// Other discovery services that ours points to.
    #[must_use]
    pub fn discovery(&self) -> DiscoveryConfig {
        let target = self.target.lock().unwrap_or_else(PoisonError::into_inner);
        let referrals = target.as_ref().map_or_else(Vec::new, Target::referrals);
        DiscoveryConfig { referrals: referrals.into_iter().map(Listen).collect() }
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
            target.set_referrals(discovery.referrals.iter().map(|listen| listen.0).collect());
        }
        Ok(self.discovery())
    }
}
