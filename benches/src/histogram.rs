//! A latency histogram of fixed size: 64 linear steps per power of two, so a percentile is right to 1.6 %.
//!
//! Owns: counting and percentiles. Must not know: what was measured.
//! Invariant: [`Histogram::record`] never allocates and never fails; every `u64` has a bucket.
#![forbid(unsafe_code)]

use crate::{to_u64, to_usize};

/// log2 of the linear steps per power of two.
const STEP_BITS: u32 = 6;
const STEPS: usize = 1 << STEP_BITS;
/// Values below 2^6 have a bucket each; then one row of 64 for each exponent 6..=63.
const BUCKETS: usize = STEPS + (64 - 6) * STEPS;

/// Counts of values (nanoseconds, here) by magnitude.
#[derive(Clone)]
pub struct Histogram {
    buckets: Box<[u64]>,
    count: u64,
    sum: u64,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new()
    }
}

impl Histogram {
    /// An empty histogram with all of its memory.
    pub fn new() -> Self {
        Histogram { buckets: vec![0; BUCKETS].into_boxed_slice(), count: 0, sum: 0, max: 0 }
    }

    #[inline]
    fn index(value: u64) -> usize {
        if value < to_u64(STEPS) {
            return to_usize(value);
        }
        let shift = 63 - value.leading_zeros() - STEP_BITS;
        // The top seven bits of the value: 64..=127, so the row's own 64 is taken off again.
        to_usize(u64::from(shift) * to_u64(STEPS) + (value >> shift))
    }

    /// The largest value that falls into bucket `index`.
    fn upper_bound(index: usize) -> u64 {
        if index < 2 * STEPS {
            return to_u64(index);
        }
        let shift = index / STEPS - 1;
        let mantissa = to_u64(index % STEPS + STEPS);
        (mantissa << shift) | ((1_u64 << shift) - 1)
    }

    /// Counts one value.
    #[inline]
    pub fn record(&mut self, value: u64) {
        self.buckets[Self::index(value)] += 1;
        self.count += 1;
        self.sum = self.sum.saturating_add(value);
        self.max = self.max.max(value);
    }

    /// Adds everything that `other` counted.
    pub fn merge(&mut self, other: &Histogram) {
        for (mine, theirs) in self.buckets.iter_mut().zip(&other.buckets) {
            *mine += theirs;
        }
        self.count += other.count;
        self.sum = self.sum.saturating_add(other.sum);
        self.max = self.max.max(other.max);
    }

    /// How many values were counted.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The mean of all values, 0 if there are none.
    pub fn mean(&self) -> u64 {
        self.sum.checked_div(self.count).unwrap_or(0)
    }

    /// The largest value, exactly.
    pub fn max(&self) -> u64 {
        self.max
    }

    /// The value that `per_mille` ‰ of all values do not exceed (500 = median, 999 = p99.9), 0 if there are none.
    pub fn percentile(&self, per_mille: u64) -> u64 {
        let rank = (self.count * per_mille).div_ceil(1000).max(1);
        let mut seen = 0;
        for (index, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return Self::upper_bound(index).min(self.max);
            }
        }
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_lies_in_a_bucket_that_bounds_it_closely() {
        let mut values: Vec<u64> = (0..4096).collect();
        for exponent in 7..64 {
            for offset in [0_u64, 1, 77] {
                values.push((1 << exponent) + offset);
                values.push((1_u64 << exponent) - 1 - offset.min(3));
            }
        }
        values.push(u64::MAX);
        for value in values {
            let index = Histogram::index(value);
            assert!(index < BUCKETS, "{value} has bucket {index}");
            let bound = Histogram::upper_bound(index);
            assert!(bound >= value, "{value} is above its bound {bound}");
            assert!(bound - value <= value / 64, "{value} is far below its bound {bound}");
            assert!(index == 0 || Histogram::upper_bound(index - 1) < value);
        }
    }

    #[test]
    fn percentiles_match_a_sorted_list() {
        let mut histogram = Histogram::new();
        let mut all = Vec::new();
        let mut x = 12345_u64;
        for _ in 0..10_000 {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let value = (x >> 33) % 1_000_000;
            histogram.record(value);
            all.push(value);
        }
        all.sort_unstable();
        for per_mille in [1_u64, 500, 990, 999, 1000] {
            let exact = all[to_usize((10_000 * per_mille).div_ceil(1000)) - 1];
            let got = histogram.percentile(per_mille);
            assert!(got >= exact && got <= exact + exact / 64 + 1, "p{per_mille}: {got} for {exact}");
        }
        assert_eq!(histogram.max(), *all.last().expect("ten thousand values"));
        assert_eq!(histogram.mean(), all.iter().sum::<u64>() / 10_000);
    }

    #[test]
    fn an_empty_histogram_answers_zero() {
        let histogram = Histogram::new();
        assert_eq!((histogram.percentile(999), histogram.mean(), histogram.max()), (0, 0, 0));
    }
}
