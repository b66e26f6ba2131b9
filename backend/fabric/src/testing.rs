//! What the tests of leaf devices share: a reactor on the test's own thread, and a byte-wise model to compare with.

use hawser_block::{
    BlockCount, Buffers, Channel, Completion, Device, Geometry, Lba, Operation, Outcome, Request, Token,
};
use hawser_runtime::buffers::AlignedBuffer;
use hawser_runtime::{Event, Reactor, ReactorConfig, Runtime, Source, SourceId};
use std::cell::RefCell;
use std::rc::Rc;

/// The source that a channel wakes.
struct Idle;

impl Source for Idle {
    fn poll(&mut self, _: &Runtime, _: &mut Vec<Event>) {}
}

/// A seeded stream of numbers.
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn new(seed: u64) -> Numbers {
        Numbers(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// The next number below `bound`.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 16).unwrap() % bound
    }
}

/// A reactor to try devices on.
pub(crate) struct Harness {
    pub(crate) reactor: Reactor,
    pub(crate) user: SourceId,
}

impl Harness {
    pub(crate) fn new() -> Harness {
        let reactor = Reactor::new(ReactorConfig::default()).unwrap();
        let user = reactor.runtime().add_source(Rc::new(RefCell::new(Idle)));
        Harness { reactor, user }
    }

    pub(crate) fn open(&self, device: &dyn Device) -> Box<dyn Channel> {
        device.channel(self.reactor.runtime(), self.user)
    }

    /// Submits all and waits until all have ended.
    pub(crate) fn run(&mut self, channel: &mut dyn Channel, mut requests: Vec<Request>) -> Vec<Completion> {
        let count = requests.len();
        channel.submit(&mut requests);
        assert!(requests.is_empty());
        let mut ended = Vec::new();
        loop {
            channel.reap(&mut ended);
            if ended.len() >= count {
                assert_eq!(ended.len(), count);
                return ended;
            }
            self.reactor.step();
        }
    }

    /// Runs one request with a payload that lies at `skew` bytes after an aligned address.
    pub(crate) fn one(
        &mut self,
        channel: &mut dyn Channel,
        operation: Operation,
        (lba, blocks): (u64, u32),
        payload: &mut [u8],
        skew: usize,
    ) -> Outcome {
        let memory = AlignedBuffer::new(payload.len() + skew);
        // SAFETY: `memory` has `skew + payload.len()` bytes, apart from `payload`, and nobody else touches it now.
        unsafe { memory.as_ptr().add(skew).copy_from_nonoverlapping(payload.as_ptr(), payload.len()) };
        let iovec =
            libc::iovec { iov_base: memory.as_ptr().wrapping_add(skew).cast(), iov_len: payload.len() };
        let buffers = if payload.is_empty() {
            Buffers::EMPTY
        } else {
            // SAFETY: `iovec` and `memory` outlive the request, which has ended when `run` returns.
            unsafe { Buffers::new(&raw const iovec, 1, u32::try_from(payload.len()).unwrap()) }
        };
        let request =
            Request { operation, lba: Lba(lba), blocks: BlockCount(blocks), buffers, token: Token(77) };
        let ended = self.run(channel, vec![request]);
        assert_eq!(ended[0].token, Token(77));
        if operation == Operation::Read {
            // SAFETY: as above.
            unsafe {
                payload.as_mut_ptr().copy_from_nonoverlapping(memory.as_ptr().add(skew), payload.len())
            };
        }
        ended[0].outcome
    }
}

/// Payload memory cut into pieces of odd places and sizes.
pub(crate) struct Pieces {
    memory: AlignedBuffer,
    iovecs: Vec<libc::iovec>,
    len: usize,
}

impl Pieces {
    /// `len` bytes in up to `cuts + 1` pieces with gaps between; `unit` divides each piece's place and length.
    pub(crate) fn new(numbers: &mut Numbers, len: usize, cuts: usize, unit: usize) -> Pieces {
        let mut lens = Vec::new();
        let mut left = len;
        while left > 0 {
            let piece = if lens.len() == cuts { left } else { (numbers.below(left / unit) + 1) * unit };
            lens.push(piece);
            left -= piece;
        }
        let memory = AlignedBuffer::new(len + lens.len() * unit * 2);
        let mut at = 0;
        let iovecs = lens
            .iter()
            .map(|&piece| {
                at += numbers.below(2) * unit;
                let iovec = libc::iovec { iov_base: memory.as_ptr().wrapping_add(at).cast(), iov_len: piece };
                at += piece + unit;
                iovec
            })
            .collect();
        Pieces { memory, iovecs, len }
    }

    pub(crate) fn buffers(&self) -> Buffers {
        assert!(self.memory.len() >= self.len);
        let count = u32::try_from(self.iovecs.len()).unwrap();
        // SAFETY: the tests keep `self` until the request has ended; the lengths add up to `len`.
        unsafe { Buffers::new(self.iovecs.as_ptr(), count, u32::try_from(self.len).unwrap()) }
    }

    pub(crate) fn fill(&self, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.len);
        // SAFETY: ours, writable, as long as `bytes`, and no request is under way.
        unsafe { self.buffers().copy_from(bytes.as_ptr()) };
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        // SAFETY: as above.
        unsafe { self.buffers().copy_to(bytes.as_mut_ptr()) };
        bytes
    }
}

/// Compares a device with plain bytes over `rounds` batches of random requests that do not overlap within a batch.
/// `content` is what it holds now; `unit` divides the payload's places and lengths.
pub(crate) fn compare_with_model(
    harness: &mut Harness,
    device: &dyn Device,
    mut content: Vec<u8>,
    unit: usize,
    rounds: usize,
    seed: u64,
) {
    let geometry = device.geometry().unwrap();
    assert_eq!(content.len() as u64, geometry.size_bytes());
    let shift = geometry.block_size.shift();
    let mut numbers = Numbers::new(seed);
    let mut channel = harness.open(device);
    for round in 0..rounds {
        let mut requests = Vec::new();
        let mut reads: Vec<(Pieces, usize)> = Vec::new();
        let mut kept = Vec::new();
        let mut next_block = 0;
        let blocks_all = usize::try_from(geometry.blocks).unwrap();
        while next_block < blocks_all && requests.len() < 16 {
            let lba = next_block + numbers.below((blocks_all - next_block).min(40));
            let blocks = 1 + numbers.below((blocks_all - lba).min(40));
            next_block = lba + blocks;
            let (from, len) = (lba << shift, blocks << shift);
            let operation = random_operation(&mut numbers, &geometry);
            let mut buffers = Buffers::EMPTY;
            let mut range = (lba as u64, u32::try_from(blocks).unwrap());
            match operation {
                Operation::Read => {
                    let pieces = Pieces::new(&mut numbers, len, 5, unit);
                    buffers = pieces.buffers();
                    reads.push((pieces, from));
                }
                Operation::Write { .. } => {
                    let pieces = Pieces::new(&mut numbers, len, 5, unit);
                    let value = u8::try_from(numbers.below(256)).unwrap();
                    for (index, byte) in content[from..from + len].iter_mut().enumerate() {
                        *byte = value.wrapping_add(u8::try_from(index % 251).unwrap());
                    }
                    pieces.fill(&content[from..from + len]);
                    buffers = pieces.buffers();
                    kept.push(pieces);
                }
                Operation::Flush => range = (0, 0),
                Operation::Discard | Operation::WriteZeroes { .. } => content[from..from + len].fill(0),
            }
            let token = Token(requests.len() as u64);
            requests.push(Request {
                operation,
                lba: Lba(range.0),
                blocks: BlockCount(range.1),
                buffers,
                token,
            });
        }
        let mut ended = harness.run(channel.as_mut(), requests);
        ended.sort_by_key(|completion| completion.token);
        for (index, completion) in ended.iter().enumerate() {
            assert_eq!(*completion, Completion { token: Token(index as u64), outcome: Ok(()) });
        }
        for (pieces, from) in reads {
            let bytes = pieces.bytes();
            assert!(bytes == content[from..from + bytes.len()], "seed {seed} round {round}: read at {from}");
        }
    }
    let mut all = vec![0; content.len()];
    let most = (geometry.transfer_blocks_max as usize) << shift;
    for (index, chunk) in all.chunks_mut(most).enumerate() {
        let lba = (index * most) >> shift;
        let range = (lba as u64, u32::try_from(chunk.len() >> shift).unwrap());
        assert_eq!(harness.one(channel.as_mut(), Operation::Read, range, chunk, 0), Ok(()));
    }
    assert!(all == content, "seed {seed}: the whole content");
}

fn random_operation(numbers: &mut Numbers, geometry: &Geometry) -> Operation {
    loop {
        let flag = numbers.below(2) == 0;
        let operation = match numbers.below(10) {
            0..4 => Operation::Read,
            4..7 => Operation::Write { fua: flag },
            7 => Operation::Flush,
            8 => Operation::Discard,
            _ => Operation::WriteZeroes { unmap: flag, fua: numbers.below(2) == 0 },
        };
        let able = match operation {
            Operation::Discard => geometry.discard.is_some_and(|limits| limits.reads_zeroes),
            Operation::WriteZeroes { .. } => geometry.write_zeroes.is_some(),
            _ => true,
        };
        if able {
            return operation;
        }
    }
}

/// The requests that no device may take, with the outcome that each must have.
pub(crate) fn refuses_what_is_wrong(harness: &mut Harness, device: &dyn Device) {
    use hawser_block::Status;
    let geometry = device.geometry().unwrap();
    let block = geometry.block_size.bytes() as usize;
    let mut channel = harness.open(device);
    let last = geometry.blocks - 1;
    let zeroes = Operation::WriteZeroes { unmap: true, fua: false };
    let cases: [(Operation, u64, u32, usize); 10] = [
        (Operation::Read, 0, 0, 0),
        (Operation::Read, last, 2, 2 * block),
        (Operation::Read, last + 1, 1, block),
        (Operation::Write { fua: false }, u64::MAX, 1, block),
        (Operation::Read, 0, 2, block),
        (Operation::Write { fua: true }, 0, 1, 2 * block),
        (Operation::Read, 0, geometry.transfer_blocks_max + 1, block),
        (Operation::Discard, last, u32::MAX, 0),
        (Operation::Discard, 0, 0, 0),
        (zeroes, u64::MAX, 1, 0),
    ];
    for (operation, lba, blocks, len) in cases {
        let outcome = harness.one(channel.as_mut(), operation, (lba, blocks), &mut vec![0; len], 0);
        assert_eq!(outcome, Err(Status::Invalid), "{operation:?} {lba} {blocks} {len}");
    }
    assert_eq!(device.stats().failures(Status::Invalid), 10);
}
