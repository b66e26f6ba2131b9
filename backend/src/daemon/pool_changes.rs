//! Pools and volumes of the running daemon: what is shown, and what can be changed.
//!
//! All of these wait for a pool, and some for targets: never on a reactor, nor with a lock of the daemon's held.

use super::api::pool_view::{
    AddDevices, CreatePool, CreateVolume, MakeClone, PoolView, Replace, Scrub, SetVolume, TakeSnapshots,
    VolumeView,
};
use super::pools::{Lack, Pools, Taken};
use super::{ChangeError, Daemon};
use crate::assemble::pool as assemble;
use crate::assemble::{host, reserve};
use crate::image;
use hawser_block::Device;
use hawser_config::Backing;
use hawser_config::value::{Name, VolumePath};
use hawser_volume::pool::{self, Pool};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

/// A new pool is opened in no time, or something is wrong that its view tells.
const OPEN_MAX: Duration = Duration::from_secs(20);

impl From<Lack> for ChangeError {
    fn from(lack: Lack) -> ChangeError {
        match lack {
            Lack::Unknown(what) => ChangeError::Unknown(what),
            Lack::Conflict(what) => ChangeError::Conflict(what),
        }
    }
}

/// The most that is read of a volume at a time.
const DATA_MAX: u64 = 8 << 20;
/// Whole blocks, of whatever size a pool's are.
const DATA_UNIT: u64 = 4096;

fn name_in(key: &str, text: &str) -> Result<Name, ChangeError> {
    text.parse().map_err(|what: String| ChangeError::Wrong(format!("{key}: {what}")))
}

impl Daemon {
    /// All pools.
    #[must_use]
    pub fn pool_views(&self) -> Vec<PoolView> {
        self.pools.views()
    }

    /// One pool.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn pool_view(&self, name: &str) -> Result<PoolView, ChangeError> {
        let found = self.pools.views().into_iter().find(|pool| pool.name == name);
        found.ok_or_else(|| ChangeError::Unknown(self.pools.no_such_pool(name)))
    }

    /// All volumes of all pools that are open.
    #[must_use]
    pub fn volume_views(&self) -> Vec<VolumeView> {
        self.with_users(self.pools.volume_views())
    }

    /// Fills in who is configured to be on them.
    fn with_users(&self, mut views: Vec<VolumeView>) -> Vec<VolumeView> {
        let disks = self.all_disks();
        for view in &mut views {
            let Ok(path) = view.path() else { continue };
            let disks = disks.iter().map(|disk| &disk.config);
            let subsystems = self.config.subsystems.iter().map(|placed| &placed.value);
            view.used_by = assemble::users_of(&path, disks, subsystems);
        }
        views
    }

    /// All volumes of one pool.
    ///
    /// # Errors
    /// When there is none of this name, or it is not open.
    pub fn volume_views_of(&self, pool: &str) -> Result<Vec<VolumeView>, ChangeError> {
        let pool = self.pools.open_pool(pool)?;
        let views = pool.volumes().iter().map(|volume| assemble::volume_view(pool.name(), volume)).collect();
        Ok(self.with_users(views))
    }

    /// One volume.
    ///
    /// # Errors
    /// When there is no such pool or volume.
    pub fn volume_view(&self, pool: &str, volume: &str) -> Result<VolumeView, ChangeError> {
        let all = self.volume_views_of(pool)?;
        let names: Vec<String> = all.iter().map(|volume| volume.name.clone()).collect();
        all.into_iter().find(|it| it.name == volume).ok_or_else(|| {
            let there = if names.is_empty() {
                "there is none".to_owned()
            } else {
                format!("there are {}", names.join(", "))
            };
            ChangeError::Unknown(format!("volume {pool}/{volume} is not there; {there}"))
        })
    }

    /// Makes a pool of devices that nobody uses, and opens it.
    ///
    /// # Errors
    /// When it cannot be; then nothing has changed.
    pub fn create_pool(&self, create: &CreatePool) -> Result<PoolView, ChangeError> {
        let name = name_in("name", &create.name)?;
        let level =
            assemble::level(&create.level).map_err(|what| ChangeError::Wrong(format!("level: {what}")))?;
        let devices = self.devices_named(&create.devices)?;
        let _one = self.pool_creation.lock().unwrap_or_else(PoisonError::into_inner);
        if self.pools.has(name.as_str()) {
            return Err(ChangeError::Conflict(format!("pool {name} is there, want another name")));
        }
        let taken = self.pools.take(&devices)?;
        let uuid = assemble::new_uuid().map_err(ChangeError::Failed)?;
        let mut options = pool::CreateOptions::new(name.as_str(), uuid, level);
        options.strip_bytes = create.strip_bytes.unwrap_or(options.strip_bytes);
        options.extent_bytes = create.extent_bytes.unwrap_or(options.extent_bytes);
        options.log_bytes = create.log_bytes.unwrap_or(options.log_bytes);
        options.metadata_bytes = create.metadata_bytes;
        (options.spares, options.force) = (create.spares, create.force);
        self.with_reserved(name.as_str(), None, &taken, |devices| {
            self.pools.asks().ask(name.as_str(), || pool::create(self.pools.reactor(), devices, options))
        })?;
        log::info!("pool {name}: created on {}", create.devices.join(", "));
        drop(taken);
        self.pools.wait_for(uuid, OPEN_MAX);
        self.pool_view(name.as_str())
    }

    /// Begins to compare the members of a pool.
    ///
    /// # Errors
    /// When there is no such pool, or it cannot be done now.
    pub fn scrub_pool(&self, pool: &str, scrub: Scrub) -> Result<PoolView, ChangeError> {
        let open = self.pools.open_pool(pool)?;
        self.pools.asks().ask(pool, || open.scrub(scrub.repair))?;
        self.pool_view(pool)
    }

    /// Puts a device in the place of a member.
    ///
    /// # Errors
    /// When there is no such pool, member or device, or it cannot be done now.
    pub fn replace_member(&self, pool: &str, replace: &Replace) -> Result<PoolView, ChangeError> {
        let open = self.pools.open_pool(pool)?;
        self.give(&open, std::slice::from_ref(&replace.new), |mut devices| {
            let new = devices.pop().ok_or_else(|| ChangeError::Failed("no device".to_owned()))?;
            self.pools.asks().ask(pool, || open.replace(&replace.old, new, replace.force))
        })?;
        log::info!("pool {pool}: device {} is to replace {}", replace.new, replace.old);
        self.pool_view(pool)
    }

    /// Gives up replacing a member that is still in service.
    ///
    /// # Errors
    /// When there is no such pool, or nothing to give up.
    pub fn abort_replace(&self, pool: &str) -> Result<PoolView, ChangeError> {
        let open = self.pools.open_pool(pool)?;
        self.pools.asks().ask(pool, || open.abort_replace())?;
        log::info!("pool {pool}: the replacement of a member is given up");
        self.pool_view(pool)
    }

    /// Appends another set of members to a pool.
    ///
    /// # Errors
    /// When there is no such pool or device, or it cannot be done now.
    pub fn grow_pool(&self, pool: &str, add: &AddDevices) -> Result<PoolView, ChangeError> {
        let open = self.pools.open_pool(pool)?;
        self.give(&open, &add.devices, |devices| {
            self.pools.asks().ask(pool, || open.grow(devices, add.force))
        })?;
        log::info!("pool {pool}: grown by {}", add.devices.join(", "));
        self.pool_view(pool)
    }

    /// Gives a pool spares.
    ///
    /// # Errors
    /// When there is no such pool or device, or it cannot be done now. Those before the one that cannot be are added.
    pub fn add_spares(&self, pool: &str, add: &AddDevices) -> Result<PoolView, ChangeError> {
        let open = self.pools.open_pool(pool)?;
        self.give(&open, &add.devices, |devices| {
            let mut devices = devices.into_iter();
            devices.try_for_each(|device| self.pools.asks().ask(pool, || open.add_spare(device, add.force)))
        })?;
        log::info!("pool {pool}: spares {}", add.devices.join(", "));
        self.pool_view(pool)
    }

    /// Makes a volume.
    ///
    /// # Errors
    /// When there is no such pool, or the volume cannot be.
    pub fn create_volume(&self, pool: &str, create: &CreateVolume) -> Result<VolumeView, ChangeError> {
        let name = name_in("name", &create.name)?;
        let open = self.pools.open_pool(pool)?;
        self.pools.asks().ask(pool, || open.create_volume(name.as_str(), create.size_bytes))?;
        self.made(pool, name.as_str(), "created")
    }

    /// Makes a volume larger, or smaller.
    ///
    /// # Errors
    /// When there is none, or it cannot be.
    pub fn resize_volume(&self, pool: &str, volume: &str, set: SetVolume) -> Result<VolumeView, ChangeError> {
        let before = self.volume_view(pool, volume)?;
        let path: VolumePath = before.path().map_err(ChangeError::Wrong)?;
        let shrinks = set.size_bytes < before.size_bytes;
        if shrinks {
            // A disk has said how large it is, whether its guest is connected now or not, and only grows.
            self.hold(&path, |user| format!("volume {path} is {user}'s, it can only grow"))?;
        }
        let resized = self.pools.open_pool(pool).map_err(ChangeError::from);
        let resized = resized
            .and_then(|open| self.pools.asks().ask(pool, || open.resize_volume(volume, set.size_bytes)));
        if shrinks {
            self.pools.end_delete(&path);
        }
        resized?;
        log::info!("volume {pool}/{volume}: {} bytes instead of {}", set.size_bytes, before.size_bytes);
        self.volume_view(pool, volume)
    }

    /// Takes snapshots at one instant.
    ///
    /// # Errors
    /// When one of them cannot be; then there is none.
    pub fn take_snapshots(&self, pool: &str, take: &TakeSnapshots) -> Result<Vec<VolumeView>, ChangeError> {
        if take.snapshots.is_empty() {
            return Err(ChangeError::Wrong(
                "snapshots: [] is none, want a volume and a name at least".to_owned(),
            ));
        }
        let mut wanted = Vec::new();
        for snapshot in &take.snapshots {
            wanted.push((snapshot.volume.clone(), name_in("name", &snapshot.name)?.to_string()));
        }
        let open = self.pools.open_pool(pool)?;
        self.pools.asks().ask(pool, || open.snapshot(wanted))?;
        take.snapshots.iter().map(|snapshot| self.made(pool, &snapshot.name, "taken")).collect()
    }

    /// Makes a clone of a snapshot.
    ///
    /// # Errors
    /// When there is no such snapshot, or the clone cannot be.
    pub fn make_clone(&self, pool: &str, make: &MakeClone) -> Result<VolumeView, ChangeError> {
        let name = name_in("name", &make.name)?;
        let open = self.pools.open_pool(pool)?;
        self.pools.asks().ask(pool, || open.clone_volume(&make.snapshot, name.as_str()))?;
        self.made(pool, name.as_str(), "cloned")
    }

    /// Deletes a volume or snapshot.
    ///
    /// # Errors
    /// When there is none, or a disk or namespace is on it.
    pub fn delete_volume(&self, pool: &str, volume: &str) -> Result<VolumeView, ChangeError> {
        let before = self.volume_view(pool, volume)?;
        let path: VolumePath = before.path().map_err(ChangeError::Wrong)?;
        self.hold(&path, |user| format!("volume {path} is {user}'s, want that removed first"))?;
        let deleted = self.pools.open_pool(pool).map_err(ChangeError::from);
        let deleted = deleted.and_then(|open| self.pools.asks().ask(pool, || open.delete_volume(volume)));
        self.pools.end_delete(&path);
        deleted?;
        log::info!("volume {path}: deleted");
        Ok(before)
    }

    /// The content of a snapshot, or of a volume that nobody uses, from `offset` on; `None`: it is all zero.
    ///
    /// # Errors
    /// When there is no such volume, or it changes while it is read, or the range is none of its.
    pub fn volume_data(
        &self,
        pool: &str,
        volume: &str,
        offset: u64,
        len: u64,
    ) -> Result<Option<Vec<u8>>, ChangeError> {
        let view = self.volume_view(pool, volume)?;
        let end = offset.checked_add(len).filter(|end| *end <= view.size_bytes);
        let is_whole = |at: u64| at.is_multiple_of(DATA_UNIT);
        if !end.is_some_and(|end| is_whole(offset) && (is_whole(end) || end == view.size_bytes))
            || len == 0
            || len > DATA_MAX
        {
            return Err(ChangeError::Wrong(format!(
                "{len} bytes at {offset} of {}, want whole {DATA_UNIT} bytes within it, at most {DATA_MAX}",
                view.size_bytes
            )));
        }
        let _waiting = self.pools.asks().begin(pool)?;
        // A reactor has one lane for this; whoever reads is a user too.
        let _one = self.volume_reading.lock().unwrap_or_else(PoisonError::into_inner);
        if !view.snapshot && self.volume_view(pool, volume)?.users > 0 {
            let what = format!("volume {pool}/{volume} is in use, want a snapshot of it");
            return Err(ChangeError::Conflict(what));
        }
        let device = self.pools.open_pool(pool)?.device(volume);
        let device =
            device.ok_or_else(|| ChangeError::Unknown(format!("volume {pool}/{volume} is not there")))?;
        image::read(&device, self.pools.reactor(), offset, len)
            .map_err(|what| ChangeError::Failed(format!("volume {pool}/{volume}: {what}")))
    }

    /// Keeps disks away from a volume that none is on, until [`Pools::end_delete`].
    fn hold(&self, path: &VolumePath, used: impl FnOnce(&str) -> String) -> Result<(), ChangeError> {
        let _change = self.lock_changes();
        if let Some(user) = self.user_of(&Backing::Volume(path.clone())) {
            return Err(ChangeError::Conflict(used(&user)));
        }
        match self.pools.begin_delete(path) {
            true => Ok(()),
            false => Err(ChangeError::Conflict(format!("volume {path} is being deleted or made smaller"))),
        }
    }

    /// The disk or subsystem that has something.
    pub(super) fn user_of(&self, backing: &Backing) -> Option<String> {
        let is = |other: Result<Backing, (&'static str, String)>| other.is_ok_and(|other| other == *backing);
        let disk = self.all_disks().into_iter().find(|disk| is(disk.config.backing()));
        if let Some(disk) = disk {
            return Some(format!("disk {}", disk.config.name));
        }
        let mut subsystems = self.config.subsystems.iter().map(|placed| &placed.value);
        let subsystem = subsystems.find(|subsystem| subsystem.namespaces.iter().any(|it| is(it.backing())));
        subsystem.map(|subsystem| format!("subsystem {}", subsystem.nqn))
    }

    fn made(&self, pool: &str, volume: &str, how: &str) -> Result<VolumeView, ChangeError> {
        self.pools.volumes_changed();
        log::info!("volume {pool}/{volume}: {how}");
        self.volume_view(pool, volume)
    }

    fn devices_named(&self, names: &[String]) -> Result<Vec<Name>, ChangeError> {
        let known = |name: &String| assemble::known_device(&self.config, name);
        let names: Result<Vec<Name>, String> = names.iter().map(known).collect();
        let names = names.map_err(|what| ChangeError::Wrong(format!("devices: {what}")))?;
        assemble::distinct(&names).map_err(|what| ChangeError::Wrong(format!("devices: {what}")))?;
        Ok(names)
    }

    /// Gives an open pool devices, which are let go with it.
    fn give(
        &self,
        pool: &Pool,
        names: &[String],
        change: impl FnOnce(Vec<Arc<dyn Device>>) -> Result<(), ChangeError>,
    ) -> Result<(), ChangeError> {
        let names = self.devices_named(names)?;
        let taken = self.pools.take(&names)?;
        let reserved = self.with_reserved(pool.name(), Some(pool), &taken, change)?;
        self.pools.joined(pool.name(), &reserved);
        Ok(())
    }

    /// Does something with devices that are reserved for it; if it fails, lets go of those that the pool has not taken all the same.
    fn with_reserved(
        &self,
        pool: &str,
        open: Option<&Pool>,
        taken: &Taken,
        change: impl FnOnce(Vec<Arc<dyn Device>>) -> Result<(), ChangeError>,
    ) -> Result<Vec<Arc<dyn Device>>, ChangeError> {
        if let Some(view) = open.map(Pool::view).filter(|view| view.is_failed) {
            return Err(ChangeError::Conflict(format!("pool {pool}: {}", view.troubles.join("; "))));
        }
        let identity =
            host::identity(&self.config.host, &self.config.daemon.state_dir).map_err(ChangeError::Failed)?;
        let host = identity.id.0;
        let assume_exclusive = pool.parse().is_ok_and(|name| self.config.pool(&name).assume_exclusive);
        let reserved = reserve::take_all(taken.devices.clone(), host, assume_exclusive)
            .map_err(ChangeError::Conflict)?;
        match change(taken.devices.clone()) {
            Ok(()) => Ok(reserved),
            Err(error) => {
                let view = open.map(Pool::view);
                // What nobody waits for any more may still take them.
                let goes_on = !self.pools.asks().is_idle(pool);
                let has = |device: &Arc<dyn Device>| {
                    let mut members = view.iter().flat_map(|view| &view.members);
                    goes_on || members.any(|member| member.device.as_deref() == Some(device.name()))
                };
                let (kept, left): (Vec<_>, Vec<_>) = reserved.into_iter().partition(has);
                self.pools.joined(pool, &kept);
                left.iter().for_each(|device| reserve::leave(device.as_ref(), &host));
                Err(error)
            }
        }
    }

    /// Why a disk may not be on something now.
    pub(super) fn check_free(
        &self,
        pools: &Pools,
        backing: &Backing,
        read_only: bool,
    ) -> Result<(), ChangeError> {
        match backing {
            Backing::Device(_) => Ok(()),
            Backing::Volume(path) => pools.check_volume(path, read_only).map_err(|lack| match lack {
                Lack::Unknown(what) => ChangeError::Wrong(format!("volume: {what}")),
                Lack::Conflict(what) => ChangeError::Conflict(what),
            }),
        }
    }
}

impl VolumeView {
    pub(crate) fn path(&self) -> Result<VolumePath, String> {
        format!("{}/{}", self.pool, self.name).parse()
    }
}
