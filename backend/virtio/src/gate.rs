//! The gate of a session: a queue that starts begins nothing new before everything unfinished of all queues is executed.

#![forbid(unsafe_code)]

use hawser_runtime::{ReactorHandle, Runtime};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What a queue that waits is woken with.
type Open = Box<dyn FnOnce(&Runtime) + Send>;

#[derive(Default)]
struct State {
    /// Queues with unfinished requests in the log.
    unfinished: Vec<bool>,
    waiting: Vec<(ReactorHandle, Open)>,
}

/// Shared by the queues of one session.
#[derive(Default)]
pub(crate) struct Gate(Mutex<State>);

impl Gate {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says whether `queue` has unfinished requests. The last that has none any more opens the gate.
    pub(crate) fn set_unfinished(&self, queue: u16, unfinished: bool) {
        let mut state = self.state();
        let index = usize::from(queue);
        if state.unfinished.len() <= index {
            state.unfinished.resize(index + 1, false);
        }
        state.unfinished[index] = unfinished;
        if !state.unfinished.contains(&true) {
            for (reactor, open) in std::mem::take(&mut state.waiting) {
                reactor.run(open);
            }
        }
    }

    /// Whether new requests may begin. If not, `open` is run on the reactor when they may.
    pub(crate) fn enter(&self, reactor: &ReactorHandle, open: Open) -> bool {
        let mut state = self.state();
        if !state.unfinished.contains(&true) {
            return true;
        }
        state.waiting.push((reactor.clone(), open));
        false
    }
}
