//! A queue on a reactor of the calling thread, over a fake device and a piece of memory: for tests that stop the world
//! between two stores, and for the fuzz targets.

use crate::connection;
use crate::crash::Recorder;
use crate::dirty::Marks;
use crate::disk::{DiskConfig, DiskShared};
use crate::gate::Gate;
use crate::inflight::{LogError, QueueLog};
use crate::interrupt::Interrupt;
use crate::memory::{GuestMemory, Region, Share};
use crate::message::RegionDescription;
use crate::queue::{Queue, QueueSetup, Stopped, with_queue};
use crate::ring::{self, Ring};
use crate::session::{Session, SessionShared};
use crate::socket::SocketAccess;
use hawser_block::fake::FakeDevice;
use hawser_block::{BlockSize, Device, DiscardLimits, Geometry, WriteZeroesLimits};
use hawser_runtime::{Reactor, ReactorConfig, ReactorThread};
use std::cell::RefCell;
use std::fs::File;
use std::io::Write;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

/// Where the harness's memory begins for the guest.
pub(crate) const GUEST: u64 = 0x1_0000;
/// Its size in bytes.
pub(crate) const BYTES: u64 = 0x8_0000;
/// Where the three parts of the ring are, from the start of the memory.
pub(crate) const DESCRIPTORS: u64 = 0;
pub(crate) const AVAILABLE: u64 = 0x4000;
/// `used.idx` is in a page apart from the elements.
pub(crate) const USED: u64 = 0x4ffc;
/// What is behind the rings.
pub(crate) const DATA: u64 = 0x8000;

/// A memfd of this size.
pub(crate) fn memfd(bytes: u64) -> OwnedFd {
    // SAFETY: a literal C string and plain system calls; the descriptor is ours.
    unsafe {
        let fd = libc::memfd_create(c"harness".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0, "memfd");
        let fd = OwnedFd::from_raw_fd(fd);
        File::from(fd.try_clone().expect("dup")).set_len(bytes).expect("ftruncate");
        fd
    }
}

/// One disk over a fake device, and memory for a guest.
pub(crate) struct Harness {
    pub(crate) reactor: Reactor,
    pub(crate) device: Arc<FakeDevice>,
    pub(crate) disk: Arc<DiskShared>,
    pub(crate) memory: Arc<GuestMemory>,
}

/// A queue that was started on a [`Harness`].
pub(crate) struct Started {
    key: u64,
    #[cfg_attr(not(test), expect(dead_code, reason = "kept for the queue; tests look at it"))]
    pub(crate) session: Arc<SessionShared>,
}

pub(crate) fn geometry() -> Geometry {
    let mut geometry = Geometry::new(BlockSize::B512, 256);
    geometry.discard = Some(DiscardLimits { blocks_max: 100, granularity_blocks: 1, reads_zeroes: true });
    geometry.write_zeroes = Some(WriteZeroesLimits { blocks_max: 100, may_unmap: true });
    geometry.transfer_blocks_max = 64;
    geometry
}

pub(crate) fn config() -> DiskConfig {
    DiskConfig {
        name: "harness".into(),
        socket: "/nowhere".into(),
        access: SocketAccess::default(),
        serial: "harness".into(),
        queues: 2,
        read_only: false,
        drain_timeout: Duration::from_secs(5),
        index: 0,
        crash: None,
    }
}

impl Harness {
    pub(crate) fn new() -> Harness {
        let device = Arc::new(FakeDevice::new(geometry()));
        let shared = DiskShared::new(config(), Arc::clone(&device) as Arc<dyn Device>).expect("eventfd");
        let disk = Arc::new(shared);
        disk.refresh_geometry();
        // Two regions with a gap behind the second, so that ranges cross from one into the other.
        let file = memfd(BYTES);
        let first = BYTES / 2 + 0x123;
        let map = |from: u64, to: u64| {
            let description = RegionDescription {
                guest_address: GUEST + from,
                bytes: to - from,
                user_address: GUEST + from,
                file_offset: from,
            };
            Region::map(description, &file, &Share::default()).expect("mmap")
        };
        let memory = GuestMemory::new(vec![map(0, first), map(first, BYTES)]).expect("apart");
        let reactor = Reactor::new(ReactorConfig::default()).expect("io_uring");
        Harness { reactor, device, disk, memory: Arc::new(memory) }
    }

    /// Writes guest memory, from its start.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) {
        let mut done = 0;
        let whole = self.memory.pieces(GUEST + offset, bytes.len() as u64, |at, len| {
            // SAFETY: a checked piece of our own mapping; `bytes` has as much left.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr().add(done), at, len) };
            done += len;
            true
        });
        assert!(whole, "within the memory");
    }

    /// Reads guest memory, from its start.
    #[cfg(test)]
    pub(crate) fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len);
        let whole = self.memory.pieces(GUEST + offset, len as u64, |at, len| {
            // SAFETY: a checked piece of our own mapping, which nobody else writes to meanwhile.
            bytes.extend((0..len).map(|index| unsafe { at.add(index).read_volatile() }));
            true
        });
        assert!(whole, "within the memory");
        bytes
    }

    pub(crate) fn ring(&self, size: u16) -> Ring {
        let (descriptors, available, used) = ring::part_bytes(size);
        let part = |offset, bytes| self.memory.user(GUEST + offset, bytes).expect("within the first region");
        // SAFETY: all parts lie in one region of `self.memory`, which the queue gets too.
        let ring = unsafe {
            Ring::new(part(DESCRIPTORS, descriptors), part(AVAILABLE, available), part(USED, used), size)
        };
        ring.expect("aligned")
    }

    /// Starts a queue on what is in the memory and in the log, as a session would.
    pub(crate) fn start(
        &mut self,
        size: u16,
        event_idx: bool,
        log: Option<QueueLog>,
    ) -> Result<Started, LogError> {
        self.start_marking(size, event_idx, log, None)
    }

    /// The same, with a log of dirty pages.
    pub(crate) fn start_marking(
        &mut self,
        size: u16,
        event_idx: bool,
        mut log: Option<QueueLog>,
        marks: Option<Marks>,
    ) -> Result<Started, LogError> {
        let ring = self.ring(size);
        let next_used = ring.used_idx();
        let unfinished = match &mut log {
            Some(log) => log.recover(next_used, ring.available_idx(), size)?,
            None => Vec::new(),
        };
        let begun = u16::try_from(unfinished.len()).unwrap_or(0);
        let session = Arc::new(SessionShared::new().expect("eventfd"));
        let gate = Arc::new(Gate::default());
        gate.set_unfinished(0, !unfinished.is_empty());
        let setup = QueueSetup {
            index: 0,
            ring,
            memory: Arc::clone(&self.memory),
            kick: None,
            interrupt: Interrupt::new().expect("io_uring"),
            event_idx,
            indirect: true,
            flush: true,
            log,
            marks,
            unfinished,
            next_available: next_used.wrapping_add(begun),
            next_used,
            gate,
            disk: Arc::clone(&self.disk),
            session: Arc::clone(&session),
            recorder: Recorder::none(),
        };
        static KEYS: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1 << 32);
        let key = KEYS.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Queue::start(self.reactor.runtime(), key, setup);
        Ok(Started { key, session })
    }

    /// Passes of the reactor. A queue without a kick keeps it awake.
    pub(crate) fn steps(&mut self, count: usize) {
        for _ in 0..count {
            // Something to do in each pass, so that none sleeps.
            self.reactor.runtime().handle().run(|_| {});
            self.reactor.step();
        }
    }

    /// Stops a queue, giving up what is in flight if it does not end.
    pub(crate) fn stop(&mut self, started: &Started) -> Stopped {
        let (done, is_done) = mpsc::channel();
        with_queue(self.reactor.runtime(), started.key, |queue, runtime| queue.stop(runtime, false, done));
        for turn in 0..100 {
            if turn == 10 {
                with_queue(self.reactor.runtime(), started.key, |queue, _| queue.abort());
            }
            self.steps(1);
            if let Some(stopped) = taken(&is_done) {
                return stopped;
            }
        }
        panic!("a queue that was given up did not end");
    }
}

fn taken<T>(receiver: &Receiver<T>) -> Option<T> {
    receiver.try_recv().ok()
}

/// Parses and executes descriptor chains: `data` is the ring (descriptors, available ring) and what is behind it, over a
/// fake device.
///
/// Nothing outside of the guest's memory may be touched, and the queue must come to an end, whatever `data` is.
///
/// # Panics
/// When that is not so: a finding.
pub fn fuzz_chain(data: &[u8]) {
    thread_local! {
        static HARNESS: RefCell<Harness> = RefCell::new(Harness::new());
    }
    let Some((&[flags, avail], rest)) = data.split_first_chunk::<2>() else { return };
    HARNESS.with(|harness| {
        let mut harness = harness.borrow_mut();
        let harness = &mut *harness;
        harness.write(0, &vec![0; usize::try_from(BYTES).unwrap_or(0)]);
        let size = 1u16 << (flags & 7);
        // Descriptors, then the available ring's heads, then data that addresses from DATA on point to.
        let descriptor_bytes = (usize::from(size) * 16).min(rest.len());
        let (descriptors, rest) = rest.split_at(descriptor_bytes);
        harness.write(DESCRIPTORS, descriptors);
        let head_bytes = (usize::from(size) * 2).min(rest.len());
        let (heads, rest) = rest.split_at(head_bytes);
        harness.write(AVAILABLE + 4, heads);
        harness.write(AVAILABLE + 2, &u16::from(avail).to_le_bytes());
        harness.write(DATA, &rest[..rest.len().min(usize::try_from(BYTES - DATA).unwrap_or(0))]);
        let started = harness.start(size, flags & 8 != 0, None).expect("no log, no error");
        harness.steps(4);
        let used = harness.ring(size).used_idx();
        assert!(used <= size.max(u16::from(avail)), "more used elements than chains");
        harness.stop(&started);
        harness.device.state().log.clear();
    });
}

/// Feeds bytes to a session as a front end would send them, with a descriptor here and there.
///
/// # Panics
/// When the session panics or does not end: a finding.
pub fn fuzz_messages(data: &[u8]) {
    thread_local! {
        static DISK: (ReactorThread, Arc<DiskShared>) = {
            let device = Arc::new(FakeDevice::new(geometry()));
            let disk = Arc::new(DiskShared::new(config(), device).expect("eventfd"));
            disk.refresh_geometry();
            (ReactorThread::spawn("fuzz", ReactorConfig::default()).expect("reactor"), disk)
        };
    }
    DISK.with(|(reactor, disk)| {
        let (ours, theirs) = UnixStream::pair().expect("socketpair");
        let reactors: Arc<[_]> = Arc::from([reactor.handle().clone()]);
        std::thread::scope(|scope| {
            let session = Session::new(Arc::clone(disk), reactors, theirs).expect("eventfd");
            let session = scope.spawn(move || session.run());
            // A frame: which descriptor goes along (0: none), the length of what follows.
            let mut rest = data;
            while let Some((&[kind, len], more)) = rest.split_first_chunk::<2>() {
                let (bytes, more) = more.split_at(usize::from(len).min(more.len()));
                rest = more;
                let descriptor = match kind & 3 {
                    1 => connection::eventfd().ok(),
                    2 => Some(memfd(0x1_0000)),
                    3 => File::open("/dev/null").map(OwnedFd::from).ok(),
                    _ => None,
                };
                let descriptor = descriptor.as_ref().map(std::os::fd::AsFd::as_fd);
                if bytes.is_empty() || connection::send(&ours, bytes, descriptor).is_err() {
                    break;
                }
            }
            let _ = (&ours).flush();
            // The end of the connection is the end of the session.
            drop(ours);
            // Joined, not only awaited: a leak checker looks right after us.
            session.join().expect("a session does not panic");
        });
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Random(u64);

    impl Random {
        fn below(&mut self, below: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % below
        }

        fn byte(&mut self) -> u8 {
            self.below(256).to_le_bytes()[0]
        }
    }

    /// Descriptors that are nearly right: addresses near the edges of memory, small numbers, flags that mean something.
    fn chain_input(random: &mut Random) -> Vec<u8> {
        let mut bytes = vec![random.byte(), u8::try_from(random.below(12)).unwrap()];
        let size = 1u64 << (bytes[0] & 7);
        let edges =
            [0, GUEST, GUEST + DATA, GUEST + BYTES / 2, GUEST + BYTES / 2 + 0x123, GUEST + BYTES, u64::MAX];
        for _ in 0..size {
            let edge = edges[usize::try_from(random.below(edges.len() as u64)).unwrap()];
            let address = edge.wrapping_add(random.below(64) * 16).wrapping_sub(random.below(3) * 256);
            let len = [1, 16, 32, 512, 513, 4096, 48][usize::try_from(random.below(7)).unwrap()];
            bytes.extend_from_slice(&address.to_le_bytes());
            bytes.extend_from_slice(&u32::to_le_bytes(len));
            bytes.extend_from_slice(&[u8::try_from(random.below(8)).unwrap(), 0]);
            bytes.extend_from_slice(&u16::try_from(random.below(size + 1)).unwrap().to_le_bytes());
        }
        for _ in 0..size {
            bytes.extend_from_slice(&u16::try_from(random.below(size)).unwrap().to_le_bytes());
        }
        for _ in 0..64 {
            // Headers, and descriptors of indirect tables.
            bytes.extend_from_slice(&[u8::try_from(random.below(15)).unwrap(), 0, 0, 0, 0, 0, 0, 0]);
            bytes.extend_from_slice(&random.below(300).to_le_bytes());
        }
        bytes
    }

    /// A ring of 1024 long chains was taken off in one turn, while the reactor's other queues waited.
    #[test]
    fn a_turn_takes_its_share_of_a_full_ring_and_the_rest_follows_without_a_kick() {
        for (table_descriptors, chains_per_turn) in [(2u64, 128u64), (200, 21)] {
            let mut harness = Harness::new();
            harness.device.state().hold = true;
            let descriptor = |address: u64, len: u64, flags: u64, next: u64| {
                (u128::from(GUEST + address) | u128::from(len | flags << 32 | next << 48) << 64).to_le_bytes()
            };
            // All chains have the same table: a flush in many empty pieces.
            let table = DATA + 0x1000;
            for index in 0..table_descriptors - 1 {
                let len = if index == 0 { 16 } else { 0 };
                harness.write(table + 16 * index, &descriptor(DATA, len, 1, index + 1));
            }
            harness.write(table + 16 * (table_descriptors - 1), &descriptor(DATA + 16, 1, 2, 0));
            harness.write(DATA, &[4]);
            for head in 0..1024u16 {
                harness.write(16 * u64::from(head), &descriptor(table, 16 * table_descriptors, 4, 0));
                harness.write(AVAILABLE + 4 + 2 * u64::from(head), &head.to_le_bytes());
            }
            let started = harness.start(1024, true, None).expect("no log, no error");
            harness.write(AVAILABLE + 2, &1024u16.to_le_bytes());
            let taken = |harness: &Harness| {
                let counters = &harness.disk.counters[0];
                (counters.batches.get(), counters.requests.get())
            };
            // A held device wakes nobody: a pass has one turn for what was woken and one for what is seen in the ring.
            harness.steps(1);
            let (_, requests) = taken(&harness);
            assert!(requests > 0 && requests < 1024 && requests % chains_per_turn == 0, "{requests} at once");
            harness.steps(60);
            assert_eq!(taken(&harness), (1024u64.div_ceil(chains_per_turn), 1024));
            harness.stop(&started);
            assert_eq!(harness.ring(1024).used_idx(), 1024);
        }
    }

    #[test]
    fn chains_of_random_bytes_end() {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        for _ in 0..3000 {
            fuzz_chain(&chain_input(&mut random));
            let len = random.below(600);
            let noise: Vec<u8> = (0..len).map(|_| random.byte()).collect();
            fuzz_chain(&noise);
        }
    }

    #[test]
    fn messages_of_random_bytes_end_their_session() {
        let mut random = Random(0x1234_5678_9abc_def1);
        for _ in 0..300 {
            let mut bytes = Vec::new();
            for _ in 0..random.below(20) {
                let request = u32::try_from(random.below(48)).unwrap();
                let payload: Vec<u8> = (0..[0, 4, 8, 8, 8, 12, 20, 24, 40]
                    [usize::try_from(random.below(9)).unwrap()])
                    .map(|_| if random.below(3) == 0 { random.byte() } else { 0 })
                    .collect();
                bytes.push(random.byte());
                bytes.push(u8::try_from(12 + payload.len()).unwrap());
                bytes.extend_from_slice(&request.to_ne_bytes());
                bytes.extend_from_slice(&(1u32 | if random.below(2) == 0 { 8 } else { 0 }).to_ne_bytes());
                bytes.extend_from_slice(&u32::try_from(payload.len()).unwrap().to_ne_bytes());
                bytes.extend_from_slice(&payload);
            }
            fuzz_messages(&bytes);
        }
    }
}
