//! The port for the status of a worker that knows no gateway to send heartbeats to. In `dev` there is none:
//! the gateway and its worker are one process.

use crate::backend::BackendError;
use async_trait::async_trait;
use std::time::Duration;

/// How long a status is kept. A worker stores the next one long before.
pub const LONE_STATUS_TTL: Duration = Duration::from_secs(10);

/// The store that a worker shares with the gateways: that of the results.
#[async_trait]
pub trait LoneStatusStore: Send + Sync {
    /// Stores the status, a JSON object, for [`LONE_STATUS_TTL`]. It replaces the previous one of any worker.
    async fn put(&self, status: &str) -> Result<(), BackendError>;

    /// Whether the store answers.
    async fn ping(&self) -> Result<(), BackendError>;
}
