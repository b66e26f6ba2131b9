//! Superblocks, roots and pages of intents that are sealed and may say anything: taken, or refused with one line; and what is taken
//! is what would be written again.
#![no_main]

mod edits;

use edits::{Input, edit_some, seal};
use hawser_volume::format::parity_log::HEADER_PAGES;
use hawser_volume::format::{
    INTENTS_PER_PAGE, Layout, MemberRecord, PAGE_BYTES, PagePtr, Replacement, Root, ScrubRecord, SetRecord, Superblock, decode_intents,
    encode_intents, unit_bytes_for,
};
use hawser_volume::raid::{Array, Level, Set, SetConfig};
use std::sync::Arc;

const POOL: [u8; 16] = [9; 16];

/// A pool of this level, with sets of so many members and a spare.
fn real(level: Level, counts: &[u16]) -> Superblock {
    let total = counts.iter().sum::<u16>();
    let (region_bytes, data_bytes) = (1 << 20, 64 << 20);
    let regions = if level.is_redundant() { 64 } else { 0 };
    let extent_bytes = 60 << 16;
    Superblock {
        pool_uuid: POOL,
        name: "p0".to_owned(),
        level,
        block_bytes: 512,
        strip_bytes: 64 << 10,
        extent_bytes,
        unit_bytes: unit_bytes_for(extent_bytes),
        region_bytes,
        layout: Layout { intent_pages: 1, log_bytes: 1 << 20, metadata_pages: 100, parity_log_pages: if matches!(level, Level::Raid5 | Level::Raid6) { 256 } else { 0 } },
        generation: 7,
        epoch: 3,
        opened_by: Some([5; 16]),
        sets: counts.iter().map(|members| SetRecord { members: *members, regions }).collect(),
        members: (0..total)
            .map(|number| MemberRecord { uuid: [10 + number as u8; 16], in_sync: number != 1, data_bytes })
            .collect(),
        spares: vec![[200; 16]],
        replacement: (total > 2).then_some(Replacement { uuid: [201; 16], copied_bytes: 1 << 20, member: 1 }),
        scrub: (level.is_redundant() && total % 2 == 0).then_some(ScrubRecord { repair: true, volume: 2, index: 5, done: 9, mismatches: 3, data_faults: 1, parity_faults: 2, failures: 1 }),
        this: [10; 16],
    }
}

fn superblock(input: &mut Input<'_>) {
    let real = match input.u8() % 6 {
        0 => real(Level::Linear, &[1]),
        1 => real(Level::Raid0, &[3, 4]),
        2 => real(Level::Raid1, &[2]),
        3 => real(Level::Raid10, &[4, 3]),
        4 => real(Level::Raid5, &[4]),
        _ => real(Level::Raid6, &[5]),
    };
    let mut page = real.encode();
    edit_some(input, &mut page);
    seal(&mut page);
    match Superblock::decode(&page) {
        Ok(None) => {}
        Ok(Some(found)) => {
            assert_eq!(found.encode(), page);
            look(&found);
        }
        Err(error) => is_line(&error.0),
    }
}

/// What opening a pool makes of it, before it looks at anything else.
fn look(found: &Superblock) {
    let layout = found.layout;
    assert!(layout.pages_offset() <= layout.data_offset());
    assert!(found.metadata_members() > 0);
    let _ = (found.place(), found.epoch.checked_add(1));
    let mut sets = Vec::new();
    let mut first = 0;
    for record in &found.sets {
        let members = &found.members[first..first + usize::from(record.members)];
        let regions: u64 =
            members.iter().map(|member| member.data_bytes).max().unwrap_or(0) / found.region_bytes;
        if regions > 1 << 24 {
            // Its bits would take memory, as a pool of that size does.
            return;
        }
        let set = Set::new(SetConfig {
            level: found.level,
            first_member: u16::try_from(first).expect("few members"),
            member_bytes: members.iter().map(|member| member.data_bytes).collect(),
            strip_bytes: found.strip_bytes,
            extent_bytes: found.extent_bytes,
            region_bytes: found.region_bytes,
            data_offset: layout.data_offset(),
            parity_log: (layout.parity_log_offset(), layout.parity_log_pages.saturating_sub(HEADER_PAGES)),
        });
        match set {
            Ok(set) => sets.push(Arc::new(set)),
            Err(what) => return is_line(&what),
        }
        first += usize::from(record.members);
    }
    match Array::new(sets) {
        Ok(array) => {
            let last = array.extents() - 1;
            let (set, pieces) = array.pieces(last, 0, found.extent_bytes);
            let mut end = 0;
            for piece in pieces {
                assert_eq!(piece.start, end);
                end += u64::from(piece.len);
                for copy in piece.copies.as_slice() {
                    let member = &found.members[usize::from(copy.member)];
                    assert!(copy.offset + u64::from(piece.len) <= member.data_bytes);
                    assert!(set.first_member() <= copy.member);
                }
            }
            assert_eq!(end, found.extent_bytes);
        }
        Err(what) => is_line(&what),
    }
}

fn root(input: &mut Input<'_>) {
    let volumes = PagePtr { page: 5, crc: 77 };
    let root = Root {
        pool: POOL,
        number: 4,
        record_seq: 100,
        log_position: 4096,
        log_batch: 6,
        generation: 3,
        next_volume: 9,
        extents: 300,
        volumes,
        volume_count: 2,
    };
    let mut page = root.encode();
    edit_some(input, &mut page);
    seal(&mut page);
    if let Some(found) = Root::decode(&page, &POOL) {
        assert_eq!(found.encode(), page);
    }
}

fn intents(input: &mut Input<'_>) {
    let words = vec![0x5555; INTENTS_PER_PAGE as usize / 64];
    let mut page = encode_intents(&POOL, 1, &words);
    edit_some(input, &mut page);
    seal(&mut page);
    if let Some(words) = decode_intents(&page, &POOL, 1) {
        assert_eq!(encode_intents(&POOL, 1, &words), page);
    }
}

fn is_line(what: &str) {
    assert!(!what.is_empty() && !what.contains('\n'), "not one line: {what:?}");
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    match input.u8() % 8 {
        0 => root(&mut input),
        1 => intents(&mut input),
        2 => {
            // Nothing is right but the beginning.
            let mut page = input.rest().to_vec();
            page.resize(PAGE_BYTES, 0);
            page[..12].copy_from_slice(b"HAWSERSB\x01\0\0\0");
            seal(&mut page);
            if let Ok(Some(found)) = Superblock::decode(&page) {
                look(&found);
            }
        }
        _ => superblock(&mut input),
    }
});
