//! `[[pool]]`: policies of a pool, and what stands behind a disk or namespace.
//!
//! Which devices a pool is made of is not said here: the devices say it themselves.

use crate::value::{ByteSize, Name, VolumePath};
use serde::Deserialize;
use std::fmt;

/// What writes get that need space when there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NoSpace {
    /// An error, at once.
    #[default]
    Error,
    /// They wait until there is space again.
    Wait,
}

/// `[[pool]]`: how a pool is run, whichever devices it is found on.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolConfig {
    /// The pool's name.
    pub name: Name,
    /// What writes get that need space when there is none.
    #[serde(default)]
    pub no_space: NoSpace,
    /// Extents that nobody has any more are discarded on the members.
    #[serde(default)]
    pub discard: bool,
    /// Below so many percent of free space a warning is due.
    #[serde(default = "low_water")]
    pub low_water: u32,
    /// The most bytes per second that a resync, rebuild or scrub copies; 0: no limit.
    #[serde(default = "sync_rate")]
    pub sync_rate: ByteSize,
    /// How long requests wait for a member that is out of reach before the others go on without it, in seconds.
    #[serde(default = "member_timeout")]
    pub member_timeout: u32,
    /// How long a member may be away before a spare takes its place, in seconds.
    #[serde(default = "spare_delay")]
    pub spare_delay: u32,
    /// How long members that are missing are waited for before the pool starts without them, in seconds.
    #[serde(default = "assemble_timeout")]
    pub assemble_timeout: u32,
    /// Whoever wrote this says that no other host has the pool open.
    #[serde(default)]
    pub assume_exclusive: bool,
    /// Whoever wrote this would rather have the pool with some garbage in it than not at all.
    #[serde(default)]
    pub accept_loss: bool,
}

fn low_water() -> u32 {
    10
}

fn sync_rate() -> ByteSize {
    ByteSize(200 << 20)
}

fn member_timeout() -> u32 {
    10
}

fn spare_delay() -> u32 {
    60
}

fn assemble_timeout() -> u32 {
    30
}

/// A day: a longer time is a member that is gone.
const SPARE_DELAY_MAX: u32 = 86400;
const ASSEMBLE_TIMEOUT_MAX: u32 = 3600;

impl PoolConfig {
    /// The policies of a pool that no section is about.
    #[must_use]
    pub fn default_of(name: &Name) -> PoolConfig {
        PoolConfig {
            name: name.clone(),
            no_space: NoSpace::default(),
            discard: false,
            low_water: low_water(),
            sync_rate: sync_rate(),
            member_timeout: member_timeout(),
            spare_delay: spare_delay(),
            assemble_timeout: assemble_timeout(),
            assume_exclusive: false,
            accept_loss: false,
        }
    }

    pub(crate) fn check(&self) -> Result<(), (&'static str, String)> {
        if self.low_water > 100 {
            return Err((
                "low_water",
                format!("{} is out of range, want 0 to 100 (percent)", self.low_water),
            ));
        }
        for (key, value, max) in [
            ("member_timeout", self.member_timeout, SPARE_DELAY_MAX),
            ("spare_delay", self.spare_delay, SPARE_DELAY_MAX),
            ("assemble_timeout", self.assemble_timeout, ASSEMBLE_TIMEOUT_MAX),
        ] {
            if value > max {
                return Err((key, format!("{value} is too long, want 0 to {max} (seconds)")));
            }
        }
        Ok(())
    }
}

/// What is behind a disk or namespace.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Backing {
    /// A whole device.
    Device(Name),
    /// A volume of a pool.
    Volume(VolumePath),
}

impl Backing {
    /// The device, if it is one.
    #[must_use]
    pub fn device(&self) -> Option<&Name> {
        match self {
            Backing::Device(name) => Some(name),
            Backing::Volume(_) => None,
        }
    }

    /// The volume, if it is one.
    #[must_use]
    pub fn volume(&self) -> Option<&VolumePath> {
        match self {
            Backing::Device(_) => None,
            Backing::Volume(path) => Some(path),
        }
    }

    /// The key that says it.
    #[must_use]
    pub fn key(&self) -> &'static str {
        match self {
            Backing::Device(_) => "device",
            Backing::Volume(_) => "volume",
        }
    }

    /// From the two keys.
    pub(crate) fn of(
        device: &Option<Name>,
        volume: &Option<VolumePath>,
    ) -> Result<Backing, (&'static str, String)> {
        match (device, volume) {
            (Some(device), None) => Ok(Backing::Device(device.clone())),
            (None, Some(volume)) => Ok(Backing::Volume(volume.clone())),
            (Some(device), Some(volume)) => {
                Err(("volume", format!("\"{volume}\" is there beside device \"{device}\", want one of them")))
            }
            (None, None) => Err(("device", "is missing, want it, or volume = \"POOL/VOLUME\"".to_owned())),
        }
    }
}

impl fmt::Display for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Backing::Device(name) => name.fmt(f),
            Backing::Volume(path) => path.fmt(f),
        }
    }
}
