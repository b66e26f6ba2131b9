//! A reactor as seen by what runs on it: everything that the loop and its sources share, and [`Runtime`], the handle to it.
//!
//! Owns: the reactor's state. Must not know: in which order a pass of the loop does things ([`super::Reactor`]).

use super::handle::{ReactorHandle, Shared, WakeTask};
use super::source::{Event, INDEX_BITS, Source, SourceId};
use crate::executor::Executor;
use crate::op::{Driver, Fd, Op};
use crate::slab::Slab;
use crate::time::Instant;
use crate::timers::{TimerId, Timers};
use crate::uring::Uring;
use std::any::{Any, TypeId};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use std::sync::Arc;

pub(super) struct Entry {
    pub(super) id: SourceId,
    pub(super) source: Rc<RefCell<dyn Source>>,
    pub(super) events: Vec<Event>,
    pub(super) ready: bool,
    pub(super) watching: bool,
    /// It was armed, and has not been polled since: its notification will come.
    pub(super) armed: bool,
}

pub(super) enum AnyDriver {
    Uring(Box<Uring>),
    Other(Box<dyn Driver>),
}

/// Calls the driver: the real one without a table in between.
macro_rules! driver {
    ($self:expr, $driver:ident => $call:expr) => {
        match &mut *$self.driver.borrow_mut() {
            $crate::reactor::runtime::AnyDriver::Uring($driver) => $call,
            $crate::reactor::runtime::AnyDriver::Other($driver) => $call,
        }
    };
}
pub(super) use driver;

pub(super) struct Inner {
    pub(super) driver: RefCell<AnyDriver>,
    pub(super) now: Cell<Instant>,
    pub(super) timers: RefCell<Timers>,
    pub(super) sources: RefCell<Slab<Entry>>,
    /// How often each place among the sources was given out, modulo what fits into an id.
    pub(super) generations: RefCell<Vec<u32>>,
    pub(super) ready: RefCell<Vec<SourceId>>,
    pub(super) watching: RefCell<Vec<SourceId>>,
    pub(super) outstanding: Cell<u64>,
    pub(super) executor: Rc<Executor>,
    pub(super) locals: RefCell<HashMap<TypeId, Rc<dyn Any>>>,
    pub(super) shared: Arc<Shared>,
    pub(super) stop: Cell<bool>,
}

thread_local! {
    static CURRENT: RefCell<Option<Runtime>> = const { RefCell::new(None) };
}

/// A reactor as seen by what runs on it. Cheap to clone; stays on its thread.
#[derive(Clone)]
pub struct Runtime(pub(super) Rc<Inner>);

impl Runtime {
    /// The runtime of the reactor that runs on this thread.
    ///
    /// # Panics
    /// On a thread that runs no reactor.
    #[must_use]
    pub fn current() -> Runtime {
        CURRENT.with(|current| current.borrow().clone()).expect("called on a reactor's thread")
    }

    /// Runs `f` as on this reactor's thread: [`Runtime::current`] is this one meanwhile. For whoever steps reactors by hand.
    pub fn enter<T>(&self, f: impl FnOnce() -> T) -> T {
        let before = CURRENT.with(|current| current.borrow_mut().replace(self.clone()));
        let result = f();
        CURRENT.with(|current| *current.borrow_mut() = before);
        result
    }

    /// The time at the start of this pass: good enough for statistics and deadlines, and free.
    #[must_use]
    pub fn now(&self) -> Instant {
        self.0.now.get()
    }

    /// The time now, read afresh; also what [`Runtime::now`] says until the next pass.
    pub fn refresh_now(&self) -> Instant {
        let now = driver!(self.0, driver => driver.now());
        self.0.now.set(now);
        now
    }

    /// A random number: seeded in the simulator, not for secrets.
    #[must_use]
    pub fn random(&self) -> u64 {
        driver!(self.0, driver => driver.random())
    }

    /// A new TCP socket.
    ///
    /// # Errors
    /// As `socket(2)`.
    pub fn tcp_socket(&self, ipv6: bool) -> io::Result<Fd> {
        driver!(self.0, driver => driver.tcp_socket(ipv6))
    }

    /// Closes a socket of [`Runtime::tcp_socket`] or [`Op::Accept`]. No operation may name it any more.
    pub fn close(&self, fd: Fd) {
        driver!(self.0, driver => driver.close(fd));
    }

    /// Ends both directions of a connection, so that operations on it become terminal soon.
    pub fn shutdown(&self, fd: Fd) {
        driver!(self.0, driver => driver.shutdown(fd));
    }

    /// Takes a source in. It is not polled until something happens to it.
    ///
    /// # Panics
    /// With more than 2^20 sources.
    pub fn add_source(&self, source: Rc<RefCell<dyn Source>>) -> SourceId {
        let mut sources = self.0.sources.borrow_mut();
        let mut generations = self.0.generations.borrow_mut();
        let entry = Entry {
            id: SourceId(0),
            source,
            events: Vec::new(),
            ready: false,
            watching: false,
            armed: false,
        };
        let index = sources.insert(entry);
        assert!(index < 1 << INDEX_BITS, "too many sources on one reactor");
        if index == generations.len() {
            generations.push(0);
        }
        // The last generation is the names that are not sources.
        generations[index] = (generations[index] + 1) % ((1 << (32 - INDEX_BITS)) - 1);
        let id = SourceId(generations[index] << INDEX_BITS | u32::try_from(index).unwrap_or(0));
        sources.get_mut(index).expect("just inserted").id = id;
        id
    }

    /// Lets a source go, and its timers. Its operations must all be terminal; events of one that is not are dropped.
    pub fn remove_source(&self, id: SourceId) {
        let removed = {
            let mut sources = self.0.sources.borrow_mut();
            if sources.get(id.index()).is_some_and(|entry| entry.id == id) {
                sources.remove(id.index())
            } else {
                None
            }
        };
        self.0.watching.borrow_mut().retain(|other| *other != id);
        self.0.timers.borrow_mut().cancel_source(id);
        drop(removed);
    }

    /// From now on [`Source::peek`] and [`Source::arm`] of this source are called.
    pub fn watch(&self, id: SourceId) {
        let mut sources = self.0.sources.borrow_mut();
        if let Some(entry) = sources.get_mut(id.index()).filter(|entry| entry.id == id && !entry.watching) {
            entry.watching = true;
            self.0.watching.borrow_mut().push(id);
        }
    }

    /// Polls this source in this pass or the next.
    pub fn wake(&self, id: SourceId) {
        let mut sources = self.0.sources.borrow_mut();
        if let Some(entry) = sources.get_mut(id.index()).filter(|entry| entry.id == id && !entry.ready) {
            entry.ready = true;
            self.0.ready.borrow_mut().push(id);
        }
    }

    /// Starts an operation; its events come to `source` with `key`.
    ///
    /// # Safety
    /// Everything that `op` points to stays valid and in place until its last event has been delivered ([`Op`]).
    pub unsafe fn submit(&self, source: SourceId, key: u32, op: &Op) {
        // SAFETY: the caller's promise is the driver's condition.
        driver!(self.0, driver => unsafe { driver.submit(user(source, key), op) });
    }

    /// Asks that the operation that `source` submitted with `key` be given up. It completes as cancelled, or as it would
    /// have; only then is it terminal.
    pub fn cancel(&self, source: SourceId, key: u32) {
        driver!(self.0, driver => driver.cancel(user(source, key)));
    }

    /// From now on `source` gets an event with `key` each time that `fd` becomes readable: see [`Op::PollReadable`].
    pub fn poll_readable(&self, source: SourceId, key: u32, fd: Fd) {
        // SAFETY: the operation names no memory.
        unsafe { self.submit(source, key, &Op::PollReadable { fd }) };
    }

    /// Sets a timer: at `deadline`, or soon after, `source` gets [`Event::Timer`] with `key`.
    pub fn timer(&self, source: SourceId, deadline: Instant, key: u32) -> TimerId {
        self.0.timers.borrow_mut().insert(deadline, source, key)
    }

    /// Cancels a timer that has not fired; else does nothing. An event that is already on its way still comes.
    pub fn cancel_timer(&self, timer: TimerId) {
        self.0.timers.borrow_mut().cancel(timer);
    }

    /// Says that `count` requests went out to the network: while any are out, this reactor does not spin.
    pub fn add_outstanding(&self, count: u64) {
        self.0.outstanding.set(self.0.outstanding.get() + count);
    }

    /// Says that `count` requests came back from the network.
    ///
    /// # Panics
    /// When more come back than went out.
    pub fn sub_outstanding(&self, count: u64) {
        self.0
            .outstanding
            .set(self.0.outstanding.get().checked_sub(count).expect("came back without going out"));
    }

    /// This reactor's own instance of `T`, made on first use: for what a layer keeps once per reactor.
    pub fn local<T: Any + Default>(&self) -> Rc<T> {
        let mut locals = self.0.locals.borrow_mut();
        let local = locals.entry(TypeId::of::<T>()).or_insert_with(|| Rc::new(T::default()));
        Rc::clone(local).downcast::<T>().expect("stored under its own type")
    }

    /// Runs what may block on a thread of its own, which ends with it. In the simulator it does not block, and is done when its driver says.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn on_thread(&self, name: &str, job: impl FnOnce() + Send + 'static) -> io::Result<()> {
        if matches!(*self.0.driver.borrow(), AnyDriver::Uring(_)) {
            let job = move || {
                super::thread::leave_cpu();
                job();
            };
            return std::thread::Builder::new().name(name.to_owned()).spawn(job).map(drop);
        }
        let takes = driver!(self.0, driver => driver.thread_takes());
        if takes.is_zero() {
            job();
        } else {
            let sleep = self.sleep(takes);
            self.spawn(async move {
                sleep.await;
                job();
            });
        }
        Ok(())
    }

    /// For other threads to reach this reactor.
    #[must_use]
    pub fn handle(&self) -> ReactorHandle {
        ReactorHandle(Arc::clone(&self.0.shared))
    }

    /// Ends the loop after this pass.
    pub fn stop(&self) {
        self.0.stop.set(true);
    }

    /// Whether the loop ends after this pass, or has ended: what lives here goes, as it is.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.0.stop.get()
    }

    pub(crate) fn executor(&self) -> &Rc<Executor> {
        &self.0.executor
    }

    pub(crate) fn wake_task_here(&self, task: usize) {
        self.0.shared.wake_task(task);
    }
}

/// What a driver gives back with an operation's events.
fn user(source: SourceId, key: u32) -> u64 {
    u64::from(source.0) << 32 | u64::from(key)
}
