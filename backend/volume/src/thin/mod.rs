//! Thin volumes: which extent of the pool holds which part of which volume.
//!
//! Owns: the [`Table`], which every reactor reads without a lock; the [`Metadata`], the one that changes it, record by record;
//! reference counts, free extents, free metadata pages; what a checkpoint consists of and how one is loaded. Must not know:
//! members, levels, the log, when something becomes durable. No I/O here: pages and records come in and go out as values.
//!
//! ```text
//!  volume ──► VolumeMap ──► chunk (448 entries) ──► Entry: nothing                    zeroes
//!                │             shared by snapshots         full, extent, birth
//!                │             until one changes it        partial, id, birth ──► Partial: extent, bits, fallback
//!                │                                                                bit set: the extent
//!                └ owner's side: dir (512 chunks), shared likewise                bit clear: the fallback, else zeroes
//! ```
//!
//! Invariants:
//! - A chunk or dir with more than one reference is never changed; it is copied first.
//! - An extent's references are the entries of live chunks that name it (through a partial or not), and the partials that have
//!   it as fallback. Without one it is free, reserved (allocated, not yet mapped), or freed and not yet recycled.
//! - An entry born after its volume's last snapshot holds an extent that nobody else refers to.
//! - What lost its last reference is not used again before [`Metadata::recycle`]: readers may still be looking at it.
//! - Reference counts and free maps are never stored; loading finds them again.
//! - The same records applied to the same checkpoint give the same mapping, whatever was released when.

mod apply;
mod bitmap;
mod change;
mod checkpoint;
mod chunks;
mod dirs;
mod entry;
mod extents;
mod finish;
mod load;
mod metadata;
mod pages;
mod release;
mod table;
#[cfg(test)]
mod tests;
mod verify;
mod volume;

pub use entry::{Bits, Entry, Mapped};
pub use load::Loader;
pub use metadata::{Metadata, Thin};
pub use release::Freed;
pub use table::{PartialView, Table, VolumeMap};
pub use volume::Volume;
