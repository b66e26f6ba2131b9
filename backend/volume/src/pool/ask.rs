//! A question to a reactor, and its answer: what crosses threads.

use super::PoolError;
use hawser_runtime::{ReactorHandle, Runtime};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

struct Place<T> {
    answer: Option<T>,
    /// Nobody will answer any more.
    is_over: bool,
    waker: Option<Waker>,
}

type Shared<T> = Arc<Mutex<Place<T>>>;

/// The right to answer, once. Dropped without an answer, it tells so.
pub(crate) struct Reply<T>(Shared<T>);

/// An answer that will come.
pub(crate) struct Answer<T>(Shared<T>);

/// A pair of them.
pub(crate) fn channel<T>() -> (Reply<T>, Answer<T>) {
    let place = Arc::new(Mutex::new(Place { answer: None, is_over: false, waker: None }));
    (Reply(Arc::clone(&place)), Answer(place))
}

impl<T> Reply<T> {
    pub(crate) fn send(self, answer: T) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).answer = Some(answer);
    }
}

impl<T> Drop for Reply<T> {
    fn drop(&mut self) {
        let waker = {
            let mut place = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            place.is_over = true;
            place.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> Future for Answer<T> {
    type Output = Option<T>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<T>> {
        let mut place = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if place.is_over {
            return Poll::Ready(place.answer.take());
        }
        place.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

/// Wakes a thread that waits.
struct Unpark(std::thread::Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// What was asked of a pool, and will be answered: awaited on a reactor, or waited for by any other thread.
/// The work goes on when it is dropped.
pub struct Ask<T>(Answer<Result<T, PoolError>>);

impl<T: Send + 'static> Ask<T> {
    /// Runs `work` as a task on `reactor`.
    pub(crate) fn of<F>(reactor: &ReactorHandle, work: impl FnOnce(Runtime) -> F + Send + 'static) -> Ask<T>
    where
        F: Future<Output = Result<T, PoolError>> + 'static,
    {
        let (reply, answer) = channel();
        reactor.run(move |runtime| {
            let task = work(runtime.clone());
            runtime.spawn(async move { reply.send(task.await) });
        });
        Ask(answer)
    }

    /// Waits for the answer. Never on a reactor's thread.
    ///
    /// # Errors
    /// Why it was not done.
    pub fn wait(mut self) -> Result<T, PoolError> {
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        let mut cx = Context::from_waker(&waker);
        loop {
            if let Poll::Ready(answer) = Pin::new(&mut self).poll(&mut cx) {
                return answer;
            }
            std::thread::park();
        }
    }
}

impl<T> Ask<T> {
    /// Waits for the answer for so long at most; what was asked for goes on all the same. Never on a reactor's thread.
    ///
    /// # Errors
    /// The ask, when it was not answered.
    pub fn wait_within(mut self, limit: Duration) -> Result<Result<T, PoolError>, Ask<T>> {
        let until = Instant::now() + limit;
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        let mut cx = Context::from_waker(&waker);
        loop {
            if let Poll::Ready(answer) = Pin::new(&mut self).poll(&mut cx) {
                return Ok(answer);
            }
            let Some(left) = until.checked_duration_since(Instant::now()) else { return Err(self) };
            std::thread::park_timeout(left);
        }
    }

    /// Whether it was answered.
    pub fn is_over(&mut self) -> bool {
        Pin::new(self).poll(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    /// One that a test answers when it likes.
    pub fn pending() -> (impl FnOnce(Result<T, PoolError>), Ask<T>) {
        let (reply, answer) = channel();
        (move |answer| reply.send(answer), Ask(answer))
    }
}

impl<T> Future for Ask<T> {
    type Output = Result<T, PoolError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let answer = Pin::new(&mut self.0).poll(cx);
        answer.map(|answer| {
            answer.unwrap_or_else(|| Err(PoolError::Failed("its reactor has ended".to_owned())))
        })
    }
}
