//! The discovery log page (base 5.16.1.23): where subsystems can be reached.

use super::bytes::{get_padded, get_u16, get_u64, put_padded, put_u16, put_u64};
use super::{FieldError, get_nqn, put_nqn};
use std::fmt;

/// The first 1024 bytes of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// GENCTR: changes with the content.
    pub generation: u64,
    /// NUMREC: how many entries follow.
    pub records: u64,
    /// RECFMT: 0.
    pub record_format: u16,
}

impl Header {
    /// Its size in bytes.
    pub const LEN: usize = 1024;

    /// As on the wire.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Header::LEN] {
        let mut bytes = [0; Header::LEN];
        put_u64(&mut bytes, 0, self.generation);
        put_u64(&mut bytes, 8, self.records);
        put_u16(&mut bytes, 16, self.record_format);
        bytes
    }

    /// From the wire.
    ///
    /// # Errors
    /// When the entries' format is not ours.
    pub fn from_bytes(bytes: &[u8; Header::LEN]) -> Result<Header, FieldError> {
        let header = Header {
            generation: get_u64(bytes, 0),
            records: get_u64(bytes, 8),
            record_format: get_u16(bytes, 16),
        };
        if header.record_format != 0 {
            return Err(FieldError {
                structure: "discovery log page",
                field: "RECFMT",
                value: u64::from(header.record_format),
                expected: "0",
            });
        }
        Ok(header)
    }
}

/// TRTYPE: what carries the commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransportType(pub u8);

impl TransportType {
    /// RDMA.
    pub const RDMA: TransportType = TransportType(1);
    /// TCP.
    pub const TCP: TransportType = TransportType(3);
}

impl fmt::Display for TransportType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            1 => f.write_str("rdma"),
            2 => f.write_str("fc"),
            3 => f.write_str("tcp"),
            254 => f.write_str("loop"),
            other => write!(f, "transport {other}"),
        }
    }
}

/// ADRFAM: the address family is IPv4.
pub const FAMILY_IPV4: u8 = 1;
/// ADRFAM: the address family is IPv6.
pub const FAMILY_IPV6: u8 = 2;
/// SUBTYPE: a referral to another discovery service.
pub const SUBTYPE_REFERRAL: u8 = 1;
/// SUBTYPE: an NVM subsystem.
pub const SUBTYPE_NVM: u8 = 2;
/// SUBTYPE: the discovery subsystem that is being asked.
pub const SUBTYPE_CURRENT: u8 = 3;
/// TREQ bit 2: the target can do without SQ flow control. Bits 1:0 stay 00b, nothing is said of a secure channel: "not required"
/// means for nvme-cli (libnvme 1.3) that there may be one, and it asks its kernel for TLS.
pub const TREQ_NO_FLOW_CONTROL: u8 = 4;

/// One way to one subsystem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// TRTYPE.
    pub transport: TransportType,
    /// ADRFAM.
    pub family: u8,
    /// SUBTYPE.
    pub subtype: u8,
    /// TREQ.
    pub requirements: u8,
    /// PORTID.
    pub port_id: u16,
    /// CNTLID: FFFFh for the dynamic model.
    pub cntlid: u16,
    /// ASQSZ: the largest admin queue.
    pub admin_queue_size: u16,
    /// EFLAGS.
    pub flags: u16,
    /// TRSVCID: the port number, as text.
    pub service: String,
    /// SUBNQN.
    pub subsystem_nqn: String,
    /// TRADDR: the address, as text.
    pub address: String,
    /// TSAS byte 0, for TCP SECTYPE: 0 none, 1 TLS; for RDMA RDMA_QPTYPE.
    pub security: u8,
}

impl Entry {
    /// Its size in bytes.
    pub const LEN: usize = 1024;

    /// As on the wire.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Entry::LEN] {
        let mut bytes = [0; Entry::LEN];
        bytes[0] = self.transport.0;
        bytes[1] = self.family;
        bytes[2] = self.subtype;
        bytes[3] = self.requirements;
        put_u16(&mut bytes, 4, self.port_id);
        put_u16(&mut bytes, 6, self.cntlid);
        put_u16(&mut bytes, 8, self.admin_queue_size);
        put_u16(&mut bytes, 10, self.flags);
        put_padded(&mut bytes[32..64], &self.service);
        put_nqn(&mut bytes[256..512], &self.subsystem_nqn);
        put_padded(&mut bytes[512..768], &self.address);
        bytes[768] = self.security;
        if self.transport == TransportType::RDMA {
            // RDMA_PRTYPE: the network is not said; RDMA_CMS: connections are set up by rdma_cm.
            (bytes[769], bytes[770]) = (1, 1);
        }
        bytes
    }

    /// From the wire.
    ///
    /// # Errors
    /// When the subsystem's name cannot be read.
    pub fn from_bytes(bytes: &[u8; Entry::LEN]) -> Result<Entry, FieldError> {
        Ok(Entry {
            transport: TransportType(bytes[0]),
            family: bytes[1],
            subtype: bytes[2],
            requirements: bytes[3],
            port_id: get_u16(bytes, 4),
            cntlid: get_u16(bytes, 6),
            admin_queue_size: get_u16(bytes, 8),
            flags: get_u16(bytes, 10),
            service: get_padded(&bytes[32..64]),
            subsystem_nqn: get_nqn(&bytes[256..512], "discovery log page entry", "SUBNQN")?,
            address: get_padded(&bytes[512..768]),
            security: bytes[768],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_the_bytes_that_the_specification_says() {
        let entry = Entry {
            transport: TransportType::TCP,
            family: FAMILY_IPV4,
            subtype: SUBTYPE_NVM,
            requirements: TREQ_NO_FLOW_CONTROL,
            port_id: 1,
            cntlid: 0xffff,
            admin_queue_size: 32,
            flags: 0,
            service: "4420".into(),
            subsystem_nqn: "nqn.x".into(),
            address: "127.0.0.1".into(),
            security: 0,
        };
        let bytes = entry.to_bytes();
        assert_eq!(bytes[..12], [3, 1, 2, 4, 1, 0, 0xff, 0xff, 32, 0, 0, 0]);
        assert_eq!(&bytes[32..38], b"4420  ");
        assert_eq!(&bytes[256..262], b"nqn.x\0");
        assert_eq!(&bytes[512..523], b"127.0.0.1  ");
        assert_eq!(Entry::from_bytes(&bytes), Ok(entry));
    }

    #[test]
    fn a_header_of_another_format_is_refused_by_name() {
        let header = Header { generation: 5, records: 2, record_format: 0 };
        assert_eq!(header.to_bytes()[..18], [5, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(Header::from_bytes(&header.to_bytes()), Ok(header));
        let other = Header { record_format: 1, ..header };
        assert_eq!(Header::from_bytes(&other.to_bytes()).unwrap_err().field, "RECFMT");
    }
}
