//! `mem:`, a device in anonymous memory that all reactors share.
//!
//! The memory is sparse: what was never written takes no space and reads as zeroes. Discarding, and writing zeroes, give
//! whole pages back. Payload is copied between the guest's pages and ours; nothing is ever in a volatile cache, because
//! what a flush could save it from (the end of this process) takes the memory along. So the UUID is a new one in each
//! process: nobody may take the next process's empty memory for the same blocks.
//!
//! A batch ends in portions, one in each `reap`, so that the guest is woken by the first requests while the last ones are copied.
//!
//! Two requests to the same blocks at the same time may tear each other's bytes, as on any disk.

use crate::leaf::{self, Tally};
use hawser_block::{
    BlockSize, Channel, Completion, Device, DeviceState, DiscardLimits, Geometry, IoKind, IoStats, Operation,
    Request, StatsSet, Status, WriteZeroesLimits,
};
use hawser_runtime::{Instant, Runtime, SourceId};
use std::collections::VecDeque;
use std::io;
use std::ptr::{self, NonNull};
use std::sync::Arc;

/// Zeroing that a reactor does in one go: 32 MiB are 8192 pages to give back, about a millisecond at worst.
const ZERO_BYTES_MAX: u32 = 32 << 20;

/// What is copied in one go: 4 requests of 4 KiB, or one larger. Waking a guest takes longer than copying 128 KiB, so the wake-up
/// is begun early and the rest is copied meanwhile: against portions of 128 KiB, 4k at depth 32 went up by 1.3 to 1.5.
const PASS_BYTES: usize = 16 << 10;
/// How much of the next request is fetched while this one is copied: without it the copy waits for memory half of its time.
const PREFETCH_BYTES: usize = 4096;

/// Writes of as many bytes pass the caches by: nobody reads them soon, and memory that is overwritten need not be fetched for it. For a client that
/// polls, 4 KiB take half of the time, and 1 MiB goes 1.6 times as fast from a copy that the cache has, as those of mirrors and stripes are.
const STREAM_BYTES: usize = 4 << 10;

const PAGE: usize = 4096;
const CACHE_LINE: usize = 64;

/// A device in memory.
pub struct MemDevice {
    name: String,
    geometry: Geometry,
    uuid: [u8; 16],
    memory: Arc<Mapping>,
    stats: Arc<StatsSet>,
}

impl MemDevice {
    /// A device of `size_bytes`, all zero.
    ///
    /// # Errors
    /// When the size is not a multiple of the block size, or the address space cannot be had: one line for people.
    pub fn new(name: &str, size_bytes: u64, block_size: BlockSize) -> Result<MemDevice, String> {
        let blocks = leaf::blocks_of(size_bytes, block_size)?;
        let memory = Mapping::new(size_bytes)
            .map_err(|error| format!("size {size_bytes} does not fit into memory: {error}"))?;
        let mut geometry = Geometry::new(block_size, blocks);
        let zero_blocks_max = ZERO_BYTES_MAX >> block_size.shift();
        geometry.discard = Some(DiscardLimits {
            blocks_max: zero_blocks_max,
            granularity_blocks: (4096 >> block_size.shift()).max(1),
            reads_zeroes: true,
        });
        geometry.write_zeroes = Some(WriteZeroesLimits { blocks_max: zero_blocks_max, may_unmap: true });
        Ok(MemDevice {
            name: name.to_owned(),
            geometry,
            uuid: random_uuid().map_err(|error| format!("no random numbers: {error}"))?,
            memory: Arc::new(memory),
            stats: Arc::default(),
        })
    }
}

/// A version-4 UUID.
fn random_uuid() -> io::Result<[u8; 16]> {
    let mut bytes = [0u8; 16];
    // SAFETY: `bytes` is 16 writable bytes.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if usize::try_from(got) != Ok(bytes.len()) {
        return Err(io::Error::last_os_error());
    }
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    Ok(bytes)
}

impl Device for MemDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn geometry(&self) -> Option<Geometry> {
        Some(self.geometry)
    }

    fn state(&self) -> DeviceState {
        DeviceState::Ready
    }

    fn uuid(&self) -> [u8; 16] {
        self.uuid
    }

    /// The memory itself: each process has another.
    fn cache_identity(&self) -> Option<[u8; 16]> {
        Some(self.uuid)
    }

    /// Nothing ever changes, so nobody is ever called.
    fn subscribe(&self, _: Box<dyn Fn() + Send + Sync>) {}

    fn channel(&self, runtime: &Runtime, user: SourceId) -> Box<dyn Channel> {
        Box::new(MemChannel {
            geometry: self.geometry,
            memory: Arc::clone(&self.memory),
            stats: self.stats.writer(runtime),
            runtime: runtime.clone(),
            user,
            waiting: VecDeque::new(),
            ended: Vec::new(),
        })
    }

    fn stats(&self) -> Arc<StatsSet> {
        Arc::clone(&self.stats)
    }

    /// Memory of ours is what it is made of: everything is copied.
    fn copied_bytes(&self) -> Vec<(&'static str, u64)> {
        let bytes = self.stats.bytes(IoKind::Read) + self.stats.bytes(IoKind::Write);
        vec![("mem", bytes)]
    }
}

/// Private anonymous memory without reserved swap.
struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: plain memory that is only ever touched through raw pointers, by copies that no reference relies on.
unsafe impl Send for Mapping {}
// SAFETY: as above; concurrent copies to the same bytes give torn bytes, which is what a disk promises.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(size_bytes: u64) -> io::Result<Mapping> {
        let len = usize::try_from(size_bytes).map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
        // SAFETY: a fresh anonymous mapping, placed by the kernel: touches nothing that exists.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: our own mapping of `len` bytes. Without huge pages it works as well, only slower: no error to handle.
        unsafe { libc::madvise(start, len, libc::MADV_HUGEPAGE) };
        let start = NonNull::new(start.cast::<u8>()).ok_or_else(io::Error::last_os_error)?;
        Ok(Mapping { start, len })
    }

    /// The first byte of a range.
    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(offset <= self.len && len <= self.len - offset, "range outside of the device");
        self.start.as_ptr().wrapping_add(offset)
    }

    /// Makes a range read as zeroes; whole pages are given back.
    fn zero(&self, offset: usize, len: usize) {
        let start = self.at(offset, len);
        let head = start.align_offset(PAGE).min(len);
        let pages = (len - head) / PAGE * PAGE;
        // SAFETY: all three parts are within the range, which is within the mapping (asserted in `at`). MADV_DONTNEED on
        // private anonymous memory makes it read as zeroes; where it fails, the bytes are overwritten.
        unsafe {
            ptr::write_bytes(start, 0, head);
            let middle = start.add(head);
            if pages > 0 && libc::madvise(middle.cast(), pages, libc::MADV_DONTNEED) != 0 {
                ptr::write_bytes(middle, 0, pages);
            }
            ptr::write_bytes(middle.add(pages), 0, len - head - pages);
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our own mapping; the last channel is gone, and no operation outlives `submit`.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

struct MemChannel {
    geometry: Geometry,
    memory: Arc<Mapping>,
    stats: Arc<IoStats>,
    runtime: Runtime,
    user: SourceId,
    /// Not begun, with the time of their submission.
    waiting: VecDeque<(Request, Instant)>,
    ended: Vec<Completion>,
}

impl MemChannel {
    /// Carries out what waits, as far as one pass goes.
    fn run(&mut self) {
        let mut budget = PASS_BYTES;
        let mut tally = Tally::default();
        let mut tally_started = self.waiting.front().map_or(self.runtime.now(), |(_, started)| *started);
        while budget > 0 {
            let Some((request, started)) = self.waiting.pop_front() else { break };
            let outcome = leaf::check(&self.geometry, &request);
            match outcome {
                Ok(()) => {
                    let bytes = leaf::bytes_of(&self.geometry, &request);
                    self.prefetch_next();
                    self.execute(&request, bytes);
                    // Giving pages back costs about an eighth of copying them.
                    let cost = if request.operation.has_payload() { bytes } else { bytes / 8 };
                    budget = budget.saturating_sub(cost);
                    if started != tally_started {
                        tally.record(&self.stats, self.runtime.refresh_now().ns_since(tally_started));
                        tally = Tally::default();
                        tally_started = started;
                    }
                    tally.add(request.operation, bytes);
                }
                Err(_) => self.stats.record(request.operation.into(), 0, 0, outcome),
            }
            self.ended.push(Completion { token: request.token, outcome });
        }
        end_of_streams();
        tally.record(&self.stats, self.runtime.refresh_now().ns_since(tally_started));
        self.runtime.wake(self.user);
    }

    /// Brings our side of the next request's payload closer, unless it passes the caches by.
    #[inline]
    fn prefetch_next(&self) {
        let Some((next, _)) = self.waiting.front() else { return };
        let is_cached = next.operation == Operation::Read || next.buffers.len() < STREAM_BYTES;
        if next.operation.has_payload() && is_cached {
            // Not checked yet: any address will do.
            let offset = usize::try_from(next.lba.0 << self.geometry.block_size.shift()).unwrap_or(0);
            let start = self.memory.start.as_ptr().wrapping_add(offset);
            for line in (0..next.buffers.len().min(PREFETCH_BYTES)).step_by(CACHE_LINE) {
                prefetch(start.wrapping_add(line));
            }
        }
    }

    /// Carries out a request that was checked.
    fn execute(&self, request: &Request, bytes: usize) {
        let shift = self.geometry.block_size.shift();
        let offset = usize::try_from(request.lba.0 << shift).expect("checked: within a mapping of ours");
        match request.operation {
            // SAFETY: `at` gives `bytes` bytes of our own, apart from the payload, which is as long (checked), and valid
            // and writable while the request lives, which it does until its completion is reaped.
            Operation::Read => unsafe { request.buffers.copy_from(self.memory.at(offset, bytes)) },
            // SAFETY: as above.
            Operation::Write { .. } if bytes < STREAM_BYTES => unsafe {
                request.buffers.copy_to(self.memory.at(offset, bytes));
            },
            Operation::Write { .. } => {
                let mut to = self.memory.at(offset, bytes);
                for segment in request.buffers.segments() {
                    // SAFETY: as above; the segments are as long together as the range.
                    unsafe {
                        stream(segment.start, to, segment.len);
                        to = to.add(segment.len);
                    }
                }
            }
            Operation::Discard | Operation::WriteZeroes { .. } => self.memory.zero(offset, bytes),
            Operation::Flush => {}
        }
    }
}

impl Channel for MemChannel {
    fn submit(&mut self, batch: &mut Vec<Request>) {
        // Not looked at again for each: it was, when the reactor came here.
        let now = self.runtime.now();
        // No other copy comes before the first of them, beside which it would be fetched.
        let was_empty = self.waiting.is_empty();
        self.waiting.extend(batch.drain(..).map(|request| (request, now)));
        if was_empty {
            self.prefetch_next();
        }
        self.runtime.wake(self.user);
    }

    fn reap(&mut self, ended: &mut Vec<Completion>) {
        if !self.waiting.is_empty() {
            self.run();
        }
        ended.append(&mut self.ended);
    }

    fn is_working(&self) -> bool {
        // A wake-up for each large request would cost as much as its copy.
        self.waiting.front().is_some_and(|(request, _)| request.buffers.len() < PASS_BYTES)
    }

    fn abort(&mut self) {
        let now = self.runtime.now();
        for (request, started) in self.waiting.drain(..) {
            let outcome = Err(Status::Aborted);
            self.stats.record(request.operation.into(), 0, now.ns_since(started), outcome);
            self.ended.push(Completion { token: request.token, outcome });
        }
        self.runtime.wake(self.user);
    }
}

/// Copies, and leaves no trace of `to` in the caches. What was copied is seen by others in order only after [`end_of_streams`].
///
/// # Safety
/// As of [`ptr::copy_nonoverlapping`]; others may write to `from` meanwhile.
unsafe fn stream(from: *const u8, to: *mut u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
        let head = to.align_offset(CACHE_LINE).min(len);
        let lines = (len - head) / CACHE_LINE * CACHE_LINE;
        #[expect(clippy::cast_ptr_alignment, reason = "loads need none, and stores have it")]
        // SAFETY: all offsets are below `len`, of which the caller vouches for both sides; what is streamed to begins at a cache line, and so
        // each word of it is aligned. SSE2 is part of x86-64.
        unsafe {
            ptr::copy_nonoverlapping(from, to, head);
            for line in (head..head + lines).step_by(CACHE_LINE) {
                let (from, to) = (from.add(line).cast::<__m128i>(), to.add(line).cast::<__m128i>());
                let words = [0, 1, 2, 3].map(|word| _mm_loadu_si128(from.add(word)));
                for (word, value) in words.into_iter().enumerate() {
                    _mm_stream_si128(to.add(word), value);
                }
            }
            let rest = head + lines;
            ptr::copy_nonoverlapping(from.add(rest), to.add(rest), len - rest);
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    // SAFETY: the caller vouches for both sides.
    unsafe {
        ptr::copy_nonoverlapping(from, to, len);
    }
}

/// What was streamed is there for others before whatever is stored from here on.
fn end_of_streams() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a fence; SSE is part of x86-64.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

/// Brings a line into the second-level cache; any address will do.
#[inline]
fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch of any address is harmless.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Harness, compare_with_model, refuses_what_is_wrong};

    #[test]
    fn random_requests_match_a_byte_wise_model() {
        for (seed, block_size, unit) in
            [(1, BlockSize::B512, 1), (2, BlockSize::B4096, 1), (3, BlockSize::B512, 512)]
        {
            let mut harness = Harness::new();
            let device = MemDevice::new("m", 300 * 4096, block_size).unwrap();
            compare_with_model(&mut harness, &device, vec![0; 300 * 4096], unit, 300, seed);
            refuses_what_is_wrong(&mut harness, &device);
        }
    }

    #[test]
    fn every_edge_of_zeroing_keeps_its_neighbours() {
        let mut harness = Harness::new();
        let size = 6 * 4096;
        for (from, to) in (0..12u32).flat_map(|from| (from + 1..=48).map(move |to| (from, to))) {
            let device = MemDevice::new("m", size as u64, BlockSize::B512).unwrap();
            let mut channel = harness.open(&device);
            let mut all = vec![0xee; size];
            let write = Operation::Write { fua: false };
            assert_eq!(harness.one(channel.as_mut(), write, (0, 48), &mut all, 0), Ok(()));
            let range = (u64::from(from), to - from);
            assert_eq!(harness.one(channel.as_mut(), Operation::Discard, range, &mut [], 0), Ok(()));
            assert_eq!(harness.one(channel.as_mut(), Operation::Read, (0, 48), &mut all, 0), Ok(()));
            for (index, byte) in all.iter().enumerate() {
                let zeroed = (from as usize * 512..to as usize * 512).contains(&index);
                assert_eq!(*byte, if zeroed { 0 } else { 0xee }, "{from}..{to} byte {index}");
            }
        }
    }

    #[test]
    fn reactors_share_the_content_and_processes_do_not_share_the_uuid() {
        let device = MemDevice::new("m", 8192, BlockSize::B4096).unwrap();
        let mut one = Harness::new();
        let mut channel = one.open(&device);
        let mut payload = vec![7; 4096];
        assert_eq!(
            one.one(channel.as_mut(), Operation::Write { fua: false }, (1, 1), &mut payload, 0),
            Ok(())
        );
        let mut other = Harness::new();
        let mut channel = other.open(&device);
        let mut back = vec![0; 4096];
        assert_eq!(other.one(channel.as_mut(), Operation::Read, (1, 1), &mut back, 1), Ok(()));
        assert_eq!(back, payload);
        let another = MemDevice::new("m", 8192, BlockSize::B4096).unwrap();
        assert_ne!(device.uuid(), another.uuid());
        assert_eq!(device.uuid()[6] >> 4, 4);
        assert!(MemDevice::new("m", 1 << 60, BlockSize::B512).err().unwrap().contains("memory"));
    }
}
