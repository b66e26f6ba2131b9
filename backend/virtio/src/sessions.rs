//! The sessions of a disk: two at most, of which one serves.
//!
//! A VM that migrates has two front ends for a while: that of its source, whose rings run, and that of its destination, which
//! negotiates, reads the configuration and says where its memory and rings are. The rings of a disk are those of one session at
//! a time, whoever that is: the turn changes hands when all rings of the session that has it are stopped, or when it ends.
//! Until what a stopped ring has left at the device has ended, no ring of the disk starts at all: an old write would land on a
//! newer one.
//!
//! Must not know messages or rings.

use crate::session::SessionShared;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The most sessions at a time.
pub(crate) const SESSIONS_MAX: usize = 2;

/// A session of a disk, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionView {
    /// Its rings run, or may; those of the other one wait.
    pub serving: bool,
    /// Its front end logs what is written into guest memory: its VM migrates.
    pub logging: bool,
}

#[derive(Default)]
struct State {
    live: Vec<Arc<SessionShared>>,
    /// Whose turn it is, by the session's number.
    serving: Option<u64>,
}

/// The sessions of one disk.
#[derive(Default)]
pub(crate) struct Sessions(Mutex<State>);

impl Sessions {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn enter(&self, session: &Arc<SessionShared>) {
        self.state().live.push(Arc::clone(session));
    }

    /// A session is over: its rings have stopped.
    pub(crate) fn leave(&self, session: &SessionShared) {
        self.state().live.retain(|other| other.number != session.number);
        self.give_turn(session);
    }

    /// Takes the turn, if nobody has it and `free` says that nothing is left of an earlier one. Whether `session` has it now, and
    /// whether it had it before.
    pub(crate) fn take_turn(&self, session: &SessionShared, free: impl FnOnce() -> bool) -> (bool, bool) {
        let mut state = self.state();
        let had = state.serving == Some(session.number);
        let has = (had || state.serving.is_none()) && free();
        if has {
            state.serving = Some(session.number);
        }
        (has, had)
    }

    /// Whether another session has the turn.
    pub(crate) fn is_anothers_turn(&self, session: &SessionShared) -> bool {
        self.state().serving.is_some_and(|number| number != session.number)
    }

    /// Gives the turn up, if `session` has it: none of its rings runs.
    pub(crate) fn give_turn(&self, session: &SessionShared) {
        let mut state = self.state();
        if state.serving == Some(session.number) {
            state.serving = None;
            state.live.iter().filter(|other| other.number != session.number).for_each(|other| other.wake());
        }
    }

    /// All of them look at what has changed.
    pub(crate) fn wake(&self) {
        self.state().live.iter().for_each(|session| session.wake());
    }

    pub(crate) fn view(&self) -> Vec<SessionView> {
        let state = self.state();
        let view = |session: &Arc<SessionShared>| SessionView {
            serving: state.serving == Some(session.number),
            logging: session.logging.load(Ordering::Acquire),
        };
        state.live.iter().map(view).collect()
    }
}
