//! Spans that are exported to a collector.

use super::register::counter_vec;
use prometheus::{IntCounter, Registry};

/// The metrics of the export. Clones share their values.
#[derive(Clone)]
pub struct TraceMetrics {
    pub exported: IntCounter,
    /// The queue was full, or the collector did not accept them.
    pub dropped: IntCounter,
}

impl TraceMetrics {
    pub(super) fn new(r: &Registry) -> prometheus::Result<Self> {
        let help = "Spans, exported to the collector or dropped.";
        let spans = counter_vec(r, "infra_trace_spans_total", help, &["result"])?;
        let of = |result| spans.with_label_values(&[result]);
        Ok(Self { exported: of("exported"), dropped: of("dropped") })
    }
}
