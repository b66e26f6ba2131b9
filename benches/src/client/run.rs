//! Connects, starts the jobs, keeps the time and collects what they counted.
//!
//! Owns: the connection, the buffers' memory, the phases and the watchdog. Must not know: how a job waits.
//! Invariants: the server's CPU time is read at the two moments at which the phase changes; the device outlives the
//! jobs, because the library's queues point into the device's memory without saying so.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, channel};
use std::time::{Duration, Instant};

use blkio::{Blkio, Blkioq};

use super::job::{Job, MEASURE, STOP, Setup, Shared, Totals, WARM};
use super::options::{Options, Verify, WaitMode};
use super::pattern::Pattern;
use super::regions::Regions;
use super::report::Report;
use super::verify::{BLOCK_MIN, Ledger};
use crate::{sys, to_f64, to_u64, to_usize};

/// How often the watchdog looks.
const WATCH: Duration = Duration::from_millis(100);
/// How long it pauses where regions come and go.
const CHURN: Duration = Duration::from_millis(5);

/// Runs what `options` describe and reports; an error is one line for people.
pub fn run(options: &Options) -> Result<Report, String> {
    check(options)?;
    if let Some(cpu) = options.cpus_allowed {
        sys::pin_to(cpu).map_err(|e| format!("--cpus_allowed={cpu}: {e}"))?;
    }
    let (mut device, queues) = connect_in_time(options)?;
    let range = Range::of(options, &device)?;
    let depth_bytes = u64::from(options.iodepth) * options.bs;
    let region = device
        .alloc_mem_region(to_usize(depth_bytes * u64::from(options.numjobs)))
        .and_then(|region| device.map_mem_region(&region).map(|()| region))
        .map_err(|e| format!("buffers of {depth_bytes} bytes per job: {e}"))?;

    let shared = Arc::new(Shared {
        phase: AtomicU8::new(WARM),
        progress: (0..options.numjobs).map(|_| AtomicU64::new(0)).collect(),
    });
    let (sender, results) = channel();
    // Queues that no job uses stay alive until the end: dropping one would not disable it at the server.
    let mut queues = queues.into_iter();
    for (index, queue) in queues.by_ref().take(usize::from(options.numjobs)).enumerate() {
        let first_byte = options.offset + to_u64(index) * range.stride;
        let setup = Setup {
            queue,
            wait: options.wait_mode,
            buffers: region.addr + index * to_usize(depth_bytes),
            block_size: options.bs,
            depth: options.iodepth,
            segment: to_usize(if options.segment == 0 { options.bs } else { options.segment }),
            batch: if options.iodepth_batch_complete_max == 0 {
                options.iodepth
            } else {
                options.iodepth_batch_complete_max.min(options.iodepth)
            },
            first_byte,
        };
        let options = options.clone();
        let blocks = range.blocks;
        let shared = Arc::clone(&shared);
        let sender = sender.clone();
        std::thread::spawn(move || {
            let result = run_job(setup, &options, index, blocks, &shared);
            // The main thread has gone only if it gave up already.
            let _ = sender.send(result);
        });
    }
    drop(sender);
    let parts = if range.stride == 0 { 1 } else { u64::from(options.numjobs) };
    let end = options.offset + parts * range.blocks * options.bs;
    let mut collected = Collected { jobs: usize::from(options.numjobs), totals: Vec::new(), regions: None };
    let result = Regions::new(options, &device, queues.next(), end).and_then(|regions| {
        collected.regions = regions.map(|regions| (&mut device, regions));
        measure(options, &shared, &results, &mut collected)
    });
    drop(collected);
    if result.is_err() {
        shared.phase.store(STOP, Ordering::Relaxed);
        let end = Instant::now() + Duration::from_secs(1);
        while Instant::now() < end
            && !matches!(results.recv_timeout(WATCH), Err(RecvTimeoutError::Disconnected))
        {}
        if !matches!(results.try_recv(), Err(TryRecvError::Disconnected)) {
            // A job waits for a server that is gone. It still looks at the rings, which the device would unmap.
            std::mem::forget(device);
        }
    }
    result
}

fn check(options: &Options) -> Result<(), String> {
    if options.time_based && options.runtime.is_none() {
        return Err("--time_based: needs --runtime".into());
    }
    if options.verify != Verify::None && options.bs < BLOCK_MIN {
        return Err(format!("--bs={}: --verify needs at least {BLOCK_MIN} bytes", options.bs));
    }
    if options.segment > 0
        && !(options.segment.is_multiple_of(512) && options.bs.is_multiple_of(options.segment))
    {
        return Err(format!(
            "--segment={}: want a part of --bs={}, of whole sectors",
            options.segment, options.bs
        ));
    }
    if !options.queue_size.is_power_of_two() {
        return Err(format!("--queue_size={}: must be a power of two", options.queue_size));
    }
    if options.num_queues.is_some_and(|n| n < options.numjobs) {
        return Err(format!("--num_queues: must be at least --numjobs={}", options.numjobs));
    }
    Ok(())
}

/// Connects on a thread of its own, since the library waits for ever for a server that does not answer.
fn connect_in_time(options: &Options) -> Result<(Blkio, Vec<Blkioq>), String> {
    let (sender, receiver) = channel();
    let for_thread = options.clone();
    std::thread::spawn(move || {
        // Nobody listens any more if it took too long.
        let _ = sender.send(connect(&for_thread));
    });
    let silent = || {
        let limit = options.stall_timeout;
        format!("{}: the server has not answered the handshake for {limit:?}", options.path.display())
    };
    receiver.recv_timeout(options.stall_timeout).map_err(|_| silent())?
}

fn connect(options: &Options) -> Result<(Blkio, Vec<Blkioq>), String> {
    let path = options.path.to_str().ok_or("--path: must be UTF-8")?;
    let failed = |e: blkio::Error| format!("{path}: {e}");
    let mut device = Blkio::new("virtio-blk-vhost-user").map_err(failed)?;
    device.set_str("path", path).map_err(failed)?;
    let only_reads = options.rw.read_percent(options.rwmixread) == 100;
    device.set_bool("read-only", only_reads).map_err(failed)?;
    device.connect().map_err(failed)?;
    let queues = options.num_queues.unwrap_or(options.numjobs + u16::from(options.churn > 0));
    let queues = i32::from(queues);
    let (used, unused) = match options.wait_mode {
        WaitMode::Loop => ("num-poll-queues", "num-queues"),
        WaitMode::Eventfd | WaitMode::Block => ("num-queues", "num-poll-queues"),
    };
    device.set_i32(unused, 0).map_err(failed)?;
    device.set_i32(used, queues).map_err(failed)?;
    // A request takes two descriptors beside those of its memory; with fewer, the library would keep a backlog. Servers take 1024.
    let segments = options.bs.checked_div(options.segment).unwrap_or(1);
    let descriptors = u64::from(options.iodepth) * (segments + 2);
    let size = u64::from(options.queue_size).max(descriptors.next_power_of_two()).min(1024);
    device.set_i32("queue-size", i32::try_from(size).unwrap_or(i32::MAX)).map_err(failed)?;
    let mut started = device.start().map_err(failed)?;
    started.queues.append(&mut started.poll_queues);
    Ok((device, started.queues))
}

/// The part of the disk that a job uses.
struct Range {
    blocks: u64,
    /// Bytes from one job's first block to the next job's.
    stride: u64,
}

impl Range {
    fn of(options: &Options, device: &Blkio) -> Result<Self, String> {
        let failed = |e: blkio::Error| format!("{}: {e}", options.path.display());
        let capacity = device.get_u64("capacity").map_err(failed)?;
        let alignment =
            u64::try_from(device.get_i32("request-alignment").map_err(failed)?).unwrap_or(512).max(1);
        if options.bs == 0
            || !options.bs.is_multiple_of(alignment)
            || !options.offset.is_multiple_of(alignment)
        {
            return Err(format!("--bs={}: bs and offset must be multiples of {alignment}", options.bs));
        }
        // Jobs that verify must not write into each other's ranges; others share the range, as in fio.
        let apart = options.verify != Verify::None && options.numjobs > 1;
        let parts = if apart { u64::from(options.numjobs) } else { 1 };
        let available = capacity.saturating_sub(options.offset) / parts;
        let size = options.size.unwrap_or(available);
        let blocks = size / options.bs;
        if size > available || blocks == 0 {
            let hint = format!("{available} bytes are there for each job behind the offset");
            return Err(format!("--size={size}: {hint}, and at least one block is needed"));
        }
        Ok(Range { blocks, stride: if apart { blocks * options.bs } else { 0 } })
    }
}

fn run_job(
    setup: Setup,
    options: &Options,
    index: usize,
    blocks: u64,
    shared: &Shared,
) -> Result<Totals, String> {
    let read_percent = options.rw.read_percent(options.rwmixread);
    let first_block = setup.first_byte / options.bs;
    let ledger =
        (options.verify == Verify::Crc32c).then(|| Ledger::new(blocks, first_block, options.randseed));
    let reads_back = ledger.is_some() && options.do_verify && read_percent < 100;
    let mut job = Job::new(setup, ledger, read_percent == 100);
    let seed = options.randseed.wrapping_add(to_u64(index) << 32);
    let mut pattern = Pattern::new(blocks, options.rw.is_random(), read_percent, seed);
    let passes = (!options.time_based).then_some(1);
    let progress = &shared.progress[index];
    job.run(&mut pattern, passes, false, shared, progress)?;
    if reads_back {
        // The measurement is over for this job: what follows is not counted, and runs to its end.
        let reading = Shared { phase: AtomicU8::new(WARM), progress: Vec::new() };
        let mut pattern = Pattern::new(blocks, options.rw.is_random(), 100, seed);
        job.run(&mut pattern, Some(1), true, &reading, progress)?;
    }
    Ok(job.into_totals())
}

/// What the clocks showed at one moment.
struct Reading {
    at: Instant,
    server: Option<f64>,
    client: sys::Usage,
    waited: f64,
}

impl Reading {
    fn take(options: &Options) -> Result<Self, String> {
        let server = (!options.server_pid.is_empty())
            .then(|| options.server_pid.iter().map(|&pid| sys::cpu_seconds(pid)).sum::<Result<f64, _>>())
            .transpose()
            .map_err(|e| format!("--server_pid: {e}"))?;
        Ok(Reading { at: Instant::now(), server, client: sys::usage(), waited: sys::waited_for_cpu() })
    }
}

fn measure(
    options: &Options,
    shared: &Shared,
    results: &Receiver<Result<Totals, String>>,
    collected: &mut Collected<'_>,
) -> Result<Report, String> {
    let mut watch = Watch { last: 0, since: Instant::now(), limit: options.stall_timeout };
    let ramp_end = Instant::now() + options.ramp_time;
    collected.until(Some(ramp_end), shared, results, &mut watch)?;
    let start = Reading::take(options)?;
    shared.phase.store(MEASURE, Ordering::Relaxed);
    let end = options.runtime.map(|runtime| start.at + runtime);
    collected.until(end, shared, results, &mut watch)?;
    let stop = Reading::take(options)?;
    shared.phase.store(STOP, Ordering::Relaxed);
    collected.until(None, shared, results, &mut watch)?;
    let regions = collected.regions.as_ref().map(|(_, regions)| regions.turns());
    Ok(Report { regions, ..report(options, &start, &stop, &collected.totals) })
}

/// Results of the jobs that have ended.
struct Collected<'a> {
    jobs: usize,
    totals: Vec<Totals>,
    /// Regions that come and go meanwhile.
    regions: Option<(&'a mut Blkio, Regions)>,
}

impl Collected<'_> {
    /// Waits until `end`, or until all jobs have ended, or until one has failed.
    fn until(
        &mut self,
        end: Option<Instant>,
        shared: &Shared,
        results: &Receiver<Result<Totals, String>>,
        watch: &mut Watch,
    ) -> Result<(), String> {
        while self.totals.len() < self.jobs {
            let left = end.map_or(WATCH, |end| end.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return Ok(());
            }
            let mut pause = WATCH;
            if let Some((device, regions)) = &mut self.regions {
                regions.turn(device)?;
                pause = CHURN;
            }
            match results.recv_timeout(left.min(pause)) {
                Ok(result) => self.totals.push(result?),
                Err(RecvTimeoutError::Timeout) => watch.look(shared)?,
                Err(RecvTimeoutError::Disconnected) => return Err("a job has gone without a result".into()),
            }
        }
        Ok(())
    }
}

/// Finds out that nothing completes any more: the library hides the socket, so a dead server is noticed by silence.
struct Watch {
    last: u64,
    since: Instant,
    limit: Duration,
}

impl Watch {
    fn look(&mut self, shared: &Shared) -> Result<(), String> {
        let completed = shared.progress.iter().map(|p| p.load(Ordering::Relaxed)).sum();
        if completed != self.last {
            self.last = completed;
            self.since = Instant::now();
        }
        if self.since.elapsed() > self.limit {
            return Err(format!("no request has completed for {:?}, after {completed}", self.limit));
        }
        Ok(())
    }
}

fn report(options: &Options, start: &Reading, stop: &Reading, totals: &[Totals]) -> Report {
    let mut all = Totals::default();
    for job in totals {
        all.reads.merge(&job.reads);
        all.writes.merge(&job.writes);
        all.batches += job.batches;
        all.verified += job.verified;
    }
    let mut both = all.reads.clone();
    both.merge(&all.writes);
    let requests = to_f64(both.count());
    let seconds = (stop.at - start.at).as_secs_f64().max(1e-9);
    let server = start.server.zip(stop.server).map(|(a, b)| b - a);
    let per_million = |cpu: f64| if requests > 0.0 { cpu * 1e6 / requests } else { 0.0 };
    Report {
        iops: requests / seconds,
        bandwidth: requests * to_f64(options.bs) / seconds,
        seconds,
        batch_mean: requests / to_f64(all.batches.max(1)),
        read_ns: (&all.reads).into(),
        write_ns: (&all.writes).into(),
        all_ns: (&both).into(),
        server_cpu_per_million: server.map(per_million),
        server_cpu_share: server.map(|cpu| cpu / seconds),
        client_cpu_per_million: per_million(stop.client.cpu_seconds - start.client.cpu_seconds),
        client_sleeps_per_thousand: to_f64(stop.client.voluntary_switches - start.client.voluntary_switches)
            * 1e3
            / requests.max(1.0),
        client_waited_share: (stop.waited - start.waited).max(0.0) / seconds,
        client_involuntary_switches: stop.client.involuntary_switches - start.client.involuntary_switches,
        verified: all.verified,
        regions: None,
    }
}
