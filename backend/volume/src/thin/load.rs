//! Loading a checkpoint: says which pages it wants, is given them, and in the end is a [`Metadata`].
//!
//! ```text
//!   wanted() ─► pages ─► (read, from whichever member) ─► give() ─► wanted() … ─► empty ─► finish()
//! ```
//!
//! A page is identified by its number: the same pointer in two dirs, or two volumes, is the same chunk or dir, shared.
//! Entries go straight into the table; nothing is allocated per entry. Must not know: where pages are, the log.
//!
//! Invariants:
//! - Every page has one role, at one place of the address space.
//! - No content is believed: the CRC says that a page is what was written, the checks say that it made sense.

use super::chunks::Stored;
use super::entry::{Entry, NO_BITS, is_within};
use super::metadata::{Metadata, Thin};
use super::table::PartialView;
use crate::format::{
    CHUNK_ENTRIES, ChunkPage, DIR_POINTERS, FormatError, NONE, PARTIALS_PER_PAGE, PagePtr, Root,
    VolumeRecord, VolumesDecoder, crc_of, decode_dir, decode_partials,
};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

/// What a page is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    List,
    Dir(u32),
    Chunk(u32),
    Partials { chunk: u32, records: u16 },
}

/// The roles of the pages seen so far, in 4 bytes each.
struct Roles(Vec<u32>);

const IS_DIR: u32 = 1 << 31;
const IS_OTHER: u32 = u32::MAX;

impl Roles {
    /// The dir or chunk that this page was before.
    fn known(&self, page: u32) -> Option<Role> {
        match *self.0.get(page as usize)? {
            0 => None,
            IS_OTHER => Some(Role::List),
            dir if dir & IS_DIR != 0 => Some(Role::Dir(dir & !IS_DIR)),
            chunk => Some(Role::Chunk(chunk)),
        }
    }

    fn set(&mut self, page: u32, role: Role) {
        self.0[page as usize] = match role {
            Role::Dir(id) => id | IS_DIR,
            Role::Chunk(id) => id,
            _ => IS_OTHER,
        };
    }
}

/// A checkpoint that is being loaded.
pub struct Loader {
    pub(super) metadata: Metadata,
    pub(super) root: Root,
    list: Option<VolumesDecoder>,
    is_list_wanted: bool,
    pub(super) records: Vec<VolumeRecord>,
    /// The dirs of each record, as ids.
    pub(super) dirs_of: Vec<Vec<u32>>,
    roles: Roles,
    /// At which place of a volume a dir or chunk is, by id.
    dir_places: Vec<usize>,
    chunk_places: Vec<usize>,
    /// The latest birth in a chunk, by id.
    pub(super) births: Vec<u32>,
    queue: VecDeque<(PagePtr, Role)>,
    outstanding: BTreeMap<u32, (u32, Role)>,
    /// Partials whose records have not come.
    partials_missing: u64,
}

impl Loader {
    /// Of the checkpoint that this root is the root of.
    #[must_use]
    pub fn new(thin: Thin, metadata_pages: u32, root: &Root) -> Loader {
        let extents = root.extents.min(thin.extents);
        Loader {
            metadata: Metadata::unloaded(Thin { extents, ..thin }, metadata_pages),
            root: root.clone(),
            list: Some(VolumesDecoder::new(root.volumes)).filter(|list| list.wanted().is_some()),
            is_list_wanted: false,
            records: Vec::new(),
            dirs_of: Vec::new(),
            roles: Roles(vec![0; metadata_pages as usize]),
            dir_places: vec![0],
            chunk_places: vec![0],
            births: vec![0],
            queue: VecDeque::new(),
            outstanding: BTreeMap::new(),
            partials_missing: 0,
        }
    }

    /// The next pages to read, at most so many. Empty when all that were handed out were given: done.
    pub fn wanted(&mut self, max: usize) -> Vec<u32> {
        if let Some(list) = &self.list {
            let is_new = !std::mem::replace(&mut self.is_list_wanted, true);
            return list.wanted().filter(|_| is_new && max > 0).into_iter().collect();
        }
        let next = self.queue.drain(..max.min(self.queue.len()));
        let mut pages = Vec::with_capacity(next.len());
        for (ptr, role) in next {
            self.outstanding.insert(ptr.page, (ptr.crc, role));
            pages.push(ptr.page);
        }
        pages
    }

    /// The content of a page that was wanted.
    ///
    /// # Errors
    /// What is wrong with it, and with which page. It is still wanted: another member's copy may be given.
    pub fn give(&mut self, page: u32, bytes: &[u8]) -> Result<(), String> {
        self.take(page, bytes).map_err(|FormatError(what)| format!("metadata page {page}: {what}"))
    }

    fn take(&mut self, page: u32, bytes: &[u8]) -> Result<(), FormatError> {
        if self.list.is_some() {
            return self.take_list(page, bytes);
        }
        let (crc, role) = *self.outstanding.get(&page).ok_or_else(|| wrong("was not asked for"))?;
        if bytes.len() != crate::format::PAGE_BYTES || crc_of(bytes) != crc {
            return Err(wrong("is not what its pointer says (CRC)"));
        }
        match role {
            Role::List => return Err(wrong("is no page of the tree")),
            Role::Dir(id) => self.take_dir(id, bytes)?,
            Role::Chunk(id) => self.take_chunk(id, bytes)?,
            Role::Partials { chunk, records } => self.take_partials(chunk, records, bytes)?,
        }
        self.outstanding.remove(&page);
        Ok(())
    }

    fn take_list(&mut self, page: u32, bytes: &[u8]) -> Result<(), FormatError> {
        let list = self.list.as_mut().expect("checked");
        if list.wanted() != Some(page) {
            return Err(wrong("was not asked for"));
        }
        if !self.metadata.pages.is_free(page) {
            return Err(wrong("is in the volume list twice, or outside the metadata area"));
        }
        list.give(bytes)?;
        self.metadata.pages.take(page);
        self.roles.set(page, Role::List);
        self.is_list_wanted = false;
        if list.wanted().is_some() {
            return Ok(());
        }
        let list = self.list.take().expect("checked");
        self.metadata.list_pages = list.pages().to_vec();
        self.records = list.finish()?;
        for at in 0..self.records.len() {
            let ptrs = std::mem::take(&mut self.records[at].dirs);
            let dirs = ptrs.into_iter().enumerate().map(|(place, ptr)| self.dir(place, ptr));
            let dirs = dirs.collect::<Result<Vec<u32>, FormatError>>()?;
            self.dirs_of.push(dirs);
        }
        Ok(())
    }

    /// The dir that a volume has at this place.
    fn dir(&mut self, place: usize, ptr: PagePtr) -> Result<u32, FormatError> {
        if ptr.is_none() {
            return Ok(0);
        }
        match self.roles.known(ptr.page) {
            Some(Role::Dir(id)) if self.dir_places[id as usize] == place => {
                let dir = self.metadata.dirs.get_mut(id);
                if dir.stored != ptr {
                    return Err(wrong(&format!("names dir page {} with two CRCs", ptr.page)));
                }
                dir.refs += 1;
                Ok(id)
            }
            Some(_) => Err(wrong(&format!("names page {} as a dir, which is something else", ptr.page))),
            None => {
                let id = self.metadata.dirs.allocate();
                self.metadata.dirs.get_mut(id).stored = ptr;
                self.dir_places.push(place);
                self.want(ptr, Role::Dir(id))?;
                Ok(id)
            }
        }
    }

    fn take_dir(&mut self, id: u32, bytes: &[u8]) -> Result<(), FormatError> {
        for (at, ptr) in decode_dir(bytes)?.into_iter().enumerate().filter(|(_, ptr)| !ptr.is_none()) {
            let chunk = self.chunk(self.dir_places[id as usize] * DIR_POINTERS + at, ptr)?;
            self.metadata.dirs.set_chunk(id, at, chunk);
        }
        Ok(())
    }

    /// The chunk that a dir has at this place.
    fn chunk(&mut self, place: usize, ptr: PagePtr) -> Result<u32, FormatError> {
        match self.roles.known(ptr.page) {
            Some(Role::Chunk(id)) if self.chunk_places[id as usize] == place => {
                let chunk = self.metadata.chunks.get_mut(id);
                if chunk.stored.chunk != ptr {
                    return Err(wrong(&format!("names chunk page {} with two CRCs", ptr.page)));
                }
                chunk.refs += 1;
                Ok(id)
            }
            Some(_) => Err(wrong(&format!("names page {} as a chunk, which is something else", ptr.page))),
            None => {
                if !self.metadata.chunks.has_room(1, 0) {
                    return Err(wrong("names more chunks than there can be"));
                }
                let id = self.metadata.chunks.allocate();
                self.metadata.chunks.get_mut(id).stored.chunk = ptr;
                self.chunk_places.push(place);
                self.births.push(0);
                self.want(ptr, Role::Chunk(id))?;
                Ok(id)
            }
        }
    }

    fn want(&mut self, ptr: PagePtr, role: Role) -> Result<(), FormatError> {
        if !self.metadata.pages.take(ptr.page) {
            return Err(wrong(&format!(
                "names page {}, which is taken or outside the metadata area",
                ptr.page
            )));
        }
        self.roles.set(ptr.page, role);
        // Partials before more chunks: what waits stays little.
        match role {
            Role::Partials { .. } => self.queue.push_front((ptr, role)),
            _ => self.queue.push_back((ptr, role)),
        }
        Ok(())
    }

    fn take_chunk(&mut self, id: u32, bytes: &[u8]) -> Result<(), FormatError> {
        let page = ChunkPage::decode(bytes)?;
        let extents = self.metadata.thin.extents;
        let entries = || page.entries.iter().map(|entry| Entry(*entry));
        for (slot, entry) in entries().enumerate().filter(|(_, entry)| entry.0 != 0) {
            let is_in_range = if entry.is_partial() { entry.low() == 0 } else { entry.low() < extents };
            if !entry.is_sound() || entry.birth() > self.root.generation || !is_in_range {
                return Err(wrong(&format!("entry {slot} is {:#x}", entry.0)));
            }
        }
        let mut partials = entries().filter(|entry| entry.is_partial()).count();
        if !self.metadata.chunks.has_room(0, partials) {
            return Err(wrong("has more partials than there can be"));
        }
        self.partials_missing += partials as u64;
        for ptr in page.partial_pages {
            let records = partials.min(PARTIALS_PER_PAGE);
            partials -= records;
            if ptr.is_none() != (records == 0) {
                return Err(wrong("has partials without pages, or pages without partials"));
            }
            if records > 0 {
                let records = u16::try_from(records).expect("at most a page of them");
                self.want(ptr, Role::Partials { chunk: id, records })?;
            }
        }
        let stored = self.metadata.chunks.get(id).stored;
        self.metadata.chunks.get_mut(id).stored = Stored { partials: page.partial_pages, ..stored };
        for (slot, entry) in entries().enumerate().filter(|(_, entry)| entry.0 != 0) {
            self.births[id as usize] = self.births[id as usize].max(entry.birth());
            let entry = if entry.is_partial() {
                let unknown = PartialView { extent: NONE, fallback: NONE, bits: NO_BITS };
                Entry::partial(self.metadata.chunks.allocate_partial(unknown), entry.birth())
            } else {
                self.metadata.extents.refer(entry.low());
                entry
            };
            self.metadata.chunks.set_entry(id, slot, entry);
        }
        Ok(())
    }

    fn take_partials(&mut self, chunk: u32, count: u16, bytes: &[u8]) -> Result<(), FormatError> {
        let records = decode_partials(bytes)?;
        if records.len() != usize::from(count) {
            return Err(wrong(&format!("has {} partials where {count} belong", records.len())));
        }
        let (table, extents) = (Arc::clone(&self.metadata.table), self.metadata.thin.extents);
        for (at, record) in records.into_iter().enumerate() {
            let slot = usize::from(record.index);
            let entry = if slot < CHUNK_ENTRIES { table.entry(chunk, slot) } else { Entry::EMPTY };
            let (extent, fallback, bits) = (record.extent, record.fallback, record.bits);
            let is_in_range = extent < extents && (fallback == NONE || fallback < extents);
            let has_sound_bits = is_within(bits, self.metadata.full) && bits != self.metadata.full;
            let is_expected = entry.is_partial() && table.partial(entry.low()).extent == NONE;
            if !is_in_range || !has_sound_bits || !is_expected {
                return Err(wrong(&format!("partial {at} makes no sense: {record:?}")));
            }
            self.metadata.extents.refer(extent);
            if fallback != NONE {
                self.metadata.extents.refer(fallback);
            }
            table.set_partial(entry.low(), PartialView { extent, fallback, bits });
            self.partials_missing -= 1;
        }
        Ok(())
    }

    /// Pages were not given, or partials are missing.
    pub(super) fn is_incomplete(&self) -> bool {
        self.list.is_some()
            || !self.queue.is_empty()
            || !self.outstanding.is_empty()
            || self.partials_missing > 0
    }
}

fn wrong(what: &str) -> FormatError {
    FormatError(what.to_owned())
}
