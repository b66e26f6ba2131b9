//! The completion queue entry (base 3.3.3.2): 16 bytes at the end of every command.

use super::NvmeStatus;
use super::bytes::{get_u16, get_u64, low32, put_u16, put_u64};

/// A completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cqe {
    /// Dwords 0 and 1: what the command answers, e.g. a property's value.
    pub result: u64,
    /// SQHD: the submission queue's head, as the controller has it. Not valid when flow control is off.
    pub sq_head: u16,
    /// SQID. Reserved in Fabrics.
    pub sq_id: u16,
    /// CID of the command that ended.
    pub cid: u16,
    /// How it ended.
    pub status: NvmeStatus,
}

impl Cqe {
    /// Its size in bytes.
    pub const LEN: usize = 16;

    /// A command that ended well without an answer.
    #[must_use]
    pub fn success(cid: u16) -> Cqe {
        Cqe { result: 0, sq_head: 0, sq_id: 0, cid, status: NvmeStatus::SUCCESS }
    }

    /// Dword 0 of the answer.
    #[must_use]
    pub fn dword0(&self) -> u32 {
        low32(self.result)
    }

    /// As on the wire.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Cqe::LEN] {
        let mut bytes = [0; Cqe::LEN];
        put_u64(&mut bytes, 0, self.result);
        put_u16(&mut bytes, 8, self.sq_head);
        put_u16(&mut bytes, 10, self.sq_id);
        put_u16(&mut bytes, 12, self.cid);
        put_u16(&mut bytes, 14, self.status.to_u16());
        bytes
    }

    /// From the wire.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; Cqe::LEN]) -> Cqe {
        Cqe {
            result: get_u64(bytes, 0),
            sq_head: get_u16(bytes, 8),
            sq_id: get_u16(bytes, 10),
            cid: get_u16(bytes, 12),
            status: NvmeStatus::from_u16(get_u16(bytes, 14)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nvme::StatusCode;

    #[test]
    fn bytes_are_where_the_specification_has_them() {
        let cqe = Cqe {
            result: 0x0807_0605_0403_0201,
            sq_head: 0x0a09,
            sq_id: 0x0c0b,
            cid: 0x0e0d,
            status: NvmeStatus::fatal(StatusCode::INVALID_FIELD),
        };
        assert_eq!(cqe.to_bytes(), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 0x04, 0x80]);
        assert_eq!(cqe.dword0(), 0x0403_0201);
    }
}
