//! Clients that retry each request under its own `Idempotency-Key` until they have the result.

use super::Gateway;
use super::http::{Answer, Request};
use super::load_clients::{ClientRecord, FUNCTIONS, RequestCounts, Targets, job_id};
use super::wait::{join_all, pause, spawn};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_json::json;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// How long a client waits for one answer. The job of a dead node may take longer.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// Pause between two attempts of one request.
const PAUSE_MS: std::ops::Range<u64> = 50..250;

pub struct RetryingClients {
    pub targets: Targets,
    pub counts: Arc<RequestCounts>,
    /// When the last fault ended; `None` before.
    recovered_at: watch::Sender<Option<Instant>>,
    clients: Vec<JoinHandle<(ClientRecord, Duration)>>,
}

impl RetryingClients {
    pub fn start(gateways: &[&Gateway], clients: u64, seed: u64) -> Self {
        let (targets, counts) = (Targets::new(gateways), Arc::<RequestCounts>::default());
        let (recovered_at, recovered) = watch::channel(None);
        let clients = (0..clients).map(|name| {
            let client = Client {
                targets: targets.clone(),
                key: gateways[0].key().to_owned(),
                name,
                rng: SmallRng::seed_from_u64(seed.wrapping_mul(1000).wrapping_add(name)),
                record: ClientRecord::default(),
                counts: Arc::clone(&counts),
            };
            spawn(client.run_until(recovered.clone()))
        });
        let clients = clients.collect();
        Self { targets, counts, recovered_at, clients }
    }

    /// There are no more faults. Every client must have the result of its last request before the deadline.
    /// Returns what was accepted: one id for each key.
    pub async fn finish(self, deadline: Duration) -> ClientRecord {
        self.recovered_at.send_replace(Some(Instant::now()));
        let mut all = ClientRecord::default();
        let mut slowest = Duration::ZERO;
        for (record, took) in join_all("the last requests", deadline, self.clients).await {
            slowest = slowest.max(took);
            all.accepted.extend(record.accepted);
        }
        println!("{} requests; the slowest of the last ones took {slowest:?}", all.accepted.len());
        all
    }
}

struct Client {
    targets: Targets,
    key: String,
    name: u64,
    rng: SmallRng,
    record: ClientRecord,
    counts: Arc<RequestCounts>,
}

impl Client {
    /// Returns also the time from the recovery to the result of the last request.
    async fn run_until(mut self, recovered_at: watch::Receiver<Option<Instant>>) -> (ClientRecord, Duration) {
        let mut n = 0;
        loop {
            n += 1;
            self.run(n).await;
            let recovered_at = *recovered_at.borrow();
            if let Some(recovered_at) = recovered_at {
                return (self.record, recovered_at.elapsed());
            }
        }
    }

    /// Retries one request until it has the result.
    async fn run(&mut self, n: u64) {
        let token = format!("client-{}-request-{n}-end", self.name);
        let function = FUNCTIONS[self.rng.random_range(0..FUNCTIONS.len())];
        let body = json!({ "functionId": function, "inputData": { "token": token } });
        let mut id: Option<String> = None;
        loop {
            let target = self.targets.pick(&mut self.rng);
            let asynchronous = if self.rng.random_bool(0.5) { "true" } else { "false" };
            let run = Request::new(target, "POST", "/run").described().header("x-api-key", &self.key);
            let run = run.header("idempotency-key", &token).header("x-async", asynchronous).json(&body);
            if let Some(result) = self.attempt(target, &run, &mut id).await {
                assert!(result.contains(&token), "{token} got {result}");
                let id = id.expect("a result has an id");
                let before = self.record.accepted.insert(id, "SUCCESS");
                assert_eq!(before, None, "each key has its own id");
                return;
            }
            pause(Duration::from_millis(self.rng.random_range(PAUSE_MS))).await;
        }
    }

    /// `None`: another attempt is needed.
    async fn attempt(&self, target: SocketAddr, run: &Request, id: &mut Option<String>) -> Option<String> {
        let answer = send(run).await;
        self.counts.add(answer.as_ref().map(|answer| answer.status));
        let answer = answer?;
        let body = match answer.status {
            200 | 202 => answer.json(),
            429 | 503 | 504 => return None,
            other => panic!("{other}: {}", answer.text()),
        };
        let given = job_id(answer.status, &body);
        let before = id.get_or_insert_with(|| given.clone());
        assert_eq!(*before, given, "an accepted key keeps its job");
        if answer.status == 200 {
            return Some(answer.text());
        }
        let path = format!("/status/{given}?wait=3");
        let status = Request::new(target, "GET", &path).described().header("x-api-key", &self.key);
        let answer = send(&status).await.filter(|answer| answer.status == 200)?;
        (answer.json()["status"] != "pending").then(|| answer.text())
    }
}

/// `None`: the connection broke, or there was no answer in time.
async fn send(request: &Request) -> Option<Answer> {
    tokio::time::timeout(ANSWER_MAX, request.try_send()).await.ok()?.ok()
}
