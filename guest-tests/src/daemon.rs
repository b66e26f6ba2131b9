//! A hawser daemon as a child: started from a configuration, asked through the CLI, killed, started again.
//!
//! Must not know: hawser's crates. Invariants: everything the daemon makes is in the lab's folder.

#![forbid(unsafe_code)]

use crate::Result;
use crate::json::Json;
use crate::process::{Deadline, Process, output};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// One `hawser serve`, or the place where one was and will be again.
pub struct Daemon {
    name: String,
    binary: PathBuf,
    folder: PathBuf,
    process: Option<Process>,
}

/// A front end that is connected to a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrontEnd {
    /// Its rings run.
    pub serving: bool,
    /// It logs dirty pages.
    pub logging: bool,
}

/// What `hawser status` says about a disk.
#[derive(Debug, Clone, PartialEq)]
pub struct Disk {
    /// `waiting`, `listening`, `connected`, `suspended`.
    pub state: String,
    /// Reads that this process has answered.
    pub reads: f64,
    /// Writes that this process has answered.
    pub writes: f64,
    /// Who is connected.
    pub front_ends: Vec<FrontEnd>,
}

impl Daemon {
    /// Writes `NAME.toml` into `folder` and starts the daemon; returns when its API answers.
    /// The `[daemon]` section is written here: `sections` begins after it.
    pub fn start(name: &str, binary: &Path, folder: &Path, sections: &str) -> Result<Daemon> {
        let mut daemon = Daemon::configure(name, binary, folder, sections)?;
        daemon.launch()?;
        Ok(daemon)
    }

    /// The same, without starting it.
    pub fn configure(name: &str, binary: &Path, folder: &Path, sections: &str) -> Result<Daemon> {
        let text = format!(
            "[daemon]\napi = \"{0}/{name}.api\"\nstate_dir = \"{0}/{name}.var\"\n\n{sections}",
            folder.display()
        );
        let config = folder.join(format!("{name}.toml"));
        fs::write(&config, text).map_err(|e| format!("{}: {e}", config.display()))?;
        Ok(Daemon {
            name: name.to_owned(),
            binary: binary.to_path_buf(),
            folder: folder.to_path_buf(),
            process: None,
        })
    }

    /// The configuration file.
    pub fn config(&self) -> PathBuf {
        self.folder.join(format!("{}.toml", self.name))
    }

    /// The management API's socket.
    pub fn api(&self) -> PathBuf {
        self.folder.join(format!("{}.api", self.name))
    }

    /// Starts the process (again) and waits until its API answers.
    pub fn launch(&mut self) -> Result<()> {
        let mut serve = Command::new(&self.binary);
        serve.current_dir(&self.folder).arg("serve").arg("--config").arg(self.config());
        // The user's own settings are not the test's.
        serve.env_remove("HAWSER_API").env_remove("RUST_LOG");
        self.process = Some(Process::start(serve, &self.folder.join(format!("{}.log", self.name)))?);
        let deadline = Deadline::new(45, format!("hawser serve ({}) to answer", self.name));
        while self.status().is_err() {
            self.must_live()?;
            deadline.nap().map_err(|e| self.explain(&e))?;
        }
        Ok(())
    }

    /// Another binary for the next [`Daemon::launch`].
    pub fn use_binary(&mut self, binary: &Path) {
        self.binary = binary.to_path_buf();
    }

    /// Fails with the daemon's last log lines if it has ended.
    pub fn must_live(&mut self) -> Result<()> {
        match &mut self.process {
            Some(process) => process.must_live(),
            None => Err(format!("hawser serve ({}) was stopped", self.name)),
        }
    }

    /// An error with the daemon's last log lines.
    pub fn explain(&self, error: &str) -> String {
        let tail = self.process.as_ref().map(Process::log_tail).unwrap_or_default();
        format!("hawser serve ({}): {error}{tail}", self.name)
    }

    /// SIGSTOP: from now on it answers nobody.
    pub fn pause(&mut self) -> Result<()> {
        self.send(libc::SIGSTOP)
    }

    /// SIGCONT.
    pub fn go_on(&mut self) -> Result<()> {
        self.send(libc::SIGCONT)
    }

    fn send(&mut self, signal: libc::c_int) -> Result<()> {
        self.must_live()?;
        self.process.as_ref().map_or(Ok(()), |process| process.signal(signal))
    }

    /// `kill -9`.
    pub fn kill(&mut self) -> Result<()> {
        self.must_live()?;
        self.process.take().map_or(Ok(()), |mut process| process.kill())?;
        self.nothing_was_refused()
    }

    /// The daemon's sandbox lets everything through that it does: fails with the line that says otherwise.
    fn nothing_was_refused(&self) -> Result<()> {
        let log = fs::read_to_string(self.folder.join(format!("{}.log", self.name))).unwrap_or_default();
        match log.lines().find(|line| line.contains("seccomp: system call")) {
            Some(line) => Err(format!("hawser serve ({}): {line}", self.name)),
            None => Ok(()),
        }
    }

    /// SIGTERM; the daemon drains and must exit with 0.
    pub fn terminate(&mut self) -> Result<()> {
        self.must_live()?;
        let Some(mut process) = self.process.take() else { return Ok(()) };
        process.signal(libc::SIGTERM)?;
        let status = process.wait(30)?;
        if status.success() {
            return self.nothing_was_refused();
        }
        let how = crate::process::describe(status);
        Err(format!("hawser serve ({}): SIGTERM ended it with {how}{}", self.name, process.log_tail()))
    }

    /// A `hawser` command against this daemon's API; returns its standard output.
    pub fn command(&self, args: &[&str]) -> Result<String> {
        output(Command::new(&self.binary).args(args).arg("--api").arg(self.api()))
    }

    /// A `hawser` command on this daemon's configuration, while it does not run; returns its standard output.
    pub fn offline(&self, args: &[&str]) -> Result<String> {
        output(
            Command::new(&self.binary).env_remove("HAWSER_API").args(args).arg("--config").arg(self.config()),
        )
    }

    /// `hawser status --json`.
    pub fn status(&self) -> Result<Json> {
        Json::parse(&self.command(&["status", "--json"])?)
    }

    /// One disk of the status.
    pub fn disk(&self, name: &str) -> Result<Disk> {
        let status = self.status()?;
        let disks = status.array("disks")?;
        let disk = disks
            .iter()
            .find(|disk| disk.text("name").is_ok_and(|found| found == name))
            .ok_or_else(|| format!("hawser status knows no disk {name}"))?;
        let front_end = |one: &Json| {
            let flag = |name: &str| match one.get(name) {
                Some(Json::Bool(flag)) => Ok(*flag),
                other => Err(format!("hawser status: {name} of a front end is {other:?}")),
            };
            Ok(FrontEnd { serving: flag("serving")?, logging: flag("logging")? })
        };
        Ok(Disk {
            front_ends: disk.array("front_ends")?.iter().map(front_end).collect::<Result<_>>()?,
            state: disk.text("state")?.to_owned(),
            reads: disk.number("requests.read")?,
            writes: disk.number("requests.write")?,
        })
    }

    /// Waits until a disk is in `state`.
    pub fn await_disk(&mut self, name: &str, state: &str) -> Result<()> {
        let deadline = Deadline::new(60, format!("disk {name} to be {state}"));
        loop {
            self.must_live()?;
            let disk = self.disk(name).map_err(|e| self.explain(&e))?;
            if disk.state == state {
                return Ok(());
            }
            deadline.nap().map_err(|e| self.explain(&format!("{e}; it is {}", disk.state)))?;
        }
    }

    /// Waits until this process has answered `count` more writes of a disk's VM: then its handshake, VRING_ENABLE
    /// included, is over, and the VM's load runs.
    pub fn await_writes(&mut self, name: &str, count: u32) -> Result<()> {
        self.await_more(name, &format!("{count} writes"), count, |disk| disk.writes)
    }

    /// Waits until this process has answered `count` more reads of a disk's VM.
    pub fn await_reads(&mut self, name: &str, count: u32) -> Result<()> {
        self.await_more(name, &format!("{count} reads"), count, |disk| disk.reads)
    }

    fn await_more(&mut self, name: &str, what: &str, count: u32, of: fn(&Disk) -> f64) -> Result<()> {
        let deadline = Deadline::new(60, format!("{what} of disk {name}'s VM"));
        let counted =
            |daemon: &mut Daemon| daemon.disk(name).map(|disk| of(&disk)).map_err(|e| daemon.explain(&e));
        let goal = counted(self)? + f64::from(count);
        while counted(self)? < goal {
            self.must_live()?;
            deadline.nap().map_err(|e| self.explain(&e))?;
        }
        Ok(())
    }

    /// Host and port of each of a subsystem's listeners.
    pub fn listeners(&self, nqn: &str) -> Result<Vec<String>> {
        let status = self.status()?;
        let subsystems = status.array("subsystems")?;
        let found = subsystems
            .iter()
            .find(|s| s.text("nqn").is_ok_and(|text| text == nqn))
            .ok_or_else(|| format!("hawser status knows no subsystem {nqn}"))?;
        let count = found.array("listen")?.len();
        (0..count)
            .map(|index| Ok(found.text(&format!("listen.{index}"))?.trim_start_matches("tcp://").to_owned()))
            .collect()
    }

    /// Host and port of a subsystem's first listener.
    pub fn listener(&self, nqn: &str) -> Result<String> {
        self.listeners(nqn)?.into_iter().next().ok_or_else(|| format!("{nqn} has no listener"))
    }

    /// Writes the ports that the system gave to `nqn`'s listeners into the configuration, for the next [`Daemon::launch`].
    pub fn keep_ports(&self, nqn: &str) -> Result<()> {
        let config = self.config();
        let explain = |e: std::io::Error| format!("{}: {e}", config.display());
        let text = fs::read_to_string(&config).map_err(explain)?;
        let (before, mut section) =
            text.split_once(&format!("nqn = \"{nqn}\"")).map(|(a, b)| (a, b.to_owned())).unwrap_or_default();
        for listener in self.listeners(nqn)? {
            let host = listener.rsplit_once(':').map(|(host, _)| host).unwrap_or_default();
            section = section.replacen(&format!("tcp://{host}:0\""), &format!("tcp://{listener}\""), 1);
        }
        fs::write(&config, format!("{before}nqn = \"{nqn}\"{section}")).map_err(explain)
    }

    /// PUTs a JSON text to the management API; any answer but 200 is an error.
    pub fn put(&self, path: &str, body: &str) -> Result<()> {
        let explain = |e: std::io::Error| format!("PUT {path}: {e}");
        let mut stream = UnixStream::connect(self.api()).map_err(explain)?;
        stream.set_read_timeout(Some(Duration::from_secs(20))).map_err(explain)?;
        let head = "Host: hawser\r\nConnection: close\r\nContent-Type: application/json";
        let request =
            format!("PUT {path} HTTP/1.1\r\n{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        stream.write_all(request.as_bytes()).map_err(explain)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).map_err(explain)?;
        if answer.starts_with("HTTP/1.1 200 ") { Ok(()) } else { Err(format!("PUT {path}: {answer}")) }
    }

    /// `hawser image import --verify`, with its progress bar on our standard error when that is wanted.
    pub fn import(binary: &Path, config: &Path, image: &Path, device: &str, shown: bool) -> Result<()> {
        let mut import = Command::new(binary);
        import.args(["image", "import"]).arg(image).args([device, "--verify", "--config"]).arg(config);
        if shown { crate::process::run(&mut import) } else { output(&mut import).map(drop) }
    }
}
