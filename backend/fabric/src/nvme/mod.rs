//! NVMe as bytes: commands, completions, identify data, Fabrics commands, logs. Shared by initiator and target.
//!
//! Owns: the layouts and their names, as in NVM Express Base Specification 2.0 ("base") and NVM Command Set
//! Specification 1.0 ("NVM"). Must not know: sockets, queues, devices.
//!
//! Every structure is a plain value with `to_bytes` and `from_bytes`. Reserved bits are zero when written and ignored when
//! read; a field whose value cannot be used gives a [`FieldError`] that names it. Numbers that the specification counts
//! from 0 keep that in their doc comment and nowhere else: fields here hold what is on the wire.
#![forbid(unsafe_code)]

pub mod ana;
pub(crate) mod bytes;
pub mod command;
pub mod completion;
pub mod cross_reset;
pub mod discovery;
pub mod fabrics;
pub mod features;
pub mod identify;
pub mod log;
pub mod properties;
pub mod reservation;
pub mod status;
pub mod vendor;

pub use command::{Sgl, Sqe, admin_opcode, io_opcode};
pub use completion::Cqe;
pub use status::{NvmeStatus, StatusCode};

use std::fmt;

/// A field with a value that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldError {
    /// The structure, as the specification calls it.
    pub structure: &'static str,
    /// The field, as the specification abbreviates it.
    pub field: &'static str,
    /// What it held.
    pub value: u64,
    /// What would have been right.
    pub expected: &'static str,
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let FieldError { structure, field, value, expected } = self;
        write!(f, "{structure}: {field} is {value:#x}, not {expected}")
    }
}

impl std::error::Error for FieldError {}

/// The longest NVMe Qualified Name, in bytes without its terminator (base 4.5).
pub const NQN_LEN_MAX: usize = 223;

/// The NQN that every discovery controller answers to (base 4.5.1).
pub const DISCOVERY_NQN: &str = "nqn.2014-08.org.nvmexpress.discovery";

/// Checks an NQN as people write it (base 4.5): at most 223 bytes of UTF-8 that begin with `nqn.`, without control
/// characters.
#[must_use]
pub fn nqn_is_valid(nqn: &str) -> bool {
    nqn.starts_with("nqn.") && nqn.len() <= NQN_LEN_MAX && !nqn.chars().any(char::is_control)
}

/// A 256-byte NQN field: UTF-8, ended by a NUL.
pub(crate) fn get_nqn(
    bytes: &[u8],
    structure: &'static str,
    field: &'static str,
) -> Result<String, FieldError> {
    let error = |value: usize, expected| FieldError { structure, field, value: value as u64, expected };
    let len = bytes.iter().position(|b| *b == 0).ok_or(error(bytes.len(), "ended by a NUL"))?;
    if len > NQN_LEN_MAX {
        return Err(error(len, "a name of at most 223 bytes"));
    }
    match std::str::from_utf8(&bytes[..len]) {
        Ok(name) => Ok(name.to_owned()),
        Err(bad) => Err(error(bad.valid_up_to(), "UTF-8 (offset of the first bad byte)")),
    }
}

pub(crate) fn put_nqn(bytes: &mut [u8], nqn: &str) {
    let len = nqn.len().min(NQN_LEN_MAX);
    bytes[..len].copy_from_slice(&nqn.as_bytes()[..len]);
}

/// Fuzz entry: decodes `data` as each structure; whatever decodes must survive a round trip.
pub fn fuzz(data: &[u8]) {
    fn padded<const N: usize>(data: &[u8]) -> [u8; N] {
        let mut bytes = [0; N];
        let len = data.len().min(N);
        bytes[..len].copy_from_slice(&data[..len]);
        bytes
    }
    let sqe = Sqe::from_bytes(&padded(data));
    assert_eq!(Sqe::from_bytes(&sqe.to_bytes()), sqe);
    let cqe = Cqe::from_bytes(&padded(data));
    assert_eq!(Cqe::from_bytes(&cqe.to_bytes()), cqe);
    let _ = format!("{}", cqe.status);
    if let Ok(connect) = fabrics::ConnectData::from_bytes(&padded(data)) {
        assert_eq!(fabrics::ConnectData::from_bytes(&connect.to_bytes()).as_ref(), Ok(&connect));
    }
    let controller = identify::IdentifyController::from_bytes(&padded(data));
    assert_eq!(identify::IdentifyController::from_bytes(&controller.to_bytes()), controller);
    let namespace = identify::IdentifyNamespace::from_bytes(&padded(data));
    assert_eq!(identify::IdentifyNamespace::from_bytes(&namespace.to_bytes()), namespace);
    let _ = namespace.format();
    let ids = identify::NamespaceIds::from_bytes(&padded(data));
    assert_eq!(identify::NamespaceIds::from_bytes(&ids.to_bytes()), ids);
    let list = identify::NamespaceList::from_bytes(&padded(data));
    assert_eq!(identify::NamespaceList::from_bytes(&list.to_bytes()), list);
    if let Ok(entry) = discovery::Entry::from_bytes(&padded(data)) {
        assert_eq!(discovery::Entry::from_bytes(&entry.to_bytes()).as_ref(), Ok(&entry));
    }
    if let Ok(log) = ana::AnaLog::from_bytes(data) {
        assert_eq!(ana::AnaLog::from_bytes(&log.to_bytes()).as_ref(), Ok(&log));
    }
    let resets = cross_reset::ResetLog::from_bytes(data);
    assert_eq!(cross_reset::ResetLog::from_bytes(&resets.to_bytes()), resets);
    let status = reservation::status_from_bytes(data);
    let again = reservation::status_from_bytes(&reservation::status_to_bytes(&status));
    assert_eq!(again, status);
    let _ = discovery::Header::from_bytes(&padded(data));
    let _ = log::AsyncEvent::from_dword(cqe.dword0());
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_nqn_is_checked_as_people_write_it() {
        assert!(nqn_is_valid(DISCOVERY_NQN));
        assert!(nqn_is_valid(&format!("nqn.{}", "x".repeat(219))));
        assert!(!nqn_is_valid(&format!("nqn.{}", "x".repeat(220))));
        assert!(!nqn_is_valid("iqn.2001"));
        assert!(!nqn_is_valid("nqn.a\nb"));
    }

    #[test]
    fn an_error_names_structure_field_and_value() {
        let error = get_nqn(&[b'x'; 256], "Connect data", "SUBNQN").unwrap_err();
        assert_eq!(error.to_string(), "Connect data: SUBNQN is 0x100, not ended by a NUL");
        let mut long = [b'x'; 256];
        long[224] = 0;
        assert!(get_nqn(&long, "Connect data", "SUBNQN").is_err());
        assert!(get_nqn(&[0xff, 0, 0], "Connect data", "SUBNQN").is_err());
    }

    proptest! {
        #[test]
        fn whatever_decodes_survives_a_round_trip(data in proptest::collection::vec(any::<u8>(), 0..4200)) {
            fuzz(&data);
        }

        #[test]
        fn sparse_bytes_survive_too(data in proptest::collection::vec(prop_oneof![9 => Just(0u8), 1 => any::<u8>()], 4096)) {
            fuzz(&data);
        }
    }
}
