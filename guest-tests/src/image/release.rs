//! The Debian releases whose kernels guests run, and the apt that knows their packages.
//!
//! Owns: the list of releases, and for one that is not this machine's an apt configuration below the cache.
//! Must not know: what becomes of the packages.
//! Invariants: the machine's own apt configuration, lists and packages are never changed.

#![forbid(unsafe_code)]

use crate::process::output;
use crate::{Result, progress};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// A Debian release whose kernel guests run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    /// Debian 12, Linux 6.1.
    Bookworm,
    /// Debian 13, Linux 6.12.
    Trixie,
}

impl Release {
    /// Debian's name for it.
    pub fn codename(self) -> &'static str {
        match self {
            Release::Bookworm => "bookworm",
            Release::Trixie => "trixie",
        }
    }

    /// This machine's release, or the oldest where it is none of them.
    pub fn of_machine() -> Release {
        if running(Release::Trixie) { Release::Trixie } else { Release::Bookworm }
    }
}

impl std::fmt::Display for Release {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Release::Bookworm => "Debian 12",
            Release::Trixie => "Debian 13",
        })
    }
}

fn running(release: Release) -> bool {
    let text = fs::read_to_string("/etc/os-release").unwrap_or_default();
    text.lines().any(|line| line == format!("VERSION_CODENAME={}", release.codename()))
}

/// After so long the lists are fetched again: security updates replace kernels, and the old ones leave the archive.
const LISTS_LAST: Duration = Duration::from_secs(12 * 3600);

/// apt for one release: the machine's own where that is the machine's release, else one with lists of its own.
pub(super) struct Apt {
    options: Vec<String>,
}

impl Apt {
    /// Opens, and for a foreign release fetches lists that are missing or old.
    pub(super) fn of(release: Release, cache: &Path) -> Result<Apt> {
        if running(release) {
            return Ok(Apt { options: Vec::new() });
        }
        let folder = cache.join(format!("apt-{release}", release = release.codename()));
        let explain = |e: std::io::Error| format!("{}: {e}", folder.display());
        fs::create_dir_all(folder.join("lists/partial")).map_err(explain)?;
        fs::create_dir_all(folder.join("archives/partial")).map_err(explain)?;
        let sources = folder.join("sources.list");
        let keys = "signed-by=/usr/share/keyrings/debian-archive-keyring.gpg";
        let text = format!(
            "deb [{keys}] http://deb.debian.org/debian {0} main\n\
            deb [{keys}] http://deb.debian.org/debian-security {0}-security main\n",
            release.codename()
        );
        fs::write(&sources, text).map_err(explain)?;
        let options = [
            format!("Dir::Etc::SourceList={}", sources.display()),
            "Dir::Etc::SourceParts=-".to_owned(),
            format!("Dir::State::Lists={}/lists", folder.display()),
            format!("Dir::Cache={}", folder.display()),
            "Dir::State::Status=/dev/null".to_owned(),
            // The folder may be one that apt's own user cannot enter.
            "APT::Sandbox::User=".to_owned(),
            "Acquire::Languages=none".to_owned(),
        ];
        let apt = Apt { options: options.iter().flat_map(|o| ["-o".to_owned(), o.clone()]).collect() };
        let stamp = folder.join("fetched");
        let fresh = fs::metadata(&stamp)
            .and_then(|m| m.modified())
            .is_ok_and(|time| time.elapsed().is_ok_and(|age| age < LISTS_LAST));
        if !fresh {
            progress(&format!("guest image: package lists of {release}"));
            match output(apt.command("apt-get").args(["update", "-qq", "--error-on=any"])) {
                Ok(_) => fs::write(&stamp, "").map_err(explain)?,
                // Yesterday's lists are better than none.
                Err(error) if stamp.exists() => progress(&error),
                Err(error) => return Err(error),
            }
        }
        Ok(apt)
    }

    /// One of apt's programs.
    pub(super) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.args(&self.options);
        command
    }
}
