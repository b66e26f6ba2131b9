//! A user of a device, on a reactor, driven from the test's thread.

use super::PATIENCE;
use hawser_block::{
    BlockCount, Buffers, Channel, Completion, Device, Lba, Operation, Outcome, Request, Token,
};
use hawser_runtime::buffers::AlignedBuffer;
use hawser_runtime::{Event, ReactorHandle, Runtime, Source, SourceId};
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::{Arc, mpsc};

/// What a test asks for.
pub(super) struct Ask {
    pub(super) operation: Operation,
    pub(super) lba: u64,
    pub(super) blocks: u32,
    /// For a write: the content. For a read: only its length counts.
    pub(super) data: Vec<u8>,
    /// Into how many segments the memory is cut.
    pub(super) segments: usize,
    /// The memory was taken away by its owner.
    pub(super) gone: bool,
}

impl Ask {
    pub(super) fn read(lba: u64, blocks: u32, block_bytes: usize) -> Ask {
        let data = vec![0; blocks as usize * block_bytes];
        Ask { operation: Operation::Read, lba, blocks, data, segments: 1, gone: false }
    }

    pub(super) fn write(lba: u64, blocks: u32, data: Vec<u8>) -> Ask {
        Ask { operation: Operation::Write { fua: false }, lba, blocks, data, segments: 1, gone: false }
    }

    pub(super) fn plain(operation: Operation, lba: u64, blocks: u32) -> Ask {
        Ask { operation, lba, blocks, data: Vec::new(), segments: 1, gone: false }
    }
}

/// How it ended, and the memory then.
pub(super) struct Told {
    pub(super) token: u64,
    pub(super) outcome: Outcome,
    pub(super) data: Vec<u8>,
    /// It, to see whether it stays as it was.
    pub(super) memory: Memory,
}

pub(super) struct Memory {
    buffer: AlignedBuffer,
    len: usize,
    iovecs: Vec<libc::iovec>,
}

// SAFETY: the iovecs point into the buffer, which is this one's own.
unsafe impl Send for Memory {}

impl Memory {
    /// What it holds now.
    pub(super) fn bytes(&self) -> Vec<u8> {
        assert!(self.iovecs.len() <= self.len);
        // SAFETY: the request has ended: nothing writes to its memory.
        unsafe { self.buffer.slice(0, self.len) }.to_vec()
    }
}

struct User {
    channel: Option<Box<dyn Channel>>,
    memory: HashMap<u64, Memory>,
    tell: mpsc::Sender<Told>,
    batch: Vec<Request>,
    ended: Vec<Completion>,
}

impl User {
    fn submit(&mut self, token: u64, ask: &Ask) {
        let len = ask.data.len();
        let buffer = AlignedBuffer::new(len.max(1));
        // SAFETY: the buffer is new, at least `len` long, and apart from `ask`.
        unsafe { std::ptr::copy_nonoverlapping(ask.data.as_ptr(), buffer.as_ptr(), len) };
        let count = if len == 0 { 0 } else { ask.segments.clamp(1, len) };
        let iovecs: Vec<libc::iovec> = (0..count)
            .map(|index| {
                let (from, to) = (len * index / count, len * (index + 1) / count);
                let start = if ask.gone { nowhere() } else { buffer.as_ptr() };
                libc::iovec { iov_base: start.wrapping_add(from).cast(), iov_len: to - from }
            })
            .collect();
        let buffers = if len == 0 {
            Buffers::EMPTY
        } else {
            // SAFETY: memory and iovecs are kept in `memory` until the request has ended.
            unsafe {
                let (count, len) = (u32::try_from(count).unwrap(), u32::try_from(len).unwrap());
                Buffers::new(iovecs.as_ptr(), count, len)
            }
        };
        self.memory.insert(token, Memory { buffer, len, iovecs });
        self.batch.push(Request {
            operation: ask.operation,
            lba: Lba(ask.lba),
            blocks: BlockCount(ask.blocks),
            buffers,
            token: Token(token),
        });
    }
}

impl User {
    /// A request on memory of the test's own, in one piece: it stays until the request has ended.
    fn submit_at(&mut self, token: u64, operation: Operation, lba: u64, (start, len): (*mut u8, usize)) {
        let iovecs = vec![libc::iovec { iov_base: start.cast(), iov_len: len }];
        // SAFETY: the iovec is kept in `memory` until the request has ended; the test keeps what it names.
        let buffers = unsafe { Buffers::new(iovecs.as_ptr(), 1, u32::try_from(len).unwrap()) };
        self.memory.insert(token, Memory { buffer: AlignedBuffer::new(1), len: 1, iovecs });
        let blocks = BlockCount(u32::try_from(len / 512).unwrap());
        self.batch.push(Request { operation, lba: Lba(lba), blocks, buffers, token: Token(token) });
    }
}

impl Source for User {
    fn poll(&mut self, _: &Runtime, _: &mut Vec<Event>) {
        let Some(channel) = &mut self.channel else { return };
        channel.reap(&mut self.ended);
        for end in self.ended.drain(..) {
            let memory = self.memory.remove(&end.token.0).expect("a request ends once");
            let data = memory.bytes();
            let _ = self.tell.send(Told { token: end.token.0, outcome: end.outcome, data, memory });
        }
    }
}

/// A megabyte of address space with nothing behind it, left so for the process's life.
fn nowhere() -> *mut u8 {
    let (protection, flags) = (libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping that names no memory of anybody.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), 1 << 20, protection, flags, -1, 0) };
    assert_ne!(start, libc::MAP_FAILED);
    start.cast()
}

/// The test's end of a user.
pub(super) struct Client {
    reactor: ReactorHandle,
    key: u64,
    told: mpsc::Receiver<Told>,
    next_token: u64,
}

type UserOfReactor = (SourceId, Rc<RefCell<User>>);

#[derive(Default)]
struct Users(RefCell<HashMap<u64, UserOfReactor>>);

impl Client {
    pub(super) fn open(device: &Arc<impl Device + 'static>, reactor: &ReactorHandle) -> Client {
        use std::sync::atomic::{AtomicU64, Ordering};
        static KEYS: AtomicU64 = AtomicU64::new(0);
        let key = KEYS.fetch_add(1, Ordering::Relaxed);
        let (tell, told) = mpsc::channel();
        let device = Arc::clone(device);
        reactor.call(move |runtime| {
            let (memory, batch, ended) = Default::default();
            let user = Rc::new(RefCell::new(User { channel: None, memory, tell, batch, ended }));
            let id = runtime.add_source(Rc::clone(&user) as Rc<RefCell<dyn Source>>);
            user.borrow_mut().channel = Some(device.channel(runtime, id));
            runtime.local::<Users>().0.borrow_mut().insert(key, (id, user));
        });
        Client { reactor: reactor.clone(), key, told, next_token: 0 }
    }

    fn with<T: Send + 'static>(&self, job: impl FnOnce(&mut User) -> T + Send + 'static) -> T {
        let key = self.key;
        let job = move |runtime: &Runtime| {
            let users = runtime.local::<Users>();
            let user = Rc::clone(&users.0.borrow().get(&key).expect("opened").1);
            let mut user = user.borrow_mut();
            job(&mut user)
        };
        self.reactor.call(job).expect("the reactor runs")
    }

    /// Submits all in one batch; returns the first token, the others follow.
    pub(super) fn submit(&mut self, asks: Vec<Ask>) -> u64 {
        let first = self.next_token;
        self.next_token += asks.len() as u64;
        self.with(move |user| {
            for (index, ask) in asks.iter().enumerate() {
                user.submit(first + index as u64, ask);
            }
            let mut batch = std::mem::take(&mut user.batch);
            user.channel.as_mut().expect("open").submit(&mut batch);
            user.batch = batch;
        });
        first
    }

    /// Submits a request on memory of the test's own; its token.
    pub(super) fn submit_at(
        &mut self,
        operation: Operation,
        lba: u64,
        (start, len): (*mut u8, usize),
    ) -> u64 {
        let token = self.next_token;
        self.next_token += 1;
        let start = start as usize;
        self.with(move |user| {
            user.submit_at(token, operation, lba, (start as *mut u8, len));
            let mut batch = std::mem::take(&mut user.batch);
            user.channel.as_mut().expect("open").submit(&mut batch);
            user.batch = batch;
        });
        token
    }

    pub(super) fn next(&self) -> Told {
        self.told.recv_timeout(PATIENCE).expect("requests end")
    }

    /// What has ended by now, if anything.
    pub(super) fn try_next(&self) -> Option<Told> {
        self.told.try_recv().ok()
    }

    pub(super) fn run(&mut self, ask: Ask) -> Told {
        self.submit(vec![ask]);
        self.next()
    }

    pub(super) fn abort(&self) {
        self.with(|user| user.channel.as_mut().expect("open").abort());
    }

    pub(super) fn leave(&self) {
        self.with(|user| user.channel.as_mut().expect("open").leave());
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let key = self.key;
        self.reactor.call(move |runtime| {
            let removed = runtime.local::<Users>().0.borrow_mut().remove(&key);
            if let Some((id, user)) = removed {
                user.borrow_mut().channel = None;
                runtime.remove_source(id);
            }
        });
    }
}
