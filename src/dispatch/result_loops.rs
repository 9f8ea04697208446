//! The loops that bring results in: publications, and scheduled look-ups.

use bytes::Bytes;
use crate::backend::{Hearing, ResultEvent};
use crate::dispatch::settler::{LOOKUPS_PER_TICK, LOOKUP_TICK, Settler};
use crate::model::{JobId, Outcome};
use futures_util::stream::{FuturesUnordered, StreamExt};
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Hears the results of this node's jobs. Never pauses: what is published meanwhile would pile up in memory.
pub struct Pump(Arc<Settler>);

impl Pump {
    pub fn new(settler: Arc<Settler>) -> Self {
        Self(settler)
    }

    pub async fn run(self) {
        let settler = self.0;
        loop {
            match settler.results.next().await {
                ResultEvent::Published { id, payload } => settler.settle(id, Outcome::new(payload)),
                ResultEvent::Malformed => settler.metrics.results.with_label_values(&["malformed"]).inc(),
                ResultEvent::Subscribed => settler.resubscribed.store(true, Ordering::Release),
                ResultEvent::Hearing(hearing) => settler.hears(hearing),
            }
        }
    }
}

/// Finds results whose publication was missed, and clears the journal of jobs that were never sent.
pub struct Lookups(Arc<Settler>);

impl Lookups {
    pub fn new(settler: Arc<Settler>) -> Self {
        Self(settler)
    }

    pub async fn run(self) {
        let settler = self.0;
        let mut tick = tokio::time::interval(LOOKUP_TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // All that were in flight at the last (re)subscribe and are not looked up since.
        let mut missed: Vec<JobId> = Vec::new();
        loop {
            tick.tick().await;
            settler.in_flight.forget_old();
            settler.in_flight.reckon();
            settler.journal.clear().await;
            if settler.resubscribed.swap(false, Ordering::AcqRel) {
                missed = settler.in_flight.unsettled();
            }
            let now = missed.split_off(missed.len().saturating_sub(LOOKUPS_PER_TICK));
            missed.extend(settler.look_up(&now).await);
            settler.look_up_due().await;
        }
    }
}
