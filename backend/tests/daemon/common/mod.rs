//! A real `hawser` process in a folder of its own, and plain HTTP to its API.
//!
//! Every process started here dies with the test, however that ends.

use serde_json::Value;
use std::ffi::CStr;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

/// Longer than anything takes on a machine that is busy with other tests.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A folder for one test: configuration, sockets, images.
pub(crate) struct Place {
    folder: tempfile::TempDir,
    /// A host identifier that no other has; `OWN-HOST-ID` in configurations.
    pub(crate) host: String,
    /// Locked as long as we live: that is how others' sweeps know.
    _alive: fs::File,
}

impl Place {
    /// A new folder with a short name: sockets' paths are short.
    pub(crate) fn new() -> Place {
        sweep();
        let folder = tempfile::Builder::new().prefix(PREFIX).tempdir_in("/tmp").unwrap();
        let alive = fs::File::open(folder.path()).unwrap();
        alive.lock_shared().unwrap();
        let host = fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap().trim().to_owned();
        Place { folder, host, _alive: alive }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `path` as text, for configurations.
    pub(crate) fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// Writes `hawser.toml`: `[daemon]` for this folder and a `[host]` of its own, then `rest`, in which `@` stands for the folder.
    /// A `[host]` in `rest` takes the place of that.
    pub(crate) fn configure(&self, rest: &str) -> PathBuf {
        let folder = self.folder.path().display().to_string();
        // Else it would be the machine's, and each machine is an initiator once.
        let id = &self.host;
        let host = match rest.contains("[host]") {
            true => String::new(),
            false => format!("[host]\nnqn = \"nqn.2014-08.org.nvmexpress:uuid:{id}\"\nid = \"{id}\"\n"),
        };
        let text = format!("[daemon]\napi = \"@/api\"\nstate_dir = \"@/lib\"\n{rest}\n{host}");
        let text = text.replace('@', &folder).replace("OWN-HOST-ID", id);
        let file = self.path("hawser.toml");
        fs::write(&file, text).unwrap();
        file
    }

    /// Runs `hawser ARGS` to its end. `HAWSER_API` is this folder's.
    pub(crate) fn run(&self, args: &[&str]) -> Output {
        let mut command = hawser();
        if args.first() != Some(&"serve") {
            command.env("HAWSER_API", self.path("api"));
        }
        command.args(args).output().unwrap()
    }

    /// The same with its errors on a terminal of 120 columns; and what was shown there.
    pub(crate) fn run_at_terminal(&self, args: &[&str]) -> (Output, String) {
        let (mut terminal, errors) = terminal();
        let reader = std::thread::spawn(move || {
            let mut shown = Vec::new();
            // It ends with an error when nobody has the other side any more.
            let _ = terminal.read_to_end(&mut shown);
            String::from_utf8_lossy(&shown).into_owned()
        });
        let mut command = hawser();
        command.env("HAWSER_API", self.path("api")).env("TERM", "xterm");
        let output = command.args(args).stderr(errors).output().unwrap();
        drop(command);
        (output, reader.join().unwrap())
    }

    /// Runs a command that must succeed; what it printed.
    pub(crate) fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command that must end with `code` and one line on stderr, which is given.
    pub(crate) fn fails(&self, args: &[&str], code: i32) -> String {
        one_line(args, &self.run(args), code)
    }

    /// The same, without root's rights.
    pub(crate) fn fails_as_nobody(&self, args: &[&str], code: i32) -> String {
        let mut command = hawser();
        // SAFETY: plain system call.
        if unsafe { libc::geteuid() } == 0 {
            // The build's folder may be closed to others.
            let copy = self.path("open/hawser");
            if !copy.exists() {
                // By another process: a fork of a test beside us would have the copy open for writing, and nobody could run it.
                let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_hawser")).arg(&copy).status();
                assert!(copied.unwrap().success());
            }
            command = with_parent(Command::new(copy));
            command.stdin(Stdio::null()).env("RUST_LOG", "info").env_remove("HAWSER_API");
            command.uid(65534).gid(65534).current_dir("/");
        }
        one_line(args, &command.args(args).output().unwrap(), code)
    }

    /// The names in the folder.
    pub(crate) fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder.path()).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Starts `hawser serve` on the folder's configuration and waits until it is ready.
    pub(crate) fn serve(&self) -> Serving {
        self.serve_with(&[])
    }

    /// The same, with variables in its environment.
    pub(crate) fn serve_with(&self, variables: &[(&str, &str)]) -> Serving {
        self.serve_at("hawser.toml", "api", variables)
    }

    /// The same, on another configuration, which puts the API at `api`.
    pub(crate) fn serve_at(&self, config: &str, api: &str, variables: &[(&str, &str)]) -> Serving {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.path("log")).unwrap();
        // The shell gives descriptor 3 to the daemon and becomes it.
        let mut child = with_parent(Command::new("sh"))
            .args(["-c", "exec \"$0\" serve --config \"$1\" --ready-fd 3 3>&1 >&2"])
            .arg(env!("CARGO_BIN_EXE_hawser"))
            .arg(self.path(config))
            .env_remove("HAWSER_API")
            .env("RUST_LOG", "info")
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let mut serving = Serving { child, api: self.path(api) };
        if line.is_empty() {
            // What it says of its end comes after it has closed the descriptor.
            let _ = serving.child.wait();
        }
        assert_eq!(line, "ready\n", "{}", self.log());
        serving
    }

    /// What daemons have logged here.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }
}

/// A daemon that is ready.
pub(crate) struct Serving {
    child: Child,
    api: PathBuf,
}

impl Serving {
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal by its name.
    pub(crate) fn signal(&self, name: &str) {
        let sent = Command::new("kill").args(["-s", name, &self.pid().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    /// SIGSTOP, until every thread of it has stopped: one that has not may still answer.
    pub(crate) fn stop(&self) {
        self.signal("STOP");
        let since = Instant::now();
        let is_stopped = |task: std::io::Result<std::fs::DirEntry>| {
            let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap_or_default();
            stat.rsplit(") ").next().is_none_or(|rest| rest.starts_with('T'))
        };
        while !std::fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap().all(is_stopped) {
            assert!(since.elapsed() < PATIENCE, "the daemon does not stop");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits for its end.
    pub(crate) fn wait(mut self) -> ExitStatus {
        let since = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(since.elapsed() < PATIENCE, "the daemon does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// SIGTERM, and its exit code.
    pub(crate) fn end(self) -> Option<i32> {
        self.signal("TERM");
        self.wait().code()
    }

    /// SIGKILL.
    pub(crate) fn kill(self) {
        self.signal("KILL");
        self.wait();
    }

    /// One request to the API: status, content type, body.
    pub(crate) fn http(&self, method: &str, path: &str, body: &str) -> (u16, String, String) {
        http(&self.api, method, path, body)
    }

    pub(crate) fn status(&self) -> Value {
        let (code, _, body) = self.http("GET", "/v1/status", "");
        assert_eq!(code, 200, "{body}");
        serde_json::from_str(&body).unwrap()
    }

    /// The state and the trouble of a disk.
    pub(crate) fn disk(&self, name: &str) -> (String, Option<String>) {
        let (code, _, body) = self.http("GET", &format!("/v1/disks/{name}"), "");
        assert_eq!(code, 200, "{body}");
        let disk: Value = serde_json::from_str(&body).unwrap();
        (disk["state"].as_str().unwrap().to_owned(), disk["trouble"].as_str().map(str::to_owned))
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // Whatever a test does, the sandbox lets the daemon do.
        let log = fs::read_to_string(self.api.with_file_name("log")).unwrap_or_default();
        if !std::thread::panicking() {
            assert!(!log.contains("seccomp: system call"), "{log}");
        }
    }
}

/// What a command that must end with `code` and one line on stderr has said.
fn one_line(args: &[&str], output: &Output, code: i32) -> String {
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {error}");
    // Log lines and progress do not count.
    let extra = ["[20", "writing ", "verifying "];
    let lines: Vec<&str> =
        error.lines().filter(|line| !extra.iter().any(|extra| line.starts_with(extra))).collect();
    assert_eq!(lines.len(), 1, "{args:?}: {error}");
    lines[0].strip_prefix("hawser: ").unwrap_or_else(|| panic!("{error}")).to_owned()
}

/// Of the folders' names, as short as can be.
const PREFIX: &str = "hawser-t";
/// Between making a folder and locking it nobody waits for so long.
const SWEEP_AFTER: Duration = Duration::from_secs(600);

/// Removes what test processes that were killed have left: old folders that nobody has locked. Whether a process lives cannot
/// be told from its number: it may be of another container that shares `/tmp`.
fn sweep() {
    for entry in fs::read_dir("/tmp").unwrap().flatten() {
        let ours = entry.file_name().to_str().is_some_and(|name| name.starts_with(PREFIX));
        let age = || entry.metadata().ok()?.modified().ok()?.elapsed().ok();
        if !ours || age().is_none_or(|age| age < SWEEP_AFTER) {
            continue;
        }
        if fs::File::open(entry.path()).is_ok_and(|folder| folder.try_lock().is_ok()) {
            // Another test may be quicker.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[test]
fn a_sweep_takes_what_is_old_and_nobodys() {
    let make = |age: Duration| {
        let folder = tempfile::Builder::new().prefix(PREFIX).tempdir_in("/tmp").unwrap().keep();
        let handle = fs::File::open(&folder).unwrap();
        handle.set_modified(std::time::SystemTime::now() - age).unwrap();
        (folder, handle)
    };
    let (living, lock) = make(SWEEP_AFTER * 2);
    lock.lock_shared().unwrap();
    let ((dead, _), (young, _)) = (make(SWEEP_AFTER * 2), make(Duration::ZERO));
    sweep();
    let left = [&living, &dead, &young].map(|folder| folder.exists());
    for folder in [living, young] {
        fs::remove_dir(folder).unwrap();
    }
    assert_eq!(left, [true, false, true]);
}

/// A terminal of 120 columns: our side of it, and a program's.
fn terminal() -> (fs::File, fs::File) {
    let open = |path: &str| {
        let mut options = fs::OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_NOCTTY).open(path).unwrap()
    };
    let ours = open("/dev/ptmx");
    let mut name: [libc::c_char; 64] = [0; 64];
    let size = libc::winsize { ws_row: 24, ws_col: 120, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: plain system calls on a descriptor that is open, a buffer of that length, and a size that lives long enough.
    let path = unsafe {
        let descriptor = ours.as_raw_fd();
        assert_eq!((libc::grantpt(descriptor), libc::unlockpt(descriptor)), (0, 0));
        assert_eq!(libc::ptsname_r(descriptor, name.as_mut_ptr(), name.len()), 0);
        assert_eq!(libc::ioctl(descriptor, libc::TIOCSWINSZ, &raw const size), 0);
        CStr::from_ptr(name.as_ptr()).to_str().unwrap().to_owned()
    };
    let others = open(&path);
    (ours, others)
}

fn hawser() -> Command {
    let mut command = with_parent(Command::new(env!("CARGO_BIN_EXE_hawser")));
    command.stdin(Stdio::null()).env("RUST_LOG", "info").env_remove("HAWSER_API");
    command
}

/// The process is killed when the test's thread ends.
fn with_parent(mut command: Command) -> Command {
    // SAFETY: prctl is async-signal-safe and touches nothing of ours.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
    command
}

/// One request over a Unix socket.
pub(crate) fn http(api: &Path, method: &str, path: &str, body: &str) -> (u16, String, String) {
    let mut stream = UnixStream::connect(api).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: h\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let code = head.split(' ').nth(1).unwrap().parse().unwrap();
    let content_type =
        head.lines().find_map(|line| line.strip_prefix("content-type: ")).unwrap_or_default().to_owned();
    (code, content_type, body.to_owned())
}

/// Waits until `condition` holds.
pub(crate) fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let since = Instant::now();
    while !condition() {
        assert!(since.elapsed() < PATIENCE, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
