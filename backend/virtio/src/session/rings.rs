//! The session's rings: started when the front end has said everything, stopped when all their requests have ended.

use super::{Failure, Over, Running, Session, Vring, clone_fd, end};
use crate::crash::Recorder;
use crate::features;
use crate::inflight::{self, QueueLog};
use crate::interrupt::Interrupt;
use crate::memory::GuestMemory;
use crate::queue::{Queue, QueueSetup, Stopped, with_queue};
use crate::ring::{self, Ring};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

/// Queues' names in this process.
static NEXT_KEY: AtomicU64 = AtomicU64::new(0);

/// A queue that is being stopped, and how it ended.
struct Stopping {
    index: usize,
    running: Running,
    is_done: mpsc::Receiver<Stopped>,
}

/// How long a stop waits for requests in flight.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Patience {
    /// For `drain_timeout`, and without end while the VM migrates.
    UnlessLogging,
    /// For `drain_timeout`: the session is over.
    Bounded,
}

/// How long a stop waits for requests that were given up.
const ABORT_PATIENCE: Duration = Duration::from_secs(5);

const TELL_EVERY: Duration = Duration::from_secs(10);

impl Session {
    /// Starts the rings that waited for this session's turn, or for what was left at the device.
    pub(super) fn start_waiting(&mut self) -> Result<(), Over> {
        for index in 0..self.vrings.len() {
            self.start_if_ready(index).map_err(|failure| match failure {
                Failure::Refused(what) | Failure::End(what) => Over::Failed(what),
                Failure::Closed => Over::Closed,
            })?;
        }
        Ok(())
    }

    /// No other ring of the disk runs from now on, and nothing is left at the device of one that did. If not, the session is woken
    /// when that may be so.
    fn has_turn(&mut self) -> bool {
        let disk = &self.disk;
        let (has, had) =
            disk.sessions.take_turn(&self.shared, || disk.queues_left.load(Ordering::Acquire) == 0);
        if has && !had {
            // Its log may have been another session's until now: a front end that connects again is there before its old session
            // has ended.
            self.look_for_unfinished();
            if let Some(inflight) = &self.inflight {
                inflight.set_write_through(!self.disk.writeback());
            }
        }
        has
    }

    /// A ring that waits to start may have gone on meanwhile: in an older session of the same front end that is still ending. Its
    /// base is what the ring says then, as if it had started, unless its log holds anything.
    pub(super) fn look_at_base(&mut self, index: usize) {
        let vring = &self.vrings[index];
        if vring.running.is_some() || vring.kick.is_none() {
            return;
        }
        let queue = u16::try_from(index).unwrap_or(u16::MAX);
        let log = self.inflight.as_ref().and_then(|inflight| inflight.queue(queue));
        if log.is_none_or(|log| !log.may_have_unfinished())
            && let Ok(ring) = ring_in(&self.memory, vring)
        {
            self.vrings[index].base = ring.used_idx();
        }
    }

    /// Whether the ring's in-flight log has, or may have, requests that are to be executed again.
    fn may_have_unfinished(&self, index: usize) -> bool {
        let log = self.inflight.as_ref().and_then(|area| area.queue(u16::try_from(index).ok()?));
        log.is_some_and(|log| log.may_have_unfinished())
    }

    /// Stops one ring: nothing of it is written into guest memory any more, but by requests that are left behind.
    ///
    /// While dirty pages are logged there are none of those, and none stay in the in-flight log, which does not travel: a ring that
    /// waits to start, and may have some, runs first. If that cannot be reached the session ends, and its front end does not hear
    /// that the ring has stopped.
    pub(super) fn stop_ring(&mut self, index: usize) -> Result<(), Failure> {
        self.wait_for_departed()?;
        loop {
            let vring = &self.vrings[index];
            let waits = vring.running.is_none() && vring.kick.is_some() && self.is_enabled(vring);
            if !(self.is_logging() && waits && self.may_have_unfinished(index)) {
                break;
            }
            self.start_if_ready(index)?;
            self.pause()?;
        }
        self.look_at_base(index);
        let (ran, left) = (self.vrings[index].running.is_some(), self.left.len());
        self.stop_queues(&[index], Patience::UnlessLogging);
        if self.is_logging() && ran && (self.may_have_unfinished(index) || self.left.len() > left) {
            self.is_waited_for()?;
            return end(format!("queue {index} has unfinished requests, and its VM migrates"));
        }
        Ok(())
    }

    /// Lets another session's rings run, if all rings of this one are stopped and its VM migrates. Who only resets its device, or
    /// pauses, goes on later: nobody else gets its disk meanwhile.
    pub(super) fn give_turn(&mut self) {
        let stopped = self.vrings.iter().all(|vring| vring.running.is_none() && vring.kick.is_none());
        if stopped && self.is_logging() {
            self.disk.sessions.give_turn(&self.shared);
        }
    }

    /// Enabled, where that is negotiated.
    fn is_enabled(&self, vring: &Vring) -> bool {
        vring.enabled || self.features & features::PROTOCOL_FEATURES == 0
    }

    /// Starts a ring that has been kicked, and enabled where that is negotiated, unless it must wait.
    pub(super) fn start_if_ready(&mut self, index: usize) -> Result<(), Failure> {
        let vring = &self.vrings[index];
        if vring.kick.is_none() || vring.running.is_some() || !self.is_enabled(vring) {
            return Ok(());
        }
        if !self.has_turn() {
            if !std::mem::replace(&mut self.told_to_wait, true) {
                let name = &self.disk.config.name;
                match self.disk.sessions.is_anothers_turn(&self.shared) {
                    true => log::info!("disk {name}: rings wait for those of the other front end to stop"),
                    false => {
                        log::info!("disk {name}: rings wait for what an earlier stop left at the device")
                    }
                }
            }
            return Ok(());
        }
        self.told_to_wait = false;
        self.left.clear();
        self.gave_up = None;
        let vring = &self.vrings[index];
        let wrong = |what: String| Failure::End(format!("queue {index}: {what}"));
        let ring = ring_in(&self.memory, vring).map_err(wrong)?;
        self.check_log(&self.memory).map_err(wrong)?;
        let queue = u16::try_from(index).unwrap_or(u16::MAX);
        let (used_idx, available_idx) = (ring.used_idx(), ring.available_idx());
        let mut log = self.inflight.as_ref().and_then(|inflight| inflight.queue(queue));
        let mut unfinished = Vec::new();
        if let Some(log) = &mut log {
            if log.size() < ring.size() {
                return Err(wrong(format!(
                    "size {} is above the in-flight log's ({})",
                    ring.size(),
                    log.size()
                )));
            }
            unfinished = log
                .recover(used_idx, available_idx, ring.size())
                .map_err(|error| wrong(error.to_string()))?;
        }
        // Everything that was taken from the ring is either shown as used or in the log: so this is the base, whatever a
        // front end remembers from before a disconnect. After a process that was killed without a log it is not, and what was
        // in flight nobody knows: QEMU tells `used.idx` then, which is this, and Cloud Hypervisor `avail.idx`, which would
        // leave out all that nobody has taken yet, after an end in order too.
        let begun = u16::try_from(unfinished.len()).unwrap_or(u16::MAX);
        let next_available = used_idx.wrapping_add(begun);
        if next_available != vring.base {
            log::debug!("queue {index}: base {} as told, {next_available} by the ring", vring.base);
        }
        if !unfinished.is_empty() {
            self.gate.set_unfinished(queue, true);
            log::info!(
                "disk {}: queue {index}: {} requests are executed again",
                self.disk.config.name,
                unfinished.len()
            );
        }
        let mut interrupt = Interrupt::new().map_err(|error| wrong(format!("interrupt: {error}")))?;
        interrupt
            .set(clone_fd(vring.call.as_ref())?)
            .map_err(|error| wrong(format!("SET_VRING_CALL: {error}")))?;
        let reactor_index = (self.disk.config.index + index) % self.reactors.len();
        let recorder = self.recorder(reactor_index, queue, log.as_ref());
        let logged = log.is_some();
        let setup = QueueSetup {
            index: queue,
            ring,
            memory: Arc::clone(&self.memory),
            kick: clone_fd(vring.kick.as_ref().and_then(Option::as_ref))?,
            interrupt,
            event_idx: self.features & features::EVENT_IDX != 0,
            indirect: self.features & features::INDIRECT_DESC != 0,
            flush: self.features & features::FLUSH != 0,
            log,
            marks: self.marks(index),
            unfinished,
            next_available,
            next_used: used_idx,
            gate: Arc::clone(&self.gate),
            disk: Arc::clone(&self.disk),
            session: Arc::clone(&self.shared),
            recorder,
        };
        let key = NEXT_KEY.fetch_add(1, Ordering::Relaxed);
        self.reactors[reactor_index].run(move |runtime| Queue::start(runtime, key, setup));
        self.vrings[index].running = Some(Running { key, reactor: reactor_index, logged });
        self.tell_capacity();
        Ok(())
    }

    fn recorder(&self, reactor: usize, queue: u16, log: Option<&QueueLog>) -> Recorder {
        // What is in no log is never replayed: no later request is the same.
        let log = log.map_or_else(inflight::random, QueueLog::id);
        let recorded = self.disk.config.crash.as_ref().and_then(|crash| {
            crash.disk(&self.disk.config.name).map(|disk| crash.recorder(reactor, disk, queue, log))
        });
        recorded.unwrap_or(Recorder::none())
    }

    pub(super) fn stop_all(&mut self) -> Result<(), Failure> {
        self.wait_for_departed()?;
        let all: Vec<usize> = (0..self.vrings.len()).collect();
        self.stop_queues(&all, Patience::UnlessLogging);
        for vring in &mut self.vrings {
            vring.kick = None;
            vring.enabled = false;
        }
        self.give_turn();
        Ok(())
    }

    pub(super) fn reset_device(&mut self) -> Result<(), Failure> {
        self.stop_all()?;
        for vring in &mut self.vrings {
            // Who hears of errors is the front end's matter, not the device's: it does not set that again.
            *vring = Vring { err: vring.err.take(), ..Vring::default() };
        }
        // The driver has forgotten what was in flight.
        if let Some(inflight) = &self.inflight {
            (0..inflight.queues())
                .filter_map(|queue| inflight.queue(queue))
                .for_each(|log: QueueLog| log.clear());
        }
        self.gate = Arc::default();
        Ok(())
    }

    /// Stops queues together: they take nothing new, and end what they have. After `drain_timeout` that is given up: devices tear
    /// down what they must to end it. What does not end even so stays in the in-flight log, and its queue is left behind; without
    /// a log there is nobody else to remember it, and it is waited for. Memory stays mapped for all of it, and the disk starts no
    /// ring before it has ended.
    ///
    /// A front end stops one ring after the other: what it has waited for one of them is not waited for again, until a ring starts.
    ///
    /// A VM that migrates takes its in-flight log nowhere: while dirty pages are logged, and the front end is there, nothing is
    /// given up, and everything of the log is replayed first. A disk that is removed, or whose process ends, waits for nobody.
    pub(super) fn stop_queues(&mut self, indices: &[usize], patience: Patience) {
        let disk = Arc::clone(&self.disk);
        let name = &disk.config.name;
        let replay_all = patience == Patience::UnlessLogging && self.is_logging();
        let mut stopping = Vec::<Stopping>::new();
        for index in indices {
            let Some(running) = self.vrings[*index].running.take() else { continue };
            let Running { key, reactor, .. } = running;
            let (done, is_done) = mpsc::channel::<Stopped>();
            self.reactors[reactor].run(move |runtime| {
                with_queue(runtime, key, |queue, runtime| queue.stop(runtime, replay_all, done));
            });
            stopping.push(Stopping { index: *index, running, is_done });
        }
        let mut began = Instant::now();
        let mut given_up = false;
        let mut told = began;
        while let Some(first) = stopping.first() {
            match first.is_done.recv_timeout(Duration::from_millis(20)) {
                Ok(stopped) => {
                    self.has_stopped(first.index, stopped);
                    stopping.remove(0);
                    continue;
                }
                // The queue was never there: its reactor has ended.
                Err(RecvTimeoutError::Disconnected) => {
                    stopping.remove(0);
                    continue;
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            let stop = disk.stopping();
            let migrates = replay_all && stop.is_none() && !self.connection.is_closed();
            if migrates && !given_up {
                if told.elapsed() > TELL_EVERY {
                    told = Instant::now();
                    log::warn!("disk {name}: waiting for requests in flight: its VM migrates");
                }
                continue;
            }
            let drain = match self.gave_up {
                Some(_) => Duration::ZERO,
                None => stop.unwrap_or(disk.config.drain_timeout),
            };
            if began.elapsed() < if given_up { ABORT_PATIENCE } else { drain } {
                continue;
            }
            if !given_up {
                given_up = true;
                began = *self.gave_up.get_or_insert_with(Instant::now);
                let after = drain.as_secs();
                log::warn!(
                    "disk {name}: {} queues have requests in flight after {after} s (drain_timeout): they are given up, and stay in the VM's in-flight log",
                    stopping.len()
                );
                for Stopping { running: Running { key, reactor, .. }, .. } in &stopping {
                    let key = *key;
                    self.reactors[*reactor]
                        .run(move |runtime| with_queue(runtime, key, |queue, _| queue.abort()));
                }
                continue;
            }
            let (left, waited_for): (Vec<_>, Vec<_>) =
                stopping.into_iter().partition(|one| stop.is_some() || one.running.logged);
            if !left.is_empty() {
                log::error!(
                    "disk {name}: the device does not end its requests: they are left with it, and no ring starts before they end"
                );
                self.leave_behind(left);
            }
            if told.elapsed() > TELL_EVERY {
                told = Instant::now();
                log::warn!("disk {name}: waiting for the device to end requests that were given up");
            }
            stopping = waited_for;
        }
    }

    /// A queue has ended, or is not ours any more.
    fn has_stopped(&mut self, index: usize, Stopped { next_available, left_in_log }: Stopped) {
        self.vrings[index].base = next_available;
        if left_in_log {
            self.gate.set_unfinished(u16::try_from(index).unwrap_or(u16::MAX), true);
        }
    }

    /// Takes ring, logs and interrupt from queues that still have requests in flight. When this returns, none of them touches
    /// what a successor may own. They keep their memory; what is in the log is executed again by the next start of the ring.
    fn leave_behind(&mut self, left: Vec<Stopping>) {
        let (disowned, all_disowned) = mpsc::channel();
        for Stopping { index, running: Running { key, reactor, .. }, .. } in &left {
            let (index, key, disowned) = (*index, *key, disowned.clone());
            self.reactors[*reactor].run(move |runtime| {
                with_queue(runtime, key, |queue, _| {
                    // The session waits below.
                    let _ = disowned.send((index, queue.disown()));
                });
            });
        }
        drop(disowned);
        // Ends when every message was carried out, or its reactor has ended.
        for (index, next_available) in all_disowned {
            self.has_stopped(index, Stopped { next_available, left_in_log: true });
        }
        for Stopping { index, running, is_done } in left {
            match is_done.try_recv() {
                // It has ended just before.
                Ok(stopped) => self.has_stopped(index, stopped),
                Err(_) => self.left.push(running),
            }
        }
    }
}

/// Where a ring is in our address space.
pub(super) fn ring_in(memory: &GuestMemory, vring: &Vring) -> Result<Ring, String> {
    if vring.size == 0 {
        return Err("kicked before SET_VRING_NUM".into());
    }
    let Some(addresses) = vring.addresses else { return Err("kicked before SET_VRING_ADDR".into()) };
    let (descriptor_bytes, available_bytes, used_bytes) = ring::part_bytes(vring.size);
    let part = |name: &str, address: u64, bytes: u64| {
        memory
            .user(address, bytes)
            .ok_or_else(|| format!("SET_VRING_ADDR: {name} at {address:#x} is not in memory"))
    };
    let descriptors = part("descriptor table", addresses.descriptors, descriptor_bytes)?;
    let available = part("available ring", addresses.available, available_bytes)?;
    let used = part("used ring", addresses.used, used_bytes)?;
    // SAFETY: each part lies in one mapped region with all its bytes; whoever gets the ring gets the memory with it.
    let ring = unsafe { Ring::new(descriptors, available, used, vring.size) };
    ring.ok_or_else(|| format!("SET_VRING_ADDR: misaligned: {addresses:x?}"))
}
