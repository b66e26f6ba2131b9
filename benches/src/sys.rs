//! Processes as a bench sees them: their CPU time, the core that they run on, and their end.
//!
//! Owns: `/proc`, `sched_setaffinity`, `PR_SET_PDEATHSIG`. Must not know: what the processes do.
//! Invariant: a child made by [`spawn_group`] ends when its [`Child`] guard is dropped, and when this process dies.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::{to_f64, to_usize};

/// Pins the calling thread, and the threads that it will start, to one CPU.
pub fn pin_to(cpu: usize) -> io::Result<()> {
    // SAFETY: an all-zero cpu_set_t is an empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    if cpu >= std::mem::size_of::<libc::cpu_set_t>() * 8 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("cpu {cpu}: no such CPU")));
    }
    // SAFETY: `cpu` is below the number of bits in the set, checked above.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: the pointer and size describe `set`, which lives through the call.
    let result = unsafe { libc::sched_setaffinity(0, std::mem::size_of_val(&set), &raw const set) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// From now on the calling thread runs only when nobody else wants its CPU, and keeps that awake.
pub fn yield_to_all() -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the pointer describes `parameters`, which lives through the call; 0 is the calling thread.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const parameters) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// TCP's congestion control, as the kernel names it, of connections that are made from here.
pub fn congestion_control() -> String {
    std::fs::read_to_string(CONGESTION_CONTROL)
        .map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned())
}

const CONGESTION_CONTROL: &str = "/proc/sys/net/ipv4/tcp_congestion_control";

/// Moves this thread, and all that it starts, to a network of their own: a loopback interface that nobody else uses, and
/// the kernel's usual congestion control, whatever the machine's is set to (bbr paces: a reply of 128 KiB waits for a timer,
/// or doesn't, for seconds at a time). Needs root.
pub fn own_network() -> io::Result<()> {
    // SAFETY: unshare has no preconditions; it changes only which network this thread sees.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: an all-zero ifreq is an empty request.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP).unwrap_or(1);
    // SAFETY: the request is a whole ifreq with a name that ends in a zero, and lives through the call.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    std::fs::write(CONGESTION_CONTROL, "cubic")
}

/// Clock ticks per second of the times in `/proc`.
fn ticks_per_second() -> f64 {
    // SAFETY: sysconf has no preconditions.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    to_f64(u64::try_from(ticks).unwrap_or(100).max(1))
}

/// CPU seconds (user and system) that process `pid` has used so far: all of its threads, io_uring workers included,
/// whether they still run or not. The kernel rounds to a tick (10 ms).
pub fn cpu_seconds(pid: u32) -> io::Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let malformed =
        || io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/stat: not understood"));
    // The second field is the name in parentheses and may hold anything; utime and stime are fields 14 and 15.
    let rest = &text[text.rfind(')').ok_or_else(malformed)? + 1..];
    let mut fields = rest.split_ascii_whitespace().skip(11);
    let mut ticks = 0;
    for _ in 0..2 {
        ticks += fields.next().and_then(|f| f.parse::<u64>().ok()).ok_or_else(malformed)?;
    }
    Ok(to_f64(ticks) / ticks_per_second())
}

/// Nanoseconds of CPU time of each thread of process `pid`, by its number.
pub fn threads_ns(pid: u32) -> io::Result<HashMap<u32, u64>> {
    let mut all = HashMap::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let entry = entry?;
        let Some(thread) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // It may end while we look.
        let Ok(text) = std::fs::read_to_string(entry.path().join("schedstat")) else { continue };
        let ns = text.split_ascii_whitespace().next().and_then(|field| field.parse().ok());
        let malformed = || io::Error::new(io::ErrorKind::InvalidData, "schedstat: not understood");
        all.insert(thread, ns.ok_or_else(malformed)?);
    }
    Ok(all)
}

/// What all processes had used at one moment.
pub struct Census(HashMap<u32, Entry>);

struct Entry {
    /// Its own ticks and those of its dead children.
    ticks: u64,
    /// The CPU that it ran on last.
    cpu: usize,
}

impl Census {
    /// Looks at every process but `ours` and the kernel's threads, which work for whoever asks.
    pub fn take(ours: &HashSet<u32>) -> io::Result<Self> {
        let mut all = HashMap::new();
        for entry in std::fs::read_dir("/proc")? {
            let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            // It may end while we look.
            let Ok(text) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
            let Some(end) = text.rfind(')') else { continue };
            // Counted from field 3 (the state): 1 parent, 11 to 14 the times, 36 the CPU.
            let fields: Vec<&str> = text[end + 1..].split_ascii_whitespace().collect();
            let number = |at: usize| fields.get(at).and_then(|f| f.parse::<u64>().ok()).unwrap_or(0);
            if number(1) != 2 && !ours.contains(&pid) {
                let ticks = (11..15).map(number).sum();
                all.insert(pid, Entry { ticks, cpu: to_usize(number(36)) });
            }
        }
        Ok(Census(all))
    }

    /// CPU seconds used between `earlier` and this moment by processes that last ran on one of `cpus`.
    pub fn used_since(&self, earlier: &Census, cpus: &[usize]) -> f64 {
        let mut used = 0;
        let mut before = 0;
        for (pid, entry) in &self.0 {
            if cpus.contains(&entry.cpu) {
                used += entry.ticks;
                before += earlier.0.get(pid).map_or(0, |e| e.ticks);
            }
        }
        // What ended in between has been added to its parent's dead children, with what it had used before.
        let ended = earlier.0.iter().filter(|(pid, e)| !self.0.contains_key(pid) && cpus.contains(&e.cpu));
        before += ended.map(|(_, e)| e.ticks).sum::<u64>();
        to_f64(used.saturating_sub(before)) / ticks_per_second()
    }
}

/// Seconds in which threads of the calling process could have run but somebody else had their CPU.
pub fn waited_for_cpu() -> f64 {
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else { return 0.0 };
    let waited = tasks.flatten().filter_map(|task| {
        let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split_ascii_whitespace().nth(1)?.parse::<u64>().ok()
    });
    to_f64(waited.sum()) / 1e9
}

/// CPU seconds of one CPU since boot, from `/proc/stat`.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuTimes {
    /// Everything but idle, iowait and stolen time.
    pub busy: f64,
    /// Time in which the hypervisor ran somebody else.
    pub stolen: f64,
}

/// The times of all CPUs, by number.
pub fn cpu_times() -> io::Result<Vec<CpuTimes>> {
    let text = std::fs::read_to_string("/proc/stat")?;
    let tick = ticks_per_second();
    let mut all = Vec::new();
    for line in text.lines() {
        let mut fields = line.split_ascii_whitespace();
        let Some(name) = fields.next() else { continue };
        if name == "cpu" || !name.starts_with("cpu") {
            continue;
        }
        let times: Vec<f64> = fields.filter_map(|f| f.parse::<u64>().ok()).map(to_f64).collect();
        let at = |i: usize| times.get(i).copied().unwrap_or(0.0);
        // user nice system idle iowait irq softirq steal
        all.push(CpuTimes { busy: (at(0) + at(1) + at(2) + at(5) + at(6)) / tick, stolen: at(7) / tick });
    }
    Ok(all)
}

/// What the calling process has used so far.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// CPU seconds, user and system.
    pub cpu_seconds: f64,
    /// How often it went to sleep.
    pub voluntary_switches: u64,
    /// How often it was taken from its CPU for somebody else.
    pub involuntary_switches: u64,
}

/// The calling process's usage.
pub fn usage() -> Usage {
    // SAFETY: an all-zero rusage is a valid value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a rusage that lives through the call; RUSAGE_SELF is always valid.
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) };
    let seconds = |t: libc::timeval| {
        to_f64(u64::try_from(t.tv_sec).unwrap_or(0)) + to_f64(u64::try_from(t.tv_usec).unwrap_or(0)) / 1e6
    };
    Usage {
        cpu_seconds: seconds(usage.ru_utime) + seconds(usage.ru_stime),
        voluntary_switches: u64::try_from(usage.ru_nvcsw).unwrap_or(0),
        involuntary_switches: u64::try_from(usage.ru_nivcsw).unwrap_or(0),
    }
}

/// A child process in a group of its own; dropping it ends the group.
pub struct Child {
    child: std::process::Child,
    name: String,
}

/// Starts `command` in a process group of its own, pinned to `cpu`, with an end when this process ends.
///
/// The kernel sends the signal when the *thread* that started the child ends, so start children from the main thread.
pub fn spawn_group(mut command: Command, cpu: Option<usize>) -> io::Result<Child> {
    let name = command.get_program().to_string_lossy().into_owned();
    command.process_group(0);
    // SAFETY: getpid has no preconditions.
    let parent = unsafe { libc::getpid() };
    // SAFETY: the closure runs between fork and exec and makes only async-signal-safe calls: prctl, getppid, raise
    // and sched_setaffinity on memory of its own; `pin_to` allocates only on its error path for a bad CPU number,
    // which the caller's own pinning would have met before.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(io::Error::last_os_error());
            }
            // The parent may have died before the request for its death was made.
            if libc::getppid() != parent {
                libc::raise(libc::SIGKILL);
            }
            cpu.map_or(Ok(()), pin_to)
        });
    }
    let child = command.spawn().map_err(|e| io::Error::new(e.kind(), format!("{name}: {e}")))?;
    Ok(Child { child, name })
}

impl Child {
    /// The process's id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The process itself, for its pipes.
    pub fn inner(&mut self) -> &mut std::process::Child {
        &mut self.child
    }

    /// Fails with the exit status if the process has already ended.
    pub fn still_runs(&mut self) -> io::Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => Err(io::Error::other(format!("{}: ended early: {status}", self.name))),
        }
    }

    /// Waits for its end, at most `limit`.
    pub fn wait(&mut self, limit: Duration) -> io::Result<ExitStatus> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if start.elapsed() > limit {
                let text = format!("{}: still runs after {limit:?}", self.name);
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until `path` exists, at most `limit`.
    pub fn wait_for_socket(&mut self, path: &Path, limit: Duration) -> io::Result<()> {
        let start = Instant::now();
        loop {
            self.still_runs()?;
            if path.exists() {
                return Ok(());
            }
            if start.elapsed() > limit {
                let text = format!("{}: no socket at {} after {limit:?}", self.name, path.display());
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Asks the process to end by SIGTERM and waits at most `limit`; true if it ended by itself.
    pub fn terminate(&mut self, limit: Duration) -> bool {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return true;
        }
        self.signal(libc::SIGTERM);
        let start = Instant::now();
        while start.elapsed() < limit {
            if matches!(self.child.try_wait(), Ok(Some(_)) | Err(_)) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        false
    }

    fn signal(&self, signal: i32) {
        if let Ok(pid) = i32::try_from(self.child.id()) {
            // SAFETY: kill has no memory preconditions. The group is the child's own (process_group(0) above), and
            // both callers have just seen that the child is not reaped yet, so nobody else has its id.
            unsafe { libc::kill(-pid, signal) };
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) && !self.terminate(Duration::from_secs(3)) {
            self.signal(libc::SIGKILL);
        }
        let _ = self.child.wait();
    }
}

/// What our temporary folders' names begin with; the process's id and a number follow.
const TEMP_PREFIX: &str = "hwb-";

/// Removes folders that processes left behind which were killed.
fn sweep(parent: &Path) {
    for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid =
            name.to_str().and_then(|n| n.strip_prefix(TEMP_PREFIX)?.split('-').next()?.parse::<u32>().ok());
        if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// A folder with a short path (sockets' paths hold 108 bytes), removed with everything in it when dropped.
pub struct TempDir(PathBuf);

impl TempDir {
    /// A new folder in `parent`, by default the system's folder for temporary files.
    pub fn new(parent: Option<&Path>) -> io::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let parent = parent.map_or_else(std::env::temp_dir, Path::to_owned);
        sweep(&parent);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = parent.join(format!("{TEMP_PREFIX}{}-{number}", std::process::id()));
        std::fs::create_dir(&path)?;
        Ok(TempDir(path))
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The program `name` on PATH.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|p| p.is_file())
}

/// Nanoseconds that a fixed loop takes on this CPU now: a measure of how much of the core is ours.
pub fn calibration_loop_ns() -> u64 {
    let start = Instant::now();
    let mut x = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..2_000_000 {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
    }
    std::hint::black_box(x);
    u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// How many CPUs this process may use.
pub fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// The model name of the first CPU and the kernel's version, for the head of a report.
pub fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let info = read("/proc/cpuinfo");
    let model = info.lines().find(|l| l.starts_with("model name")).and_then(|l| l.split(": ").nth(1));
    let hypervisor =
        info.lines().find(|l| l.starts_with("flags")).is_some_and(|l| l.contains(" hypervisor "));
    let memory = read("/proc/meminfo")
        .lines()
        .find_map(|l| l.strip_prefix("MemTotal:")?.split_ascii_whitespace().next()?.parse::<u64>().ok())
        .unwrap_or(0);
    format!(
        "{} × {}{}, {} GiB, Linux {}",
        cpus(),
        model.unwrap_or("unknown CPU"),
        if hypervisor { " (virtual machine)" } else { "" },
        to_usize(memory.div_ceil(1 << 20)),
        read("/proc/sys/kernel/osrelease").trim()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_works_is_seen_to() {
        let used = || threads_ns(std::process::id()).expect("our own threads").values().sum::<u64>();
        let before = used();
        calibration_loop_ns();
        // The kernel brings the number up to date at the next tick, or when the thread stops to run.
        std::thread::sleep(Duration::from_millis(20));
        assert!(used() > before);
    }

    #[test]
    fn own_cpu_time_grows_with_work() {
        let pid = std::process::id();
        let before = cpu_seconds(pid).expect("own /proc entry");
        let start = Instant::now();
        // Until the kernel has counted two ticks for us, however busy the machine is.
        while cpu_seconds(pid).expect("own /proc entry") < before + 0.02 {
            std::hint::black_box(calibration_loop_ns());
            assert!(start.elapsed() < Duration::from_secs(60), "no CPU time is counted");
        }
        assert!(cpu_times().expect("/proc/stat").len() >= cpus());
    }

    #[test]
    fn a_census_sees_others_but_not_ours() {
        let cpus: Vec<usize> = (0..1024).collect();
        let me = std::process::id();
        let everybody = || Census::take(&HashSet::new()).expect("/proc");
        let others = || Census::take(&HashSet::from([me])).expect("/proc");
        let (with, without) = (everybody(), others());
        let target = cpu_seconds(me).expect("own /proc entry") + 0.05;
        while cpu_seconds(me).expect("own /proc entry") < target {
            std::hint::black_box(calibration_loop_ns());
        }
        let (with, without) = (everybody().used_since(&with, &cpus), others().used_since(&without, &cpus));
        assert!(with >= 0.03, "own work of 50 ms is seen as {with}");
        assert!(!others().0.contains_key(&me), "{without}");
        assert!(everybody().used_since(&everybody(), &[usize::MAX]) == 0.0);
    }

    #[test]
    fn a_child_ends_with_its_guard() {
        let mut command = Command::new("sleep");
        command.arg("1000");
        let mut child = spawn_group(command, Some(0)).expect("sleep starts");
        let pid = child.pid();
        child.still_runs().expect("it sleeps");
        drop(child);
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "{pid} is still there");
    }

    #[test]
    fn folders_of_dead_processes_are_swept_and_others_are_not() {
        let outer = TempDir::new(None).expect("a folder");
        let dead = outer.path().join(format!("{TEMP_PREFIX}4194305-0"));
        let foreign = outer.path().join("hwb-notes");
        std::fs::create_dir(&dead).and_then(|()| std::fs::create_dir(&foreign)).expect("folders");
        let inner = TempDir::new(Some(outer.path())).expect("a folder");
        let second = TempDir::new(Some(outer.path())).expect("a folder");
        assert!(!dead.exists() && foreign.exists() && inner.path().exists() && second.path().exists());
        let path = inner.path().to_owned();
        drop(inner);
        assert!(!path.exists());
    }

    #[test]
    fn a_child_that_ended_is_reported() {
        let mut child = spawn_group(Command::new("false"), None).expect("false starts");
        let start = Instant::now();
        while child.still_runs().is_ok() {
            assert!(start.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(1));
        }
        let error = child.wait_for_socket(Path::new("/nonexistent"), Duration::from_secs(60));
        assert!(error.expect_err("it has ended").to_string().contains("ended early"));
    }
}
