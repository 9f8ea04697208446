//! Registers workers in Redis.

use super::connection::CommandConnection;
use super::registry::{RegistryBounds, ReportRegistry, ReportRow};
use crate::backend::{BackendError, WORKER_TTL, WORKERS_MAX, WorkerRecord, WorkerRegistry};
use async_trait::async_trait;
use bytes::Bytes;
use redis::cmd;
use std::sync::Arc;
use std::time::Duration;

const STATES_KEY: &str = "workers:{fleet}";
const SEEN_KEY: &str = "workers:seen:{fleet}";
/// Written by a worker that sends no heartbeats.
pub const LONE_STATUS_KEY: &str = "system:status";
const BOUNDS: RegistryBounds =
    RegistryBounds { listed: WORKER_TTL, kept: WORKER_TTL, members_max: WORKERS_MAX };

pub struct RedisWorkers {
    commands: Arc<CommandConnection>,
    workers: ReportRegistry,
}

impl RedisWorkers {
    pub fn new(commands: Arc<CommandConnection>) -> Self {
        let keys = (STATES_KEY.to_owned(), SEEN_KEY.to_owned());
        let workers = ReportRegistry::new(Arc::clone(&commands), keys.0, keys.1, BOUNDS);
        Self { commands, workers }
    }
}

#[async_trait]
impl WorkerRegistry for RedisWorkers {
    async fn put(&self, worker_id: &str, state: &str) -> Result<bool, BackendError> {
        self.workers.put(worker_id, state.as_bytes()).await
    }

    async fn all(&self) -> Result<Vec<WorkerRecord>, BackendError> {
        Ok(self.workers.all().await?.into_iter().map(record).collect())
    }

    async fn lone_status(&self) -> Result<Option<Bytes>, BackendError> {
        self.commands.query(cmd("GET").arg(LONE_STATUS_KEY)).await
    }
}

fn record((_, state, age, at): ReportRow) -> WorkerRecord {
    WorkerRecord { state, age: Duration::from_millis(age), at }
}
