//! The session's rings: started when the front end has said everything, stopped when all their requests have ended.

use super::{Failure, Running, Session, Vring, clone_fd};
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

/// A queue that is being stopped: index, key, reactor, and how it ended.
type Stopping = (usize, u64, usize, mpsc::Receiver<Stopped>);

/// How long the end of a disk waits for requests that were given up.
const ABORT_PATIENCE: Duration = Duration::from_secs(5);

impl Session<'_> {
    /// Starts a ring that has been kicked, and enabled where that is negotiated.
    pub(super) fn start_if_ready(&mut self, index: usize) -> Result<(), Failure> {
        let needs_enable = self.features & features::PROTOCOL_FEATURES != 0;
        let vring = &self.vrings[index];
        let Some(kick) = &vring.kick else { return Ok(()) };
        if vring.running.is_some() || (needs_enable && !vring.enabled) {
            return Ok(());
        }
        let wrong = |what: String| Failure::End(format!("queue {index}: {what}"));
        let ring = ring_in(&self.memory, vring).map_err(wrong)?;
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
        let setup = QueueSetup {
            index: queue,
            ring,
            memory: Arc::clone(&self.memory),
            kick: clone_fd(kick.as_ref())?,
            interrupt,
            event_idx: self.features & features::EVENT_IDX != 0,
            indirect: self.features & features::INDIRECT_DESC != 0,
            flush: self.features & features::FLUSH != 0,
            log,
            unfinished,
            next_available,
            next_used: used_idx,
            gate: Arc::clone(&self.gate),
            disk: Arc::clone(self.disk),
            session: Arc::clone(&self.shared),
            recorder,
        };
        let key = NEXT_KEY.fetch_add(1, Ordering::Relaxed);
        self.reactors[reactor_index].run(move |runtime| Queue::start(runtime, key, setup));
        self.vrings[index].running = Some(Running { key, reactor: reactor_index });
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

    pub(super) fn stop_all(&mut self) {
        let all: Vec<usize> = (0..self.vrings.len()).collect();
        self.stop_queues(&all);
        for vring in &mut self.vrings {
            vring.kick = None;
            vring.enabled = false;
        }
    }

    pub(super) fn reset_device(&mut self) {
        self.stop_all();
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
    }

    /// Stops queues together: they take nothing new, and end what they have. After `drain_timeout` that is given up, and still
    /// waited for: a request ends once, at the end, and until then its memory stays mapped and its disk is not served again.
    /// Only a disk that is removed, or whose process ends, does not wait for ever.
    pub(super) fn stop_queues(&mut self, indices: &[usize]) {
        let name = &self.disk.config.name;
        let mut stopping = Vec::<Stopping>::new();
        for index in indices {
            let Some(Running { key, reactor }) = self.vrings[*index].running.take() else { continue };
            let (done, is_done) = mpsc::channel::<Stopped>();
            self.reactors[reactor].run(move |runtime| {
                with_queue(runtime, key, |queue, runtime| queue.stop(runtime, done));
            });
            stopping.push((*index, key, reactor, is_done));
        }
        let mut began = Instant::now();
        let mut given_up = false;
        let mut told = began;
        while let Some((index, _, _, is_done)) = stopping.first() {
            match is_done.recv_timeout(Duration::from_millis(20)) {
                Ok(Stopped { next_available, left_in_log }) => {
                    self.vrings[*index].base = next_available;
                    if left_in_log {
                        self.gate.set_unfinished(u16::try_from(*index).unwrap_or(u16::MAX), true);
                    }
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
            let stop = self.disk.stopping();
            if began.elapsed() < stop.unwrap_or(self.disk.config.drain_timeout) {
                continue;
            }
            if !given_up {
                given_up = true;
                began = Instant::now();
                log::warn!("disk {name}: {} queues have requests in flight; giving them up", stopping.len());
                for (_, key, reactor, _) in &stopping {
                    let key = *key;
                    self.reactors[*reactor]
                        .run(move |runtime| with_queue(runtime, key, |queue, _| queue.abort()));
                }
            } else if stop.is_some() && began.elapsed() > ABORT_PATIENCE {
                log::error!("disk {name}: the device does not end its requests; leaving them");
                self.leave_behind(&stopping);
                return;
            } else if told.elapsed() > Duration::from_secs(10) {
                told = Instant::now();
                log::warn!("disk {name}: waiting for the device to end requests that were given up");
            }
        }
    }

    /// Takes ring, log and interrupt from queues that still have requests in flight. When this returns, none of them touches
    /// what a successor may own. They keep their memory; what is in the log is executed again by the next session.
    fn leave_behind(&self, stopping: &[Stopping]) {
        let (done, all_done) = mpsc::channel::<()>();
        for (_, key, reactor, _) in stopping {
            let (key, done) = (*key, done.clone());
            self.reactors[*reactor].run(move |runtime| {
                with_queue(runtime, key, |queue, _| queue.disown());
                drop(done);
            });
        }
        drop(done);
        // Ends when every message was carried out, or its reactor has ended.
        let _ = all_done.recv();
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
