//! Histograms of times that can be merged: over seconds, over nodes, in any order, and without a loss.
//!
//! The buckets are log-linear, as in HdrHistogram (Gil Tene, hdrhistogram.org): each power of two is divided
//! into 16 buckets of one width. A value is reported as the middle of its bucket. So its relative error is at
//! most 1/32, and below 16 microseconds its error is half a microsecond. The buckets of the Prometheus
//! histograms are too wide for percentiles: they only show in which third of a decade a value is.

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// The logarithm of [`SUB_BUCKETS`].
const SUB_BITS: u32 = 4;
/// Buckets of one power of two.
const SUB_BUCKETS: u64 = 1 << SUB_BITS;
/// The logarithm of the time, in microseconds, from which on all times share the last bucket: 19 hours.
const LARGEST_BITS: u32 = 36;
/// The number of buckets: 528.
const BUCKETS: usize = ((LARGEST_BITS - SUB_BITS + 1) << SUB_BITS) as usize;

/// The bucket of a time in microseconds.
fn bucket_of(us: u64) -> usize {
    let us = us.min((1 << LARGEST_BITS) - 1);
    if us < SUB_BUCKETS {
        return us as usize;
    }
    let shift = us.ilog2() - SUB_BITS;
    ((u64::from(shift) << SUB_BITS) + (us >> shift)) as usize
}

/// The middle of a bucket, in microseconds.
fn middle_of(bucket: usize) -> f64 {
    let bucket = bucket as u64;
    let shift = (bucket >> SUB_BITS).saturating_sub(1);
    let least = (bucket - (shift << SUB_BITS)) << shift;
    least as f64 + (1_u64 << shift) as f64 / 2.0
}

/// Counts times without a lock. Each time costs one relaxed addition.
pub struct LatencyRecorder {
    buckets: Box<[AtomicU32]>,
}

impl Default for LatencyRecorder {
    fn default() -> Self {
        Self { buckets: (0..BUCKETS).map(|_| AtomicU32::new(0)).collect() }
    }
}

impl LatencyRecorder {
    /// Counts one time.
    pub fn record(&self, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        // The bucket always exists. `get` spares the check a panic.
        if let Some(count) = self.buckets.get(bucket_of(us)) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Returns the times since the last call. No time is lost or counted twice.
    pub fn take(&self) -> LatencyHistogram {
        // A bucket that is 0 is only read, so that an idle second writes nothing.
        let taken = |count: &AtomicU32| match count.load(Ordering::Relaxed) {
            0 => 0,
            _ => count.swap(0, Ordering::Relaxed),
        };
        LatencyHistogram { counts: self.buckets.iter().map(taken).collect() }
    }
}

/// How many times fell into each bucket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LatencyHistogram {
    counts: Box<[u32]>,
}

impl Default for LatencyHistogram {
    fn default() -> Self {
        Self { counts: vec![0; BUCKETS].into() }
    }
}

impl LatencyHistogram {
    /// Adds the times of `other`. A count stays at its maximum.
    pub fn merge(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(other.counts.iter()) {
            *count = count.saturating_add(*more);
        }
    }

    /// The number of times.
    pub fn count(&self) -> u64 {
        self.counts.iter().map(|count| u64::from(*count)).sum()
    }

    /// The time that the share `part` of all times does not exceed, in milliseconds. `None`: it is empty.
    pub fn percentile_ms(&self, part: f64) -> Option<f64> {
        let rank = ((self.count() as f64 * part).ceil() as u64).max(1);
        let mut seen = 0;
        let bucket = self.counts.iter().position(|count| {
            seen += u64::from(*count);
            seen >= rank
        });
        bucket.map(|bucket| middle_of(bucket) / 1000.0)
    }
}

/// Pairs of numbers: how many empty buckets precede a bucket, and its count. Most buckets are empty.
impl Serialize for LatencyHistogram {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut empty = 0_u32;
        let mut pairs = Vec::new();
        for count in self.counts.iter() {
            if *count == 0 {
                empty += 1;
            } else {
                pairs.extend([std::mem::take(&mut empty), *count]);
            }
        }
        pairs.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for LatencyHistogram {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let pairs = Vec::<u32>::deserialize(deserializer)?;
        let mut histogram = Self::default();
        let mut buckets = histogram.counts.iter_mut();
        for pair in pairs.chunks(2) {
            let &[empty, count] = pair else { return Err(D::Error::custom("a bucket without a count")) };
            let bucket = buckets.nth(empty as usize).ok_or_else(|| D::Error::custom("too many buckets"))?;
            *bucket = count;
        }
        Ok(histogram)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RELATIVE_ERROR_MAX: f64 = 1.0 / 32.0;

    fn histogram(all_us: impl IntoIterator<Item = u64>) -> LatencyHistogram {
        let recorder = LatencyRecorder::default();
        all_us.into_iter().for_each(|us| recorder.record(Duration::from_micros(us)));
        recorder.take()
    }

    /// Times from 1 µs to 19 hours, dense and irregular.
    fn spread() -> Vec<u64> {
        let mut all = Vec::new();
        let mut us = 1;
        while us < 1 << LARGEST_BITS {
            all.extend([us, us + us / 3, us + us / 2, 2 * us - 1].map(|us| us.min((1 << LARGEST_BITS) - 1)));
            us = us * 17 / 16 + 1;
        }
        all
    }

    #[test]
    fn buckets_are_in_order_and_leave_no_gap() {
        for (us, bucket) in [(0, 0), (1, 1), (15, 15), (16, 16), (31, 31), (32, 32), (33, 32), (34, 33)] {
            assert_eq!(bucket_of(us), bucket, "{us}");
        }
        for largest in [(1 << LARGEST_BITS) - 1, 1 << LARGEST_BITS, u64::MAX] {
            assert_eq!(bucket_of(largest), BUCKETS - 1);
        }
        let mut last = 0;
        for us in 0..1_u64 << 20 {
            let bucket = bucket_of(us);
            assert!(bucket == last || bucket == last + 1, "{us}");
            last = bucket;
        }
    }

    #[test]
    fn every_value_is_within_the_error_of_its_bucket() {
        for us in spread() {
            let middle = middle_of(bucket_of(us));
            let error = (middle - us as f64).abs();
            assert!(error <= (us as f64 * RELATIVE_ERROR_MAX).max(0.5), "{us} µs is reported as {middle}");
        }
    }

    #[test]
    fn percentiles_of_known_values() {
        for (all, part, expected_ms) in [
            (vec![], 0.5, None),
            (vec![7_000], 0.5, Some(7.0)),
            (vec![7_000], 0.99, Some(7.0)),
            ((1..=100).map(|n| n * 1_000).collect(), 0.5, Some(50.0)),
            ((1..=100).map(|n| n * 1_000).collect(), 0.95, Some(95.0)),
            ((1..=100).map(|n| n * 1_000).collect(), 0.99, Some(99.0)),
            ((1..=1000).map(|n| if n <= 989 { 2_000 } else { 3_600_000_000 }).collect(), 0.99, Some(3.6e6)),
            ((1..=1000).map(|n| if n <= 990 { 2_000 } else { 3_600_000_000 }).collect(), 0.99, Some(2.0)),
        ] {
            let found = histogram(all).percentile_ms(part);
            match (found, expected_ms) {
                (Some(found), Some(expected)) => {
                    let error = (found - expected).abs() / expected;
                    assert!(error <= RELATIVE_ERROR_MAX, "p{part}: {found} instead of {expected}");
                }
                _ => assert_eq!(found, expected_ms),
            }
        }
    }

    #[test]
    fn a_merge_is_the_histogram_of_all_values() {
        let all = spread();
        let (one, two): (Vec<u64>, Vec<u64>) = all.iter().partition(|us| *us % 3 == 0);
        let (one, two) = (histogram(one), histogram(two));
        let mut merged = one.clone();
        merged.merge(&two);
        assert_eq!(merged, histogram(all.iter().copied()));
        assert_eq!(merged.count(), all.len() as u64);
        let mut other_order = two;
        other_order.merge(&one);
        assert_eq!(merged, other_order);
    }

    #[test]
    fn what_is_taken_is_not_taken_again() {
        let recorder = LatencyRecorder::default();
        recorder.record(Duration::from_millis(3));
        assert_eq!((recorder.take().count(), recorder.take().count()), (1, 0));
    }

    #[test]
    fn a_histogram_is_restored_from_its_text() {
        for all in [vec![], vec![0], vec![u64::MAX, 0, 0, 5], spread()] {
            let before = histogram(all);
            let text = serde_json::to_string(&before).unwrap();
            assert_eq!(serde_json::from_str::<LatencyHistogram>(&text).unwrap(), before);
        }
        assert_eq!(serde_json::to_string(&histogram([5, 5, 7])).unwrap(), "[5,2,1,1]");
        for bad in ["[1]", "[528,1]", "[4294967295,1,4294967295,1]", "[-1,1]", "{}", "[0,4294967296]"] {
            assert!(serde_json::from_str::<LatencyHistogram>(bad).is_err(), "{bad}");
        }
    }
}
