//! Writes rows, 25 a call, until the table has them, or, while it takes none, this node's disk.
//!
//! When nothing could be written for a while the table counts as away. Then rows go to the spill, but for a batch now
//! and then that tries whether the table is back; and when it is, what was spilled is replayed beside the new rows.

use super::{Kept, Ledger, Record, Spill, Stores};
use crate::backend::{BackendError, ROWS_MAX};
use crate::metrics::Metrics;
use crate::model::{Execution, JobId, Recommendation};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Pause before rows that failed are written again: doubles from the first to the last.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_LAST: Duration = Duration::from_secs(5);
/// The table counts as away when nothing could be written for so long.
const AWAY_AFTER: Duration = Duration::from_secs(3);
/// How often it is tried then.
const TRIED_EVERY: Duration = Duration::from_secs(1);

/// Rows that are written together, each with what it advises.
#[derive(Default)]
pub(super) struct Batch {
    pub(super) ids: Vec<JobId>,
    pub(super) rows: Vec<Execution>,
    pub(super) recommendations: Vec<Option<Recommendation>>,
    kept: Vec<Option<Box<Kept>>>,
    /// As they were counted when they were queued.
    pub(super) bytes: usize,
}

impl Batch {
    pub(super) fn of(records: impl ExactSizeIterator<Item = Record>) -> Self {
        let n = records.len();
        let (ids, rows) = (Vec::with_capacity(n), Vec::with_capacity(n));
        let (recommendations, kept) = (Vec::with_capacity(n), Vec::with_capacity(n));
        let mut batch = Self { ids, rows, recommendations, kept, bytes: 0 };
        for record in records {
            batch.push(record);
        }
        batch
    }

    fn push(&mut self, record: Record) {
        self.bytes += record.bytes();
        self.ids.push(record.id);
        self.rows.push(record.row);
        self.recommendations.push(record.recommendation);
        self.kept.push(record.kept);
    }

    fn append(&mut self, mut other: Self) {
        if self.ids.is_empty() {
            *self = other;
            return;
        }
        self.bytes += other.bytes;
        self.ids.append(&mut other.ids);
        self.rows.append(&mut other.rows);
        self.recommendations.append(&mut other.recommendations);
        self.kept.append(&mut other.kept);
    }

    fn into_records(self) -> impl Iterator<Item = Record> {
        let records = self.ids.into_iter().zip(self.rows).zip(self.recommendations).zip(self.kept);
        records.map(|(((id, row), recommendation), kept)| Record { id, row, recommendation, kept })
    }

    /// Splits off what stands in the batch before: a table takes a key once in a call.
    fn split_repeats(self) -> (Self, Self) {
        let is_repeat = |n: usize| self.ids[..n].contains(&self.ids[n]);
        if !(0..self.ids.len()).any(is_repeat) {
            return (self, Self::default());
        }
        let (mut first, mut repeats) = (Self::default(), Self::default());
        for record in self.into_records() {
            if first.ids.contains(&record.id) { repeats.push(record) } else { first.push(record) }
        }
        (first, repeats)
    }

    /// What needs no other try, what does, and why.
    fn split(
        self,
        results: Vec<Result<(), BackendError>>,
        metrics: &Metrics,
    ) -> (Self, Self, Option<BackendError>) {
        if results.iter().all(Result::is_ok) {
            metrics.audit.rows.inc_by(results.len() as u64);
            return (self, Self::default(), None);
        }
        let (mut done, mut failed, mut failure) = (Self::default(), Self::default(), None);
        for (record, result) in self.into_records().zip(results) {
            match result {
                Ok(()) => {
                    metrics.audit.rows.inc();
                    done.push(record);
                }
                Err(BackendError::Invalid(e)) => {
                    metrics.audit.rows_refused.inc();
                    tracing::error!(requestId = %record.id, functionId = %record.row.function, error = e, "Row Refused");
                    done.push(record);
                }
                Err(e) => {
                    failure = Some(e);
                    failed.push(record);
                }
            }
        }
        (done, failed, failure)
    }
}

/// What became of a batch.
#[derive(Default)]
pub(super) struct Tried {
    /// In the table, or refused for good.
    pub(super) written: Batch,
    /// On this node's disk.
    pub(super) spilled: Batch,
}

pub(super) struct Writer {
    stores: Stores,
    spill: Option<Arc<Spill>>,
    ledger: Arc<Ledger>,
    metrics: Arc<Metrics>,
    table: Mutex<Table>,
    /// There is no time for retries any more.
    is_ending: AtomicBool,
}

/// What is known of the log table.
#[derive(Default)]
struct Table {
    failing_since: Option<Instant>,
    /// While it is away.
    next_try: Option<Instant>,
}

impl Writer {
    pub(super) fn new(
        stores: Stores,
        spill: Option<Arc<Spill>>,
        ledger: Arc<Ledger>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let (table, is_ending) = (Mutex::default(), AtomicBool::new(false));
        Self { stores, spill, ledger, metrics, table, is_ending }
    }

    /// From now on what fails is spilled at once.
    pub(super) fn end(&self) {
        self.is_ending.store(true, Ordering::Relaxed);
    }

    /// Whether rows are on the disk.
    pub(super) fn has_spilled(&self) -> bool {
        self.spill.as_ref().is_some_and(|spill| !spill.is_empty())
    }

    /// Writes a batch until every row is in the table, on the disk, or refused for good.
    pub(super) async fn write(self: Arc<Self>, batch: Batch) -> Tried {
        let mut pause = RETRY_FIRST;
        let mut done = Batch::default();
        let mut left = batch;
        loop {
            if self.may_try() {
                let (now, later) = left.split_repeats();
                let (written, failed) = self.put(now).await;
                let is_well = failed.ids.is_empty();
                done.append(written);
                left = later;
                left.append(failed);
                if is_well && !left.ids.is_empty() {
                    continue;
                }
            }
            if left.ids.is_empty() || self.is_away() {
                match self.spill(left).await {
                    Ok(spilled) => {
                        self.keep(&done).await;
                        return Tried { written: done, spilled };
                    }
                    Err(back) => left = back,
                }
            }
            tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
            pause = (pause * 2).min(RETRY_LAST);
        }
    }

    /// One try: what needs no other, and what does.
    async fn put(&self, batch: Batch) -> (Batch, Batch) {
        let results = self.stores.executions.put(&batch.rows).await;
        let (mut written, failed, failure) = batch.split(results, &self.metrics);
        for row in written.rows.iter_mut().filter(|row| row.is_lost()) {
            self.read_kept(row).await;
        }
        if !written.ids.is_empty() {
            self.table_is_there();
        }
        if let Some(e) = failure {
            self.table_failed();
            self.metrics.audit.retries.inc_by(failed.ids.len() as u64);
            tracing::warn!(rows = failed.ids.len(), error = %e, "Rows Not Written");
        }
        (written, failed)
    }

    /// LOST replaces no row: what another node knew of the job stays, and is what counts.
    async fn read_kept(&self, row: &mut Execution) {
        match self.stores.executions.get(&row.function, &row.id.request_id()).await {
            Ok(Some(kept)) => *row = kept,
            Ok(None) => {}
            // It is counted as lost then; seldom is there another row.
            Err(e) => tracing::debug!(error = %e, "Row Not Read Again"),
        }
    }

    /// The batch back if the disk does not take it, or there is none to take it.
    async fn spill(&self, batch: Batch) -> Result<Batch, Batch> {
        if batch.ids.is_empty() {
            return Ok(batch);
        }
        let Some(spill) = self.spill.clone() else { return Err(batch) };
        let records: Vec<Record> = batch.into_records().collect();
        let appended = blocking(move || (spill.append(&records), records)).await;
        let (result, records) = appended;
        let batch = Batch::of(records.into_iter());
        match result {
            Ok(()) => Ok(batch),
            Err(_) => Err(batch),
        }
    }

    /// Whether some of what was spilled may be replayed now.
    pub(super) fn may_replay(&self) -> bool {
        self.has_spilled() && self.may_try()
    }

    /// Replays some of what was spilled. Gives the jobs whose rows are in the table now.
    pub(super) async fn replay(self: Arc<Self>) -> Vec<JobId> {
        match self.try_replay().await {
            Ok(ids) => ids,
            Err(e) => {
                tracing::error!(error = %e, "Rows Not Replayed");
                tokio::time::sleep(TRIED_EVERY).await;
                Vec::new()
            }
        }
    }

    async fn try_replay(&self) -> io::Result<Vec<JobId>> {
        let Some(spill) = self.spill.clone() else { return Ok(Vec::new()) };
        let reading = Arc::clone(&spill);
        let Some(replay) = blocking(move || reading.next(ROWS_MAX)).await? else { return Ok(Vec::new()) };
        let (segment, end) = replay.place();
        let mut left = Batch::of(replay.records.into_iter());
        let mut done = Batch::default();
        while !left.ids.is_empty() {
            let (now, later) = left.split_repeats();
            let (written, failed) = self.put(now).await;
            if !failed.ids.is_empty() {
                // All of them again, later: a row that is written twice is the same.
                return Ok(Vec::new());
            }
            done.append(written);
            left = later;
        }
        self.keep(&done).await;
        let ids = done.ids.clone();
        // Into the books before it is out of the spill: whoever looks at both finds it in one.
        self.ledger.take(&done.ids, done.rows, done.recommendations);
        blocking(move || spill.replayed(segment, end, &done.ids)).await?;
        Ok(ids)
    }

    /// Keeps the results whose requests may be repeated. Few have any, and they are written one by one.
    async fn keep(&self, batch: &Batch) {
        for (id, kept) in batch.ids.iter().zip(&batch.kept) {
            let Some(kept) = kept else { continue };
            let mut pause = RETRY_FIRST;
            while let Err(e) = self.stores.claims.keep(&kept.key, *id, &kept.result).await {
                tracing::warn!(requestId = %id, error = %e, "Result Not Kept");
                if !e.is_transient() {
                    break;
                }
                tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
                pause = (pause * 2).min(RETRY_LAST);
            }
        }
    }

    /// Whether the table is to be asked: always, but seldom while it is away.
    fn may_try(&self) -> bool {
        if !self.is_away() {
            return true;
        }
        let now = Instant::now();
        let mut table = self.table();
        if table.next_try.is_some_and(|at| now < at) {
            return false;
        }
        table.next_try = Some(now + TRIED_EVERY);
        true
    }

    fn is_away(&self) -> bool {
        let failing = self.table().failing_since;
        let after = if self.is_ending.load(Ordering::Relaxed) { Duration::ZERO } else { AWAY_AFTER };
        self.spill.is_some() && failing.is_some_and(|since| since.elapsed() >= after)
    }

    fn table_is_there(&self) {
        *self.table() = Table::default();
    }

    fn table_failed(&self) {
        self.table().failing_since.get_or_insert_with(Instant::now);
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Work on files, on a thread that may wait for them.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        // It is never cancelled, so it panicked.
        Err(e) => std::panic::resume_unwind(e.into_panic()),
    }
}
