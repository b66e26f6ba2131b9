//! From a `[[device]]` to a device.

use super::reactors::Reactors;
use crate::config::value::Uris;
use crate::config::{Config, ConfigError, DeviceConfig, Placed};
use hawser_block::{BlockSize, Device};
type NvmeUri = String;
use hawser_fabric::{FileDevice, FileOptions, MemDevice, NullDevice};
use std::path::PathBuf;
use std::sync::Arc;

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
    /// `nvme+tcp://HOST:PORT/NQN?nsid=1`, one path or several.
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
            [one] if !one.starts_with(NVME_TCP) => Kind::parse_one(one),
            paths => {
                if let Some(other) = paths.iter().find(|uri| !uri.starts_with(NVME_TCP)) {
                    return Err(format!(
                        "{other:?} cannot be one of several paths, want {NVME_TCP}... for each"
                    ));
                }
                Ok(Kind::Nvme { paths: paths.to_vec() })
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

const NVME_TCP: &str = "nvme+tcp:";

fn unknown(uri: &str) -> String {
    format!(
        "{uri:?} is no device, want nvme+tcp://HOST:PORT/NQN?nsid=1, file:///path, mem:?size=4GiB or null:?size=4GiB"
    )
}

fn size_in(uri: &str, rest: &str) -> Result<u64, String> {
    let want = || format!("want {}:?size=4GiB", uri.split(':').next().unwrap_or("mem"));
    let size = rest.strip_prefix("?size=").ok_or_else(|| format!("{uri:?} says no size, {}", want()))?;
    parse_size(size).ok_or_else(|| {
        format!("{uri:?}: {size:?} is no size, want a number and its unit (KiB, MiB, GiB, TiB), such as 4GiB")
    })
}

/// A number with a binary unit.
fn parse_size(text: &str) -> Option<u64> {
    let units = [("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40)];
    let (number, shift) = units.iter().find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, *shift)))?;
    if number.is_empty() || !number.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    number.parse::<u64>().ok()?.checked_mul(1 << shift).filter(|size| *size > 0)
}

/// Checks all devices without opening any.
///
/// # Errors
/// The first that is wrong.
pub fn check(config: &Config) -> Result<(), ConfigError> {
    for device in &config.devices {
        let kind = Kind::parse(&device.value.uri).map_err(|what| device.error("uri", what))?;
        let made_by_us = matches!(kind, Kind::Mem { .. } | Kind::Null { .. });
        if device.value.read_only && made_by_us {
            return Err(
                device.error("read_only", "true has no sense for mem: and null:, want it on the [[disk]]")
            );
        }
    }
    Ok(())
}

/// Opens one device of the `whole` configuration. May wait for a predecessor's lock; `had_predecessor`: a process that wrote
/// to it may have ended without order.
///
/// # Errors
/// One line.
pub fn open(
    config: &Placed<DeviceConfig>,
    whole: &Config,
    had_predecessor: bool,
    reactors: &Reactors,
) -> Result<Arc<dyn Device>, OpenError> {
    let DeviceConfig { name, uri, block_size, read_only } = &config.value;
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
        Kind::Nvme { .. } => {
            let _ = (super::host::identity(&whole.host, &whole.daemon.state_dir), had_predecessor, reactors);
            return Err(OpenError::Failed("this build has no NVMe".to_owned()));
        }
        Kind::File { path } => {
            let options = FileOptions { block_size, read_only: *read_only };
            let device = FileDevice::open(name.as_str(), &path, options);
            Arc::new(device.map_err(|what| OpenError::Failed(config.error("uri", what).to_string()))?)
        }
    })
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
