//! Dirs: 512 chunks of a volume each, shared between volumes as chunks are. A snapshot of 64 TiB shares 293 of them.
//!
//! The ids are behind an `Arc`: a checkpoint holds on to what they were, and changing them copies 2 KiB if it does.

use crate::format::{DIR_POINTERS, PagePtr};
use std::sync::Arc;

/// The ids of the chunks of a dir; 0: no chunk.
pub(super) type Ids = Arc<[u32; DIR_POINTERS]>;

/// A dir.
pub(super) struct Dir {
    /// How many volumes have it.
    pub(super) refs: u32,
    /// How many chunks it has.
    pub(super) used: u16,
    /// It, or a chunk of it, has changed since the last checkpoint was begun.
    pub(super) is_dirty: bool,
    /// Where it is on disk.
    pub(super) stored: PagePtr,
    pub(super) ids: Ids,
}

/// All dirs. Id 0: none.
pub(super) struct Dirs {
    all: Vec<Dir>,
    free: Vec<u32>,
    dirty: Vec<u32>,
    live: u32,
    none: Ids,
}

impl Dirs {
    pub(super) fn new() -> Dirs {
        let none = Arc::new([0; DIR_POINTERS]);
        let first = Dir { refs: 0, used: 0, is_dirty: false, stored: PagePtr::NONE, ids: Arc::clone(&none) };
        Dirs { all: vec![first], free: Vec::new(), dirty: Vec::new(), live: 0, none }
    }

    pub(super) fn get(&self, id: u32) -> &Dir {
        &self.all[id as usize]
    }

    pub(super) fn get_mut(&mut self, id: u32) -> &mut Dir {
        &mut self.all[id as usize]
    }

    /// How many are referred to.
    pub(super) fn live(&self) -> u32 {
        self.live
    }

    /// All ids that were ever used.
    pub(super) fn ids(&self) -> std::ops::Range<u32> {
        1..u32::try_from(self.all.len()).expect("ids are u32")
    }

    /// A dir with one reference and no chunk.
    pub(super) fn allocate(&mut self) -> u32 {
        let dir =
            Dir { refs: 1, used: 0, is_dirty: false, stored: PagePtr::NONE, ids: Arc::clone(&self.none) };
        self.live += 1;
        if let Some(id) = self.free.pop() {
            *self.get_mut(id) = dir;
            return id;
        }
        self.all.push(dir);
        u32::try_from(self.all.len() - 1).expect("fewer dirs than chunks and volumes")
    }

    pub(super) fn set_chunk(&mut self, id: u32, at: usize, chunk: u32) {
        let dir = &mut self.all[id as usize];
        let place = &mut Arc::make_mut(&mut dir.ids)[at];
        dir.used = dir.used + u16::from(chunk != 0) - u16::from(*place != 0);
        *place = chunk;
    }

    pub(super) fn mark_dirty(&mut self, id: u32) {
        let dir = &mut self.all[id as usize];
        if !dir.is_dirty {
            dir.is_dirty = true;
            self.dirty.push(id);
        }
    }

    /// Those that changed, as they are now. They count as clean from now on.
    pub(super) fn take_dirty(&mut self, everything: bool) -> Vec<(u32, Ids)> {
        let candidates = if everything { self.ids().collect() } else { std::mem::take(&mut self.dirty) };
        let mut taken = Vec::with_capacity(candidates.len());
        for id in candidates {
            let dir = self.get_mut(id);
            if dir.refs > 0 && (dir.is_dirty || everything) {
                dir.is_dirty = false;
                taken.push((id, Arc::clone(&dir.ids)));
            }
        }
        self.dirty.clear();
        taken
    }

    /// Its last reference is gone.
    pub(super) fn retire(&mut self, id: u32) {
        let dir = self.get_mut(id);
        assert!(dir.refs == 0, "dir {id} is in use");
        dir.is_dirty = false;
        self.live -= 1;
    }

    /// A retired one may be another from now on.
    pub(super) fn recycle(&mut self, id: u32) {
        let none = Arc::clone(&self.none);
        let dir = self.get_mut(id);
        dir.ids = none;
        dir.stored = PagePtr::NONE;
        self.free.push(id);
    }
}
