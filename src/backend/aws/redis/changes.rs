//! Changes of functions, told from node to node on one channel for each function table.

use super::beats::Beats;
use super::connection::Commands;
use super::subscriber::{Ended, History, Received, Subscriber};
use crate::backend::{BackendError, ChangeEvent, ChangeFeed, Hearing};
use async_trait::async_trait;
use redis::{Client, cmd};
use std::sync::Arc;

/// Longest announcement that is taken, in bytes: that of an id.
const ANNOUNCEMENT_BYTES_MAX: usize = 128;

pub struct RedisChanges {
    client: Client,
    commands: Arc<Commands>,
    beats: Arc<Beats>,
    channel: String,
    line: tokio::sync::Mutex<Line>,
}

#[derive(Default)]
struct Line {
    subscriber: Option<Subscriber>,
    history: History,
}

pub fn channel_of(functions_table: &str) -> String {
    format!("functions:changed:{functions_table}")
}

impl RedisChanges {
    pub fn new(client: Client, commands: Arc<Commands>, beats: Arc<Beats>, functions_table: &str) -> Self {
        let channel = channel_of(functions_table);
        Self { client, commands, beats, channel, line: tokio::sync::Mutex::default() }
    }

    async fn subscribe(&self, history: &History) -> Result<Subscriber, BackendError> {
        let mut subscriber = history.connect(&self.client, &self.beats).await?;
        subscriber.hear(&self.channel).await?;
        Ok(subscriber)
    }

    /// One try to subscribe, after a pause that grows with each failure. The subscriber says itself whether
    /// it can be relied on.
    async fn resubscribe(&self, line: &mut Line) -> Option<ChangeEvent> {
        match self.subscribe(&line.history).await {
            Ok(subscriber) => {
                if line.history.connected() > 0 {
                    tracing::info!("Changes Heard Again");
                }
                line.subscriber = Some(subscriber);
                None
            }
            Err(error) => {
                // Not only while Redis is away: the password may allow other channels and not this one.
                let is_first = line.history.failed();
                if is_first {
                    tracing::warn!(%error, "Changes Not Heard");
                }
                is_first.then_some(ChangeEvent::Hearing(Hearing::Broken))
            }
        }
    }

    /// The subscription is over; a new one is made.
    fn ended(&self, ended: Ended, history: &mut History) -> Hearing {
        match ended {
            Ended::Broken(error) => {
                tracing::warn!(%error, "Changes Not Heard");
                // So that the failures that follow from it are not told as well.
                history.failed();
                Hearing::Broken
            }
            Ended::Missed => {
                tracing::warn!(
                    subscription = "changes",
                    "Beats Not Heard: subscription and commands lead to two Redis servers. Both reconnect"
                );
                history.missed();
                self.commands.reconnect();
                Hearing::Missed
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
            let Line { subscriber: Some(subscriber), history } = &mut *line else {
                match self.resubscribe(&mut line).await {
                    Some(event) => return event,
                    None => continue,
                }
            };
            let message = match subscriber.next().await {
                Ok(Received::Message(message)) => message,
                Ok(Received::Hearing(hearing)) => {
                    history.heard();
                    return ChangeEvent::Hearing(hearing);
                }
                Err(ended) => {
                    let hearing = self.ended(ended, history);
                    line.subscriber = None;
                    return ChangeEvent::Hearing(hearing);
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
