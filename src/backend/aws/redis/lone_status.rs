//! Stores the status of a worker that sends no heartbeats, under the key that the old workers used.

use super::connection::CommandConnection;
use super::workers::LONE_STATUS_KEY;
use crate::backend::{BackendError, LONE_STATUS_TTL, LoneStatusStore};
use async_trait::async_trait;
use redis::cmd;

pub struct RedisLoneStatus {
    commands: CommandConnection,
}

impl RedisLoneStatus {
    pub fn new(commands: CommandConnection) -> Self {
        Self { commands }
    }
}

#[async_trait]
impl LoneStatusStore for RedisLoneStatus {
    async fn put(&self, status: &str) -> Result<(), BackendError> {
        self.commands
            .query(cmd("SETEX").arg(LONE_STATUS_KEY).arg(LONE_STATUS_TTL.as_secs()).arg(status))
            .await
    }

    async fn ping(&self) -> Result<(), BackendError> {
        self.commands.ping().await
    }
}
