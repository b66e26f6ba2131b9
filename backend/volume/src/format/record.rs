//! Changes of the mapping, as they stand in the log and in the tail.
//!
//! ```text
//!   u8 kind, then the fields in the order of the declaration; a name is u8 length + bytes
//! ```
//!
//! Must not know: what a record does; that is thin's.

use super::bytes::{
    put_bits, put_name, put_u32, put_u64, take_bits, take_name, take_number, take_u8, take_u32, take_u64,
    take_uuid, wrong,
};
use super::{FormatError, Uuid};

/// No volume is larger: 1 EiB.
pub const VOLUME_BYTES_MAX: u64 = 1 << 60;

/// One of the snapshots that are made at the same instant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewSnapshot {
    /// The volume that it is of.
    pub origin: u32,
    /// Its number.
    pub id: u32,
    /// Its UUID.
    pub uuid: Uuid,
    /// Its name in the pool.
    pub name: String,
}

/// A change. Volumes and extents are numbers, `index` is the extent's place in the volume, `bits` are units of an extent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// A new volume, all zero.
    CreateVolume {
        /// Its number: never used before.
        id: u32,
        /// Its UUID.
        uuid: Uuid,
        /// Its name in the pool.
        name: String,
        /// Its size.
        size_bytes: u64,
    },
    /// Another size.
    Resize {
        /// Which volume.
        id: u32,
        /// From now on.
        size_bytes: u64,
    },
    /// Snapshots, all at the same instant: the generation is raised once.
    Snapshot {
        /// At least one.
        items: Vec<NewSnapshot>,
    },
    /// A writable volume that begins as a snapshot is.
    Clone {
        /// The snapshot.
        snapshot: u32,
        /// The new volume's number.
        id: u32,
        /// Its UUID.
        uuid: Uuid,
        /// Its name in the pool.
        name: String,
    },
    /// A volume or snapshot is gone; what nobody else holds is free.
    Delete {
        /// Which.
        id: u32,
    },
    /// An extent's place in a volume.
    Map {
        /// The volume.
        volume: u32,
        /// Which of its extents.
        index: u32,
        /// The generation that the extent was born in.
        birth: u32,
        /// Where it is in the pool.
        extent: u32,
        /// What is read where a unit is not valid: another extent, or [`NONE`](super::NONE) for zeroes.
        fallback: u32,
        /// The valid units.
        bits: [u64; 4],
    },
    /// These units are valid from now on.
    Valid {
        /// The volume.
        volume: u32,
        /// Which of its extents.
        index: u32,
        /// The units.
        bits: [u64; 4],
    },
    /// These units read as zeroes again.
    Invalid {
        /// The volume.
        volume: u32,
        /// Which of its extents.
        index: u32,
        /// The units.
        bits: [u64; 4],
    },
    /// These extents read as zeroes again, and are not the volume's any more.
    Unmap {
        /// The volume.
        volume: u32,
        /// The first.
        index: u32,
        /// How many.
        count: u32,
    },
    /// Nobody else holds the extent any more, so it counts as born later.
    Rebirth {
        /// The volume.
        volume: u32,
        /// Which of its extents.
        index: u32,
        /// The generation from now on.
        birth: u32,
    },
    /// The pool has more room.
    Grow {
        /// All extents that it has now.
        extents: u32,
    },
}

impl Record {
    /// Adds it to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Record::CreateVolume { id, uuid, name, size_bytes } => {
                out.push(1);
                put_u32(out, *id);
                out.extend_from_slice(uuid);
                put_name(out, name);
                put_u64(out, *size_bytes);
            }
            Record::Resize { id, size_bytes } => {
                out.push(2);
                put_u32(out, *id);
                put_u64(out, *size_bytes);
            }
            Record::Snapshot { items } => {
                out.push(3);
                put_u32(out, u32::try_from(items.len()).expect("no more snapshots than numbers of volumes"));
                for item in items {
                    put_u32(out, item.origin);
                    put_u32(out, item.id);
                    out.extend_from_slice(&item.uuid);
                    put_name(out, &item.name);
                }
            }
            Record::Clone { snapshot, id, uuid, name } => {
                out.push(4);
                put_u32(out, *snapshot);
                put_u32(out, *id);
                out.extend_from_slice(uuid);
                put_name(out, name);
            }
            Record::Delete { id } => put_kind(out, 5, &[*id]),
            Record::Map { volume, index, birth, extent, fallback, bits } => {
                put_kind(out, 6, &[*volume, *index, *birth, *extent, *fallback]);
                put_bits(out, bits);
            }
            Record::Valid { volume, index, bits } => {
                put_kind(out, 7, &[*volume, *index]);
                put_bits(out, bits);
            }
            Record::Invalid { volume, index, bits } => {
                put_kind(out, 8, &[*volume, *index]);
                put_bits(out, bits);
            }
            Record::Unmap { volume, index, count } => put_kind(out, 9, &[*volume, *index, *count]),
            Record::Rebirth { volume, index, birth } => put_kind(out, 10, &[*volume, *index, *birth]),
            Record::Grow { extents } => put_kind(out, 11, &[*extents]),
        }
    }

    /// Takes the first from `bytes`.
    ///
    /// # Errors
    /// The kind is unknown, or a field is one that it cannot be; how much was taken then is not said.
    pub fn decode(bytes: &mut &[u8]) -> Result<Record, FormatError> {
        let b = bytes;
        Ok(match take_u8(b)? {
            1 => Record::CreateVolume {
                id: take_volume(b)?,
                uuid: take_uuid(b)?,
                name: take_name(b)?,
                size_bytes: take_size(b)?,
            },
            2 => Record::Resize { id: take_volume(b)?, size_bytes: take_size(b)? },
            3 => Record::Snapshot { items: take_snapshots(b)? },
            4 => Record::Clone {
                snapshot: take_volume(b)?,
                id: take_volume(b)?,
                uuid: take_uuid(b)?,
                name: take_name(b)?,
            },
            5 => Record::Delete { id: take_volume(b)? },
            6 => Record::Map {
                volume: take_volume(b)?,
                index: take_index(b)?,
                birth: take_u32(b)?,
                extent: take_number(b, "extent")?,
                fallback: take_u32(b)?,
                bits: take_bits(b)?,
            },
            7 => Record::Valid { volume: take_volume(b)?, index: take_index(b)?, bits: take_bits(b)? },
            8 => Record::Invalid { volume: take_volume(b)?, index: take_index(b)?, bits: take_bits(b)? },
            9 => {
                let (volume, index, count) = (take_volume(b)?, take_index(b)?, take_u32(b)?);
                if count == 0 || index.checked_add(count).is_none() {
                    return Err(wrong!("{count} extents from {index} on are unmapped"));
                }
                Record::Unmap { volume, index, count }
            }
            10 => Record::Rebirth { volume: take_volume(b)?, index: take_index(b)?, birth: take_u32(b)? },
            11 => Record::Grow { extents: take_number(b, "number of extents")? },
            kind => return Err(wrong!("a record of unknown kind {kind}")),
        })
    }
}

fn put_kind(out: &mut Vec<u8>, kind: u8, numbers: &[u32]) {
    out.push(kind);
    numbers.iter().for_each(|&number| put_u32(out, number));
}

fn take_volume(bytes: &mut &[u8]) -> Result<u32, FormatError> {
    take_number(bytes, "volume")
}

fn take_index(bytes: &mut &[u8]) -> Result<u32, FormatError> {
    take_number(bytes, "index")
}

fn take_size(bytes: &mut &[u8]) -> Result<u64, FormatError> {
    match take_u64(bytes)? {
        size if size > VOLUME_BYTES_MAX => {
            Err(wrong!("a volume of {size} bytes, more than {VOLUME_BYTES_MAX}"))
        }
        size => Ok(size),
    }
}

fn take_snapshots(bytes: &mut &[u8]) -> Result<Vec<NewSnapshot>, FormatError> {
    let count = take_u32(bytes)?;
    if count == 0 {
        return Err(wrong!("a snapshot of nothing"));
    }
    // No capacity from `count`, which may be anything: bytes run out first.
    let mut items = Vec::new();
    for _ in 0..count {
        items.push(NewSnapshot {
            origin: take_volume(bytes)?,
            id: take_volume(bytes)?,
            uuid: take_uuid(bytes)?,
            name: take_name(bytes)?,
        });
    }
    Ok(items)
}
