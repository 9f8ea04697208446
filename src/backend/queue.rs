//! The task queue.

use crate::backend::BackendError;
use crate::model::Job;
use async_trait::async_trait;
use std::time::Duration;

/// Most jobs in one [`JobQueue::send_batch`]: what SQS takes in one call.
pub const BATCH_JOBS_MAX: usize = 10;

/// Why a job is not (known to be) on the queue.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The queue refused this job and would refuse it again.
    #[error("the queue refused the job: {0}")]
    Refused(String),
    /// The job is certainly not on the queue; a later try may succeed.
    #[error("the queue did not take the job: {0}")]
    NotSent(String),
    /// No answer came: the job may be on the queue or not.
    #[error("the queue did not answer: {0}")]
    Unknown(String),
}

/// What a queue is like; read once, at start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueTraits {
    /// Largest message, and largest batch, in bytes.
    pub message_bytes_max: usize,
    /// How long a message is kept, and so how long a job may wait.
    pub retention: Duration,
    /// Order is kept within a function: at most one batch with a function's jobs may be in flight.
    pub fifo: bool,
}

/// The task queue.
#[async_trait]
pub trait JobQueue: Send + Sync {
    /// One result per job, in order. At most [`BATCH_JOBS_MAX`] jobs, within `message_bytes_max` in all.
    async fn send_batch(&self, jobs: &[Job]) -> Vec<Result<(), SendError>>;

    fn traits(&self) -> QueueTraits;

    /// Jobs waiting on the queue, roughly. Also the queue's health check.
    async fn depth(&self) -> Result<u64, BackendError>;
}
