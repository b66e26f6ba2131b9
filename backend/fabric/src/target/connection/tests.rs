//! The connection without a socket: every split of the same bytes gives the same answers, and no bytes break it.

use super::super::fuzz::{capsule, connection, enabling, feed, fuzz, opening, receive, run, shared};
use super::*;
use crate::nvme::bytes::get_array;
use crate::nvme::fabrics::{CATTR_NO_FLOW_CONTROL, CNTLID_DYNAMIC};
use crate::nvme::{Sgl, Sqe, StatusCode};
use crate::tcp::CommonHeader;
use crate::testing::Numbers;
use hawser_block::{BlockSize, Geometry, Operation, Outcome};
use proptest::prelude::*;
use std::collections::BTreeMap;

/// A device of plain bytes.
fn execute(content: &mut [u8], request: &Request) -> Outcome {
    let from = usize::try_from(request.lba.0).unwrap() * 512;
    let place = &mut content[from..from + request.buffers.len()];
    // SAFETY: the request lives; the slice is as long as its payload.
    unsafe {
        match request.operation {
            Operation::Read => request.buffers.copy_from(place.as_ptr()),
            Operation::Write { .. } => request.buffers.copy_to(place.as_mut_ptr()),
            _ => {}
        }
    }
    Ok(())
}

/// How each command ended, by CID: its status, and its data.
type Answers = BTreeMap<u16, (Option<StatusCode>, Vec<u8>)>;

/// Reads what a target said into `answers`; the R2Ts come out.
fn listen(mut bytes: &[u8], answers: &mut Answers) -> Vec<ReadyToTransfer> {
    let mut ready = Vec::new();
    while !bytes.is_empty() {
        let header = CommonHeader::decode(&get_array(bytes, 0), Receiver::Host, Digests::NONE).unwrap();
        let (pdu, rest) = bytes.split_at(header.len as usize);
        bytes = rest;
        if header.kind == PduKind::InitResponse {
            continue;
        }
        let short: [u8; 24] = get_array(pdu, 0);
        match header.kind {
            PduKind::Response => {
                let cqe = pdu::response_from_bytes(&short);
                let answer = answers.entry(cqe.cid).or_default();
                assert!(answer.0.replace(cqe.status.code).is_none(), "a command ends once");
            }
            PduKind::ControllerData => {
                let data = DataPdu::decode(&header, &short).unwrap();
                let answer = answers.entry(data.cid).or_default();
                answer.1.extend_from_slice(&pdu[usize::from(header.data_offset)..]);
                if data.success {
                    assert!(answer.0.replace(StatusCode::SUCCESS).is_none(), "a command ends once");
                }
            }
            PduKind::ReadyToTransfer => ready.push(ReadyToTransfer::decode(&short).unwrap()),
            kind => panic!("{}", kind.name()),
        }
    }
    ready
}

/// A conversation in pieces that `split` chooses; how every command ended.
fn conversation(flow_control: bool, mut split: impl FnMut(usize) -> usize) -> Answers {
    let shared = shared(Geometry::new(BlockSize::B512, 4096));
    let mut content = vec![0; 4096 * 512];
    let mut device = |request: &Request| execute(&mut content, request);
    let mut admin = connection(&shared, 1);
    feed(&mut admin, &opening(0, CNTLID_DYNAMIC, 0), &mut device);
    feed(&mut admin, &enabling(), &mut device);
    let cntlid = admin.controller().unwrap().cntlid;
    let mut peer = connection(&shared, 2);
    feed(&mut peer, &opening(1, cntlid, if flow_control { 0 } else { CATTR_NO_FLOW_CONTROL }), &mut device);
    assert!(peer.is_connected());
    let mut answers = Answers::new();
    let mut input = script();
    for last in [false, false, true] {
        let mut left = &input[..];
        while !left.is_empty() {
            let (piece, rest) = left.split_at(split(left.len()));
            feed(&mut peer, piece, &mut device);
            left = rest;
        }
        let mut output = Vec::new();
        while peer.poll_transmit().is_some() {
            output.extend(peer.sending.bytes());
            peer.transmitted();
        }
        // The data that was asked for, in two pieces; then a look at what was written.
        input = listen(&output, &mut answers).iter().flat_map(supply).collect();
        if input.is_empty() {
            let mut sqe = Sqe::read(1, 60, 72, Sgl::transport(36 << 10));
            sqe.cid = 100;
            input = capsule(&sqe, &[]);
        }
        assert!(last || !input.is_empty());
    }
    answers
}

fn payload() -> Vec<u8> {
    (0..32 << 10).map(|index: usize| u8::try_from(index % 241).unwrap()).collect()
}

fn supply(ready: &ReadyToTransfer) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (offset, len) in [(0, 20_000), (20_000, ready.len - 20_000)] {
        let pdu = DataPdu { cid: ready.cid, tag: ready.tag, offset, len, last: offset > 0, success: false };
        bytes.extend(pdu.to_bytes(Receiver::Controller, Digests::NONE, 4));
        bytes.extend_from_slice(&payload()[offset as usize..(offset + len) as usize]);
    }
    bytes
}

/// Reads, and writes of every kind; the CIDs count from 1. (Connect's was 0.)
fn script() -> Vec<u8> {
    let payload = payload();
    let commands = [
        (Sqe::write(1, 8, 8, false, Sgl::in_capsule(4096)), &payload[..4096]),
        (Sqe::read(1, 500, 8, Sgl::transport(4096)), &[]),
        (Sqe::write(1, 16, 32, true, Sgl::in_capsule(16384)), &payload[..16384]),
        (Sqe::flush(1), &[]),
        (Sqe::write(1, 64, 64, false, Sgl::transport(32 << 10)), &[]),
        (Sqe::read(9, 8, 8, Sgl::transport(4096)), &[]),
    ];
    (1..).zip(commands).flat_map(|(cid, (sqe, data))| capsule(&Sqe { cid, ..sqe }, data)).collect()
}

#[test]
fn every_split_of_the_same_bytes_gives_the_same_answers() {
    let ok = Some(StatusCode::SUCCESS);
    let mut expected: Answers = (0..6).map(|cid| (cid, (ok, Vec::new()))).collect();
    expected.insert(2, (ok, vec![0; 4096]));
    expected.insert(6, (Some(StatusCode::INVALID_NAMESPACE), Vec::new()));
    let seen = [vec![0; 2048], payload(), vec![0; 2048]].concat();
    // Blocks 60 to 131: what was there before, then all that was written to 64 and on.
    expected.insert(100, (ok, seen));
    for flow_control in [true, false] {
        for seed in 0..200 {
            let mut numbers = Numbers::new(seed);
            let most = [1, 7, 80, 3000, 60_000][numbers.below(5)];
            let answers = conversation(flow_control, |left| (numbers.below(most) + 1).min(left));
            assert!(answers == expected, "seed {seed}");
        }
    }
}

#[test]
fn payload_beyond_the_limit_waits_for_memory() {
    let shared = shared(Geometry::new(BlockSize::B512, 4096));
    let mut content = vec![0; 4096 * 512];
    let mut device = |request: &Request| execute(&mut content, request);
    let mut admin = connection(&shared, 1);
    feed(&mut admin, &opening(0, CNTLID_DYNAMIC, 0), &mut device);
    feed(&mut admin, &enabling(), &mut device);
    let mut peer = connection(&shared, 2);
    feed(&mut peer, &opening(1, admin.controller().unwrap().cntlid, 0), &mut device);
    let reads: Vec<u8> =
        (0..30).flat_map(|_| capsule(&Sqe::read(1, 0, 2048, Sgl::transport(1 << 20)), &[])).collect();
    feed(&mut peer, &reads, &mut device);
    let mut sizes = Vec::new();
    while let Some((_, len)) = peer.poll_transmit() {
        sizes.push(len >> 20);
        peer.transmitted();
        // What waited was begun by that.
        run(&mut peer, &mut device);
    }
    assert_eq!(sizes.iter().sum::<usize>(), 30);
    assert!(sizes.iter().all(|size| *size <= PAYLOAD_BYTES_MAX >> 20), "{sizes:?}");
}

/// A receive and a failed send may come in the same pass: the connection ended with requests that no device had, and an
/// assertion took the process down.
#[test]
fn a_connection_that_ends_before_its_requests_reach_a_device_is_quiet() {
    let shared = shared(Geometry::new(BlockSize::B512, 4096));
    let mut device = |_: &Request| -> Outcome { Ok(()) };
    let mut admin = connection(&shared, 1);
    feed(&mut admin, &opening(0, CNTLID_DYNAMIC, 0), &mut device);
    feed(&mut admin, &enabling(), &mut device);
    let mut peer = connection(&shared, 2);
    feed(&mut peer, &opening(1, admin.controller().unwrap().cntlid, 0), &mut device);
    let input = script();
    assert_eq!(receive(&mut peer, &input), input.len());
    assert!(!peer.is_quiet());
    peer.close();
    assert!(peer.is_quiet());
    assert!(peer.take_submitting());
    assert!(peer.lanes().iter().all(|lane| lane.batch.is_empty()));
}

#[test]
fn more_commands_than_the_queue_has_end_the_connection() {
    let shared = shared(Geometry::new(BlockSize::B512, 4096));
    let mut device = |_: &Request| -> Outcome { Ok(()) };
    let mut admin = connection(&shared, 1);
    feed(&mut admin, &opening(0, CNTLID_DYNAMIC, 0), &mut device);
    feed(&mut admin, &enabling(), &mut device);
    let mut peer = connection(&shared, 2);
    feed(&mut peer, &opening(1, admin.controller().unwrap().cntlid, 0), &mut device);
    // No device ends any of them.
    let flush = capsule(&Sqe::flush(1), &[]);
    for _ in 0..SLOTS {
        assert_eq!(receive(&mut peer, &flush), flush.len());
        assert!(!peer.is_over());
    }
    receive(&mut peer, &flush);
    assert!(peer.is_over());
    let trouble = peer.take_trouble().unwrap();
    assert_eq!(trouble, "CapsuleCmd: CID is 0x0, not within the queue's size (Transfer Limit Exceeded)");
    peer.close();
    assert!(peer.is_quiet());
}

proptest! {
    #[test]
    fn no_bytes_break_a_connection(data in proptest::collection::vec(any::<u8>(), 0..600)) {
        fuzz(&data);
    }

    #[test]
    fn no_commands_break_a_connection(
        stage in 0u8..8,
        pieces in any::<u8>(),
        commands in proptest::collection::vec(
            (any::<[u8; 16]>(), 0u8..16, prop_oneof![Just(0x01u8), Just(0x5a)], 0u32..3, 0usize..2000, any::<bool>()),
            0..40,
        ),
    ) {
        let mut bytes = vec![stage, pieces];
        for (noise, opcode, identifier, nsid, len, likely) in commands {
            let opcode = if opcode == 15 { 0x7f } else { opcode };
            let data_len = if identifier == 0x01 { len & !15 } else { 0 };
            let sgl = Sgl {
                address: 0,
                key: 0,
                len: if likely { u32::try_from(data_len).unwrap() } else { u32::from(noise[0]) << 9 },
                identifier,
            };
            let mut sqe = Sqe::new(opcode, nsid, sgl);
            for (index, chunk) in noise.chunks(4).enumerate() {
                sqe.cdw[index] = u32::from_le_bytes(chunk.try_into().unwrap());
            }
            if likely {
                sqe.cdw[0] &= 0xff;
                sqe.cdw[1] &= 0x0100_0004;
                sqe.cdw[2] &= 0x4200_00ff;
                if identifier == 0x5a && opcode < 3 {
                    sqe.sgl.len = (sqe.cdw[2] & 0xff) * 512 + 512;
                }
            }
            bytes.extend(capsule(&sqe, &vec![noise[15]; data_len]));
        }
        fuzz(&bytes);
    }
}
