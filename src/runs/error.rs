//! The errors of a run. `api` gives each its status and code.

use crate::backend::BackendError;
use crate::dispatch::{SubmitError, TooManyJobs};
use crate::limiter::Rejection;
use std::time::Duration;

/// An idempotency key is not 1 to this many visible ASCII characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidKey {
    pub bytes_max: usize,
}

/// Why a run was rejected, or why its result is not known.
#[derive(Debug)]
pub enum RunError {
    /// The queue is slow, and this job was shed.
    Shed { retry_after: Duration },
    /// The function does not exist.
    NoSuchFunction,
    /// The caller's key may not run this function.
    FunctionForbidden,
    /// A rate limit by function rejected the run.
    RateLimit(Rejection),
    /// A concurrency cap is reached.
    TooManyJobs(TooManyJobs),
    /// The queue message would exceed this many bytes.
    MessageTooLarge { bytes_max: usize },
    /// The idempotency key is malformed.
    InvalidKey(InvalidKey),
    /// The idempotency key belongs to a request with another body.
    KeyReused,
    /// The job was not queued, or it is unknown whether it was.
    Submit(SubmitError),
    /// A store did not answer.
    Backend { store: &'static str, error: BackendError },
    /// Another node holds the idempotency key, and the state of its attempt did not become known in time.
    AttemptUnresolved,
}
