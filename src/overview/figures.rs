//! Rates, shares and percentiles, of one node or of all nodes together.

use super::counts::WindowCounts;
use super::windows::NodeWindows;
use crate::metrics::LatencyHistogram;
use serde::Serialize;

/// The figures of the three windows.
#[derive(Debug, PartialEq, Serialize)]
pub struct WindowSet {
    #[serde(rename = "1s")]
    pub second: WindowFigures,
    #[serde(rename = "1m")]
    pub minute: WindowFigures,
    #[serde(rename = "1h")]
    pub hour: WindowFigures,
}

impl WindowSet {
    /// The figures of these nodes together.
    pub fn of(nodes: &[&NodeWindows]) -> Self {
        let of = |window: fn(&NodeWindows) -> &WindowCounts| {
            WindowFigures::of(&nodes.iter().map(|node| window(node)).collect::<Vec<_>>())
        };
        Self { second: of(|node| &node.second), minute: of(|node| &node.minute), hour: of(|node| &node.hour) }
    }
}

/// The figures of one window.
#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct WindowFigures {
    /// The longest time that a node covers. A young process covers less than the name of the window says.
    pub seconds: f64,
    pub accepted_per_s: f64,
    pub finished_per_s: f64,
    /// Finished jobs without the status SUCCESS, 0 to 1. `None`: no job has finished.
    pub job_error_share: Option<f64>,
    pub requests_per_s: f64,
    /// Responses with a status of 500 or more, 0 to 1. `None`: there was no request.
    pub request_error_share: Option<f64>,
    /// Responses 429 and 503.
    pub refused_per_s: f64,
    /// From the acceptance of a job to its result, in milliseconds. `None`: there was no result.
    pub run_ms: Option<Percentiles>,
    /// Times of responses, in milliseconds. `None`: there was no request.
    pub request_ms: Option<Percentiles>,
}

/// Percentiles of times, in milliseconds.
#[derive(Debug, PartialEq, Serialize)]
pub struct Percentiles {
    pub p50: f64,
    pub p95: f64,
    pub p99: f64,
}

impl WindowFigures {
    /// The figures of the same window of several nodes. Rates are added, because the nodes may cover times of
    /// different lengths.
    pub fn of(nodes: &[&WindowCounts]) -> Self {
        let rate = |count: fn(&WindowCounts) -> u64| {
            rounded(nodes.iter().map(|node| per_second(count(node), node.ms)).sum())
        };
        let sum = |count: fn(&WindowCounts) -> u64| {
            nodes.iter().map(|node| count(node)).fold(0, u64::saturating_add)
        };
        let (mut run_times, mut request_times) = (LatencyHistogram::default(), LatencyHistogram::default());
        for node in nodes {
            run_times.merge(&node.run_times);
            request_times.merge(&node.request_times);
        }
        let longest = nodes.iter().map(|node| node.ms).max().unwrap_or(0);
        Self {
            seconds: rounded(longest as f64 / 1000.0),
            accepted_per_s: rate(|node| node.accepted),
            finished_per_s: rate(|node| node.finished),
            job_error_share: share(sum(|node| node.failed), sum(|node| node.finished)),
            requests_per_s: rate(|node| node.request_times.count()),
            request_error_share: share(sum(|node| node.request_errors), request_times.count()),
            refused_per_s: rate(|node| node.refused),
            run_ms: Percentiles::of(&run_times),
            request_ms: Percentiles::of(&request_times),
        }
    }
}

impl Percentiles {
    fn of(times: &LatencyHistogram) -> Option<Self> {
        let [p50, p95, p99] = [0.5, 0.95, 0.99].map(|part| times.percentile_ms(part).map(rounded));
        Some(Self { p50: p50?, p95: p95?, p99: p99? })
    }
}

fn per_second(count: u64, ms: u64) -> f64 {
    if ms == 0 { 0.0 } else { count as f64 * 1000.0 / ms as f64 }
}

/// Counts are read one after the other, so a part may be larger than the whole for a moment.
fn share(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| rounded((part as f64 / whole as f64).min(1.0)))
}

/// With three decimals.
fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::LoadRecorder;
    use std::time::Duration;

    fn counts(ms: u64, times_ms: impl IntoIterator<Item = u64>, failed: u64) -> WindowCounts {
        let load = LoadRecorder::default();
        times_ms.into_iter().for_each(|ms| load.run(Duration::from_millis(ms), true));
        let run_times = load.take().runs;
        let finished = run_times.count();
        WindowCounts { ms, accepted: finished, finished, failed, run_times, ..WindowCounts::default() }
    }

    #[test]
    fn figures_of_nodes_are_combined() {
        let (fast, slow) = (counts(60_000, vec![10; 90], 9), counts(5_000, vec![1_000; 10], 1));
        let both = WindowFigures::of(&[&fast, &slow]);
        assert_eq!((both.seconds, both.accepted_per_s, both.finished_per_s), (60.0, 3.5, 3.5));
        assert_eq!(both.job_error_share, Some(0.1));
        assert_eq!((both.requests_per_s, both.request_error_share, both.request_ms), (0.0, None, None));
        let Percentiles { p50, p95, p99 } = both.run_ms.unwrap();
        for (found, expected) in [(p50, 10.0), (p95, 1_000.0), (p99, 1_000.0)] {
            assert!((found - expected).abs() <= expected / 32.0, "{found} instead of {expected}");
        }
        let other_order = WindowFigures::of(&[&slow, &fast]);
        assert_eq!(other_order, WindowFigures::of(&[&fast, &slow]));
    }

    #[test]
    fn nothing_has_no_shares_and_no_percentiles() {
        for nodes in [vec![], vec![WindowCounts::default()], vec![counts(1_000, [], 0)]] {
            let figures = WindowFigures::of(&nodes.iter().collect::<Vec<_>>());
            assert_eq!((figures.accepted_per_s, figures.job_error_share, figures.run_ms), (0.0, None, None));
        }
    }
}
