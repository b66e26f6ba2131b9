//! Requests to a device from a thread that is no reactor: jobs go to a reactor, do their I/O there, and come back.
//!
//! The one place of the binary that hands memory to a channel. A job owns its memory, and is itself owned by the reactor
//! until its request has ended; a reactor that cannot end it keeps it for ever.

use hawser_block::{
    BlockCount, Buffers, Channel, Completion, Device, Lba, Operation, Outcome, Request, Token,
};
use hawser_runtime::buffers::AlignedBuffer;
use hawser_runtime::{Event, ReactorHandle, Runtime, Slab, Source, SourceId};
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::Duration;

/// A device that is lost for longer than this while work is under way will not do for a person who waits.
const ANSWER_MAX: Duration = Duration::from_secs(60);

/// One request, with the memory that it needs.
pub(super) struct Job {
    pub(super) operation: Operation,
    pub(super) lba: u64,
    pub(super) blocks: u32,
    /// Bytes of the image that it covers, for progress.
    pub(super) len: u64,
    pub(super) work: Work,
}

/// The payload's memory.
pub(super) struct Work(Option<AlignedBuffer>);

impl Work {
    pub(super) fn none() -> Work {
        Work(None)
    }

    pub(super) fn zeroes(len: usize) -> Work {
        Work(Some(AlignedBuffer::new(len)))
    }

    /// Memory that `fill` has written to; what it leaves is zero.
    pub(super) fn filled(
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<(), String>,
    ) -> Result<Work, String> {
        let buffer = AlignedBuffer::new(len);
        // SAFETY: `len` initialised (zeroed) bytes of our own, which nobody else knows of yet.
        fill(unsafe { std::slice::from_raw_parts_mut(buffer.as_ptr(), len) })?;
        Ok(Work(Some(buffer)))
    }

    /// The bytes, while no request is under way.
    pub(super) fn bytes(&self) -> &[u8] {
        match &self.0 {
            None => &[],
            // SAFETY: a job's memory is seen only by who owns the job, and a request under way owns it.
            Some(buffer) => unsafe { buffer.slice(0, buffer.len()) },
        }
    }

    pub(super) fn is_all_zero(&self) -> bool {
        let bytes = self.bytes();
        // A page against the one before it: the first one against zero.
        !bytes.is_empty() && bytes[0] == 0 && bytes.iter().zip(&bytes[1..]).all(|(one, next)| one == next)
    }
}

/// A device's channel on a reactor, seen from here.
pub(super) struct Lane {
    reactor: ReactorHandle,
    ended: Receiver<(Job, Outcome)>,
}

/// What runs on the reactor.
struct Worker {
    id: SourceId,
    channel: Box<dyn Channel>,
    under_way: Slab<(Job, Box<libc::iovec>)>,
    batch: Vec<Request>,
    completions: Vec<Completion>,
    ended: Sender<(Job, Outcome)>,
}

/// Where the reactor keeps its worker: one lane for each reactor.
#[derive(Default)]
struct Place(RefCell<Option<Rc<RefCell<Worker>>>>);

impl Lane {
    /// Opens a channel to `device`, which has been reached, on a reactor that has no other lane.
    pub(super) fn open(device: &Arc<dyn Device>, reactor: &ReactorHandle) -> Result<Lane, String> {
        let (sender, ended) = mpsc::channel();
        let device = Arc::clone(device);
        let opened = reactor.call(move |runtime| {
            // The channel wants to know whom to wake before the worker can be made of it.
            let waking = Rc::new(RefCell::new(Waking(None)));
            let id = runtime.add_source(Rc::<RefCell<Waking>>::clone(&waking));
            let worker = Rc::new(RefCell::new(Worker {
                id,
                channel: device.channel(runtime, id),
                under_way: Slab::with_capacity(16),
                batch: Vec::new(),
                completions: Vec::new(),
                ended: sender,
            }));
            waking.borrow_mut().0 = Some(Rc::clone(&worker));
            *runtime.local::<Place>().0.borrow_mut() = Some(worker);
        });
        opened.ok_or("its reactor has ended")?;
        Ok(Lane { reactor: reactor.clone(), ended })
    }

    /// Gives the channel back; every job has ended.
    pub(super) fn close(self) {
        let closed = self.reactor.call(|runtime| {
            let worker = runtime.local::<Place>().0.borrow_mut().take();
            if let Some(worker) = worker {
                runtime.remove_source(worker.borrow().id);
            }
        });
        debug_assert!(closed.is_some(), "the reactor outlives its lanes");
    }

    pub(super) fn submit(&self, job: Job) {
        self.reactor.run(move |runtime| {
            let place = runtime.local::<Place>();
            if let Some(worker) = place.0.borrow().as_ref() {
                worker.borrow_mut().start(job);
            }
        });
    }

    /// The next job that has ended.
    pub(super) fn wait(&self) -> Result<(Job, Outcome), String> {
        let ended = self.ended.recv_timeout(ANSWER_MAX);
        ended.map_err(|_| format!("has not answered for {} s", ANSWER_MAX.as_secs()))
    }
}

struct Waking(Option<Rc<RefCell<Worker>>>);

impl Source for Waking {
    fn poll(&mut self, _: &Runtime, _: &mut Vec<Event>) {
        if let Some(worker) = &self.0 {
            worker.borrow_mut().reap();
        }
    }
}

impl Worker {
    fn start(&mut self, job: Job) {
        let (buffers, iovec) = match &job.work.0 {
            None => (Buffers::EMPTY, Box::new(libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 })),
            Some(buffer) => {
                let iovec = Box::new(libc::iovec { iov_base: buffer.as_ptr().cast(), iov_len: buffer.len() });
                let len = u32::try_from(buffer.len()).expect("a piece is at most 1 MiB");
                // SAFETY: iovec and memory are on the heap, owned by the entry in `under_way` until the completion has been
                // reaped; the memory is writable, not empty, and as long as said.
                (unsafe { Buffers::new(&raw const *iovec, 1, len) }, iovec)
            }
        };
        let (operation, lba, blocks) = (job.operation, Lba(job.lba), BlockCount(job.blocks));
        let token = Token(self.under_way.insert((job, iovec)) as u64);
        self.batch.push(Request { operation, lba, blocks, buffers, token });
        self.channel.submit(&mut self.batch);
    }

    fn reap(&mut self) {
        self.channel.reap(&mut self.completions);
        for Completion { token, outcome } in self.completions.drain(..) {
            let key = usize::try_from(token.0).expect("a token of ours");
            let (job, _) = self.under_way.remove(key).expect("a request ends once");
            // Who asked may have given up.
            let _ = self.ended.send((job, outcome));
        }
    }
}
