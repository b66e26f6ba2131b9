//! Cross-Controller Reset (TP8028, base 2.3, 5.4.3): a host asks one controller of a subsystem to reset another one whose
//! path is broken, so that it knows when nothing that it sent there will be executed any more.
//!
//! How a host uses it: it keeps each association's [`ControllerInstance`] (from Identify Controller and Connect). When the
//! association breaks, it sends [`ControllerInstance::reset`] on another association with the same subsystem. The command
//! succeeds: with [`IMMEDIATE_SUCCESS`] in dword 0 of its completion the other controller is reset already; without it the
//! event [`AsyncEvent::CROSS_CONTROLLER_RESET`](super::log::AsyncEvent::CROSS_CONTROLLER_RESET) tells when to look for the
//! end in the log page [`ResetLog`].

use super::bytes::{get_u16, low8, low16, low32, put_u16};
use super::identify::IdentifyController;
use super::{Sgl, Sqe, admin_opcode};

/// What names one life of one controller: after a reset its uniquifier or its random number is another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControllerInstance {
    /// CNTLID.
    pub cntlid: u16,
    /// CIU; 0: the controller cannot be reset across controllers.
    pub uniquifier: u8,
    /// CIRN.
    pub random: u64,
}

/// Dword 0 of the completion, bit 0: the impacted controller is reset already (IRS).
pub const IMMEDIATE_SUCCESS: u32 = 1;

impl ControllerInstance {
    /// From what a controller says of itself; `None` when it does not say (CIU is 0).
    #[must_use]
    pub fn of(controller: &IdentifyController) -> Option<ControllerInstance> {
        let IdentifyController { cntlid, instance_uniquifier: uniquifier, instance_random: random, .. } =
            *controller;
        (uniquifier != 0).then_some(ControllerInstance { cntlid, uniquifier, random })
    }

    /// The command that resets it, for the admin queue of another controller of its subsystem.
    #[must_use]
    pub fn reset(&self) -> Sqe {
        let mut sqe = Sqe::new(admin_opcode::CROSS_CONTROLLER_RESET, 0, Sgl::NONE);
        sqe.cdw[0] = u32::from(self.cntlid) | u32::from(self.uniquifier) << 16;
        sqe.cdw[2] = low32(self.random);
        sqe.cdw[3] = low32(self.random >> 32);
        sqe
    }

    /// From a command that is a Cross-Controller Reset.
    #[must_use]
    pub fn from_sqe(sqe: &Sqe) -> ControllerInstance {
        ControllerInstance {
            cntlid: low16(sqe.cdw[0]),
            uniquifier: low8(sqe.cdw[0] >> 16),
            random: u64::from(sqe.cdw[2]) | u64::from(sqe.cdw[3]) << 32,
        }
    }
}

/// How far a reset is (CCRS).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetState {
    /// It goes on.
    InProgress,
    /// Nothing of the impacted controller is or will be executed.
    Succeeded,
    /// It could not be done: nothing is known.
    Failed,
}

/// One reset that a controller was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResetEntry {
    /// ICID: the controller that is reset.
    pub cntlid: u16,
    /// CIU that it had.
    pub uniquifier: u8,
    /// CCRS.
    pub state: ResetState,
}

/// The Cross-Controller Reset log page (1Eh): a header and an entry for each reset that the controller was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResetLog {
    /// The entries, at most 511.
    pub entries: Vec<ResetEntry>,
}

impl ResetLog {
    /// Header and each entry have this size, in bytes.
    const UNIT: usize = 8;
    /// The size of the largest log, in bytes.
    pub const LEN_MAX: u32 = 4096;
    /// Bit 0 of LSP in Get Log Page (RMC): entries of resets that have ended are taken out once read.
    pub const REMOVE_COMPLETED: u8 = 1;

    /// As on the wire.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; ResetLog::UNIT * (1 + self.entries.len())];
        put_u16(&mut bytes, 0, u16::try_from(self.entries.len()).unwrap_or(u16::MAX));
        for (entry, bytes) in self.entries.iter().zip(bytes.chunks_exact_mut(ResetLog::UNIT).skip(1)) {
            put_u16(bytes, 0, entry.cntlid);
            bytes[2] = entry.uniquifier;
            // ACID: no other controller would do better.
            put_u16(bytes, 4, 0xffff);
            bytes[6] = match entry.state {
                ResetState::InProgress => 0,
                ResetState::Succeeded => 1,
                ResetState::Failed => 2,
            };
            // CCRF: validated, and the reset was begun.
            bytes[7] = 3;
        }
        bytes
    }

    /// From the wire, whatever is there of it.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> ResetLog {
        let count = if bytes.len() < ResetLog::UNIT { 0 } else { usize::from(get_u16(bytes, 0)) };
        let entries = bytes.chunks_exact(ResetLog::UNIT).skip(1).take(count).map(|entry| ResetEntry {
            cntlid: get_u16(entry, 0),
            uniquifier: entry[2],
            state: match entry[6] {
                0 => ResetState::InProgress,
                1 => ResetState::Succeeded,
                _ => ResetState::Failed,
            },
        });
        ResetLog { entries: entries.collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reset_is_the_bytes_that_the_specification_says() {
        let instance = ControllerInstance { cntlid: 0x0201, uniquifier: 3, random: 0x0807_0605_0403_0201 };
        let bytes = instance.reset().to_bytes();
        assert_eq!(bytes[..8], [0x38, 0x40, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[40..56], [1, 2, 3, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(ControllerInstance::from_sqe(&instance.reset()), instance);
    }

    #[test]
    fn a_controller_that_says_nothing_has_no_instance() {
        let mut controller =
            IdentifyController { cntlid: 5, instance_random: 7, ..IdentifyController::default() };
        assert_eq!(ControllerInstance::of(&controller), None);
        controller.instance_uniquifier = 9;
        let instance = ControllerInstance { cntlid: 5, uniquifier: 9, random: 7 };
        assert_eq!(ControllerInstance::of(&controller), Some(instance));
    }

    #[test]
    fn a_log_is_the_bytes_that_the_specification_says() {
        let entry = |cntlid, state| ResetEntry { cntlid, uniquifier: 7, state };
        let log =
            ResetLog { entries: vec![entry(1, ResetState::InProgress), entry(2, ResetState::Succeeded)] };
        let bytes = log.to_bytes();
        assert_eq!(bytes[..8], [2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[8..], [1, 0, 7, 0, 0xff, 0xff, 0, 3, 2, 0, 7, 0, 0xff, 0xff, 1, 3]);
        assert_eq!(ResetLog::from_bytes(&bytes), log);
        // Cut short, and a count that says too much.
        assert_eq!(ResetLog::from_bytes(&bytes[..20]).entries, log.entries[..1]);
        assert_eq!(ResetLog::from_bytes(&[0xff; 4]).entries, []);
    }
}
