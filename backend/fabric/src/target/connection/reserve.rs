//! Reservation commands, and what reservations forbid.
//!
//! Every I/O command is checked when it comes, and again when it goes to its device: its data or its buffer may have taken a
//! while. The check is one load of the namespace's epoch; only after a change the state is looked at.

use super::slots::Phase;
use super::{Action, Connection};
use crate::nvme::reservation;
use crate::nvme::{NvmeStatus, Sqe, StatusCode, io_opcode};
use crate::target::registry::Subsystem;
use std::sync::Arc;
use std::sync::atomic::Ordering;

impl Connection {
    /// Whether a reservation lets this command's host do what it asks.
    pub(super) fn check_reservation(&mut self, namespace: usize, opcode: u8) -> Result<(), NvmeStatus> {
        let subsystem = self.controller.as_ref().and_then(|it| Some((&it.host, it.subsystem.as_ref()?)));
        let Some((host, subsystem)) = subsystem else { return Ok(()) };
        let (there, lane) = (&subsystem.namespaces[namespace], &mut self.lanes[namespace]);
        let epoch = there.reservation_epoch.load(Ordering::Acquire);
        if lane.access_epoch != epoch {
            lane.access = there.access(&host.id);
            lane.access_epoch = epoch;
        }
        let allowed = match opcode {
            io_opcode::READ | io_opcode::COMPARE => lane.access.read,
            io_opcode::WRITE | io_opcode::WRITE_ZEROES | io_opcode::DATASET_MANAGEMENT | io_opcode::FLUSH => {
                lane.access.write
            }
            _ => true,
        };
        if allowed { Ok(()) } else { Err(NvmeStatus::fatal(StatusCode::RESERVATION_CONFLICT)) }
    }

    /// The keys of a command that changes reservations are there.
    pub(super) fn execute_reservation(&mut self, index: usize) {
        let slot = self.slots.at(index);
        let (sqe, position) = (slot.sqe, slot.namespace);
        let len = reservation::data_len(sqe.opcode).unwrap_or(0) as usize;
        let buffer = slot.buffer.as_ref().expect("its data came into it");
        // SAFETY: the buffer holds the command's data, whose length was checked, and nobody writes to it any more.
        let command = reservation::from_sqe(&sqe, unsafe { buffer.slice(0, len) });
        let Ok(command) = command else {
            return self.fail(index, NvmeStatus::fatal(StatusCode::INVALID_FIELD));
        };
        let subsystem = self.controller.as_ref().and_then(|it| Some((&it.host, it.subsystem.as_ref()?)));
        let Some((host, subsystem)) = subsystem else { return };
        match subsystem.namespaces[position].reserve(&host.id, command) {
            Err(code) => self.fail(index, NvmeStatus::fatal(code)),
            Ok(effect) if !effect.changed && self.is_kept(subsystem, position) => {
                self.answer(index, NvmeStatus::SUCCESS, 0);
            }
            Ok(effect) => {
                // Keys are their hosts' secrets.
                if let Some(count) = subsystem.reservation_changes.add() {
                    let (nqn, host) = (&subsystem.nqn, &host.nqn);
                    log::info!("{nqn}: namespace {}: {host} changes reservations; {count} changes", sqe.nsid);
                }
                let fence = subsystem.connections_of(&effect.fenced);
                let subsystem = Arc::clone(subsystem);
                self.slots.at(index).phase = Phase::Awaiting;
                self.actions.push(Action::Keep { index, subsystem, position, fence });
            }
        }
    }

    fn is_kept(&self, subsystem: &Subsystem, position: usize) -> bool {
        self.shared.keeper.is_none() || subsystem.namespaces[position].reservations_are_kept()
    }

    /// A change of reservations is on disk, or could not be put there.
    pub(in super::super) fn reserved(&mut self, index: usize, kept: bool) {
        if self.is_over() {
            return;
        }
        let slot = self.slots.at(index);
        let (position, acquires) = (slot.namespace, slot.sqe.opcode == io_opcode::RESERVATION_ACQUIRE);
        let subsystem = self.controller.as_ref().and_then(|it| Some((&it.host, it.subsystem.as_ref()?)));
        if let Some((host, subsystem)) = subsystem.filter(|_| kept && acquires) {
            subsystem.namespaces[position].reservation_answered(&host.id);
        }
        let status =
            if kept { NvmeStatus::SUCCESS } else { NvmeStatus::retryable(StatusCode::INTERNAL_ERROR) };
        self.answer(index, status, 0);
    }

    /// Reservation Report (base 7.5).
    pub(super) fn report_reservations(&mut self, index: usize, sqe: &Sqe) {
        let position = self.slots.at(index).namespace;
        let Some(controller) = &self.controller else { return };
        let Some(subsystem) = &controller.subsystem else { return };
        let len = sqe.cdw[0].checked_add(1).and_then(|dwords| dwords.checked_mul(4));
        let data = match len.filter(|len| *len <= controller.transfer_bytes_max) {
            // EDS: our host identifiers have 128 bits (base 7.5).
            _ if sqe.cdw[1] & 1 == 0 => Err(StatusCode::HOST_ID_INCONSISTENT),
            None => Err(StatusCode::INVALID_FIELD),
            Some(len) => {
                let status = subsystem.namespaces[position].reservation_status();
                let mut data = reservation::status_to_bytes(&status);
                data.resize(len as usize, 0);
                Ok(data)
            }
        };
        self.answer_read(index, data);
    }
}
