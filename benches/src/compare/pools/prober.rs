//! Latencies of single requests to a pool's volumes, all kinds in turns.
//!
//! The client's CPU is kept awake meanwhile by a thread that yields to everybody. Else what is measured is how it wakes: in 5 µs while it still
//! looks for work before it halts, in 20 µs after; an overwrite came in time for the first and a first write, a few microseconds later, did not.
//!
//! Owns: the requests whose latency is taken. Must not know: how a sample of a load is taken.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::Latencies;
use crate::compare::results::Spread;
use crate::frontend::{Config, Op, STATUS_OK, Session};
use crate::{sys, to_f64};

/// The unit of allocation.
const EXTENT_BYTES: u64 = 1 << 20;
/// What is read and written.
const BLOCK_BYTES: usize = 4096;
/// No answer takes longer.
const LIMIT: Duration = Duration::from_secs(10);

/// Takes latencies of requests to two volumes of one pool: `empty`, where nothing is mapped yet, and `shared`, which is full, and of
/// which there is a snapshot. Each extent serves once; `empty` has twice as many, so that half of them can be overwritten.
pub(super) struct Prober {
    empty: Session,
    shared: Session,
    cpu: usize,
    next: u64,
    extents: u64,
}

impl Prober {
    /// Connects to both. `shared` has at least `extents` extents, and `empty` twice as many.
    pub(super) fn new(empty: &Path, shared: &Path, extents: u64, cpu: usize) -> Result<Prober, String> {
        let connect = |socket| Session::connect(Config::new(socket)).map_err(|e| e.to_string());
        let mut prober = Prober { empty: connect(empty)?, shared: connect(shared)?, cpu, next: 0, extents };
        // Those that are overwritten: not one again and again, which would be in every cache.
        for extent in 0..extents {
            write(&mut prober.empty, extents + extent)?;
        }
        Ok(prober)
    }

    /// Medians of `count` requests of each kind.
    pub(super) fn probe(&mut self, count: u64) -> Result<Latencies, String> {
        let first = self.next;
        if first + count > self.extents {
            return Err(format!("{} extents are too few for so many disturbed samples", self.extents));
        }
        self.next += count;
        let (cpu, is_over) = (self.cpu, AtomicBool::new(false));
        std::thread::scope(|scope| {
            let awake = scope.spawn(|| {
                sys::pin_to(cpu).and_then(|()| sys::yield_to_all()).map_err(|e| format!("CPU {cpu}: {e}"))?;
                while !is_over.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
                Ok(())
            });
            let probing = scope.spawn(|| {
                sys::pin_to(cpu).map_err(|e| format!("CPU {cpu}: {e}"))?;
                self.probe_extents(first..first + count)
            });
            let found = probing.join().map_err(|_| "the thread that probes has panicked".to_owned());
            is_over.store(true, Ordering::Relaxed);
            let awake: Result<(), String> =
                awake.join().map_err(|_| "the thread that keeps the CPU awake has panicked".to_owned())?;
            awake.and(found?)
        })
    }

    fn probe_extents(&mut self, extents: std::ops::Range<u64>) -> Result<Latencies, String> {
        let mut times: [Vec<Duration>; 6] = Default::default();
        for extent in extents {
            let (old, empty) = (self.extents + extent, &mut self.empty);
            match extent % 2 {
                0 => {
                    times[0].push(write(empty, old)?);
                    times[1].push(write(empty, extent)?);
                }
                _ => {
                    times[4].push(polled(empty, Op::Write, old)?);
                    times[5].push(polled(empty, Op::Write, extent)?);
                }
            }
            times[2].push(read(&mut self.shared, extent)?);
            times[3].push(write(&mut self.shared, extent)?);
        }
        let [overwrite, first_write, read, after_snapshot, polled_overwrite, polled_first_write] =
            times.map(|times| {
                let nanoseconds = times.iter().map(|time| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
                Spread::of(nanoseconds.map(to_f64)).median / 1000.0
            });
        let polled = (polled_overwrite, polled_first_write);
        Ok(Latencies { overwrite, first_write, read, after_snapshot, polled })
    }
}

fn write(session: &mut Session, extent: u64) -> Result<Duration, String> {
    timed(session, Op::Write, extent)
}

fn read(session: &mut Session, extent: u64) -> Result<Duration, String> {
    timed(session, Op::Read, extent)
}

/// A request for the first block of an extent, by a client that looks for its end and is not woken.
fn polled(session: &mut Session, op: Op, extent: u64) -> Result<Duration, String> {
    let begin = Instant::now();
    let bytes = u32::try_from(BLOCK_BYTES).map_err(|e| e.to_string())?;
    session.submit(0, 0, op, extent * EXTENT_BYTES / 512, bytes);
    session.publish(0).map_err(|e| e.to_string())?;
    loop {
        let ended = session.complete(0).map_err(|e| e.to_string())?;
        match ended.map(|ended| ended.status) {
            Some(STATUS_OK) => return Ok(begin.elapsed()),
            Some(status) => return Err(format!("{op:?} of extent {extent}: status {status}")),
            None if begin.elapsed() > LIMIT => return Err(format!("no answer within {LIMIT:?}")),
            None => std::hint::spin_loop(),
        }
    }
}

/// A request for the first block of an extent.
fn timed(session: &mut Session, op: Op, extent: u64) -> Result<Duration, String> {
    let begin = Instant::now();
    let ended = session.request(0, op, extent * EXTENT_BYTES / 512, &mut [7; BLOCK_BYTES]);
    let time = begin.elapsed();
    match ended.map_err(|e| e.to_string())?.status {
        STATUS_OK => Ok(time),
        status => Err(format!("{op:?} of extent {extent}: status {status}")),
    }
}
