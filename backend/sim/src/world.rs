//! The world: one clock, one network, and the reactors that live in it.

use crate::driver::SimDriver;
use crate::net::{Net, Side, Sides};
use crate::random::Random;
use crate::verbs::{Counts, Verbs};
use hawser_runtime::{Fd, Instant, Reactor, ReactorConfig, ReactorHandle, Runtime};
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
    /// By index; those that were killed too.
    pub(crate) reactors: Vec<ReactorHandle>,
    /// The others' indices.
    live: Vec<usize>,
    /// When each reactor wants to be woken.
    pub(crate) wake_at: Vec<Instant>,
    /// When operations under way end.
    pub(crate) due: Vec<Instant>,
    /// Which reactors' drivers have operations under way.
    pub(crate) is_waited_for: Vec<bool>,
    /// Where hosts reach targets over RDMA.
    pub(crate) verbs: Option<Verbs>,
    trace: u64,
}

impl State {
    /// Takes down that something happened.
    pub(crate) fn trace(&mut self, what: &[u64]) {
        for word in what {
            self.trace = (self.trace.rotate_left(5) ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        }
    }
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
            reactors: Vec::new(),
            live: Vec::new(),
            wake_at: Vec::new(),
            due: Vec::new(),
            is_waited_for: Vec::new(),
            verbs: None,
            trace: 0,
        };
        World { state: Rc::new(RefCell::new(state)) }
    }

    /// From now on this thread's table of verbs ([`crate::verbs::TABLE`]) acts in this world, with its clock and its faults.
    pub fn with_verbs(&self) {
        let state = &mut *self.state.borrow_mut();
        state.verbs = Some(Verbs::new(state.random.next_u64(), state.now));
    }

    fn verbs(&self) -> Option<Verbs> {
        self.state.borrow().verbs
    }

    /// What was seen of verbs.
    #[must_use]
    pub fn verbs_counts(&self) -> Counts {
        self.verbs().map(Verbs::counts).unwrap_or_default()
    }

    /// Whether a peer, or a request to a device that is under way, may still reach any of this memory.
    #[must_use]
    pub fn reaches(&self, memory: &[u8]) -> bool {
        self.verbs().is_some_and(|verbs| verbs.reaches(memory.as_ptr() as u64, memory.len() as u64))
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
            state.is_waited_for.push(false);
            state.wake_at.len() - 1
        };
        let driver = SimDriver::new(self.clone(), index);
        let reactor = Reactor::simulated(ReactorConfig::default(), Box::new(driver));
        let reactor = reactor.expect("an eventfd for the inbox");
        {
            let mut state = self.state.borrow_mut();
            state.reactors.push(reactor.runtime().handle());
            state.live.push(index);
        }
        reactor
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

    /// A number that follows from everything that has happened: the same seed gives the same one.
    #[must_use]
    pub fn trace(&self) -> u64 {
        self.state.borrow().trace
    }

    /// Takes down in the trace what a scenario has done or seen.
    pub fn note(&self, what: &[u64]) {
        self.state.borrow_mut().trace(what);
    }

    /// Ends the life of a reactor as `kill -9` does its process's: at once, and the kernel closes its sockets.
    pub fn kill(&self, reactor: Reactor) {
        let index = {
            let state = &mut *self.state.borrow_mut();
            let index = state.reactors.iter().position(|handle| handle.same(&reactor.runtime().handle()));
            if let Some(index) = index {
                state.net.kill(index, state.now, &mut state.random);
                if let Some(verbs) = state.verbs {
                    verbs.kill(index);
                }
            }
            index
        };
        crate::disk::kill(reactor.runtime());
        reactor.runtime().stop();
        drop(reactor);
        if let Some(index) = index {
            let state = &mut *self.state.borrow_mut();
            state.wake_at[index] = Instant::NEVER;
            state.due[index] = Instant::NEVER;
            state.is_waited_for[index] = false;
            state.live.retain(|live| *live != index);
        }
    }

    /// Resets every connection to `address`: bytes under way are lost.
    pub fn reset_connections(&self, address: SocketAddr) {
        self.reset(address, Sides::Both, 1000, Duration::ZERO);
    }

    /// Resets connections to `address` at these ends, all or each by chance. What was on its way to the other end, if that is
    /// not reset, is held for so long and arrives then.
    pub fn reset(&self, address: SocketAddr, sides: Sides, permille: u64, hold: Duration) {
        let state = &mut *self.state.borrow_mut();
        state.net.reset(address, sides, (permille, hold), state.now, &mut state.random);
        if let Some(verbs) = state.verbs {
            verbs.reset(address, sides, permille, hold);
        }
    }

    /// Ends one direction of connections to `address`, each by chance: that side sees the end of them.
    pub fn half_close(&self, address: SocketAddr, side: Side, permille: u64) {
        let state = &mut *self.state.borrow_mut();
        state.net.half_close(address, side, permille, &mut state.random);
        if let Some(verbs) = state.verbs {
            verbs.half_close(address, side, permille);
        }
    }

    /// Holds what is on its way to that side of connections to `address`, and what will be, each connection by chance.
    pub fn hold(&self, address: SocketAddr, side: Side, permille: u64, duration: Duration) {
        let state = &mut *self.state.borrow_mut();
        let until = state.now + duration;
        state.net.hold(address, side, permille, until, &mut state.random);
        if let Some(verbs) = state.verbs {
            verbs.hold(address, side, permille, until);
        }
    }

    /// In so many of 1000 connections that a host ends, that is lost on the way and what it sent before is held up.
    pub fn lose_ends(&self, permille: u64) {
        self.state.borrow_mut().net.lost_ends_permille = permille;
        if let Some(verbs) = self.verbs() {
            verbs.lose_ends(permille);
        }
    }

    /// Ends all silences and holds.
    pub fn clear_network(&self) {
        let state = &mut *self.state.borrow_mut();
        state.net.lost_ends_permille = 0;
        state.net.end_silences(state.now);
        if let Some(verbs) = state.verbs {
            verbs.clear_network();
        }
    }

    /// When connections were asked for, and where.
    #[must_use]
    pub fn connects(&self) -> Vec<(SocketAddr, Instant)> {
        let mut connects = self.state.borrow().net.connects.clone();
        connects.extend(self.verbs().into_iter().flat_map(Verbs::connects));
        connects
    }

    /// Changes a bit of a byte on its way to or from `address`, past TCP's own checksum; says whether there was any.
    pub fn corrupt(&self, address: SocketAddr) -> bool {
        let state = &mut *self.state.borrow_mut();
        state.net.corrupt(address, &mut state.random)
    }

    /// Lets nothing through to or from `address` for `duration`; nothing is lost.
    pub fn silence(&self, address: SocketAddr, duration: Duration) {
        self.silence_to(address, Sides::Both, duration);
    }

    /// Lets nothing arrive at these ends of connections to `address` for `duration`; nothing is lost.
    pub fn silence_to(&self, address: SocketAddr, sides: Sides, duration: Duration) {
        let mut state = self.state.borrow_mut();
        let until = state.now + duration;
        state.net.silence(address, sides, until);
        if let Some(verbs) = state.verbs {
            verbs.silence(address, sides, until);
        }
    }

    /// Refuses new connections to `address` from now on, or takes them again.
    pub fn set_down(&self, address: SocketAddr, down: bool) {
        for listener in &mut self.state.borrow_mut().net.listeners {
            if listener.address == address {
                listener.down = down;
            }
        }
        if let Some(verbs) = self.verbs() {
            verbs.set_down(address, down);
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
        done: impl FnMut() -> bool,
    ) -> Result<(), String> {
        let deadline = self.now() + deadline;
        match self.run_until(reactors, deadline, done)? {
            true => Ok(()),
            false => Err(format!("not done by {deadline:?}")),
        }
    }

    /// A step of this reactor, whose number in this world it is, would find nothing to do.
    fn rests(&self, reactor: &Reactor, index: Option<usize>) -> bool {
        let (Some(index), Some(until)) = (index, reactor.idle_until()) else { return false };
        let state = &mut *self.state.borrow_mut();
        if state.is_waited_for[index] || state.verbs.is_some() {
            return false;
        }
        state.wake_at[index] = until;
        true
    }

    /// Steps the reactors until `done` says so, or until it is `at`; says whether it is done. `done` is asked whenever something has
    /// happened, or time has passed.
    ///
    /// # Errors
    /// When reactors are busy for ever without time passing.
    pub fn run_until(
        &self,
        reactors: &mut [Reactor],
        at: Instant,
        mut done: impl FnMut() -> bool,
    ) -> Result<bool, String> {
        let mut steps_at_this_time = 0u32;
        let number = |reactor: &Reactor| {
            let handle = reactor.runtime().handle();
            self.state.borrow().reactors.iter().rposition(|other| other.same(&handle))
        };
        let numbers: Vec<Option<usize>> = reactors.iter().map(number).collect();
        let mut is_news = true;
        loop {
            let mut busy = false;
            let count = reactors.len();
            let first = usize::try_from(self.below(count.max(1) as u64)).unwrap_or(0);
            for turn in 0..count {
                let at = (first + turn) % count;
                let reactor = &mut reactors[at];
                if !self.rests(reactor, numbers[at]) {
                    let runtime: Runtime = reactor.runtime().clone();
                    busy |= runtime.enter(|| reactor.step());
                    is_news = true;
                }
                if std::mem::take(&mut is_news) && done() {
                    return Ok(true);
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
            if now >= at {
                return Ok(false);
            }
            let waits = state.live.iter().flat_map(|index| [state.wake_at[*index], state.due[*index]]);
            let waits = waits.chain(state.verbs.map(Verbs::due));
            let next = waits.chain(state.net.next_event(now)).filter(|at| *at > now).min();
            state.now = next.map_or(at, |next| next.min(at));
            is_news = true;
        }
    }
}
