//! What makes a process die at a given step of its work.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Counts steps, and at one of them the process is dead: its code goes on for a little, and nothing that it does counts.
#[derive(Debug, Default)]
pub struct Trap {
    /// Steps that are left; 0: it is not set.
    left: AtomicU64,
    is_sprung: AtomicBool,
}

impl Trap {
    /// The process dies after so many steps.
    pub fn set(&self, steps: u64) {
        self.left.store(steps, Ordering::Relaxed);
    }

    /// It dies now.
    pub fn spring(&self) {
        self.is_sprung.store(true, Ordering::Relaxed);
    }

    /// The next process lives, and the trap is not set.
    pub fn clear(&self) {
        self.left.store(0, Ordering::Relaxed);
        self.is_sprung.store(false, Ordering::Relaxed);
    }

    /// Whether the process is dead.
    #[must_use]
    pub fn is_sprung(&self) -> bool {
        self.is_sprung.load(Ordering::Relaxed)
    }

    /// Takes a step; says whether the process is alive after it.
    pub fn passes(&self) -> bool {
        let left = self.left.load(Ordering::Relaxed);
        if left > 0 {
            self.left.store(left - 1, Ordering::Relaxed);
            if left == 1 {
                self.spring();
            }
        }
        !self.is_sprung()
    }
}
