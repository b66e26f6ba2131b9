//! `replay_client`: writes at a vhost-user socket with the in-flight log, goes on when the server dies and another one is there, and then
//! reads back all that it has written.
//!
//! Owns: the load and what it must find. Must not know: who kills the server.
//! Invariants: a block is written by one slot, one write at a time, so that what it must hold is what was written to it last, whether the
//! server that took the write has answered it or the one that came after.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use hawser_benches::client::options::{parse_size, parse_time};
use hawser_benches::frontend::{Config, Op, STATUS_OK, Session};
use hawser_benches::to_usize;

/// Writes that outlive the server, read back.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// The vhost-user-blk socket.
    #[arg(long)]
    path: PathBuf,
    /// Bytes per request.
    #[arg(long, value_parser = parse_size, default_value = "16k")]
    bs: u64,
    /// Writes under way.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=341))]
    iodepth: u16,
    /// Blocks that each slot writes, one after the other.
    #[arg(long, default_value_t = 8)]
    blocks: u16,
    /// How long it writes.
    #[arg(long, value_parser = parse_time, default_value = "5")]
    runtime: Duration,
    /// The server must have died so often.
    #[arg(long, default_value_t = 1)]
    deaths: u32,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(told) => {
            println!("{told}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("replay_client: {error}");
            ExitCode::FAILURE
        }
    }
}

/// How long a server may be away, and a request may take.
const PATIENCE: Duration = Duration::from_secs(60);

struct Load {
    session: Session,
    bs: u64,
    blocks: u16,
    depth: u16,
    /// By slot: writes that were begun.
    begun: Vec<u64>,
    is_busy: Vec<bool>,
    deaths: u32,
    /// Writes that were under way when the server died.
    under_way: u64,
    written: u64,
}

fn run(options: &Options) -> Result<String, String> {
    let config = Config {
        depth: options.iodepth,
        queue_size: (options.iodepth * 3).next_power_of_two().max(128),
        request_bytes_max: to_usize(options.bs),
        ..Config::new(&options.path)
    };
    let session = Session::connect(config).map_err(|e| e.to_string())?;
    let all = options.bs * u64::from(options.iodepth) * u64::from(options.blocks);
    if !options.bs.is_multiple_of(512) || all > session.device().sectors * 512 {
        return Err(format!("the disk has no room for {all} bytes in blocks of {}", options.bs));
    }
    let slots = usize::from(options.iodepth);
    let mut load = Load {
        session,
        bs: options.bs,
        blocks: options.blocks,
        depth: options.iodepth,
        begun: vec![0; slots],
        is_busy: vec![false; slots],
        deaths: 0,
        under_way: 0,
        written: 0,
    };
    load.write(Instant::now() + options.runtime, options.deaths)?;
    if load.deaths < options.deaths {
        return Err(format!("the server died {} times, want {}", load.deaths, options.deaths));
    }
    let read = load.read_back()?;
    Ok(format!(
        "{} writes, {} of them under way at {} deaths of the server; {read} blocks read back",
        load.written, load.under_way, load.deaths
    ))
}

impl Load {
    fn sector(&self, slot: u16, number: u64) -> u64 {
        let block = u64::from(slot) * u64::from(self.blocks) + number % u64::from(self.blocks);
        block * self.bs / 512
    }

    /// What the `number`th write of a slot carries.
    fn content(&self, slot: u16, number: u64) -> Vec<u8> {
        let word = (u64::from(slot) << 48 ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (0..self.bs / 8).flat_map(|at| word.wrapping_add(at).to_le_bytes()).collect()
    }

    fn begin(&mut self, slot: u16) {
        let at = usize::from(slot);
        let (number, offset) = (self.begun[at], self.session.data_offset(0, slot));
        let content = self.content(slot, number);
        self.session.memory().write(offset, &content);
        let (sector, len) = (self.sector(slot, number), u32::try_from(self.bs).unwrap_or(u32::MAX));
        self.session.submit(0, slot, Op::Write, sector, len);
        (self.begun[at], self.is_busy[at]) = (number + 1, true);
    }

    fn is_idle(&self) -> bool {
        !self.is_busy.contains(&true)
    }

    /// Writes until `end` and until the server has died so often, and until all that was begun has ended.
    fn write(&mut self, end: Instant, deaths: u32) -> Result<(), String> {
        (0..self.depth).for_each(|slot| self.begin(slot));
        self.session.publish(0).map_err(|e| e.to_string())?;
        while !self.is_idle() {
            let mut any = false;
            while let Some(completion) = self.session.complete(0).map_err(|e| e.to_string())? {
                if completion.status != STATUS_OK {
                    return Err(format!("a write ended with status {}", completion.status));
                }
                if !std::mem::take(&mut self.is_busy[usize::from(completion.slot)]) {
                    return Err(format!("the write of slot {} ended twice", completion.slot));
                }
                self.written += 1;
                let is_owed = self.deaths < deaths && Instant::now() < end + PATIENCE;
                if Instant::now() < end || is_owed {
                    self.begin(completion.slot);
                    any = true;
                }
            }
            if any {
                self.session.publish(0).map_err(|e| e.to_string())?;
            } else if !self.is_idle()
                && let Err(error) = self.session.wait(0, PATIENCE)
            {
                if !error.to_string().contains("closed the connection") {
                    return Err(error.to_string());
                }
                self.reconnect()?;
            }
        }
        Ok(())
    }

    fn reconnect(&mut self) -> Result<(), String> {
        self.deaths += 1;
        self.under_way += self.is_busy.iter().map(|busy| u64::from(*busy)).sum::<u64>();
        let end = Instant::now() + PATIENCE;
        while let Err(error) = self.session.reconnect() {
            if Instant::now() > end {
                return Err(format!("no server has come after the one that died: {error}"));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    fn read_back(&mut self) -> Result<u64, String> {
        let mut read = 0;
        for slot in 0..self.depth {
            let begun = self.begun[usize::from(slot)];
            for number in begun.saturating_sub(u64::from(self.blocks))..begun {
                let mut data = vec![0; to_usize(self.bs)];
                let sector = self.sector(slot, number);
                let completion =
                    self.session.request(0, Op::Read, sector, &mut data).map_err(|e| e.to_string())?;
                if completion.status != STATUS_OK || data != self.content(slot, number) {
                    let status = completion.status;
                    return Err(format!(
                        "sector {sector} is not what write {number} of slot {slot} has written (status {status})"
                    ));
                }
                read += 1;
            }
        }
        Ok(read)
    }
}
