//! Log pages and asynchronous events (base 5.16, 5.2).

use super::bytes::{low8, put_u16};

/// Log page identifiers.
#[expect(missing_docs, reason = "the specification's names")]
pub mod id {
    pub const SUPPORTED_LOG_PAGES: u8 = 0x00;
    pub const ERROR_INFORMATION: u8 = 0x01;
    pub const SMART: u8 = 0x02;
    pub const FIRMWARE_SLOTS: u8 = 0x03;
    pub const CHANGED_NAMESPACES: u8 = 0x04;
    pub const COMMANDS_AND_EFFECTS: u8 = 0x05;
    pub const ANA: u8 = 0x0C;
    pub const CROSS_CONTROLLER_RESET: u8 = 0x1E;
    pub const DISCOVERY: u8 = 0x70;
    pub const RESERVATION_NOTIFICATION: u8 = 0x80;
}

/// What an Asynchronous Event Request ends with (base figure "Asynchronous Event Request - Completion Queue Entry
/// Dword 0").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AsyncEvent {
    /// Type: 0 error, 1 SMART, 2 notice, 6 I/O command set, 7 vendor.
    pub event_type: u8,
    /// What within its type.
    pub information: u8,
    /// The log page that says more, and whose reading lets the next event of this type come.
    pub log_page: u8,
}

impl AsyncEvent {
    /// Notice: a namespace was attached, detached or changed.
    pub const NAMESPACE_ATTRIBUTE_CHANGED: AsyncEvent =
        AsyncEvent { event_type: 2, information: 0x00, log_page: id::CHANGED_NAMESPACES };
    /// Notice: asymmetric access changed.
    pub const ANA_CHANGE: AsyncEvent = AsyncEvent { event_type: 2, information: 0x03, log_page: id::ANA };
    /// Notice: a Cross-Controller Reset has ended.
    pub const CROSS_CONTROLLER_RESET: AsyncEvent =
        AsyncEvent { event_type: 2, information: 0xF4, log_page: id::CROSS_CONTROLLER_RESET };
    /// Notice: the discovery log changed.
    pub const DISCOVERY_CHANGED: AsyncEvent =
        AsyncEvent { event_type: 2, information: 0xF0, log_page: id::DISCOVERY };

    /// I/O command set: there is something in the Reservation Notification log.
    pub const RESERVATION_NOTICE: AsyncEvent =
        AsyncEvent { event_type: 6, information: 0x00, log_page: id::RESERVATION_NOTIFICATION };

    /// As dword 0 of the completion.
    #[must_use]
    pub fn to_dword(self) -> u32 {
        u32::from(self.event_type & 7) | u32::from(self.information) << 8 | u32::from(self.log_page) << 16
    }

    /// From dword 0 of the completion.
    #[must_use]
    pub fn from_dword(dword: u32) -> AsyncEvent {
        AsyncEvent { event_type: low8(dword) & 7, information: low8(dword >> 8), log_page: low8(dword >> 16) }
    }
}

/// The SMART / Health Information log (base 5.16.1.3) of a device in good health: 512 bytes.
#[must_use]
pub fn smart_healthy() -> [u8; 512] {
    let mut bytes = [0; 512];
    // Composite temperature in kelvin: 300 K is room temperature. 100 % of the spare is left, threshold 10 %.
    put_u16(&mut bytes, 1, 300);
    bytes[3] = 100;
    bytes[4] = 10;
    bytes
}

/// The Commands Supported and Effects log (base 5.16.1.6), 4096 bytes: each opcode's dword has bit 0 "supported", and
/// bit 1 "changes blocks".
#[must_use]
pub fn commands_supported(admin: &[u8], io: &[(u8, bool)]) -> [u8; 4096] {
    let mut bytes = [0; 4096];
    for opcode in admin {
        bytes[usize::from(*opcode) * 4] = 1;
    }
    for (opcode, writes) in io {
        bytes[1024 + usize::from(*opcode) * 4] = 1 | u8::from(*writes) << 1;
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_the_bits_that_the_specification_says() {
        assert_eq!(AsyncEvent::NAMESPACE_ATTRIBUTE_CHANGED.to_dword(), 0x0004_0002);
        assert_eq!(AsyncEvent::DISCOVERY_CHANGED.to_dword(), 0x0070_f002);
        assert_eq!(AsyncEvent::from_dword(0x000c_0302), AsyncEvent::ANA_CHANGE);
    }

    #[test]
    fn effects_are_at_their_opcodes() {
        let log = commands_supported(&[0x06], &[(0x01, true), (0x02, false)]);
        assert_eq!((log[24], log[1028], log[1032]), (1, 3, 1));
        assert_eq!(log.iter().filter(|byte| **byte != 0).count(), 3);
    }
}
