//! The pages of the metadata area: which are in use.
//!
//! Between checkpoints those in use are exactly the pages of the last durable tree. A checkpoint takes new ones, and when its
//! root is durable those that only the old tree had are free.

use super::bitmap::Bitmap;

/// The first pages are the roots'.
pub(super) const ROOT_PAGES: u32 = 2;

/// The page allocator.
pub(super) struct Pages {
    free: Bitmap,
    count: u32,
    cursor: u32,
}

impl Pages {
    pub(super) fn new(count: u32) -> Pages {
        let mut free = Bitmap::new(count);
        for page in ROOT_PAGES..count {
            free.insert(page);
        }
        Pages { free, count, cursor: ROOT_PAGES }
    }

    pub(super) fn count(&self) -> u32 {
        self.count
    }

    /// In use, the roots' included.
    #[cfg(test)]
    pub(super) fn used(&self) -> u32 {
        self.count - self.free.len()
    }

    pub(super) fn is_free(&self, page: u32) -> bool {
        self.free.contains(page)
    }

    pub(super) fn allocate(&mut self) -> Option<u32> {
        let page = self.free.next_around(self.cursor)?;
        self.free.remove(page);
        self.cursor = page + 1;
        Some(page)
    }

    /// Takes this one, while loading; false if it is taken or not there.
    pub(super) fn take(&mut self, page: u32) -> bool {
        self.free.remove(page)
    }

    pub(super) fn release(&mut self, page: u32) {
        assert!(page >= ROOT_PAGES && self.free.insert(page), "page {page} is free already");
    }
}
