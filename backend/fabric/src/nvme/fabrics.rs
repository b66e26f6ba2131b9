//! Fabrics commands (base chapter 6): Connect, Property Get, Property Set, Disconnect.
//!
//! They share opcode 7Fh; FCTYPE is the lowest byte of the place where other commands have the NSID.

use super::bytes::{get_array, get_u16, low8, low16, low32, put_u16};
use super::{Cqe, FieldError, NvmeStatus, Sgl, Sqe, StatusCode, admin_opcode, get_nqn, put_nqn};

/// FCTYPE values (base figure "Fabrics Command Type").
#[expect(missing_docs, reason = "the specification's names")]
pub mod fctype {
    pub const PROPERTY_SET: u8 = 0x00;
    pub const CONNECT: u8 = 0x01;
    pub const PROPERTY_GET: u8 = 0x04;
    pub const AUTHENTICATION_SEND: u8 = 0x05;
    pub const AUTHENTICATION_RECEIVE: u8 = 0x06;
    pub const DISCONNECT: u8 = 0x08;
}

/// A controller ID of FFFFh in Connect's data asks for any: the dynamic controller model (base 6.3).
pub const CNTLID_DYNAMIC: u16 = 0xFFFF;
/// A controller ID of FFFEh asks for any of the static model.
pub const CNTLID_STATIC: u16 = 0xFFFE;

/// CATTR bit 2: SQ flow control is off; SQHD in completions means nothing.
pub const CATTR_NO_FLOW_CONTROL: u8 = 1 << 2;
/// SQHD of a Connect's answer: SQ flow control is off, as the host has asked.
pub const NO_SQ_HEAD: u16 = 0xFFFF;

/// FCTYPE of a Fabrics command.
#[must_use]
pub fn command_type(sqe: &Sqe) -> u8 {
    low8(sqe.nsid)
}

/// The command part of Connect (base 6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connect {
    /// RECFMT: format of the data; 0.
    pub record_format: u16,
    /// QID: 0 is the admin queue.
    pub queue_id: u16,
    /// SQSIZE: entries, counted from 0.
    pub queue_size: u16,
    /// CATTR.
    pub attributes: u8,
    /// KATO in milliseconds; 0 = no keep-alive. Only for the admin queue.
    pub keep_alive_ms: u32,
}

impl Connect {
    /// As a command whose data (1024 bytes of [`ConnectData`]) is where `sgl` says.
    #[must_use]
    pub fn to_sqe(&self, sgl: Sgl) -> Sqe {
        let mut sqe = Sqe::new(admin_opcode::FABRICS, u32::from(fctype::CONNECT), sgl);
        sqe.cdw[0] = u32::from(self.record_format) | u32::from(self.queue_id) << 16;
        sqe.cdw[1] = u32::from(self.queue_size) | u32::from(self.attributes) << 16;
        sqe.cdw[2] = self.keep_alive_ms;
        sqe
    }

    /// From a command that is a Connect.
    #[must_use]
    pub fn from_sqe(sqe: &Sqe) -> Connect {
        Connect {
            record_format: low16(sqe.cdw[0]),
            queue_id: low16(sqe.cdw[0] >> 16),
            queue_size: low16(sqe.cdw[1]),
            attributes: low8(sqe.cdw[1] >> 16),
            keep_alive_ms: sqe.cdw[2],
        }
    }
}

/// The data of Connect (base figure "Connect Command - Data").
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectData {
    /// HOSTID.
    pub host_id: [u8; 16],
    /// CNTLID: [`CNTLID_DYNAMIC`] for the admin queue, then what its completion said.
    pub cntlid: u16,
    /// SUBNQN.
    pub subsystem_nqn: String,
    /// HOSTNQN.
    pub host_nqn: String,
}

impl ConnectData {
    /// Its size in bytes.
    pub const LEN: usize = 1024;

    /// As on the wire.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; ConnectData::LEN] {
        let mut bytes = [0; ConnectData::LEN];
        bytes[..16].copy_from_slice(&self.host_id);
        put_u16(&mut bytes, 16, self.cntlid);
        put_nqn(&mut bytes[256..512], &self.subsystem_nqn);
        put_nqn(&mut bytes[512..768], &self.host_nqn);
        bytes
    }

    /// From the wire.
    ///
    /// # Errors
    /// When a name is not ended, too long, or not UTF-8. (Their offsets for IPO are 256 and 512.)
    pub fn from_bytes(bytes: &[u8; ConnectData::LEN]) -> Result<ConnectData, FieldError> {
        Ok(ConnectData {
            host_id: get_array(bytes, 0),
            cntlid: get_u16(bytes, 16),
            subsystem_nqn: get_nqn(&bytes[256..512], "Connect data", "SUBNQN")?,
            host_nqn: get_nqn(&bytes[512..768], "Connect data", "HOSTNQN")?,
        })
    }
}

/// What a Connect that succeeded answers: CNTLID, and in bits 16 and up whether authentication is wanted (AUTHREQ).
#[must_use]
pub fn connect_answer(cqe: &Cqe) -> (u16, u16) {
    (low16(cqe.dword0()), low16(cqe.dword0() >> 16))
}

/// The completion of a Connect with a wrong parameter (base figure "Connect Response - Dword 0 Value Based on Status
/// Code"): `in_data` tells data from command, `offset` is the byte in it.
#[must_use]
pub fn connect_invalid(cid: u16, in_data: bool, offset: u16) -> Cqe {
    Cqe {
        result: u64::from(offset) | u64::from(in_data) << 16,
        sq_head: 0,
        sq_id: 0,
        cid,
        status: NvmeStatus::fatal(StatusCode::CONNECT_INVALID_PARAMETERS),
    }
}

/// Which parameter a target found wrong, from the completion of a Connect, for people.
#[must_use]
pub fn connect_refusal(cqe: &Cqe) -> String {
    if cqe.status.code != StatusCode::CONNECT_INVALID_PARAMETERS {
        return cqe.status.to_string();
    }
    let offset = low16(cqe.dword0());
    let field = match (cqe.dword0() >> 16 & 1, offset) {
        (0, 40) => "RECFMT",
        (0, 42) => "QID",
        (0, 44) => "SQSIZE",
        (0, 46) => "CATTR",
        (0, 48) => "KATO",
        (1, 0) => "HOSTID",
        (1, 16) => "CNTLID",
        (1, 256) => "SUBNQN",
        (1, 512) => "HOSTNQN",
        _ => return format!("{}: byte {offset}", cqe.status.code),
    };
    format!("{}: {field}", cqe.status.code)
}

/// A Property Get or Property Set (base 6.5, 6.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Property {
    /// OFST: see [`super::properties::offset`].
    pub offset: u32,
    /// ATTRIB.SIZE: 8 bytes instead of 4.
    pub wide: bool,
    /// VALUE: for a set.
    pub value: u64,
}

impl Property {
    /// Property Get; the value comes in the completion's `result`.
    #[must_use]
    pub fn get(offset: u32, wide: bool) -> Sqe {
        Property { offset, wide, value: 0 }.to_sqe(fctype::PROPERTY_GET)
    }

    /// Property Set.
    #[must_use]
    pub fn set(offset: u32, wide: bool, value: u64) -> Sqe {
        Property { offset, wide, value }.to_sqe(fctype::PROPERTY_SET)
    }

    fn to_sqe(self, fctype: u8) -> Sqe {
        let mut sqe = Sqe::new(admin_opcode::FABRICS, u32::from(fctype), Sgl::NONE);
        sqe.cdw[0] = u32::from(self.wide);
        sqe.cdw[1] = self.offset;
        sqe.cdw[2] = low32(self.value);
        sqe.cdw[3] = low32(self.value >> 32);
        sqe
    }

    /// From a command that is a Property Get or Set.
    ///
    /// # Errors
    /// When the size is neither 4 nor 8 bytes.
    pub fn from_sqe(sqe: &Sqe) -> Result<Property, FieldError> {
        let size = sqe.cdw[0] & 7;
        if size > 1 {
            return Err(FieldError {
                structure: "Property command",
                field: "ATTRIB.SIZE",
                value: u64::from(size),
                expected: "0 (4 bytes) or 1 (8 bytes)",
            });
        }
        Ok(Property {
            offset: sqe.cdw[1],
            wide: size == 1,
            value: u64::from(sqe.cdw[2]) | u64::from(sqe.cdw[3]) << 32,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nvme::properties::offset;

    #[test]
    fn connect_is_the_bytes_that_the_specification_says() {
        let connect = Connect {
            record_format: 0,
            queue_id: 3,
            queue_size: 127,
            attributes: CATTR_NO_FLOW_CONTROL,
            keep_alive_ms: 5000,
        };
        let sqe = connect.to_sqe(Sgl::in_capsule(1024));
        let bytes = sqe.to_bytes();
        assert_eq!(bytes[..8], [0x7f, 0x40, 0, 0, 0x01, 0, 0, 0]);
        assert_eq!(bytes[40..52], [0, 0, 3, 0, 127, 0, 4, 0, 0x88, 0x13, 0, 0]);
        assert_eq!(Connect::from_sqe(&sqe), connect);
        let data = ConnectData {
            host_id: [7; 16],
            cntlid: CNTLID_DYNAMIC,
            subsystem_nqn: "nqn.a".into(),
            host_nqn: "nqn.b".into(),
        };
        let bytes = data.to_bytes();
        assert_eq!(bytes[14..18], [7, 7, 0xff, 0xff]);
        assert_eq!(&bytes[256..262], b"nqn.a\0");
        assert_eq!(&bytes[512..518], b"nqn.b\0");
        assert_eq!(ConnectData::from_bytes(&bytes), Ok(data));
    }

    #[test]
    fn a_refused_connect_names_the_parameter() {
        assert_eq!(connect_refusal(&connect_invalid(1, true, 256)), "Connect Invalid Parameters: SUBNQN");
        assert_eq!(connect_refusal(&connect_invalid(1, false, 44)), "Connect Invalid Parameters: SQSIZE");
        assert_eq!(connect_refusal(&connect_invalid(1, false, 7)), "Connect Invalid Parameters: byte 7");
    }

    #[test]
    fn properties_are_the_bytes_that_the_specification_says() {
        let set = Property::set(offset::CC, false, 0x0046_0001);
        assert_eq!(set.to_bytes()[..8], [0x7f, 0x40, 0, 0, 0, 0, 0, 0]);
        assert_eq!(set.to_bytes()[40..56], [0, 0, 0, 0, 0x14, 0, 0, 0, 1, 0, 0x46, 0, 0, 0, 0, 0]);
        let get = Property::get(offset::CAP, true);
        assert_eq!(command_type(&get), fctype::PROPERTY_GET);
        assert_eq!(get.to_bytes()[40], 1);
        assert_eq!(Property::from_sqe(&set), Ok(Property { offset: 0x14, wide: false, value: 0x0046_0001 }));
        let mut bad = get;
        bad.cdw[0] = 2;
        assert_eq!(Property::from_sqe(&bad).unwrap_err().field, "ATTRIB.SIZE");
    }
}
