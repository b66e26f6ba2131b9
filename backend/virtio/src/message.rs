//! vhost-user's messages as typed values: bytes in, [`FrontendMessage`] out, and the replies.
//!
//! Owns the wire format (the vhost-user specification, "Message Specification"; numbers are in native byte order). Must
//! not know sockets, memory or rings. It validates form only: sizes, counts, flags, overflow of ranges. No input may
//! make it panic.

#![forbid(unsafe_code)]

use std::fmt;

/// Bytes of a message's header: request, flags, size of what follows.
pub(crate) const HEADER_BYTES: usize = 12;
/// The most bytes that may follow a header: a table of 32 regions or a configuration space, with room to spare.
pub(crate) const PAYLOAD_BYTES_MAX: usize = 4096;
/// The most descriptors in one message.
pub(crate) const DESCRIPTORS_MAX: usize = 32;
/// The configuration space of a virtio device ends here.
pub(crate) const CONFIG_BYTES_MAX: u32 = 256;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const FLAG_REPLY: u32 = 4;
const FLAG_NEED_REPLY: u32 = 8;
/// VHOST_VRING_F_LOG.
const RING_FLAG_LOG: u32 = 1;

/// Protocol features that we offer or look at (bits of `SET_PROTOCOL_FEATURES`).
pub(crate) mod protocol {
    pub(crate) const MQ: u64 = 1 << 0;
    pub(crate) const LOG_SHMFD: u64 = 1 << 1;
    pub(crate) const REPLY_ACK: u64 = 1 << 3;
    pub(crate) const BACKEND_REQ: u64 = 1 << 5;
    pub(crate) const CONFIG: u64 = 1 << 9;
    pub(crate) const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub(crate) const RESET_DEVICE: u64 = 1 << 13;
    pub(crate) const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    /// What this back end can do.
    pub(crate) const OFFERED: u64 = MQ
        | LOG_SHMFD
        | REPLY_ACK
        | BACKEND_REQ
        | CONFIG
        | INFLIGHT_SHMFD
        | RESET_DEVICE
        | CONFIGURE_MEM_SLOTS;
}

/// The numbers of the requests that we know.
pub(crate) mod request {
    pub(crate) const GET_FEATURES: u32 = 1;
    pub(crate) const SET_FEATURES: u32 = 2;
    pub(crate) const SET_OWNER: u32 = 3;
    pub(crate) const RESET_OWNER: u32 = 4;
    pub(crate) const SET_MEM_TABLE: u32 = 5;
    pub(crate) const SET_LOG_BASE: u32 = 6;
    pub(crate) const SET_LOG_FD: u32 = 7;
    pub(crate) const SET_VRING_NUM: u32 = 8;
    pub(crate) const SET_VRING_ADDR: u32 = 9;
    pub(crate) const SET_VRING_BASE: u32 = 10;
    pub(crate) const GET_VRING_BASE: u32 = 11;
    pub(crate) const SET_VRING_KICK: u32 = 12;
    pub(crate) const SET_VRING_CALL: u32 = 13;
    pub(crate) const SET_VRING_ERR: u32 = 14;
    pub(crate) const GET_PROTOCOL_FEATURES: u32 = 15;
    pub(crate) const SET_PROTOCOL_FEATURES: u32 = 16;
    pub(crate) const GET_QUEUE_NUM: u32 = 17;
    pub(crate) const SET_VRING_ENABLE: u32 = 18;
    pub(crate) const SET_BACKEND_REQ_FD: u32 = 21;
    pub(crate) const GET_CONFIG: u32 = 24;
    pub(crate) const SET_CONFIG: u32 = 25;
    pub(crate) const GET_INFLIGHT_FD: u32 = 31;
    pub(crate) const SET_INFLIGHT_FD: u32 = 32;
    pub(crate) const RESET_DEVICE: u32 = 34;
    pub(crate) const GET_MAX_MEM_SLOTS: u32 = 36;
    pub(crate) const ADD_MEM_REG: u32 = 37;
    pub(crate) const REM_MEM_REG: u32 = 38;
}

/// Requests of the back end, on the socket of `SET_BACKEND_REQ_FD`.
const BACKEND_CONFIG_CHANGE: u32 = 2;

/// What is wrong with a message; ends the session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MessageError(pub(crate) String);

impl fmt::Display for MessageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn wrong<T>(what: impl Into<String>) -> Result<T, MessageError> {
    Err(MessageError(what.into()))
}

/// A message's first 12 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) request: u32,
    pub(crate) need_reply: bool,
    pub(crate) payload_bytes: usize,
}

impl Header {
    /// Checks version, direction and size.
    pub(crate) fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Header, MessageError> {
        let mut fields = Fields(bytes);
        let (request, flags, size) = (fields.u32()?, fields.u32()?, fields.u32()?);
        if flags & VERSION_MASK != VERSION {
            return wrong(format!("message {request}: flags {flags:#x} do not name version 1"));
        }
        if flags & FLAG_REPLY != 0 {
            return wrong(format!("message {request}: a front end does not send replies here"));
        }
        let payload_bytes = usize::try_from(size).unwrap_or(usize::MAX);
        if payload_bytes > PAYLOAD_BYTES_MAX {
            return wrong(format!("message {request}: size {size} is above {PAYLOAD_BYTES_MAX}"));
        }
        Ok(Header { request, need_reply: flags & FLAG_NEED_REPLY != 0, payload_bytes })
    }
}

/// One region of the front end's memory, as it describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RegionDescription {
    pub(crate) guest_address: u64,
    pub(crate) bytes: u64,
    pub(crate) user_address: u64,
    pub(crate) file_offset: u64,
}

/// Where a ring's three parts are, in the front end's user addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RingAddresses {
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
}

/// Where the log of dirty pages is in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LogDescription {
    pub(crate) bytes: u64,
    pub(crate) file_offset: u64,
}

/// Where the in-flight log is in its file, and its dimensions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct InflightDescription {
    pub(crate) bytes: u64,
    pub(crate) file_offset: u64,
    pub(crate) queues: u16,
    pub(crate) queue_size: u16,
}

/// What a front end asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum FrontendMessage {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    SetMemTable(Vec<RegionDescription>),
    SetLogBase(LogDescription),
    SetLogFd,
    SetVringNum {
        queue: u32,
        size: u32,
    },
    SetVringAddr {
        queue: u32,
        addresses: RingAddresses,
        /// Where writes to the used ring are logged as if it were there, if they are.
        log: Option<u64>,
    },
    SetVringBase {
        queue: u32,
        base: u32,
    },
    GetVringBase {
        queue: u32,
    },
    SetVringKick {
        queue: u32,
        has_descriptor: bool,
    },
    SetVringCall {
        queue: u32,
        has_descriptor: bool,
    },
    SetVringErr {
        queue: u32,
        has_descriptor: bool,
    },
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetVringEnable {
        queue: u32,
        enable: bool,
    },
    SetBackendReqFd,
    GetConfig {
        offset: u32,
        bytes: u32,
        flags: u32,
    },
    SetConfig {
        offset: u32,
        data: Vec<u8>,
    },
    GetInflightFd(InflightDescription),
    SetInflightFd(InflightDescription),
    ResetDevice,
    GetMaxMemSlots,
    AddMemReg(RegionDescription),
    RemMemReg(RegionDescription),
    /// A request that we do not know.
    Unknown(u32),
}

/// Takes numbers off the front of a payload.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], MessageError> {
        match self.0.split_first_chunk::<N>() {
            Some((first, rest)) => {
                self.0 = rest;
                Ok(*first)
            }
            None => wrong("payload is too short"),
        }
    }

    fn u16(&mut self) -> Result<u16, MessageError> {
        Ok(u16::from_ne_bytes(self.take()?))
    }

    fn u32(&mut self) -> Result<u32, MessageError> {
        Ok(u32::from_ne_bytes(self.take()?))
    }

    fn u64(&mut self) -> Result<u64, MessageError> {
        Ok(u64::from_ne_bytes(self.take()?))
    }

    fn region(&mut self) -> Result<RegionDescription, MessageError> {
        let region = RegionDescription {
            guest_address: self.u64()?,
            bytes: self.u64()?,
            user_address: self.u64()?,
            file_offset: self.u64()?,
        };
        for (name, start) in [
            ("guest address", region.guest_address),
            ("user address", region.user_address),
            ("mmap offset", region.file_offset),
        ] {
            if region.bytes == 0 || start.checked_add(region.bytes).is_none() {
                return wrong(format!("memory region: {name} {start:#x} with size {:#x}", region.bytes));
            }
        }
        Ok(region)
    }

    fn inflight(&mut self) -> Result<InflightDescription, MessageError> {
        Ok(InflightDescription {
            bytes: self.u64()?,
            file_offset: self.u64()?,
            queues: self.u16()?,
            queue_size: self.u16()?,
        })
    }

    /// The u64 of SET_VRING_KICK, CALL and ERR: bits 0-7 are the queue, bit 8 says that there is no descriptor.
    fn ring_descriptor(&mut self) -> Result<(u32, bool), MessageError> {
        let value = self.u64()?;
        let queue = u32::try_from(value & 0xff).unwrap_or(u32::MAX);
        Ok((queue, value & 0x100 == 0))
    }
}

impl FrontendMessage {
    /// Parses the payload of a message.
    pub(crate) fn parse(request: u32, payload: &[u8]) -> Result<FrontendMessage, MessageError> {
        let mut fields = Fields(payload);
        let message = Self::parse_fields(request, &mut fields)
            .map_err(|MessageError(what)| MessageError(format!("message {request}: {what}")))?;
        // The log's description is 20 bytes that C pads to 24.
        let padding =
            matches!(message, Self::GetInflightFd(_) | Self::SetInflightFd(_)) && fields.0.len() == 4;
        let left_over = !matches!(message, Self::Unknown(_)) && !fields.0.is_empty() && !padding;
        if left_over {
            return wrong(format!("message {request}: size {} is too long", payload.len()));
        }
        Ok(message)
    }

    fn parse_fields(request: u32, fields: &mut Fields<'_>) -> Result<FrontendMessage, MessageError> {
        Ok(match request {
            request::GET_FEATURES => Self::GetFeatures,
            request::SET_FEATURES => Self::SetFeatures(fields.u64()?),
            request::SET_OWNER => Self::SetOwner,
            request::RESET_OWNER => Self::ResetOwner,
            request::SET_MEM_TABLE => {
                let count = fields.u32()?;
                let _padding = fields.u32()?;
                if count == 0 || usize::try_from(count).unwrap_or(usize::MAX) > DESCRIPTORS_MAX {
                    return wrong(format!("{count} memory regions; 1 to {DESCRIPTORS_MAX} would be right"));
                }
                Self::SetMemTable((0..count).map(|_| fields.region()).collect::<Result<_, _>>()?)
            }
            request::SET_LOG_BASE => {
                Self::SetLogBase(LogDescription { bytes: fields.u64()?, file_offset: fields.u64()? })
            }
            request::SET_LOG_FD => {
                // Old front ends send an unused u64.
                fields.0 = &[];
                Self::SetLogFd
            }
            request::SET_VRING_NUM => Self::SetVringNum { queue: fields.u32()?, size: fields.u32()? },
            request::SET_VRING_ADDR => {
                let queue = fields.u32()?;
                let flags = fields.u32()?;
                if flags & !RING_FLAG_LOG != 0 {
                    return wrong(format!(
                        "ring address flags {flags:#x}; 0 or {RING_FLAG_LOG} would be right"
                    ));
                }
                let (descriptors, used, available) = (fields.u64()?, fields.u64()?, fields.u64()?);
                let log = fields.u64()?;
                Self::SetVringAddr {
                    queue,
                    addresses: RingAddresses { descriptors, available, used },
                    log: (flags & RING_FLAG_LOG != 0).then_some(log),
                }
            }
            request::SET_VRING_BASE => Self::SetVringBase { queue: fields.u32()?, base: fields.u32()? },
            request::GET_VRING_BASE => {
                let queue = fields.u32()?;
                let _unused = fields.u32()?;
                Self::GetVringBase { queue }
            }
            request::SET_VRING_KICK => {
                let (queue, has_descriptor) = fields.ring_descriptor()?;
                Self::SetVringKick { queue, has_descriptor }
            }
            request::SET_VRING_CALL => {
                let (queue, has_descriptor) = fields.ring_descriptor()?;
                Self::SetVringCall { queue, has_descriptor }
            }
            request::SET_VRING_ERR => {
                let (queue, has_descriptor) = fields.ring_descriptor()?;
                Self::SetVringErr { queue, has_descriptor }
            }
            request::GET_PROTOCOL_FEATURES => Self::GetProtocolFeatures,
            request::SET_PROTOCOL_FEATURES => Self::SetProtocolFeatures(fields.u64()?),
            request::GET_QUEUE_NUM => Self::GetQueueNum,
            request::SET_VRING_ENABLE => {
                let queue = fields.u32()?;
                match fields.u32()? {
                    0 => Self::SetVringEnable { queue, enable: false },
                    1 => Self::SetVringEnable { queue, enable: true },
                    other => return wrong(format!("enable {other}; 0 or 1 would be right")),
                }
            }
            request::SET_BACKEND_REQ_FD => {
                // Old front ends send an unused u64.
                fields.0 = &[];
                Self::SetBackendReqFd
            }
            request::GET_CONFIG => {
                let (offset, bytes, flags) = Self::config_header(fields)?;
                fields.0 = &[];
                Self::GetConfig { offset, bytes, flags }
            }
            request::SET_CONFIG => {
                let (offset, bytes, _flags) = Self::config_header(fields)?;
                let data = std::mem::take(&mut fields.0).to_vec();
                if u32::try_from(data.len()) != Ok(bytes) {
                    return wrong(format!("config size {bytes} with {} bytes of it", data.len()));
                }
                Self::SetConfig { offset, data }
            }
            request::GET_INFLIGHT_FD => Self::GetInflightFd(fields.inflight()?),
            request::SET_INFLIGHT_FD => Self::SetInflightFd(fields.inflight()?),
            request::RESET_DEVICE => Self::ResetDevice,
            request::GET_MAX_MEM_SLOTS => Self::GetMaxMemSlots,
            request::ADD_MEM_REG | request::REM_MEM_REG => {
                let _padding = fields.u64()?;
                let region = fields.region()?;
                if request == request::ADD_MEM_REG {
                    Self::AddMemReg(region)
                } else {
                    Self::RemMemReg(region)
                }
            }
            other => Self::Unknown(other),
        })
    }

    fn config_header(fields: &mut Fields<'_>) -> Result<(u32, u32, u32), MessageError> {
        let (offset, bytes, flags) = (fields.u32()?, fields.u32()?, fields.u32()?);
        if bytes == 0 || offset.checked_add(bytes).is_none_or(|end| end > CONFIG_BYTES_MAX) {
            return wrong(format!(
                "config offset {offset} with size {bytes}; at most {CONFIG_BYTES_MAX} bytes would be right"
            ));
        }
        Ok((offset, bytes, flags))
    }
}

fn with_header(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
    for field in [request, VERSION | flags, size] {
        bytes.extend_from_slice(&field.to_ne_bytes());
    }
    bytes.extend_from_slice(payload);
    bytes
}

/// A reply that is one number: features, counts, and the acknowledgement of REPLY_ACK (0 = done).
pub(crate) fn reply_u64(request: u32, value: u64) -> Vec<u8> {
    with_header(request, FLAG_REPLY, &value.to_ne_bytes())
}

/// The reply to GET_VRING_BASE.
pub(crate) fn reply_vring_base(queue: u32, base: u32) -> Vec<u8> {
    let payload = [queue.to_ne_bytes(), base.to_ne_bytes()].concat();
    with_header(request::GET_VRING_BASE, FLAG_REPLY, &payload)
}

/// The reply to SET_LOG_BASE: its description once more. The specification asks for a reply and does not say which; QEMU takes
/// any, the crate `vhost` (Cloud Hypervisor) wants this one.
pub(crate) fn reply_log_base(log: &LogDescription) -> Vec<u8> {
    let payload = [log.bytes.to_ne_bytes(), log.file_offset.to_ne_bytes()].concat();
    with_header(request::SET_LOG_BASE, FLAG_REPLY, &payload)
}

/// The reply to GET_CONFIG.
pub(crate) fn reply_config(offset: u32, flags: u32, data: &[u8]) -> Vec<u8> {
    let size = u32::try_from(data.len()).unwrap_or(u32::MAX);
    let mut payload = [offset.to_ne_bytes(), size.to_ne_bytes(), flags.to_ne_bytes()].concat();
    payload.extend_from_slice(data);
    with_header(request::GET_CONFIG, FLAG_REPLY, &payload)
}

/// The reply to GET_INFLIGHT_FD: 20 bytes, padded to 24 as C does and as QEMU checks.
pub(crate) fn reply_inflight(inflight: &InflightDescription) -> Vec<u8> {
    let mut payload = [inflight.bytes.to_ne_bytes(), inflight.file_offset.to_ne_bytes()].concat();
    payload.extend_from_slice(&inflight.queues.to_ne_bytes());
    payload.extend_from_slice(&inflight.queue_size.to_ne_bytes());
    payload.extend_from_slice(&[0; 4]);
    with_header(request::GET_INFLIGHT_FD, FLAG_REPLY, &payload)
}

/// CONFIG_CHANGE, for the socket of SET_BACKEND_REQ_FD. Asks for no reply.
pub(crate) fn config_change() -> Vec<u8> {
    with_header(BACKEND_CONFIG_CHANGE, 0, &[])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_of_other_versions_replies_and_long_payloads_are_refused() {
        let header = |request: u32, flags: u32, size: u32| {
            let bytes = [request.to_ne_bytes(), flags.to_ne_bytes(), size.to_ne_bytes()].concat();
            Header::parse(bytes.as_slice().try_into().unwrap())
        };
        assert_eq!(header(1, 9, 8), Ok(Header { request: 1, need_reply: true, payload_bytes: 8 }));
        assert!(header(1, 2, 8).is_err());
        assert!(header(1, 5, 8).is_err());
        assert!(header(1, 1, 4097).is_err());
    }

    #[test]
    fn short_and_long_payloads_name_the_message() {
        let error = FrontendMessage::parse(request::SET_FEATURES, &[0; 7]).unwrap_err();
        assert_eq!(error.0, "message 2: payload is too short");
        let error = FrontendMessage::parse(request::SET_FEATURES, &[0; 9]).unwrap_err();
        assert_eq!(error.0, "message 2: size 9 is too long");
        for size in [20, 24] {
            assert!(FrontendMessage::parse(request::GET_INFLIGHT_FD, &vec![0; size]).is_ok());
        }
        assert!(FrontendMessage::parse(request::GET_INFLIGHT_FD, &[0; 22]).is_err());
    }

    #[test]
    fn regions_that_wrap_are_refused() {
        let region = |guest: u64, bytes: u64, user: u64, offset: u64| {
            let payload = [0, guest, bytes, user, offset].map(u64::to_ne_bytes).concat();
            FrontendMessage::parse(request::ADD_MEM_REG, &payload)
        };
        assert!(region(1 << 47, 4096, 1 << 47, 3).is_ok());
        assert!(region(1 << 47, 0, 1 << 47, 0).is_err());
        assert!(region(u64::MAX - 4094, 4096, 0, 0).is_err());
        assert!(region(0, 4096, u64::MAX - 4094, 0).is_err());
        assert!(region(0, 4096, 0, u64::MAX - 4094).is_err());
    }
}
