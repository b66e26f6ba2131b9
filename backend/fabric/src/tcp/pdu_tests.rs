//! Byte-exact examples of every PDU, one refusal per field, and random bytes.

use super::*;
use crate::nvme::Sgl;
use proptest::prelude::*;

fn first(bytes: &[u8]) -> [u8; 8] {
    bytes[..8].try_into().unwrap()
}

fn refused(bytes: [u8; 8], receiver: Receiver) -> (&'static str, u32) {
    let error = CommonHeader::decode(&bytes, receiver, Digests::NONE).unwrap_err();
    (error.field, error.offset)
}

#[test]
fn connection_set_up_is_the_bytes_that_the_specification_says() {
    let both = Digests { header: true, data: true };
    let request = InitRequest { data_alignment: 1, digests: both, r2t_max: 3 };
    let bytes = request.to_bytes();
    assert_eq!(bytes[..16], [0, 0, 128, 0, 128, 0, 0, 0, 0, 0, 1, 3, 3, 0, 0, 0]);
    assert!(bytes[16..].iter().all(|byte| *byte == 0));
    assert!(CommonHeader::decode(&first(&bytes), Receiver::Controller, both).is_ok());
    assert_eq!(InitRequest::decode(&bytes), Ok(request));

    let response = InitResponse { data_alignment: 0, digests: Digests::NONE, host_data_max: 0x0002_0000 };
    let bytes = response.to_bytes();
    assert_eq!(bytes[..16], [1, 0, 128, 0, 128, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0]);
    assert_eq!(InitResponse::decode(&bytes), Ok(response));

    let mut bad = bytes;
    bad[8] = 1;
    let error = InitResponse::decode(&bad).unwrap_err();
    assert_eq!((error.field, error.status), ("PFV", FatalStatus::UNSUPPORTED_PARAMETER));
    let mut bad = bytes;
    bad[10] = 32;
    assert_eq!(InitResponse::decode(&bad).unwrap_err().field, "CPDA");
    let mut bad = bytes;
    bad[12..16].copy_from_slice(&[0xff, 0x0f, 0, 0]);
    assert_eq!(
        InitResponse::decode(&bad).unwrap_err().to_string(),
        "ICResp: MAXH2CDATA is 0xfff, not at least 4096 (Invalid PDU Header Field)"
    );
}

#[test]
fn a_command_with_data_is_the_bytes_that_the_specification_says() {
    let mut sqe = Sqe::write(1, 0, 1, false, Sgl::in_capsule(512));
    sqe.cid = 5;
    let bytes = command_to_bytes(&sqe, 512, Digests::NONE, 4);
    // PLEN = 72 + 512 = 584 = 0x248
    assert_eq!(bytes[..12], [4, 0, 72, 72, 0x48, 2, 0, 0, 0x01, 0x40, 5, 0]);
    assert_eq!(command_from_bytes(&bytes), sqe);
    let header = CommonHeader::decode(&first(&bytes), Receiver::Controller, Digests::NONE).unwrap();
    assert_eq!((header.data_offset, header.data_len, header.header_len()), (72, 512, 72));

    // Digests: 4 bytes after the header, data aligned to 16, 4 bytes after the data: 80 + 512 + 4 = 0x254.
    let both = Digests { header: true, data: true };
    let bytes = command_to_bytes(&sqe, 512, both, alignment(3));
    assert_eq!(bytes[..8], [4, 3, 72, 80, 0x54, 2, 0, 0]);
    let header = CommonHeader::decode(&first(&bytes), Receiver::Controller, both).unwrap();
    assert_eq!((header.data_offset, header.data_len, header.header_len()), (80, 512, 76));

    let bytes = command_to_bytes(&Sqe::flush(1), 0, Digests::NONE, 128);
    assert_eq!(bytes[..8], [4, 0, 72, 0, 72, 0, 0, 0]);
}

#[test]
fn answers_and_data_are_the_bytes_that_the_specification_says() {
    let bytes = response_to_bytes(&Cqe::success(7), Digests::NONE);
    assert_eq!(bytes, [5, 0, 24, 0, 24, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0]);
    assert_eq!(response_from_bytes(&bytes), Cqe::success(7));

    let data = DataPdu { cid: 2, tag: 0, offset: 8192, len: 4096, last: true, success: true };
    let bytes = data.to_bytes(Receiver::Host, Digests::NONE, 4);
    assert_eq!(
        bytes,
        [7, 12, 24, 24, 0x18, 0x10, 0, 0, 2, 0, 0, 0, 0, 0x20, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0]
    );
    let header = CommonHeader::decode(&first(&bytes), Receiver::Host, Digests::NONE).unwrap();
    assert_eq!(DataPdu::decode(&header, &bytes), Ok(data));

    let data = DataPdu { cid: 2, tag: 9, offset: 0, len: 4, last: false, success: false };
    let bytes = data.to_bytes(Receiver::Controller, Digests::NONE, 4);
    assert_eq!(bytes, [6, 0, 24, 24, 28, 0, 0, 0, 2, 0, 9, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0]);

    let ready = ReadyToTransfer { cid: 2, tag: 9, offset: 4, len: 0x10000 };
    let bytes = ready.to_bytes(Digests::NONE);
    assert_eq!(bytes, [9, 0, 24, 0, 24, 0, 0, 0, 2, 0, 9, 0, 4, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]);
    assert_eq!(ReadyToTransfer::decode(&bytes), Ok(ready));

    let error = invalid(PduKind::Command, 4, "PLEN", 5u32, "x");
    let bytes = TermRequest::new(&error).to_bytes(Receiver::Host, &[0xee; 200]);
    assert_eq!(bytes[..14], [3, 0, 24, 0, 152, 0, 0, 0, 1, 0, 4, 0, 0, 0]);
    assert_eq!(bytes.len(), 152);
    assert_eq!(TermRequest::decode(&bytes[..24].try_into().unwrap()), TermRequest::new(&error));
}

#[test]
fn every_wrong_field_of_the_common_header_is_named() {
    use Receiver::{Controller, Host};
    assert_eq!(refused([8, 0, 24, 0, 24, 0, 0, 0], Host), ("PDU-Type", 0));
    assert_eq!(refused([4, 0, 72, 0, 72, 0, 0, 0], Host), ("PDU-Type", 0));
    assert_eq!(refused([5, 0, 24, 0, 24, 0, 0, 0], Controller), ("PDU-Type", 0));
    assert_eq!(refused([5, 0, 25, 0, 24, 0, 0, 0], Host), ("HLEN", 2));
    assert_eq!(refused([5, 1, 24, 0, 28, 0, 0, 0], Host), ("FLAGS.HDGSTF", 1));
    assert_eq!(refused([5, 2, 24, 0, 24, 0, 0, 0], Host), ("FLAGS.DDGSTF", 1));
    assert_eq!(refused([7, 2, 24, 24, 32, 0, 0, 0], Host), ("FLAGS.DDGSTF", 1));
    assert_eq!(refused([5, 0, 24, 0, 28, 0, 0, 0], Host), ("PLEN", 4));
    assert_eq!(refused([7, 0, 24, 0, 23, 0, 0, 0], Host), ("PDO", 3));
    assert_eq!(refused([7, 0, 24, 20, 28, 0, 0, 0], Host), ("PDO", 3));
    assert_eq!(refused([7, 0, 24, 26, 30, 0, 0, 0], Host), ("PDO", 3));
    assert_eq!(refused([7, 0, 24, 28, 28, 0, 0, 0], Host), ("PLEN", 4));
    assert_eq!(refused([3, 0, 24, 0, 153, 0, 0, 0], Host), ("PLEN", 4));
    assert_eq!(refused([3, 0, 24, 0, 23, 0, 0, 0], Host), ("PLEN", 4));
    assert_eq!(refused([2, 1, 24, 0, 24, 0, 0, 0], Controller), ("FLAGS.HDGSTF", 1));
}

#[test]
fn every_wrong_field_of_data_and_r2t_is_named() {
    let data = DataPdu { cid: 2, tag: 0, offset: 0, len: 8, last: false, success: false };
    let decode = |bytes: [u8; 24]| {
        let header = CommonHeader::decode(&first(&bytes), Receiver::Host, Digests::NONE).unwrap();
        DataPdu::decode(&header, &bytes).map_err(|error| error.field)
    };
    let good = data.to_bytes(Receiver::Host, Digests::NONE, 4);
    assert_eq!(decode(good), Ok(data));
    let with = |at: usize, value: u8| {
        let mut bytes = good;
        bytes[at] = value;
        decode(bytes)
    };
    assert_eq!(with(16, 7), Err("DATAL"));
    assert_eq!(with(12, 2), Err("DATAO"));
    assert_eq!(with(1, FLAG_SUCCESS), Err("FLAGS.SUCCESS"));
    let mut far = good;
    far[12..16].copy_from_slice(&[0xfc, 0xff, 0xff, 0xff]);
    assert_eq!(decode(far), Err("DATAO"));

    let ready = ReadyToTransfer { cid: 2, tag: 9, offset: 0, len: 8 };
    let with = |change: ReadyToTransfer| {
        ReadyToTransfer::decode(&change.to_bytes(Digests::NONE)).map_err(|error| error.field)
    };
    assert_eq!(with(ready), Ok(ready));
    assert_eq!(with(ReadyToTransfer { len: 0, ..ready }), Err("R2TL"));
    assert_eq!(with(ReadyToTransfer { offset: 1, ..ready }), Err("R2TO"));
    assert_eq!(with(ReadyToTransfer { offset: u32::MAX - 3, ..ready }), Err("R2TO"));
}

#[test]
fn a_digest_is_crc32c() {
    // RFC 3720, B.4: 32 bytes of zeroes.
    assert_eq!(digest(&[0; 32]), [0xaa, 0x36, 0x91, 0x8a]);
}

proptest! {
    #[test]
    fn whatever_decodes_survives_a_round_trip(
        kind in 0u8..10, flags in 0u8..16, header_len in prop_oneof![Just(24u8), Just(72), Just(128), any::<u8>()],
        rest in proptest::collection::vec(any::<u8>(), 0..160), len in prop_oneof![0u32..200, any::<u32>()],
        offset in prop_oneof![Just(0u8), Just(24), Just(72), any::<u8>()],
    ) {
        let mut bytes = vec![kind, flags, header_len, offset];
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(&rest);
        fuzz(&bytes);
        // Make data PDUs' length agree, so that they get past that check.
        if bytes.len() >= 24 {
            bytes[16..20].copy_from_slice(&len.saturating_sub(u32::from(offset)).to_le_bytes());
            bytes[12] &= 0xfc;
            fuzz(&bytes);
        }
    }
}
