//! The shared store as the limiter sees it: whether it answers, and how many nodes use it.

use super::lease::Micros;
use crate::backend::{Decision, Grant, LeaseCall, LimitStore};
use crate::metrics::Metrics;
use crate::model::Quota;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use tokio::time::Instant;

/// Interval of probes while the store is down. Other requests do not wait for it.
const PROBE_EVERY: Micros = 100_000;
/// How long a node count stays valid after the last bucket that showed it.
const NODES_KEPT: Micros = 10_000_000;

pub struct SharedStore {
    port: Option<Arc<dyn LimitStore>>,
    metrics: Arc<Metrics>,
    start: Instant,
    is_away: AtomicBool,
    probe_at: AtomicU64,
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
            is_away: AtomicBool::new(false),
            probe_at: AtomicU64::new(0),
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
        self.is_away.load(Ordering::Relaxed)
    }

    /// Whether the caller is the one that probes the store now.
    pub fn is_probe_due(&self, now: Micros) -> bool {
        let at = self.probe_at.load(Ordering::Relaxed);
        let next = now.saturating_add(PROBE_EVERY);
        now >= at && self.probe_at.compare_exchange(at, next, Ordering::Relaxed, Ordering::Relaxed).is_ok()
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
        if answer.is_none() && !self.is_away.swap(true, Ordering::Relaxed) {
            self.probe_at.store(self.now() + PROBE_EVERY, Ordering::Relaxed);
        }
        if answer.is_some() && self.is_away() {
            self.is_away.store(false, Ordering::Relaxed);
        }
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
