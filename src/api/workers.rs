//! `/worker/heartbeat`, `/workers`, `/worker/status` and `/system/status`: the workers, the same on every node.

use super::{ApiError, Call, Reply, object};
use crate::backend::{WorkerRegistry, WorkerSeen};
use crate::model::{UnixMs, now_ms, rfc3339_ms};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Number, Value, json};
use std::sync::Arc;
use std::time::Duration;

/// Longest heartbeat, in bytes.
pub const BODY_BYTES_MAX: usize = 16 << 10;
/// A worker that was not heard of for longer may hang.
const HEALTHY_WITHIN: Duration = Duration::from_secs(30);
/// What a worker calls itself when it is not well, in small letters.
const NOT_WELL: [&str; 6] = ["unhealthy", "error", "offline", "stopped", "stopping", "draining"];

const ID_BYTES_MAX: usize = 128;
const TEXT_CHARS_MAX: usize = 64;
const POOLS_BYTES_MAX: usize = 8 << 10;
const JOBS_MAX: u64 = 1_000_000;
const UPTIME_S_MAX: f64 = 1e10;

pub struct Workers {
    registry: Arc<dyn WorkerRegistry>,
}

impl Workers {
    pub fn new(registry: Arc<dyn WorkerRegistry>) -> Self {
        Self { registry }
    }

    pub async fn heartbeat(&self, call: &Call) -> Result<Reply, ApiError> {
        if !call.headers.is_json() {
            return Err(ApiError::NotJson);
        }
        let state = State::parse(&call.body)?;
        let text =
            serde_json::to_string(&state).map_err(|_| ApiError::invalid("the heartbeat is no JSON"))?;
        let known = self.registry.put(&state.worker_id, &text).await;
        let known = known.map_err(|e| ApiError::backend("the worker registry", &e))?;
        if known { Ok(Reply::json(StatusCode::OK, r#"{"ok":true}"#)) } else { Err(ApiError::TooManyWorkers) }
    }

    pub async fn list(&self) -> Result<Reply, ApiError> {
        let workers = self.workers().await?;
        let body = json!({
            "totalWorkers": workers.len(),
            "healthyWorkers": workers.iter().filter(|worker| worker.is_healthy()).count(),
            "workers": workers.iter().map(Worker::shown).collect::<Vec<_>>(),
        });
        Ok(Reply::value(StatusCode::OK, &body))
    }

    pub async fn system_status(&self) -> Result<Reply, ApiError> {
        let workers = self.workers().await?;
        let status = if workers.is_empty() {
            let lone = self.registry.lone_status().await;
            let lone = lone.map_err(|e| ApiError::backend("the worker registry", &e))?;
            lone.and_then(|json| lone_status(&json)).unwrap_or_else(no_workers)
        } else {
            summed(&workers)
        };
        Ok(Reply::value(StatusCode::OK, &status))
    }

    async fn workers(&self) -> Result<Vec<Worker>, ApiError> {
        let seen = self.registry.all().await.map_err(|e| ApiError::backend("the worker registry", &e))?;
        let now = now_ms();
        // What cannot be read was not written by us.
        Ok(seen.iter().filter_map(|seen| Worker::of(seen, now)).collect())
    }
}

/// What a worker says of itself. Members nobody knows are passed over.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct State {
    worker_id: String,
    status: Option<String>,
    pools: Option<Map<String, Value>>,
    #[serde(default, deserialize_with = "object::whole")]
    active_jobs: Option<u64>,
    uptime_seconds: Option<f64>,
    timestamp: Option<Timestamp>,
}

/// By whatever clock and in whatever form the worker has it.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum Timestamp {
    Text(String),
    Number(Number),
}

impl State {
    fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let state: Self = object::parse(body, |member| match member {
            "workerId" | "status" => Some("a string"),
            "pools" => Some("an object"),
            "activeJobs" => Some("a whole number"),
            "uptimeSeconds" => Some("a number"),
            "timestamp" => Some("a string or a number"),
            _ => None,
        })?;
        let fits = |name: &str, fits: bool, wanted: &str| {
            fits.then_some(()).ok_or_else(|| ApiError::invalid(format!("`{name}` must {wanted}")))
        };
        let id = state.worker_id.as_bytes();
        let is_id = (1..=ID_BYTES_MAX).contains(&id.len()) && id.iter().all(u8::is_ascii_graphic);
        fits("workerId", is_id, &format!("have 1 to {ID_BYTES_MAX} visible ASCII characters"))?;
        let short = |text: &String| text.chars().count() <= TEXT_CHARS_MAX;
        let is_short = state.status.as_ref().is_none_or(short);
        fits("status", is_short, &format!("have at most {TEXT_CHARS_MAX} characters"))?;
        let pools = state.pools.as_ref().map_or(0, |pools| Value::from(pools.clone()).to_string().len());
        fits("pools", pools <= POOLS_BYTES_MAX, &format!("have at most {POOLS_BYTES_MAX} bytes"))?;
        let jobs = state.active_jobs.is_none_or(|jobs| jobs <= JOBS_MAX);
        fits("activeJobs", jobs, &format!("be at most {JOBS_MAX}"))?;
        let uptime = state.uptime_seconds.is_none_or(|s| (0.0..=UPTIME_S_MAX).contains(&s));
        fits("uptimeSeconds", uptime, &format!("be from 0 to {UPTIME_S_MAX}"))?;
        let timestamp = match &state.timestamp {
            Some(Timestamp::Text(text)) => short(text),
            _ => true,
        };
        fits("timestamp", timestamp, &format!("have at most {TEXT_CHARS_MAX} characters"))?;
        Ok(state)
    }
}

/// A worker as it is known now.
struct Worker {
    state: State,
    age: Duration,
    last_seen: String,
}

impl Worker {
    fn of(seen: &WorkerSeen, now: UnixMs) -> Option<Self> {
        let state = serde_json::from_slice(&seen.state).ok()?;
        let age_ms = u64::try_from(seen.age.as_millis()).unwrap_or(u64::MAX);
        Some(Self { state, age: seen.age, last_seen: rfc3339_ms(now.saturating_sub(age_ms)) })
    }

    fn status(&self) -> &str {
        self.state.status.as_deref().unwrap_or("healthy")
    }

    fn is_healthy(&self) -> bool {
        self.age <= HEALTHY_WITHIN && !NOT_WELL.contains(&self.status().to_ascii_lowercase().as_str())
    }

    fn shown(&self) -> Value {
        let state = &self.state;
        json!({
            "workerId": state.worker_id,
            "status": self.status(),
            "pools": state.pools.as_ref().unwrap_or(&Map::new()),
            "activeJobs": state.active_jobs.unwrap_or(0),
            "uptimeSeconds": state.uptime_seconds.unwrap_or(0.0),
            "timestamp": state.timestamp.as_ref().map_or_else(|| json!(self.last_seen), |at| json!(at)),
            "lastSeen": self.last_seen,
            "healthy": self.is_healthy(),
        })
    }
}

fn status_of(status: &str, count: usize, jobs: u64, pools: Map<String, Value>, uptime_s: f64) -> Value {
    json!({
        "status": status,
        "worker_count": count,
        "active_jobs": jobs,
        "pools": pools,
        "uptime_seconds": uptime_s,
        "timestamp": rfc3339_ms(now_ms()),
    })
}

fn no_workers() -> Value {
    status_of("offline", 0, 0, Map::new(), 0.0)
}

/// The healthy workers as one.
fn summed(workers: &[Worker]) -> Value {
    let healthy: Vec<&Worker> = workers.iter().filter(|worker| worker.is_healthy()).collect();
    let jobs = healthy.iter().filter_map(|worker| worker.state.active_jobs).sum();
    let mut pools = Map::new();
    for of_worker in healthy.iter().filter_map(|worker| worker.state.pools.as_ref()) {
        merge(&mut pools, of_worker);
    }
    let uptime = healthy.iter().filter_map(|worker| worker.state.uptime_seconds).fold(0.0, f64::max);
    let status = if healthy.is_empty() { "degraded" } else { "healthy" };
    status_of(status, healthy.len(), jobs, pools, uptime)
}

/// Numbers add up, objects are merged by name, and of anything else the later one is taken.
fn merge(into: &mut Map<String, Value>, from: &Map<String, Value>) {
    for (name, value) in from {
        match (into.get_mut(name), value) {
            (Some(Value::Object(into)), Value::Object(from)) => merge(into, from),
            (Some(sum @ Value::Number(_)), Value::Number(n)) => *sum = added(sum, n),
            _ => {
                into.insert(name.clone(), value.clone());
            }
        }
    }
}

/// Whole as long as both are.
fn added(one: &Value, other: &Number) -> Value {
    let whole = one.as_i64().zip(other.as_i64()).and_then(|(a, b)| a.checked_add(b));
    whole.map_or_else(|| json!(one.as_f64().unwrap_or(0.0) + other.as_f64().unwrap_or(0.0)), Value::from)
}

/// What a lone worker says, with the six members that clients know and no others.
fn lone_status(json: &[u8]) -> Option<Value> {
    let said: Map<String, Value> = serde_json::from_slice(json).ok()?;
    let mut status = status_of("healthy", 1, 0, Map::new(), 0.0);
    for (name, member) in status.as_object_mut()? {
        let Some(value) = said.get(name) else { continue };
        let fits = match name.as_str() {
            "status" => value.is_string(),
            "pools" => value.is_object(),
            "timestamp" => value.is_string() || value.is_number(),
            "uptime_seconds" => value.as_f64().is_some_and(|s| s >= 0.0),
            _ => value.is_u64(),
        };
        if fits {
            member.clone_from(value);
        }
    }
    Some(status)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heartbeats_are_checked() {
        let full = r#"{"workerId":"w","status":"healthy","pools":{"python":{"warm":2}},"activeJobs":3,"uptimeSeconds":1.5,
            "timestamp":"2026-11-22T00:00:00Z","other":[1]}"#;
        let state = State::parse(full.as_bytes()).unwrap();
        assert_eq!((state.worker_id.as_str(), state.active_jobs), ("w", Some(3)));
        assert!(!serde_json::to_string(&state).unwrap().contains("other"));
        for good in [
            r#"{"workerId":"w"}"#,
            r#"{"workerId":"w","status":null,"pools":null,"activeJobs":null,"uptimeSeconds":null,"timestamp":null}"#,
            r#"{"workerId":"w","activeJobs":7.0}"#,
            r#"{"workerId":"w","timestamp":1795305600.5,"activeJobs":1000000,"uptimeSeconds":10000000000}"#,
        ] {
            assert!(State::parse(good.as_bytes()).is_ok(), "{good}");
        }
        let deep = format!(r#"{{"workerId":"w","pools":{}1{}}}"#, "[".repeat(5000), "]".repeat(5000));
        // What is passed over is walked without recursion.
        let deep_other = format!(r#"{{"workerId":"w","x":{}1{}}}"#, "[".repeat(5000), "]".repeat(5000));
        assert!(State::parse(deep_other.as_bytes()).is_ok());
        let long = format!(r#"{{"workerId":"w","status":"{}"}}"#, "s".repeat(65));
        let pools = format!(r#"{{"workerId":"w","pools":{{"a":"{}"}}}}"#, "p".repeat(8200));
        for (bad, told) in [
            ("", "object"),
            ("[]", "object"),
            ("{}", "workerId"),
            (r#"{"workerId":7}"#, "`workerId`"),
            (r#"{"workerId":""}"#, "`workerId`"),
            (r#"{"workerId":"a b"}"#, "`workerId`"),
            (r#"{"workerId":"\ud800"}"#, "`workerId`"),
            (r#"{"workerId":"w","workerId":"w"}"#, "workerId"),
            (r#"{"workerId":"w","activeJobs":-1}"#, "`activeJobs`"),
            (r#"{"workerId":"w","activeJobs":1000001}"#, "`activeJobs`"),
            (r#"{"workerId":"w","activeJobs":1.5}"#, "`activeJobs`"),
            (r#"{"workerId":"w","uptimeSeconds":-0.5}"#, "`uptimeSeconds`"),
            (r#"{"workerId":"w","uptimeSeconds":"1"}"#, "`uptimeSeconds`"),
            (r#"{"workerId":"w","pools":[]}"#, "`pools`"),
            (r#"{"workerId":"w","timestamp":true}"#, "`timestamp`"),
            (r#"{"workerId":"w"}{"#, ""),
            (&deep, "`pools`"),
            (&long, "`status`"),
            (&pools, "`pools`"),
        ] {
            let detail = ApiError::refusal(State::parse(bad.as_bytes()));
            assert!(detail.contains(told), "{bad:.60}: {detail}");
        }
    }

    fn worker(state: &str, age_s: u64) -> Worker {
        let seen = WorkerSeen { state: state.to_owned().into(), age: Duration::from_secs(age_s) };
        Worker::of(&seen, 1_795_305_600_000).unwrap()
    }

    #[test]
    fn the_healthy_add_up() {
        let workers = [
            worker(
                r#"{"workerId":"a","pools":{"python":{"warm":1,"kind":"x"},"go":2},"activeJobs":1,"uptimeSeconds":5}"#,
                0,
            ),
            worker(
                r#"{"workerId":"b","pools":{"python":{"warm":2},"go":0.5},"activeJobs":2,"uptimeSeconds":9}"#,
                30,
            ),
            worker(r#"{"workerId":"c","activeJobs":4}"#, 31),
            worker(r#"{"workerId":"d","status":"Draining","activeJobs":8}"#, 0),
        ];
        let mut sums = summed(&workers);
        sums.as_object_mut().unwrap().remove("timestamp");
        let expected = json!({
            "status": "healthy", "worker_count": 2, "active_jobs": 3, "uptime_seconds": 9.0,
            "pools": { "python": { "warm": 3, "kind": "x" }, "go": 2.5 },
        });
        assert_eq!(sums, expected);
        assert_eq!(summed(&workers[2..])["status"], "degraded");
        let shown = workers[2].shown();
        assert_eq!(
            (&shown["healthy"], &shown["lastSeen"]),
            (&json!(false), &json!("2026-11-21T23:59:29.000Z"))
        );
        assert_eq!((&shown["status"], &shown["timestamp"]), (&json!("healthy"), &shown["lastSeen"]));
    }

    #[test]
    fn a_lone_worker_is_believed_member_by_member() {
        let said =
            br#"{"status":"healthy","worker_count":3,"active_jobs":"x","pools":[],"timestamp":7,"extra":1}"#;
        let status = lone_status(said).unwrap();
        let expected = json!({ "status": "healthy", "worker_count": 3, "active_jobs": 0, "pools": {},
            "uptime_seconds": 0.0, "timestamp": 7 });
        assert_eq!(status, expected);
        for odd in ["", "[]", "7"] {
            assert_eq!(lone_status(odd.as_bytes()), None);
        }
    }
}
