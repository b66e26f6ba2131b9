//! [`Metadata::apply`]: one record, checked against what is there, then carried out as a whole.
//!
//! Records come from disks too: whatever one says, it is refused with a reason or leaves everything consistent.

use super::entry::{Bits, Entry, GENERATIONS, Mapped, NO_BITS, is_within, or, without};
use super::metadata::Metadata;
use super::table::{PartialView, split};
use super::volume::{Volume, VolumeParts, dirs_for};
use crate::format::{CHUNK_ENTRIES, DIR_POINTERS, NONE, NewSnapshot, Record, Uuid, is_name};

/// Chunks that an `Unmap` lets go of at once; the rest waits for [`Metadata::release_some`].
const UNMAP_CHUNKS: usize = 64;

impl Metadata {
    /// Carries out a record.
    ///
    /// # Errors
    /// What in it does not go with what is there; nothing has changed.
    pub fn apply(&mut self, record: &Record) -> Result<(), String> {
        match record {
            Record::CreateVolume { id, uuid, name, size_bytes } => self.create(*id, *uuid, name, *size_bytes),
            Record::Resize { id, size_bytes } => self.resize(*id, *size_bytes),
            Record::Snapshot { items } => self.snapshot(items),
            Record::Clone { snapshot, id, uuid, name } => self.clone_of(*snapshot, *id, *uuid, name),
            Record::Delete { id } => self.delete(*id),
            &Record::Map { volume, index, birth, extent, fallback, bits } => {
                self.map(volume, index, birth, PartialView { extent, fallback, bits })
            }
            &Record::Valid { volume, index, bits } => self.valid(volume, index, bits),
            &Record::Invalid { volume, index, bits } => self.invalid(volume, index, bits),
            &Record::Unmap { volume, index, count } => self.unmap(volume, index, count),
            &Record::Rebirth { volume, index, birth } => self.rebirth(volume, index, birth),
            &Record::Grow { extents } => self.grow(extents),
        }?;
        self.is_changed = true;
        Ok(())
    }

    fn create(&mut self, id: u32, uuid: Uuid, name: &str, size_bytes: u64) -> Result<(), String> {
        self.check_new(id, name)?;
        let dirs = dirs_for(self.thin.indices(size_bytes)?);
        let parts = VolumeParts {
            name: name.to_owned(),
            uuid,
            is_snapshot: false,
            origin: NONE,
            size_bytes,
            shared_generation: 0,
            mapped: 0,
            dirs: vec![0; dirs],
        };
        self.insert(id, Volume::new(parts, &[]));
        Ok(())
    }

    fn resize(&mut self, id: u32, size_bytes: u64) -> Result<(), String> {
        let volume = self.writable(id)?;
        let indices = self.thin.indices(size_bytes)?;
        let mapped = if size_bytes < volume.size_bytes { self.first_mapped(id, indices) } else { None };
        if let Some(index) = mapped {
            return Err(format!("{} is mapped at index {index}, beyond {size_bytes} bytes", volume.name));
        }
        let extent_bytes = self.thin.extent_bytes;
        self.volumes.get_mut(&id).expect("checked").resize(size_bytes, indices, extent_bytes);
        Ok(())
    }

    fn snapshot(&mut self, items: &[NewSnapshot]) -> Result<(), String> {
        if items.is_empty() {
            return Err("a snapshot of nothing".to_owned());
        }
        for (at, item) in items.iter().enumerate() {
            self.existing(item.origin)?;
            self.check_new(item.id, &item.name)?;
            if items[..at].iter().any(|before| before.name == item.name || before.id >= item.id) {
                return Err(format!("snapshot {} ({}) is named twice or out of order", item.id, item.name));
            }
        }
        let next = self.next_generation()?;
        for item in items {
            self.share(item.origin, item.id, item.uuid, &item.name, true);
        }
        self.generation = next;
        Ok(())
    }

    fn clone_of(&mut self, snapshot: u32, id: u32, uuid: Uuid, name: &str) -> Result<(), String> {
        let origin = self.existing(snapshot)?;
        if !origin.is_snapshot {
            return Err(format!("{} is no snapshot", origin.name));
        }
        self.check_new(id, name)?;
        let next = self.next_generation()?;
        self.share(snapshot, id, uuid, name, false);
        self.generation = next;
        Ok(())
    }

    /// A new volume with all that the origin has. Nothing of that is the origin's alone from now on.
    fn share(&mut self, origin_id: u32, id: u32, uuid: Uuid, name: &str, is_snapshot: bool) {
        let generation = self.generation;
        let origin = self.volumes.get_mut(&origin_id).expect("checked");
        if !origin.is_snapshot {
            origin.set_shared_generation(generation);
        }
        let parts = VolumeParts {
            name: name.to_owned(),
            uuid,
            is_snapshot,
            origin: origin_id,
            size_bytes: origin.size_bytes,
            shared_generation: generation,
            mapped: origin.mapped,
            dirs: origin.dirs.clone(),
        };
        for &dir in parts.dirs.iter().filter(|dir| **dir != 0) {
            self.dirs.get_mut(dir).refs += 1;
        }
        let volume = Volume::new(parts, &origin.map().chunk_ids());
        self.insert(id, volume);
    }

    fn delete(&mut self, id: u32) -> Result<(), String> {
        self.existing(id)?;
        let volume = self.volumes.remove(&id).expect("checked");
        self.names.remove(&volume.name);
        for dir in volume.dirs.into_iter().filter(|dir| *dir != 0) {
            self.let_go_dir(dir);
        }
        Ok(())
    }

    fn map(&mut self, volume: u32, index: u32, birth: u32, view: PartialView) -> Result<(), String> {
        let PartialView { extent, fallback, bits } = view;
        self.check_place(volume, index)?;
        self.check_bits(bits)?;
        self.check_birth(birth)?;
        if extent >= self.extents.count() || !self.extents.is_available(extent) {
            return Err(format!("extent {extent} is not free, for volume {volume} at index {index}"));
        }
        if fallback != NONE && fallback != self.entry(volume, index).background() {
            return Err(format!("volume {volume} does not show extent {fallback} at index {index}"));
        }
        self.check_arenas()?;
        let (at, _) = split(index);
        let chunk = self.chunk_for_change(volume, at);
        let entry = if bits == self.full {
            self.extents.refer(extent);
            Entry::full(extent, birth)
        } else {
            self.new_partial(view, birth)
        };
        self.replace_entry(volume, index, chunk, entry);
        Ok(())
    }

    fn valid(&mut self, volume: u32, index: u32, bits: Bits) -> Result<(), String> {
        self.check_exclusive(volume, index)?;
        self.check_bits(bits)?;
        let Mapped::Partial { bits: before, .. } = self.entry(volume, index) else { return Ok(()) };
        let after = or(before, bits);
        if after == before {
            return Ok(());
        }
        self.check_arenas()?;
        let (at, slot) = split(index);
        let chunk = self.chunk_for_change(volume, at);
        let entry = self.table.entry(chunk, slot);
        if after == self.full {
            let extent = self.table.partial(entry.low()).extent;
            self.extents.refer(extent);
            self.replace_entry(volume, index, chunk, Entry::full(extent, entry.birth()));
        } else {
            self.table.set_bits(entry.low(), after);
        }
        Ok(())
    }

    /// Undoes `Valid`s of these units, which are in no log: what they covered shows `fallback` again, which the last of them had let go of
    /// ([`NONE`]: none had), or zeroes. True when nobody else had the fallback: it is not freed any more.
    ///
    /// It is as if the records had named no units; what came behind them must not depend on that.
    ///
    /// # Panics
    /// If what is mapped there is not the volume's own.
    pub fn take_back(&mut self, volume: u32, index: u32, bits: Bits, fallback: u32) -> bool {
        self.check_exclusive(volume, index).expect("nobody shares what was just written");
        self.check_arenas().expect("there is room for one more");
        let (at, slot) = split(index);
        match self.entry(volume, index) {
            Mapped::None => false,
            Mapped::Partial { bits: before, .. } => {
                let chunk = self.chunk_for_change(volume, at);
                let entry = self.table.entry(chunk, slot);
                self.table.set_bits(entry.low(), without(before, bits));
                false
            }
            Mapped::Full { extent, birth } => {
                let is_freed = fallback != NONE && self.extents.take_back(fallback);
                let chunk = self.chunk_for_change(volume, at);
                let view = PartialView { extent, fallback, bits: without(self.full, bits) };
                let partial = self.new_partial(view, birth);
                self.replace_entry(volume, index, chunk, partial);
                if fallback != NONE {
                    // The partial has its own.
                    self.extents.let_go(fallback);
                }
                is_freed
            }
        }
    }

    fn invalid(&mut self, volume: u32, index: u32, bits: Bits) -> Result<(), String> {
        self.check_exclusive(volume, index)?;
        self.check_bits(bits)?;
        let before = match self.entry(volume, index) {
            Mapped::Partial { fallback, .. } if fallback != NONE => {
                return Err(format!("volume {volume} shows extent {fallback} at index {index}"));
            }
            Mapped::Partial { bits, .. } => bits,
            _ => self.full,
        };
        let after = without(before, bits);
        if after == before {
            return Ok(());
        }
        self.check_arenas()?;
        let (at, slot) = split(index);
        let chunk = self.chunk_for_change(volume, at);
        let entry = self.table.entry(chunk, slot);
        if after == NO_BITS {
            self.replace_entry(volume, index, chunk, Entry::EMPTY);
        } else if entry.is_partial() {
            self.table.set_bits(entry.low(), after);
        } else {
            let view = PartialView { extent: entry.low(), fallback: NONE, bits: after };
            let partial = self.new_partial(view, entry.birth());
            self.replace_entry(volume, index, chunk, partial);
        }
        Ok(())
    }

    fn unmap(&mut self, volume: u32, index: u32, count: u32) -> Result<(), String> {
        let last = match count.checked_sub(1).and_then(|more| index.checked_add(more)) {
            Some(last) => last,
            None => return Err(format!("{count} indices from {index} on are no range")),
        };
        self.check_place(volume, last)?;
        self.check_arenas()?;
        let ((first_at, first_slot), (last_at, last_slot)) = (split(index), split(last));
        let v = &self.volumes[&volume];
        // A place without a dir is skipped with all that the dir would have.
        let mut at = first_at;
        let mut places = Vec::new();
        while at <= last_at {
            let dir = at / DIR_POINTERS;
            let end = ((dir + 1) * DIR_POINTERS).min(last_at + 1);
            if v.dirs[dir] != 0 {
                places.extend(at..end);
            }
            at = end;
        }
        for at in places {
            let first = if at == first_at { first_slot } else { 0 };
            let end = if at == last_at { last_slot + 1 } else { CHUNK_ENTRIES };
            self.unmap_in_chunk(volume, at, first, end);
        }
        self.release_some(UNMAP_CHUNKS);
        Ok(())
    }

    fn rebirth(&mut self, volume: u32, index: u32, birth: u32) -> Result<(), String> {
        self.check_place(volume, index)?;
        self.check_birth(birth)?;
        let entry = self.raw_entry(volume, index);
        if !self.can_rebirth(volume, index) || birth < entry.birth() {
            return Err(format!("what volume {volume} maps at index {index} is not its own"));
        }
        let (at, slot) = split(index);
        let chunk = self.chunk_for_change(volume, at);
        self.chunks.set_entry(chunk, slot, entry.with_birth(birth));
        Ok(())
    }

    fn grow(&mut self, extents: u32) -> Result<(), String> {
        if extents < self.extents.count() || extents == NONE {
            return Err(format!("a pool of {} extents does not grow to {extents}", self.extents.count()));
        }
        self.thin.extents = extents;
        self.extents.grow(extents);
        Ok(())
    }

    fn insert(&mut self, id: u32, volume: Volume) {
        self.names.insert(volume.name.clone(), id);
        self.volumes.insert(id, volume);
        self.next_volume = id + 1;
    }

    fn existing(&self, id: u32) -> Result<&Volume, String> {
        self.volumes.get(&id).ok_or_else(|| format!("there is no volume {id}"))
    }

    fn writable(&self, id: u32) -> Result<&Volume, String> {
        let volume = self.existing(id)?;
        if volume.is_snapshot { Err(format!("{} is a snapshot", volume.name)) } else { Ok(volume) }
    }

    fn check_new(&self, id: u32, name: &str) -> Result<(), String> {
        if id < self.next_volume || id >= NONE - 1 {
            return Err(format!("id {id} is not new: the next is {}", self.next_volume));
        }
        if !is_name(name) {
            return Err(format!("`{name}` is no name for a volume"));
        }
        if self.names.contains_key(name) {
            return Err(format!("there is a volume {name} already"));
        }
        Ok(())
    }

    fn next_generation(&self) -> Result<u32, String> {
        let next = self.generation + 1;
        if next < GENERATIONS { Ok(next) } else { Err("all generations are used up".to_owned()) }
    }

    fn check_place(&self, volume: u32, index: u32) -> Result<(), String> {
        let v = self.writable(volume)?;
        if u64::from(index) < v.size_bytes.div_ceil(self.thin.extent_bytes) {
            Ok(())
        } else {
            Err(format!("index {index} is beyond the end of {}", v.name))
        }
    }

    fn check_exclusive(&self, volume: u32, index: u32) -> Result<(), String> {
        self.check_place(volume, index)?;
        if self.is_exclusive(volume, index) {
            Ok(())
        } else {
            Err(format!("what volume {volume} maps at index {index} is not its own, or nothing"))
        }
    }

    fn check_bits(&self, bits: Bits) -> Result<(), String> {
        if is_within(bits, self.full) {
            Ok(())
        } else {
            Err(format!("{bits:x?} has more than {} units", self.thin.units()))
        }
    }

    fn check_birth(&self, birth: u32) -> Result<(), String> {
        if (1..=self.generation).contains(&birth) {
            Ok(())
        } else {
            Err(format!("generation {birth} has not begun: {} is now", self.generation))
        }
    }

    /// A record makes at most two new chunks, with all their partials, and one partial more.
    fn check_arenas(&self) -> Result<(), String> {
        if self.chunks.has_room(2, 2 * CHUNK_ENTRIES + 1) {
            Ok(())
        } else {
            Err("there are as many chunks or partials as there can be".to_owned())
        }
    }

    /// The first index from here on that is mapped.
    fn first_mapped(&self, volume: u32, indices: u64) -> Option<u64> {
        let v = &self.volumes[&volume];
        let begin = usize::try_from(indices / CHUNK_ENTRIES as u64).expect("indices are u32");
        let places = (begin..v.dirs.len() * DIR_POINTERS).map(|at| (at, self.chunk_at(volume, at)));
        for (at, chunk) in places.filter(|(_, chunk)| *chunk != 0) {
            let first = (at * CHUNK_ENTRIES) as u64;
            let mut entries = (first..).zip(self.table.entries(chunk));
            let found = entries.find(|(index, entry)| *index >= indices && entry.is_mapped());
            if let Some((index, _)) = found {
                return Some(index);
            }
        }
        None
    }
}
