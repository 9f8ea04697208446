//! Changes of functions, told from node to node on one channel for each function table.

use super::redis::Commands;
use super::subscriber::{Failures, Subscriber};
use crate::backend::{BackendError, ChangeEvent, ChangeFeed};
use async_trait::async_trait;
use redis::{Client, cmd};
use std::sync::Arc;

/// Longest announcement that is taken, in bytes: that of an id.
const ANNOUNCEMENT_BYTES_MAX: usize = 128;

pub(super) struct RedisChanges {
    client: Client,
    commands: Arc<Commands>,
    channel: String,
    line: tokio::sync::Mutex<Line>,
}

#[derive(Default)]
struct Line {
    subscriber: Option<Subscriber>,
    failures: Failures,
}

impl RedisChanges {
    pub(super) fn new(client: Client, commands: Arc<Commands>, functions_table: &str) -> Self {
        let channel = format!("functions:changed:{functions_table}");
        Self { client, commands, channel, line: tokio::sync::Mutex::default() }
    }

    async fn subscribe(&self) -> Result<Subscriber, BackendError> {
        let mut subscriber = Subscriber::connect(&self.client).await?;
        subscriber.hear(&self.channel).await?;
        Ok(subscriber)
    }
}

#[async_trait]
impl ChangeFeed for RedisChanges {
    async fn announce(&self, id: &str) -> Result<(), BackendError> {
        self.commands.query(cmd("PUBLISH").arg(&self.channel).arg(id)).await
    }

    async fn next(&self) -> ChangeEvent {
        let mut line = self.line.lock().await;
        loop {
            let Some(subscriber) = &mut line.subscriber else {
                line.failures.pause().await;
                // The results' subscription tells the operator that Redis is away.
                let Ok(subscriber) = self.subscribe().await else {
                    line.failures.add();
                    continue;
                };
                line.failures.end();
                line.subscriber = Some(subscriber);
                return ChangeEvent::Heard;
            };
            let Ok(message) = subscriber.next().await else {
                line.subscriber = None;
                return ChangeEvent::Deaf;
            };
            match std::str::from_utf8(message.get_payload_bytes()) {
                Ok(id) if id.len() <= ANNOUNCEMENT_BYTES_MAX => return ChangeEvent::Changed(id.to_owned()),
                // Nobody of ours says such a thing.
                _ => {}
            }
        }
    }
}
