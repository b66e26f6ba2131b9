//! Reservations: who may write to, or read, a device that several hosts share. The words of NVMe (base 8.19), which others have too.

use std::fmt;

/// What a reservation allows to whom, as NVMe has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReservationType {
    /// Its holder writes, everybody reads.
    WriteExclusive,
    /// Its holder alone.
    ExclusiveAccess,
    /// Registrants write, everybody reads; one host holds it.
    WriteExclusiveRegistrantsOnly,
    /// Registrants alone; one host holds it.
    ExclusiveAccessRegistrantsOnly,
    /// Registrants write, everybody reads; all of them hold it.
    WriteExclusiveAllRegistrants,
    /// Registrants alone; all of them hold it.
    ExclusiveAccessAllRegistrants,
}

impl ReservationType {
    /// All types, in the order of their values from 1.
    pub const ALL: [ReservationType; 6] = [
        ReservationType::WriteExclusive,
        ReservationType::ExclusiveAccess,
        ReservationType::WriteExclusiveRegistrantsOnly,
        ReservationType::ExclusiveAccessRegistrantsOnly,
        ReservationType::WriteExclusiveAllRegistrants,
        ReservationType::ExclusiveAccessAllRegistrants,
    ];

    /// The word that people use.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            ReservationType::WriteExclusive => "write-exclusive",
            ReservationType::ExclusiveAccess => "exclusive-access",
            ReservationType::WriteExclusiveRegistrantsOnly => "write-exclusive-registrants-only",
            ReservationType::ExclusiveAccessRegistrantsOnly => "exclusive-access-registrants-only",
            ReservationType::WriteExclusiveAllRegistrants => "write-exclusive-all-registrants",
            ReservationType::ExclusiveAccessAllRegistrants => "exclusive-access-all-registrants",
        }
    }

    /// RTYPE.
    #[must_use]
    pub fn to_u8(self) -> u8 {
        match self {
            ReservationType::WriteExclusive => 1,
            ReservationType::ExclusiveAccess => 2,
            ReservationType::WriteExclusiveRegistrantsOnly => 3,
            ReservationType::ExclusiveAccessRegistrantsOnly => 4,
            ReservationType::WriteExclusiveAllRegistrants => 5,
            ReservationType::ExclusiveAccessAllRegistrants => 6,
        }
    }

    /// From RTYPE.
    #[must_use]
    pub fn from_u8(value: u8) -> Option<ReservationType> {
        ReservationType::ALL.into_iter().find(|kind| kind.to_u8() == value)
    }

    /// Whether every registrant holds it.
    #[must_use]
    pub fn is_held_by_all(self) -> bool {
        matches!(
            self,
            ReservationType::WriteExclusiveAllRegistrants | ReservationType::ExclusiveAccessAllRegistrants
        )
    }

    /// Whether those that may not write may not read either.
    #[must_use]
    pub fn excludes_readers(self) -> bool {
        matches!(
            self,
            ReservationType::ExclusiveAccess
                | ReservationType::ExclusiveAccessRegistrantsOnly
                | ReservationType::ExclusiveAccessAllRegistrants
        )
    }

    /// Whether registrants that do not hold it have its rights all the same.
    #[must_use]
    pub fn includes_registrants(self) -> bool {
        !matches!(self, ReservationType::WriteExclusive | ReservationType::ExclusiveAccess)
    }
}

impl std::str::FromStr for ReservationType {
    type Err = String;

    /// From its word, or its number.
    fn from_str(text: &str) -> Result<ReservationType, String> {
        let number = text.parse().ok().and_then(ReservationType::from_u8);
        number.or_else(|| ReservationType::ALL.into_iter().find(|kind| kind.name() == text)).ok_or_else(
            || {
                let names = ReservationType::ALL.map(ReservationType::name).join(", ");
                format!("{text:?} is no reservation type, want 1 to 6 or one of {names}")
            },
        )
    }
}

/// RREGA of Reservation Register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegisterAction {
    /// The host becomes a registrant with the new key.
    Register,
    /// It is none any more.
    Unregister,
    /// Its key becomes the new one.
    Replace,
}

/// RACQA of Reservation Acquire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AcquireAction {
    /// Takes it if nobody has it.
    Acquire,
    /// Takes it from the registrants with the other key, who are none any more.
    Preempt,
    /// The same, and their commands have ended when it succeeds.
    PreemptAndAbort,
}

/// RRELA of Reservation Release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReleaseAction {
    /// Gives it back.
    Release,
    /// Nobody has it, and nobody is registered.
    Clear,
}

/// One of the commands that change something, with its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReservationCommand {
    /// Reservation Register (base 7.3).
    Register {
        /// RREGA.
        action: RegisterAction,
        /// CRKEY.
        current: u64,
        /// NRKEY.
        new: u64,
        /// IEKEY: CRKEY is not looked at.
        ignore_key: bool,
        /// CPTPL: whether it shall persist through power loss; `None`: as it is.
        persist: Option<bool>,
    },
    /// Reservation Acquire (base 7.2).
    Acquire {
        /// RACQA.
        action: AcquireAction,
        /// CRKEY.
        current: u64,
        /// PRKEY.
        preempted: u64,
        /// RTYPE.
        kind: ReservationType,
    },
    /// Reservation Release (base 7.4).
    Release {
        /// RRELA.
        action: ReleaseAction,
        /// CRKEY.
        current: u64,
        /// RTYPE; for [`ReleaseAction::Clear`] it is not looked at.
        kind: Option<ReservationType>,
    },
}

/// A host that is registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registrant {
    /// HOSTID.
    pub host: [u8; 16],
    /// RKEY.
    pub key: u64,
    /// RCSTS: it holds the reservation.
    pub holds: bool,
}

/// What there is, as a report tells it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReservationStatus {
    /// GEN: counts changes of registrants.
    pub generation: u32,
    /// RTYPE: the reservation there is.
    pub kind: Option<ReservationType>,
    /// PTPLS: it persists through power loss.
    pub persists: bool,
    /// The registrants.
    pub registrants: Vec<Registrant>,
}

/// Why a reservation command has not succeeded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReserveError {
    /// Another host's reservation, or another key, stands against it.
    Conflict,
    /// The device knows no reservations.
    Unsupported,
    /// It was refused for another reason.
    Refused(String),
    /// The device could not be asked; nothing has changed.
    NotSent(String),
    /// It was sent and not answered: only a report tells whether it was carried out, and one that comes later may still be.
    Unanswered(String),
}

impl fmt::Display for ReserveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ReserveError::Conflict => {
                f.write_str("Reservation Conflict: another key, or another host has it")
            }
            ReserveError::Unsupported => f.write_str("the device knows no reservations"),
            ReserveError::Refused(why) => f.write_str(why),
            ReserveError::NotSent(why) => write!(f, "not sent: {why}"),
            ReserveError::Unanswered(why) => write!(f, "the outcome is not known, a report tells it: {why}"),
        }
    }
}
