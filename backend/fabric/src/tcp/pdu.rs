//! PDUs (TCP 3.6): common header, type-specific header, padding, data, and where digests go.
//!
//! ```text
//!  0     1      2     3    4        8             HLEN  [+4]        PDO         PLEN-4   PLEN
//!  ├─────┼──────┼─────┼────┼────────┼──────────────┼────────┼───────┼────────────┼────────┤
//!  │type │flags │HLEN │PDO │ PLEN   │ by type      │ header │ pad   │ data       │ data   │
//!  │     │      │     │    │        │              │ digest │       │            │ digest │
//!  └─────┴──────┴─────┴────┴────────┴──────────────┴────────┴───────┴────────────┴────────┘
//! ```
//!
//! Receiving goes in two steps: [`CommonHeader::decode`] on the first 8 bytes, which says how long the header is; then
//! the type's own `decode` on the whole header. Each refuses what the specification calls an error with a [`PduError`],
//! which names the field and is what a terminate request ([`TermRequest`]) is made of.

use crate::nvme::bytes::{get_u16, get_u32, low8, put_u16, put_u32};
use crate::nvme::{Cqe, Sqe};
use std::fmt;

/// PDU types (TCP figure "NVMe/TCP PDU Types").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum PduKind {
    /// ICReq: a host opens a connection.
    InitRequest = 0x00,
    /// ICResp: the controller's answer.
    InitResponse = 0x01,
    /// H2CTermReq: the host gives the connection up.
    HostTerm = 0x02,
    /// C2HTermReq: the controller gives the connection up.
    ControllerTerm = 0x03,
    /// CapsuleCmd: a command, perhaps with data.
    Command = 0x04,
    /// CapsuleResp: a completion.
    Response = 0x05,
    /// H2CData: data that an R2T asked for.
    HostData = 0x06,
    /// C2HData: data that a command asked for.
    ControllerData = 0x07,
    /// R2T: the controller is ready for data.
    ReadyToTransfer = 0x09,
}

impl PduKind {
    fn from_byte(byte: u8) -> Option<PduKind> {
        Some(match byte {
            0x00 => PduKind::InitRequest,
            0x01 => PduKind::InitResponse,
            0x02 => PduKind::HostTerm,
            0x03 => PduKind::ControllerTerm,
            0x04 => PduKind::Command,
            0x05 => PduKind::Response,
            0x06 => PduKind::HostData,
            0x07 => PduKind::ControllerData,
            0x09 => PduKind::ReadyToTransfer,
            _ => return None,
        })
    }

    /// The specification's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            PduKind::InitRequest => "ICReq",
            PduKind::InitResponse => "ICResp",
            PduKind::HostTerm => "H2CTermReq",
            PduKind::ControllerTerm => "C2HTermReq",
            PduKind::Command => "CapsuleCmd",
            PduKind::Response => "CapsuleResp",
            PduKind::HostData => "H2CData",
            PduKind::ControllerData => "C2HData",
            PduKind::ReadyToTransfer => "R2T",
        }
    }

    /// HLEN: the length of common and type-specific header.
    #[must_use]
    pub const fn header_len(self) -> u8 {
        match self {
            PduKind::InitRequest | PduKind::InitResponse => 128,
            PduKind::Command => 72,
            _ => 24,
        }
    }

    /// Who gets PDUs of this kind.
    #[must_use]
    pub const fn receiver(self) -> Receiver {
        match self {
            PduKind::InitRequest | PduKind::HostTerm | PduKind::Command | PduKind::HostData => {
                Receiver::Controller
            }
            _ => Receiver::Host,
        }
    }

    /// Whether data may follow the header.
    const fn may_have_data(self) -> bool {
        matches!(self, PduKind::Command | PduKind::HostData | PduKind::ControllerData)
    }

    /// ICReq, ICResp and terminate requests never carry digests (TCP 3.3.1).
    const fn never_digested(self) -> bool {
        matches!(
            self,
            PduKind::InitRequest | PduKind::InitResponse | PduKind::HostTerm | PduKind::ControllerTerm
        )
    }
}

/// Which side reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Receiver {
    /// An initiator.
    Host,
    /// A target.
    Controller,
}

/// Which digests a connection uses: CRC32C over the header (HDGST) and over the data (DDGST).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Digests {
    /// HDGST.
    pub header: bool,
    /// DDGST.
    pub data: bool,
}

impl Digests {
    /// Neither.
    pub const NONE: Digests = Digests { header: false, data: false };
    /// The length of one.
    pub const LEN: u32 = 4;

    fn from_byte(byte: u8) -> Digests {
        Digests { header: byte & 1 != 0, data: byte & 2 != 0 }
    }

    fn to_byte(self) -> u8 {
        u8::from(self.header) | u8::from(self.data) << 1
    }

    const fn header_len(self) -> u32 {
        if self.header { Digests::LEN } else { 0 }
    }

    const fn data_len(self) -> u32 {
        if self.data { Digests::LEN } else { 0 }
    }
}

/// A digest as on the wire (TCP 3.3.1.1): CRC32C, little-endian.
#[must_use]
pub fn digest(bytes: &[u8]) -> [u8; 4] {
    crc32c::crc32c(bytes).to_le_bytes()
}

/// FLAGS bit 0: a header digest follows the header.
pub const FLAG_HEADER_DIGEST: u8 = 1 << 0;
/// FLAGS bit 1: a data digest follows the data.
pub const FLAG_DATA_DIGEST: u8 = 1 << 1;
/// FLAGS bit 2 of H2CData and C2HData: the last data of the transfer.
pub const FLAG_LAST: u8 = 1 << 2;
/// FLAGS bit 3 of C2HData: the command succeeded, no CapsuleResp will follow.
pub const FLAG_SUCCESS: u8 = 1 << 3;

/// FES: why a connection is given up (TCP figure "H2CTermReq PDU" and "C2HTermReq PDU").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FatalStatus(pub u16);

impl FatalStatus {
    /// A header field has a value that it may not have; FEI is the field's offset.
    pub const INVALID_HEADER_FIELD: FatalStatus = FatalStatus(1);
    /// A PDU that may not come now.
    pub const SEQUENCE_ERROR: FatalStatus = FatalStatus(2);
    /// The header digest is wrong; FEI is the digest received.
    pub const HEADER_DIGEST_ERROR: FatalStatus = FatalStatus(3);
    /// Data outside of the transfer.
    pub const DATA_OUT_OF_RANGE: FatalStatus = FatalStatus(4);
    /// More R2Ts, or more data in a PDU, than was agreed.
    pub const LIMIT_EXCEEDED: FatalStatus = FatalStatus(5);
    /// A parameter that the receiver does not support; FEI is its offset.
    pub const UNSUPPORTED_PARAMETER: FatalStatus = FatalStatus(6);
}

impl fmt::Display for FatalStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            1 => "Invalid PDU Header Field",
            2 => "PDU Sequence Error",
            3 => "Header Digest Error",
            4 => "Data Transfer Out of Range",
            5 => "Transfer Limit Exceeded",
            6 => "Unsupported Parameter",
            other => return write!(f, "fatal status {other}"),
        })
    }
}

/// A PDU that ends the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PduError {
    /// For FES of the terminate request.
    pub status: FatalStatus,
    /// For FEI: the offset of the wrong field, where the status calls for one.
    pub offset: u32,
    /// The kind's name, or "PDU" when that is what is wrong.
    pub pdu: &'static str,
    /// The field, as the specification abbreviates it.
    pub field: &'static str,
    /// What it held.
    pub value: u64,
    /// What would have been right.
    pub expected: &'static str,
}

impl fmt::Display for PduError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let PduError { status, pdu, field, value, expected, .. } = self;
        write!(f, "{pdu}: {field} is {value:#x}, not {expected} ({status})")
    }
}

impl std::error::Error for PduError {}

/// An error of a header field.
fn invalid(
    kind: PduKind,
    offset: u32,
    field: &'static str,
    value: impl Into<u64>,
    expected: &'static str,
) -> PduError {
    let status = FatalStatus::INVALID_HEADER_FIELD;
    PduError { status, offset, pdu: kind.name(), field, value: value.into(), expected }
}

/// The first 8 bytes of every PDU, checked as far as they can be by themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommonHeader {
    /// PDU-Type.
    pub kind: PduKind,
    /// FLAGS.
    pub flags: u8,
    /// PDO: where the data begins; 0 without data.
    pub data_offset: u8,
    /// PLEN: the length of everything.
    pub len: u32,
    /// The length of the data (without padding and digest).
    pub data_len: u32,
}

impl CommonHeader {
    /// Its size in bytes.
    pub const LEN: usize = 8;
    /// The most of an erroneous header that a terminate request may carry.
    const TERM_DATA_MAX: u32 = 128;

    /// Reads and checks a PDU's first 8 bytes.
    ///
    /// # Errors
    /// When the type is unknown or not for `receiver`, the digest flags are not what was agreed, or HLEN, PDO and PLEN do
    /// not fit together (TCP 3.6.1).
    pub fn decode(bytes: &[u8; 8], receiver: Receiver, digests: Digests) -> Result<CommonHeader, PduError> {
        let Some(kind) = PduKind::from_byte(bytes[0]).filter(|kind| kind.receiver() == receiver) else {
            let status = FatalStatus::INVALID_HEADER_FIELD;
            let value = u64::from(bytes[0]);
            let expected = match receiver {
                Receiver::Host => "a type that a controller sends",
                Receiver::Controller => "a type that a host sends",
            };
            return Err(PduError { status, offset: 0, pdu: "PDU", field: "PDU-Type", value, expected });
        };
        let [_, flags, header_len, data_offset, ..] = *bytes;
        let len = get_u32(bytes, 4);
        let digests = if kind.never_digested() { Digests::NONE } else { digests };
        if header_len != kind.header_len() {
            return Err(invalid(kind, 2, "HLEN", header_len, "the length of this type's header"));
        }
        if (flags & FLAG_HEADER_DIGEST != 0) != digests.header {
            return Err(invalid(kind, 1, "FLAGS.HDGSTF", flags, "as agreed in ICReq and ICResp"));
        }
        let header_end = u32::from(header_len) + digests.header_len();
        if matches!(kind, PduKind::HostTerm | PduKind::ControllerTerm) {
            if !(header_end..=header_end + CommonHeader::TERM_DATA_MAX).contains(&len) {
                return Err(invalid(kind, 4, "PLEN", len, "24 to 152"));
            }
            return Ok(CommonHeader {
                kind,
                flags,
                data_offset: header_len,
                len,
                data_len: len - header_end,
            });
        }
        if !kind.may_have_data() || len == header_end {
            if len != header_end {
                return Err(invalid(kind, 4, "PLEN", len, "the length of this type's header"));
            }
            if flags & FLAG_DATA_DIGEST != 0 {
                return Err(invalid(kind, 1, "FLAGS.DDGSTF", flags, "clear without data"));
            }
            return Ok(CommonHeader { kind, flags, data_offset: 0, len, data_len: 0 });
        }
        if (flags & FLAG_DATA_DIGEST != 0) != digests.data {
            return Err(invalid(kind, 1, "FLAGS.DDGSTF", flags, "as agreed in ICReq and ICResp"));
        }
        // The least padding alignment is a dword (TCP 3.6.2.2, HPDA and CPDA counted from 0).
        if u32::from(data_offset) < header_end || data_offset % 4 != 0 {
            return Err(invalid(kind, 3, "PDO", data_offset, "a multiple of 4 after the header"));
        }
        let data_len = len.checked_sub(u32::from(data_offset) + digests.data_len()).filter(|len| *len > 0);
        let Some(data_len) = data_len else {
            return Err(invalid(kind, 4, "PLEN", len, "more than PDO"));
        };
        Ok(CommonHeader { kind, flags, data_offset, len, data_len })
    }

    /// The length of the header with its digest, if it has one: what must be there before the type's `decode`.
    #[must_use]
    pub fn header_len(&self) -> usize {
        let digest = if self.flags & FLAG_HEADER_DIGEST != 0 { 4 } else { 0 };
        usize::from(self.kind.header_len()) + digest
    }

    fn put(bytes: &mut [u8], kind: PduKind, flags: u8, data_offset: u8, len: u32) {
        bytes[0] = kind as u8;
        bytes[1] = flags;
        bytes[2] = kind.header_len();
        bytes[3] = data_offset;
        put_u32(bytes, 4, len);
    }

    /// Puts the header of a PDU with `data_len` bytes of data (perhaps 0) that begin as soon as `digests` and an alignment
    /// of `1 << shift` bytes allow. Returns PDO.
    fn put_with_data(
        bytes: &mut [u8],
        kind: PduKind,
        flags: u8,
        data_len: u32,
        digests: Digests,
        alignment: u32,
    ) -> u8 {
        let header_end = u32::from(kind.header_len()) + digests.header_len();
        let flags = flags | if digests.header { FLAG_HEADER_DIGEST } else { 0 };
        if data_len == 0 {
            CommonHeader::put(bytes, kind, flags, 0, header_end);
            return 0;
        }
        let flags = flags | if digests.data { FLAG_DATA_DIGEST } else { 0 };
        let data_offset = header_end.next_multiple_of(alignment);
        let len = data_offset + data_len + digests.data_len();
        CommonHeader::put(bytes, kind, flags, low8(data_offset), len);
        low8(data_offset)
    }
}

/// The alignment in bytes that a HPDA or CPDA value (0 to 31) asks for: dwords, counted from 0.
#[must_use]
pub fn alignment(padding: u8) -> u32 {
    (u32::from(padding & 31) + 1) * 4
}

/// ICReq (TCP 3.6.2.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InitRequest {
    /// HPDA: how data in C2HData shall be aligned; see [`alignment`].
    pub data_alignment: u8,
    /// DGST: digests that the host asks for.
    pub digests: Digests,
    /// MAXR2T: how many R2Ts may be outstanding for one command, counted from 0.
    pub r2t_max: u32,
}

/// ICResp (TCP 3.6.2.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InitResponse {
    /// CPDA: how data in CapsuleCmd and H2CData shall be aligned; see [`alignment`].
    pub data_alignment: u8,
    /// DGST: digests that are used.
    pub digests: Digests,
    /// MAXH2CDATA: the most bytes of data in one H2CData; at least 4096.
    pub host_data_max: u32,
}

fn check_init(kind: PduKind, bytes: &[u8; 128]) -> Result<(), PduError> {
    let version = get_u16(bytes, 8);
    if version != 0 {
        let status = FatalStatus::UNSUPPORTED_PARAMETER;
        return Err(PduError { status, ..invalid(kind, 8, "PFV", version, "0") });
    }
    if bytes[10] > 31 {
        let field = if kind == PduKind::InitRequest { "HPDA" } else { "CPDA" };
        return Err(invalid(kind, 10, field, bytes[10], "0 to 31"));
    }
    Ok(())
}

impl InitRequest {
    /// As on the wire.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; 128] {
        let mut bytes = [0; 128];
        CommonHeader::put(&mut bytes, PduKind::InitRequest, 0, 0, 128);
        bytes[10] = self.data_alignment;
        bytes[11] = self.digests.to_byte();
        put_u32(&mut bytes, 12, self.r2t_max);
        bytes
    }

    /// From the wire, after [`CommonHeader::decode`].
    ///
    /// # Errors
    /// When the format version or the alignment is unknown.
    pub fn decode(bytes: &[u8; 128]) -> Result<InitRequest, PduError> {
        check_init(PduKind::InitRequest, bytes)?;
        let digests = Digests::from_byte(bytes[11]);
        Ok(InitRequest { data_alignment: bytes[10], digests, r2t_max: get_u32(bytes, 12) })
    }
}

impl InitResponse {
    /// As on the wire.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; 128] {
        let mut bytes = [0; 128];
        CommonHeader::put(&mut bytes, PduKind::InitResponse, 0, 0, 128);
        bytes[10] = self.data_alignment;
        bytes[11] = self.digests.to_byte();
        put_u32(&mut bytes, 12, self.host_data_max);
        bytes
    }

    /// From the wire, after [`CommonHeader::decode`].
    ///
    /// # Errors
    /// When the format version or the alignment is unknown, or MAXH2CDATA too small.
    pub fn decode(bytes: &[u8; 128]) -> Result<InitResponse, PduError> {
        check_init(PduKind::InitResponse, bytes)?;
        let host_data_max = get_u32(bytes, 12);
        if host_data_max < 4096 {
            return Err(invalid(PduKind::InitResponse, 12, "MAXH2CDATA", host_data_max, "at least 4096"));
        }
        Ok(InitResponse { data_alignment: bytes[10], digests: Digests::from_byte(bytes[11]), host_data_max })
    }
}

/// H2CTermReq and C2HTermReq (TCP 3.6.2.4, 3.6.2.5): the 24 bytes before the copy of the erroneous header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TermRequest {
    /// FES.
    pub status: FatalStatus,
    /// FEI.
    pub information: u32,
}

impl TermRequest {
    /// What ends a connection over `error`.
    #[must_use]
    pub fn new(error: &PduError) -> TermRequest {
        TermRequest { status: error.status, information: error.offset }
    }

    /// As on the wire, to `receiver`, with the header that was wrong (at most 128 bytes of it).
    #[must_use]
    pub fn to_bytes(&self, receiver: Receiver, erroneous: &[u8]) -> Vec<u8> {
        let kind = match receiver {
            Receiver::Controller => PduKind::HostTerm,
            Receiver::Host => PduKind::ControllerTerm,
        };
        let erroneous = &erroneous[..erroneous.len().min(128)];
        let mut bytes = vec![0; 24];
        let len = u32::try_from(24 + erroneous.len()).unwrap_or(24);
        CommonHeader::put(&mut bytes, kind, 0, 0, len);
        put_u16(&mut bytes, 8, self.status.0);
        put_u32(&mut bytes, 10, self.information);
        bytes.extend_from_slice(erroneous);
        bytes
    }

    /// From the wire, after [`CommonHeader::decode`].
    #[must_use]
    pub fn decode(bytes: &[u8; 24]) -> TermRequest {
        TermRequest { status: FatalStatus(get_u16(bytes, 8)), information: get_u32(bytes, 10) }
    }
}

/// The header of a CapsuleCmd (TCP 3.6.2.6) with `data_len` bytes of in-capsule data. With the header digest, padding and
/// data still to follow: [`CommonHeader::data_offset`] is byte 3.
#[must_use]
pub fn command_to_bytes(sqe: &Sqe, data_len: u32, digests: Digests, alignment: u32) -> [u8; 72] {
    let mut bytes = [0; 72];
    CommonHeader::put_with_data(&mut bytes, PduKind::Command, 0, data_len, digests, alignment);
    bytes[8..].copy_from_slice(&sqe.to_bytes());
    bytes
}

/// The command in a CapsuleCmd's header, after [`CommonHeader::decode`].
#[must_use]
pub fn command_from_bytes(bytes: &[u8; 72]) -> Sqe {
    Sqe::from_bytes(&crate::nvme::bytes::get_array(bytes, 8))
}

/// A CapsuleResp (TCP 3.6.2.7), without the header digest that may follow.
#[must_use]
pub fn response_to_bytes(cqe: &Cqe, digests: Digests) -> [u8; 24] {
    let mut bytes = [0; 24];
    CommonHeader::put_with_data(&mut bytes, PduKind::Response, 0, 0, digests, 4);
    bytes[8..].copy_from_slice(&cqe.to_bytes());
    bytes
}

/// The completion in a CapsuleResp, after [`CommonHeader::decode`].
#[must_use]
pub fn response_from_bytes(bytes: &[u8; 24]) -> Cqe {
    Cqe::from_bytes(&crate::nvme::bytes::get_array(bytes, 8))
}

/// H2CData (TCP 3.6.2.8) and C2HData (TCP 3.6.2.9): a piece of a command's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataPdu {
    /// CCCID: the command.
    pub cid: u16,
    /// TTAG: the R2T that asked (H2CData only).
    pub tag: u16,
    /// DATAO: where in the command's data the piece begins.
    pub offset: u32,
    /// DATAL: its length.
    pub len: u32,
    /// LAST_PDU: the transfer's last piece.
    pub last: bool,
    /// SUCCESS (C2HData only): the command succeeded, no CapsuleResp will follow.
    pub success: bool,
}

impl DataPdu {
    /// The header as on the wire, of either kind.
    #[must_use]
    pub fn to_bytes(&self, receiver: Receiver, digests: Digests, alignment: u32) -> [u8; 24] {
        let kind = match receiver {
            Receiver::Controller => PduKind::HostData,
            Receiver::Host => PduKind::ControllerData,
        };
        let flags = if self.last { FLAG_LAST } else { 0 } | if self.success { FLAG_SUCCESS } else { 0 };
        let mut bytes = [0; 24];
        CommonHeader::put_with_data(&mut bytes, kind, flags, self.len, digests, alignment);
        put_u16(&mut bytes, 8, self.cid);
        put_u16(&mut bytes, 10, self.tag);
        put_u32(&mut bytes, 12, self.offset);
        put_u32(&mut bytes, 16, self.len);
        bytes
    }

    /// From the wire, after [`CommonHeader::decode`] gave `header`.
    ///
    /// # Errors
    /// When DATAL is not the length of the data that follows, or DATAO cannot be.
    pub fn decode(header: &CommonHeader, bytes: &[u8; 24]) -> Result<DataPdu, PduError> {
        let controller = header.kind == PduKind::ControllerData;
        let pdu = DataPdu {
            cid: get_u16(bytes, 8),
            tag: if controller { 0 } else { get_u16(bytes, 10) },
            offset: get_u32(bytes, 12),
            len: get_u32(bytes, 16),
            last: header.flags & FLAG_LAST != 0,
            success: controller && header.flags & FLAG_SUCCESS != 0,
        };
        if pdu.len != header.data_len {
            return Err(invalid(header.kind, 16, "DATAL", pdu.len, "the length of the data that follows"));
        }
        if !pdu.offset.is_multiple_of(4) {
            return Err(invalid(header.kind, 12, "DATAO", pdu.offset, "a multiple of 4"));
        }
        if pdu.offset.checked_add(pdu.len).is_none() {
            let status = FatalStatus::DATA_OUT_OF_RANGE;
            return Err(PduError {
                status,
                ..invalid(header.kind, 12, "DATAO", pdu.offset, "within the transfer")
            });
        }
        if pdu.success && !pdu.last {
            return Err(invalid(header.kind, 1, "FLAGS.SUCCESS", header.flags, "clear without LAST_PDU"));
        }
        Ok(pdu)
    }
}

/// R2T (TCP 3.6.2.10).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadyToTransfer {
    /// CCCID: the command.
    pub cid: u16,
    /// TTAG: what H2CData shall carry.
    pub tag: u16,
    /// R2TO: where in the command's data the piece begins.
    pub offset: u32,
    /// R2TL: its length, not 0.
    pub len: u32,
}

impl ReadyToTransfer {
    /// As on the wire, without the header digest that may follow.
    #[must_use]
    pub fn to_bytes(&self, digests: Digests) -> [u8; 24] {
        let mut bytes = [0; 24];
        CommonHeader::put_with_data(&mut bytes, PduKind::ReadyToTransfer, 0, 0, digests, 4);
        put_u16(&mut bytes, 8, self.cid);
        put_u16(&mut bytes, 10, self.tag);
        put_u32(&mut bytes, 12, self.offset);
        put_u32(&mut bytes, 16, self.len);
        bytes
    }

    /// From the wire, after [`CommonHeader::decode`].
    ///
    /// # Errors
    /// When R2TO or R2TL cannot be.
    pub fn decode(bytes: &[u8; 24]) -> Result<ReadyToTransfer, PduError> {
        let kind = PduKind::ReadyToTransfer;
        let pdu = ReadyToTransfer {
            cid: get_u16(bytes, 8),
            tag: get_u16(bytes, 10),
            offset: get_u32(bytes, 12),
            len: get_u32(bytes, 16),
        };
        if pdu.len == 0 {
            return Err(invalid(kind, 16, "R2TL", pdu.len, "more than 0"));
        }
        if !pdu.offset.is_multiple_of(4) {
            return Err(invalid(kind, 12, "R2TO", pdu.offset, "a multiple of 4"));
        }
        if pdu.offset.checked_add(pdu.len).is_none() {
            let status = FatalStatus::DATA_OUT_OF_RANGE;
            return Err(PduError { status, ..invalid(kind, 12, "R2TO", pdu.offset, "within the transfer") });
        }
        Ok(pdu)
    }
}

/// Fuzz entry: decodes `data` as a PDU for either side; what decodes must be the same after encoding and decoding again.
pub fn fuzz(data: &[u8]) {
    let mut header = [0; 128];
    let len = data.len().min(128);
    header[..len].copy_from_slice(&data[..len]);
    let first: [u8; 8] = crate::nvme::bytes::get_array(&header, 0);
    let short: [u8; 24] = crate::nvme::bytes::get_array(&header, 0);
    for receiver in [Receiver::Host, Receiver::Controller] {
        for bits in 0..4 {
            let digests = Digests::from_byte(bits);
            let Ok(common) = CommonHeader::decode(&first, receiver, digests) else { continue };
            assert!(common.header_len() <= common.len as usize || common.kind.never_digested());
            assert!(u32::from(common.data_offset) + common.data_len <= common.len);
            match common.kind {
                PduKind::InitRequest => {
                    if let Ok(pdu) = InitRequest::decode(&header) {
                        assert_eq!(InitRequest::decode(&pdu.to_bytes()), Ok(pdu));
                    }
                }
                PduKind::InitResponse => {
                    if let Ok(pdu) = InitResponse::decode(&header) {
                        assert_eq!(InitResponse::decode(&pdu.to_bytes()), Ok(pdu));
                    }
                }
                PduKind::HostTerm | PduKind::ControllerTerm => {
                    let pdu = TermRequest::decode(&short);
                    let bytes = pdu.to_bytes(receiver, &header[..common.data_len as usize]);
                    let again = CommonHeader::decode(
                        &crate::nvme::bytes::get_array(&bytes, 0),
                        receiver,
                        Digests::NONE,
                    );
                    assert_eq!(again.map(|again| again.len), Ok(common.len));
                }
                PduKind::Command => {
                    let sqe = command_from_bytes(&crate::nvme::bytes::get_array(&header, 0));
                    let bytes = command_to_bytes(&sqe, common.data_len, digests, 4);
                    assert_eq!(command_from_bytes(&bytes), sqe);
                }
                PduKind::Response => {
                    let cqe = response_from_bytes(&short);
                    assert_eq!(response_from_bytes(&response_to_bytes(&cqe, digests)), cqe);
                }
                PduKind::HostData | PduKind::ControllerData => {
                    if let Ok(pdu) = DataPdu::decode(&common, &short) {
                        let bytes = pdu.to_bytes(receiver, digests, 4);
                        let again = CommonHeader::decode(
                            &crate::nvme::bytes::get_array(&bytes, 0),
                            receiver,
                            digests,
                        )
                        .expect("what we encode decodes");
                        assert_eq!(DataPdu::decode(&again, &bytes), Ok(pdu));
                    }
                }
                PduKind::ReadyToTransfer => {
                    if let Ok(pdu) = ReadyToTransfer::decode(&short) {
                        assert_eq!(ReadyToTransfer::decode(&pdu.to_bytes(digests)), Ok(pdu));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "pdu_tests.rs"]
mod tests;
