//! Copying along the members, slice by slice, from a window that moves with it.
//!
//! ```text
//!   members' bytes ─►  ░░░░░░░│▒▒▒▒│▒▒▒▒│▒▒▒▒│    │    │▓▓▓▓▓▓▓▓▓│
//!                      done    slices under way    held  announced, and the barrier is under way
//!                             ╰──────────── the window ──────────╯
//! ```
//!
//! Slices are read, computed and written beside each other. The window's end moves on before they come to it, and its start as soon as they
//! have left, so that they need not wait for a barrier, and writers wait for no more than what is between. Whoever needs a window of his own
//! gets it in between: then all that was begun is ended first.
//!
//! Invariant: a slice begins when all of it has been in the window since before a barrier, and leaves it when it has ended.

use super::Owner;
use crate::pool::manners::Courtesy;
use crate::pool::wait::{Crowd, next_pass};
use crate::raid::Set;
use crate::simulated::is_broken;
use hawser_runtime::Instant;
use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// How far the window reaches at most. Members that answer after a millisecond get a gigabyte in a second so.
const REACH_MAX: u64 = 2 << 20;
/// How long, at the rate that was asked for, what is in the window takes.
const REACH_TIME_MS: u64 = 5;
/// So many slices at a time.
const BESIDE: usize = 16;
/// How long the window stays while nothing is due. A barrier costs a few passes of the reactor, a writer that has to wait more.
const LINGER: Duration = Duration::from_nanos(LINGER_NS);
const LINGER_NS: u64 = 500_000;

/// How work along the members is cut.
#[derive(Clone, Copy)]
pub(super) struct Slices {
    /// What a slice covers of each member.
    pub(super) len: u64,
    /// What is read and written for each byte of that.
    pub(super) cost: u64,
    /// What is held beside a slice, before and behind it.
    pub(super) margin: u64,
}

enum Ended<E> {
    /// The slice that began there.
    Slice(u64, Result<(), E>),
    /// The barrier: the window is held up to there.
    Held(u64),
}

/// A slide that has a window.
struct Window<'a> {
    owner: &'a Rc<Owner>,
    set: &'a Arc<Set>,
    margin: u64,
    /// Slices that were begun, and whether they have ended; the first has not.
    begun: VecDeque<(u64, bool)>,
    /// Where the next begins.
    next: u64,
    held: u64,
    announced: u64,
}

impl Window<'_> {
    /// What is done: everything before.
    fn start(&self) -> u64 {
        self.begun.front().map_or(self.next, |(start, _)| *start)
    }

    fn announce(&self) {
        if !is_broken("resync_without_window") {
            let start = self.start().saturating_sub(self.margin);
            self.set.set_window(Some(start..self.announced + self.margin));
        }
    }

    fn end_slice(&mut self, start: u64) {
        if let Some(slice) = self.begun.iter_mut().find(|slice| slice.0 == start) {
            slice.1 = true;
        }
        let before = self.start();
        while self.begun.pop_front_if(|slice| slice.1).is_some() {}
        if self.start() != before {
            self.announce();
            self.owner.bell.ring();
        }
    }
}

impl Drop for Window<'_> {
    fn drop(&mut self) {
        self.set.set_window(None);
        self.owner.bell.ring();
    }
}

impl Owner {
    /// Waits until the next slice is due, or the pool is being closed.
    async fn until_due(&self) {
        let now = self.runtime.now();
        let due = self.work.pace.due(now);
        if due > now {
            self.bell.until_or(&mut self.runtime.sleep_until(due), || self.is_closing.get()).await;
        }
    }

    /// Takes the time that so many bytes have, where they were read and written in no [`Owner::slide`].
    pub(super) async fn take_time(&self, bytes: u64) {
        self.work.pace.begin(self.runtime.now(), bytes, self.options.sync_bytes_per_second);
        self.until_due().await;
    }

    /// Lets those go first who are under way here. For a few passes at most: who has a window may be what they wait for.
    pub(super) async fn give_way(&self) {
        let mut courtesy = Courtesy::default();
        while courtesy.waits(&self.place) {
            next_pass().await;
        }
    }

    /// Has `work` done with `rows` of a set's members, in slices, while writers keep out of them. Gives up to where all is done: less than the
    /// end when the pool is being closed.
    ///
    /// # Errors
    /// The first of a slice. Then none begins any more.
    pub(super) async fn slide<E, F>(
        self: &Rc<Self>,
        set: &Arc<Set>,
        rows: Range<u64>,
        slices: Slices,
        work: impl Fn(Range<u64>) -> F,
    ) -> Result<u64, E>
    where
        F: Future<Output = Result<(), E>>,
    {
        let mut at = rows.start;
        while at < rows.end && !self.is_closing.get() {
            self.until_due().await;
            at = self.slide_with_window(set, at..rows.end, slices, &work).await?;
        }
        Ok(at)
    }

    /// The same until somebody else wants the window, or nothing is due for a while.
    async fn slide_with_window<E, F>(
        self: &Rc<Self>,
        set: &Arc<Set>,
        rows: Range<u64>,
        Slices { len, cost, margin }: Slices,
        work: &impl Fn(Range<u64>) -> F,
    ) -> Result<u64, E>
    where
        F: Future<Output = Result<(), E>>,
    {
        let _turn = self.turns.window.take().await;
        let rate = self.options.sync_bytes_per_second;
        let reach = match rate {
            0 => REACH_MAX,
            _ => (rate / 1000 * REACH_TIME_MS / cost).clamp(len, REACH_MAX).next_multiple_of(len),
        };
        let at = rows.start;
        debug_assert!(at.is_multiple_of(512) && rows.end.is_multiple_of(512), "{rows:?} is not whole blocks");
        let mut window =
            Window { owner: self, set, margin, begun: VecDeque::new(), next: at, held: at, announced: at };
        let mut crowd: Crowd<'_, Ended<E>> = Crowd::new();
        let (mut failed, mut courtesy, mut is_over) = (None, Courtesy::default(), false);
        loop {
            let now = self.runtime.now();
            let due = self.work.pace.due(now);
            let is_soon = due <= now + LINGER;
            is_over |= failed.is_some()
                || self.is_closing.get()
                // Not before it has come forward: those who want it may never end, as guests that read what is being made the same.
                || (self.turns.window.is_wanted() && window.next >= rows.end.min(at + reach))
                || (!is_soon && window.begun.is_empty());
            let is_left = window.next < rows.end && !is_over;
            let has_moved_on = window.held == window.announced
                && window.held < rows.end.min(window.next + reach.div_ceil(2));
            if is_left && is_soon && has_moved_on {
                window.announced = rows.end.min(window.next + reach);
                window.announce();
                let announced = window.announced;
                crowd.push(async move {
                    if !is_broken("resync_without_window") {
                        self.barrier().await;
                    }
                    Ended::Held(announced)
                });
            }
            let end = rows.end.min(window.next + len);
            let has_room = is_left && window.begun.len() < BESIDE;
            let ended = if has_room && due > now {
                let until = if is_soon { due } else { Instant(due.0 - LINGER_NS) };
                crowd.next_or(&mut self.runtime.sleep_until(until)).await
            } else if has_room && end <= window.held {
                if !courtesy.waits(&self.place) {
                    let start = window.next;
                    self.work.pace.begin(now, (end - start) * cost, rate);
                    let slice = work(start..end);
                    crowd.push(async move { Ended::Slice(start, slice.await) });
                    window.begun.push_back((start, false));
                    window.next = end;
                }
                // One a pass: requests that have come meanwhile are next.
                crowd.next_or(&mut next_pass()).await
            } else if crowd.len() > 0 {
                crowd.next_or(&mut std::future::pending::<()>()).await
            } else {
                break;
            };
            match ended {
                Some(Ended::Slice(start, outcome)) => {
                    window.end_slice(start);
                    if let Err(error) = outcome {
                        failed.get_or_insert(error);
                    }
                }
                Some(Ended::Held(end)) => window.held = end,
                None => {}
            }
        }
        match failed {
            Some(error) => Err(error),
            None => Ok(window.next),
        }
    }
}
