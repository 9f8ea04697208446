//! What a node writes once a second, as JSON.
//!
//! Nodes of several versions run beside each other during an update. So unknown members are ignored, and
//! missing ones have defaults. Members keep their meaning; a new meaning gets a new name.

use super::windows::NodeWindows;
use crate::model::UnixMs;
use serde::{Deserialize, Serialize};

/// The summary of a node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeSummary {
    /// The version of its program.
    pub version: String,
    /// The start of its process, by its clock.
    pub started_at: UnixMs,
    /// The age of its process, in seconds.
    pub uptime_s: u64,
    /// `starting`, `ready`, `draining` or `closing`.
    pub phase: String,
    pub gauges: NodeGauges,
    pub windows: NodeWindows,
    /// The identities that are close to a limit.
    pub limits: Vec<LimitLevel>,
}

/// The state of a node now.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeGauges {
    pub jobs: JobGauges,
    pub rows: RowGauges,
    /// Open client connections.
    pub connections: u64,
    /// New jobs are rejected, because nothing can be sent to the queue.
    pub breaker_open: bool,
    /// Jobs per thousand that are shed.
    pub shed_permille: u64,
    pub subscriptions: ReceivingSubscriptions,
    /// The node may admit jobs.
    pub lease_held: bool,
}

/// Jobs of a node, or of all nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct JobGauges {
    /// Accepted jobs whose row is not written yet.
    pub in_flight: u64,
    /// Those that wait to be sent or retried.
    pub waiting: u64,
    /// Batches being sent.
    pub sends_in_flight: u64,
    /// Requests that wait for a result.
    pub waiters: u64,
    /// The age of the oldest job without a result, in milliseconds.
    pub oldest_ms: Option<u64>,
}

/// Rows for the log table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RowGauges {
    /// In memory.
    pub waiting: u64,
    /// On the disk.
    pub spilled: u64,
}

/// Whether the subscriptions of a node receive what others publish.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ReceivingSubscriptions {
    pub results: bool,
    pub changes: bool,
}

/// An identity that is close to a limit.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LimitLevel {
    /// The name of the limit.
    pub limit: String,
    /// What it counts by: `key`, `ip`, `function` or `global`.
    pub identity: String,
    /// The name of the key, the address, or the id of the function.
    pub name: String,
    /// The used part of the burst, 0.8 to 1.
    pub level: f64,
    /// The time since then, in milliseconds.
    pub age_ms: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::SUMMARY_BYTES_MAX;
    use crate::limiter::NEAR_LIMITS_MAX;
    use crate::metrics::LoadRecorder;
    use crate::overview::counts::WindowCounts;
    use serde_json::{Value, json};
    use std::time::Duration;

    /// A summary in which every member has a value, and every bucket a large count.
    fn full() -> NodeSummary {
        let load = LoadRecorder::default();
        for us in (0..40_u32).flat_map(|bits| (16..32_u64).map(move |us| us << bits)) {
            load.request(200, Duration::from_micros(us));
            load.run(Duration::from_micros(us), true);
        }
        let taken = load.take();
        let mut counts = WindowCounts {
            ms: 1_000,
            accepted: 1,
            finished: 2,
            failed: 1,
            request_errors: 3,
            refused: 4,
            run_times: taken.runs,
            request_times: taken.requests,
        };
        for _ in 0..30 {
            let same = counts.clone();
            counts.add(&same);
        }
        let level = LimitLevel {
            limit: "l".repeat(64),
            identity: "function".to_owned(),
            name: "n".repeat(128),
            level: 0.875,
            age_ms: 59_999,
        };
        NodeSummary {
            version: "10.20.30".to_owned(),
            started_at: 1_795_305_600_000,
            uptime_s: 31_536_000,
            phase: "draining".to_owned(),
            gauges: NodeGauges {
                jobs: JobGauges {
                    in_flight: 1,
                    waiting: 2,
                    sends_in_flight: 3,
                    waiters: 4,
                    oldest_ms: Some(5),
                },
                rows: RowGauges { waiting: 6, spilled: 7 },
                connections: 8,
                breaker_open: true,
                shed_permille: 9,
                subscriptions: ReceivingSubscriptions { results: true, changes: true },
                lease_held: true,
            },
            windows: NodeWindows { second: counts.clone(), minute: counts.clone(), hour: counts },
            limits: vec![level; NEAR_LIMITS_MAX],
        }
    }

    #[test]
    fn a_summary_is_restored_from_its_text_and_bounded() {
        for summary in [NodeSummary::default(), full()] {
            let text = serde_json::to_vec(&summary).unwrap();
            assert!(text.len() <= SUMMARY_BYTES_MAX, "{} bytes", text.len());
            assert_eq!(serde_json::from_slice::<NodeSummary>(&text).unwrap(), summary);
        }
    }

    #[test]
    fn summaries_of_other_versions_are_read() {
        let mut later = serde_json::to_value(full()).unwrap();
        for pointer in ["", "/gauges", "/gauges/jobs", "/windows", "/windows/1m", "/limits/0"] {
            let object = later.pointer_mut(pointer).and_then(Value::as_object_mut).unwrap();
            object.insert("ofALaterVersion".to_owned(), json!({ "x": [1] }));
        }
        assert_eq!(serde_json::from_value::<NodeSummary>(later).unwrap(), full());
        let earlier = serde_json::from_str::<NodeSummary>(r#"{"gauges":{"jobs":{"inFlight":3}}}"#).unwrap();
        assert_eq!(earlier.gauges.jobs, JobGauges { in_flight: 3, ..JobGauges::default() });
    }
}
