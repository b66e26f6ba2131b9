//! What a daemon starts with: one TOML file and the `conf.d/*.toml` beside it, read, merged and checked.
//!
//! Owns: the meaning of every key, its default and its limits. Must not know: any other crate of ours, how any of it is
//! carried out, nor the state of the world (whether a target answers, whether a socket is free).
//!
//! Every error is one line that names the file, the place, the key, the value and what would be right.

#![forbid(unsafe_code)]

mod place;
mod pool;
pub mod value;

pub use pool::{Backing, NoSpace, PoolConfig};

use place::Place;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use value::{Listen, Name, Nqn, Referral, Serial, SocketMode, SocketPath, Uris, Uuid, VolumePath};

/// A wrong configuration, or one that cannot be read. Its text is one line.
#[derive(Debug)]
pub struct ConfigError(String);

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ConfigError {}

/// Everything that the files say.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// The main file.
    pub file: PathBuf,
    /// `[daemon]`
    pub daemon: DaemonConfig,
    /// `[host]`
    pub host: HostConfig,
    /// `[discovery]`
    pub discovery: DiscoveryConfig,
    /// `[[device]]`
    pub devices: Vec<Placed<DeviceConfig>>,
    /// `[[disk]]`
    pub disks: Vec<Placed<DiskConfig>>,
    /// `[[subsystem]]`
    pub subsystems: Vec<Placed<SubsystemConfig>>,
    /// `[[pool]]`
    pub pools: Vec<Placed<PoolConfig>>,
    daemon_place: Option<Place>,
}

/// A section, and where it stands.
#[derive(Clone, Debug)]
pub struct Placed<T> {
    /// What it says.
    pub value: T,
    place: Place,
}

impl<T> Placed<T> {
    /// The file that it stands in.
    #[must_use]
    pub fn file(&self) -> &Path {
        self.place.file()
    }

    /// An error about `key` of this section.
    #[must_use]
    pub fn error(&self, key: &str, what: impl fmt::Display) -> ConfigError {
        ConfigError(format!("{}: {what}", self.place.key(key)))
    }
}

/// `[daemon]`: the process.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DaemonConfig {
    /// The management API's socket.
    pub api: SocketPath,
    /// The API socket's permissions.
    pub api_mode: SocketMode,
    /// CPUs, one reactor on each; `None`: one reactor, unpinned.
    pub reactors: Option<Vec<usize>>,
    /// How long an idle reactor polls before it sleeps, in microseconds.
    pub poll_us: u32,
    /// How long requests in flight may take when a disk or the daemon stops, in seconds.
    pub drain_timeout: u32,
    /// For what outlives a boot.
    pub state_dir: PathBuf,
    /// Whom a daemon that is started as root becomes.
    pub user: Option<String>,
    /// With which group; `None`: the user's own.
    pub group: Option<String>,
    /// Gives up files and system calls that are not needed.
    pub sandbox: bool,
    /// The only places where files may be opened; `None`: the run, state and `conf.d` directories and the devices.
    pub allow_paths: Option<Vec<PathBuf>>,
}

/// Where the API is when nobody says otherwise.
pub const DEFAULT_API: &str = "/run/hawser/api.sock";

/// A second of polling is more than any idle period worth polling through.
const POLL_US_MAX: u32 = 1_000_000;
const DRAIN_TIMEOUT_MAX: u32 = 3600;
/// A day; above it somebody meant milliseconds.
const TIMER_MAX: u32 = 86400;
/// As nvmet's NVMET_MAX_ANAGRPS.
const ANA_GROUP_MAX: u32 = 128;
/// The most queues of a disk.
pub const QUEUES_MAX: u16 = 64;

impl Default for DaemonConfig {
    fn default() -> Self {
        DaemonConfig {
            api: DEFAULT_API.parse().expect("a short path"),
            api_mode: SocketMode(0o600),
            reactors: None,
            poll_us: 100,
            drain_timeout: 10,
            state_dir: PathBuf::from("/var/lib/hawser"),
            user: None,
            group: None,
            sandbox: true,
            allow_paths: None,
        }
    }
}

/// `[host]`: who we are to targets.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostConfig {
    /// The host NQN.
    pub nqn: Option<Nqn>,
    /// The host identifier.
    pub id: Option<Uuid>,
}

/// `[discovery]`: what our discovery service says beside our own subsystems.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct DiscoveryConfig {
    /// Other discovery services.
    pub referrals: Vec<Referral>,
}

/// `[[device]]`: a block device that the daemon can reach.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceConfig {
    /// Its name.
    pub name: Name,
    /// One path to it or several.
    pub uri: Uris,
    /// The logical block size in bytes, for devices that have none of their own.
    pub block_size: Option<u32>,
    /// Nobody may write, and a `file:` is opened (and locked) accordingly.
    #[serde(default)]
    pub read_only: bool,
    /// `nvme+tcp:` and `nvme+rdma:` only, in seconds, as all that follow: a controller that is not heard of for so long is given up.
    pub keep_alive_tmo: Option<u32>,
    /// The longest wait between attempts to reconnect.
    pub reconnect_delay: Option<u32>,
    /// After so long without a connection a path is not waited for; when that holds for all, requests fail. `None`: they wait.
    pub fast_io_fail_tmo: Option<u32>,
    /// The same; the shorter of the two counts.
    pub ctrl_loss_tmo: Option<u32>,
    /// A command that is not answered for so long ends the connection.
    pub io_timeout: Option<u32>,
    /// How long a target may still execute commands of a lost connection, where it does not say so itself.
    pub quiesce_tmo: Option<u32>,
    /// `nvme+tcp:` and `nvme+rdma:` only: which of several good paths is taken.
    pub io_policy: Option<String>,
    /// The same: what is done about a volatile cache that may have been lost.
    pub on_cache_doubt: Option<String>,
    /// `nvme+rdma:` only: by which keys the target reaches the memory of a command.
    pub rdma_keys: Option<String>,
}

impl DeviceConfig {
    /// The timers of a path that are set, with their keys.
    pub fn timers(&self) -> impl Iterator<Item = (&'static str, u32)> {
        let all = [
            ("keep_alive_tmo", self.keep_alive_tmo),
            ("reconnect_delay", self.reconnect_delay),
            ("fast_io_fail_tmo", self.fast_io_fail_tmo),
            ("ctrl_loss_tmo", self.ctrl_loss_tmo),
            ("io_timeout", self.io_timeout),
            ("quiesce_tmo", self.quiesce_tmo),
        ];
        all.into_iter().filter_map(|(key, value)| Some((key, value?)))
    }
}

/// `[[disk]]`: a device or volume offered to a VM at a vhost-user socket. Also what `disk add` sends and `--save` writes.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Its name.
    pub name: Name,
    /// The device behind it, or
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<Name>,
    /// the volume behind it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<VolumePath>,
    /// The vhost-user socket.
    pub socket: SocketPath,
    /// The socket's permissions; default: what the umask leaves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket_mode: Option<SocketMode>,
    /// The socket's owner: a name or a number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket_user: Option<String>,
    /// The socket's group: a name or a number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket_group: Option<String>,
    /// What GET_ID answers; default: the name's first 20 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<Serial>,
    /// The most queues that the VM may use.
    #[serde(default = "one_queue")]
    pub queues: u16,
    /// The VM may not write.
    #[serde(default)]
    pub read_only: bool,
    /// Other disks of the same device or volume may write too: the VMs know how to share its blocks.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shared: bool,
}

fn one_queue() -> u16 {
    1
}

impl DiskConfig {
    /// What GET_ID answers.
    #[must_use]
    pub fn serial(&self) -> Serial {
        self.serial.clone().unwrap_or_else(|| Serial::from_name(&self.name))
    }

    /// What is behind it.
    ///
    /// # Errors
    /// When that is not exactly one thing: the key that is wrong, and why. Never of one that was checked.
    pub fn backing(&self) -> Result<Backing, (&'static str, String)> {
        Backing::of(&self.device, &self.volume)
    }

    /// Checks the values that are not checked by their types.
    ///
    /// # Errors
    /// The key that is wrong, and why.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        self.backing()?;
        if self.queues == 0 || self.queues > QUEUES_MAX {
            return Err(("queues", format!("{} is out of range, want 1 to {QUEUES_MAX}", self.queues)));
        }
        Ok(())
    }
}

/// `[[subsystem]]`: an NVMe-oF subsystem that we are the target of.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SubsystemConfig {
    /// Its name.
    pub nqn: Nqn,
    /// Where it is reached.
    pub listen: Vec<Listen>,
    /// The hosts that may connect; `None`: any.
    pub allowed_hosts: Option<Vec<Nqn>>,
    /// What is in it.
    #[serde(default, rename = "namespace")]
    pub namespaces: Vec<NamespaceConfig>,
}

/// `[[subsystem.namespace]]`: a device or volume inside a subsystem.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NamespaceConfig {
    /// Its number in the subsystem.
    pub nsid: u32,
    /// The device behind it, or
    pub device: Option<Name>,
    /// the volume behind it.
    pub volume: Option<VolumePath>,
    /// Its UUID, where the device's own is not wanted.
    pub uuid: Option<Uuid>,
    /// The ANA group that it is in.
    #[serde(default = "ana_group")]
    pub ana_group: u32,
}

impl NamespaceConfig {
    /// As [`DiskConfig::backing`].
    ///
    /// # Errors
    /// As [`DiskConfig::backing`].
    pub fn backing(&self) -> Result<Backing, (&'static str, String)> {
        Backing::of(&self.device, &self.volume)
    }
}

fn ana_group() -> u32 {
    1
}

/// One file as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    daemon: Option<toml::Spanned<DaemonConfig>>,
    host: Option<toml::Spanned<HostConfig>>,
    discovery: Option<toml::Spanned<DiscoveryConfig>>,
    #[serde(default)]
    device: Vec<toml::Spanned<DeviceConfig>>,
    #[serde(default)]
    disk: Vec<toml::Spanned<DiskConfig>>,
    #[serde(default)]
    subsystem: Vec<toml::Spanned<SubsystemConfig>>,
    #[serde(default)]
    pool: Vec<toml::Spanned<PoolConfig>>,
}

impl Config {
    /// Reads `file` and its `conf.d/*.toml`, in the order of their names, and checks the whole.
    ///
    /// # Errors
    /// When a file cannot be read or says something wrong.
    pub fn load(file: &Path) -> Result<Config, ConfigError> {
        let mut files = vec![(file.to_owned(), read(file)?)];
        for extra in conf_d_files(file)? {
            let text = read(&extra)?;
            files.push((extra, text));
        }
        Config::parse(&files)
    }

    /// Checks files that have been read: pairs of path and content, the main file first.
    ///
    /// # Errors
    /// When one of them says something wrong.
    pub fn parse(files: &[(PathBuf, String)]) -> Result<Config, ConfigError> {
        let mut config = Config { file: files[0].0.clone(), ..Config::default() };
        let mut host_place: Option<Place> = None;
        let mut discovery_place: Option<Place> = None;
        for (file, text) in files {
            let document: Document =
                toml::from_str(text).map_err(|error| ConfigError(place::toml_error(file, text, &error)))?;
            let at = |section: &str, start: usize| Place::new(file, text, section, start);
            if let Some(daemon) = document.daemon {
                let place = at("[daemon]", daemon.span().start);
                once("daemon", config.daemon_place.as_ref(), &place)?;
                config.daemon = daemon.into_inner();
                check_daemon(&config.daemon, &place)?;
                config.daemon_place = Some(place);
            }
            if let Some(host) = document.host {
                let place = at("[host]", host.span().start);
                once("host", host_place.as_ref(), &place)?;
                config.host = host.into_inner();
                host_place = Some(place);
            }
            if let Some(discovery) = document.discovery {
                let place = at("[discovery]", discovery.span().start);
                once("discovery", discovery_place.as_ref(), &place)?;
                config.discovery = discovery.into_inner();
                discovery_place = Some(place);
            }
            place_all(document.device, &mut config.devices, |start| at("[[device]]", start));
            place_all(document.disk, &mut config.disks, |start| at("[[disk]]", start));
            place_all(document.subsystem, &mut config.subsystems, |start| at("[[subsystem]]", start));
            place_all(document.pool, &mut config.pools, |start| at("[[pool]]", start));
        }
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        unique(&self.devices, "name", |device| device.name.clone())?;
        unique(&self.disks, "name", |disk| disk.name.clone())?;
        unique(&self.disks, "socket", |disk| disk.socket.clone())?;
        unique(&self.subsystems, "nqn", |subsystem| subsystem.nqn.clone())?;
        unique(&self.pools, "name", |pool| pool.name.clone())?;
        for pool in &self.pools {
            pool.value.check().map_err(|(key, what)| pool.error(key, what))?;
        }
        for device in &self.devices {
            let known = device.value.block_size.is_none_or(|bytes| bytes == 512 || bytes == 4096);
            if !known {
                let bytes = device.value.block_size.unwrap_or(0);
                return Err(device.error("block_size", format!("{bytes} is no block size, want 512 or 4096")));
            }
            for (key, seconds) in device.value.timers() {
                if seconds == 0 || seconds > TIMER_MAX {
                    let what = format!("{seconds} is out of range, want 1 to {TIMER_MAX} (seconds)");
                    return Err(device.error(key, what));
                }
            }
        }
        for (index, disk) in self.disks.iter().enumerate() {
            disk.value.check().map_err(|(key, what)| disk.error(key, what))?;
            let backing = disk.value.backing().map_err(|(key, what)| disk.error(key, what))?;
            self.check_backing(&backing).map_err(|what| disk.error(backing.key(), what))?;
            let before = self.disks[..index].iter().map(|other| &other.value);
            self.check_sharing(&disk.value, before).map_err(|what| disk.error(backing.key(), what))?;
            if disk.value.socket == self.daemon.api {
                let what = format!("{:?} is the API's own, want another path", disk.value.socket.to_string());
                return Err(disk.error("socket", what));
            }
        }
        for subsystem in &self.subsystems {
            self.check_subsystem(subsystem)?;
        }
        Ok(())
    }

    fn check_subsystem(&self, subsystem: &Placed<SubsystemConfig>) -> Result<(), ConfigError> {
        let SubsystemConfig { listen, namespaces, .. } = &subsystem.value;
        if listen.is_empty() {
            let what = "[] is nowhere, want at least one address such as \"tcp://127.0.0.1:4420\"";
            return Err(subsystem.error("listen", what));
        }
        for (index, namespace) in namespaces.iter().enumerate() {
            // NVMe base specification 2.0, section 3.2.1.2: 0 and FFFFFFFFh name no namespace.
            if namespace.nsid == 0 || namespace.nsid == u32::MAX {
                let what = format!("{} is no namespace number, want 1 or more", namespace.nsid);
                return Err(subsystem.error("nsid", what));
            }
            if namespace.ana_group == 0 || namespace.ana_group > ANA_GROUP_MAX {
                let what = format!("{} is out of range, want 1 to {ANA_GROUP_MAX}", namespace.ana_group);
                return Err(subsystem.error("ana_group", what));
            }
            if namespaces[..index].iter().any(|other| other.nsid == namespace.nsid) {
                let what = format!(
                    "{} is there twice in {}, want another number for each namespace",
                    namespace.nsid, subsystem.value.nqn
                );
                return Err(subsystem.error("nsid", what));
            }
            let backing = namespace.backing().map_err(|(key, what)| subsystem.error(key, what))?;
            self.check_backing(&backing).map_err(|what| subsystem.error(backing.key(), what))?;
        }
        Ok(())
    }

    /// Checks that there is a device called `name`.
    ///
    /// # Errors
    /// What is wrong, and which devices there are.
    pub fn check_device(&self, name: &Name) -> Result<(), String> {
        if self.device(name.as_str()).is_some() {
            return Ok(());
        }
        Err(format!("{:?} is no [[device]], {}", name.as_str(), self.device_names()))
    }

    /// Checks that what is behind a disk or namespace can be there: volumes are known when their pool is open.
    ///
    /// # Errors
    /// As [`Config::check_device`].
    pub fn check_backing(&self, backing: &Backing) -> Result<(), String> {
        match backing {
            Backing::Device(name) => self.check_device(name),
            Backing::Volume(_) => Ok(()),
        }
    }

    /// What disks and namespaces of the files use, each as often as it is used.
    pub fn used(&self) -> impl Iterator<Item = Backing> {
        let namespaces = self.subsystems.iter().flat_map(|subsystem| &subsystem.value.namespaces);
        let disks = self.disks.iter().filter_map(|disk| disk.value.backing().ok());
        disks.chain(namespaces.filter_map(|namespace| namespace.backing().ok()))
    }

    /// The policies of the pool called `name`.
    #[must_use]
    pub fn pool(&self, name: &Name) -> PoolConfig {
        let section = self.pools.iter().find(|pool| pool.value.name == *name);
        section.map_or_else(|| PoolConfig::default_of(name), |pool| pool.value.clone())
    }

    /// Checks that `disk` may be there beside `others`: two disks may both write to one device or volume only where both say
    /// that they share it.
    ///
    /// # Errors
    /// Which disk is in the way, and what would be right.
    pub fn check_sharing<'a>(
        &self,
        disk: &DiskConfig,
        others: impl IntoIterator<Item = &'a DiskConfig>,
    ) -> Result<(), String> {
        let Ok(backing) = disk.backing() else { return Ok(()) };
        let writes =
            |disk: &DiskConfig| disk.backing().is_ok_and(|other| other == backing) && !disk.read_only;
        let device = backing.device().and_then(|name| self.device(name.as_str()));
        if !writes(disk) || device.is_some_and(|device| device.value.read_only) {
            return Ok(());
        }
        match others.into_iter().find(|other| writes(other) && !(disk.shared && other.shared)) {
            None => Ok(()),
            Some(other) => Err(format!(
                "\"{backing}\" is disk {}'s too, want read_only = true on one of them, or shared = true on both if their \
                 VMs know how to share it",
                other.name
            )),
        }
    }

    /// Puts the API elsewhere than the files say.
    ///
    /// # Errors
    /// When a disk has that socket.
    pub fn set_api(&mut self, api: SocketPath) -> Result<(), ConfigError> {
        self.daemon.api = api;
        self.check()
    }

    /// An error about a key of `[daemon]`.
    #[must_use]
    pub fn daemon_error(&self, key: &str, what: impl fmt::Display) -> ConfigError {
        match &self.daemon_place {
            Some(place) => ConfigError(format!("{}: {what}", place.key(key))),
            None => ConfigError(format!("{}: [daemon] {key}: {what}", self.file.display())),
        }
    }

    /// The device called `name`.
    #[must_use]
    pub fn device(&self, name: &str) -> Option<&Placed<DeviceConfig>> {
        self.devices.iter().find(|device| device.value.name.as_str() == name)
    }

    /// "there are n0 and n1", for messages.
    #[must_use]
    pub fn device_names(&self) -> String {
        let names: Vec<&str> = self.devices.iter().map(|device| device.value.name.as_str()).collect();
        match names.as_slice() {
            [] => "there is none in the configuration".to_owned(),
            [one] => format!("want {one}"),
            [first @ .., last] => format!("want one of {} or {last}", first.join(", ")),
        }
    }

    /// The folder of additional files.
    #[must_use]
    pub fn conf_d(&self) -> PathBuf {
        conf_d(&self.file)
    }
}

fn conf_d(file: &Path) -> PathBuf {
    file.parent().unwrap_or(Path::new("")).join("conf.d")
}

fn read(file: &Path) -> Result<String, ConfigError> {
    fs::read_to_string(file)
        .map_err(|error| ConfigError(format!("{}: cannot be read: {error}", file.display())))
}

fn conf_d_files(file: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let folder = conf_d(file);
    let cannot = |error: io::Error| ConfigError(format!("{}: cannot be read: {error}", folder.display()));
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(cannot(error)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(cannot)?.path();
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if path.extension().is_some_and(|extension| extension == "toml") && !hidden {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn once(section: &str, first: Option<&Place>, second: &Place) -> Result<(), ConfigError> {
    let Some(first) = first else { return Ok(()) };
    Err(ConfigError(format!(
        "{}: is in {} too, want [{section}] in one file only",
        second.section(),
        first.file().display()
    )))
}

fn check_daemon(daemon: &DaemonConfig, place: &Place) -> Result<(), ConfigError> {
    let wrong = |key: &str, what: String| Err(ConfigError(format!("{}: {what}", place.key(key))));
    if let Some(reactors) = &daemon.reactors {
        if reactors.is_empty() {
            return wrong("reactors", "[] is none, want CPU numbers such as [0], or no such key".to_owned());
        }
        if let Some(twice) = reactors
            .iter()
            .enumerate()
            .find(|(index, cpu)| reactors[..*index].contains(cpu))
            .map(|(_, cpu)| cpu)
        {
            return wrong("reactors", format!("{twice} is there twice, want another CPU for each reactor"));
        }
    }
    if daemon.group.is_some() && daemon.user.is_none() {
        return wrong("group", "has no effect without user, want both".to_owned());
    }
    if daemon.poll_us > POLL_US_MAX {
        return wrong(
            "poll_us",
            format!("{} is too long, want 0 to {POLL_US_MAX} (microseconds)", daemon.poll_us),
        );
    }
    if daemon.drain_timeout > DRAIN_TIMEOUT_MAX {
        return wrong(
            "drain_timeout",
            format!("{} is too long, want 0 to {DRAIN_TIMEOUT_MAX} (seconds)", daemon.drain_timeout),
        );
    }
    Ok(())
}

fn place_all<T>(
    sections: Vec<toml::Spanned<T>>,
    placed: &mut Vec<Placed<T>>,
    place: impl Fn(usize) -> Place,
) {
    placed.extend(sections.into_iter().map(|section| {
        let place = place(section.span().start);
        Placed { value: section.into_inner(), place }
    }));
}

fn unique<T, K: Eq + std::hash::Hash + fmt::Display>(
    sections: &[Placed<T>],
    key: &str,
    value: impl Fn(&T) -> K,
) -> Result<(), ConfigError> {
    let mut seen: HashMap<K, &Place> = HashMap::new();
    for section in sections {
        let value = value(&section.value);
        if let Some(first) = seen.get(&value) {
            let what = format!("{:?} is in {} too, want another", value.to_string(), first.short());
            return Err(section.error(key, what));
        }
        seen.insert(value, &section.place);
    }
    Ok(())
}
