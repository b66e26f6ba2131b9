//! A reactor as seen from other threads: messages, wake-ups of tasks, and counters. Nothing else of it is shared.

use super::Runtime;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};

pub(super) type Message = Box<dyn FnOnce(&Runtime) + Send>;

/// What other threads may touch.
pub(super) struct Shared {
    /// `None` once the reactor has ended: nobody will look any more.
    pub(super) messages: Mutex<Option<Vec<Message>>>,
    pub(super) tasks: Mutex<Vec<usize>>,
    pub(super) pending: AtomicBool,
    /// The reactor sleeps, or is about to: a sender must write to `wake`.
    pub(super) sleeping: AtomicBool,
    pub(super) wake: OwnedFd,
    pub(super) stats: ReactorStats,
}

/// What a reactor has done so far; written by it alone.
#[derive(Debug, Default)]
pub struct ReactorStats {
    /// Passes of the loop.
    pub passes: AtomicU64,
    /// Passes that found something to do.
    pub busy_passes: AtomicU64,
    /// Times it went to sleep.
    pub sleeps: AtomicU64,
}

pub(super) fn bump(counter: &AtomicU64) {
    counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
}

pub(crate) trait WakeTask: Send + Sync {
    fn wake_task(&self, task: usize);
}

impl Shared {
    pub(super) fn signal(&self) {
        // Pairs with the fence in `Reactor::sleep`: either we see `sleeping`, or the reactor sees `pending`.
        self.pending.store(true, Ordering::SeqCst);
        if self.sleeping.load(Ordering::SeqCst) {
            let one = 1u64;
            // SAFETY: `one` is 8 readable bytes; the eventfd lives as long as `self`. A full counter is a wake-up too.
            unsafe { libc::write(self.wake.as_raw_fd(), (&raw const one).cast(), 8) };
        }
    }
}

impl WakeTask for Shared {
    fn wake_task(&self, task: usize) {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner).push(task);
        self.signal();
    }
}

/// A reactor as seen from other threads.
#[derive(Clone)]
pub struct ReactorHandle(pub(super) Arc<Shared>);

impl ReactorHandle {
    /// Runs `message` on the reactor's thread, soon. When the reactor has ended, or ends before, it is dropped.
    pub fn run(&self, message: impl FnOnce(&Runtime) + Send + 'static) {
        if let Some(messages) = &mut *self.0.messages.lock().unwrap_or_else(PoisonError::into_inner) {
            messages.push(Box::new(message));
        } else {
            return;
        }
        self.0.signal();
    }

    /// Runs `message` on the reactor's thread and waits for its answer; `None` when the reactor has ended.
    /// Never called on a reactor's thread: it would wait for itself.
    pub fn call<T: Send + 'static>(&self, message: impl FnOnce(&Runtime) -> T + Send + 'static) -> Option<T> {
        let (sender, receiver) = mpsc::sync_channel(1);
        self.run(move |runtime| {
            // The asker may have given up; then nobody wants the answer.
            let _ = sender.send(message(runtime));
        });
        receiver.recv().ok()
    }

    /// What the reactor has done so far.
    #[must_use]
    pub fn stats(&self) -> &ReactorStats {
        &self.0.stats
    }

    /// Whether both name the same reactor.
    #[must_use]
    pub fn same(&self, other: &ReactorHandle) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}
