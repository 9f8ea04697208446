//! Clients that repeat each order under its own `Idempotency-Key` until they have its result, as a careful client does.

use super::Gateway;
use super::crowd::{Doors, FUNCTIONS, Record};
use super::http::{Answer, Request};
use super::wait::{join_all, spawn};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_json::json;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// How long a client waits for one answer: less than a job of a dead node may take.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// Between two tries of one order.
const PAUSE_MS: std::ops::Range<u64> = 50..250;

pub struct Orders {
    doors: Doors,
    well_since: watch::Sender<Option<Instant>>,
    clients: Vec<JoinHandle<Seen>>,
}

/// What one client saw.
#[derive(Default)]
struct Seen {
    accepted: BTreeMap<String, &'static str>,
    /// From when all was well to the result of the last order.
    last: Option<Duration>,
}

impl Orders {
    pub fn start(gateways: &[&Gateway], clients: u64, seed: u64) -> Self {
        // Before anybody asks.
        let doors: Doors = Arc::new(Mutex::new(gateways.iter().map(|g| g.addr()).collect()));
        let (well_since, all_well) = watch::channel(None);
        let clients = (0..clients).map(|name| {
            let client = Client {
                doors: Arc::clone(&doors),
                key: gateways[0].key().to_owned(),
                name,
                rng: SmallRng::seed_from_u64(seed.wrapping_mul(1000).wrapping_add(name)),
                seen: Seen::default(),
            };
            spawn(client.order_until(all_well.clone()))
        });
        Self { doors: Arc::clone(&doors), well_since, clients: clients.collect() }
    }

    pub fn knock_at(&self, gateways: &[&Gateway]) {
        *self.doors.lock().expect("no holder panics") = gateways.iter().map(|g| g.addr()).collect();
    }

    /// All is well from now on: every client has the result of its last order `within` that time. Gives what was
    /// accepted: one id a key.
    pub async fn finish(self, within: Duration) -> Record {
        self.well_since.send_replace(Some(Instant::now()));
        let mut record = Record::default();
        let mut slowest = Duration::ZERO;
        for seen in join_all("the last orders", within, self.clients).await {
            slowest = slowest.max(seen.last.expect("it has ended"));
            record.accepted.extend(seen.accepted);
        }
        println!("{} orders, the slowest of the last ones after {slowest:?}", record.accepted.len());
        record
    }
}

struct Client {
    doors: Doors,
    key: String,
    name: u64,
    rng: SmallRng,
    seen: Seen,
}

impl Client {
    async fn order_until(mut self, well_since: watch::Receiver<Option<Instant>>) -> Seen {
        let mut n = 0;
        loop {
            n += 1;
            self.order(n).await;
            let well_since = *well_since.borrow();
            if let Some(well_since) = well_since {
                self.seen.last = Some(well_since.elapsed());
                return self.seen;
            }
        }
    }

    /// Repeats the order until its result is there.
    async fn order(&mut self, n: u64) {
        let token = format!("client-{}-order-{n}-end", self.name);
        let function = FUNCTIONS[self.rng.random_range(0..FUNCTIONS.len())];
        let body = json!({ "functionId": function, "inputData": { "token": token } });
        let mut id: Option<String> = None;
        loop {
            let door = self.door();
            let asynchronous = if self.rng.random_bool(0.5) { "true" } else { "false" };
            let run = Request::new(door, "POST", "/run").described().header("x-api-key", &self.key);
            let run = run.header("idempotency-key", &token).header("x-async", asynchronous).json(&body);
            if let Some(result) = self.result(door, &run, &mut id).await {
                assert!(result.contains(&token), "{token} got {result}");
                let id = id.expect("a result has an id");
                let before = self.seen.accepted.insert(id, "SUCCESS");
                assert_eq!(before, None, "each key has an id of its own");
                return;
            }
            tokio::time::sleep(Duration::from_millis(self.rng.random_range(PAUSE_MS))).await;
        }
    }

    fn door(&mut self) -> SocketAddr {
        let doors = self.doors.lock().expect("no holder panics");
        doors[self.rng.random_range(0..doors.len())]
    }

    /// One try. `None`: it is to be repeated.
    async fn result(&self, door: SocketAddr, run: &Request, id: &mut Option<String>) -> Option<String> {
        let answer = answered(run).await?;
        let body = match answer.status {
            200 | 202 => answer.json(),
            429 | 503 | 504 => return None,
            other => panic!("{other}: {}", answer.text()),
        };
        let member = if answer.status == 200 { "requestId" } else { "jobId" };
        let given = body[member].as_str().unwrap_or_else(|| panic!("no {member} in {body}")).to_owned();
        let before = id.get_or_insert_with(|| given.clone());
        assert_eq!(*before, given, "a key that was accepted keeps its job");
        if answer.status == 200 {
            return Some(answer.text());
        }
        let path = format!("/status/{given}?wait=3");
        let status = Request::new(door, "GET", &path).described().header("x-api-key", &self.key);
        let answer = answered(&status).await.filter(|answer| answer.status == 200)?;
        (answer.json()["status"] != "pending").then(|| answer.text())
    }
}

/// `None`: the connection broke, or the answer takes too long.
async fn answered(request: &Request) -> Option<Answer> {
    tokio::time::timeout(ANSWER_MAX, request.try_send()).await.ok()?.ok()
}
