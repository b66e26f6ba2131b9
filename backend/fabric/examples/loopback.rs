//! How fast the initiator is against our own target over loopback, without a virtqueue in front.
//!
//! `cargo run --release -p hawser-fabric --example loopback -- [OP] [BLOCKS] [DEPTH] [SECONDS] [one|two]`
//!
//! `OP` is `read` or `write`, at random places of a 64 MiB `mem:` device with blocks of 512 bytes; `one`: host and target
//! on the same reactor, `two`: on one each. Prints I/Os and bytes a second, and the CPU seconds per million I/Os.

use hawser_block::{
    BlockCount, BlockSize, Buffers, Channel, Completion, Device, Lba, Operation, Request, Token,
};
use hawser_fabric::MemDevice;
use hawser_fabric::initiator::{HostIdentity, NvmeConfig, NvmeDevice};
use hawser_fabric::target::{NamespaceConfig, SubsystemConfig, Target};
use hawser_runtime::buffers::AlignedBuffer;
use hawser_runtime::{Event, ReactorConfig, ReactorThread, Runtime, Source};
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Small, so that its pages are there after the warm-up: their first touch costs milliseconds on a virtual machine.
const SIZE: u64 = 64 << 20;
const NQN: &str = "nqn.2026-11.io.hawser:loopback";

/// Keeps `depth` requests under way, and counts.
struct Load {
    channel: Option<Box<dyn Channel>>,
    operation: Operation,
    blocks: u32,
    memory: Vec<(AlignedBuffer, Box<libc::iovec>)>,
    batch: Vec<Request>,
    ended: Vec<Completion>,
    done: Arc<AtomicU64>,
}

impl Load {
    fn ask(&mut self, runtime: &Runtime, slot: u64) {
        let places = SIZE / 512 / u64::from(self.blocks);
        let (memory, iovec) = &self.memory[usize::try_from(slot).expect("a slot")];
        let len = u32::try_from(memory.len()).expect("a small buffer");
        self.batch.push(Request {
            operation: self.operation,
            lba: Lba(runtime.random() % places * u64::from(self.blocks)),
            blocks: BlockCount(self.blocks),
            // SAFETY: memory and iovec live as long as the load, which lives as long as its reactor.
            buffers: unsafe { Buffers::new(&raw const **iovec, 1, len) },
            token: Token(slot),
        });
    }
}

impl Source for Load {
    fn poll(&mut self, runtime: &Runtime, _: &mut Vec<Event>) {
        let Some(mut channel) = self.channel.take() else { return };
        let mut ended = std::mem::take(&mut self.ended);
        channel.reap(&mut ended);
        self.done.fetch_add(ended.len() as u64, Ordering::Relaxed);
        for end in ended.drain(..) {
            assert!(end.outcome.is_ok(), "{end:?}");
            self.ask(runtime, end.token.0);
        }
        self.ended = ended;
        if !self.batch.is_empty() {
            channel.submit(&mut self.batch);
        }
        self.channel = Some(channel);
    }
}

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
    let argument =
        |index: usize, default: &str| arguments.get(index).cloned().unwrap_or_else(|| default.to_owned());
    let operation = match argument(0, "read").as_str() {
        "read" => Operation::Read,
        "write" => Operation::Write { fua: false },
        other => return Err(format!("{other:?} is no operation, want read or write").into()),
    };
    let (blocks, depth, seconds): (u32, u64, u64) =
        (argument(1, "8").parse()?, argument(2, "32").parse()?, argument(3, "3").parse()?);
    let config = ReactorConfig { cpu: Some(0), poll_us: 20 };
    let host = ReactorThread::spawn("host", config)?;
    let other = match argument(4, "one").as_str() {
        "two" => Some(ReactorThread::spawn("target", ReactorConfig { cpu: Some(1), ..config })?),
        _ => None,
    };
    let mem = MemDevice::new("m0", SIZE, BlockSize::B512)?;
    let subsystem = SubsystemConfig {
        nqn: NQN.into(),
        listen: vec!["127.0.0.1:0".parse()?],
        transports: Vec::new(),
        allowed_hosts: None,
        serial: "loopback".into(),
        namespaces: vec![NamespaceConfig { nsid: 1, device: Arc::new(mem), uuid: None }],
    };
    let target_handle = other.as_ref().unwrap_or(&host).handle().clone();
    let target = Target::start(vec![subsystem], &[target_handle])?;
    let address = target.addresses()[0].1[0];
    let uri = format!("nvme+tcp://{address}/{NQN}?nsid=1").parse()?;
    let identity = HostIdentity { nqn: "nqn.2014-08.org.nvmexpress:uuid:loopback".into(), id: [1; 16] };
    let device = NvmeDevice::open(NvmeConfig::new("n0", vec![uri], identity), &[host.handle().clone()])?;
    while device.geometry().is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    let done = Arc::new(AtomicU64::new(0));
    let (counter, opened) = (Arc::clone(&done), Arc::clone(&device));
    host.handle().call(move |runtime| {
        let memory = (0..depth)
            .map(|_| {
                let memory = AlignedBuffer::new(blocks as usize * 512);
                let iovec = libc::iovec { iov_base: memory.as_ptr().cast(), iov_len: memory.len() };
                (memory, Box::new(iovec))
            })
            .collect();
        let (batch, ended) = (Vec::new(), Vec::new());
        let load = Load { channel: None, operation, blocks, memory, batch, ended, done: counter };
        let load = Rc::new(RefCell::new(load));
        let id = runtime.add_source(Rc::clone(&load) as Rc<RefCell<dyn Source>>);
        let mut load = load.borrow_mut();
        load.channel = Some(opened.channel(runtime, id));
        for slot in 0..depth {
            load.ask(runtime, slot);
        }
        let Load { channel, batch, .. } = &mut *load;
        if let Some(channel) = channel {
            channel.submit(batch);
        }
    });
    std::thread::sleep(Duration::from_secs(2));
    let (from, cpu_from, begun) = (done.load(Ordering::Relaxed), cpu_seconds(), Instant::now());
    std::thread::sleep(Duration::from_secs(seconds));
    let ios = done.load(Ordering::Relaxed) - from;
    let (cpu, elapsed) = (cpu_seconds() - cpu_from, begun.elapsed().as_secs_f64());
    let per_second = f64::from(u32::try_from(ios)?) / elapsed;
    println!(
        "{per_second:.0} IOPS, {:.0} MiB/s, {:.3} CPU s per million",
        per_second * f64::from(blocks) / 2048.0,
        cpu / f64::from(u32::try_from(ios)?) * 1e6
    );
    Ok(())
}
