//! One path's connection on one reactor: a part of its lane.

use super::held::Held;
use super::lane::Notice;
use super::meter::{LaneNumbers, Loss};
use super::signal::Mailbox;
use super::transport::Connection;
use crate::nvme::ana::AnaState;
use hawser_block::Geometry;
use std::sync::Arc;
use std::time::Duration;

/// What the path's task tells a lane when its queue may be used.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Start {
    pub(crate) association: u64,
    /// What its controller takes.
    pub(crate) limits: Geometry,
    pub(crate) nsid: u32,
    /// How long after the loss of the association its commands may live.
    pub(crate) lives: Duration,
    /// CRDT1 to CRDT3, in 100 ms.
    pub(crate) retry_delays: [u16; 3],
    /// `None`: the controller does not report it.
    pub(crate) ana: Option<AnaState>,
}

/// See the module's text.
pub(crate) struct Way {
    pub(super) notices: Arc<Mailbox<Notice>>,
    pub(super) association: u64,
    pub(super) connection: Option<Connection<Held>>,
    /// `Some`: commands may be sent on `connection`.
    pub(super) started: Option<Start>,
    /// The task waits until the connection is gone.
    pub(super) torn_down: Option<Arc<Mailbox<()>>>,
    pub(super) told_loss: bool,
    /// The controller of the last start has a volatile cache.
    pub(super) has_cache: bool,
    /// As of the last start.
    pub(super) lives: Duration,
    pub(super) numbers: Arc<LaneNumbers>,
    /// From this reactor's NUMA node to that of the connection's interface.
    pub(super) distance: u32,
}

impl Way {
    pub(super) fn new(notices: Arc<Mailbox<Notice>>, numbers: Arc<LaneNumbers>, lives: Duration) -> Way {
        Way {
            notices,
            numbers,
            association: 0,
            connection: None,
            started: None,
            torn_down: None,
            told_loss: false,
            has_cache: false,
            lives,
            distance: super::numa::LOCAL,
        }
    }

    /// Asymmetric access, while commands may be sent.
    pub(super) fn ana(&self) -> Option<AnaState> {
        self.started.map(|start| start.ana.unwrap_or(AnaState::Optimized))
    }

    /// Whether commands may be sent, and the namespace can be reached there.
    pub(super) fn is_good(&self) -> bool {
        self.ana().is_some_and(|ana| ana.refusal().is_none())
    }

    /// Whether commands of this association may be sent.
    pub(super) fn is_started(&self, association: u64) -> bool {
        self.started.is_some_and(|start| start.association == association)
    }

    /// The path and association, where there is a volatile cache.
    pub(super) fn cached((path, way): (usize, &Way)) -> Option<(usize, u64)> {
        way.started.filter(|start| start.limits.volatile_cache).map(|start| (path, start.association))
    }

    /// How many more commands can be sent.
    pub(super) fn room(&self) -> usize {
        if self.started.is_none() { 0 } else { self.connection.as_ref().map_or(0, Connection::room) }
    }

    pub(super) fn outstanding(&self) -> usize {
        self.connection.as_ref().map_or(0, Connection::outstanding)
    }

    pub(super) fn lost(&mut self, loss: Loss, why: String) {
        if !self.told_loss && self.association != 0 {
            self.told_loss = true;
            self.notices.post(Notice::Lost { association: self.association, loss, why });
        }
    }
}
