//! The workers that report, in memory: a restart forgets them as time would.

use crate::backend::{BackendError, WorkerRegistry, WorkerSeen};
use async_trait::async_trait;
use bytes::Bytes;

#[derive(Default)]
pub(super) struct LocalWorkers {}

#[async_trait]
impl WorkerRegistry for LocalWorkers {
    async fn put(&self, _worker_id: &str, _state: &str) -> Result<bool, BackendError> {
        Err(BackendError::Invalid("stub".into()))
    }

    async fn all(&self) -> Result<Vec<WorkerSeen>, BackendError> {
        Ok(Vec::new())
    }

    async fn lone_status(&self) -> Result<Option<Bytes>, BackendError> {
        Ok(None)
    }
}
