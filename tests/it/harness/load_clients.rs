//! Clients that request runs under load and record every answer. Afterwards what was accepted is reconciled
//! with what the tables, the queue and the journals hold.

use super::aws::Cloud;
use super::http::{Answer, Conn, Request};
use super::platform::{Fleet, HELLO};
use super::redis::{Redis, Reply};
use super::wait::{eventually, join_all, pause, spawn};
use super::{Gateway, SOON};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Clients, each with one request at a time.
const CLIENTS: u64 = 6;
/// Pause between two requests of a client. Together the clients send about 100 requests per second.
const PAUSE_MS: std::ops::Range<u64> = 20..60;
/// `dev` abandons a run whose gateway was killed three times during it: the run may be the cause.
const STARTED_TOO_OFTEN: &str = "was started 3 times, and each time the worker was killed";
/// The functions that are run.
pub const FUNCTIONS: [&str; 2] = [HELLO, "second"];

/// The addresses that clients send to. They change as gateways start and stop. Cheap to clone.
#[derive(Clone, Default)]
pub struct Targets(Arc<Mutex<Vec<SocketAddr>>>);

impl Targets {
    pub fn new(gateways: &[&Gateway]) -> Self {
        let targets = Self::default();
        targets.set(gateways);
        targets
    }

    pub fn set(&self, gateways: &[&Gateway]) {
        *self.0.lock().expect("the lock is not poisoned") = gateways.iter().map(|g| g.addr()).collect();
    }

    /// A random one.
    pub fn pick(&self, rng: &mut SmallRng) -> SocketAddr {
        let targets = self.0.lock().expect("the lock is not poisoned");
        targets[rng.random_range(0..targets.len())]
    }
}

/// Number of requests so far, over all clients.
#[derive(Default)]
pub struct RequestCounts {
    /// Completed requests, with or without an answer.
    completed: AtomicUsize,
    /// Answers with status 503.
    unavailable: AtomicUsize,
}

impl RequestCounts {
    pub fn add(&self, status: Option<u16>) {
        self.unavailable.fetch_add(usize::from(status == Some(503)), Ordering::Relaxed);
        self.completed.fetch_add(1, Ordering::Relaxed);
    }

    /// Waits until `requests` more requests are completed.
    pub async fn wait_for_more(&self, requests: usize) {
        wait_for_more("completed requests", &self.completed, requests).await;
    }

    /// Waits until one more request is answered with 503.
    pub async fn wait_for_unavailable(&self) {
        wait_for_more("answers with 503", &self.unavailable, 1).await;
    }
}

async fn wait_for_more(what: &str, count: &AtomicUsize, more: usize) {
    let until = count.load(Ordering::Relaxed) + more;
    eventually(&format!("{more} more {what}"), 4 * SOON, || async {
        let now = count.load(Ordering::Relaxed);
        if now >= until { Ok(()) } else { Err(format!("{} are missing", until - now)) }
    })
    .await;
}

/// How clients and workers behave.
#[derive(Clone, Copy, Debug, Default)]
pub struct ClientMix {
    /// Percentage of requests whose client disconnects before the answer.
    pub disconnect_percent: u64,
    /// Percentage of runs whose worker, the one in Python, returns something unusual.
    pub fault_percent: u64,
    /// Use only the seeded function of `dev`, which prints its input.
    pub echo_only: bool,
}

/// What clients know of their requests.
#[derive(Debug, Default)]
pub struct ClientRecord {
    /// By job id: the status that its row must have.
    pub accepted: BTreeMap<String, &'static str>,
    /// Requests with an unknown outcome.
    pub unanswered: usize,
    /// Rejections by status.
    pub rejected: BTreeMap<u16, usize>,
}

pub struct LoadClients {
    pub targets: Targets,
    pub counts: Arc<RequestCounts>,
    stop: watch::Sender<bool>,
    clients: Vec<JoinHandle<ClientRecord>>,
}

impl LoadClients {
    /// Starts to send. The same seed sends the same requests.
    pub fn start(gateways: &[&Gateway], seed: u64, mix: ClientMix) -> Self {
        let (targets, counts) = (Targets::new(gateways), Arc::<RequestCounts>::default());
        let (stop, stopped) = watch::channel(false);
        let clients = (0..CLIENTS).map(|n| {
            let client = Client {
                targets: targets.clone(),
                key: gateways[0].key().to_owned(),
                name: n,
                rng: SmallRng::seed_from_u64(seed.wrapping_mul(CLIENTS).wrapping_add(n)),
                mix,
                record: ClientRecord::default(),
                counts: Arc::clone(&counts),
            };
            spawn(client.send_until(stopped.clone()))
        });
        let clients = clients.collect();
        Self { targets, counts, stop, clients }
    }

    /// Stops sending. Requests in flight are answered first.
    pub async fn stop(self) -> ClientRecord {
        self.stop.send_replace(true);
        let mut all = ClientRecord::default();
        for record in join_all("the clients", Duration::from_secs(120), self.clients).await {
            all.accepted.extend(record.accepted);
            all.unanswered += record.unanswered;
            for (status, count) in record.rejected {
                *all.rejected.entry(status).or_default() += count;
            }
        }
        all
    }
}

struct Client {
    targets: Targets,
    key: String,
    name: u64,
    rng: SmallRng,
    mix: ClientMix,
    record: ClientRecord,
    counts: Arc<RequestCounts>,
}

impl Client {
    async fn send_until(mut self, stopped: watch::Receiver<bool>) -> ClientRecord {
        let mut n = 0;
        while !*stopped.borrow() {
            n += 1;
            self.send(n).await;
            pause(Duration::from_millis(self.rng.random_range(PAUSE_MS))).await;
        }
        self.record
    }

    async fn send(&mut self, n: u64) {
        let token = format!("client-{}-run-{n}-end", self.name);
        let (input, status) = self.input(&token);
        let functions = if self.mix.echo_only { 1 } else { FUNCTIONS.len() };
        let function = FUNCTIONS[self.rng.random_range(0..functions)];
        let asynchronous = self.rng.random_bool(0.5);
        let target = self.targets.pick(&mut self.rng);
        let run = Request::new(target, "POST", "/run").described().header("x-api-key", &self.key);
        let run = run.json(&json!({ "functionId": function, "inputData": input }));
        let run = if asynchronous { run.header("x-async", "true") } else { run };
        if self.rng.random_range(0..100) < self.mix.disconnect_percent {
            let truncate = self.rng.random_bool(0.5);
            self.record.unanswered += 1;
            let _ = disconnect_early(&run, truncate).await;
            self.counts.add(None);
            return;
        }
        let answer = run.try_send().await.ok();
        match &answer {
            Some(answer) => self.note(answer, status, &token),
            None => self.record.unanswered += 1,
        }
        self.counts.add(answer.map(|answer| answer.status));
    }

    /// The input that selects the behaviour of the worker, and the resulting status.
    fn input(&mut self, token: &str) -> (Value, &'static str) {
        if self.mix.echo_only {
            return (json!({ "token": token }), "SUCCESS");
        }
        let is_faulty = self.rng.random_range(0..100) < self.mix.fault_percent;
        match (is_faulty, self.rng.random_range(0..4)) {
            (false, 0) => (json!({ "behave": "fail", "token": token }), "FAILED"),
            (false, 1) => {
                let ms = self.rng.random_range(1..300);
                (json!({ "behave": "sleep", "ms": ms, "token": token }), "SUCCESS")
            }
            (false, _) => (json!({ "token": token }), "SUCCESS"),
            (true, 0) => (json!({ "behave": "publish_twice", "token": token }), "SUCCESS"),
            (true, 1) => (json!({ "behave": "another_id", "token": token }), "SUCCESS"),
            (true, 2) => (json!({ "behave": "store_only", "token": token }), "SUCCESS"),
            (true, _) => (json!({ "behave": "no_status", "token": token }), "ERROR"),
        }
    }

    fn note(&mut self, answer: &Answer, status: &'static str, token: &str) {
        let body = match answer.status {
            200 | 202 => answer.json(),
            rejected => {
                // The queue may have the job, so the client cannot know the outcome.
                if answer.text().contains("queue_timeout") {
                    self.record.unanswered += 1;
                }
                *self.record.rejected.entry(rejected).or_default() += 1;
                assert!(matches!(rejected, 429 | 503 | 504), "{rejected}: {}", answer.text());
                let retry = answer.need("retry-after").parse::<u64>();
                assert!(retry.is_ok(), "{answer:?}");
                return;
            }
        };
        let id = job_id(answer.status, &body);
        if answer.status == 200 {
            let text = answer.text();
            assert!(text.contains(token), "{token} got {text}");
        }
        let before = self.record.accepted.insert(id, status);
        assert_eq!(before, None, "ids are unique");
    }
}

/// The id of the job in the body of an answer with status 200 or 202.
pub fn job_id(status: u16, body: &Value) -> String {
    let member = if status == 200 { "requestId" } else { "jobId" };
    body[member].as_str().unwrap_or_else(|| panic!("no {member} in {body}")).to_owned()
}

/// Disconnects when the request is sent, or in the middle of it.
async fn disconnect_early(run: &Request, truncate: bool) -> std::io::Result<()> {
    let mut conn = Conn::open(run.addr()).await?;
    let bytes = run.to_bytes();
    let sent = if truncate { bytes.len() - 10 } else { bytes.len() };
    conn.write(&bytes[..sent]).await
}

/// The counts of a reconciliation.
#[derive(Debug, Default)]
#[expect(dead_code, reason = "printed as a whole")]
pub struct Reconciliation {
    pub accepted: usize,
    pub unanswered: usize,
    pub rejected: BTreeMap<u16, usize>,
    pub rows: BTreeMap<String, usize>,
}

impl ClientRecord {
    /// Compares what was accepted with what is stored, once the gateways that run (`gateways`) have drained.
    pub async fn reconcile(
        &self,
        fleet: &Fleet,
        gateways: &[&Gateway],
        deadline: Duration,
    ) -> Reconciliation {
        for gateway in gateways {
            wait_until_drained(gateway, deadline).await;
        }
        wait_for_empty_journals(&fleet.redis, deadline).await;
        wait_for_empty_queue(&fleet.cloud, deadline).await;
        let mut rows = Vec::new();
        for function in FUNCTIONS {
            let items = fleet.cloud.log_rows(function).await;
            wait_for_counters(&fleet.cloud, function, &items).await;
            let text = |item: &Value, name: &str| item[name]["S"].as_str().expect("a text").to_owned();
            rows.extend(items.iter().map(|item| (text(item, "requestId"), text(item, "status"))));
        }
        self.compare(rows, &self.accepted)
    }

    /// [`Self::reconcile`] for `dev`, through its own API.
    pub async fn reconcile_dev(&self, gateway: &Gateway, deadline: Duration) -> Reconciliation {
        wait_until_drained(gateway, deadline).await;
        let path = format!("/functions/{HELLO}");
        let logs = gateway.get(&format!("{path}/logs?limit=1000")).await.expect(200).json();
        let logs = logs.as_array().expect("an array");
        assert!(logs.len() < 1000, "more than a page");
        let function = gateway.get(&format!("{path}/metrics")).await.expect(200).json();
        assert_eq!(function["executions"], logs.len(), "{function}");
        let text = |row: &Value, name: &str| row[name].as_str().expect("a text").to_owned();
        let mut expected = self.accepted.clone();
        for row in logs.iter().filter(|row| text(row, "message").contains(STARTED_TOO_OFTEN)) {
            expected.entry(text(row, "requestId")).and_modify(|status| *status = "FAILED");
        }
        let rows = logs.iter().map(|row| (text(row, "requestId"), text(row, "status")));
        self.compare(rows.collect(), &expected)
    }

    /// Compares what was accepted with the rows, each an id and a status.
    fn compare(
        &self,
        rows: Vec<(String, String)>,
        accepted: &BTreeMap<String, &'static str>,
    ) -> Reconciliation {
        let mut found = Reconciliation {
            accepted: self.accepted.len(),
            unanswered: self.unanswered,
            rejected: self.rejected.clone(),
            ..Reconciliation::default()
        };
        let mut statuses: BTreeMap<String, String> = BTreeMap::new();
        for (id, status) in rows {
            *found.rows.entry(status.clone()).or_default() += 1;
            assert_eq!(statuses.insert(id, status), None, "each job has one row");
        }
        for (id, expected) in accepted {
            let status = statuses.remove(id).unwrap_or_else(|| panic!("{id} was accepted and has no row"));
            assert_eq!(status, *expected, "{id}");
        }
        let unknown = statuses.len();
        assert!(unknown <= self.unanswered, "{unknown} rows of unknown jobs: {statuses:?}, {found:?}");
        found
    }
}

async fn wait_until_drained(gateway: &Gateway, deadline: Duration) {
    eventually("a drained gateway", deadline, || async {
        let mut left = Vec::new();
        for series in [
            "infra_waiters",
            "infra_jobs_in_flight",
            "infra_audit_waiting_rows",
            "infra_audit_waiting_ends",
            "infra_audit_waiting_functions",
            "infra_audit_spill_rows",
            "infra_audit_failing_rows",
        ] {
            match gateway.metric(series).await {
                Some(0.0) => {}
                other => left.push(format!("{series} {other:?}")),
            }
        }
        if left.is_empty() { Ok(()) } else { Err(left.join(", ")) }
    })
    .await;
    let accepted = gateway.metric("infra_jobs_accepted_total").await.expect("the series exists");
    let finished = gateway.metric("infra_jobs_finished_total").await.expect("the series exists");
    assert!((accepted - finished).abs() < 0.5, "accepted {accepted}, finished {finished}, none in flight");
    gateway.wait_for_metric("infra_jobs_unaccounted", 0.0).await;
}

async fn wait_for_empty_journals(redis: &Redis, deadline: Duration) {
    eventually("empty journals", deadline, || async {
        let mut left = Vec::new();
        for part in ["inflight", "unposted", "posting"] {
            let Reply::Array(keys) = redis.command(&[b"KEYS", format!("{part}:{{*").as_bytes()]).await else {
                panic!("KEYS returns an array")
            };
            left.extend(keys);
        }
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;
}

async fn wait_for_empty_queue(cloud: &Cloud, deadline: Duration) {
    eventually("an empty queue", deadline, || async {
        let left = cloud.messages(&cloud.queue_url).await;
        if left == 0 { Ok(()) } else { Err(format!("{left} messages")) }
    })
    .await;
}

/// Waits until the counters of the function are the sums of its rows.
async fn wait_for_counters(cloud: &Cloud, function: &str, rows: &[Value]) {
    let errors = rows.iter().filter(|row| row["status"]["S"] != "SUCCESS").count().to_string();
    let duration = |row: &Value| row["duration"]["N"].as_str().and_then(|n| n.parse().ok()).unwrap_or(0.0);
    let total: f64 = rows.iter().map(duration).sum();
    eventually("counters that equal the rows", 3 * SOON, || async {
        let item = cloud.function_item(function).await;
        let number = |name: &str| item[name]["N"].as_str().unwrap_or("0").to_owned();
        let counted: f64 = number("totalDuration").parse().expect("a number");
        let same = number("invocations") == rows.len().to_string()
            && number("errorCount") == errors
            && (counted - total).abs() < 0.01;
        if same { Ok(()) } else { Err(format!("{} rows, {errors} errors, {total} ms; {item}", rows.len())) }
    })
    .await;
}
