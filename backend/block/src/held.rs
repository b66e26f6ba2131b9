//! A device for tests of the layers above, over another one: requests that a test chooses are kept from it until the test lets
//! them go, as by a disk that hangs, or a target that answers minutes late.

use crate::channel::{Channel, Device, DeviceState};
use crate::geometry::Geometry;
use crate::request::{Completion, Request};
use crate::stats::StatsSet;
use hawser_runtime::{ReactorHandle, Runtime, SourceId};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

type Which = Box<dyn FnMut(&Request) -> bool + Send>;

#[derive(Default)]
struct State {
    which: Option<Which>,
    held: usize,
    users: Vec<(ReactorHandle, SourceId)>,
}

/// A device that holds requests back.
pub struct HeldDevice {
    inner: Arc<dyn Device>,
    state: Arc<Mutex<State>>,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl HeldDevice {
    /// Holds nothing back yet.
    #[must_use]
    pub fn new(inner: Arc<dyn Device>) -> HeldDevice {
        HeldDevice { inner, state: Arc::default() }
    }

    /// From now on, requests of which `which` says so do not reach the device; nor does an abort end them.
    pub fn hold(&self, which: impl FnMut(&Request) -> bool + Send + 'static) {
        lock(&self.state).which = Some(Box::new(which));
    }

    /// Holds the first request back of which `which` says so.
    pub fn hold_one(&self, mut which: impl FnMut(&Request) -> bool + Send + 'static) {
        let mut caught = false;
        self.hold(move |request| {
            let catches = !caught && which(request);
            caught |= catches;
            catches
        });
    }

    /// How many are held back now.
    #[must_use]
    pub fn held(&self) -> usize {
        lock(&self.state).held
    }

    /// Lets all go, and holds no more back.
    pub fn release(&self) {
        let mut state = lock(&self.state);
        state.which = None;
        let users = state.users.clone();
        drop(state);
        for (reactor, user) in users {
            reactor.run(move |runtime| runtime.wake(user));
        }
    }
}

impl Device for HeldDevice {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn geometry(&self) -> Option<Geometry> {
        self.inner.geometry()
    }

    fn state(&self) -> DeviceState {
        self.inner.state()
    }

    fn uuid(&self) -> [u8; 16] {
        self.inner.uuid()
    }

    fn cache_identity(&self) -> Option<[u8; 16]> {
        self.inner.cache_identity()
    }

    fn cache_losses(&self) -> u64 {
        self.inner.cache_losses()
    }

    fn owes_a_loss(&self) -> bool {
        self.inner.owes_a_loss()
    }

    fn leaves_payload(&self) -> bool {
        self.inner.leaves_payload()
    }

    fn quiesce_time(&self) -> Duration {
        self.inner.quiesce_time()
    }

    fn has_unknown_writes(&self) -> bool {
        self.inner.has_unknown_writes()
    }

    fn has_left_behind(&self) -> bool {
        self.inner.has_left_behind()
    }

    fn subscribe(&self, listener: Box<dyn Fn() + Send + Sync>) {
        self.inner.subscribe(listener);
    }

    fn channel(&self, runtime: &Runtime, user: SourceId) -> Box<dyn Channel> {
        lock(&self.state).users.push((runtime.handle(), user));
        let inner = self.inner.channel(runtime, user);
        Box::new(HeldChannel { inner, state: Arc::clone(&self.state), held: Vec::new() })
    }

    fn stats(&self) -> Arc<StatsSet> {
        self.inner.stats()
    }
}

struct HeldChannel {
    inner: Box<dyn Channel>,
    state: Arc<Mutex<State>>,
    held: Vec<Request>,
}

impl Channel for HeldChannel {
    fn submit(&mut self, batch: &mut Vec<Request>) {
        let mut state = lock(&self.state);
        if let Some(which) = &mut state.which {
            let held: Vec<Request> = batch.extract_if(.., |request| which(request)).collect();
            state.held += held.len();
            self.held.extend(held);
        }
        drop(state);
        self.inner.submit(batch);
    }

    fn reap(&mut self, ended: &mut Vec<Completion>) {
        let mut state = lock(&self.state);
        if state.which.is_none() && !self.held.is_empty() {
            state.held -= self.held.len();
            drop(state);
            self.inner.submit(&mut self.held);
        }
        self.inner.reap(ended);
    }

    fn is_working(&self) -> bool {
        self.inner.is_working()
    }

    fn abort(&mut self) {
        self.inner.abort();
    }

    fn leave(&mut self) {
        self.inner.leave();
    }
}
