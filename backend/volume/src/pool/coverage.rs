//! What pools of this process have been through: for simulations, which want to know that they have seen it.

use std::sync::atomic::{AtomicU64, Ordering};

/// Something that a pool does seldom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    LogBatch,
    Checkpoint,
    LogReplayed,
    TailReplayed,
    Stale,
    Resync,
    Settled,
    Repaired,
    CopyOnWrite,
    Recycled,
    IntentSet,
    IntentCleared,
    Rejoined,
    StripeLogged,
    StripeByDifference,
    StripesReplayed,
    ParityReleased,
    Computed,
    ParityMended,
    Replaced,
    Discarded,
    ScrubResumed,
    InParts,
    TakenBack,
}

const NAMES: [&str; 24] = [
    "log batches",
    "checkpoints",
    "log replays",
    "tail replays",
    "stale members",
    "regions resynchronised",
    "reads settled",
    "repaired reads",
    "copies on write",
    "extents used again",
    "intents set",
    "intents cleared",
    "members back",
    "stripes logged",
    "parity by difference",
    "stripes replayed",
    "releases of the parity log",
    "reads computed",
    "parity made right",
    "members replaced",
    "discards of members",
    "scrubs of a process before",
    "writes in parts",
    "lost units taken back",
];

static COUNTS: [AtomicU64; NAMES.len()] = [const { AtomicU64::new(0) }; NAMES.len()];

pub(crate) fn count(event: Event) {
    COUNTS[event as usize].fetch_add(1, Ordering::Relaxed);
}

/// What has happened so far, and how often.
#[must_use]
pub fn coverage() -> Vec<(&'static str, u64)> {
    NAMES.iter().zip(&COUNTS).map(|(name, count)| (*name, count.load(Ordering::Relaxed))).collect()
}
