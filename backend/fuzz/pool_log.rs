//! Logs and tails whose CRCs are right and whose records may say anything: each record is carried out or refused with one line, and
//! whichever were, everything goes together, also in a checkpoint that is loaded again.
#![no_main]

mod edits;
mod tables;

use edits::{Input, edit, edit_some, seal};
use hawser_volume::format::{
    NONE, NewSnapshot, Record, decode_batch, decode_tail, encode_batch, encode_tail_entry, encode_tail_header,
};
use hawser_volume::thin::{Metadata, Thin};
use tables::{Disk, POOL, check, finish, is_line};

const THIN: Thin = Thin { extents: 200, extent_bytes: 1 << 20, unit_bytes: 1 << 18 };
const PAGES: u32 = 200;
/// What volumes' tables take in memory goes by their size, and so do a pool's by its extents.
const SIZE_BYTES_MAX: u64 = 1 << 40;
const EXTENTS_MAX: u32 = 1 << 12;

/// A pool's first day: every kind of record.
fn day() -> Vec<Record> {
    let map = |volume, index, birth, extent, fallback, bits| {
        let bits = [bits, 0, 0, 0];
        Record::Map { volume, index, birth, extent, fallback, bits }
    };
    vec![
        Record::CreateVolume { id: 1, uuid: [1; 16], name: "v".to_owned(), size_bytes: 1000 << 20 },
        map(1, 0, 1, 0, NONE, 0xf),
        map(1, 1, 1, 1, NONE, 0b1),
        map(1, 500, 1, 2, NONE, 0),
        Record::Valid { volume: 1, index: 1, bits: [0b10, 0, 0, 0] },
        Record::Snapshot {
            items: vec![NewSnapshot { origin: 1, id: 2, uuid: [2; 16], name: "s".to_owned() }],
        },
        map(1, 0, 2, 3, 0, 0b1),
        Record::Clone { snapshot: 2, id: 3, uuid: [3; 16], name: "c".to_owned() },
        map(3, 500, 3, 4, NONE, 0xf),
        Record::Invalid { volume: 3, index: 500, bits: [0b100, 0, 0, 0] },
        Record::Resize { id: 3, size_bytes: 2000 << 20 },
        Record::Grow { extents: 300 },
        Record::Delete { id: 2 },
        Record::Rebirth { volume: 1, index: 1, birth: 3 },
        Record::Unmap { volume: 1, index: 0, count: 1 },
        Record::Delete { id: 3 },
    ]
}

/// The records of a sealed batch or tail, of which what follows the header was changed.
fn decoded(input: &mut Input<'_>, records: &[Record]) -> Vec<Record> {
    let which = input.u8();
    if which & 1 == 0 {
        let mut bytes = Vec::new();
        records.iter().for_each(|record| record.encode(&mut bytes));
        let count = u32::try_from(records.len()).expect("few");
        let mut batch = encode_batch(&POOL, 6, 100, count, &bytes, 512);
        edit_some(input, &mut batch);
        seal(&mut batch);
        return match decode_batch(&batch, &POOL, 6) {
            Some(Ok(batch)) => batch.records,
            Some(Err(error)) => {
                is_line(&error.0);
                Vec::new()
            }
            None => Vec::new(),
        };
    }
    let mut tail = encode_tail_header(&POOL, 3, &[([1; 16], [2; 16]), ([3; 16], [4; 16])], &[5, 6]);
    if which & 4 != 0 {
        edit_some(input, &mut tail);
        seal(&mut tail);
    }
    let mut entries = Vec::new();
    for (seq, record) in (100..).zip(records) {
        let mut entry = Vec::new();
        encode_tail_entry(seq, record, &mut entry);
        entries.push(entry);
    }
    for _ in 0..input.edits() {
        let at = input.below(entries.len());
        let entry = &mut entries[at];
        edit(input, entry);
        if which & 2 == 0 {
            // The CRC is over the length and what is behind the CRC.
            let crc = crc32c::crc32c_append(crc32c::crc32c(&entry[..4]), &entry[8..]);
            entry[4..8].copy_from_slice(&crc.to_le_bytes());
        }
    }
    tail.extend(entries.concat());
    let records = decode_tail(&tail, &POOL).map_or_else(Vec::new, |tail| tail.records);
    assert!(records.windows(2).all(|pair| pair[0].0 < pair[1].0));
    records.into_iter().map(|(_, record)| record).collect()
}

/// Records of any bytes, in short: the fields of one are a byte each.
fn short(input: &mut Input<'_>) -> Record {
    let names = ["a", "b", "c", "v", "s"];
    let volume = u32::from(input.u8() % 8);
    let mut index = || match input.u8() {
        at @ 0..200 => u32::from(at % 20),
        at => u32::from(at - 200) * 448 + 440,
    };
    let at = index();
    let bits = |input: &mut Input<'_>| [u64::from(input.u8() & 0xf), 0, 0, 0];
    let size_bytes = u64::from(input.u16()) << 19;
    let kind = input.u8() % 16;
    let name = || names[usize::from(kind) % names.len()].to_owned();
    let (uuid, id) = ([volume as u8; 16], u32::from(input.u8() % 16));
    match kind {
        0 => Record::CreateVolume { id, uuid, name: name(), size_bytes },
        1 => Record::Resize { id: volume, size_bytes },
        2 => Record::Snapshot { items: vec![NewSnapshot { origin: volume, id, uuid, name: name() }] },
        3 => Record::Clone { snapshot: volume, id, uuid, name: name() },
        4 => Record::Delete { id: volume },
        5 | 6 => Record::Unmap { volume, index: at, count: u32::from(input.u16()) },
        7 => Record::Rebirth { volume, index: at, birth: u32::from(input.u8()) },
        8 => Record::Grow { extents: u32::from(input.u16() % 1024) },
        9 => Record::Valid { volume, index: at, bits: bits(input) },
        10 => Record::Invalid { volume, index: at, bits: bits(input) },
        _ => {
            let (birth, extent) = (u32::from(input.u8() % 8), u32::from(input.u8()));
            let fallback = if kind == 15 { NONE } else { u32::from(input.u8()) };
            Record::Map { volume, index: at, birth, extent, fallback, bits: bits(input) }
        }
    }
}

fn is_within_reason(record: &Record) -> bool {
    match record {
        Record::CreateVolume { size_bytes, .. } | Record::Resize { size_bytes, .. } => {
            *size_bytes <= SIZE_BYTES_MAX
        }
        Record::Grow { extents } => *extents <= EXTENTS_MAX,
        _ => true,
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let mode = input.u8();
    let mut metadata = Metadata::new(THIN, PAGES);
    let mut records = day();
    match mode % 4 {
        0 => records = decoded(&mut input, &records),
        1 => {
            // As they come: any bytes.
            let mut bytes = input.rest();
            while let Ok(record) = Record::decode(&mut bytes) {
                let mut again = Vec::new();
                record.encode(&mut again);
                assert_eq!(Record::decode(&mut again.as_slice()).as_ref(), Ok(&record));
                records.push(record);
            }
        }
        _ => {
            records.truncate(usize::from(input.u8()) % (records.len() + 1));
            for _ in 0..input.u8() {
                records.push(short(&mut input));
            }
        }
    }
    let settles = mode & 4 == 0;
    // A checkpoint is begun after some of them, and goes on meanwhile.
    let begins = (mode & 8 != 0).then_some(usize::from(mode >> 4));
    let (mut disk, mut is_begun) = (Disk::new(), false);
    for (number, record) in records.iter().filter(|record| is_within_reason(record)).enumerate() {
        if begins == Some(number) {
            metadata.begin_checkpoint(false);
            is_begun = true;
        }
        if let Err(what) = metadata.apply(record) {
            is_line(&what);
        }
        if settles {
            metadata.settle();
        }
        if begins == Some(number)
            && let Ok(pages) = metadata.checkpoint_step(2)
        {
            disk.extend(pages);
        }
    }
    if is_begun {
        finish(&mut metadata, &mut disk);
    }
    check(metadata, disk, PAGES);
});
