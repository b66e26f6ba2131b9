//! The queue pair against a scripted controller that reads our bytes and answers with its own, cut anywhere.

use super::*;
use crate::initiator::batch::SEND_IOVECS_MAX;
use crate::initiator::fuzz::fuzz;
use crate::nvme::bytes::get_array;
use crate::nvme::command::io_opcode;
use crate::nvme::{Cqe, StatusCode};
use crate::tcp::pdu::PduKind;
use crate::tcp::{CommonHeader, FatalStatus, ReadyToTransfer};
use proptest::prelude::*;

const LIMITS: Limits =
    Limits { in_capsule_max: 4096, host_data_max: 8192, alignment: 4, digests: Digests::NONE, flow: None };

/// Memory of one request: some segments, and the iovecs that name them.
struct Memory {
    _segments: Vec<Vec<u8>>,
    iovecs: Vec<libc::iovec>,
    len: u32,
}

impl Memory {
    fn new(lens: &[usize], fill: impl Fn(usize) -> u8) -> Memory {
        let mut at = 0;
        let mut segments: Vec<Vec<u8>> = lens
            .iter()
            .map(|len| {
                let segment = (at..at + len).map(&fill).collect();
                at += len;
                segment
            })
            .collect();
        let iovecs = segments
            .iter_mut()
            .map(|segment| libc::iovec { iov_base: segment.as_mut_ptr().cast(), iov_len: segment.len() })
            .collect();
        Memory { _segments: segments, iovecs, len: u32::try_from(at).unwrap() }
    }

    fn buffers(&self) -> Buffers {
        // SAFETY: the segments live as long as `self`, which the tests keep until the command has ended.
        unsafe { Buffers::new(self.iovecs.as_ptr(), u32::try_from(self.iovecs.len()).unwrap(), self.len) }
    }

    fn content(&self) -> Vec<u8> {
        let mut content = vec![0; self.len as usize];
        // SAFETY: `content` is as long as the buffers, which live.
        unsafe { self.buffers().copy_to(content.as_mut_ptr()) };
        content
    }
}

fn pattern(at: usize) -> u8 {
    (at.wrapping_mul(31) >> 3).to_le_bytes()[0]
}

/// Sends everything that is ready, in one send, and returns its bytes.
fn transmit(pair: &mut QueuePair<u32>) -> Vec<u8> {
    let bytes = begin_transmit(pair);
    pair.transmitted();
    bytes
}

fn begin_transmit(pair: &mut QueuePair<u32>) -> Vec<u8> {
    let mut iovecs = Vec::new();
    let len = pair.poll_transmit(&mut iovecs);
    assert!(iovecs.len() <= SEND_IOVECS_MAX);
    let mut bytes = Vec::new();
    for iovec in &iovecs {
        // SAFETY: what `poll_transmit` names is valid until `transmitted`.
        bytes.extend_from_slice(unsafe { std::slice::from_raw_parts(iovec.iov_base.cast(), iovec.iov_len) });
    }
    assert_eq!(bytes.len(), len);
    bytes
}

/// Gives bytes to the pair as the driver would: what it wants in place goes there, the rest through staging.
fn receive(pair: &mut QueuePair<u32>, mut bytes: &[u8], cut: usize) -> Result<(), QueueError> {
    while !bytes.is_empty() {
        let mut chunk = &bytes[..bytes.len().min(cut)];
        bytes = &bytes[chunk.len()..];
        if let Some(place) = pair.receive_into() {
            let take = chunk.len().min(place.len());
            // SAFETY: the command has not ended.
            unsafe { place.slice(0, take).copy_from(chunk.as_ptr()) };
            pair.handle_in_place(u32::try_from(take).unwrap())?;
            chunk = &chunk[take..];
        }
        pair.handle_bytes(chunk)?;
    }
    Ok(())
}

/// What a controller reads from us.
#[derive(Debug)]
enum Heard {
    Command(Sqe, Vec<u8>),
    Data(DataPdu, Vec<u8>),
}

fn listen(bytes: &[u8]) -> Vec<Heard> {
    listen_to(bytes, Digests::NONE)
}

fn listen_to(mut bytes: &[u8], digests: Digests) -> Vec<Heard> {
    let mut heard = Vec::new();
    while !bytes.is_empty() {
        let header = CommonHeader::decode(&get_array(bytes, 0), Receiver::Controller, digests).unwrap();
        let len = header.header_len();
        if digests.header {
            assert_eq!(pdu::digest(&bytes[..len - 4]), bytes[len - 4..len]);
        }
        let data = bytes[usize::from(header.data_offset)..][..header.data_len as usize].to_vec();
        let data = if header.data_len == 0 { Vec::new() } else { data };
        if digests.data && !data.is_empty() {
            assert_eq!(pdu::digest(&data), bytes[header.len as usize - 4..header.len as usize]);
        }
        heard.push(match header.kind {
            PduKind::Command => Heard::Command(pdu::command_from_bytes(&get_array(bytes, 0)), data),
            PduKind::HostData => Heard::Data(DataPdu::decode(&header, &get_array(bytes, 0)).unwrap(), data),
            other => panic!("{other:?}"),
        });
        bytes = &bytes[header.len as usize..];
    }
    heard
}

fn data_bytes(cid: u16, offset: u32, data: &[u8], last: bool, success: bool) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap();
    let pdu = DataPdu { cid, tag: 0, offset, len, last, success };
    let mut bytes = pdu.to_bytes(Receiver::Host, Digests::NONE, 4).to_vec();
    bytes.extend_from_slice(data);
    bytes
}

fn answer_bytes(cid: u16) -> Vec<u8> {
    pdu::response_to_bytes(&Cqe::success(cid), Digests::NONE).to_vec()
}

fn ends(pair: &mut QueuePair<u32>) -> Vec<(u32, bool)> {
    pair.ended().map(|ended| (ended.user, ended.answer.status.is_success())).collect()
}

fn only_command(bytes: &[u8]) -> Sqe {
    match listen(bytes).as_slice() {
        [Heard::Command(sqe, _)] => *sqe,
        other => panic!("{other:?}"),
    }
}

/// A pair with one read of 8 KiB sent, and its identifier.
fn with_read(memory: &Memory) -> (QueuePair<u32>, u16) {
    let mut pair = QueuePair::new(4, LIMITS);
    pair.submit(Sqe::read(1, 0, 16, Sgl::NONE), Transfer::ToHost(memory.buffers()), 7);
    let cid = only_command(&transmit(&mut pair)).cid;
    (pair, cid)
}

fn field(result: Result<(), QueueError>) -> (&'static str, u16) {
    match result.unwrap_err() {
        QueueError::Protocol(error) => (error.field, error.status.0),
        QueueError::Terminated(term) => ("terminated", term.status.0),
        QueueError::Corrupted { .. } => ("corrupted", 0),
    }
}

#[test]
fn reads_end_out_of_order_whatever_the_cuts() {
    for cut in [1, 7, 23, 24, 25, 31, 48, 97, 119].into_iter().chain([4096, 24 + 200_000, 1 << 20]) {
        let small = Memory::new(&[100, 412], |_| 0);
        let large = Memory::new(&[4096, 1, 295_903], |_| 0);
        let mut pair = QueuePair::new(8, LIMITS);
        pair.submit(Sqe::read(1, 0, 1, Sgl::NONE), Transfer::ToHost(small.buffers()), 1);
        pair.submit(Sqe::read(1, 0, 1, Sgl::NONE), Transfer::ToHost(large.buffers()), 2);
        let heard = listen(&transmit(&mut pair));
        let cids: Vec<u16> = heard
            .iter()
            .map(|heard| match heard {
                Heard::Command(sqe, data) => {
                    assert!(data.is_empty());
                    assert_eq!(sqe.sgl.identifier, Sgl::TRANSPORT);
                    sqe.cid
                }
                Heard::Data(..) => panic!(),
            })
            .collect();
        let content: Vec<u8> = (0..300_000).map(pattern).collect();
        let mut bytes = data_bytes(cids[1], 0, &content[..1000], false, false);
        bytes.extend(data_bytes(cids[1], 1000, &content[1000..], true, false));
        bytes.extend(data_bytes(cids[0], 0, &content[..512], true, true));
        bytes.extend(answer_bytes(cids[1]));
        receive(&mut pair, &bytes, cut).unwrap();
        assert_eq!(ends(&mut pair), [(1, true), (2, true)]);
        assert!(small.content() == content[..512] && large.content() == content, "cut {cut}");
        assert_eq!((pair.outstanding(), pair.large_reads), (0, 0));
    }
}

#[test]
fn a_small_write_goes_in_the_capsule_and_a_large_one_when_asked() {
    let small = Memory::new(&[3, 509], pattern);
    let large = Memory::new(&[20000, 480], pattern);
    let mut pair = QueuePair::new(8, LIMITS);
    pair.submit(Sqe::write(1, 0, 1, false, Sgl::NONE), Transfer::FromHost(small.buffers()), 1);
    pair.submit(Sqe::write(1, 0, 40, false, Sgl::NONE), Transfer::FromHost(large.buffers()), 2);
    let heard = listen(&transmit(&mut pair));
    let [Heard::Command(first, data), Heard::Command(second, none)] = heard.as_slice() else {
        panic!("{heard:?}")
    };
    assert_eq!((first.sgl.identifier, first.sgl.len), (Sgl::IN_CAPSULE, 512));
    assert_eq!(*data, small.content());
    assert_eq!((second.sgl.identifier, second.sgl.len, none.len()), (Sgl::TRANSPORT, 20480, 0));
    let mut received = Vec::new();
    for (offset, len) in [(0, 12288), (12288, 8192)] {
        let ready = ReadyToTransfer { cid: second.cid, tag: 9, offset, len }.to_bytes(Digests::NONE);
        receive(&mut pair, &ready, 5).unwrap();
        for heard in listen(&transmit(&mut pair)) {
            let Heard::Data(header, data) = heard else { panic!() };
            assert_eq!((header.cid, header.tag), (second.cid, 9));
            assert_eq!(header.offset as usize, received.len());
            received.extend(data);
            assert_eq!(header.last, received.len() == (offset + len) as usize);
            assert!(header.len <= LIMITS.host_data_max);
        }
    }
    assert!(received == large.content());
    receive(&mut pair, &[answer_bytes(second.cid), answer_bytes(first.cid)].concat(), 7).unwrap();
    assert_eq!(ends(&mut pair), [(2, true), (1, true)]);
}

#[test]
fn an_answer_before_the_send_is_over_ends_the_command_only_then() {
    let memory = Memory::new(&[512], pattern);
    let mut pair = QueuePair::new(1, LIMITS);
    pair.submit(Sqe::write(1, 0, 1, false, Sgl::NONE), Transfer::FromHost(memory.buffers()), 1);
    let cid = only_command(&begin_transmit(&mut pair)).cid;
    receive(&mut pair, &answer_bytes(cid), 100).unwrap();
    assert_eq!((ends(&mut pair), pair.room()), (vec![], 0));
    pair.transmitted();
    assert_eq!((ends(&mut pair), pair.room()), (vec![(1, true)], 1));
}

#[test]
fn an_early_refusal_of_a_write_forgets_the_data_that_was_asked_for() {
    let memory = Memory::new(&[20480], pattern);
    let mut pair = QueuePair::new(2, LIMITS);
    pair.submit(Sqe::write(1, 0, 40, false, Sgl::NONE), Transfer::FromHost(memory.buffers()), 1);
    let cid = only_command(&transmit(&mut pair)).cid;
    let ready = ReadyToTransfer { cid, tag: 9, offset: 0, len: 20480 }.to_bytes(Digests::NONE);
    receive(&mut pair, &ready, 100).unwrap();
    let failed = Cqe { status: NvmeStatus::fatal(StatusCode::WRITE_FAULT), ..Cqe::success(cid) };
    receive(&mut pair, &pdu::response_to_bytes(&failed, Digests::NONE), 100).unwrap();
    assert_eq!(ends(&mut pair), [(1, false)]);
    // The slot is taken again by a read before the stale order is looked at.
    let other = Memory::new(&[512], |_| 0);
    pair.submit(Sqe::read(1, 0, 1, Sgl::NONE), Transfer::ToHost(other.buffers()), 2);
    let sqe = only_command(&transmit(&mut pair));
    assert_eq!((sqe.opcode, slot_of(sqe.cid)), (io_opcode::READ, slot_of(cid)));
    assert_ne!(sqe.cid, cid, "the generation is another");
}

#[test]
fn a_write_in_very_many_segments_is_sent_in_pieces_that_a_send_can_hold() {
    let memory = Memory::new(&[3; 4000], pattern);
    let mut pair = QueuePair::new(2, Limits { in_capsule_max: 1 << 20, host_data_max: 1 << 20, ..LIMITS });
    pair.submit(Sqe::write(1, 0, 1, false, Sgl::NONE), Transfer::FromHost(memory.buffers()), 1);
    let sqe = only_command(&transmit(&mut pair));
    assert_eq!(sqe.sgl.identifier, Sgl::TRANSPORT);
    let ready = ReadyToTransfer { cid: sqe.cid, tag: 1, offset: 0, len: 12000 }.to_bytes(Digests::NONE);
    receive(&mut pair, &ready, 100).unwrap();
    let mut received = Vec::new();
    while pair.wants_to_send() {
        for heard in listen(&transmit(&mut pair)) {
            let Heard::Data(header, data) = heard else { panic!() };
            assert_eq!(header.offset as usize, received.len());
            received.extend(data);
        }
    }
    assert!(received == memory.content());
}

#[test]
fn inline_data_follows_its_command() {
    let mut pair = QueuePair::new(2, LIMITS);
    pair.submit(Sqe::deallocate(1, 1, Sgl::NONE), Transfer::Inline([0xab; 16], 16), 1);
    let heard = listen(&transmit(&mut pair));
    let [Heard::Command(sqe, data)] = heard.as_slice() else { panic!() };
    assert_eq!((sqe.sgl, data.as_slice()), (Sgl::in_capsule(16), [0xab; 16].as_slice()));
}

#[test]
fn what_a_controller_may_not_send_is_named() {
    let memory = Memory::new(&[8192], |_| 0);
    let check = |make: &dyn Fn(u16) -> Vec<u8>, expected: (&'static str, u16)| {
        let (mut pair, cid) = with_read(&memory);
        assert_eq!(field(receive(&mut pair, &make(cid), 1 << 20)), expected);
        let (mut pair, cid) = with_read(&memory);
        assert_eq!(field(receive(&mut pair, &make(cid), 1)), expected);
    };
    let zeroes = [0; 8192];
    check(&|cid| data_bytes(cid ^ 1, 0, &zeroes, true, true), ("CCCID", 1));
    check(&|cid| data_bytes(cid.wrapping_add(512), 0, &zeroes, true, true), ("CCCID", 1));
    check(&|cid| data_bytes(cid, 4, &zeroes[..512], false, false), ("DATAO", 4));
    check(&|cid| data_bytes(cid, 0, &[0; 8196], true, true), ("DATAL", 4));
    check(&|cid| data_bytes(cid, 0, &zeroes[..512], true, false), ("FLAGS.LAST_PDU", 1));
    check(&|cid| data_bytes(cid, 0, &zeroes[..512], true, true), ("success, bytes moved", 1));
    check(&answer_bytes, ("success, bytes moved", 1));
    check(&|cid| answer_bytes(cid ^ 1), ("CID", 1));
    check(&|cid| [data_bytes(cid, 0, &zeroes, true, true), answer_bytes(cid)].concat(), ("CID", 1));
    check(
        &|cid| ReadyToTransfer { cid, tag: 0, offset: 0, len: 4 }.to_bytes(Digests::NONE).to_vec(),
        ("CCCID", 1),
    );
    check(&|_| [1, 0, 128, 0, 128, 0, 0, 0].repeat(20), ("PDU-Type", 2));
    check(&|_| b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(), ("PDU-Type", 1));
    check(
        &|_| vec![3, 0, 24, 0, 24, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ("terminated", 2),
    );

    let write = Memory::new(&[8192], pattern);
    let check = |make: &dyn Fn(u16) -> Vec<u8>, expected: (&'static str, u16)| {
        let mut pair = QueuePair::new(4, LIMITS);
        pair.submit(Sqe::write(1, 0, 16, false, Sgl::NONE), Transfer::FromHost(write.buffers()), 7);
        let cid = only_command(&transmit(&mut pair)).cid;
        assert_eq!(field(receive(&mut pair, &make(cid), 9)), expected);
    };
    let ready =
        |cid, offset, len| ReadyToTransfer { cid, tag: 0, offset, len }.to_bytes(Digests::NONE).to_vec();
    check(&|cid| ready(cid, 4, 4), ("R2TO", 4));
    check(&|cid| ready(cid, 0, 8196), ("R2TL", 4));
    check(&|cid| [ready(cid, 0, 8192), ready(cid, 0, 8192)].concat(), ("TTAG", 5));
    check(&answer_bytes, ("success, bytes moved", 1));
    check(&|cid| data_bytes(cid, 0, &zeroes[..512], false, false), ("CCCID", 1));
}

/// A target that insists on flow control answers commands before it says that their entries may be used again.
#[test]
fn a_controllers_queue_is_never_filled_beyond_what_it_says_of_it() {
    let flow = Some(SqFlow::new(4, 1));
    let mut pair = QueuePair::<u32>::new(3, Limits { flow, ..LIMITS });
    let mut cids = Vec::new();
    for user in 0..3 {
        pair.submit(Sqe::flush(1), Transfer::None, user);
        cids.push(only_command(&transmit(&mut pair)).cid);
    }
    assert_eq!(pair.room(), 0);
    let answer = |cid, sq_head| {
        let cqe = Cqe { sq_head, ..Cqe::success(cid) };
        pdu::response_to_bytes(&cqe, Digests::NONE)
    };
    pair.handle_bytes(&answer(cids[0], 1)).unwrap();
    assert_eq!((ends(&mut pair), pair.room()), (vec![(0, true)], 0), "answered, and its entry is taken");
    pair.handle_bytes(&answer(cids[2], 3)).unwrap();
    assert_eq!((ends(&mut pair), pair.room()), (vec![(2, true)], 2), "two entries, and slots, are free");
    pair.handle_bytes(&answer(cids[1], 3)).unwrap();
    assert_eq!(pair.room(), 3, "all are answered");
}

#[test]
fn a_command_that_was_not_sent_cannot_be_answered() {
    let mut pair = QueuePair::new(1, LIMITS);
    pair.submit(Sqe::flush(1), Transfer::None, 1);
    let cid = 1 << SLOT_BITS;
    assert_eq!(field(receive(&mut pair, &answer_bytes(cid), 100)), ("CID", 1));
}

#[test]
fn what_is_drained_comes_in_order_and_says_what_may_have_arrived() {
    let mut pair = QueuePair::new(4, LIMITS);
    for user in 0..3 {
        pair.submit(Sqe::flush(1), Transfer::None, user);
    }
    let heard = listen(&transmit(&mut pair));
    let Heard::Command(second, _) = &heard[1] else { panic!() };
    receive(&mut pair, &answer_bytes(second.cid), 100).unwrap();
    // Takes the freed slot, which comes before slot 2 by index, and is not sent.
    pair.submit(Sqe::flush(1), Transfer::None, 3);
    assert_eq!(pair.drain(), [(0, true), (2, true), (3, false)]);
}

proptest! {
    #[test]
    fn garbage_is_refused_or_taken(data in proptest::collection::vec(any::<u8>(), 0..400)) {
        fuzz(&data);
    }

    #[test]
    fn likely_garbage_is_refused_or_taken(pdus in proptest::collection::vec(
        (prop_oneof![Just(7u8), Just(5), Just(9), Just(3)], 0u8..16, 0u16..4, 0u32..40000, 0u32..310_000), 1..8)) {
        let mut bytes = vec![255];
        for (kind, flags, cid, offset, len) in pdus {
            let data = if kind == 7 { len } else { 0 };
            bytes.extend([kind, flags & 12, 24, if data > 0 { 24 } else { 0 }]);
            bytes.extend((24 + data).to_le_bytes());
            bytes.extend((cid | 1 << SLOT_BITS).to_le_bytes());
            bytes.extend([0, 0]);
            bytes.extend((offset & !3).to_le_bytes());
            bytes.extend(if kind == 5 { u32::from(cid | 1 << SLOT_BITS) } else { len }.to_le_bytes());
            bytes.extend([0; 4]);
            bytes.extend(vec![0xee; data as usize]);
        }
        fuzz(&bytes);
    }

    #[test]
    fn any_mix_of_reads_and_writes_moves_every_byte(
        commands in proptest::collection::vec((any::<bool>(), 1usize..80), 1..20), seed in any::<u64>(), cut in 1usize..9000,
    ) {
        model(&commands, seed, cut);
    }
}

/// Runs commands of so many blocks of 512 bytes against a controller that works in a seeded order, over a flat disk.
fn model(commands: &[(bool, usize)], seed: u64, cut: usize) {
    let mut random = crate::testing::Numbers::new(seed);
    let mut disk: Vec<u8> = (0..100 * 512).map(pattern).collect();
    let mut pair = QueuePair::new(5, LIMITS);
    let memories: Vec<Memory> = commands
        .iter()
        .enumerate()
        .map(|(index, (write, blocks))| {
            let half = blocks * 512 / 3;
            let fill = |at: usize| if *write { pattern(at ^ index.wrapping_mul(977)) } else { 0 };
            Memory::new(&[half, blocks * 512 - half], fill)
        })
        .collect();
    let mut next = 0;
    let mut ended = 0;
    let mut work: Vec<(Sqe, u32)> = Vec::new();
    let mut expected: Vec<Option<Vec<u8>>> = vec![None; commands.len()];
    while ended < commands.len() {
        while next < commands.len() && pair.room() > 0 {
            let (write, blocks) = commands[next];
            let blocks = u32::try_from(blocks).unwrap();
            let buffers = memories[next].buffers();
            let user = u32::try_from(next).unwrap();
            if write {
                pair.submit(Sqe::write(1, 3, blocks, false, Sgl::NONE), Transfer::FromHost(buffers), user);
            } else {
                pair.submit(Sqe::read(1, 3, blocks, Sgl::NONE), Transfer::ToHost(buffers), user);
            }
            next += 1;
        }
        for heard in listen(&transmit(&mut pair)) {
            match heard {
                Heard::Command(sqe, data) => {
                    disk[1536..1536 + data.len()].copy_from_slice(&data);
                    let moved = u32::try_from(data.len()).unwrap();
                    work.push((sqe, moved));
                }
                Heard::Data(header, data) => {
                    let at = 1536 + header.offset as usize;
                    disk[at..at + data.len()].copy_from_slice(&data);
                    let (_, moved) = work.iter_mut().find(|(sqe, _)| sqe.cid == header.cid).unwrap();
                    *moved += header.len;
                }
            }
        }
        // The controller works on one command, a step.
        let chosen = random.below(work.len());
        let (sqe, moved) = &mut work[chosen];
        let left = sqe.sgl.len - *moved;
        let step = left.min(512 * u32::try_from(1 + random.below(40)).unwrap());
        let bytes = if sqe.opcode == io_opcode::WRITE && left > 0 {
            ReadyToTransfer { cid: sqe.cid, tag: 5, offset: *moved, len: step }
                .to_bytes(Digests::NONE)
                .to_vec()
        } else if sqe.opcode == io_opcode::READ && left > 0 {
            let from = 1536 + *moved as usize;
            let success = step == left && random.below(2) == 0;
            let bytes = data_bytes(sqe.cid, *moved, &disk[from..from + step as usize], step == left, success);
            *moved += step;
            if success {
                work.remove(chosen);
            }
            bytes
        } else {
            answer_bytes(work.remove(chosen).0.cid)
        };
        receive(&mut pair, &bytes, cut).unwrap();
        for end in pair.ended().collect::<Vec<_>>() {
            assert!(end.answer.status.is_success());
            expected[end.user as usize] = Some(memories[end.user as usize].content());
            ended += 1;
        }
    }
    // Everything ended once, and the last write's bytes are on the disk if no other was under way with it.
    assert!(expected.iter().all(Option::is_some));
    if let [(true, blocks)] = commands {
        assert_eq!(disk[1536..1536 + blocks * 512], memories[0].content());
    }
    if let [(false, blocks)] = commands {
        assert_eq!(disk[1536..1536 + blocks * 512], memories[0].content());
    }
}

/// A controller that takes no data in capsules was sent the range of a discard in the capsule all the same, which ends the
/// connection, every time anew.
#[test]
fn a_range_goes_when_asked_where_capsules_carry_no_data() {
    let mut pair = QueuePair::<u32>::new(4, Limits { in_capsule_max: 0, ..LIMITS });
    let range: [u8; 16] = std::array::from_fn(|at| at.to_le_bytes()[0]);
    pair.submit(Sqe::deallocate(1, 1, Sgl::NONE), Transfer::Inline(range, 16), 7);
    let heard = listen(&transmit(&mut pair));
    let [Heard::Command(sqe, data)] = &heard[..] else { panic!("{heard:?}") };
    assert_eq!((sqe.sgl.identifier, sqe.sgl.len, data.len()), (Sgl::TRANSPORT, 16, 0));
    let success = pdu::response_to_bytes(&Cqe::success(sqe.cid), Digests::NONE);
    for (offset, len) in [(0, 8), (8, 8)] {
        let ready = ReadyToTransfer { cid: sqe.cid, tag: 3, offset, len }.to_bytes(Digests::NONE);
        receive(&mut pair, &ready, 64).unwrap();
        let heard = listen(&transmit(&mut pair));
        let [Heard::Data(header, data)] = &heard[..] else { panic!("{heard:?}") };
        assert_eq!((header.offset, header.last), (offset, true));
        assert_eq!(data[..], range[offset as usize..][..8]);
    }
    receive(&mut pair, &success, 64).unwrap();
    assert_eq!(pair.ended().map(|ended| ended.user).collect::<Vec<_>>(), [7]);
}

/// A PDU to the host with its digests.
fn with_digests(header: &[u8], data: &[u8], digests: Digests) -> Vec<u8> {
    let mut bytes = header.to_vec();
    if digests.header {
        bytes.extend(pdu::digest(header));
    }
    bytes.resize(bytes.len().max(usize::from(header[3])), 0);
    bytes.extend(data);
    if digests.data && !data.is_empty() {
        bytes.extend(pdu::digest(data));
    }
    bytes
}

const ALL_DIGESTS: [Digests; 4] = [
    Digests::NONE,
    Digests { header: true, data: false },
    Digests { header: false, data: true },
    Digests { header: true, data: true },
];

#[test]
fn digests_go_with_headers_and_data_both_ways() {
    for (digests, alignment, cut) in
        ALL_DIGESTS.into_iter().flat_map(|digests| [(digests, 4, 1), (digests, 64, 1000), (digests, 4, 27)])
    {
        let mut pair = QueuePair::<u32>::new(8, Limits { digests, alignment, ..LIMITS });
        let small = Memory::new(&[512, 512], pattern);
        let large = Memory::new(&[5000, 7288], pattern);
        let into = Memory::new(&[300, 300_000 - 300], |_| 0);
        pair.submit(Sqe::write(1, 0, 2, false, Sgl::NONE), Transfer::FromHost(small.buffers()), 1);
        pair.submit(Sqe::write(1, 0, 24, false, Sgl::NONE), Transfer::FromHost(large.buffers()), 2);
        pair.submit(Sqe::read(1, 0, 586, Sgl::NONE), Transfer::ToHost(into.buffers()), 3);
        pair.submit(Sqe::deallocate(1, 1, Sgl::NONE), Transfer::Inline([3; 16], 16), 4);
        let heard = listen_to(&transmit(&mut pair), digests);
        let [
            Heard::Command(first, in_capsule),
            Heard::Command(second, nothing),
            Heard::Command(third, _),
            Heard::Command(fourth, range),
        ] = &heard[..]
        else {
            panic!("{heard:?}")
        };
        assert_eq!((in_capsule, nothing.len(), &range[..]), (&small.content(), 0, &[3; 16][..]));

        let len = large.len;
        let ready = ReadyToTransfer { cid: second.cid, tag: 1, offset: 0, len }.to_bytes(digests);
        receive(&mut pair, &with_digests(&ready, &[], digests), cut).unwrap();
        let mut content = Vec::new();
        for heard in listen_to(&transmit(&mut pair), digests) {
            let Heard::Data(_, data) = heard else { panic!("{heard:?}") };
            content.extend(data);
        }
        assert_eq!(content, large.content());

        let sent: Vec<u8> = (0..300_000).map(pattern).collect();
        let mut answers = Vec::new();
        for (index, piece) in sent.chunks(100_000).enumerate() {
            let offset = u32::try_from(index * 100_000).unwrap();
            let (tag, len) = (0, u32::try_from(piece.len()).unwrap());
            let data = DataPdu { cid: third.cid, tag, offset, len, last: index == 2, success: index == 2 };
            answers.extend(with_digests(&data.to_bytes(Receiver::Host, digests, 4), piece, digests));
        }
        for cid in [first.cid, second.cid, fourth.cid] {
            let answer = pdu::response_to_bytes(&Cqe::success(cid), digests);
            answers.extend(with_digests(&answer, &[], digests));
        }
        receive(&mut pair, &answers, cut).unwrap();
        let ended: Vec<_> = pair.ended().map(|ended| ended.user).collect();
        assert_eq!(ended, [3, 1, 2, 4]);
        assert_eq!(into.content(), sent);
    }
}

/// nvmet computes the digest of an H2CData over all of its command's data. When 1 MiB went in pieces of 384 KiB, for the sake of
/// the cache, it closed the connection at each attempt, and the VM waited for ever.
#[test]
fn a_write_with_a_digest_is_one_h2cdata() {
    let digests = Digests { header: false, data: true };
    let limits = Limits { digests, host_data_max: 4 << 20, ..LIMITS };
    let mut pair = QueuePair::<u32>::new(8, limits);
    let writes = [200 << 10, 1 << 20, 300 << 10].map(|len| Memory::new(&[len], pattern));
    for (memory, user) in writes.iter().zip(0..) {
        let blocks = memory.len / 512;
        pair.submit(Sqe::write(1, 0, blocks, false, Sgl::NONE), Transfer::FromHost(memory.buffers()), user);
    }
    for heard in listen_to(&transmit(&mut pair), digests) {
        let Heard::Command(sqe, _) = heard else { panic!("{heard:?}") };
        let ready = ReadyToTransfer { cid: sqe.cid, tag: 1, offset: 0, len: sqe.sgl.len }.to_bytes(digests);
        receive(&mut pair, &with_digests(&ready, &[], digests), 100).unwrap();
    }
    let sends = [(); 3].map(|()| listen_to(&transmit(&mut pair), digests));
    let lens: Vec<_> = sends
        .iter()
        .flatten()
        .map(|heard| match heard {
            Heard::Data(pdu, data) => (pdu.last, pdu.offset, data.len()),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(lens, writes.each_ref().map(|memory| (true, 0, memory.len as usize)));
}

#[test]
fn a_byte_that_changes_on_the_way_is_found() {
    let digests = Digests { header: true, data: true };
    for at in 0..28 + 64 + 4 {
        let mut pair = QueuePair::<u32>::new(2, Limits { digests, ..LIMITS });
        let into = Memory::new(&[64], |_| 0);
        pair.submit(Sqe::read(1, 0, 1, Sgl::NONE), Transfer::ToHost(into.buffers()), 1);
        let heard = listen_to(&transmit(&mut pair), digests);
        let [Heard::Command(sqe, _)] = &heard[..] else { panic!("{heard:?}") };
        let data = DataPdu { cid: sqe.cid, tag: 0, offset: 0, len: 64, last: true, success: true };
        let header = data.to_bytes(Receiver::Host, digests, 4);
        let mut bytes = with_digests(&header, &[7; 64], digests);
        bytes[at] ^= 0x10;
        let error = receive(&mut pair, &bytes, 1000).unwrap_err();
        match (at, error) {
            (0..8, QueueError::Protocol(_)) | (28.., QueueError::Corrupted { .. }) => {}
            (_, QueueError::Protocol(error)) => {
                assert_eq!((error.field, error.status), ("HDGST", FatalStatus::HEADER_DIGEST_ERROR));
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(pair.ended().count(), 0);
    }
}
