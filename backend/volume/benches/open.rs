//! How long a pool takes to open whose volume is mapped from end to end, and what memory that needs; and what a snapshot of that volume costs, as people
//! ask for it. `cargo bench -p hawser-volume --bench open`; `cargo test` does it for a moment.
//!
//! ```text
//!   this process     makes a pool on sparse files, and puts a checkpoint of 64 TiB in 1 MiB extents where its own stands
//!   another one      opens it as a daemon does: superblocks, marks, root, pages, log, a checkpoint; then it is asked what it has;
//!                    then it takes snapshots: barrier, tables, log, all members flushed. What its thread waits for is not counted
//! ```
//!
//! Invariants: asserts no time. The files are in the page cache, which is nobody's memory.

mod table;

use hawser_block::{BlockSize, Device};
use hawser_fabric::file::{FileDevice, FileOptions};
use hawser_runtime::{Reactor, ReactorConfig};
use hawser_volume::format::{NONE, PAGE_BYTES, Record, Root, Superblock};
use hawser_volume::pool::{self, Ask, CreateOptions, MemoryTail, OpenOptions, Pool};
use hawser_volume::raid::Level;
use hawser_volume::thin::{Metadata, Thin};
use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use table::line;

const EXTENT_BYTES: u64 = 1 << 20;
const VOLUME: u32 = 1;
/// RAID 10 on so many files: each of them less than the 16 TiB that a file of ext4 can have.
const MEMBERS: u64 = 16;
/// How many are taken.
const SNAPSHOTS: usize = 7;
/// Says that this process is the one that opens.
const OPENS: &str = "--opens";
const HOST: [u8; 16] = [7; 16];

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let Some(at) = arguments.iter().position(|argument| argument == OPENS) {
        opens(Path::new(&arguments[at + 1]));
        return;
    }
    // `cargo bench` says so; `cargo test` does not.
    let bytes = if arguments.iter().any(|argument| argument == "--bench") { 64 << 40 } else { 64 << 30 };
    let scratch = Scratch::new();
    let begin = Instant::now();
    make(&scratch.0, bytes);
    let tib = format!("{} GiB", bytes >> 30);
    line(&format!("make a pool with a volume of {tib}"), begin.elapsed().as_secs_f64(), None, "s", None);
    let this = std::env::current_exe().expect("this program");
    let child = Command::new(this).arg(OPENS).arg(&scratch.0).output().expect("it starts");
    let text = String::from_utf8_lossy(&child.stdout).into_owned();
    let found: Vec<f64> = text.split_whitespace().filter_map(|number| number.parse().ok()).collect();
    let [seconds, peak_mib, mapped, snapshot_ms, middle_ms] = found[..] else {
        panic!("{text} {}", String::from_utf8_lossy(&child.stderr));
    };
    #[allow(clippy::cast_precision_loss, reason = "a multiple of 1 MiB")]
    let all = bytes as f64;
    assert!(mapped == all, "{mapped} bytes are mapped of {bytes}");
    line(&format!("open of a pool with {tib} mapped"), seconds, None, "s", Some(10.0));
    line(&format!("open of a pool with {tib} mapped: peak of memory"), peak_mib, None, "MiB", Some(1024.0));
    let name = format!("snapshot of {tib} by their pool's owner: CPU");
    line(&name, snapshot_ms, Some(middle_ms), "ms", Some(10.0));
}

/// Removes a folder when it goes.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Scratch {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("open-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a scratch folder");
        Scratch(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn member(folder: &Path, number: u64) -> PathBuf {
    folder.join(format!("m{number}.raw"))
}

fn devices(folder: &Path) -> Vec<Arc<dyn Device>> {
    let device = |number| {
        let options = FileOptions { block_size: BlockSize::B4096, read_only: false };
        let device = FileDevice::open(&format!("m{number}"), &member(folder, number), options);
        Arc::new(device.expect("it was just made")) as Arc<dyn Device>
    };
    (0..MEMBERS).map(device).collect()
}

/// Does what is asked for on a reactor of this thread.
fn run<T: 'static + Send>(reactor: &mut Reactor, ask: Ask<T>) -> T {
    let found = Rc::new(RefCell::new(None));
    let place = Rc::clone(&found);
    let runtime = reactor.runtime().clone();
    runtime.enter(|| {
        runtime.spawn(async move { *place.borrow_mut() = Some(ask.await) });
        while found.borrow().is_none() {
            reactor.step();
        }
    });
    found.take().expect("it is there").expect("nothing is wrong")
}

fn reactor() -> Reactor {
    Reactor::new(ReactorConfig { cpu: None, poll_us: 0 }).expect("a reactor")
}

/// A pool, and then a volume of `bytes` in the place of its empty tables.
fn make(folder: &Path, bytes: u64) {
    // Twice the volume, and a little for the tables.
    let member_bytes = (bytes * 2 / MEMBERS).next_multiple_of(EXTENT_BYTES) + bytes / 64 + (4 << 30);
    for number in 0..MEMBERS {
        File::create(member(folder, number)).and_then(|file| file.set_len(member_bytes)).expect("a file");
    }
    let mut reactor = reactor();
    let handle = reactor.runtime().handle();
    let options =
        CreateOptions { extent_bytes: EXTENT_BYTES, ..CreateOptions::new("p", [9; 16], Level::Raid10) };
    run(&mut reactor, pool::create(&handle, devices(folder), options));
    drop(reactor);

    let files: Vec<File> = (0..2)
        .map(|number| {
            File::options().read(true).write(true).open(member(folder, number)).expect("it is there")
        })
        .collect();
    let page = |offset: u64| {
        let mut bytes = vec![0; PAGE_BYTES];
        files[0].read_exact_at(&mut bytes, offset).expect("it is there");
        bytes
    };
    let book = Superblock::decode(&page(4096)).expect("good").expect("a superblock");
    assert_eq!(usize::from(book.metadata_members()), files.len());
    assert_eq!(book.extent_bytes, EXTENT_BYTES);
    let layout = book.layout;
    let empty = (0..2).filter_map(|slot| Root::decode(&page(layout.page_offset(slot)), &book.pool_uuid));
    let empty = empty.max_by_key(|root| root.number).expect("a root");

    let thin = Thin { extents: empty.extents, extent_bytes: EXTENT_BYTES, unit_bytes: book.unit_bytes };
    let mut metadata = Metadata::new(thin, layout.metadata_pages);
    let create = Record::CreateVolume { id: VOLUME, uuid: [1; 16], name: "v".to_owned(), size_bytes: bytes };
    metadata.apply(&create).expect("good");
    for index in 0..u32::try_from(bytes / EXTENT_BYTES).expect("few enough") {
        let extent = metadata.allocate().expect("there are enough");
        let bits = thin.full_bits();
        let map = Record::Map { volume: VOLUME, index, birth: 1, extent, fallback: NONE, bits };
        metadata.apply(&map).expect("good");
    }
    let put = |page: u32, bytes: &[u8]| {
        files
            .iter()
            .for_each(|file| file.write_all_at(bytes, layout.page_offset(page)).expect("there is room"));
    };
    metadata.begin_checkpoint(true);
    loop {
        let pages = metadata.checkpoint_step(256).expect("there is room");
        if pages.is_empty() {
            break;
        }
        pages.iter().for_each(|(page, bytes)| put(*page, bytes));
    }
    let Root { record_seq, log_position, log_batch, .. } = empty;
    let root = metadata.checkpoint_root(book.pool_uuid, record_seq, log_position, log_batch);
    metadata.end_checkpoint(true);
    // Behind the empty one, in the other place.
    let root = Root { number: empty.number + 1, ..root };
    put(u32::from(root.number % 2 == 1), &root.encode());
}

/// What this thread has used of a CPU, in milliseconds.
fn cpu_ms() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is there to be written.
    let got = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(got, 0, "Linux has this clock");
    let whole =
        Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0));
    whole.as_secs_f64() * 1e3
}

/// Snapshots of the volume, one after the other, of which the next is as large as the first: the owner's CPU time for the best, and the middle one.
fn snapshots(reactor: &mut Reactor, pool: &Pool) -> (f64, f64) {
    let mut times: Vec<f64> = (0..SNAPSHOTS)
        .map(|number| {
            let begin = cpu_ms();
            run(reactor, pool.snapshot(vec![("v".to_owned(), format!("s{number}"))]));
            cpu_ms() - begin
        })
        .collect();
    let volumes = pool.volumes();
    assert_eq!(volumes.len(), 1 + SNAPSHOTS);
    assert!(volumes.iter().all(|volume| volume.mapped_bytes == volumes[0].mapped_bytes));
    times.sort_by(f64::total_cmp);
    (times[0], times[SNAPSHOTS / 2])
}

/// The process that opens: prints the time, its peak of memory in MiB, what is mapped, and what snapshots of it cost.
fn opens(folder: &Path) {
    let devices = devices(folder);
    let mut reactor = reactor();
    let handle = reactor.runtime().handle();
    let begin = Instant::now();
    let options = OpenOptions::new(HOST, Box::new(MemoryTail::default()));
    let pool = run(&mut reactor, Pool::open(&handle, devices, options));
    let seconds = begin.elapsed().as_secs_f64();
    let mapped = pool.volumes().first().map_or(0, |volume| volume.mapped_bytes);
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse::<f64>().ok());
    let (snapshot, middle) = snapshots(&mut reactor, &pool);
    println!("{seconds} {} {mapped} {snapshot} {middle}", peak.expect("Linux says it") / 1024.0);
    // The pool is left as it is, as by a process that dies.
    std::process::exit(0);
}
