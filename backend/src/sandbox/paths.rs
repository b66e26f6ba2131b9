//! Which files may be opened: those under `[daemon] allow_paths`, and what libraries read (names of hosts and users).

use crate::assemble::device::{self, Kind};
use hawser_config::{Config, ConfigError, DeviceConfig};
use landlock::{
    ABI, Access, AccessFs, BitFlags, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus,
    path_beneath_rules,
};
use std::path::{Path, PathBuf};

/// What is read beside the configured paths: resolver and user databases with their libraries, the process's own and the
/// system's numbers, block devices' limits.
const READ: [&str; 11] = [
    "/etc",
    "/usr",
    "/lib",
    "/lib64",
    "/proc",
    "/sys",
    "/dev/null",
    "/dev/urandom",
    "/run/systemd/resolve",
    "/run/NetworkManager",
    "/run/resolvconf",
];

/// The newest of Landlock's versions whose rights are all of a kind that we decide about.
const LANDLOCK: ABI = ABI::V5;

/// Where the system has RDMA devices: they are opened, written to and mapped, when a device over RDMA is reached for.
pub(crate) const RDMA: &str = "/dev/infiniband";

/// Where files may be opened, made and removed.
#[derive(Clone, Debug)]
pub(crate) struct AllowedPaths {
    /// With symbolic links followed as far as the paths exist.
    paths: Vec<PathBuf>,
    /// Whether anything is refused at all.
    all: bool,
    /// RDMA devices may be used.
    rdma: bool,
}

impl AllowedPaths {
    /// `allow_paths`, or what it is by default: the run, state and `conf.d` directories and the configured devices.
    ///
    /// # Errors
    /// When a path of the configuration lies outside.
    pub(crate) fn of(config: &Config) -> Result<AllowedPaths, ConfigError> {
        if !config.daemon.sandbox && config.daemon.allow_paths.is_some() {
            return Err(
                config.daemon_error("allow_paths", "has no effect with sandbox = false, want one of them")
            );
        }
        let files = || config.devices.iter().filter_map(|device| Some((device, file_of(&device.value)?)));
        let paths = match &config.daemon.allow_paths {
            Some(paths) => paths.clone(),
            None => {
                let run = config.daemon.api.as_path().parent().unwrap_or(Path::new(""));
                let folders = [run.to_owned(), config.daemon.state_dir.clone(), config.conf_d()];
                folders.into_iter().chain(files().map(|(_, path)| path)).collect()
            }
        };
        let paths = paths.iter().map(|path| resolved(path)).collect();
        let rdma = device::uses_rdma(config);
        let allowed = AllowedPaths { paths, all: !config.daemon.sandbox, rdma };
        let daemon = &config.daemon;
        allowed.check(daemon.api.as_path()).map_err(|what| config.daemon_error("api", what))?;
        if uses_state(config) {
            allowed.check(&daemon.state_dir).map_err(|what| config.daemon_error("state_dir", what))?;
        }
        for (device, path) in files() {
            allowed.check(&path).map_err(|what| device.error("uri", what))?;
        }
        for disk in &config.disks {
            allowed.check(disk.value.socket.as_path()).map_err(|what| disk.error("socket", what))?;
        }
        Ok(allowed)
    }

    /// Whether `path` may be used.
    ///
    /// # Errors
    /// What would be right.
    pub(crate) fn check(&self, path: &Path) -> Result<(), String> {
        let wanted = resolved(path);
        if self.all || self.paths.iter().any(|allowed| wanted.starts_with(allowed)) {
            return Ok(());
        }
        let shown: Vec<String> =
            self.paths.iter().map(|path| format!("{:?}", path.display().to_string())).collect();
        Err(format!(
            "{:?} is outside of what the daemon may open, want it under one of {}, or its folder in [daemon] allow_paths",
            path.display().to_string(),
            shown.join(", ")
        ))
    }
}

/// Whether anything is kept in the state folder.
pub(crate) fn uses_state(config: &Config) -> bool {
    let nvme = |uri: &String| uri.starts_with("nvme");
    !config.subsystems.is_empty()
        || !config.pools.is_empty()
        // Who opens a pool says who it is.
        || config.used().any(|backing| backing.volume().is_some())
        || config.devices.iter().any(|device| device.value.uri.0.iter().any(nvme))
}

fn file_of(device: &DeviceConfig) -> Option<PathBuf> {
    match Kind::parse(&device.uri) {
        Ok(Kind::File { path }) => Some(path),
        _ => None,
    }
}

/// The path without symbolic links, as far as it exists.
pub(crate) fn resolved(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    for above in path.ancestors() {
        if let (Ok(real), Ok(rest)) = (above.canonicalize(), path.strip_prefix(above)) {
            return if rest.as_os_str().is_empty() { real } else { real.join(rest) };
        }
    }
    path
}

/// From now on this thread, and those that it starts, open nothing else; `false` where the kernel cannot do that.
pub(super) fn restrict(allowed: &AllowedPaths) -> Result<bool, String> {
    let failed = |error: landlock::RulesetError| format!("landlock: {error}");
    // Nothing here is ever executed.
    let own: BitFlags<AccessFs> = AccessFs::from_all(LANDLOCK) & !AccessFs::Execute;
    // A panic's backtrace reads the binary.
    let binary = std::env::current_exe().ok();
    let status = Ruleset::default()
        .handle_access(AccessFs::from_all(LANDLOCK))
        .map_err(failed)?
        .create()
        .map_err(failed)?
        // Paths that are not there are left out.
        .add_rules(path_beneath_rules(&allowed.paths, own))
        .map_err(failed)?
        .add_rules(path_beneath_rules(READ, AccessFs::ReadFile | AccessFs::ReadDir))
        .map_err(failed)?
        .add_rules(path_beneath_rules(binary, AccessFs::ReadFile))
        .map_err(failed)?
        .add_rules(path_beneath_rules(allowed.rdma.then_some(RDMA), own))
        .map_err(failed)?
        .restrict_self()
        .map_err(failed)?;
    let shown: Vec<String> = allowed.paths.iter().map(|path| path.display().to_string()).collect();
    match status.ruleset {
        RulesetStatus::NotEnforced => {
            log::warn!(
                "landlock: this kernel does not have it; files outside of allow_paths are not protected"
            );
        }
        RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced => {
            log::info!("landlock: files are opened for writing below {} only", shown.join(", "));
        }
    }
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn config(folder: &Path, text: &str) -> Config {
        let text = text.replace('@', &folder.display().to_string());
        Config::parse(&[(folder.join("h.toml"), text)]).unwrap()
    }

    const BASE: &str = "[daemon]\napi = \"@/run/api\"\nstate_dir = \"@/lib\"\n";

    #[test]
    fn paths_outside_are_refused_with_the_keys_name() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let device = "[[device]]\nname = \"m\"\nuri = \"mem:?size=1MiB\"\n";
        let disk = |socket: &str| format!("[[disk]]\nname = \"d\"\ndevice = \"m\"\nsocket = \"{socket}\"\n");
        let error =
            |text: String| AllowedPaths::of(&config(folder, &text)).map(drop).map_err(|e| e.to_string());
        assert_eq!(error(format!("{BASE}{device}{}", disk("@/run/d"))), Ok(()));
        assert_eq!(error(format!("{BASE}{device}{}", disk("@/lib/d"))), Ok(()));
        let wrong = error(format!("{BASE}{device}{}", disk("@/other/d"))).unwrap_err();
        let want = format!("{0}/h.toml:10:10: [[disk]] socket: \"{0}/other/d\" is outside", folder.display());
        assert!(wrong.starts_with(&want) && wrong.contains("[daemon] allow_paths"), "{wrong}");
        // Names that only begin alike, and ways around.
        error(format!("{BASE}{device}{}", disk("@/running/d"))).unwrap_err();
        fs::create_dir_all(folder.join("run")).unwrap();
        fs::create_dir_all(folder.join("other")).unwrap();
        std::os::unix::fs::symlink(folder.join("other"), folder.join("run/link")).unwrap();
        error(format!("{BASE}{device}{}", disk("@/run/link/d"))).unwrap_err();
        error(format!("{BASE}{device}{}", disk("@/run/../other/d"))).unwrap_err();

        let some = format!("{BASE}allow_paths = [\"@/run\"]\n");
        assert_eq!(error(format!("{some}{device}")), Ok(()));
        let file = "[[device]]\nname = \"f\"\nuri = \"file://@/images/f\"\n";
        assert_eq!(error(format!("{BASE}{file}")), Ok(()), "a device is allowed by being there");
        assert!(error(format!("{some}{file}")).unwrap_err().contains("[[device]] uri: "));
        let far = "[[device]]\nname = \"n\"\nuri = \"nvme+tcp://h/nqn.x\"\n";
        assert!(error(format!("{some}{far}")).unwrap_err().contains("[daemon] state_dir: "));
        let none = format!("{BASE}allow_paths = []\n");
        assert!(error(none.clone()).unwrap_err().contains("[daemon] api: "));
        assert!(
            error(format!("{none}sandbox = false\n"))
                .unwrap_err()
                .contains("[daemon] allow_paths: has no effect")
        );
        assert_eq!(error(format!("{BASE}sandbox = false\n{device}{}", disk("/x"))), Ok(()));
    }

    /// On a thread of its own, which takes the restriction with it.
    #[test]
    fn nothing_outside_is_opened_for_writing() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["run", "lib", "other"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        let image = folder.path().join("image");
        fs::write(&image, "x").unwrap();
        fs::write(folder.path().join("secret"), "x").unwrap();
        let text = format!("{BASE}[[device]]\nname = \"f\"\nuri = \"file://@/image\"\n");
        let allowed = AllowedPaths::of(&config(folder.path(), &text)).unwrap();
        let at = |name: &str| folder.path().join(name);
        let supported = std::thread::scope(|scope| {
            let restricted = scope.spawn(|| {
                // Not that nothing was refused: it is what this test is about.
                if !restrict(&allowed).unwrap() {
                    return false;
                }
                assert!(fs::write(at("other/f"), "x").is_err());
                fs::write(at("run/f"), "x").unwrap();
                fs::rename(at("run/f"), at("run/g")).unwrap();
                fs::create_dir(at("run/folder")).unwrap();
                std::os::unix::net::UnixListener::bind(at("run/s")).unwrap();
                fs::remove_file(at("run/s")).unwrap();
                fs::write(at("lib/f"), "x").unwrap();
                fs::OpenOptions::new().read(true).write(true).open(at("image")).unwrap();
                fs::read("/etc/hosts").unwrap();
                fs::read("/proc/self/status").unwrap();
                let denied = |result: std::io::Result<()>| {
                    assert_eq!(result.unwrap_err().kind(), std::io::ErrorKind::PermissionDenied);
                };
                denied(fs::read(at("secret")).map(drop));
                denied(fs::write("/etc/f", "x"));
                denied(fs::create_dir(at("f")));
                denied(fs::remove_file(at("secret")));
                denied(std::os::unix::net::UnixListener::bind(at("other/s")).map(drop));
                true
            });
            restricted.join().unwrap()
        });
        if !supported {
            skips::skip("this kernel has no Landlock");
        }
        fs::write(at("other/f"), "x").unwrap();
    }
}
