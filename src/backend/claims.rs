//! Idempotency keys and the jobs that hold them.

use crate::backend::BackendError;
use crate::model::{BodyHash, FunctionId, IdempotencyKey, JobId};
use async_trait::async_trait;
use bytes::Bytes;
use std::time::Duration;

/// How long a request may be repeated under its key.
pub const CLAIMED: Duration = Duration::from_secs(24 * 3600);

/// Largest result that is kept with the key, in bytes: what an item of DynamoDB holds, and some room. Larger ones are
/// found as long as the worker's own copy.
pub const KEPT_BYTES_MAX: usize = 350 * 1024;

/// A request's claim to be the one of its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    pub key: IdempotencyKey,
    pub body: BodyHash,
    pub job: JobId,
    pub function: FunctionId,
}

/// A claim that stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claimed {
    pub claim: Claim,
    /// The latest attempt to send the job: the job's own id for the first one, a new id for each one after it. It says
    /// which node makes the attempt, and since when.
    pub attempt: JobId,
    /// The job is known to be on the queue, or to have been.
    pub is_sent: bool,
    pub result: Option<Bytes>,
}

/// The requests that are to be carried out once; each is forgotten after [`CLAIMED`].
#[async_trait]
pub trait Claims: Send + Sync {
    /// Claims the key, if nobody has it. Else gives who has; nothing is written then.
    async fn claim(&self, claim: &Claim) -> Result<Option<Claimed>, BackendError>;

    /// Who has the key.
    async fn find(&self, key: &IdempotencyKey) -> Result<Option<Claimed>, BackendError>;

    /// Claims the next attempt to send the job, after the one in `claimed`. `false`: the job is confirmed or released, or
    /// another attempt came first.
    async fn try_again(&self, claimed: &Claimed, attempt: JobId) -> Result<bool, BackendError>;

    /// The job is on the queue.
    async fn confirm(&self, claim: &Claim) -> Result<(), BackendError>;

    /// The job is certainly not on the queue, and the key is free again. `false`: the job is confirmed, or another attempt
    /// to send it has begun.
    async fn release(&self, claim: &Claim, attempt: JobId) -> Result<bool, BackendError>;

    /// Keeps the result of the job that has the key.
    async fn keep(&self, key: &IdempotencyKey, job: JobId, result: &Bytes) -> Result<(), BackendError>;
}
