//! Configuration.

use super::register::{counter_vec, gauge};
use prometheus::{IntCounterVec, IntGauge, Registry};

/// The metrics of the configuration. Clones share their values.
#[derive(Clone)]
pub struct ConfMetrics {
    /// By `file`, and by `result`: `applied`, `refused`.
    pub reloads: IntCounterVec,
    /// In Unix seconds.
    pub applied_at: IntGauge,
}

impl ConfMetrics {
    pub(super) fn new(r: &Registry) -> prometheus::Result<Self> {
        let (name, help) = ("infra_conf_reloads_total", "Configuration changes, applied or rejected.");
        let reloads = counter_vec(r, name, help, &["file", "result"])?;
        let (name, help) =
            ("infra_conf_applied_timestamp_seconds", "Unix time of the last applied configuration.");
        Ok(Self { reloads, applied_at: gauge(r, name, help)? })
    }
}
