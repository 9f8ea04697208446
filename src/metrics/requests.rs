//! Requests and their responses.

use super::register::{OTHER, counter_vec, gauge, histogram_vec};
use prometheus::{HistogramVec, IntCounterVec, IntGauge, Registry};
use std::time::Duration;

/// In seconds, from a rejected request (0.5 ms) to the longest wait of a synchronous run.
const HTTP_BUCKETS: &[f64] = &[
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
    300.0,
];

/// The response times. Their name, labels and label order are fixed.
pub struct HttpMetrics(HistogramVec);

impl HttpMetrics {
    pub fn new(r: &Registry) -> prometheus::Result<Self> {
        let (name, help) = ("http_request_duration_seconds", "Response time in seconds.");
        histogram_vec(r, name, help, HTTP_BUCKETS, &["method", "route", "status_code"]).map(Self)
    }

    pub fn observe(&self, method: &str, route: &str, status: u16, took: Duration) {
        let mut digits = *b"000";
        for (place, value) in digits.iter_mut().zip([status / 100, status / 10, status]) {
            *place += (value % 10) as u8;
        }
        let status = std::str::from_utf8(&digits).unwrap_or(OTHER);
        self.0.with_label_values(&[method, route, status]).observe(took.as_secs_f64());
    }
}

pub fn in_flight(r: &Registry) -> prometheus::Result<IntGauge> {
    gauge(r, "infra_requests_in_flight", "Requests being answered.")
}

pub fn waiters(r: &Registry) -> prometheus::Result<IntGauge> {
    gauge(r, "infra_waiters", "Synchronous runs and long polls that wait for a result.")
}

pub fn refused(r: &Registry) -> prometheus::Result<IntCounterVec> {
    let help = "Requests answered with a problem, by its code.";
    counter_vec(r, "infra_requests_refused_total", help, &["code"])
}
