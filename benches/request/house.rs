//! A dispatcher and an audit over a backend that answers at once, so that what is left to measure is ours.

use async_trait::async_trait;
use bytes::Bytes;
use infra_controller::audit::{self, Audit, RowsStored, Stores};
use infra_controller::backend::{
    Backend, BackendError, Decision, EndedJob, ExecutionStore, FunctionPage, FunctionStore, FunctionWrite,
    FunctionWriteOutcome, Grant, JobQueue, Journal, JournalEntry, LeaseCall, LimitStore, LogPage, LogQuery,
    QueueTraits, Quota, ResultEvent, Results, SendError, embedded,
};
use infra_controller::config::{Conf, Live};
use infra_controller::dispatch::{self, Dispatcher};
use infra_controller::functions::{self, FunctionCache};
use infra_controller::limiter::RateLimiter;
use infra_controller::metrics::Metrics;
use infra_controller::model::{
    Execution, Function, FunctionCounters, FunctionId, Job, JobId, NodeId, Recommendation, now_ms,
};
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinSet;

/// Results on their way to the pump; a bench that publishes more at a time waits.
const PUBLISHED_MAX: usize = 1024;

/// Does what it is asked to, at once.
struct Instantly {
    function: Function,
    published: Mutex<mpsc::Receiver<ResultEvent>>,
}

#[async_trait]
impl JobQueue for Instantly {
    async fn send_batch(&self, jobs: &[Job]) -> Vec<Result<(), SendError>> {
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

    async fn end(&self, _: NodeId, ended: &[EndedJob]) -> Result<bool, BackendError> {
        black_box(ended);
        Ok(true)
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

/// The loops run as long as it lives, on the runtime it was started in.
pub struct House {
    pub dispatcher: Dispatcher,
    pub functions: FunctionCache,
    publish: mpsc::Sender<ResultEvent>,
    _loops: JoinSet<()>,
    _dir: tempfile::TempDir,
}

impl House {
    pub fn start() -> Self {
        let dir = tempfile::tempdir().expect("a directory for the parts that are not measured");
        let embedded::Embedded { node, backend, .. } = embedded::open(dir.path()).expect("they start");
        let (publish, published) = mpsc::channel(PUBLISHED_MAX);
        let instantly = Arc::new(Instantly { function: function(), published: Mutex::new(published) });
        let backend = Backend {
            queue: Arc::clone(&instantly) as _,
            results: Arc::clone(&instantly) as _,
            journal: Arc::clone(&instantly) as _,
            functions: Arc::clone(&instantly) as _,
            executions: Arc::clone(&instantly) as _,
            ..backend
        };
        let conf = Conf::shipped().expect("the shipped conf is whole");
        let metrics = Arc::new(metrics());
        let (audit, books) = audit::new(&conf.memory, (&backend).into(), None, Arc::clone(&metrics));
        // Nobody else changes functions here, so there is nothing to hear of.
        let (functions, _) = functions::new(&conf.cache, &backend, "code".to_owned(), &metrics);
        let batch = Live::new(conf.batch.clone());
        let ledger = Arc::clone(&books.ledger);
        let (memory, fleet) = (&conf.memory, &conf.fleet);
        let dead_letter = &conf.dead_letter;
        let parts = dispatch::DispatchParts {
            node,
            memory,
            fleet,
            dead_letter,
            batch,
            overload: Live::new(conf.overload.clone()),
            backend: &backend,
            audit,
            ledger,
            metrics,
        };
        let (dispatcher, loops) = dispatch::new(parts);
        let mut running = JoinSet::new();
        running.spawn(loops.batches.run(std::future::pending()));
        running.spawn(loops.pump.run());
        running.spawn(loops.lookups.run());
        running.spawn(books.flusher.run(loops.rows, std::future::pending()));
        running.spawn(books.ledger.run(std::future::pending()));
        Self { dispatcher, functions, publish, _loops: running, _dir: dir }
    }

    pub async fn publish(&self, id: JobId) {
        let event = ResultEvent::Published { id, payload: Bytes::copy_from_slice(RESULT.as_bytes()) };
        self.publish.send(event).await.expect("the pump runs");
    }

    pub fn job(&self) -> Job {
        Job {
            id: self.dispatcher.new_id(),
            function: FunctionId::parse("bench").expect("a function id"),
            idempotency_key: None,
            deadline: now_ms() + 1_000_000,
            message: Bytes::from_static(b"{}"),
        }
    }
}

/// Gives whatever it is asked for.
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

/// The limits of the shipped conf, as they are but for their height, with their loop.
pub fn limiter(loops: &mut JoinSet<()>) -> RateLimiter {
    let mut limits = Conf::shipped().expect("the shipped conf is whole").limits;
    for limit in &mut limits {
        (limit.rate, limit.period_s, limit.burst) = (1_000_000_000, 1, 1_000_000_000);
    }
    let (limiter, leaser) = RateLimiter::new(&limits, &[], Some(Arc::new(Generous)), Arc::new(metrics()));
    loops.spawn(leaser.run());
    limiter
}

struct Nobody;

impl RowsStored for Nobody {
    fn rows_written(&self, ids: &[JobId]) {
        black_box(ids);
    }
}

/// An audit alone, with its loop, and the directory of the parts that are not measured.
pub fn audit(loops: &mut JoinSet<()>) -> (Audit, tempfile::TempDir) {
    let dir = tempfile::tempdir().expect("a directory");
    let claims = embedded::open(dir.path()).expect("it starts").backend.claims;
    let (_, published) = mpsc::channel(1);
    let store = Arc::new(Instantly { function: function(), published: Mutex::new(published) });
    let conf = Conf::shipped().expect("the shipped conf is whole").memory;
    let (executions, journal) = (Arc::clone(&store) as _, Arc::clone(&store) as _);
    let stores = Stores { executions, claims, journal, functions: store };
    let (audit, books) = audit::new(&conf, stores, None, Arc::new(metrics()));
    loops.spawn(books.flusher.run(Arc::new(Nobody), std::future::pending()));
    loops.spawn(books.ledger.run(std::future::pending()));
    (audit, dir)
}

pub fn metrics() -> Metrics {
    Metrics::new(1000).expect("no name stands twice")
}

/// What the workers of the fleet publish: about 500 bytes.
pub const RESULT: &str = r#"{"requestId":"00000001-6846-8c3a-9b00-123456789abc","functionId":"bench","workerId":"w-1","status":"SUCCESS","exitCode":0,"stdout":"{\"message\": \"Hello, Ada!\"}\n","stderr":"","durationMs":12.5,"handlerDurationMs":3.25,"peakMemoryBytes":11694080,"allocatedMemoryMb":128,"optimizationTip":null,"estimatedSavings":null,"recommendedMemoryMb":null,"cpuUsage":null,"networkRx":null,"networkTx":null,"diskRead":null,"diskWrite":null,"outputFiles":[],"llm_token_count":null}"#;

pub fn function() -> Function {
    Function {
        id: FunctionId::parse("bench").expect("a function id"),
        name: "bench".into(),
        description: String::new(),
        runtime: "python".into(),
        max_concurrency: 0,
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
