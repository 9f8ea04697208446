//! A connection to Redis that listens, and the pauses between tries to have one.
//!
//! A subscriber that only listens does not notice that its peer is gone, so it asks with a PING each second.

use super::redis::{COMMAND_DEADLINE, CONNECT_DEADLINE, class};
use crate::backend::BackendError;
use futures_util::StreamExt;
use redis::aio::{PubSubSink, PubSubStream};
use redis::{Client, Msg, RedisError, ToRedisArgs};
use std::time::Duration;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at, sleep, timeout};

const PING_EVERY: Duration = Duration::from_secs(1);
const BACKOFF_FIRST: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(1);

pub(super) struct Subscriber {
    sink: PubSubSink,
    stream: PubSubStream,
    ping: Interval,
}

impl Subscriber {
    pub(super) async fn connect(client: &Client) -> Result<Self, BackendError> {
        let (sink, stream) = within(timeout(CONNECT_DEADLINE, client.get_async_pubsub()).await)?.split();
        let mut ping = interval_at(Instant::now() + PING_EVERY, PING_EVERY);
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Ok(Self { sink, stream, ping })
    }

    pub(super) async fn hear_pattern(&mut self, pattern: &str) -> Result<(), BackendError> {
        within(timeout(COMMAND_DEADLINE, self.sink.psubscribe(pattern)).await)
    }

    pub(super) async fn hear(&mut self, channels: impl ToRedisArgs) -> Result<(), BackendError> {
        within(timeout(COMMAND_DEADLINE, self.sink.subscribe(channels)).await)
    }

    pub(super) async fn stop_hearing(&mut self, channels: impl ToRedisArgs) -> Result<(), BackendError> {
        within(timeout(COMMAND_DEADLINE, self.sink.unsubscribe(channels)).await)
    }

    /// The next message. May be dropped while it waits, and then called again.
    ///
    /// # Errors
    /// The connection is gone.
    pub(super) async fn next(&mut self) -> Result<Msg, BackendError> {
        loop {
            tokio::select! {
                message = self.stream.next() => {
                    return message.ok_or_else(|| BackendError::Unavailable("the connection broke".into()));
                }
                _ = self.ping.tick() => within(timeout(COMMAND_DEADLINE, self.sink.ping()).await)?,
            }
        }
    }
}

fn within<T>(in_time: Result<Result<T, RedisError>, tokio::time::error::Elapsed>) -> Result<T, BackendError> {
    match in_time {
        Ok(answer) => answer.map_err(|e| class(&e)),
        Err(_) => Err(BackendError::Unavailable("Redis did not answer in time".into())),
    }
}

/// Tries that failed in a row.
#[derive(Default)]
pub(super) struct Failures(u32);

impl Failures {
    /// The pause before the next try: none at first, then it doubles, with jitter.
    pub(super) async fn pause(&self) {
        if self.0 > 0 {
            let pause = BACKOFF_FIRST * 2_u32.saturating_pow(self.0.min(10) - 1);
            sleep(pause.min(BACKOFF_MAX).mul_f64(rand::random_range(0.5..1.0))).await;
        }
    }

    /// One more; `true`: it is the first.
    pub(super) fn add(&mut self) -> bool {
        self.0 = self.0.saturating_add(1);
        self.0 == 1
    }

    /// A try succeeded: how many failed before it.
    pub(super) fn end(&mut self) -> u32 {
        std::mem::take(&mut self.0)
    }
}
