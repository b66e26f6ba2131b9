//! Controller properties (base 3.1.3), which Fabrics reads and writes by command instead of by register.

use super::bytes::{bits, low8, low16};

/// Property offsets (base 3.1.3).
pub mod offset {
    /// CAP, 8 bytes.
    pub const CAP: u32 = 0x00;
    /// VS, 4 bytes.
    pub const VS: u32 = 0x08;
    /// CC, 4 bytes.
    pub const CC: u32 = 0x14;
    /// CSTS, 4 bytes.
    pub const CSTS: u32 = 0x1C;
    /// NSSR, 4 bytes.
    pub const NSSR: u32 = 0x20;
    /// CRTO, 4 bytes.
    pub const CRTO: u32 = 0x68;
}

/// CAP: Controller Capabilities (base 3.1.3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// MQES: the most entries of an I/O queue, counted from 0.
    pub queue_entries_max: u16,
    /// TO: how long to wait for CSTS.RDY, in 500 ms.
    pub timeout: u8,
    /// CSS: command sets; bit 0 is NVM, bit 6 is "one or more by Identify".
    pub command_sets: u8,
    /// MPSMIN: the smallest memory page is 2^(12 + this) bytes; MDTS counts in it.
    pub page_size_min: u8,
    /// MPSMAX: as MPSMIN, the largest.
    pub page_size_max: u8,
}

impl Capabilities {
    /// As the property's value. CQR is 1: Fabrics queues are contiguous.
    #[must_use]
    pub fn to_u64(self) -> u64 {
        u64::from(self.queue_entries_max)
            | 1 << 16
            | u64::from(self.timeout) << 24
            | u64::from(self.command_sets) << 37
            | u64::from(self.page_size_min & 15) << 48
            | u64::from(self.page_size_max & 15) << 52
    }

    /// From the property's value.
    #[must_use]
    pub fn from_u64(value: u64) -> Capabilities {
        Capabilities {
            queue_entries_max: low16(bits(value, 15, 0)),
            timeout: low8(bits(value, 31, 24)),
            command_sets: low8(bits(value, 44, 37)),
            page_size_min: low8(bits(value, 51, 48)),
            page_size_max: low8(bits(value, 55, 52)),
        }
    }
}

/// VS: major, minor and tertiary version (base 3.1.3.2).
#[must_use]
pub const fn version(major: u16, minor: u8, tertiary: u8) -> u32 {
    (major as u32) << 16 | (minor as u32) << 8 | tertiary as u32
}

/// CC.EN: the controller shall run (base 3.1.3.5).
pub const CC_ENABLE: u32 = 1;
/// CC.SHN 01b: normal shutdown.
pub const CC_SHUTDOWN_NORMAL: u32 = 1 << 14;
/// CC.SHN: both bits.
pub const CC_SHUTDOWN_MASK: u32 = 3 << 14;
/// CC as an initiator sets it to start: enabled, NVM command set, 4 KiB pages, SQEs of 2^6 and CQEs of 2^4 bytes.
pub const CC_START: u32 = CC_ENABLE | 6 << 16 | 4 << 20;

/// CSTS.RDY: the controller takes commands (base 3.1.3.6).
pub const CSTS_READY: u32 = 1;
/// CSTS.CFS: the controller has failed for good.
pub const CSTS_FATAL: u32 = 1 << 1;
/// CSTS.SHST 10b: shutdown is complete.
pub const CSTS_SHUTDOWN_COMPLETE: u32 = 2 << 2;
/// CSTS.SHST: both bits.
pub const CSTS_SHUTDOWN_MASK: u32 = 3 << 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_the_bits_that_the_specification_says() {
        let cap = Capabilities {
            queue_entries_max: 127,
            timeout: 30,
            command_sets: 1,
            page_size_min: 0,
            page_size_max: 4,
        };
        assert_eq!(cap.to_u64(), 127 | 1 << 16 | 30 << 24 | 1 << 37 | 4 << 52);
        assert_eq!(Capabilities::from_u64(cap.to_u64()), cap);
        assert_eq!(version(2, 0, 0), 0x0002_0000);
        assert_eq!(CC_START, 0x0046_0001);
    }
}
