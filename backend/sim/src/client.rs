//! A client of a device: one request, awaited. For tests.

use hawser_block::{
    BlockCount, Buffers, Channel, Completion, Device, Lba, Operation, Outcome, Request, Token,
};
use hawser_runtime::buffers::AlignedBuffer;
use hawser_runtime::{Event, Runtime, Slab, Source, SourceId};
use std::cell::RefCell;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::{Poll, Waker};

struct Under {
    buffer: AlignedBuffer,
    _iovec: Box<libc::iovec>,
    outcome: Option<Outcome>,
    waker: Option<Waker>,
}

struct Inner {
    runtime: Runtime,
    source: SourceId,
    channel: Option<Box<dyn Channel>>,
    under_way: Slab<Under>,
    shift: u32,
}

/// A way to a device, for tasks of one reactor.
pub struct Client(Rc<RefCell<Inner>>);

struct Poller(Weak<RefCell<Inner>>);

impl Source for Poller {
    fn poll(&mut self, _: &Runtime, _: &mut Vec<Event>) {
        let Some(inner) = self.0.upgrade() else { return };
        let mut ended: Vec<Completion> = Vec::new();
        let mut inner = inner.borrow_mut();
        if let Some(channel) = &mut inner.channel {
            channel.reap(&mut ended);
        }
        for Completion { token, outcome } in ended {
            let key = usize::try_from(token.0).expect("a token of ours");
            let under = inner.under_way.get_mut(key).expect("a request ends once");
            under.outcome = Some(outcome);
            if let Some(waker) = under.waker.take() {
                waker.wake();
            }
        }
    }
}

impl Client {
    /// Opens a channel.
    ///
    /// # Panics
    /// When the device's geometry is not known.
    #[must_use]
    pub fn new(runtime: &Runtime, device: &Arc<dyn Device>) -> Client {
        let shift = device.geometry().expect("the device is reached").block_size.shift();
        Client(Rc::new_cyclic(|weak| {
            let source = runtime.add_source(Rc::new(RefCell::new(Poller(Weak::clone(weak)))));
            let channel = runtime.enter(|| device.channel(runtime, source));
            RefCell::new(Inner {
                runtime: runtime.clone(),
                source,
                channel: Some(channel),
                under_way: Slab::default(),
                shift,
            })
        }))
    }

    /// One request of `bytes` from `offset` on, in bytes; the payload comes back. What has none is only as long as `bytes`.
    ///
    /// # Panics
    /// When a request ends twice.
    pub async fn io(&self, operation: Operation, offset: u64, bytes: Vec<u8>) -> (Outcome, Vec<u8>) {
        let key = self.start(operation, offset, &bytes);
        let outcome = std::future::poll_fn(|cx| {
            let mut inner = self.0.borrow_mut();
            let under = inner.under_way.get_mut(key).expect("kept until somebody has looked");
            match under.outcome {
                Some(outcome) => Poll::Ready(outcome),
                None => {
                    under.waker = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await;
        let under = self.0.borrow_mut().under_way.remove(key).expect("just seen");
        // SAFETY: the request has ended, and the memory is ours.
        let payload = unsafe { under.buffer.slice(0, bytes.len()) }.to_vec();
        (outcome, payload)
    }

    /// Does not wait any longer: what is under way shall end soon, however it does.
    pub fn abort(&self) {
        if let Some(channel) = &mut self.0.borrow_mut().channel {
            channel.abort();
        }
    }

    fn start(&self, operation: Operation, offset: u64, bytes: &[u8]) -> usize {
        let buffer = AlignedBuffer::new(bytes.len());
        // SAFETY: the buffer is at least as long, and nobody else knows of it yet.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), buffer.as_ptr(), bytes.len()) };
        let iovec = Box::new(libc::iovec { iov_base: buffer.as_ptr().cast(), iov_len: bytes.len() });
        let len = u32::try_from(bytes.len()).expect("requests are small");
        let buffers = match operation.has_payload() {
            // SAFETY: iovec and buffer are on the heap, kept in `under_way` until the request has ended; not empty.
            true => unsafe { Buffers::new(&raw const *iovec, 1, len) },
            false => Buffers::EMPTY,
        };
        let mut inner = self.0.borrow_mut();
        let (shift, under) = (inner.shift, Under { buffer, _iovec: iovec, outcome: None, waker: None });
        let key = inner.under_way.insert(under);
        let is_flush = operation == Operation::Flush;
        let mut batch = vec![Request {
            operation,
            lba: Lba(if is_flush { 0 } else { offset >> shift }),
            blocks: BlockCount(if is_flush { 0 } else { len >> shift }),
            buffers,
            token: Token(key as u64),
        }];
        if let Some(channel) = &mut inner.channel {
            channel.submit(&mut batch);
        }
        key
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let mut inner = self.0.borrow_mut();
        inner.channel = None;
        let (runtime, source) = (inner.runtime.clone(), inner.source);
        drop(inner);
        runtime.remove_source(source);
    }
}
