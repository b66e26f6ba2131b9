//! `inflight_client`: what the in-flight log costs. 4k random reads (by default) over `hawser_benches::frontend`, with
//! INFLIGHT_SHMFD negotiated and without, in alternation on one socket.
//!
//! Owns: the measurement. Must not know: how a session is set up.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use hawser_benches::client::options::{parse_size, parse_time};
use hawser_benches::frontend::{Config, Op, STATUS_OK, Session};
use hawser_benches::{sys, to_f64, to_usize};
use serde::Serialize;

/// Random reads with the in-flight log on and off.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// The vhost-user-blk socket.
    #[arg(long)]
    path: PathBuf,
    /// Bytes per request.
    #[arg(long, value_parser = parse_size, default_value = "4k")]
    bs: u64,
    /// Requests in flight.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=341))]
    iodepth: u16,
    /// Time of each measurement.
    #[arg(long, value_parser = parse_time, default_value = "2")]
    runtime: Duration,
    /// Time before each measurement begins.
    #[arg(long = "ramp_time", value_parser = parse_time, default_value = "200ms")]
    ramp_time: Duration,
    /// How often each of the two is measured.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=100))]
    rounds: u16,
    /// Pins the client to this CPU.
    #[arg(long = "cpus_allowed")]
    cpus_allowed: Option<usize>,
    /// The server's process, whose CPU time is measured.
    #[arg(long = "server_pid")]
    server_pid: Option<u32>,
    /// Measures only without the log: for servers that have none.
    #[arg(long)]
    without_only: bool,
    /// Reports as one JSON object.
    #[arg(long)]
    json: bool,
}

/// One measurement.
#[derive(Clone, Copy, Debug, Serialize)]
struct Sample {
    iops: f64,
    server_cpu_per_million: Option<f64>,
}

/// All measurements.
#[derive(Debug, Default, Serialize)]
struct Report {
    with: Vec<Sample>,
    without: Vec<Sample>,
    /// Median with the log over median without.
    ratio: Option<f64>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    match run(&options) {
        Ok(report) if options.json => {
            println!("{}", serde_json::to_string(&report).expect("numbers only"));
            ExitCode::SUCCESS
        }
        Ok(report) => {
            for (name, samples) in [("with", &report.with), ("without", &report.without)] {
                if let Some(median) = median(samples) {
                    let cpu = samples.iter().filter_map(|s| s.server_cpu_per_million).sum::<f64>();
                    let cpu = cpu / to_f64(hawser_benches::to_u64(samples.len()));
                    println!(
                        "{name:8} the in-flight log: {median:.0} IOPS, server {cpu:.3} CPU s per million"
                    );
                }
            }
            if let Some(ratio) = report.ratio {
                println!("ratio {ratio:.3}");
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("inflight_client: {}: {error}", options.path.display());
            ExitCode::FAILURE
        }
    }
}

fn median(samples: &[Sample]) -> Option<f64> {
    let mut iops: Vec<f64> = samples.iter().map(|s| s.iops).collect();
    iops.sort_by(f64::total_cmp);
    iops.get(iops.len() / 2).copied()
}

fn run(options: &Options) -> Result<Report, String> {
    if let Some(cpu) = options.cpus_allowed {
        sys::pin_to(cpu).map_err(|e| format!("--cpus_allowed={cpu}: {e}"))?;
    }
    let mut report = Report::default();
    for _ in 0..options.rounds {
        if !options.without_only {
            report.with.push(measure(options, true)?);
        }
        report.without.push(measure(options, false)?);
    }
    report.ratio = median(&report.with).zip(median(&report.without)).map(|(with, without)| with / without);
    Ok(report)
}

fn measure(options: &Options, inflight: bool) -> Result<Sample, String> {
    let text = |e: hawser_benches::frontend::Error| e.to_string();
    let config = Config {
        inflight,
        depth: options.iodepth,
        queue_size: (options.iodepth * 3).next_power_of_two().max(128),
        request_bytes_max: to_usize(options.bs),
        ..Config::new(&options.path)
    };
    let mut session = Session::connect(config).map_err(text)?;
    let mut load = Load::new(options, &session)?;
    for slot in 0..options.iodepth {
        load.submit(&mut session, slot);
    }
    session.publish(0).map_err(text)?;
    load.until(&mut session, Instant::now() + options.ramp_time)?;
    let server =
        || options.server_pid.map(sys::cpu_seconds).transpose().map_err(|e| format!("--server_pid: {e}"));
    let (before, cpu_before, start) = (load.completed, server()?, Instant::now());
    load.until(&mut session, start + options.runtime)?;
    let (after, cpu_after, seconds) = (load.completed, server()?, start.elapsed().as_secs_f64());
    load.finish(&mut session)?;
    session.stop().map_err(text)?;
    let requests = to_f64(after - before);
    Ok(Sample {
        iops: requests / seconds,
        server_cpu_per_million: cpu_before.zip(cpu_after).map(|(a, b)| (b - a) * 1e6 / requests.max(1.0)),
    })
}

/// The requests of one measurement.
struct Load {
    bytes: u32,
    sectors_per_request: u64,
    requests: u64,
    random: u64,
    in_flight: u16,
    completed: u64,
}

impl Load {
    fn new(options: &Options, session: &Session) -> Result<Self, String> {
        let bytes = u32::try_from(options.bs).map_err(|e| format!("--bs: {e}"))?;
        let sectors_per_request = options.bs / 512;
        let requests = session.device().sectors.checked_div(sectors_per_request).unwrap_or(0);
        if requests == 0 || !options.bs.is_multiple_of(512) {
            return Err(format!("--bs={}: not a multiple of 512, or larger than the disk", options.bs));
        }
        let random = 0x9e37_79b9_7f4a_7c15;
        Ok(Load { bytes, sectors_per_request, requests, random, in_flight: 0, completed: 0 })
    }

    fn submit(&mut self, session: &mut Session, slot: u16) {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let sector = self.random % self.requests * self.sectors_per_request;
        session.submit(0, slot, Op::Read, sector, self.bytes);
        self.in_flight += 1;
    }

    /// Takes what is finished; the number of requests.
    fn reap(&mut self, session: &mut Session, again: bool) -> Result<u16, String> {
        let mut reaped = 0;
        while let Some(completion) = session.complete(0).map_err(|e| e.to_string())? {
            if completion.status != STATUS_OK {
                return Err(format!("a read ended with status {}", completion.status));
            }
            self.in_flight -= 1;
            reaped += 1;
            if again {
                self.submit(session, completion.slot);
            }
        }
        self.completed += u64::from(reaped);
        Ok(reaped)
    }

    fn until(&mut self, session: &mut Session, end: Instant) -> Result<(), String> {
        while Instant::now() < end {
            if self.reap(session, true)? > 0 {
                session.publish(0).map_err(|e| e.to_string())?;
            } else {
                session.wait(0, Duration::from_secs(10)).map_err(|e| e.to_string())?;
            }
        }
        Ok(())
    }

    fn finish(&mut self, session: &mut Session) -> Result<(), String> {
        while self.in_flight > 0 {
            if self.reap(session, false)? == 0 {
                session.wait(0, Duration::from_secs(10)).map_err(|e| e.to_string())?;
            }
        }
        Ok(())
    }
}
