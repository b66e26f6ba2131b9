//! fio's options, as far as this client has them, and fio's way to write sizes and times.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Parser, ValueEnum};

/// Which requests a job makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "lower")]
pub enum Mix {
    /// Sequential reads.
    Read,
    /// Sequential writes.
    Write,
    /// Random reads.
    RandRead,
    /// Random writes.
    RandWrite,
    /// Sequential reads and writes.
    #[value(alias = "readwrite")]
    Rw,
    /// Random reads and writes.
    RandRw,
}

impl Mix {
    /// Whether blocks are visited in random order.
    pub fn is_random(self) -> bool {
        matches!(self, Mix::RandRead | Mix::RandWrite | Mix::RandRw)
    }

    /// How many of a hundred requests are reads, given the share in a mixed workload.
    pub fn read_percent(self, mixed: u8) -> u8 {
        match self {
            Mix::Read | Mix::RandRead => 100,
            Mix::Write | Mix::RandWrite => 0,
            Mix::Rw | Mix::RandRw => mixed,
        }
    }
}

/// How a job waits for completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WaitMode {
    /// Notifications stay on; a blocking read of the eventfd (fio's `libblkio_wait_mode=eventfd`).
    Eventfd,
    /// Notifications are on only while it waits, in the library (fio's `libblkio_wait_mode=block`).
    Block,
    /// Polls the used ring (fio's `libblkio_wait_mode=loop` with `hipri`).
    Loop,
}

/// What written blocks carry and read blocks must carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Verify {
    /// Nothing is checked.
    None,
    /// A header with block number, seed, generation and the CRC-32C of the whole block.
    Crc32c,
}

/// A load on a vhost-user-blk socket, measured; options are named as in fio.
#[derive(Clone, Debug, Parser)]
#[command(name = "blkclient", version, args_override_self = true)]
pub struct Options {
    /// The vhost-user-blk socket.
    #[arg(long, alias = "libblkio_path")]
    pub path: PathBuf,
    /// Which requests to make.
    #[arg(long, alias = "readwrite", value_enum, default_value = "randread")]
    pub rw: Mix,
    /// Share of reads in a mixed workload, in percent.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub rwmixread: u8,
    /// Bytes per request (4k, 128KiB, 1m: powers of 1024).
    #[arg(long, value_parser = parse_size, default_value = "4k")]
    pub bs: u64,
    /// Requests in flight per job.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub iodepth: u16,
    /// At most so many completions are taken at a time (0 = iodepth).
    #[arg(long = "iodepth_batch_complete_max", default_value_t = 0)]
    pub iodepth_batch_complete_max: u16,
    /// Ends after this time (2, 2s, 500ms); with --time_based also not before.
    #[arg(long, value_parser = parse_time)]
    pub runtime: Option<Duration>,
    /// Starts again from the front until --runtime is over.
    #[arg(long = "time_based", action = ArgAction::Set, num_args = 0..=1, require_equals = true,
          default_value_t = false, default_missing_value = "true", value_parser = parse_switch)]
    pub time_based: bool,
    /// Time before the measurement begins.
    #[arg(long = "ramp_time", value_parser = parse_time, default_value = "0")]
    pub ramp_time: Duration,
    /// Bytes of the disk to use per job (default: to its end).
    #[arg(long, value_parser = parse_size)]
    pub size: Option<u64>,
    /// First byte of the disk to use.
    #[arg(long, value_parser = parse_size, default_value = "0")]
    pub offset: u64,
    /// What written blocks carry and read blocks must carry.
    #[arg(long, value_enum, default_value = "none")]
    pub verify: Verify,
    /// After writing with --verify, read everything back.
    #[arg(long = "do_verify", action = ArgAction::Set, num_args = 0..=1, require_equals = true,
          default_value_t = true, default_missing_value = "true", value_parser = parse_switch)]
    pub do_verify: bool,
    /// The seed of offsets and contents; a block written with one seed fails the check with another.
    #[arg(long, default_value_t = 1)]
    pub randseed: u64,
    /// Threads; each has a queue of its own, and with --verify a range of its own behind the other's.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub numjobs: u16,
    /// Cuts each request's memory into segments of this size, none of which is the neighbour of the one after it (0: one segment).
    #[arg(long, value_parser = parse_size, default_value = "0")]
    pub segment: u64,
    /// Adds a memory region of this size again and again while the jobs run, writes and reads the disk's last bytes by it, and removes it
    /// (0: none). Takes a queue of its own.
    #[arg(long, value_parser = parse_size, default_value = "0")]
    pub churn: u64,
    /// Queues to set up (default: numjobs, and one for --churn).
    #[arg(long = "num_queues", alias = "libblkio_num_queues")]
    pub num_queues: Option<u16>,
    /// Descriptors per queue (a power of two).
    #[arg(long = "queue_size", default_value_t = 256)]
    pub queue_size: u16,
    /// How to wait for completions.
    #[arg(long = "wait_mode", alias = "libblkio_wait_mode", value_enum, default_value = "eventfd")]
    pub wait_mode: WaitMode,
    /// Pins the client to this CPU.
    #[arg(long = "cpus_allowed")]
    pub cpus_allowed: Option<usize>,
    /// Processes whose CPU time is measured over the same time.
    #[arg(long = "server_pid", value_delimiter = ',')]
    pub server_pid: Vec<u32>,
    /// Gives up when no request completes for this long.
    #[arg(long = "stall_timeout", value_parser = parse_time, default_value = "10s")]
    pub stall_timeout: Duration,
    /// Reports as one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// fio's sizes: a number and k, m, g or t, each also with `b` or `ib`, all powers of 1024.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(split);
    let number: u64 = digits.parse().map_err(|_| format!("{text}: not a size; write 4096, 4k or 4KiB"))?;
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(format!("{text}: unknown unit `{unit}`; k, m, g and t are known")),
    };
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text}: more than 64 bits hold"))
}

/// fio's times: a number (seconds), or a number and us, ms, s or m.
pub fn parse_time(text: &str) -> Result<Duration, String> {
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (digits, unit) = text.split_at(split);
    let number: f64 = digits.parse().map_err(|_| format!("{text}: not a time; write 2, 2s or 500ms"))?;
    let scale = match unit {
        "" | "s" => 1.0,
        "us" => 1e-6,
        "ms" => 1e-3,
        "m" => 60.0,
        _ => return Err(format!("{text}: unknown unit `{unit}`; us, ms, s and m are known")),
    };
    Duration::try_from_secs_f64(number * scale).map_err(|e| format!("{text}: {e}"))
}

fn parse_switch(text: &str) -> Result<bool, String> {
    match text {
        "1" | "true" => Ok(true),
        "0" | "false" => Ok(false),
        _ => Err(format!("{text}: write 0 or 1")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_read_as_in_fio() {
        assert_eq!(parse_size("4k"), Ok(4096));
        assert_eq!(parse_size("128KiB"), Ok(131_072));
        assert_eq!(parse_size("512"), Ok(512));
        assert!(parse_size("4q").is_err());
        assert!(parse_size("").is_err());
        assert!(parse_size("99999999999t").is_err());
        assert_eq!(parse_time("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_time("2"), Ok(Duration::from_secs(2)));
        assert!(parse_time("-1").is_err());
        assert!(parse_time("1h").is_err());
    }

    #[test]
    fn options_are_spelled_as_in_fio() {
        let line = "blkclient --path=/s --rw=randwrite --bs=4k --iodepth=32 --time_based --runtime=2 --verify=crc32c \
                    --iodepth_batch_complete_max=32 --do_verify=0 --wait_mode=loop --server_pid=1,2";
        let options = Options::try_parse_from(line.split_ascii_whitespace()).expect("all known");
        assert!(options.time_based && !options.do_verify);
        assert_eq!(options.rw, Mix::RandWrite);
        assert_eq!(options.server_pid, [1, 2]);
        assert!(Options::try_parse_from(["blkclient", "--path=/s", "--rw=trim"]).is_err());
        assert!(Options::try_parse_from(["blkclient", "--path=/s", "--iodepth=0"]).is_err());
    }
}
