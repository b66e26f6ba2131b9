//! Who we are to targets: the host NQN and identifier.
//!
//! From `[host]`, else from `/etc/nvme` as nvme-cli keeps them, else made once and kept in the state folder, so that
//! reservations and access lists hold over restarts.

use hawser_config::HostConfig;
use hawser_config::value::{Nqn, Uuid};
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Our identity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostIdentity {
    /// The host NQN.
    pub nqn: Nqn,
    /// The host identifier.
    pub id: Uuid,
}

/// Where nvme-cli keeps its own.
const NVME_CLI: &str = "/etc/nvme";

/// Finds or makes the identity.
///
/// # Errors
/// When a file holds something else, or a new identity cannot be kept: one line.
pub fn identity(config: &HostConfig, state_dir: &Path) -> Result<HostIdentity, String> {
    identity_from(config, Path::new(NVME_CLI), state_dir)
}

/// For a command that only looks: the identity that is there, else one for this once. Nothing is written.
///
/// # Errors
/// When a file holds something else, or there are no random numbers: one line.
pub fn passing(state_dir: &Path) -> Result<HostIdentity, String> {
    let nvme_cli = Path::new(NVME_CLI);
    let id = match read(&nvme_cli.join("hostid"))?.or(read(&state_dir.join("hostid"))?) {
        Some(id) => id,
        None => random_uuid().map_err(|error| error.to_string())?,
    };
    let nqn = match read(&nvme_cli.join("hostnqn"))?.or(read(&state_dir.join("hostnqn"))?) {
        Some(nqn) => nqn,
        None => nqn_of(id)?,
    };
    Ok(HostIdentity { nqn, id })
}

/// For a command that only looks at what a configuration names. Nothing is written.
///
/// # Errors
/// As [`passing`].
pub(crate) fn looking(config: &HostConfig, state_dir: &Path) -> Result<HostIdentity, String> {
    let HostIdentity { nqn, id } = passing(state_dir)?;
    Ok(HostIdentity { nqn: config.nqn.clone().unwrap_or(nqn), id: config.id.unwrap_or(id) })
}

/// NVMe base specification 2.0, section 4.5: the form for hosts without a domain of their own.
fn nqn_of(id: Uuid) -> Result<Nqn, String> {
    format!("nqn.2014-08.org.nvmexpress:uuid:{id}").parse()
}

fn identity_from(config: &HostConfig, nvme_cli: &Path, state_dir: &Path) -> Result<HostIdentity, String> {
    let id = match config.id {
        Some(id) => id,
        None => match read(&nvme_cli.join("hostid"))? {
            Some(id) => id,
            None => kept(&state_dir.join("hostid"), || random_uuid().map_err(|error| error.to_string()))?,
        },
    };
    let nqn = match &config.nqn {
        Some(nqn) => nqn.clone(),
        None => match read(&nvme_cli.join("hostnqn"))? {
            Some(nqn) => nqn,
            None => kept(&state_dir.join("hostnqn"), || nqn_of(id))?,
        },
    };
    Ok(HostIdentity { nqn, id })
}

fn read<T: std::str::FromStr<Err = String>>(file: &Path) -> Result<Option<T>, String> {
    match fs::read_to_string(file) {
        Ok(text) => text.trim().parse().map(Some).map_err(|error| format!("{}: {error}", file.display())),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(None)
        }
        Err(error) => Err(format!("{}: cannot be read: {error}", file.display())),
    }
}

fn kept<T>(file: &Path, make: impl FnOnce() -> Result<T, String>) -> Result<T, String>
where
    T: std::str::FromStr<Err = String> + std::fmt::Display,
{
    if let Some(value) = read(file)? {
        return Ok(value);
    }
    let value = make()?;
    keep(file, &value.to_string()).map_err(|error| {
        format!(
            "{}: cannot be written: {error}; want a [daemon] state_dir that can, or [host] nqn and id",
            file.display()
        )
    })?;
    // Another daemon may have been quicker: then its value stands.
    Ok(read(file)?.unwrap_or(value))
}

fn keep(file: &Path, text: &str) -> io::Result<()> {
    let folder = file.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let mut new = tempfile::NamedTempFile::new_in(folder)?;
    writeln!(new, "{text}")?;
    // No secret: who makes it may be root, and who reads it the daemon's user.
    new.as_file().set_permissions(fs::Permissions::from_mode(0o644))?;
    new.as_file().sync_all()?;
    match new.persist_noclobber(file) {
        Ok(_) => {}
        Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        Err(error) => return Err(error.error),
    }
    fs::File::open(folder)?.sync_all()
}

/// The kernel makes one at each read.
pub(super) fn random_uuid() -> io::Result<Uuid> {
    let text = fs::read_to_string("/proc/sys/kernel/random/uuid")?;
    text.trim().parse().map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_made_once_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("state");
        let none = folder.path().join("none");
        let first = identity_from(&HostConfig::default(), &none, &state).unwrap();
        assert_eq!(first.nqn.as_str(), format!("nqn.2014-08.org.nvmexpress:uuid:{}", first.id));
        assert_eq!(identity_from(&HostConfig::default(), &none, &state).unwrap(), first);
    }

    #[test]
    fn the_configuration_comes_before_nvme_cli_and_that_before_our_own() {
        let folder = tempfile::tempdir().unwrap();
        let nvme_cli = folder.path().join("nvme");
        fs::create_dir(&nvme_cli).unwrap();
        fs::write(nvme_cli.join("hostnqn"), "nqn.2014-08.org.example:h\n").unwrap();
        fs::write(nvme_cli.join("hostid"), "0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff\n").unwrap();
        let state = folder.path().join("state");
        let found = identity_from(&HostConfig::default(), &nvme_cli, &state).unwrap();
        assert_eq!(found.nqn.as_str(), "nqn.2014-08.org.example:h");
        assert_eq!(found.id.to_string(), "0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff");
        assert!(!state.exists());
        let config = HostConfig { nqn: Some("nqn.2026-11.a:b".parse().unwrap()), id: None };
        let found = identity_from(&config, &nvme_cli, &state).unwrap();
        assert_eq!(found.nqn.as_str(), "nqn.2026-11.a:b");
        fs::write(nvme_cli.join("hostid"), "garbage\n").unwrap();
        let error = identity_from(&HostConfig::default(), &nvme_cli, &state).unwrap_err();
        assert!(error.contains("hostid: \"garbage\" is no UUID"), "{error}");
    }
}
