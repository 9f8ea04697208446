//! Why a backend call failed.

/// Why a backend did not do what was asked. The text is for the log, never for a client.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BackendError {
    /// The queue, table or bucket does not exist.
    #[error("{0}")]
    Missing(String),
    /// The credentials or the password do not allow it.
    #[error("{0}")]
    Denied(String),
    /// The request itself is at fault; the same request will fail again.
    #[error("{0}")]
    Invalid(String),
    /// No answer, a broken connection, throttling, a fault on the other side: may pass. Whether the
    /// request took effect is not known.
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
    /// Which part: `the queue`, `Redis`, `the log table InfraExecutionLogs`.
    pub what: String,
    pub error: BackendError,
    /// What an operator can do about it, as an imperative sentence.
    pub mend: String,
}
