//! Admin commands.

use super::slots::{Phase, Place, place_of};
use super::{Connection, answers};
use crate::nvme::ana::GROUPS_ONLY;
use crate::nvme::cross_reset::ResetLog;
use crate::nvme::features::{
    self, EVENT_ANA_CHANGE, EVENT_CROSS_CONTROLLER_RESET, EVENT_DISCOVERY_CHANGE, EVENT_NAMESPACE_ATTRIBUTE,
};
use crate::nvme::log;
use crate::nvme::{NvmeStatus, StatusCode, admin_opcode};
use crate::target::namespace::Namespace;
use crate::target::{ASYNC_EVENTS_MAX, IO_QUEUES_MAX};
use std::sync::atomic::Ordering;

/// Feature 82h: the bits of all notices.
const NOTICE_BITS: u32 = 0b1110;
/// "All namespaces".
const NSID_ALL: u32 = 0xffff_ffff;
/// Dword 0 of Abort's completion: the command was not aborted (base 5.1).
const NOT_ABORTED: u64 = 1;

impl Connection {
    pub(super) fn begin_admin(&mut self, index: usize) {
        let sqe = self.slots.at(index).sqe;
        let opcode = sqe.opcode;
        let discovery = self.controller.as_ref().is_none_or(|controller| controller.subsystem.is_none());
        match opcode {
            admin_opcode::FABRICS => self.begin_fabrics(index),
            admin_opcode::IDENTIFY => {
                let data = self.identify(index);
                self.answer_read(index, data);
            }
            admin_opcode::GET_LOG_PAGE => {
                let data = self.log_page(index);
                self.answer_read(index, data);
            }
            // Best effort (base 5.1): commands end soon by themselves, and an association that hangs is given up whole.
            admin_opcode::ABORT if !discovery => self.answer(index, NvmeStatus::SUCCESS, NOT_ABORTED),
            admin_opcode::SET_FEATURES if !discovery && self.has_behavior(index) => {
                let len = u32::try_from(features::HOST_BEHAVIOR_LEN).unwrap_or(0);
                if let Err(status) = self.take_host_data(index, len) {
                    self.fail(index, status);
                }
            }
            admin_opcode::GET_FEATURES if !discovery && self.has_behavior(index) => {
                let controller = self.controller.as_ref();
                let on = controller.is_some_and(|controller| controller.retry_delays.load(Ordering::Relaxed));
                let mut data = vec![0; features::HOST_BEHAVIOR_LEN];
                data[0] = if on { features::RETRY_DELAYS_ENABLED } else { 0 };
                self.answer_read(index, Ok(data));
            }
            admin_opcode::SET_FEATURES
                if !discovery && sqe.feature_id() == features::id::RESERVATION_PERSISTENCE =>
            {
                if let Err(code) = self.set_reservation_persistence(index) {
                    self.fail(index, NvmeStatus::fatal(code));
                }
            }
            admin_opcode::SET_FEATURES => match self.set_feature(index, discovery) {
                Ok(result) => self.answer(index, NvmeStatus::SUCCESS, result),
                Err(code) => self.fail(index, NvmeStatus::fatal(code)),
            },
            admin_opcode::GET_FEATURES => match self.get_feature(index, discovery) {
                Ok(result) => self.answer(index, NvmeStatus::SUCCESS, result),
                Err(code) => self.fail(index, NvmeStatus::fatal(code)),
            },
            admin_opcode::ASYNC_EVENT_REQUEST => {
                if self.slots.in_phase(Phase::Held).count() >= ASYNC_EVENTS_MAX {
                    self.fail(index, NvmeStatus::fatal(StatusCode::AER_LIMIT_EXCEEDED));
                    return;
                }
                self.slots.drop_buffer(index);
                self.slots.at(index).phase = Phase::Held;
                self.give_notices();
            }
            admin_opcode::CROSS_CONTROLLER_RESET if !discovery => self.begin_reset(index),
            admin_opcode::KEEP_ALIVE => self.answer(index, NvmeStatus::SUCCESS, 0),
            _ => self.fail(index, NvmeStatus::fatal(StatusCode::INVALID_OPCODE)),
        }
    }

    /// Whether a Set or Get Features is about Host Behavior Support as it is now: that feature alone has data.
    fn has_behavior(&mut self, index: usize) -> bool {
        let sqe = self.slots.at(index).sqe;
        // SV of Set Features, SEL of Get Features.
        let now = sqe.cdw[0] & (1 << 31 | 7 << 8) == 0;
        sqe.feature_id() == features::id::HOST_BEHAVIOR && now
    }

    /// The data of an admin command is there: Set Features, Host Behavior Support.
    pub(super) fn execute_admin(&mut self, index: usize) {
        let buffer = self.slots.at(index).buffer.as_ref().expect("its data came into it");
        // SAFETY: the buffer holds the command's data, whose length was checked, and nobody writes to it any more.
        let retry_delays = unsafe { buffer.slice(0, 1) }[0];
        let Some(controller) = self.controller.as_ref().filter(|_| retry_delays <= 1) else {
            return self.fail(index, NvmeStatus::fatal(StatusCode::INVALID_FIELD));
        };
        controller.retry_delays.store(retry_delays == features::RETRY_DELAYS_ENABLED, Ordering::Relaxed);
        self.answer(index, NvmeStatus::SUCCESS, 0);
    }

    /// Ends a command that reads with its data, of which the host wants at most as much as its SGL says.
    pub(super) fn answer_read(&mut self, index: usize, data: Result<Vec<u8>, StatusCode>) {
        let data = match data {
            Ok(data) => data,
            Err(code) => return self.fail(index, NvmeStatus::fatal(code)),
        };
        let len = u32::try_from(data.len()).expect("bounded by the transfer size");
        // The host may have room for more than it asked for.
        let slot = self.slots.at(index);
        let room = slot.sqe.sgl.len.max(len);
        match place_of(slot, room) {
            Ok(Place::Transport) => {}
            Ok(Place::Capsule) => return self.fail(index, NvmeStatus::fatal(StatusCode::INVALID_SGL_TYPE)),
            Err(status) => return self.fail(index, status),
        }
        // A host that does not fetch its answers gets no more of them.
        let Some(buffer) = self.slots.pool.take(data.len()) else {
            return self.fail(index, NvmeStatus::retryable(StatusCode::COMMAND_INTERRUPTED));
        };
        // SAFETY: the buffer has room for all of `data`, is fresh, and apart from it.
        unsafe { buffer.as_ptr().copy_from_nonoverlapping(data.as_ptr(), data.len()) };
        let slot = self.slots.at(index);
        slot.buffer = Some(buffer);
        slot.len = len;
        self.answer_with_data(index, len);
    }

    fn identify(&mut self, index: usize) -> Result<Vec<u8>, StatusCode> {
        let sqe = self.slots.at(index).sqe;
        let controller = self.controller.as_ref().ok_or(StatusCode::INTERNAL_ERROR)?;
        answers::identify(controller, &sqe)
    }

    fn log_page(&mut self, index: usize) -> Result<Vec<u8>, StatusCode> {
        let sqe = self.slots.at(index).sqe;
        let controller = self.controller.as_ref().ok_or(StatusCode::INTERNAL_ERROR)?;
        let len = sqe.log_len().filter(|len| *len <= controller.transfer_bytes_max);
        let len = len.ok_or(StatusCode::INVALID_FIELD)? as usize;
        let page = match (&controller.subsystem, sqe.log_id()) {
            (None, log::id::DISCOVERY) => {
                let page = answers::discovery_log(&self.shared, &controller.host.nqn, self.local);
                if !sqe.log_retains_event() {
                    self.log_was_read(EVENT_DISCOVERY_CHANGE);
                }
                page
            }
            (Some(_), log::id::CHANGED_NAMESPACES) => {
                let page = answers::changed_namespaces(&self.changed_namespaces);
                if !sqe.log_retains_event() {
                    self.changed_namespaces.clear();
                    self.log_was_read(EVENT_NAMESPACE_ATTRIBUTE);
                }
                page
            }
            (Some(_), log::id::ANA) => {
                let groups_only = sqe.log_specific() & GROUPS_ONLY != 0;
                let page = controller.ana_log(groups_only).ok_or(StatusCode::INTERNAL_ERROR)?.to_bytes();
                if !sqe.log_retains_event() {
                    self.log_was_read(EVENT_ANA_CHANGE);
                }
                page
            }
            (Some(_), log::id::RESERVATION_NOTIFICATION) => {
                self.reservation_log_page(sqe.log_retains_event()).to_vec()
            }
            (Some(_), log::id::CROSS_CONTROLLER_RESET) => {
                let remove = sqe.log_specific() & ResetLog::REMOVE_COMPLETED != 0;
                self.reset_log(remove, sqe.log_retains_event())
            }
            (subsystem, id) => answers::plain_log(id, subsystem.is_none())?,
        };
        // What lies past the page's end reads as zeroes.
        let from = usize::try_from(sqe.log_offset()).unwrap_or(usize::MAX);
        if from > page.len() || !from.is_multiple_of(4) {
            return Err(StatusCode::INVALID_FIELD);
        }
        let mut data = vec![0; len];
        let there = len.min(page.len() - from);
        data[..there].copy_from_slice(&page[from..from + there]);
        Ok(data)
    }

    fn set_feature(&mut self, index: usize, discovery: bool) -> Result<u64, StatusCode> {
        let sqe = self.slots.at(index).sqe;
        let controller = self.controller.as_ref().ok_or(StatusCode::INTERNAL_ERROR)?;
        if sqe.cdw[0] & 1 << 31 != 0 {
            return Err(StatusCode::FEATURE_NOT_SAVEABLE);
        }
        let value = sqe.cdw[1];
        match sqe.feature_id() {
            features::id::NUMBER_OF_QUEUES if !discovery => {
                if value & 0xffff == 0xffff || value >> 16 == 0xffff {
                    return Err(StatusCode::INVALID_FIELD);
                }
                if !controller.io_connections().is_empty() {
                    return Err(StatusCode::COMMAND_SEQUENCE_ERROR);
                }
                let count = features::queues_from_value(value).min(u32::from(IO_QUEUES_MAX));
                controller.io_queues_max.store(count, Ordering::Relaxed);
                Ok(u64::from(features::queues_to_value(u16::try_from(count).unwrap_or(1))))
            }
            features::id::KEEP_ALIVE_TIMER => {
                controller.keep_alive_ms.store(value, Ordering::Relaxed);
                Ok(u64::from(value))
            }
            features::id::ASYNC_EVENT_CONFIGURATION => {
                let able = if discovery {
                    EVENT_DISCOVERY_CHANGE
                } else {
                    EVENT_NAMESPACE_ATTRIBUTE | EVENT_ANA_CHANGE | EVENT_CROSS_CONTROLLER_RESET
                };
                // Bits 7:0 are SMART's critical warnings, of which there will be none.
                if value & !(able | 0xff) != 0 {
                    return Err(StatusCode::INVALID_FIELD);
                }
                controller.event_mask.store(value, Ordering::Relaxed);
                self.give_notices();
                Ok(0)
            }
            features::id::VOLATILE_WRITE_CACHE if !discovery => {
                if !answers::has_volatile_cache(controller) {
                    return Err(StatusCode::INVALID_FIELD);
                }
                controller.write_cache.store(value & 1 != 0, Ordering::Relaxed);
                Ok(0)
            }
            features::id::RESERVATION_NOTIFICATION_MASK if !discovery => {
                if value & !NOTICE_BITS != 0 {
                    return Err(StatusCode::INVALID_FIELD);
                }
                let subsystem = controller.subsystem.as_ref().ok_or(StatusCode::INVALID_FIELD)?;
                let named = |it: &&Namespace| sqe.nsid == NSID_ALL || it.nsid == sqe.nsid;
                let namespaces: Vec<_> = subsystem.namespaces.iter().filter(named).collect();
                if namespaces.is_empty() {
                    return Err(StatusCode::INVALID_NAMESPACE);
                }
                namespaces.iter().for_each(|it| it.notice_mask.store(value, Ordering::Relaxed));
                Ok(0)
            }
            features::id::HOST_IDENTIFIER => Err(StatusCode::COMMAND_SEQUENCE_ERROR),
            _ => Err(StatusCode::INVALID_FIELD),
        }
    }

    fn get_feature(&mut self, index: usize, discovery: bool) -> Result<u64, StatusCode> {
        let sqe = self.slots.at(index).sqe;
        let controller = self.controller.as_ref().ok_or(StatusCode::INTERNAL_ERROR)?;
        // SEL: only the current value.
        if sqe.cdw[0] >> 8 & 7 != 0 {
            return Err(StatusCode::INVALID_FIELD);
        }
        let value = match sqe.feature_id() {
            features::id::NUMBER_OF_QUEUES if !discovery => {
                let count = controller.io_queues_max.load(Ordering::Relaxed);
                features::queues_to_value(u16::try_from(count).unwrap_or(1))
            }
            features::id::KEEP_ALIVE_TIMER => controller.keep_alive_ms.load(Ordering::Relaxed),
            features::id::ASYNC_EVENT_CONFIGURATION => controller.event_mask.load(Ordering::Relaxed),
            features::id::VOLATILE_WRITE_CACHE if !discovery && answers::has_volatile_cache(controller) => {
                u32::from(controller.write_cache.load(Ordering::Relaxed))
            }
            id @ (features::id::RESERVATION_NOTIFICATION_MASK | features::id::RESERVATION_PERSISTENCE)
                if !discovery =>
            {
                let subsystem = controller.subsystem.as_ref().ok_or(StatusCode::INVALID_FIELD)?;
                let position = subsystem.position(sqe.nsid).ok_or(StatusCode::INVALID_NAMESPACE)?;
                let namespace = &subsystem.namespaces[position];
                match id {
                    features::id::RESERVATION_PERSISTENCE => {
                        u32::from(namespace.reservation_status().persists)
                    }
                    _ => namespace.notice_mask.load(Ordering::Relaxed),
                }
            }
            _ => return Err(StatusCode::INVALID_FIELD),
        };
        Ok(u64::from(value))
    }
}
