//! Clients that measure a vhost-user-blk socket without a VM, and the comparison with other back ends.
//!
//! Owns: the `blkio` client and its options, the small front end on the crate `vhost`, the measuring of other
//! processes, the cases and the table of the bench. Must not know: anything inside `backend/`. What is measured here
//! is a process behind a socket, whoever wrote it.
//!
//! | module | what it is |
//! |---|---|
//! | [`client`] | fio's options, workloads and report over the crate `blkio` |
//! | [`compare`] | the bench: cases, servers, alternation, verdicts |
//! | [`frontend`] | a vhost-user front end with one split ring per queue, for tests and for the in-flight log |
//! | [`histogram`] | latencies, preallocated |
//! | [`wakeup`] | how long the machine takes to wake a sleeping thread |
//! | [`sys`] | processes: CPU time, pinning, children that end with their parent |

pub mod client;
pub mod compare;
pub mod frontend;
pub mod histogram;
pub mod sys;
pub mod wakeup;

/// A `u64` as a `usize`: lossless on the 64-bit hosts that this workspace runs on.
#[inline]
pub fn to_usize(value: u64) -> usize {
    const { assert!(usize::BITS == 64) };
    usize::try_from(value).expect("a 64-bit host")
}

/// A `usize` as a `u64`: lossless on every host that Rust knows.
#[inline]
pub fn to_u64(value: usize) -> u64 {
    u64::try_from(value).expect("usize has at most 64 bits")
}

/// A count as a floating-point number for rates and ratios; exact below 2^53.
#[expect(clippy::cast_precision_loss, reason = "rates are shown with a few digits")]
pub fn to_f64(value: u64) -> f64 {
    value as f64
}
