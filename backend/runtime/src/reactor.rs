//! The reactor: one thread, one driver, and everything that it owns.
//!
//! One pass of the loop: deliver completions, messages and due timers; poll each source that has something; poll the
//! sources that watch shared memory ([`Source::peek`]); hand new operations to the driver. When a pass did nothing, the
//! reactor goes on looking for up to `poll_us`, then asks every watching source to arm its notification
//! ([`Source::arm`]: arm, fence, look again) and sleeps in the driver. It does not spin while requests are out on the
//! network ([`Runtime::add_outstanding`]), and it spins less where spinning has not paid lately.

mod handle;
mod runtime;
mod source;
#[cfg(test)]
mod tests;
mod thread;

pub(crate) use handle::WakeTask;
pub use handle::{ReactorHandle, ReactorStats};
pub use runtime::Runtime;
pub use source::{Event, Source, SourceId};
pub use thread::ReactorThread;

use crate::op::{Completed, Driver, Fd, Wait};
use crate::time::Instant;
use crate::uring::Uring;
use handle::{Message, Shared, bump};
use runtime::{AnyDriver, Inner, driver};
use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// How often one pass looks for sources that its own sources woke: device, volume's user, connection, and one to spare.
const READY_ROUNDS: usize = 4;

/// How a reactor behaves.
#[derive(Clone, Copy, Debug, Default)]
pub struct ReactorConfig {
    /// The CPU to run on; `None` leaves it to the scheduler.
    pub cpu: Option<usize>,
    /// How long an idle reactor looks for work before it sleeps, in microseconds; 0 = not at all.
    pub poll_us: u32,
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

    /// Until when this reactor would sleep, if a pass would find nothing but what its driver may have. For whoever steps reactors by hand.
    #[must_use]
    pub fn idle_until(&self) -> Option<Instant> {
        let inner = &self.runtime.0;
        let now = self.runtime.refresh_now();
        let has_work = inner.shared.pending.load(Ordering::Relaxed)
            || !inner.ready.borrow().is_empty()
            || !inner.watching.borrow().is_empty()
            || inner.stop.get();
        let deadline = inner.timers.borrow().next_deadline().unwrap_or(Instant::NEVER);
        (!has_work && deadline > now).then_some(deadline)
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
            log::error!(
                "a reactor ends, and the kernel still works for it: the memory of that is kept until the process ends"
            );
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
            // Whoever is dropped may begin something that holds the runtime. It ends soon, because nothing runs any more.
            for _ in 0..8 {
                drop(inner.executor.take_all());
                drop(inner.sources.take());
            }
        });
    }
}
