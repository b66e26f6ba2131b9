//! Two devices in one member's place: the one that is in service, and the one that is to take its place.
//!
//! ```text
//!              reads          writes, flushes                superblocks                 a failure of the new one
//!   Copying    the old one    both; what the old one says    the old one's               is hidden: nothing of it counts any more
//!   Strict     the old one    both; both must have it        the old one's               is the request's
//!   Swapped    the old one    both; both must have it        the new one's               is the request's
//! ```
//!
//! What is below [`Layout::METADATA_OFFSET`] says whose it is and is never written to both.
//!
//! Owns: that both get the same. Must not know: what has been copied, and who decides that it is all.
//!
//! Invariants: while it is not off, a write that has ended well is on both; one that has not switches it off, unless the request fails
//! with it.

use crate::format::Layout;
use hawser_block::{
    Channel, Completion, Device, DeviceState, Geometry, Operation, Outcome, Request, StatsSet, Status, Token,
};
use hawser_runtime::{Runtime, Slab, SourceId};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How far a replacement is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Phase {
    Copying = 0,
    Strict = 1,
    Swapped = 2,
}

/// What all channels share.
struct State {
    phase: AtomicU8,
    /// The new one lacks something: it is not written to any more.
    is_off: AtomicBool,
    /// The cache that the new one's writes are in.
    cache: Mutex<Option<[u8; 16]>>,
}

/// The pair, as a device.
pub(crate) struct Twin {
    pub(crate) old: Arc<dyn Device>,
    pub(crate) new: Arc<dyn Device>,
    state: Arc<State>,
    stats: Arc<StatsSet>,
}

impl Twin {
    pub(crate) fn new(old: Arc<dyn Device>, new: Arc<dyn Device>) -> Twin {
        let state = State {
            phase: AtomicU8::new(Phase::Copying as u8),
            is_off: AtomicBool::new(false),
            cache: Mutex::new(new.cache_identity()),
        };
        Twin { old, new, state: Arc::new(state), stats: Arc::default() }
    }

    pub(crate) fn set_phase(&self, phase: Phase) {
        self.state.phase.store(phase as u8, Ordering::Release);
    }

    /// Whether the new one has had everything since it was last switched on.
    pub(crate) fn is_good(&self) -> bool {
        let cache = *super::shared::lock(&self.state.cache);
        !self.state.is_off.load(Ordering::Acquire) && self.new.cache_identity() == cache
    }

    /// Nothing is written to the new one any more.
    pub(crate) fn switch_off(&self) {
        self.state.is_off.store(true, Ordering::Release);
    }

    /// It gets all writes again that begin from now on.
    pub(crate) fn switch_on(&self) {
        *super::shared::lock(&self.state.cache) = self.new.cache_identity();
        self.state.is_off.store(false, Ordering::Release);
    }
}

/// What both can do.
fn both(old: Geometry, new: Geometry) -> Geometry {
    let least = |one: u32, other: u32| match (one, other) {
        (0, most) | (most, 0) => most,
        (one, other) => one.min(other),
    };
    Geometry {
        transfer_blocks_max: least(old.transfer_blocks_max, new.transfer_blocks_max),
        volatile_cache: old.volatile_cache || new.volatile_cache,
        discard: old.discard.zip(new.discard).map(|(mut limits, other)| {
            limits.blocks_max = limits.blocks_max.min(other.blocks_max);
            limits.granularity_blocks = limits.granularity_blocks.max(other.granularity_blocks);
            limits.reads_zeroes &= other.reads_zeroes;
            limits
        }),
        write_zeroes: old.write_zeroes.zip(new.write_zeroes).map(|(mut limits, other)| {
            limits.blocks_max = limits.blocks_max.min(other.blocks_max);
            limits.may_unmap &= other.may_unmap;
            limits
        }),
        ..old
    }
}

impl Device for Twin {
    fn name(&self) -> &str {
        self.old.name()
    }

    fn geometry(&self) -> Option<Geometry> {
        Some(both(self.old.geometry()?, self.new.geometry()?))
    }

    fn state(&self) -> DeviceState {
        self.old.state()
    }

    fn trouble(&self) -> String {
        self.old.trouble()
    }

    fn uuid(&self) -> [u8; 16] {
        self.old.uuid()
    }

    fn cache_identity(&self) -> Option<[u8; 16]> {
        self.old.cache_identity()
    }

    /// The new one is nobody's before it has everything.
    fn cache_losses(&self) -> u64 {
        self.old.cache_losses()
    }

    fn owes_a_loss(&self) -> bool {
        self.old.owes_a_loss()
    }

    fn leaves_payload(&self) -> bool {
        self.old.leaves_payload()
    }

    fn quiesce_time(&self) -> Duration {
        self.old.quiesce_time().max(self.new.quiesce_time())
    }

    fn has_unknown_writes(&self) -> bool {
        // For what the new one keeps the old one is not put out.
        self.old.has_unknown_writes()
    }

    fn has_left_behind(&self) -> bool {
        self.old.has_left_behind() || self.new.has_left_behind()
    }

    fn subscribe(&self, listener: Box<dyn Fn() + Send + Sync>) {
        self.old.subscribe(listener);
    }

    fn channel(&self, runtime: &Runtime, user: SourceId) -> Box<dyn Channel> {
        let shift = self.old.geometry().map_or(9, |geometry| geometry.block_size.shift());
        Box::new(TwinChannel {
            old: self.old.channel(runtime, user),
            new: self.new.channel(runtime, user),
            state: Arc::clone(&self.state),
            first_shared: Layout::METADATA_OFFSET >> shift,
            pairs: Slab::with_capacity(256),
            to_old: Vec::with_capacity(64),
            to_new: Vec::with_capacity(64),
            reaped: Vec::with_capacity(64),
        })
    }

    fn stats(&self) -> Arc<StatsSet> {
        Arc::clone(&self.stats)
    }

    fn fail_after(&self, patience: Duration) {
        self.old.fail_after(patience);
    }
}

/// A request that is under way at one of them or at both.
struct Pair {
    token: Token,
    left: u8,
    goes_to_both: bool,
    old: Outcome,
    new: Outcome,
}

struct TwinChannel {
    old: Box<dyn Channel>,
    new: Box<dyn Channel>,
    state: Arc<State>,
    /// The first block that is written to both.
    first_shared: u64,
    pairs: Slab<Pair>,
    to_old: Vec<Request>,
    to_new: Vec<Request>,
    reaped: Vec<Completion>,
}

impl TwinChannel {
    fn ended(&mut self, completion: Completion, is_old: bool, ended: &mut Vec<Completion>) {
        let key = usize::try_from(completion.token.0).expect("a token of ours");
        let pair = self.pairs.get_mut(key).expect("a request ends once");
        match is_old {
            true => pair.old = completion.outcome,
            false => pair.new = completion.outcome,
        }
        pair.left -= 1;
        if pair.left > 0 {
            return;
        }
        let Pair { token, goes_to_both, old, new, .. } = self.pairs.remove(key).expect("looked up just now");
        ended.push(Completion { token, outcome: self.outcome(goes_to_both, old, new) });
    }

    fn outcome(&self, goes_to_both: bool, old: Outcome, new: Outcome) -> Outcome {
        let worse = match (old, new) {
            // One that says "given up" says less than any other.
            (Err(Status::Aborted), Err(status)) => Err(status),
            (Err(status), _) => Err(status),
            (Ok(()), new) => new,
        };
        let is_strict = self.state.phase.load(Ordering::Acquire) != Phase::Copying as u8;
        if !goes_to_both || is_strict || worse.is_ok() {
            return worse;
        }
        // Whichever of them failed: they may differ now.
        self.state.is_off.store(true, Ordering::Release);
        old
    }
}

impl Channel for TwinChannel {
    fn submit(&mut self, batch: &mut Vec<Request>) {
        let is_off = self.state.is_off.load(Ordering::Acquire);
        let is_swapped = self.state.phase.load(Ordering::Acquire) == Phase::Swapped as u8;
        for request in batch.drain(..) {
            let is_own = request.operation != Operation::Flush && request.lba.0 < self.first_shared;
            let changes = request.operation != Operation::Read;
            let goes_to_both = !is_own && changes && !is_off;
            let only_new = is_own && is_swapped;
            let pair = Pair {
                token: request.token,
                left: 1 + u8::from(goes_to_both),
                goes_to_both,
                old: Ok(()),
                new: Ok(()),
            };
            let token = Token(self.pairs.insert(pair) as u64);
            if !only_new {
                self.to_old.push(Request { token, ..request });
            }
            if goes_to_both || only_new {
                self.to_new.push(Request { token, ..request });
            }
        }
        if !self.to_old.is_empty() {
            self.old.submit(&mut self.to_old);
        }
        if !self.to_new.is_empty() {
            self.new.submit(&mut self.to_new);
        }
    }

    fn reap(&mut self, ended: &mut Vec<Completion>) {
        if self.pairs.is_empty() {
            return;
        }
        let mut reaped = std::mem::take(&mut self.reaped);
        self.old.reap(&mut reaped);
        for completion in reaped.drain(..) {
            self.ended(completion, true, ended);
        }
        self.new.reap(&mut reaped);
        for completion in reaped.drain(..) {
            self.ended(completion, false, ended);
        }
        self.reaped = reaped;
    }

    fn is_working(&self) -> bool {
        self.old.is_working() || self.new.is_working()
    }

    fn abort(&mut self) {
        self.old.abort();
        self.new.abort();
    }

    fn leave(&mut self) {
        self.old.leave();
        self.new.leave();
    }
}
