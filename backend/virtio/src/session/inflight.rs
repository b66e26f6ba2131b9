//! The session's in-flight log: made for the front end, or taken back from it.

use super::{Failure, Reply, Session, end};
use crate::inflight::InflightArea;
use crate::message::{self, InflightDescription};
use crate::ring;
use std::os::fd::OwnedFd;
use std::sync::Arc;

impl Session {
    pub(super) fn get_inflight(&mut self, wanted: InflightDescription) -> Result<Reply, Failure> {
        if self.vrings.iter().any(|vring| vring.running.is_some()) {
            return end("GET_INFLIGHT_FD: a ring is running");
        }
        let InflightDescription { queues, queue_size, .. } = wanted;
        let right = queues > 0
            && usize::from(queues) <= self.vrings.len()
            && queue_size > 0
            && queue_size <= ring::SIZE_MAX;
        if !right {
            return end(format!("GET_INFLIGHT_FD: {queues} queues of {queue_size}"));
        }
        // A driver may set up a larger ring than the front end foresees (SeaBIOS does), so there is room for the largest.
        let (area, file, mut description) =
            InflightArea::create(queues, ring::SIZE_MAX).map_err(|error| Failure::End(error.to_string()))?;
        description.queue_size = queue_size;
        area.set_write_through(!self.disk.writeback());
        // Nothing is unfinished in a new log, whatever was in one that was set before.
        self.gate = Arc::default();
        self.inflight = Some(area);
        Ok(Reply::WithDescriptor(message::reply_inflight(&description), file))
    }

    pub(super) fn set_inflight(
        &mut self,
        description: InflightDescription,
        files: &[OwnedFd],
    ) -> Result<(), Failure> {
        if self.vrings.iter().any(|vring| vring.running.is_some()) {
            return end("SET_INFLIGHT_FD: a ring is running");
        }
        let [file] = files else {
            return end(format!("SET_INFLIGHT_FD: {} descriptors; one would be right", files.len()));
        };
        if usize::from(description.queues) > self.vrings.len() {
            // Nobody would ever execute what is unfinished in the others, and the whole disk would wait for it.
            return end(format!(
                "SET_INFLIGHT_FD: a log of {} queues; the disk has {}",
                description.queues,
                self.vrings.len()
            ));
        }
        let area = InflightArea::map(description, file).map_err(|error| Failure::End(error.to_string()))?;
        match area.write_through() {
            // While another front end's rings run, its driver is the one who says.
            Some(write_through) if !self.disk.sessions.is_anothers_turn(&self.shared) => {
                self.disk.set_writeback(!write_through);
            }
            _ => area.set_write_through(!self.disk.writeback()),
        }
        self.inflight = Some(area);
        self.look_for_unfinished();
        Ok(())
    }

    /// Closes the gate for all queues that may have unfinished requests in the log. No ring runs.
    pub(super) fn look_for_unfinished(&mut self) {
        self.gate = Arc::default();
        let Some(area) = &self.inflight else { return };
        for queue in 0..area.queues() {
            if area.queue(queue).is_some_and(|log| log.may_have_unfinished()) {
                self.gate.set_unfinished(queue, true);
            }
        }
    }
}
