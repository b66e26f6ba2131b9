//! Member I/O for tasks: one request, awaited.
//!
//! Owns: a reactor's own channels to the members, beside those of the queues. What a request names is kept here until it has ended,
//! whoever waits for it.

use super::bounce::Bounce;
use super::twin::Twin;
use super::wait::all;
use crate::engine::Volume;
use hawser_block::{
    BlockCount, Buffers, Channel, Completion, Device, Lba, Operation, Outcome, Request, Status, Token,
};
use hawser_runtime::{Event, Runtime, Slab, Source, SourceId};
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

/// A member's device as pools use it: whatever length a request has, and told apart from others.
#[derive(Clone)]
pub(crate) struct Leaf {
    /// What was given to us.
    pub(crate) device: Arc<dyn Device>,
    /// The same, which takes whole requests and splits them.
    pub(crate) whole: Arc<Volume>,
    /// log2 of the block size, which does not change.
    pub(crate) shift: u32,
    /// The device, when it is two.
    pub(crate) twin: Option<Arc<Twin>>,
}

impl Leaf {
    /// Only when the device was reached.
    pub(crate) fn new(device: Arc<dyn Device>) -> Option<Leaf> {
        let shift = device.geometry()?.block_size.shift();
        let whole = Arc::new(Volume::whole(device.name().to_owned(), Arc::clone(&device), false));
        Some(Leaf { device, whole, shift, twin: None })
    }

    /// One that is being replaced, and the other.
    pub(crate) fn twin(old: &Leaf, new: &Leaf) -> Leaf {
        let twin = Arc::new(Twin::new(Arc::clone(&old.device), Arc::clone(&new.device)));
        let device = Arc::clone(&twin) as Arc<dyn Device>;
        let whole = Arc::new(Volume::whole(device.name().to_owned(), Arc::clone(&device), false));
        Leaf { device, whole, shift: old.shift, twin: Some(twin) }
    }

    pub(crate) fn same(&self, other: &Leaf) -> bool {
        Arc::ptr_eq(&self.device, &other.device)
    }

    /// Whether some device is in both.
    pub(crate) fn is_kin(&self, other: &Leaf) -> bool {
        self.devices().any(|one| other.devices().any(|other| Arc::ptr_eq(one, other)))
    }

    fn devices(&self) -> impl Iterator<Item = &Arc<dyn Device>> {
        let (first, second) = match &self.twin {
            Some(twin) => (&twin.old, Some(&twin.new)),
            None => (&self.device, None),
        };
        std::iter::once(first).chain(second)
    }

    pub(crate) fn name(&self) -> &str {
        self.device.name()
    }
}

/// A request's number, for whoever waits.
struct Waiting {
    outcome: Option<Outcome>,
    waker: Option<Waker>,
    /// Nobody waits any more.
    is_left: bool,
    /// What the request names.
    _kept: Option<Rc<Bounce>>,
}

struct Lane {
    leaf: Leaf,
    channel: Box<dyn Channel>,
    batch: Vec<Request>,
    outstanding: usize,
}

/// This reactor's ways to the members, by the members' numbers.
pub(crate) struct Lanes {
    runtime: Runtime,
    source: Cell<Option<SourceId>>,
    lanes: RefCell<Vec<Lane>>,
    /// The lane that is looked at first.
    turn: Cell<usize>,
    waiting: RefCell<Slab<Waiting>>,
    ended: RefCell<Vec<Completion>>,
}

struct Poller(Weak<Lanes>);

impl Source for Poller {
    fn poll(&mut self, _: &Runtime, _: &mut Vec<Event>) {
        if let Some(lanes) = self.0.upgrade() {
            lanes.poll();
        }
    }
}

impl Lanes {
    pub(crate) fn new(runtime: &Runtime) -> Rc<Lanes> {
        let lanes = Rc::new(Lanes {
            runtime: runtime.clone(),
            source: Cell::new(None),
            lanes: RefCell::default(),
            turn: Cell::new(0),
            waiting: RefCell::default(),
            ended: RefCell::default(),
        });
        let poller = Rc::new(RefCell::new(Poller(Rc::downgrade(&lanes))));
        lanes.source.set(Some(runtime.add_source(poller)));
        lanes
    }

    fn source(&self) -> SourceId {
        self.source.get().expect("set when it was made")
    }

    fn poll(&self) {
        let mut lanes = self.lanes.borrow_mut();
        let mut ended = self.ended.borrow_mut();
        for lane in lanes.iter_mut().filter(|lane| !lane.batch.is_empty()) {
            lane.channel.submit(&mut lane.batch);
        }
        // Of members that do their work in this thread one has its turn: requests that have come meanwhile do not wait for all of them.
        let (count, first) = (lanes.len(), self.turn.get());
        let mut has_worked = false;
        for step in 0..count {
            let at = (first + step) % count;
            let lane = &mut lanes[at];
            if lane.outstanding == 0 {
                continue;
            }
            let is_working = lane.channel.is_working();
            if is_working && has_worked {
                self.runtime.wake(self.source());
                continue;
            }
            if is_working {
                has_worked = true;
                self.turn.set(at + 1);
            }
            let before = ended.len();
            lane.channel.reap(&mut ended);
            lane.outstanding -= ended.len() - before;
        }
        drop(lanes);
        let mut waiting = self.waiting.borrow_mut();
        for Completion { token, outcome } in ended.drain(..) {
            let key = usize::try_from(token.0).expect("a token of ours");
            let entry = waiting.get_mut(key).expect("a request ends once");
            if entry.is_left {
                waiting.remove(key);
                continue;
            }
            entry.outcome = Some(outcome);
            if let Some(waker) = entry.waker.take() {
                waker.wake();
            }
        }
    }

    /// Starts a request of bytes of a device: `kept` is what its buffers name, if that is ours.
    pub(crate) fn start(
        self: &Rc<Self>,
        leaf: &Leaf,
        operation: Operation,
        offset: u64,
        buffers: Buffers,
        kept: Option<Rc<Bounce>>,
    ) -> Io {
        let blocks = u32::try_from(buffers.len()).expect("far below 4 GiB") >> leaf.shift;
        self.start_blocks(leaf, operation, offset, blocks, buffers, kept)
    }

    fn start_blocks(
        self: &Rc<Self>,
        leaf: &Leaf,
        operation: Operation,
        offset: u64,
        blocks: u32,
        buffers: Buffers,
        kept: Option<Rc<Bounce>>,
    ) -> Io {
        let mut lanes = self.lanes.borrow_mut();
        let at = lanes.iter().position(|lane| lane.leaf.same(leaf)).unwrap_or_else(|| {
            let channel = leaf.whole.channel(&self.runtime, self.source());
            lanes.push(Lane { leaf: leaf.clone(), channel, batch: Vec::new(), outstanding: 0 });
            lanes.len() - 1
        });
        let waiting = Waiting { outcome: None, waker: None, is_left: false, _kept: kept };
        let key = self.waiting.borrow_mut().insert(waiting);
        let is_flush = operation == Operation::Flush;
        let lba = if is_flush { 0 } else { offset >> leaf.shift };
        lanes[at].batch.push(Request {
            operation,
            lba: Lba(lba),
            blocks: BlockCount(blocks),
            buffers,
            token: Token(key as u64),
        });
        lanes[at].outstanding += 1;
        self.runtime.wake(self.source());
        Io { lanes: Rc::clone(self), key, is_over: false }
    }

    pub(crate) async fn read(
        self: &Rc<Self>,
        leaf: &Leaf,
        offset: u64,
        into: &Rc<Bounce>,
        at: usize,
        len: usize,
    ) -> Outcome {
        let buffers = into.buffers(at, len);
        self.start(leaf, Operation::Read, offset, buffers, Some(Rc::clone(into))).await
    }

    /// Reads a device's bytes into a buffer of their own.
    pub(crate) async fn read_bytes(
        self: &Rc<Self>,
        leaf: &Leaf,
        offset: u64,
        len: usize,
    ) -> Result<Rc<Bounce>, Status> {
        let into = Rc::new(Bounce::zeroed(len));
        self.read(leaf, offset, &into, 0, len).await?;
        Ok(into)
    }

    /// The write goes on whether it is awaited or not: several are begun, and then awaited one after the other.
    pub(crate) fn write(
        self: &Rc<Self>,
        leaf: &Leaf,
        offset: u64,
        from: &Rc<Bounce>,
        at: usize,
        len: usize,
        fua: bool,
    ) -> Io {
        let buffers = from.buffers(at, len);
        self.start(leaf, Operation::Write { fua }, offset, buffers, Some(Rc::clone(from)))
    }

    pub(crate) async fn discard(self: &Rc<Self>, leaf: &Leaf, offset: u64, len: u64) -> Outcome {
        let blocks = u32::try_from(len >> leaf.shift).expect("far below 2^32 blocks");
        self.start_blocks(leaf, Operation::Discard, offset, blocks, Buffers::EMPTY, None).await
    }

    pub(crate) async fn flush(self: &Rc<Self>, leaf: &Leaf) -> Outcome {
        self.start(leaf, Operation::Flush, 0, Buffers::EMPTY, None).await
    }

    /// Writes the same bytes to all of them at the same time; how each ended.
    pub(crate) async fn write_to_all(
        self: &Rc<Self>,
        to: &[(u16, Leaf)],
        offset: u64,
        from: &Rc<Bounce>,
        len: usize,
        fua: bool,
    ) -> Vec<(u16, Outcome)> {
        let writes = to.iter().map(|(member, leaf)| async move {
            (*member, self.write(leaf, offset, from, 0, len, fua).await)
        });
        all(writes).await
    }

    /// Ends what is under way at a device as soon as that can be done safely.
    pub(crate) fn abort(&self, leaf: &Leaf) {
        self.end_all(leaf, |channel| channel.abort());
    }

    /// The same at the device of a member that is out, which the superblocks say: what its writes do there later does not matter.
    pub(crate) fn leave(&self, leaf: &Leaf) {
        self.end_all(leaf, |channel| channel.leave());
    }

    fn end_all(&self, leaf: &Leaf, end: impl Fn(&mut dyn Channel)) {
        for lane in self.lanes.borrow_mut().iter_mut().filter(|lane| lane.leaf.is_kin(leaf)) {
            if !lane.batch.is_empty() {
                lane.channel.submit(&mut lane.batch);
            }
            end(lane.channel.as_mut());
        }
        // What has ended by it is seen now, not when something else ends.
        if let Some(source) = self.source.get() {
            self.runtime.wake(source);
        }
    }

    /// Nobody will start anything any more, and all has ended.
    pub(crate) fn close(&self) {
        if let Some(source) = self.source.take() {
            self.runtime.remove_source(source);
        }
        self.lanes.borrow_mut().clear();
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        self.close();
    }
}

/// The end of a request.
pub(crate) struct Io {
    lanes: Rc<Lanes>,
    key: usize,
    is_over: bool,
}

impl Future for Io {
    type Output = Outcome;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome> {
        let lanes = Rc::clone(&self.lanes);
        let mut waiting = lanes.waiting.borrow_mut();
        let entry = waiting.get_mut(self.key).expect("kept until somebody has looked");
        let Some(outcome) = entry.outcome else {
            entry.waker = Some(cx.waker().clone());
            return Poll::Pending;
        };
        waiting.remove(self.key);
        self.is_over = true;
        Poll::Ready(outcome)
    }
}

impl Drop for Io {
    fn drop(&mut self) {
        if self.is_over {
            return;
        }
        let mut waiting = self.lanes.waiting.borrow_mut();
        let Some(entry) = waiting.get_mut(self.key) else { return };
        if entry.outcome.is_some() {
            waiting.remove(self.key);
        } else {
            entry.is_left = true;
        }
    }
}
