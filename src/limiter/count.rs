//! The state of counting one request.

use super::lease::Micros;
use super::who::LimitIdentity;
use crate::backend::Decision;
use crate::metrics::Metrics;
use prometheus::IntCounter;
use smallvec::SmallVec;
use std::time::Duration;

/// By the place of the limit in the [`Plan`]. Few routes have more limits than two.
pub type Decisions = SmallVec<[(usize, Decision); 2]>;

/// Where a decision came from.
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

/// Looked up once, as every request counts.
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

/// What one limit says. `lease`: the call its token came with, for the refund.
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

/// One step of counting, on its way.
#[derive(Default)]
pub struct Step {
    pub decisions: Decisions,
    /// Tokens from leases, to be given back if another limit refuses.
    pub spent: SmallVec<[(usize, LimitIdentity, u64); 2]>,
    pub exact: SmallVec<[(usize, LimitIdentity); 1]>,
}
