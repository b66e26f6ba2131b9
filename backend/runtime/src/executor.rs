//! A small executor for what is not hot: straight-line control code (`async`) on the reactor's thread.
//!
//! Tasks are woken through the reactor's inbox, so a waker may travel to any thread. An operation that a task awaits
//! keeps its buffers until it is terminal even when the task is dropped in between: they live in the executor's slab.

use crate::op::{Completed, Op};
use crate::reactor::{Runtime, SourceId, WakeTask};
use crate::slab::Slab;
use crate::time::Instant;
use std::any::Any;
use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

struct Task {
    future: Pin<Box<dyn Future<Output = ()>>>,
    /// Made with the first turn.
    waker: Option<Waker>,
}

#[derive(Default)]
pub(crate) struct Executor {
    tasks: RefCell<Slab<Option<Task>>>,
    waits: RefCell<Slab<WaitState>>,
}

struct WaitState {
    done: Option<Completed>,
    waker: Option<Waker>,
    abandoned: bool,
    /// What the operation points to.
    _owned: Option<Box<dyn Any>>,
}

struct TaskWaker {
    task: usize,
    reactor: Arc<dyn WakeTask>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.reactor.wake_task(self.task);
    }
}

impl Executor {
    pub(crate) fn spawn(&self, future: impl Future<Output = ()> + 'static) -> usize {
        self.tasks.borrow_mut().insert(Some(Task { future: Box::pin(future), waker: None }))
    }

    /// Polls one task. A wake-up for a task that has ended, or is being polled, is harmless.
    pub(crate) fn run(&self, task: usize, reactor: &Arc<dyn WakeTask>) {
        let Some(mut turn) = self.tasks.borrow_mut().get_mut(task).and_then(Option::take) else { return };
        let new = || Waker::from(Arc::new(TaskWaker { task, reactor: Arc::clone(reactor) }));
        let waker = turn.waker.get_or_insert_with(new);
        if turn.future.as_mut().poll(&mut Context::from_waker(waker)).is_ready() {
            self.tasks.borrow_mut().remove(task);
        } else if let Some(place) = self.tasks.borrow_mut().get_mut(task) {
            *place = Some(turn);
        }
    }

    /// Takes out all tasks and everything that their operations own, to be dropped when nothing is borrowed.
    pub(crate) fn take_all(&self) -> impl Sized + use<> {
        (self.tasks.take(), self.waits.take())
    }

    /// Delivers the completion or the time-out that the wait `key` stands for.
    pub(crate) fn complete(&self, key: u32, completed: Completed) {
        let key = key as usize;
        let mut waits = self.waits.borrow_mut();
        let Some(wait) = waits.get_mut(key) else { return };
        if wait.abandoned {
            // What it owned may use the executor when it is dropped.
            let ended = waits.remove(key);
            drop(waits);
            drop(ended);
            return;
        }
        wait.done = Some(completed);
        let waker = wait.waker.take();
        drop(waits);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn insert(&self, owned: Option<Box<dyn Any>>) -> u32 {
        let wait = WaitState { done: None, waker: None, abandoned: false, _owned: owned };
        u32::try_from(self.waits.borrow_mut().insert(wait)).expect("fewer than 2^32 operations are awaited")
    }
}

/// The end of one operation, or of a sleep. Dropping it asks for cancellation.
pub struct OpFuture {
    runtime: Runtime,
    key: u32,
    kind: Kind,
    finished: bool,
}

enum Kind {
    Op,
    Sleep(crate::TimerId),
}

impl Future for OpFuture {
    type Output = Completed;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Completed> {
        let executor = Rc::clone(self.runtime.executor());
        let mut waits = executor.waits.borrow_mut();
        let wait = waits.get_mut(self.key as usize).expect("a wait lives as long as its future");
        match wait.done {
            Some(completed) => {
                let ended = waits.remove(self.key as usize);
                drop(waits);
                drop(ended);
                self.finished = true;
                Poll::Ready(completed)
            }
            None => {
                wait.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl Drop for OpFuture {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        let executor = Rc::clone(self.runtime.executor());
        let mut waits = executor.waits.borrow_mut();
        let Some(wait) = waits.get_mut(self.key as usize) else { return };
        if let Kind::Op = self.kind
            && wait.done.is_none()
        {
            wait.abandoned = true;
            drop(waits);
            self.runtime.cancel(SourceId::EXECUTOR, self.key);
            return;
        }
        let ended = waits.remove(self.key as usize);
        drop(waits);
        drop(ended);
        if let Kind::Sleep(timer) = self.kind {
            self.runtime.cancel_timer(timer);
        }
    }
}

impl Runtime {
    /// Runs `future` on this reactor until it ends.
    pub fn spawn(&self, future: impl Future<Output = ()> + 'static) {
        let task = self.executor().spawn(future);
        self.wake_task_here(task);
    }

    /// Submits `op` and awaits its end. `owned` is kept until the operation is terminal, also when the future is dropped before.
    ///
    /// # Safety
    /// Everything that `op` points to is valid, and stays so for as long as `owned` lives, wherever that is moved.
    ///
    /// # Panics
    /// For operations that do not end exactly once.
    pub unsafe fn operate(&self, op: &Op, owned: Option<Box<dyn Any>>) -> OpFuture {
        assert!(!matches!(op, Op::PollReadable { .. }), "{op:?} does not end exactly once");
        let key = self.executor().insert(owned);
        // SAFETY: what `op` points to lives as long as `owned`, which the executor drops after the last event.
        unsafe { self.submit(SourceId::EXECUTOR, key, op) };
        OpFuture { runtime: self.clone(), key, kind: Kind::Op, finished: false }
    }

    /// Accepts one connection; the result is its descriptor. `owned` is kept until then.
    pub fn accept(&self, fd: crate::Fd, owned: Option<Box<dyn Any>>) -> OpFuture {
        // SAFETY: no memory is named.
        unsafe { self.operate(&Op::Accept { fd }, owned) }
    }

    /// Awaits `deadline`.
    pub fn sleep_until(&self, deadline: Instant) -> OpFuture {
        let key = self.executor().insert(None);
        let timer = self.timer(SourceId::EXECUTOR, deadline, key);
        OpFuture { runtime: self.clone(), key, kind: Kind::Sleep(timer), finished: false }
    }

    /// Awaits the passing of `duration`.
    pub fn sleep(&self, duration: std::time::Duration) -> OpFuture {
        self.sleep_until(self.now() + duration)
    }
}
