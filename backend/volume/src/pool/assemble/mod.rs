//! From devices to a pool: new ones, and those that are there.
//!
//! The superblocks say who is a member and who has the data; the one with the highest generation knows best. Then the tables are read from those who
//! have them: the newest root, what it points to, the log behind it, and what the process before us left in the tail.

mod check;
mod create;
mod found;
mod open;
mod parity_log;
mod tables;

pub(super) use check::check;
pub(super) use create::create;
pub(super) use found::too_small;
pub(super) use open::open;

use super::lanes::{Lanes, Leaf};
use super::{Ask, Label, PoolError};
use crate::format::parity_log::HEADER_PAGES;
use crate::format::{Layout, PAGE_BYTES, SetRecord, Superblock, Uuid};
use crate::raid::{Array, Level, Set, SetConfig};
use hawser_block::{Device, Status};
use hawser_runtime::{ReactorHandle, Runtime};
use std::rc::Rc;
use std::sync::Arc;

/// Of a device that is to be a member.
pub(super) fn read_only_line(name: &str) -> String {
    format!("{name} is read-only, want a device that can be written")
}

/// Why a device is not taken that was given up by whoever had it.
pub(crate) fn still_gets_writes(name: &str) -> PoolError {
    PoolError::Conflict(format!(
        "{name} may still get writes of before it was lost: want it tried again in a minute, or another device"
    ))
}

/// Of spares where no member can be done without.
pub(super) fn spares_line(level: Level) -> String {
    format!("{} has no second copy that a spare could be given, want no spares", level.name())
}

pub(super) fn wrong(what: String) -> PoolError {
    PoolError::Wrong(what)
}

pub(super) fn failed(leaf: &Leaf, what: &str, status: Status) -> PoolError {
    PoolError::Failed(format!("{}: {what}: {}", leaf.name(), status.name()))
}

pub(super) fn leaves_of(devices: Vec<Arc<dyn Device>>) -> Result<Vec<Leaf>, PoolError> {
    let leaf = |device: Arc<dyn Device>| {
        let name = device.name().to_owned();
        Leaf::new(device).ok_or_else(|| PoolError::Failed(format!("{name} is not reached")))
    };
    let leaves = devices.into_iter().map(leaf).collect::<Result<Vec<_>, _>>()?;
    for (index, leaf) in leaves.iter().enumerate() {
        if leaves[..index].iter().any(|other| other.same(leaf)) {
            return Err(wrong(format!("{} is given twice", leaf.name())));
        }
    }
    Ok(leaves)
}

/// What a device says of itself; `None`: nothing.
pub(crate) async fn read_superblock(lanes: &Rc<Lanes>, leaf: &Leaf) -> Result<Option<Superblock>, PoolError> {
    let size = leaf.device.geometry().map_or(0, |geometry| geometry.size_bytes());
    let mut best: Option<Superblock> = None;
    let mut faults: Vec<(u64, String)> = Vec::new();
    for offset in Layout::SUPERBLOCKS {
        if offset + PAGE_BYTES as u64 > size {
            continue;
        }
        let decoded = match lanes.read_bytes(leaf, offset, PAGE_BYTES).await {
            Ok(page) => Superblock::decode(page.bytes(0, PAGE_BYTES)).map_err(|error| error.0),
            Err(status) => Err(format!("it cannot be read: {}", status.name())),
        };
        match decoded {
            Ok(Some(found)) if best.as_ref().is_none_or(|best| best.generation < found.generation) => {
                best = Some(found)
            }
            Ok(_) => {}
            Err(what) => faults.push((offset, what)),
        }
    }
    match (best, faults.as_slice()) {
        (best @ Some(_), _) | (best, []) => Ok(best),
        // Both copies, most of the time for one reason.
        (None, [(first, what), (second, other)]) if what == other => {
            Err(PoolError::Failed(format!("{}: superblock at {first} and at {second}: {what}", leaf.name())))
        }
        (None, faults) => {
            let faults: Vec<String> =
                faults.iter().map(|(offset, what)| format!("superblock at {offset}: {what}")).collect();
            Err(PoolError::Failed(format!("{}: {}", leaf.name(), faults.join("; "))))
        }
    }
}

/// The set that members from `first` on make.
pub(crate) fn new_set(
    book: &Superblock,
    first: usize,
    count: usize,
) -> Result<(Arc<Set>, SetRecord), String> {
    let set = Set::new(SetConfig {
        level: book.level,
        first_member: u16::try_from(first).map_err(|_| "too many members".to_owned())?,
        member_bytes: book.members[first..first + count].iter().map(|member| member.data_bytes).collect(),
        strip_bytes: book.strip_bytes,
        extent_bytes: book.extent_bytes,
        region_bytes: book.region_bytes,
        data_offset: book.layout.data_offset(),
        parity_log: (
            book.layout.parity_log_offset(),
            book.layout.parity_log_pages.saturating_sub(HEADER_PAGES),
        ),
    })?;
    let record = SetRecord { members: set.members(), regions: set.regions() };
    Ok((Arc::new(set), record))
}

pub(super) fn array_of(book: &Superblock) -> Result<Array, PoolError> {
    let mut first = 0;
    let mut sets = Vec::new();
    for record in &book.sets {
        let count = usize::from(record.members);
        let (set, again) = new_set(book, first, count)
            .map_err(|what| PoolError::Failed(format!("pool {}: {what}", book.name)))?;
        if again.regions != record.regions {
            return Err(PoolError::Failed(format!(
                "pool {}: its superblock names {} regions where its members have {}",
                book.name, record.regions, again.regions
            )));
        }
        sets.push(set);
        first += count;
    }
    Array::new(sets).map_err(|what| PoolError::Failed(format!("pool {}: {what}", book.name)))
}

pub(super) fn random_uuid(runtime: &Runtime) -> Uuid {
    let mut uuid = [0; 16];
    uuid[..8].copy_from_slice(&runtime.random().to_le_bytes());
    uuid[8..].copy_from_slice(&runtime.random().to_le_bytes());
    uuid
}

pub(super) fn probe(reactor: &ReactorHandle, device: Arc<dyn Device>) -> Ask<Option<Label>> {
    Ask::of(reactor, move |runtime| async move {
        let leaves = leaves_of(vec![device])?;
        let lanes = Lanes::new(&runtime);
        let found = read_superblock(&lanes, &leaves[0]).await;
        lanes.close();
        Ok(found?.map(|book| Label {
            place: book.place(),
            members: u16::try_from(book.members.len()).unwrap_or(u16::MAX),
            in_sync: book.members.iter().map(|member| member.in_sync).collect(),
            generation: book.generation,
            openings: book.openings(),
            uuid: book.this,
            member_uuids: book.members.iter().map(|member| member.uuid).collect(),
            spare_uuids: book.spares.clone(),
            replacement: book.replacement.map(|it| (it.member, it.uuid)),
            opened_by: book.opened_by,
            pool: book.name,
            pool_uuid: book.pool_uuid,
            level: book.level,
        }))
    })
}
