//! Jobs in flight and membership.

use super::register::{counter, gauge};
use prometheus::{IntCounter, IntGauge, Registry};

/// The metrics of jobs in flight and of membership.
pub struct JobMetrics {
    pub in_flight: IntGauge,
    /// Jobs that were restored or adopted are included.
    pub accepted: IntCounter,
    pub finished: IntCounter,
    /// A check of the table: accepted − finished − in flight is always 0.
    pub unaccounted: IntGauge,
    /// In seconds. 0: there is none.
    pub oldest: IntGauge,
    pub adopted_nodes: IntCounter,
    pub dead_letters: IntCounter,
    /// While it is 1, this process admits no jobs.
    pub node_id_lost: IntGauge,
    /// In Unix seconds. 0: this node needs no lease, as in `dev`.
    pub lease_ends_at: IntGauge,
}

impl JobMetrics {
    pub(super) fn new(r: &Registry) -> prometheus::Result<Self> {
        Ok(Self {
            in_flight: gauge(r, "infra_jobs_in_flight", "Accepted jobs whose row is not written yet.")?,
            accepted: counter(
                r,
                "infra_jobs_accepted_total",
                "Jobs that entered the table of jobs in flight.",
            )?,
            finished: counter(r, "infra_jobs_finished_total", "Jobs that left the table of jobs in flight.")?,
            unaccounted: gauge(
                r,
                "infra_jobs_unaccounted",
                "Accepted minus finished minus in flight. Not 0: an internal error.",
            )?,
            oldest: gauge(
                r,
                "infra_jobs_oldest_seconds",
                "Age of the oldest job without a result, in seconds.",
            )?,
            adopted_nodes: counter(
                r,
                "infra_nodes_adopted_total",
                "Dead nodes whose jobs this node has adopted.",
            )?,
            dead_letters: counter(
                r,
                "infra_dead_letters_total",
                "Jobs ended because the queue gave them up.",
            )?,
            node_id_lost: gauge(r, "infra_node_id_lost", "1 while another process holds this node's id.")?,
            lease_ends_at: gauge(
                r,
                "infra_node_lease_expires_timestamp_seconds",
                "Unix time when this node's lease lapses.",
            )?,
        })
    }
}
