//! What comes in: bytes into PDUs, PDUs into data where it belongs and into ends of commands.

use super::{
    Answer, Data, HEADER_LEN, HEADER_LEN_MAX, IN_PLACE_MIN, QueueError, QueuePair, Receive, SLOTS_MAX,
    Transfer, length,
};
use crate::initiator::batch::DIGEST_PIECE;
use crate::nvme::bytes::{get_array, low32};
use crate::nvme::{Cqe, NvmeStatus};
use crate::tcp::pdu::{self, FLAG_HEADER_DIGEST, PduKind};
use crate::tcp::{
    CommonHeader, DataPdu, Digests, FatalStatus, PduError, ReadyToTransfer, Receiver, TermRequest,
};
use hawser_block::Buffers;

/// A rest below this is not worth a receive of its own.
const IN_PLACE_REST_MIN: u32 = 32 << 10;
/// How much is staged at once while such reads are outstanding: a few headers, so that little of their data is copied.
const STAGING_SHORT: usize = 8 << 10;

impl<T: Copy> QueuePair<T> {
    /// Where the kernel may put the next bytes itself: when they are the rest of large data. Whatever comes after those is
    /// for the staging buffer. To be followed by [`QueuePair::handle_in_place`].
    pub(crate) fn receive_into(&self) -> Option<Buffers> {
        let Receive::Data(Data { slot, left, .. }) = self.receive else { return None };
        let slot = &self.slots[usize::from(slot)];
        let Transfer::ToHost(buffers) = slot.transfer else { return None };
        // A digest is computed before the guest can change what it covers.
        if left < IN_PLACE_REST_MIN || length(&buffers) < IN_PLACE_MIN || self.limits.digests.data {
            return None;
        }
        Some(buffers.slice(slot.moved as usize, left as usize))
    }

    /// How much of the staging buffer the next receive should use.
    pub(crate) fn staging_len(&self, staging: usize) -> usize {
        if self.large_reads > 0 { staging.min(STAGING_SHORT) } else { staging }
    }

    /// `len` bytes were received to where `receive_into` said.
    pub(crate) fn handle_in_place(&mut self, len: u32) -> Result<(), QueueError> {
        let Receive::Data(data) = self.receive else { unreachable!("only data is received in place") };
        self.moved.in_place += u64::from(len);
        self.data_arrived(data, len)
    }

    /// Takes received bytes, as many as there are.
    ///
    /// # Errors
    /// When the connection cannot go on.
    pub(crate) fn handle_bytes(&mut self, mut bytes: &[u8]) -> Result<(), QueueError> {
        while !bytes.is_empty() {
            match self.receive {
                Receive::Header { have: 0 } if bytes.len() >= self.header_len() => {
                    let mut header = [0; HEADER_LEN_MAX];
                    let len = self.header_len();
                    header[..len].copy_from_slice(&bytes[..len]);
                    let len = self.handle_header(&header)?;
                    bytes = &bytes[len..];
                }
                Receive::Header { have } => {
                    // Garbage is told from a header without waiting for more of it.
                    let want = if have < CommonHeader::LEN {
                        CommonHeader::LEN
                    } else {
                        // An ICResp has a longer one; it is refused for what it is.
                        self.common_header(&get_array(&self.header, 0))?.header_len().min(HEADER_LEN_MAX)
                    };
                    let take = bytes.len().min(want - have);
                    self.header[have..have + take].copy_from_slice(&bytes[..take]);
                    bytes = &bytes[take..];
                    let have = have + take;
                    self.receive = Receive::Header { have };
                    if have == CommonHeader::LEN {
                        self.common_header(&get_array(&self.header, 0))?;
                    } else if have == want && want > CommonHeader::LEN {
                        self.handle_header(&{ self.header })?;
                    }
                }
                Receive::Padding { left, data } => {
                    let take = low32(bytes.len() as u64).min(left);
                    bytes = &bytes[take as usize..];
                    let left = left - take;
                    self.receive =
                        if left == 0 { Receive::Data(data) } else { Receive::Padding { left, data } };
                }
                Receive::Digest { have, data } => {
                    let take = bytes.len().min(Digests::LEN as usize - have);
                    self.header[have..have + take].copy_from_slice(&bytes[..take]);
                    bytes = &bytes[take..];
                    let have = have + take;
                    self.receive = Receive::Digest { have, data };
                    if have == Digests::LEN as usize {
                        let received = u32::from_le_bytes(get_array(&self.header, 0));
                        if received != data.crc {
                            return Err(QueueError::Corrupted { received, computed: data.crc });
                        }
                        self.data_over(data)?;
                    }
                }
                Receive::Data(mut data) => {
                    let mut take = low32(bytes.len() as u64).min(data.left);
                    if self.limits.digests.data {
                        take = take.min(low32(DIGEST_PIECE as u64));
                        data.crc = crc32c::crc32c_append(data.crc, &bytes[..take as usize]);
                    }
                    let slot = &self.slots[usize::from(data.slot)];
                    let Transfer::ToHost(buffers) = &slot.transfer else {
                        unreachable!("data is taken for reads only")
                    };
                    let place = buffers.slice(slot.moved as usize, take as usize);
                    // SAFETY: the slot is taken, so its request has not ended and its buffers are valid; it is a read;
                    // `bytes` has `take` bytes, and our staging memory is apart from the request's.
                    unsafe { place.copy_from(bytes.as_ptr()) };
                    *match (self.limits.digests.data, length(buffers) < IN_PLACE_MIN) {
                        (true, _) => &mut self.moved.digest_read,
                        (false, true) => &mut self.moved.small_read,
                        (false, false) => &mut self.moved.large_read,
                    } += u64::from(take);
                    bytes = &bytes[take as usize..];
                    self.data_arrived(data, take)?;
                }
                Receive::Over => return Ok(()),
            }
        }
        Ok(())
    }

    /// How long headers are, but those that never have a digest.
    fn header_len(&self) -> usize {
        if self.limits.digests.header { HEADER_LEN_MAX } else { HEADER_LEN }
    }

    /// The first bytes of a PDU.
    fn common_header(&self, bytes: &[u8; 8]) -> Result<CommonHeader, QueueError> {
        CommonHeader::decode(bytes, Receiver::Host, self.limits.digests).map_err(QueueError::Protocol)
    }

    /// Takes a whole header, with its digest if it has one. Returns how long it was.
    fn handle_header(&mut self, whole: &[u8; HEADER_LEN_MAX]) -> Result<usize, QueueError> {
        let header = self.common_header(&get_array(whole, 0))?;
        let bytes: &[u8; HEADER_LEN] = &get_array(whole, 0);
        let header_len = header.header_len().min(HEADER_LEN_MAX);
        if header.flags & FLAG_HEADER_DIGEST != 0 && pdu::digest(bytes) != get_array::<4>(whole, HEADER_LEN) {
            let received = u32::from_le_bytes(get_array(whole, HEADER_LEN));
            let status = FatalStatus::HEADER_DIGEST_ERROR;
            return Err(with_status(wrong(header.kind, received, "HDGST", received, "the header's"), status));
        }
        self.receive = Receive::Header { have: 0 };
        match header.kind {
            PduKind::ControllerData => {
                let data = DataPdu::decode(&header, bytes).map_err(QueueError::Protocol)?;
                let index = self.find(header.kind, 8, data.cid)?;
                let slot = &self.slots[usize::from(index)];
                let Transfer::ToHost(buffers) = &slot.transfer else {
                    return Err(wrong(header.kind, 8, "CCCID", data.cid, "a command that reads"));
                };
                // In order (TCP 3.3.2: a controller sends the data of one command in order), and not more than asked.
                if data.offset != slot.moved {
                    let error = wrong(header.kind, 12, "DATAO", data.offset, "where the last data ended");
                    return Err(with_status(error, FatalStatus::DATA_OUT_OF_RANGE));
                }
                if data.len > length(buffers) - slot.moved {
                    let error = wrong(header.kind, 16, "DATAL", data.len, "within the command's data");
                    return Err(with_status(error, FatalStatus::DATA_OUT_OF_RANGE));
                }
                let padding = u32::from(header.data_offset).saturating_sub(low32(header_len as u64));
                let DataPdu { len, last, success, .. } = data;
                let state = Data { slot: index, left: len, last, success, crc: 0 };
                self.receive = match (len, padding) {
                    // A C2HData without data has no digest: only its flags count.
                    (0, _) => {
                        self.data_over(state)?;
                        return Ok(header_len);
                    }
                    (_, 0) => Receive::Data(state),
                    (_, left) => Receive::Padding { left, data: state },
                };
            }
            PduKind::Response => {
                let cqe = Cqe::from_bytes(&get_array(bytes, 8));
                let index = self.find(header.kind, 20, cqe.cid)?;
                if let Some(flow) = &mut self.limits.flow
                    && !flow.answered(cqe.sq_head)
                {
                    self.limits.flow = None;
                }
                self.answer(index, Answer { status: cqe.status, result: cqe.result })?;
            }
            PduKind::ReadyToTransfer => {
                let ready = ReadyToTransfer::decode(bytes).map_err(QueueError::Protocol)?;
                let index = self.find(header.kind, 8, ready.cid)?;
                self.ready_to_transfer(index, &ready)?;
            }
            PduKind::ControllerTerm => {
                self.receive = Receive::Over;
                return Err(QueueError::Terminated(TermRequest::decode(bytes)));
            }
            _ => {
                let error = wrong(header.kind, 0, "PDU-Type", header.kind as u8, "a type that may come now");
                return Err(with_status(error, FatalStatus::SEQUENCE_ERROR));
            }
        }
        Ok(header_len)
    }

    /// The slot of a command that is not answered yet.
    fn find(&self, kind: PduKind, offset: u32, cid: u16) -> Result<u16, QueueError> {
        let index = cid & (SLOTS_MAX - 1);
        let field = if kind == PduKind::Response { "CID" } else { "CCCID" };
        match self.slots.get(usize::from(index)) {
            Some(slot)
                if slot.sqe.cid == cid && slot.begun && slot.user.is_some() && slot.answer.is_none() =>
            {
                Ok(index)
            }
            _ => Err(wrong(kind, offset, field, cid, "a command that is outstanding")),
        }
    }

    fn ready_to_transfer(&mut self, index: u16, ready: &ReadyToTransfer) -> Result<(), QueueError> {
        let kind = PduKind::ReadyToTransfer;
        let slot = &mut self.slots[usize::from(index)];
        let Some(outgoing) = slot.transfer.outgoing() else {
            return Err(wrong(kind, 8, "CCCID", ready.cid, "a command that writes"));
        };
        if slot.in_capsule {
            return Err(wrong(kind, 8, "CCCID", ready.cid, "a command whose data was not in the capsule"));
        }
        if slot.wanted > 0 {
            let error = wrong(kind, 10, "TTAG", ready.tag, "the only R2T of its command");
            return Err(with_status(error, FatalStatus::LIMIT_EXCEEDED));
        }
        if ready.offset != slot.moved {
            let error = wrong(kind, 12, "R2TO", ready.offset, "where the last data ended");
            return Err(with_status(error, FatalStatus::DATA_OUT_OF_RANGE));
        }
        if ready.len > outgoing.len() - slot.moved {
            let error = wrong(kind, 16, "R2TL", ready.len, "within the command's data");
            return Err(with_status(error, FatalStatus::DATA_OUT_OF_RANGE));
        }
        slot.tag = ready.tag;
        slot.wanted = ready.len;
        self.data.push_back(index);
        Ok(())
    }

    fn data_arrived(&mut self, mut data: Data, len: u32) -> Result<(), QueueError> {
        self.slots[usize::from(data.slot)].moved += len;
        data.left -= len;
        if data.left > 0 {
            self.receive = Receive::Data(data);
            return Ok(());
        }
        if self.limits.digests.data {
            self.receive = Receive::Digest { have: 0, data };
            return Ok(());
        }
        self.data_over(data)
    }

    /// All data of a PDU is there, and is what was sent.
    fn data_over(&mut self, data: Data) -> Result<(), QueueError> {
        self.receive = Receive::Header { have: 0 };
        if data.success {
            if let Some(flow) = &mut self.limits.flow {
                flow.answered_with_data();
            }
            self.answer(data.slot, Answer { status: NvmeStatus::SUCCESS, result: 0 })?;
        } else if data.last {
            self.whole(data.slot, PduKind::ControllerData, 1, "FLAGS.LAST_PDU")?;
        }
        Ok(())
    }

    /// All data of the command has moved.
    fn whole(&self, index: u16, kind: PduKind, offset: u32, field: &'static str) -> Result<(), QueueError> {
        let slot = &self.slots[usize::from(index)];
        let all = match &slot.transfer {
            Transfer::ToHost(buffers) | Transfer::FromHost(buffers) => length(buffers),
            Transfer::Inline(_, len) => u32::from(*len),
            Transfer::None => return Ok(()),
        };
        if slot.moved == all && slot.wanted == 0 {
            return Ok(());
        }
        Err(wrong(kind, offset, field, slot.moved, "after all data of the command"))
    }

    fn answer(&mut self, index: u16, answer: Answer) -> Result<(), QueueError> {
        if answer.status.is_success() {
            self.whole(index, PduKind::Response, 22, "success, bytes moved")?;
        }
        let slot = &mut self.slots[usize::from(index)];
        slot.answer = Some(answer);
        if slot.sending {
            return Ok(());
        }
        self.end(index);
        Ok(())
    }
}

fn wrong(
    kind: PduKind,
    offset: u32,
    field: &'static str,
    value: impl Into<u64>,
    expected: &'static str,
) -> QueueError {
    let status = FatalStatus::INVALID_HEADER_FIELD;
    QueueError::Protocol(PduError { status, offset, pdu: kind.name(), field, value: value.into(), expected })
}

fn with_status(error: QueueError, status: FatalStatus) -> QueueError {
    match error {
        QueueError::Protocol(error) => QueueError::Protocol(PduError { status, ..error }),
        other => other,
    }
}
