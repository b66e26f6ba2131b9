//! What a history is made of: drawn from its seed.

use crate::guest::Habits;
use hawser_block::BlockSize;
use hawser_sim::Random;
use hawser_volume::pool::NoSpacePolicy;
use hawser_volume::raid::Level;
use std::time::Duration;

/// What can happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// Nothing, for a while.
    Pause,
    /// The power goes: members' caches and the tail are lost.
    Cut,
    /// The same, at some step of the work.
    CutAtStep,
    /// The process is killed.
    Kill,
    /// The same, at some step of the work.
    KillAtStep,
    /// The pool is closed and opened again.
    Reopen,
    /// A member fails for good.
    Dies,
    /// Some requests to a member fail.
    Errs,
    /// A member answers late.
    Slow,
    /// A member alone loses its power, and comes back at once.
    Power,
    /// Members that cannot be done without lose their power so, all at once or only one where all data is there once.
    Lose,
    /// Blocks of a member cannot be read.
    Media,
    /// A member that was dead is back with what it had, or less.
    Back,
    /// It is back empty.
    BackEmpty,
    /// A good member is replaced by a new disk.
    Replace,
    /// It is not, after all.
    AbortReplace,
    /// A spare waits.
    Spare,
    /// Members are compared.
    Scrub,
    /// More members.
    Grow,
    Create,
    Snapshot,
    Clone,
    Delete,
    Resize,
    /// Writes to volumes until the pool is full.
    Fill,
    /// All is made durable.
    Sync,
    /// Each half of a mirror is opened without the other.
    Split,
}

use Event::{
    AbortReplace, Back, BackEmpty, Create, Cut, CutAtStep, Delete, Dies, Errs, Fill, Grow, Kill, KillAtStep,
    Lose, Media, Pause, Power, Reopen, Replace, Resize, Scrub, Slow, Snapshot, Spare, Split, Sync,
};

/// The names that `--scenario` knows, with what happens in them.
pub(crate) const SCENARIOS: [(&str, &[Event]); 13] = [
    ("calm", &[Pause, Sync, Reopen, Create, Scrub]),
    ("power", &[Cut, Cut, CutAtStep, CutAtStep, Kill, Snapshot, Delete, Create, Sync, Slow]),
    ("kills", &[Kill, KillAtStep, KillAtStep, KillAtStep, Snapshot, Delete, Create, Slow]),
    ("members", &[Dies, Dies, Errs, Slow, Power, Media, Back, Back, BackEmpty, Replace, Scrub, Kill, Cut]),
    (
        "thin",
        &[
            Create,
            Snapshot,
            Snapshot,
            Event::Clone,
            Event::Clone,
            Delete,
            Delete,
            Resize,
            Reopen,
            KillAtStep,
            Slow,
        ],
    ),
    ("full", &[Fill, Fill, Fill, Slow, Delete, Snapshot, Create, Cut, CutAtStep, KillAtStep, Sync, Grow]),
    ("split", &[Kill, Cut, Dies, Back, Split]),
    (
        "parity",
        &[
            Cut, CutAtStep, CutAtStep, Kill, KillAtStep, Dies, Dies, Errs, Slow, Power, Media, Back, Replace,
            Scrub, Snapshot,
        ],
    ),
    (
        "stripes",
        &[
            Dies, Dies, Power, Power, Back, Back, Back, Replace, Replace, Kill, KillAtStep, Cut, CutAtStep,
            Reopen, Delete, Create, Snapshot, Slow,
        ],
    ),
    (
        "losses",
        &[
            Lose,
            Lose,
            Lose,
            Lose,
            Snapshot,
            Snapshot,
            Event::Clone,
            Delete,
            Delete,
            Create,
            Sync,
            Kill,
            KillAtStep,
            Cut,
            Slow,
            Reopen,
        ],
    ),
    // Where the first thing that happens is that a member dies.
    ("degraded", &[Cut, Cut, Cut, CutAtStep, CutAtStep, Kill, KillAtStep, Pause]),
    (
        "replace",
        &[
            Replace,
            Replace,
            Replace,
            Replace,
            AbortReplace,
            Pause,
            Pause,
            Dies,
            Errs,
            Slow,
            Power,
            Media,
            Back,
            Back,
            Kill,
            KillAtStep,
            KillAtStep,
            Cut,
            CutAtStep,
            CutAtStep,
            Reopen,
            Reopen,
            Snapshot,
        ],
    ),
    (
        "all",
        &[
            Cut,
            Cut,
            CutAtStep,
            CutAtStep,
            Kill,
            KillAtStep,
            KillAtStep,
            Reopen,
            Dies,
            Dies,
            Errs,
            Slow,
            Power,
            Media,
            Back,
            Back,
            BackEmpty,
            Replace,
            AbortReplace,
            Spare,
            Scrub,
            Grow,
            Create,
            Snapshot,
            Snapshot,
            Event::Clone,
            Delete,
            Delete,
            Resize,
            Fill,
            Sync,
        ],
    ),
];

/// A history, before it has happened.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) scenario: &'static str,
    pub(crate) events: Vec<Event>,
    pub(crate) level: Level,
    pub(crate) members: usize,
    pub(crate) block_size: BlockSize,
    pub(crate) member_bytes: u64,
    pub(crate) strip_bytes: u32,
    pub(crate) extent_bytes: u64,
    pub(crate) region_bytes: u64,
    pub(crate) log_bytes: u64,
    pub(crate) parity_log_bytes: u64,
    pub(crate) metadata_bytes: u64,
    pub(crate) tail_bytes: usize,
    /// Reactors besides the owner's.
    pub(crate) lanes: usize,
    pub(crate) volumes: usize,
    /// Sizes of volumes, in bytes.
    pub(crate) volume_bytes: u64,
    pub(crate) habits: Habits,
    pub(crate) no_space: NoSpacePolicy,
    /// Members are told what is free.
    pub(crate) discards: bool,
    pub(crate) intent_idle: Duration,
    pub(crate) spare_delay: Duration,
    pub(crate) sync_bytes_per_second: u64,
    /// Members say which cache they have.
    pub(crate) has_cache_identity: bool,
    /// Disks were used before.
    pub(crate) has_junk: bool,
}

impl Plan {
    /// Whether every block is there twice, or can be computed.
    pub(crate) fn is_redundant(&self) -> bool {
        self.level.is_redundant()
    }

    pub(crate) fn has_parity(&self) -> bool {
        matches!(self.level, Level::Raid5 | Level::Raid6)
    }
}

/// `seed` as it is, for the scenario of this name, or the one that the seed gives.
pub(crate) fn plan(seed: u64, scenario: Option<&str>) -> Plan {
    let mut random = Random::new(seed ^ 0x7001_0000);
    let drawn = random.index(SCENARIOS.len() + 3).min(SCENARIOS.len() - 1);
    let named = scenario.and_then(|name| SCENARIOS.iter().position(|(other, _)| *other == name));
    let (scenario, choice) = SCENARIOS[named.unwrap_or(drawn)];
    let (mut level, mut members) = match random.below(16) {
        0 => (Level::Linear, 1 + random.index(3)),
        1..3 => (Level::Raid0, 2 + random.index(3)),
        3..7 => (Level::Raid1, 2 + random.index(3).min(random.index(3))),
        7..10 => (Level::Raid10, 2 + random.index(4)),
        10..13 => (Level::Raid5, 3 + random.index(3)),
        _ => (Level::Raid6, 4 + random.index(3)),
    };
    let is_stripes = matches!(scenario, "stripes" | "degraded");
    if scenario == "parity" || is_stripes {
        (level, members) = match random.chance(500) {
            true => (Level::Raid5, 3 + random.index(3)),
            false => (Level::Raid6, 4 + random.index(3)),
        };
    }
    if is_stripes {
        // As few as there can be, or one more: many writes meet then.
        members = members.min(usize::from(level.members_min()) + 1);
    }
    if scenario == "members" && !level.is_redundant() && random.chance(700) {
        level = Level::Raid1;
        members = members.max(2);
    }
    if scenario == "split" {
        (level, members) = (Level::Raid1, 2);
    }
    let block_size = if random.chance(500) { BlockSize::B512 } else { BlockSize::B4096 };
    let strip_bytes = 4096u32 << random.below(5);
    let extent_bytes = (64u64 << 10) << random.below(5).min(random.below(5));
    let is_full = scenario == "full";
    let member_bytes = (if level.parities() > 0 { 6u64 } else { 5 } << 20)
        + (random.below(if is_full { 2 << 20 } else { 5 << 20 }) & !0xfff);
    let count = 2 + random.index(12);
    let mut events: Vec<Event> = (0..count).map(|_| choice[random.index(choice.len())]).collect();
    if scenario == "split" {
        events.retain(|event| *event != Split);
        events.push(Split);
    }
    if scenario == "degraded" {
        events[0] = Dies;
    }
    let volume_bytes = match random.below(10) {
        0 => 1 << 40,
        1..4 => 2 << 20,
        4..7 => 1 << 20,
        _ => 384 << 10,
    };
    let metadata_bytes = [256u64 << 10, 700 << 10, 1700 << 10][random.index(3)];
    let block_bytes = u64::from(block_size.bytes());
    let volume_bytes = if is_stripes { 384 << 10 } else { volume_bytes };
    let habits = Habits {
        pause_ns_max: [300_000, 3_000_000, 30_000_000][random.index(3)],
        flushes: [20, 60, 200][random.index(3)],
        discards: if is_full || is_stripes { 150 } else { [0, 40, 150][random.index(3)] },
        zeroes: [0, 40, 100][random.index(3)],
        writes: [300, 500, 700][random.index(3)],
        fua: [0, 50, 300][random.index(3)],
        overlaps: std::env::var_os("HAWSER_SIM_OVERLAPS").is_some(),
        small_blocks: [1, 4, (16 << 10) / block_bytes][random.index(3)],
        hot_blocks: [64 << 10, 256 << 10, 1 << 20][random.index(3)] / block_bytes,
    };
    // Who waits for space waits for ever when it is room for mappings that lacks.
    let waits = random.chance(150);
    let (volume_bytes, metadata_bytes) =
        if waits { (volume_bytes.min(2 << 20), 1700 << 10) } else { (volume_bytes, metadata_bytes) };
    Plan {
        seed,
        scenario,
        events,
        level,
        members,
        block_size,
        member_bytes,
        strip_bytes,
        extent_bytes,
        region_bytes: (64 << 10) << random.below(4),
        log_bytes: [16u64 << 10, 64 << 10, 64 << 10][random.index(3)],
        parity_log_bytes: (64u64 << 10) << random.below(5),
        metadata_bytes,
        tail_bytes: (64 << 10) << random.below(2),
        lanes: 1 + random.index(2),
        volumes: 1 + random.index(2),
        volume_bytes,
        habits,
        no_space: if waits { NoSpacePolicy::Wait } else { NoSpacePolicy::Error },
        intent_idle: Duration::from_millis([3, 50, 1000, 5000][random.index(4)]),
        spare_delay: Duration::from_millis([10, 500][random.index(2)]),
        // Slow enough for much to happen meanwhile.
        sync_bytes_per_second: if is_stripes {
            1 << 20
        } else {
            [0, 0, 200 << 20, 20 << 20, 3 << 20][random.index(5)]
        },
        // What a process before had written is known to be there only by the cache's name.
        has_cache_identity: random.chance(700) || scenario == "losses",
        discards: random.chance(500),
        has_junk: random.chance(if is_stripes { 700 } else { 100 }) || scenario == "losses",
    }
}
