//! What tasks of one reactor wait for: their turn, or for something to change. Nothing here crosses threads.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

use super::shared::lock;

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

    /// Whether somebody waits for it.
    pub(crate) fn is_wanted(&self) -> bool {
        self.0.waiting.borrow().iter().any(|waiting| !waiting.is_gone.get())
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

/// Awaits all of them. Each is looked at when it has something to tell, however many there are.
pub(crate) async fn all<F: Future>(futures: impl IntoIterator<Item = F>) -> Vec<F::Output> {
    let mut running: Vec<_> = futures.into_iter().map(|future| (Some(Box::pin(future)), None)).collect();
    let ready =
        Arc::new(Ready { numbers: Mutex::new((0..running.len()).collect()), parent: Mutex::default() });
    let wakers: Vec<Waker> = (0..running.len())
        .map(|number| Waker::from(Arc::new(One { number, ready: Arc::clone(&ready) })))
        .collect();
    let mut left = running.len();
    std::future::poll_fn(|cx| {
        *lock(&ready.parent) = Some(cx.waker().clone());
        // Whoever is ready from now on wakes us again.
        let numbers = std::mem::take(&mut *lock(&ready.numbers));
        for number in numbers {
            let (future, result) = &mut running[number];
            let Some(pending) = future else { continue };
            if let Poll::Ready(done) = pending.as_mut().poll(&mut Context::from_waker(&wakers[number])) {
                (*future, *result) = (None, Some(done));
                left -= 1;
            }
        }
        if left > 0 { Poll::Pending } else { Poll::Ready(()) }
    })
    .await;
    running.into_iter().map(|(_, result)| result.expect("all have ended")).collect()
}

/// Futures that go on beside each other while more of them come.
pub(crate) struct Crowd<'a, T> {
    running: Vec<Option<Pin<Box<dyn Future<Output = T> + 'a>>>>,
    wakers: Vec<Waker>,
    free: Vec<usize>,
    ready: Arc<Ready>,
}

impl<'a, T> Crowd<'a, T> {
    pub(crate) fn new() -> Crowd<'a, T> {
        let ready = Arc::new(Ready { numbers: Mutex::default(), parent: Mutex::default() });
        Crowd { running: Vec::new(), wakers: Vec::new(), free: Vec::new(), ready }
    }

    /// One more. It is looked at for the first time with the next [`Crowd::next_or`].
    pub(crate) fn push(&mut self, future: impl Future<Output = T> + 'a) {
        let number = self.free.pop().unwrap_or_else(|| {
            let number = self.running.len();
            self.running.push(None);
            self.wakers.push(Waker::from(Arc::new(One { number, ready: Arc::clone(&self.ready) })));
            number
        });
        self.running[number] = Some(Box::pin(future));
        lock(&self.ready.numbers).push(number);
    }

    /// How many have not ended.
    pub(crate) fn len(&self) -> usize {
        self.running.len() - self.free.len()
    }

    /// What one of them has come to, or `None` when `or` is over before.
    pub(crate) async fn next_or<F: Future + Unpin>(&mut self, or: &mut F) -> Option<T> {
        std::future::poll_fn(|cx| {
            *lock(&self.ready.parent) = Some(cx.waker().clone());
            let mut numbers = std::mem::take(&mut *lock(&self.ready.numbers)).into_iter();
            while let Some(number) = numbers.next() {
                // Who was woken twice may have ended in between.
                let Some(future) = &mut self.running[number] else { continue };
                let Poll::Ready(done) = future.as_mut().poll(&mut Context::from_waker(&self.wakers[number]))
                else {
                    continue;
                };
                self.running[number] = None;
                self.free.push(number);
                lock(&self.ready.numbers).extend(numbers);
                return Poll::Ready(Some(done));
            }
            Pin::new(&mut *or).poll(cx).map(|_| None)
        })
        .await
    }
}

/// Over when the reactor has made another pass: whoever has something to do on it has had his turn.
pub(crate) fn next_pass() -> impl Future<Output = ()> + Unpin {
    let mut has_waited = false;
    std::future::poll_fn(move |cx| {
        if std::mem::replace(&mut has_waited, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
}

/// Which of several have something to tell, and whom it is told.
struct Ready {
    numbers: Mutex<Vec<usize>>,
    parent: Mutex<Option<Waker>>,
}

/// One of them.
struct One {
    number: usize,
    ready: Arc<Ready>,
}

impl Wake for One {
    fn wake(self: Arc<Self>) {
        lock(&self.ready.numbers).push(self.number);
        let parent = lock(&self.ready.parent).take();
        if let Some(parent) = parent {
            parent.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    /// Looks at 1000 futures of which one is woken at a time: each is polled twice, not a thousand times.
    #[test]
    fn only_who_has_something_to_tell_is_looked_at() {
        let polls = Rc::new(Cell::new(0));
        let bells: Vec<Rc<Bell>> = (0..1000).map(|_| Rc::default()).collect();
        let rung = Rc::new(RefCell::new(vec![false; 1000]));
        let waiting = bells.iter().enumerate().map(|(number, bell)| {
            let (bell, rung, polls) = (Rc::clone(bell), Rc::clone(&rung), Rc::clone(&polls));
            async move {
                bell.until(|| {
                    polls.set(polls.get() + 1);
                    rung.borrow()[number].then_some(number)
                })
                .await
            }
        });
        let mut waiting = std::pin::pin!(all(waiting));
        let mut cx = Context::from_waker(Waker::noop());
        for (number, bell) in bells.iter().enumerate().rev() {
            assert!(waiting.as_mut().poll(&mut cx).is_pending());
            rung.borrow_mut()[number] = true;
            bell.ring();
        }
        let Poll::Ready(numbers) = waiting.as_mut().poll(&mut cx) else { panic!("all have ended") };
        assert_eq!(numbers, (0..1000).collect::<Vec<_>>(), "in their order");
        assert_eq!(polls.get(), 2000);
    }
}
