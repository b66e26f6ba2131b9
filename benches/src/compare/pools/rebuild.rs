//! A member of a RAID 5 made anew while the pool serves: how fast, and what that costs reads.
//!
//! ```text
//!   p ── RAID 5 ── m0  m1  m2        healthy: reads, one at a time; and what a device of the kind can do by itself
//!               └─ m0  m1  ·   n0    m2 is gone, n0 takes its place, at any rate
//!               └─ m0  m1  ·   n1    n0 is gone, n1 takes its place, …; at last at half of that rate, while reads go on
//! ```
//!
//! Members are files on a tmpfs, which outlive the daemon: in between it is stopped, and started with other devices.
//!
//! Owns: this one story. Must not know: how a table looks.
//! Invariant: what a rebuild moves is told from what reads move by the new member, which nobody reads: for each of its bytes one is written,
//! and one read of each of the two others.

use std::fs::File;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::server::{PoolServer, TABLES_BYTES, rate};
use super::{Case, Found};
use crate::client::options::Mix;
use crate::compare::cases::Shape;
use crate::compare::load::Load;
use crate::compare::quiet::Guard;
use crate::compare::results::{Series, Spread};
use crate::compare::runner::{Candidate, Plan};
use crate::compare::servers::{Place, READY};
use crate::sys::TempDir;
use crate::to_f64;

const MEMBERS: f64 = 3.0;
/// The pool's volume, at least: a rebuild must last long enough to be looked at.
const BYTES_MIN: u64 = 64 << 20;
/// How often it is looked how far a rebuild is.
const LOOK: Duration = Duration::from_millis(5);
/// What a load takes besides its time: its process, its connection.
const AROUND_LOAD: Duration = Duration::from_millis(200);

/// So much of a file has superblocks in it.
const SUPERBLOCKS_BYTES: usize = 4 << 20;

/// What each case has found, and what makes it doubtful.
pub(super) type All = Vec<(Case, Found, Vec<String>)>;

/// Runs all three.
pub(super) fn measure(plan: &Plan, place: &Place<'_>, guard: &mut Guard) -> Result<All, String> {
    let failed = |e: std::io::Error| format!("{}: {e}", plan.tmpfs.display());
    let folder = TempDir::new(Some(&plan.tmpfs)).map_err(failed)?;
    let volume_bytes = place.bytes.max(BYTES_MIN);
    // Two of three members have data.
    let rows = to_f64(volume_bytes / 2);
    for name in ["b", "m0", "m1", "m2", "n0", "n1"] {
        let bytes = if name == "b" { volume_bytes / 2 } else { volume_bytes / 2 + TABLES_BYTES };
        let mut file = File::create(folder.path().join(format!("{name}.raw"))).map_err(failed)?;
        // All its memory is there: what is measured is a device, and not where a tmpfs gets its pages from.
        std::io::copy(&mut std::io::repeat(0).take(bytes), &mut file).map_err(failed)?;
    }
    let launch = |folder: TempDir, members: [&str; 3], rate: f64| {
        let uri = |name: &str| (name.to_owned(), format!("file://{}/{name}.raw", folder.path().display()));
        let devices: Vec<(String, String)> = members.into_iter().chain(["b"]).map(uri).collect();
        let more = format!(
            "[[pool]]\nname = \"p\"\nassemble_timeout = 1\nsync_rate = \"{:.0}KiB\"\n\n",
            rate / 1024.0
        );
        PoolServer::launch(
            &plan.hawser,
            plan.poll_us,
            place,
            folder,
            &devices,
            &more,
            &[("b", "device = \"b\"")],
        )
    };

    let healthy = launch(folder, ["m0", "m1", "m2"], 0.0)?;
    let failed = |server: &PoolServer| {
        let complaint = server.server.complaint();
        move |e: String| format!("{e}: {complaint}")
    };
    healthy.ask(&["pool", "create", "p", "--raid", "raid5", "m0", "m1", "m2"])?;
    let volume = healthy.add_volume("p", "v", volume_bytes)?;
    let bare = healthy.server.socket().to_owned();
    for socket in [&bare, &volume] {
        plan.fill_socket(&healthy.server, socket).map_err(failed(&healthy))?;
    }
    let reads = Case::ReadsDuringRebuild.shape().ok_or("no load")?;
    let mut before = Series::default();
    let mut own = [Vec::new(), Vec::new()];
    for _ in 0..plan.rounds {
        let mut sample = |socket: &PathBuf, shape: Shape| {
            let load = plan.load(shape, &candidate(&healthy, shape));
            plan.sample_load(&Load { socket: socket.clone(), ..load }, guard, &healthy.server.pids())
                .map_err(failed(&healthy))
        };
        let reading = sample(&volume, reads)?;
        before.samples.push(reading.value);
        before.disturbed.extend(reading.disturbed);
        for (mix, rates) in [Mix::Read, Mix::Write].into_iter().zip(&mut own) {
            let shape = Shape { mix, kib: 128, depth: 8 };
            rates.push(sample(&bare, shape)?.value.iops * to_f64(shape.kib << 10));
        }
    }
    // What is read of two devices and written to a third, one after the other on one CPU.
    let [read, write] = own.map(|rates| Spread::of(rates.into_iter()).median);
    let devices = if read > 0.0 && write > 0.0 { MEMBERS / (2.0 / read + 1.0 / write) } else { 0.0 };

    let (mut most, mut doubts) = (Vec::new(), Vec::new());
    let mut folder = healthy.stop()?;
    let mut news = ["n0", "n1"].into_iter().cycle();
    for new in news.by_ref().take(plan.rounds as usize) {
        forget(&folder, new)?;
        let fast = launch(folder, ["m0", "m1", new], 0.0)?;
        begin(&fast, new).map_err(failed(&fast))?;
        let (started, ended) =
            (await_written(&fast, new, rows * 0.1)?, await_written(&fast, new, rows * 0.9)?);
        most.push(MEMBERS * rate(ended.1 - started.1, ended.0 - started.0));
        if ended.0 - started.0 < LOOK * 10 {
            doubts.push("the rebuild was too short to be looked at".to_owned());
        }
        await_ready(&fast).map_err(failed(&fast))?;
        folder = fast.stop()?;
    }
    let most = Spread::of(most.into_iter()).median;
    let mut all: All = vec![(Case::Rebuild, Found::Rate { rebuild: most, most: devices }, doubts)];

    let half = (most / 2.0).max(1e6);
    // A quarter is kept for what takes longer than it should.
    let time = Duration::from_secs_f64(rows * 0.95 * MEMBERS / half * 0.75);
    let runtime =
        time.saturating_sub(AROUND_LOAD + plan.ramp / 4).clamp(Duration::from_millis(50), plan.runtime);
    let (mut meanwhile, mut kept, mut doubts) = (Series::default(), Vec::new(), before.disturbed.clone());
    for new in news.by_ref().take(plan.rounds as usize) {
        forget(&folder, new)?;
        let slow = launch(folder, ["m0", "m1", new], half)?;
        let volume = begin(&slow, new).map_err(failed(&slow))?;
        let started = await_written(&slow, new, rows * 0.05)?;
        let load = plan.load(reads, &candidate(&slow, reads));
        let load = Load { socket: volume, runtime, ramp: plan.ramp / 4, ..load };
        meanwhile.samples.push(plan.maker.run(&load).map_err(failed(&slow))?);
        let ended = written(&slow, new)?;
        if ended.1 >= rows {
            doubts.push("the rebuild ended before the reads did".to_owned());
        }
        kept.push(MEMBERS * rate(ended.1 - started.1, ended.0 - started.0));
        await_ready(&slow).map_err(failed(&slow))?;
        folder = slow.stop()?;
    }
    let rebuild = Spread::of(kept.into_iter()).median;
    all.push((Case::RebuildRate, Found::Rate { rebuild, most: half }, doubts.clone()));
    all.push((Case::ReadsDuringRebuild, Found::Loads { beside: before, volume: meanwhile }, doubts));
    Ok(all)
}

/// A device was a member once, and does not say so any more.
fn forget(folder: &TempDir, device: &str) -> Result<(), String> {
    let path = folder.path().join(format!("{device}.raw"));
    let file = File::options().write(true).open(&path);
    file.and_then(|mut file| file.write_all(&vec![0; SUPERBLOCKS_BYTES]))
        .map_err(|e| format!("{}: {e}", path.display()))
}

pub(super) fn candidate(server: &PoolServer, shape: Shape) -> Candidate<'_> {
    Candidate { server: &server.server, batch: shape.depth, configuration: String::new() }
}

/// Has a device take the place of the member that is gone; the socket of the volume, which is served meanwhile.
pub(super) fn begin(server: &PoolServer, new: &str) -> Result<PathBuf, String> {
    let socket = server.server.folder.path().join("p-v");
    let _ = std::fs::remove_file(&socket);
    wait(|| Ok(server.numbers()?.sum("hawser_pool_state{pool=\"p\",state=\"degraded\"}") > 0.0))?;
    server.ask(&["disk", "add", "p-v", "--volume", "p/v", "--socket", &socket.to_string_lossy()])?;
    wait(|| Ok(socket.exists()))?;
    server.ask(&["pool", "replace", "p", "2", new])?;
    Ok(socket)
}

fn await_ready(server: &PoolServer) -> Result<(), String> {
    wait(|| Ok(server.numbers()?.sum("hawser_pool_state{pool=\"p\",state=\"ready\"}") > 0.0))
}

/// When, and how many bytes the device has been written.
fn written(server: &PoolServer, device: &str) -> Result<(Instant, f64), String> {
    let numbers = server.numbers()?;
    Ok((Instant::now(), numbers.of_devices(&[device.to_owned()], "bytes")[1]))
}

/// The same as soon as it is so many.
pub(super) fn await_written(server: &PoolServer, device: &str, bytes: f64) -> Result<(Instant, f64), String> {
    let mut now = (Instant::now(), 0.0);
    wait(|| {
        now = written(server, device)?;
        Ok(now.1 >= bytes)
    })
    .map_err(|e| format!("{e}: {}", server.server.complaint()))?;
    Ok(now)
}

fn wait(mut is: impl FnMut() -> Result<bool, String>) -> Result<(), String> {
    let begin = Instant::now();
    while !is()? {
        if begin.elapsed() > READY {
            return Err(format!("a rebuild is not as far as it should be after {READY:?}"));
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}
