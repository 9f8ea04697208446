//! Execution rows and counters, written in the background.
//!
//! A bounded queue in front: [`Audit::record`] never waits. When it is full the caller keeps the job in flight
//! and comes again, so a slow log table costs memory up to the bound and nothing else. Behind it one loop writes
//! rows 25 at a time and adds the counters of each function up, written about once a second.

mod tail;

pub use tail::{Tail, TailEntry};

use crate::backend::{BackendError, ExecutionStore, FunctionStore, ROWS_MAX};
use crate::config::MemoryConf;
use crate::metrics::Metrics;
use crate::model::{Counters, Execution, FunctionId, JobId, Recommendation, Status};
use futures_util::stream::{FuturesUnordered, StreamExt};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// How long a row waits for company.
const ROWS_LINGER: Duration = Duration::from_millis(50);
/// Row writes in flight at a time.
const WRITES_MAX: usize = 4;
/// How often the counters are written.
const COUNTERS_PERIOD: Duration = Duration::from_secs(1);
/// Counter updates in flight at a time.
const UPDATES_MAX: usize = 8;
/// Pause before rows that failed are written again: doubles from the first to the last.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_LAST: Duration = Duration::from_secs(5);

/// The queue is full: the log table does not keep up.
#[derive(Debug, PartialEq, Eq)]
pub struct Full;

/// Who is told that rows are written. Must not wait: rows of other jobs stand behind.
pub trait Ledger: Send + Sync {
    fn rows_written(&self, ids: &[JobId]);
}

/// Takes rows. Cheap to clone.
#[derive(Clone)]
pub struct Audit {
    sender: mpsc::Sender<Record>,
    bytes: Arc<AtomicUsize>,
    bytes_max: usize,
    metrics: Arc<Metrics>,
    tail: Tail,
}

struct Record {
    id: JobId,
    row: Execution,
    recommendation: Option<Recommendation>,
}

impl Record {
    /// Memory the row takes, roughly.
    fn bytes(&self) -> usize {
        let tip = self.recommendation.as_ref().and_then(|r| r.tip.as_ref()).map_or(0, String::len);
        self.row.message.len() + tip + 512
    }
}

impl Audit {
    /// Queues a row with what the execution recommends, and counts it.
    pub fn record(
        &self,
        id: JobId,
        row: Execution,
        recommendation: Option<Recommendation>,
    ) -> Result<(), Full> {
        let record = Record { id, row, recommendation };
        let bytes = record.bytes();
        if self.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes > self.bytes_max {
            self.bytes.fetch_sub(bytes, Ordering::Relaxed);
            return Err(Full);
        }
        let permit = self.sender.try_reserve().map_err(|_| {
            self.bytes.fetch_sub(bytes, Ordering::Relaxed);
            Full
        })?;
        self.metrics.observe_execution(&record.row);
        self.tail.push(&record.row);
        self.metrics.audit_waiting_rows.inc();
        permit.send(record);
        Ok(())
    }
}

impl Audit {
    /// The last executions.
    pub fn tail(&self) -> Tail {
        self.tail.clone()
    }
}

/// The loop behind [`Audit`].
pub struct Flusher {
    receiver: mpsc::Receiver<Record>,
    bytes: Arc<AtomicUsize>,
    executions: Arc<dyn ExecutionStore>,
    functions: Arc<dyn FunctionStore>,
    metrics: Arc<Metrics>,
    notes: Notes,
}

/// What is to be written to the functions themselves.
#[derive(Default)]
struct Notes(HashMap<FunctionId, Note>);

#[derive(Default)]
struct Note {
    sums: Counters,
    /// The newest.
    recommendation: Option<Recommendation>,
}

impl Notes {
    fn add(&mut self, function: FunctionId, note: Note) {
        let noted = self.0.entry(function).or_default();
        noted.sums += note.sums;
        let newest = |r: &Option<Recommendation>| r.as_ref().map(|r| r.at);
        if newest(&note.recommendation) >= newest(&noted.recommendation) {
            noted.recommendation = note.recommendation;
        }
    }
}

/// A handle and its loop.
pub fn new(
    conf: &MemoryConf,
    executions: Arc<dyn ExecutionStore>,
    functions: Arc<dyn FunctionStore>,
    metrics: Arc<Metrics>,
) -> (Audit, Flusher) {
    let (sender, receiver) = mpsc::channel(conf.audit_rows_max);
    let bytes = Arc::new(AtomicUsize::new(0));
    let audit = Audit {
        sender,
        bytes: Arc::clone(&bytes),
        bytes_max: conf.audit_bytes_max,
        metrics: Arc::clone(&metrics),
        tail: Tail::default(),
    };
    let flusher = Flusher { receiver, bytes, executions, functions, metrics, notes: Notes::default() };
    (audit, flusher)
}

impl Flusher {
    /// Runs until `stop` resolves, and then until every row that was taken is written.
    pub async fn run(mut self, ledger: Arc<dyn Ledger>, stop: impl Future<Output = ()>) {
        tokio::pin!(stop);
        let mut stopping = false;
        let mut writes = FuturesUnordered::new();
        let mut batch = Vec::with_capacity(ROWS_MAX);
        let mut oldest = Instant::now();
        let mut counters_at = Instant::now() + COUNTERS_PERIOD;
        // At most one: a table that does not answer must not hold the rows up.
        let mut sums = FuturesUnordered::new();
        let mut open = true;
        while open || !batch.is_empty() || !writes.is_empty() || !sums.is_empty() {
            let room = ROWS_MAX - batch.len();
            tokio::select! {
                Some(written) = writes.next() => self.after_write(written, ledger.as_ref()),
                n = self.receiver.recv_many(&mut batch, room), if open && room > 0 => {
                    open = n > 0;
                    if batch.len() == n {
                        oldest = Instant::now();
                    }
                }
                () = tokio::time::sleep_until(oldest + ROWS_LINGER), if !batch.is_empty() && writes.len() < WRITES_MAX => {}
                Some(left) = sums.next() => self.add_back(left),
                () = tokio::time::sleep_until(counters_at), if sums.is_empty() => {
                    counters_at = Instant::now() + COUNTERS_PERIOD;
                    sums.push(write_notes(Arc::clone(&self.functions), std::mem::take(&mut self.notes)));
                }
                () = &mut stop, if !stopping => {
                    stopping = true;
                    self.receiver.close();
                }
            }
            let due = batch.len() == ROWS_MAX || !open || oldest.elapsed() >= ROWS_LINGER;
            if due && !batch.is_empty() && writes.len() < WRITES_MAX {
                let records = std::mem::replace(&mut batch, Vec::with_capacity(ROWS_MAX));
                writes.push(write(Arc::clone(&self.executions), Arc::clone(&self.metrics), records));
            }
        }
        let left = write_notes(self.functions, self.notes).await;
        if !left.is_empty() {
            tracing::error!(functions = left.len(), "Counters Lost");
        }
    }

    fn after_write(&mut self, written: Vec<Record>, ledger: &dyn Ledger) {
        let mut ids = Vec::with_capacity(written.len());
        for record in written {
            self.bytes.fetch_sub(record.bytes(), Ordering::Relaxed);
            self.metrics.audit_waiting_rows.dec();
            ids.push(record.id);
            let note = Note { sums: counted(&record.row), recommendation: record.recommendation };
            self.notes.add(record.row.function, note);
        }
        ledger.rows_written(&ids);
    }

    /// What could not be written, for the next time.
    fn add_back(&mut self, left: Vec<(FunctionId, Note)>) {
        for (function, note) in left {
            self.notes.add(function, note);
        }
    }
}

/// Writes the notes; gives those back that could not be written.
async fn write_notes(store: Arc<dyn FunctionStore>, notes: Notes) -> Vec<(FunctionId, Note)> {
    let mut notes = notes.0.into_iter();
    let mut updates = FuturesUnordered::new();
    let mut left = Vec::new();
    loop {
        let free = UPDATES_MAX - updates.len();
        updates.extend(notes.by_ref().take(free).map(|(function, note)| write_note(&*store, function, note)));
        match updates.next().await {
            None => return left,
            Some(failed) => left.extend(failed),
        }
    }
}

/// What could not be written of a note.
async fn write_note(
    store: &dyn FunctionStore,
    function: FunctionId,
    mut note: Note,
) -> Option<(FunctionId, Note)> {
    if note.sums != Counters::default() {
        match store.add_counters(&function, note.sums).await {
            Ok(()) => note.sums = Counters::default(),
            Err(e) => tracing::warn!(functionId = %function, error = %e, "Counters Not Written"),
        }
    }
    if let Some(recommendation) = &note.recommendation {
        match store.recommend(&function, recommendation).await {
            Ok(()) => note.recommendation = None,
            Err(e) => tracing::warn!(functionId = %function, error = %e, "Recommendation Not Written"),
        }
    }
    let is_left = note.sums != Counters::default() || note.recommendation.is_some();
    is_left.then_some((function, note))
}

fn counted(row: &Execution) -> Counters {
    Counters {
        invocations: 1,
        errors: u64::from(row.status.as_str() != Status::SUCCESS),
        total_duration_ms: row.duration_ms,
        handler_invocations: u64::from(row.handler_duration_ms.is_some()),
        total_handler_duration_ms: row.handler_duration_ms.unwrap_or(0.0),
    }
}

/// Writes a batch until every row is in the table, or refused for good; gives the records back.
async fn write(store: Arc<dyn ExecutionStore>, metrics: Arc<Metrics>, records: Vec<Record>) -> Vec<Record> {
    let mut pause = RETRY_FIRST;
    let mut done = Vec::with_capacity(records.len());
    let mut left = records;
    loop {
        let (now, later) = without_repeats(left);
        let rows: Vec<Execution> = now.iter().map(|record| record.row.clone()).collect();
        let results = store.put(&rows).await;
        left = later;
        let mut failure = None;
        for (record, result) in now.into_iter().zip(results) {
            match result {
                Ok(()) => {
                    metrics.audit_rows.inc();
                    done.push(record);
                }
                Err(BackendError::Invalid(e)) => {
                    metrics.audit_rows_refused.inc();
                    tracing::error!(requestId = %record.id, functionId = %record.row.function, error = e, "Row Refused");
                    done.push(record);
                }
                Err(e) => {
                    failure = Some(e);
                    left.push(record);
                }
            }
        }
        if left.is_empty() {
            return done;
        }
        if let Some(e) = failure {
            metrics.audit_retries.inc_by(left.len() as u64);
            tracing::warn!(rows = left.len(), error = %e, "Rows Not Written");
            tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
            pause = (pause * 2).min(RETRY_LAST);
        }
    }
}

/// Splits off records whose row stands in the batch already: a table takes a key once in a call.
fn without_repeats(records: Vec<Record>) -> (Vec<Record>, Vec<Record>) {
    let mut seen = HashSet::new();
    records.into_iter().partition(|record| seen.insert(record.id))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{FunctionPage, FunctionWrite, LogPage, LogQuery, Written};
    use crate::model::{Function, NodeId, Outcome, RowKey};
    use async_trait::async_trait;
    use std::sync::Mutex;

    /// Tables in memory that fail as told: one entry a call, fine when it is used up.
    #[derive(Default)]
    struct Tables {
        failures: Mutex<Vec<BackendError>>,
        rows: Mutex<HashMap<RowKey, Execution>>,
        puts: Mutex<Vec<usize>>,
        sums: Mutex<HashMap<FunctionId, Counters>>,
        left: Mutex<Vec<JobId>>,
        failed_recommendations: Mutex<Vec<BackendError>>,
        recommended: Mutex<Vec<(FunctionId, Recommendation)>>,
    }

    #[async_trait]
    impl ExecutionStore for Tables {
        async fn put(&self, rows: &[Execution]) -> Vec<Result<(), BackendError>> {
            self.puts.lock().unwrap().push(rows.len());
            if let Some(error) = self.failures.lock().unwrap().pop() {
                return vec![Err(error); rows.len()];
            }
            self.rows.lock().unwrap().extend(rows.iter().map(|row| (row.key.clone(), row.clone())));
            vec![Ok(()); rows.len()]
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
    impl FunctionStore for Tables {
        async fn get(&self, _: &FunctionId) -> Result<Option<Function>, BackendError> {
            Ok(None)
        }

        async fn list(&self, _: usize, _: Option<&str>) -> Result<FunctionPage, BackendError> {
            Ok(FunctionPage::default())
        }

        async fn write(&self, _: &FunctionWrite) -> Result<Written, BackendError> {
            Ok(Written::Conflict)
        }

        async fn recommend(&self, id: &FunctionId, r: &Recommendation) -> Result<(), BackendError> {
            if let Some(error) = self.failed_recommendations.lock().unwrap().pop() {
                return Err(error);
            }
            self.recommended.lock().unwrap().push((id.clone(), r.clone()));
            Ok(())
        }

        async fn add_counters(&self, id: &FunctionId, sums: Counters) -> Result<(), BackendError> {
            *self.sums.lock().unwrap().entry(id.clone()).or_default() += sums;
            Ok(())
        }

        async fn probe(&self) -> Result<(), BackendError> {
            Ok(())
        }
    }

    impl Ledger for Tables {
        fn rows_written(&self, ids: &[JobId]) {
            self.left.lock().unwrap().extend_from_slice(ids);
        }
    }

    fn audit(tables: &Arc<Tables>, rows_max: usize, bytes_max: usize) -> (Audit, Flusher) {
        let mut conf = crate::config::Conf::shipped().unwrap().memory;
        (conf.audit_rows_max, conf.audit_bytes_max) = (rows_max, bytes_max);
        let metrics = Arc::new(Metrics::new(10).unwrap());
        new(&conf, Arc::clone(tables) as _, Arc::clone(tables) as _, metrics)
    }

    fn record(audit: &Audit, n: u64) -> Result<(), Full> {
        let id = JobId::new(NodeId(1), 1, n);
        let outcome = Outcome::new(r#"{"status":"SUCCESS","durationMs":3,"handlerDurationMs":2}"#.into());
        let fields = outcome.fields();
        let row = Execution::of(id, FunctionId::parse("f").unwrap(), &fields);
        audit.record(id, row, Recommendation::of(id, &fields))
    }

    #[tokio::test(start_paused = true)]
    async fn every_row_is_written_and_counted_once_whatever_fails_on_the_way() {
        let tables = Arc::new(Tables::default());
        let unavailable = BackendError::Unavailable("x".into());
        *tables.failures.lock().unwrap() = vec![unavailable; 5];
        let (audit, flusher) = audit(&tables, 1000, 1 << 20);
        for n in 0..60 {
            record(&audit, n).unwrap();
        }
        flusher.run(Arc::clone(&tables) as _, async {}).await;
        assert_eq!(tables.rows.lock().unwrap().len(), 60);
        assert_eq!(tables.left.lock().unwrap().len(), 60);
        let puts = tables.puts.lock().unwrap().clone();
        assert_eq!(puts.iter().max(), Some(&ROWS_MAX), "{puts:?}");
        let sums = Counters {
            invocations: 60,
            errors: 0,
            total_duration_ms: 180.0,
            handler_invocations: 60,
            total_handler_duration_ms: 120.0,
        };
        assert_eq!(tables.sums.lock().unwrap().get(&FunctionId::parse("f").unwrap()), Some(&sums));
        assert_eq!(audit.metrics.audit_waiting_rows.get(), 0);
        assert_eq!(audit.bytes.load(Ordering::Relaxed), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_row_that_is_refused_for_good_holds_nothing_up() {
        let tables = Arc::new(Tables::default());
        *tables.failures.lock().unwrap() = vec![BackendError::Invalid("x".into())];
        let (audit, flusher) = audit(&tables, 10, 1 << 20);
        record(&audit, 1).unwrap();
        flusher.run(Arc::clone(&tables) as _, async {}).await;
        assert_eq!((tables.rows.lock().unwrap().len(), tables.left.lock().unwrap().len()), (0, 1));
        assert_eq!(audit.metrics.audit_rows_refused.get(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn the_newest_recommendation_is_kept_and_written_again_after_a_failure() {
        let tables = Arc::new(Tables::default());
        *tables.failed_recommendations.lock().unwrap() = vec![BackendError::Unavailable("x".into())];
        let (audit, flusher) = audit(&tables, 10, 1 << 20);
        let f = FunctionId::parse("f").unwrap();
        for (at, mb) in [(1, Some(128)), (3, Some(256)), (2, Some(512)), (4, None)] {
            let id = JobId::new(NodeId(1), at, at);
            let result = mb.map_or("{}".to_owned(), |mb| format!("{{\"recommendedMemoryMb\":{mb}}}"));
            let fields = Outcome::new(result.into()).fields();
            let row = Execution::of(id, f.clone(), &fields);
            audit.record(id, row, Recommendation::of(id, &fields)).unwrap();
        }
        let later = tokio::time::sleep(3 * COUNTERS_PERIOD);
        flusher.run(Arc::clone(&tables) as _, later).await;
        let recommended = tables.recommended.lock().unwrap().clone();
        let [(id, r)] = &recommended[..] else { panic!("{recommended:?}") };
        assert_eq!((id, r.memory_mb, r.at), (&f, Some(256), 3));
        assert_eq!(tables.sums.lock().unwrap()[&f].errors, 4, "a result without a status is an error");
    }

    #[tokio::test]
    async fn the_queue_is_bounded_in_rows_and_bytes() {
        let tables = Arc::new(Tables::default());
        let (audit, _flusher) = self::audit(&tables, 2, 1 << 20);
        assert_eq!([record(&audit, 1), record(&audit, 2), record(&audit, 3)], [Ok(()), Ok(()), Err(Full)]);
        let (audit, _flusher) = self::audit(&tables, 10, 1000);
        assert_eq!([record(&audit, 1), record(&audit, 2)], [Ok(()), Err(Full)]);
    }
}
