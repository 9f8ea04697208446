//! Several clients that ask for runs and record every answer, and the reckoning afterwards: what was accepted against
//! what the tables, the queue and the journals hold.

use super::aws::Cloud;
use super::http::{Answer, Conn, Request};
use super::platform::{Fleet, HELLO};
use super::redis::{Redis, Reply};
use super::wait::{eventually, join_all, spawn};
use super::{Gateway, SOON};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Clients, each with one request at a time.
const CLIENTS: u64 = 6;
/// Between two requests of a client: together they ask some 100 times a second.
const PAUSE_MS: std::ops::Range<u64> = 20..60;
/// `dev` gives up a run whose gateway was killed three times while it ran, as it may be what kills it.
const STARTED_TOO_OFTEN: &str = "was started 3 times, and each time the gateway was killed";
/// The functions that are run.
pub const FUNCTIONS: [&str; 2] = [HELLO, "second"];

/// Where a crowd knocks; changes as gateways come and go.
pub type Doors = Arc<Mutex<Vec<SocketAddr>>>;

/// What the clients are like.
#[derive(Clone, Copy, Debug, Default)]
pub struct Manners {
    /// Of a hundred requests, those whose client leaves before the answer.
    pub leave_percent: u64,
    /// Of a hundred runs, those that a worker does something odd with.
    pub odd_percent: u64,
    /// Only what the seeded function of `dev` does: it prints its input.
    pub is_plain: bool,
}

/// What one client saw.
#[derive(Debug, Default)]
struct Seen {
    /// By job id: the status that its row is to have.
    accepted: BTreeMap<String, &'static str>,
    /// Requests whose fate the client does not know.
    unanswered: usize,
    refused: BTreeMap<u16, usize>,
}

pub struct Crowd {
    doors: Doors,
    stop: watch::Sender<bool>,
    clients: Vec<JoinHandle<Seen>>,
}

impl Crowd {
    /// Begins to ask. The same seed asks the same.
    pub fn start(gateways: &[&Gateway], seed: u64, manners: Manners) -> Self {
        let doors: Doors = Arc::default();
        let (stop, stopped) = watch::channel(false);
        let key = gateways[0].key().to_owned();
        let clients = (0..CLIENTS).map(|n| {
            let client = Client {
                doors: Arc::clone(&doors),
                key: key.clone(),
                name: n,
                rng: SmallRng::seed_from_u64(seed.wrapping_mul(CLIENTS).wrapping_add(n)),
                manners,
                seen: Seen::default(),
            };
            spawn(client.ask_until(stopped.clone()))
        });
        let crowd = Self { doors: Arc::clone(&doors), stop, clients: clients.collect() };
        crowd.knock_at(gateways);
        crowd
    }

    pub fn knock_at(&self, gateways: &[&Gateway]) {
        *self.doors.lock().expect("no holder panics") = gateways.iter().map(|g| g.addr()).collect();
    }

    /// Ends the asking; those who wait are answered first.
    pub async fn stop(self) -> Record {
        self.stop.send_replace(true);
        let mut record = Record::default();
        for seen in join_all("the crowd", Duration::from_secs(120), self.clients).await {
            record.accepted.extend(seen.accepted);
            record.unanswered += seen.unanswered;
            for (status, count) in seen.refused {
                *record.refused.entry(status).or_default() += count;
            }
        }
        record
    }
}

struct Client {
    doors: Doors,
    key: String,
    name: u64,
    rng: SmallRng,
    manners: Manners,
    seen: Seen,
}

impl Client {
    async fn ask_until(mut self, stopped: watch::Receiver<bool>) -> Seen {
        let mut n = 0;
        while !*stopped.borrow() {
            n += 1;
            self.ask(n).await;
            tokio::time::sleep(Duration::from_millis(self.rng.random_range(PAUSE_MS))).await;
        }
        self.seen
    }

    async fn ask(&mut self, n: u64) {
        let token = format!("client-{}-run-{n}-end", self.name);
        let (input, status) = self.behaviour(&token);
        let functions = if self.manners.is_plain { 1 } else { FUNCTIONS.len() };
        let function = FUNCTIONS[self.rng.random_range(0..functions)];
        let asynchronous = self.rng.random_bool(0.5);
        let door = {
            let doors = self.doors.lock().expect("no holder panics");
            if doors.is_empty() {
                return;
            }
            doors[self.rng.random_range(0..doors.len())]
        };
        let run = Request::new(door, "POST", "/run").described().header("x-api-key", &self.key);
        let run = run.json(&json!({ "functionId": function, "inputData": input }));
        let run = if asynchronous { run.header("x-async", "true") } else { run };
        if self.rng.random_range(0..100) < self.manners.leave_percent {
            let cut = self.rng.random_bool(0.5);
            self.seen.unanswered += 1;
            let _ = leave_early(&run, cut).await;
            return;
        }
        match run.try_send().await {
            Ok(answer) => self.note(&answer, status, &token),
            Err(_) => self.seen.unanswered += 1,
        }
    }

    /// What the worker is to do, and the status it is to give.
    fn behaviour(&mut self, token: &str) -> (Value, &'static str) {
        if self.manners.is_plain {
            return (json!({ "token": token }), "SUCCESS");
        }
        let odd = self.rng.random_range(0..100) < self.manners.odd_percent;
        match (odd, self.rng.random_range(0..4)) {
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
            refused => {
                // A job that the queue may have is not refused, and the client cannot know.
                if answer.text().contains("queue_timeout") {
                    self.seen.unanswered += 1;
                }
                *self.seen.refused.entry(refused).or_default() += 1;
                assert!(matches!(refused, 429 | 503 | 504), "{refused}: {}", answer.text());
                let retry = answer.need("retry-after").parse::<u64>();
                assert!(retry.is_ok(), "{answer:?}");
                return;
            }
        };
        let member = if answer.status == 200 { "requestId" } else { "jobId" };
        let id = body[member].as_str().unwrap_or_else(|| panic!("no {member} in {body}")).to_owned();
        if answer.status == 200 {
            let text = answer.text();
            assert!(text.contains(token), "{token} got {text}");
        }
        let before = self.seen.accepted.insert(id, status);
        assert_eq!(before, None, "an id is given once");
    }
}

/// Leaves when the request is sent, or in the middle of it.
async fn leave_early(run: &Request, cut: bool) -> std::io::Result<()> {
    let mut conn = Conn::open(run.addr()).await?;
    let bytes = run.to_bytes();
    let sent = if cut { bytes.len() - 10 } else { bytes.len() };
    conn.write(&bytes[..sent]).await
}

/// What all clients saw.
#[derive(Debug, Default)]
pub struct Record {
    pub accepted: BTreeMap<String, &'static str>,
    pub unanswered: usize,
    pub refused: BTreeMap<u16, usize>,
}

/// What a reckoning found.
#[derive(Debug, Default)]
#[expect(dead_code, reason = "printed as a whole")]
pub struct Reckoning {
    pub accepted: usize,
    pub unanswered: usize,
    pub refused: BTreeMap<u16, usize>,
    pub rows: BTreeMap<String, usize>,
}

impl Record {
    /// Holds what was accepted against what is stored, once the gateways have nothing left to do. `gateways` are
    /// those that run.
    pub async fn reckon(&self, fleet: &Fleet, gateways: &[&Gateway], within: Duration) -> Reckoning {
        for gateway in gateways {
            nothing_left(gateway, within).await;
        }
        journals_are_empty(&fleet.redis, within).await;
        queue_is_empty(&fleet.cloud, within).await;
        let mut rows = Vec::new();
        for function in FUNCTIONS {
            let items = fleet.cloud.log_rows(function).await;
            counters_equal(&fleet.cloud, function, &items).await;
            let text = |item: &Value, name: &str| item[name]["S"].as_str().expect("a text").to_owned();
            rows.extend(items.iter().map(|item| (text(item, "requestId"), text(item, "status"))));
        }
        self.compare(rows, &self.accepted)
    }

    /// [`Self::reckon`] for `dev`, by what it says itself.
    pub async fn reckon_dev(&self, gateway: &Gateway, within: Duration) -> Reckoning {
        nothing_left(gateway, within).await;
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

    /// What was accepted against the rows, each an id and a status.
    fn compare(&self, rows: Vec<(String, String)>, accepted: &BTreeMap<String, &'static str>) -> Reckoning {
        let mut reckoning = Reckoning {
            accepted: self.accepted.len(),
            unanswered: self.unanswered,
            refused: self.refused.clone(),
            ..Reckoning::default()
        };
        let mut statuses: BTreeMap<String, String> = BTreeMap::new();
        for (id, status) in rows {
            *reckoning.rows.entry(status.clone()).or_default() += 1;
            assert_eq!(statuses.insert(id, status), None, "one row for each job");
        }
        for (id, expected) in accepted {
            let status = statuses.remove(id).unwrap_or_else(|| panic!("{id} was accepted and has no row"));
            assert_eq!(status, *expected, "{id}");
        }
        let nobodys = statuses.len();
        assert!(nobodys <= self.unanswered, "{nobodys} rows of nobody: {statuses:?}, {reckoning:?}");
        reckoning
    }
}

async fn nothing_left(gateway: &Gateway, within: Duration) {
    eventually("nothing left to do", within, || async {
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
    let accepted = gateway.metric("infra_jobs_accepted_total").await.expect("there");
    let finished = gateway.metric("infra_jobs_finished_total").await.expect("there");
    assert!((accepted - finished).abs() < 0.5, "accepted {accepted}, finished {finished}, none in flight");
    gateway.wait_for_metric("infra_jobs_unaccounted", 0.0).await;
}

async fn journals_are_empty(redis: &Redis, within: Duration) {
    eventually("empty journals", within, || async {
        let mut left = Vec::new();
        for part in ["inflight", "unposted", "posting"] {
            let Reply::Array(keys) = redis.command(&[b"KEYS", format!("{part}:{{*").as_bytes()]).await else {
                panic!("KEYS gives an array")
            };
            left.extend(keys);
        }
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;
}

async fn queue_is_empty(cloud: &Cloud, within: Duration) {
    eventually("an empty queue", within, || async {
        let left = cloud.messages(&cloud.queue_url).await;
        if left == 0 { Ok(()) } else { Err(format!("{left} messages")) }
    })
    .await;
}

/// What the function says of its runs is what their rows say.
async fn counters_equal(cloud: &Cloud, function: &str, rows: &[Value]) {
    let errors = rows.iter().filter(|row| row["status"]["S"] != "SUCCESS").count().to_string();
    let duration = |row: &Value| row["duration"]["N"].as_str().and_then(|n| n.parse().ok()).unwrap_or(0.0);
    let total: f64 = rows.iter().map(duration).sum();
    eventually("counters that equal the rows", SOON, || async {
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
