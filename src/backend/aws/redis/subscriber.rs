//! A subscribed connection to Redis, and the backoff between attempts to connect.
//!
//! A connection that only receives does not notice that its peer is gone, so it sends a PING every second.
//! The peer may also be the wrong server. So the connection must receive the beats of this process
//! ([`Beats`]) every second too.

use super::beats::{BEAT_EVERY, Beats};
use super::connection::{COMMAND_DEADLINE, CONNECT_DEADLINE, class};
use crate::backend::{BackendError, SubscriptionState};
use crate::backoff::Backoff;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use redis::aio::{PubSubSink, PubSubStream};
use redis::{Client, Msg, RedisError, ToRedisArgs};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at, timeout};

const PING_EVERY: Duration = BEAT_EVERY;
/// The pauses before attempts to connect.
const RECONNECTS: Backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(1));
/// Beats that may be missed in a row: doubled with each reconnect that did not help, up to the maximum.
const MISSED_FIRST: u64 = 2;
const MISSED_MAX: u64 = 64;
/// Beats that a new connection must receive before it is trusted, if its predecessor missed them.
const PROOF: u32 = 2;

pub struct Subscriber {
    sink: PubSubSink,
    stream: PubSubStream,
    tick: Interval,
    pulse: BeatMonitor,
}

/// The state of one subscription according to its beats.
struct BeatMonitor {
    beats: Arc<Beats>,
    /// The last beat received, or the one in flight when the subscription began.
    received: u64,
    /// Whether the channel of the beats is subscribed; false if the ACL denies it.
    listens: bool,
    /// Beats that must arrive before the subscription is reported as working, because its predecessor missed
    /// them.
    to_prove: u32,
    missed_max: u64,
    /// The state that was reported last.
    said: Option<SubscriptionState>,
    /// A beat that is being published.
    publishing: Option<BoxFuture<'static, ()>>,
}

/// What [`Subscriber::next`] returns.
pub enum Received {
    Message(Msg),
    /// The state of the subscription has changed.
    Subscription(SubscriptionState),
}

/// Why a subscription has ended.
pub enum SubscriptionError {
    Broken(BackendError),
    /// It did not receive the beats.
    Missed,
}

impl From<BackendError> for SubscriptionError {
    fn from(error: BackendError) -> Self {
        Self::Broken(error)
    }
}

impl Subscriber {
    /// `misses` is the number of subscriptions in a row that ended because they received no beats.
    async fn connect(client: &Client, beats: Arc<Beats>, misses: u32) -> Result<Self, BackendError> {
        let (sink, stream) = within(timeout(CONNECT_DEADLINE, client.get_async_pubsub()).await)?.split();
        let mut tick = interval_at(Instant::now() + PING_EVERY, PING_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let missed_max = MISSED_FIRST.saturating_mul(1 << misses.min(16)).min(MISSED_MAX);
        let (received, to_prove) = (beats.begun(), if misses > 0 { PROOF } else { 0 });
        let pulse = BeatMonitor {
            beats,
            received,
            listens: false,
            to_prove,
            missed_max,
            said: None,
            publishing: None,
        };
        let mut subscriber = Self { sink, stream, tick, pulse };
        subscriber.listen_for_beats().await?;
        Ok(subscriber)
    }

    pub async fn subscribe_pattern(&mut self, pattern: &str) -> Result<(), BackendError> {
        within(timeout(COMMAND_DEADLINE, self.sink.psubscribe(pattern)).await)
    }

    pub async fn subscribe(&mut self, channels: impl ToRedisArgs) -> Result<(), BackendError> {
        within(timeout(COMMAND_DEADLINE, self.sink.subscribe(channels)).await)
    }

    pub async fn unsubscribe(&mut self, channels: impl ToRedisArgs) -> Result<(), BackendError> {
        within(timeout(COMMAND_DEADLINE, self.sink.unsubscribe(channels)).await)
    }

    /// Returns the next message or change of state. Cancel safe.
    ///
    /// # Errors
    /// The connection is broken or receives no beats.
    pub async fn next(&mut self) -> Result<Received, SubscriptionError> {
        loop {
            if let Some(state) = self.pulse.news() {
                return Ok(Received::Subscription(state));
            }
            tokio::select! {
                // Messages come first: a beat is missed only if nothing is left to read.
                biased;
                message = self.stream.next() => {
                    let gone = || BackendError::Unavailable("the connection broke".into());
                    let message = message.ok_or_else(gone)?;
                    if !self.pulse.takes(&message) {
                        return Ok(Received::Message(message));
                    }
                }
                () = ended(&mut self.pulse.publishing) => {}
                _ = self.tick.tick() => self.tick().await?,
            }
        }
    }

    async fn tick(&mut self) -> Result<(), SubscriptionError> {
        if self.pulse.has_missed() {
            return Err(SubscriptionError::Missed);
        }
        if !self.pulse.listens && self.pulse.beats.are_due_again() {
            self.listen_for_beats().await?;
        }
        self.pulse.publish_due();
        within::<()>(timeout(COMMAND_DEADLINE, self.sink.ping()).await)?;
        Ok(())
    }

    async fn listen_for_beats(&mut self) -> Result<(), BackendError> {
        let channel = self.pulse.beats.channel().to_owned();
        match self.subscribe(channel).await {
            Ok(()) => {
                self.pulse.listens = true;
                self.pulse.received = self.pulse.beats.begun();
                Ok(())
            }
            Err(BackendError::Denied(error)) => {
                self.pulse.beats.denied(&error);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

impl BeatMonitor {
    /// Whether the message is a beat, which is not passed on.
    fn takes(&mut self, message: &Msg) -> bool {
        // Checked first, because most messages arrive by a pattern and beats never do.
        if message.from_pattern() || message.get_channel_name() != self.beats.channel() {
            return false;
        }
        if let Some(number) = self.beats.number(message.get_payload_bytes())
            && number > self.received
        {
            self.received = number;
            self.to_prove = self.to_prove.saturating_sub(1);
            self.beats.arrived();
        }
        true
    }

    fn has_missed(&self) -> bool {
        self.listens && !self.beats.are_off() && self.beats.expected() >= self.received + self.missed_max
    }

    fn publish_due(&mut self) {
        if self.listens && self.publishing.is_none() {
            self.publishing = self.beats.publish_due();
        }
    }

    /// The state of the subscription, if it differs from the last report.
    fn news(&mut self) -> Option<SubscriptionState> {
        let state = if !self.listens || self.beats.are_off() {
            SubscriptionState::Unverified
        } else if self.to_prove > 0 {
            return None;
        } else {
            SubscriptionState::Verified
        };
        (self.said.replace(state) != Some(state)).then_some(state)
    }
}

/// Waits for the future, if there is one, and then removes it.
async fn ended(future: &mut Option<BoxFuture<'static, ()>>) {
    match future {
        Some(running) => {
            running.await;
            *future = None;
        }
        None => std::future::pending().await,
    }
}

fn within<T>(in_time: Result<Result<T, RedisError>, tokio::time::error::Elapsed>) -> Result<T, BackendError> {
    match in_time {
        Ok(answer) => answer.map_err(|e| class(&e)),
        Err(_) => Err(BackendError::Unavailable("Redis did not answer in time".into())),
    }
}

/// The connection history of one subscription.
#[derive(Default)]
pub struct ReconnectHistory {
    /// Failed attempts in a row.
    failures: u32,
    /// Connections in a row that ended because they received no beats.
    misses: u32,
}

impl ReconnectHistory {
    /// Tries once to connect, after a pause that grows with each failure: zero at first, then doubling with
    /// jitter.
    pub async fn connect(&self, client: &Client, beats: &Arc<Beats>) -> Result<Subscriber, BackendError> {
        if self.failures > 0 {
            RECONNECTS.sleep(self.failures).await;
        }
        Subscriber::connect(client, Arc::clone(beats), self.misses).await
    }

    /// Counts a failure. Returns `true` for the first one.
    pub fn failed(&mut self) -> bool {
        self.failures = self.failures.saturating_add(1);
        self.failures == 1
    }

    /// Records a success. Returns the number of failed attempts before it.
    pub fn connected(&mut self) -> u32 {
        std::mem::take(&mut self.failures)
    }

    /// Records that a connection received no beats.
    pub fn missed(&mut self) {
        self.misses = self.misses.saturating_add(1);
    }

    /// Records that a connection receives beats, or that beats are off.
    pub fn heard(&mut self) {
        self.misses = 0;
    }
}
