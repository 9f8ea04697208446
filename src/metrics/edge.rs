//! Connections and upstreams.

use super::register::{counter, gauge, gauge_vec};
use prometheus::{IntCounter, IntGauge, IntGaugeVec, Registry};

/// The metrics of connections and upstreams.
pub struct EdgeMetrics {
    pub connections: IntGauge,
    pub connections_refused: IntCounter,
    pub handshakes_failed: IntCounter,
    pub accepts_failed: IntCounter,
    pub descriptors_short: IntGauge,
    /// By `upstream`, its name.
    pub upstream_healthy: IntGaugeVec,
}

impl EdgeMetrics {
    pub(super) fn new(r: &Registry) -> prometheus::Result<Self> {
        Ok(Self {
            connections: gauge(r, "infra_connections", "Open client connections.")?,
            connections_refused: counter(
                r,
                "infra_connections_refused_total",
                "Connections beyond the connection limits.",
            )?,
            accepts_failed: counter(
                r,
                "infra_accepts_failed_total",
                "Failed accepts: no file descriptor was free.",
            )?,
            descriptors_short: gauge(
                r,
                "infra_file_descriptors_short",
                "1 while file descriptors are exhausted.",
            )?,
            handshakes_failed: counter(
                r,
                "infra_tls_handshakes_failed_total",
                "TLS handshakes that failed or timed out.",
            )?,
            upstream_healthy: gauge_vec(
                r,
                "infra_upstream_healthy_addresses",
                "Healthy addresses of an upstream.",
                &["upstream"],
            )?,
        })
    }
}
