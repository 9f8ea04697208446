//! Messages that the queue has given up.

use crate::backend::BackendError;
use crate::model::{FunctionId, JobId};
use async_trait::async_trait;
use bytes::Bytes;

/// A message that the queue has given up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLetter {
    /// `None`: no job of our kind.
    pub job: Option<(JobId, FunctionId)>,
    /// By which the store knows it.
    pub receipt: String,
}

/// Messages that came to workers too often, and that none deleted.
#[async_trait]
pub trait DeadLetters: Send + Sync {
    /// A few of them, those that were not read for a while; none if there are no others.
    async fn read(&self) -> Result<Vec<DeadLetter>, BackendError>;

    /// Leaves a result for the job of one, as a worker does, unless there is a result. `false`: there is.
    async fn answer(&self, id: JobId, result: Bytes) -> Result<bool, BackendError>;

    /// Of one [`Self::read`].
    async fn delete(&self, letters: &[DeadLetter]) -> Result<(), BackendError>;
}
