//! Features (base 5.27.1): what Set Features and Get Features speak of.

use super::bytes::low16;

/// Feature identifiers.
#[expect(missing_docs, reason = "the specification's names")]
pub mod id {
    pub const ARBITRATION: u8 = 0x01;
    pub const POWER_MANAGEMENT: u8 = 0x02;
    pub const TEMPERATURE_THRESHOLD: u8 = 0x04;
    pub const ERROR_RECOVERY: u8 = 0x05;
    pub const VOLATILE_WRITE_CACHE: u8 = 0x06;
    pub const NUMBER_OF_QUEUES: u8 = 0x07;
    pub const WRITE_ATOMICITY: u8 = 0x0A;
    pub const ASYNC_EVENT_CONFIGURATION: u8 = 0x0B;
    pub const KEEP_ALIVE_TIMER: u8 = 0x0F;
    pub const HOST_BEHAVIOR: u8 = 0x16;
    pub const HOST_IDENTIFIER: u8 = 0x81;
    pub const RESERVATION_NOTIFICATION_MASK: u8 = 0x82;
    pub const RESERVATION_PERSISTENCE: u8 = 0x83;
}

/// Number of Queues (base 5.27.1.5), as value and as answer: both halves hold the count minus 1.
#[must_use]
pub fn queues_to_value(count: u16) -> u32 {
    let zero_based = u32::from(count.saturating_sub(1));
    zero_based | zero_based << 16
}

/// How many queue pairs a Number of Queues value or answer stands for: the smaller of the two counts, 1 to 65536.
#[must_use]
pub fn queues_from_value(value: u32) -> u32 {
    u32::from(low16(value)).min(u32::from(low16(value >> 16))) + 1
}

/// The data of Host Behavior Support (base 5.27.1.18).
pub const HOST_BEHAVIOR_LEN: usize = 512;
/// ACRE, its first byte: the host waits as long as CRD says before it tries again.
pub const RETRY_DELAYS_ENABLED: u8 = 1;

/// Asynchronous Event Configuration (base 5.27.1.8): tell when a namespace changes.
pub const EVENT_NAMESPACE_ATTRIBUTE: u32 = 1 << 8;
/// Asynchronous Event Configuration: tell when asymmetric access changes.
pub const EVENT_ANA_CHANGE: u32 = 1 << 11;
/// Asynchronous Event Configuration: tell when a Cross-Controller Reset has ended.
pub const EVENT_CROSS_CONTROLLER_RESET: u32 = 1 << 20;
/// Asynchronous Event Configuration: tell when the discovery log changes.
pub const EVENT_DISCOVERY_CHANGE: u32 = 1 << 31;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queue_counts_are_zero_based_on_the_wire() {
        assert_eq!(queues_to_value(4), 0x0003_0003);
        assert_eq!(queues_from_value(0x0003_0001), 2);
        assert_eq!(queues_from_value(0xffff_ffff), 65536);
    }
}
