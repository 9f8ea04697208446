//! Results, and requests that ask for the result of an earlier one.

use super::register::{counter, counter_by};
use prometheus::{IntCounter, IntCounterVec, Registry};

const KINDS: &[&str] = &["settled", "repeated", "unknown_job", "malformed", "lost", "late", "deferred"];
const OUTCOMES: &[&str] = &["new", "repeated", "reused", "taken_over", "sent_again"];

pub fn by_kind(r: &Registry) -> prometheus::Result<IntCounterVec> {
    counter_by(r, "infra_results_total", "Results, by their outcome.", "kind", KINDS)
}

pub fn looked_up(r: &Registry) -> prometheus::Result<IntCounter> {
    counter(r, "infra_results_looked_up_total", "Results found by a lookup instead of a publication.")
}

pub fn idempotent_requests(r: &Registry) -> prometheus::Result<IntCounterVec> {
    let help = "Requests with an Idempotency-Key.";
    counter_by(r, "infra_idempotent_requests_total", help, "outcome", OUTCOMES)
}
