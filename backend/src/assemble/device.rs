//! From a `[[device]]` to a device.

use super::host::{self, HostIdentity};
use crate::daemon::run_state;
use crate::sandbox;
use hawser_block::{BlockSize, Device};
use hawser_config::value::{self, ByteSize, Listen, Name, Uris};
use hawser_config::{Config, ConfigError, DeviceConfig, Placed, SubsystemConfig};
use hawser_fabric::initiator::{self, CacheDoubt, IoPolicy, NvmeConfig, NvmeDevice, PathTimers};
use hawser_fabric::rdma::KeyPolicy;
use hawser_fabric::uri::{NvmeUri, Transport};
use hawser_fabric::{FileDevice, FileOptions, MemDevice, NullDevice};
use hawser_runtime::ReactorHandle;
use std::collections::HashMap;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A device's URIs, understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `mem:?size=4GiB`
    Mem {
        /// In bytes.
        size: u64,
    },
    /// `null:?size=4GiB`
    Null {
        /// In bytes.
        size: u64,
    },
    /// `file:///path`
    File {
        /// The file or block device.
        path: PathBuf,
    },
    /// `nvme+tcp://HOST:PORT/NQN?nsid=1` or `nvme+rdma:`, one path or several.
    Nvme {
        /// The paths.
        paths: Vec<NvmeUri>,
    },
}

/// Why a device is not there.
#[derive(Debug)]
pub enum OpenError {
    /// The configuration cannot be right.
    Config(ConfigError),
    /// The configuration may be right, and the machine is not as it says: one line.
    Failed(String),
}

impl Kind {
    /// Understands the URIs of one device.
    ///
    /// # Errors
    /// What is wrong and what would be right.
    pub fn parse(uris: &Uris) -> Result<Kind, String> {
        match uris.0.as_slice() {
            [one] if !is_nvme(one) => Kind::parse_one(one),
            paths => {
                if let Some(other) = paths.iter().find(|uri| !is_nvme(uri)) {
                    return Err(format!(
                        "{other:?} cannot be one of several paths, want nvme+tcp:... or nvme+rdma:... for each"
                    ));
                }
                Ok(Kind::Nvme { paths: paths.iter().map(|uri| uri.parse()).collect::<Result<_, _>>()? })
            }
        }
    }

    fn parse_one(uri: &str) -> Result<Kind, String> {
        let (scheme, rest) = uri.split_once(':').ok_or_else(|| unknown(uri))?;
        match scheme {
            "mem" => Ok(Kind::Mem { size: size_in(uri, rest)? }),
            "null" => Ok(Kind::Null { size: size_in(uri, rest)? }),
            "file" => {
                let path = rest.strip_prefix("//").unwrap_or(rest);
                if !path.starts_with('/') || path.ends_with('/') {
                    return Err(format!("{uri:?} names no absolute path, want file:///path/to/image"));
                }
                Ok(Kind::File { path: PathBuf::from(path) })
            }
            _ => Err(unknown(uri)),
        }
    }
}

fn is_nvme(uri: &str) -> bool {
    Transport::ALL.iter().any(|transport| {
        uri.strip_prefix("nvme+")
            .and_then(|rest| rest.strip_prefix(transport.name()))
            .is_some_and(|rest| rest.starts_with(':'))
    })
}

/// The device that is reached over RDMA first.
fn rdma_device(config: &Config) -> Option<&Placed<DeviceConfig>> {
    config.devices.iter().find(|device| device.value.uri.0.iter().any(|uri| uri.starts_with("nvme+rdma:")))
}

/// The subsystem that listens there first.
fn rdma_subsystem(config: &Config) -> Option<&Placed<SubsystemConfig>> {
    let listens = |listen: &Listen| listen.transport == value::Transport::Rdma;
    config.subsystems.iter().find(|subsystem| subsystem.value.listen.iter().any(listens))
}

/// Whether the configuration asks for RDMA.
#[must_use]
pub fn uses_rdma(config: &Config) -> bool {
    rdma_device(config).is_some() || rdma_subsystem(config).is_some()
}

/// Opens the verbs driver, if the configuration asks for RDMA: a library that only some hosts have.
///
/// # Errors
/// One line: what is missing, and who asks for it.
pub fn open_verbs(config: &Config) -> Result<(), String> {
    if !uses_rdma(config) {
        return Ok(());
    }
    hawser_fabric::rdma::watch_memory();
    hawser_fabric::rdma::driver::table().map(drop).map_err(|what| {
        let device = rdma_device(config).map(|device| device.error("uri", &what));
        let subsystem = || rdma_subsystem(config).map(|subsystem| subsystem.error("listen", &what));
        device.or_else(subsystem).map_or(what.clone(), |error| error.to_string())
    })
}

fn unknown(uri: &str) -> String {
    format!(
        "{uri:?} is no device, want nvme+tcp://HOST:PORT/NQN?nsid=1, nvme+rdma://HOST:PORT/NQN?nsid=1, file:///path, mem:?size=4GiB or null:?size=4GiB"
    )
}

fn size_in(uri: &str, rest: &str) -> Result<u64, String> {
    let want = || format!("want {}:?size=4GiB", uri.split(':').next().unwrap_or("mem"));
    let size = rest.strip_prefix("?size=").ok_or_else(|| format!("{uri:?} says no size, {}", want()))?;
    match size.parse::<ByteSize>() {
        Ok(ByteSize(0)) => Err(format!("{uri:?}: {size:?} is no size, {}", want())),
        Ok(ByteSize(size)) => Ok(size),
        Err(what) => Err(format!("{uri:?}: {what}")),
    }
}

/// What two devices must not both write to.
#[derive(PartialEq, Eq, Hash)]
enum Place {
    /// A file that is there, by whatever name: its device and number.
    File(u64, u64),
    /// A block device, whichever node leads to it.
    BlockDevice(u64),
    /// A file that is not there (yet), without symbolic links.
    Missing(PathBuf),
    /// A namespace: its subsystem has one name, at whatever address.
    Namespace(String, u32),
}

impl Place {
    fn of_file(path: &Path) -> Place {
        match std::fs::metadata(path) {
            Ok(found) if found.file_type().is_block_device() => Place::BlockDevice(found.rdev()),
            Ok(found) => Place::File(found.dev(), found.ino()),
            Err(_) => Place::Missing(sandbox::resolved(path)),
        }
    }
}

/// Checks all devices without opening any.
///
/// # Errors
/// The first that is wrong.
pub fn check(config: &Config) -> Result<(), ConfigError> {
    let mut places: HashMap<Place, &Placed<DeviceConfig>> = HashMap::new();
    for device in &config.devices {
        let kind = Kind::parse(&device.value.uri).map_err(|what| device.error("uri", what))?;
        if !matches!(kind, Kind::Nvme { .. })
            && let Some((key, _)) = device.value.timers().next()
        {
            return Err(device.error(key, "is for nvme+tcp:// and nvme+rdma:// only, want no such key here"));
        }
        let (policy, doubt) = (&device.value.io_policy, &device.value.on_cache_doubt);
        for (key, value) in [("io_policy", policy), ("on_cache_doubt", doubt)] {
            if value.is_some() && !matches!(kind, Kind::Nvme { .. }) {
                let what = "is for nvme+tcp:// and nvme+rdma:// only, want no such key here";
                return Err(device.error(key, what));
            }
        }
        let keys = &device.value.rdma_keys;
        let has_rdma = |kind: &Kind| match kind {
            Kind::Nvme { paths } => paths.iter().any(|uri| uri.transport == Transport::Rdma),
            _ => false,
        };
        if keys.is_some() && !has_rdma(&kind) {
            return Err(device.error("rdma_keys", "is for nvme+rdma:// only, want no such key here"));
        }
        parsed::<KeyPolicy>(keys).map_err(|what| device.error("rdma_keys", what))?;
        parsed::<IoPolicy>(policy).map_err(|what| device.error("io_policy", what))?;
        parsed::<CacheDoubt>(doubt).map_err(|what| device.error("on_cache_doubt", what))?;
        if matches!(kind, Kind::Nvme { .. }) && device.value.block_size.is_some() {
            return Err(device.error("block_size", "is the target's to say, want no such key here"));
        }
        match kind {
            Kind::File { path } => {
                // A writer locks its file: the second would wait for the first.
                let place = Place::of_file(&path);
                if let Some(first) = places.get(&place)
                    && !(first.value.read_only && device.value.read_only)
                {
                    let what =
                        format!("{:?} is device {}'s file too, want one device", path, first.value.name);
                    return Err(device.error("uri", what));
                }
                places.insert(place, device);
            }
            Kind::Mem { .. } | Kind::Null { .. } | Kind::Nvme { .. } if device.value.read_only => {
                return Err(device.error("read_only", "true is for file: only, want it on the [[disk]]"));
            }
            Kind::Mem { .. } | Kind::Null { .. } => {}
            Kind::Nvme { paths } => {
                // Two devices know nothing of each other: each would be written to by a disk of its own.
                let mut own: Vec<Place> = Vec::new();
                for uri in &paths {
                    let place = Place::Namespace(uri.subsystem_nqn.clone(), uri.nsid);
                    if let Some(first) = places.get(&place) {
                        let what = format!(
                            "namespace {} of {} is device {}'s too, want one device",
                            uri.nsid, uri.subsystem_nqn, first.value.name
                        );
                        return Err(device.error("uri", what));
                    }
                    own.push(place);
                }
                places.extend(own.into_iter().map(|place| (place, device)));
            }
        }
    }
    Ok(())
}

/// For what a device is opened.
#[derive(Clone, Copy, Debug)]
pub struct Opening {
    /// A process that wrote to it may have ended without order.
    pub had_predecessor: bool,
    /// For a command, whose user waits: what cannot be reached fails, instead of being tried again without end.
    pub offline: bool,
    /// With `offline`: in place of the daemon, whose record of what it had asked for is used.
    pub in_run_state: bool,
}

/// Whether two devices, of which each is understood, are the same file or namespace.
#[must_use]
pub fn are_the_same(one: &Uris, other: &Uris) -> bool {
    let places = |uris: &Uris| match Kind::parse(uris) {
        Ok(Kind::File { path }) => vec![Place::of_file(&path)],
        Ok(Kind::Nvme { paths }) => {
            paths.into_iter().map(|uri| Place::Namespace(uri.subsystem_nqn, uri.nsid)).collect()
        }
        // Each process has its own.
        Ok(Kind::Mem { .. } | Kind::Null { .. }) | Err(_) => Vec::new(),
    };
    let others = places(other);
    places(one).iter().any(|place| others.contains(place))
}

/// Where an import keeps what names its associations, for the next one.
#[must_use]
pub fn import_record(config: &Config, device: &Name) -> PathBuf {
    config.daemon.state_dir.join(format!("import-{device}"))
}

/// Opens one device of the `whole` configuration. May wait for a predecessor's lock.
///
/// # Errors
/// One line.
pub fn open(
    config: &Placed<DeviceConfig>,
    whole: &Config,
    opening: Opening,
    reactors: &[ReactorHandle],
) -> Result<Arc<dyn Device>, OpenError> {
    let DeviceConfig { name, uri, block_size, read_only, .. } = &config.value;
    let wrong = |key: &str, what: String| OpenError::Config(config.error(key, what));
    let kind = Kind::parse(uri).map_err(|what| wrong("uri", what))?;
    let block_size = BlockSize::new(block_size.unwrap_or(512)).unwrap_or(BlockSize::B512);
    let shown = &uri.0[0];
    Ok(match kind {
        Kind::Mem { size } => Arc::new(
            MemDevice::new(name.as_str(), size, block_size)
                .map_err(|what| wrong("uri", format!("{shown:?}: {what}")))?,
        ),
        Kind::Null { size } => Arc::new(
            NullDevice::new(name.as_str(), size, block_size)
                .map_err(|what| wrong("uri", format!("{shown:?}: {what}")))?,
        ),
        Kind::Nvme { paths } => {
            let HostIdentity { nqn, id } =
                host::identity(&whole.host, &whole.daemon.state_dir).map_err(OpenError::Failed)?;
            let host = initiator::HostIdentity { nqn: nqn.to_string(), id: id.0 };
            let mut nvme = NvmeConfig::new(name.as_str(), paths, host);
            nvme.timers = timers(&config.value);
            nvme.policy = parsed(&config.value.io_policy).map_err(|what| wrong("io_policy", what))?;
            let doubt = parsed(&config.value.on_cache_doubt);
            nvme.on_cache_doubt = doubt.map_err(|what| wrong("on_cache_doubt", what))?;
            nvme.rdma_keys = parsed(&config.value.rdma_keys).map_err(|what| wrong("rdma_keys", what))?;
            nvme.had_predecessor = opening.had_predecessor;
            nvme.offline = opening.offline;
            nvme.sysfs = Some(PathBuf::from("/sys"));
            nvme.record = Some(match opening.offline && !opening.in_run_state {
                true => import_record(whole, name),
                false => {
                    run_state::folder_of(whole.daemon.api.as_path()).join(format!("associations-{name}"))
                }
            });
            NvmeDevice::open(nvme, reactors)
                .map_err(|what| OpenError::Failed(config.error("uri", what).to_string()))?
        }
        Kind::File { path } => {
            let options = FileOptions { block_size, read_only: *read_only };
            let device = FileDevice::open(name.as_str(), &path, options);
            Arc::new(device.map_err(|what| OpenError::Failed(config.error("uri", what).to_string()))?)
        }
    })
}

/// What a key says, or its default.
fn parsed<T: Default + std::str::FromStr<Err = String>>(text: &Option<String>) -> Result<T, String> {
    text.as_ref().map_or_else(|| Ok(T::default()), |text| text.parse())
}

fn timers(config: &DeviceConfig) -> PathTimers {
    let seconds = |value: u32| Duration::from_secs(u64::from(value));
    let default = PathTimers::default();
    PathTimers {
        keep_alive_tmo: config.keep_alive_tmo.map_or(default.keep_alive_tmo, seconds),
        reconnect_delay: config.reconnect_delay.map_or(default.reconnect_delay, seconds),
        fast_io_fail_tmo: config.fast_io_fail_tmo.map(seconds),
        ctrl_loss_tmo: config.ctrl_loss_tmo.map_or(default.ctrl_loss_tmo, |value| Some(seconds(value))),
        io_timeout: config.io_timeout.map_or(default.io_timeout, seconds),
        quiesce_tmo: config.quiesce_tmo.map_or(default.quiesce_tmo, seconds),
    }
}

/// How long a device may take to end what it does: a target that does not answer is left.
const CLOSE_MAX: Duration = Duration::from_secs(2);

/// Lets devices go, and waits until their connections have ended in order.
pub fn close(devices: Vec<Arc<dyn Device>>) {
    // A device's numbers live as long as anything of it is at work.
    let at_work: Vec<_> = devices.iter().map(|device| Arc::downgrade(&device.stats())).collect();
    drop(devices);
    let since = Instant::now();
    while at_work.iter().any(|stats| stats.strong_count() > 0) {
        if since.elapsed() > CLOSE_MAX {
            log::warn!(
                "targets did not end their associations within {} s: they notice our end by themselves",
                CLOSE_MAX.as_secs()
            );
            return;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(uri: &str) -> Result<Kind, String> {
        Kind::parse(&Uris(vec![uri.to_owned()]))
    }

    #[test]
    fn uris_are_understood() {
        assert_eq!(parse("mem:?size=4GiB"), Ok(Kind::Mem { size: 4 << 30 }));
        assert_eq!(parse("null:?size=64KiB"), Ok(Kind::Null { size: 64 << 10 }));
        assert_eq!(parse("file:///a/b"), Ok(Kind::File { path: "/a/b".into() }));
        assert_eq!(parse("file:/a/b"), Ok(Kind::File { path: "/a/b".into() }));
        let paths = ["nvme+tcp://h:1/nqn.x?nsid=2", "nvme+tcp://i:1/nqn.x?nsid=2"];
        let Ok(Kind::Nvme { paths: parsed }) = Kind::parse(&Uris(paths.map(str::to_owned).to_vec())) else {
            panic!("two paths to one namespace");
        };
        assert_eq!(parsed.len(), 2);
        let mixed = Kind::parse(&Uris(vec![paths[0].to_owned(), "mem:?size=1GiB".to_owned()]));
        assert!(mixed.unwrap_err().contains("\"mem:?size=1GiB\" cannot be one of several paths"));
    }

    #[test]
    fn keys_that_do_not_go_with_a_uri_are_refused() {
        for (devices, want) in [
            (
                vec!["mem:?size=1GiB\"\nread_only = true #"],
                "h:4:13: [[device]] read_only: true is for file: only",
            ),
            (
                vec!["nvme+tcp://h/nqn.x\"\nread_only = true #"],
                "h:4:13: [[device]] read_only: true is for file: only",
            ),
            (
                vec!["nvme+tcp://h/nqn.x\"\nblock_size = 512 #"],
                "h:4:14: [[device]] block_size: is the target's to say",
            ),
            (
                vec!["nvme+tcp://h/nqn.x\"\nio_policy = \"best\" #"],
                "h:4:13: [[device]] io_policy: \"best\" is no policy, want numa, round-robin or queue-depth",
            ),
            (
                vec!["mem:?size=1GiB\"\nio_policy = \"numa\" #"],
                "h:4:13: [[device]] io_policy: is for nvme+tcp:// and nvme+rdma:// only",
            ),
            (
                vec!["mem:?size=1GiB\"\nio_timeout = 1 #"],
                "h:4:14: [[device]] io_timeout: is for nvme+tcp:// and nvme+rdma:// only",
            ),
            (
                vec!["nvme+tcp://h/nqn.x\"\nrdma_keys = \"window\" #"],
                "h:4:13: [[device]] rdma_keys: is for nvme+rdma:// only",
            ),
            (
                vec!["nvme+rdma://h/nqn.x\"\nrdma_keys = \"all\" #"],
                "h:4:13: [[device]] rdma_keys: \"all\" is no kind of key, want window or region",
            ),
            (
                vec!["file:///a", "file:/a"],
                "h:6:7: [[device]] uri: \"/a\" is device d0's file too, want one device",
            ),
            (
                vec!["nvme+tcp://h/nqn.x?nsid=2", "nvme+tcp://i:4421/nqn.x?nsid=2"],
                "h:6:7: [[device]] uri: namespace 2 of nqn.x is device d0's too, want one device",
            ),
        ] {
            let device =
                |(at, uri): (usize, &&str)| format!("[[device]]\nname = \"d{at}\"\nuri = \"{uri}\"\n");
            let text: String = devices.iter().enumerate().map(device).collect();
            let config = Config::parse(&[("h".into(), text)]).unwrap();
            let error = check(&config).unwrap_err().to_string();
            assert!(error.starts_with(want), "{error}");
        }
        let text = "[[device]]\nname = \"a\"\nuri = \"nvme+tcp://h/nqn.x\"\nio_timeout = 0\n".to_owned();
        let error = Config::parse(&[("h".into(), text)]).unwrap_err().to_string();
        assert_eq!(error, "h:4:14: [[device]] io_timeout: 0 is out of range, want 1 to 86400 (seconds)");
    }

    /// Paths were compared as they were written: the second writer waited 30 s for the lock of the first, and then blamed
    /// another process, which was this one.
    #[test]
    fn one_file_by_another_name_is_the_same_file() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("image"), "x").unwrap();
        std::fs::create_dir(at("real")).unwrap();
        std::os::unix::fs::symlink(at("image"), at("link")).unwrap();
        std::os::unix::fs::symlink(at("real"), at("other")).unwrap();
        std::fs::hard_link(at("image"), at("hard")).unwrap();
        let result = |first: &str, second: &str, more: &str| {
            let device = |name: &str, path: &str| {
                format!("[[device]]\nname = \"{name}\"\nuri = \"file://{}\"\n{more}", at(path).display())
            };
            let text = device("a", first) + &device("b", second);
            check(&Config::parse(&[("h".into(), text)]).unwrap()).map_err(|error| error.to_string())
        };
        for (first, second) in [
            ("image", "link"),
            ("link", "image"),
            ("image", "hard"),
            ("image", "real/../image"),
            ("real/none", "other/none"),
        ] {
            let error = result(first, second, "").unwrap_err();
            let want = format!("{:?} is device a's file too, want one device", at(second));
            assert_eq!(error, format!("h:6:7: [[device]] uri: {want}"));
            assert_eq!(result(first, second, "read_only = true\n"), Ok(()), "readers may");
        }
        assert_eq!(result("image", "real/image", ""), Ok(()));
    }

    #[test]
    fn wrong_uris_say_what_would_be_right() {
        for (uri, want) in [
            ("", "is no device, want nvme+tcp://"),
            ("/a", "is no device, want nvme+tcp://"),
            ("http://x", "is no device, want nvme+tcp://"),
            ("mem:", "says no size, want mem:?size=4GiB"),
            ("null:?siz=1GiB", "says no size, want null:?size=4GiB"),
            ("mem:?size=4", "\"4\" is no size, want a number and its unit"),
            ("mem:?size=4GB", "\"4GB\" is no size"),
            ("mem:?size=-4GiB", "is no size"),
            ("mem:?size=0GiB", "is no size"),
            ("mem:?size=99999999999TiB", "is no size"),
            ("file://a/b", "names no absolute path, want file:///path/to/image"),
            ("file:///a/", "names no absolute path"),
        ] {
            let error = parse(uri).unwrap_err();
            assert!(error.contains(want) && error.contains(uri), "{uri}: {error}");
        }
    }
}
