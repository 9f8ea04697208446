//! The shared store as the limiter sees it: whether it answers, and how many nodes use it.

use super::lease::Micros;
use crate::availability::Availability;
use crate::backend::{Decision, Grant, LeaseCall, LimitStore};
use crate::metrics::Metrics;
use crate::model::Quota;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// Interval of probes while the store is down. Other requests do not wait for it.
const PROBE_EVERY: Duration = Duration::from_millis(100);
/// How long a node count stays valid after the last bucket that showed it.
const NODES_KEPT: Micros = 10_000_000;

pub struct SharedStore {
    port: Option<Arc<dyn LimitStore>>,
    metrics: Arc<Metrics>,
    start: Instant,
    availability: Availability,
    /// The largest number of nodes recently seen to share a bucket.
    nodes: AtomicU32,
    nodes_at: AtomicU64,
}

impl SharedStore {
    pub fn new(port: Option<Arc<dyn LimitStore>>, metrics: Arc<Metrics>) -> Self {
        Self {
            port,
            metrics,
            start: Instant::now(),
            availability: Availability::new(Duration::ZERO, PROBE_EVERY),
            nodes: AtomicU32::new(1),
            nodes_at: AtomicU64::new(0),
        }
    }

    /// The time on the clock of the leases.
    pub fn now(&self) -> Micros {
        Micros::try_from(self.start.elapsed().as_micros()).unwrap_or(Micros::MAX)
    }

    /// `false`: limits are counted in this process only.
    pub fn is_shared(&self) -> bool {
        self.port.is_some()
    }

    /// Whether the last call failed.
    pub fn is_away(&self) -> bool {
        self.availability.is_down()
    }

    /// Whether the caller is the one that probes the store now.
    pub fn take_probe(&self) -> bool {
        self.availability.take_probe()
    }

    /// The number of nodes that share a limit, as far as is known.
    pub fn nodes(&self) -> u32 {
        self.nodes.load(Ordering::Relaxed)
    }

    pub async fn lease(&self, call: &LeaseCall) -> Option<Grant> {
        self.metrics.limiter_calls.with_label_values(&["lease"]).inc();
        let answer = self.port.as_ref()?.lease(call).await;
        let grant = self.heard(answer.ok())?;
        self.note_nodes(grant.nodes);
        Some(grant)
    }

    pub async fn take(&self, buckets: &[(String, Quota)]) -> Option<Vec<Decision>> {
        self.metrics.limiter_calls.with_label_values(&["exact"]).inc();
        let answer = self.port.as_ref()?.take(buckets).await;
        self.heard(answer.ok())
    }

    /// Updates the state after a call. Logs nothing: the subscription to results logs an outage of Redis, and
    /// one line per request would bury that.
    fn heard<T>(&self, answer: Option<T>) -> Option<T> {
        // Whether this changed the state does not matter here.
        let _ = if answer.is_some() { self.availability.succeeded() } else { self.availability.failed() };
        answer
    }

    fn note_nodes(&self, nodes: u32) {
        let now = self.now();
        let is_old = now.saturating_sub(self.nodes_at.load(Ordering::Relaxed)) > NODES_KEPT;
        if nodes >= self.nodes() || is_old {
            self.nodes.store(nodes.max(1), Ordering::Relaxed);
            self.nodes_at.store(now, Ordering::Relaxed);
        }
    }
}
