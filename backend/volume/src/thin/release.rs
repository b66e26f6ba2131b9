//! Letting go: what lost its last reference waits in [`Freed`] until readers and the log are done with it.

use super::metadata::Metadata;

/// Extents, chunks and partials that nobody refers to any more, and that readers may still look at.
#[derive(Debug, Default)]
#[must_use = "what is not recycled is never used again"]
pub struct Freed {
    pub(super) extents: Vec<u32>,
    pub(super) chunks: Vec<u32>,
    pub(super) partials: Vec<u32>,
}

impl Freed {
    /// Nothing is in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.extents.is_empty() && self.chunks.is_empty() && self.partials.is_empty()
    }

    /// The extents: what may be told to the members as not needed.
    #[must_use]
    pub fn extents(&self) -> &[u32] {
        &self.extents
    }

    /// It has a reference again; whether it was in here.
    pub(crate) fn takes_back(&mut self, extent: u32) -> bool {
        let before = self.extents.len();
        self.extents.retain(|other| *other != extent);
        self.extents.len() < before
    }

    /// Both.
    pub fn merge(&mut self, mut other: Freed) {
        self.extents.append(&mut other.extents);
        self.chunks.append(&mut other.chunks);
        self.partials.append(&mut other.partials);
    }
}

impl Metadata {
    /// What lost its last reference since the last call.
    pub fn take_freed(&mut self) -> Freed {
        std::mem::take(&mut self.freed)
    }

    /// No reader can know these any more, and the records that freed them are durable: they may be used again.
    pub fn recycle(&mut self, freed: Freed) {
        for &extent in &freed.extents {
            self.extents.recycle(extent);
        }
        match &mut self.checkpoint {
            // It may have yet to write what they were.
            Some(checkpoint) => checkpoint.recycled.merge(Freed { extents: Vec::new(), ..freed }),
            None => self.chunks.recycle(&freed.chunks, &freed.partials),
        }
    }

    /// Lets go of what deleted volumes (and large unmapped ranges) held, at most so many chunks; true while there is more.
    pub fn release_some(&mut self, chunks_max: usize) -> bool {
        for _ in 0..chunks_max {
            match self.doomed.pop() {
                Some(chunk) => self.release_chunk(chunk),
                None => break,
            }
        }
        !self.doomed.is_empty()
    }

    /// There is something for [`Metadata::release_some`].
    #[must_use]
    pub fn has_more_to_release(&self) -> bool {
        !self.doomed.is_empty()
    }

    /// Lets go of everything and recycles it at once: for replay, after each record, when there are no readers and what is
    /// replayed is durable.
    pub fn settle(&mut self) {
        loop {
            let has_more = self.release_some(1024);
            let freed = self.take_freed();
            self.recycle(freed);
            if !has_more {
                return;
            }
        }
    }

    /// Before a snapshot: readers find nothing of these volumes exclusive, so that what they begin from now on takes the slow way
    /// to the owner, which can wait. The `Snapshot` makes it so; without one, `false` takes it back.
    pub fn hold_writes(&mut self, volume: u32, hold: bool) {
        let generation = self.generation;
        if let Some(v) = self.volumes.get_mut(&volume) {
            let shown = if hold { generation } else { v.shared_generation };
            v.show_shared_generation(shown);
        }
    }
}
