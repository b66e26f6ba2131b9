//! The sessions of a disk: two at most, of which one serves.
//!
//! A VM that migrates has two front ends for a while: that of its source, whose rings run, and that of its destination, which
//! negotiates, reads the configuration and says where its memory and rings are. The rings of a disk are those of one session at
//! a time, whoever that is: the turn changes hands when the session that has it ends, or has stopped all its rings while it logs
//! what is written, for its VM migrates. Who stops its rings without that keeps the turn: a client that is not the VM's would
//! have the disk else at the next reboot.
//! Until what a stopped ring has left at the device has ended, no ring of the disk starts at all: an old write would land on a
//! newer one.
//!
//! Must not know messages or rings.

use crate::connection;
use crate::session::SessionShared;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
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

struct Live {
    session: Arc<SessionShared>,
    /// To see that its front end has gone before it sees that itself.
    connection: UnixStream,
}

#[derive(Default)]
struct State {
    live: Vec<Live>,
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

    pub(crate) fn enter(&self, session: &Arc<SessionShared>, connection: UnixStream) {
        self.state().live.push(Live { session: Arc::clone(session), connection });
    }

    /// A session is over: its rings have stopped.
    pub(crate) fn leave(&self, session: &SessionShared) {
        self.state().live.retain(|other| other.session.number != session.number);
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

    /// Whether another session has the turn whose front end has gone: it drains its rings, and ends.
    pub(crate) fn is_departed_ones_turn(&self, session: &SessionShared) -> bool {
        let state = self.state();
        state.live.iter().any(|other| {
            let number = other.session.number;
            number != session.number
                && state.serving == Some(number)
                && connection::is_closed(other.connection.as_fd())
        })
    }

    /// Gives the turn up, if `session` has it: none of its rings runs.
    pub(crate) fn give_turn(&self, session: &SessionShared) {
        let mut state = self.state();
        if state.serving == Some(session.number) {
            state.serving = None;
            let others = state.live.iter().map(|live| &live.session);
            others.filter(|other| other.number != session.number).for_each(|other| other.wake());
        }
    }

    /// All of them look at what has changed.
    pub(crate) fn wake(&self) {
        self.state().live.iter().for_each(|live| live.session.wake());
    }

    pub(crate) fn view(&self) -> Vec<SessionView> {
        let state = self.state();
        let view = |Live { session, .. }: &Live| SessionView {
            serving: state.serving == Some(session.number),
            logging: session.logging.load(Ordering::Acquire),
        };
        state.live.iter().map(view).collect()
    }
}
