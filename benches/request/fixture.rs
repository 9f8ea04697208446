//! The gateway with everything behind it replaced: a queue, a worker and tables that answer immediately. What
//! is left to measure is the code of this crate.
//!
//! All imports from the crate are in this file, so that a module that moves changes one file here.

use async_trait::async_trait;
use bytes::Bytes;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, mpsc, watch};
use tokio::task::JoinSet;

pub use infra_controller::dispatch::Permits;
pub use infra_controller::limiter::RateLimitState;
pub use infra_controller::log::Json;
pub use infra_controller::model::{
    Execution, FunctionId, Job, JobDraft, JobId, JobTemplate, NodeId, Outcome, Recommendation, RunRequest,
    now_ms,
};

use infra_controller::api::{Api, ApiParts};
use infra_controller::audit::{self, Audit, RowsStored, Stores};
use infra_controller::backend::{
    Backend, BackendError, Decision, EndOutcome, EndedJob, ExecutionStore, FunctionPage, FunctionStore,
    FunctionWrite, FunctionWriteOutcome, Grant, JobQueue, Journal, JournalEntry, LeaseCall, LimitStore,
    LogPage, LogQuery, QueueTraits, ResultEvent, Results, SendError, embedded,
};
use infra_controller::catalogue::Catalogue;
use infra_controller::config::{Conf, Live, Secret};
use infra_controller::dispatch::{self, Dispatcher};
use infra_controller::events::EventBus;
use infra_controller::functions::{self, Editor, FunctionCache};
use infra_controller::gateway::{Accepted, Gateway, GatewaySettings, GuardState, ListenerApp, Pseudonym};
use infra_controller::lifecycle::{Lifecycle, Phase};
use infra_controller::limiter::RateLimiter;
use infra_controller::metrics::Metrics;
use infra_controller::model::{Function, FunctionCounters, Quota};
use infra_controller::node_lease::NodeLease;
use infra_controller::overview::{self, OverviewParts};
use infra_controller::runs::{RunParts, Runs};
use infra_controller::traces::Traces;

/// Most jobs that wait for the worker, and most results that wait to be read.
const WAITING_MAX: usize = 1024;
const API_KEY: &str = "0123456789abcdef0123456789abcdef";
/// The body of `POST /run`.
pub const RUN_REQUEST: &str = concat!(
    r#"{"functionId":"bench","inputData":{"name":"Ada","numbers":[1,2,3,4,5,6,7,8],"#,
    r#""text":"some words to carry along"}}"#,
);

/// Every port that a run uses. Each call succeeds immediately.
struct Instantly {
    function: Function,
    sent: mpsc::Sender<JobId>,
    published: Mutex<mpsc::Receiver<ResultEvent>>,
}

/// Publishes a result for each job. It is a task of its own, so a result comes after the queue's
/// confirmation.
struct Worker {
    sent: mpsc::Receiver<JobId>,
    publish: mpsc::Sender<ResultEvent>,
}

impl Worker {
    async fn run(mut self) {
        while let Some(id) = self.sent.recv().await {
            let event = ResultEvent::Published { id, payload: Bytes::copy_from_slice(RESULT.as_bytes()) };
            if self.publish.send(event).await.is_err() {
                return;
            }
        }
    }
}

fn instantly() -> (Arc<Instantly>, Worker) {
    let (jobs, sent) = mpsc::channel(WAITING_MAX);
    let (publish, published) = mpsc::channel(WAITING_MAX);
    let ports = Instantly { function: function(), sent: jobs, published: Mutex::new(published) };
    (Arc::new(ports), Worker { sent, publish })
}

#[async_trait]
impl JobQueue for Instantly {
    async fn send_batch(&self, jobs: &[Job]) -> Vec<Result<(), SendError>> {
        for job in jobs {
            self.sent.send(job.id).await.expect("the worker runs");
        }
        vec![Ok(()); jobs.len()]
    }

    fn traits(&self) -> QueueTraits {
        QueueTraits { message_bytes_max: 1 << 18, retention: Duration::from_secs(345_600), fifo: false }
    }

    async fn depth(&self) -> Result<u64, BackendError> {
        Ok(0)
    }
}

#[async_trait]
impl Journal for Instantly {
    async fn enter(&self, jobs: &[Job]) -> Result<(), BackendError> {
        black_box(jobs);
        Ok(())
    }

    async fn leave(&self, ids: &[JobId]) -> Result<(), BackendError> {
        black_box(ids);
        Ok(())
    }

    async fn end(&self, _: NodeId, ended: &[EndedJob]) -> Result<EndOutcome, BackendError> {
        black_box(ended);
        Ok(EndOutcome::AllAdded)
    }

    async fn given_up(&self, _: NodeId) -> Result<Vec<(JobId, FunctionId)>, BackendError> {
        Ok(Vec::new())
    }

    async fn contains(&self, _: JobId) -> Result<bool, BackendError> {
        Ok(false)
    }

    async fn entries(&self, _: NodeId) -> Result<Vec<JournalEntry>, BackendError> {
        Ok(Vec::new())
    }
}

#[async_trait]
impl Results for Instantly {
    async fn next(&self) -> ResultEvent {
        match self.published.lock().await.recv().await {
            Some(event) => event,
            None => std::future::pending().await,
        }
    }

    async fn stored(&self, ids: &[JobId]) -> Result<Vec<Option<Bytes>>, BackendError> {
        Ok(vec![None; ids.len()])
    }

    async fn stored_foreign(&self, _: &str) -> Result<Option<Bytes>, BackendError> {
        Ok(None)
    }

    async fn wait_for(&self, _: JobId) -> Result<Bytes, BackendError> {
        std::future::pending().await
    }

    fn store_name(&self) -> &'static str {
        "memory"
    }

    async fn ping(&self) -> Result<(), BackendError> {
        Ok(())
    }
}

#[async_trait]
impl ExecutionStore for Instantly {
    async fn put(&self, rows: &[Execution]) -> Vec<Result<(), BackendError>> {
        vec![Ok(()); black_box(rows).len()]
    }

    async fn list(&self, _: &LogQuery) -> Result<LogPage, BackendError> {
        Ok(LogPage::default())
    }

    async fn get(&self, _: &FunctionId, _: &str) -> Result<Option<Execution>, BackendError> {
        Ok(None)
    }

    async fn probe(&self) -> Result<(), BackendError> {
        Ok(())
    }
}

#[async_trait]
impl FunctionStore for Instantly {
    async fn get(&self, id: &FunctionId) -> Result<Option<Function>, BackendError> {
        Ok(Some(Function { id: id.clone(), ..self.function.clone() }))
    }

    async fn list(&self, _: usize, _: Option<&str>) -> Result<FunctionPage, BackendError> {
        Ok(FunctionPage::default())
    }

    async fn write(&self, _: &FunctionWrite) -> Result<FunctionWriteOutcome, BackendError> {
        Ok(FunctionWriteOutcome::Conflict)
    }

    async fn recommend(&self, _: &FunctionId, _: &Recommendation) -> Result<(), BackendError> {
        Ok(())
    }

    async fn probe(&self) -> Result<(), BackendError> {
        Ok(())
    }
}

/// The parts of a node, and their loops, which run until this is dropped.
pub struct Fixture {
    pub dispatcher: Dispatcher,
    pub functions: FunctionCache,
    guard: Arc<ListenerApp<Gateway>>,
    stop: watch::Sender<bool>,
    loops: JoinSet<()>,
    _dir: tempfile::TempDir,
}

impl Fixture {
    /// Call it inside a runtime.
    pub fn start() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let embedded::Embedded { node, backend, .. } = embedded::open(dir.path(), false).expect("a backend");
        let (ports, worker) = instantly();
        let backend = Backend {
            queue: Arc::clone(&ports) as _,
            results: Arc::clone(&ports) as _,
            journal: Arc::clone(&ports) as _,
            functions: Arc::clone(&ports) as _,
            executions: Arc::clone(&ports) as _,
            ..backend
        };
        let conf = Conf::shipped().expect("the shipped conf is valid");
        let metrics = Arc::new(metrics());
        let (audit, books) = audit::new(
            &conf.memory,
            Stores::of(&backend, node),
            None,
            NodeLease::of_fleet(false),
            Arc::clone(&metrics),
        );
        let tail = audit.tail();
        // The loop is dropped: nothing else changes functions here.
        let (functions, _) = functions::new(&conf.cache, &backend, "code".to_owned(), &metrics);
        let (waits, batch) = (Live::new(conf.waits.clone()), Live::new(conf.batch.clone()));
        let (dispatcher, running) = dispatch::new(dispatch::DispatchParts {
            node,
            memory: &conf.memory,
            dead_letter: &conf.dead_letter,
            batch: batch.clone(),
            overload: Live::new(conf.overload.clone()),
            backend: &backend,
            audit,
            lease: NodeLease::of_fleet(false),
            events: EventBus::default(),
            traces: Traces::default(),
            metrics: Arc::clone(&metrics),
        });
        let mut loops = JoinSet::new();
        loops.spawn(worker.run());
        loops.spawn(running.batches.run(std::future::pending()));
        loops.spawn(running.pump.run());
        loops.spawn(running.lookups.run());
        loops.spawn(books.flusher.run(running.rows, std::future::pending()));
        loops.spawn(books.ledger.run(std::future::pending()));

        let limiter = limiter(&mut loops, &metrics);
        let lifecycle = Lifecycle::default();
        lifecycle.enter(Phase::Ready);
        let api_key = Secret::new(API_KEY.to_owned());
        let edge = GatewaySettings::new(&conf, &api_key, Pseudonym::of(b"bench"))
            .expect("the shipped conf has no TLS");
        let runs = Runs::new(RunParts {
            backend: &backend,
            waits: waits.clone(),
            batch,
            dispatcher: dispatcher.clone(),
            functions: functions.clone(),
            limiter: limiter.clone(),
            lifecycle: lifecycle.clone(),
            tail: tail.clone(),
            traces: Traces::default(),
            metrics: Arc::clone(&metrics),
        });
        // The loop is dropped: no summary is written here.
        let (overview, _) = overview::new(OverviewParts {
            node,
            summaries: Arc::clone(&backend.summaries),
            is_fleet: false,
            lease: NodeLease::of_fleet(false),
            oldest: dispatcher.oldest_job(),
            limiter: limiter.clone(),
            lifecycle: lifecycle.clone(),
            metrics: Arc::clone(&metrics),
        });
        let api = Api::new(ApiParts {
            waits,
            backend: &backend,
            runs,
            dispatcher: dispatcher.clone(),
            editor: Editor::new(&backend, functions.clone()),
            tail,
            events: EventBus::default(),
            catalogue: Catalogue::new(None).expect("a catalogue without a node"),
            overview,
            lifecycle: lifecycle.clone(),
            metrics: Arc::clone(&metrics),
            spool_dir: dir.path().join("spool"),
            gb_second: None,
            api_key: &api_key,
        });
        let gateway =
            Gateway::new(api, edge.clone(), limiter, lifecycle, Traces::default(), Arc::clone(&metrics));
        let proxy = pingora::proxy::http_proxy(&Arc::default(), gateway);
        let guarded = Arc::new(GuardState::new(proxy, edge, &conf.http2, metrics));
        let (guard, stop) = (Arc::new(guarded.plain()), watch::Sender::new(false));
        Self { dispatcher, functions, guard, stop, loops, _dir: dir }
    }

    pub fn job(&self) -> Job {
        Job {
            progress: None,
            id: self.dispatcher.new_id(),
            function: FunctionId::parse("bench").expect("a function id"),
            idempotency_key: None,
            is_promised: true,
            deadline: now_ms() + 1_000_000,
            message: Bytes::from_static(b"{}"),
            trace: None,
        }
    }

    /// Connects a client that asks for runs.
    pub async fn client(&mut self, is_async: bool) -> Client {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let stream = TcpStream::connect(address).await.expect("a connection");
        stream.set_nodelay(true).expect("a socket");
        let (accepted, client) = listener.accept().await.expect("a connection");
        let (guard, stop) = (Arc::clone(&self.guard), self.stop.subscribe());
        let place = guard.admit(client.ip(), Accepted::Usually).expect("room for a connection");
        self.loops.spawn(async move { guard.serve(accepted, client, place, &stop).await });
        let mode = if is_async { "x-async: true\r\n" } else { "" };
        let request = format!(
            "POST /run HTTP/1.1\r\nhost: {address}\r\nx-api-key: {API_KEY}\r\n\
             content-type: application/json\r\n{mode}content-length: {}\r\n\r\n{RUN_REQUEST}",
            RUN_REQUEST.len(),
        );
        let expected = if is_async { "HTTP/1.1 202 " } else { "HTTP/1.1 200 " };
        Client { stream, request, expected, answer: Vec::with_capacity(4096) }
    }
}

/// One connection, with one request at a time.
pub struct Client {
    stream: TcpStream,
    request: String,
    expected: &'static str,
    answer: Vec<u8>,
}

impl Client {
    /// Asks for a run, and reads the answer.
    pub async fn run(&mut self) {
        self.stream.write_all(self.request.as_bytes()).await.expect("the server reads");
        self.answer.clear();
        while !is_whole(&self.answer) {
            let n = self.stream.read_buf(&mut self.answer).await.expect("the server writes");
            assert!(n > 0, "the server closed the connection: {}", String::from_utf8_lossy(&self.answer));
        }
        let is_expected = self.answer.starts_with(self.expected.as_bytes());
        assert!(is_expected, "{}", String::from_utf8_lossy(&self.answer));
    }
}

/// Whether a response with a `Content-Length` has arrived.
fn is_whole(answer: &[u8]) -> bool {
    let mut fields = [httparse::EMPTY_HEADER; 32];
    let mut head = httparse::Response::new(&mut fields);
    let Ok(httparse::Status::Complete(len)) = head.parse(answer) else { return false };
    let length = head.headers.iter().find(|field| field.name.eq_ignore_ascii_case("content-length"));
    let length = length.and_then(|field| str::from_utf8(field.value).ok()?.parse().ok());
    answer.len() >= len + length.unwrap_or(0_usize)
}

/// A shared store of limits that grants every call.
struct Generous;

#[async_trait]
impl LimitStore for Generous {
    async fn take(&self, buckets: &[(String, Quota)]) -> Result<Vec<Decision>, BackendError> {
        let allowed = Decision { allowed: true, remaining: 1_000_000, retry_after: Duration::ZERO };
        Ok(vec![allowed; buckets.len()])
    }

    async fn lease(&self, call: &LeaseCall) -> Result<Grant, BackendError> {
        let (taken, retry_after) = (call.need, Duration::ZERO);
        Ok(Grant { applied: true, amount: 1_000_000, taken, left: 1_000_000, retry_after, nodes: 1 })
    }
}

/// The limits of the shipped conf, with rates that are never reached, and the loop.
pub fn limiter(loops: &mut JoinSet<()>, metrics: &Arc<Metrics>) -> RateLimiter {
    let mut limits = Conf::shipped().expect("the shipped conf is valid").limits;
    for limit in &mut limits {
        (limit.rate, limit.period_s, limit.burst) = (1_000_000_000, 1, 1_000_000_000);
    }
    let (limiter, leaser) = RateLimiter::new(&limits, &[], Some(Arc::new(Generous)), Arc::clone(metrics));
    loops.spawn(leaser.run());
    limiter
}

struct Nobody;

impl RowsStored for Nobody {
    fn rows_written(&self, ids: &[JobId]) {
        black_box(ids);
    }
}

/// An audit on its own, with its loops, and the directory that must outlive it.
pub fn audit(loops: &mut JoinSet<()>) -> (Audit, tempfile::TempDir) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let claims = embedded::open(dir.path(), false).expect("a backend").backend.claims;
    let (store, _) = instantly();
    let conf = Conf::shipped().expect("the shipped conf is valid").memory;
    let (executions, journal) = (Arc::clone(&store) as _, Arc::clone(&store) as _);
    let stores = Stores { executions, claims, journal, functions: store, node: NodeId(1), membership: None };
    let (audit, books) = audit::new(&conf, stores, None, NodeLease::of_fleet(false), Arc::new(metrics()));
    loops.spawn(books.flusher.run(Arc::new(Nobody), std::future::pending()));
    loops.spawn(books.ledger.run(std::future::pending()));
    (audit, dir)
}

pub fn metrics() -> Metrics {
    Metrics::new(1000).expect("metric names are unique")
}

/// A result as workers publish it, about 500 bytes.
pub const RESULT: &str = concat!(
    r#"{"requestId":"00000001-6846-8c3a-9b00-123456789abc","functionId":"bench","workerId":"w-1","#,
    r#""status":"SUCCESS","exitCode":0,"stdout":"{\"message\": \"Hello, Ada!\"}\n","stderr":"","#,
    r#""durationMs":12.5,"handlerDurationMs":3.25,"peakMemoryBytes":11694080,"allocatedMemoryMb":128,"#,
    r#""optimizationTip":null,"estimatedSavings":null,"recommendedMemoryMb":null,"cpuUsage":null,"#,
    r#""networkRx":null,"networkTx":null,"diskRead":null,"diskWrite":null,"outputFiles":[],"#,
    r#""llm_token_count":null}"#,
);

pub fn function() -> Function {
    Function {
        id: FunctionId::parse("bench").expect("a function id"),
        name: "bench".into(),
        description: String::new(),
        runtime: "python".into(),
        max_concurrency: 0,
        handler: None,
        memory_mb: 128,
        s3_key: "functions/bench/code.zip".into(),
        original_name: "code.zip".into(),
        uploaded_at: "2026-11-22T00:00:00.000Z".into(),
        updated_at: String::new(),
        env_vars: r#"{"STAGE":"bench"}"#.into(),
        version: 1,
        counters: FunctionCounters::default(),
        recommendation: None,
    }
}
