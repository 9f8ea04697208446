//! Which traces are recorded: the samplers of the OpenTelemetry specification.

use super::recorder::{new_span_id, new_trace_id};
use crate::config::TraceSampling;
use crate::model::TraceContext;

/// A new span, below `parent` if there is one. `None`: its trace is not recorded.
pub fn recorded(sampling: TraceSampling, parent: Option<TraceContext>) -> Option<TraceContext> {
    let is_sampled = match parent.filter(|_| sampling.follows_parent) {
        Some(parent) => parent.is_sampled(),
        None => {
            let trace_id = parent.map_or_else(new_trace_id, |parent| parent.trace_id());
            return is_in_share(sampling.threshold, trace_id).then(|| child(trace_id, parent));
        }
    };
    parent.filter(|_| is_sampled).map(|parent| parent.recorded_child(new_span_id()))
}

fn child(trace_id: u128, parent: Option<TraceContext>) -> TraceContext {
    let id = new_span_id();
    parent.map_or_else(|| TraceContext::new(trace_id, id, true), |parent| parent.recorded_child(id))
}

/// The rule of the OpenTelemetry SDK for Rust, so that all services decide alike about a trace.
fn is_in_share(threshold: u64, trace_id: u128) -> bool {
    (trace_id as u64) >> 1 < threshold
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::SAMPLING_RANGE;

    #[test]
    fn parents_and_shares_decide() {
        let half = SAMPLING_RANGE / 2;
        let parent = |low: u64, is_sampled| Some(TraceContext::new(1 << 64 | u128::from(low), 7, is_sampled));
        for (follows_parent, threshold, parent, is_recorded) in [
            (true, 0, parent(1, true), true),
            (true, SAMPLING_RANGE, parent(1, false), false),
            (true, SAMPLING_RANGE, None, true),
            (true, 0, None, false),
            (false, 0, parent(1, true), false),
            (false, SAMPLING_RANGE, parent(u64::MAX, false), true),
            (false, half, parent(u64::MAX / 2, false), true),
            (false, half, parent(u64::MAX / 2 + 1, true), false),
        ] {
            let span = recorded(TraceSampling { follows_parent, threshold }, parent);
            assert_eq!(span.is_some(), is_recorded, "{follows_parent} {threshold} {parent:?}");
            if let Some(span) = span {
                assert!(span.is_sampled() && span.span_id() != 0 && span.trace_id() != 0);
                assert!(parent.is_none_or(|parent| parent.trace_id() == span.trace_id()));
                assert_ne!(Some(span.span_id()), parent.map(|parent| parent.span_id()));
            }
        }
    }
}
