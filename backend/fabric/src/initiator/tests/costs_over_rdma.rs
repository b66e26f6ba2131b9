//! What a command costs over RDMA beside the device's own: no memory is allocated, the reactor's loop goes round for batches and not for
//! commands, and a batch is posted with one doorbell.

use super::over_rdma::{Announcement, Lab, lab};
use super::*;
use hawser_block::{BlockCount, Buffers, Channel, Completion, Lba, Operation, Request, Token};
use hawser_runtime::{Event, ReactorHandle, Runtime, Source};
use hawser_sim::verbs;
use hawser_verbs_abi::{Queue, ReceiveRequest, SendRequest, Table, WorkCompletion};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
    static DOORBELLS: Cell<u64> = const { Cell::new(0) };
    static IN_DEVICE: Cell<bool> = const { Cell::new(false) };
}

/// Counts what a thread allocates outside of the simulated device.
struct Counting;

fn count() {
    if !IN_DEVICE.get() {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
    }
}

// SAFETY: everything is passed on to the system's allocator as it is; the counters are plain values that allocate nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, len: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.realloc(memory, layout, len) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn in_device<T>(call: impl FnOnce() -> T) -> T {
    IN_DEVICE.set(true);
    let result = call();
    IN_DEVICE.set(false);
    result
}

unsafe extern "C" fn post_send(
    queue: *mut Queue,
    requests: *const SendRequest,
    len: u32,
    posted: *mut u32,
) -> i32 {
    DOORBELLS.set(DOORBELLS.get() + 1);
    // SAFETY: the caller's promise.
    in_device(|| unsafe { (verbs::TABLE.post_send)(queue, requests, len, posted) })
}

unsafe extern "C" fn post_receive(
    queue: *mut Queue,
    requests: *const ReceiveRequest,
    len: u32,
    posted: *mut u32,
) -> i32 {
    // SAFETY: the caller's promise.
    in_device(|| unsafe { (verbs::TABLE.post_receive)(queue, requests, len, posted) })
}

unsafe extern "C" fn poll(queue: *mut Queue, out: *mut WorkCompletion, len: u32) -> i32 {
    // SAFETY: the caller's promise.
    in_device(|| unsafe { (verbs::TABLE.poll)(queue, out, len) })
}

unsafe extern "C" fn arm(queue: *mut Queue) -> i32 {
    // SAFETY: the caller's promise.
    in_device(|| unsafe { (verbs::TABLE.arm)(queue) })
}

/// The simulated verbs, counted.
pub(super) static TABLE: Table = Table { post_send, post_receive, poll, arm, ..verbs::TABLE };

const BATCH: usize = 64;
const LEN: usize = 4096;

/// Submits batches on its reactor, one after the other, without allocating anything.
struct Pump {
    channel: Option<Box<dyn Channel>>,
    operation: Operation,
    iovecs: Vec<libc::iovec>,
    batch: Vec<Request>,
    ended: Vec<Completion>,
    under_way: usize,
    left: usize,
    done: mpsc::SyncSender<()>,
}

impl Pump {
    fn submit(&mut self) {
        for (index, iovec) in self.iovecs.iter().enumerate() {
            // SAFETY: the iovec stays where it is, and the test keeps the memory that it names.
            let buffers = unsafe { Buffers::new(iovec, 1, u32::try_from(LEN).unwrap()) };
            let (lba, blocks) = (Lba(8 * index as u64), BlockCount(8));
            let token = Token(index as u64);
            self.batch.push(Request { operation: self.operation, lba, blocks, buffers, token });
        }
        self.under_way = BATCH;
        self.left -= 1;
        self.channel.as_mut().expect("open").submit(&mut self.batch);
    }
}

impl Source for Pump {
    fn poll(&mut self, _: &Runtime, _: &mut Vec<Event>) {
        let Some(channel) = &mut self.channel else { return };
        channel.reap(&mut self.ended);
        self.under_way -= self.ended.len();
        assert!(self.ended.drain(..).all(|ended| ended.outcome.is_ok()));
        match (self.under_way, self.left) {
            (0, 0) => drop(self.done.try_send(())),
            (0, _) => self.submit(),
            _ => {}
        }
    }
}

#[derive(Default)]
struct Pumps(RefCell<Vec<(hawser_runtime::SourceId, Rc<RefCell<Pump>>)>>);

/// What a reactor has allocated, how often it has rung, and its passes.
fn costs(reactor: &ReactorHandle) -> [u64; 3] {
    let [allocations, doorbells] = reactor.call(|_| [ALLOCATIONS.get(), DOORBELLS.get()]).unwrap();
    [allocations, doorbells, reactor.stats().passes.load(Ordering::Relaxed)]
}

fn batches(lab: &Lab, memory: &Announcement, operation: Operation, rounds: usize) {
    let (done, is_done) = mpsc::sync_channel(1);
    let (device, start) = (Arc::clone(lab.device()), memory.start() as usize);
    let host = lab.reactors()[0].handle();
    host.call(move |runtime| {
        let place = |index: usize| (start + index * LEN) as *mut libc::c_void;
        let iovecs = (0..BATCH).map(|index| libc::iovec { iov_base: place(index), iov_len: LEN }).collect();
        let (batch, ended) = (Vec::with_capacity(BATCH), Vec::with_capacity(BATCH));
        let pump = Pump { channel: None, operation, iovecs, batch, ended, under_way: 0, left: rounds, done };
        let pump = Rc::new(RefCell::new(pump));
        let id = runtime.add_source(Rc::clone(&pump) as Rc<RefCell<dyn Source>>);
        pump.borrow_mut().channel = Some(device.channel(runtime, id));
        pump.borrow_mut().submit();
        runtime.local::<Pumps>().0.borrow_mut().push((id, pump));
    });
    is_done.recv_timeout(PATIENCE).unwrap();
    host.call(|runtime| {
        for (id, pump) in runtime.local::<Pumps>().0.borrow_mut().drain(..) {
            pump.borrow_mut().channel = None;
            runtime.remove_source(id);
        }
    });
}

#[test]
fn a_command_allocates_nothing_and_a_batch_rings_once() {
    const ROUNDS: usize = 100;
    let lab = lab(|_| {});
    let memory = Announcement::new(BATCH * LEN);
    for operation in [Operation::Read, Operation::Write { fua: false }] {
        let measure = |rounds: usize| {
            let before = lab.reactors().each_ref().map(|reactor| costs(reactor.handle()));
            batches(&lab, &memory, operation, rounds);
            let after = lab.reactors().each_ref().map(|reactor| costs(reactor.handle()));
            [0, 1].map(|side| [0, 1, 2].map(|what| after[side][what] - before[side][what]))
        };
        // Room is made when it is first needed.
        measure(10);
        let [few, many] = [measure(1), measure(1 + ROUNDS)];
        let [host, target] =
            [0, 1].map(|side| [0, 1, 2].map(|what| many[side][what].saturating_sub(few[side][what])));
        println!("{operation:?}: {ROUNDS} batches of {BATCH}: host {host:?}, target {target:?}");
        // A tick of the second, a keep-alive, and what the test itself asks may fall into one and not the other.
        assert!(host[0] < 10 && target[0] < 10, "{operation:?}: allocations");
        assert_eq!(host[1], ROUNDS as u64, "{operation:?}: doorbells of the host");
        // The loop makes at most one system call each time that it goes round.
        let commands = (ROUNDS * BATCH) as u64;
        assert!(host[2] < commands / 4 && target[2] < commands / 4, "{operation:?}: passes");
        assert!(target[1] < commands / 4, "{operation:?}: doorbells of the target");
    }
    drop(memory);
    lab.end();
}
