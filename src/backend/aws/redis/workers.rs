//! Registers workers in Redis.

use super::connection::CommandConnection;
use super::registry::{PutOutcome, RegistryBounds, ReportRegistry};
use crate::backend::{
    BackendError, HeartbeatOutcome, SILENCE_FORGOTTEN, WORKER_TTL, WORKERS_MAX, WorkerRecord, WorkerRegistry,
};
use crate::model::{UnixMs, millis};
use async_trait::async_trait;
use bytes::Bytes;
use redis::{Script, cmd};
use std::sync::Arc;
use std::time::Duration;

const STATES_KEY: &str = "workers:{fleet}";
const SEEN_KEY: &str = "workers:seen:{fleet}";
/// Up to when silent workers were looked for.
const SILENT_KEY: &str = "workers:silent:{fleet}";
/// Written by a worker that sends no heartbeats.
pub const LONE_STATUS_KEY: &str = "system:status";
const BOUNDS: RegistryBounds =
    RegistryBounds { listed: WORKER_TTL, kept: WORKER_TTL, members_max: WORKERS_MAX };

pub struct RedisWorkers {
    commands: Arc<CommandConnection>,
    workers: ReportRegistry,
    silent: Script,
}

impl RedisWorkers {
    pub fn new(commands: Arc<CommandConnection>) -> Self {
        let keys = (STATES_KEY.to_owned(), SEEN_KEY.to_owned());
        let workers = ReportRegistry::new(Arc::clone(&commands), keys.0, keys.1, BOUNDS);
        Self { commands, workers, silent: Script::new(include_str!("workers_silent.lua")) }
    }
}

#[async_trait]
impl WorkerRegistry for RedisWorkers {
    async fn put(&self, worker_id: &str, state: &str) -> Result<HeartbeatOutcome, BackendError> {
        Ok(match self.workers.put(worker_id, state.as_bytes(), true).await? {
            PutOutcome::Full => HeartbeatOutcome::TooMany,
            PutOutcome::Stored { before } => {
                HeartbeatOutcome::Stored { before: before.map(|(state, age, at)| record(state, age, at)) }
            }
        })
    }

    async fn newly_silent(&self, silence: Duration) -> Result<Vec<Bytes>, BackendError> {
        let mut call = self.silent.key(STATES_KEY);
        call.key(SEEN_KEY).key(SILENT_KEY).arg(millis(silence)).arg(millis(SILENCE_FORGOTTEN));
        let call = &call;
        self.commands.run(async |mut connection| call.invoke_async(&mut connection).await).await
    }

    async fn all(&self) -> Result<Vec<WorkerRecord>, BackendError> {
        let rows = self.workers.all().await?;
        Ok(rows.into_iter().map(|(_, state, age, at)| record(state, age, at)).collect())
    }

    async fn lone_status(&self) -> Result<Option<Bytes>, BackendError> {
        self.commands.query(cmd("GET").arg(LONE_STATUS_KEY)).await
    }
}

fn record(state: Bytes, age_ms: u64, at: UnixMs) -> WorkerRecord {
    WorkerRecord { state, age: Duration::from_millis(age_ms), at }
}
