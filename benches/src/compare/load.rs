//! One sample: a load for a while, by fio's libblkio engine where there is one, else by `blkclient`.
//!
//! Owns: command lines of load makers and reading what they report. Must not know: which server answers.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::cases::Shape;
use crate::client::report::Report;
use crate::sys;

/// Which program makes the load.
#[derive(Clone, Debug)]
pub enum Maker {
    /// fio with the engine libblkio, at this path.
    Fio(PathBuf),
    /// `blkclient`, at this path.
    Blkclient(PathBuf),
}

/// A load on a socket.
#[derive(Clone, Debug)]
pub struct Load {
    /// The server's socket.
    pub socket: PathBuf,
    /// What to do.
    pub shape: Shape,
    /// Completions to take at a time.
    pub batch: u16,
    /// `eventfd`, `block` or `loop`.
    pub wait_mode: String,
    /// Measured time.
    pub runtime: Duration,
    /// Time before it.
    pub ramp: Duration,
    /// The client's CPU.
    pub cpu: usize,
    /// Processes whose CPU time counts.
    pub servers: Vec<u32>,
}

/// What a load measured.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Measured {
    /// Requests per second.
    pub iops: f64,
    /// Median latency, ns.
    pub p50: u64,
    /// 99th percentile, ns.
    pub p99: u64,
    /// 99.9th percentile, ns.
    pub p999: u64,
    /// The servers' CPU seconds per million requests.
    pub cpu_per_million: f64,
    /// Share of the time in which the client waited for its CPU.
    pub waited: f64,
}

impl Maker {
    /// fio if it has the engine, else `blkclient` beside this program.
    pub fn find(beside: &Path) -> Result<Self, String> {
        if let Some(fio) = sys::find_program("fio") {
            let engines = Command::new(&fio).arg("--enghelp").output().map_err(|e| format!("fio: {e}"))?;
            if String::from_utf8_lossy(&engines.stdout).lines().any(|line| line.trim() == "libblkio") {
                return Ok(Maker::Fio(fio));
            }
        }
        let client = beside.join("blkclient");
        if !client.is_file() {
            return Err(format!("{}: not there; build it with the bench", client.display()));
        }
        Ok(Maker::Blkclient(client))
    }

    /// A name for the report.
    pub fn describe(&self) -> String {
        match self {
            Maker::Fio(path) => {
                let version = Command::new(path).arg("--version").output();
                let version = version.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned());
                format!("{} with the engine libblkio", version.unwrap_or_else(|_| "fio".to_owned()))
            }
            Maker::Blkclient(_) => "blkclient (crate blkio)".to_owned(),
        }
    }

    /// Runs a load to its end.
    pub fn run(&self, load: &Load) -> Result<Measured, String> {
        match self {
            Maker::Blkclient(path) => {
                let report = run_json(path, &blkclient_arguments(load), load)?;
                let report: Report = serde_json::from_str(&report).map_err(|e| format!("blkclient: {e}"))?;
                Ok(Measured {
                    iops: report.iops,
                    p50: report.all_ns.p50,
                    p99: report.all_ns.p99,
                    p999: report.all_ns.p999,
                    cpu_per_million: report.server_cpu_per_million.unwrap_or(0.0),
                    waited: report.client_waited_share,
                })
            }
            Maker::Fio(path) => {
                let cpu = || load.servers.iter().map(|&pid| sys::cpu_seconds(pid)).sum::<Result<f64, _>>();
                let before = cpu().map_err(|e| format!("server: {e}"))?;
                let report = run_json(path, &fio_arguments(load), load)?;
                let used = cpu().map_err(|e| format!("server: {e}"))? - before;
                read_fio(&report, used)
            }
        }
    }
}

fn blkclient_arguments(load: &Load) -> Vec<String> {
    let servers: Vec<String> = load.servers.iter().map(u32::to_string).collect();
    let mut arguments = vec![
        format!("--path={}", load.socket.display()),
        "--time_based".into(),
        format!("--runtime={}us", load.runtime.as_micros()),
        format!("--ramp_time={}us", load.ramp.as_micros()),
        format!("--wait_mode={}", load.wait_mode),
        "--json".into(),
    ];
    if !servers.is_empty() {
        arguments.push(format!("--server_pid={}", servers.join(",")));
    }
    arguments.extend(common_arguments(load));
    arguments
}

fn fio_arguments(load: &Load) -> Vec<String> {
    let mut arguments = vec![
        "--name=bench".into(),
        "--ioengine=libblkio".into(),
        "--libblkio_driver=virtio-blk-vhost-user".into(),
        format!("--libblkio_path={}", load.socket.display()),
        format!("--libblkio_wait_mode={}", load.wait_mode),
        format!("--hipri={}", u8::from(load.wait_mode == "loop")),
        "--thread=1".into(),
        "--time_based=1".into(),
        // No ramp: the servers' CPU time is taken over the whole run, and so must the requests be. Whole seconds,
        // because that is what fio's older versions take.
        format!("--runtime={}", load.runtime.as_secs().max(1)),
        "--output-format=json".into(),
    ];
    arguments.extend(common_arguments(load));
    arguments
}

fn common_arguments(load: &Load) -> Vec<String> {
    vec![
        format!("--rw={}", load.shape.rw()),
        format!("--bs={}k", load.shape.kib),
        format!("--iodepth={}", load.shape.depth),
        format!("--iodepth_batch_complete_max={}", load.batch),
        format!("--cpus_allowed={}", load.cpu),
    ]
}

/// Runs a program that prints JSON, and ends it if it takes much longer than it should.
pub(super) fn run_json(program: &Path, arguments: &[String], load: &Load) -> Result<String, String> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let limit = load.runtime + load.ramp + Duration::from_secs(30);
    let mut child = sys::spawn_group(command, Some(load.cpu)).map_err(|e| e.to_string())?;
    // Reports are far smaller than a pipe, so that nothing blocks while nobody reads.
    let status = child.wait(limit).map_err(|e| format!("{name}: {e}"))?;
    let text = |pipe: Option<&mut dyn Read>| {
        let mut text = String::new();
        pipe.map_or(Ok(0), |pipe| pipe.read_to_string(&mut text)).map(|_| text)
    };
    let output =
        text(child.inner().stdout.as_mut().map(|p| p as &mut dyn Read)).map_err(|e| e.to_string())?;
    let errors =
        text(child.inner().stderr.as_mut().map(|p| p as &mut dyn Read)).map_err(|e| e.to_string())?;
    if !status.success() {
        return Err(format!("{name}: {status}: {}", errors.trim()));
    }
    Ok(output)
}

fn read_fio(report: &str, server_cpu: f64) -> Result<Measured, String> {
    // fio may print notes before the object.
    let start = report.find('{').ok_or("fio: no JSON")?;
    let value: serde_json::Value = serde_json::from_str(&report[start..]).map_err(|e| format!("fio: {e}"))?;
    let job = value.pointer("/jobs/0").ok_or("fio: no job in the report")?;
    let requests = |direction: &str| job.pointer(&format!("/{direction}/total_ios")).and_then(|v| v.as_f64());
    let direction =
        if requests("write").unwrap_or(0.0) > requests("read").unwrap_or(0.0) { "write" } else { "read" };
    let number = |path: &str| {
        let found = job.pointer(&format!("/{direction}/{path}"));
        found.and_then(serde_json::Value::as_f64).ok_or_else(|| format!("fio: no {direction}/{path}"))
    };
    let nanoseconds = |percentile: &str| {
        let found = job.pointer(&format!("/{direction}/clat_ns/percentile/{percentile}"));
        found.and_then(serde_json::Value::as_u64).unwrap_or(0)
    };
    let total = number("total_ios")?;
    Ok(Measured {
        iops: number("iops")?,
        p50: nanoseconds("50.000000"),
        p99: nanoseconds("99.000000"),
        p999: nanoseconds("99.900000"),
        cpu_per_million: if total > 0.0 { server_cpu * 1e6 / total } else { 0.0 },
        waited: 0.0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::options::Options;

    fn load() -> Load {
        Load {
            socket: "/s".into(),
            shape: Shape::ALL[3],
            batch: 32,
            wait_mode: "eventfd".into(),
            runtime: Duration::from_millis(1500),
            ramp: Duration::from_millis(200),
            cpu: 1,
            servers: vec![1, 2],
        }
    }

    #[test]
    fn the_client_understands_its_command_line() {
        let arguments = blkclient_arguments(&load());
        let words = std::iter::once("blkclient".to_owned()).chain(arguments);
        let options = <Options as clap::Parser>::try_parse_from(words).expect("all known");
        assert_eq!((options.bs, options.iodepth, options.server_pid.len()), (4096, 32, 2));
        assert_eq!(options.runtime, Some(Duration::from_millis(1500)));
    }

    #[test]
    fn a_report_of_fio_is_understood() {
        let report = r#"note: something
        {"fio version": "fio-3.36", "jobs": [{"jobname": "bench",
          "read": {"total_ios": 0, "iops": 0.0},
          "write": {"total_ios": 200000, "iops": 100000.5, "clat_ns": {"percentile":
            {"50.000000": 9000, "99.000000": 20000, "99.900000": 30000}}}}]}"#;
        let measured = read_fio(report, 0.5).expect("understood");
        assert_eq!(measured.iops, 100_000.5);
        assert_eq!((measured.p50, measured.p99, measured.p999), (9000, 20_000, 30_000));
        assert_eq!(measured.cpu_per_million, 2.5);
        assert!(read_fio("fio: engine libblkio not loadable", 0.0).is_err());
    }
}
