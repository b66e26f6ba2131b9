//! The pool's extents: how often each is referred to, and which are free.
//!
//! ```text
//!            allocate              Map                last reference gone         recycle
//!   free ─────────────► reserved ──────► referenced ──────────────────► freed ───────────► free
//!     ▲                    │                  ▲                            │
//!     └──── give back ─────┘                  └───────── take back ────────┘
//! ```
//!
//! Every extent is in exactly one of the four states.

use super::bitmap::Bitmap;
use std::collections::BTreeMap;

/// So many references, or more: the number is in `many`. Two bytes per extent suffice for nearly all.
const MANY: u16 = u16::MAX;

/// The extents.
pub(super) struct Extents {
    refs: Vec<u16>,
    many: BTreeMap<u32, u32>,
    free: Bitmap,
    reserved: Bitmap,
    /// Without a reference, and neither free nor reserved.
    freed: u32,
    cursor: u32,
}

impl Extents {
    /// So many extents, all unreferred to, none free: see [`Extents::find_free`].
    pub(super) fn new(extents: u32) -> Extents {
        Extents {
            refs: vec![0; extents as usize],
            many: BTreeMap::new(),
            free: Bitmap::new(extents),
            reserved: Bitmap::new(extents),
            freed: 0,
            cursor: 0,
        }
    }

    /// What nobody refers to is free.
    pub(super) fn find_free(&mut self) {
        for (extent, _) in (0..).zip(&self.refs).filter(|(_, refs)| **refs == 0) {
            self.free.insert(extent);
        }
    }

    pub(super) fn count(&self) -> u32 {
        u32::try_from(self.refs.len()).expect("extents are numbered by u32")
    }

    pub(super) fn grow(&mut self, extents: u32) {
        let before = self.count();
        self.refs.resize(extents as usize, 0);
        self.free.grow(extents);
        self.reserved.grow(extents);
        for extent in before..extents {
            self.free.insert(extent);
        }
    }

    pub(super) fn refs(&self, extent: u32) -> u32 {
        match self.refs[extent as usize] {
            MANY => self.many[&extent],
            few => u32::from(few),
        }
    }

    /// One more reference. The first takes it out of the free or reserved ones.
    pub(super) fn refer(&mut self, extent: u32) {
        let few = &mut self.refs[extent as usize];
        if *few == MANY {
            *self.many.get_mut(&extent).expect("counted in `many`") += 1;
            return;
        }
        *few += 1;
        if *few == MANY {
            self.many.insert(extent, u32::from(MANY));
        } else if *few == 1 && !self.free.remove(extent) {
            self.reserved.remove(extent);
        }
    }

    /// One less; true if it was the last: it is freed.
    pub(super) fn let_go(&mut self, extent: u32) -> bool {
        let few = &mut self.refs[extent as usize];
        if *few == MANY {
            let many = self.many.get_mut(&extent).expect("counted in `many`");
            *many -= 1;
            if *many < u32::from(MANY) {
                self.many.remove(&extent);
                *few = MANY - 1;
            }
            return false;
        }
        assert!(*few > 0, "extent {extent} is let go once too often");
        *few -= 1;
        let is_last = *few == 0;
        self.freed += u32::from(is_last);
        is_last
    }

    /// One more reference to one that has some, or that is freed; true if it was freed.
    pub(super) fn take_back(&mut self, extent: u32) -> bool {
        let is_freed = self.refs(extent) == 0;
        assert!(!is_freed || !self.is_available(extent), "extent {extent} may be somebody else's by now");
        self.freed -= u32::from(is_freed);
        self.refer(extent);
        is_freed
    }

    /// It may be mapped: free, or reserved.
    pub(super) fn is_available(&self, extent: u32) -> bool {
        self.free.contains(extent) || self.reserved.contains(extent)
    }

    /// The next free one behind the last that was given.
    pub(super) fn allocate(&mut self) -> Option<u32> {
        let extent = self.free.next_around(self.cursor)?;
        self.free.remove(extent);
        self.reserved.insert(extent);
        self.cursor = extent + 1;
        Some(extent)
    }

    pub(super) fn give_back(&mut self, extent: u32) {
        assert!(self.reserved.remove(extent), "extent {extent} was not reserved");
        self.free.insert(extent);
    }

    pub(super) fn recycle(&mut self, extent: u32) {
        assert!(self.refs[extent as usize] == 0 && self.free.insert(extent), "extent {extent} is in use");
        self.freed -= 1;
    }

    pub(super) fn free(&self) -> u32 {
        self.free.len()
    }

    pub(super) fn reserved(&self) -> u32 {
        self.reserved.len()
    }

    pub(super) fn freed(&self) -> u32 {
        self.freed
    }

    pub(super) fn is_free(&self, extent: u32) -> bool {
        self.free.contains(extent)
    }

    pub(super) fn is_reserved(&self, extent: u32) -> bool {
        self.reserved.contains(extent)
    }
}
