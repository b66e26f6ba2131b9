//! What a history is made of: drawn from its seed.

use hawser_fabric::initiator::{CacheDoubt, IoPolicy};
use hawser_fabric::rdma::KeyPolicy;
use hawser_sim::Random;
use std::time::Duration;

/// What can happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Connections are reset: both ends know.
    Reset,
    /// Connections are reset towards the host only; what is on its way to the target arrives, late.
    ResetHost,
    /// Towards the target only.
    ResetTarget,
    /// One side sees the end of connections, whose other direction goes on.
    HalfClose,
    /// Nothing passes.
    Silence,
    /// Nothing passes in one direction.
    OneWay,
    /// What is on its way on some connections is held up.
    Hold,
    /// Nobody listens for a while.
    Down,
    /// A bit is another one; only where there are digests.
    Corrupt,
    /// The target's process is killed and started again.
    TargetKill,
    /// The same, and its disk's cache is lost.
    PowerLoss,
    /// The host's process is killed and started again.
    HostKill,
    /// The namespace's asymmetric access at one address changes.
    Ana,
    /// The disk is slow, or some of its requests take very long.
    Slow,
    /// The disk refuses for now: requests may be sent again.
    Refuse,
    /// The disk fails for good: media errors.
    Media,
    /// What is on its way to the target is held up while the host goes on, and sees the connection's end.
    Ghost,
    /// The namespace has more blocks than before.
    Grow,
}

use Fault::{
    Ana, Corrupt, Down, Ghost, Grow, HalfClose, Hold, HostKill, Media, OneWay, PowerLoss, Refuse, Reset,
    ResetHost, ResetTarget, Silence, Slow, TargetKill,
};

const LINKS: [Fault; 8] = [Reset, ResetHost, ResetTarget, HalfClose, Silence, OneWay, Hold, Down];

/// The names that `--scenario` knows, with what happens in them.
pub(crate) const SCENARIOS: [(&str, &[Fault]); 10] = [
    ("calm", &[]),
    ("links", &LINKS),
    ("ghosts", &[Ghost, Ghost, Ghost, Slow, ResetHost, OneWay, Hold]),
    ("disk", &[Reset, Down, Slow, Slow, Refuse, Media, Grow]),
    ("digests", &[Corrupt, Corrupt, Corrupt, Reset, Hold]),
    ("restarts", &[TargetKill, PowerLoss, PowerLoss, Reset, Ghost, Hold]),
    ("successor", &[HostKill, HostKill, HostKill, Ghost, Hold, OneWay, Slow]),
    ("ana", &[Ana, Ana, Ana, Reset, Silence, Down]),
    (
        "rdma",
        &[
            Reset,
            ResetHost,
            ResetTarget,
            HalfClose,
            Silence,
            OneWay,
            Hold,
            Down,
            TargetKill,
            PowerLoss,
            HostKill,
            Ana,
            Slow,
            Refuse,
            Ghost,
            Ghost,
        ],
    ),
    (
        "all",
        &[
            Reset,
            ResetHost,
            ResetTarget,
            HalfClose,
            Silence,
            OneWay,
            Hold,
            Down,
            Corrupt,
            TargetKill,
            PowerLoss,
            HostKill,
            Ana,
            Slow,
            Refuse,
            Media,
            Ghost,
            Grow,
        ],
    ),
];

/// A history, before it has happened.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) scenario: &'static str,
    pub(crate) faults: Vec<Fault>,
    /// How many of them happen.
    pub(crate) count: u64,
    pub(crate) hosts: usize,
    /// Reactors of each host; a queue of the guest on each.
    pub(crate) lanes: usize,
    /// Addresses, each of one of the targets.
    pub(crate) links: usize,
    /// Processes that serve the same disk.
    pub(crate) targets: usize,
    pub(crate) policy: IoPolicy,
    pub(crate) digests: bool,
    /// The target is not like ours: it promises nothing, and resets nobody else's controllers.
    pub(crate) foreign: bool,
    /// It says which cache it has.
    pub(crate) has_cache_identity: bool,
    pub(crate) doubt: CacheDoubt,
    pub(crate) keep_alive: Duration,
    pub(crate) io_timeout: Duration,
    pub(crate) reconnect_delay: Duration,
    /// Requests of each queue of each guest.
    pub(crate) requests: usize,
    /// Ends of connections that are lost on their way, in 1000.
    pub(crate) lost_ends_permille: u64,
    /// Hosts reach the targets over RDMA; else over TCP.
    pub(crate) rdma: Option<Rdma>,
}

/// How hosts use RDMA.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rdma {
    pub(crate) keys: KeyPolicy,
    /// Guests' memory is announced, in 1000; it comes and goes when no request names it. Else its payload is copied.
    pub(crate) announced_permille: u64,
}

/// `seed` as it is, for the scenario of this name, or the one that the seed gives.
pub(crate) fn plan(seed: u64, scenario: Option<&str>) -> Plan {
    let mut random = Random::new(seed ^ 0x5eed_0000);
    let drawn = random.index(SCENARIOS.len());
    let named = scenario.and_then(|name| SCENARIOS.iter().position(|(other, _)| *other == name));
    let (scenario, faults) = SCENARIOS[named.unwrap_or(drawn)];
    let links = [1, 1, 2, 2, 3][random.index(5)];
    let links = if scenario == "ana" { links.max(2) } else { links };
    let digests = faults.contains(&Corrupt);
    let has_cache_identity = random.chance(700);
    let rdma = (scenario == "rdma").then(|| Rdma {
        keys: if random.chance(850) { KeyPolicy::Window } else { KeyPolicy::Region },
        announced_permille: [0, 900, 900, 950][random.index(4)],
    });
    Plan {
        seed,
        scenario,
        faults: faults.to_vec(),
        count: if faults.is_empty() { 0 } else { 3 + random.below(14) },
        hosts: if random.chance(200) { 2 } else { 1 },
        lanes: [1, 2, 2, 3][random.index(4)],
        links,
        targets: if links > 1 && random.chance(300) { 2 } else { 1 },
        policy: [IoPolicy::Numa, IoPolicy::RoundRobin, IoPolicy::QueueDepth][random.index(3)],
        digests: digests || random.chance(150) && rdma.is_none(),
        foreign: random.chance(150),
        has_cache_identity,
        doubt: [CacheDoubt::Trust, CacheDoubt::FailFlush, CacheDoubt::WriteThrough][random.index(3)],
        keep_alive: Duration::from_secs([1, 5][random.index(2)]),
        io_timeout: Duration::from_secs([5, 30][random.index(2)]),
        reconnect_delay: Duration::from_secs([1, 10][random.index(2)]),
        requests: [20, 60, 100][random.index(3)],
        lost_ends_permille: if scenario == "calm" { 0 } else { [0, 200, 600][random.index(3)] },
        rdma,
    }
}
