//! The end of loading: volumes are made of what was read, and what belongs to more than one page is checked.

use super::entry::{Entry, GENERATIONS};
use super::load::Loader;
use super::metadata::Metadata;
use super::table::split;
use super::volume::{Volume, VolumeParts, dirs_for};
use crate::format::{DIR_POINTERS, NONE, VolumeRecord, is_name};

impl Loader {
    /// All pages were given.
    ///
    /// # Errors
    /// What does not go together.
    pub fn finish(mut self) -> Result<Metadata, String> {
        if self.is_incomplete() {
            return Err("not all pages of the checkpoint were given".to_owned());
        }
        let count = self.records.len();
        if u32::try_from(count) != Ok(self.root.volume_count) {
            return Err(format!("the root says {} volumes, the list has {count}", self.root.volume_count));
        }
        if self.root.extents > self.metadata.thin.extents || self.root.extents == NONE {
            return Err(format!("the root says {} extents, the pool has fewer", self.root.extents));
        }
        if !(1..GENERATIONS).contains(&self.root.generation) {
            return Err(format!("the root says generation {}", self.root.generation));
        }
        let records = std::mem::take(&mut self.records);
        let dirs_of = std::mem::take(&mut self.dirs_of);
        for (record, dirs) in records.into_iter().zip(dirs_of) {
            self.add(record, dirs)?;
        }
        let mut metadata = self.metadata;
        metadata.generation = self.root.generation;
        metadata.next_volume = self.root.next_volume;
        metadata.root_number = self.root.number;
        metadata.check_exclusive_extents(&self.births)?;
        metadata.extents.find_free();
        Ok(metadata)
    }

    fn add(&mut self, record: VolumeRecord, mut dirs: Vec<u32>) -> Result<(), String> {
        let VolumeRecord { id, uuid, name, size_bytes, shared_generation, is_snapshot, origin, .. } = record;
        let fault = |what: &str| Err(format!("volume {id} ({name}): {what}"));
        let m = &mut self.metadata;
        if id >= self.root.next_volume || m.volumes.contains_key(&id) {
            return fault("its id is another's, or was never given");
        }
        if !is_name(&name) || m.names.contains_key(&name) {
            return fault("its name is another's, or none");
        }
        if shared_generation >= self.root.generation {
            return fault("it was shared in a generation that has not ended");
        }
        let indices = m.thin.indices(size_bytes).map_err(|what| format!("volume {id}: {what}"))?;
        let needed = dirs_for(indices);
        if dirs.len() > needed {
            return fault("it maps more than its size");
        }
        dirs.resize(needed, 0);
        let mut chunks = Vec::with_capacity(needed * DIR_POINTERS);
        let mut mapped = 0;
        for &dir in &dirs {
            let dir = m.dirs.get(dir);
            for &chunk in dir.ids.iter() {
                chunks.push(chunk);
                let state = m.chunks.get(chunk);
                mapped += u64::from(state.mapped);
                let is_shared = is_snapshot || dir.refs > 1 || state.refs > 1;
                if is_shared && self.births[chunk as usize] > shared_generation {
                    return fault("it shares what was born after it was shared");
                }
            }
        }
        let (end_at, end_slot) = split(u32::try_from(indices - 1).expect("indices are u32"));
        let beyond = |chunk: u32| m.table.entries(chunk).skip(end_slot + 1).any(Entry::is_mapped);
        if chunks[end_at + 1..].iter().any(|chunk| *chunk != 0) || beyond(chunks[end_at]) {
            return fault("it maps more than its size");
        }
        let name_of = name.clone();
        let parts =
            VolumeParts { name, uuid, is_snapshot, origin, size_bytes, shared_generation, mapped, dirs };
        m.names.insert(name_of, id);
        m.volumes.insert(id, Volume::new(parts, &chunks));
        Ok(())
    }
}

impl Metadata {
    /// What a volume would write in place is referred to once.
    fn check_exclusive_extents(&self, births: &[u32]) -> Result<(), String> {
        for volume in self.volumes.values().filter(|volume| !volume.is_snapshot) {
            let chunks = volume.dirs.iter().flat_map(|dir| self.dirs.get(*dir).ids.iter());
            for &chunk in chunks.filter(|chunk| births[**chunk as usize] > volume.shared_generation) {
                let own = self.table.entries(chunk).filter(|entry| entry.birth() > volume.shared_generation);
                for entry in own {
                    let extent =
                        if entry.is_partial() { self.table.partial(entry.low()).extent } else { entry.low() };
                    if self.extents.refs(extent) != 1 {
                        return Err(format!("extent {extent} is {}'s own and yet another's", volume.name));
                    }
                }
            }
        }
        Ok(())
    }
}
