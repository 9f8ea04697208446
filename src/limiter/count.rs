//! The state of counting one request.

use ahash::AHashMap;
use arc_swap::ArcSwap;
use crate::backend::Decision;
use crate::metrics::Metrics;
use fields::seconds_up;
use http::HeaderValue;
use lease::{Micros, Verdict};
use leaser::{DUE_MAX, Due, Swept};
use limit::{Limit, OnEmpty, Tried};
use prometheus::IntCounter;
use smallvec::SmallVec;
use std::net::IpAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use store::Store;
use tokio::sync::mpsc;
use who::{Subject, Who};

/// By the place of the limit in the [`Plan`]. Few routes have more limits than two.
type Decisions = SmallVec<[(usize, Decision); 2]>;

/// Where a decision came from.
#[derive(Clone, Copy)]
enum Source {
    Lease,
    RefusalMemory,
    Exact,
    Local,
    Closed,
}

impl Source {
    const ALL: [(Self, &str); 5] = [
        (Self::Lease, "lease"),
        (Self::RefusalMemory, "refusal_memory"),
        (Self::Exact, "exact"),
        (Self::Local, "local"),
        (Self::Closed, "closed"),
    ];
}

/// Looked up once, as every request counts.
struct Counters {
    allowed: [IntCounter; 5],
    limited: [IntCounter; 5],
}

impl Counters {
    fn new(metrics: &Metrics) -> Self {
        let all =
            |decision| Source::ALL.map(|(_, name)| metrics.limiter.with_label_values(&[decision, name]));
        Self { allowed: all("allowed"), limited: all("limited") }
    }

    fn count(&self, source: Source, allowed: bool) {
        let counters = if allowed { &self.allowed } else { &self.limited };
        if let Some(counter) = counters.get(source as usize) {
            counter.inc();
        }
    }
}

/// What one limit says. `lease`: the call its token came with, for the refund.
struct Said {
    decision: Decision,
    source: Source,
    lease: Option<u64>,
}

impl Said {
    fn allowed(remaining: u32, source: Source) -> Self {
        Self {
            decision: Decision { allowed: true, remaining, retry_after: Duration::ZERO },
            source,
            lease: None,
        }
    }

    fn refused(retry: Micros, source: Source) -> Self {
        let retry_after = Duration::from_micros(retry);
        Self { decision: Decision { allowed: false, remaining: 0, retry_after }, source, lease: None }
    }
}

/// One step of counting, on its way.
#[derive(Default)]
struct Step {
    decisions: Decisions,
    /// Tokens from leases, to be given back if another limit refuses.
    spent: SmallVec<[(usize, Who, u64); 2]>,
    exact: SmallVec<[(usize, Who); 1]>,
}
