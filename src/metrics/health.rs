//! Health, the subscriptions of this node and its log.

use super::register::{counter_vec, gauge, gauge_vec};
use prometheus::{IntCounterVec, IntGauge, IntGaugeVec, Registry};

/// The metrics of the subscriptions of this node, by `subscription`: `results`, `changes`.
pub struct SubscriptionMetrics {
    lost: IntGaugeVec,
    beat_off: IntGaugeVec,
    missed: IntCounterVec,
}

impl SubscriptionMetrics {
    pub(super) fn new(r: &Registry) -> prometheus::Result<Self> {
        let labels = &["subscription"];
        Ok(Self {
            lost: gauge_vec(
                r,
                "infra_subscription_lost",
                "1 while the subscription receives nothing.",
                labels,
            )?,
            beat_off: gauge_vec(
                r,
                "infra_subscription_beat_off",
                "1 while the ACL of Redis denies the beats.",
                labels,
            )?,
            missed: counter_vec(
                r,
                "infra_subscription_beats_missed_total",
                "Reconnects after missed beats.",
                labels,
            )?,
        })
    }

    /// Sets the state of a subscription, and counts a reconnect after missed beats.
    pub fn note(&self, subscription: &str, is_receiving: bool, is_beat_off: bool, has_missed_beats: bool) {
        self.lost.with_label_values(&[subscription]).set((!is_receiving).into());
        self.beat_off.with_label_values(&[subscription]).set(is_beat_off.into());
        // The series exists from the first state on.
        self.missed.with_label_values(&[subscription]).inc_by(has_missed_beats.into());
    }

    pub fn is_receiving(&self, subscription: &str) -> bool {
        self.lost.with_label_values(&[subscription]).get() == 0
    }

    pub fn is_beat_off(&self, subscription: &str) -> bool {
        self.beat_off.with_label_values(&[subscription]).get() != 0
    }
}

pub fn healthy(r: &Registry) -> prometheus::Result<IntGaugeVec> {
    let help = "1 if the last health check of this part succeeded, else 0.";
    gauge_vec(r, "infra_healthy", help, &["check"])
}

pub fn log_lines_dropped(r: &Registry) -> prometheus::Result<IntGauge> {
    gauge(r, "infra_log_lines_dropped", "Log lines lost since the start.")
}
