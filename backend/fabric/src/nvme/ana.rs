//! Asymmetric Namespace Access (base 8.1, log page 5.16.1.13): how well a namespace can be reached through a controller.

use super::bytes::{get_u16, get_u32, get_u64, put_u16, put_u32, put_u64};
use super::{FieldError, StatusCode};
use std::fmt;
use std::str::FromStr;

/// The state of a group of namespaces, as one controller sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AnaState {
    /// The best way there is.
    #[default]
    Optimized,
    /// It works; another way may be better.
    NonOptimized,
    /// Commands are refused for now.
    Inaccessible,
    /// Commands are refused for good.
    PersistentLoss,
    /// In transition: commands are refused; the state will be another within ANATT.
    Change,
}

impl AnaState {
    /// All states.
    pub const ALL: [AnaState; 5] = [
        AnaState::Optimized,
        AnaState::NonOptimized,
        AnaState::Inaccessible,
        AnaState::PersistentLoss,
        AnaState::Change,
    ];

    /// The name that nvmet's configfs and Linux's sysfs use.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            AnaState::Optimized => "optimized",
            AnaState::NonOptimized => "non-optimized",
            AnaState::Inaccessible => "inaccessible",
            AnaState::PersistentLoss => "persistent-loss",
            AnaState::Change => "change",
        }
    }

    /// As in the log page.
    #[must_use]
    pub fn to_u8(self) -> u8 {
        match self {
            AnaState::Optimized => 1,
            AnaState::NonOptimized => 2,
            AnaState::Inaccessible => 3,
            AnaState::PersistentLoss => 4,
            AnaState::Change => 0xf,
        }
    }

    /// From the log page.
    #[must_use]
    pub fn from_u8(value: u8) -> Option<AnaState> {
        AnaState::ALL.into_iter().find(|state| state.to_u8() == value & 0xf)
    }

    /// With what commands are refused in this state; `None` where they are executed.
    #[must_use]
    pub fn refusal(self) -> Option<StatusCode> {
        match self {
            AnaState::Optimized | AnaState::NonOptimized => None,
            AnaState::Inaccessible => Some(StatusCode::ANA_INACCESSIBLE),
            AnaState::PersistentLoss => Some(StatusCode::ANA_PERSISTENT_LOSS),
            AnaState::Change => Some(StatusCode::ANA_TRANSITION),
        }
    }
}

impl fmt::Display for AnaState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for AnaState {
    type Err = String;

    fn from_str(text: &str) -> Result<AnaState, String> {
        AnaState::ALL.into_iter().find(|state| state.name() == text).ok_or_else(|| {
            let names = AnaState::ALL.map(AnaState::name).join(", ");
            format!("{text:?} is no ANA state, want one of {names}")
        })
    }
}

/// One group of namespaces that share their state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AnaGroup {
    /// AGID: 1 and up.
    pub id: u32,
    /// The group's own change count.
    pub changes: u64,
    /// Its state.
    pub state: AnaState,
    /// The namespaces in it, in rising order; none where only groups were asked for (RGO).
    pub namespaces: Vec<u32>,
}

/// The ANA log page (0Ch).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AnaLog {
    /// CHGCNT: counts changes; the log was read whole when it is the same before and after.
    pub changes: u64,
    /// The groups, in rising order of their IDs.
    pub groups: Vec<AnaGroup>,
}

/// ANACAP: the states that a controller may report: all five.
pub const ANACAP_ALL_STATES: u8 = 0x1f;
/// ANACAP bit 6: a namespace's ANAGRPID does not change while it is attached.
pub const ANACAP_GROUP_IS_FIXED: u8 = 1 << 6;
/// CMIC bit 3: the subsystem reports ANA.
pub const CMIC_ANA: u8 = 1 << 3;
/// Bit 0 of LSP in Get Log Page (RGO): groups without their namespaces.
pub const GROUPS_ONLY: u8 = 1;

impl AnaLog {
    const HEADER: usize = 16;
    const DESCRIPTOR: usize = 32;

    /// The size of a log of `groups` groups and `namespaces` namespaces in all, in bytes: for who asks for it.
    #[must_use]
    pub fn len_for(groups: u32, namespaces: u32) -> u32 {
        let descriptors = groups.saturating_mul(32).saturating_add(namespaces.saturating_mul(4));
        descriptors.saturating_add(16)
    }

    /// As on the wire.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; AnaLog::HEADER];
        put_u64(&mut bytes, 0, self.changes);
        put_u16(&mut bytes, 8, u16::try_from(self.groups.len()).unwrap_or(u16::MAX));
        for group in &self.groups {
            let mut descriptor = [0; AnaLog::DESCRIPTOR];
            put_u32(&mut descriptor, 0, group.id);
            put_u32(&mut descriptor, 4, u32::try_from(group.namespaces.len()).unwrap_or(u32::MAX));
            put_u64(&mut descriptor, 8, group.changes);
            descriptor[16] = group.state.to_u8();
            bytes.extend_from_slice(&descriptor);
            bytes.extend(group.namespaces.iter().flat_map(|nsid| nsid.to_le_bytes()));
        }
        bytes
    }

    /// From the wire.
    ///
    /// # Errors
    /// When the log is cut short, or a state is none.
    pub fn from_bytes(bytes: &[u8]) -> Result<AnaLog, FieldError> {
        let error =
            |field, value: u64, expected| FieldError { structure: "ANA log page", field, value, expected };
        let short = |field, value: usize| error(field, value as u64, "within the log");
        if bytes.len() < AnaLog::HEADER {
            return Err(short("header", bytes.len()));
        }
        let mut log = AnaLog { changes: get_u64(bytes, 0), groups: Vec::new() };
        let mut rest = &bytes[AnaLog::HEADER..];
        for _ in 0..get_u16(bytes, 8) {
            if rest.len() < AnaLog::DESCRIPTOR {
                return Err(short("NAGD", rest.len()));
            }
            let (descriptor, after) = rest.split_at(AnaLog::DESCRIPTOR);
            let count = get_u32(descriptor, 4) as usize;
            if count > after.len() / 4 {
                return Err(short("NNV", count));
            }
            let (namespaces, after) = after.split_at(4 * count);
            let state = AnaState::from_u8(descriptor[16]).ok_or(error(
                "ANAS",
                u64::from(descriptor[16]),
                "one of the five states",
            ))?;
            log.groups.push(AnaGroup {
                id: get_u32(descriptor, 0),
                changes: get_u64(descriptor, 8),
                state,
                namespaces: namespaces.chunks_exact(4).map(|nsid| get_u32(nsid, 0)).collect(),
            });
            rest = after;
        }
        Ok(log)
    }

    /// The state of a group; `None` for one that the log does not have.
    #[must_use]
    pub fn state_of(&self, group: u32) -> Option<AnaState> {
        self.groups.iter().find(|other| other.id == group).map(|group| group.state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_the_bytes_that_the_specification_says() {
        let log = AnaLog {
            changes: 5,
            groups: vec![
                AnaGroup { id: 1, changes: 4, state: AnaState::Optimized, namespaces: vec![1, 0x0201] },
                AnaGroup { id: 2, changes: 5, state: AnaState::Change, namespaces: vec![] },
            ],
        };
        let bytes = log.to_bytes();
        assert_eq!(bytes.len(), AnaLog::len_for(2, 2) as usize);
        assert_eq!(bytes[..16], [5, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[16..33], [1, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(bytes[48..57], [1, 0, 0, 0, 1, 2, 0, 0, 2]);
        assert_eq!(bytes[72], 0xf);
        assert_eq!(AnaLog::from_bytes(&bytes), Ok(log.clone()));
        assert_eq!(log.state_of(2), Some(AnaState::Change));
        assert_eq!(log.state_of(3), None);
    }

    #[test]
    fn a_log_that_says_more_than_it_has_is_refused_by_name() {
        let group = AnaGroup { id: 1, changes: 0, state: AnaState::Inaccessible, namespaces: vec![1] };
        let bytes = AnaLog { changes: 1, groups: vec![group] }.to_bytes();
        assert_eq!(AnaLog::from_bytes(&bytes[..15]).unwrap_err().field, "header");
        assert_eq!(AnaLog::from_bytes(&bytes[..40]).unwrap_err().field, "NAGD");
        assert_eq!(AnaLog::from_bytes(&bytes[..51]).unwrap_err().field, "NNV");
        let mut odd = bytes;
        odd[32] = 7;
        assert_eq!(AnaLog::from_bytes(&odd).unwrap_err().field, "ANAS");
    }

    #[test]
    fn states_have_the_names_that_linux_gives_them() {
        for state in AnaState::ALL {
            assert_eq!(state.name().parse(), Ok(state));
            assert_eq!(AnaState::from_u8(state.to_u8()), Some(state));
        }
        assert!("good".parse::<AnaState>().unwrap_err().contains("want one of optimized, non-optimized"));
    }
}
