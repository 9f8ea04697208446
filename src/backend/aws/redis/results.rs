//! Receives results: publications of workers, and the keys in which workers store a copy.
//!
//! The subscription has its own connection and no task: [`Results::next`] drives it. It covers the pattern of
//! this node's job ids, and one channel for each job of another node that a long poll waits for. The set of
//! these channels ([`ForeignWaits`]) is applied by `next`. So a waiter may come and go at any time, even
//! while Redis is down, and dropping it leaves nothing behind.
//!
//! The `redis` crate reads ahead without a bound. The caller of `next` must therefore hand results on without
//! pausing.

use super::beats::Beats;
use super::connection::CommandConnection;
use super::subscriber::{Received, ReconnectHistory, Subscriber, SubscriptionError};
use crate::backend::{BackendError, ResultEvent, Results, STORED_MAX, SubscriptionState};
use crate::model::{JobId, NodeId};
use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};
use redis::{Client, Msg, cmd};
use std::collections::HashMap;
use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::time::timeout;

const CHANNEL_PREFIX: &str = "result:";
/// Maximum number of other nodes' jobs that are waited for. When it is reached:
/// [`BackendError::Unavailable`].
const WATCHES_MAX: usize = 8_192;
/// How often a waiter reads the stored key. A result published before the subscription was active may be
/// stored only after it.
const LOOK_EVERY: Duration = Duration::from_secs(1);

pub struct RedisResults {
    client: Client,
    commands: Arc<CommandConnection>,
    beats: Arc<Beats>,
    pattern: String,
    line: tokio::sync::Mutex<ResultsSlot>,
    watches: ForeignWaits,
}

#[derive(Default)]
struct ResultsSlot {
    subscription: Option<Subscription>,
    history: ReconnectHistory,
}

struct Subscription {
    subscriber: Subscriber,
    /// Taken from the watches and not applied yet. Kept here because `next` may be dropped in between.
    changes: Vec<SubscriptionChange>,
}

/// The channel pattern for the jobs of a node, whose ids begin with the node id.
pub fn pattern_of(node: NodeId) -> String {
    format!("{CHANNEL_PREFIX}{node}*")
}

impl RedisResults {
    pub fn new(client: Client, commands: Arc<CommandConnection>, beats: Arc<Beats>, node: NodeId) -> Self {
        Self {
            client,
            commands,
            beats,
            pattern: pattern_of(node),
            line: tokio::sync::Mutex::default(),
            watches: ForeignWaits::default(),
        }
    }

    async fn subscribe(&self, history: &ReconnectHistory) -> Result<Subscription, BackendError> {
        let mut subscriber = history.connect(&self.client, &self.beats).await?;
        subscriber.subscribe_pattern(&self.pattern).await?;
        let channels = self.watches.start();
        if !channels.is_empty() {
            subscriber.subscribe(channels).await?;
        }
        Ok(Subscription { subscriber, changes: Vec::new() })
    }

    /// Tries once to subscribe, after a pause that grows with each failure.
    async fn resubscribe(&self, line: &mut ResultsSlot) -> Option<ResultEvent> {
        match self.subscribe(&line.history).await {
            Ok(subscription) => {
                let failures = line.history.connected();
                if failures > 0 {
                    tracing::info!(failures, "Subscription to results restored");
                }
                line.subscription = Some(subscription);
                self.watches.tell_all_subscribed();
                Some(ResultEvent::Subscribed)
            }
            Err(error) => {
                self.watches.stop();
                let is_first = line.history.failed();
                if is_first {
                    tracing::warn!(
                        %error,
                        "Subscription to results failed; results are polled until it is restored. \
                         Check Redis and its ACL"
                    );
                }
                is_first.then_some(ResultEvent::Subscription(SubscriptionState::Disconnected))
            }
        }
    }

    /// Returns the next event of the active subscription. An error ends the subscription.
    async fn listen(
        &self,
        subscription: &mut Subscription,
        history: &mut ReconnectHistory,
    ) -> Result<Option<ResultEvent>, SubscriptionError> {
        let Subscription { subscriber, changes } = subscription;
        changes.append(&mut self.watches.take_changes());
        if !changes.is_empty() {
            apply(subscriber, changes).await?;
            self.watches.tell_subscribed(changes);
            changes.clear();
        }
        tokio::select! {
            heard = subscriber.next() => match heard? {
                Received::Message(message) => Ok(self.heard(&message)),
                Received::Subscription(state) => {
                    history.heard();
                    Ok(Some(ResultEvent::Subscription(state)))
                }
            },
            () = self.watches.changed.notified() => Ok(None),
        }
    }

    /// Handles the end of a subscription and prepares the next one.
    fn ended(&self, ended: SubscriptionError, history: &mut ReconnectHistory) -> SubscriptionState {
        self.watches.stop();
        match ended {
            SubscriptionError::Broken(error) => {
                tracing::warn!(%error, "Subscription to results broke; reconnecting");
                SubscriptionState::Disconnected
            }
            SubscriptionError::Missed => {
                tracing::warn!(
                    subscription = "results",
                    "Beats missed: subscription and commands lead to different Redis servers. Both reconnect"
                );
                history.missed();
                self.commands.reconnect();
                SubscriptionState::BeatsMissed
            }
        }
    }

    fn heard(&self, message: &Msg) -> Option<ResultEvent> {
        let id = message.get_channel_name().strip_prefix(CHANNEL_PREFIX).and_then(JobId::parse);
        let payload = Bytes::copy_from_slice(message.get_payload_bytes());
        match id {
            Some(id) if message.from_pattern() => Some(ResultEvent::Published { id, payload }),
            Some(id) => {
                self.watches.tell(id, WatchState::Published(payload));
                None
            }
            None => Some(ResultEvent::Malformed),
        }
    }
}

#[async_trait]
impl Results for RedisResults {
    async fn next(&self) -> ResultEvent {
        let mut line = self.line.lock().await;
        loop {
            let ResultsSlot { subscription: Some(subscription), history } = &mut *line else {
                match self.resubscribe(&mut line).await {
                    Some(event) => return event,
                    None => continue,
                }
            };
            match self.listen(subscription, history).await {
                Ok(Some(event)) => return event,
                Ok(None) => {}
                Err(ended) => {
                    let state = self.ended(ended, history);
                    line.subscription = None;
                    return ResultEvent::Subscription(state);
                }
            }
        }
    }

    async fn stored(&self, ids: &[JobId]) -> Result<Vec<Option<Bytes>>, BackendError> {
        assert!(ids.len() <= STORED_MAX, "{} ids at once", ids.len());
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let mut command = cmd("MGET");
        for id in ids {
            command.arg(stored_key(&id.to_string()));
        }
        self.commands.query(&command).await
    }

    async fn store(&self, id: JobId, result: &Bytes) -> Result<(), BackendError> {
        let mut command = cmd("SET");
        command.arg(stored_key(&id.to_string())).arg(result.as_ref());
        self.commands.query::<()>(command.arg("NX").arg("EX").arg(STORED_S)).await
    }

    async fn stored_foreign(&self, request_id: &str) -> Result<Option<Bytes>, BackendError> {
        // MGET instead of GET, because GET fails on a key that does not hold a string.
        let mut values: Vec<Option<Bytes>> =
            self.commands.query(cmd("MGET").arg(stored_key(request_id))).await?;
        Ok(values.pop().flatten())
    }

    async fn wait_for(&self, id: JobId) -> Result<Bytes, BackendError> {
        let mut watched = self.watches.enter(id)?;
        loop {
            let heard = watched.heard.borrow_and_update().clone();
            match heard {
                WatchState::Published(payload) => return Ok(payload),
                // Read only while the subscription is active: results stored before are found, later ones are
                // received.
                WatchState::Subscribed => match self.stored(&[id]).await.map(|mut values| values.pop()) {
                    Ok(Some(Some(payload))) => return Ok(payload),
                    // While Redis is down nothing changes. When it is back the key is read again.
                    Ok(_) | Err(BackendError::Unavailable(_)) => {}
                    Err(error) => return Err(error),
                },
                WatchState::Nothing => {}
            }
            // Ends at the next read or change. The sender lives as long as this waiter is registered.
            let _ = timeout(LOOK_EVERY, watched.heard.changed()).await;
        }
    }

    fn store_name(&self) -> &'static str {
        "redis"
    }

    async fn ping(&self) -> Result<(), BackendError> {
        self.commands.ping().await
    }
}

/// How long a result is stored, in seconds; as workers do it.
pub const STORED_S: u64 = 3600;

pub fn stored_key(request_id: &str) -> String {
    format!("job:{request_id}")
}

pub fn channel(request_id: impl Display) -> String {
    format!("{CHANNEL_PREFIX}{request_id}")
}

/// Applies the changes in order. Adjacent changes of one kind go in one command.
async fn apply(subscriber: &mut Subscriber, changes: &[SubscriptionChange]) -> Result<(), BackendError> {
    for run in changes.chunk_by(|a, b| a.wanted == b.wanted) {
        let channels: Vec<_> = run.iter().map(|change| channel(change.id)).collect();
        if run[0].wanted {
            subscriber.subscribe(channels).await?;
        } else {
            subscriber.unsubscribe(channels).await?;
        }
    }
    Ok(())
}

/// The state of a watched job.
#[derive(Clone, Debug, PartialEq, Eq)]
enum WatchState {
    Nothing,
    Subscribed,
    Published(Bytes),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct SubscriptionChange {
    id: JobId,
    wanted: bool,
}

/// The jobs of other nodes that are waited for, and the changes that the subscription has not applied yet.
#[derive(Default)]
struct ForeignWaits {
    inner: Mutex<WaitTable>,
    changed: Notify,
}

#[derive(Default)]
struct WaitTable {
    jobs: HashMap<JobId, JobWait>,
    /// In order. Empty while there is no subscription, because a new one starts from `jobs`.
    changes: Vec<SubscriptionChange>,
    subscribed: bool,
}

struct JobWait {
    heard: watch::Sender<WatchState>,
    waiters: usize,
}

impl ForeignWaits {
    fn enter(&self, id: JobId) -> Result<JobWaitGuard<'_>, BackendError> {
        let mut inner = self.inner();
        // Bounds the changes too: each entry causes at most two.
        if inner.jobs.len() >= WATCHES_MAX || inner.changes.len() >= WATCHES_MAX {
            return Err(BackendError::Unavailable("too many waits for jobs of other nodes".into()));
        }
        let wish = inner
            .jobs
            .entry(id)
            .or_insert_with(|| JobWait { heard: watch::Sender::new(WatchState::Nothing), waiters: 0 });
        wish.waiters += 1;
        let (heard, is_first) = (wish.heard.subscribe(), wish.waiters == 1);
        if is_first {
            self.change(&mut inner, SubscriptionChange { id, wanted: true });
        }
        Ok(JobWaitGuard { watches: self, id, heard })
    }

    fn leave(&self, id: JobId) {
        let mut inner = self.inner();
        let Some(wish) = inner.jobs.get_mut(&id) else { return };
        wish.waiters -= 1;
        if wish.waiters == 0 {
            inner.jobs.remove(&id);
            self.change(&mut inner, SubscriptionChange { id, wanted: false });
        }
    }

    fn change(&self, inner: &mut WaitTable, change: SubscriptionChange) {
        if inner.subscribed {
            inner.changes.push(change);
            self.changed.notify_one();
        }
    }

    /// Returns the channels of a new subscription. From now on changes are recorded for it.
    fn start(&self) -> Vec<String> {
        let mut inner = self.inner();
        inner.subscribed = true;
        inner.changes.clear();
        inner.jobs.keys().map(|id| channel(*id)).collect()
    }

    fn stop(&self) {
        let mut inner = self.inner();
        inner.subscribed = false;
        inner.changes.clear();
    }

    fn take_changes(&self) -> Vec<SubscriptionChange> {
        std::mem::take(&mut self.inner().changes)
    }

    fn tell(&self, id: JobId, heard: WatchState) {
        if let Some(wish) = self.inner().jobs.get(&id) {
            wish.heard.send_replace(heard);
        }
    }

    fn tell_subscribed(&self, changes: &[SubscriptionChange]) {
        for change in changes.iter().filter(|change| change.wanted) {
            self.tell_unless_published(change.id);
        }
    }

    /// A job whose channel is not subscribed yet is notified too early. That costs one look and loses no
    /// result.
    fn tell_all_subscribed(&self) {
        let ids: Vec<_> = self.inner().jobs.keys().copied().collect();
        ids.into_iter().for_each(|id| self.tell_unless_published(id));
    }

    fn tell_unless_published(&self, id: JobId) {
        if let Some(wish) = self.inner().jobs.get(&id) {
            wish.heard.send_if_modified(|heard| {
                let told = !matches!(heard, WatchState::Published(_));
                if told {
                    *heard = WatchState::Subscribed;
                }
                told
            });
        }
    }

    fn inner(&self) -> MutexGuard<'_, WaitTable> {
        self.inner.lock()
    }
}

/// The registration of one waiter; Drop removes it.
struct JobWaitGuard<'a> {
    watches: &'a ForeignWaits,
    id: JobId,
    heard: watch::Receiver<WatchState>,
}

impl Drop for JobWaitGuard<'_> {
    fn drop(&mut self) {
        self.watches.leave(self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(random: u64) -> JobId {
        JobId::new(NodeId(1), 2, random)
    }

    #[test]
    fn dropped_waiters_leave_nothing_behind() {
        let watches = ForeignWaits::default();
        drop(watches.enter(id(1)));
        assert_eq!(watches.take_changes(), [], "no subscription, no changes");

        let kept = watches.enter(id(1)).unwrap();
        assert_eq!(watches.start(), [channel(id(1))]);
        let twin = watches.enter(id(1)).unwrap();
        assert_eq!(watches.take_changes(), [], "one channel serves both");
        drop(twin);
        let other = watches.enter(id(2)).unwrap();
        drop(kept);
        let wanted = |random, wanted| SubscriptionChange { id: id(random), wanted };
        assert_eq!(watches.take_changes(), [wanted(2, true), wanted(1, false)]);
        drop(other);
        watches.stop();
        assert_eq!(watches.take_changes(), []);
        assert!(watches.inner().jobs.is_empty());
    }

    #[test]
    fn a_publication_is_not_overwritten() {
        let watches = ForeignWaits::default();
        let watched = watches.enter(id(1)).unwrap();
        watches.tell_all_subscribed();
        assert_eq!(*watched.heard.borrow(), WatchState::Subscribed);
        watches.tell(id(1), WatchState::Published("x".into()));
        watches.tell_all_subscribed();
        assert_eq!(*watched.heard.borrow(), WatchState::Published("x".into()));
    }

    #[test]
    fn a_full_set_of_watches_returns_unavailable() {
        let watches = ForeignWaits::default();
        let _held: Vec<_> = (0..WATCHES_MAX as u64).map(|i| watches.enter(id(i)).unwrap()).collect();
        assert!(matches!(watches.enter(id(u64::MAX)), Err(BackendError::Unavailable(_))));
    }
}
