//! What a run has measured, as text for people and as JSON for programs.
#![forbid(unsafe_code)]

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::histogram::Histogram;
use crate::to_f64;

/// Latencies of one direction, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct Latency {
    /// Requests that completed in the measured time.
    pub count: u64,
    /// Mean latency.
    pub mean: u64,
    /// Median.
    pub p50: u64,
    /// 99 of 100 requests took no longer.
    pub p99: u64,
    /// 999 of 1000 requests took no longer.
    pub p999: u64,
    /// The slowest request.
    pub max: u64,
}

impl From<&Histogram> for Latency {
    fn from(h: &Histogram) -> Self {
        let at = |per_mille| h.percentile(per_mille);
        Latency { count: h.count(), mean: h.mean(), p50: at(500), p99: at(990), p999: at(999), max: h.max() }
    }
}

/// One run.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Report {
    /// Completed requests per second.
    pub iops: f64,
    /// Bytes per second.
    pub bandwidth: f64,
    /// Length of the measured time.
    pub seconds: f64,
    /// Completions taken at a time, on average.
    pub batch_mean: f64,
    /// Latencies of reads.
    pub read_ns: Latency,
    /// Latencies of writes.
    pub write_ns: Latency,
    /// Latencies of both.
    pub all_ns: Latency,
    /// CPU seconds of `--server_pid` per million requests.
    pub server_cpu_per_million: Option<f64>,
    /// Share of the measured time in which `--server_pid` used a CPU.
    pub server_cpu_share: Option<f64>,
    /// CPU seconds of the client per million requests.
    pub client_cpu_per_million: f64,
    /// How often the client slept per thousand requests.
    pub client_sleeps_per_thousand: f64,
    /// Share of the measured time in which the client could have run but somebody else had its CPU.
    pub client_waited_share: f64,
    /// How often the client was taken from its CPU for somebody else.
    pub client_involuntary_switches: u64,
    /// Blocks whose contents were checked and right.
    pub verified: u64,
    /// How often a memory region came and went (`--churn`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub regions: Option<u64>,
}

fn micros(ns: u64) -> f64 {
    to_f64(ns) / 1000.0
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = self.bandwidth / f64::from(1 << 20);
        writeln!(f, "IOPS {:.0}  bandwidth {mib:.1} MiB/s  time {:.2} s", self.iops, self.seconds)?;
        for (name, l) in [("read", &self.read_ns), ("write", &self.write_ns)] {
            if l.count > 0 {
                writeln!(
                    f,
                    "{name:5} {} requests, latency µs: mean {:.1} p50 {:.1} p99 {:.1} p99.9 {:.1} max {:.1}",
                    l.count,
                    micros(l.mean),
                    micros(l.p50),
                    micros(l.p99),
                    micros(l.p999),
                    micros(l.max)
                )?;
            }
        }
        if let (Some(cpu), Some(share)) = (self.server_cpu_per_million, self.server_cpu_share) {
            writeln!(f, "server {cpu:.3} CPU s per million requests, {:.0} % of a core", share * 100.0)?;
        }
        writeln!(
            f,
            "client {:.3} CPU s per million requests, {:.1} completions at a time, {:.2} sleeps per thousand requests, \
             {} involuntary switches",
            self.client_cpu_per_million,
            self.batch_mean,
            self.client_sleeps_per_thousand,
            self.client_involuntary_switches
        )?;
        if self.verified > 0 {
            writeln!(f, "verified {} blocks", self.verified)?;
        }
        if let Some(regions) = self.regions {
            writeln!(f, "{regions} memory regions came and went")?;
        }
        Ok(())
    }
}
