//! The servers: `hawser` with a configuration made for one case, and qemu-storage-daemon.
//!
//! Owns: configurations, command lines and readiness. Must not know: loads.
//! Invariant: a server lives as long as its value, in a folder of its own that goes with it.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::cases::{Backing, Rival};
use super::fabric::Link;
use crate::sys::{Child, TempDir, find_program, spawn_group};

/// How long a server may take to be ready.
pub(super) const READY: Duration = Duration::from_secs(30);

/// A running server.
pub struct Server {
    pub(super) children: Vec<Child>,
    pub(super) socket: PathBuf,
    // After the children: fields are dropped in order.
    pub(super) folder: TempDir,
}

impl Server {
    /// The vhost-user socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Processes whose CPU time is the server's.
    pub fn pids(&self) -> Vec<u32> {
        self.children.iter().map(Child::pid).collect()
    }

    /// The end of what the server has written to its standard error, for a message about a failure.
    pub fn complaint(&self) -> String {
        let text = std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(5)..].join(" | ")
    }

    pub(super) fn start_child(&mut self, mut command: Command, cpu: Option<usize>) -> Result<(), String> {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.folder.path().join("log"));
        let log = log.map_err(|e| format!("log: {e}"))?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.children.push(spawn_group(command, cpu).map_err(|e| e.to_string())?);
        Ok(())
    }

    pub(super) fn wait(&mut self) -> Result<(), String> {
        let socket = self.socket.clone();
        let last = self.children.last_mut().ok_or("no server")?;
        last.wait_for_socket(&socket, READY).map_err(|e| format!("{e}: {}", self.complaint()))
    }
}

/// What a server's disk is made of and where things are.
pub struct Place<'a> {
    /// The CPU to pin to.
    pub cpu: usize,
    /// A file on tmpfs with written blocks, for `file:` and the rival.
    pub image: &'a Path,
    /// Bytes of every disk.
    pub bytes: u64,
}

/// Starts `hawser` with one disk.
pub fn hawser(program: &Path, backing: Backing, poll_us: u32, place: &Place<'_>) -> Result<Server, String> {
    let folder = TempDir::new(None).map_err(|e| format!("a temporary folder: {e}"))?;
    let socket = folder.path().join("s");
    let mut server = Server { children: Vec::new(), socket, folder };
    let size = size(place.bytes);
    let local = |uri: String| (uri, String::new());
    let (uri, extra) = match backing {
        Backing::Null => local(format!("null:?size={size}")),
        Backing::Mem => local(format!("mem:?size={size}")),
        Backing::File => local(format!("file://{}", place.image.display())),
        Backing::NvmeSame => {
            let port = free_port()?;
            (nvme_uri(&format!("127.0.0.1:{port}"), NQN), target(&size, port))
        }
        Backing::NvmeOther => {
            let text = head(server.folder.path(), "t", poll_us, &[place.cpu]) + &target(&size, 0);
            let config = write(server.folder.path(), "target.toml", &text)?;
            server.start_child(serve(program, &config), Some(place.cpu))?;
            let api = server.folder.path().join("t.api");
            let address = bound_address(program, &api, &mut server.children[0])
                .map_err(|e| format!("{e}: {}", server.complaint()))?;
            local(nvme_uri(&address, NQN))
        }
    };
    let text = head(server.folder.path(), "d", poll_us, &[place.cpu])
        + &extra
        + &format!(
            "[[device]]\nname = \"d\"\nuri = \"{uri}\"\n\n\
             [[disk]]\nname = \"d\"\ndevice = \"d\"\nsocket = \"{}\"\nserial = \"bench\"\nqueues = 1\n",
            server.socket.display()
        );
    let config = write(server.folder.path(), "disk.toml", &text)?;
    server.start_child(serve(program, &config), Some(place.cpu))?;
    server.wait()?;
    Ok(server)
}

/// Starts `hawser` with one disk for each of `links`, all on one namespace of a target in the same process: what they are
/// compared by is in the same memory. Returns their sockets.
pub fn linked_hawser(
    program: &Path,
    links: &[Link],
    poll_us: u32,
    place: &Place<'_>,
) -> Result<(Server, Vec<PathBuf>), String> {
    let folder = TempDir::new(None).map_err(|e| format!("a temporary folder: {e}"))?;
    let sockets: Vec<PathBuf> = (0..links.len()).map(|disk| folder.path().join(format!("s{disk}"))).collect();
    let socket = sockets.last().ok_or("no disks")?.clone();
    let mut server = Server { children: Vec::new(), socket, folder };
    let mut text = head(server.folder.path(), "d", poll_us, &[place.cpu]) + &memory(&size(place.bytes));
    for (disk, (link, socket)) in links.iter().zip(&sockets).enumerate() {
        // A namespace is one device's: each has a subsystem of its own, of the same memory.
        let nqn = format!("nqn.2026-11.io.hawser:bench{disk}");
        let ports =
            (0..if link.two_paths { 2 } else { 1 }).map(|_| free_port()).collect::<Result<Vec<_>, _>>()?;
        let digests = if link.digests { "&hdr_digest=1&data_digest=1" } else { "" };
        let uris: Vec<String> =
            ports.iter().map(|port| nvme_uri(&format!("127.0.0.1:{port}"), &nqn) + digests).collect();
        let policy = if link.two_paths { "io_policy = \"round-robin\"\n" } else { "" };
        text += &subsystem(&nqn, &ports);
        text += &format!(
            "[[device]]\nname = \"d{disk}\"\nuri = {uris:?}\n{policy}\n\
             [[disk]]\nname = \"d{disk}\"\ndevice = \"d{disk}\"\nsocket = \"{}\"\nqueues = 1\n\n",
            socket.display()
        );
    }
    let config = write(server.folder.path(), "disks.toml", &text)?;
    server.start_child(serve(program, &config), Some(place.cpu))?;
    for socket in &sockets {
        server.socket.clone_from(socket);
        server.wait()?;
    }
    Ok((server, sockets))
}

/// Starts `hawser` on both CPUs with several disks, each on a device of its own; their sockets.
pub fn idle_hawser(
    program: &Path,
    poll_us: u32,
    cpus: [usize; 2],
    place: &Place<'_>,
    disks: usize,
) -> Result<(Server, Vec<PathBuf>), String> {
    let folder = TempDir::new(None).map_err(|e| format!("a temporary folder: {e}"))?;
    let sockets: Vec<PathBuf> = (0..disks).map(|disk| folder.path().join(format!("s{disk}"))).collect();
    let socket = sockets.last().ok_or("no disks")?.clone();
    let mut server = Server { children: Vec::new(), socket, folder };
    let port = free_port()?;
    let bytes = size(place.bytes.min(64 << 20));
    let mut devices = String::new();
    let mut namespaces = format!(
        "[[subsystem]]\nnqn = \"nqn.2026-11.io.hawser:bench\"\nlisten = [\"tcp://127.0.0.1:{port}\"]\n\n"
    );
    for (disk, socket) in sockets.iter().enumerate() {
        // Each kind has something that could keep a daemon awake: a file's size is looked at, a remote device is kept alive.
        let uri = match disk % 3 {
            0 => format!("null:?size={bytes}"),
            1 => {
                let file = server.folder.path().join(format!("f{disk}"));
                let made = std::fs::File::create(&file).and_then(|f| f.set_len(place.bytes.min(64 << 20)));
                made.map_err(|e| format!("{}: {e}", file.display()))?;
                format!("file://{}", file.display())
            }
            _ => {
                let nsid = disk + 1;
                devices += &format!("[[device]]\nname = \"m{disk}\"\nuri = \"mem:?size={bytes}\"\n\n");
                namespaces += &format!("[[subsystem.namespace]]\nnsid = {nsid}\ndevice = \"m{disk}\"\n\n");
                format!("nvme+tcp://127.0.0.1:{port}/nqn.2026-11.io.hawser:bench?nsid={nsid}")
            }
        };
        devices += &format!(
            "[[device]]\nname = \"d{disk}\"\nuri = \"{uri}\"\n\n\
             [[disk]]\nname = \"d{disk}\"\ndevice = \"d{disk}\"\nsocket = \"{}\"\nqueues = 1\n\n",
            socket.display()
        );
    }
    let text = head(server.folder.path(), "i", poll_us, &cpus) + &namespaces + &devices;
    let config = write(server.folder.path(), "idle.toml", &text)?;
    server.start_child(serve(program, &config), None)?;
    // A remote device's disk listens when the device is connected, so the order is not known.
    for socket in &sockets {
        server.socket.clone_from(socket);
        server.wait()?;
    }
    Ok((server, sockets))
}

/// Starts qemu-storage-daemon; `aio` is for files.
pub fn rival(rival: Rival, aio: &str, place: &Place<'_>) -> Result<Server, String> {
    let program = find_program("qemu-storage-daemon")
        .ok_or("qemu-storage-daemon: not on PATH; Debian has it in qemu-system-common")?;
    let folder = TempDir::new(None).map_err(|e| format!("a temporary folder: {e}"))?;
    let socket = folder.path().join("s");
    let device = match rival {
        Rival::NullCo => format!("null-co,node-name=d,size={}", place.bytes),
        Rival::TmpfsFile => {
            format!(
                "file,node-name=d,filename={},aio={aio},cache.direct=on,locking=off",
                place.image.display()
            )
        }
    };
    let export =
        format!("vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={},writable=on", socket.display());
    let mut command = Command::new(program);
    command.args(["--blockdev", &device, "--export", &export]);
    let mut server = Server { children: Vec::new(), socket, folder };
    server.start_child(command, Some(place.cpu))?;
    server.wait()?;
    Ok(server)
}

/// What a server that [`linked_hawser`] started says of a device, as JSON.
pub fn show_device(program: &Path, server: &Server, device: &str) -> Result<String, String> {
    let answer = Command::new(program)
        .args(["device", "show", device, "--json", "--api"])
        .arg(server.folder.path().join("d.api"))
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("{}: {e}", program.display()))?;
    if !answer.status.success() {
        return Err(format!("device show: {}", String::from_utf8_lossy(&answer.stderr).trim()));
    }
    Ok(String::from_utf8_lossy(&answer.stdout).into_owned())
}

pub(super) fn serve(program: &Path, config: &Path) -> Command {
    let mut command = Command::new(program);
    command.arg("serve").arg("--config").arg(config).env("RUST_LOG", "warn");
    command
}

/// Sizes in hawser's configuration say their unit.
pub(super) fn size(bytes: u64) -> String {
    format!("{}KiB", bytes / 1024)
}

fn nvme_uri(address: &str, nqn: &str) -> String {
    format!("nvme+tcp://{address}/{nqn}?nsid=1")
}

pub(super) fn head(folder: &Path, name: &str, poll_us: u32, cpus: &[usize]) -> String {
    let folder = folder.display();
    // Host identities differ: a machine is an initiator once under each.
    static HOSTS: AtomicU32 = AtomicU32::new(0);
    let host = format!("{:08x}{:04x}", std::process::id(), HOSTS.fetch_add(1, Ordering::Relaxed) & 0xffff);
    format!(
        "[daemon]\napi = \"{folder}/{name}.api\"\nreactors = {cpus:?}\npoll_us = {poll_us}\n\
         state_dir = \"{folder}/{name}.state\"\n\n\
         [host]\nnqn = \"nqn.2014-08.org.nvmexpress:uuid:00000000-0000-4000-8000-{host}\"\n\
         id = \"00000000-0000-4000-8000-{host}\"\n\n"
    )
}

/// The subsystem's name where there is one.
pub(super) const NQN: &str = "nqn.2026-11.io.hawser:bench";

fn target(size: &str, port: u16) -> String {
    memory(size) + &subsystem(NQN, &[port])
}

fn memory(size: &str) -> String {
    format!("[[device]]\nname = \"m\"\nuri = \"mem:?size={size}\"\n\n")
}

fn subsystem(nqn: &str, ports: &[u16]) -> String {
    let listen: Vec<String> = ports.iter().map(|port| format!("tcp://127.0.0.1:{port}")).collect();
    format!(
        "[[subsystem]]\nnqn = \"{nqn}\"\nlisten = {listen:?}\n\n\
         [[subsystem.namespace]]\nnsid = 1\ndevice = \"m\"\n\n"
    )
}

pub(super) fn write(folder: &Path, name: &str, text: &str) -> Result<PathBuf, String> {
    let path = folder.join(name);
    std::fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(path)
}

/// A port that was free a moment ago: a device's URI and its target's address are in the same file, so that the
/// kernel cannot choose.
fn free_port() -> Result<u16, String> {
    let listener = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr());
    listener.map(|a| a.port()).map_err(|e| format!("a free port: {e}"))
}

/// Asks a daemon which address its subsystem listens on, until it does.
pub(super) fn bound_address(program: &Path, api: &Path, child: &mut Child) -> Result<String, String> {
    let start = Instant::now();
    loop {
        child.still_runs().map_err(|e| e.to_string())?;
        let answer = Command::new(program)
            .args(["status", "--json", "--api"])
            .arg(api)
            .stdin(Stdio::null())
            .output()
            .map_err(|e| format!("{}: {e}", program.display()))?;
        if let Some(address) = listen_address(&String::from_utf8_lossy(&answer.stdout)) {
            return Ok(address);
        }
        if start.elapsed() > READY {
            let errors = String::from_utf8_lossy(&answer.stderr);
            return Err(format!("the target does not listen after {READY:?}: {}", errors.trim()));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn listen_address(status: &str) -> Option<String> {
    let value: serde_json::Value = serde_json::from_str(status).ok()?;
    let address = value.pointer("/subsystems/0/listen/0")?.as_str()?.strip_prefix("tcp://")?;
    (!address.ends_with(":0")).then(|| address.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_address_is_found_in_a_status() {
        let status = r#"{"pid": 1, "subsystems": [{"nqn": "n", "listen": ["tcp://127.0.0.1:41234"]}]}"#;
        assert_eq!(listen_address(status).as_deref(), Some("127.0.0.1:41234"));
        assert_eq!(listen_address(r#"{"subsystems": [{"listen": ["tcp://127.0.0.1:0"]}]}"#), None);
        assert_eq!(listen_address(""), None);
    }
}
