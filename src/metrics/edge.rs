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
    /// In Unix seconds, by `file`: `certificate`, `client_ca`. Set if there is a TLS listener.
    certificate_ends_at: IntGaugeVec,
    /// By `upstream`, its name.
    pub upstream_healthy: IntGaugeVec,
}

impl EdgeMetrics {
    /// Sets the ends of the certificates in force: (file, Unix seconds).
    pub fn show_certificates(&self, ends: &[(&str, i64)]) {
        for (file, end) in ends {
            self.certificate_ends_at.with_label_values(&[file]).set(*end);
        }
    }

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
            certificate_ends_at: gauge_vec(
                r,
                "infra_tls_certificate_expiry_timestamp_seconds",
                "Unix time when a certificate expires.",
                &["file"],
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
