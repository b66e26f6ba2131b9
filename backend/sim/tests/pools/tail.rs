//! What outlives the process: the tail's memory.

use hawser_sim::Trap;
use hawser_volume::pool::Tail;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A tail in memory that the next process finds again, unless the power goes.
#[derive(Clone)]
pub(crate) struct SimTail {
    memory: Arc<Mutex<Vec<u8>>>,
    capacity: usize,
    trap: Arc<Trap>,
}

impl SimTail {
    pub(crate) fn new(capacity: usize, trap: Arc<Trap>) -> SimTail {
        SimTail { memory: Arc::default(), capacity, trap }
    }

    /// The power is lost.
    pub(crate) fn lose_power(&self) {
        self.memory().clear();
    }

    pub(crate) fn len(&self) -> usize {
        self.memory().len()
    }

    fn memory(&self) -> MutexGuard<'_, Vec<u8>> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tail for SimTail {
    fn capacity(&self) -> usize {
        self.capacity
    }

    fn content(&self) -> Vec<u8> {
        self.memory().clone()
    }

    fn append(&mut self, bytes: &[u8]) {
        if !self.trap.passes() {
            return;
        }
        let mut memory = self.memory();
        assert!(memory.len() + bytes.len() <= self.capacity, "the tail is full: {} bytes", memory.len());
        memory.extend_from_slice(bytes);
        drop(memory);
        self.trap.passes();
    }

    fn replace(&mut self, bytes: &[u8]) {
        if !self.trap.passes() {
            return;
        }
        assert!(bytes.len() <= self.capacity, "the tail is too small for {} bytes", bytes.len());
        bytes.clone_into(&mut self.memory());
        self.trap.passes();
    }
}
