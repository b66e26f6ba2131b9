//! What a leaf device costs by itself, without a virtqueue or a network in front.
//!
//! `cargo run --release -p hawser-fabric --example devices -- [DEVICE] [read|write] [BLOCKS] [DEPTH] [SECONDS]`
//!
//! `DEVICE` is `null`, `mem`, or a path to a file of at least 64 MiB. Blocks have 512 bytes; places are random within the
//! first 64 MiB. Prints I/Os a second and the CPU time of each.

use hawser_block::{BlockCount, BlockSize, Buffers, Device, Lba, Operation, Request, Token};
use hawser_fabric::{FileDevice, FileOptions, MemDevice, NullDevice};
use hawser_runtime::buffers::AlignedBuffer;
use hawser_runtime::{Event, Reactor, ReactorConfig, Runtime, Source};
use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

const SIZE: u64 = 64 << 20;

/// The source that the channel wakes.
struct Idle;

impl Source for Idle {
    fn poll(&mut self, _: &Runtime, _: &mut Vec<Event>) {}
}

fn open(name: &str) -> Result<Box<dyn Device>, String> {
    Ok(match name {
        "null" => Box::new(NullDevice::new("d", SIZE, BlockSize::B512)?),
        "mem" => Box::new(MemDevice::new("d", SIZE, BlockSize::B512)?),
        path => {
            let options = FileOptions { block_size: BlockSize::B512, read_only: false };
            Box::new(FileDevice::open("d", Path::new(path), options)?)
        }
    })
}

/// CPU seconds of this process, kernel threads that work for it included.
fn cpu_seconds() -> f64 {
    // SAFETY: `usage` is a valid place for the result.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &raw mut usage);
        usage
    };
    let seconds = |time: libc::timeval| {
        Duration::new(time.tv_sec.unsigned_abs(), 0) + Duration::from_micros(time.tv_usec.unsigned_abs())
    };
    (seconds(usage.ru_utime) + seconds(usage.ru_stime)).as_secs_f64()
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let argument = |index: usize, default: &str| arguments.get(index).cloned().unwrap_or(default.to_owned());
    let device = open(&argument(0, "null"))?;
    let operation = match argument(1, "read").as_str() {
        "read" => Operation::Read,
        "write" => Operation::Write { fua: false },
        other => return Err(format!("{other:?} is no operation, want read or write").into()),
    };
    let blocks: u32 = argument(2, "8").parse()?;
    let depth: usize = argument(3, "32").parse()?;
    let seconds: u64 = argument(4, "3").parse()?;

    let mut reactor = Reactor::new(ReactorConfig::default())?;
    let runtime = reactor.runtime().clone();
    let user = runtime.add_source(Rc::new(RefCell::new(Idle)));
    let mut channel = device.channel(&runtime, user);
    let memory: Vec<AlignedBuffer> = (0..depth).map(|_| AlignedBuffer::new(blocks as usize * 512)).collect();
    let iovecs: Vec<libc::iovec> = memory
        .iter()
        .map(|memory| libc::iovec { iov_base: memory.as_ptr().cast(), iov_len: memory.len() })
        .collect();
    let places = SIZE / 512 / u64::from(blocks);
    let ask = |slot: usize| Request {
        operation,
        lba: Lba(runtime.random() % places * u64::from(blocks)),
        blocks: BlockCount(blocks),
        // SAFETY: memory and iovecs outlive the channel, which is idle before it is dropped.
        buffers: unsafe { Buffers::new(&raw const iovecs[slot], 1, blocks * 512) },
        token: Token(slot as u64),
    };
    let mut batch: Vec<Request> = (0..depth).map(ask).collect();
    let mut ended = Vec::new();
    let mut done = 0u32;
    let (begun, cpu_from) = (Instant::now(), cpu_seconds());
    let mut going_on = true;
    let mut under_way = 0;
    while going_on || under_way > 0 {
        under_way += batch.len();
        channel.submit(&mut batch);
        reactor.step();
        channel.reap(&mut ended);
        going_on &= begun.elapsed() < Duration::from_secs(seconds);
        for end in ended.drain(..) {
            assert!(end.outcome.is_ok(), "{end:?}");
            done += 1;
            under_way -= 1;
            if going_on {
                batch.push(ask(usize::try_from(end.token.0)?));
            }
        }
    }
    let (elapsed, cpu) = (begun.elapsed().as_secs_f64(), cpu_seconds() - cpu_from);
    println!("{:.0} IOPS, {:.0} ns CPU each", f64::from(done) / elapsed, cpu * 1e9 / f64::from(done));
    Ok(())
}
