//! The decisions of the limits about one request, while it is counted.

use super::lease::Micros;
use super::who::LimitIdentity;
use crate::backend::Decision;
use crate::metrics::Metrics;
use prometheus::IntCounter;
use smallvec::SmallVec;
use std::time::Duration;

/// Decisions, each with the index of its limit in the [`Plan`](super::plan::Plan). Few routes have more than
/// two limits.
pub type Decisions = SmallVec<[(usize, Decision); 2]>;

/// The source of a decision, as a label of the metric.
#[derive(Clone, Copy)]
pub enum Source {
    Lease,
    RefusalMemory,
    Exact,
    Local,
    Closed,
}

impl Source {
    pub const ALL: [(Self, &str); 5] = [
        (Self::Lease, "lease"),
        (Self::RefusalMemory, "refusal_memory"),
        (Self::Exact, "exact"),
        (Self::Local, "local"),
        (Self::Closed, "closed"),
    ];
}

/// The counters of decisions, by [`Source`]. Looked up once, because every request counts.
pub struct DecisionCounters {
    pub allowed: [IntCounter; 5],
    pub limited: [IntCounter; 5],
}

impl DecisionCounters {
    pub fn new(metrics: &Metrics) -> Self {
        let all =
            |decision| Source::ALL.map(|(_, name)| metrics.limiter.with_label_values(&[decision, name]));
        Self { allowed: all("allowed"), limited: all("limited") }
    }

    pub fn count(&self, source: Source, allowed: bool) {
        let counters = if allowed { &self.allowed } else { &self.limited };
        if let Some(counter) = counters.get(source as usize) {
            counter.inc();
        }
    }
}

/// The decision of one limit. `lease`: the number of the call that leased the token, for a refund.
pub struct LimitDecision {
    pub decision: Decision,
    pub source: Source,
    pub lease: Option<u64>,
}

impl LimitDecision {
    pub fn allowed(remaining: u32, source: Source) -> Self {
        Self {
            decision: Decision { allowed: true, remaining, retry_after: Duration::ZERO },
            source,
            lease: None,
        }
    }

    pub fn refused(retry: Micros, source: Source) -> Self {
        let retry_after = Duration::from_micros(retry);
        Self { decision: Decision { allowed: false, remaining: 0, retry_after }, source, lease: None }
    }
}

/// The progress of one step.
#[derive(Default)]
pub struct Step {
    pub decisions: Decisions,
    /// Tokens from leases, to be refunded if another limit rejects the request.
    pub spent: SmallVec<[(usize, LimitIdentity, u64); 2]>,
    pub exact: SmallVec<[(usize, LimitIdentity); 1]>,
}
