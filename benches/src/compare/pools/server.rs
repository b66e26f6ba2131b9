//! A daemon with pools: how it is configured, asked and counted.
//!
//! Owns: the configuration, the management API as far as the cases need it. Must not know: loads.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::Pool;
use crate::compare::servers::{Place, READY, Server, head, serve, size, write};
use crate::sys::TempDir;
use crate::to_f64;

/// What a pool's own tables and logs take of each member, at most.
pub(super) const TABLES_BYTES: u64 = 256 << 20;

/// A daemon with a bare device and, beside it, pools of the same kind of devices.
pub(super) struct PoolServer {
    /// The daemon; its first socket is the bare device's.
    pub(super) server: Server,
    program: PathBuf,
}

/// What a daemon has counted: values by `name{labels}`.
pub(super) struct Numbers(BTreeMap<String, f64>);

impl Numbers {
    /// The sum of all whose name begins so.
    pub(super) fn sum(&self, start: &str) -> f64 {
        self.0
            .range(start.to_owned()..)
            .take_while(|(name, _)| name.starts_with(start))
            .map(|(_, value)| value)
            .sum()
    }

    fn parse(text: &str) -> Numbers {
        let lines = text.lines().filter(|line| line.starts_with("hawser_"));
        let pairs = lines.filter_map(|line| {
            let (name, value) = line.rsplit_once(' ')?;
            Some((name.to_owned(), value.trim().parse().ok()?))
        });
        Numbers(pairs.collect())
    }
}

impl PoolServer {
    /// Starts `hawser` with a bare device `d` of `place.bytes` and these pools, that have room for a volume of as many bytes and
    /// `more_bytes` besides; members are `mem:`.
    pub(super) fn start(
        program: &Path,
        poll_us: u32,
        place: &Place<'_>,
        pools: &[Pool],
        more_bytes: u64,
    ) -> Result<Self, String> {
        let folder = TempDir::new(None).map_err(|e| format!("a temporary folder: {e}"))?;
        // Memory that is not written is not taken.
        let member = format!("mem:?size={}", size(place.bytes + more_bytes + TABLES_BYTES));
        let mut devices = vec![("d".to_owned(), format!("mem:?size={}", size(place.bytes)))];
        for pool in pools {
            devices.extend(members(*pool).into_iter().map(|name| (name, member.clone())));
        }
        let started =
            Self::launch(program, poll_us, place, folder, &devices, "", &[("d", "device = \"d\"")])?;
        for pool in pools {
            started.create(*pool)?;
        }
        Ok(started)
    }

    /// Makes a pool of its members.
    pub(super) fn create(&self, pool: Pool) -> Result<(), String> {
        let members = members(pool);
        let mut create = vec!["pool", "create", pool.name(), "--raid", pool.level()];
        create.extend(members.iter().map(String::as_str));
        self.ask(&create).map(drop)
    }

    /// Starts `hawser` with devices, more of a configuration, and disks: their names, and what is behind them.
    pub(super) fn launch(
        program: &Path,
        poll_us: u32,
        place: &Place<'_>,
        folder: TempDir,
        devices: &[(String, String)],
        more: &str,
        disks: &[(&str, &str)],
    ) -> Result<Self, String> {
        let socket = folder.path().join(disks.first().map_or("d", |(name, _)| name));
        let mut server = Server { children: Vec::new(), socket, folder };
        let config = configure(server.folder.path(), poll_us, place.cpu, devices, more, disks)?;
        server.start_child(serve(program, &config), Some(place.cpu))?;
        server.wait()?;
        let api = server.folder.path().join("d.api");
        let child = server.children.last_mut().ok_or("no server")?;
        let ready = child.wait_for_socket(&api, READY);
        ready.map_err(|e| format!("{e}: {}", server.complaint()))?;
        Ok(PoolServer { server, program: program.to_owned() })
    }

    /// Ends the daemon as a service manager does; what it has written stays.
    pub(super) fn stop(mut self) -> Result<TempDir, String> {
        for child in &mut self.server.children {
            if !child.terminate(READY) {
                return Err(format!("the daemon does not end: {}", self.server.complaint()));
            }
        }
        let Server { folder, children, .. } = self.server;
        drop(children);
        Ok(folder)
    }

    /// Makes a volume, and offers it; its socket.
    pub(super) fn add_volume(&self, pool: &str, name: &str, bytes: u64) -> Result<PathBuf, String> {
        let (path, disk) = (format!("{pool}/{name}"), format!("{pool}-{name}"));
        let socket = self.server.folder.path().join(&disk);
        self.ask(&["volume", "create", &path, "--size", &size(bytes)])?;
        let at = socket.to_string_lossy();
        self.ask(&["disk", "add", &disk, "--volume", &path, "--socket", &at])?;
        let begin = Instant::now();
        while !socket.exists() {
            if begin.elapsed() > READY {
                return Err(format!("{path} is not offered after {READY:?}: {}", self.server.complaint()));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(socket)
    }

    /// Deletes a volume and what offers it.
    pub(super) fn remove_volume(&self, pool: &str, name: &str) -> Result<(), String> {
        self.ask(&["disk", "remove", &format!("{pool}-{name}")])?;
        self.ask(&["volume", "delete", &format!("{pool}/{name}")]).map(drop)
    }

    /// Bytes that no volume has, as of a second ago at most.
    pub(super) fn free_bytes(&self, pool: &str) -> Result<u64, String> {
        let answer = self.ask(&["pool", "status", pool, "--json"])?;
        free_bytes(&answer).ok_or_else(|| format!("pool status {pool}: no free_bytes in {answer}"))
    }

    /// Takes a snapshot of a volume.
    pub(super) fn snapshot(&self, pool: &str, name: &str, snapshot: &str) -> Result<(), String> {
        self.ask(&["volume", "snapshot", &format!("{pool}/{name}"), snapshot]).map(drop)
    }

    /// Has the command line do something through the API; what it prints.
    pub(super) fn ask(&self, what: &[&str]) -> Result<String, String> {
        let api = self.server.folder.path().join("d.api");
        command(&self.program, what, "--api", &api)
    }

    /// Everything that is counted. What pools count is as of a second ago at most.
    pub(super) fn numbers(&self) -> Result<Numbers, String> {
        let failed = |e: std::io::Error| format!("/metrics: {e}");
        let mut stream = UnixStream::connect(self.server.folder.path().join("d.api")).map_err(failed)?;
        stream.set_read_timeout(Some(READY)).map_err(failed)?;
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\nhost: hawser\r\nconnection: close\r\n\r\n")
            .map_err(failed)?;
        let mut text = String::new();
        stream.read_to_string(&mut text).map_err(failed)?;
        if !text.starts_with("HTTP/1.1 200 ") {
            return Err(format!("/metrics: {}", text.lines().next().unwrap_or_default()));
        }
        Ok(Numbers::parse(&text))
    }
}

impl Numbers {
    /// What has been asked of a pool's members: reads and writes.
    pub(super) fn of_members(&self, pool: Pool, what: &str) -> [f64; 2] {
        self.of_devices(&members(pool), what)
    }

    /// The same of some devices; `what` is `requests` or `bytes`.
    pub(super) fn of_devices(&self, devices: &[String], what: &str) -> [f64; 2] {
        ["read", "write"].map(|kind| {
            let each = devices.iter().map(|device| {
                self.sum(&format!("hawser_device_{what}_total{{device=\"{device}\",kind=\"{kind}\"}}"))
            });
            each.sum()
        })
    }
}

/// The names of a pool's devices.
pub(super) fn members(pool: Pool) -> Vec<String> {
    (0..pool.members()).map(|member| format!("{}m{member}", pool.name())).collect()
}

/// Writes a configuration; its path.
pub(super) fn configure(
    folder: &Path,
    poll_us: u32,
    cpu: usize,
    devices: &[(String, String)],
    more: &str,
    disks: &[(&str, &str)],
) -> Result<PathBuf, String> {
    let mut text = head(folder, "d", poll_us, &[cpu]);
    for (name, uri) in devices {
        text += &format!("[[device]]\nname = \"{name}\"\nuri = \"{uri}\"\n\n");
    }
    text += more;
    for (name, behind) in disks {
        let socket = folder.join(name);
        text += &format!(
            "[[disk]]\nname = \"{name}\"\n{behind}\nsocket = \"{}\"\nqueues = 1\n\n",
            socket.display()
        );
    }
    write(folder, "pools.toml", &text)
}

/// Has a program do something; what it prints.
pub(super) fn command(program: &Path, what: &[&str], option: &str, path: &Path) -> Result<String, String> {
    let answer = Command::new(program)
        .args(what)
        .arg(option)
        .arg(path)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("{}: {e}", program.display()))?;
    match answer.status.success() {
        true => Ok(String::from_utf8_lossy(&answer.stdout).into_owned()),
        false => Err(format!("{}: {}", what.join(" "), String::from_utf8_lossy(&answer.stderr).trim())),
    }
}

fn free_bytes(status: &str) -> Option<u64> {
    let value: serde_json::Value = serde_json::from_str(status).ok()?;
    let pool = value.get(0).unwrap_or(&value);
    pool.get("free_bytes")?.as_u64()
}

/// A per-second rate.
pub(super) fn rate(bytes: f64, time: Duration) -> f64 {
    if time.is_zero() {
        0.0
    } else {
        bytes / (to_f64(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)) / 1e9)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_free_space_is_found_in_a_status() {
        assert_eq!(free_bytes(r#"[{"name": "r1", "free_bytes": 4096}]"#), Some(4096));
        assert_eq!(free_bytes(r#"{"name": "r1", "free_bytes": 4096}"#), Some(4096));
        assert_eq!(free_bytes("[]"), None);
    }

    #[test]
    fn what_members_were_asked_for_is_found_and_nobody_else() {
        let text = "HTTP/1.1 200 OK\r\n\r\n# TYPE hawser_device_requests counter\n\
                    hawser_device_requests_total{device=\"r5m0\",kind=\"read\"} 3\n\
                    hawser_device_requests_total{device=\"r5m0\",kind=\"write\"} 5\n\
                    hawser_device_requests_total{device=\"r5m2\",kind=\"write\"} 7\n\
                    hawser_device_requests_total{device=\"r6m2\",kind=\"write\"} 100\n\
                    hawser_device_bytes_total{device=\"r5m0\",kind=\"write\"} 4096\n";
        let numbers = Numbers::parse(text);
        assert_eq!(numbers.of_members(Pool::Raid5, "requests"), [3.0, 12.0]);
        assert_eq!(numbers.of_members(Pool::Raid5, "bytes"), [0.0, 4096.0]);
        assert_eq!(numbers.sum("hawser_pool_parity_log_bytes_total"), 0.0);
    }
}
