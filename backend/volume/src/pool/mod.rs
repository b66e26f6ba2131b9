//! A pool: an array of member devices, and the thin volumes in it.
//!
//! ```text
//!   any thread ── Pool (this file) ──ask──► Owner, on one reactor: all changes of mappings, intents, members
//!   a queue's reactor ── VolumeChannel ── resolve() ──► members            the hot path
//!                              └── slow ──► a task on the same reactor ──ask──► Owner
//! ```
//!
//! Owns: what others see of pools. Must not know: rings, NVMe, paths, files.
//!
//! Invariants:
//! - One owner, on one reactor, changes what a pool is; all others read it lock-free, or ask.
//! - A change is in the tail before anybody is told of it (it survives the process), and in the log on the members before
//!   a FLUSH that came after it ends (it survives the power).

mod ask;
mod assemble;
pub(crate) mod bounce;
mod channel;
mod coverage;
mod device;
mod failure;
mod lanes;
mod lost_caches;
mod manners;
mod owner;
mod place;
pub mod resolve;
mod shared;
mod slow;
mod stripes;
mod twin;
mod wait;

pub use ask::Ask;
pub use coverage::coverage;
pub use shared::{Class, View};

use crate::format::Superblock;
use crate::raid::Level;
use device::VolumeDevice;
use hawser_block::Device;
use hawser_runtime::ReactorHandle;
use shared::{Shared, lock};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Why something was not done with a pool. One line each, which names the thing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PoolError {
    /// What was asked for cannot be right.
    Wrong(String),
    /// There is no such thing.
    Unknown(String),
    /// It does not go together with what is there.
    Conflict(String),
    /// It could be right, and did not work.
    Failed(String),
}

impl fmt::Display for PoolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PoolError::Wrong(what)
            | PoolError::Unknown(what)
            | PoolError::Conflict(what)
            | PoolError::Failed(what) => f.write_str(what),
        }
    }
}

impl std::error::Error for PoolError {}

/// Where a pool keeps what is acknowledged and not yet durable on its members: memory that outlives the process, not the power.
pub trait Tail: Send {
    /// How many bytes it holds at most.
    fn capacity(&self) -> usize;
    /// All that it holds.
    fn content(&self) -> Vec<u8>;
    /// Adds at the end; when it returns, a death of the process does not lose it. What does not fit is our bug.
    fn append(&mut self, bytes: &[u8]);
    /// Holds `bytes` from now on, and nothing else: a death of the process leaves either the old or the new.
    fn replace(&mut self, bytes: &[u8]);
}

/// A tail for tests, and for commands that make everything durable before they end.
#[derive(Clone, Debug, Default)]
pub struct MemoryTail(pub Arc<std::sync::Mutex<Vec<u8>>>);

impl Tail for MemoryTail {
    fn capacity(&self) -> usize {
        1 << 20
    }

    fn content(&self) -> Vec<u8> {
        lock(&self.0).clone()
    }

    fn append(&mut self, bytes: &[u8]) {
        lock(&self.0).extend_from_slice(bytes);
    }

    fn replace(&mut self, bytes: &[u8]) {
        *lock(&self.0) = bytes.to_vec();
    }
}

/// How a new pool is laid out.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Its name: letters, digits, `-`, `_`, `.`; at most 64 bytes.
    pub name: String,
    /// Its UUID: random.
    pub uuid: [u8; 16],
    /// The RAID level.
    pub level: Level,
    /// What of one member follows on what of another: 4 KiB to 1 MiB, a power of two.
    pub strip_bytes: u32,
    /// The unit of allocation: rounded up to whole stripes, at most 64 MiB.
    pub extent_bytes: u64,
    /// What one intent bit covers of each member.
    pub region_bytes: u64,
    /// The log of mapping changes, on each member that has metadata.
    pub log_bytes: u64,
    /// RAID 5 and 6: the log of stripes that are being changed, on each member.
    pub parity_log_bytes: u64,
    /// Room for mappings besides the log, on each member; `None`: by the pool's size. Less than half of it can be used.
    pub metadata_bytes: Option<u64>,
    /// Members that are spares from the beginning, behind the others in the list of devices.
    pub spares: usize,
    /// Devices that belong to another pool are taken all the same.
    pub force: bool,
}

impl CreateOptions {
    /// The defaults: strips of 64 KiB, extents of 1 MiB, regions of 64 MiB, a log of 16 MiB, a parity log of 32 MiB.
    #[must_use]
    pub fn new(name: &str, uuid: [u8; 16], level: Level) -> CreateOptions {
        CreateOptions {
            name: name.to_owned(),
            uuid,
            level,
            strip_bytes: 64 << 10,
            extent_bytes: 1 << 20,
            region_bytes: 64 << 20,
            log_bytes: 16 << 20,
            parity_log_bytes: 32 << 20,
            metadata_bytes: None,
            spares: 0,
            force: false,
        }
    }
}

/// What writes get that need an extent when there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NoSpacePolicy {
    /// `NoSpace`, at once.
    #[default]
    Error,
    /// They wait until there is space again.
    Wait,
}

/// How a pool is opened.
pub struct OpenOptions {
    /// Who opens it: the host identifier.
    pub host: [u8; 16],
    /// What a process before us left here, and where we leave what the next one needs.
    pub tail: Box<dyn Tail>,
    /// Somebody says that no other host has it open.
    pub assume_exclusive: bool,
    /// Start although members are missing, if the others have all the data.
    pub degraded: bool,
    /// Start although it cannot be told which stripes of a set that lacks members were being written when it was not closed.
    pub accept_loss: bool,
    /// For those who write when there is no space.
    pub no_space: NoSpacePolicy,
    /// Extents that nobody has are discarded on the members.
    pub discard: bool,
    /// Below so many free bytes in 1000 of all, a warning is due.
    pub low_water_permille: u32,
    /// The most bytes per second that a resync, rebuild or scrub copies, from all members together; 0: no limit.
    pub sync_bytes_per_second: u64,
    /// How long regions stay marked after the last write to them.
    pub intent_idle: Duration,
    /// How long a member may be out of reach before the others go on without it.
    pub member_timeout: Duration,
    /// How long a member may be away before a spare takes its place.
    pub spare_delay: Duration,
    /// Only look: nothing is written, and no volume can be.
    pub read_only: bool,
}

impl OpenOptions {
    /// The defaults, for this host and tail.
    #[must_use]
    pub fn new(host: [u8; 16], tail: Box<dyn Tail>) -> OpenOptions {
        OpenOptions {
            host,
            tail,
            assume_exclusive: false,
            degraded: false,
            accept_loss: false,
            no_space: NoSpacePolicy::Error,
            discard: false,
            low_water_permille: 100,
            sync_bytes_per_second: 200 << 20,
            intent_idle: Duration::from_secs(5),
            member_timeout: Duration::from_secs(10),
            spare_delay: Duration::from_secs(60),
            read_only: false,
        }
    }
}

/// What a device says of the pool that it belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    /// The pool's name.
    pub pool: String,
    /// The pool's UUID.
    pub pool_uuid: [u8; 16],
    /// The level.
    pub level: Level,
    /// Its place among the members; `None`: a spare.
    pub place: Option<u16>,
    /// How many members the pool has.
    pub members: u16,
    /// The places, and whether this device says that they are in sync: who is needed for a start.
    pub in_sync: Vec<bool>,
    /// Raised with each change of members; the highest knows best.
    pub generation: u64,
    /// Raised with each opening.
    pub openings: u64,
    /// This device's own UUID as a member or spare.
    pub uuid: [u8; 16],
    /// The UUIDs of all members, in their places, as far as this device knows.
    pub member_uuids: Vec<[u8; 16]>,
    /// The UUIDs of all spares, as far as this device knows.
    pub spare_uuids: Vec<[u8; 16]>,
    /// The place of the member that is being replaced while it stays in service, and the UUID of what is to take its place.
    pub replacement: Option<(u16, [u8; 16])>,
    /// The host that has it open, or had when it ended without closing it.
    pub opened_by: Option<[u8; 16]>,
}

impl Label {
    /// Whether a member or spare with this UUID belongs to the pool, as far as this device knows.
    #[must_use]
    pub fn names(&self, uuid: &[u8; 16]) -> bool {
        let replacement = self.replacement.as_ref().map(|(_, uuid)| uuid);
        self.member_uuids.iter().chain(&self.spare_uuids).chain(replacement).any(|known| known == uuid)
    }
}

/// How a member is doing, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemberState {
    /// Has all the data.
    InSync,
    /// Is there, lacks what was written while it was not, and is being brought up to date.
    Syncing,
    /// Lacks data, and is not written to.
    Stale,
    /// Is not there.
    Missing,
    /// Waits to replace another.
    Spare,
    /// Is to take the place of a member that is in service, and is given what that has.
    Replacing,
}

impl MemberState {
    /// The word that people and the API see.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            MemberState::InSync => "in_sync",
            MemberState::Syncing => "syncing",
            MemberState::Stale => "stale",
            MemberState::Missing => "missing",
            MemberState::Spare => "spare",
            MemberState::Replacing => "replacing",
        }
    }
}

/// One member.
#[derive(Clone, Debug)]
pub struct MemberView {
    /// Its place in the array; `None`: a spare.
    pub place: Option<u16>,
    /// The device's name, when it is there.
    pub device: Option<String>,
    /// How it is doing.
    pub state: MemberState,
    /// Why, or empty.
    pub why: String,
    /// Read errors that were repaired by rewriting.
    pub repaired: u64,
    /// Units that were found to be wrong on this one by a scrub, where that can be told.
    pub wrong: u64,
}

/// Long work on a pool.
#[derive(Clone, Debug)]
pub struct TaskView {
    /// `resync`, `rebuild`, `replace` or `scrub`.
    pub kind: &'static str,
    /// Bytes of members that are done.
    pub done_bytes: u64,
    /// Of how many.
    pub total_bytes: u64,
    /// How long it has been running.
    pub elapsed: Duration,
    /// Units that differed between members, for a scrub.
    pub mismatches: u64,
    /// Of those, how many are known to be wrong on a member that has data, and on one that has parity. Of the others nobody can tell.
    pub data_faults: u64,
    /// See there.
    pub parity_faults: u64,
    /// Units that a scrub could not compare on all members that should have them, or not rewrite.
    pub failures: u64,
    /// It has ended.
    pub is_done: bool,
    /// Why a scrub has ended before it was through.
    pub cut_short: Option<String>,
}

/// The whole pool, for people.
#[derive(Clone, Debug)]
pub struct PoolView {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: [u8; 16],
    /// Its level.
    pub level: Level,
    /// Of its superblocks: raised with each change of members.
    pub generation: u64,
    /// Of its superblocks: raised with each opening.
    pub openings: u64,
    /// See [`CreateOptions`].
    pub strip_bytes: u32,
    /// See [`CreateOptions`].
    pub extent_bytes: u64,
    /// Room for data.
    pub size_bytes: u64,
    /// Of that, not given to any volume.
    pub free_bytes: u64,
    /// Room for mappings: what one tree of them may take of the area, which has room for the next one, too.
    pub metadata_bytes: u64,
    /// Of that, what they take now. When it is all, what needs more is refused.
    pub metadata_used_bytes: u64,
    /// Writes to members' parity logs since it was opened, and their bytes.
    pub parity_log: (u64, u64),
    /// What is wrong, each a line; empty: nothing.
    pub troubles: Vec<String>,
    /// Regions whose copies, or parity, may not be right, or that a member lacks.
    pub unsynced_regions: u64,
    /// It has less redundancy than it should, or none, or a member is out of reach.
    pub is_degraded: bool,
    /// Nothing is read or written any more.
    pub is_failed: bool,
    /// All members and spares.
    pub members: Vec<MemberView>,
    /// What goes on, and the last that has ended.
    pub tasks: Vec<TaskView>,
}

impl PoolView {
    /// What is known before the tables are.
    pub(crate) fn empty(book: &Superblock) -> PoolView {
        PoolView {
            name: book.name.clone(),
            uuid: book.pool_uuid,
            level: book.level,
            generation: book.generation,
            openings: book.openings(),
            strip_bytes: book.strip_bytes,
            extent_bytes: book.extent_bytes,
            size_bytes: 0,
            free_bytes: 0,
            metadata_bytes: 0,
            metadata_used_bytes: 0,
            parity_log: (0, 0),
            troubles: Vec::new(),
            unsynced_regions: 0,
            is_degraded: false,
            is_failed: false,
            members: Vec::new(),
            tasks: Vec::new(),
        }
    }
}

/// One volume, snapshot or clone, for people.
#[derive(Clone, Debug)]
pub struct VolumeView {
    /// Its name in the pool.
    pub name: String,
    /// Its UUID.
    pub uuid: [u8; 16],
    /// As the guest sees it.
    pub size_bytes: u64,
    /// In extents of the pool, shared ones included.
    pub mapped_bytes: u64,
    /// It cannot be written.
    pub is_snapshot: bool,
    /// The volume or snapshot that it was made of, while that is there.
    pub origin: Option<String>,
    /// How many channels are open to it.
    pub users: usize,
    /// Requests that did not take the hot path, by class.
    pub slow: Vec<(&'static str, u64)>,
}

/// What a check found.
#[derive(Clone, Debug, Default)]
pub struct CheckReport {
    /// Each fault, with where it is.
    pub faults: Vec<String>,
    /// Members, spares and a replacement that are not there, each a line.
    pub missing: Vec<String>,
    /// What was looked at, for people.
    pub checked: Vec<(&'static str, u64)>,
}

/// Writes a new, empty pool on `devices`, in this order. They must all be reached.
#[must_use]
pub fn create(reactor: &ReactorHandle, devices: Vec<Arc<dyn Device>>, options: CreateOptions) -> Ask<()> {
    assemble::create(reactor, devices, options)
}

/// What pool a device belongs to, if any. It must be reached.
#[must_use]
pub fn probe(reactor: &ReactorHandle, device: Arc<dyn Device>) -> Ask<Option<Label>> {
    assemble::probe(reactor, device)
}

/// Looks at everything that the members say of a pool, and whether it goes together. Nothing is written.
#[must_use]
pub fn check(reactor: &ReactorHandle, devices: Vec<Arc<dyn Device>>) -> Ask<CheckReport> {
    assemble::check(reactor, devices)
}

/// A pool that is open. Cheap to clone. Its owner lives on one reactor.
#[derive(Clone)]
pub struct Pool {
    shared: Arc<Shared>,
}

impl Pool {
    pub(crate) fn of(shared: Arc<Shared>) -> Pool {
        Pool { shared }
    }

    /// Opens the pool that `devices` are members of, in any order; all must be reached. `owner` is the reactor that its owner
    /// lives on.
    #[must_use]
    pub fn open(owner: &ReactorHandle, devices: Vec<Arc<dyn Device>>, options: OpenOptions) -> Ask<Pool> {
        assemble::open(owner, devices, options)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// How it is doing. From any thread.
    #[must_use]
    pub fn view(&self) -> PoolView {
        lock(&self.shared.told).pool.clone()
    }

    /// All volumes, by name. From any thread.
    #[must_use]
    pub fn volumes(&self) -> Vec<VolumeView> {
        let volumes: Vec<_> = lock(&self.shared.volumes).values().cloned().collect();
        let told = lock(&self.shared.told);
        let view = |volume: &Arc<shared::VolumeShared>| {
            let (mapped_bytes, origin) = told.volumes.get(&volume.id).cloned().unwrap_or_default();
            VolumeView {
                name: volume.name.clone(),
                uuid: volume.uuid,
                size_bytes: volume.map().size_bytes(),
                mapped_bytes,
                is_snapshot: volume.is_snapshot,
                origin,
                users: volume.users.load(Ordering::Relaxed),
                slow: volume.slow_counts(),
            }
        };
        let mut views: Vec<VolumeView> = volumes.iter().map(view).collect();
        views.sort_by(|one, other| one.name.cmp(&other.name));
        views
    }

    /// A volume as a device.
    #[must_use]
    pub fn device(&self, volume: &str) -> Option<Arc<dyn Device>> {
        let volume = self.shared.volume_named(volume)?;
        Some(Arc::new(VolumeDevice::new(Arc::clone(&self.shared), volume)))
    }

    /// A new volume, all zero.
    #[must_use]
    pub fn create_volume(&self, name: &str, size_bytes: u64) -> Ask<()> {
        let name = name.to_owned();
        self.shared.control(move |owner| owner.create_volume(name, size_bytes))
    }

    /// Makes a volume larger, or smaller where nothing is mapped. Its users see it at once.
    #[must_use]
    pub fn resize_volume(&self, name: &str, size_bytes: u64) -> Ask<()> {
        let name = name.to_owned();
        self.shared.control(move |owner| owner.resize_volume(name, size_bytes))
    }

    /// Read-only volumes with the content that these have now, all at the same instant: `(origin, name of the snapshot)`.
    #[must_use]
    pub fn snapshot(&self, snapshots: Vec<(String, String)>) -> Ask<()> {
        self.shared.control(move |owner| owner.snapshot(snapshots))
    }

    /// A writable volume with the content of a snapshot.
    #[must_use]
    pub fn clone_volume(&self, snapshot: &str, name: &str) -> Ask<()> {
        let (snapshot, name) = (snapshot.to_owned(), name.to_owned());
        self.shared.control(move |owner| owner.clone_volume(snapshot, name))
    }

    /// Deletes a volume or snapshot that nobody uses.
    #[must_use]
    pub fn delete_volume(&self, name: &str) -> Ask<()> {
        let name = name.to_owned();
        self.shared.control(move |owner| owner.delete_volume(name))
    }

    /// Puts `device` in the place of the member whose device is (or, when it is missing, whose place is) `old`. One that is in service
    /// stays so until `device` has all that it has; how far that is: [`Pool::view`].
    #[must_use]
    pub fn replace(&self, old: &str, device: Arc<dyn Device>, force: bool) -> Ask<()> {
        let old = old.to_owned();
        self.shared.control(move |owner| owner.replace(old, device, force))
    }

    /// Gives up replacing a member that is still in service.
    #[must_use]
    pub fn abort_replace(&self) -> Ask<()> {
        self.shared.control(|owner| owner.abort_replacing())
    }

    /// Takes back a member that was missing or stale, or a spare.
    #[must_use]
    pub fn add_member(&self, device: Arc<dyn Device>) -> Ask<()> {
        self.shared.control(move |owner| owner.add_member(device))
    }

    /// A device that takes the place of a member that is away for long.
    #[must_use]
    pub fn add_spare(&self, device: Arc<dyn Device>, force: bool) -> Ask<()> {
        self.shared.control(move |owner| owner.add_spare(device, force))
    }

    /// Appends another set of as many members.
    #[must_use]
    pub fn grow(&self, devices: Vec<Arc<dyn Device>>, force: bool) -> Ask<()> {
        self.shared.control(move |owner| owner.grow(devices, force))
    }

    /// Begins to compare the members, and with `repair` to rewrite what differs; how far it is: [`Pool::view`]. The next opening goes on
    /// with it, if it has not ended.
    #[must_use]
    pub fn scrub(&self, repair: bool) -> Ask<()> {
        self.shared.control(move |owner| owner.scrub(repair))
    }

    /// The members' reservations tell that another host has it: nothing is read or written from now on.
    #[must_use]
    pub fn lose(&self, why: &str) -> Ask<()> {
        let why = why.to_owned();
        self.shared.control(move |owner| async move {
            owner.lose(&why);
            Ok(())
        })
    }

    /// A member's reservation was lost for a while: looks whether another host has opened the pool meanwhile.
    #[must_use]
    pub fn check_owner(&self) -> Ask<()> {
        self.shared.control(|owner| async move {
            owner.check_owner().await;
            Ok(())
        })
    }

    /// Makes everything durable.
    #[must_use]
    pub fn sync(&self) -> Ask<()> {
        self.shared.control(move |owner| async move {
            owner.flush().await.map_err(|status| owner.failed("cannot be made durable", status))
        })
    }

    /// Makes everything durable and lets the members go; nobody uses a volume any more.
    #[must_use]
    pub fn close(&self) -> Ask<()> {
        self.shared.control(|owner| owner.close())
    }
}
