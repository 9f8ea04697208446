//! The port for the task queue: jobs are sent in batches, and workers receive each at least once.
//!
//! A send has three outcomes besides success: rejected, certainly not sent, or unknown. The callers depend on
//! the distinction, so a backend must report `Unknown` if it has any doubt. `aws` uses SQS, with exactly one
//! attempt per call. `embedded` uses a table of its database, and a confirmed job is on the disk.

use crate::backend::BackendError;
use crate::model::Job;
use async_trait::async_trait;
use std::time::Duration;

/// Maximum number of jobs per [`JobQueue::send_batch`]; the limit of SQS.
pub const BATCH_JOBS_MAX: usize = 10;

/// Why a job is not known to be on the queue.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The queue rejected the content of this job, and would reject it again.
    #[error("the queue rejected the job: {0}")]
    Refused(String),
    /// The job is certainly not on the queue. A retry may succeed.
    #[error("the queue did not accept the job: {0}")]
    NotSent(String),
    /// No usable answer arrived. The job may be on the queue.
    #[error("the queue did not answer: {0}")]
    Unknown(String),
}

impl SendError {
    /// The kind of the error, as spans name it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Refused(_) => "refused",
            Self::NotSent(_) => "not_sent",
            Self::Unknown(_) => "unknown",
        }
    }
}

/// The properties of a queue. They are read once, at start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueTraits {
    /// Maximum size of a message, and of all messages of a batch, in bytes.
    pub message_bytes_max: usize,
    /// How long the queue keeps a message, and so the maximum time that a job may wait.
    pub retention: Duration,
    /// The queue keeps the order of jobs of one function. So at most one batch with jobs of a function may be
    /// in flight.
    pub fifo: bool,
}

/// The task queue.
#[async_trait]
pub trait JobQueue: Send + Sync {
    /// Sends at most [`BATCH_JOBS_MAX`] jobs, whose messages have at most `message_bytes_max` bytes together.
    /// Returns one result per job, in order. A job that is sent again may be on the queue twice.
    async fn send_batch(&self, jobs: &[Job]) -> Vec<Result<(), SendError>>;

    fn traits(&self) -> QueueTraits;

    /// The approximate number of jobs on the queue. Also the health check of the queue.
    async fn depth(&self) -> Result<u64, BackendError>;
}
