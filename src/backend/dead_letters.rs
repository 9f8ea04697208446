//! The port for the dead-letter queue: messages that workers received too often without deleting them.
//!
//! Any number of nodes may read it at the same time. A job may be found several times, and
//! [`DeadLetters::answer`] stores at most one result for it. `aws` reads the queue that the RedrivePolicy of
//! the task queue names; without one there is no port. `embedded` has none, because it limits the starts of a
//! job itself.

use crate::backend::BackendError;
use crate::model::{FunctionId, JobId};
use async_trait::async_trait;
use bytes::Bytes;

/// A message in the dead-letter queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLetter {
    /// The job that the message names. `None`: this program did not send the message.
    pub job: Option<(JobId, FunctionId)>,
    /// Identifies the message for [`DeadLetters::delete`].
    pub receipt: String,
}

/// The messages of the dead-letter queue, and the results of their jobs.
#[async_trait]
pub trait DeadLetters: Send + Sync {
    /// Reads a few messages. A message that was read is hidden from further reads for a short time. Empty: no
    /// message is visible.
    async fn read(&self) -> Result<Vec<DeadLetter>, BackendError>;

    /// Stores and publishes a result, as a worker does. Returns `false`, and changes nothing, if the job has
    /// a stored result.
    async fn answer(&self, id: JobId, result: Bytes) -> Result<bool, BackendError>;

    /// Deletes messages that one [`Self::read`] returned.
    async fn delete(&self, letters: &[DeadLetter]) -> Result<(), BackendError>;
}
