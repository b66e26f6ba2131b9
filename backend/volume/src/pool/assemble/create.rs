//! A new pool: what it looks like, and the order in which it is written. What has no superblock is no pool, so superblocks come last.

use super::{
    array_of, failed, leaves_of, new_set, random_uuid, read_only_line, read_superblock, spares_line,
    still_gets_writes, wrong,
};
use crate::format::superblock::PARITY_LOG_PAGES_MAX;
use crate::format::{self, Layout, MemberRecord, PAGE_BYTES, ParityHeader, Superblock, Uuid, unit_bytes_for};
use crate::pool::bounce::Bounce;
use crate::pool::lanes::{Lanes, Leaf};
use crate::pool::{Ask, CreateOptions, PoolError};
use crate::raid::Level;
use crate::simulated::is_broken;
use crate::thin::{Metadata, Thin};
use hawser_block::{Device, Status};
use hawser_runtime::{ReactorHandle, Runtime};
use std::rc::Rc;
use std::sync::Arc;

/// Pages that are written at a time.
const PAGES_AT_A_TIME: usize = 64;

pub(in crate::pool) fn create(
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
    if let Some(leaf) = leaves.iter().find(|leaf| leaf.device.has_left_behind()) {
        return Err(still_gets_writes(leaf.name()));
    }
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
    if options.force && !is_broken("old_superblocks_left") {
        // What they belonged to does not take them for whole any more.
        let nothing = Rc::new(Bounce::zeroed(PAGE_BYTES));
        for leaf in &leaves {
            for offset in Layout::SUPERBLOCKS {
                let written = lanes.write(leaf, offset, &nothing, 0, PAGE_BYTES, true).await;
                written.map_err(|status| failed(leaf, "cannot be written", status))?;
            }
        }
    }
    let count = usize::from(book.metadata_members());
    let (members, rest) = leaves.split_at(leaves.len() - spares.len());
    if is_broken("superblocks_before_tables") {
        write_superblocks(lanes, &book, members, (rest, &spares)).await?;
    }
    for leaf in &members[..count] {
        write_empty_tables(lanes, leaf, &book, thin)
            .await
            .map_err(|status| failed(leaf, "cannot be written", status))?;
    }
    for leaf in &members[..members.len() * usize::from(book.level.parities().min(1))] {
        write_empty_parity_log(runtime, lanes, leaf, &book)
            .await
            .map_err(|status| failed(leaf, "cannot be written", status))?;
    }
    // Last: what has no superblock is no pool.
    write_superblocks(lanes, &book, members, (rest, &spares)).await
}

async fn write_superblocks(
    lanes: &Rc<Lanes>,
    book: &Superblock,
    members: &[Leaf],
    (rest, spares): (&[Leaf], &[Uuid]),
) -> Result<(), PoolError> {
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
        let spares = match options.spares {
            0 => String::new(),
            spares => format!(" beside {spares} spares, of {} devices", leaves.len()),
        };
        return Err(wrong(format!(
            "{} has {least} to {most} members, and {count} are given{spares}",
            level.name()
        )));
    }
    if options.spares > 0 && !level.is_redundant() {
        return Err(wrong(spares_line(*level)));
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
            return Err(wrong(read_only_line(leaf.name())));
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
    let extent_bytes = options.extent_bytes.div_ceil(stripe) * stripe;
    if !(4096..=64 << 20).contains(&options.extent_bytes)
        || extent_bytes > format::superblock::EXTENT_BYTES_MAX
    {
        return Err(wrong(format!(
            "an extent of {} bytes cannot be, want 4KiB to 64MiB, which is made whole stripes",
            options.extent_bytes
        )));
    }
    let sizes: Vec<u64> = geometries[..count].iter().map(|geometry| geometry.size_bytes()).collect();
    let smallest = sizes.iter().copied().min().unwrap_or(0);
    let total: u64 = match level {
        Level::Linear => sizes.iter().sum(),
        _ => smallest * data_strips as u64,
    };
    let least = format::parity_log_pages_min(*level, u16::try_from(count).unwrap_or(u16::MAX), *strip_bytes);
    let layout = layout_of(options, (total, extent_bytes), smallest, least);
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
        replacement: None,
        scrub: None,
    };
    let (_, record) = new_set(&book, 0, count).map_err(|what| wrong(format!("pool {name}: {what}")))?;
    book.sets.push(record);
    book.validate().map_err(|error| wrong(format!("pool {name}: {}", error.0)))?;
    Ok((book, spares))
}

/// At most so much room for mappings is added for volumes that are written here and there.
const SPARSE_BYTES_MAX: u64 = 1 << 30;

/// Room for what a pool of so many bytes in extents needs, and for eight times as many regions, so that it can grow.
fn layout_of(
    options: &CreateOptions,
    (data_bytes, extent_bytes): (u64, u64),
    member_bytes: u64,
    parity_log_min: u32,
) -> Layout {
    let regions = member_bytes.div_ceil(options.region_bytes.max(1));
    let intent_pages = (regions * 8).div_ceil(u64::from(format::INTENTS_PER_PAGE)).max(1);
    // All mapped twice over (snapshots), each page there twice (the last checkpoint and the next), and room to grow.
    let mapped_bytes = data_bytes / extent_bytes / format::CHUNK_ENTRIES as u64 * 4096 * 8;
    // A first write far from all others takes a page or two for one extent.
    let sparse_bytes = (data_bytes / 1024).min(SPARSE_BYTES_MAX);
    let by_size = (8 << 20) + mapped_bytes + sparse_bytes;
    let metadata_bytes = options.metadata_bytes.unwrap_or(by_size).max(64 << 10);
    let narrow = |value: u64| u32::try_from(value).unwrap_or(u32::MAX - 1);
    Layout {
        intent_pages: narrow(intent_pages),
        log_bytes: options.log_bytes.div_ceil(4096) * 4096,
        metadata_pages: narrow(metadata_bytes / 4096),
        parity_log_pages: match parity_log_min {
            0 => 0,
            // No more of small members than a sixteenth.
            least => {
                let bytes = options.parity_log_bytes.min(member_bytes / 16);
                narrow(bytes / 4096).clamp(least, PARITY_LOG_PAGES_MAX)
            }
        },
    }
}

/// Whatever stood there counts for nothing: no entry has this key.
async fn write_empty_parity_log(
    runtime: &Runtime,
    lanes: &Rc<Lanes>,
    leaf: &Leaf,
    book: &Superblock,
) -> Result<(), Status> {
    for number in [0, 1] {
        let header = ParityHeader { number, released: 0, key: random_uuid(runtime), unlogged: false };
        let bounce = Rc::new(Bounce::holding(&header.encode(&book.pool_uuid)));
        let offset = book.layout.parity_log_offset() + number * PAGE_BYTES as u64;
        lanes.write(leaf, offset, &bounce, 0, PAGE_BYTES, true).await?;
    }
    lanes.flush(leaf).await
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

#[cfg(test)]
mod tests {
    use super::{CreateOptions, layout_of};
    use crate::raid::Level;

    /// A page of mappings is needed for each 448 extents of a volume of which one is mapped. A pool had room for all of its data mapped in whole chunks,
    /// and guests that wrote here and there used that up while most of the data was free.
    #[test]
    fn a_new_pool_has_room_for_volumes_that_are_written_here_and_there() {
        let pages = |data_bytes: u64, metadata_bytes: Option<u64>| {
            let options = CreateOptions { metadata_bytes, ..CreateOptions::new("p", [1; 16], Level::Raid1) };
            u64::from(layout_of(&options, (data_bytes, 1 << 20), data_bytes, 0).metadata_pages)
        };
        for data in [64u64 << 20, 1 << 30, 100 << 30, 1 << 40] {
            let by_extents = (data >> 20) / 448 * 8;
            assert_eq!(pages(data, None), 2048 + by_extents + data / 1024 / 4096, "{data} bytes");
        }
        assert_eq!(
            pages(16 << 40, None),
            2048 + (16 << 20) / 448 * 8 + (1 << 30) / 4096,
            "no more than that"
        );
        assert_eq!(pages(1 << 40, Some(1 << 20)), 256, "as much as is asked for");
    }
}
