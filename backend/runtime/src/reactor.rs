//! The reactor: one thread, one driver, and everything that it owns.
//!
//! One pass of the loop: deliver completions, messages and due timers; poll each source that has something; poll the
//! sources that watch shared memory ([`Source::peek`]); hand new operations to the driver. When a pass did nothing, the
//! reactor goes on looking for up to `poll_us`, then asks every watching source to arm its notification
//! ([`Source::arm`]: arm, fence, look again) and sleeps in the driver. It does not spin while requests are out on the
//! network ([`Runtime::add_outstanding`]), and it spins less where spinning has not paid lately.

use crate::executor::Executor;
use crate::op::{Completed, Driver, Fd, Op, Wait};
use crate::slab::Slab;
use crate::time::Instant;
use crate::timers::{TimerId, Timers};
use crate::uring::Uring;
use std::any::{Any, TypeId};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};

/// Something that lives on a reactor and reacts to events: a virtqueue, a connection, a device's channel.
pub trait Source {
    /// Handles what has happened: the events of its operations and timers, or none after a [`Runtime::wake`].
    /// Takes events out of `events`; what it leaves is discarded.
    fn poll(&mut self, runtime: &Runtime, events: &mut Vec<Event>);

    /// For a source that watches shared memory ([`Runtime::watch`]): is there work that no event has told of?
    /// Must be cheap: called on every pass while the reactor is awake.
    fn peek(&mut self) -> bool {
        false
    }

    /// For a watching source, before the reactor sleeps: make the other side notify from now on, then look again.
    /// Returns whether there is work after all.
    fn arm(&mut self) -> bool {
        false
    }
}

/// One thing that happened to a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "key: what the operation or timer was given")]
pub enum Event {
    /// The operation submitted with `key` completed, or had one of its events.
    Op { key: u32, completed: Completed },
    /// The timer that was set with `key` is due.
    Timer { key: u32 },
}

/// Names a source on its reactor. Not used again for another source before 4095 others had its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SourceId(u32);

const INDEX_BITS: u32 = 20;

/// How often one pass looks for sources that its own sources woke: device, volume's user, connection, and one to spare.
const READY_ROUNDS: usize = 4;

impl SourceId {
    pub(crate) const EXECUTOR: SourceId = SourceId(u32::MAX - 1);
    const INBOX: SourceId = SourceId(u32::MAX - 2);

    fn index(self) -> usize {
        (self.0 & ((1 << INDEX_BITS) - 1)) as usize
    }
}

/// How a reactor behaves.
#[derive(Clone, Copy, Debug, Default)]
pub struct ReactorConfig {
    /// The CPU to run on; `None` leaves it to the scheduler.
    pub cpu: Option<usize>,
    /// How long an idle reactor looks for work before it sleeps, in microseconds; 0 = not at all.
    pub poll_us: u32,
}

type Message = Box<dyn FnOnce(&Runtime) + Send>;

struct Entry {
    id: SourceId,
    source: Rc<RefCell<dyn Source>>,
    events: Vec<Event>,
    ready: bool,
    watching: bool,
    /// It was armed, and has not been polled since: its notification will come.
    armed: bool,
}

enum AnyDriver {
    Uring(Box<Uring>),
    Other(Box<dyn Driver>),
}

macro_rules! driver {
    ($self:expr, $driver:ident => $call:expr) => {
        match &mut *$self.driver.borrow_mut() {
            AnyDriver::Uring($driver) => $call,
            AnyDriver::Other($driver) => $call,
        }
    };
}

struct Inner {
    driver: RefCell<AnyDriver>,
    now: Cell<Instant>,
    timers: RefCell<Timers>,
    sources: RefCell<Slab<Entry>>,
    /// How often each place among the sources was given out, modulo what fits into an id.
    generations: RefCell<Vec<u32>>,
    ready: RefCell<Vec<SourceId>>,
    watching: RefCell<Vec<SourceId>>,
    outstanding: Cell<u64>,
    executor: Rc<Executor>,
    locals: RefCell<HashMap<TypeId, Rc<dyn Any>>>,
    shared: Arc<Shared>,
    stop: Cell<bool>,
}

/// What other threads may touch.
struct Shared {
    /// `None` once the reactor has ended: nobody will look any more.
    messages: Mutex<Option<Vec<Message>>>,
    tasks: Mutex<Vec<usize>>,
    pending: AtomicBool,
    /// The reactor sleeps, or is about to: a sender must write to `wake`.
    sleeping: AtomicBool,
    wake: OwnedFd,
    stats: ReactorStats,
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

fn bump(counter: &AtomicU64) {
    counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
}

pub(crate) trait WakeTask: Send + Sync {
    fn wake_task(&self, task: usize);
}

impl Shared {
    fn signal(&self) {
        // Pairs with the fence in `prepare_to_sleep`: either we see `sleeping`, or the reactor sees `pending`.
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

thread_local! {
    static CURRENT: RefCell<Option<Runtime>> = const { RefCell::new(None) };
}

/// A reactor as seen by what runs on it. Cheap to clone; stays on its thread.
#[derive(Clone)]
pub struct Runtime(Rc<Inner>);

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

    /// For other threads to reach this reactor.
    #[must_use]
    pub fn handle(&self) -> ReactorHandle {
        ReactorHandle(Arc::clone(&self.0.shared))
    }

    /// Ends the loop after this pass.
    pub fn stop(&self) {
        self.0.stop.set(true);
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

/// A reactor as seen from other threads.
#[derive(Clone)]
pub struct ReactorHandle(Arc<Shared>);

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

/// The loop itself. Made and run on one thread.
pub struct Reactor {
    runtime: Runtime,
    poll_ns_max: u64,
    /// How long to spin now: between 0 and `poll_ns_max`, by what spinning brought lately.
    poll_ns: u64,
    idle_since: Option<Instant>,
    completed: Vec<(u64, Completed)>,
    messages: Vec<Message>,
    tasks: Vec<usize>,
    running: Vec<SourceId>,
    events: Vec<Event>,
}

impl Reactor {
    /// A reactor over a real io_uring, for the calling thread.
    ///
    /// # Errors
    /// When io_uring or an eventfd cannot be had.
    pub fn new(config: ReactorConfig) -> io::Result<Reactor> {
        Reactor::with_driver(config, AnyDriver::Uring(Box::new(Uring::new()?)))
    }

    /// A reactor over any driver: the simulator's.
    ///
    /// # Errors
    /// When an eventfd cannot be had.
    pub fn simulated(config: ReactorConfig, driver: Box<dyn Driver>) -> io::Result<Reactor> {
        Reactor::with_driver(config, AnyDriver::Other(driver))
    }

    fn with_driver(config: ReactorConfig, driver: AnyDriver) -> io::Result<Reactor> {
        // SAFETY: plain system call without pointers.
        let wake = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if wake < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `wake` is a descriptor that we just made and nobody else owns.
        let wake = unsafe { OwnedFd::from_raw_fd(wake) };
        let shared = Arc::new(Shared {
            messages: Mutex::new(Some(Vec::new())),
            tasks: Mutex::default(),
            pending: AtomicBool::new(false),
            sleeping: AtomicBool::new(false),
            wake,
            stats: ReactorStats::default(),
        });
        let runtime = Runtime(Rc::new(Inner {
            driver: RefCell::new(driver),
            now: Cell::new(Instant::default()),
            timers: RefCell::default(),
            sources: RefCell::default(),
            generations: RefCell::default(),
            ready: RefCell::default(),
            watching: RefCell::default(),
            outstanding: Cell::new(0),
            executor: Rc::default(),
            locals: RefCell::default(),
            shared,
            stop: Cell::new(false),
        }));
        runtime.refresh_now();
        let fd = Fd(runtime.0.shared.wake.as_raw_fd());
        runtime.poll_readable(SourceId::INBOX, 0, fd);
        let poll_ns_max = u64::from(config.poll_us) * 1000;
        Ok(Reactor {
            idle_since: None,
            runtime,
            poll_ns_max,
            poll_ns: poll_ns_max,
            completed: Vec::with_capacity(1024),
            messages: Vec::new(),
            tasks: Vec::new(),
            running: Vec::with_capacity(64),
            events: Vec::with_capacity(1024),
        })
    }

    /// What runs on this reactor sees it through this.
    #[must_use]
    pub fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// Runs until [`Runtime::stop`].
    pub fn run(&mut self) {
        let runtime = self.runtime.clone();
        runtime.enter(|| {
            while !self.runtime.0.stop.get() {
                self.step();
            }
        });
    }

    /// One pass of the loop, which may sleep at its end. Returns whether there was anything to do: a reactor that found
    /// nothing has told its driver until when it would sleep.
    pub fn step(&mut self) -> bool {
        let busy = self.pass();
        let inner = Rc::clone(&self.runtime.0);
        let stats = &inner.shared.stats;
        bump(&stats.passes);
        if busy {
            bump(&stats.busy_passes);
            driver!(inner, driver => driver.enter(Wait::No));
            self.idle_since = None;
            return true;
        }
        let idle_since = *self.idle_since.get_or_insert(inner.now.get());
        let spin = if self.may_spin() { self.poll_ns } else { 0 };
        if inner.now.get().ns_since(idle_since) < spin {
            driver!(inner, driver => driver.enter(Wait::No));
            std::hint::spin_loop();
            return true;
        }
        self.sleep()
    }

    /// Spinning makes sense only for work that shared memory brings; what is out on the network wakes us by itself.
    fn may_spin(&self) -> bool {
        self.runtime.0.outstanding.get() == 0 && !self.runtime.0.watching.borrow().is_empty()
    }

    /// Arms every source and sleeps, unless one of them has work after all: then returns true at once.
    fn sleep(&mut self) -> bool {
        let inner = Rc::clone(&self.runtime.0);
        inner.shared.sleeping.store(true, Ordering::SeqCst);
        let mut stay_awake = inner.shared.pending.load(Ordering::SeqCst);
        let watching = inner.watching.borrow().len();
        for index in 0..watching {
            let Some(id) = inner.watching.borrow().get(index).copied() else { break };
            if self.set_armed(id, true) {
                continue;
            }
            if self.with_source(id, |source| source.arm()) == Some(true) {
                self.runtime.wake(id);
                stay_awake = true;
            }
        }
        stay_awake |= !inner.ready.borrow().is_empty() || inner.stop.get();
        if stay_awake {
            inner.shared.sleeping.store(false, Ordering::SeqCst);
            driver!(inner, driver => driver.enter(Wait::No));
            return true;
        }
        let deadline = inner.timers.borrow().next_deadline().unwrap_or(Instant::NEVER);
        bump(&inner.shared.stats.sleeps);
        let (slept_from, could_have_spun) = (inner.now.get(), self.may_spin());
        driver!(inner, driver => driver.enter(Wait::Until(deadline)));
        inner.shared.sleeping.store(false, Ordering::SeqCst);
        let slept = self.runtime.refresh_now().ns_since(slept_from);
        // As the kernel's haltpoll: work that came soon after we slept would have been found by spinning; work that
        // came late shows that spinning was in vain.
        if could_have_spun {
            self.poll_ns = if slept < self.poll_ns_max { self.poll_ns_max } else { self.poll_ns / 2 };
        }
        false
    }

    /// Delivers everything that has happened. Returns whether there was anything.
    fn pass(&mut self) -> bool {
        let inner = Rc::clone(&self.runtime.0);
        let now = self.runtime.refresh_now();
        let mut busy = false;

        let mut completed = std::mem::take(&mut self.completed);
        driver!(inner, driver => driver.reap(&mut completed));
        for (user, completed) in completed.drain(..) {
            busy = true;
            self.deliver(user, completed);
        }
        self.completed = completed;

        loop {
            let due = inner.timers.borrow_mut().pop_due(now);
            let Some((source, key)) = due else { break };
            busy = true;
            if source == SourceId::EXECUTOR {
                inner.executor.complete(key, Completed { result: 0, more: false });
            } else {
                self.push_event(source, Event::Timer { key });
            }
        }

        if inner.shared.pending.load(Ordering::Relaxed) {
            busy = true;
            self.run_inbox();
        }

        // A channel's events wake its user, whose answer should leave with the same enter: a few rounds, but not for ever.
        for _ in 0..READY_ROUNDS {
            std::mem::swap(&mut self.running, &mut inner.ready.borrow_mut());
            if self.running.is_empty() {
                break;
            }
            busy = true;
            let mut running = std::mem::take(&mut self.running);
            for id in running.drain(..) {
                self.poll_source(id);
            }
            self.running = running;
        }

        let watching = inner.watching.borrow().len();
        for index in 0..watching {
            let Some(id) = inner.watching.borrow().get(index).copied() else { break };
            if !self.is_armed(id) && self.with_source(id, |source| source.peek()) == Some(true) {
                busy = true;
                self.poll_source(id);
            }
        }
        busy || !inner.ready.borrow().is_empty()
    }

    fn deliver(&mut self, user: u64, completed: Completed) {
        let source = SourceId(u32::try_from(user >> 32).unwrap_or(u32::MAX));
        let key = u32::try_from(user & u64::from(u32::MAX)).unwrap_or(u32::MAX);
        if source == SourceId::EXECUTOR {
            self.runtime.0.executor.complete(key, completed);
        } else if source == SourceId::INBOX {
            if !completed.more {
                assert!(completed.result >= 0, "the inbox's poll failed: {completed:?}");
                let fd = Fd(self.runtime.0.shared.wake.as_raw_fd());
                self.runtime.poll_readable(SourceId::INBOX, 0, fd);
            }
        } else {
            self.push_event(source, Event::Op { key, completed });
        }
    }

    fn push_event(&self, id: SourceId, event: Event) {
        let inner = &self.runtime.0;
        let mut sources = inner.sources.borrow_mut();
        if let Some(entry) = sources.get_mut(id.index()).filter(|entry| entry.id == id) {
            entry.events.push(event);
            if !entry.ready {
                entry.ready = true;
                inner.ready.borrow_mut().push(id);
            }
        }
    }

    fn run_inbox(&mut self) {
        let shared = Arc::clone(&self.runtime.0.shared);
        shared.pending.store(false, Ordering::SeqCst);
        if let Some(messages) = &mut *shared.messages.lock().unwrap_or_else(PoisonError::into_inner) {
            std::mem::swap(&mut self.messages, messages);
        }
        let mut messages = std::mem::take(&mut self.messages);
        for message in messages.drain(..) {
            message(&self.runtime);
        }
        self.messages = messages;
        std::mem::swap(&mut self.tasks, &mut *shared.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        let mut tasks = std::mem::take(&mut self.tasks);
        let waker: Arc<dyn WakeTask> = shared;
        for task in tasks.drain(..) {
            self.runtime.0.executor.run(task, &waker);
        }
        self.tasks = tasks;
    }

    fn with_source<T>(&self, id: SourceId, f: impl FnOnce(&mut dyn Source) -> T) -> Option<T> {
        let source = {
            let sources = self.runtime.0.sources.borrow();
            let entry = sources.get(id.index()).filter(|entry| entry.id == id)?;
            Rc::clone(&entry.source)
        };
        let mut source = source.borrow_mut();
        Some(f(&mut *source))
    }

    fn is_armed(&self, id: SourceId) -> bool {
        self.runtime.0.sources.borrow().get(id.index()).is_some_and(|entry| entry.id == id && entry.armed)
    }

    /// Notes whether the source is armed, and returns whether it was.
    fn set_armed(&self, id: SourceId, armed: bool) -> bool {
        let mut sources = self.runtime.0.sources.borrow_mut();
        let entry = sources.get_mut(id.index()).filter(|entry| entry.id == id);
        entry.is_some_and(|entry| std::mem::replace(&mut entry.armed, armed))
    }

    fn poll_source(&mut self, id: SourceId) {
        let source = {
            let mut sources = self.runtime.0.sources.borrow_mut();
            let Some(entry) = sources.get_mut(id.index()).filter(|entry| entry.id == id) else { return };
            entry.ready = false;
            entry.armed = false;
            std::mem::swap(&mut self.events, &mut entry.events);
            Rc::clone(&entry.source)
        };
        source.borrow_mut().poll(&self.runtime, &mut self.events);
        self.events.clear();
    }
}

impl Drop for Reactor {
    /// Ends every operation, then lets go of what lived here. What the kernel will not let go of is leaked: it may still
    /// write to it.
    fn drop(&mut self) {
        let inner = Rc::clone(&self.runtime.0);
        let messages = inner.shared.messages.lock().unwrap_or_else(PoisonError::into_inner).take();
        if !driver!(inner, driver => driver.quiesce()) {
            log::error!("operations are still under way at the end of a reactor: their memory is leaked");
            std::mem::forget(inner);
            return;
        }
        // All of these may reach for the runtime when they are dropped, so nothing is borrowed meanwhile; and all of them
        // may hold the runtime, so they are taken out of it.
        self.runtime.enter(|| {
            drop(messages);
            drop(inner.executor.take_all());
            drop(inner.sources.take());
            drop(inner.locals.take());
        });
    }
}

/// A reactor on a thread of its own. Dropping it, on another thread, stops and joins it.
pub struct ReactorThread {
    handle: ReactorHandle,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl ReactorThread {
    /// Starts a thread called `name` and a reactor on it.
    ///
    /// # Errors
    /// When the thread, its CPU or its io_uring cannot be had.
    pub fn spawn(name: &str, config: ReactorConfig) -> io::Result<ReactorThread> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            match config.cpu.map_or(Ok(()), pin_to_cpu).and_then(|()| Reactor::new(config)) {
                Ok(mut reactor) => {
                    let _ = sender.send(Ok(reactor.runtime().handle()));
                    reactor.run();
                }
                Err(error) => {
                    let _ = sender.send(Err(error));
                }
            }
        })?;
        let handle =
            receiver.recv().map_err(|_| io::Error::other("the reactor's thread ended at once"))??;
        Ok(ReactorThread { handle, thread: Some(thread) })
    }

    /// For other threads to reach the reactor.
    #[must_use]
    pub fn handle(&self) -> &ReactorHandle {
        &self.handle
    }
}

impl Drop for ReactorThread {
    fn drop(&mut self) {
        self.handle.run(Runtime::stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn pin_to_cpu(cpu: usize) -> io::Result<()> {
    // SAFETY: an all-zero cpu_set_t is an empty set; CPU_SET checks nothing, so the bound is checked first.
    let result = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if cpu >= 8 * size_of::<libc::cpu_set_t>() {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    struct Echo {
        heard: mpsc::Sender<Event>,
    }

    impl Source for Echo {
        fn poll(&mut self, _: &Runtime, events: &mut Vec<Event>) {
            for event in events.drain(..) {
                let _ = self.heard.send(event);
            }
        }
    }

    #[test]
    fn events_timers_messages_and_tasks_arrive() {
        let thread = ReactorThread::spawn("test", ReactorConfig::default()).unwrap();
        let (heard, hears) = mpsc::channel();
        // SAFETY: plain system call.
        let raw = unsafe { libc::eventfd(1, libc::EFD_NONBLOCK) };
        let tell = heard.clone();
        thread.handle().call(move |runtime| {
            let fd = Fd(raw);
            let id = runtime.add_source(Rc::new(RefCell::new(Echo { heard: tell })));
            runtime.poll_readable(id, 5, fd);
            runtime.timer(id, runtime.now() + Duration::from_millis(20), 9);
            let inner = runtime.clone();
            runtime.spawn(async move {
                inner.sleep(Duration::from_millis(40)).await;
                inner.cancel(id, 5);
                // SAFETY: no memory is named.
                let nop = unsafe { inner.operate(&Op::Nop, None) }.await;
                assert_eq!(nop.result, 0);
            });
        });
        let next = || hears.recv_timeout(Duration::from_secs(20)).unwrap();
        assert_eq!(next(), Event::Op { key: 5, completed: Completed { result: 1, more: true } });
        assert_eq!(next(), Event::Timer { key: 9 });
        assert_eq!(
            next(),
            Event::Op { key: 5, completed: Completed { result: -libc::ECANCELED, more: false } }
        );
        drop(thread);
        // SAFETY: ours since the eventfd call.
        unsafe { libc::close(raw) };
    }

    #[test]
    fn an_operation_dropped_by_its_task_keeps_its_buffer_until_it_ends() {
        let thread = ReactorThread::spawn("test", ReactorConfig::default()).unwrap();
        let mut fds = [0i32; 2];
        // SAFETY: `fds` has room for two descriptors.
        assert_eq!(unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, fds.as_mut_ptr()) }, 0);
        struct Guard(mpsc::Sender<()>, Box<[u8; 64]>);
        impl Drop for Guard {
            fn drop(&mut self) {
                let _ = self.0.send(());
            }
        }
        let (dropped, drops) = mpsc::channel();
        thread.handle().call(move |runtime| {
            let mut guard = Guard(dropped, Box::new([0; 64]));
            let op = Op::Recv { fd: Fd(fds[0]), buffer: guard.1.as_mut_ptr(), len: 64 };
            // SAFETY: the guard owns the buffer.
            drop(unsafe { runtime.operate(&op, Some(Box::new(guard))) });
        });
        drops.recv_timeout(Duration::from_secs(20)).expect("freed once the cancellation was delivered");
        drop(thread);
        // SAFETY: ours since socketpair.
        unsafe {
            libc::close(fds[0]);
            libc::close(fds[1]);
        }
    }

    #[test]
    fn an_ended_reactor_drops_its_tasks_and_answers_nobody() {
        let thread = ReactorThread::spawn("test", ReactorConfig::default()).unwrap();
        let handle = thread.handle().clone();
        let (dropped, drops) = mpsc::channel::<()>();
        handle.call(move |runtime| {
            let runtime_kept = runtime.clone();
            runtime.spawn(async move {
                let _until_dropped = dropped;
                runtime_kept.sleep(Duration::from_secs(3600)).await;
            });
        });
        drop(thread);
        assert_eq!(drops.recv_timeout(Duration::from_secs(20)), Err(mpsc::RecvTimeoutError::Disconnected));
        assert_eq!(handle.call(|_| 1), None);
    }

    #[test]
    fn what_an_abandoned_operation_owned_may_use_the_executor_when_it_is_dropped() {
        let thread = ReactorThread::spawn("test", ReactorConfig::default()).unwrap();
        struct Spawns(Runtime, mpsc::Sender<()>);
        impl Drop for Spawns {
            fn drop(&mut self) {
                let told = self.1.clone();
                // SAFETY: no memory is named.
                let op = unsafe { self.0.operate(&Op::Nop, None) };
                self.0.spawn(async move {
                    op.await;
                    let _ = told.send(());
                });
            }
        }
        let (tell, told) = mpsc::channel();
        thread.handle().call(move |runtime| {
            // SAFETY: no memory is named.
            drop(unsafe { runtime.operate(&Op::Nop, Some(Box::new(Spawns(runtime.clone(), tell)))) });
        });
        told.recv_timeout(Duration::from_secs(20)).expect("the drop ran, and its task");
    }

    #[test]
    fn a_sleeping_reactor_is_woken_every_time() {
        let thread = ReactorThread::spawn("test", ReactorConfig { cpu: None, poll_us: 0 }).unwrap();
        for round in 0..10_000 {
            assert_eq!(thread.handle().call(move |_| round), Some(round));
        }
    }
}
