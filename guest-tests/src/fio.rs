//! fio in a guest: the jobs that the tests and the demo run, and what their reports say.

#![forbid(unsafe_code)]

use crate::Result;
use crate::json::Json;
use crate::process::Deadline;
use crate::qemu::Qemu;
use crate::shell::Started;

/// What one fio job did.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Report {
    /// Reads per second.
    pub read_iops: f64,
    /// Writes per second.
    pub write_iops: f64,
    /// The longest that one read or write took, in seconds: a pause shows here.
    pub latency_max: f64,
    /// Reads and writes that finished.
    pub ios: f64,
    /// Errors that fio counted.
    pub errors: f64,
}

impl Report {
    /// Reads fio's `--output-format=json`.
    pub fn parse(text: &str) -> Result<Report> {
        let json = Json::parse(text)?;
        let mut report = Report::default();
        for job in json.array("jobs")? {
            report.errors += job.number("error")? + job.number("total_err").unwrap_or(0.0);
            report.read_iops += job.number("read.iops")?;
            report.write_iops += job.number("write.iops")?;
            for direction in ["read", "write"] {
                report.ios += job.number(&format!("{direction}.total_ios"))?;
                let longest = job.number(&format!("{direction}.lat_ns.max"))? / 1e9;
                report.latency_max = report.latency_max.max(longest);
            }
        }
        Ok(report)
    }
}

/// Runs fio to its end; `seconds` is how long the job itself runs.
pub fn run(guest: &mut Qemu, options: &str, seconds: u64) -> Result<Report> {
    let started = start(guest, options)?;
    finish(guest, started, seconds)
}

/// Starts fio; the guest's shell is busy until [`finish`].
pub fn start(guest: &mut Qemu, options: &str) -> Result<Started> {
    guest.shell().start(&format!("fio --name=job --output-format=json --direct=1 {options}"))
}

/// Waits for fio and reads its report; an error that fio found, a verify error too, is an error here.
pub fn finish(guest: &mut Qemu, started: Started, seconds: u64) -> Result<Report> {
    let deadline = Deadline::new(seconds + 60 * guest.patience(), "fio in the guest");
    let finished = guest.shell().finish(started, &deadline).map_err(|e| guest.explain(&e))?;
    if finished.status != 0 {
        return Err(guest.explain(&format!("fio: status {}: {}", finished.status, finished.output)));
    }
    checked(guest, &finished.output)
}

fn checked(guest: &Qemu, output: &str) -> Result<Report> {
    let report = Report::parse(output)?;
    if report.errors != 0.0 {
        return Err(guest.explain(&format!("fio counted {} errors: {output}", report.errors)));
    }
    Ok(report)
}

/// Longer than any load that is ended.
pub const UNTIL_ENDED: u32 = 900;

/// Starts fio, for [`UNTIL_ENDED`] at most; the guest's shell is free until [`end`].
pub fn begin(guest: &mut Qemu, options: &str) -> Result<()> {
    guest
        .run(&format!(
            "rm -f /run/fio.*
            (
                fio --name=job --output-format=json --direct=1 {options} > /run/fio.out 2>&1 &
                echo $! > /run/fio.pid
                wait $!
                echo $? > /run/fio.status
            ) > /dev/null 2>&1 &
            until [ -s /run/fio.pid ]; do usleep 20000; done"
        ))
        .map(drop)
}

/// Ends it as Ctrl-C does and reads its report; an error that fio found, a verify error too, is an error here, and so is an end of its
/// own.
pub fn end(guest: &mut Qemu) -> Result<Report> {
    let output = guest.run_for(
        "if [ -e /run/fio.status ]; then echo \"fio has ended by itself\"; cat /run/fio.out; exit 1; fi
        kill -INT $(cat /run/fio.pid)
        for try in $(seq 600); do [ -e /run/fio.status ] && break; usleep 100000; done
        [ -e /run/fio.status ] || { echo \"fio does not end; in flight: $(cat /sys/block/vda/inflight)\"; exit 1; }
        cat /run/fio.out",
        60,
    )?;
    checked(guest, &output)
}
