//! What the volumes of a pool may hold, as their guests may rely on it; and which volumes there are.
//!
//! ```text
//!   possible   what a block may read as now: the last acknowledged write, and those of unknown outcome beside it
//!   writes     under way
//!   stable     what may be there at worst when the power goes: as the last FLUSH found it,
//!   log        and every write that began since
//! ```
//!
//! Each write has a number, and a block's content follows from the number, the block and the volume: what is read says which write
//! it is, whole or not at all, and whose. 0 is what was never written: zeroes.
//!
//! - What is acknowledged survives the process; what was flushed survives the power.
//! - Of contents that are possible, the one that was read is what it stays.
//! - A snapshot has what its origin had at one instant between its begin and its end.

mod blocks;
mod names;

pub(crate) use names::{Names, Op};

use blocks::{Block, Blocks, Busy, Few, Write};
use names::apply;
use std::collections::{BTreeMap, BTreeSet};

/// The content of block `lba` after write `id`: both, and words that follow from them.
pub(crate) fn fill(memory: &mut [u8], id: u64, lba: u64) {
    let first = first_word(id, lba);
    for (at, chunk) in memory.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        *chunk = first.wrapping_add(at as u64).to_le_bytes();
    }
    memory[..8].copy_from_slice(&id.to_le_bytes());
    memory[8..16].copy_from_slice(&lba.to_le_bytes());
}

/// Each word behind it is greater by one.
fn first_word(id: u64, lba: u64) -> u64 {
    (id ^ (lba << 40)).wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

/// Which write this content of block `lba` is.
pub(crate) fn identify(memory: &[u8], lba: u64) -> Result<u64, String> {
    let at = |index: usize| u64::from_le_bytes(memory[index * 8..index * 8 + 8].try_into().unwrap());
    let id = at(0);
    if id == 0 {
        return match is_zero(memory) {
            true => Ok(0),
            false => Err("zero at its start, and not all of it: no write's content".to_owned()),
        };
    }
    let mut word = first_word(id, lba).wrapping_add(2);
    let mut differs = at(1) ^ lba;
    for chunk in memory[16..].chunks_exact(8) {
        differs |= u64::from_le_bytes(chunk.try_into().unwrap()) ^ word;
        word = word.wrapping_add(1);
    }
    if differs == 0 {
        return Ok(id);
    }
    let is_wrong = |index: &usize| match index {
        1 => at(1) != lba,
        _ => at(*index) != first_word(id, lba).wrapping_add(*index as u64),
    };
    let wrong = (1..memory.len() / 8).find(is_wrong).unwrap_or(0);
    Err(format!("{id:#x} at its start, {:#x} at word {wrong}: no write's content", at(wrong)))
}

/// What tells its writes apart.
fn uid_of(name: &str) -> u64 {
    name.bytes().fold(0u64, |sum, byte| (sum * 31 + u64::from(byte)) & 0xffff)
}

/// Whether all of it is.
fn is_zero(memory: &[u8]) -> bool {
    const ZEROES: [u8; 512] = [0; 512];
    memory.chunks(ZEROES.len()).all(|chunk| *chunk == ZEROES[..chunk.len()])
}

/// A read that is under way.
#[derive(Clone, Debug)]
struct Reading {
    request: u64,
    /// Its first block, and the one behind its last.
    range: (u64, u64),
    /// Blocks that may read as more than one content.
    doubtful: BTreeMap<u64, Doubt>,
}

#[derive(Clone, Debug)]
struct Doubt {
    allowed: Few,
    /// No write was under way meanwhile.
    alone: bool,
}

/// Writes by block: number in order, and content.
pub(crate) type Touched = BTreeMap<u64, Vec<(u64, u64)>>;

/// A snapshot that is being made.
#[derive(Clone, Debug)]
struct Capture {
    name: String,
    /// Writes that were under way when it began, or began since, by block.
    pub(crate) touched: Touched,
    /// Something was lost meanwhile.
    has_no_instant: bool,
}

#[derive(Clone, Default)]
struct Volume {
    blocks: Blocks,
    readings: Vec<Reading>,
    size_blocks: u64,
    is_snapshot: bool,
    captures: Vec<Capture>,
    /// Pieces that were ever written.
    written: BTreeSet<u64>,
    /// Of a snapshot whose instant has not been looked at yet: its group, and what was touched while it was made.
    made: Option<(u64, Touched)>,
}

impl Volume {
    fn up_to_its_end(&self, from: u64, count: u64) -> Option<(u64, u64)> {
        let count = count.min(self.size_blocks.saturating_sub(from));
        (count > 0).then_some((from, count))
    }

    /// Reads of `from..to` that are under way may see `id` too, which is about to be written.
    fn doubt(&mut self, (from, to): (u64, u64), id: u64) {
        let Volume { blocks, readings, .. } = self;
        for reading in readings {
            for at in from.max(reading.range.0)..to.min(reading.range.1) {
                let doubt = reading.doubtful.entry(at).or_insert_with(|| Doubt {
                    allowed: blocks.get(at).map_or(Few::one(0), Block::possible),
                    alone: true,
                });
                doubt.allowed.push(id);
                doubt.alone = false;
            }
        }
    }
}

/// What a FLUSH has to make durable, as it is when it begins.
pub(crate) struct Flush {
    seq: u64,
    blocks: Vec<(u64, Few)>,
    /// Changes of volumes that were done.
    ops: usize,
}

/// All volumes of a pool.
#[derive(Clone)]
pub(crate) struct Models {
    seq: u64,
    next_id: u64,
    volumes: BTreeMap<String, Volume>,
    /// When acknowledged writes ended.
    ends: BTreeMap<u64, u64>,
    base: Names,
    /// Since `base`.
    ops: Vec<Op>,
    /// How many before `ops` were made durable and are in `base`.
    settled: usize,
    /// The last of `ops` has not ended.
    is_pending: bool,
    /// As the pool has them.
    pub(crate) extent_blocks: u64,
    /// The pool's room for mappings.
    pub(crate) metadata_pages: u64,
    /// What is written is remembered in pieces of so many: no extent is smaller.
    piece_blocks: u64,
    /// The number when the pool was last opened, and when something was last lost.
    opened_at: u64,
    lost_at: u64,
    /// A change of volumes is durable when it is answered.
    pub(crate) changes_are_durable: bool,
}

impl Models {
    pub(crate) fn new(block_bytes: usize) -> Models {
        Models {
            seq: 1,
            next_id: 0,
            volumes: BTreeMap::new(),
            ends: BTreeMap::new(),
            base: Names::new(),
            ops: Vec::new(),
            settled: 0,
            is_pending: false,
            extent_blocks: 1,
            metadata_pages: 0,
            piece_blocks: (64 << 10) / block_bytes as u64,
            opened_at: 0,
            lost_at: 0,
            changes_are_durable: true,
        }
    }

    fn tick(&mut self) -> u64 {
        self.seq += 1;
        self.seq
    }

    fn volume(&mut self, name: &str) -> &mut Volume {
        self.volumes.get_mut(name).expect("a volume that is used has a model")
    }

    /// Those that there are now.
    pub(crate) fn names(&self) -> Names {
        let mut names = self.base.clone();
        let done = self.ops.len() - usize::from(self.is_pending);
        for op in &self.ops[..done] {
            apply(&mut names, op);
        }
        names
    }

    pub(crate) fn size_blocks(&self, name: &str) -> u64 {
        self.volumes.get(name).map_or(0, |volume| volume.size_blocks)
    }

    /// What was ever written of a volume, as whole extents.
    pub(crate) fn written(&self, name: &str) -> Vec<(u64, u64)> {
        self.volumes.get(name).map_or_else(Vec::new, |volume| {
            let extents = self.extents(volume).into_iter().map(|at| at * self.extent_blocks);
            extents.filter_map(|from| volume.up_to_its_end(from, self.extent_blocks)).collect()
        })
    }

    /// The same with little around it, in runs.
    pub(crate) fn written_closely(&self, name: &str) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let Some(volume) = self.volumes.get(name) else { return runs };
        let pieces = volume.written.iter().map(|at| at * self.piece_blocks);
        for (from, count) in pieces.filter_map(|from| volume.up_to_its_end(from, self.piece_blocks)) {
            match runs.last_mut() {
                Some((first, so_far)) if *first + *so_far == from => *so_far += count,
                _ => runs.push((from, count)),
            }
        }
        runs
    }

    fn extents(&self, volume: &Volume) -> Vec<u64> {
        let mut extents: Vec<u64> =
            volume.written.iter().map(|at| at * self.piece_blocks / self.extent_blocks).collect();
        extents.dedup();
        extents
    }

    /// How many extents all volumes have at most.
    pub(crate) fn extents_max(&self) -> u64 {
        self.volumes.values().map(|volume| self.extents(volume).len() as u64).sum()
    }

    /// How many pages their mappings take about: each chunk of entries, what is partial of it, and what names it.
    pub(crate) fn pages_max(&self) -> u64 {
        let chunks = |volume: &Volume| {
            let mut chunks: Vec<u64> = self.extents(volume).into_iter().map(|at| at / 448).collect();
            chunks.dedup();
            chunks.len() as u64
        };
        self.volumes.values().map(|volume| 3 * chunks(volume) + 3).sum()
    }

    /// Whether some of these blocks are being written.
    pub(crate) fn is_being_written(&self, name: &str, (lba, count): (u64, u64)) -> bool {
        let blocks = self.volumes.get(name).map(|volume| volume.blocks.busy_in(lba, lba + count));
        blocks.into_iter().flatten().any(|(_, block)| !block.writes.is_empty())
    }

    /// A number for a request that is no write.
    pub(crate) fn request(&mut self) -> u64 {
        self.tick()
    }

    /// Blocks are being written; all of them zero, if so. What a discard does not cover in whole extents may stay as it was. Returns its number in order, and its content's.
    pub(crate) fn write_begins(
        &mut self,
        name: &str,
        (lba, count): (u64, u64),
        is_zero: bool,
        is_discard: bool,
    ) -> (u64, u64) {
        let seq = self.tick();
        // What is given back while there is no room to write that down is kept.
        let may_be_kept =
            is_discard && (self.metadata_pages < 80 || self.pages_max() * 3 > self.metadata_pages);
        if !is_zero {
            self.next_id += 1;
        }
        let id = if is_zero { 0 } else { self.next_id | uid_of(name) << 32 };
        let (extent_blocks, piece_blocks) = (self.extent_blocks, self.piece_blocks);
        // Where the volume ends is not known while that may be changing, or be refused.
        let ends = !self.is_pending;
        let volume = self.volume(name);
        let size_blocks = if ends { volume.size_blocks } else { u64::MAX };
        if !is_zero {
            volume.written.extend(lba / piece_blocks..=(lba + count - 1) / piece_blocks);
        }
        volume.doubt((lba, lba + count), id);
        let mut captures = std::mem::take(&mut volume.captures);
        for at in lba..lba + count {
            let from = at / extent_blocks * extent_blocks;
            let is_whole = from >= lba && (from + extent_blocks).min(size_blocks) <= lba + count;
            let is_weak = is_discard && (!is_whole || may_be_kept);
            volume.blocks.change(at, |block| {
                let block = block.busy();
                let others = block.writes.iter().map(|write| write.id).collect();
                for write in &mut block.writes {
                    write.others.push(id);
                }
                block.log.push((seq, id));
                block.writes.push(Write { seq, id, others, is_weak });
            });
        }
        for capture in &mut captures {
            let Some(snapshot) = self.volumes.get_mut(&capture.name) else { continue };
            for at in lba..lba + count {
                snapshot.blocks.change(at, |block| {
                    let block = block.busy();
                    block.possible.push(id);
                    block.log.push((seq, id));
                });
                capture.touched.entry(at).or_default().push((seq, id));
            }
        }
        self.volume(name).captures = captures;
        (seq, id)
    }

    /// `ok`: it was acknowledged; else it has failed, and each of its blocks may be there or not.
    pub(crate) fn write_ends(&mut self, name: &str, seq: u64, (lba, count): (u64, u64), ok: bool, fua: bool) {
        let end = self.tick();
        // One that was under way when something was lost may be a part of it.
        if ok && seq > self.lost_at {
            self.ends.insert(seq, end);
        }
        let volume = self.volume(name);
        for at in lba..lba + count {
            volume.blocks.change_known(at, |whole| {
                let block = whole.busy();
                let Some(place) = block.writes.iter().position(|write| write.seq == seq) else { return };
                let write = block.writes.swap_remove(place);
                if ok && !write.is_weak {
                    block.possible = Few::NONE;
                    write.others.iter().for_each(|id| block.possible.push(*id));
                }
                if !block.possible.contains(write.id) {
                    block.possible.push(write.id);
                }
                if ok && fua {
                    let possible = block.possible.clone();
                    whole.make_stable(possible, seq);
                }
            });
        }
    }

    pub(crate) fn read_begins(&mut self, name: &str, request: u64, (lba, count): (u64, u64)) {
        let volume = self.volume(name);
        let of = |block: &Busy| Doubt { allowed: block.seen(), alone: block.writes.is_empty() };
        let doubtful = volume.blocks.busy_in(lba, lba + count).map(|(at, block)| (at, of(block))).collect();
        volume.readings.push(Reading { request, range: (lba, lba + count), doubtful });
    }

    /// `payload`: what was read; `None`: it has failed.
    pub(crate) fn read_ends(
        &mut self,
        name: &str,
        request: u64,
        (lba, count): (u64, u64),
        payload: Option<&[u8]>,
    ) -> Result<(), String> {
        let volume = self.volumes.get_mut(name).expect("a volume that is used has a model");
        let Some(place) = volume.readings.iter().position(|reading| reading.request == request) else {
            return Ok(());
        };
        let reading = volume.readings.swap_remove(place);
        let Some(payload) = payload else { return Ok(()) };
        let size = payload.len() / usize::try_from(count).unwrap();
        for (at, content) in (lba..).zip(payload.chunks_exact(size)) {
            let block = volume.blocks.get(at);
            let doubt = reading.doubtful.get(&at);
            // Nothing has happened to it meanwhile.
            let allowed = || {
                doubt
                    .map_or_else(|| block.map_or(Few::one(0), Block::possible), |doubt| doubt.allowed.clone())
            };
            let id = match identify(content, at) {
                Ok(id) => id,
                Err(why) => {
                    return Err(format!("{name} block {at} is {why}; want one of {:#x?}", allowed()));
                }
            };
            if !allowed().contains(id) {
                let (wanted, log) = (allowed(), block.and_then(Block::as_busy).map(|block| &block.log));
                let stable = block.map(Block::stable);
                return Err(format!(
                    "{name} block {at} reads as {id:#x}, want one of {wanted:#x?} (stable {stable:#x?}, since {log:#x?})"
                ));
            }
            // What was possible before may be narrower by now.
            let Some(busy) = block.and_then(Block::as_busy) else { continue };
            if doubt.is_none_or(|doubt| doubt.alone) && busy.writes.is_empty() {
                if !busy.possible.contains(id) {
                    let possible = &busy.possible;
                    return Err(format!(
                        "{name} block {at} reads as {id:#x} after it read as {possible:#x?}"
                    ));
                }
                volume.blocks.change(at, |block| block.busy().possible = Few::one(id));
            }
        }
        Ok(())
    }

    fn done(&self) -> usize {
        self.settled + self.ops.len() - usize::from(self.is_pending)
    }

    pub(crate) fn flush_begins(&mut self, name: &str) -> Flush {
        let (seq, ops) = (self.tick(), self.done());
        let blocks = self.volume(name).blocks.busy();
        Flush { seq, blocks: blocks.map(|(at, block)| (at, block.seen())).collect(), ops }
    }

    /// It was acknowledged.
    pub(crate) fn flush_ends(&mut self, name: &str, flush: Flush) {
        let volume = self.volume(name);
        for (at, contents) in flush.blocks {
            volume.blocks.change_known(at, |block| block.make_stable(contents, flush.seq));
        }
        self.settle(flush.ops);
    }

    /// Changes up to the `ops`th are durable.
    fn settle(&mut self, ops: usize) {
        let count = ops.saturating_sub(self.settled).min(self.ops.len());
        for op in self.ops.drain(..count) {
            apply(&mut self.base, &op);
        }
        self.settled += count;
        self.forget();
    }

    /// Volumes that cannot come back.
    fn forget(&mut self) {
        let mut names: BTreeSet<String> = self.base.keys().cloned().collect();
        let mut now = self.base.clone();
        for op in &self.ops {
            apply(&mut now, op);
            names.extend(now.keys().cloned());
        }
        self.volumes.retain(|name, _| names.contains(name));
    }

    /// Everything was made durable, and nothing was under way.
    pub(crate) fn all_durable(&mut self) {
        let seq = self.tick();
        for volume in self.volumes.values_mut() {
            volume.blocks.change_busy(|_, block| {
                let seen = block.seen();
                block.make_stable(seen, seq);
            });
        }
        self.settle(self.done());
    }

    /// The power was lost: writes under way are not heard of again.
    pub(crate) fn cut(&mut self) {
        for volume in self.volumes.values_mut() {
            volume.readings.clear();
            volume.blocks.change_busy(|_, block| block.cut());
        }
        self.process_died();
    }

    /// Volumes with acknowledged writes that nobody has flushed, and the number of the last of them.
    pub(crate) fn unflushed(&self) -> BTreeMap<String, u64> {
        let last = |name: &str, volume: &Volume| {
            let writes = volume.blocks.busy().flat_map(|(_, block)| block.log.iter());
            // What a clone was made of was made durable then, and what was there when the pool was opened.
            let its = writes.filter(|(seq, id)| *seq > self.opened_at && *id >> 32 == uid_of(name));
            its.map(|(seq, _)| *seq).filter(|seq| self.ends.contains_key(seq)).max()
        };
        let written = self.volumes.iter().filter(|(_, volume)| !volume.is_snapshot);
        written.filter_map(|(name, volume)| Some((name.clone(), last(name, volume)?))).collect()
    }

    /// What nobody has flushed may be lost, though the guests' requests go on: of all volumes, which are named.
    pub(crate) fn lose_unflushed(&mut self) -> BTreeSet<String> {
        self.lost_at = self.tick();
        for volume in self.volumes.values_mut() {
            let Volume { blocks, readings, .. } = volume;
            for reading in readings.iter_mut() {
                for (at, busy) in blocks.busy_in(reading.range.0, reading.range.1) {
                    let new = || Doubt { allowed: busy.seen(), alone: false };
                    let doubt = reading.doubtful.entry(at).or_insert_with(new);
                    doubt.alone = false;
                    let lost = busy.stable.all().iter().chain(busy.log.iter().map(|(_, id)| id));
                    lost.for_each(|id| doubt.allowed.push(*id));
                    doubt.allowed.sort();
                }
            }
            blocks.change_busy(|_, block| block.lose_unflushed());
            // It need not have what has ended, and may have what came later.
            volume.captures.iter_mut().for_each(|capture| capture.has_no_instant = true);
            volume.made = None;
        }
        self.volumes.keys().cloned().collect()
    }

    /// The process has died: whether a change that was under way has happened will be seen.
    pub(crate) fn process_died(&mut self) {
        for volume in self.volumes.values_mut() {
            volume.captures.clear();
            volume.made = None;
        }
    }

    /// What a snapshot was made of.
    pub(crate) fn is_snapshot(&self, name: &str) -> bool {
        self.volumes.get(name).is_some_and(|volume| volume.is_snapshot)
    }
}
