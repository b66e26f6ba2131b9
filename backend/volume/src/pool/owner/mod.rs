//! The owner of a pool: the only one who changes what it is. It lives on one reactor; others ask it by message.
//!
//! ```text
//!   journal    records → tail → (members flush) → log → checkpoints
//!   mapping    extents for writes, discards, space; discard: what members are told of those that are free
//!   intents    regions that may differ
//!   members    who has the data: superblocks; caches: members that have lost what they had not flushed
//!   volumes    what people ask for
//!   resync     what makes members the same again; rejoin, replace: members that come; scrub: whether they are the same
//!   slide      copying along the members, from a window that moves with it
//!   parity     stripes: their log, what makes them whole again
//!   replacing  a member that is copied to another device while it stays in service
//!   take_back  units that were written into a cache that is lost: they show what they covered again
//! ```
//!
//! Invariants:
//! - State is changed without awaiting in between, so that every task sees it whole.
//! - Turns are taken in this order, never the other way round: change, reclaim, a round of flushes, checkpoint, commit, intents,
//!   parity, superblock, again. The turns
//!   of window and barrier are taken by who holds none of flush to superblock.
//! - Nobody who is under way ([`super::place`]) waits for a barrier.

mod caches;
mod differing;
mod discard;
mod intents;
mod journal;
mod mapping;
mod members;
mod parity;
mod rejoin;
mod replace;
mod replacing;
mod resync;
mod scrub;
mod slide;
mod take_back;
mod tick;
mod volumes;

pub(crate) use intents::Intents;
pub(crate) use journal::Log;
pub(crate) use mapping::Locks;
pub(crate) use members::Member;
pub(crate) use members::{is_copied, survives};
pub(crate) use replacing::Replacing;
pub(crate) use resync::Work;
pub(crate) use take_back::Written;

use super::ask::{self};
use super::lanes::{Lanes, Leaf};
use super::place::Place;
use super::shared::{Shared, View};
use super::wait::{Bell, Turn, all};
use super::{OpenOptions, PoolError, Tail};
use crate::format::{self, Record, Superblock, Uuid};
use crate::thin::{Freed, Metadata};
use hawser_block::{Outcome, Status};
use hawser_runtime::Runtime;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, VecDeque};
use std::future::Future;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The owners on this reactor, by the pool's number.
#[derive(Default)]
struct Owners(RefCell<Vec<(u64, Weak<Owner>)>>);

/// The owner of the pool of this number, if it is on this reactor.
pub(crate) fn find(runtime: &Runtime, number: u64) -> Option<Rc<Owner>> {
    let owners = runtime.local::<Owners>();
    let owners = owners.0.borrow();
    owners.iter().find(|(other, _)| *other == number).and_then(|(_, owner)| owner.upgrade())
}

/// A change of the mapping that is not durable on the members.
pub(crate) struct Pending {
    pub(crate) seq: u64,
    /// As in the tail.
    entry: Vec<u8>,
    /// What it says to be valid.
    written: Option<Written>,
}

impl Pending {
    pub(crate) fn new(seq: u64, record: &Record) -> Pending {
        let mut entry = Vec::new();
        format::encode_tail_entry(seq, record, &mut entry);
        Pending { seq, entry, written: None }
    }

    /// As in the log.
    fn record(&self) -> &[u8] {
        format::record_of_tail_entry(&self.entry)
    }
}

/// The turns, each for one at a time.
#[derive(Default)]
pub(crate) struct Turns {
    pub(crate) change: Turn,
    pub(crate) reclaim: Turn,
    pub(crate) checkpoint: Turn,
    pub(crate) commit: Turn,
    pub(crate) intents: Turn,
    pub(crate) parity: Turn,
    pub(crate) superblock: Turn,
    pub(crate) again: Turn,
    pub(crate) window: Turn,
    pub(crate) barrier: Turn,
}

/// Rounds of flushing, which all share who came before one began.
#[derive(Default)]
pub(crate) struct Rounds {
    pub(crate) begun: Cell<u64>,
    pub(crate) done: Cell<u64>,
    pub(crate) failed: Cell<u64>,
    pub(crate) status: Cell<Option<Status>>,
    turn: Turn,
}

impl Rounds {
    pub(crate) fn turn(&self) -> &Turn {
        &self.turn
    }

    /// One that begins after this: its own, or somebody else's that comes as late.
    async fn join<F: Future<Output = Outcome>>(&self, flush: impl FnOnce() -> F) -> Outcome {
        let need = self.begun.get() + 1;
        let _turn = self.turn.take().await;
        if self.done.get() < need {
            self.begun.set(need);
            let outcome = flush().await;
            self.done.set(need);
            if let Err(status) = outcome {
                self.failed.set(need);
                self.status.set(Some(status));
            }
        }
        match self.status.get() {
            Some(status) if self.failed.get() >= need => Err(status),
            _ => Ok(()),
        }
    }
}

/// A pool's owner.
pub(crate) struct Owner {
    pub(crate) runtime: Runtime,
    pub(crate) shared: Arc<Shared>,
    pub(crate) place: Rc<Place>,
    /// The owner's own ways to the members, which nobody else aborts.
    pub(crate) lanes: Rc<Lanes>,
    pub(crate) meta: RefCell<Metadata>,
    /// What the superblocks say, as last recorded.
    pub(crate) book: RefCell<Superblock>,
    pub(crate) members: RefCell<Vec<Member>>,
    pub(crate) spares: RefCell<Vec<(Uuid, Option<Leaf>)>>,
    pub(crate) replacing: RefCell<Option<Replacing>>,
    pub(crate) options: Options,
    pub(crate) tail: RefCell<Box<dyn Tail>>,
    pub(crate) tail_used: Cell<usize>,
    /// The next record's number.
    pub(crate) seq: Cell<u64>,
    /// Records before this one are durable.
    pub(crate) durable: Cell<u64>,
    /// The data of records before this one is.
    pub(crate) flushed: Cell<u64>,
    pub(crate) pending: RefCell<VecDeque<Pending>>,
    pub(crate) log: Cell<Log>,
    pub(crate) intents: RefCell<Intents>,
    pub(crate) turns: Turns,
    pub(crate) rounds: Rounds,
    /// The same of the members alone.
    pub(crate) copies: Rounds,
    /// What lost its last reference with the record of this number.
    pub(crate) freed: RefCell<Vec<(u64, Freed)>>,
    /// Behind the last record by which somebody let go of an extent that another may hold too.
    pub(crate) let_go: Cell<u64>,
    pub(crate) locks: Locks,
    /// Volumes that are just being copied: nothing of them changes.
    pub(crate) frozen: RefCell<BTreeSet<u32>>,
    /// Something has changed that somebody may wait for.
    pub(crate) bell: Bell,
    /// There may be space again.
    pub(crate) space: Bell,
    pub(crate) work: Work,
    pub(crate) lost: RefCell<Option<String>>,
    /// Why it takes no more writes, though it is ours.
    pub(crate) stopped: RefCell<Option<String>>,
    /// There is little space left, and it was said.
    pub(crate) is_low: Cell<bool>,
    /// The same of room for mappings.
    pub(crate) is_metadata_low: Cell<bool>,
    /// The superblocks say that we have it.
    pub(crate) is_open: Cell<bool>,
    /// It has been opened: what the process before had is durable.
    pub(crate) is_ready: Cell<bool>,
    pub(crate) is_closing: Cell<bool>,
    /// It was closed: whoever waits for a turn still comes too late.
    pub(crate) is_over: Cell<bool>,
    pub(crate) is_read_only: bool,
}

/// What was asked for when the pool was opened.
pub(crate) struct Options {
    pub(crate) no_space: super::NoSpacePolicy,
    pub(crate) discard: bool,
    pub(crate) low_water_permille: u32,
    pub(crate) sync_bytes_per_second: u64,
    pub(crate) intent_idle: std::time::Duration,
    pub(crate) member_timeout: std::time::Duration,
    pub(crate) spare_delay: std::time::Duration,
}

impl Options {
    pub(crate) fn of(options: &OpenOptions) -> Options {
        Options {
            no_space: options.no_space,
            discard: options.discard,
            low_water_permille: options.low_water_permille,
            sync_bytes_per_second: options.sync_bytes_per_second,
            intent_idle: options.intent_idle,
            member_timeout: options.member_timeout,
            spare_delay: options.spare_delay,
        }
    }
}

impl Owner {
    /// Lets others on this reactor find it.
    pub(crate) fn register(self: &Rc<Self>) {
        let owners = self.runtime.local::<Owners>();
        owners.0.borrow_mut().retain(|(_, owner)| owner.strong_count() > 0);
        owners.0.borrow_mut().push((self.shared.number, Rc::downgrade(self)));
        // The owner lives until it is closed.
        let keeper = self.runtime.local::<Keeper>();
        keeper.0.borrow_mut().push(Rc::clone(self));
    }

    /// Nobody finds it any more.
    pub(crate) fn unregister(&self) {
        let keeper = self.runtime.local::<Keeper>();
        let number = self.shared.number;
        let kept: Vec<_> =
            keeper.0.borrow_mut().extract_if(.., |owner| owner.shared.number == number).collect();
        drop(kept);
        self.runtime.local::<Owners>().0.borrow_mut().retain(|(other, _)| *other != number);
    }

    pub(crate) fn view(&self) -> Arc<View> {
        self.shared.view()
    }

    /// Whether writes are taken.
    pub(crate) fn check_writable(&self) -> Outcome {
        match self.shared.is_writable.load(Ordering::Relaxed) && !self.is_closing.get() {
            true => Ok(()),
            false => Err(Status::ReadOnly),
        }
    }

    /// The pool is not ours any more: whoever has it may give any extent to another volume, so that our tables say nothing of what is there.
    pub(crate) fn lose(&self, why: &str) {
        let mut lost = self.lost.borrow_mut();
        let is_new = lost.is_none();
        if is_new {
            log::error!("pool {}: nothing is read or written any more: {why}", self.shared.name);
            *lost = Some(why.to_owned());
        }
        drop(lost);
        self.shared.is_writable.store(false, Ordering::Release);
        if is_new {
            self.shared.set_view(View { is_lost: true, ..View::clone(&self.view()) });
        }
        self.publish();
        self.bell.ring();
        self.space.ring();
    }

    /// It takes no more writes: a stripe stays half written, since a member fails its part and cannot be done without. Reads go on, and so does FLUSH.
    pub(crate) fn stop(&self, member: u16, status: Status, is_logged: bool) {
        if self.stopped.borrow().is_some() || self.lost.borrow().is_some() {
            return;
        }
        let how = match is_logged {
            true => "what was begun is in the log, for the next opening with a member that takes it",
            false => {
                "a whole stripe that was begun is not in the log, so that the next opening may want --accept-loss"
            }
        };
        let why = format!(
            "no more writes are taken: {} (member {member}) fails one with {}, and cannot be done without; {how}",
            self.device_name(member),
            status.name()
        );
        log::error!("pool {}: {why}", self.shared.name);
        *self.stopped.borrow_mut() = Some(why);
        self.shared.is_stopped.store(true, Ordering::Release);
        self.shared.is_writable.store(false, Ordering::Release);
        self.publish();
        self.bell.ring();
        self.space.ring();
    }

    /// Why nothing is changed any more.
    pub(crate) fn ended(&self) -> Option<String> {
        self.lost.borrow().clone().or_else(|| self.stopped.borrow().clone())
    }

    /// Waits until all have ended that are under way now, on all reactors.
    pub(crate) async fn barrier(&self) {
        let _turn = self.turns.barrier.take().await;
        let answers = self.shared.reactors().into_iter().map(|reactor| {
            let (reply, answer) = ask::channel();
            let shared = Arc::clone(&self.shared);
            reactor.run(move |runtime| {
                if let Some(place) = Place::find(runtime, &shared) {
                    place.barrier(reply);
                }
            });
            answer
        });
        all(answers.collect::<Vec<_>>()).await;
    }

    /// Makes everything durable that has ended before: data, then mappings. Who comes while a round runs shares the next one.
    pub(crate) async fn flush(self: &Rc<Self>) -> Outcome {
        if self.is_read_only {
            // Nothing was written.
            return Ok(());
        }
        self.rounds.join(|| self.flush_once()).await
    }

    /// Makes durable what has been copied; who copies something else meanwhile shares the next round.
    pub(crate) async fn flush_copies(self: &Rc<Self>) -> Outcome {
        self.copies.join(|| self.flush_members()).await
    }

    async fn flush_once(self: &Rc<Self>) -> Outcome {
        let upto = loop {
            if self.lost.borrow().is_some() {
                // Whoever has it now need not have kept what was written.
                return Err(Status::Conflict);
            }
            self.put_out_doubted().await?;
            let seen = self.shared.lost_caches.look();
            if seen.is_open() {
                continue;
            }
            // Records that are made while the members flush may be of data that is not durable.
            let upto = self.seq.get();
            self.flush_members().await?;
            if self.are_flushed(seen, upto) {
                break upto;
            }
        };
        let upto = match crate::simulated::is_broken("log_records_made_after_flush_began") {
            true => self.seq.get(),
            false => upto,
        };
        self.commit(upto).await
    }

    /// An error for people, of what a request would get as a status.
    pub(crate) fn failed(&self, what: &str, status: Status) -> PoolError {
        let stopped = self.stopped.borrow().clone().filter(|_| status == Status::ReadOnly);
        let why = self.lost.borrow().clone().or(stopped).unwrap_or_else(|| status.name().to_owned());
        PoolError::Failed(format!("pool {}: {what}: {why}", self.shared.name))
    }
}

/// Keeps owners alive.
#[derive(Default)]
struct Keeper(RefCell<Vec<Rc<Owner>>>);
