//! The world: one clock, one network, and the reactors that live in it.

use crate::driver::SimDriver;
use crate::net::Net;
use crate::random::Random;
use hawser_runtime::{Fd, Instant, Reactor, ReactorConfig, Runtime};
use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

/// How a world behaves.
#[derive(Clone, Copy, Debug)]
pub struct WorldConfig {
    /// Everything follows from it.
    pub seed: u64,
    /// The longest that bytes are under way.
    pub delay_max: Duration,
}

impl WorldConfig {
    /// A quick local network.
    #[must_use]
    pub fn new(seed: u64) -> WorldConfig {
        WorldConfig { seed, delay_max: Duration::from_micros(300) }
    }
}

pub(crate) struct State {
    pub(crate) now: Instant,
    pub(crate) random: Random,
    pub(crate) net: Net,
    pub(crate) delay_max: Duration,
    /// When each reactor wants to be woken.
    pub(crate) wake_at: Vec<Instant>,
    /// When operations under way end.
    pub(crate) due: Vec<Instant>,
}

/// A simulated world. Cheap to clone: all clones are the same world.
#[derive(Clone)]
pub struct World {
    pub(crate) state: Rc<RefCell<State>>,
}

/// Passes that reactors may be busy without time passing; more is somebody waking itself for ever.
const STEPS_MAX: u32 = 1_000_000;

impl World {
    /// A new world at time 1 s.
    #[must_use]
    pub fn new(config: WorldConfig) -> World {
        let state = State {
            now: Instant(1_000_000_000),
            random: Random::new(config.seed),
            net: Net::default(),
            delay_max: config.delay_max,
            wake_at: Vec::new(),
            due: Vec::new(),
        };
        World { state: Rc::new(RefCell::new(state)) }
    }

    /// A reactor that lives in this world.
    ///
    /// # Panics
    /// When the process has no descriptor left for its inbox.
    #[must_use]
    pub fn reactor(&self) -> Reactor {
        let index = {
            let mut state = self.state.borrow_mut();
            state.wake_at.push(Instant::NEVER);
            state.due.push(Instant::NEVER);
            state.wake_at.len() - 1
        };
        let driver = SimDriver::new(self.clone(), index);
        Reactor::simulated(ReactorConfig::default(), Box::new(driver)).expect("an eventfd for the inbox")
    }

    /// A listening socket for [`hawser_runtime::Op::Accept`].
    #[must_use]
    pub fn listen(&self, address: SocketAddr) -> Fd {
        let listener = self.state.borrow_mut().net.listen(address);
        Fd(crate::driver::LISTENER_BASE + i32::try_from(listener).unwrap_or(0))
    }

    /// The time now.
    #[must_use]
    pub fn now(&self) -> Instant {
        self.state.borrow().now
    }

    /// The world's own random numbers, for scenarios.
    #[must_use]
    pub fn below(&self, bound: u64) -> u64 {
        self.state.borrow_mut().random.below(bound)
    }

    /// Resets every connection to `address`: bytes under way are lost.
    pub fn reset_connections(&self, address: SocketAddr) {
        self.state.borrow_mut().net.reset_all(address);
    }

    /// Changes a bit of a byte on its way to or from `address`, past TCP's own checksum; says whether there was any.
    pub fn corrupt(&self, address: SocketAddr) -> bool {
        let state = &mut *self.state.borrow_mut();
        state.net.corrupt(address, &mut state.random)
    }

    /// Lets nothing through to or from `address` for `duration`; nothing is lost.
    pub fn silence(&self, address: SocketAddr, duration: Duration) {
        let mut state = self.state.borrow_mut();
        let until = state.now + duration;
        state.net.silence(address, until);
    }

    /// Refuses new connections to `address` from now on, or takes them again.
    pub fn set_down(&self, address: SocketAddr, down: bool) {
        for listener in &mut self.state.borrow_mut().net.listeners {
            if listener.address == address {
                listener.down = down;
            }
        }
    }

    /// Steps the reactors until `done` says so. Time passes when none of them has anything to do.
    ///
    /// # Errors
    /// When it is not done by `deadline`, or nothing will ever happen again: says which, with the time.
    pub fn run(
        &self,
        reactors: &mut [Reactor],
        deadline: Duration,
        mut done: impl FnMut() -> bool,
    ) -> Result<(), String> {
        let deadline = self.now() + deadline;
        let mut steps_at_this_time = 0u32;
        loop {
            let mut busy = false;
            let first = usize::try_from(self.below(reactors.len() as u64)).unwrap_or(0);
            let count = reactors.len();
            for turn in 0..count {
                let reactor = &mut reactors[(first + turn) % count];
                let runtime: Runtime = reactor.runtime().clone();
                busy |= runtime.enter(|| reactor.step());
                if done() {
                    return Ok(());
                }
            }
            if busy {
                steps_at_this_time += 1;
                if steps_at_this_time > STEPS_MAX {
                    return Err(format!("no end of work at {:?}", self.now()));
                }
                continue;
            }
            steps_at_this_time = 0;
            let mut state = self.state.borrow_mut();
            let now = state.now;
            let waits = state.wake_at.iter().chain(state.due.iter()).copied();
            let next = waits.chain(state.net.next_event(now)).filter(|at| *at > now).min();
            match next {
                None | Some(Instant::NEVER) => {
                    return Err(format!("nothing will ever happen again, at {now:?}"));
                }
                Some(at) if at > deadline => return Err(format!("not done by {deadline:?}")),
                Some(at) => state.now = at,
            }
        }
    }
}
