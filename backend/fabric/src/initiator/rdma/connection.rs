//! A queue pair on its connection: what a lane or the admin queue has of it.
//!
//! Owns: posting, polling, the events of the connection, and its end. Must not know: what commands are for, or what happens after it is
//! lost. Invariants:
//! - Completions are polled in every pass while the reactor is awake; before it sleeps the completion channel is armed and polled once
//!   more ([`RdmaConnection::arm`]), so that none is missed.
//! - [`RdmaConnection::close`] ends the queue pair on a thread of its own: it goes to error, what was under way completes as flushed,
//!   then it is taken away, and with it every key. Only then [`RdmaConnection::is_quiet`] says that what requests name is theirs again.
//!   No peer is waited for.
//! - A connection that is dropped before that (our bug, or the end of its reactor) leaks what the device may still use.

use super::connect::RdmaPair;
use super::queue::{RdmaError, RdmaQueue};
use crate::initiator::meter::{Loss, Moved};
use crate::initiator::queue::{Ended, Transfer};
use crate::nvme::Sqe;
use crate::rdma::link::Link;
use crate::rdma::words;
use crate::simulated::is_broken;
use hawser_runtime::{Completed, Fd, Runtime, SourceId};
use hawser_verbs_abi::{STATUS_FLUSHED, WorkCompletion, event};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Key of the wait for events of the connection, from its first key on.
const KEY_EVENTS: u32 = 1;
/// Key of the wait for completions, likewise.
const KEY_COMPLETIONS: u32 = 2;
/// Completions that are taken at once.
const POLLED: usize = 32;

/// What comes back from the thread that ends a link.
#[derive(Default)]
struct Closing {
    done: AtomicBool,
    /// What still completed.
    last: Mutex<Vec<WorkCompletion>>,
}

/// See the module's text.
pub(crate) struct RdmaConnection<T: Copy> {
    runtime: Runtime,
    source: SourceId,
    first_key: u32,
    link: Option<Box<Link>>,
    queue: Option<Box<RdmaQueue>>,
    generation: u64,
    /// By the queue's numbers.
    users: Box<[Option<T>]>,
    free: Vec<u32>,
    ended: Vec<Ended<T>>,
    polled: Box<[WorkCompletion; POLLED]>,
    /// Completions in `polled` that were not handled.
    have: usize,
    waits_for_events: bool,
    waits_for_completions: bool,
    closing: Option<Arc<Closing>>,
    /// What still completed was handled.
    is_over: bool,
    error: Option<String>,
    loss: Loss,
    ended_by_target: bool,
}

impl<T: Copy> RdmaConnection<T> {
    /// Takes over a connected queue of which `source` will get the events, with keys from `first_key` to 3 beyond.
    pub(crate) fn new(
        runtime: &Runtime,
        source: SourceId,
        first_key: u32,
        pair: RdmaPair,
    ) -> RdmaConnection<T> {
        let (link, queue, depth, generation) = pair.into_parts();
        let (events, completions) = (Fd(link.end.channel.fd()), Fd(link.queue_fd()));
        let depth = u32::from(depth);
        let connection = RdmaConnection {
            runtime: runtime.clone(),
            source,
            first_key,
            link: Some(link),
            queue: Some(queue),
            generation,
            users: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            ended: Vec::with_capacity(depth as usize),
            polled: Box::new([WorkCompletion::NONE; POLLED]),
            have: 0,
            waits_for_events: true,
            waits_for_completions: true,
            closing: None,
            is_over: false,
            error: None,
            loss: Loss::default(),
            ended_by_target: false,
        };
        runtime.poll_readable(source, first_key + KEY_EVENTS, events);
        runtime.poll_readable(source, first_key + KEY_COMPLETIONS, completions);
        // Completions are looked for in every pass.
        runtime.watch(source);
        runtime.wake(source);
        connection
    }

    fn queue(&mut self) -> &mut RdmaQueue {
        self.queue.as_mut().expect("only a drop takes it out")
    }

    pub(crate) fn room(&self) -> usize {
        match &self.queue {
            Some(queue) if self.error.is_none() => queue.room().min(self.free.len()),
            _ => 0,
        }
    }

    pub(crate) fn outstanding(&self) -> usize {
        self.users.len() - self.free.len()
    }

    pub(crate) fn submit(&mut self, sqe: Sqe, transfer: Transfer, user: T) {
        let number = self.free.pop().expect("the caller looked for room");
        self.users[number as usize] = Some(user);
        self.follow_memory();
        self.queue().submit(sqe, transfer, number);
    }

    /// Memory may have come since, which is to be named now.
    fn follow_memory(&mut self) {
        let (Some(link), Some(queue)) = (&self.link, &mut self.queue) else { return };
        if link.domain.generation() != self.generation {
            let (generation, entries) = link.domain.entries();
            self.generation = generation;
            queue.set_entries(entries);
        }
    }

    /// Posts what there is, with one doorbell for receives and one for sends.
    pub(crate) fn flush(&mut self) {
        if self.error.is_some() {
            return;
        }
        let (Some(queue), Some(link)) = (&mut self.queue, &mut self.link) else { return };
        let (receives, sends) = queue.posts();
        let (mut posted, mut failed) = ((receives.len(), sends.len()), None);
        // SAFETY: the link's memory goes with it; what requests name stays until they have ended or were drained, which is after
        // the link is gone (`is_quiet`).
        unsafe {
            if !receives.is_empty()
                && let Err((count, code)) = link.post_receives(receives)
            {
                (posted.0, failed) = (count, Some(code));
            }
            if !sends.is_empty()
                && let Err((count, code)) = link.post_sends(sends)
            {
                (posted.1, failed) = (count, Some(code));
            }
        }
        queue.posted(posted.0, posted.1);
        if let Some(code) = failed {
            let why = format!("RDMA device {} takes no work: {}", link.domain.name, words::errno(code));
            self.fail(Loss::Network, why);
        }
    }

    /// Takes the end of the operation `key`.
    pub(crate) fn handle(&mut self, key: u32, completed: Completed) {
        let waits = match key - self.first_key {
            KEY_EVENTS => &mut self.waits_for_events,
            KEY_COMPLETIONS => &mut self.waits_for_completions,
            _ => return,
        };
        *waits = completed.more;
        if self.closing.is_some() {
            return;
        }
        if key - self.first_key == KEY_EVENTS {
            self.take_events();
        }
        let Some(link) = self.link.as_ref().filter(|_| !completed.more && self.error.is_none()) else {
            return;
        };
        let (fd, waits) = match key - self.first_key {
            KEY_EVENTS => (link.end.channel.fd(), &mut self.waits_for_events),
            _ => (link.queue_fd(), &mut self.waits_for_completions),
        };
        *waits = true;
        self.runtime.poll_readable(self.source, key, Fd(fd));
    }

    fn take_events(&mut self) {
        loop {
            let Some(link) = &mut self.link else { return };
            match link.end.channel.event() {
                Ok(None) => return,
                Err(code) => return self.fail(Loss::Network, format!("rdma_cm: {}", words::errno(code))),
                Ok(Some(event)) => match event.kind {
                    // What the other end's acknowledgement adds to its first message; the end of the time in which late messages
                    // are caught; a change of what nothing here rests on.
                    event::ESTABLISHED | event::TIMEWAIT_EXIT | event::CONNECT_RESPONSE => {}
                    event::DISCONNECTED => {
                        self.ended_by_target |= self.error.is_none();
                        self.fail(Loss::Closed, words::event(&event));
                    }
                    event::DEVICE_REMOVAL => {
                        link.domain.device_is_gone();
                        self.fail(Loss::Network, words::event(&event));
                    }
                    _ => self.fail(Loss::Network, words::event(&event)),
                },
            }
        }
    }

    /// For a watching source: whether something has completed.
    pub(crate) fn peek(&mut self) -> bool {
        if self.have > 0 || self.closing.is_some() {
            return self.have > 0;
        }
        let Some(link) = &mut self.link else { return false };
        match link.poll(&mut self.polled[..]) {
            Ok(count) => self.have = count,
            Err(code) => {
                self.fail(Loss::Network, format!("completions cannot be polled: {}", words::errno(code)))
            }
        }
        self.have > 0
    }

    /// For a watching source, before it sleeps. Whether something has completed after all.
    pub(crate) fn arm(&mut self) -> bool {
        if let Some(link) = self.link.as_mut().filter(|_| self.closing.is_none())
            && let Err(code) = link.arm()
        {
            self.fail(Loss::Network, format!("completions cannot be waited for: {}", words::errno(code)));
            return true;
        }
        self.peek()
    }

    /// Handles all that has completed, and posts what follows from it.
    pub(crate) fn progress(&mut self) {
        if self.closing.is_some() {
            return self.finish_closing();
        }
        while self.peek() {
            for index in 0..std::mem::take(&mut self.have) {
                let completion = self.polled[index];
                if let Err(error) = self.queue().handle(&completion) {
                    self.fail_queue(&error);
                }
            }
        }
        self.collect();
        self.flush();
    }

    fn collect(&mut self) {
        let Some(queue) = &mut self.queue else { return };
        for (number, answer) in queue.ended() {
            let Some(user) = self.users[number as usize].take() else { unreachable!("a request ends once") };
            self.free.push(number);
            self.ended.push(Ended { user, answer });
        }
    }

    fn fail_queue(&mut self, error: &RdmaError) {
        match error {
            RdmaError::Protocol(what) => {
                self.fail(Loss::Protocol, format!("the target broke the protocol: {what}"))
            }
            RdmaError::Work { status, vendor } => {
                // What ended it may be waiting as an event.
                if *status == STATUS_FLUSHED {
                    self.take_events();
                }
                let vendor = if *vendor == 0 { String::new() } else { format!(" (vendor code {vendor:#x})") };
                let loss = if (9..=11).contains(status) { Loss::Protocol } else { Loss::Network };
                self.fail(loss, format!("{}{vendor}", words::completion(*status)));
            }
        }
    }

    fn fail(&mut self, loss: Loss, error: String) {
        if self.error.is_none() {
            self.loss = loss;
            self.error = Some(error);
            self.queue().end_posting();
        }
    }

    pub(crate) fn error(&self) -> Option<&str> {
        self.error.as_deref()
    }

    pub(crate) fn loss(&self) -> Loss {
        self.loss
    }

    pub(crate) fn take_moved(&mut self) -> Moved {
        self.queue().take_moved()
    }

    pub(crate) fn was_ended_by_target(&self) -> bool {
        self.ended_by_target
    }

    pub(crate) fn ended(&mut self) -> std::vec::Drain<'_, Ended<T>> {
        self.finish_closing();
        self.collect();
        self.ended.drain(..)
    }

    /// Gives the connection up: what is under way ends soon, and what was not posted yet never is.
    pub(crate) fn close(&mut self) {
        self.fail(Loss::GivenUp, "given up".to_owned());
        let Some(link) = self.link.take() else { return };
        if self.waits_for_events {
            self.runtime.cancel(self.source, self.first_key + KEY_EVENTS);
        }
        if self.waits_for_completions {
            self.runtime.cancel(self.source, self.first_key + KEY_COMPLETIONS);
        }
        // Completions that were taken are no longer the device's.
        for index in 0..std::mem::take(&mut self.have) {
            let completion = self.polled[index];
            let _ = self.queue().handle(&completion);
        }
        let closing = Arc::new(Closing::default());
        self.closing = Some(Arc::clone(&closing));
        let (reactor, source) = (self.runtime.handle(), self.source);
        let (flushed, is_last) = (self.queue().is_flushed(), self.queue().counter());
        let held = Arc::new(Mutex::new(Some((link, is_last))));
        let job = Arc::clone(&held);
        let close = move || {
            let taken = job.lock().unwrap_or_else(PoisonError::into_inner).take();
            let Some((link, is_last)) = taken else { return };
            let last = if flushed {
                drop(link);
                Vec::new()
            } else {
                link.close(is_last)
            };
            *closing.last.lock().unwrap_or_else(PoisonError::into_inner) = last;
            closing.done.store(true, Ordering::Release);
            reactor.run(move |runtime| runtime.wake(source));
        };
        if self.runtime.on_thread("rdma-close", close.clone()).is_err() {
            // No thread to be had: this one waits, rather than that memory is given back too early.
            close();
        }
    }

    fn finish_closing(&mut self) {
        if self.is_over || !self.is_quiet() {
            return;
        }
        let Some(closing) = &self.closing else { return };
        self.is_over = true;
        let last = std::mem::take(&mut *closing.last.lock().unwrap_or_else(PoisonError::into_inner));
        for completion in &last {
            let _ = self.queue().handle(completion);
        }
        self.queue().end_answered();
        self.collect();
    }

    /// Whether nothing is under way: what requests name is ours again.
    pub(crate) fn is_quiet(&self) -> bool {
        let done = |closing: &Arc<Closing>| {
            closing.done.load(Ordering::Acquire) || is_broken("rdma_give_back_before_flush")
        };
        let gone = self.closing.as_ref().is_some_and(done);
        if is_broken("rdma_wait_for_peer") && !self.ended_by_target {
            return false;
        }
        gone && !self.waits_for_events && !self.waits_for_completions
    }

    /// Takes out all requests that did not end, in order, each with whether any of it may have reached the controller.
    ///
    /// # Panics
    /// While the device may use what they name.
    pub(crate) fn drain(&mut self) -> Vec<(T, bool)> {
        assert!(self.is_quiet(), "the device may still use these requests' buffers");
        self.finish_closing();
        let drained = self.queue().drain();
        drained
            .into_iter()
            .map(|(number, begun)| {
                let Some(user) = self.users[number as usize].take() else {
                    unreachable!("a request ends once")
                };
                self.free.push(number);
                (user, begun)
            })
            .collect()
    }

    pub(crate) fn users_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.users.iter_mut().flatten()
    }
}

impl<T: Copy> Drop for RdmaConnection<T> {
    fn drop(&mut self) {
        if !self.is_quiet() {
            // The reactor has ended, and nobody told us; or a bug of ours. A leak is safe in both cases.
            std::mem::forget((self.link.take(), self.queue.take()));
        }
    }
}
