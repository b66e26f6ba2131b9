//! What a daemon costs that has nothing to do: eight disks (`null:`, `file:`, and `nvme+tcp:` to a target in the same process), each
//! with a front end connected and its rings enabled.
//!
//! Owns: the measurement. Must not know: why the daemon is awake, if it is.

use std::path::Path;
use std::time::{Duration, Instant};

use super::servers::{Place, idle_hawser};
use crate::frontend::{Config, Op, STATUS_OK, Session};
use crate::{sys, to_f64};

/// How many disks.
pub const DISKS: usize = 8;
/// The share of one CPU that the daemon may use, in percent.
pub const GOAL_PERCENT: f64 = 1.0;
/// After the last request, until the reactors have given up to look for more.
const SETTLE: Duration = Duration::from_millis(500);

/// What an idle daemon used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct IdleOutcome {
    /// How long was looked.
    pub seconds: f64,
    /// Threads that it has.
    pub threads: usize,
    /// Percent of one CPU, by the ticks in `/proc/PID/stat`: all threads, io_uring's included, in steps of 10 ms.
    pub percent_by_ticks: f64,
    /// Percent of one CPU, by the nanoseconds in `/proc/PID/task/*/schedstat`, of the threads that there are.
    pub percent_by_threads: f64,
}

impl IdleOutcome {
    /// The higher of both.
    pub fn percent(&self) -> f64 {
        self.percent_by_ticks.max(self.percent_by_threads)
    }
}

/// Starts a daemon, connects to all of its disks, lets each answer a read, and looks what it uses from then on.
pub fn measure(
    program: &Path,
    poll_us: u32,
    cpus: [usize; 2],
    place: &Place<'_>,
    time: Duration,
) -> Result<IdleOutcome, String> {
    let (server, sockets) = idle_hawser(program, poll_us, cpus, place, DISKS)?;
    let mut sessions = Vec::new();
    for socket in &sockets {
        let mut session = Session::connect(Config::new(socket)).map_err(|e| e.to_string())?;
        let read = session.request(0, Op::Read, 0, &mut [0; 4096]).map_err(|e| e.to_string())?;
        if read.status != STATUS_OK {
            return Err(format!("a read ended with status {}", read.status));
        }
        sessions.push(session);
    }
    std::thread::sleep(SETTLE);
    let pid = *server.pids().first().ok_or("no server")?;
    let failed = |e: std::io::Error| format!("/proc/{pid}: {e}");
    let (start, ticks, threads) =
        (Instant::now(), sys::cpu_seconds(pid).map_err(failed)?, sys::threads_ns(pid).map_err(failed)?);
    std::thread::sleep(time);
    let seconds = start.elapsed().as_secs_f64();
    let ticks = sys::cpu_seconds(pid).map_err(failed)? - ticks;
    let after = sys::threads_ns(pid).map_err(failed)?;
    let ns: u64 = after.iter().map(|(id, ns)| ns.saturating_sub(threads.get(id).copied().unwrap_or(0))).sum();
    drop(sessions);
    Ok(IdleOutcome {
        seconds,
        threads: after.len(),
        percent_by_ticks: ticks / seconds * 100.0,
        percent_by_threads: to_f64(ns) / 1e9 / seconds * 100.0,
    })
}
