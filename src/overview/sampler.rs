//! Reads this node: its counters as differences since the last reading, and its state.

use super::counts::WindowCounts;
use super::summary::{JobGauges, LimitLevel, NodeGauges, NodeSummary, ReceivingSubscriptions, RowGauges};
use super::windows::NodeWindows;
use crate::dispatch::OldestJob;
use crate::lifecycle::{Lifecycle, Phase};
use crate::limiter::{NearLimit, RateLimiter};
use crate::metrics::{LoadSample, Metrics};
use crate::model::{UnixMs, millis, now_ms};
use crate::node_lease::NodeLease;
use std::sync::Arc;
use tokio::time::Instant;

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Reads this node.
pub struct Sampler {
    is_fleet: bool,
    lease: Arc<NodeLease>,
    oldest: OldestJob,
    limiter: RateLimiter,
    lifecycle: Lifecycle,
    metrics: Arc<Metrics>,
    started: Instant,
    started_at: UnixMs,
    read_at: Instant,
    last: JobCounters,
}

/// Counters that only grow.
#[derive(Clone, Copy)]
struct JobCounters {
    accepted: u64,
    settled: u64,
    lost: u64,
}

impl Sampler {
    pub fn new(
        is_fleet: bool,
        lease: Arc<NodeLease>,
        oldest: OldestJob,
        limiter: RateLimiter,
        lifecycle: Lifecycle,
        metrics: Arc<Metrics>,
    ) -> Self {
        let (started, started_at) = (Instant::now(), now_ms());
        let (read_at, last) = (started, JobCounters { accepted: 0, settled: 0, lost: 0 });
        Self { is_fleet, lease, oldest, limiter, lifecycle, metrics, started, started_at, read_at, last }
    }

    /// What has happened since the last call.
    pub fn take(&mut self) -> WindowCounts {
        let now = Instant::now();
        let ms = millis(now - std::mem::replace(&mut self.read_at, now));
        let read = JobCounters {
            accepted: self.metrics.jobs.accepted.get(),
            settled: self.metrics.results_settled.get(),
            lost: self.metrics.results.with_label_values(&["lost"]).get(),
        };
        let before = std::mem::replace(&mut self.last, read);
        let lost = read.lost.saturating_sub(before.lost);
        let LoadSample { runs, runs_failed, requests, requests_failed, requests_refused } =
            self.metrics.load.take();
        WindowCounts {
            ms,
            accepted: read.accepted.saturating_sub(before.accepted),
            finished: read.settled.saturating_sub(before.settled) + lost,
            failed: runs_failed + lost,
            request_errors: requests_failed,
            refused: requests_refused,
            run_times: runs,
            request_times: requests,
        }
    }

    /// The summary of this node with the given windows.
    pub fn summary(&self, windows: NodeWindows) -> NodeSummary {
        NodeSummary {
            version: VERSION.to_owned(),
            started_at: self.started_at,
            uptime_s: self.started.elapsed().as_secs(),
            phase: name_of(self.lifecycle.phase()).to_owned(),
            gauges: self.gauges(),
            windows,
            limits: self.limiter.near_limits().into_iter().map(level).collect(),
        }
    }

    fn gauges(&self) -> NodeGauges {
        let metrics = &self.metrics;
        let oldest_ms = self.oldest.accepted_at().map(|at| now_ms().saturating_sub(at));
        metrics.jobs.oldest.set(i64::try_from(oldest_ms.unwrap_or(0) / 1000).unwrap_or(i64::MAX));
        NodeGauges {
            jobs: JobGauges {
                in_flight: count(metrics.jobs.in_flight.get()),
                waiting: count(metrics.queue_waiting.get()),
                sends_in_flight: count(metrics.sends_in_flight.get()),
                waiters: count(metrics.waiters.get()),
                oldest_ms,
            },
            rows: RowGauges {
                waiting: count(metrics.audit.waiting_rows.get()),
                spilled: count(metrics.audit.spill.rows.get()),
            },
            connections: count(metrics.edge.connections.get()),
            breaker_open: metrics.queue_refuses.get() != 0,
            shed_permille: count(metrics.queue_shed_permille.get()),
            // A node without others has no subscription that could fail.
            subscriptions: ReceivingSubscriptions {
                results: !self.is_fleet || metrics.subscriptions.is_receiving("results"),
                changes: !self.is_fleet || metrics.subscriptions.is_receiving("changes"),
            },
            lease_held: self.lease.holds(),
        }
    }
}

fn level(near: NearLimit) -> LimitLevel {
    let NearLimit { limit, identity, name, level, age } = near;
    LimitLevel { limit, identity: identity.to_owned(), name, level, age_ms: millis(age) }
}

fn name_of(phase: Phase) -> &'static str {
    match phase {
        Phase::Starting => "starting",
        Phase::Ready => "ready",
        Phase::Draining => "draining",
        Phase::Closing => "closing",
    }
}

/// A gauge is never negative, except for a moment while two threads change it.
fn count(gauge: i64) -> u64 {
    u64::try_from(gauge).unwrap_or(0)
}
