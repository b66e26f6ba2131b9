//! What the management API sends and takes about pools and volumes.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// `GET /v1/pools/{pool}`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PoolView {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: String,
    /// How it is doing.
    pub state: PoolState,
    /// What is wrong, each a line.
    pub troubles: Vec<String>,
    /// `linear`, `raid0`, `raid1`, `raid10`, `raid5` or `raid6`.
    pub level: String,
    /// What of one member follows on what of another; `None`, as for all sizes, until it is open.
    pub strip_bytes: Option<u32>,
    /// The unit of allocation.
    pub extent_bytes: Option<u64>,
    /// Room for data.
    pub size_bytes: Option<u64>,
    /// Of that, not given to any volume.
    pub free_bytes: Option<u64>,
    /// Room for mappings.
    pub metadata_bytes: Option<u64>,
    /// Of that, what they take; when it is all, what needs more is refused.
    pub metadata_used_bytes: Option<u64>,
    /// Writes to members' parity logs since it was opened.
    pub parity_log_writes: Option<u64>,
    /// Their bytes.
    pub parity_log_bytes: Option<u64>,
    /// All members, and then the spares.
    pub members: Vec<MemberView>,
    /// What goes on, and what has ended last.
    pub tasks: Vec<TaskView>,
}

/// How a pool is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PoolState {
    /// It is not open: its members are not all there, or it cannot be.
    Waiting,
    /// All is as it should be.
    Ready,
    /// It has less redundancy than it should, or none.
    Degraded,
    /// It takes no writes any more.
    Failed,
}

impl PoolState {
    /// The word that people see.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            PoolState::Waiting => "waiting",
            PoolState::Ready => "ready",
            PoolState::Degraded => "degraded",
            PoolState::Failed => "failed",
        }
    }
}

/// A member of a pool.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MemberView {
    /// Its place in the array; `None`: a spare.
    pub place: Option<u16>,
    /// The device; `None`: it is not there.
    pub device: Option<String>,
    /// `in_sync`, `syncing`, `stale`, `missing` or `spare`.
    pub state: String,
    /// Why.
    pub why: Option<String>,
    /// Read errors that were repaired by rewriting.
    pub repaired: u64,
    /// Units that were found to be wrong on this one by a scrub, where that can be told.
    pub wrong: u64,
}

/// Long work on a pool.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TaskView {
    /// `resync`, `rebuild`, `replace` or `scrub`.
    pub kind: String,
    /// Bytes of members that are done.
    pub done_bytes: u64,
    /// Of how many.
    pub total_bytes: u64,
    /// How long it has been running.
    pub elapsed_seconds: u64,
    /// How long it takes if it goes on as it went.
    pub left_seconds: Option<u64>,
    /// Units that differed between members, for a scrub.
    pub mismatches: u64,
    /// Of those, how many are known to be wrong on a member that has data.
    pub data_faults: u64,
    /// And on one that has parity. Of the others nobody can tell.
    pub parity_faults: u64,
    /// Units that a scrub could not compare on all members that should have them, or not rewrite.
    pub failures: u64,
    /// It has ended.
    pub done: bool,
    /// Why a scrub has ended before it was through.
    pub cut_short: Option<String>,
}

/// A volume, snapshot or clone.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VolumeView {
    /// The pool.
    pub pool: String,
    /// Its name in it.
    pub name: String,
    /// Its UUID.
    pub uuid: String,
    /// As the VM sees it.
    pub size_bytes: u64,
    /// In extents of the pool, shared ones included.
    pub mapped_bytes: u64,
    /// It cannot be written.
    pub snapshot: bool,
    /// The volume or snapshot that it was made of, while that is there.
    pub origin: Option<String>,
    /// How many queues and connections have it open.
    pub users: usize,
    /// The disks that are on it, and the subsystems, one for each namespace; whether or not anybody has it open.
    pub used_by: Vec<String>,
    /// Requests that did not take the hot path since the pool was opened, by class.
    pub slow: BTreeMap<String, u64>,
}

/// The body of `POST /v1/pools`. Its devices must be free.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreatePool {
    /// Its name.
    pub name: String,
    /// `linear`, `raid0`, `raid1`, `raid10`, `raid5` or `raid6`.
    pub level: String,
    /// Names of devices, in the order of their places; spares last.
    pub devices: Vec<String>,
    /// 64 KiB if not said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strip_bytes: Option<u32>,
    /// 1 MiB if not said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub extent_bytes: Option<u64>,
    /// The log of mapping changes on each member: 16 MiB if not said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_bytes: Option<u64>,
    /// Room for mappings on each member, of which less than half can be used: by the pool's size if not said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata_bytes: Option<u64>,
    /// How many of the devices are spares.
    #[serde(default)]
    pub spares: usize,
    /// Take devices that belong to another pool all the same.
    #[serde(default)]
    pub force: bool,
}

/// The body of `POST /v1/pools/{pool}/scrub`.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scrub {
    /// Rewrite what differs.
    #[serde(default)]
    pub repair: bool,
}

/// The body of `POST /v1/pools/{pool}/replace`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Replace {
    /// The member's device, or its place if it is missing.
    pub old: String,
    /// The device that takes its place.
    pub new: String,
    /// It belongs to another pool, and is taken all the same.
    #[serde(default)]
    pub force: bool,
}

/// The body of `POST /v1/pools/{pool}/grow` and `POST /v1/pools/{pool}/spares`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddDevices {
    /// Names of devices.
    pub devices: Vec<String>,
    /// They belong to another pool, and are taken all the same.
    #[serde(default)]
    pub force: bool,
}

/// The body of `POST /v1/pools/{pool}/volumes`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateVolume {
    /// Its name.
    pub name: String,
    /// As the VM sees it.
    pub size_bytes: u64,
}

/// The body of `PATCH /v1/pools/{pool}/volumes/{volume}`.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetVolume {
    /// The new size.
    pub size_bytes: u64,
}

/// The body of `POST /v1/pools/{pool}/snapshots`: all at the same instant.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TakeSnapshots {
    /// Which, and under what names.
    pub snapshots: Vec<TakeSnapshot>,
}

/// One of them.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TakeSnapshot {
    /// The volume.
    pub volume: String,
    /// The snapshot's name.
    pub name: String,
}

/// The body of `POST /v1/pools/{pool}/clones`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MakeClone {
    /// The snapshot.
    pub snapshot: String,
    /// The new volume's name.
    pub name: String,
}
