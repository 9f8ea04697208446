//! What the overview of the fleet counts beside the Prometheus metrics: times in finer buckets, and failures.
//!
//! These counts are not series of `/metrics`. The overview takes them once a second. Each finished job and
//! each request costs one relaxed addition, and a failed one two.

use super::latency::{LatencyHistogram, LatencyRecorder};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const TOO_MANY_REQUESTS: u16 = 429;
const UNAVAILABLE: u16 = 503;

/// Runs and requests since the overview has last taken them.
#[derive(Default)]
pub struct LoadRecorder {
    runs: LatencyRecorder,
    runs_failed: AtomicU64,
    requests: LatencyRecorder,
    requests_failed: AtomicU64,
    requests_refused: AtomicU64,
}

/// What a [`LoadRecorder`] has counted.
#[derive(Debug)]
pub struct LoadSample {
    /// From the acceptance of a job to its result.
    pub runs: LatencyHistogram,
    /// Runs with another status than SUCCESS.
    pub runs_failed: u64,
    /// Times of responses.
    pub requests: LatencyHistogram,
    /// Responses with a status of 500 or more.
    pub requests_failed: u64,
    /// Responses 429 and 503.
    pub requests_refused: u64,
}

impl LoadRecorder {
    /// Counts the result of a job that was accepted so long ago.
    pub fn run(&self, took: Duration, is_success: bool) {
        self.runs.record(took);
        if !is_success {
            self.runs_failed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts a response.
    pub fn request(&self, status: u16, took: Duration) {
        self.requests.record(took);
        if status >= 500 {
            self.requests_failed.fetch_add(1, Ordering::Relaxed);
        }
        if matches!(status, TOO_MANY_REQUESTS | UNAVAILABLE) {
            self.requests_refused.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Returns what was counted since the last call.
    pub fn take(&self) -> LoadSample {
        LoadSample {
            runs: self.runs.take(),
            runs_failed: self.runs_failed.swap(0, Ordering::Relaxed),
            requests: self.requests.take(),
            requests_failed: self.requests_failed.swap(0, Ordering::Relaxed),
            requests_refused: self.requests_refused.swap(0, Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_counted_by_kind() {
        let load = LoadRecorder::default();
        for status in [200, 202, 404, 429, 500, 503, 599] {
            load.request(status, Duration::from_millis(1));
        }
        load.run(Duration::from_millis(5), true);
        load.run(Duration::from_millis(5), false);
        let taken = load.take();
        let requests = (taken.requests.count(), taken.requests_failed, taken.requests_refused);
        assert_eq!((requests, taken.runs.count(), taken.runs_failed), ((7, 3, 2), 2, 1));
        assert_eq!((load.take().requests_failed, load.take().runs_failed), (0, 0));
    }
}
