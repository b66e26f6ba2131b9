//! Round trips, single wrong bytes, and bytes at random, for all codecs.

use super::*;
use crate::raid::Level;
use proptest::prelude::*;

pub(super) const POOL: Uuid = [7; 16];
pub(super) const OTHER: Uuid = [8; 16];

pub(super) fn uuid(number: u8) -> Uuid {
    let mut uuid = [0xa0; 16];
    uuid[15] = number;
    uuid
}

pub(super) fn superblock(level: Level, sets: &[u16]) -> Superblock {
    let members: u16 = sets.iter().sum();
    let data_strips = match level {
        Level::Linear | Level::Raid1 => 1,
        Level::Raid0 => u64::from(sets[0]),
        Level::Raid10 => u64::from(sets[0] / 2),
        Level::Raid5 => u64::from(sets[0] - 1),
        Level::Raid6 => u64::from(sets[0] - 2),
    };
    let extent_bytes = (1_u64 << 20).next_multiple_of(data_strips * (64 << 10));
    let most = sets.iter().copied().max().unwrap_or(0);
    let parity_log_pages = crate::format::parity_log_pages_min(level, most, 64 << 10);
    Superblock {
        pool_uuid: POOL,
        name: "p0.fast_1-a".to_owned(),
        level,
        block_bytes: 4096,
        strip_bytes: 64 << 10,
        extent_bytes,
        unit_bytes: unit_bytes_for(extent_bytes),
        region_bytes: 64 << 20,
        layout: Layout { intent_pages: 1, log_bytes: 16 << 20, metadata_pages: 1000, parity_log_pages },
        generation: 12,
        epoch: 3,
        opened_by: Some(uuid(200)),
        sets: sets.iter().map(|&members| SetRecord { members, regions: 160 }).collect(),
        members: (0..members)
            .map(|place| MemberRecord {
                uuid: uuid(u8::try_from(place).unwrap()),
                in_sync: place != 1,
                data_bytes: (10 << 30) + (u64::from(place) << 20),
            })
            .collect(),
        spares: vec![uuid(100), uuid(101)],
        replacement: None,
        scrub: None,
        this: uuid(0),
    }
}

/// Calls `check` with each byte of `bytes` wrong once, in one bit and in all.
fn each_flip(bytes: &[u8], mut check: impl FnMut(usize, &[u8])) {
    let mut wrong = bytes.to_vec();
    for at in 0..bytes.len() {
        for mask in [1 << (at % 8), 0xff] {
            wrong[at] ^= mask;
            check(at, &wrong);
            wrong[at] ^= mask;
        }
    }
}

const CACHES: [(Uuid, [u8; 16]); 2] = [([1; 16], [2; 16]), ([3; 16], [4; 16])];

/// The records of a tail, or none.
fn records_of(bytes: &[u8]) -> Vec<(u64, Record)> {
    decode_tail(bytes, &POOL).map_or_else(Vec::new, |tail| tail.records)
}

#[test]
fn a_wrong_byte_anywhere_is_found() {
    let block = superblock(Level::Raid10, &[4]);
    each_flip(&block.encode(), |at, bytes| {
        assert!(!matches!(Superblock::decode(bytes), Ok(Some(_))), "superblock, byte {at}");
    });
    each_flip(&root().encode(), |at, bytes| assert_eq!(Root::decode(bytes, &POOL), None, "root, byte {at}"));
    let words: Vec<u64> = (0..504).collect();
    each_flip(&encode_intents(&POOL, 3, &words), |at, bytes| {
        assert_eq!(decode_intents(bytes, &POOL, 3), None, "intents, byte {at}");
    });
    let (bytes, _) = batch(&some_records(), 512);
    each_flip(&bytes, |at, bytes| assert_eq!(decode_batch(bytes, &POOL, 9), None, "batch, byte {at}"));
}

#[test]
fn a_wrong_byte_in_a_tail_ends_it_before_that_entry() {
    let records = some_records();
    let mut bytes = encode_tail_header(&POOL, 5, &CACHES, &[7, 9]);
    let mut ends = vec![bytes.len()];
    let mut all = Vec::new();
    for (seq, record) in (100..).zip(records) {
        encode_tail_entry(seq, &record, &mut bytes);
        ends.push(bytes.len());
        all.push((seq, record));
    }
    let whole = TailContent { epoch: 5, caches: CACHES.to_vec(), untold: vec![7, 9], records: all.clone() };
    assert_eq!(decode_tail(&bytes, &POOL), Some(whole));
    assert_eq!(decode_tail(&bytes, &OTHER), None);
    each_flip(&bytes, |at, wrong| {
        let whole = ends.iter().filter(|&&end| end <= at).count().saturating_sub(1);
        assert_eq!(records_of(wrong), all[..whole], "byte {at}");
    });
    for len in 0..bytes.len() {
        let whole = ends.iter().filter(|&&end| end <= len).count().saturating_sub(1);
        assert_eq!(records_of(&bytes[..len]), all[..whole], "cut at {len}");
    }
}

#[test]
fn a_tail_whose_numbers_do_not_grow_ends_there() {
    let mut bytes = encode_tail_header(&POOL, 5, &CACHES, &[]);
    for seq in [4, 6, 6] {
        encode_tail_entry(seq, &Record::Delete { id: 1 }, &mut bytes);
    }
    assert_eq!(records_of(&bytes).len(), 2);
}

fn root() -> Root {
    Root {
        pool: POOL,
        number: 41,
        record_seq: 1 << 40,
        log_position: 8192,
        log_batch: 77,
        generation: 6,
        next_volume: 9,
        extents: 1 << 30,
        volumes: PagePtr { page: 2, crc: 0xdead_beef },
        volume_count: 3,
    }
}

#[test]
fn roots_round_trip_and_are_refused_to_other_pools() {
    let root = root();
    assert_eq!(Root::decode(&root.encode(), &POOL), Some(root.clone()));
    assert_eq!(Root::decode(&root.encode(), &OTHER), None);
    let empty = Root { volumes: PagePtr::NONE, volume_count: 0, ..root.clone() };
    assert_eq!(Root::decode(&empty.encode(), &POOL), Some(empty));
    for bad in [
        Root { volume_count: 0, ..root.clone() },
        Root { volumes: PagePtr::NONE, ..root.clone() },
        Root { volumes: PagePtr { page: 1, crc: 0 }, ..root.clone() },
        Root { volumes: PagePtr { page: NONE, crc: 1 }, volume_count: 0, ..root.clone() },
        Root { log_position: 100, ..root.clone() },
        Root { extents: NONE, ..root },
    ] {
        assert_eq!(Root::decode(&bad.encode(), &POOL), None, "{bad:?}");
    }
}

#[test]
fn intents_of_another_page_or_pool_count_as_torn() {
    let words: Vec<u64> = (0..504).map(|word| word * 0x0101_0101).collect();
    let bytes = encode_intents(&POOL, 3, &words);
    assert_eq!(bytes.len(), PAGE_BYTES);
    assert_eq!(decode_intents(&bytes, &POOL, 3), Some(words));
    assert_eq!(decode_intents(&bytes, &POOL, 2), None);
    assert_eq!(decode_intents(&bytes, &OTHER, 3), None);
}

#[test]
fn chunks_partials_and_directories_round_trip() {
    let mut chunk = ChunkPage { partial_pages: [PagePtr::NONE; 6], entries: Box::new([0; CHUNK_ENTRIES]) };
    chunk.partial_pages[1] = PagePtr { page: 44, crc: 3 };
    (0..).zip(chunk.entries.iter_mut()).for_each(|(index, entry)| *entry = index << 33);
    assert_eq!(ChunkPage::decode(&chunk.encode()), Ok(chunk.clone()));
    chunk.partial_pages[1].page = 0;
    assert!(ChunkPage::decode(&chunk.encode()).unwrap_err().0.contains("page 0"));

    let partials: Vec<PartialRecord> = (0..84)
        .map(|index| PartialRecord {
            index: index * 5,
            extent: 9,
            fallback: NONE,
            bits: [1, 2, 3, u64::from(index)],
        })
        .collect();
    assert_eq!(decode_partials(&encode_partials(&partials)), Ok(partials.clone()));
    assert_eq!(decode_partials(&encode_partials(&[])), Ok(vec![]));
    let far = PartialRecord { index: 448, ..partials[0].clone() };
    assert!(decode_partials(&encode_partials(&[far])).unwrap_err().0.contains("448"));
    let nowhere = PartialRecord { extent: NONE, ..partials[0].clone() };
    assert!(decode_partials(&encode_partials(&[nowhere])).is_err());
    let mut twice = encode_partials(&partials[..2]);
    twice[64 + 48] = 0;
    assert!(decode_partials(&twice).unwrap_err().0.contains("out of order"));

    let mut pointers = vec![PagePtr { page: 2, crc: 1 }, PagePtr::NONE, PagePtr { page: 2, crc: 1 }];
    let bytes = encode_dir(&pointers);
    pointers.resize(DIR_POINTERS, PagePtr::NONE);
    assert_eq!(decode_dir(&bytes), Ok(pointers));
    assert!(decode_dir(&bytes[8..]).is_err());
    assert!(decode_dir(&[0; PAGE_BYTES]).is_err());
}

fn some_records() -> Vec<Record> {
    let name = |name: &str| name.to_owned();
    let bits = [1, 0, u64::MAX, 1 << 63];
    vec![
        Record::CreateVolume { id: 1, uuid: uuid(1), name: name("root"), size_bytes: 20 << 30 },
        Record::Resize { id: 1, size_bytes: 30 << 30 },
        Record::Snapshot {
            items: vec![
                NewSnapshot { origin: 1, id: 2, uuid: uuid(2), name: name("root.1") },
                NewSnapshot { origin: 3, id: 4, uuid: uuid(4), name: "x".repeat(64) },
            ],
        },
        Record::Clone { snapshot: 2, id: 5, uuid: uuid(5), name: name("vm-1") },
        Record::Delete { id: 2 },
        Record::Map { volume: 1, index: 9, birth: 2, extent: 100, fallback: NONE, bits },
        Record::Map { volume: 1, index: 9, birth: 2, extent: 100, fallback: 99, bits: [0; 4] },
        Record::Valid { volume: 1, index: 9, bits },
        Record::Invalid { volume: 1, index: 9, bits },
        Record::Unmap { volume: 1, index: 9, count: 7 },
        Record::Rebirth { volume: 1, index: 9, birth: 3 },
        Record::Grow { extents: 1 << 20 },
    ]
}

fn encoded(records: &[Record]) -> Vec<u8> {
    let mut out = Vec::new();
    records.iter().for_each(|record| record.encode(&mut out));
    out
}

fn batch(records: &[Record], block_bytes: u32) -> (Vec<u8>, u64) {
    let bytes = encoded(records);
    let count = u32::try_from(records.len()).unwrap();
    (encode_batch(&POOL, 9, 100, count, &bytes, block_bytes), batch_len(bytes.len(), block_bytes))
}

#[test]
fn batches_round_trip_in_whole_blocks_and_only_as_their_number() {
    for block_bytes in [512, 4096] {
        let records = some_records();
        let (mut bytes, len_bytes) = batch(&records, block_bytes);
        assert_eq!(bytes.len() as u64, len_bytes);
        assert!(len_bytes.is_multiple_of(u64::from(block_bytes)));
        bytes.extend_from_slice(b"what an earlier lap left here");
        let expected = Batch { number: 9, first_seq: 100, records, len_bytes };
        assert_eq!(decode_batch(&bytes, &POOL, 9), Some(Ok(expected)));
        assert_eq!(decode_batch(&bytes, &POOL, 10), None);
        assert_eq!(decode_batch(&bytes, &OTHER, 9), None);
        for len in [0, 63, 64, 511, bytes.len() - 30] {
            assert_eq!(decode_batch(&bytes[..len], &POOL, 9), None, "cut at {len}");
        }
    }
    assert_eq!(batch_len(512 - 64, 512), 512);
    assert_eq!(batch_len(512 - 63, 512), 1024);
}

#[test]
fn a_whole_batch_that_makes_no_sense_is_an_error() {
    let good = encoded(&[Record::Delete { id: 1 }]);
    for (count, records, first_seq) in [
        (1, vec![99], 1),
        (2, good.clone(), 1),
        (u32::MAX, good.clone(), 1),
        (0, good.clone(), 1),
        (1, good.clone(), u64::MAX),
        (1, encoded(&[Record::Delete { id: NONE }]), 1),
        (1, encoded(&[Record::Unmap { volume: 1, index: NONE - 1, count: 5 }]), 1),
        (1, encoded(&[Record::Unmap { volume: 1, index: 1, count: 0 }]), 1),
        (1, encoded(&[Record::Snapshot { items: vec![] }]), 1),
        (1, encoded(&[Record::Resize { id: 1, size_bytes: u64::MAX }]), 1),
        (
            1,
            encoded(&[Record::Map {
                volume: 1,
                index: 1,
                birth: 1,
                extent: NONE,
                fallback: 1,
                bits: [0; 4],
            }]),
            1,
        ),
    ] {
        let bytes = encode_batch(&POOL, 9, first_seq, count, &records, 512);
        let error = decode_batch(&bytes, &POOL, 9).expect("its CRC is right").expect_err("it makes no sense");
        assert!(error.0.starts_with("batch 9"), "{error}");
    }
}

fn volume(id: u32, dirs: usize) -> VolumeRecord {
    VolumeRecord {
        id,
        uuid: uuid(1),
        name: format!("v{id}"),
        size_bytes: 1 << 40,
        shared_generation: 4,
        is_snapshot: id.is_multiple_of(2),
        origin: NONE,
        dirs: (0..dirs)
            .map(|dir| if dir % 3 == 2 { PagePtr::NONE } else { PagePtr { page: 50, crc: 9 } })
            .collect(),
    }
}

/// Gives the decoder what it wants from `pages`.
fn read(head: PagePtr, pages: &[(u32, Vec<u8>)]) -> Result<(Vec<VolumeRecord>, Vec<u32>), FormatError> {
    let mut decoder = VolumesDecoder::new(head);
    while let Some(page) = decoder.wanted() {
        let (_, bytes) =
            pages.iter().find(|(number, _)| *number == page).ok_or(FormatError("no page".to_owned()))?;
        decoder.give(bytes)?;
    }
    let used = decoder.pages().to_vec();
    Ok((decoder.finish()?, used))
}

#[test]
fn volumes_cross_pages_and_every_wrong_byte_is_found() {
    for counts in [vec![], vec![0], vec![293; 20], vec![5000], vec![1; 400]] {
        let volumes: Vec<_> = (1..).zip(&counts).map(|(id, &dirs)| volume(id, dirs)).collect();
        let mut free = (100..).step_by(3);
        let (head, pages) = encode_volumes(&volumes, &mut || free.next()).expect("pages enough");
        assert_eq!(head.is_none(), counts.is_empty());
        let (read_back, mut used) = read(head, &pages).expect("as it was written");
        assert_eq!(read_back, volumes);
        let mut given: Vec<u32> = pages.iter().map(|(page, _)| *page).collect();
        given.sort_unstable();
        used.sort_unstable();
        assert_eq!(used, given);
        if pages.len() > 1 {
            let mut left = pages.len() - 1;
            let few = &mut || {
                left = left.checked_sub(1)?;
                u32::try_from(left).ok()
            };
            assert_eq!(encode_volumes(&volumes, few), None);
        }
    }
    let (head, pages) = encode_volumes(&[volume(1, 2)], &mut || Some(5)).unwrap();
    each_flip(&pages[0].1, |at, bytes| assert!(read(head, &[(5, bytes.to_vec())]).is_err(), "byte {at}"));
}

#[test]
fn volumes_that_are_there_twice_or_end_early_are_refused() {
    let decode = |volumes: &[VolumeRecord]| {
        let mut free = 100..;
        let (head, pages) = encode_volumes(volumes, &mut || free.next()).unwrap();
        read(head, &pages)
    };
    assert!(decode(&[volume(1, 1), volume(1, 1)]).unwrap_err().0.contains("two volumes"));
    assert!(decode(&[VolumeRecord { origin: 1, ..volume(1, 1) }]).is_err());
    assert!(decode(&[VolumeRecord { size_bytes: u64::MAX, ..volume(1, 1) }]).is_err());

    let mut free = 100..;
    let (head, pages) = encode_volumes(&[volume(1, 5000)], &mut || free.next()).unwrap();
    assert!(VolumesDecoder::new(head).finish().unwrap_err().0.contains("missing"));
    // The second page alone is a chain too, of the middle of a record.
    let second = pages.len() - 2;
    let head = PagePtr { page: pages[second].0, crc: crc_of(&pages[second].1) };
    assert!(read(head, &pages[..=second]).is_err());
}

#[test]
fn a_chain_that_comes_back_to_a_page_ends() {
    // A page that names itself cannot carry its own CRC by accident; by intent it can: two unequal pages, one number.
    let (head, pages) = encode_volumes(&[volume(1, 700)], &mut || Some(5)).expect("always page 5");
    assert_eq!(pages.len(), 2);
    let mut decoder = VolumesDecoder::new(head);
    decoder.give(&pages[1].1).expect("the first time");
    assert!(decoder.give(&pages[0].1).unwrap_err().0.contains("twice"));
}

fn any_name() -> impl Strategy<Value = String> {
    "[A-Za-z0-9._-]{1,64}"
}

fn any_record() -> impl Strategy<Value = Record> {
    let id = || 0..NONE;
    let bits = any::<[u64; 4]>;
    let size = || 0..=record::VOLUME_BYTES_MAX;
    let item = (id(), id(), any::<Uuid>(), any_name()).prop_map(|(origin, id, uuid, name)| NewSnapshot {
        origin,
        id,
        uuid,
        name,
    });
    prop_oneof![
        (id(), any::<Uuid>(), any_name(), size())
            .prop_map(|(id, uuid, name, size_bytes)| Record::CreateVolume { id, uuid, name, size_bytes }),
        (id(), size()).prop_map(|(id, size_bytes)| Record::Resize { id, size_bytes }),
        proptest::collection::vec(item, 1..5).prop_map(|items| Record::Snapshot { items }),
        (id(), id(), any::<Uuid>(), any_name()).prop_map(|(snapshot, id, uuid, name)| Record::Clone {
            snapshot,
            id,
            uuid,
            name
        }),
        id().prop_map(|id| Record::Delete { id }),
        (id(), id(), any::<u32>(), id(), any::<u32>(), bits()).prop_map(
            |(volume, index, birth, extent, fallback, bits)| Record::Map {
                volume,
                index,
                birth,
                extent,
                fallback,
                bits
            }
        ),
        (id(), id(), bits()).prop_map(|(volume, index, bits)| Record::Valid { volume, index, bits }),
        (id(), id(), bits()).prop_map(|(volume, index, bits)| Record::Invalid { volume, index, bits }),
        (id(), 0..NONE / 2, 1..NONE / 2).prop_map(|(volume, index, count)| Record::Unmap {
            volume,
            index,
            count
        }),
        (id(), id(), any::<u32>()).prop_map(|(volume, index, birth)| Record::Rebirth {
            volume,
            index,
            birth
        }),
        id().prop_map(|extents| Record::Grow { extents }),
    ]
}

/// Every decoder, none of which may panic; what is taken encodes to the same bytes.
fn decode_all(bytes: &[u8]) {
    if let Ok(Some(block)) = Superblock::decode(bytes) {
        assert_eq!(block.encode(), bytes[..PAGE_BYTES]);
    }
    if let Some(root) = Root::decode(bytes, &POOL) {
        assert_eq!(root.encode(), bytes);
    }
    if let Ok(chunk) = ChunkPage::decode(bytes) {
        assert_eq!(chunk.encode(), bytes);
    }
    if let Ok(partials) = decode_partials(bytes) {
        assert_eq!(encode_partials(&partials), bytes);
    }
    if let Ok(pointers) = decode_dir(bytes) {
        assert_eq!(encode_dir(&pointers), bytes);
    }
    if let Some(words) = decode_intents(bytes, &POOL, 3) {
        assert_eq!(encode_intents(&POOL, 3, &words), bytes);
    }
    let mut rest = bytes;
    if let Ok(record) = Record::decode(&mut rest) {
        assert_eq!(encoded(&[record]), bytes[..bytes.len() - rest.len()]);
    }
    _ = decode_batch(bytes, &POOL, 9);
    _ = decode_tail(bytes, &POOL);
    let mut decoder = VolumesDecoder::new(PagePtr { page: 5, crc: crc_of(bytes) });
    if decoder.give(bytes).is_ok() {
        _ = decoder.finish();
    }
}

proptest! {
    #[test]
    fn records_round_trip(records in proptest::collection::vec(any_record(), 0..20)) {
        let bytes = encoded(&records);
        let mut rest = bytes.as_slice();
        for record in &records {
            prop_assert_eq!(&Record::decode(&mut rest).unwrap(), record);
        }
        prop_assert!(rest.is_empty());
        let (mut batch_bytes, len_bytes) = batch(&records, 512);
        batch_bytes.push(1);
        let expected = Batch { number: 9, first_seq: 100, records, len_bytes };
        prop_assert_eq!(decode_batch(&batch_bytes, &POOL, 9), Some(Ok(expected)));
    }

    #[test]
    fn random_bytes_make_no_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        decode_all(&bytes);
    }

    /// Good pages with a few wrong bytes and a CRC that is right again: what a decoder sees beyond the CRC.
    #[test]
    fn wrong_fields_with_a_right_crc_make_no_decoder_panic(
        which in 0_usize..8,
        changes in proptest::collection::vec((0_usize..4096, any::<u8>()), 0..4),
        near in proptest::collection::vec((0_usize..160, any::<u8>()), 0..4),
    ) {
        let has_crc = which < 5;
        let mut bytes = match which {
            0 => superblock(Level::Raid5, &[4, 4]).encode(),
            1 => root().encode(),
            2 => encode_intents(&POOL, 3, &[5; 504]),
            3 => batch(&some_records(), 4096).0,
            4 => [encode_tail_header(&POOL, 5, &CACHES, &[7]), vec![0; 50]].concat(),
            5 => encode_partials(&[PartialRecord { index: 3, extent: 4, fallback: 5, bits: [6; 4] }]),
            6 => encode_volumes(&[volume(1, 300)], &mut || Some(5)).unwrap().1.remove(0).1,
            _ => ChunkPage { partial_pages: [PagePtr::NONE; 6], entries: Box::new([3; CHUNK_ENTRIES]) }.encode(),
        };
        for (at, value) in changes.into_iter().chain(near) {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
        }
        if has_crc {
            super::bytes::seal(&mut bytes);
        }
        decode_all(&bytes);
    }
}
