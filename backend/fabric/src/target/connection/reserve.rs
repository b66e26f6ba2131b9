//! Reservation commands, and what reservations forbid.
//!
//! Every I/O command is checked when it comes, and again when it goes to its device: its data or its buffer may have taken a
//! while. The check is one load of the namespace's epoch; only after a change the state is looked at.

use super::notices::RESERVATION_NOTICE;
use super::slots::Phase;
use super::{Action, Connection};
use crate::nvme::reservation::{self, NoticeLog, ReservationNotice};
use crate::nvme::{NvmeStatus, Sqe, StatusCode, io_opcode};
use crate::target::registry::Subsystem;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Notices that a host has not read: the newest ones, as nvmet.
const NOTICES_MAX: usize = 64;

/// What other hosts have done, for the Reservation Notification log.
#[derive(Default)]
pub(super) struct ReservationLog {
    count: u64,
    notices: VecDeque<(u64, ReservationNotice, u32)>,
}

impl ReservationLog {
    fn add(&mut self, notice: ReservationNotice, nsid: u32) {
        if self.notices.len() >= NOTICES_MAX {
            self.notices.pop_front();
        }
        // LPC is never 0 in a page with a notice.
        self.count = self.count.wrapping_add(1).max(1);
        self.notices.push_back((self.count, notice, nsid));
    }

    fn page(&self) -> NoticeLog {
        let more = u8::try_from(self.notices.len().saturating_sub(1)).unwrap_or(u8::MAX);
        match self.notices.front() {
            Some((count, notice, nsid)) => NoticeLog { count: *count, notice: Some((*notice, *nsid)), more },
            None => NoticeLog { count: 0, notice: None, more },
        }
    }
}

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
                let masked = subsystem.namespaces[position].notice_mask.load(Ordering::Relaxed);
                for (host, notice) in effect.notices.iter().filter(|(_, it)| masked & 1 << it.to_u8() == 0) {
                    let (connections, nsid) = (subsystem.admin_connections_of(host), sqe.nsid);
                    self.actions.push(Action::Notify { connections, notice: *notice, nsid });
                }
                let fence = subsystem.connections_of(&effect.fenced);
                let subsystem = Arc::clone(subsystem);
                self.slots.at(index).phase = Phase::Awaiting;
                self.actions.push(Action::Keep { index, subsystem, position, fence });
            }
        }
    }

    /// Set Features, Reservation Persistence: of one namespace at a time, because it is answered when that is on disk.
    pub(super) fn set_reservation_persistence(&mut self, index: usize) -> Result<(), StatusCode> {
        let slot = self.slots.at(index);
        let sqe = slot.sqe;
        // SV.
        if sqe.cdw[0] & 1 << 31 != 0 {
            return Err(StatusCode::FEATURE_NOT_SAVEABLE);
        }
        if sqe.cdw[1] & !1 != 0 {
            return Err(StatusCode::INVALID_FIELD);
        }
        let subsystem = self.controller.as_ref().and_then(|controller| controller.subsystem.as_ref());
        let subsystem = Arc::clone(subsystem.ok_or(StatusCode::INVALID_FIELD)?);
        let position = subsystem.position(sqe.nsid).ok_or(StatusCode::INVALID_NAMESPACE)?;
        let changed = subsystem.namespaces[position].set_reservations_persist(sqe.cdw[1] & 1 != 0);
        if !changed && self.is_kept(&subsystem, position) {
            self.answer(index, NvmeStatus::SUCCESS, 0);
            return Ok(());
        }
        let slot = self.slots.at(index);
        slot.phase = Phase::Awaiting;
        slot.namespace = position;
        self.actions.push(Action::Keep { index, subsystem, position, fence: Vec::new() });
        Ok(())
    }

    /// Another host has done something to this one's registration, or to what registrants share.
    pub(in super::super) fn reservation_notice(&mut self, notice: ReservationNotice, nsid: u32) {
        self.reservation_log.add(notice, nsid);
        self.notify(RESERVATION_NOTICE);
    }

    /// The log page: the oldest notice, which is read once.
    pub(super) fn reservation_log_page(&mut self, retain: bool) -> [u8; NoticeLog::LEN] {
        let page = self.reservation_log.page();
        if !retain {
            self.reservation_log.notices.pop_front();
            self.log_was_read(RESERVATION_NOTICE);
            if !self.reservation_log.notices.is_empty() {
                self.notify(RESERVATION_NOTICE);
            }
        }
        page.to_bytes()
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
