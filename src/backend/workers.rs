//! The registry of workers.

use crate::backend::BackendError;
use crate::model::UnixMs;
use async_trait::async_trait;
use bytes::Bytes;
use std::time::Duration;

/// How long a worker that says nothing more is known.
pub const WORKER_FORGOTTEN: Duration = Duration::from_secs(300);

/// Most workers that are known at a time.
pub const WORKERS_MAX: usize = 1000;

/// What a worker last said of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerSeen {
    /// The JSON object it was put with.
    pub state: Bytes,
    /// How long ago, by the clock of the store.
    pub age: Duration,
    /// When, by a clock that all nodes share.
    pub at: UnixMs,
}

/// The workers that report, as all nodes see them.
#[async_trait]
pub trait WorkerRegistry: Send + Sync {
    /// Keeps what a worker says of itself until it says something else or is forgotten. `false`: there are
    /// [`WORKERS_MAX`] others.
    async fn put(&self, worker_id: &str, state: &str) -> Result<bool, BackendError>;

    /// Those heard of within [`WORKER_FORGOTTEN`], by id.
    async fn all(&self) -> Result<Vec<WorkerSeen>, BackendError>;

    /// What a lone worker that does not report says of the system.
    async fn lone_status(&self) -> Result<Option<Bytes>, BackendError>;
}
