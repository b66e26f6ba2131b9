//! Checkpoints whose CRCs are right and whose pages may say anything: loaded, or refused with one line; and what is loaded goes
//! together as what we write ourselves does.
#![no_main]

mod edits;
mod tables;

use edits::{Input, edit};
use hawser_volume::format::{
    ChunkPage, NONE, NewSnapshot, PAGE_BYTES, PagePtr, Record, Root, VolumesDecoder, crc_of, decode_dir,
    decode_partials, encode_dir, encode_partials,
};
use hawser_volume::thin::{Metadata, Thin};
use std::sync::OnceLock;
use tables::{Disk, check, finish, is_line, load};

const THIN: Thin = Thin { extents: 300, extent_bytes: 1 << 20, unit_bytes: 1 << 18 };
const PAGES: u32 = 64;
/// Pointers that go in circles have no right CRCs.
const DEPTH_MAX: u32 = 8;

/// A volume with two directories, a snapshot and a clone; partials on two pages.
fn real() -> (Disk, Root) {
    let mut m = Metadata::new(THIN, PAGES);
    let mut disk = Disk::new();
    let size_bytes = (513 * 448) << 20;
    m.apply(&Record::CreateVolume { id: 1, uuid: [1; 16], name: "v".to_owned(), size_bytes }).expect("good");
    let map = |m: &mut Metadata, volume, index, fallback, bits| {
        let (extent, birth) = (m.allocate().expect("enough"), m.generation());
        let bits = [bits, 0, 0, 0];
        m.apply(&Record::Map { volume, index, birth, extent, fallback, bits }).expect("good");
        extent
    };
    for index in 0..100 {
        map(&mut m, 1, index, NONE, 0b11);
    }
    let full = map(&mut m, 1, 512 * 448, NONE, 0xf);
    let item = NewSnapshot { origin: 1, id: 2, uuid: [2; 16], name: "s".to_owned() };
    m.apply(&Record::Snapshot { items: vec![item] }).expect("good");
    m.apply(&Record::Clone { snapshot: 2, id: 3, uuid: [3; 16], name: "c".to_owned() }).expect("good");
    map(&mut m, 3, 512 * 448, full, 0b1);
    map(&mut m, 1, 512 * 448 + 3, NONE, 0xf);
    m.begin_checkpoint(false);
    let root = finish(&mut m, &mut disk).expect("enough pages");
    (disk, root)
}

/// Puts other bytes into a page, and the right CRC into all pointers to it, and so on up to the root.
fn put(disk: &mut Disk, root: &mut Root, page: u32, bytes: Vec<u8>, depth: u32) {
    let (old, new) = (crc_of(&disk[&page]), crc_of(&bytes));
    disk.insert(page, bytes);
    let pointer = |crc: u32| u64::from(crc) << 32 | u64::from(page);
    if root.volumes == (PagePtr { page, crc: old }) {
        root.volumes.crc = new;
    }
    if old == new || depth == DEPTH_MAX {
        return;
    }
    let parents: Vec<u32> = disk.keys().copied().filter(|parent| *parent != page).collect();
    for parent in parents {
        let bytes = &disk[&parent];
        // The records of volumes have any length; all others are aligned.
        let step = if bytes.starts_with(b"HAWSERVL") { 1 } else { 8 };
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let is_old = |at: &usize| word(*at) == pointer(old);
        let places: Vec<usize> = (0..bytes.len() - 7).step_by(step).filter(is_old).collect();
        if !places.is_empty() {
            let mut bytes = bytes.clone();
            places.iter().for_each(|at| bytes[*at..*at + 8].copy_from_slice(&pointer(new).to_le_bytes()));
            put(disk, root, parent, bytes, depth + 1);
        }
    }
}

/// Each page by itself, of any bytes.
fn alone(data: &[u8]) {
    let mut page = data.to_vec();
    page.resize(PAGE_BYTES, 0);
    if let Ok(pointers) = decode_dir(&page) {
        assert_eq!(encode_dir(&pointers), page);
    }
    for magic in [b"HAWSERCH", b"HAWSERPT", b"HAWSERVL"] {
        page[..16].copy_from_slice(&[*magic, [1, 0, 0, 0, 0, 0, 0, 0]].concat());
        match magic {
            b"HAWSERCH" => {
                if let Ok(chunk) = ChunkPage::decode(&page) {
                    assert_eq!(chunk.encode(), page);
                }
            }
            b"HAWSERPT" => {
                if let Ok(partials) = decode_partials(&page) {
                    assert_eq!(encode_partials(&partials), page);
                }
            }
            _ => {
                let mut list = VolumesDecoder::new(PagePtr { page: 2, crc: crc_of(&page) });
                while let Some(wanted) = list.wanted() {
                    assert!(wanted >= 2);
                    if list.give(&page).is_err() {
                        return;
                    }
                }
                let _ = list.finish();
            }
        }
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    static REAL: OnceLock<(Disk, Root)> = OnceLock::new();
    let mut input = Input::new(data);
    if input.u8() % 8 == 0 {
        return alone(input.rest());
    }
    let (mut disk, mut root) = REAL.get_or_init(real).clone();
    let pages: Vec<u32> = disk.keys().copied().collect();
    for _ in 0..input.edits() {
        let page = pages[input.below(pages.len())];
        let mut bytes = disk[&page].clone();
        match input.u8() % 8 {
            0 => match input.u8() % 6 {
                0 => root.generation = input.u32() & 0xff,
                1 => root.extents = input.u32(),
                2 => root.next_volume = input.u32(),
                3 => root.volume_count = input.u32(),
                4 => root.generation = input.u32(),
                _ => root.number = u64::from(input.u32()),
            },
            1 => {
                // A pointer to some page, with its CRC.
                let to = pages[input.below(pages.len())];
                let at = input.below(bytes.len() - 7);
                bytes[at..at + 4].copy_from_slice(&to.to_le_bytes());
                bytes[at + 4..at + 8].copy_from_slice(&crc_of(&disk[&to]).to_le_bytes());
            }
            2 => {
                // The same as another page.
                bytes.clone_from(&disk[&pages[input.below(pages.len())]]);
            }
            _ => edit(&mut input, &mut bytes),
        }
        put(&mut disk, &mut root, page, bytes, 0);
    }
    match load(&disk, &root, THIN, PAGES) {
        Ok(metadata) => check(metadata, disk, PAGES),
        Err(what) => is_line(&what),
    }
});
