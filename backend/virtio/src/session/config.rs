//! The configuration space: what a driver may write, and what is told when it has changed.

use super::{Failure, Running, Session};
use crate::connection;
use crate::features;
use crate::message::{self, protocol};
use crate::queue::with_queue;
use hawser_block::{
    BlockCount, Buffers, Channel, Completion, Device, Lba, Operation, Outcome, Request, Token,
};
use hawser_runtime::{Event, Runtime, Source, SourceId};
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};

impl Session {
    /// The one thing that a driver may write is `writeback`.
    pub(super) fn set_config(&mut self, offset: u32, data: &[u8]) -> Result<(), Failure> {
        if self.disk.sessions.is_anothers_turn(&self.shared) {
            return Err(Failure::Refused("SET_CONFIG: another front end's rings run".into()));
        }
        let place =
            features::WRITEBACK_OFFSET.checked_sub(offset).and_then(|place| usize::try_from(place).ok());
        match place.and_then(|place| data.get(place)) {
            Some(0) => self.write_through(),
            Some(1) => {
                self.disk.set_writeback(true);
                if let Some(inflight) = &self.inflight {
                    inflight.set_write_through(false);
                }
                Ok(())
            }
            Some(value) => {
                Err(Failure::Refused(format!("SET_CONFIG: writeback {value}; 0 or 1 would be right")))
            }
            None => Err(Failure::Refused(format!(
                "SET_CONFIG: offset {offset} with {} bytes; only writeback (at {}) can be written",
                data.len(),
                features::WRITEBACK_OFFSET
            ))),
        }
    }

    /// From now on what has been written is durable: what comes (it carries FUA), and what came. Writes that have begun without
    /// FUA end first, then the device is flushed.
    fn write_through(&mut self) -> Result<(), Failure> {
        if self.disk.writeback() {
            self.disk.set_writeback(false);
            if let Err(error) = self.make_durable() {
                // The driver is told that nothing has changed.
                self.disk.set_writeback(true);
                return Err(error);
            }
        }
        if let Some(inflight) = &self.inflight {
            inflight.set_write_through(true);
        }
        Ok(())
    }

    fn make_durable(&self) -> Result<(), Failure> {
        let (ended, all_ended) = mpsc::channel();
        for Running { key, reactor, .. } in self.vrings.iter().filter_map(|vring| vring.running) {
            let ended = ended.clone();
            self.reactors[reactor]
                .run(move |runtime| with_queue(runtime, key, |queue, _| queue.await_in_flight(ended)));
        }
        drop(ended);
        self.wait_for_all(&all_ended)?;
        let (flushed, is_flushed) = mpsc::channel();
        let disk = Arc::clone(&self.disk);
        self.reactors[self.disk.config.index % self.reactors.len()]
            .run(move |runtime| Flush::start(runtime, disk.device.as_ref(), flushed));
        match self.wait_for(&is_flushed)? {
            Some(Ok(())) => Ok(()),
            Some(Err(status)) => Err(Failure::Refused(format!(
                "SET_CONFIG: writeback 0: the device's flush failed: {status:?}"
            ))),
            None => Err(Failure::End("SET_CONFIG: the reactor has ended".into())),
        }
    }

    /// Tells the front end to read the configuration again, if it may not know the disk's size: it has grown, or the front
    /// end has reconnected and knows what our predecessor told it.
    pub(super) fn tell_capacity(&mut self) {
        let capacity = features::capacity(&self.disk.limits(true).geometry);
        let serving = self.vrings.iter().any(|vring| vring.running.is_some());
        if self.told_capacity == Some(capacity) || !serving || self.protocol & protocol::BACKEND_REQ == 0 {
            return;
        }
        let Some(socket) = &self.backend_requests else { return };
        match connection::send(socket, &message::config_change(), None) {
            Ok(()) => self.told_capacity = Some(capacity),
            Err(error) => log::warn!(
                "disk {}: its front end was not told of the new size, and sees it when it connects again: CONFIG_CHANGE: {error}",
                self.disk.config.name
            ),
        }
    }
}

/// One flush of a device, for a session. Lets go of itself when it has ended.
struct Flush {
    id: Option<SourceId>,
    channel: Option<Box<dyn Channel>>,
    ended: Vec<Completion>,
    outcome: Sender<Outcome>,
}

impl Flush {
    fn start(runtime: &Runtime, device: &dyn Device, outcome: Sender<Outcome>) {
        let flush = Rc::new(RefCell::new(Flush { id: None, channel: None, ended: Vec::new(), outcome }));
        let id = runtime.add_source(Rc::clone(&flush) as Rc<RefCell<dyn Source>>);
        let mut channel = device.channel(runtime, id);
        channel.submit(&mut vec![Request {
            operation: Operation::Flush,
            lba: Lba(0),
            blocks: BlockCount(0),
            buffers: Buffers::EMPTY,
            token: Token(0),
        }]);
        let mut flush = flush.borrow_mut();
        flush.id = Some(id);
        flush.channel = Some(channel);
        // It may have ended at once.
        runtime.wake(id);
    }
}

impl Source for Flush {
    fn poll(&mut self, runtime: &Runtime, _: &mut Vec<Event>) {
        let Some(channel) = &mut self.channel else { return };
        channel.reap(&mut self.ended);
        let (Some(Completion { outcome, .. }), Some(id)) = (self.ended.pop(), self.id) else { return };
        // The session may have stopped waiting.
        let _ = self.outcome.send(outcome);
        self.channel = None;
        runtime.remove_source(id);
    }
}
