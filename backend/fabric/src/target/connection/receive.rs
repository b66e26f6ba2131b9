//! What comes in: bytes into PDUs, PDUs into commands and their data.

use super::slots::Phase;
use super::{Connection, IN_CAPSULE_BYTES_MAX, Payload, Receiving, STAGING_BYTES, TRANSFER_BYTES_MAX};
use crate::nvme::bytes::get_array;
use crate::nvme::{NvmeStatus, StatusCode};
use crate::simulated::is_broken;
use crate::tcp::pdu::{self, alignment, command_from_bytes};
use crate::tcp::{
    CommonHeader, DataPdu, FatalStatus, InitRequest, InitResponse, PduError, PduKind, Receiver, TermRequest,
};
use hawser_block::{Completion, Status};
use hawser_runtime::Instant;

impl Connection {
    /// Where received bytes shall go: up to two places, in order. None when nothing more is wanted.
    pub(in super::super) fn receive_space(&mut self, places: &mut [libc::iovec; 2]) -> usize {
        let mut count = 0;
        if let Receiving::Payload(payload) = self.receiving {
            let slot = self.slots.at(payload.slot);
            // The data in front is there already.
            let start = slot.data().wrapping_add(slot.received as usize);
            places[0] = libc::iovec { iov_base: start.cast(), iov_len: payload.left };
            count = 1;
        } else if matches!(self.receiving, Receiving::Over) {
            return 0;
        }
        let (_, to) = self.staged;
        places[count] = libc::iovec {
            iov_base: self.staging.as_ptr().wrapping_add(to).cast(),
            iov_len: STAGING_BYTES - to,
        };
        count + 1
    }

    /// `count` bytes have come to the places that [`Connection::receive_space`] named.
    pub(in super::super) fn handle_received(&mut self, count: usize, now: Instant) {
        self.now = now;
        if let Some(controller) = &self.controller {
            controller.heard(now);
        }
        let mut staged = count;
        if let Receiving::Payload(payload) = self.receiving {
            let direct = count.min(payload.left);
            staged -= direct;
            self.payload_arrived(payload, direct);
        }
        assert!(self.staged.1 + staged <= STAGING_BYTES, "received more than there was room for");
        self.staged.1 += staged;
        self.parse();
    }

    /// The connection is over: nothing more is taken in, nothing that waits is begun.
    pub(in super::super) fn close(&mut self) {
        self.receiving = Receiving::Over;
        while let Some(index) = self.waiting.pop_front() {
            self.slots.release(index);
        }
        // What no device has got ends here.
        let unsent: Vec<_> = self
            .lanes
            .iter_mut()
            .flat_map(|lane| lane.batch.drain(..))
            .map(|request| request.token)
            .collect();
        for token in unsent {
            self.handle_completion(Completion { token, outcome: Err(Status::Aborted) });
        }
    }

    fn parse(&mut self) {
        loop {
            let (from, to) = self.staged;
            let there = to - from;
            let went_on = match self.receiving {
                Receiving::Over => {
                    self.staged = (0, 0);
                    return;
                }
                Receiving::Header => self.parse_header(there),
                Receiving::Payload(payload) => {
                    let count = there.min(payload.left);
                    if count > 0 {
                        let slot = self.slots.at(payload.slot);
                        // SAFETY: `count` bytes of staging are there; the slot's buffer has room for all of its data, of
                        // which `received + left` is at most `len` (checked with the header); they are apart.
                        unsafe {
                            let to = slot.data().add(slot.received as usize);
                            to.copy_from_nonoverlapping(self.staging.as_ptr().add(from), count);
                        }
                        self.staged.0 += count;
                        self.payload_arrived(payload, count);
                    }
                    count > 0
                }
                Receiving::Digest(payload) => self.parse_digest(payload, there),
            };
            if !went_on {
                break;
            }
        }
        let (from, to) = self.staged;
        if from == to {
            self.staged = (0, 0);
        } else if from > 0 && STAGING_BYTES - to < STAGING_BYTES / 2 {
            // A part of a header: below 300 bytes.
            // SAFETY: both ranges are within the staging buffer; `copy` allows overlap.
            unsafe { self.staging.as_ptr().copy_from(self.staging.as_ptr().add(from), to - from) };
            self.staged = (0, to - from);
        }
    }

    /// `count` bytes at the parse position, which are there.
    fn peek<const N: usize>(&self) -> [u8; N] {
        // SAFETY: the caller has seen that N bytes are there; no receive is under way while we parse.
        get_array(unsafe { self.staging.slice(self.staged.0, N) }, 0)
    }

    /// Parses one PDU's header, if it is whole. Returns whether it went on.
    fn parse_header(&mut self, there: usize) -> bool {
        if there < CommonHeader::LEN {
            return false;
        }
        let first: [u8; 8] = self.peek();
        let header = match CommonHeader::decode(&first, Receiver::Controller, self.digests) {
            Ok(header) => header,
            Err(error) => return self.terminate(&error, &first),
        };
        if let Err(error) = self.check_in_order(&header) {
            return self.terminate(&error, &first);
        }
        let header_len = header.header_len();
        // Padding before the data goes with the header.
        let skip = header_len.max(usize::from(header.data_offset));
        if there < skip {
            return false;
        }
        let result = self.check_header_digest(&header, header_len).and_then(|()| match header.kind {
            PduKind::InitRequest => self.initialise(),
            PduKind::Command => self.command(&header),
            PduKind::HostData => self.host_data(&header),
            // What the host found wrong with us.
            _ => {
                let term = TermRequest::decode(&self.peek());
                let offset = term.information;
                self.given_up = true;
                self.trouble = Some(format!("the host gave up: {} at offset {offset}", term.status));
                self.receiving = Receiving::Over;
                Ok(())
            }
        });
        if let Err(error) = result {
            // SAFETY: `there` bytes are there, of which the header is at most 132.
            let bytes = unsafe { self.staging.slice(self.staged.0, header_len.min(128)) }.to_vec();
            return self.terminate(&error, &bytes);
        }
        self.staged.0 += skip;
        true
    }

    /// What may come when, and how much data it may have.
    fn check_in_order(&self, header: &CommonHeader) -> Result<(), PduError> {
        let error = |status, offset, field, value: u32, expected| PduError {
            status,
            offset,
            pdu: header.kind.name(),
            field,
            value: u64::from(value),
            expected,
        };
        let kind = header.kind as u32;
        match header.kind {
            PduKind::HostTerm => Ok(()),
            PduKind::InitRequest if self.initialised => {
                Err(error(FatalStatus::SEQUENCE_ERROR, 0, "PDU-Type", kind, "a second one"))
            }
            PduKind::InitRequest => Ok(()),
            _ if !self.initialised => {
                Err(error(FatalStatus::SEQUENCE_ERROR, 0, "PDU-Type", kind, "before ICReq"))
            }
            PduKind::Command if header.data_len > IN_CAPSULE_BYTES_MAX => {
                let status = FatalStatus::LIMIT_EXCEEDED;
                Err(error(status, 4, "PLEN", header.len, "at most what IOCCSZ allows in a capsule"))
            }
            PduKind::HostData if header.data_len > TRANSFER_BYTES_MAX => {
                Err(error(FatalStatus::LIMIT_EXCEEDED, 4, "PLEN", header.len, "at most MAXH2CDATA of data"))
            }
            _ => Ok(()),
        }
    }

    fn check_header_digest(&self, header: &CommonHeader, header_len: usize) -> Result<(), PduError> {
        let bare = usize::from(header.kind.header_len());
        if header_len == bare {
            return Ok(());
        }
        // SAFETY: the whole header is there, and no receive is under way while we parse.
        let bytes = unsafe { self.staging.slice(self.staged.0, header_len) };
        let received: [u8; 4] = get_array(bytes, bare);
        if pdu::digest(&bytes[..bare]) == received {
            return Ok(());
        }
        let received = u32::from_le_bytes(received);
        Err(PduError {
            status: FatalStatus::HEADER_DIGEST_ERROR,
            offset: received,
            pdu: header.kind.name(),
            field: "HDGST",
            value: u64::from(received),
            expected: "the CRC32C of the header",
        })
    }

    fn initialise(&mut self) -> Result<(), PduError> {
        let request = InitRequest::decode(&self.peek())?;
        self.initialised = true;
        self.digests = request.digests;
        self.host_alignment = alignment(request.data_alignment);
        let response =
            InitResponse { data_alignment: 0, digests: self.digests, host_data_max: TRANSFER_BYTES_MAX };
        self.next.push_head(&response.to_bytes());
        Ok(())
    }

    fn command(&mut self, header: &CommonHeader) -> Result<(), PduError> {
        let sqe = command_from_bytes(&self.peek());
        let Some(index) = self.slots.take(sqe) else {
            return Err(PduError {
                status: FatalStatus::LIMIT_EXCEEDED,
                offset: 10,
                pdu: header.kind.name(),
                field: "CID",
                value: u64::from(sqe.cid),
                expected: "within the queue's size",
            });
        };
        if header.data_len == 0 {
            self.begin(index);
            return Ok(());
        }
        let slot = self.slots.at(index);
        slot.in_capsule = header.data_len;
        slot.len = header.data_len;
        let buffer = self.slots.pool.take_anyway(header.data_len as usize);
        self.slots.at(index).buffer = Some(buffer);
        self.receiving = Receiving::Payload(Payload {
            slot: index,
            begin: 0,
            left: header.data_len as usize,
            kind: header.kind,
            last: true,
        });
        Ok(())
    }

    fn host_data(&mut self, header: &CommonHeader) -> Result<(), PduError> {
        let data = DataPdu::decode(header, &self.peek())?;
        let error = |status, offset, field, value: u32, expected| PduError {
            status,
            offset,
            pdu: header.kind.name(),
            field,
            value: u64::from(value),
            expected,
        };
        let index = usize::from(data.tag);
        let slot = self.slots.get(index).filter(|slot| slot.phase == Phase::Transfer);
        let Some(slot) = slot else {
            let status = FatalStatus::INVALID_HEADER_FIELD;
            return Err(error(status, 10, "TTAG", u32::from(data.tag), "that of an R2T"));
        };
        if slot.sqe.cid != data.cid {
            let status = FatalStatus::INVALID_HEADER_FIELD;
            return Err(error(status, 8, "CCCID", u32::from(data.cid), "that of the R2T"));
        }
        if data.offset != slot.received {
            let status = FatalStatus::DATA_OUT_OF_RANGE;
            return Err(error(status, 12, "DATAO", data.offset, "where the data before it ended"));
        }
        let left = slot.len - slot.received;
        if data.len == 0 {
            let status = FatalStatus::INVALID_HEADER_FIELD;
            return Err(error(status, 16, "DATAL", data.len, "more than 0"));
        }
        if data.len > left {
            return Err(error(FatalStatus::DATA_OUT_OF_RANGE, 16, "DATAL", data.len, "within the R2T"));
        }
        if data.last != (data.len == left) {
            let status = FatalStatus::INVALID_HEADER_FIELD;
            let flags = u32::from(header.flags);
            return Err(error(
                status,
                1,
                "FLAGS.LAST_PDU",
                flags,
                "set on the R2T's last data, and only there",
            ));
        }
        self.receiving = Receiving::Payload(Payload {
            slot: index,
            begin: slot.received as usize,
            left: data.len as usize,
            kind: header.kind,
            last: data.last,
        });
        Ok(())
    }

    /// `count` more bytes of a PDU's data are in the command's buffer.
    fn payload_arrived(&mut self, mut payload: Payload, count: usize) {
        payload.left -= count;
        self.slots.at(payload.slot).received += u32::try_from(count).expect("at most the PDU's data");
        self.receiving = Receiving::Payload(payload);
        if payload.left == 0 {
            if self.digests.data {
                self.receiving = Receiving::Digest(payload);
            } else {
                self.payload_complete(payload);
            }
        }
    }

    fn parse_digest(&mut self, payload: Payload, there: usize) -> bool {
        if there < 4 {
            return false;
        }
        let received: [u8; 4] = self.peek();
        self.staged.0 += 4;
        let slot = self.slots.at(payload.slot);
        let len = slot.received as usize - payload.begin;
        let buffer = slot.buffer.as_ref().expect("data came into it");
        // SAFETY: these bytes were received; the device does not have them yet, and nothing is received while we parse.
        let right = pdu::digest(unsafe { buffer.slice(payload.begin, len) }) == received
            || is_broken("skip_data_digest");
        if !right {
            // The command fails; the connection goes on (TCP 3.3.1.1).
            slot.refused = Some(NvmeStatus::retryable(StatusCode::TRANSIENT_TRANSPORT_ERROR));
            if let Some(count) = self.shared.corrupted.add() {
                let host = self.controller.as_ref().map_or("nobody", |controller| &controller.host.nqn);
                log::warn!(
                    "target: data of {host} came with a wrong digest: the command fails, and the host sends it again; {count} such commands so far"
                );
            }
        }
        self.payload_complete(payload);
        true
    }

    /// A PDU's data is whole.
    fn payload_complete(&mut self, payload: Payload) {
        self.receiving = Receiving::Header;
        if payload.kind == PduKind::Command {
            self.begin(payload.slot);
        } else if payload.last {
            self.transferred(payload.slot);
        }
    }

    /// Ends the connection over what the peer did. Returns false: nothing goes on.
    fn terminate(&mut self, error: &PduError, header: &[u8]) -> bool {
        self.trouble = Some(error.to_string());
        self.next.push_head(&TermRequest::new(error).to_bytes(Receiver::Host, header));
        self.receiving = Receiving::Over;
        false
    }
}
