//! Rate limits.

use super::register::{counter_by, counter_vec};
use prometheus::{IntCounterVec, Registry};

pub fn decisions(r: &Registry) -> prometheus::Result<IntCounterVec> {
    let help = "Decisions, one per request and limit.";
    counter_vec(r, "infra_limiter_decisions_total", help, &["decision", "source"])
}

pub fn calls(r: &Registry) -> prometheus::Result<IntCounterVec> {
    let help = "Calls to Redis: lease or exact.";
    counter_by(r, "infra_limiter_calls_total", help, "mode", &["lease", "exact"])
}
