//! `/worker/heartbeat`, `/workers`, `/worker/status` and `/system/status`: the workers, the same on every node.

use super::{ApiError, Call, Reply};
use crate::backend::WorkerRegistry;
use http::StatusCode;
use std::sync::Arc;

/// Longest heartbeat, in bytes.
pub const BODY_BYTES_MAX: usize = 16 << 10;

/// Stub.
pub struct Workers {
    registry: Arc<dyn WorkerRegistry>,
}

impl Workers {
    pub fn new(registry: Arc<dyn WorkerRegistry>) -> Self {
        Self { registry }
    }

    pub async fn heartbeat(&self, _call: &Call) -> Result<Reply, ApiError> {
        let _ = &self.registry;
        Err(ApiError::TooManyWorkers)
    }

    pub async fn list(&self) -> Result<Reply, ApiError> {
        Ok(Reply::json(StatusCode::OK, "{}"))
    }

    pub async fn system_status(&self) -> Result<Reply, ApiError> {
        Ok(Reply::json(StatusCode::OK, "{}"))
    }
}
