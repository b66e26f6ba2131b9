//! A reactor on a thread of its own, pinned to a CPU if wanted.

use super::{Reactor, ReactorConfig, ReactorHandle, Runtime};
use std::io;
use std::sync::mpsc;

/// A reactor on a thread of its own. Dropping it, on another thread, stops and joins it.
pub struct ReactorThread {
    handle: ReactorHandle,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl ReactorThread {
    /// Starts a thread called `name` and a reactor on it.
    ///
    /// # Errors
    /// When the thread, its CPU or its io_uring cannot be had.
    pub fn spawn(name: &str, config: ReactorConfig) -> io::Result<ReactorThread> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            match config.cpu.map_or(Ok(()), pin_to_cpu).and_then(|()| Reactor::new(config)) {
                Ok(mut reactor) => {
                    let _ = sender.send(Ok(reactor.runtime().handle()));
                    reactor.run();
                }
                Err(error) => {
                    let _ = sender.send(Err(error));
                }
            }
        })?;
        let handle =
            receiver.recv().map_err(|_| io::Error::other("the reactor's thread ended at once"))??;
        Ok(ReactorThread { handle, thread: Some(thread) })
    }

    /// For other threads to reach the reactor.
    #[must_use]
    pub fn handle(&self) -> &ReactorHandle {
        &self.handle
    }
}

impl Drop for ReactorThread {
    fn drop(&mut self) {
        self.handle.run(Runtime::stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn pin_to_cpu(cpu: usize) -> io::Result<()> {
    // SAFETY: an all-zero cpu_set_t is an empty set; CPU_SET checks nothing, so the bound is checked first.
    let result = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if cpu >= 8 * size_of::<libc::cpu_set_t>() {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
