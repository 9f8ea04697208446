//! The events, and their JSON.

use crate::model::{Execution, FunctionId, JobId, NodeId, Status, UnixMs, rfc3339_ms};
use bytes::Bytes;
use serde::Serialize;

/// The type of an event, as clients see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventType {
    JobAccepted,
    JobFinished,
    JobLost,
    FunctionChanged,
    FunctionDeleted,
    WorkerJoined,
    WorkerLeft,
    NodeJoined,
    NodeLeft,
    /// A node has skipped events.
    Sampled,
}

impl EventType {
    const ALL: [Self; 10] = [
        Self::JobAccepted,
        Self::JobFinished,
        Self::JobLost,
        Self::FunctionChanged,
        Self::FunctionDeleted,
        Self::WorkerJoined,
        Self::WorkerLeft,
        Self::NodeJoined,
        Self::NodeLeft,
        Self::Sampled,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::JobAccepted => "job.accepted",
            Self::JobFinished => "job.finished",
            Self::JobLost => "job.lost",
            Self::FunctionChanged => "function.changed",
            Self::FunctionDeleted => "function.deleted",
            Self::WorkerJoined => "worker.joined",
            Self::WorkerLeft => "worker.left",
            Self::NodeJoined => "node.joined",
            Self::NodeLeft => "node.left",
            Self::Sampled => "sampled",
        }
    }

    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|of| of.name() == name)
    }
}

/// Why a worker or a node has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaveReason {
    /// It reported so itself.
    Stopped,
    /// A worker sends no heartbeats any more.
    Silent,
    /// A node does not renew its lease, and another one has adopted its jobs.
    Adopted,
}

impl LeaveReason {
    fn name(self) -> &'static str {
        match self {
            Self::Stopped => "stopped",
            Self::Silent => "silent",
            Self::Adopted => "adopted",
        }
    }
}

/// Something that has happened.
#[derive(Clone, Debug, PartialEq)]
pub enum FleetEvent {
    JobAccepted {
        id: JobId,
        function: FunctionId,
    },
    JobFinished {
        id: JobId,
        function: FunctionId,
        status: Status,
        duration_ms: f64,
        cold_start: Option<bool>,
    },
    JobLost {
        id: JobId,
        function: FunctionId,
    },
    FunctionChanged {
        function: FunctionId,
        version: u64,
    },
    FunctionDeleted {
        function: FunctionId,
    },
    WorkerJoined {
        worker: String,
    },
    WorkerLeft {
        worker: String,
        reason: LeaveReason,
    },
    NodeJoined {
        node: NodeId,
    },
    NodeLeft {
        node: NodeId,
        reason: LeaveReason,
    },
    /// `kept` of `seen` events of the last second or more were published.
    Sampled {
        kept: u64,
        seen: u64,
    },
}

/// The JSON object of an event. Absent members are left out.
#[derive(Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct EventBody<'a> {
    r#type: &'static str,
    at: String,
    /// The node that has published the event, or that the event is about.
    node: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    function_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    request_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    duration_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cold_start: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    worker_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kept: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    seen: Option<u64>,
}

impl FleetEvent {
    /// The end of a job with this row.
    pub fn job_ended(id: JobId, row: &Execution) -> Self {
        let function = row.function.clone();
        if row.is_lost() {
            return Self::JobLost { id, function };
        }
        let (status, duration_ms, cold_start) = (row.status.clone(), row.duration_ms, row.cold_start);
        Self::JobFinished { id, function, status, duration_ms, cold_start }
    }

    pub fn kind(&self) -> EventType {
        match self {
            Self::JobAccepted { .. } => EventType::JobAccepted,
            Self::JobFinished { .. } => EventType::JobFinished,
            Self::JobLost { .. } => EventType::JobLost,
            Self::FunctionChanged { .. } => EventType::FunctionChanged,
            Self::FunctionDeleted { .. } => EventType::FunctionDeleted,
            Self::WorkerJoined { .. } => EventType::WorkerJoined,
            Self::WorkerLeft { .. } => EventType::WorkerLeft,
            Self::NodeJoined { .. } => EventType::NodeJoined,
            Self::NodeLeft { .. } => EventType::NodeLeft,
            Self::Sampled { .. } => EventType::Sampled,
        }
    }

    /// Whether it is one of the many: a job that was accepted, or that has succeeded. These are skipped
    /// first.
    pub fn is_ordinary(&self) -> bool {
        match self {
            Self::JobAccepted { .. } => true,
            Self::JobFinished { status, .. } => status.is_success(),
            _ => false,
        }
    }

    /// The JSON object. `node`: the node that publishes it.
    pub fn body(&self, at: UnixMs, node: NodeId) -> Bytes {
        let mut body = EventBody {
            r#type: self.kind().name(),
            at: rfc3339_ms(at),
            node: node.to_string(),
            ..EventBody::default()
        };
        match self {
            Self::JobAccepted { id, function } => {
                (body.request_id, body.function_id) = (Some(id.to_string()), Some(function.as_str()));
            }
            Self::JobFinished { id, function, status, duration_ms, cold_start } => {
                (body.request_id, body.function_id) = (Some(id.to_string()), Some(function.as_str()));
                (body.status, body.duration_ms) = (Some(status.as_str()), Some(*duration_ms));
                body.cold_start = *cold_start;
            }
            Self::JobLost { id, function } => {
                (body.request_id, body.function_id) = (Some(id.to_string()), Some(function.as_str()));
                body.status = Some(Status::LOST);
            }
            Self::FunctionChanged { function, version } => {
                (body.function_id, body.version) = (Some(function.as_str()), Some(*version));
            }
            Self::FunctionDeleted { function } => body.function_id = Some(function.as_str()),
            Self::WorkerJoined { worker } => body.worker_id = Some(worker),
            Self::WorkerLeft { worker, reason } => {
                (body.worker_id, body.reason) = (Some(worker.as_str()), Some(reason.name()));
            }
            Self::NodeJoined { node } => body.node = node.to_string(),
            Self::NodeLeft { node, reason } => {
                (body.node, body.reason) = (node.to_string(), Some(reason.name()));
            }
            Self::Sampled { kept, seen } => (body.kept, body.seen) = (Some(*kept), Some(*seen)),
        }
        // Cannot fail: all members are texts and numbers. An infinite number becomes null.
        serde_json::to_vec(&body).unwrap_or_default().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Outcome;
    use serde_json::{Value, json};

    const AT: UnixMs = 1_795_305_600_123;

    fn body(event: &FleetEvent) -> Value {
        serde_json::from_slice(&event.body(AT, NodeId(0xa1))).unwrap()
    }

    #[test]
    fn an_event_is_one_object() {
        let (id, function) = (JobId::new(NodeId(1), AT, 7), FunctionId::parse("f").unwrap());
        let outcome = Outcome::new(r#"{"status":"FAILED","durationMs":1.5,"coldStart":true}"#.into());
        let ended = FleetEvent::job_ended(id, &Execution::of(id, function.clone(), &outcome.fields()));
        let expected = json!({
            "type": "job.finished", "at": "2026-11-22T00:00:00.123Z", "node": "000000a1", "functionId": "f",
            "requestId": id.to_string(), "status": "FAILED", "durationMs": 1.5, "coldStart": true,
        });
        assert_eq!((body(&ended), ended.is_ordinary()), (expected, false));
        let lost = FleetEvent::job_ended(id, &Execution::lost(id, function.clone(), false));
        assert_eq!((&body(&lost)["type"], &body(&lost)["status"]), (&json!("job.lost"), &json!("LOST")));
        let left = FleetEvent::NodeLeft { node: NodeId(2), reason: LeaveReason::Adopted };
        assert_eq!((&body(&left)["node"], &body(&left)["reason"]), (&json!("00000002"), &json!("adopted")));
        let worker = FleetEvent::WorkerJoined { worker: "a\"b".into() };
        assert_eq!(body(&worker)["workerId"], "a\"b");
        assert!(FleetEvent::JobAccepted { id, function }.is_ordinary());
    }

    #[test]
    fn types_have_names() {
        for of in EventType::ALL {
            assert_eq!(EventType::parse(of.name()), Some(of));
        }
        assert_eq!(EventType::parse("job"), None);
    }
}
