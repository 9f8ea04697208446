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

/// The workers that send heartbeats.
#[async_trait]
pub trait WorkerRegistry: Send + Sync {
    /// Stores the heartbeat of a worker, a JSON object. It replaces the previous one. Returns `false`, and
    /// stores nothing, if [`WORKERS_MAX`] other workers are listed.
    async fn put(&self, worker_id: &str, state: &str) -> Result<bool, BackendError>;

    /// The workers whose last heartbeat is at most [`WORKER_TTL`] old, sorted by id.
    async fn all(&self) -> Result<Vec<WorkerRecord>, BackendError>;

    /// The system status, a JSON object, that a worker without heartbeats has written. In `embedded` that is
    /// the local worker.
    async fn lone_status(&self) -> Result<Option<Bytes>, BackendError>;
}
