//! What may be set while it runs, and what it counts.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;

/// Probabilities are from 0 to 1.
#[derive(Clone, Debug, Serialize)]
pub struct Settings {
    pub sqs_ms: u64,
    pub dynamodb_ms: u64,
    pub worker_ms: u64,
    /// A batch is refused as a whole.
    pub batch_failure: f64,
    /// One entry of a batch fails.
    pub entry_failure: f64,
    /// The queue takes a batch, and its answer never comes.
    pub lost_answer: f64,
    /// A row of a batch is not processed.
    pub unprocessed: f64,
    /// A call to a table is throttled.
    pub throttle: f64,
    /// Whether jobs are answered.
    pub worker: bool,
}

/// The members of [`Settings`] that are to change.
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

/// Timers are late by so much on average: they tick in whole milliseconds, and `epoll` waits for whole ones.
const LATE: Duration = Duration::from_micros(1500);

/// Waits as long as is said, on average.
pub async fn wait(latency: Duration) {
    tokio::time::sleep(latency.saturating_sub(LATE)).await;
}

fn set<T: Copy>(value: &mut T, change: Option<T>) {
    *value = change.unwrap_or(*value);
}

/// Whether something of that probability happens now.
pub fn happens(probability: f64) -> bool {
    probability > 0.0 && rand::random_bool(probability.min(1.0))
}

#[derive(Debug, Default, Serialize)]
pub struct Stats {
    /// Calls by operation.
    pub operations: BTreeMap<String, u64>,
    /// Taken by the queue.
    pub messages: u64,
    /// Log rows written, each key once.
    pub rows: usize,
    /// Sent by the worker.
    pub redis_commands: u64,
    pub published: u64,
    /// Results that Redis was not there to take.
    pub unpublished: u64,
    /// When the queue last confirmed, in nanoseconds of `CLOCK_MONOTONIC`.
    pub last_confirmed_ns: u64,
}
