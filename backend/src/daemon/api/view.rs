//! The values that the management API sends and takes: the one definition for the daemon, the command line and the tests.
//!
//! `docs/openapi.json` describes the same for others; a test holds real answers against it.

use super::pool_view::{PoolView, VolumeView};
use hawser_config::DiskConfig;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// `GET /v1/status`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StatusView {
    /// The package's version.
    pub version: String,
    /// The linker's build ID.
    pub build_id: String,
    /// The daemon's process.
    pub pid: u32,
    /// Since the daemon serves.
    pub uptime_seconds: u64,
    /// Deaths by the daemon's own fault since its run state was made.
    pub crashes: u64,
    /// The threads that do the work.
    pub reactors: Vec<ReactorView>,
    /// As `GET /v1/disks`.
    pub disks: Vec<DiskView>,
    /// As `GET /v1/devices`.
    pub devices: Vec<DeviceView>,
    /// As `GET /v1/subsystems`.
    pub subsystems: Vec<SubsystemView>,
    /// As `GET /v1/pools`.
    pub pools: Vec<PoolView>,
    /// As `GET /v1/volumes`.
    pub volumes: Vec<VolumeView>,
}

/// One reactor.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ReactorView {
    /// The CPU that it is pinned to.
    pub cpu: Option<usize>,
    /// Passes of its loop.
    pub passes: u64,
    /// Passes that found something to do.
    pub busy_passes: u64,
    /// Times it went to sleep.
    pub sleeps: u64,
}

/// One disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DiskView {
    /// Its name.
    pub name: String,
    /// The device behind it, or
    pub device: Option<String>,
    /// the volume behind it.
    pub volume: Option<String>,
    /// The vhost-user socket.
    pub socket: String,
    /// How it is doing.
    pub state: DiskState,
    /// Why it is suspended or waits, or what went wrong last with its socket or a session.
    pub trouble: Option<String>,
    /// The most queues that the VM may use.
    pub queues: u16,
    /// What GET_ID answers.
    pub serial: String,
    /// `None` until the device was reached once.
    pub size_bytes: Option<u64>,
    /// `None` until the device was reached once.
    pub block_size: Option<u32>,
    /// The VM may not write.
    pub read_only: bool,
    /// The file that brings it back at the next start; `None`: it was added without `--save`.
    pub saved_in: Option<String>,
    /// Who is connected: two front ends while a VM migrates from one to the other.
    pub front_ends: Vec<FrontEndView>,
    /// How its rings and sessions went; `None` while it is suspended.
    pub rings: Option<RingsView>,
    /// What the VM asked for.
    #[serde(flatten)]
    pub io: IoView,
}

/// A front end that is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrontEndView {
    /// Its rings run, or may; those of another one wait.
    pub serving: bool,
    /// It logs what is written into the VM's memory: the VM migrates.
    pub logging: bool,
}

/// What a disk's queues and sessions have seen since the daemon started, all queues added up.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct RingsView {
    /// Front ends that connected.
    pub sessions: u64,
    /// Sessions that ended for a fault of the guest or its front end.
    pub sessions_failed: u64,
    /// Front ends that were refused, because two were connected.
    pub sessions_refused: u64,
    /// Times that a ring was drained and something was in it.
    pub batches: u64,
    /// Notifications from the guest.
    pub kicks: u64,
    /// Notifications to the guest.
    pub interrupts: u64,
    /// Requests answered with an error without asking the device: the guest's mistakes.
    pub mistakes: u64,
    /// Requests of the process before this one that were carried out again.
    pub replayed: u64,
}

/// How a disk is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskState {
    /// The device was not reached yet, or the socket cannot be had.
    Waiting,
    /// The socket is there and nobody has connected.
    Listening,
    /// A VM is connected.
    Connected,
    /// Set aside after the same request crashed the daemon twice.
    Suspended,
}

impl DiskView {
    /// The device or volume behind it.
    #[must_use]
    pub fn backing(&self) -> &str {
        self.device.as_deref().or(self.volume.as_deref()).unwrap_or("-")
    }
}

impl NamespaceView {
    /// The device or volume behind it.
    #[must_use]
    pub fn backing(&self) -> &str {
        self.device.as_deref().or(self.volume.as_deref()).unwrap_or("-")
    }
}

impl DiskState {
    /// The word that people see.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            DiskState::Waiting => "waiting",
            DiskState::Listening => "listening",
            DiskState::Connected => "connected",
            DiskState::Suspended => "suspended",
        }
    }
}

/// One device.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DeviceView {
    /// Its name.
    pub name: String,
    /// The paths to it.
    pub uri: Vec<String>,
    /// `connecting`, `ready`, `reconnecting` or `failed`.
    pub state: String,
    /// Why it is not ready.
    pub trouble: Option<String>,
    /// `None` until it was reached once.
    pub size_bytes: Option<u64>,
    /// `None` until it was reached once.
    pub block_size: Option<u32>,
    /// The pool that it is a member of, as far as is known.
    pub pool: Option<String>,
    /// `None` when not known.
    pub uuid: Option<String>,
    /// How each of its paths is doing; none where there is but the device itself.
    pub paths: Vec<PathView>,
    /// How it was told to behave, of `nvme+tcp:` and `nvme+rdma:` devices: `io_policy`, `on_cache_doubt`, `rdma_keys`.
    pub settings: BTreeMap<String, String>,
    /// What only its kind of device counts: `bounced_requests` of a `file:`, those that were copied because the guest's
    /// memory was not aligned as direct I/O wants it.
    pub counters: BTreeMap<String, u64>,
    /// Bytes of payload that were copied in this process, by reason.
    pub copied_bytes: BTreeMap<String, u64>,
    /// What was asked of it.
    #[serde(flatten)]
    pub io: IoView,
}

/// One path to a device.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PathView {
    /// As configured.
    pub uri: String,
    /// `live`, `connecting`, or `failed` when it is not waited for any more.
    pub state: String,
    /// What the target says of it, such as `optimized`; `None` where it says nothing.
    pub ana: Option<String>,
    /// What is wrong with it.
    pub trouble: Option<String>,
    /// Since the daemon started: `connect_attempts`, `connects`, `keep_alive_misses`, `failovers`, `retries`, `requeued`.
    pub counters: BTreeMap<String, u64>,
    /// How often its association was lost, by cause.
    pub losses: BTreeMap<String, u64>,
    /// How long it was in each state.
    pub state_seconds: BTreeMap<String, u64>,
    /// Its commands: those that were answered; failures are refusals, also of what was tried again.
    #[serde(flatten)]
    pub io: IoView,
}

/// The body of `PATCH /v1/devices/{name}`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetDevice {
    /// As in the configuration; until the daemon ends.
    pub io_policy: String,
}

/// The numbers of a disk or device since the daemon started, by kind: `read`, `write`, `flush`, `discard`, `write_zeroes`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct IoView {
    /// Requests that ended well.
    pub requests: BTreeMap<String, u64>,
    /// Bytes that they moved or covered.
    pub bytes: BTreeMap<String, u64>,
    /// Requests that failed, by status.
    pub failures: BTreeMap<String, u64>,
    /// From submission to end, of all requests.
    pub latency_ns: BTreeMap<String, LatencyView>,
}

/// One kind's latencies in nanoseconds, known to about 6 %.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct LatencyView {
    /// Half were quicker.
    pub p50: u64,
    /// 99 of 100 were quicker.
    pub p99: u64,
    /// 999 of 1000 were quicker.
    pub p999: u64,
    /// How many.
    pub count: u64,
}

/// A reservation key, as text: `0x` and hexadecimal digits, or a decimal number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key(pub u64);

impl std::str::FromStr for Key {
    type Err = String;

    fn from_str(text: &str) -> Result<Key, String> {
        let number = match text.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16),
            None => text.parse(),
        };
        number.map(Key).map_err(|_| format!("{text:?} is no key, want 64 bits, such as 0x1a2b"))
    }
}

impl Serialize for Key {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:#x}", self.0))
    }
}

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Key, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// `GET /v1/devices/{name}/reservation`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ReservationView {
    /// Counts changes of registrants.
    pub generation: u32,
    /// The type of the reservation there is; `None`: there is none.
    pub rtype: Option<String>,
    /// It outlives a power loss of the target.
    pub ptpl: bool,
    /// Who is registered.
    pub registrants: Vec<RegistrantView>,
}

/// A host that is registered.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RegistrantView {
    /// Its identifier.
    pub hostid: String,
    /// Its key.
    pub rkey: Key,
    /// It holds the reservation.
    pub holds: bool,
}

/// The body of `POST /v1/devices/{name}/reservation`. Keys have nvme-cli's names: `crkey` is our own, `nrkey` the one to register,
/// `prkey` that of who is preempted.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "action", rename_all = "lowercase", deny_unknown_fields)]
#[expect(missing_docs, reason = "nvme-cli's names, said above and in docs/openapi.json")]
pub enum ChangeReservation {
    /// This host becomes a registrant.
    Register {
        nrkey: Key,
        #[serde(default)]
        cptpl: Option<bool>,
    },
    /// Its key becomes another.
    Replace {
        nrkey: Key,
        #[serde(default)]
        crkey: Option<Key>,
        #[serde(default)]
        iekey: bool,
        #[serde(default)]
        cptpl: Option<bool>,
    },
    /// It is none any more.
    Unregister {
        #[serde(default)]
        crkey: Option<Key>,
        #[serde(default)]
        iekey: bool,
    },
    /// It takes the reservation, if nobody has it.
    Acquire { crkey: Key, rtype: String },
    /// It takes it from the registrants with `prkey`.
    Preempt {
        crkey: Key,
        prkey: Key,
        rtype: String,
        #[serde(default)]
        abort: bool,
    },
    /// It gives it back.
    Release { crkey: Key, rtype: String },
    /// Nobody has it, and nobody is registered.
    Clear { crkey: Key },
}

impl ChangeReservation {
    /// The action's word.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            ChangeReservation::Register { .. } => "register",
            ChangeReservation::Replace { .. } => "replace",
            ChangeReservation::Unregister { .. } => "unregister",
            ChangeReservation::Acquire { .. } => "acquire",
            ChangeReservation::Preempt { .. } => "preempt",
            ChangeReservation::Release { .. } => "release",
            ChangeReservation::Clear { .. } => "clear",
        }
    }
}

/// One subsystem.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SubsystemView {
    /// Its name.
    pub nqn: String,
    /// Where it is reached, with the ports that were bound.
    pub listen: Vec<String>,
    /// The same addresses with how well its namespaces can be reached there, counted from 0.
    pub ports: Vec<PortView>,
    /// The hosts that may connect; `None`: any.
    pub allowed_hosts: Option<Vec<String>>,
    /// The hosts that are connected, one for each association.
    pub hosts: Vec<String>,
    /// What is in it.
    pub namespaces: Vec<NamespaceView>,
}

/// One address of a subsystem.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PortView {
    /// The address.
    pub listen: String,
    /// Its ANA groups.
    pub ana_groups: Vec<AnaGroupView>,
}

/// One ANA group at one address.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AnaGroupView {
    /// Its number.
    pub grpid: u32,
    /// `optimized`, `non-optimized`, `inaccessible`, `persistent-loss` or `change`.
    pub ana_state: String,
}

/// The body of `PUT /v1/subsystems/{nqn}/ports/{port}/ana_groups/{grpid}`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetAnaState {
    /// As in [`AnaGroupView`].
    pub ana_state: String,
}

/// One namespace.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NamespaceView {
    /// Its number.
    pub nsid: u32,
    /// The device behind it, or
    pub device: Option<String>,
    /// the volume behind it.
    pub volume: Option<String>,
}

/// The body of `POST /v1/disks`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AddDisk {
    /// What to add.
    pub disk: DiskConfig,
    /// Whether it comes back at the next start.
    #[serde(default)]
    pub save: bool,
}

/// What an error looks like.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ErrorView {
    /// One line.
    pub error: String,
}
