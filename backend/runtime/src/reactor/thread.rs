//! A reactor on a thread of its own, pinned to a CPU if wanted.

use super::{Reactor, ReactorConfig, ReactorHandle, Runtime};
use std::io;
use std::mem::MaybeUninit;
use std::sync::{OnceLock, mpsc};

/// The CPUs that threads of this process may use, as it was before the first reactor was pinned.
static ALL_CPUS: OnceLock<libc::cpu_set_t> = OnceLock::new();

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

/// The CPUs that this thread may use.
fn own_cpus() -> libc::cpu_set_t {
    let mut set = MaybeUninit::<libc::cpu_set_t>::zeroed();
    // SAFETY: the kernel fills the set, of the length that is told; a set of zeroes is a valid one.
    unsafe {
        libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), set.as_mut_ptr());
        set.assume_init()
    }
}

/// Lets this thread, which a reactor has started, run on other CPUs than the reactor's, which it has inherited.
pub(super) fn leave_cpu() {
    if let Some(all) = ALL_CPUS.get() {
        // SAFETY: a set of the length that is told. If it is refused, the thread is where it would have been.
        unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), all) };
    }
}

fn pin_to_cpu(cpu: usize) -> io::Result<()> {
    ALL_CPUS.get_or_init(own_cpus);
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What takes its time was done on the CPU that its reactor has to itself, beside it.
    #[test]
    fn threads_of_a_pinned_reactor_are_not_pinned() {
        let cpus = |set: libc::cpu_set_t| -> Vec<usize> {
            // SAFETY: below the number of bits of the set.
            (0..8 * size_of::<libc::cpu_set_t>())
                .filter(|cpu| unsafe { libc::CPU_ISSET(*cpu, &set) })
                .collect()
        };
        let all = cpus(own_cpus());
        let config = ReactorConfig { cpu: all.last().copied(), ..ReactorConfig::default() };
        let reactor = ReactorThread::spawn("pinned", config).unwrap();
        let (sender, receiver) = mpsc::channel();
        reactor.handle().run(move |runtime| {
            let (here, there) = (sender.clone(), sender);
            here.send(own_cpus()).unwrap();
            runtime.on_thread("job", move || there.send(own_cpus()).unwrap()).unwrap();
        });
        assert_eq!(cpus(receiver.recv().unwrap()), all[all.len() - 1..]);
        assert_eq!(cpus(receiver.recv().unwrap()), all);
    }
}
