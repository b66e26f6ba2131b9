//! What targets have sent that they should not have: counted, because a connection that ends for it is made again without a word
//! to anybody but the log.
#![forbid(unsafe_code)]

use super::connection::Breach;
use std::sync::atomic::{AtomicU64, Ordering};

/// Of one device, on all its paths and reactors.
#[derive(Default)]
pub(crate) struct Breaches {
    protocol: AtomicU64,
    digest: AtomicU64,
}

impl Breaches {
    pub(crate) fn count(&self, breach: Option<Breach>) {
        match breach {
            None => {}
            Some(Breach::Protocol) => drop(self.protocol.fetch_add(1, Ordering::Relaxed)),
            Some(Breach::Digest) => drop(self.digest.fetch_add(1, Ordering::Relaxed)),
        }
    }

    /// By the names of the API.
    pub(crate) fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("protocol_errors", self.protocol.load(Ordering::Relaxed)),
            ("digest_errors", self.digest.load(Ordering::Relaxed)),
        ]
    }
}
