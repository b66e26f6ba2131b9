//! What an NVMe device is opened with.

use crate::rdma::KeyPolicy;
use crate::uri::NvmeUri;
use std::time::Duration;

/// Who we are to targets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostIdentity {
    /// HOSTNQN.
    pub nqn: String,
    /// HOSTID: a UUID's bytes.
    pub id: [u8; 16],
}

/// The timers of a path, with the names that people know from Linux.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathTimers {
    /// A controller that has not heard of us for so long ends the association; we give it up when a keep-alive is not
    /// answered for as long.
    pub keep_alive_tmo: Duration,
    /// The longest wait between attempts to reconnect. The first come sooner.
    pub reconnect_delay: Duration,
    /// After so long without an association a path is not waited for any more; reconnecting goes on. When that holds for all
    /// paths of a device, requests fail. `None`: they wait.
    pub fast_io_fail_tmo: Option<Duration>,
    /// The same: the shorter of the two counts, as on Linux, where after this one reconnecting ends.
    pub ctrl_loss_tmo: Option<Duration>,
    /// A command that is not answered for so long ends the association.
    pub io_timeout: Duration,
    /// How long after the keep-alive timeout a controller may still execute commands of a lost association, where it
    /// does not say so itself (CQT).
    pub quiesce_tmo: Duration,
}

impl PathTimers {
    /// How long after our last command a controller may take to notice that we are gone: twice the keep-alive time-out,
    /// because one that counts traffic (CTRATT.TBKAS, Linux's nvmet) looks once in a time-out whether there was any.
    #[must_use]
    pub fn expiry(&self) -> Duration {
        self.keep_alive_tmo * 2
    }

    /// How long a path is waited for at most.
    #[must_use]
    pub fn patience(&self) -> Option<Duration> {
        self.fast_io_fail_tmo.into_iter().chain(self.ctrl_loss_tmo).min()
    }
}

impl Default for PathTimers {
    fn default() -> Self {
        PathTimers {
            keep_alive_tmo: Duration::from_secs(5),
            reconnect_delay: Duration::from_secs(10),
            fast_io_fail_tmo: None,
            ctrl_loss_tmo: None,
            io_timeout: Duration::from_secs(30),
            quiesce_tmo: Duration::from_secs(5),
        }
    }
}

/// Which of several good paths a command takes; as Linux's `iopolicy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoPolicy {
    /// The one whose network interface is nearest to the reactor. Of several, or where nothing is known of them, the first in the
    /// configuration's order, until it is not good any more.
    #[default]
    Numa,
    /// One after the other.
    RoundRobin,
    /// The one with the fewest commands under way.
    QueueDepth,
}

impl IoPolicy {
    /// The word in the configuration.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            IoPolicy::Numa => "numa",
            IoPolicy::RoundRobin => "round-robin",
            IoPolicy::QueueDepth => "queue-depth",
        }
    }
}

impl std::str::FromStr for IoPolicy {
    type Err = String;

    fn from_str(text: &str) -> Result<IoPolicy, String> {
        Ok(match text {
            "numa" => IoPolicy::Numa,
            "round-robin" => IoPolicy::RoundRobin,
            "queue-depth" => IoPolicy::QueueDepth,
            _ => return Err(format!("{text:?} is no policy, want numa, round-robin or queue-depth")),
        })
    }
}

/// What is done about a volatile cache of which nothing tells whether it was lost with writes in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheDoubt {
    /// It was not, as Linux takes it.
    #[default]
    Trust,
    /// It was: after each new association with unflushed writes before it, the next FLUSH fails.
    FailFlush,
    /// Nothing is left in it: every write is made durable at once (FUA).
    WriteThrough,
}

impl CacheDoubt {
    /// The word in the configuration.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            CacheDoubt::Trust => "trust",
            CacheDoubt::FailFlush => "fail-flush",
            CacheDoubt::WriteThrough => "write-through",
        }
    }
}

impl std::str::FromStr for CacheDoubt {
    type Err = String;

    fn from_str(text: &str) -> Result<CacheDoubt, String> {
        Ok(match text {
            "trust" => CacheDoubt::Trust,
            "fail-flush" => CacheDoubt::FailFlush,
            "write-through" => CacheDoubt::WriteThrough,
            _ => return Err(format!("{text:?} is no answer, want trust, fail-flush or write-through")),
        })
    }
}

/// What an NVMe device is opened with.
#[derive(Clone, Debug)]
pub struct NvmeConfig {
    /// The device's name in the configuration.
    pub name: String,
    /// One path or several, to the same namespace.
    pub paths: Vec<NvmeUri>,
    /// Which of several is taken.
    pub policy: IoPolicy,
    /// For controllers that do not say whose cache they have; ours do.
    pub on_cache_doubt: CacheDoubt,
    /// By which keys targets reach our users' memory, over RDMA.
    pub rdma_keys: KeyPolicy,
    /// Who we are.
    pub host: HostIdentity,
    /// Its timers.
    pub timers: PathTimers,
    /// A process that may have written to this device before us died without an orderly end: where `record` does not tell of its
    /// associations, our first writes wait the longest time that they can live.
    pub had_predecessor: bool,
    /// Where what names our associations is kept for a process after us. Without it that knows less, and waits longer.
    pub record: Option<std::path::PathBuf>,
    /// Where the kernel says how near a network interface is to a CPU: `/sys`. `None`: all are as near.
    pub sysfs: Option<std::path::PathBuf>,
    /// Somebody waits for the outcome: a path at which nobody listens, or that is refused for good, is not waited for.
    pub offline: bool,
}

impl NvmeConfig {
    /// With Linux's timers and no predecessor.
    #[must_use]
    pub fn new(name: impl Into<String>, paths: Vec<NvmeUri>, host: HostIdentity) -> NvmeConfig {
        NvmeConfig {
            name: name.into(),
            paths,
            policy: IoPolicy::default(),
            on_cache_doubt: CacheDoubt::default(),
            rdma_keys: KeyPolicy::default(),
            host,
            timers: PathTimers::default(),
            had_predecessor: false,
            record: None,
            sysfs: None,
            offline: false,
        }
    }
}
