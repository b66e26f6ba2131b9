//! How many wait for a pool, and for how long: one that hangs, because a member does not answer, keeps only a few of those who ask.
//!
//! What a pool was asked for goes on when nobody waits for it any more. Until it has ended, who asks for more is told so at once.
//!
//! Owns: the count of those who wait. Must not know: what they ask for.

use crate::daemon::ChangeError;
use hawser_volume::pool::Ask;
use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Who waits for a pool, at most: a quarter of the API's clients.
const WAITING_MAX: usize = 8;
/// How long one more waits for one of them to end.
const TURN_MAX: Duration = Duration::from_secs(5);
/// How long one of them waits. A pool that is well answers within seconds, however large it is.
const ANSWER_MAX: Duration = Duration::from_secs(60);

/// All pools', by name.
#[derive(Default)]
pub(in crate::daemon) struct Asks {
    places: Mutex<BTreeMap<String, Place>>,
    changed: Condvar,
}

#[derive(Default)]
struct Place {
    waiting: usize,
    /// What nobody waits for any more, and has not ended.
    left: Vec<Left>,
}

struct Left {
    since: Instant,
    is_over: Box<dyn FnMut() -> bool + Send>,
}

/// Somebody waits, until it is dropped.
pub(in crate::daemon) struct Waiting<'a> {
    asks: &'a Asks,
    pool: String,
}

impl Asks {
    fn places(&self) -> MutexGuard<'_, BTreeMap<String, Place>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts somebody who waits for a pool.
    ///
    /// # Errors
    /// When it has not answered for long, or too many wait.
    pub(in crate::daemon) fn begin(&self, pool: &str) -> Result<Waiting<'_>, ChangeError> {
        self.begin_within(pool, TURN_MAX)
    }

    /// Whether nothing goes on of what a pool was asked for.
    pub(in crate::daemon) fn is_idle(&self, pool: &str) -> bool {
        self.places().get_mut(pool).is_none_or(|place| {
            place.left.retain_mut(|left| !(left.is_over)());
            place.waiting == 0 && place.left.is_empty()
        })
    }

    fn begin_within(&self, pool: &str, patience: Duration) -> Result<Waiting<'_>, ChangeError> {
        let since = Instant::now();
        let mut places = self.places();
        loop {
            let place = places.entry(pool.to_owned()).or_default();
            place.left.retain_mut(|left| !(left.is_over)());
            if let Some(left) = place.left.first() {
                return Err(ChangeError::Conflict(format!(
                    "pool {pool} is busy: it has not answered for {} s; a member that hangs keeps it, see its troubles",
                    left.since.elapsed().as_secs()
                )));
            }
            if place.waiting < WAITING_MAX {
                place.waiting += 1;
                return Ok(Waiting { asks: self, pool: pool.to_owned() });
            }
            let Some(more) = patience.checked_sub(since.elapsed()) else {
                return Err(ChangeError::Conflict(format!(
                    "pool {pool} is busy: {WAITING_MAX} others wait for it, want it tried again"
                )));
            };
            places = self.changed.wait_timeout(places, more).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Asks a pool for something and waits for the answer, not for ever.
    ///
    /// # Errors
    /// Why it was not done, or is not known to be.
    pub(in crate::daemon) fn ask<T: Send + 'static>(
        &self,
        pool: &str,
        ask: impl FnOnce() -> Ask<T>,
    ) -> Result<T, ChangeError> {
        self.ask_within(pool, ask, ANSWER_MAX)
    }

    fn ask_within<T: Send + 'static>(
        &self,
        pool: &str,
        ask: impl FnOnce() -> Ask<T>,
        limit: Duration,
    ) -> Result<T, ChangeError> {
        let since = Instant::now();
        let _waiting = self.begin(pool)?;
        match ask().wait_within(limit) {
            Ok(answer) => Ok(answer?),
            Err(mut ask) => {
                let left = Left { since, is_over: Box::new(move || ask.is_over()) };
                self.places().entry(pool.to_owned()).or_default().left.push(left);
                Err(ChangeError::Failed(format!(
                    "pool {pool} has not answered for {} s: what was asked for goes on when it can; a member that hangs keeps it, see its \
                     troubles",
                    limit.as_secs()
                )))
            }
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if let Some(place) = self.asks.places().get_mut(&self.pool) {
            place.waiting -= 1;
        }
        self.asks.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hawser_volume::pool::PoolError;

    fn line<T>(result: Result<T, ChangeError>) -> String {
        match result {
            Ok(_) => "done".to_owned(),
            Err(ChangeError::Conflict(what) | ChangeError::Failed(what)) => what,
            Err(_) => "something else".to_owned(),
        }
    }

    #[test]
    fn who_asks_a_pool_that_hangs_is_told_so_and_the_others_have_their_answers() {
        let asks = Asks::default();
        let (answer, hangs) = Ask::pending();
        let first = line(asks.ask_within("p0", || hangs, Duration::ZERO));
        assert!(first.starts_with("pool p0 has not answered for 0 s: what was asked for goes on"), "{first}");
        let second = line(asks.ask("p0", || -> Ask<()> { panic!("it was asked") }));
        assert!(second.starts_with("pool p0 is busy: it has not answered for 0 s"), "{second}");
        let (other, ask) = Ask::pending();
        other(Ok(7));
        assert!(matches!(asks.ask("p1", || ask), Ok(7)));
        assert!(!asks.is_idle("p0") && asks.is_idle("p1"));
        answer(Ok(()));
        assert!(asks.is_idle("p0"));
        let (again, ask) = Ask::pending();
        again(Err(PoolError::Conflict("no".to_owned())));
        assert_eq!(line::<()>(asks.ask("p0", || ask)), "no", "it answers again");
    }

    #[test]
    fn only_so_many_wait_for_one_pool() {
        let asks = Asks::default();
        let mut waiting: Vec<_> = (0..WAITING_MAX).map(|_| asks.begin("p0").ok().unwrap()).collect();
        let one_more = line(asks.begin_within("p0", Duration::from_millis(1)));
        assert_eq!(one_more, "pool p0 is busy: 8 others wait for it, want it tried again");
        assert!(asks.begin("p1").is_ok());
        std::thread::scope(|scope| {
            let late = scope.spawn(|| asks.begin("p0").is_ok());
            drop(waiting.pop());
            assert!(late.join().unwrap(), "it has the place of one that ended");
        });
    }
}
