//! Asynchronous events (base 5.2): what a host is told when it has asked to be, and once until it reads the log that says more.

use super::Connection;
use super::slots::Phase;
use crate::nvme::NvmeStatus;
use crate::nvme::features::{
    EVENT_ANA_CHANGE, EVENT_CROSS_CONTROLLER_RESET, EVENT_DISCOVERY_CHANGE, EVENT_NAMESPACE_ATTRIBUTE,
};
use crate::nvme::log::AsyncEvent;
use std::sync::atomic::Ordering;

/// What there is to tell, by the bits of the feature Asynchronous Event Configuration.
#[derive(Default)]
pub(super) struct Notices {
    /// It has happened, and the host does not know.
    pending: u32,
    /// The host was told, and has not read the log since: nothing more of the kind is told.
    told: u32,
}

/// There is something in the Reservation Notification log. No bit of the feature, which does not speak of it: 82h does.
pub(super) const RESERVATION_NOTICE: u32 = 1 << 30;

/// In the order in which they are told: each with its bit.
const EVENTS: [(u32, AsyncEvent); 5] = [
    (RESERVATION_NOTICE, AsyncEvent::RESERVATION_NOTICE),
    (EVENT_DISCOVERY_CHANGE, AsyncEvent::DISCOVERY_CHANGED),
    (EVENT_ANA_CHANGE, AsyncEvent::ANA_CHANGE),
    (EVENT_NAMESPACE_ATTRIBUTE, AsyncEvent::NAMESPACE_ATTRIBUTE_CHANGED),
    (EVENT_CROSS_CONTROLLER_RESET, AsyncEvent::CROSS_CONTROLLER_RESET),
];

impl Connection {
    /// Something has happened that the host may want to know.
    pub(in super::super) fn notify(&mut self, event: u32) {
        self.notices.pending |= event;
        self.give_notices();
    }

    /// The host has read the log that says what has happened.
    pub(super) fn log_was_read(&mut self, event: u32) {
        self.notices.pending &= !event;
        self.notices.told &= !event;
    }

    /// Answers Asynchronous Event Requests as long as there is something to tell.
    pub(super) fn give_notices(&mut self) {
        let Some(controller) = &self.controller else { return };
        if self.is_over() {
            return;
        }
        let wanted = controller.event_mask.load(Ordering::Relaxed) | RESERVATION_NOTICE;
        for (bit, event) in EVENTS {
            if self.notices.pending & !self.notices.told & wanted & bit == 0 {
                continue;
            }
            let Some(index) = self.slots.in_phase(Phase::Held).next() else { return };
            self.notices.pending &= !bit;
            self.notices.told |= bit;
            self.answer(index, NvmeStatus::SUCCESS, u64::from(event.to_dword()));
        }
    }

    /// A namespace may have changed.
    pub(in super::super) fn handle_namespace_change(&mut self) {
        let Some(controller) = &self.controller else { return };
        self.changed_namespaces.extend(controller.take_changes());
        if !self.changed_namespaces.is_empty() {
            self.notify(EVENT_NAMESPACE_ATTRIBUTE);
        }
    }
}
