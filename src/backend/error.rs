//! The errors of all ports.
//!
//! The variants differ in what the caller can do: retry, correct the request, or ask the operator. Errors of
//! the SDKs are mapped to them inside each backend, so no other module depends on an SDK.

/// Why a backend call failed. The text is for the log, never for a client.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BackendError {
    /// The queue, table or bucket does not exist.
    #[error("{0}")]
    Missing(String),
    /// The credentials or the password do not allow it.
    #[error("{0}")]
    Denied(String),
    /// The request itself is at fault. The same request would fail again.
    #[error("{0}")]
    Invalid(String),
    /// No answer, a broken connection, throttling or a server error. A retry may succeed. It is not known
    /// whether the request took effect.
    #[error("{0}")]
    Unavailable(String),
}

impl BackendError {
    /// Whether the same call may succeed later.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable(_))
    }
}

/// What keeps a backend from starting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartProblem {
    /// The part that failed, for example `the queue`, `Redis` or `the log table InfraExecutionLogs`.
    pub what: String,
    pub error: BackendError,
    /// How the operator can correct it, as an imperative sentence.
    pub remedy: String,
}
