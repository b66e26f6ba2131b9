//! What sessions tell a queue: a new interrupt, new memory, to stop, to give up, to end unseen.

use super::{KEY_KICK, OldMemory, PIECES_INLINE, Queue, Queues, Stopped};
use crate::chain::PIECES_MAX;
use crate::connection;
use crate::memory::{GuestMemory, Region};
use crate::ring::Ring;
use hawser_runtime::Runtime;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Sender;

impl Queue {
    /// Replaces the interrupt.
    pub(crate) fn set_call(&mut self, call: Option<OwnedFd>) {
        if let Err(error) = self.interrupt.set(call) {
            return self.fail(&format!("SET_VRING_CALL: {error}"));
        }
        // What was signalled on the old one may have been missed.
        self.interrupt();
    }

    /// A new epoch of memory, and the ring's place in it. `free` hears when no request names `removed` any more.
    pub(crate) fn set_memory(
        &mut self,
        memory: Arc<GuestMemory>,
        ring: Ring,
        removed: Option<&Region>,
        free: Sender<()>,
    ) {
        let old_in_flight: usize = self.old_memory.iter().map(|old| old.in_flight).sum();
        let in_flight = self.in_flight - old_in_flight;
        let old = std::mem::replace(&mut self.memory, memory);
        self.ring = ring;
        if in_flight > 0 {
            self.old_memory.push(OldMemory { generation: self.generation, in_flight, memory: old });
            self.generation = self.generation.wrapping_add(1);
        } else {
            self.session.retire(old);
        }
        if let Some(removed) = removed {
            self.await_region(removed, free);
        }
    }

    /// `free` hears when no request names `removed` any more.
    pub(crate) fn await_region(&mut self, removed: &Region, free: Sender<()>) {
        for (head, slot) in self.slots.iter_mut().enumerate().filter(|(_, slot)| slot.busy) {
            let pieces = if usize::from(slot.pieces) <= PIECES_INLINE {
                &slot.inline[..usize::from(slot.pieces)]
            } else {
                &self.overflow[head * PIECES_MAX..head * PIECES_MAX + usize::from(slot.pieces)]
            };
            let names_it = removed.touches(slot.status as usize, 1)
                || pieces.iter().any(|piece| removed.touches(piece.iov_base as usize, piece.iov_len));
            if names_it && !slot.awaited {
                slot.awaited = true;
                self.awaited += 1;
            }
        }
        if self.awaited > 0 {
            self.awaited_ended = Some(free);
        }
    }

    /// `ended` hears when all requests that are in flight now have ended.
    pub(crate) fn await_in_flight(&mut self, ended: Sender<()>) {
        for slot in self.slots.iter_mut().filter(|slot| slot.busy && !slot.awaited) {
            slot.awaited = true;
            self.awaited += 1;
        }
        if self.awaited > 0 {
            self.awaited_ended = Some(ended);
        }
    }

    /// Takes no more from the ring, and ends when everything in flight has; `replay_all`: what is still to be executed again, too.
    pub(crate) fn stop(&mut self, runtime: &Runtime, replay_all: bool, done: Sender<Stopped>) {
        self.stopping = Some(done);
        self.replay_all = replay_all;
        if self.kick_armed {
            runtime.cancel(self.id(), KEY_KICK);
        }
        // A held interrupt waits for nothing any more.
        self.publish(runtime);
        self.finish_if_idle(runtime);
    }

    /// Has waited long enough: gives up what is in flight as soon as that is safe.
    pub(crate) fn abort(&mut self) {
        self.aborting = true;
        if let Some(channel) = &mut self.channel {
            channel.abort();
        }
    }

    /// The session goes on, or away, though requests are in flight that do not end. From now on the ring, the in-flight log, the
    /// interrupt and the log of dirty pages are a successor's, who finds those requests in the log: what ends here later is not
    /// shown. The memory that it names stays mapped until then, and the disk starts no ring ([`crate::sessions`]).
    ///
    /// Returns where the driver's next chain will be.
    pub(crate) fn disown(&mut self) -> u16 {
        self.disowned = true;
        self.log = None;
        self.marks = None;
        self.signalled = self.published;
        self.held_since = None;
        self.owes_interrupt = false;
        // It is closed whatever the kernel says.
        let _ = self.interrupt.set(None);
        self.disk.queues_left.fetch_add(1, Ordering::AcqRel);
        self.next_available
    }

    pub(super) fn finish_if_idle(&mut self, runtime: &Runtime) {
        if self.in_flight > 0 || self.kick_armed || (self.replaying && self.replays()) {
            return;
        }
        let Some(done) = self.stopping.take() else { return };
        let left_in_log = self.left_in_log || self.replaying;
        self.session.retire(std::mem::take(&mut self.memory));
        runtime.remove_source(self.id());
        runtime.local::<Queues>().0.borrow_mut().remove(&self.key);
        if self.disowned {
            // The session's thread, which would do it, may have gone.
            let session = Arc::clone(&self.session);
            let name = "unmap".to_owned();
            if std::thread::Builder::new().name(name).spawn(move || session.drop_retired()).is_err() {
                // No room for a thread: then this reactor takes the time.
                self.session.drop_retired();
            }
            self.disk.queues_left.fetch_sub(1, Ordering::AcqRel);
            // A ring may have waited for that.
            connection::signal(self.disk.wake_fd());
            log::info!(
                "disk {}: queue {}: the device has ended the requests that an earlier stop left with it",
                self.disk.config.name,
                self.index
            );
        }
        // The session may have stopped waiting.
        let _ = done.send(Stopped { next_available: self.next_available, left_in_log });
    }
}
