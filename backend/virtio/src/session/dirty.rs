//! The session's log of dirty pages: mapped, checked against the memory, told to the queues.
//!
//! It is in use while VHOST_F_LOG_ALL is negotiated and there is one. A message that changes that is answered when all running
//! queues have heard of it: from then on the front end may rely on what is marked, or let go of the log before.

use super::{Failure, Reply, Running, Session, end};
use crate::dirty::{DirtyLog, Marks};
use crate::features;
use crate::memory::GuestMemory;
use crate::message::{self, LogDescription, protocol};
use crate::queue::with_queue;
use crate::ring;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;

impl Session {
    /// Whether what is written into guest memory is logged.
    pub(super) fn is_logging(&self) -> bool {
        self.features & features::LOG_ALL != 0 && self.dirty_log.is_some()
    }

    /// Where the queue of this index marks what it writes.
    pub(super) fn marks(&self, index: usize) -> Option<Marks> {
        let log = self.dirty_log.as_ref().filter(|_| self.is_logging())?;
        Some(Marks { log: Arc::clone(log), used: self.vrings[index].log_address })
    }

    /// SET_LOG_BASE. Unlike other messages it is always replied to, so a log that cannot be had ends the session: a front end that
    /// does not look at the reply (QEMU) would lose pages.
    pub(super) fn set_log_base(
        &mut self,
        description: LogDescription,
        files: &[OwnedFd],
    ) -> Result<Reply, Failure> {
        if self.protocol & protocol::LOG_SHMFD == 0 {
            return end("SET_LOG_BASE: LOG_SHMFD was not negotiated");
        }
        let [file] = files else {
            return end(format!("SET_LOG_BASE: {} descriptors; one would be right", files.len()));
        };
        let LogDescription { bytes, file_offset } = description;
        if bytes == 0 || file_offset.checked_add(bytes).is_none() {
            return end(format!("SET_LOG_BASE: {bytes:#x} bytes at mmap offset {file_offset:#x}"));
        }
        let log = DirtyLog::map(description, file)
            .map_err(|error| Failure::End(format!("SET_LOG_BASE: {bytes:#x} bytes: {error}")))?;
        // Queues may have the one before until they have heard of the new one; it is unmapped here, when they have.
        self.dirty_log_before = self.dirty_log.replace(log);
        self.log_changed("SET_LOG_BASE")?;
        self.dirty_log_before = None;
        Ok(Reply::Bytes(message::reply_log_base(&description)))
    }

    /// Whether the log covers this memory and the rings, where it must.
    pub(super) fn check_log(&self, memory: &GuestMemory) -> Result<(), String> {
        let Some(log) = self.dirty_log.as_ref().filter(|_| self.is_logging()) else { return Ok(()) };
        let covered = |what: &str, last: u64| match last < log.end() {
            true => Ok(()),
            false => Err(format!(
                "the log of dirty pages ends at {:#x}, before the end of {what} at {:#x}",
                log.end(),
                last.saturating_add(1)
            )),
        };
        if let Some(last) = memory.end().checked_sub(1) {
            covered("memory", last)?;
        }
        // A ring that nobody has kicked is not written to, and its driver may not have said yet where it is.
        for vring in self.vrings.iter().filter(|vring| vring.running.is_some() || vring.kick.is_some()) {
            let (Some(used), true) = (vring.log_address, vring.size > 0) else { continue };
            let (_, _, used_bytes) = ring::part_bytes(vring.size);
            covered("a used ring", used.saturating_add(used_bytes - 1))?;
        }
        Ok(())
    }

    /// Tells the running queues where they mark what they write, and waits until they have heard it.
    pub(super) fn log_changed(&mut self, message: &str) -> Result<(), Failure> {
        self.shared.logging.store(self.is_logging(), Ordering::Release);
        if self.is_logging() {
            // It marks what it still writes elsewhere, or nowhere.
            self.wait_for_departed()?;
        }
        let (told, all_told) = mpsc::channel::<()>();
        if self.vrings.iter().any(|vring| vring.running.is_some()) {
            self.check_log(&self.memory).map_err(|what| Failure::End(format!("{message}: {what}")))?;
        }
        for (index, vring) in self.vrings.iter().enumerate() {
            let Some(Running { key, reactor, .. }) = vring.running else { continue };
            let (marks, told) = (self.marks(index), told.clone());
            self.reactors[reactor].run(move |runtime| {
                with_queue(runtime, key, |queue, _| queue.set_marks(marks));
                drop(told);
            });
        }
        drop(told);
        self.wait_for_all(&all_told)
    }
}
