//! What can be changed at run time, and what is counted.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;

/// Probabilities are from 0 to 1.
#[derive(Clone, Debug, Serialize)]
pub struct Settings {
    pub sqs_ms: u64,
    pub dynamodb_ms: u64,
    pub worker_ms: u64,
    /// Of a batch that is rejected as a whole.
    pub batch_failure: f64,
    /// Of an entry of a batch that fails.
    pub entry_failure: f64,
    /// Of a batch that the queue takes without an answer.
    pub lost_answer: f64,
    /// Of a row of a batch that is not processed.
    pub unprocessed: f64,
    /// Of a call to a table that is throttled.
    pub throttle: f64,
    /// Whether the worker answers jobs.
    pub worker: bool,
}

/// The members of [`Settings`] to change.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Changes {
    sqs_ms: Option<u64>,
    dynamodb_ms: Option<u64>,
    worker_ms: Option<u64>,
    batch_failure: Option<f64>,
    entry_failure: Option<f64>,
    lost_answer: Option<f64>,
    unprocessed: Option<f64>,
    throttle: Option<f64>,
    worker: Option<bool>,
}

impl Settings {
    pub fn new(sqs_ms: u64, dynamodb_ms: u64, worker_ms: u64) -> Self {
        Self {
            sqs_ms,
            dynamodb_ms,
            worker_ms,
            batch_failure: 0.0,
            entry_failure: 0.0,
            lost_answer: 0.0,
            unprocessed: 0.0,
            throttle: 0.0,
            worker: true,
        }
    }

    pub fn change(&mut self, changes: &Changes) {
        set(&mut self.sqs_ms, changes.sqs_ms);
        set(&mut self.dynamodb_ms, changes.dynamodb_ms);
        set(&mut self.worker_ms, changes.worker_ms);
        set(&mut self.batch_failure, changes.batch_failure);
        set(&mut self.entry_failure, changes.entry_failure);
        set(&mut self.lost_answer, changes.lost_answer);
        set(&mut self.unprocessed, changes.unprocessed);
        set(&mut self.throttle, changes.throttle);
        set(&mut self.worker, changes.worker);
    }

    pub fn sqs(&self) -> Duration {
        Duration::from_millis(self.sqs_ms)
    }

    pub fn dynamodb(&self) -> Duration {
        Duration::from_millis(self.dynamodb_ms)
    }

    pub fn worker_delay(&self) -> Duration {
        Duration::from_millis(self.worker_ms)
    }
}

/// Mean delay of a timer: timers tick in whole milliseconds, and `epoll` waits for whole ones.
const LATE: Duration = Duration::from_micros(1500);

/// Waits for `latency` on average.
pub async fn wait(latency: Duration) {
    tokio::time::sleep(latency.saturating_sub(LATE)).await;
}

fn set<T: Copy>(value: &mut T, change: Option<T>) {
    *value = change.unwrap_or(*value);
}

/// Draws once with this probability.
pub fn happens(probability: f64) -> bool {
    probability > 0.0 && rand::random_bool(probability.min(1.0))
}

#[derive(Debug, Default, Serialize)]
pub struct Stats {
    /// Calls by operation.
    pub operations: BTreeMap<String, u64>,
    /// Messages that the queue took.
    pub messages: u64,
    /// Log rows written, each key once.
    pub rows: usize,
    /// Commands that the worker sent.
    pub redis_commands: u64,
    pub published: u64,
    /// Results that were dropped because Redis was away.
    pub unpublished: u64,
    /// Time of the last confirmation of the queue, in nanoseconds of `CLOCK_MONOTONIC`.
    pub last_confirmed_ns: u64,
}
