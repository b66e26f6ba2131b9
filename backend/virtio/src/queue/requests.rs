//! From a chain to requests: what [`Queue`] does with one chain that it has taken off the ring.

use super::{PIECES_INLINE, Queue};
use crate::blk::{Action, HEADER_BYTES, ID_BYTES, Limits, RANGE_BYTES, RANGES_MAX, VirtioStatus};
use crate::chain::{ChainError, PIECES_MAX};
use hawser_block::{BlockCount, Buffers, IoKind, Lba, Operation, Request, Token};
use hawser_runtime::Instant;

impl Queue {
    /// Parses one chain into its slot, and either makes requests of it or ends it here. `log`: it is new to the log.
    #[inline]
    pub(super) fn begin(
        &mut self,
        head: u16,
        started: Instant,
        limits: &Limits,
        log: bool,
    ) -> Result<(), ChainError> {
        self.chain.walk(&self.ring, &self.memory, head, self.indirect)?;
        let status = self.chain.take_status(&self.memory)?;
        match &mut self.log {
            Some(queue_log) if log => {
                queue_log.begin(head);
            }
            _ => self.counter = self.counter.wrapping_add(u64::from(log)),
        }
        let slot = &mut self.slots[usize::from(head)];
        slot.status = status;
        slot.started = started;
        slot.bytes = 0;
        slot.used_len = 1;
        slot.pending = 0;
        slot.pieces = 0;
        slot.generation = self.generation;
        slot.busy = true;
        slot.outcome = Ok(());
        self.in_flight += 1;

        let action = match self.chain.take_front::<HEADER_BYTES>() {
            Some(header) => limits.decode(&header, self.chain.readable_bytes(), self.chain.writable_bytes()),
            None => Action::Answer(VirtioStatus::IoErr),
        };
        match action {
            Action::Submit { operation, lba, blocks } => {
                self.begin_operation(head, operation, lba, blocks, limits)
            }
            Action::Ranges { write_zeroes } => self.begin_ranges(head, write_zeroes, limits),
            Action::GetId => self.answer_id(head),
            Action::Answer(status) => self.answer(head, status),
        }
        Ok(())
    }

    #[inline]
    fn begin_operation(&mut self, head: u16, operation: Operation, lba: u64, blocks: u64, limits: &Limits) {
        let token = Token(u64::from(head));
        let slot = &mut self.slots[usize::from(head)];
        slot.kind = operation.into();
        let pieces = match operation {
            Operation::Read => self.chain.writable(),
            Operation::Write { .. } => self.chain.readable(),
            _ => {
                slot.pending = 1;
                self.requests.push(Request {
                    operation,
                    lba: Lba(lba),
                    blocks: BlockCount(0),
                    buffers: Buffers::EMPTY,
                    token,
                });
                return;
            }
        };
        let shift = limits.geometry.block_size.shift();
        // A chain is at most 16 MiB (`chain::BYTES_MAX`).
        let bytes = u32::try_from(blocks << shift).unwrap_or(u32::MAX);
        slot.bytes = bytes;
        slot.used_len = if operation == Operation::Read { bytes.wrapping_add(1) } else { 1 };
        slot.pieces = u16::try_from(pieces.len()).unwrap_or(u16::MAX);
        self.bytes_in_flight += u64::from(bytes);
        let kept = if pieces.len() <= PIECES_INLINE {
            slot.inline[..pieces.len()].copy_from_slice(pieces);
            slot.inline.as_ptr()
        } else {
            let from = usize::from(head) * PIECES_MAX;
            let place = &mut self.overflow[from..from + pieces.len()];
            place.copy_from_slice(pieces);
            place.as_ptr()
        };
        // SAFETY: the slot keeps the array in place (neither vector is ever resized) until the request has ended, and the
        // queue owns the epoch of memory that it names until then; all of it is mapped readable and writable. No piece is
        // empty, and they add up to the bytes that were decoded.
        let buffers = unsafe { Buffers::new(kept, u32::from(slot.pieces), bytes) };
        let most = u64::from(limits.geometry.transfer_blocks_max.max(1));
        if blocks <= most {
            slot.pending = 1;
            self.requests.push(Request {
                operation,
                lba: Lba(lba),
                blocks: BlockCount(u32::try_from(blocks).unwrap_or(u32::MAX)),
                buffers,
                token,
            });
            return;
        }
        // Larger than what the device takes at once.
        let mut done = 0;
        while done < blocks {
            let here = most.min(blocks - done);
            let byte_at = |blocks: u64| usize::try_from(blocks << shift).unwrap_or(usize::MAX);
            slot.pending += 1;
            self.requests.push(Request {
                operation,
                lba: Lba(lba + done),
                blocks: BlockCount(u32::try_from(here).unwrap_or(u32::MAX)),
                buffers: buffers.slice(byte_at(done), byte_at(here)),
                token,
            });
            done += here;
        }
    }

    fn begin_ranges(&mut self, head: u16, write_zeroes: bool, limits: &Limits) {
        self.slots[usize::from(head)].kind = if write_zeroes { IoKind::WriteZeroes } else { IoKind::Discard };
        let bytes = self.chain.readable_bytes();
        let right = bytes > 0
            && bytes.is_multiple_of(RANGE_BYTES as u64)
            && bytes <= (RANGES_MAX * RANGE_BYTES) as u64;
        if !right {
            return self.answer(head, VirtioStatus::IoErr);
        }
        // All ranges are checked before the first is begun.
        let before = self.requests.len();
        while let Some(range) = self.chain.take_front::<RANGE_BYTES>() {
            match limits.range(write_zeroes, range) {
                Ok((operation, lba, blocks)) => {
                    let slot = &mut self.slots[usize::from(head)];
                    slot.pending += 1;
                    slot.bytes = slot.bytes.saturating_add(
                        u32::try_from(blocks << limits.geometry.block_size.shift()).unwrap_or(u32::MAX),
                    );
                    self.requests.push(Request {
                        operation,
                        lba: Lba(lba),
                        blocks: BlockCount(u32::try_from(blocks).unwrap_or(u32::MAX)),
                        buffers: Buffers::EMPTY,
                        token: Token(u64::from(head)),
                    });
                }
                Err(status) => {
                    self.requests.truncate(before);
                    self.slots[usize::from(head)].pending = 0;
                    return self.answer(head, status);
                }
            }
        }
    }

    /// GET_ID: the serial, padded with zeroes to 20 bytes, or as much of it as there is room for.
    fn answer_id(&mut self, head: u16) {
        let mut id = [0u8; ID_BYTES];
        for (to, from) in id.iter_mut().zip(self.disk.config.serial.bytes()) {
            *to = from;
        }
        let mut done = 0;
        for piece in self.chain.writable() {
            let len = piece.iov_len.min(ID_BYTES - done);
            // SAFETY: `len` bytes of a piece that lies in mapped guest memory; raw copy, no reference.
            unsafe { std::ptr::copy_nonoverlapping(id.as_ptr().add(done), piece.iov_base.cast::<u8>(), len) };
            done += len;
        }
        if done == 0 {
            return self.answer(head, VirtioStatus::IoErr);
        }
        if self.marks.is_some() {
            self.mark_writable(done);
        }
        self.slots[usize::from(head)].used_len = u32::try_from(done + 1).unwrap_or(1);
        self.show(head, VirtioStatus::Ok);
    }

    /// Ends a request that the device never sees: the guest's mistake, or what the disk does not offer.
    fn answer(&mut self, head: u16, status: VirtioStatus) {
        self.counters().mistakes.add(1);
        self.slots[usize::from(head)].used_len = 1;
        self.show(head, status);
    }
}
