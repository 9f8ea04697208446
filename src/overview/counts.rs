//! What a node did in one period.

use crate::metrics::LatencyHistogram;
use serde::{Deserialize, Serialize};

/// The counts of one period on one node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct WindowCounts {
    /// The length of the period, in milliseconds.
    pub ms: u64,
    /// Jobs that were accepted, restored or adopted.
    pub accepted: u64,
    /// Jobs with a first result, and lost jobs.
    pub finished: u64,
    /// Those of them without the status SUCCESS.
    pub failed: u64,
    /// Responses with a status of 500 or more.
    pub request_errors: u64,
    /// Responses 429 and 503.
    pub refused: u64,
    /// From the acceptance of a job to its result. Lost jobs are not in it.
    pub run_times: LatencyHistogram,
    /// Times of responses, one for each.
    pub request_times: LatencyHistogram,
}

impl WindowCounts {
    /// Adds the counts of a period that follows.
    pub fn add(&mut self, other: &Self) {
        let sums = [
            (&mut self.ms, other.ms),
            (&mut self.accepted, other.accepted),
            (&mut self.finished, other.finished),
            (&mut self.failed, other.failed),
            (&mut self.request_errors, other.request_errors),
            (&mut self.refused, other.refused),
        ];
        for (sum, more) in sums {
            *sum = sum.saturating_add(more);
        }
        self.run_times.merge(&other.run_times);
        self.request_times.merge(&other.request_times);
    }
}
