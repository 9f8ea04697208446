//! Announces changes of functions to all nodes over a Redis channel, one per function table.

use super::beats::Beats;
use super::connection::CommandConnection;
use super::subscriber::{Received, ReconnectHistory, Subscriber, SubscriptionError};
use crate::backend::{BackendError, ChangeEvent, ChangeFeed, SubscriptionState};
use async_trait::async_trait;
use redis::{Client, cmd};
use std::sync::Arc;

/// Maximum length of an announcement, in bytes: that of an id.
const ANNOUNCEMENT_BYTES_MAX: usize = 128;

pub struct RedisChanges {
    client: Client,
    commands: Arc<CommandConnection>,
    beats: Arc<Beats>,
    channel: String,
    line: tokio::sync::Mutex<ChangesSlot>,
}

#[derive(Default)]
struct ChangesSlot {
    subscriber: Option<Subscriber>,
    history: ReconnectHistory,
}

pub fn channel_of(functions_table: &str) -> String {
    format!("functions:changed:{functions_table}")
}

impl RedisChanges {
    pub fn new(
        client: Client,
        commands: Arc<CommandConnection>,
        beats: Arc<Beats>,
        functions_table: &str,
    ) -> Self {
        let channel = channel_of(functions_table);
        Self { client, commands, beats, channel, line: tokio::sync::Mutex::default() }
    }

    async fn subscribe(&self, history: &ReconnectHistory) -> Result<Subscriber, BackendError> {
        let mut subscriber = history.connect(&self.client, &self.beats).await?;
        subscriber.subscribe(&self.channel).await?;
        Ok(subscriber)
    }

    /// Tries once to subscribe, after a pause that grows with each failure. A new subscriber proves by its
    /// beats that it can be relied on, so success returns no event.
    async fn resubscribe(&self, line: &mut ChangesSlot) -> Option<ChangeEvent> {
        match self.subscribe(&line.history).await {
            Ok(subscriber) => {
                if line.history.connected() > 0 {
                    tracing::info!("Subscription to function changes restored");
                }
                line.subscriber = Some(subscriber);
                None
            }
            Err(error) => {
                // Redis may be up and still deny this channel to the user.
                let is_first = line.history.failed();
                if is_first {
                    tracing::warn!(
                        %error,
                        "Subscription to function changes failed; functions are read more often. \
                         Check Redis and its ACL"
                    );
                }
                is_first.then_some(ChangeEvent::Subscription(SubscriptionState::Disconnected))
            }
        }
    }

    /// Handles the end of a subscription and prepares the next one.
    fn ended(&self, ended: SubscriptionError, history: &mut ReconnectHistory) -> SubscriptionState {
        match ended {
            SubscriptionError::Broken(error) => {
                tracing::warn!(%error, "Subscription to function changes broke; reconnecting");
                // The failures that follow from this one are not logged again.
                history.failed();
                SubscriptionState::Disconnected
            }
            SubscriptionError::Missed => {
                tracing::warn!(
                    subscription = "changes",
                    "Beats missed: subscription and commands lead to different Redis servers. Both reconnect"
                );
                history.missed();
                self.commands.reconnect();
                SubscriptionState::BeatsMissed
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
            let ChangesSlot { subscriber: Some(subscriber), history } = &mut *line else {
                match self.resubscribe(&mut line).await {
                    Some(event) => return event,
                    None => continue,
                }
            };
            let message = match subscriber.next().await {
                Ok(Received::Message(message)) => message,
                Ok(Received::Subscription(state)) => {
                    history.heard();
                    return ChangeEvent::Subscription(state);
                }
                Err(ended) => {
                    let state = self.ended(ended, history);
                    line.subscriber = None;
                    return ChangeEvent::Subscription(state);
                }
            };
            match std::str::from_utf8(message.get_payload_bytes()) {
                Ok(id) if id.len() <= ANNOUNCEMENT_BYTES_MAX => return ChangeEvent::Changed(id.to_owned()),
                // Not an announcement of this program.
                _ => {}
            }
        }
    }
}
