//! `/worker/heartbeat`, `/workers`, `/worker/status` and `/system/status`: the workers. Every node answers
//! the same.

use super::call::Call;
use super::number::number;
use super::object;
use super::problem::ApiError;
use super::reply::Reply;
use crate::audit::{Event, RecentEvents};
use crate::backend::{HEALTHY_WITHIN, HeartbeatOutcome, WorkerRecord, WorkerRegistry, reports_well};
use crate::events::{EventBus, FleetEvent, LeaveReason};
use crate::model::{UnixMs, now_ms, parse_rfc3339_ms};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Number, Value, json};
use std::sync::Arc;
use std::time::Duration;

/// Maximum length of a heartbeat, in bytes.
pub const BODY_BYTES_MAX: usize = 16 << 10;

/// The pools of `/system/status`. Clients expect all four; others are not counted.
const POOLS: [&str; 4] = ["python", "nodejs", "cpp", "go"];

// Bounds of the members of a heartbeat.
const ID_BYTES_MAX: usize = 128;
const TEXT_CHARS_MAX: usize = 64;
const POOLS_BYTES_MAX: usize = 8 << 10;
const JOBS_MAX: u64 = 1_000_000;
const UPTIME_S_MAX: f64 = 1e10;

/// The handlers of workers.
#[derive(Clone)]
pub struct Workers {
    registry: Arc<dyn WorkerRegistry>,
    tail: RecentEvents,
    events: EventBus,
}

impl Workers {
    pub fn new(registry: Arc<dyn WorkerRegistry>, tail: RecentEvents, events: EventBus) -> Self {
        Self { registry, tail, events }
    }

    /// Records the state of a worker.
    ///
    /// # Errors
    /// `TooManyWorkers` for a new worker beyond the maximum.
    pub async fn heartbeat(&self, call: &Call) -> Result<Reply, ApiError> {
        if !call.headers.is_json() {
            return Err(ApiError::NotJson);
        }
        let state = Heartbeat::parse(&call.body)?;
        let text =
            serde_json::to_string(&state).map_err(|_| ApiError::invalid("the heartbeat is not JSON"))?;
        let stored = self.registry.put(&state.worker_id, &text).await;
        match stored.map_err(|e| ApiError::backend("the worker registry", &e))? {
            HeartbeatOutcome::Stored { before } => self.report(&state, before.as_ref()),
            HeartbeatOutcome::TooMany => return Err(ApiError::TooManyWorkers),
        }
        self.tail.note(now_ms(), || Event::Heartbeat {
            worker: state.worker_id,
            active_jobs: state.active_jobs.unwrap_or(0),
            pools: state.pools.unwrap_or_default(),
        });
        Ok(Reply::json(StatusCode::OK, r#"{"ok":true}"#))
    }

    /// Reports that a worker has come or gone. The store says what a heartbeat replaces, so of all nodes one
    /// reports it. A worker that became silent is reported by the loop of events.
    fn report(&self, state: &Heartbeat, before: Option<&WorkerRecord>) {
        if !self.events.is_watched() {
            return;
        }
        let was_there = before.and_then(KnownWorker::of).is_some_and(|before| before.is_healthy());
        let is_there = reports_well(state.status());
        let worker = || state.worker_id.clone();
        match (was_there, is_there) {
            (false, true) => self.events.report(|| FleetEvent::WorkerJoined { worker: worker() }),
            (true, false) => {
                let reason = LeaveReason::Stopped;
                self.events.report(|| FleetEvent::WorkerLeft { worker: worker(), reason });
            }
            _ => {}
        }
    }

    /// All known workers with their health.
    pub async fn list(&self) -> Result<Reply, ApiError> {
        let workers = self.workers().await?;
        let body = json!({
            "totalWorkers": workers.len(),
            "healthyWorkers": workers.iter().filter(|worker| worker.is_healthy()).count(),
            "workers": workers.iter().map(KnownWorker::shown).collect::<Vec<_>>(),
        });
        Ok(Reply::value(StatusCode::OK, &body))
    }

    /// Sums over the healthy workers, or the status of a lone worker, or `offline`.
    pub async fn system_status(&self) -> Result<Reply, ApiError> {
        let workers = self.workers().await?;
        Ok(Reply::value(StatusCode::OK, &self.status_of(&workers).await?))
    }

    /// The same in the form of the overview, and the number of all known workers.
    pub async fn in_short(&self) -> Result<Value, ApiError> {
        let workers = self.workers().await?;
        let mut status = self.status_of(&workers).await?;
        let healthy = status.get("worker_count").and_then(Value::as_u64).unwrap_or(0);
        let mut part = |name: &str| status.get_mut(name).map(Value::take);
        Ok(json!({
            "status": part("status"),
            "total": healthy.max(workers.len() as u64),
            "healthy": healthy,
            "activeJobs": part("active_jobs"),
            "pools": part("pools"),
        }))
    }

    async fn status_of(&self, workers: &[KnownWorker]) -> Result<Value, ApiError> {
        let healthy: Vec<&KnownWorker> = workers.iter().filter(|worker| worker.is_healthy()).collect();
        if !healthy.is_empty() {
            return Ok(summed(&healthy));
        }
        let lone = self.registry.lone_status().await;
        let lone = lone.map_err(|e| ApiError::backend("the worker registry", &e))?;
        Ok(lone.and_then(|json| lone_status(&json)).unwrap_or_else(offline))
    }

    async fn workers(&self) -> Result<Vec<KnownWorker>, ApiError> {
        let seen = self.registry.all().await.map_err(|e| ApiError::backend("the worker registry", &e))?;
        // Entries that are not heartbeats were written by another program.
        Ok(seen.iter().filter_map(KnownWorker::of).collect())
    }
}

/// The state that a worker reports. Unknown members are ignored.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct Heartbeat {
    worker_id: String,
    status: Option<String>,
    pools: Option<Map<String, Value>>,
    #[serde(default, deserialize_with = "object::whole")]
    active_jobs: Option<u64>,
    uptime_seconds: Option<f64>,
    timestamp: Option<Timestamp>,
}

/// A time by the clock and in the format of the worker.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum Timestamp {
    Text(String),
    Number(Number),
}

impl Heartbeat {
    fn status(&self) -> &str {
        self.status.as_deref().unwrap_or("healthy")
    }

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

/// A known worker.
struct KnownWorker {
    state: Heartbeat,
    age: Duration,
    last_seen: UnixMs,
}

impl KnownWorker {
    fn of(seen: &WorkerRecord) -> Option<Self> {
        let state = serde_json::from_slice(&seen.state).ok()?;
        Some(Self { state, age: seen.age, last_seen: seen.at })
    }

    fn is_healthy(&self) -> bool {
        self.age <= HEALTHY_WITHIN && reports_well(self.state.status())
    }

    fn shown(&self) -> Value {
        let state = &self.state;
        json!({
            "workerId": state.worker_id,
            "status": state.status(),
            "pools": state.pools.as_ref().unwrap_or(&Map::new()),
            "activeJobs": state.active_jobs.unwrap_or(0),
            "uptimeSeconds": number(state.uptime_seconds.unwrap_or(0.0)),
            "timestamp": state.timestamp.as_ref().map_or_else(|| seconds(self.last_seen), |at| json!(at)),
            "lastSeen": self.last_seen,
            "receivedAt": self.last_seen,
            "healthStatus": if self.is_healthy() { "healthy" } else { "unhealthy" },
            "lastSeenAgo": format!("{}s", self.age.as_secs_f64().round()),
        })
    }
}

/// Epoch seconds with a fraction, as clients expect.
fn seconds(at: UnixMs) -> Value {
    number(at as f64 / 1000.0)
}

/// The value, if it is a number of at least 0.
fn amount(value: Option<&Value>) -> Option<&Number> {
    value.and_then(Value::as_number).filter(|n| n.as_f64().is_some_and(|n| n >= 0.0))
}

/// Every pool of [`POOLS`], summed over the workers. A value that is not a number counts as 0.
fn pools_of(workers: &[&Map<String, Value>]) -> Value {
    let sum = |name: &str| {
        let said = workers.iter().filter_map(|pools| amount(pools.get(name)));
        said.fold(json!(0), |sum, n| added(&sum, n))
    };
    Value::Object(POOLS.iter().map(|name| ((*name).to_owned(), sum(name))).collect())
}

/// The sum of two numbers. It is an integer if both are.
fn added(one: &Value, other: &Number) -> Value {
    let whole = one.as_u64().zip(other.as_u64()).and_then(|(a, b)| a.checked_add(b));
    let sum = || one.as_f64().unwrap_or(0.0) + other.as_f64().unwrap_or(0.0);
    whole.map_or_else(|| number(sum().min(f64::MAX)), Value::from)
}

/// The status without any worker.
fn offline() -> Value {
    json!({ "pools": pools_of(&[]), "active_jobs": 0, "status": "offline" })
}

fn online(count: u64, jobs: u64, pools: &Value, uptime_s: f64, timestamp: &Value) -> Value {
    json!({
        "status": "online",
        "worker_count": count,
        "active_jobs": jobs,
        "pools": pools,
        "uptime_seconds": number(uptime_s),
        "timestamp": timestamp,
    })
}

/// The status of the healthy workers: sums, and the longest uptime.
fn summed(healthy: &[&KnownWorker]) -> Value {
    let jobs = healthy.iter().filter_map(|worker| worker.state.active_jobs).sum();
    let pools: Vec<_> = healthy.iter().filter_map(|worker| worker.state.pools.as_ref()).collect();
    let pools = pools_of(&pools);
    let uptime = healthy.iter().filter_map(|worker| worker.state.uptime_seconds).fold(0.0, f64::max);
    online(healthy.len() as u64, jobs, &pools, uptime, &seconds(now_ms()))
}

/// The status of a lone worker that sends no heartbeats. Invalid members have defaults. It counts as online,
/// whatever it reports, because its entry has not expired. `None`: the entry is not a JSON object.
fn lone_status(json: &[u8]) -> Option<Value> {
    let said: Map<String, Value> = serde_json::from_slice(json).ok()?;
    let count = |name: &str| said.get(name).and_then(Value::as_u64);
    let pools: Vec<_> = said.get("pools").and_then(Value::as_object).into_iter().collect();
    let pools = pools_of(&pools);
    let uptime = amount(said.get("uptime_seconds")).and_then(Number::as_f64).unwrap_or(0.0);
    let timestamp = match said.get("timestamp") {
        Some(Value::Number(at)) => json!(at),
        Some(Value::String(at)) => seconds(parse_rfc3339_ms(at).unwrap_or_else(now_ms)),
        _ => seconds(now_ms()),
    };
    let (workers, jobs) = (count("worker_count").unwrap_or(1), count("active_jobs").unwrap_or(0));
    Some(online(workers, jobs, &pools, uptime, &timestamp))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heartbeats_are_checked() {
        let full = r#"{"workerId":"w","status":"healthy","pools":{"python":{"warm":2}},"activeJobs":3,
            "uptimeSeconds":1.5,"timestamp":"2026-11-22T00:00:00Z","other":[1]}"#;
        let state = Heartbeat::parse(full.as_bytes()).unwrap();
        assert_eq!((state.worker_id.as_str(), state.active_jobs), ("w", Some(3)));
        assert!(!serde_json::to_string(&state).unwrap().contains("other"));
        for good in [
            r#"{"workerId":"w"}"#,
            r#"{"workerId":"w","status":null,"pools":null,"activeJobs":null,"uptimeSeconds":null,
                "timestamp":null}"#,
            r#"{"workerId":"w","activeJobs":7.0}"#,
            r#"{"workerId":"w","timestamp":1795305600.5,"activeJobs":1000000,"uptimeSeconds":10000000000}"#,
        ] {
            assert!(Heartbeat::parse(good.as_bytes()).is_ok(), "{good}");
        }
        let deep = format!(r#"{{"workerId":"w","pools":{}1{}}}"#, "[".repeat(5000), "]".repeat(5000));
        // Unknown members are skipped without recursion.
        let deep_other = format!(r#"{{"workerId":"w","x":{}1{}}}"#, "[".repeat(5000), "]".repeat(5000));
        assert!(Heartbeat::parse(deep_other.as_bytes()).is_ok());
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
            let detail = ApiError::refusal(Heartbeat::parse(bad.as_bytes()));
            assert!(detail.contains(told), "{bad:.60}: {detail}");
        }
    }

    const SEEN_AT: UnixMs = 1_795_305_600_000;

    fn worker(state: &str, age_s: u64) -> KnownWorker {
        let age = Duration::from_secs(age_s);
        KnownWorker::of(&WorkerRecord { state: state.to_owned().into(), age, at: SEEN_AT }).unwrap()
    }

    #[test]
    fn only_healthy_workers_are_summed() {
        let workers = [
            worker(
                r#"{"workerId":"a","pools":{"python":1,"go":2,"rust":9},"activeJobs":1,"uptimeSeconds":5}"#,
                0,
            ),
            worker(
                r#"{"workerId":"b","pools":{"python":2,"go":0.5,"cpp":-3,"nodejs":{"warm":2}},
                    "uptimeSeconds":9}"#,
                30,
            ),
            worker(r#"{"workerId":"c","activeJobs":4}"#, 31),
            worker(r#"{"workerId":"d","status":"Draining","activeJobs":8}"#, 0),
        ];
        let healthy: Vec<&KnownWorker> = workers.iter().filter(|worker| worker.is_healthy()).collect();
        let mut sums = summed(&healthy);
        let at = sums.as_object_mut().unwrap().remove("timestamp").unwrap();
        assert!(at.as_f64().is_some_and(|s| s > 1.7e9 && s < 1e11), "epoch seconds: {at}");
        let expected = json!({
            "status": "online", "worker_count": 2, "active_jobs": 1, "uptime_seconds": 9,
            "pools": { "python": 3, "nodejs": 0, "cpp": 0, "go": 2.5 },
        });
        assert_eq!(sums, expected);
        let expected = json!({
            "pools": { "python": 0, "nodejs": 0, "cpp": 0, "go": 0 }, "active_jobs": 0, "status": "offline",
        });
        assert_eq!(offline(), expected);
        let huge = worker(r#"{"workerId":"h","pools":{"go":1.7e308}}"#, 0);
        assert_eq!(summed(&[&huge, &huge])["pools"]["go"], f64::MAX);
    }

    #[test]
    fn a_worker_is_shown_with_its_health() {
        let pools = json!({ "python": { "warm": 2 }, "rust": 1 });
        let said = json!({
            "workerId": "w", "pools": pools, "activeJobs": 3, "uptimeSeconds": 1.5, "timestamp": "t",
        });
        for (age_s, status, health) in [
            (3, "healthy", "healthy"),
            (30, "busy", "healthy"),
            (31, "healthy", "unhealthy"),
            (0, "ERROR", "unhealthy"),
        ] {
            let mut said = said.clone();
            said["status"] = json!(status);
            let mut expected = said.clone();
            for (name, value) in [
                ("lastSeen", json!(SEEN_AT)),
                ("receivedAt", json!(SEEN_AT)),
                ("healthStatus", json!(health)),
                ("lastSeenAgo", json!(format!("{age_s}s"))),
            ] {
                expected[name] = value;
            }
            assert_eq!(worker(&said.to_string(), age_s).shown(), expected);
        }
        let bare = worker(r#"{"workerId":"w"}"#, 0).shown();
        assert_eq!((&bare["status"], &bare["timestamp"]), (&json!("healthy"), &json!(1_795_305_600)));
    }

    #[test]
    fn invalid_members_of_a_lone_worker_have_defaults() {
        let said = br#"{"status":"busy","worker_count":3,"active_jobs":"x","pools":{"go":2,"x":1},
            "timestamp":7.5,"extra":1}"#;
        let status = lone_status(said).unwrap();
        let expected = json!({ "status": "online", "worker_count": 3, "active_jobs": 0,
            "pools": { "python": 0, "nodejs": 0, "cpp": 0, "go": 2 }, "uptime_seconds": 0,
            "timestamp": 7.5 });
        assert_eq!(status, expected);
        let text = lone_status(br#"{"timestamp":"2026-11-22T00:00:00.500Z","pools":[]}"#).unwrap();
        assert_eq!((&text["timestamp"], &text["worker_count"]), (&json!(1_795_305_600.5), &json!(1)));
        for odd in ["", "[]", "7"] {
            assert_eq!(lone_status(odd.as_bytes()), None);
        }
    }
}
