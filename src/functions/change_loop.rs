//! The background loop of the function cache: it receives the announcements of other nodes, and retries the
//! announcements of this node.
//!
//! Both run in one task, so that `boot` has one loop to start. An announcement that is not a function id
//! means that any function may have changed. So a later version can add kinds of announcements that this one
//! handles safely.

use super::announcer::Announcer;
use crate::backend::{ChangeEvent, SubscriptionState};
use crate::functions::cache::FunctionCache;
use crate::metrics::Metrics;
use crate::model::FunctionId;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{MissedTickBehavior, interval};

/// How often announcements that failed are retried.
const RETRY_EVERY: Duration = Duration::from_millis(250);

/// Receives and retries announcements.
pub struct ChangeLoop {
    announcer: Announcer,
    functions: FunctionCache,
    metrics: Arc<Metrics>,
}

impl ChangeLoop {
    pub fn new(announcer: Announcer, functions: FunctionCache, metrics: Arc<Metrics>) -> Self {
        Self { announcer, functions, metrics }
    }

    /// Never ends.
    pub async fn run(self) {
        tokio::join!(self.receive(), self.announce_pending());
    }

    async fn receive(&self) {
        let mut last = None;
        while let Some(event) = self.announcer.next().await {
            match event {
                ChangeEvent::Changed(id) => self.changed(&id),
                ChangeEvent::Subscription(state) => self.note_subscription(last.replace(state), state),
            }
        }
    }

    async fn announce_pending(&self) {
        let mut tick = interval(RETRY_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            self.settle_unanswered_writes().await;
            self.announcer.try_again().await;
        }
    }

    /// Invalidates and announces once more what unanswered writes may have changed, now that their outcome is
    /// certain.
    async fn settle_unanswered_writes(&self) {
        while let Some(write) = self.announcer.next_settled_write() {
            match write {
                Some(id) => self.functions.changed(&id).await,
                None => {
                    self.functions.doubt_all();
                    self.announcer.announce_all().await;
                }
            }
        }
    }

    fn note_subscription(&self, before: Option<SubscriptionState>, state: SubscriptionState) {
        self.metrics.subscriptions.note(
            "changes",
            state.is_receiving(),
            state == SubscriptionState::Unverified,
            state == SubscriptionState::BeatsMissed,
        );
        match (before.is_some_and(SubscriptionState::is_receiving), state.is_receiving()) {
            (false, true) => self.functions.announcements_resumed(),
            (_, false) => self.functions.announcements_interrupted(),
            (true, true) => {}
        }
    }

    fn changed(&self, id: &str) {
        self.metrics.cache.changes.inc();
        match FunctionId::parse(id) {
            Some(id) => self.functions.forget(&id),
            // All functions, or an announcement of a later version.
            None => self.functions.doubt_all(),
        }
    }
}
