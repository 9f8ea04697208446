//! Results, and requests that ask for the result of an earlier one.

use super::register::{counter, counter_vec};
use prometheus::{IntCounter, IntCounterVec, Registry};

pub fn by_kind(r: &Registry) -> prometheus::Result<IntCounterVec> {
    counter_vec(r, "infra_results_total", "Results, by their outcome.", &["kind"])
}

pub fn looked_up(r: &Registry) -> prometheus::Result<IntCounter> {
    counter(r, "infra_results_looked_up_total", "Results found by a lookup instead of a publication.")
}

pub fn idempotent_requests(r: &Registry) -> prometheus::Result<IntCounterVec> {
    let help = "Requests with an Idempotency-Key.";
    counter_vec(r, "infra_idempotent_requests_total", help, &["outcome"])
}
