//! What people ask for: volumes, snapshots, clones.

use super::Owner;
use crate::format::{self, NAME_BYTES_MAX, NewSnapshot, Record, Uuid};
use crate::pool::PoolError;
use crate::pool::shared::{Unflushed, VolumeShared, lock};
use crate::simulated::is_broken;
use crate::thin::Metadata;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// Tables that readers hold as arrays: volumes of a pool at most.
const VOLUMES_MAX: usize = 4096;
/// An entry has 28 bits for it.
const GENERATION_MAX: u32 = (1 << 28) - 2;

impl Owner {
    /// Volumes that are in the tables and not yet seen by others, and those that have grown.
    pub(crate) fn show_volumes(&self) {
        let meta = self.meta.borrow();
        let mut shown = lock(&self.shared.volumes);
        for (id, volume) in meta.volumes() {
            let map = Arc::clone(volume.map());
            if let Some(before) = shown.get(&id) {
                *lock(&before.map) = map;
                continue;
            }
            let volume = VolumeShared {
                id,
                name: volume.name().to_owned(),
                uuid: volume.uuid(),
                is_snapshot: volume.is_snapshot(),
                map: Mutex::new(map),
                slow: [const { AtomicU64::new(0) }; super::super::shared::Class::ALL.len()],
                copied_bytes: AtomicU64::new(0),
                losses: AtomicU64::new(0),
                told_losses: AtomicU64::new(0),
                unflushed: Unflushed::default(),
                users: AtomicUsize::new(0),
                stats: Arc::default(),
                listeners: Mutex::default(),
            };
            shown.insert(id, Arc::new(volume));
        }
        shown.retain(|id, _| meta.volume(*id).is_some());
        drop(shown);
        self.shared.version.fetch_add(1, Ordering::Release);
    }

    fn check_change(&self) -> Result<(), PoolError> {
        self.check_writable().map_err(|status| self.failed("cannot be changed", status))
    }

    /// Room for a change, and everything made durable when it was made.
    async fn change(
        self: &Rc<Self>,
        what: &str,
        record: impl FnOnce() -> Result<Record, PoolError>,
    ) -> Result<(), PoolError> {
        self.check_change()?;
        self.room().await.map_err(|status| self.failed(what, status))?;
        let record = record()?;
        self.make(&record);
        self.show_volumes();
        self.flush().await.map_err(|status| self.failed(what, status))?;
        self.publish();
        Ok(())
    }

    fn find(&self, name: &str) -> Result<u32, PoolError> {
        self.meta
            .borrow()
            .volume_named(name)
            .ok_or_else(|| PoolError::Unknown(format!("volume {}/{name} is not there", self.shared.name)))
    }

    fn check_new_name(&self, name: &str, meta: &Metadata) -> Result<(), PoolError> {
        if !format::is_name(name) {
            return Err(PoolError::Wrong(format!(
                "{name:?} is no name for a volume, want letters, digits, '-', '_', '.', at most {NAME_BYTES_MAX}"
            )));
        }
        if meta.volume_named(name).is_some() {
            return Err(PoolError::Conflict(format!(
                "volume {}/{name} is there, want another name",
                self.shared.name
            )));
        }
        if meta.volumes().count() >= VOLUMES_MAX {
            return Err(PoolError::Conflict(format!(
                "pool {} has {VOLUMES_MAX} volumes, the most",
                self.shared.name
            )));
        }
        Ok(())
    }

    fn check_size(&self, name: &str, size_bytes: u64) -> Result<(), PoolError> {
        let block_bytes = u64::from(self.book.borrow().block_bytes);
        let most = (u64::from(u32::MAX) / 2)
            .saturating_mul(self.view().thin.extent_bytes)
            .min(format::record::VOLUME_BYTES_MAX);
        if size_bytes == 0 || !size_bytes.is_multiple_of(block_bytes) || size_bytes > most {
            return Err(PoolError::Wrong(format!(
                "volume {}/{name}: a size of {size_bytes} bytes cannot be, want a multiple of {block_bytes} from {block_bytes} to {most}",
                self.shared.name
            )));
        }
        Ok(())
    }

    fn uuid(&self) -> Uuid {
        let mut uuid = [0; 16];
        uuid[..8].copy_from_slice(&self.runtime.random().to_le_bytes());
        uuid[8..].copy_from_slice(&self.runtime.random().to_le_bytes());
        // Version 4.
        uuid[6] = uuid[6] & 0x0f | 0x40;
        uuid[8] = uuid[8] & 0x3f | 0x80;
        uuid
    }

    /// Births are told apart by numbers, of which there are many and not endless ones.
    fn check_generation(&self, meta: &Metadata) -> Result<(), PoolError> {
        match meta.generation() < GENERATION_MAX {
            true => Ok(()),
            false => Err(PoolError::Conflict(format!(
                "pool {} has had {GENERATION_MAX} snapshots, the most",
                self.shared.name
            ))),
        }
    }

    fn no_room(&self) -> PoolError {
        PoolError::Failed(format!("pool {}: its room for metadata is used up", self.shared.name))
    }

    pub(crate) async fn create_volume(
        self: Rc<Self>,
        name: String,
        size_bytes: u64,
    ) -> Result<(), PoolError> {
        let _turn = self.turns.change.take().await;
        let what = format!("volume {name} cannot be made");
        self.change(&what, || {
            let meta = self.meta.borrow();
            self.check_new_name(&name, &meta)?;
            self.check_size(&name, size_bytes)?;
            if !meta.has_room_for_metadata(1) {
                return Err(self.no_room());
            }
            Ok(Record::CreateVolume {
                id: meta.next_volume(),
                uuid: self.uuid(),
                name: name.clone(),
                size_bytes,
            })
        })
        .await
    }

    pub(crate) async fn resize_volume(
        self: Rc<Self>,
        name: String,
        size_bytes: u64,
    ) -> Result<(), PoolError> {
        let _turn = self.turns.change.take().await;
        let what = format!("volume {name} cannot be resized");
        let id = self.find(&name)?;
        let shown = lock(&self.shared.volumes).get(&id).cloned();
        self.change(&what, || {
            self.check_size(&name, size_bytes)?;
            let meta = self.meta.borrow();
            let volume =
                meta.volume(id).ok_or_else(|| PoolError::Unknown(format!("volume {name} is gone")))?;
            if volume.is_snapshot() {
                return Err(PoolError::Wrong(format!("{name} is a snapshot, whose size does not change")));
            }
            let before = volume.size_bytes();
            if size_bytes < before {
                let extent_bytes = meta.thin().extent_bytes;
                if shown.as_ref().is_some_and(|shown| shown.users.load(Ordering::Acquire) > 0) {
                    return Err(PoolError::Conflict(format!(
                        "volume {name} is in use, it can only grow now"
                    )));
                }
                let first = u32::try_from(size_bytes / extent_bytes).unwrap_or(u32::MAX);
                let after = |at: Option<u32>| at.and_then(|at| meta.next_mapped(id, at));
                let mapped = std::iter::successors(after(Some(first)), |at| after(at.checked_add(1)));
                if let Some(last) = mapped.last() {
                    let needed = ((u64::from(last) + 1) * extent_bytes).min(before);
                    return Err(PoolError::Conflict(format!(
                        "volume {name} has data up to {needed} bytes, want at least that, or discard it first"
                    )));
                }
            }
            Ok(Record::Resize { id, size_bytes })
        })
        .await?;
        if let Some(shown) = shown {
            shown.tell();
        }
        Ok(())
    }

    /// All at the same instant.
    pub(crate) async fn snapshot(self: Rc<Self>, snapshots: Vec<(String, String)>) -> Result<(), PoolError> {
        let _turn = self.turns.change.take().await;
        self.check_change()?;
        if snapshots.is_empty() {
            return Err(PoolError::Wrong("a snapshot of nothing, want at least one volume".to_owned()));
        }
        let items = self.snapshot_items(&snapshots)?;
        let origins: BTreeSet<u32> = items.iter().map(|item| item.origin).collect();
        // What is to be durable then mostly is, before anybody has to wait for it.
        let _ = self.flush().await;
        // Nobody gets anything mapped any more, and everything mapped goes the slow way, which waits. What is under way ends.
        self.frozen.borrow_mut().extend(&origins);
        self.hold(&origins, true);
        if !is_broken("snapshot_without_barrier") {
            self.barrier().await;
        }
        // What a lost cache may take with it is taken back where it was written, and nowhere else.
        let made = match self.settle_written(|written| origins.contains(&written.volume)).await {
            Ok(()) => self.room().await,
            error => error,
        };
        if made.is_ok() {
            self.make(&Record::Snapshot { items });
            self.show_volumes();
        } else {
            self.hold(&origins, false);
        }
        self.frozen.borrow_mut().retain(|id| !origins.contains(id));
        self.bell.ring();
        let made = match made {
            Ok(()) => self.flush().await,
            error => error,
        };
        self.publish();
        made.map_err(|status| self.failed("no snapshot", status))
    }

    fn hold(&self, volumes: &BTreeSet<u32>, hold: bool) {
        let mut meta = self.meta.borrow_mut();
        volumes.iter().for_each(|volume| meta.hold_writes(*volume, hold));
    }

    fn snapshot_items(&self, snapshots: &[(String, String)]) -> Result<Vec<NewSnapshot>, PoolError> {
        let meta = self.meta.borrow();
        self.check_generation(&meta)?;
        let mut items: Vec<NewSnapshot> = Vec::new();
        for (origin, name) in snapshots {
            let origin = self.find(origin)?;
            self.check_new_name(name, &meta)?;
            if items.iter().any(|item| item.name == *name || item.origin == origin) {
                return Err(PoolError::Wrong(format!("{name}: a volume or a name is given twice")));
            }
            let id = meta.next_volume() + u32::try_from(items.len()).unwrap_or(0);
            items.push(NewSnapshot { origin, id, uuid: self.uuid(), name: name.clone() });
        }
        let records: u32 = 1 + u32::try_from(items.len() / 16).unwrap_or(0);
        if items.len() > 64 {
            return Err(PoolError::Wrong("at most 64 volumes at the same instant".to_owned()));
        }
        if !meta.has_room_for_metadata(records) {
            return Err(self.no_room());
        }
        Ok(items)
    }

    pub(crate) async fn clone_volume(
        self: Rc<Self>,
        snapshot: String,
        name: String,
    ) -> Result<(), PoolError> {
        let _turn = self.turns.change.take().await;
        let what = format!("volume {name} cannot be made");
        self.change(&what, || {
            let from = self.find(&snapshot)?;
            let meta = self.meta.borrow();
            self.check_generation(&meta)?;
            self.check_new_name(&name, &meta)?;
            if !meta.volume(from).is_some_and(|volume| volume.is_snapshot()) {
                return Err(PoolError::Wrong(format!(
                    "{snapshot} is no snapshot, want one: hawser volume snapshot {}/{snapshot} NAME",
                    self.shared.name
                )));
            }
            if !meta.has_room_for_metadata(1) {
                return Err(self.no_room());
            }
            Ok(Record::Clone {
                snapshot: from,
                id: meta.next_volume(),
                uuid: self.uuid(),
                name: name.clone(),
            })
        })
        .await
    }

    pub(crate) async fn delete_volume(self: Rc<Self>, name: String) -> Result<(), PoolError> {
        let _turn = self.turns.change.take().await;
        let id = self.find(&name)?;
        let shown = lock(&self.shared.volumes).get(&id).cloned();
        let what = format!("volume {name} cannot be deleted");
        let done = self
            .change(&what, || {
                if let Some(shown) = &shown {
                    if shown.users.load(Ordering::SeqCst) > 0 {
                        return Err(PoolError::Conflict(format!(
                            "volume {}/{name} is in use",
                            self.shared.name
                        )));
                    }
                    // Who opens it from now on finds nothing; who has just looked ends before anything of it is used again.
                    shown.map().forget();
                }
                Ok(Record::Delete { id })
            })
            .await;
        if self.meta.borrow().volume(id).is_some() {
            return done;
        }
        let owner = Rc::clone(&self);
        // Its extents come back by and by.
        self.runtime.spawn(async move {
            let _ = owner.reclaim().await;
            owner.publish();
        });
        done
    }

    /// A pool that has more room than its tables know: it grew, and the record of it was lost.
    pub(crate) async fn use_all_extents(self: &Rc<Self>) -> Result<(), PoolError> {
        let extents = self.view().array.extents();
        if self.meta.borrow().thin().extents < extents {
            self.change("cannot grow", || Ok(Record::Grow { extents })).await?;
        }
        Ok(())
    }
}
