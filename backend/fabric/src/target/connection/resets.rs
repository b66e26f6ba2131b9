//! Cross-Controller Reset (base 2.3, 5.4.3): a host that has lost one association asks for its end through another one.
//!
//! ```text
//!   command ──► the other controller is closed, its connections end ──► all are quiet: answered, "immediate success"
//!                                                     └─► not within RESET_HOLD: answered; later the event, and the log
//! ```
//!
//! Success means what the host needs before it sends its writes again: no command of the other controller is executed any
//! more, and none that is still on its way will be.

use super::slots::Phase;
use super::{Action, Connection};
use crate::nvme::cross_reset::{ControllerInstance, IMMEDIATE_SUCCESS, ResetEntry, ResetLog, ResetState};
use crate::nvme::features::EVENT_CROSS_CONTROLLER_RESET;
use crate::nvme::{NvmeStatus, StatusCode};
use crate::simulated::is_broken;
use crate::target::registry::Impacted;
use crate::target::{CROSS_RESETS_LOGGED_MAX, CROSS_RESETS_MAX};

/// A reset that this controller was asked for.
pub(super) struct Reset {
    /// Names it to the driver.
    id: u64,
    instance: ControllerInstance,
    state: ResetState,
    /// The command, while it is not answered. From then on the log tells how it goes.
    slot: Option<usize>,
}

impl Connection {
    pub(super) fn begin_reset(&mut self, index: usize) {
        match self.try_begin_reset(index) {
            Ok(true) => self.answer(index, NvmeStatus::SUCCESS, u64::from(IMMEDIATE_SUCCESS)),
            Ok(false) => {}
            Err(code) => self.fail(index, NvmeStatus::fatal(code)),
        }
    }

    /// Returns whether there is nothing to wait for.
    fn try_begin_reset(&mut self, index: usize) -> Result<bool, StatusCode> {
        let instance = ControllerInstance::from_sqe(&self.slots.at(index).sqe);
        let controller = self.controller.as_ref().ok_or(StatusCode::INTERNAL_ERROR)?;
        let subsystem = controller.subsystem.as_ref().ok_or(StatusCode::INVALID_OPCODE)?;
        let under_way = || self.resets.iter().filter(|reset| reset.state == ResetState::InProgress);
        if under_way().any(|reset| reset.instance == instance) {
            return Err(StatusCode::CONTROLLER_RESET_IN_PROGRESS);
        }
        if under_way().count() >= usize::from(CROSS_RESETS_MAX) {
            return Err(StatusCode::CONTROLLER_RESET_LIMIT_EXCEEDED);
        }
        if self.resets.len() >= CROSS_RESETS_LOGGED_MAX {
            return Err(StatusCode::CONTROLLER_RESET_LOG_FULL);
        }
        let impacted = match subsystem.impacted(&instance, &controller.host) {
            Impacted::Unknown => return Err(StatusCode::INVALID_FIELD),
            Impacted::Gone => return Ok(true),
            // A process before this one may have had one of the same ID.
            Impacted::Found(impacted) if impacted.cntlid == controller.cntlid => {
                return Err(StatusCode::INVALID_FIELD);
            }
            Impacted::Found(impacted) => impacted,
        };
        log::info!(
            "{}: {} has controller {} reset through controller {}",
            subsystem.nqn,
            controller.host.nqn,
            instance.cntlid,
            controller.cntlid
        );
        impacted.close();
        let connections = impacted.connections();
        if connections.is_empty() || is_broken("reset_without_waiting") {
            return Ok(true);
        }
        let id = self.next_reset;
        self.next_reset += 1;
        self.resets.push(Reset { id, instance, state: ResetState::InProgress, slot: Some(index) });
        self.slots.at(index).phase = Phase::Awaiting;
        self.actions.push(Action::Reset { id, connections });
        Ok(false)
    }

    /// The controller of this reset is quiet.
    pub(in super::super) fn reset_ended(&mut self, id: u64) {
        let Some(at) = self.resets.iter().position(|reset| reset.id == id) else { return };
        if self.is_over() {
            return;
        }
        match self.resets[at].slot {
            Some(index) => {
                self.resets.remove(at);
                self.answer(index, NvmeStatus::SUCCESS, u64::from(IMMEDIATE_SUCCESS));
            }
            None => {
                self.resets[at].state = ResetState::Succeeded;
                self.notify(EVENT_CROSS_CONTROLLER_RESET);
            }
        }
    }

    /// The command of this reset has been held for long enough: its host may not wait for ever.
    pub(in super::super) fn reset_lasts(&mut self, id: u64) {
        let Some(reset) = self.resets.iter_mut().find(|reset| reset.id == id) else { return };
        if let Some(index) = reset.slot.take()
            && !self.is_over()
        {
            self.answer(index, NvmeStatus::SUCCESS, 0);
        }
    }

    /// The log page: resets whose commands are answered.
    pub(super) fn reset_log(&mut self, remove_completed: bool, retain: bool) -> Vec<u8> {
        let logged = self.resets.iter().filter(|reset| reset.slot.is_none());
        let entries = logged
            .map(|reset| ResetEntry {
                cntlid: reset.instance.cntlid,
                uniquifier: reset.instance.uniquifier,
                state: reset.state,
            })
            .collect();
        if remove_completed {
            self.resets.retain(|reset| reset.state == ResetState::InProgress);
        }
        if !retain {
            self.log_was_read(EVENT_CROSS_CONTROLLER_RESET);
        }
        ResetLog { entries }.to_bytes()
    }
}
