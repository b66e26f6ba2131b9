//! Reservations (base 8.19): the four commands as bytes.

use super::bytes::{bits, get_array, get_u16, get_u32, get_u64, low8, put_u16, put_u32, put_u64};
use super::{FieldError, Sgl, Sqe, io_opcode};
pub use hawser_block::reservation::{
    AcquireAction, RegisterAction, Registrant, ReleaseAction, ReservationCommand, ReservationStatus,
    ReservationType,
};

/// How much data a command of this opcode has; `None` for one that is none of these.
#[must_use]
pub fn data_len(opcode: u8) -> Option<u32> {
    match opcode {
        io_opcode::RESERVATION_REGISTER | io_opcode::RESERVATION_ACQUIRE => Some(16),
        io_opcode::RESERVATION_RELEASE => Some(8),
        _ => None,
    }
}

/// As a command whose data, which comes along, is in its capsule.
#[must_use]
pub fn to_sqe(command: &ReservationCommand, nsid: u32) -> (Sqe, Vec<u8>) {
    let (opcode, dword, keys) = match *command {
        ReservationCommand::Register { action, current, new, ignore_key, persist } => {
            let action = match action {
                RegisterAction::Register => 0,
                RegisterAction::Unregister => 1,
                RegisterAction::Replace => 2,
            };
            let persist = persist.map_or(0, |on| 2 | u32::from(on));
            let dword = action | u32::from(ignore_key) << 3 | persist << 30;
            (io_opcode::RESERVATION_REGISTER, dword, vec![current, new])
        }
        ReservationCommand::Acquire { action, current, preempted, kind } => {
            let action = match action {
                AcquireAction::Acquire => 0,
                AcquireAction::Preempt => 1,
                AcquireAction::PreemptAndAbort => 2,
            };
            let dword = action | u32::from(kind.to_u8()) << 8;
            (io_opcode::RESERVATION_ACQUIRE, dword, vec![current, preempted])
        }
        ReservationCommand::Release { action, current, kind } => {
            let action = if action == ReleaseAction::Release { 0 } else { 1 };
            let dword = action | u32::from(kind.map_or(0, ReservationType::to_u8)) << 8;
            (io_opcode::RESERVATION_RELEASE, dword, vec![current])
        }
    };
    let data: Vec<u8> = keys.into_iter().flat_map(u64::to_le_bytes).collect();
    let len = u32::try_from(data.len()).unwrap_or(0);
    let mut sqe = Sqe::new(opcode, nsid, Sgl::in_capsule(len));
    sqe.cdw[0] = dword;
    (sqe, data)
}

/// From a command and its data, of [`data_len`] bytes.
///
/// # Errors
/// The field that holds none of its values.
pub fn from_sqe(sqe: &Sqe, data: &[u8]) -> Result<ReservationCommand, FieldError> {
    let error = |field, value: u32, expected| FieldError {
        structure: "Reservation command",
        field,
        value: u64::from(value),
        expected,
    };
    if data_len(sqe.opcode) != u32::try_from(data.len()).ok() {
        return Err(error("data", u32::from(sqe.opcode), "of a command that changes reservations"));
    }
    let dword = sqe.cdw[0];
    let action = dword & 7;
    let ignore_key = dword & 1 << 3 != 0;
    let kind = ReservationType::from_u8(low8(bits(u64::from(dword), 15, 8)));
    let current = get_u64(data, 0);
    if ignore_key && sqe.opcode != io_opcode::RESERVATION_REGISTER {
        return Err(error("IEKEY", 1, "0"));
    }
    match sqe.opcode {
        io_opcode::RESERVATION_REGISTER => Ok(ReservationCommand::Register {
            action: match action {
                0 => RegisterAction::Register,
                1 => RegisterAction::Unregister,
                2 => RegisterAction::Replace,
                _ => return Err(error("RREGA", action, "0 to 2")),
            },
            current,
            new: get_u64(data, 8),
            ignore_key,
            persist: match dword >> 30 {
                0 => None,
                2 => Some(false),
                3 => Some(true),
                other => return Err(error("CPTPL", other, "0, 2 or 3")),
            },
        }),
        io_opcode::RESERVATION_ACQUIRE => Ok(ReservationCommand::Acquire {
            action: match action {
                0 => AcquireAction::Acquire,
                1 => AcquireAction::Preempt,
                2 => AcquireAction::PreemptAndAbort,
                _ => return Err(error("RACQA", action, "0 to 2")),
            },
            current,
            preempted: get_u64(data, 8),
            kind: kind.ok_or(error("RTYPE", dword >> 8 & 0xff, "1 to 6"))?,
        }),
        _ => Ok(ReservationCommand::Release {
            action: match action {
                0 => ReleaseAction::Release,
                1 => ReleaseAction::Clear,
                _ => return Err(error("RRELA", action, "0 or 1")),
            },
            current,
            kind,
        }),
    }
}

/// What a registrant is told that another host has done to it (base 8.19, Reservation Notifications).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReservationNotice {
    /// Its registration was taken away.
    RegistrationPreempted,
    /// Nobody holds what registrants shared any more, or it is of another type.
    Released,
    /// The reservation and all registrations were cleared.
    Preempted,
}

impl ReservationNotice {
    /// All, in the order of their numbers from 1.
    pub const ALL: [ReservationNotice; 3] =
        [ReservationNotice::RegistrationPreempted, ReservationNotice::Released, ReservationNotice::Preempted];

    /// RNLPT: its number in the log page. Its bit in feature 82h has the same.
    #[must_use]
    pub fn to_u8(self) -> u8 {
        match self {
            ReservationNotice::RegistrationPreempted => 1,
            ReservationNotice::Released => 2,
            ReservationNotice::Preempted => 3,
        }
    }
}

/// The Reservation Notification log page (80h, base figure of it).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoticeLog {
    /// LPC: counts notices; 0 in an empty page.
    pub count: u64,
    /// RNLPT and NSID; `None`: there is nothing to tell.
    pub notice: Option<(ReservationNotice, u32)>,
    /// NALP: how many more there are.
    pub more: u8,
}

impl NoticeLog {
    /// Its size in bytes.
    pub const LEN: usize = 64;

    /// As on the wire.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; NoticeLog::LEN] {
        let mut bytes = [0; NoticeLog::LEN];
        if let Some((notice, nsid)) = self.notice {
            put_u64(&mut bytes, 0, self.count);
            bytes[8] = notice.to_u8();
            bytes[9] = self.more;
            put_u32(&mut bytes, 12, nsid);
        }
        bytes
    }

    /// From the wire.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; NoticeLog::LEN]) -> NoticeLog {
        let kind = ReservationNotice::ALL.into_iter().find(|notice| notice.to_u8() == bytes[8]);
        let notice = kind.map(|kind| (kind, get_u32(bytes, 12)));
        NoticeLog { count: get_u64(bytes, 0), notice, more: bytes[9] }
    }
}

/// Reservation Report (base 7.5) of `len` bytes with host identifiers of 128 bits (EDS), as Fabrics demands.
#[must_use]
pub fn report(nsid: u32, len: u32) -> Sqe {
    let mut sqe = Sqe::new(io_opcode::RESERVATION_REPORT, nsid, Sgl::transport(len));
    sqe.cdw[0] = (len / 4).saturating_sub(1);
    sqe.cdw[1] = 1;
    sqe
}

/// The header of a report, and each of its registrants.
const UNIT: usize = 64;

/// What Reservation Report answers (base figure "Reservation Status Extended Data Structure"), as on the wire.
#[must_use]
pub fn status_to_bytes(status: &ReservationStatus) -> Vec<u8> {
    let mut bytes = vec![0; UNIT * (1 + status.registrants.len())];
    put_u32(&mut bytes, 0, status.generation);
    bytes[4] = status.kind.map_or(0, ReservationType::to_u8);
    put_u16(&mut bytes, 5, u16::try_from(status.registrants.len()).unwrap_or(u16::MAX));
    bytes[9] = u8::from(status.persists);
    for (registrant, entry) in status.registrants.iter().zip(bytes.chunks_exact_mut(UNIT).skip(1)) {
        // CNTLID: those of the dynamic model come and go.
        put_u16(entry, 0, 0xffff);
        entry[2] = u8::from(registrant.holds);
        put_u64(entry, 8, registrant.key);
        entry[16..32].copy_from_slice(&registrant.host);
    }
    bytes
}

/// How long a report is, from its beginning.
#[must_use]
pub fn status_len(bytes: &[u8]) -> u32 {
    let registrants = if bytes.len() < UNIT { 0 } else { get_u16(bytes, 5) };
    64 * (1 + u32::from(registrants))
}

/// From the wire, whatever is there of it.
#[must_use]
pub fn status_from_bytes(bytes: &[u8]) -> ReservationStatus {
    if bytes.len() < UNIT {
        return ReservationStatus::default();
    }
    let entries = bytes.chunks_exact(UNIT).skip(1);
    ReservationStatus {
        generation: get_u32(bytes, 0),
        kind: ReservationType::from_u8(bytes[4]),
        persists: bytes[9] & 1 != 0,
        registrants: entries
            .take(usize::from(get_u16(bytes, 5)))
            .map(|entry| Registrant {
                host: get_array(entry, 16),
                key: get_u64(entry, 8),
                holds: entry[2] & 1 != 0,
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_the_bytes_that_the_specification_says() {
        let register = ReservationCommand::Register {
            action: RegisterAction::Replace,
            current: 1,
            new: 0x0201,
            ignore_key: true,
            persist: Some(true),
        };
        let (sqe, data) = to_sqe(&register, 7);
        assert_eq!(
            (sqe.opcode, sqe.nsid, sqe.to_bytes()[40..44].to_vec()),
            (0x0d, 7, vec![0x0a, 0, 0, 0xc0])
        );
        assert_eq!(data, [1, 0, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0]);
        assert_eq!(from_sqe(&sqe, &data), Ok(register));
        for kind in ReservationType::ALL {
            let action = AcquireAction::PreemptAndAbort;
            let acquire = ReservationCommand::Acquire { action, current: 3, preempted: 4, kind };
            let (sqe, data) = to_sqe(&acquire, 1);
            assert_eq!((sqe.opcode, sqe.to_bytes()[40..42].to_vec()), (0x11, vec![2, kind.to_u8()]));
            assert_eq!(from_sqe(&sqe, &data), Ok(acquire));
        }
        let release = ReservationCommand::Release { action: ReleaseAction::Clear, current: 9, kind: None };
        let (sqe, data) = to_sqe(&release, 1);
        assert_eq!((sqe.opcode, sqe.to_bytes()[40], data.len()), (0x15, 1, 8));
        assert_eq!(from_sqe(&sqe, &data), Ok(release));
        let sqe = report(1, 4096);
        assert_eq!((sqe.opcode, sqe.cdw[0], sqe.cdw[1]), (0x0e, 1023, 1));
    }

    #[test]
    fn a_notice_is_the_bytes_that_the_specification_says() {
        let log = NoticeLog { count: 0x0102, notice: Some((ReservationNotice::Released, 7)), more: 3 };
        let bytes = log.to_bytes();
        assert_eq!(bytes[..16], [2, 1, 0, 0, 0, 0, 0, 0, 2, 3, 0, 0, 7, 0, 0, 0]);
        assert_eq!(NoticeLog::from_bytes(&bytes), log);
        assert_eq!(NoticeLog::from_bytes(&[0; 64]).notice, None);
    }

    #[test]
    fn a_value_that_is_none_is_refused_by_name() {
        let refused = |opcode, dword, len: usize| {
            let mut sqe = Sqe::new(opcode, 1, Sgl::NONE);
            sqe.cdw[0] = dword;
            from_sqe(&sqe, &vec![0; len]).unwrap_err().field
        };
        assert_eq!(refused(0x0d, 3, 16), "RREGA");
        assert_eq!(refused(0x0d, 1 << 30, 16), "CPTPL");
        assert_eq!(refused(0x11, 0x103, 16), "RACQA");
        assert_eq!(refused(0x11, 0x700, 16), "RTYPE");
        assert_eq!(refused(0x11, 0x108, 16), "IEKEY");
        assert_eq!(refused(0x15, 2, 8), "RRELA");
        assert_eq!(refused(0x15, 0, 16), "data");
    }

    #[test]
    fn a_report_is_the_bytes_that_the_specification_says() {
        let status = ReservationStatus {
            generation: 0x0102,
            kind: Some(ReservationType::ExclusiveAccess),
            persists: true,
            registrants: vec![Registrant { host: [9; 16], key: 5, holds: true }],
        };
        let bytes = status_to_bytes(&status);
        assert_eq!(bytes[..10], [2, 1, 0, 0, 2, 1, 0, 0, 0, 1]);
        assert_eq!((bytes.len(), &bytes[64..67], bytes[72], bytes[80]), (128, &[0xff, 0xff, 1][..], 5, 9));
        assert_eq!((status_from_bytes(&bytes), status_len(&bytes), status_len(&[])), (status, 128, 64));
        assert_eq!(status_from_bytes(&bytes[..100]).registrants, []);
    }
}
