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

    /// One try to subscribe, after a pause that grows with each failure.
    async fn resubscribe(&self, line: &mut Line) -> Option<ChangeEvent> {
        line.failures.pause().await;
        match self.subscribe().await {
            Ok(subscriber) => {
                if line.failures.end() > 0 {
                    tracing::info!("Changes Heard Again");
                }
                line.subscriber = Some(subscriber);
                Some(ChangeEvent::Heard)
            }
            Err(error) => {
                // Not only while Redis is away: the password may allow other channels and not this one.
                if line.failures.add() {
                    tracing::warn!(%error, "Changes Not Heard");
                }
                None
            }
        }
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
                match self.resubscribe(&mut line).await {
                    Some(event) => return event,
                    None => continue,
                }
            };
            let message = match subscriber.next().await {
                Ok(message) => message,
                Err(error) => {
                    tracing::warn!(%error, "Changes Not Heard");
                    line.subscriber = None;
                    // So that the failures that follow from it are not told as well.
                    line.failures.add();
                    return ChangeEvent::Deaf;
                }
            };
            match std::str::from_utf8(message.get_payload_bytes()) {
                Ok(id) if id.len() <= ANNOUNCEMENT_BYTES_MAX => return ChangeEvent::Changed(id.to_owned()),
                // Nobody of ours says such a thing.
                _ => {}
            }
        }
    }
}
