//! Tests of the dispatcher over the embedded backend.

use super::*;
use crate::audit;
use crate::backend::{BackendError, JournalEntry, LogQuery, ResultEvent, Results, embedded};
use crate::config::Conf;
use crate::events::EventBus;
use crate::fleet::Adopter;
use crate::model::{FunctionId, Job, JobId, Outcome, UnixMs, now_ms};
use async_trait::async_trait;
use bytes::Bytes;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::task::JoinSet;

/// A dispatcher over the embedded backend, with its loops running. The worker does not run, so the tests
/// publish or store the results themselves.
struct Fixture {
    dispatcher: Dispatcher,
    backend: Backend,
    node: NodeId,
    metrics: Arc<Metrics>,
    _loops: JoinSet<()>,
    _dir: tempfile::TempDir,
}

impl Fixture {
    async fn start(change: impl FnOnce(&mut Conf)) -> Self {
        Self::start_all(change, |_| {}, &[]).await
    }

    async fn start_with(change: impl FnOnce(&mut Backend)) -> Self {
        Self::start_all(|_| {}, change, &[]).await
    }

    /// `before`: the jobs that an earlier process of the node left in the journal.
    async fn start_after(before: &[(u64, UnixMs)]) -> Self {
        Self::start_all(|_| {}, |_| {}, before).await
    }

    async fn start_all(
        change_conf: impl FnOnce(&mut Conf),
        change_backend: impl FnOnce(&mut Backend),
        before: &[(u64, UnixMs)],
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let embedded::Embedded { node, mut backend, .. } = embedded::open(dir.path(), false).unwrap();
        let mut conf = Conf::shipped().unwrap();
        change_conf(&mut conf);
        change_backend(&mut backend);
        let metrics = Arc::new(Metrics::new(10).unwrap());
        let lease = NodeLease::of_fleet(false);
        let (audit, books) = audit::new(
            &conf.memory,
            audit::Stores::of(&backend, node),
            None,
            Arc::clone(&lease),
            Arc::clone(&metrics),
        );
        let (dispatcher, loops) = new(DispatchParts {
            node,
            memory: &conf.memory,
            dead_letter: &conf.dead_letter,
            batch: Live::new(conf.batch),
            overload: Live::new(conf.overload),
            backend: &backend,
            audit,
            lease: Arc::clone(&lease),
            events: EventBus::default(),
            traces: Traces::default(),
            metrics: Arc::clone(&metrics),
        });
        let left: Vec<Job> = before.iter().map(|(n, deadline)| job(node, *n, *deadline)).collect();
        backend.journal.enter(&left).await.unwrap();
        let ledger = Arc::clone(&books.ledger);
        let mut adopter = Adopter::new(
            node,
            &conf.fleet,
            None,
            lease,
            loops.node_jobs.clone(),
            ledger,
            Arc::clone(&metrics),
        );
        assert_eq!(adopter.begin().await, Ok(before.len()));
        let mut running = JoinSet::new();
        running.spawn(loops.batches.run(std::future::pending()));
        running.spawn(loops.pump.run());
        running.spawn(loops.lookups.run());
        running.spawn(books.flusher.run(loops.rows, std::future::pending()));
        running.spawn(books.ledger.run(std::future::pending()));
        Self { dispatcher, backend, node, metrics, _loops: running, _dir: dir }
    }

    async fn row_status(&self, id: JobId) -> String {
        let function = FunctionId::parse("hello").unwrap();
        eventually(async || {
            let row = self.backend.executions.get(&function, &id.to_string()).await.unwrap()?;
            Some(row.status.to_string())
        })
        .await
    }

    async fn is_forgotten(&self, id: JobId) {
        eventually(async || (!self.backend.journal.contains(id).await.unwrap()).then_some(())).await;
    }
}

async fn eventually<T>(look: impl AsyncFn() -> Option<T>) -> T {
    let found = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), found).await.expect("in time")
}

fn job(node: NodeId, n: u64, deadline: UnixMs) -> Job {
    let id = JobId::new(node, now_ms(), n);
    Job {
        progress: None,
        id,
        function: FunctionId::parse("hello").unwrap(),
        deadline,
        idempotency_key: None,
        is_promised: true,
        message: "{}".into(),
        trace: None,
    }
}

fn outcome(text: &str) -> Outcome {
    Outcome::new(text.to_owned().into())
}

const LATER: UnixMs = 4_000_000_000_000;

#[tokio::test]
async fn a_result_answers_the_waiter_and_becomes_one_row() {
    let fixture = Fixture::start(|_| {}).await;
    let job = job(fixture.node, 1, LATER);
    let id = job.id;
    let mut submitted = fixture.dispatcher.submit_waiting(job, Permits::new()).unwrap();
    submitted.sent.await.unwrap().unwrap();
    for published in [r#"{"status":"SUCCESS"}"#, r#"{"status":"FAILED"}"#] {
        fixture.dispatcher.settler().settle(id, outcome(published));
    }
    assert_eq!(submitted.waiter.outcome().await, Some(outcome(r#"{"status":"SUCCESS"}"#)));
    assert_eq!(fixture.row_status(id).await, "SUCCESS");
    fixture.is_forgotten(id).await;
    let function = FunctionId::parse("hello").unwrap();
    let query = LogQuery { function, limit: 10, start: None, end: None, status: None, after: None };
    assert_eq!(fixture.backend.executions.list(&query).await.unwrap().rows.len(), 1);
    assert!(matches!(fixture.dispatcher.state(id).await, Ok(JobState::Done(_))), "kept for /status");
}

#[tokio::test]
async fn a_job_past_its_deadline_ends_as_lost() {
    let fixture = Fixture::start(|_| {}).await;
    let job = job(fixture.node, 1, now_ms());
    let id = job.id;
    fixture.dispatcher.submit(job, Permits::new()).unwrap().await.unwrap().unwrap();
    assert_eq!(fixture.row_status(id).await, "LOST");
    fixture.is_forgotten(id).await;
}

/// Results whose look-ups fail while `away`.
struct Flaky {
    inner: Arc<dyn Results>,
    away: AtomicBool,
    refused: AtomicUsize,
}

#[async_trait]
impl Results for Flaky {
    /// Hides the event that triggers a look-up of all jobs, so that only scheduled look-ups occur.
    async fn next(&self) -> ResultEvent {
        loop {
            let event = self.inner.next().await;
            if event != ResultEvent::Subscribed {
                return event;
            }
        }
    }

    async fn stored(&self, ids: &[JobId]) -> Result<Vec<Option<Bytes>>, BackendError> {
        if self.away.load(Ordering::Relaxed) {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return Err(BackendError::Unavailable("away".into()));
        }
        self.inner.stored(ids).await
    }

    async fn stored_foreign(&self, request_id: &str) -> Result<Option<Bytes>, BackendError> {
        self.inner.stored_foreign(request_id).await
    }

    async fn wait_for(&self, id: JobId) -> Result<Bytes, BackendError> {
        self.inner.wait_for(id).await
    }

    fn store_name(&self) -> &'static str {
        self.inner.store_name()
    }

    async fn ping(&self) -> Result<(), BackendError> {
        self.inner.ping().await
    }
}

#[tokio::test]
async fn a_job_is_not_lost_while_its_look_ups_fail() {
    let flaky = Arc::new(std::sync::OnceLock::new());
    let fixture = Fixture::start_with(|backend| {
        let flaky = flaky.get_or_init(|| {
            let (away, refused) = (AtomicBool::new(true), AtomicUsize::new(0));
            Arc::new(Flaky { inner: Arc::clone(&backend.results), away, refused })
        });
        backend.results = Arc::clone(flaky) as _;
    })
    .await;
    let job = job(fixture.node, 1, now_ms());
    let id = job.id;
    fixture.dispatcher.submit(job, Permits::new()).unwrap().await.unwrap().unwrap();
    let state = fixture.dispatcher.state(id).await;
    assert!(matches!(state, Ok(JobState::Pending(_))), "a job in the table is known without the store");
    let flaky = flaky.get().unwrap();
    let before = flaky.refused.load(Ordering::Relaxed);
    // A second look-up occurs only if the first, which failed, has not ended the job.
    eventually(async || (flaky.refused.load(Ordering::Relaxed) >= before + 2).then_some(())).await;
    assert!(fixture.dispatcher.is_in_flight(id));
    flaky.away.store(false, Ordering::Relaxed);
    assert_eq!(fixture.row_status(id).await, "LOST");
}

#[tokio::test]
async fn a_restarted_node_resumes_its_jobs() {
    let fixture = Fixture::start_after(&[(1, LATER), (2, 1)]).await;
    let entries: Vec<JournalEntry> = fixture.backend.journal.entries(fixture.node).await.unwrap();
    let due = entries.iter().find(|entry| entry.deadline == 1).unwrap().id;
    let open = entries.iter().find(|entry| entry.deadline == LATER).unwrap().id;
    assert_eq!(fixture.row_status(due).await, "LOST");
    assert!(matches!(
        fixture.dispatcher.state(open).await,
        Ok(JobState::Pending(Pending { place: Some(_), .. }))
    ));
    fixture.dispatcher.settler().settle(open, outcome(r#"{"exitCode":0}"#));
    assert_eq!(fixture.row_status(open).await, "SUCCESS");
}

/// Its result is published to its own node, so only look-ups can end it here.
#[tokio::test]
async fn a_job_of_another_node_whose_resend_failed_ends() {
    let fixture = Fixture::start(|conf| conf.batch.queue_jobs_max = 0).await;
    let job = job(NodeId(99), 1, now_ms());
    let id = job.id;
    fixture.backend.journal.enter(std::slice::from_ref(&job)).await.unwrap();
    let resend = Resend { since: now_ms(), is_journaled: true, maybe_sent: true };
    let sent = fixture.dispatcher.submit_again(job, resend, false).await;
    assert_eq!(sent.map(drop), Err(SubmitError::Overloaded));
    assert_eq!(fixture.row_status(id).await, "LOST");
    fixture.is_forgotten(id).await;
}

#[tokio::test]
async fn a_row_without_room_is_retried_later() {
    let fixture = Fixture::start(|conf| conf.memory.audit_bytes_max = 1).await;
    let job = job(fixture.node, 1, LATER);
    let id = job.id;
    let mut submitted = fixture.dispatcher.submit_waiting(job, Permits::new()).unwrap();
    submitted.sent.await.unwrap().unwrap();
    let settler = fixture.dispatcher.settler();
    settler.settle(id, outcome("{}"));
    assert_eq!(submitted.waiter.outcome().await, Some(outcome("{}")), "the client does not wait for the row");
    assert!(fixture.dispatcher.is_in_flight(id), "but the job stays in the table");
    assert_eq!(fixture.metrics.results.with_label_values(&["deferred"]).get(), 1);
}

#[tokio::test]
async fn a_full_table_rejects_jobs() {
    let fixture = Fixture::start(|conf| conf.memory.jobs_in_flight_max = 1).await;
    fixture.dispatcher.submit(job(fixture.node, 1, LATER), Permits::new()).unwrap().await.unwrap().unwrap();
    assert_eq!(
        fixture.dispatcher.submit(job(fixture.node, 2, LATER), Permits::new()).map(drop),
        Err(SubmitError::Overloaded)
    );
    assert!(matches!(fixture.dispatcher.state(job(fixture.node, 3, LATER).id).await, Ok(JobState::Unknown)));
}
