//! Events and their watchers.

use super::register::{counter, counter_vec, gauge};
use prometheus::{IntCounter, IntCounterVec, IntGauge, Registry};

/// The metrics of events and their watchers.
#[derive(Clone)]
pub struct EventMetrics {
    pub watchers: IntGauge,
    pub published: IntCounter,
    /// By `reason`: `sampled` (too many in a second), `failed` (the stream did not answer).
    pub dropped: IntCounterVec,
    /// By `reason`: `slow`, `key` (it is no longer valid).
    pub watchers_dropped: IntCounterVec,
}

impl EventMetrics {
    pub(super) fn new(r: &Registry) -> prometheus::Result<Self> {
        let reason = &["reason"];
        Ok(Self {
            watchers: gauge(r, "infra_event_watchers", "Clients that watch events on this node.")?,
            published: counter(r, "infra_events_published_total", "Events that this node has published.")?,
            dropped: counter_vec(
                r,
                "infra_events_dropped_total",
                "Events of this node that were not published.",
                reason,
            )?,
            watchers_dropped: counter_vec(
                r,
                "infra_event_watchers_dropped_total",
                "Watchers whose stream this node has ended.",
                reason,
            )?,
        })
    }
}
