//! Memory that requests name for long: whoever maps a guest's memory says so here, and whoever has to prepare memory for a device
//! (RDMA pins it, and gives it keys) hears of it. One list for the process, as address space is.
//!
//! Owns: the list, and the order of what listeners hear. Must not know: guests, devices. Invariants:
//! - A region is told before any request can name it, and taken back after the last one that could has ended.
//! - A listener hears of each region that there is once, in whatever order it came.
//! - Both are said on the thread of whoever maps or unmaps, which is never a reactor's: preparing memory takes its time.
#![forbid(unsafe_code)]

use std::sync::{Arc, Mutex, PoisonError};

/// Where a region is: bytes of our address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The address of its first byte.
    pub start: usize,
    /// Its length.
    pub len: usize,
}

/// Hears of regions.
pub trait Listener: Send + Sync {
    /// Requests may name this memory from now on.
    fn added(&self, span: Span);
    /// None does any more, and it will be unmapped when this returns.
    fn removed(&self, span: Span);
}

#[derive(Default)]
struct State {
    spans: Vec<(u64, Span)>,
    last: u64,
    listeners: Vec<Arc<dyn Listener>>,
}

/// The list of a process.
pub struct Regions(Mutex<State>);

static PROCESS: Regions = Regions(Mutex::new(State { spans: Vec::new(), last: 0, listeners: Vec::new() }));

/// A region that was told of. Dropping it takes it back.
pub struct Announced {
    regions: &'static Regions,
    number: u64,
    span: Span,
}

impl std::fmt::Debug for Announced {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.span.fmt(f)
    }
}

impl Regions {
    /// This process's.
    #[must_use]
    pub fn of_process() -> &'static Regions {
        &PROCESS
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says that requests may name this memory, when everybody who prepares memory has done so.
    #[must_use]
    pub fn announce(&'static self, span: Span) -> Announced {
        let (number, listeners) = {
            let mut state = self.lock();
            state.last += 1;
            let number = state.last;
            state.spans.push((number, span));
            (number, state.listeners.clone())
        };
        for listener in listeners {
            listener.added(span);
        }
        Announced { regions: self, number, span }
    }

    /// From now on `listener` hears of regions, at first of all that there are. It is kept as long as the process lives.
    pub fn listen(&self, listener: &Arc<dyn Listener>) {
        // Nothing comes or goes meanwhile: it would be heard of twice, or not at all.
        let mut state = self.lock();
        state.listeners.push(Arc::clone(listener));
        for (_, span) in &state.spans {
            listener.added(*span);
        }
    }
}

impl Drop for Announced {
    fn drop(&mut self) {
        let listeners = {
            let mut state = self.regions.lock();
            state.spans.retain(|(number, _)| *number != self.number);
            state.listeners.clone()
        };
        for listener in listeners {
            listener.removed(self.span);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Heard(Mutex<Vec<(bool, usize)>>);

    impl Listener for Heard {
        fn added(&self, span: Span) {
            self.0.lock().unwrap().push((true, span.start));
        }

        fn removed(&self, span: Span) {
            self.0.lock().unwrap().push((false, span.start));
        }
    }

    #[test]
    fn a_listener_hears_of_what_is_there_and_of_what_comes_and_goes() {
        let regions: &'static Regions = Box::leak(Box::new(Regions(Mutex::default())));
        let span = |start| Span { start, len: 0x1000 };
        let (first, second) = (regions.announce(span(0x1000)), regions.announce(span(0x2000)));
        drop(first);
        let heard = Arc::new(Heard::default());
        let listener: Arc<dyn Listener> = Arc::clone(&heard) as _;
        regions.listen(&listener);
        let third = regions.announce(span(0x3000));
        drop((second, third));
        let want = [(true, 0x2000), (true, 0x3000), (false, 0x2000), (false, 0x3000)];
        assert_eq!(*heard.0.lock().unwrap(), want);
    }
}
