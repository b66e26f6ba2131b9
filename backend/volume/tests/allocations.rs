//! The hot path of a pool's volume allocates nothing: an allocator that counts, under the channel that a disk uses.
//!
//! What is counted is what submitting and reaping do on this thread, the members' channels included, once everything has been used
//! before.

use hawser_block::fake::FakeDevice;
use hawser_block::{
    BlockCount, BlockSize, Buffers, Channel, Completion, Device, Geometry, Lba, Operation, Request, Token,
};
use hawser_runtime::buffers::AlignedBuffer;
use hawser_runtime::{Event, Reactor, ReactorConfig, Runtime, Source};
use hawser_volume::pool::{self, Ask, CreateOptions, MemoryTail, OpenOptions, Pool};
use hawser_volume::raid::Level;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

/// The system's allocator, and how often each thread has asked it for something.
struct Counting;

thread_local! {
    static ASKED: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    // A thread that is ending has no count any more.
    let _ = ASKED.try_with(|asked| asked.set(asked.get() + 1));
}

// SAFETY: everything is handed to the system's allocator as it came; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are ours.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are ours.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, len: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are ours.
        unsafe { System.realloc(start, layout, len) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are ours.
        unsafe { System.dealloc(start, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn asked(work: impl FnOnce()) -> u64 {
    let before = ASKED.get();
    work();
    ASKED.get() - before
}

const EXTENT_BYTES: u64 = 64 << 10;
const VOLUME_BYTES: u64 = 8 << 20;
/// What of the volume is written at first; the rest reads as zeroes.
const WRITTEN_BYTES: u64 = 4 << 20;
const BATCH: usize = 32;

struct Nothing;

impl Source for Nothing {
    fn poll(&mut self, _: &Runtime, _: &mut Vec<Event>) {}
}

struct Scene {
    reactor: Reactor,
    members: Vec<Arc<FakeDevice>>,
    channel: Option<Box<dyn Channel>>,
    _payload: AlignedBuffer,
    iovec: Box<libc::iovec>,
    batch: Vec<Request>,
    ended: Vec<Completion>,
    random: u64,
}

impl Scene {
    fn new(level: Level, members: usize) -> (Scene, Pool) {
        let reactor = Reactor::new(ReactorConfig::default()).expect("io_uring");
        let geometry = Geometry { volatile_cache: true, ..Geometry::new(BlockSize::B512, (24 << 20) / 512) };
        let members: Vec<_> = (0..members).map(|_| Arc::new(FakeDevice::new(geometry))).collect();
        let payload = AlignedBuffer::new(1 << 20);
        let iovec = Box::new(libc::iovec { iov_base: payload.as_ptr().cast(), iov_len: payload.len() });
        let mut scene = Scene {
            reactor,
            members,
            channel: None,
            _payload: payload,
            iovec,
            batch: Vec::with_capacity(2 * BATCH),
            ended: Vec::with_capacity(2 * BATCH),
            random: 1,
        };
        let devices: Vec<_> =
            scene.members.iter().map(|device| Arc::clone(device) as Arc<dyn Device>).collect();
        let handle = scene.reactor.runtime().handle();
        let options = CreateOptions {
            strip_bytes: 16 << 10,
            extent_bytes: EXTENT_BYTES,
            region_bytes: 1 << 20,
            log_bytes: 256 << 10,
            metadata_bytes: Some(1 << 20),
            ..CreateOptions::new("p", [9; 16], level)
        };
        scene.ask(pool::create(&handle, devices.clone(), options));
        let tail = Box::new(MemoryTail::default());
        let pool = scene.ask(Pool::open(&handle, devices, OpenOptions::new([7; 16], tail)));
        scene.ask(pool.create_volume("v", VOLUME_BYTES));
        let user = scene.reactor.runtime().add_source(Rc::new(RefCell::new(Nothing)));
        let device = pool.device("v").expect("just made");
        scene.channel = Some(device.channel(scene.reactor.runtime(), user));
        (scene, pool)
    }

    fn ask<T: Send + 'static>(&mut self, ask: Ask<T>) -> T {
        let answer = Rc::new(RefCell::new(None));
        let place = Rc::clone(&answer);
        self.reactor.runtime().spawn(async move { *place.borrow_mut() = Some(ask.await) });
        while answer.borrow().is_none() {
            self.step();
        }
        answer.take().expect("it is there").expect("it succeeds")
    }

    /// Whatever waits, off the hot path.
    fn step(&mut self) {
        let runtime = self.reactor.runtime().clone();
        runtime.enter(|| self.reactor.step());
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.random =
            self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) % bound
    }

    /// A batch of requests in the first `bytes` of the volume.
    fn fill(&mut self, count: usize, operation: Operation, len: u32, bytes: u64) {
        for number in 0..count as u64 {
            let at = self.below((bytes - u64::from(len)) / 4096 + 1) * 4096;
            // SAFETY: the iovec names the whole buffer; both stay in place for as long as the scene, whose requests all end.
            let buffers = unsafe { Buffers::new(&raw const *self.iovec, 1, 1 << 20) }.slice(0, len as usize);
            let blocks = BlockCount(len / 512);
            self.batch.push(Request { operation, lba: Lba(at / 512), blocks, buffers, token: Token(number) });
        }
    }

    /// Carries the batch out; whether it ended without the reactor's help: on the hot path.
    fn carry_out(&mut self) -> bool {
        let (channel, count) = (self.channel.as_mut().expect("opened"), self.batch.len());
        channel.submit(&mut self.batch);
        channel.reap(&mut self.ended);
        self.ended.len() == count
    }

    fn finish(&mut self, count: usize) {
        while self.ended.len() < count {
            self.step();
            self.channel.as_mut().expect("opened").reap(&mut self.ended);
        }
        assert!(self.ended.iter().all(|completion| completion.outcome == Ok(())), "{:?}", self.ended);
        self.ended.clear();
    }

    /// What a round of batches allocates, when all of it is on the hot path.
    fn allocations(&mut self, count: usize, operation: Operation, len: u32, bytes: u64) -> u64 {
        for member in &self.members {
            member.state().log.clear();
            member.state().log.reserve(1 << 16);
        }
        let mut total = 0;
        for _ in 0..8 {
            self.fill(count, operation, len, bytes);
            let mut is_hot = false;
            total += asked(|| is_hot = self.carry_out());
            assert!(is_hot, "{operation:?} of {len} bytes took another way");
            self.finish(count);
        }
        total
    }
}

const WRITE: Operation = Operation::Write { fua: false };

#[test]
fn reads_and_overwrites_allocate_nothing() {
    let levels = [
        (Level::Linear, 2),
        (Level::Raid0, 2),
        (Level::Raid1, 2),
        (Level::Raid1, 3),
        (Level::Raid10, 4),
        (Level::Raid10, 3),
    ];
    for (level, members) in levels {
        let (mut scene, pool) = Scene::new(level, members);
        for at in (0..WRITTEN_BYTES).step_by(1 << 20) {
            // The first writes find nothing mapped: that allocates, and so the counter works.
            // SAFETY: as in `fill`.
            let buffers = unsafe { Buffers::new(&raw const *scene.iovec, 1, 1 << 20) };
            for number in 0..BATCH as u64 {
                let len = (1 << 20) / BATCH as u64;
                let buffers = buffers.slice(0, 1 << 15);
                let (lba, blocks) = (Lba((at + number * len) / 512), BlockCount(64));
                scene.batch.push(Request { operation: WRITE, lba, blocks, buffers, token: Token(number) });
            }
            assert!(asked(|| assert!(!scene.carry_out())) > 0, "the counter does not count");
            scene.finish(BATCH);
        }
        let whole = VOLUME_BYTES;
        let rounds = [
            ("reads", Operation::Read, 4096, WRITTEN_BYTES),
            ("long reads", Operation::Read, 128 << 10, WRITTEN_BYTES),
            ("reads of what is not there too", Operation::Read, 256 << 10, whole),
            ("overwrites", WRITE, 4096, WRITTEN_BYTES),
            ("long overwrites", WRITE, 128 << 10, WRITTEN_BYTES),
        ];
        for (what, operation, len, bytes) in rounds {
            // Chance gives one member more of a batch than another: twice as much has been seen by all then.
            scene.allocations(2 * BATCH, operation, len, bytes);
            let again = scene.allocations(BATCH, operation, len, bytes);
            assert_eq!(again, 0, "{what} on {level}, {members} members");
        }
        scene.channel = None;
        scene.ask(pool.close());
    }
}

/// Whole stripes, each once in a batch: two that are written at the same time wait for each other, which is not hot.
#[test]
fn reads_and_whole_stripes_with_parity_allocate_nothing() {
    for (level, members, data) in [(Level::Raid5, 3, 2), (Level::Raid6, 4, 2)] {
        let (mut scene, pool) = Scene::new(level, members);
        let stripe = data * (16 << 10);
        let write = |scene: &mut Scene, count: u64| {
            for number in 0..count {
                // SAFETY: as in `fill`.
                let buffers = unsafe { Buffers::new(&raw const *scene.iovec, 1, 1 << 20) };
                let buffers = buffers.slice(0, usize::try_from(stripe).expect("small"));
                let (lba, blocks) =
                    (Lba(number * stripe / 512), BlockCount(u32::try_from(stripe / 512).expect("small")));
                scene.batch.push(Request { operation: WRITE, lba, blocks, buffers, token: Token(number) });
            }
        };
        for round in 0..12 {
            write(&mut scene, 32);
            for member in &scene.members {
                member.state().log.clear();
                member.state().log.reserve(1 << 16);
            }
            let mut is_hot = false;
            let count = asked(|| is_hot = scene.carry_out());
            // At first nothing is mapped, marked, or used before.
            assert!(
                round < 4 || (is_hot && count == 0),
                "{level}: round {round}: {is_hot}, {count} allocations"
            );
            scene.finish(32);
        }
        scene.allocations(2 * BATCH, Operation::Read, 4096, 1 << 20);
        assert_eq!(scene.allocations(BATCH, Operation::Read, 4096, 1 << 20), 0, "reads on {level}");
        // In parts, several under way.
        for round in 0..12 {
            for number in 0..4 {
                // SAFETY: as in `fill`.
                let buffers = unsafe { Buffers::new(&raw const *scene.iovec, 1, 1 << 20) };
                let (lba, blocks) = (Lba(number * 2048), BlockCount(2048));
                scene.batch.push(Request { operation: WRITE, lba, blocks, buffers, token: Token(number) });
            }
            for member in &scene.members {
                member.state().log.clear();
            }
            let mut is_hot = false;
            let count = asked(|| is_hot = scene.carry_out());
            assert!(
                round < 4 || (is_hot && count == 0),
                "{level}: 1 MiB, round {round}: {is_hot}, {count} allocations"
            );
            scene.finish(4);
        }
        scene.channel = None;
        scene.ask(pool.close());
    }
}
