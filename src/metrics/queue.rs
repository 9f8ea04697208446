//! Sending jobs to the queue.

use super::register::{counter_by, gauge, histogram};
use prometheus::{Histogram, IntCounterVec, IntGauge, Registry};

const BATCH_BUCKETS: &[f64] = &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0];
const OUTCOMES: &[&str] = &["sent", "retried", "refused", "not_sent", "unknown"];
/// In seconds.
const SEND_BUCKETS: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0];

pub fn by_outcome(r: &Registry) -> prometheus::Result<IntCounterVec> {
    let help = "Attempts to send a job, by their outcome.";
    counter_by(r, "infra_queue_jobs_total", help, "outcome", OUTCOMES)
}

pub fn waiting_jobs(r: &Registry) -> prometheus::Result<IntGauge> {
    gauge(r, "infra_queue_waiting_jobs", "Jobs that wait to be sent or retried.")
}

pub fn depth(r: &Registry) -> prometheus::Result<IntGauge> {
    gauge(r, "infra_queue_depth", "Messages on the queue, approximately.")
}

pub fn sends_in_flight(r: &Registry) -> prometheus::Result<IntGauge> {
    gauge(r, "infra_queue_sends_in_flight", "Batches being sent.")
}

pub fn batch_jobs(r: &Registry) -> prometheus::Result<Histogram> {
    histogram(r, "infra_queue_batch_jobs", "Jobs per batch, 1 to 10.", BATCH_BUCKETS)
}

pub fn send_seconds(r: &Registry) -> prometheus::Result<Histogram> {
    histogram(r, "infra_queue_send_seconds", "Seconds to journal and send a batch.", SEND_BUCKETS)
}

pub fn breaker_open(r: &Registry) -> prometheus::Result<IntGauge> {
    gauge(r, "infra_queue_breaker_open", "1 while new jobs are rejected: nothing can be sent.")
}

pub fn shed_permille(r: &Registry) -> prometheus::Result<IntGauge> {
    gauge(r, "infra_queue_shed_permille", "Jobs per thousand that are shed: the queue is slow.")
}
