//! What blocks may hold, as whoever uses the device may rely on it. Each write has a number; a block's content follows from its
//! number and place, so that what is read says which write it is, whole or not at all.
//!
//! - A read gives what the last write left, or one that was under way meanwhile. Of a write of unknown outcome either may be
//!   read, but the one that was is what it stays.
//! - What a FLUSH or a FUA write has made durable is on the disk's stable store.

use hawser_sim::Memory;
use std::collections::BTreeMap;

pub(crate) const BLOCK: usize = 512;

/// The content of block `lba` after write `id`. 0 is the beginning: all zero.
pub(crate) fn fill(memory: &mut [u8], id: u64, lba: u64) {
    for (index, chunk) in memory.chunks_exact_mut(8).enumerate() {
        chunk.copy_from_slice(&word(id, lba, index as u64).to_le_bytes());
    }
}

fn word(id: u64, lba: u64, index: u64) -> u64 {
    match (id, index) {
        (0, _) => 0,
        (id, 0) => id,
        (id, index) => (id ^ (lba << 40)).wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(index),
    }
}

/// Which write this content of block `lba` is.
pub(crate) fn identify(memory: &[u8], lba: u64) -> Result<u64, String> {
    let at = |index: usize| u64::from_le_bytes(memory[index * 8..index * 8 + 8].try_into().unwrap());
    let id = at(0);
    for index in 0..BLOCK / 8 {
        if at(index) != word(id, lba, index as u64) {
            return Err(format!(
                "block {lba} is torn: {:#x} at its start, {:#x} at word {index}",
                id,
                at(index)
            ));
        }
    }
    Ok(id)
}

struct Write {
    id: u64,
    /// Writes that were under way at the same time, and what a lost cache has put in its place.
    others: Vec<u64>,
}

struct Reading {
    request: u64,
    allowed: Vec<u64>,
    /// No write was under way meanwhile.
    alone: bool,
}

#[derive(Default)]
struct Block {
    /// What it may hold, but for writes under way.
    possible: Vec<u64>,
    writes: Vec<Write>,
    readings: Vec<Reading>,
    /// Every write, as they began.
    log: Vec<u64>,
    /// What its stable store may hold: these, and every write from this place of the log on.
    stable: (Vec<u64>, usize),
    /// Writes before this place of the log were under a FLUSH that has failed: their loss is told.
    told: usize,
}

impl Block {
    fn seen(&self) -> Vec<u64> {
        self.possible.iter().copied().chain(self.writes.iter().map(|write| write.id)).collect()
    }

    fn is_stable_with(&self, stable: &(Vec<u64>, usize), id: u64) -> bool {
        stable.0.contains(&id) || self.log[stable.1..].contains(&id)
    }
}

/// What a FLUSH has to make durable, as it is when it begins.
pub(crate) struct Snapshot {
    blocks: BTreeMap<u64, (Vec<u64>, usize)>,
    /// How many caches were lost before.
    losses: u64,
}

/// The blocks of one device.
pub(crate) struct Model {
    blocks: BTreeMap<u64, Block>,
    next_id: u64,
    /// Acknowledged writes were lost with a cache, and no FLUSH has said so yet.
    lost: bool,
    losses: u64,
    /// How many FLUSHes may still fail, because caches became others.
    pub(crate) failures_allowed: u64,
    /// Nothing names the cache, and the configuration trusts it.
    pub(crate) trusts: bool,
    /// Every write is durable when it ends.
    pub(crate) write_through: bool,
}

impl Model {
    pub(crate) fn new(from: u64, to: u64) -> Model {
        let block = || Block { possible: vec![0], stable: (vec![0], 0), ..Block::default() };
        Model {
            blocks: (from..to).map(|lba| (lba, block())).collect(),
            next_id: from << 32 | 1,
            lost: false,
            losses: 0,
            failures_allowed: 0,
            trusts: false,
            write_through: false,
        }
    }

    fn range(&mut self, lba: u64, count: u64) -> impl Iterator<Item = (u64, &mut Block)> {
        self.blocks.range_mut(lba..lba + count).map(|(lba, block)| (*lba, block))
    }

    pub(crate) fn next_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    pub(crate) fn write_begins(&mut self, id: u64, lba: u64, count: u64) {
        for (_, block) in self.range(lba, count) {
            let others = block.writes.iter().map(|write| write.id).collect();
            for write in &mut block.writes {
                write.others.push(id);
            }
            for reading in &mut block.readings {
                reading.allowed.push(id);
                reading.alone = false;
            }
            block.log.push(id);
            block.writes.push(Write { id, others });
        }
    }

    /// `ok`: it was acknowledged; else it has failed, and may be there or not.
    pub(crate) fn write_ends(&mut self, id: u64, (lba, count): (u64, u64), ok: bool, fua: bool) {
        let durable = fua || self.write_through;
        for (_, block) in self.range(lba, count) {
            let at = block.writes.iter().position(|write| write.id == id).expect("it has begun");
            let write = block.writes.swap_remove(at);
            if ok {
                block.possible = write.others;
            }
            block.possible.push(id);
            if ok && durable {
                let from = block.log.iter().position(|other| *other == id).expect("it has begun") + 1;
                if from >= block.stable.1 {
                    block.stable = (block.possible.clone(), from);
                }
            }
        }
    }

    pub(crate) fn read_begins(&mut self, request: u64, lba: u64, count: u64) {
        for (_, block) in self.range(lba, count) {
            let (allowed, alone) = (block.seen(), block.writes.is_empty());
            block.readings.push(Reading { request, allowed, alone });
        }
    }

    /// `payload`: what was read; `None`: it has failed.
    pub(crate) fn read_ends(
        &mut self,
        request: u64,
        (lba, count): (u64, u64),
        payload: Option<&[u8]>,
    ) -> Result<(), String> {
        for (at, block) in self.range(lba, count) {
            let position = block.readings.iter().position(|reading| reading.request == request);
            let reading = block.readings.swap_remove(position.expect("it has begun"));
            let Some(payload) = payload else { continue };
            let from = usize::try_from(at - lba).unwrap() * BLOCK;
            let id = identify(&payload[from..from + BLOCK], at)?;
            if !reading.allowed.contains(&id) {
                let allowed = reading.allowed;
                return Err(format!("block {at} reads as {id:#x}, which is none of {allowed:#x?}"));
            }
            // What was possible before may be narrower by now.
            if reading.alone && block.writes.is_empty() {
                if !block.possible.contains(&id) {
                    return Err(format!("block {at} reads as {id:#x} and as another at the same time"));
                }
                block.possible = vec![id];
            }
        }
        Ok(())
    }

    pub(crate) fn flush_begins(&self) -> Snapshot {
        let blocks = self.blocks.iter().map(|(lba, block)| (*lba, (block.seen(), block.log.len())));
        Snapshot { blocks: blocks.collect(), losses: self.losses }
    }

    /// A FLUSH has failed: whatever was lost is told, and will be.
    pub(crate) fn flush_fails(&mut self, snapshot: &Snapshot) {
        self.lost = false;
        for (lba, (_, from)) in &snapshot.blocks {
            let block = self.blocks.get_mut(lba).expect("blocks stay");
            block.told = block.told.max(*from);
        }
    }

    /// A FLUSH has ended well or not, with this stable store.
    pub(crate) fn flush_ends(
        &mut self,
        snapshot: &Snapshot,
        ok: bool,
        stable: &Memory,
    ) -> Result<(), String> {
        if !ok {
            if self.failures_allowed == 0 {
                return Err("a FLUSH fails, and no cache was lost".to_owned());
            }
            self.failures_allowed -= 1;
            self.flush_fails(snapshot);
            return Ok(());
        }
        if self.trusts {
            return Ok(());
        }
        // One that was answered before the loss promises what the stable store shows.
        if self.lost && snapshot.losses == self.losses {
            return Err("a FLUSH ends well after acknowledged writes were lost with a cache".to_owned());
        }
        for (lba, promised) in &snapshot.blocks {
            let block = self.blocks.get_mut(lba).expect("blocks stay");
            let from = usize::try_from(*lba).unwrap() * BLOCK;
            let id = identify(&stable.get(from..from + BLOCK), *lba)?;
            if !block.is_stable_with(promised, id) {
                return Err(format!(
                    "block {lba} is {id:#x} on the stable store after a FLUSH, want {promised:#x?}"
                ));
            }
            if promised.1 >= block.stable.1 {
                block.stable = promised.clone();
            }
        }
        Ok(())
    }

    /// The disk's cache was lost: this is what is left.
    pub(crate) fn cache_lost(&mut self, content: &Memory) -> Result<(), String> {
        let trusts = self.trusts;
        let mut lost = false;
        for (lba, block) in &mut self.blocks {
            let from = usize::try_from(*lba).unwrap() * BLOCK;
            let id = identify(&content.get(from..from + BLOCK), *lba)?;
            let promised = block.stable.clone();
            if !trusts && !block.is_stable_with(&promised, id) {
                return Err(format!("block {lba} is {id:#x} after a loss of power, want {promised:#x?}"));
            }
            let untold = &block.log[block.told..];
            if !block.seen().contains(&id) && block.possible.iter().any(|id| untold.contains(id)) {
                lost = true;
            }
            block.possible = vec![id];
            for write in &mut block.writes {
                write.others.push(id);
            }
            for reading in &mut block.readings {
                reading.allowed.push(id);
                reading.alone = false;
            }
        }
        self.lost |= lost && !trusts;
        self.losses += 1;
        self.failures_allowed += 1;
        Ok(())
    }

    /// What is left at the end.
    pub(crate) fn check_all(&self, content: &Memory) -> Result<(), String> {
        for (lba, block) in &self.blocks {
            let from = usize::try_from(*lba).unwrap() * BLOCK;
            let id = identify(&content.get(from..from + BLOCK), *lba)?;
            if !block.seen().contains(&id) {
                let seen = block.seen();
                return Err(format!("block {lba} is {id:#x} at the end, want one of {seen:#x?}"));
            }
        }
        Ok(())
    }
}
