//! The interrupt of a queue: adds 1 to the front end's call eventfd, and never waits for it. The same for its error eventfd.
//!
//! The eventfd's file is the front end's: it may be blocking (libblkio's clients want it so) and it may be full, so a plain
//! `write` could hang a reactor, and io_uring hands a write to a blocking eventfd to a worker thread (1.9 µs and a second
//! thread's time, against 0.3 µs). What the kernel itself signals it never waits for: so each queue has a tiny io_uring of
//! its own with the eventfd registered, and an interrupt is a no-op in there.

use crate::connection;
use io_uring::{IoUring, opcode};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// The call descriptor of one queue. Used by one thread.
pub(crate) struct Interrupt {
    ring: IoUring,
    /// Kept for its number; the ring has a reference of its own.
    call: Option<OwnedFd>,
}

impl Interrupt {
    /// An interrupt that goes nowhere.
    pub(crate) fn new() -> io::Result<Interrupt> {
        Ok(Interrupt { ring: IoUring::builder().dontfork().build(2)?, call: None })
    }

    /// From now on interrupts go to `call`, an eventfd, or nowhere.
    pub(crate) fn set(&mut self, call: Option<OwnedFd>) -> io::Result<()> {
        if self.call.take().is_some() {
            self.ring.submitter().unregister_eventfd()?;
        }
        if let Some(call) = call {
            self.ring.submitter().register_eventfd(call.as_raw_fd())?;
            self.call = Some(call);
        }
        Ok(())
    }

    /// Whether anybody hears it.
    pub(crate) fn is_set(&self) -> bool {
        self.call.is_some()
    }

    /// Signals.
    #[inline]
    pub(crate) fn signal(&mut self) {
        if self.call.is_none() {
            return;
        }
        // The completions of earlier ones, which say nothing; else the ring would fill up.
        self.ring.completion().for_each(drop);
        // SAFETY: a no-op names no memory.
        let pushed = unsafe { self.ring.submission().push(&opcode::Nop::new().build()) };
        // A full ring holds a signal that was not submitted: submitting is all it needs.
        let _ = pushed;
        while let Err(error) = self.ring.submit() {
            if error.kind() != io::ErrorKind::Interrupted {
                self.signal_plainly();
                return;
            }
        }
    }

    /// The kernel had no memory for a no-op: an interrupt that is not sent is never made up for, so it is written. To an
    /// eventfd that has no room it need not be, for its reader has not looked since. Whether it still has room when it is
    /// written is the front end's will: so it is a thread that is nobody else's which may wait there.
    #[cold]
    fn signal_plainly(&self) {
        let Some(call) = self.call.as_ref().filter(|call| connection::is_writable(call.as_fd())) else {
            return;
        };
        let sent = call.try_clone().and_then(|call| {
            let name = "interrupt".to_owned();
            std::thread::Builder::new().name(name).spawn(move || connection::signal(call.as_fd()))
        });
        if let Err(error) = sent {
            log::error!(
                "an interrupt could not be sent: {error}; a queue of some VM stands still until its next one"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::FromRawFd;

    fn count(fd: &OwnedFd) -> u64 {
        let mut count = 0u64;
        // SAFETY: 8 writable bytes; our own descriptor.
        let got = unsafe { libc::read(fd.as_raw_fd(), (&raw mut count).cast(), 8) };
        if got == 8 { count } else { 0 }
    }

    #[test]
    fn every_signal_counts_and_goes_to_the_newest_descriptor() {
        let (first, second) = (connection::eventfd().unwrap(), connection::eventfd().unwrap());
        let mut interrupt = Interrupt::new().unwrap();
        interrupt.signal();
        interrupt.set(Some(first.try_clone().unwrap())).unwrap();
        for _ in 0..100 {
            interrupt.signal();
        }
        assert_eq!(count(&first), 100);
        interrupt.set(Some(second.try_clone().unwrap())).unwrap();
        interrupt.signal();
        assert_eq!((count(&first), count(&second)), (0, 1));
        interrupt.set(None).unwrap();
        interrupt.signal();
        assert_eq!((count(&first), count(&second)), (0, 0));
    }

    #[test]
    fn a_full_and_blocking_eventfd_does_not_hang_us() {
        // SAFETY: plain system call; the descriptor is ours.
        let full = unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_CLOEXEC)) };
        let most = u64::MAX - 1;
        // SAFETY: 8 readable bytes.
        assert_eq!(unsafe { libc::write(full.as_raw_fd(), (&raw const most).cast(), 8) }, 8);
        assert!(connection::is_eventfd(full.as_fd()));
        let mut interrupt = Interrupt::new().unwrap();
        interrupt.set(Some(full.try_clone().unwrap())).unwrap();
        for _ in 0..10 {
            interrupt.signal();
        }
        assert!(count(&full) >= most);
    }

    /// An error of the ring's other than EINTR was passed over, and the guest waited for ever.
    #[test]
    fn an_interrupt_that_the_ring_refuses_is_sent_all_the_same() {
        let call = connection::eventfd().unwrap();
        let mut interrupt = Interrupt::new().unwrap();
        interrupt.set(Some(call.try_clone().unwrap())).unwrap();
        interrupt.signal();
        // Something that is no ring in its place: every submission fails.
        let other = connection::eventfd().unwrap();
        // SAFETY: both are our own descriptors; the ring's mappings stay.
        assert!(unsafe { libc::dup2(other.as_raw_fd(), interrupt.ring.as_raw_fd()) } >= 0);
        interrupt.signal();
        interrupt.signal();
        let since = std::time::Instant::now();
        let mut counted = count(&call);
        while counted < 3 && since.elapsed() < std::time::Duration::from_secs(20) {
            std::thread::sleep(std::time::Duration::from_millis(1));
            counted += count(&call);
        }
        assert_eq!(counted, 3);
    }
}
