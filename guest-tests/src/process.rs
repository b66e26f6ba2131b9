//! Child processes that cannot outlive us.
//!
//! Owns: how a child is started (a process group of its own, `PR_SET_PDEATHSIG`, logs into a file), how it is waited
//! for (always with a deadline) and how it ends (the whole group is killed when the handle is dropped).
//! Must not know: what the child is.
//! Invariants:
//! - every wait is bounded by a [`Deadline`], and a Ctrl-C ends every wait at once, so that handles are dropped in order;
//! - children are started from the main thread only: the parent-death signal follows the *thread* that forked.

use crate::Result;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn note_interrupt(_signal: libc::c_int) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// Turns SIGINT, SIGTERM and SIGHUP into an error from the next wait, so that everything started is also ended.
pub fn catch_interrupts() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let handler: extern "C" fn(libc::c_int) = note_interrupt;
        // SAFETY: the handler has the C ABI and the signature that signal() wants, lives for the whole program, and
        // only stores to an atomic, which is async-signal-safe. The three signals are catchable.
        unsafe {
            libc::signal(signal, handler as *const () as libc::sighandler_t);
        }
    }
}

/// A point in time after which waiting is a failure that says what was waited for.
pub struct Deadline {
    started: Instant,
    limit: Duration,
    what: String,
}

impl Deadline {
    /// Waits at most `seconds` for `what` ("QEMU to open its monitor").
    pub fn new(seconds: u64, what: impl Into<String>) -> Self {
        Self { started: Instant::now(), limit: Duration::from_secs(seconds), what: what.into() }
    }

    /// Time left; an error once there is none, or when the user interrupted us.
    pub fn left(&self) -> Result<Duration> {
        if INTERRUPTED.load(Ordering::Relaxed) {
            return Err("interrupted".into());
        }
        match self.limit.checked_sub(self.started.elapsed()) {
            Some(left) if !left.is_zero() => Ok(left),
            _ => Err(format!("waited {} s in vain for {}", self.limit.as_secs(), self.what)),
        }
    }

    /// Sleeps a moment; an error as in [`Deadline::left`].
    pub fn nap(&self) -> Result<()> {
        std::thread::sleep(self.left()?.min(Duration::from_millis(10)));
        Ok(())
    }
}

/// A running child: its whole process group is killed and reaped when this is dropped.
pub struct Process {
    child: Child,
    name: String,
    log: Option<PathBuf>,
    ended: Option<ExitStatus>,
}

fn confine(command: &mut Command) {
    let parent = std::process::id();
    command.process_group(0);
    // SAFETY: the closure runs between fork and exec in the child and calls only prctl, getppid and _exit, which are
    // async-signal-safe; it touches no memory that another thread may have held locked at the fork.
    unsafe {
        command.pre_exec(move || {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            // The parent may have died before the request took effect: then nobody would ever signal us.
            if u32::try_from(libc::getppid()) != Ok(parent) {
                libc::_exit(127);
            }
            Ok(())
        });
    }
}

fn group_of(child: &Child) -> libc::pid_t {
    libc::pid_t::try_from(child.id()).unwrap_or(libc::pid_t::MAX)
}

impl Process {
    /// Starts `command` without standard input; standard output and error are appended to `log`.
    pub fn start(mut command: Command, log: &Path) -> Result<Self> {
        let name =
            Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy().into_owned();
        let out = File::options()
            .create(true)
            .append(true)
            .open(log)
            .map_err(|e| format!("{}: {e}", log.display()))?;
        let err = out.try_clone().map_err(|e| format!("{}: {e}", log.display()))?;
        command.stdin(Stdio::null()).stdout(out).stderr(err);
        confine(&mut command);
        let child = command.spawn().map_err(|e| format!("{name} does not start: {e}"))?;
        Ok(Self { child, name, log: Some(log.to_path_buf()), ended: None })
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends `signal` to the child itself.
    pub fn signal(&self, signal: libc::c_int) -> Result<()> {
        if self.ended.is_some() {
            return Err(format!("{} has already ended", self.name));
        }
        // SAFETY: kill() takes plain integers. The pid is ours: the child has not been reaped (`ended` is set only
        // where it is), so the number cannot have been given to another process.
        let sent = unsafe { libc::kill(group_of(&self.child), signal) };
        if sent == 0 { Ok(()) } else { Err(format!("{}: {}", self.name, std::io::Error::last_os_error())) }
    }

    /// The exit status if the child has ended.
    pub fn poll(&mut self) -> Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().map_err(|e| format!("{}: {e}", self.name))?;
        }
        Ok(self.ended)
    }

    /// Fails with the tail of the child's log if it has ended.
    pub fn must_live(&mut self) -> Result<()> {
        match self.poll()? {
            None => Ok(()),
            Some(status) => Err(format!("{} ended ({}){}", self.name, describe(status), self.log_tail())),
        }
    }

    /// Waits for the end of the child.
    pub fn wait(&mut self, seconds: u64) -> Result<ExitStatus> {
        let deadline = Deadline::new(seconds, format!("{} to end", self.name));
        loop {
            if let Some(status) = self.poll()? {
                return Ok(status);
            }
            deadline.nap().map_err(|e| format!("{e}{}", self.log_tail()))?;
        }
    }

    /// Kills the child as `kill -9` does and reaps it.
    pub fn kill(&mut self) -> Result<()> {
        if self.poll()?.is_none() {
            self.signal(libc::SIGKILL)?;
            self.wait(10)?;
        }
        Ok(())
    }

    /// The last lines of the log, ready to be appended to an error message.
    pub fn log_tail(&self) -> String {
        self.log.as_deref().map(|log| tail(log, 25)).unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // SAFETY: kill() takes plain integers; the group was made by us at the spawn and named after our child. If the
        // child has been reaped the group holds only its own orphans, or nobody (ESRCH).
        unsafe {
            libc::kill(-group_of(&self.child), libc::SIGKILL);
        }
        if self.ended.is_none() {
            let _ = self.child.wait();
        }
    }
}

/// The last `lines` lines of a file, indented, behind a newline; empty if there is nothing to show.
pub fn tail(path: &Path, lines: usize) -> String {
    let bytes = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let from = all.len().saturating_sub(lines);
    all[from..].iter().fold(String::new(), |text, line| text + "\n    | " + line.trim_end())
}

/// "exit status 1", "signal 9".
pub fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "unknown status".into(),
    }
}

/// Runs a command to its end and returns its standard output; anything but success is an error with its standard error.
pub fn output(command: &mut Command) -> Result<String> {
    confine(command);
    let name = command.get_program().to_string_lossy().into_owned();
    let result = command.stdin(Stdio::null()).output().map_err(|e| format!("{name} does not start: {e}"))?;
    let out = String::from_utf8_lossy(&result.stdout).into_owned();
    if result.status.success() {
        return Ok(out);
    }
    let err = String::from_utf8_lossy(&result.stderr);
    let err = if err.trim().is_empty() { out.trim() } else { err.trim() };
    let args: Vec<_> = command.get_args().map(|a| a.to_string_lossy().into_owned()).collect();
    Err(format!("{name} {}: {}: {err}", args.join(" "), describe(result.status)))
}

/// Runs a command to its end with our own standard output and error; a Ctrl-C ends it.
pub fn run(command: &mut Command) -> Result<()> {
    let (name, status) = run_with(command, |_| Ok(()))?;
    if status.success() { Ok(()) } else { Err(format!("{name}: {}", describe(status))) }
}

/// Runs a command to its end and passes on its standard output, line by line; `look` sees each line.
pub fn run_and_look(command: &mut Command, look: impl FnMut(&str)) -> Result<ExitStatus> {
    command.stdout(Stdio::piped());
    let mut look = look;
    let (_, status) = run_with(command, |child| {
        let out = child.stdout.take().ok_or("no standard output")?;
        for line in BufReader::new(out).split(b'\n') {
            let line = line.map_err(|e| format!("standard output: {e}"))?;
            let line = String::from_utf8_lossy(&line);
            println!("{line}");
            look(&line);
        }
        Ok(())
    })?;
    Ok(status)
}

fn run_with(
    command: &mut Command,
    attend: impl FnOnce(&mut Child) -> Result<()>,
) -> Result<(String, ExitStatus)> {
    confine(command);
    let name = command.get_program().to_string_lossy().into_owned();
    let child = command.stdin(Stdio::null()).spawn().map_err(|e| format!("{name} does not start: {e}"))?;
    let mut process = Process { child, name: name.clone(), log: None, ended: None };
    attend(&mut process.child)?;
    let deadline = Deadline::new(3600, format!("{name} to end"));
    loop {
        if let Some(status) = process.poll()? {
            return Ok((name, status));
        }
        deadline.nap()?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn output_of_failing_command_is_its_standard_error() {
        let error = output(&mut sh("echo out; echo bad >&2; exit 3")).unwrap_err();
        assert!(error.contains("exit status 3") && error.ends_with("bad"), "{error}");
    }

    #[test]
    fn dropped_process_takes_its_grandchildren_along() {
        let log = std::env::temp_dir().join(format!("hawser-process-{}", std::process::id()));
        let mut process = Process::start(sh("sleep 1000 & echo $!; wait"), &log).unwrap();
        let deadline = Deadline::new(10, "the grandchild's number");
        let grandchild = loop {
            let text = std::fs::read_to_string(&log).unwrap();
            if text.ends_with('\n') {
                break text.trim().to_owned();
            }
            process.must_live().unwrap();
            deadline.nap().unwrap();
        };
        drop(process);
        std::fs::remove_file(&log).unwrap();
        let deadline = Deadline::new(10, "the grandchild's end");
        // A zombie waiting for its reaper is as dead as one that is gone.
        while std::fs::read_to_string(format!("/proc/{grandchild}/stat"))
            .is_ok_and(|stat| !stat.contains(") Z "))
        {
            deadline.nap().unwrap();
        }
    }

    #[test]
    fn deadline_names_what_it_waited_for() {
        let deadline = Deadline::new(0, "godot");
        assert_eq!(deadline.left().unwrap_err(), "waited 0 s in vain for godot");
    }
}
