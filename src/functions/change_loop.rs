//! The loop that applies the changes of other nodes.

use crate::backend::{ChangeEvent, Hearing};
use crate::functions::cache::Functions;
use crate::metrics::Metrics;
use crate::model::FunctionId;
use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use super::announcer::{Feed, RETRY_EVERY};
use tokio::time::{Instant, MissedTickBehavior, interval};

/// Hears of changes, and announces what could not be announced at once.
pub struct ChangeLoop {
    feed: Feed,
    functions: Functions,
    metrics: Arc<Metrics>,
}

impl ChangeLoop {
    pub(super) fn new(feed: Feed, functions: Functions, metrics: Arc<Metrics>) -> Self {
        Self { feed, functions, metrics }
    }

    pub async fn run(self) {
        tokio::join!(self.hear(), self.tell());
    }

    async fn hear(&self) {
        let Some(feed) = &self.feed.0.feed else { return };
        let mut last = None;
        loop {
            match feed.next().await {
                ChangeEvent::Changed(id) => self.changed(&id),
                ChangeEvent::Hearing(hearing) => self.hears(last.replace(hearing), hearing),
            }
        }
    }

    async fn tell(&self) {
        let mut tick = interval(RETRY_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            self.feed.0.settle_doubts(&self.functions).await;
            self.feed.0.try_again().await;
        }
    }

    fn hears(&self, before: Option<Hearing>, hearing: Hearing) {
        self.metrics.subscriptions.note("changes", hearing.is_heard(), hearing == Hearing::Unproven);
        if hearing == Hearing::Missed {
            self.metrics.subscriptions.missed.with_label_values(&["changes"]).inc();
        }
        match (before.is_some_and(Hearing::is_heard), hearing.is_heard()) {
            (false, true) => self.functions.hear(),
            (_, false) => self.functions.be_deaf(),
            (true, true) => {}
        }
    }

    fn changed(&self, id: &str) {
        self.metrics.cache.changes.inc();
        match FunctionId::parse(id) {
            Some(id) => self.functions.forget(&id),
            // Everything, or something only a later program knows.
            None => self.functions.doubt_all(),
        }
    }
}
