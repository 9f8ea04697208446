//! The port for the registry of workers: the last heartbeat of each, the same on every node.
//!
//! The registry does not schedule jobs, because workers take them from the queue. It only reports, so losing
//! it is harmless: workers send the next heartbeat within seconds. `aws` keeps it in Redis, `embedded` in
//! memory.

use crate::backend::BackendError;
use crate::model::UnixMs;
use async_trait::async_trait;
use bytes::Bytes;
use std::time::Duration;

/// How long a worker is listed after its last heartbeat.
pub const WORKER_TTL: Duration = Duration::from_secs(300);

/// A worker is unhealthy when its last heartbeat is older.
pub const HEALTHY_WITHIN: Duration = Duration::from_secs(30);

/// Reported statuses that make a worker unhealthy, in lower case.
const NOT_WELL: [&str; 6] = ["unhealthy", "error", "offline", "stopped", "stopping", "draining"];

/// Whether a worker that reports this status is healthy.
pub fn reports_well(status: &str) -> bool {
    !NOT_WELL.contains(&status.to_ascii_lowercase().as_str())
}

/// How long the place of the last [`WorkerRegistry::newly_silent`] is remembered.
pub const SILENCE_FORGOTTEN: Duration = Duration::from_secs(60);

/// Maximum number of listed workers.
pub const WORKERS_MAX: usize = 1000;

/// The last heartbeat of a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerRecord {
    /// The JSON object of the heartbeat.
    pub state: Bytes,
    /// The age of the heartbeat, by the clock of the store.
    pub age: Duration,
    /// The time of the heartbeat, by the clock of the store, which all nodes share.
    pub at: UnixMs,
}

/// The outcome of [`WorkerRegistry::put`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HeartbeatOutcome {
    /// `before`: the heartbeat that was replaced.
    Stored { before: Option<WorkerRecord> },
    /// [`WORKERS_MAX`] other workers are listed.
    TooMany,
}

/// The workers that send heartbeats.
#[async_trait]
pub trait WorkerRegistry: Send + Sync {
    /// Stores the heartbeat of a worker, a JSON object. It replaces the previous one. Stores nothing if
    /// [`WORKERS_MAX`] other workers are listed.
    async fn put(&self, worker_id: &str, state: &str) -> Result<HeartbeatOutcome, BackendError>;

    /// The last heartbeats of the workers that have become silent for longer than `silence` since the last
    /// call on any node. So of all nodes one gets each of them. The first call after a pause of more than
    /// [`SILENCE_FORGOTTEN`] gets none.
    async fn newly_silent(&self, silence: Duration) -> Result<Vec<Bytes>, BackendError> {
        let _ = silence;
        Ok(Vec::new())
    }

    /// The workers whose last heartbeat is at most [`WORKER_TTL`] old, sorted by id.
    async fn all(&self) -> Result<Vec<WorkerRecord>, BackendError>;

    /// The system status, a JSON object, that a worker without heartbeats has written. In `embedded` that is
    /// the local worker.
    async fn lone_status(&self) -> Result<Option<Bytes>, BackendError>;
}
