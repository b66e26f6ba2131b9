//! What sets with parity need beside the hot path: changes of parts of stripes, and reads of what is lost.
//!
//! ```text
//!   changes of one stripe ──► queue ──► round: all that wait now, together
//!        read what is needed ─► compute ─► log (FUA) ─► data and parity in place ─► answer
//! ```
//!
//! Owns: the queues of this reactor, and the order of one change. Must not know: volumes, mappings.
//!
//! Invariants:
//! - Whoever changes a stripe, or computes from it what is lost, has it ([`Guards`](crate::raid::Guards)) from its first read to its last write.
//! - What was begun in place is finished in place, or a member is put out, or the pool takes no more writes; whoever waits may leave before.

mod change;
mod entries;
mod finish;
mod log;
mod row;
mod stuck;

pub(crate) use entries::{Entries, read_entries};
pub(crate) use finish::Begun;
pub(crate) use row::{Bad, Contents, Lost, Row, Slots, each};

use super::ask::{self, Reply};
use super::bounce::Bounce;
use super::coverage;
use super::lanes::Lanes;
use super::place::Place;
use super::shared::Shared;
use crate::raid::{Piece, Set};
use hawser_block::Status;
use hawser_runtime::Runtime;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// Whether any unit of these columns of a stripe's data is valid: row, where in the strips, how many bytes.
pub(crate) type IsValid = Rc<dyn Fn(u64, u64, u64) -> bool>;

/// New bytes for a part of a stripe.
#[derive(Clone)]
pub(crate) struct Change {
    /// Which of the stripe's bytes.
    pub(crate) from: u64,
    pub(crate) to: u64,
    /// Where they are.
    pub(crate) bounce: Rc<Bounce>,
    pub(crate) at: usize,
    pub(crate) is_valid: IsValid,
    /// Nobody else writes to the extent.
    pub(crate) is_alone: bool,
}

/// How a change ended that did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Changed {
    Done,
    /// Not now: it is being resynchronised, or is not marked, or needs the extent for itself. Nothing was changed.
    NotNow,
}

type Answer = Result<Changed, Status>;

/// A change that waits for its turn.
struct Waiting {
    change: Change,
    /// Nobody waits for it any more; if it was not begun, it is not.
    is_left: Rc<Cell<bool>>,
    reply: Reply<Answer>,
}

/// Nobody waits any more when this is dropped.
struct Left(Rc<Cell<bool>>);

impl Drop for Left {
    fn drop(&mut self) {
        self.0.set(true);
    }
}

/// The stripes that are being changed from this reactor, by the set's first member and the row: what waits behind the round under way.
#[derive(Default)]
pub(crate) struct Queues(RefCell<BTreeMap<(u16, u64), Vec<Waiting>>>);

/// Ways to the members, and to the owner.
#[derive(Clone)]
pub(crate) struct Ways {
    pub(crate) runtime: Runtime,
    pub(crate) shared: Arc<Shared>,
    pub(crate) place: Rc<Place>,
    pub(crate) lanes: Rc<Lanes>,
}

/// A stripe that is ours, until it is dropped.
pub(crate) struct Held {
    set: Arc<Set>,
    row: u64,
}

impl Held {
    /// Who has taken it gives it back by this.
    pub(crate) fn taken(set: &Arc<Set>, row: u64) -> Held {
        Held { set: Arc::clone(set), row }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.set.parity().expect("only stripes are held").guards.give_back(self.row);
    }
}

impl Ways {
    /// Waits until a stripe is ours.
    pub(crate) async fn hold(&self, set: &Arc<Set>, row: u64) -> Held {
        let guards = &set.parity().expect("only sets with parity have stripes").guards;
        let mut wait = Duration::from_micros(20);
        while !guards.take(row) {
            self.runtime.sleep(wait).await;
            wait = (wait * 2).min(Duration::from_millis(1));
        }
        Held::taken(set, row)
    }

    /// Computes a piece whose member cannot be read.
    pub(crate) async fn read_lost(&self, set: &Arc<Set>, piece: &Piece) -> Result<Rc<Bounce>, Status> {
        let copy = piece.copies.as_slice()[0];
        let strip = u64::from(set.strip_bytes());
        let (number, within) = (copy.offset / strip, copy.offset % strip);
        let _held = match crate::simulated::is_broken("degraded_read_without_lock") {
            true => None,
            false => Some(self.hold(set, number).await),
        };
        // As it is now that nobody changes the stripe: a member may have got another device since the caller looked, and writes go there.
        let view = &self.shared.view();
        let row = Row::new(view, set, number, within, piece.len as usize);
        if row.is_doubtful() {
            return Err(Status::Media);
        }
        let slot = (0..row.data()).find(|slot| row.member(*slot) == copy.member);
        let slot = slot.expect("a piece of data is on one of them");
        let mut bad = Bad::known(1 << slot);
        let mut contents = row.gather(&self.lanes, &self.place, 1 << slot, &mut bad, Lost::Computed).await?;
        coverage::count(coverage::Event::Computed);
        Ok(contents.as_mut().and_then(|contents| contents[slot].take()).expect("it is computed"))
    }

    /// Changes a part of a stripe. With whatever waits for the same stripe, in the order in which they came. When the future is dropped, what
    /// was begun goes on.
    pub(crate) async fn change(&self, set: &Arc<Set>, row: u64, change: Change) -> Answer {
        let (reply, answer) = ask::channel();
        let is_left = Left(Rc::new(Cell::new(false)));
        let waiting = Waiting { change, is_left: Rc::clone(&is_left.0), reply };
        let key = (set.first_member(), row);
        let queued = {
            let mut queues = self.place.queues.0.borrow_mut();
            match queues.get_mut(&key) {
                Some(queue) => {
                    queue.push(waiting);
                    true
                }
                None => {
                    queues.insert(key, vec![waiting]);
                    false
                }
            }
        };
        if !queued {
            let (ways, set) = (self.clone(), Arc::clone(set));
            self.runtime.spawn(async move { ways.rounds(&set, row).await });
        }
        answer.await.unwrap_or(Err(Status::Aborted))
    }

    /// Changes a stripe until nobody wants to any more.
    async fn rounds(&self, set: &Arc<Set>, row: u64) {
        let key = (set.first_member(), row);
        loop {
            let held = match crate::simulated::is_broken("stripe_changed_by_two") {
                true => None,
                false => Some(self.hold(set, row).await),
            };
            // Those who have come while we waited.
            let waiting = {
                let mut queues = self.place.queues.0.borrow_mut();
                let queue = queues.get_mut(&key).expect("there until the last round");
                if queue.is_empty() {
                    queues.remove(&key);
                    return;
                }
                match crate::simulated::is_broken("waiting_not_joined") {
                    true => vec![queue.remove(0)],
                    false => std::mem::take(queue),
                }
            };
            let waiting: Vec<Waiting> =
                waiting.into_iter().filter(|waiting| !waiting.is_left.get()).collect();
            let changes: Vec<Change> = waiting.iter().map(|waiting| waiting.change.clone()).collect();
            let outcome = match changes.is_empty() {
                true => Ok(Changed::Done),
                false => self.round(set, row, &changes).await,
            };
            drop(held);
            waiting.into_iter().for_each(|waiting| waiting.reply.send(outcome));
        }
    }
}
