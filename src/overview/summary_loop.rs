//! Closes each second, and writes the summary of this node.

use super::sampler::Sampler;
use super::summary::NodeSummary;
use super::windows::WindowRings;
use crate::backend::{BackendError, NodeSummaries};
use crate::model::NodeId;
use arc_swap::ArcSwapOption;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, MissedTickBehavior, interval_at};

const SECOND: Duration = Duration::from_secs(1);

/// The loop that writes summaries. Its failures are only logged, once per outage.
pub struct SummaryLoop {
    node: NodeId,
    sampler: Sampler,
    rings: WindowRings,
    summaries: Arc<dyn NodeSummaries>,
    /// Receives each summary, for this node's own answers.
    own: Arc<ArcSwapOption<NodeSummary>>,
    is_failing: bool,
}

impl SummaryLoop {
    pub fn new(
        node: NodeId,
        sampler: Sampler,
        summaries: Arc<dyn NodeSummaries>,
        own: Arc<ArcSwapOption<NodeSummary>>,
    ) -> Self {
        Self { node, sampler, rings: WindowRings::default(), summaries, own, is_failing: false }
    }

    /// Runs the loop. Never returns.
    pub async fn run(mut self) {
        // At once, so that the node is listed as soon as it serves. No second has ended yet.
        self.publish().await;
        let mut tick = interval_at(Instant::now() + SECOND, SECOND);
        // A write may take a second. The next period is longer then, and says so.
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            self.rings.close_second(self.sampler.take());
            self.publish().await;
        }
    }

    async fn publish(&mut self) {
        let summary = Arc::new(self.sampler.summary(self.rings.windows()));
        self.own.store(Some(Arc::clone(&summary)));
        let written = match serde_json::to_vec(&*summary) {
            Ok(text) => self.summaries.write(self.node, text.into()).await,
            Err(e) => Err(BackendError::Invalid(e.to_string())),
        };
        let problem = match written {
            Ok(true) => {
                self.is_failing = false;
                return;
            }
            Ok(false) => "too many nodes are listed".to_owned(),
            Err(e) => e.to_string(),
        };
        if !std::mem::replace(&mut self.is_failing, true) {
            tracing::warn!(
                error = problem,
                "Summary of this node not written; retrying each second. Until then the overview of other \
                 nodes is incomplete. Check Redis, and that its ACL allows the keys overview:*"
            );
        }
    }
}
