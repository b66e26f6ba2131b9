//! From devices to a pool: new ones, and those that are there.
//!
//! The superblocks say who is a member and who has the data; the one with the highest generation knows best. Then the tables are read from those who
//! have them: the newest root, what it points to, the log behind it, and what the process before us left in the tail.

use super::ask::Ask;
use super::bounce::Bounce;
use super::lanes::{Lanes, Leaf};
use super::owner::{Intents, Log, Member, Options, Owner, Rounds, Turns};
use super::place::Place;
use super::shared::{Shared, View};
use super::{CheckReport, CreateOptions, Label, OpenOptions, Pool, PoolError, PoolView, coverage};
use crate::format::{
    self, Layout, MemberRecord, PAGE_BYTES, Record, Root, SetRecord, Superblock, Uuid, unit_bytes_for,
};
use crate::raid::{Array, Level, Mode, Set, SetConfig};
use crate::thin::{Loader, Metadata, Thin};
use hawser_block::{Device, Status};
use hawser_runtime::{ReactorHandle, Runtime};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

/// What is read of a log at a time.
const LOG_READ_BYTES: u64 = 4 << 20;
/// Pages that are read at a time.
const PAGES_AT_A_TIME: usize = 64;

fn wrong(what: String) -> PoolError {
    PoolError::Wrong(what)
}

fn failed(leaf: &Leaf, what: &str, status: Status) -> PoolError {
    PoolError::Failed(format!("{}: {what}: {}", leaf.name(), status.name()))
}

fn leaves_of(devices: Vec<Arc<dyn Device>>) -> Result<Vec<Leaf>, PoolError> {
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
    let (mut best, mut fault): (Option<Superblock>, Option<PoolError>) = (None, None);
    for offset in Layout::SUPERBLOCKS {
        if offset + PAGE_BYTES as u64 > size {
            continue;
        }
        let decoded = match lanes.read_bytes(leaf, offset, PAGE_BYTES).await {
            Ok(page) => Superblock::decode(page.bytes(0, PAGE_BYTES)).map_err(|error| {
                PoolError::Failed(format!("{}: superblock at {offset}: {}", leaf.name(), error.0))
            }),
            Err(status) => Err(failed(leaf, "its superblock cannot be read", status)),
        };
        match decoded {
            Ok(Some(found)) if best.as_ref().is_none_or(|best| best.generation < found.generation) => {
                best = Some(found)
            }
            Ok(_) => {}
            Err(error) => fault = Some(error),
        }
    }
    match (best, fault) {
        (None, Some(fault)) => Err(fault),
        (best, _) => Ok(best),
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
    })?;
    let record = SetRecord { members: set.members(), regions: set.regions() };
    Ok((Arc::new(set), record))
}

fn array_of(book: &Superblock) -> Result<Array, PoolError> {
    let mut first = 0;
    let mut sets = Vec::new();
    for record in &book.sets {
        let count = usize::from(record.members);
        let (set, _) = new_set(book, first, count)
            .map_err(|what| PoolError::Failed(format!("pool {}: {what}", book.name)))?;
        sets.push(set);
        first += count;
    }
    Array::new(sets).map_err(|what| PoolError::Failed(format!("pool {}: {what}", book.name)))
}

pub(super) fn create(
    reactor: &ReactorHandle,
    devices: Vec<Arc<dyn Device>>,
    options: CreateOptions,
) -> Ask<()> {
    Ask::of(reactor, move |runtime| async move {
        let lanes = Lanes::new(&runtime);
        let made = make(&runtime, &lanes, devices, options).await;
        lanes.close();
        made
    })
}

async fn make(
    runtime: &Runtime,
    lanes: &Rc<Lanes>,
    devices: Vec<Arc<dyn Device>>,
    options: CreateOptions,
) -> Result<(), PoolError> {
    let leaves = leaves_of(devices)?;
    let (book, spares) = plan_pool(runtime, &leaves, &options)?;
    for leaf in &leaves {
        match read_superblock(lanes, leaf).await {
            Ok(None) => {}
            _ if options.force => {}
            Ok(Some(label)) => {
                return Err(PoolError::Conflict(format!(
                    "{} belongs to pool {}, want another device, or --force",
                    leaf.name(),
                    label.name
                )));
            }
            Err(error) => return Err(error),
        }
    }
    let array = array_of(&book)?;
    if array.extents() == 0 {
        return Err(wrong(format!("pool {}: its members are too small for one extent", book.name)));
    }
    let thin =
        Thin { extents: array.extents(), extent_bytes: book.extent_bytes, unit_bytes: book.unit_bytes };
    let count = usize::from(book.metadata_members());
    let (members, rest) = leaves.split_at(leaves.len() - spares.len());
    for leaf in &members[..count] {
        write_empty_tables(lanes, leaf, &book, thin)
            .await
            .map_err(|status| failed(leaf, "cannot be written", status))?;
    }
    // Last: what has no superblock is no pool.
    let named = members
        .iter()
        .zip(book.members.iter().map(|member| member.uuid))
        .chain(rest.iter().zip(spares.iter().copied()));
    for (leaf, uuid) in named {
        let own = Superblock { this: uuid, ..book.clone() };
        let bounce = Rc::new(Bounce::holding(&own.encode()));
        for offset in Layout::SUPERBLOCKS {
            let written = lanes.write(leaf, offset, &bounce, 0, PAGE_BYTES, true).await;
            written.map_err(|status| failed(leaf, "cannot be written", status))?;
        }
        lanes.flush(leaf).await.map_err(|status| failed(leaf, "cannot be flushed", status))?;
    }
    Ok(())
}

fn random_uuid(runtime: &Runtime) -> Uuid {
    let mut uuid = [0; 16];
    uuid[..8].copy_from_slice(&runtime.random().to_le_bytes());
    uuid[8..].copy_from_slice(&runtime.random().to_le_bytes());
    uuid
}

/// The superblock of a new pool, and the UUIDs of its spares.
fn plan_pool(
    runtime: &Runtime,
    leaves: &[Leaf],
    options: &CreateOptions,
) -> Result<(Superblock, Vec<Uuid>), PoolError> {
    let CreateOptions { name, level, strip_bytes, .. } = options;
    if !format::is_name(name) {
        return Err(wrong(format!(
            "{name:?} is no name for a pool, want letters, digits, '-', '_', '.', at most {}",
            format::NAME_BYTES_MAX
        )));
    }
    let count = leaves.len().saturating_sub(options.spares);
    let (least, most) = (usize::from(level.members_min()), usize::from(level.members_max()));
    if !(least..=most).contains(&count) {
        return Err(wrong(format!("{} has {least} to {most} members, and {count} are given", level.name())));
    }
    if !level.is_supported() {
        return Err(wrong(format!("{} is not supported by this version", level.name())));
    }
    if !strip_bytes.is_power_of_two() || !(4096..=1 << 20).contains(strip_bytes) {
        return Err(wrong(format!(
            "a strip of {strip_bytes} bytes cannot be, want a power of two from 4KiB to 1MiB"
        )));
    }
    let geometries: Vec<_> = leaves.iter().filter_map(|leaf| leaf.device.geometry()).collect();
    let block_bytes = geometries[0].block_size.bytes();
    for (leaf, geometry) in leaves.iter().zip(&geometries) {
        if geometry.block_size.bytes() != block_bytes {
            return Err(wrong(format!(
                "{} has blocks of {} bytes and {} of {block_bytes}, want members of one block size",
                leaf.name(),
                geometry.block_size.bytes(),
                leaves[0].name()
            )));
        }
        if geometry.read_only {
            return Err(wrong(format!("{} is read-only, want a device that can be written", leaf.name())));
        }
    }
    if !(512..=4096).contains(&block_bytes) {
        return Err(wrong(format!("blocks of {block_bytes} bytes are not for pools, want 512 to 4096")));
    }
    let data_strips = match level {
        Level::Linear | Level::Raid1 => 1,
        Level::Raid0 => count,
        Level::Raid10 if count.is_multiple_of(2) => count / 2,
        Level::Raid10 => 1,
        Level::Raid5 => count - 1,
        Level::Raid6 => count - 2,
    };
    let stripe = data_strips as u64 * u64::from(*strip_bytes);
    let extent_bytes = options.extent_bytes.max(1).div_ceil(stripe) * stripe;
    if options.extent_bytes > 64 << 20 || extent_bytes > format::superblock::EXTENT_BYTES_MAX {
        return Err(wrong(format!(
            "an extent of {} bytes cannot be, want at most 64MiB",
            options.extent_bytes
        )));
    }
    let sizes: Vec<u64> = geometries[..count].iter().map(|geometry| geometry.size_bytes()).collect();
    let smallest = sizes.iter().copied().min().unwrap_or(0);
    let total: u64 = match level {
        Level::Linear => sizes.iter().sum(),
        _ => smallest * data_strips as u64,
    };
    let layout = layout_of(options, total / extent_bytes, smallest);
    let data_offset = layout.data_offset();
    for (leaf, geometry) in leaves.iter().zip(&geometries) {
        if geometry.size_bytes() < data_offset + extent_bytes.max(options.region_bytes.min(1 << 20)) {
            return Err(wrong(format!(
                "{} has {} bytes, want at least {}",
                leaf.name(),
                geometry.size_bytes(),
                data_offset + extent_bytes
            )));
        }
    }
    let data_bytes = |size: u64| (size - data_offset) / u64::from(block_bytes) * u64::from(block_bytes);
    let members: Vec<MemberRecord> = sizes
        .iter()
        .map(|size| MemberRecord { uuid: random_uuid(runtime), in_sync: true, data_bytes: data_bytes(*size) })
        .collect();
    let spares: Vec<Uuid> = (0..options.spares).map(|_| random_uuid(runtime)).collect();
    let mut book = Superblock {
        pool_uuid: options.uuid,
        name: name.clone(),
        level: *level,
        block_bytes,
        strip_bytes: *strip_bytes,
        extent_bytes,
        unit_bytes: unit_bytes_for(extent_bytes),
        region_bytes: options.region_bytes,
        layout,
        generation: 1,
        epoch: 0,
        opened_by: None,
        sets: Vec::new(),
        this: members[0].uuid,
        members,
        spares: spares.clone(),
    };
    let (_, record) = new_set(&book, 0, count).map_err(|what| wrong(format!("pool {name}: {what}")))?;
    book.sets.push(record);
    book.validate().map_err(|error| wrong(format!("pool {name}: {}", error.0)))?;
    Ok((book, spares))
}

/// Room for what a pool of so many extents needs, and for eight times as many regions, so that it can grow.
fn layout_of(options: &CreateOptions, extents: u64, member_bytes: u64) -> Layout {
    let regions = member_bytes.div_ceil(options.region_bytes.max(1));
    let intent_pages = (regions * 8).div_ceil(u64::from(format::INTENTS_PER_PAGE)).max(1);
    // All mapped twice over (snapshots), each page there twice (the last checkpoint and the next), and room to grow.
    let mapped_bytes = extents / format::CHUNK_ENTRIES as u64 * 4096 * 8;
    let metadata_bytes = options.metadata_bytes.unwrap_or_else(|| (8 << 20) + mapped_bytes).max(64 << 10);
    let narrow = |value: u64| u32::try_from(value).unwrap_or(u32::MAX - 1);
    Layout {
        intent_pages: narrow(intent_pages),
        log_bytes: options.log_bytes.div_ceil(4096) * 4096,
        metadata_pages: narrow(metadata_bytes / 4096),
    }
}

async fn write_empty_tables(
    lanes: &Rc<Lanes>,
    leaf: &Leaf,
    book: &Superblock,
    thin: Thin,
) -> Result<(), Status> {
    let layout = book.layout;
    for page in 0..layout.intent_pages {
        let bytes = format::encode_intents(&book.pool_uuid, page, &[0; 504]);
        let bounce = Rc::new(Bounce::holding(&bytes));
        let offset = layout.intents_offset() + u64::from(page) * PAGE_BYTES as u64;
        lanes.write(leaf, offset, &bounce, 0, PAGE_BYTES, false).await?;
    }
    let mut meta = Metadata::new(thin, layout.metadata_pages);
    meta.begin_checkpoint(true);
    loop {
        let pages = meta.checkpoint_step(PAGES_AT_A_TIME).map_err(|_| Status::NoSpace)?;
        if pages.is_empty() {
            break;
        }
        for (page, bytes) in pages {
            let bounce = Rc::new(Bounce::holding(&bytes));
            lanes.write(leaf, layout.page_offset(page), &bounce, 0, PAGE_BYTES, false).await?;
        }
    }
    let root = meta.checkpoint_root(book.pool_uuid, 0, 0, 0);
    let slot = u32::from(root.number % 2 == 1);
    for page in [0, 1] {
        let bytes = if page == slot { root.encode() } else { vec![0; PAGE_BYTES] };
        let bounce = Rc::new(Bounce::holding(&bytes));
        lanes.write(leaf, layout.page_offset(page), &bounce, 0, PAGE_BYTES, true).await?;
    }
    lanes.flush(leaf).await
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
            opened_by: book.opened_by,
            pool: book.name,
            pool_uuid: book.pool_uuid,
            level: book.level,
        }))
    })
}

/// The members that are there, and what they say.
struct Found {
    book: Superblock,
    array: Array,
    /// By the member's number: its device, and what it says.
    members: Vec<Option<(Leaf, Superblock)>>,
    spares: Vec<(Uuid, Option<Leaf>)>,
}

impl Found {
    /// Finds out who has the data. Marks them in sync in the array.
    async fn read(lanes: &Rc<Lanes>, devices: Vec<Arc<dyn Device>>) -> Result<Found, PoolError> {
        let mut labels: Vec<(Leaf, Superblock)> = Vec::new();
        for leaf in leaves_of(devices)? {
            match read_superblock(lanes, &leaf).await {
                Ok(Some(label)) => labels.push((leaf, label)),
                Ok(None) => return Err(PoolError::Unknown(format!("{} belongs to no pool", leaf.name()))),
                Err(error) => return Err(error),
            }
        }
        let knows_best = |(_, label): &&(Leaf, Superblock)| {
            (label.generation, label.epoch, label.members.iter().filter(|member| !member.in_sync).count())
        };
        let Some((best_leaf, book)) = labels.iter().max_by_key(knows_best).cloned() else {
            return Err(wrong("no device is given".to_owned()));
        };
        let array = array_of(&book)?;
        let mut members: Vec<Option<(Leaf, Superblock)>> = vec![None; book.members.len()];
        let mut spares: Vec<(Uuid, Option<Leaf>)> = book.spares.iter().map(|uuid| (*uuid, None)).collect();
        for (leaf, label) in labels {
            if label.pool_uuid != book.pool_uuid {
                return Err(PoolError::Conflict(format!(
                    "{} belongs to pool {} and {} to pool {}",
                    leaf.name(),
                    label.name,
                    best_leaf.name(),
                    book.name
                )));
            }
            if let Some(spare) = spares.iter_mut().find(|(uuid, _)| *uuid == label.this) {
                spare.1 = Some(leaf);
                continue;
            }
            match book.members.iter().position(|member| member.uuid == label.this) {
                None => {
                    log::warn!("{} was a member of pool {} and has been replaced", leaf.name(), book.name)
                }
                Some(number) => {
                    if let Some((other, _)) = &members[number] {
                        return Err(PoolError::Conflict(format!(
                            "{} and {} both say that they are member {number} of pool {}",
                            other.name(),
                            leaf.name(),
                            book.name
                        )));
                    }
                    members[number] = Some((leaf, label));
                }
            }
        }
        let found = Found { book, array, members, spares };
        found.check_no_rivals()?;
        Ok(found)
    }

    /// Members that each went on without the other.
    fn check_no_rivals(&self) -> Result<(), PoolError> {
        for (one, place) in self.members.iter().enumerate() {
            for (other, rival) in self.members.iter().enumerate().skip(one + 1) {
                let (Some((leaf, label)), Some((rival_leaf, rival_label))) = (place, rival) else { continue };
                let calls_stale = |label: &Superblock, member: usize| {
                    label.members.get(member).is_some_and(|record| !record.in_sync)
                };
                if calls_stale(label, other)
                    && calls_stale(rival_label, one)
                    && !calls_stale(label, one)
                    && !calls_stale(rival_label, other)
                {
                    return Err(PoolError::Conflict(format!(
                        "{} and {} were each used without the other, so they differ: pool {} opens with one of them; the other \
                         can be put in as a replacement",
                        leaf.name(),
                        rival_leaf.name(),
                        self.book.name
                    )));
                }
            }
        }
        Ok(())
    }

    fn is_in_sync(&self, number: usize) -> bool {
        self.book.members[number].in_sync && self.members[number].is_some()
    }

    /// Sets who is in sync; says who should be there and is not.
    fn set_modes(&self, degraded: bool) -> Result<(), PoolError> {
        let name = &self.book.name;
        let mut missing = Vec::new();
        for (number, record) in self.book.members.iter().enumerate() {
            let (set, index) = self
                .array
                .set_of_member(u16::try_from(number).unwrap_or(0))
                .expect("every member is in a set");
            match self.is_in_sync(number) {
                true => self.array.set(set).set_mode(index, Mode::InSync),
                false if record.in_sync => missing.push(number),
                false => {}
            }
        }
        for set in self.array.sets() {
            let has_all = (0..set.members())
                .all(|member| set.mode(member) == Mode::InSync || super::owner::survives(set, 1 << member));
            if !has_all {
                let lacking: Vec<String> = (0..set.members())
                    .filter(|member| set.mode(*member) != Mode::InSync)
                    .map(|member| (set.first_member() + member).to_string())
                    .collect();
                return Err(PoolError::Conflict(format!(
                    "pool {name} lacks data without its members {}",
                    lacking.join(", ")
                )));
            }
        }
        if !missing.is_empty() && !degraded {
            let missing: Vec<String> = missing.iter().map(usize::to_string).collect();
            return Err(PoolError::Conflict(format!(
                "pool {name} is not complete: members {} are missing",
                missing.join(", ")
            )));
        }
        Ok(())
    }

    /// Those who have the tables.
    fn with_tables(&self) -> Vec<Leaf> {
        let count = usize::from(self.book.metadata_members());
        let numbers = (0..count).filter(|number| self.is_in_sync(*number));
        numbers.filter_map(|number| Some(self.members[number].as_ref()?.0.clone())).collect()
    }
}

/// The tables as the members have them.
struct Tables {
    meta: Metadata,
    /// The next record's number.
    seq: u64,
    log: Log,
    pages_read: u64,
    replayed: u64,
}

fn corrupt(book: &Superblock, what: &str) -> PoolError {
    PoolError::Failed(format!("pool {}: {what}", book.name))
}

async fn read_tables(lanes: &Rc<Lanes>, found: &Found) -> Result<Tables, PoolError> {
    let book = &found.book;
    let from = found.with_tables();
    let layout = book.layout;
    let mut root: Option<Root> = None;
    for leaf in &from {
        for slot in [0, 1] {
            if let Ok(page) = lanes.read_bytes(leaf, layout.page_offset(slot), PAGE_BYTES).await
                && let Some(other) = Root::decode(page.bytes(0, PAGE_BYTES), &book.pool_uuid)
                && root.as_ref().is_none_or(|root| root.number < other.number)
            {
                root = Some(other);
            }
        }
    }
    let root = root.ok_or_else(|| corrupt(book, "no member has a root of the tables that is whole"))?;
    let thin =
        Thin { extents: found.array.extents(), extent_bytes: book.extent_bytes, unit_bytes: book.unit_bytes };
    if root.extents > thin.extents {
        return Err(corrupt(book, "its tables name more extents than its members have"));
    }
    let mut loader = Loader::new(thin, layout.metadata_pages, &root);
    let mut pages_read = 0;
    loop {
        let wanted = loader.wanted(PAGES_AT_A_TIME);
        if wanted.is_empty() {
            break;
        }
        let reads = wanted.iter().map(|page| async move {
            match from_first(lanes, &from_leaves(found), layout.page_offset(*page)).await {
                Some(bytes) => (*page, Some(bytes)),
                None => (*page, None),
            }
        });
        for (page, bytes) in super::wait::all(reads).await {
            pages_read += 1;
            let first =
                bytes.ok_or_else(|| corrupt(book, &format!("page {page} of its tables cannot be read")))?;
            let Err(mut what) = loader.give(page, first.bytes(0, PAGE_BYTES)) else { continue };
            let mut is_good = false;
            for leaf in &from {
                if let Ok(bytes) = lanes.read_bytes(leaf, layout.page_offset(page), PAGE_BYTES).await {
                    match loader.give(page, bytes.bytes(0, PAGE_BYTES)) {
                        Ok(()) => {
                            is_good = true;
                            break;
                        }
                        Err(other) => what = other,
                    }
                }
            }
            if !is_good {
                return Err(corrupt(book, &what));
            }
        }
    }
    let mut meta = loader.finish().map_err(|what| corrupt(book, &what))?;
    let (seq, log, replayed) = replay(lanes, found, &from, &root, &mut meta).await?;
    Ok(Tables { meta, seq, log, pages_read, replayed })
}

fn from_leaves(found: &Found) -> Vec<Leaf> {
    found.with_tables()
}

async fn from_first(lanes: &Rc<Lanes>, from: &[Leaf], offset: u64) -> Option<Rc<Bounce>> {
    for leaf in from {
        if let Ok(bytes) = lanes.read_bytes(leaf, offset, PAGE_BYTES).await {
            return Some(bytes);
        }
    }
    None
}

async fn read_log(lanes: &Rc<Lanes>, leaf: &Leaf, layout: Layout) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut at = 0;
    while at < layout.log_bytes {
        let len = LOG_READ_BYTES.min(layout.log_bytes - at);
        let size = usize::try_from(len).ok()?;
        let part = lanes.read_bytes(leaf, layout.log_offset() + at, size).await.ok()?;
        bytes.extend_from_slice(part.bytes(0, size));
        at += len;
    }
    Some(bytes)
}

/// Applies the log behind a root: from whoever has the next batch whole.
async fn replay(
    lanes: &Rc<Lanes>,
    found: &Found,
    from: &[Leaf],
    root: &Root,
    meta: &mut Metadata,
) -> Result<(u64, Log, u64), PoolError> {
    let (book, layout) = (&found.book, found.book.layout);
    let mut logs = Vec::new();
    for leaf in from {
        logs.extend(read_log(lanes, leaf, layout).await);
    }
    if logs.is_empty() {
        return Err(corrupt(book, "no member's log can be read"));
    }
    let mut log = Log { position: root.log_position, batch: root.log_batch, head: 0, tail: 0 };
    let (mut seq, mut replayed) = (root.record_seq, 0);
    loop {
        let places = [log.position, 0];
        let next = places.iter().find_map(|place| {
            let at = usize::try_from(*place).ok()?;
            logs.iter().find_map(|bytes| {
                Some((*place, format::decode_batch(bytes.get(at..)?, &book.pool_uuid, log.batch)?))
            })
        });
        let Some((place, batch)) = next else { break };
        let batch = batch.map_err(|error| corrupt(book, &format!("its log at {place}: {}", error.0)))?;
        for (number, record) in (batch.first_seq..).zip(&batch.records) {
            if number > seq {
                return Err(corrupt(book, &format!("its log at {place} lacks records before {number}")));
            }
            if number == seq {
                meta.apply(record).map_err(|what| corrupt(book, &format!("its log at {place}: {what}")))?;
                meta.settle();
                seq += 1;
                replayed += 1;
            }
        }
        if place != log.position {
            log.head += layout.log_bytes - log.position;
        }
        log.head += batch.len_bytes;
        log.position = place + batch.len_bytes;
        log.batch += 1;
    }
    if replayed > 0 {
        coverage::count(coverage::Event::LogReplayed);
    }
    Ok((seq, log, replayed))
}

/// The marks of regions, from all who have them: marked is what anybody says is.
async fn read_intents(lanes: &Rc<Lanes>, found: &Found) -> Vec<Option<Vec<u64>>> {
    let layout = found.book.layout;
    let from = found.with_tables();
    let mut pages = Vec::new();
    for page in 0..layout.intent_pages {
        let offset = layout.intents_offset() + u64::from(page) * PAGE_BYTES as u64;
        let mut all = Some(vec![0u64; 504]);
        for leaf in &from {
            let words = match lanes.read_bytes(leaf, offset, PAGE_BYTES).await {
                Ok(bytes) => format::decode_intents(bytes.bytes(0, PAGE_BYTES), &found.book.pool_uuid, page),
                Err(_) => None,
            };
            all = all
                .zip(words)
                .map(|(all, words)| all.iter().zip(&words).map(|(one, other)| one | other).collect());
        }
        pages.push(all);
    }
    pages
}

pub(super) fn open(owner: &ReactorHandle, devices: Vec<Arc<dyn Device>>, options: OpenOptions) -> Ask<Pool> {
    let handle = owner.clone();
    Ask::of(owner, move |runtime| async move {
        let lanes = Lanes::new(&runtime);
        match start(&runtime, handle, &lanes, devices, options).await {
            Ok(pool) => Ok(pool),
            Err(error) => {
                lanes.close();
                Err(error)
            }
        }
    })
}

async fn start(
    runtime: &Runtime,
    handle: ReactorHandle,
    lanes: &Rc<Lanes>,
    devices: Vec<Arc<dyn Device>>,
    mut options: OpenOptions,
) -> Result<Pool, PoolError> {
    let found = Found::read(lanes, devices).await?;
    found.set_modes(options.degraded || options.read_only)?;
    let was_closed = found.book.opened_by.is_none();
    if let Some(other) = found.book.opened_by
        && other != options.host
        && !options.assume_exclusive
        && !options.read_only
    {
        return Err(PoolError::Conflict(format!(
            "pool {} is open on host {}, or was not closed there: want it closed, or --assume-exclusive when that host is dead",
            found.book.name,
            uuid_text(&other)
        )));
    }
    // Before anything is changed: whether it can be opened at all.
    let mut tables = Some(read_tables(lanes, &found).await?);
    let entries = tail_entries(&found.book, &options);
    let book = next_book(&found.book, &options);
    let now = runtime.now();
    let members: Vec<Member> = book
        .members
        .iter()
        .zip(&found.members)
        .map(|(record, place)| {
            let leaf = place.as_ref().map(|(leaf, _)| leaf.clone());
            let is_recorded = record.in_sync && leaf.is_some();
            let mut member = Member::new(record.uuid, leaf, is_recorded, now);
            if !is_recorded {
                member.why = if place.is_some() { "was away" } else { "is missing" }.to_owned();
            }
            member
        })
        .collect();
    let leaves: Vec<Option<Leaf>> = members.iter().map(|member| member.leaf.clone()).collect();
    let shared = Shared::new(
        PoolView::empty(&book),
        handle,
        View {
            is_redundant: book.level.is_redundant(),
            data_offset: book.layout.data_offset(),
            block_shift: book.block_bytes.trailing_zeros(),
            table: tables.as_ref().expect("read just now").meta.table(),
            thin: Thin {
                extents: found.array.extents(),
                extent_bytes: book.extent_bytes,
                unit_bytes: book.unit_bytes,
            },
            array: found.array.clone(),
            leaves,
        },
    );
    let is_read_only = options.read_only;
    let nothing = Thin { extents: 1, extent_bytes: book.extent_bytes, unit_bytes: book.unit_bytes };
    let owner = Rc::new(Owner {
        runtime: runtime.clone(),
        place: Place::of(runtime, &shared),
        shared,
        lanes: Rc::clone(lanes),
        meta: RefCell::new(Metadata::new(nothing, book.layout.metadata_pages)),
        book: RefCell::new(book),
        members: RefCell::new(members),
        spares: RefCell::new(found.spares.clone()),
        options: Options::of(&options),
        tail: RefCell::new(std::mem::replace(&mut options.tail, Box::new(super::MemoryTail::default()))),
        tail_used: Cell::new(0),
        seq: Cell::new(0),
        durable: Cell::new(0),
        pending: RefCell::new(VecDeque::new()),
        log: Cell::new(Log::default()),
        intents: RefCell::new(Intents::default()),
        turns: Turns::default(),
        rounds: Rounds::default(),
        freed: RefCell::default(),
        locks: super::owner::Locks::default(),
        frozen: RefCell::default(),
        bell: super::wait::Bell::default(),
        space: super::wait::Bell::default(),
        work: super::owner::Work::default(),
        lost: RefCell::new(None),
        is_open: Cell::new(false),
        is_closing: Cell::new(false),
        is_read_only,
    });
    if !is_read_only {
        // The tail is ready for us before anybody may take it for another's.
        keep_tail(&owner, &entries);
        {
            let _turn = owner.turns.superblock.take().await;
            let (_, failed) = owner.write_superblocks().await;
            if !failed.is_empty() {
                let names: Vec<String> = failed.iter().map(|member| owner.device_name(*member)).collect();
                return Err(PoolError::Failed(format!(
                    "pool {}: superblocks of {} cannot be written",
                    owner.shared.name,
                    names.join(", ")
                )));
            }
        }
        owner.is_open.set(true);
        if !was_closed {
            // Writes of the process before us are over only now.
            drop(tables.take());
            tables = Some(read_tables(lanes, &found).await?);
        }
    }
    let tables = tables.expect("read just now");
    let pages = read_intents(lanes, &found).await;
    owner.take_over(tables.meta, tables.seq, tables.log);
    owner.begin_intents(pages, was_closed);
    let replayed = replay_tail(&owner, tables.seq, entries);
    if !is_read_only {
        owner.begin_tail();
    }
    owner.register();
    owner.show_volumes();
    if !is_read_only {
        let ready = async {
            owner.checkpoint(false).await?;
            owner.rewrite_intents().await
        };
        if let Err(status) = ready.await {
            owner.unregister();
            return Err(owner.failed("cannot be opened", status));
        }
        owner.shared.is_writable.store(true, std::sync::atomic::Ordering::Release);
        owner.use_all_extents().await?;
        for member in 0..owner.members.borrow().len() {
            owner.watch(u16::try_from(member).unwrap_or(0));
        }
        runtime.spawn(Rc::clone(&owner).tick());
        runtime.spawn(Rc::clone(&owner).resync());
    }
    owner.publish();
    log::info!(
        "pool {}: open, {} records of its log and {replayed} of its last process were done again",
        owner.shared.name,
        tables.replayed
    );
    Ok(Pool::of(Arc::clone(&owner.shared)))
}

/// What the process before us acknowledged and may not have made durable; of this pool, this host, and its last opening.
fn tail_entries(book: &Superblock, options: &OpenOptions) -> Vec<(u64, Record)> {
    let content = options.tail.content();
    if book.opened_by == Some(options.host) {
        let entries = format::decode_tail(&content, &book.pool_uuid, book.epoch);
        if !entries.is_empty() {
            return entries;
        }
    }
    // A process that died while it opened the pool.
    format::decode_tail(&content, &book.pool_uuid, book.epoch + 1)
}

/// What the superblocks say while we have it open.
fn next_book(book: &Superblock, options: &OpenOptions) -> Superblock {
    let mut next = book.clone();
    if !options.read_only {
        next.epoch += 1;
        next.opened_by = Some(options.host);
    }
    next
}

fn keep_tail(owner: &Rc<Owner>, entries: &[(u64, Record)]) {
    let mut content = format::encode_tail_header(&owner.shared.uuid, owner.book.borrow().epoch);
    for (seq, record) in entries {
        format::encode_tail_entry(*seq, record, &mut content);
    }
    owner.tail.borrow_mut().replace(&content);
}

/// Applies what the members' log does not have.
fn replay_tail(owner: &Rc<Owner>, seq: u64, entries: Vec<(u64, Record)>) -> u64 {
    let mut next = seq;
    for (number, record) in entries {
        if number < next {
            continue;
        }
        if number > next {
            log::error!(
                "pool {}: what its last process left lacks records before {number}",
                owner.shared.name
            );
            break;
        }
        if let Err(what) = owner.replay_one(number, &record) {
            log::error!("pool {}: what its last process left cannot be done: {what}", owner.shared.name);
            break;
        }
        next += 1;
    }
    if next > seq {
        coverage::count(coverage::Event::TailReplayed);
    }
    next - seq
}

impl Owner {
    fn take_over(&self, meta: Metadata, seq: u64, log: Log) {
        let view = self.view();
        let table = meta.table();
        *self.meta.borrow_mut() = meta;
        self.seq.set(seq);
        self.durable.set(seq);
        self.log.set(log);
        let leaves = view.leaves.clone();
        self.shared.set_view(View { array: view.array.clone(), table, leaves, ..*view });
    }

    fn replay_one(&self, seq: u64, record: &Record) -> Result<(), String> {
        self.meta.borrow_mut().apply(record)?;
        let (mut bytes, mut entry) = (Vec::new(), Vec::new());
        record.encode(&mut bytes);
        format::encode_tail_entry(seq, record, &mut entry);
        self.seq.set(seq + 1);
        self.pending.borrow_mut().push_back(super::owner::Pending { seq, record: bytes, entry });
        self.take_freed();
        Ok(())
    }

    /// Takes the marks over. After a death, what is marked may differ.
    fn begin_intents(&self, pages: Vec<Option<Vec<u64>>>, was_closed: bool) {
        *self.intents.borrow_mut() = Intents::new(pages);
        let sets = self.view().array.sets().to_vec();
        for (index, set) in sets.iter().enumerate().filter(|(_, set)| set.level().is_redundant()) {
            let first = self.first_region(index);
            for region in (0..set.regions()).filter(|region| self.intents.borrow().is_durable(first + region))
            {
                set.intents.set(region);
                if !was_closed {
                    set.unsynced.set(region);
                }
            }
        }
    }

    /// Makes everything durable and lets go. Nobody uses a volume any more.
    pub(crate) async fn close(self: Rc<Self>) -> Result<(), PoolError> {
        if self.is_closing.get() {
            return Err(PoolError::Conflict(format!("pool {} is being closed", self.shared.name)));
        }
        let _turn = self.turns.change.take().await;
        if !self.is_read_only && self.lost.borrow().is_none() {
            let closed = async {
                self.flush().await?;
                self.clear_idle_intents(true).await?;
                self.checkpoint(false).await
            };
            closed.await.map_err(|status| self.failed("cannot be closed", status))?;
        }
        self.shared.is_writable.store(false, std::sync::atomic::Ordering::Release);
        self.is_closing.set(true);
        self.bell.ring();
        self.space.ring();
        if !self.is_read_only && self.lost.borrow().is_none() {
            // Writes that came after the checkpoint are in the log.
            let closed = async {
                self.flush().await?;
                let _turn = self.turns.superblock.take().await;
                let is_same = self.view().array.sets().iter().all(|set| !set.unsynced.any());
                if is_same {
                    self.book.borrow_mut().opened_by = None;
                }
                self.record_members().await
            };
            closed.await.map_err(|status| self.failed("cannot be closed", status))?;
            self.begin_tail();
        }
        // Tasks that sleep still name it.
        self.unregister();
        Ok(())
    }
}

pub(super) fn check(reactor: &ReactorHandle, devices: Vec<Arc<dyn Device>>) -> Ask<CheckReport> {
    Ask::of(reactor, move |runtime| async move {
        let lanes = Lanes::new(&runtime);
        let report = look(&lanes, devices).await;
        lanes.close();
        report
    })
}

async fn look(lanes: &Rc<Lanes>, devices: Vec<Arc<dyn Device>>) -> Result<CheckReport, PoolError> {
    let mut report = CheckReport::default();
    let leaves = leaves_of(devices.clone())?;
    for leaf in &leaves {
        for offset in Layout::SUPERBLOCKS {
            match lanes.read_bytes(leaf, offset, PAGE_BYTES).await {
                Err(status) => {
                    report.faults.push(format!("{}: superblock at {offset}: {}", leaf.name(), status.name()))
                }
                Ok(page) => match Superblock::decode(page.bytes(0, PAGE_BYTES)) {
                    Ok(Some(_)) => {}
                    Ok(None) => report.faults.push(format!("{}: no superblock at {offset}", leaf.name())),
                    Err(error) => {
                        report.faults.push(format!("{}: superblock at {offset}: {}", leaf.name(), error.0))
                    }
                },
            }
        }
    }
    let found = Found::read(lanes, devices).await?;
    found.set_modes(true)?;
    for (number, record) in found.book.members.iter().enumerate() {
        match &found.members[number] {
            None => report.faults.push(format!("member {number} is missing")),
            Some((leaf, _)) if !record.in_sync => {
                report.faults.push(format!("member {number} ({}) is stale", leaf.name()))
            }
            Some(_) => {}
        }
    }
    let mut best: BTreeMap<&'static str, u64> = BTreeMap::new();
    // Each by itself: a fault of one may be hidden by another.
    for (number, leaf) in found.with_tables().iter().enumerate() {
        let mut alone = Found {
            book: found.book.clone(),
            array: found.array.clone(),
            members: vec![None; found.members.len()],
            spares: Vec::new(),
        };
        let place =
            found.members.iter().position(|other| other.as_ref().is_some_and(|(other, _)| other.same(leaf)));
        let Some(place) = place else { continue };
        alone.members[place].clone_from(&found.members[place]);
        match read_tables(lanes, &alone).await {
            Err(PoolError::Failed(what)) => report.faults.push(format!("{}: {what}", leaf.name())),
            Err(error) => return Err(error),
            Ok(tables) => {
                report.faults.extend(
                    tables.meta.verify().into_iter().map(|fault| format!("{}: {fault}", leaf.name())),
                );
                if number == 0 {
                    best.insert("pages of tables", tables.pages_read);
                    best.insert("records of the log", tables.replayed);
                    best.insert("volumes", tables.meta.volumes().count() as u64);
                    let mapped = tables.meta.volumes().map(|(_, volume)| volume.mapped_extents()).sum();
                    best.insert("mapped extents", mapped);
                    best.insert("free extents", u64::from(tables.meta.free_extents()));
                }
            }
        }
    }
    for (page, words) in read_intents(lanes, &found).await.into_iter().enumerate() {
        match words {
            None => report.faults.push(format!(
                "page {page} of the marks of regions is not whole: all of it counts as marked"
            )),
            Some(words) => {
                *best.entry("marked regions").or_default() +=
                    words.iter().map(|word| u64::from(word.count_ones())).sum::<u64>()
            }
        }
    }
    report.checked = best.into_iter().collect();
    Ok(report)
}

fn uuid_text(uuid: &Uuid) -> String {
    let hex: String = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}
