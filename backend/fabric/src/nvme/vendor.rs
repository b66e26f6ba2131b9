//! What our target says in the vendor's area of Identify Controller (bytes 3072 and on).
//!
//! ```text
//!   0..8    VENDOR_MARK: its Connect waits for the host's earlier associations
//!   8..24   cache identity; all zero: not known
//! ```

use super::identify::{IdentifyController, VENDOR_MARK};

/// What became of a volatile cache can be told from this: while it stays the same, what was written and not flushed is
/// still there. Never all zero.
pub type CacheIdentity = [u8; 16];

/// Our vendor's area.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Vendor {
    /// Whose cache the subsystem's writes are in: the host's boot for files, the process for memory, combined from below for
    /// others. `None`: not known.
    pub cache_identity: Option<CacheIdentity>,
}

impl Vendor {
    /// As the field's value.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; 32] {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&VENDOR_MARK);
        bytes[8..24].copy_from_slice(&self.cache_identity.unwrap_or_default());
        bytes
    }

    /// What a controller says, if it is one of ours.
    #[must_use]
    pub fn of(controller: &IdentifyController) -> Option<Vendor> {
        if controller.vendor[..8] != VENDOR_MARK {
            return None;
        }
        let mut identity = [0; 16];
        identity.copy_from_slice(&controller.vendor[8..24]);
        Some(Vendor { cache_identity: Some(identity).filter(|identity| *identity != [0; 16]) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_controllers_have_a_cache_identity() {
        let vendor = Vendor { cache_identity: Some([7; 16]) };
        let mut controller =
            IdentifyController { vendor: vendor.to_bytes(), ..IdentifyController::default() };
        assert_eq!(Vendor::of(&controller), Some(vendor));
        controller.vendor = Vendor::default().to_bytes();
        assert_eq!(Vendor::of(&controller), Some(Vendor::default()));
        controller.vendor = [7; 32];
        assert_eq!(Vendor::of(&controller), None);
    }
}
