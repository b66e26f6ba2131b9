//! From devices that say what they belong to, to pools that can be opened; and what is shown of a pool.
//!
//! Owns: which devices make up which pool and whether they are enough, for the daemon and for commands without one alike. Must
//! not know: what a pool does.

use super::device;
use crate::daemon::ChangeError;
use crate::daemon::api::pool_view::{MemberView, PoolState, PoolView, TaskView, VolumeView};
use hawser_config::value::{Name, Uuid, VolumePath};
use hawser_config::{Backing, Config, DiskConfig, NoSpace, PoolConfig, SubsystemConfig};
use hawser_volume::pool::{self, Label, NoSpacePolicy, OpenOptions, PoolError, Tail};
use hawser_volume::raid::Level;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

const LEVELS: [(&str, Level); 6] = [
    ("linear", Level::Linear),
    ("raid0", Level::Raid0),
    ("raid1", Level::Raid1),
    ("raid10", Level::Raid10),
    ("raid5", Level::Raid5),
    ("raid6", Level::Raid6),
];

/// The word for a level.
pub(crate) fn level_name(level: Level) -> &'static str {
    LEVELS.iter().find(|(_, known)| *known == level).map_or("unknown", |(name, _)| name)
}

/// A level by its word.
///
/// # Errors
/// When there is none.
pub(crate) fn level(text: &str) -> Result<Level, String> {
    let found = LEVELS.iter().find(|(name, _)| *name == text).map(|(_, level)| *level);
    match found {
        Some(level) => Ok(level),
        None => Err(format!("{text:?} is no RAID level, want linear, raid0, raid1, raid10, raid5 or raid6")),
    }
}

impl From<PoolError> for ChangeError {
    fn from(error: PoolError) -> ChangeError {
        match error {
            PoolError::Wrong(what) => ChangeError::Wrong(what),
            PoolError::Unknown(what) => ChangeError::Unknown(what),
            PoolError::Conflict(what) => ChangeError::Conflict(what),
            PoolError::Failed(what) => ChangeError::Failed(what),
        }
    }
}

/// The line of an error, whatever its kind.
pub(crate) fn line_of(error: PoolError) -> String {
    let (PoolError::Wrong(what)
    | PoolError::Unknown(what)
    | PoolError::Conflict(what)
    | PoolError::Failed(what)) = error;
    what
}

/// What is wrong with a pool, for a line that begins with its name: most errors do so, too.
pub(crate) fn without_name<'a>(pool: &str, what: &'a str) -> &'a str {
    let rest = what.strip_prefix("pool ").and_then(|rest| rest.strip_prefix(pool));
    rest.and_then(|rest| rest.strip_prefix(": ").or_else(|| rest.strip_prefix(' '))).unwrap_or(what)
}

/// How a pool is opened by its policies.
pub(crate) fn open_options(policy: &PoolConfig, host: [u8; 16], tail: Box<dyn Tail>) -> OpenOptions {
    let seconds = |seconds: u32| Duration::from_secs(u64::from(seconds));
    OpenOptions {
        assume_exclusive: policy.assume_exclusive,
        accept_loss: policy.accept_loss,
        no_space: match policy.no_space {
            NoSpace::Error => NoSpacePolicy::Error,
            NoSpace::Wait => NoSpacePolicy::Wait,
        },
        discard: policy.discard,
        low_water_permille: policy.low_water * 10,
        sync_bytes_per_second: policy.sync_rate.0,
        member_timeout: seconds(policy.member_timeout),
        spare_delay: seconds(policy.spare_delay),
        ..OpenOptions::new(host, tail)
    }
}

/// The devices that no disk and no namespace of the configuration has for itself: pools are looked for on these.
pub(crate) fn free_devices(config: &Config) -> BTreeSet<Name> {
    let mut names: BTreeSet<Name> = config.devices.iter().map(|device| device.value.name.clone()).collect();
    for backing in config.used() {
        if let Some(device) = backing.device() {
            names.remove(device);
        }
    }
    names
}

/// A pool as its devices tell of it.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    /// Of the device that knows best.
    pub(crate) label: Label,
    /// The devices that belong to it, their places, and their own UUIDs.
    pub(crate) devices: Vec<(Name, Option<u16>, [u8; 16])>,
    /// Devices that say that they belong to it, and were replaced.
    pub(crate) replaced: Vec<Name>,
}

impl Found {
    /// What pools there are, by UUID, on devices with these labels.
    pub(crate) fn all<'a>(
        labels: impl IntoIterator<Item = (&'a Name, &'a Label)>,
    ) -> BTreeMap<[u8; 16], Found> {
        let mut all: BTreeMap<[u8; 16], Found> = BTreeMap::new();
        for (name, label) in labels {
            let found = all.entry(label.pool_uuid).or_insert_with(|| Found {
                label: label.clone(),
                devices: Vec::new(),
                replaced: Vec::new(),
            });
            let knows = |label: &Label| (label.generation, label.openings);
            if knows(label) > knows(&found.label) {
                found.label = label.clone();
            }
            found.devices.push((name.clone(), label.place, label.uuid));
        }
        for found in all.values_mut() {
            // A device that was replaced says for ever that it is a member.
            let (devices, replaced) = std::mem::take(&mut found.devices)
                .into_iter()
                .partition(|(_, _, uuid)| found.label.names(uuid));
            found.devices = devices;
            found.replaced = replaced.into_iter().map(|(name, ..): (Name, _, _)| name).collect();
        }
        all
    }

    /// The places that have to be there for a whole start and are not.
    pub(crate) fn missing(&self) -> Vec<u16> {
        let needed = (0..).zip(&self.label.in_sync).filter(|(_, in_sync)| **in_sync).map(|(place, _)| place);
        needed.filter(|place| self.devices.iter().all(|(_, there, _)| *there != Some(*place))).collect()
    }

    /// "members 1 and 3 are missing", if any are.
    pub(crate) fn missing_line(&self) -> Option<String> {
        let missing: Vec<String> = self.missing().iter().map(u16::to_string).collect();
        match missing.as_slice() {
            [] => None,
            [one] => Some(format!("member {one} is not there")),
            [first @ .., last] => Some(format!("members {} and {last} are not there", first.join(", "))),
        }
    }

    /// Why it is waited for a device that is needed by nobody: what it was given of a member would have to be copied anew.
    pub(crate) fn replacement_line(&self) -> Option<String> {
        let (place, uuid) = self.label.replacement?;
        let is_there = self.devices.iter().any(|(_, _, own)| *own == uuid);
        (!is_there).then(|| format!("the device that is to replace member {place} is not there"))
    }

    /// The names of its devices.
    pub(crate) fn device_names(&self) -> String {
        self.devices.iter().map(|(name, ..)| name.as_str()).collect::<Vec<_>>().join(", ")
    }

    /// What is shown of it while it is not open.
    pub(crate) fn view(&self, troubles: Vec<String>) -> PoolView {
        let member = |place: u16| {
            let device = self.devices.iter().find(|(_, there, _)| *there == Some(place));
            let in_sync = self.label.in_sync.get(usize::from(place)).copied().unwrap_or(false);
            let state = match (device, in_sync) {
                (None, _) => pool::MemberState::Missing,
                (Some(_), true) => pool::MemberState::InSync,
                (Some(_), false) => pool::MemberState::Stale,
            };
            MemberView {
                place: Some(place),
                device: device.map(|(name, ..)| name.to_string()),
                state: state.name().to_owned(),
                why: None,
                repaired: 0,
                wrong: 0,
            }
        };
        let spare = |(name, _, uuid): &(Name, Option<u16>, [u8; 16])| {
            let replaces = self.label.replacement.filter(|(_, replacement)| replacement == uuid);
            let state = match replaces {
                Some(_) => pool::MemberState::Replacing,
                None => pool::MemberState::Spare,
            };
            MemberView {
                place: replaces.map(|(place, _)| place),
                device: Some(name.to_string()),
                state: state.name().to_owned(),
                why: None,
                repaired: 0,
                wrong: 0,
            }
        };
        let spares = self.devices.iter().filter(|(_, place, _)| place.is_none()).map(spare);
        PoolView {
            name: self.label.pool.clone(),
            uuid: Uuid(self.label.pool_uuid).to_string(),
            state: PoolState::Waiting,
            troubles,
            level: level_name(self.label.level).to_owned(),
            strip_bytes: None,
            extent_bytes: None,
            size_bytes: None,
            free_bytes: None,
            metadata_bytes: None,
            metadata_used_bytes: None,
            parity_log_writes: None,
            parity_log_bytes: None,
            members: (0..self.label.members).map(member).chain(spares).collect(),
            tasks: Vec::new(),
        }
    }
}

/// Two pools of one name: neither can be told from the other by it.
pub(crate) fn clash_line(name: &str, one: &Found, other: &Found) -> String {
    let of = |found: &Found| format!("{} (on {})", Uuid(found.label.pool_uuid), found.device_names());
    format!(
        "two pools are called {name}: {} and {}, want the devices of one of them out of the configuration",
        of(one),
        of(other)
    )
}

/// What is shown of a pool that is open.
pub(crate) fn pool_view(view: &pool::PoolView) -> PoolView {
    let state = match (view.is_failed, view.is_degraded) {
        (true, _) => PoolState::Failed,
        (false, true) => PoolState::Degraded,
        (false, false) => PoolState::Ready,
    };
    PoolView {
        name: view.name.clone(),
        uuid: Uuid(view.uuid).to_string(),
        state,
        troubles: view.troubles.clone(),
        level: level_name(view.level).to_owned(),
        strip_bytes: Some(view.strip_bytes),
        extent_bytes: Some(view.extent_bytes),
        size_bytes: Some(view.size_bytes),
        free_bytes: Some(view.free_bytes),
        metadata_bytes: Some(view.metadata_bytes),
        metadata_used_bytes: Some(view.metadata_used_bytes),
        parity_log_writes: Some(view.parity_log.0),
        parity_log_bytes: Some(view.parity_log.1),
        members: view.members.iter().map(member_view).collect(),
        tasks: view.tasks.iter().map(task_view).collect(),
    }
}

fn member_view(member: &pool::MemberView) -> MemberView {
    MemberView {
        place: member.place,
        device: member.device.clone(),
        state: member.state.name().to_owned(),
        why: Some(member.why.clone()).filter(|why| !why.is_empty()),
        repaired: member.repaired,
        wrong: member.wrong,
    }
}

fn task_view(task: &pool::TaskView) -> TaskView {
    TaskView {
        kind: task.kind.to_owned(),
        done_bytes: task.done_bytes,
        total_bytes: task.total_bytes,
        elapsed_seconds: task.elapsed.as_secs(),
        left_seconds: left(task).map(|left| left.as_secs()),
        mismatches: task.mismatches,
        data_faults: task.data_faults,
        parity_faults: task.parity_faults,
        failures: task.failures,
        done: task.is_done,
        cut_short: task.cut_short.clone(),
    }
}

/// How long it takes if it goes on as it went.
fn left(task: &pool::TaskView) -> Option<Duration> {
    if task.is_done || task.done_bytes == 0 {
        return None;
    }
    let to_go = u128::from(task.total_bytes.saturating_sub(task.done_bytes));
    let ms = task.elapsed.as_millis() * to_go / u128::from(task.done_bytes);
    Some(Duration::from_millis(u64::try_from(ms).unwrap_or(u64::MAX)))
}

/// What is shown of a volume.
pub(crate) fn volume_view(pool: &str, volume: &pool::VolumeView) -> VolumeView {
    VolumeView {
        pool: pool.to_owned(),
        name: volume.name.clone(),
        uuid: Uuid(volume.uuid).to_string(),
        size_bytes: volume.size_bytes,
        mapped_bytes: volume.mapped_bytes,
        snapshot: volume.is_snapshot,
        origin: volume.origin.clone(),
        users: volume.users,
        used_by: Vec::new(),
        slow: volume.slow.iter().map(|(class, count)| ((*class).to_owned(), *count)).collect(),
    }
}

/// What is configured to be on a volume: each disk, and each subsystem once for each of its namespaces.
pub(crate) fn users_of<'a>(
    path: &VolumePath,
    disks: impl IntoIterator<Item = &'a DiskConfig>,
    subsystems: impl IntoIterator<Item = &'a SubsystemConfig>,
) -> Vec<String> {
    let is = |backing: Result<Backing, (&'static str, String)>| {
        backing.is_ok_and(|backing| backing.volume() == Some(path))
    };
    let disks = disks.into_iter().filter(|disk| is(disk.backing()));
    let mut users: Vec<String> = disks.map(|disk| format!("disk {}", disk.name)).collect();
    for subsystem in subsystems {
        let namespaces = subsystem.namespaces.iter().filter(|namespace| is(namespace.backing()));
        users.extend(namespaces.map(|_| format!("subsystem {}", subsystem.nqn)));
    }
    users
}

/// A device of the configuration by name, for those that name it.
///
/// # Errors
/// When there is none.
pub(crate) fn known_device(config: &Config, name: &str) -> Result<Name, String> {
    match config.device(name) {
        Some(device) => Ok(device.value.name.clone()),
        None => Err(format!("{name:?} is no [[device]], {}", config.device_names())),
    }
}

/// A new UUID, at random.
///
/// # Errors
/// When the kernel has none: one line.
pub(crate) fn new_uuid() -> Result<[u8; 16], String> {
    super::host::random_uuid().map(|uuid| uuid.0).map_err(|error| format!("no random numbers: {error}"))
}

/// Whether two devices of the configuration, in a list of names, are one.
///
/// # Errors
/// Which is there twice.
pub(crate) fn distinct(names: &[Name]) -> Result<(), String> {
    let mut seen = BTreeSet::new();
    match names.iter().find(|name| !seen.insert(*name)) {
        Some(twice) => Err(format!("device {twice} is named twice, want each device once")),
        None => Ok(()),
    }
}

/// Whether a device may be a member at all: what is in memory, or nowhere, is gone with its process.
///
/// # Errors
/// What would be right.
pub(crate) fn outlives_commands(config: &Config, name: &Name) -> Result<(), String> {
    let kind = config.device(name.as_str()).map(|device| device::Kind::parse(&device.value.uri));
    match kind {
        Some(Ok(device::Kind::Mem { .. } | device::Kind::Null { .. })) => Err(format!(
            "device {name} is gone when this command ends, want a file: or nvme+tcp: device, or --api of a daemon"
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn label(pool: u8, place: Option<u16>, in_sync: &[bool], generation: u64) -> Label {
        Label {
            pool: "p".to_owned(),
            pool_uuid: [pool; 16],
            level: Level::Raid1,
            place,
            members: u16::try_from(in_sync.len()).unwrap(),
            in_sync: in_sync.to_vec(),
            generation,
            openings: 1,
            uuid: place.map_or([99; 16], |place| [place.to_le_bytes()[0]; 16]),
            member_uuids: (0..).zip(in_sync).map(|(place, _)| [place; 16]).collect(),
            spare_uuids: vec![[99; 16]],
            replacement: None,
            opened_by: None,
        }
    }

    fn found(labels: &[(&str, Label)]) -> Vec<Found> {
        let names: Vec<Name> = labels.iter().map(|(name, _)| name.parse().unwrap()).collect();
        Found::all(names.iter().zip(labels.iter().map(|(_, label)| label))).into_values().collect()
    }

    #[test]
    fn the_freshest_label_says_who_is_needed() {
        let both = [true, true];
        let one = found(&[("a", label(1, Some(0), &both, 4))]);
        assert_eq!(one[0].missing(), [1]);
        assert_eq!(one[0].missing_line().unwrap(), "member 1 is not there");
        // The other went on without the first.
        let later = found(&[("b", label(1, Some(1), &[false, true], 5))]);
        assert!(later[0].missing().is_empty());
        let all = found(&[("a", label(1, Some(0), &both, 4)), ("b", label(1, Some(1), &[false, true], 5))]);
        assert!(all[0].missing_line().is_none());
        let view = all[0].view(Vec::new());
        assert_eq!(
            view.members.iter().map(|member| member.state.as_str()).collect::<Vec<_>>(),
            ["stale", "in_sync"]
        );
    }

    #[test]
    fn a_device_that_was_replaced_fills_no_place() {
        let both = [true, true];
        let mut new = label(1, Some(1), &both, 7);
        (new.uuid, new.member_uuids[1]) = ([50; 16], [50; 16]);
        let mut best = label(1, Some(0), &both, 7);
        best.member_uuids[1] = [50; 16];
        let old = label(1, Some(1), &both, 4);
        let without = found(&[("a", best.clone()), ("b", old.clone())]);
        assert_eq!((without[0].missing(), without[0].device_names()), (vec![1], "a".to_owned()));
        assert_eq!(without[0].replaced.iter().map(Name::as_str).collect::<Vec<_>>(), ["b"]);
        let with = found(&[("b", old), ("a", best), ("c", new)]);
        assert_eq!((with[0].missing(), with[0].device_names()), (vec![], "a, c".to_owned()));
    }

    #[test]
    fn a_device_that_replaces_a_member_is_the_pools_and_is_waited_for() {
        let both = [true, true];
        let named = |place, own| {
            let label = label(1, place, &both, 7);
            Label { replacement: Some((1, [60; 16])), uuid: own, ..label }
        };
        let (a, b, c) = (named(Some(0), [0; 16]), named(Some(1), [1; 16]), named(None, [60; 16]));
        let without = found(&[("a", a.clone()), ("b", b.clone())]);
        assert_eq!(without[0].missing_line(), None);
        assert_eq!(
            without[0].replacement_line().unwrap(),
            "the device that is to replace member 1 is not there"
        );
        let with = found(&[("a", a), ("c", c), ("b", b)]);
        assert_eq!((with[0].replacement_line(), with[0].device_names()), (None, "a, c, b".to_owned()));
        let view = with[0].view(Vec::new());
        assert_eq!((view.members[2].state.as_str(), view.members[2].place), ("replacing", Some(1)));
    }

    #[test]
    fn pools_are_told_apart_by_their_uuids() {
        let all = found(&[
            ("a", label(1, Some(0), &[true], 1)),
            ("b", label(2, Some(0), &[true], 1)),
            ("c", label(1, None, &[true], 1)),
        ]);
        assert_eq!(all.iter().map(Found::device_names).collect::<Vec<_>>(), ["a, c", "b"]);
        let line = clash_line("p", &all[0], &all[1]);
        assert!(
            line.starts_with(
                "two pools are called p: 01010101-0101-0101-0101-010101010101 (on a, c) and 0202"
            ),
            "{line}"
        );
        assert_eq!(all[0].view(Vec::new()).members[1].state, "spare");
    }

    /// "pool q: pool q: metadata page 2 …", where the name stood before the line already.
    #[test]
    fn a_name_that_is_said_already_is_not_said_again() {
        for (what, want) in [
            ("pool q: metadata page 2: torn", "metadata page 2: torn"),
            ("pool q is not complete", "is not complete"),
            ("pool q2: torn", "pool q2: torn"),
            ("d0: torn", "d0: torn"),
        ] {
            assert_eq!(without_name("q", what), want);
        }
    }

    #[test]
    fn an_estimate_goes_on_as_it_went() {
        let task = |done_bytes, is_done| pool::TaskView {
            kind: "scrub",
            done_bytes,
            total_bytes: 400,
            elapsed: Duration::from_secs(10),
            mismatches: 0,
            data_faults: 0,
            parity_faults: 0,
            failures: 0,
            is_done,
            cut_short: None,
        };
        assert_eq!(left(&task(100, false)), Some(Duration::from_secs(30)));
        assert_eq!(left(&task(0, false)), None);
        assert_eq!(left(&task(400, true)), None);
    }
}
