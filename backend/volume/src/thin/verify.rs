//! [`Metadata::verify`]: everything that is kept twice is counted again and compared.

use super::entry::{Entry, Mapped, is_within};
use super::metadata::Metadata;
use super::pages::ROOT_PAGES;
use crate::format::{CHUNK_ENTRIES, DIR_POINTERS, NONE};

/// No place.
const NOWHERE: u64 = u64::MAX;

/// What is found on the way through all volumes.
struct Count {
    refs: Vec<u32>,
    /// The index that an extent is mapped at. It is the same in all volumes that share it.
    index: Vec<u32>,
    faults: Vec<String>,
}

impl Metadata {
    /// Counts everything again. Each fault is a line that names the volume, the offset and the extent.
    #[must_use]
    pub fn verify(&self) -> Vec<String> {
        let extents = self.extents.count() as usize;
        let mut count = Count { refs: vec![0; extents], index: vec![NONE; extents], faults: Vec::new() };
        let (dir_refs, chunk_refs) = self.verify_sharing(&mut count);
        for (id, v) in &self.volumes {
            let mut mapped = 0;
            for at in 0..v.dirs.len() * DIR_POINTERS {
                let chunk = self.chunk_at(*id, at);
                if chunk == 0 {
                    continue;
                }
                let is_first = chunk_refs[chunk as usize].1 == *id;
                for (slot, entry) in self.table.entries(chunk).enumerate().filter(|(_, entry)| entry.0 != 0) {
                    mapped += 1;
                    let index = (at * CHUNK_ENTRIES + slot) as u64;
                    self.verify_entry(&mut count, *id, index, entry, is_first);
                }
            }
            if mapped != v.mapped {
                count
                    .faults
                    .push(format!("volume {}: {mapped} extents are mapped, not {}", v.name, v.mapped));
            }
        }
        for &chunk in &self.doomed {
            for entry in self.table.entries(chunk) {
                self.count_entry(&mut count, entry, NOWHERE);
            }
        }
        for (extent, refs) in (0..).zip(&count.refs) {
            if self.extents.refs(extent) != *refs {
                let said = self.extents.refs(extent);
                count.faults.push(format!("extent {extent}: {refs} references, {said} were counted"));
            }
        }
        self.verify_exclusive(&mut count);
        self.verify_counts(&mut count, &dir_refs, &chunk_refs);
        count.faults
    }

    /// References to dirs and chunks, and the first volume that has each.
    fn verify_sharing(&self, count: &mut Count) -> (Vec<u32>, Vec<(u32, u32)>) {
        let mut dirs = vec![0; self.dirs.ids().end as usize];
        let mut chunks = vec![(0, NONE); self.chunks.ids().end as usize];
        for (id, v) in &self.volumes {
            for (at, &dir) in v.dirs.iter().enumerate().filter(|(_, dir)| **dir != 0) {
                dirs[dir as usize] += 1;
                for (place, &chunk) in self.dirs.get(dir).ids.iter().enumerate() {
                    if v.map().chunk(at * DIR_POINTERS + place) != chunk {
                        let offset = (at * DIR_POINTERS + place) as u64
                            * CHUNK_ENTRIES as u64
                            * self.thin.extent_bytes;
                        count
                            .faults
                            .push(format!("volume {}: readers see another chunk at {offset}", v.name));
                    }
                    if chunk != 0 && dirs[dir as usize] == 1 {
                        let (refs, first) = &mut chunks[chunk as usize];
                        *refs += 1;
                        *first = (*first).min(*id);
                    }
                }
            }
        }
        (dirs, chunks)
    }

    fn verify_entry(&self, count: &mut Count, volume: u32, index: u64, entry: Entry, is_first: bool) {
        let v = &self.volumes[&volume];
        let offset = index.saturating_mul(self.thin.extent_bytes);
        let mut fault = |what: &str| {
            let extent = entry.low();
            count.faults.push(format!("volume {} at offset {offset} (extent {extent}): {what}", v.name));
        };
        if !entry.is_sound() || entry.birth() > self.generation {
            fault("the entry makes no sense");
            return;
        }
        if offset >= v.size_bytes {
            fault("it is beyond the volume's end");
        }
        let is_shared = self.is_shared(volume, usize::try_from(index).expect("u32") / CHUNK_ENTRIES);
        if entry.birth() > v.shared_generation && (is_shared || v.is_snapshot) {
            fault("it is shared and yet exclusive");
        }
        if let Mapped::Partial { extent, bits, .. } = self.table.resolve(entry)
            && (!is_within(bits, self.full) || bits == self.full)
        {
            fault(&format!("the bits of partly valid extent {extent} are {bits:x?}"));
        }
        if is_first && !self.count_entry(count, entry, index) {
            count.faults.push(format!("volume {} at offset {offset}: its extent is out of range", v.name));
        }
    }

    /// False if it names an extent that does not exist.
    fn count_entry(&self, count: &mut Count, entry: Entry, index: u64) -> bool {
        let (extent, fallback) = match self.table.resolve(entry) {
            Mapped::None => return true,
            Mapped::Full { extent, .. } => (extent, NONE),
            Mapped::Partial { extent, fallback, .. } => (extent, fallback),
        };
        for extent in [extent, fallback].into_iter().filter(|extent| *extent != NONE) {
            let Some(refs) = count.refs.get_mut(extent as usize) else { return false };
            *refs += 1;
            let Ok(index) = u32::try_from(index) else { continue };
            let place = &mut count.index[extent as usize];
            if *place != NONE && *place != index {
                count.faults.push(format!("extent {extent} is mapped at index {place} and at {index}"));
            }
            *place = index;
        }
        extent != NONE
    }

    /// Whoever may write an extent in place is the only one that has it.
    fn verify_exclusive(&self, count: &mut Count) {
        for (id, v) in self.volumes.iter().filter(|(_, v)| !v.is_snapshot) {
            for at in 0..v.dirs.len() * DIR_POINTERS {
                let chunk = self.chunk_at(*id, at);
                if chunk == 0 {
                    continue;
                }
                let entries = self.table.entries(chunk).enumerate();
                for (slot, entry) in entries.filter(|(_, entry)| entry.birth() > v.shared_generation) {
                    let extent =
                        if entry.is_partial() { self.table.partial(entry.low()).extent } else { entry.low() };
                    let refs = count.refs.get(extent as usize).copied().unwrap_or(0);
                    if refs != 1 {
                        let offset = (at * CHUNK_ENTRIES + slot) as u64 * self.thin.extent_bytes;
                        let name = &v.name;
                        count.faults.push(format!("volume {name} at offset {offset}: extent {extent} is exclusive and has {refs} references"));
                    }
                }
            }
        }
    }

    fn verify_counts(&self, count: &mut Count, dir_refs: &[u32], chunk_refs: &[(u32, u32)]) {
        for (id, refs) in self.dirs.ids().zip(&dir_refs[1..]) {
            let said = self.dirs.get(id).refs;
            if said != *refs {
                count.faults.push(format!("dir {id}: {refs} references, {said} were counted"));
            }
        }
        for (id, (refs, _)) in self.chunks.ids().zip(&chunk_refs[1..]) {
            let chunk = self.chunks.get(id);
            if chunk.refs != *refs {
                count.faults.push(format!("chunk {id}: {refs} references, {} were counted", chunk.refs));
            }
            let mapped = self.table.entries(id).filter(|entry| entry.is_mapped()).count();
            if *refs > 0 && mapped != usize::from(chunk.mapped) {
                count.faults.push(format!("chunk {id}: {mapped} entries, {} were counted", chunk.mapped));
            }
        }
        let (mut free, mut reserved, mut freed) = (0_u32, 0_u32, 0_u32);
        for (extent, refs) in (0..).zip(&count.refs) {
            let (is_free, is_reserved) = (self.extents.is_free(extent), self.extents.is_reserved(extent));
            if u8::from(is_free) + u8::from(is_reserved) + u8::from(*refs > 0) > 1 {
                count.faults.push(format!("extent {extent} is free or reserved, and has {refs} references"));
            }
            free += u32::from(is_free);
            reserved += u32::from(!is_free && is_reserved);
            freed += u32::from(!is_free && !is_reserved && *refs == 0);
        }
        let counted = [
            ("free", free, self.extents.free()),
            ("reserved", reserved, self.extents.reserved()),
            ("freed", freed, self.extents.freed()),
        ];
        for (state, found, said) in counted.into_iter().filter(|(_, found, said)| found != said) {
            count.faults.push(format!("{found} extents are {state}, {said} were counted"));
        }
        if self.checkpoint.is_none() {
            self.verify_pages(count);
        }
    }

    /// Between checkpoints the pages in use are those of live chunks and dirs, the list, and those that are obsolete.
    fn verify_pages(&self, count: &mut Count) {
        let mut pages: Vec<u32> = self.list_pages.iter().chain(&self.obsolete).copied().collect();
        let chunks = self.chunks.ids().map(|id| self.chunks.get(id)).filter(|chunk| chunk.refs > 0);
        pages.extend(chunks.flat_map(|chunk| chunk.stored.pages().collect::<Vec<u32>>()));
        let dirs = self.dirs.ids().map(|id| self.dirs.get(id)).filter(|dir| dir.refs > 0);
        pages.extend(dirs.filter(|dir| !dir.stored.is_none()).map(|dir| dir.stored.page));
        pages.sort_unstable();
        for pair in pages.windows(2).filter(|pair| pair[0] == pair[1]) {
            count.faults.push(format!("metadata page {} is used twice", pair[0]));
        }
        for page in ROOT_PAGES..self.pages.count() {
            if self.pages.is_free(page) == pages.binary_search(&page).is_ok() {
                count.faults.push(format!("metadata page {page} is free and in use, or neither"));
            }
        }
    }
}
