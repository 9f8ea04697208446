//! Configuration.

use super::register::{counter_vec, gauge};
use prometheus::{IntCounterVec, IntGauge, Registry};

pub fn reloads(r: &Registry) -> prometheus::Result<IntCounterVec> {
    let help = "Configuration changes, applied or rejected.";
    counter_vec(r, "infra_conf_reloads_total", help, &["file", "result"])
}

pub fn applied_at(r: &Registry) -> prometheus::Result<IntGauge> {
    gauge(r, "infra_conf_applied_timestamp_seconds", "Unix time of the last applied configuration.")
}
