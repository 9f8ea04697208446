//! The port for idempotency keys: which job holds a key, and whether the queue has confirmed that job.
//!
//! Each operation is one atomic, conditional write. So of concurrent requests, on any nodes, exactly one
//! claims a key, and exactly one claims the next attempt to send. `aws` stores claims as items of the log
//! table, `embedded` in a table of its database. An expired claim does not block its key.

use crate::backend::BackendError;
use crate::model::{BodyHash, FunctionId, IdempotencyKey, JobId};
use async_trait::async_trait;
use bytes::Bytes;
use std::time::Duration;

/// How long a claim lasts, and so how long a request may be repeated under its key.
pub const CLAIM_TTL: Duration = Duration::from_secs(24 * 3600);

/// Maximum size of a result that is stored with its claim, in bytes: the item limit of DynamoDB, with some
/// room. A larger result is available only as long as the copy that the worker stores.
pub const STORED_RESULT_BYTES_MAX: usize = 350 * 1024;

/// The claim of a request: its key, its body and its job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    pub key: IdempotencyKey,
    pub body: BodyHash,
    pub job: JobId,
    pub function: FunctionId,
}

/// A stored claim and its state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredClaim {
    pub claim: Claim,
    /// The latest attempt to send the job: the id of the job for the first attempt, a new id for each later
    /// one. It identifies the node that makes the attempt, and the time at which it was claimed.
    pub attempt: JobId,
    /// The queue is known to have received the job.
    pub is_sent: bool,
    /// The result, if it has arrived and has at most [`STORED_RESULT_BYTES_MAX`] bytes.
    pub result: Option<Bytes>,
}

/// The store of claims. Each claim expires after [`CLAIM_TTL`]. Every call may be repeated after
/// [`BackendError::Unavailable`].
#[async_trait]
pub trait Claims: Send + Sync {
    /// Claims the key, and returns `None`. If another job holds the key, returns that claim and writes
    /// nothing.
    async fn claim(&self, claim: &Claim) -> Result<Option<StoredClaim>, BackendError>;

    /// The claim of the key, if there is one.
    async fn find(&self, key: &IdempotencyKey) -> Result<Option<StoredClaim>, BackendError>;

    /// Claims the next attempt to send the job, after the one in `claimed`. Returns `false` if the job was
    /// confirmed or released, or if another attempt was claimed first.
    async fn try_again(&self, claimed: &StoredClaim, attempt: JobId) -> Result<bool, BackendError>;

    /// Records that the queue has received the job. No effect if the job no longer holds the key.
    async fn confirm(&self, claim: &Claim) -> Result<(), BackendError>;

    /// Deletes the claim, because the job is certainly not on the queue. Returns `false`, and changes
    /// nothing, if the job was confirmed or another attempt was claimed.
    async fn release(&self, claim: &Claim, attempt: JobId) -> Result<bool, BackendError>;

    /// Stores the result with the claim, which also confirms the job. No effect if the job no longer holds
    /// the key.
    async fn keep(&self, key: &IdempotencyKey, job: JobId, result: &Bytes) -> Result<(), BackendError>;
}
