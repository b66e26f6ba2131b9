//! An address of a subsystem, and how well its namespaces can be reached there: Asymmetric Namespace Access.

use super::namespace::Namespace;
use crate::nvme::ana::{AnaGroup, AnaLog, AnaState};
use crate::uri::Transport;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// A group of namespaces at one address.
pub(super) struct PortGroup {
    pub(super) id: u32,
    /// As in the log page.
    state: AtomicU8,
    /// How often it has changed.
    changes: AtomicU64,
}

impl PortGroup {
    pub(super) fn state(&self) -> AnaState {
        AnaState::from_u8(self.state.load(Ordering::Relaxed)).unwrap_or_default()
    }
}

/// One address.
pub(super) struct Port {
    /// The listener, as the target counts them.
    pub(super) listener: usize,
    pub(super) address: SocketAddr,
    pub(super) transport: Transport,
    /// In rising order of their IDs; at least one.
    pub(super) groups: Vec<Arc<PortGroup>>,
    /// How often the state of any has changed.
    changes: AtomicU64,
}

impl Port {
    /// With groups and the state that each begins with.
    pub(super) fn new(
        listener: usize,
        (transport, address): (Transport, SocketAddr),
        groups: &[(u32, AnaState)],
    ) -> Arc<Port> {
        let group = |(id, state): &(u32, AnaState)| {
            let (state, changes) = (AtomicU8::new(state.to_u8()), AtomicU64::new(1));
            Arc::new(PortGroup { id: *id, state, changes })
        };
        let groups = groups.iter().map(group).collect();
        Arc::new(Port { listener, address, transport, groups, changes: AtomicU64::new(1) })
    }

    pub(super) fn group(&self, id: u32) -> Option<&Arc<PortGroup>> {
        self.groups.iter().find(|group| group.id == id)
    }

    /// Sets the state of a group; whether it is another than before.
    pub(super) fn set_state(&self, group: &PortGroup, state: AnaState) -> bool {
        if group.state.swap(state.to_u8(), Ordering::Relaxed) == state.to_u8() {
            return false;
        }
        group.changes.fetch_add(1, Ordering::Release);
        self.changes.fetch_add(1, Ordering::Release);
        true
    }

    /// The log page.
    pub(super) fn log(&self, namespaces: &[Namespace], groups_only: bool) -> AnaLog {
        let changes = self.changes.load(Ordering::Acquire);
        let group = |group: &Arc<PortGroup>| {
            let there = namespaces.iter().filter(|it| it.ana_group == group.id && !groups_only);
            AnaGroup {
                id: group.id,
                changes: group.changes.load(Ordering::Acquire),
                state: group.state(),
                namespaces: there.map(|namespace| namespace.nsid).collect(),
            }
        };
        AnaLog { changes, groups: self.groups.iter().map(group).collect() }
    }
}
