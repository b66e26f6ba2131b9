//! What a superblock may say, and what not.

use super::superblock::{EXTENT_BYTES_MAX, MEMBERS_MAX};
use super::tests::{OTHER, superblock, uuid};
use super::*;
use crate::raid::Level;

#[test]
fn superblocks_of_all_levels_round_trip() {
    let cases: [(Level, &[u16], u16); 11] = [
        (Level::Linear, &[1], 1),
        (Level::Linear, &[32, 32], 1),
        (Level::Raid0, &[2, 2], 1),
        (Level::Raid0, &[31], 1),
        (Level::Raid1, &[2], 2),
        (Level::Raid1, &[4, 4], 4),
        (Level::Raid10, &[2], 2),
        (Level::Raid10, &[8; 8], 2),
        (Level::Raid5, &[3, 3], 2),
        (Level::Raid6, &[4], 3),
        (Level::Raid6, &[32, 32], 3),
    ];
    for (level, sets, metadata) in cases {
        let mut block = superblock(level, sets);
        let bytes = block.encode();
        assert_eq!(bytes.len(), PAGE_BYTES);
        assert_eq!(Superblock::decode(&bytes), Ok(Some(block.clone())), "{level:?} {sets:?}");
        assert_eq!(block.metadata_members(), metadata, "{level:?} {sets:?}");
        assert_eq!(block.place(), Some(0));
        block.this = uuid(101);
        block.opened_by = None;
        assert_eq!(Superblock::decode(&block.encode()), Ok(Some(block.clone())));
        let member = sets[0] - 1;
        block.replacement = Some(Replacement { uuid: uuid(102), copied_bytes: 9 << 30, member });
        block.this = uuid(102);
        assert_eq!(block.place(), None);
        assert_eq!(Superblock::decode(&block.encode()), Ok(Some(block.clone())));
        for repair in [false, true] {
            block.scrub = Some(ScrubRecord {
                repair,
                volume: 7,
                index: 1 << 30,
                done: 1 << 40,
                mismatches: 3,
                data_faults: 1,
                parity_faults: 2,
                failures: u64::MAX,
            });
            let decoded = Superblock::decode(&block.encode());
            match level.is_redundant() {
                true => assert_eq!(decoded, Ok(Some(block.clone())), "{level:?}"),
                false => assert!(decoded.unwrap_err().0.contains("a scrub is under way"), "{level:?}"),
            }
        }
    }
    let mut odd = superblock(Level::Raid10, &[3]);
    odd.extent_bytes = 1 << 20;
    assert_eq!(Superblock::decode(&odd.encode()), Ok(Some(odd)));
}

#[test]
fn superblock_fields_that_cannot_be_are_refused_by_name() {
    type Change = fn(&mut Superblock);
    fn being_replaced(s: &mut Superblock, number: u8, copied_bytes: u64, member: u16) {
        s.replacement = Some(Replacement { uuid: uuid(number), copied_bytes, member });
    }
    let cases: [(Change, &str); 31] = [
        (|s| s.block_bytes = 1000, "block_bytes"),
        (|s| s.block_bytes = 8192, "block_bytes"),
        (|s| s.strip_bytes = 2048, "strip_bytes"),
        (|s| s.strip_bytes = 2 << 20, "strip_bytes"),
        (|s| s.strip_bytes = 65537, "strip_bytes"),
        (|s| s.extent_bytes = 0, "extent_bytes"),
        (|s| s.extent_bytes += 4096, "extent_bytes"),
        (|s| s.extent_bytes = EXTENT_BYTES_MAX + (64 << 10), "extent_bytes"),
        (|s| s.unit_bytes = 2048, "unit_bytes"),
        (|s| s.unit_bytes = 12288, "unit_bytes"),
        (|s| s.unit_bytes = 2 << 20, "unit_bytes"),
        (|s| (s.extent_bytes, s.unit_bytes) = (2 << 20, 4096), "unit_bytes"),
        (|s| s.region_bytes = 32 << 10, "region_bytes"),
        (|s| s.region_bytes = 96 << 10, "region_bytes"),
        (|s| (s.strip_bytes, s.region_bytes) = (1 << 20, 64 << 10), "region_bytes"),
        (|s| s.layout.log_bytes = 0, "log_bytes"),
        (|s| s.layout.log_bytes = 5000, "log_bytes"),
        (|s| s.layout.log_bytes = u64::MAX - 4095, "log_bytes"),
        (|s| s.layout.metadata_pages = 2, "metadata_pages"),
        (|s| s.layout.intent_pages = 0, "intent pages"),
        (|s| s.sets[0].regions = 0, "regions"),
        (|s| s.sets[0].regions = u32::MAX, "regions"),
        (|s| s.sets.clear(), "sets"),
        (|s| s.sets[0].members = 3, "the sets have"),
        (|s| s.members[1].data_bytes = 0, "member 1"),
        (|s| s.members[1].data_bytes = u64::MAX, "member 1"),
        (|s| s.spares[0] = s.members[1].uuid, "same UUID"),
        (|s| s.this = OTHER, "neither"),
        (|s| being_replaced(s, 102, 0, 2), "member 2 is being replaced"),
        (|s| being_replaced(s, 102, 11 << 30, 0), "bytes of member 0 are copied"),
        (|s| being_replaced(s, 1, 0, 0), "same UUID"),
    ];
    let good = superblock(Level::Raid1, &[2]);
    assert_eq!(good.validate(), Ok(()));
    for (index, (change, what)) in cases.into_iter().enumerate() {
        let mut bad = good.clone();
        change(&mut bad);
        let error = Superblock::decode(&bad.encode()).expect_err(&format!("case {index}, {what}"));
        assert!(error.0.contains(what), "case {index}: {error} should name {what}");
    }
    let mut unnamed = good.clone();
    unnamed.name = "a/b".to_owned();
    assert!(unnamed.validate().unwrap_err().0.contains("name"));
}

#[test]
fn sets_of_too_few_or_too_many_members_are_refused() {
    let cases = [
        (Level::Raid0, 1),
        (Level::Raid0, 33),
        (Level::Raid1, 1),
        (Level::Raid1, 5),
        (Level::Raid10, 1),
        (Level::Raid5, 2),
        (Level::Raid6, 3),
        (Level::Linear, 33),
    ];
    for (level, members) in cases {
        let mut bad = superblock(Level::Linear, &[members]);
        bad.level = level;
        bad.layout.parity_log_pages = crate::format::parity_log_pages_min(level, members, bad.strip_bytes);
        let error = Superblock::decode(&bad.encode()).expect_err("wrong number of members");
        assert!(error.0.contains("members, and not"), "{level:?} {members}: {error}");
    }
}

#[test]
fn what_is_reserved_or_unknown_in_a_superblock_is_refused() {
    let good = superblock(Level::Raid1, &[2]).encode();
    for at in [
        104,
        128,
        130,
        132,
        134,
        136,
        137,
        140,
        144 + 40,
        210,
        208 + 8,
        272 + 40,
        400 + 25,
        400 + 70,
        2448 + 16,
        2448 + 24,
        2448 + 26,
        2480,
        2480 + 4,
        2480 + 12,
        2480 + 16,
        2480 + 39,
        2480 + 40,
        3000,
        4095,
    ] {
        let mut bytes = good.clone();
        bytes[at] ^= 0x42;
        super::bytes::seal(&mut bytes);
        assert!(Superblock::decode(&bytes).is_err(), "byte {at}");
    }
    let mut newer = good.clone();
    newer[8] = 2;
    assert!(Superblock::decode(&newer).unwrap_err().0.contains("version 2"));
    assert_eq!(Superblock::decode(&[0; PAGE_BYTES]), Ok(None));
    assert!(Superblock::decode(&good[..4000]).is_err());
}

#[test]
fn units_are_the_smallest_power_of_two_of_at_most_256() {
    for (extent, unit) in [
        (4096, 4096),
        (192 << 10, 4096),
        (1 << 20, 4096),
        ((1 << 20) + 4096, 8192),
        (64 << 20, 256 << 10),
        (EXTENT_BYTES_MAX, 512 << 10),
    ] {
        assert_eq!(unit_bytes_for(extent), unit, "{extent}");
    }
    assert_eq!(unit_bytes_for(u64::MAX), 1 << 31);
}

#[test]
fn the_largest_superblock_fits() {
    let mut block = superblock(Level::Linear, &[8; 8]);
    block.spares = (0..8).map(|spare| uuid(100 + spare)).collect();
    block.name = "n".repeat(NAME_BYTES_MAX);
    assert_eq!(block.members.len(), MEMBERS_MAX);
    assert_eq!(Superblock::decode(&block.encode()), Ok(Some(block)));
}

#[test]
fn pages_stand_behind_each_other_and_data_is_aligned() {
    let layout = Layout { intent_pages: 2, log_bytes: 16 << 20, metadata_pages: 5, parity_log_pages: 0 };
    assert_eq!(layout.intents_offset(), 1 << 20);
    assert_eq!(layout.log_offset(), (1 << 20) + 8192);
    assert_eq!(layout.pages_offset(), (17 << 20) + 8192);
    assert_eq!(layout.page_offset(4), (17 << 20) + 8192 + 16384);
    assert_eq!(layout.data_offset(), 18 << 20);
    let exact = Layout { intent_pages: 0, log_bytes: 1 << 20, metadata_pages: 256, parity_log_pages: 0 };
    assert_eq!(exact.data_offset(), 3 << 20);
}
