//! The volume over a fake member, beside a flat array of bytes.

use hawser_block::fake::FakeDevice;
use hawser_block::{
    BlockCount, BlockSize, Buffers, Channel, Completion, Device, DiscardLimits, Geometry, Lba, Operation,
    Request, Status, Token, WriteZeroesLimits,
};
use hawser_runtime::{Event, Reactor, ReactorConfig, Runtime, Source, SourceId};
use hawser_volume::Volume;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

struct Nothing;

impl Source for Nothing {
    fn poll(&mut self, _: &Runtime, _: &mut Vec<Event>) {}
}

fn user(reactor: &Reactor) -> SourceId {
    reactor.runtime().add_source(Rc::new(RefCell::new(Nothing)))
}

/// A generator with a seed that failures print.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }

    fn small(&mut self, bound: u64) -> u32 {
        u32::try_from(self.below(bound)).unwrap()
    }
}

fn run(channel: &mut dyn Channel, requests: &[Request]) -> Vec<Completion> {
    let mut batch = requests.to_vec();
    channel.submit(&mut batch);
    assert!(batch.is_empty(), "submit takes everything");
    let mut ended = Vec::new();
    channel.reap(&mut ended);
    ended
}

#[test]
fn random_requests_over_members_of_every_limit_read_back_like_the_model() {
    let reactor = Reactor::new(ReactorConfig::default()).unwrap();
    for seed in 0..60 {
        let mut random = Random(seed);
        let blocks = 1 + random.below(400);
        let member = Arc::new(FakeDevice::new(Geometry {
            transfer_blocks_max: 1 + random.small(40),
            discard: Some(DiscardLimits {
                blocks_max: 1 + random.small(40),
                granularity_blocks: 1 + random.small(9),
                reads_zeroes: true,
            }),
            write_zeroes: Some(WriteZeroesLimits { blocks_max: 1 + random.small(40), may_unmap: true }),
            ..Geometry::new(BlockSize::B512, blocks)
        }));
        let volume = Volume::whole("v".into(), Arc::clone(&member) as Arc<dyn Device>, false);
        let mut channel = volume.channel(reactor.runtime(), user(&reactor));
        let mut model = vec![0u8; usize::try_from(blocks).unwrap() * 512];
        for step in 0..200u64 {
            let lba = random.below(blocks + 2);
            let count = random.small(60);
            let len = count as usize * 512;
            let fits = count > 0 && lba < blocks && u64::from(count) <= blocks - lba;
            let from = usize::try_from(lba).unwrap() * 512;
            let mut payload: Vec<u8> = (0..len).map(|_| random.below(256).to_le_bytes()[0]).collect();
            // Two segments, cut anywhere.
            let cut = usize::try_from(random.below(len.max(1) as u64)).unwrap();
            let base = payload.as_mut_ptr();
            let mut iovecs = vec![
                libc::iovec { iov_base: base.cast(), iov_len: cut },
                libc::iovec { iov_base: base.wrapping_add(cut).cast(), iov_len: len - cut },
            ];
            iovecs.retain(|iovec| iovec.iov_len > 0);
            let n = u32::try_from(iovecs.len()).unwrap();
            // SAFETY: `payload` and `iovecs` outlive the request, which ends in `run`.
            let buffers = unsafe { Buffers::new(iovecs.as_ptr(), n, u32::try_from(len).unwrap()) };
            let operation = match random.below(4) {
                0 => Operation::Read,
                1 => Operation::Write { fua: random.below(2) == 0 },
                2 => Operation::Discard,
                _ => Operation::WriteZeroes { unmap: random.below(2) == 0, fua: false },
            };
            let buffers = if operation.has_payload() { buffers } else { Buffers::EMPTY };
            let token = Token(step);
            let request = Request { operation, lba: Lba(lba), blocks: BlockCount(count), buffers, token };
            let ended = run(&mut *channel, &[request]);
            let offered = volume.geometry().unwrap();
            let blocks_max = match operation {
                Operation::Discard => offered.discard.unwrap().blocks_max,
                Operation::WriteZeroes { .. } => offered.write_zeroes.unwrap().blocks_max,
                _ => offered.transfer_blocks_max,
            };
            let ok = fits && count <= blocks_max;
            let outcome = if ok { Ok(()) } else { Err(Status::Invalid) };
            assert_eq!(ended, [Completion { token, outcome }], "seed {seed} step {step}");
            if !ok {
                continue;
            }
            match operation {
                Operation::Read => assert_eq!(payload, model[from..from + len], "seed {seed} step {step}"),
                Operation::Write { .. } => model[from..from + len].copy_from_slice(&payload),
                _ => model[from..from + len].fill(0),
            }
        }
        assert_eq!(member.state().content, model, "seed {seed}");
    }
}

#[test]
fn a_split_request_ends_once_with_the_first_failure_and_pieces_keep_fua() {
    let reactor = Reactor::new(ReactorConfig::default()).unwrap();
    let member =
        Arc::new(FakeDevice::new(Geometry { transfer_blocks_max: 2, ..Geometry::new(BlockSize::B512, 16) }));
    let volume = Volume::whole("v".into(), Arc::clone(&member) as Arc<dyn Device>, false);
    let mut channel = volume.channel(reactor.runtime(), user(&reactor));
    let mut payload = [7u8; 8 * 512];
    let iovec = libc::iovec { iov_base: payload.as_mut_ptr().cast(), iov_len: payload.len() };
    // SAFETY: `payload` and `iovec` outlive the request.
    let buffers = unsafe { Buffers::new(&raw const iovec, 1, 4096) };
    let operation = Operation::Write { fua: true };
    let write = Request { operation, lba: Lba(3), blocks: BlockCount(8), buffers, token: Token(1) };
    member.state().outcomes = [Ok(()), Err(Status::Aborted), Err(Status::Media), Ok(())].into();
    assert_eq!(run(&mut *channel, &[write]), [Completion { token: Token(1), outcome: Err(Status::Media) }]);
    let expected: Vec<_> = (0..4).map(|piece| (operation, 3 + 2 * piece, 2)).collect();
    assert_eq!(member.state().log, expected);
}

#[test]
fn requests_that_are_held_below_end_after_abort() {
    let reactor = Reactor::new(ReactorConfig::default()).unwrap();
    let member =
        Arc::new(FakeDevice::new(Geometry { transfer_blocks_max: 2, ..Geometry::new(BlockSize::B512, 16) }));
    member.state().hold = true;
    let volume = Volume::whole("v".into(), Arc::clone(&member) as Arc<dyn Device>, false);
    let mut channel = volume.channel(reactor.runtime(), user(&reactor));
    let flush = Request {
        operation: Operation::Flush,
        lba: Lba(0),
        blocks: BlockCount(0),
        buffers: Buffers::EMPTY,
        token: Token(9),
    };
    assert_eq!(run(&mut *channel, &[flush]), []);
    channel.abort();
    let mut ended = Vec::new();
    channel.reap(&mut ended);
    assert_eq!(ended, [Completion { token: Token(9), outcome: Err(Status::Aborted) }]);
}
