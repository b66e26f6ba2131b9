//! Small pieces for straight-line control code: a mailbox between threads, the first of two futures, a deadline.
#![forbid(unsafe_code)]

use hawser_runtime::{Instant, Runtime};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

/// A queue of messages for one task, which any thread may post to.
pub(crate) struct Mailbox<T>(Mutex<Inner<T>>);

struct Inner<T> {
    messages: VecDeque<T>,
    waker: Option<Waker>,
}

impl<T> Default for Mailbox<T> {
    fn default() -> Self {
        Mailbox(Mutex::new(Inner { messages: VecDeque::new(), waker: None }))
    }
}

impl<T> Mailbox<T> {
    fn lock(&self) -> MutexGuard<'_, Inner<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Posts a message and wakes the reader.
    pub(crate) fn post(&self, message: T) {
        let waker = {
            let mut inner = self.lock();
            inner.messages.push_back(message);
            inner.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Posts a message, unless one that says the same waits already: so many cost no more memory than one.
    pub(crate) fn post_once(&self, message: T)
    where
        T: PartialEq,
    {
        if !self.lock().messages.contains(&message) {
            self.post(message);
        }
    }

    /// Awaits the next message. One reader at a time.
    pub(crate) async fn next(&self) -> T {
        poll_fn(|cx| {
            let mut inner = self.lock();
            match inner.messages.pop_front() {
                Some(message) => Poll::Ready(message),
                None => {
                    inner.waker = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }
}

/// The output of whichever ends first.
pub(crate) enum Either<A, B> {
    First(A),
    Second(B),
}

/// Runs both until one ends; the other is dropped.
pub(crate) async fn first<A, B>(a: impl Future<Output = A>, b: impl Future<Output = B>) -> Either<A, B> {
    let mut a = pin!(a);
    let mut b = pin!(b);
    poll_fn(|cx| {
        if let Poll::Ready(output) = a.as_mut().poll(cx) {
            return Poll::Ready(Either::First(output));
        }
        b.as_mut().poll(cx).map(Either::Second)
    })
    .await
}

/// Runs `future` for at most `duration`.
pub(crate) async fn within<T>(
    runtime: &Runtime,
    duration: Duration,
    future: impl Future<Output = T>,
) -> Option<T> {
    match first(future, runtime.sleep(duration)).await {
        Either::First(output) => Some(output),
        Either::Second(_) => None,
    }
}

/// Says what a peer can cause at will, but seldom.
pub(crate) struct Seldom {
    every: Duration,
    next: Instant,
}

impl Seldom {
    /// At most once in `every`.
    pub(crate) fn new(every: Duration) -> Seldom {
        Seldom { every, next: Instant(0) }
    }

    /// Whether it may be said now.
    pub(crate) fn may(&mut self, now: Instant) -> bool {
        let may = now >= self.next;
        if may {
            self.next = now + self.every;
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_already_is_not_posted_again() {
        let mailbox = Mailbox::default();
        for message in [1, 2, 1, 2, 2] {
            mailbox.post_once(message);
        }
        assert_eq!(mailbox.lock().messages, [1, 2]);
    }

    #[test]
    fn a_flood_is_said_once_in_a_while() {
        let mut seldom = Seldom::new(Duration::from_nanos(100));
        let said: Vec<_> = (0..250).filter(|now| seldom.may(Instant(*now))).collect();
        assert_eq!(said, [0, 100, 200]);
    }
}
