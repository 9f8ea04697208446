//! The loops that receive results: the pump for publications, and the scheduled look-ups.

use super::in_flight::InFlight;
use super::journal::NodeJournal;
use super::settler::{LOOKUPS_PER_TICK, Settler};
use crate::backend::{ResultEvent, Results};
use crate::model::JobId;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{MissedTickBehavior, interval};

/// Interval at which due look-ups are done.
const LOOKUP_TICK: Duration = Duration::from_millis(100);

/// Receives the published results of this node's jobs. It must not pause, because unread publications
/// accumulate in memory.
pub struct Pump {
    settler: Arc<Settler>,
    results: Arc<dyn Results>,
}

impl Pump {
    pub fn new(settler: Arc<Settler>, results: Arc<dyn Results>) -> Self {
        Self { settler, results }
    }

    pub async fn run(self) {
        let settler = self.settler;
        loop {
            match self.results.next().await {
                ResultEvent::Published { id, payload } => settler.hear(id, payload),
                ResultEvent::Malformed => settler.count_malformed(),
                ResultEvent::Subscribed => settler.subscribed(),
                ResultEvent::Subscription(state) => settler.note_subscription(state),
            }
        }
    }
}

/// Finds results whose publication was missed, and ends jobs as LOST. Also removes jobs that were never sent
/// from the journal.
pub struct Lookups {
    settler: Arc<Settler>,
    in_flight: Arc<InFlight>,
    journal: Arc<NodeJournal>,
}

impl Lookups {
    pub fn new(settler: Arc<Settler>, in_flight: Arc<InFlight>, journal: Arc<NodeJournal>) -> Self {
        Self { settler, in_flight, journal }
    }

    pub async fn run(self) {
        let mut tick = interval(LOOKUP_TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // The jobs that were in flight at the last (re)subscription and have not been looked up since.
        let mut missed: Vec<JobId> = Vec::new();
        loop {
            tick.tick().await;
            self.in_flight.forget_old();
            self.in_flight.reckon();
            self.journal.clear().await;
            if self.settler.take_resubscribed() {
                missed = self.in_flight.unsettled();
            }
            let now = missed.split_off(missed.len().saturating_sub(LOOKUPS_PER_TICK));
            missed.extend(self.settler.look_up(&now).await);
            self.settler.store_late().await;
            self.settler.look_up_due().await;
        }
    }
}
