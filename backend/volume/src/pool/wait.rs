//! What tasks of one reactor wait for: their turn, or for something to change. Nothing here crosses threads.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// Wakes all that wait for something to change.
#[derive(Default)]
pub(crate) struct Bell {
    waiting: RefCell<Vec<Waker>>,
}

impl Bell {
    /// Everybody looks again.
    pub(crate) fn ring(&self) {
        for waker in self.waiting.take() {
            waker.wake();
        }
    }

    /// Waits until `look` finds what it looks for; it looks at once, and after each ring.
    pub(crate) async fn until<T>(&self, mut look: impl FnMut() -> Option<T>) -> T {
        std::future::poll_fn(|cx| match look() {
            Some(found) => Poll::Ready(found),
            None => {
                self.waiting.borrow_mut().push(cx.waker().clone());
                Poll::Pending
            }
        })
        .await
    }

    /// Waits for an answer, or until `is_over`; it looks after each ring.
    pub(crate) async fn until_or<F: Future + Unpin>(
        &self,
        answer: &mut F,
        is_over: impl Fn() -> bool,
    ) -> Option<F::Output> {
        std::future::poll_fn(|cx| {
            if let Poll::Ready(answer) = Pin::new(&mut *answer).poll(cx) {
                return Poll::Ready(Some(answer));
            }
            if is_over() {
                return Poll::Ready(None);
            }
            self.waiting.borrow_mut().push(cx.waker().clone());
            Poll::Pending
        })
        .await
    }
}

/// One at a time, in the order in which they came.
#[derive(Clone, Default)]
pub(crate) struct Turn(Rc<TurnState>);

#[derive(Default)]
struct TurnState {
    is_taken: Cell<bool>,
    waiting: RefCell<VecDeque<Rc<Waiting>>>,
}

#[derive(Default)]
struct Waiting {
    has_turn: Cell<bool>,
    is_gone: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

/// Somebody's turn, until it is dropped.
pub(crate) struct Held(Rc<TurnState>);

struct Queueing {
    state: Rc<TurnState>,
    place: Option<Rc<Waiting>>,
}

impl Turn {
    /// Waits for the turn.
    pub(crate) fn take(&self) -> impl Future<Output = Held> + use<> {
        Queueing { state: Rc::clone(&self.0), place: None }
    }

    /// Whether somebody has it.
    pub(crate) fn is_taken(&self) -> bool {
        self.0.is_taken.get()
    }
}

impl TurnState {
    fn pass_on(&self) {
        while let Some(next) = self.waiting.borrow_mut().pop_front() {
            if next.is_gone.get() {
                continue;
            }
            next.has_turn.set(true);
            if let Some(waker) = next.waker.take() {
                waker.wake();
            }
            return;
        }
        self.is_taken.set(false);
    }
}

impl Future for Queueing {
    type Output = Held;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Held> {
        match &self.place {
            None if !self.state.is_taken.get() => self.state.is_taken.set(true),
            None => {
                let place = Rc::<Waiting>::default();
                *place.waker.borrow_mut() = Some(cx.waker().clone());
                self.state.waiting.borrow_mut().push_back(Rc::clone(&place));
                self.place = Some(place);
                return Poll::Pending;
            }
            Some(place) if !place.has_turn.get() => {
                *place.waker.borrow_mut() = Some(cx.waker().clone());
                return Poll::Pending;
            }
            Some(_) => self.place = None,
        }
        Poll::Ready(Held(Rc::clone(&self.state)))
    }
}

impl Drop for Queueing {
    fn drop(&mut self) {
        let Some(place) = self.place.take() else { return };
        place.is_gone.set(true);
        if place.has_turn.get() {
            self.state.pass_on();
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.pass_on();
    }
}

/// Awaits all of them.
pub(crate) async fn all<F: Future>(futures: impl IntoIterator<Item = F>) -> Vec<F::Output> {
    let mut running: Vec<_> = futures.into_iter().map(|future| (Some(Box::pin(future)), None)).collect();
    std::future::poll_fn(|cx| {
        let mut waits = false;
        for (future, result) in &mut running {
            if let Some(pending) = future {
                match pending.as_mut().poll(cx) {
                    Poll::Ready(done) => (*future, *result) = (None, Some(done)),
                    Poll::Pending => waits = true,
                }
            }
        }
        if waits { Poll::Pending } else { Poll::Ready(()) }
    })
    .await;
    running.into_iter().map(|(_, result)| result.expect("all have ended")).collect()
}
