//! I/O commands: from a command to requests for its namespace's device, and from their ends to the answer.

use super::Access;
use super::slots::{Phase, Place, Run, place_of};
use super::{Connection, Lane, Queue};
use crate::nvme::bytes::get_array;
use crate::nvme::command::DsmRange;
use crate::nvme::reservation;
use crate::nvme::{NvmeStatus, StatusCode, io_opcode};
use crate::simulated::is_broken;
use hawser_block::{
    BlockCount, Buffers, Completion, Geometry, Lba, Operation, Outcome, Request, Status, Token,
};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The length of a range of Dataset Management.
const RANGE_BYTES: u32 = 16;
/// Pieces of a run that are at the device at a time.
const PIECES_MAX: u32 = 4;

impl Lane {
    /// log2 of the block size, once the device has been reached.
    fn shift(&mut self) -> Option<u32> {
        if self.shift.is_none() {
            self.shift = self.device.geometry().map(|geometry| geometry.block_size.shift());
        }
        self.shift
    }
}

impl Connection {
    pub(super) fn begin_io(&mut self, index: usize) {
        if let Err(status) = self.try_begin_io(index) {
            self.fail(index, status);
        }
    }

    fn try_begin_io(&mut self, index: usize) -> Result<(), NvmeStatus> {
        let controller = self.controller.as_ref().ok_or(NvmeStatus::fatal(StatusCode::INTERNAL_ERROR))?;
        if !controller.is_enabled() {
            return Err(NvmeStatus::fatal(StatusCode::COMMAND_SEQUENCE_ERROR));
        }
        let sqe = self.slots.at(index).sqe;
        if sqe.opcode == io_opcode::FABRICS {
            // Connect came already; Disconnect is not offered (OFCS), and properties belong to the admin queue.
            return Err(NvmeStatus::fatal(StatusCode::COMMAND_SEQUENCE_ERROR));
        }
        let subsystem = controller.subsystem.as_ref();
        let namespace = subsystem
            .and_then(|subsystem| subsystem.position(sqe.nsid))
            .ok_or(NvmeStatus::fatal(StatusCode::INVALID_NAMESPACE))?;
        let transfer_bytes_max = controller.transfer_bytes_max;
        if let Some(code) = self.lanes[namespace].ana.as_ref().and_then(|group| group.state().refusal()) {
            return Err(NvmeStatus::retryable(code));
        }
        let shift = self.lanes[namespace].shift();
        let shift = shift.ok_or(NvmeStatus::retryable(StatusCode::NAMESPACE_NOT_READY))?;
        self.check_reservation(namespace, sqe.opcode)?;
        let slot = self.slots.at(index);
        slot.namespace = namespace;
        let bytes = || {
            let bytes = u64::from(sqe.block_count()) << shift;
            let bytes = u32::try_from(bytes).ok().filter(|bytes| *bytes <= transfer_bytes_max);
            bytes.ok_or(NvmeStatus::fatal(StatusCode::INVALID_FIELD))
        };
        match sqe.opcode {
            io_opcode::READ => {
                let bytes = bytes()?;
                if place_of(slot, bytes)? == Place::Capsule {
                    return Err(NvmeStatus::fatal(StatusCode::INVALID_SGL_TYPE));
                }
                if self.allocate(index, bytes) {
                    self.begin_with_buffer(index);
                }
            }
            io_opcode::WRITE | io_opcode::COMPARE => {
                let bytes = bytes()?;
                self.take_host_data(index, bytes)?;
            }
            io_opcode::RESERVATION_REGISTER
            | io_opcode::RESERVATION_ACQUIRE
            | io_opcode::RESERVATION_RELEASE => {
                self.take_host_data(index, reservation::data_len(sqe.opcode).unwrap_or(0))?;
            }
            io_opcode::RESERVATION_REPORT => self.report_reservations(index, &sqe),
            io_opcode::DATASET_MANAGEMENT => {
                // A host may send more than the ranges it counts: Linux always sends room for 256 (nvme_setup_discard).
                let bytes = sqe.sgl.len.clamp(sqe.dsm_ranges() * RANGE_BYTES, 256 * RANGE_BYTES);
                self.take_host_data(index, bytes)?;
            }
            io_opcode::FLUSH => {
                self.slots.drop_buffer(index);
                if is_broken("flush_without_device") {
                    self.answer(index, NvmeStatus::SUCCESS, 0);
                    return Ok(());
                }
                self.push_request(index, Operation::Flush, Run::default(), Buffers::EMPTY);
            }
            io_opcode::WRITE_ZEROES => {
                self.slots.drop_buffer(index);
                // What is past the end fails whole: no piece is begun before that is known.
                let geometry =
                    self.geometry(index).ok_or(NvmeStatus::retryable(StatusCode::NAMESPACE_NOT_READY))?;
                if !geometry.contains(sqe.lba(), BlockCount(sqe.block_count())) {
                    return Err(NvmeStatus::fatal(StatusCode::LBA_OUT_OF_RANGE));
                }
                self.slots.at(index).run = Run { lba: sqe.lba(), blocks: u64::from(sqe.block_count()) };
                self.push_pieces(index)?;
            }
            _ => return Err(NvmeStatus::fatal(StatusCode::INVALID_OPCODE)),
        }
        Ok(())
    }

    /// The host has `bytes` bytes for this command: here already, or to be asked for.
    pub(super) fn take_host_data(&mut self, index: usize, bytes: u32) -> Result<(), NvmeStatus> {
        match place_of(self.slots.at(index), bytes)? {
            Place::Capsule => self.execute_write(index),
            Place::Transport => {
                if self.allocate(index, bytes) {
                    self.begin_with_buffer(index);
                }
            }
        }
        Ok(())
    }

    /// A read, or a command whose data is to be asked for, has its buffer.
    pub(super) fn begin_with_buffer(&mut self, index: usize) {
        if self.queue != Queue::Io {
            return self.ask_for_data(index);
        }
        let slot = self.slots.at(index);
        let (opcode, namespace) = (slot.sqe.opcode, slot.namespace);
        if let Err(status) = self.check_reservation(namespace, opcode) {
            self.fail(index, status);
            return;
        }
        if opcode == io_opcode::READ {
            let run = self.run_of(index);
            let payload = self.slots.at(index).payload();
            self.push_request(index, Operation::Read, run, payload);
        } else {
            self.ask_for_data(index);
        }
    }

    /// All data of a Write, Compare or Dataset Management is there.
    pub(super) fn execute_write(&mut self, index: usize) {
        match self.queue {
            Queue::Io => {}
            Queue::Admin => return self.execute_admin(index),
            Queue::None | Queue::Connecting(_) => return self.begin_fabrics(index),
        }
        let slot = self.slots.at(index);
        let (sqe, namespace) = (slot.sqe, slot.namespace);
        if reservation::data_len(sqe.opcode).is_some() {
            self.execute_reservation(index);
            return;
        }
        if let Err(status) = self.check_reservation(namespace, sqe.opcode) {
            self.fail(index, status);
            return;
        }
        if sqe.opcode == io_opcode::WRITE {
            let fua = sqe.fua() || self.is_write_through();
            let run = self.run_of(index);
            let payload = self.slots.at(index).payload();
            self.push_request(index, Operation::Write { fua }, run, payload);
            return;
        }
        if sqe.opcode == io_opcode::COMPARE {
            self.slots.add_compared(index);
            let run = self.run_of(index);
            let payload = self.slots.at(index).payload();
            self.push_request(index, Operation::Read, run, payload);
            return;
        }
        let pushed = match self.check_ranges(index) {
            // Hints that are not about deallocating, and devices that cannot: nothing needs to be done.
            Ok(false) => {
                self.answer(index, NvmeStatus::SUCCESS, 0);
                return;
            }
            Ok(true) => self.push_pieces(index),
            Err(status) => Err(status),
        };
        if let Err(status) = pushed {
            self.fail(index, status);
        }
    }

    /// Whether the host has switched the volatile write cache off.
    fn is_write_through(&self) -> bool {
        self.controller.as_ref().is_some_and(|controller| !controller.write_cache.load(Ordering::Relaxed))
    }

    fn run_of(&mut self, index: usize) -> Run {
        let sqe = &self.slots.at(index).sqe;
        Run { lba: sqe.lba(), blocks: u64::from(sqe.block_count()) }
    }

    /// Hands a request to the device of the command's namespace.
    fn push_request(&mut self, index: usize, operation: Operation, run: Run, buffers: Buffers) {
        let slot = self.slots.at(index);
        if slot.pieces == 0 && slot.phase != Phase::Executing {
            slot.phase = Phase::Executing;
            slot.epoch = self.epoch;
            self.executing += 1;
        }
        slot.pieces += 1;
        self.submitting = true;
        let blocks = BlockCount(u32::try_from(run.blocks).expect("pieces and transfers are bounded"));
        let request = Request { operation, lba: Lba(run.lba), blocks, buffers, token: Token(index as u64) };
        let lane = &mut self.lanes[slot.namespace];
        if lane.cleared && operation == Operation::Read {
            // SAFETY: the request is a read that has not begun.
            unsafe { buffers.zero() };
        }
        lane.batch.push(request);
    }

    fn geometry(&mut self, index: usize) -> Option<Geometry> {
        let namespace = self.slots.at(index).namespace;
        self.lanes[namespace].device.geometry()
    }

    /// Whether Dataset Management has anything to do; all its ranges are checked before the first is begun.
    fn check_ranges(&mut self, index: usize) -> Result<bool, NvmeStatus> {
        let geometry = self.geometry(index);
        let sqe = self.slots.at(index).sqe;
        let Some(geometry) = geometry.filter(|geometry| geometry.discard.is_some()) else { return Ok(false) };
        if !sqe.dsm_deallocates() {
            return Ok(false);
        }
        if geometry.read_only {
            return Err(NvmeStatus::from_block_status(Status::ReadOnly));
        }
        for number in 0..sqe.dsm_ranges() {
            let range = self.range(index, number);
            let end = range.lba.checked_add(range.blocks);
            if end.is_none_or(|end| end > geometry.blocks) {
                return Err(NvmeStatus::fatal(StatusCode::LBA_OUT_OF_RANGE));
            }
        }
        Ok(true)
    }

    /// A range of Dataset Management.
    fn range(&mut self, index: usize, number: u32) -> Run {
        let buffer = self.slots.at(index).buffer.as_ref().expect("the ranges came into it");
        // SAFETY: the buffer holds all ranges of the command (its length was checked), and nobody writes to it any more.
        let bytes = unsafe { buffer.slice(number as usize * DsmRange::LEN, DsmRange::LEN) };
        let range = DsmRange::from_bytes(&get_array(bytes, 0));
        Run { lba: range.lba, blocks: u64::from(range.blocks) }
    }

    /// Hands the next pieces of a command's runs to the device. A command without any more ends when the last piece has.
    fn push_pieces(&mut self, index: usize) -> Result<(), NvmeStatus> {
        let unsupported = NvmeStatus::from_block_status(Status::Unsupported);
        let geometry = self.geometry(index).ok_or(NvmeStatus::retryable(StatusCode::NAMESPACE_NOT_READY))?;
        let slot = self.slots.at(index);
        let (sqe, namespace) = (slot.sqe, slot.namespace);
        self.check_reservation(namespace, sqe.opcode)?;
        let (operation, blocks_max) = if sqe.opcode == io_opcode::WRITE_ZEROES {
            let limits = geometry.write_zeroes.ok_or(unsupported)?;
            let unmap = sqe.deallocate_zeroes() && limits.may_unmap;
            let fua = sqe.fua() || self.is_write_through();
            (Operation::WriteZeroes { unmap, fua }, limits.blocks_max)
        } else {
            (Operation::Discard, geometry.discard.ok_or(unsupported)?.blocks_max)
        };
        loop {
            let slot = self.slots.at(index);
            if slot.pieces >= PIECES_MAX {
                return Ok(());
            }
            if slot.run.blocks == 0 {
                let ranges = if sqe.opcode == io_opcode::WRITE_ZEROES { 0 } else { sqe.dsm_ranges() };
                if slot.next_range >= ranges {
                    break;
                }
                let number = slot.next_range;
                slot.next_range += 1;
                let run = self.range(index, number);
                self.slots.at(index).run = run;
                continue;
            }
            let blocks = slot.run.blocks.min(u64::from(blocks_max.max(1)));
            let piece = Run { lba: slot.run.lba, blocks };
            slot.run = Run { lba: slot.run.lba.wrapping_add(blocks), blocks: slot.run.blocks - blocks };
            self.push_request(index, operation, piece, Buffers::EMPTY);
        }
        let slot = self.slots.at(index);
        if slot.pieces == 0 {
            // Only ranges of no blocks, or the last piece has ended.
            if slot.phase == Phase::Executing {
                let epoch = slot.epoch;
                self.count_ended(epoch);
            }
            self.answer(index, NvmeStatus::SUCCESS, 0);
        }
        Ok(())
    }

    /// A request has ended.
    pub(in super::super) fn handle_completion(&mut self, completion: Completion) {
        let index = usize::try_from(completion.token.0).expect("we made the token from an index");
        let slot = self.slots.at(index);
        assert!(slot.phase == Phase::Executing && slot.pieces > 0, "a request ends once");
        slot.pieces -= 1;
        if let Err(status) = completion.outcome {
            slot.failed.get_or_insert(status);
        }
        let in_pieces = matches!(slot.sqe.opcode, io_opcode::WRITE_ZEROES | io_opcode::DATASET_MANAGEMENT);
        let mut outcome: Outcome = slot.failed.map_or(Ok(()), Err);
        if in_pieces && outcome.is_ok() && !self.is_over() {
            if let Err(status) = self.push_pieces(index) {
                // The device cannot any more what it could when we began, or another host has reserved it in between: what
                // is left is not done.
                let failed = status.to_block_status().unwrap_or(Status::Unsupported);
                self.slots.at(index).failed = Some(failed);
                outcome = Err(failed);
            } else {
                self.go_on_waiting();
                return;
            }
        }
        let slot = self.slots.at(index);
        if slot.pieces > 0 {
            return;
        }
        let epoch = slot.epoch;
        self.count_ended(epoch);
        if self.is_over() {
            self.slots.release(index);
        } else {
            self.end_io(index, outcome);
        }
        self.go_on_waiting();
    }

    fn end_io(&mut self, index: usize, outcome: Outcome) {
        let sqe = self.slots.at(index).sqe;
        match outcome {
            Ok(()) if sqe.opcode == io_opcode::READ => {
                let len = self.slots.at(index).len;
                self.answer_with_data(index, len);
            }
            Ok(()) if sqe.opcode == io_opcode::COMPARE && !self.slots.at(index).is_equal() => {
                self.fail(index, NvmeStatus::fatal(StatusCode::COMPARE_FAILURE));
            }
            Ok(()) => self.answer(index, NvmeStatus::SUCCESS, 0),
            Err(status) => {
                let status = self.status_for(index, status);
                self.fail(index, status);
            }
        }
    }

    /// What to tell the host: past the end and the wrong kind of error have names of their own.
    fn status_for(&mut self, index: usize, status: Status) -> NvmeStatus {
        let sqe = self.slots.at(index).sqe;
        match status {
            Status::Invalid => {
                let blocks = BlockCount(sqe.block_count());
                let within = self.geometry(index).is_none_or(|geometry| geometry.contains(sqe.lba(), blocks));
                let code = if within { StatusCode::INVALID_FIELD } else { StatusCode::LBA_OUT_OF_RANGE };
                NvmeStatus::fatal(code)
            }
            Status::Media if !matches!(sqe.opcode, io_opcode::READ | io_opcode::COMPARE) => {
                NvmeStatus::fatal(StatusCode::WRITE_FAULT)
            }
            status => NvmeStatus::from_block_status(status),
        }
    }

    /// The lanes of a subsystem's namespaces, in its order.
    pub(super) fn make_lanes(&mut self) {
        let subsystem = self.controller.as_ref().and_then(|controller| controller.subsystem.as_ref());
        let namespaces = subsystem.map_or(&[][..], |subsystem| &subsystem.namespaces);
        self.lanes = namespaces
            .iter()
            .map(|namespace| Lane {
                device: Arc::clone(&namespace.device),
                ana: self.controller.as_ref().and_then(|it| it.ana_group(namespace.ana_group)),
                shift: None,
                cleared: namespace.device.leaves_payload(),
                access: Access::ALL,
                access_epoch: 0,
                batch: Vec::new(),
            })
            .collect();
    }
}
