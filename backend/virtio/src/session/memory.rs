//! The session's memory: tables and regions that come and go, while the rings run.

use super::rings::ring_in;
use super::{Failure, Running, Session, end};
use crate::memory::{GuestMemory, Region};
use crate::message::RegionDescription;
use crate::queue::with_queue;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::Duration;

impl Session {
    pub(super) fn set_mem_table(
        &mut self,
        regions: &[RegionDescription],
        files: &[OwnedFd],
    ) -> Result<(), Failure> {
        if files.len() != regions.len() {
            return end(format!("SET_MEM_TABLE: {} regions with {} descriptors", regions.len(), files.len()));
        }
        let mapped = regions
            .iter()
            .zip(files)
            .map(|(region, file)| Region::map(*region, file, &self.share))
            .collect::<Result<Vec<_>, _>>()
            .and_then(GuestMemory::new)
            .map_err(|error| Failure::Refused(format!("SET_MEM_TABLE: {error}")))?;
        self.change_memory(mapped, None)
    }

    pub(super) fn add_mem_reg(
        &mut self,
        region: RegionDescription,
        files: &[OwnedFd],
    ) -> Result<(), Failure> {
        let [file] = files else {
            return end(format!("ADD_MEM_REG: {} descriptors; one would be right", files.len()));
        };
        let wrong = |error| {
            Failure::Refused(format!(
                "ADD_MEM_REG: {:#x} bytes at {:#x}, mmap offset {:#x}: {error}",
                region.bytes, region.guest_address, region.file_offset
            ))
        };
        let mut regions = self.memory.regions().to_vec();
        regions.push(Region::map(region, file, &self.share).map_err(wrong)?);
        let memory = GuestMemory::new(regions).map_err(wrong)?;
        self.change_memory(memory, None)
    }

    /// REM_MEM_REG. A descriptor that comes along (libblkio sends one) is closed unused, as the specification has it.
    pub(super) fn rem_mem_reg(&mut self, wanted: RegionDescription) -> Result<(), Failure> {
        let is_it = |region: &RegionDescription| {
            (region.guest_address, region.user_address, region.bytes)
                == (wanted.guest_address, wanted.user_address, wanted.bytes)
        };
        let mut regions = self.memory.regions().to_vec();
        let Some(place) = regions.iter().position(|region| is_it(region.description())) else {
            return Err(Failure::Refused(format!(
                "REM_MEM_REG: no region of {:#x} bytes at {:#x}",
                wanted.bytes, wanted.guest_address
            )));
        };
        let removed = regions.remove(place);
        let memory =
            GuestMemory::new(regions).map_err(|error| Failure::Refused(format!("REM_MEM_REG: {error}")))?;
        self.change_memory(memory, Some(removed))
    }

    /// A new epoch, for us and all queues. Waits until they have it, and until nothing names `removed` any more.
    fn change_memory(&mut self, memory: GuestMemory, removed: Option<Arc<Region>>) -> Result<(), Failure> {
        let memory = Arc::new(memory);
        // All rings are looked up before the first queue changes.
        let mut rings = Vec::new();
        for (index, vring) in self.vrings.iter().enumerate() {
            if let Some(running) = vring.running {
                let ring = ring_in(&memory, vring).map_err(|what| {
                    Failure::Refused(format!(
                        "memory without the ring of queue {index}, which is running: {what}"
                    ))
                })?;
                rings.push((running, ring));
            }
        }
        if !rings.is_empty() {
            self.check_log(&memory).map_err(Failure::Refused)?;
        }
        let (free, freed) = mpsc::channel();
        for (Running { key, reactor, .. }, ring) in rings {
            let (memory, removed, free) = (Arc::clone(&memory), removed.clone(), free.clone());
            self.reactors[reactor].run(move |runtime| {
                with_queue(runtime, key, |queue, _| queue.set_memory(memory, ring, removed.as_deref(), free));
            });
        }
        if let Some(removed) = &removed {
            // Queues that were stopped with requests that did not end may name it too.
            for Running { key, reactor, .. } in &self.left {
                let (key, removed, free) = (*key, Arc::clone(removed), free.clone());
                self.reactors[*reactor].run(move |runtime| {
                    with_queue(runtime, key, |queue, _| queue.await_region(&removed, free));
                });
            }
        }
        self.memory = memory;
        drop(free);
        let waited = self.wait_for_all(&freed);
        self.shared.drop_retired();
        waited
    }

    /// Waits until every sender has sent or is gone; a session that ends meanwhile, or whose front end goes, does not wait.
    pub(super) fn wait_for_all(&self, receiver: &Receiver<()>) -> Result<(), Failure> {
        while self.wait_for(receiver)?.is_some() {}
        Ok(())
    }

    /// Waits for what is sent next; `None` when every sender is gone. A session that ends meanwhile, or whose front end goes, does
    /// not wait: the rings are drained then, with a limit.
    pub(super) fn wait_for<T>(&self, receiver: &Receiver<T>) -> Result<Option<T>, Failure> {
        loop {
            match receiver.recv_timeout(Duration::from_millis(100)) {
                Ok(sent) => return Ok(Some(sent)),
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
                Err(RecvTimeoutError::Timeout) => {
                    self.is_waited_for()?;
                }
            }
        }
    }

    /// Whether there is any sense in waiting on.
    pub(super) fn is_waited_for(&self) -> Result<(), Failure> {
        if self.disk.stopping().is_some() {
            return end("stopped while the front end waited for requests in flight");
        }
        if let Some(error) = self.shared.error() {
            return end(error.what);
        }
        if self.connection.is_closed() {
            return Err(Failure::Closed);
        }
        Ok(())
    }

    /// Waits a little, for what nobody tells; with the same exceptions.
    pub(super) fn pause(&self) -> Result<(), Failure> {
        std::thread::sleep(Duration::from_millis(10));
        self.is_waited_for()
    }

    /// Waits for the queues of a front end that has gone: its session ends them still, and that may be our front end's old one,
    /// with the same memory.
    pub(super) fn wait_for_departed(&self) -> Result<(), Failure> {
        while self.disk.sessions.is_departed_ones_turn(&self.shared) {
            self.pause()?;
        }
        Ok(())
    }
}
