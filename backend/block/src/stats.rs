//! Counters and latency histograms: written by one reactor without atomic read-modify-write, read by anybody.

use crate::request::Operation;
use crate::status::{Outcome, Status};
use hawser_runtime::{ReactorHandle, Runtime};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// A number that one thread raises and others read. Two writers may lose counts, never more than that.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Raises it.
    pub fn add(&self, count: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(count), Ordering::Relaxed);
    }

    /// Reads it.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Steps per power of two: values are known to 1/8, about 6 % on either side of a bucket's middle.
const STEPS: usize = 8;
/// Values below 8 have a bucket each; every power of two from 2^3 to 2^63 has 8.
const BUCKETS: usize = 62 * STEPS;

/// Latencies in nanoseconds, in buckets of equal ratio.
#[derive(Debug)]
pub struct Histogram {
    buckets: Box<[Counter; BUCKETS]>,
    sum: Counter,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram {
            buckets: Box::new([const { Counter(AtomicU64::new(0)) }; BUCKETS]),
            sum: Counter::default(),
        }
    }
}

fn bucket_of(ns: u64) -> usize {
    if ns < STEPS as u64 {
        return usize::try_from(ns).unwrap_or(0);
    }
    let exponent = ns.ilog2() as usize;
    let step = usize::try_from(ns >> (exponent - 3)).unwrap_or(0) & (STEPS - 1);
    (exponent - 2) * STEPS + step
}

/// The smallest value of a bucket.
fn floor_of(bucket: usize) -> u64 {
    if bucket < STEPS {
        return bucket as u64;
    }
    let exponent = bucket / STEPS + 2;
    (1 << exponent) | ((bucket % STEPS) as u64) << (exponent - 3)
}

impl Histogram {
    /// Counts `count` values of `ns`.
    pub fn record(&self, ns: u64, count: u64) {
        self.buckets[bucket_of(ns)].add(count);
        self.sum.add(ns.saturating_mul(count));
    }

    /// A copy to compute with, all zero at first: add histograms to it.
    #[must_use]
    pub fn snapshot(&self) -> HistogramSnapshot {
        let mut snapshot = HistogramSnapshot::default();
        snapshot.add(self);
        snapshot
    }
}

/// The sum of some histograms at one time.
#[derive(Clone, Debug)]
pub struct HistogramSnapshot {
    counts: Vec<u64>,
    /// The sum of all values, in nanoseconds.
    pub sum_ns: u64,
}

impl Default for HistogramSnapshot {
    fn default() -> Self {
        HistogramSnapshot { counts: vec![0; BUCKETS], sum_ns: 0 }
    }
}

impl HistogramSnapshot {
    /// Adds what `histogram` holds now.
    pub fn add(&mut self, histogram: &Histogram) {
        for (count, bucket) in self.counts.iter_mut().zip(histogram.buckets.iter()) {
            *count += bucket.get();
        }
        self.sum_ns = self.sum_ns.wrapping_add(histogram.sum.get());
    }

    /// How many values there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// How many values are below the end of the bucket of `ns`: those up to `ns`, and at most 1/8 above.
    #[must_use]
    pub fn count_up_to(&self, ns: u64) -> u64 {
        self.counts
            .iter()
            .enumerate()
            .take_while(|(bucket, _)| floor_of(*bucket) <= ns)
            .map(|(_, count)| count)
            .sum()
    }

    /// The value below which `permille` of 1000 values lie, in nanoseconds; 0 without values.
    #[must_use]
    pub fn quantile_ns(&self, permille: u32) -> u64 {
        let rank = (u128::from(self.count()) * u128::from(permille.min(1000))).div_ceil(1000);
        let mut seen = 0u128;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += u128::from(*count);
            if *count > 0 && seen >= rank {
                let next = if bucket + 1 < BUCKETS { floor_of(bucket + 1) } else { u64::MAX };
                return floor_of(bucket).midpoint(next);
            }
        }
        0
    }
}

/// The numbers of one disk or device: an [`IoStats`] for each reactor that writes, added up by whoever reads.
#[derive(Default)]
pub struct StatsSet {
    writers: Mutex<Vec<(ReactorHandle, Arc<IoStats>)>>,
}

impl StatsSet {
    /// The instance that this reactor writes to; the same each time.
    #[must_use]
    pub fn writer(&self, runtime: &Runtime) -> Arc<IoStats> {
        let handle = runtime.handle();
        let mut writers = self.writers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, stats)) = writers.iter().find(|(other, _)| other.same(&handle)) {
            return Arc::clone(stats);
        }
        let stats = Arc::<IoStats>::default();
        writers.push((handle, Arc::clone(&stats)));
        stats
    }

    /// All instances, to read.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<IoStats>> {
        let writers = self.writers.lock().unwrap_or_else(PoisonError::into_inner);
        writers.iter().map(|(_, stats)| Arc::clone(stats)).collect()
    }

    /// Requests, bytes and latencies of one kind, added up.
    #[must_use]
    pub fn kind(&self, kind: IoKind) -> KindSnapshot {
        let mut sum = KindSnapshot::default();
        for stats in self.all() {
            let stats = stats.kind(kind);
            sum.requests += stats.requests.get();
            sum.bytes += stats.bytes.get();
            sum.latency.add(&stats.latency);
        }
        sum
    }

    /// Bytes moved or covered by requests of one kind that ended well.
    #[must_use]
    pub fn bytes(&self, kind: IoKind) -> u64 {
        self.all().iter().map(|stats| stats.kind(kind).bytes.get()).sum()
    }

    /// How many requests failed with `status`.
    #[must_use]
    pub fn failures(&self, status: Status) -> u64 {
        self.all().iter().map(|stats| stats.failures(status)).sum()
    }
}

/// One kind's numbers at one time.
#[derive(Clone, Debug, Default)]
pub struct KindSnapshot {
    /// Requests that ended well.
    pub requests: u64,
    /// Bytes moved or covered by them.
    pub bytes: u64,
    /// From submission to end, of all requests.
    pub latency: HistogramSnapshot,
}

/// What was asked of one disk or device on one reactor, by kind of operation.
#[derive(Debug, Default)]
pub struct IoStats {
    kinds: [KindStats; IoKind::COUNT],
    failures: [Counter; Status::ALL.len()],
}

/// The kinds that are counted apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoKind {
    /// Reads.
    Read,
    /// Writes with payload.
    Write,
    /// Flushes.
    Flush,
    /// Discards.
    Discard,
    /// Writes of zeroes without payload.
    WriteZeroes,
}

impl IoKind {
    /// How many kinds there are.
    pub const COUNT: usize = 5;
    /// All of them.
    pub const ALL: [IoKind; IoKind::COUNT] =
        [IoKind::Read, IoKind::Write, IoKind::Flush, IoKind::Discard, IoKind::WriteZeroes];

    /// The name used in metrics and messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            IoKind::Read => "read",
            IoKind::Write => "write",
            IoKind::Flush => "flush",
            IoKind::Discard => "discard",
            IoKind::WriteZeroes => "write_zeroes",
        }
    }
}

impl From<Operation> for IoKind {
    fn from(operation: Operation) -> IoKind {
        match operation {
            Operation::Read => IoKind::Read,
            Operation::Write { .. } => IoKind::Write,
            Operation::Flush => IoKind::Flush,
            Operation::Discard => IoKind::Discard,
            Operation::WriteZeroes { .. } => IoKind::WriteZeroes,
        }
    }
}

/// One kind's numbers.
#[derive(Debug, Default)]
pub struct KindStats {
    /// Requests that ended well.
    pub requests: Counter,
    /// Bytes moved or covered by them.
    pub bytes: Counter,
    /// From submission to end, of all requests.
    pub latency: Histogram,
}

impl IoStats {
    /// Counts one ended request.
    pub fn record(&self, kind: IoKind, bytes: u64, latency_ns: u64, outcome: Outcome) {
        let stats = &self.kinds[kind as usize];
        stats.latency.record(latency_ns, 1);
        match outcome {
            Ok(()) => {
                stats.requests.add(1);
                stats.bytes.add(bytes);
            }
            Err(status) => self.failures[status as usize - 1].add(1),
        }
    }

    /// The numbers of one kind.
    #[must_use]
    pub fn kind(&self, kind: IoKind) -> &KindStats {
        &self.kinds[kind as usize]
    }

    /// How many requests failed with `status`.
    #[must_use]
    pub fn failures(&self, status: Status) -> u64 {
        self.failures[status as usize - 1].get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_in_order_and_hold_their_floor() {
        let mut values: Vec<u64> = (0..4096).collect();
        values
            .extend((12..64).flat_map(|shift| (0..16).map(move |step| (1 << shift) | (step << (shift - 4)))));
        values.push(u64::MAX);
        let mut last = 0;
        for value in values {
            let bucket = bucket_of(value);
            assert!(bucket == last || bucket == last + 1, "{value}: {bucket} after {last}");
            assert!(floor_of(bucket) <= value, "{value} in bucket {bucket}");
            assert!(
                bucket == bucket_of(u64::MAX) || value < floor_of(bucket + 1),
                "{value} in bucket {bucket}"
            );
            last = bucket;
        }
    }

    #[test]
    fn quantiles_are_within_a_bucket_of_the_truth() {
        let histogram = Histogram::default();
        for ns in 1..=100_000 {
            histogram.record(ns, 1);
        }
        let snapshot = histogram.snapshot();
        assert_eq!(snapshot.count(), 100_000);
        for (permille, truth) in [(500, 50_000u64), (990, 99_000), (999, 99_900)] {
            let found = snapshot.quantile_ns(permille);
            assert!(found.abs_diff(truth) * 8 <= truth, "{permille}: {found}");
        }
    }
}
