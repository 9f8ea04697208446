//! The overview of the fleet: what all nodes did in the last second, minute and hour, and their state now.
//!
//! Once a second each node closes the second and writes one small summary to the store that all nodes share.
//! So any node answers for all of them, with one read. Requests pay nothing for that: the figures are
//! differences of metrics that exist anyway, and times from [`crate::metrics::LoadRecorder`]. Times are
//! histograms and not percentiles, because percentiles of several nodes cannot be combined.
//!
//! Without the store a node answers with its own figures, and says that they are not complete.
//!
//! In reading order: [`counts`] is one period, [`windows`] the last hour of this node, [`sampler`] reads this
//! node, [`summary`] is what a node writes, [`figures`] combines periods, [`fleet`] combines nodes, and
//! [`summary_loop`] runs once a second.

mod counts;
mod figures;
mod fleet;
mod sampler;
mod summary;
mod summary_loop;
mod windows;

pub use fleet::FleetOverview;
pub use summary_loop::SummaryLoop;

use crate::backend::NodeSummaries;
use crate::dispatch::OldestJob;
use crate::lifecycle::Lifecycle;
use crate::limiter::RateLimiter;
use crate::metrics::Metrics;
use crate::model::{NodeId, now_ms};
use crate::node_lease::NodeLease;
use arc_swap::ArcSwapOption;
use sampler::Sampler;
use std::sync::Arc;
use summary::NodeSummary;

/// What the overview reads.
pub struct OverviewParts {
    pub node: NodeId,
    pub summaries: Arc<dyn NodeSummaries>,
    /// Whether there can be other nodes.
    pub is_fleet: bool,
    pub lease: Arc<NodeLease>,
    pub oldest: OldestJob,
    pub limiter: RateLimiter,
    pub lifecycle: Lifecycle,
    pub metrics: Arc<Metrics>,
}

/// Answers for all nodes.
pub struct Overview {
    node: NodeId,
    summaries: Arc<dyn NodeSummaries>,
    lease: Arc<NodeLease>,
    own: Arc<ArcSwapOption<NodeSummary>>,
}

/// Builds the overview of a node, and the loop that writes its summaries. Starts nothing.
pub fn new(parts: OverviewParts) -> (Overview, SummaryLoop) {
    let own = Arc::new(ArcSwapOption::empty());
    let (node, summaries) = (parts.node, Arc::clone(&parts.summaries));
    let overview = Overview { node, summaries, lease: Arc::clone(&parts.lease), own: Arc::clone(&own) };
    let OverviewParts { summaries, is_fleet, lease, oldest, limiter, lifecycle, metrics, .. } = parts;
    let sampler = Sampler::new(is_fleet, lease, oldest, limiter, lifecycle, metrics);
    (overview, SummaryLoop::new(node, sampler, summaries, own))
}

impl Overview {
    /// Reads the summaries of all nodes and combines them.
    pub async fn read(&self) -> FleetOverview {
        let stored = self.summaries.all().await;
        let own = self.own.load_full().map(|own| (self.node, own));
        FleetOverview::of(now_ms(), stored.ok(), own.as_ref(), self.lease.nodes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{BackendError, StoredSummary};
    use async_trait::async_trait;
    use bytes::Bytes;
    use parking_lot::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;
    use tokio::time::sleep;

    #[derive(Default)]
    struct SummaryStore {
        last: Mutex<Option<StoredSummary>>,
        is_away: AtomicBool,
    }

    impl SummaryStore {
        fn answer<T>(&self, answer: T) -> Result<T, BackendError> {
            let is_away = self.is_away.load(Ordering::Relaxed);
            if is_away { Err(BackendError::Unavailable("away".into())) } else { Ok(answer) }
        }
    }

    #[async_trait]
    impl NodeSummaries for SummaryStore {
        async fn write(&self, node: NodeId, summary: Bytes) -> Result<bool, BackendError> {
            self.answer(())?;
            *self.last.lock() = Some(StoredSummary { node, age: Duration::ZERO, summary });
            Ok(true)
        }

        async fn all(&self) -> Result<Vec<StoredSummary>, BackendError> {
            self.answer(self.last.lock().iter().cloned().collect())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn each_second_is_closed_and_written() {
        let (store, metrics) = (Arc::new(SummaryStore::default()), Arc::new(Metrics::new(1).unwrap()));
        let (overview, summary_loop) = new(OverviewParts {
            node: NodeId(1),
            summaries: Arc::clone(&store) as _,
            is_fleet: false,
            lease: NodeLease::of_fleet(false),
            oldest: OldestJob::of_nothing(Arc::clone(&metrics)),
            limiter: RateLimiter::new(&[], &[], None, Arc::clone(&metrics)).0,
            lifecycle: Lifecycle::default(),
            metrics: Arc::clone(&metrics),
        });
        let mut running = Box::pin(summary_loop.run());
        let mut run_for = async |ms| {
            tokio::select! {
                () = &mut running => panic!("the loop ended"),
                () = sleep(Duration::from_millis(ms)) => {}
            }
        };
        assert!(overview.read().await.nodes.is_empty());
        run_for(10).await;
        let first = overview.read().await;
        assert_eq!((first.fleet.nodes, first.complete, first.nodes[0].phase.as_str()), (1, true, "starting"));
        assert_eq!(first.fleet.windows.second.seconds, 0.0);

        metrics.jobs.accepted.inc_by(3);
        metrics.results_settled.inc();
        metrics.load.run(Duration::from_millis(5), true);
        metrics.results.with_label_values(&["lost"]).inc();
        metrics.observe_http("GET", "/", 503, Duration::from_millis(7));
        run_for(1_000).await;
        let second = overview.read().await.fleet.windows.second;
        assert_eq!((second.seconds, second.accepted_per_s, second.finished_per_s), (1.0, 3.0, 2.0));
        assert_eq!((second.job_error_share, second.request_error_share), (Some(0.5), Some(1.0)));
        assert_eq!((second.requests_per_s, second.refused_per_s), (1.0, 1.0));
        let p99 = second.run_ms.unwrap().p99;
        assert!((4.8..5.2).contains(&p99), "{p99}");

        run_for(1_000).await;
        let windows = overview.read().await.fleet.windows;
        assert_eq!((windows.second.accepted_per_s, windows.second.run_ms), (0.0, None));
        assert_eq!((windows.minute.seconds, windows.minute.accepted_per_s), (2.0, 1.5));

        store.is_away.store(true, Ordering::Relaxed);
        run_for(1_000).await;
        let alone = overview.read().await;
        assert_eq!((alone.complete, alone.fleet.windows.hour.seconds), (false, 3.0));
        assert_eq!(alone.fleet.windows.hour.accepted_per_s, 1.0);
    }
}
