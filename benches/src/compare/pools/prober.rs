//! Latencies of single requests to a pool's volumes, all kinds in turns, so that they sleep and wake alike.
//!
//! Owns: the requests whose latency is taken. Must not know: how a sample of a load is taken.

use std::path::Path;
use std::time::{Duration, Instant};

use super::Latencies;
use crate::compare::results::Spread;
use crate::frontend::{Config, Op, STATUS_OK, Session};
use crate::{sys, to_f64};

/// The unit of allocation.
const EXTENT_BYTES: u64 = 1 << 20;
/// What is read and written.
const BLOCK_BYTES: usize = 4096;

/// Takes latencies of requests to two volumes of one pool: `empty`, where nothing is mapped yet, and `shared`, which is full, and of
/// which there is a snapshot. Each extent serves once.
pub(super) struct Prober {
    empty: Session,
    shared: Session,
    cpu: usize,
    next: u64,
    extents: u64,
}

impl Prober {
    /// Connects to both; they have at least `extents` extents.
    pub(super) fn new(empty: &Path, shared: &Path, extents: u64, cpu: usize) -> Result<Prober, String> {
        let connect = |socket| Session::connect(Config::new(socket)).map_err(|e| e.to_string());
        let mut prober = Prober { empty: connect(empty)?, shared: connect(shared)?, cpu, next: 0, extents };
        // The extent for overwrites.
        write(&mut prober.empty, 0)?;
        prober.next = 1;
        Ok(prober)
    }

    /// Medians of `count` requests of each kind.
    pub(super) fn probe(&mut self, count: u64) -> Result<Latencies, String> {
        let first = self.next;
        if first + count > self.extents {
            return Err(format!("{} extents are too few for so many disturbed samples", self.extents));
        }
        self.next += count;
        std::thread::scope(|scope| {
            let probing = scope.spawn(|| {
                sys::pin_to(self.cpu).map_err(|e| format!("CPU {}: {e}", self.cpu))?;
                self.probe_extents(first..first + count)
            });
            probing.join().map_err(|_| "the thread that probes has panicked".to_owned())?
        })
    }

    fn probe_extents(&mut self, extents: std::ops::Range<u64>) -> Result<Latencies, String> {
        let mut times: [Vec<Duration>; 4] = Default::default();
        for extent in extents {
            times[0].push(write(&mut self.empty, 0)?);
            times[1].push(write(&mut self.empty, extent)?);
            times[2].push(read(&mut self.shared, extent)?);
            times[3].push(write(&mut self.shared, extent)?);
        }
        let [overwrite, first_write, read, after_snapshot] = times.map(|times| {
            let nanoseconds = times.iter().map(|time| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
            Spread::of(nanoseconds.map(to_f64)).median / 1000.0
        });
        Ok(Latencies { overwrite, first_write, read, after_snapshot })
    }
}

fn write(session: &mut Session, extent: u64) -> Result<Duration, String> {
    timed(session, Op::Write, extent)
}

fn read(session: &mut Session, extent: u64) -> Result<Duration, String> {
    timed(session, Op::Read, extent)
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
