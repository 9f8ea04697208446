//! Writes rows, 25 per call, until each is in the table or, while the table is unavailable, on this node's
//! disk.
//!
//! After three seconds without a successful write the table counts as unavailable. Then rows go to the spill,
//! except for one batch at intervals that tests the table. When the table is back, spilled rows are replayed
//! beside new ones.
//!
//! One row that the table rejects must not block any other. Other rows show whether the row or the table is
//! at fault. A batch that fails repeatedly is written row by row. A row that fails alone while others succeed
//! goes to a separate place on the disk (see [`super::disk`]). The table counts as unavailable only if no
//! single row can explain all failures. A row that keeps failing there, while others are written between its
//! attempts, is put aside. A row that the table rejects as invalid is put aside immediately. The execution of
//! such a row counts, its job leaves the journal, and the row stays on the disk for the operator.

use super::record::{Record, Stores};
use super::spill::Spill;
use super::{Ledger, SpillDirs};
use crate::ambient::blocking;
use crate::audit::batch::{Batch, CallOutcome, RowOrigin, WriteOutcome, batch_of};
use crate::audit::failing::FailingRows;
use crate::availability::Availability;
use crate::backend::BackendError;
use crate::backoff::Backoff;
use crate::metrics::Metrics;
use crate::model::{Execution, JobId, NodeId, now_ms};
use crate::node_lease::NodeLease;
use futures_util::stream::{self, StreamExt};
use parking_lot::{Mutex, MutexGuard};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// The pauses before failed rows are retried.
const RETRIES: Backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(5));
/// The table counts as unavailable when no write has succeeded for this long.
const AWAY_AFTER: Duration = Duration::from_secs(3);
/// Interval between attempts while the table is unavailable.
pub(super) const TRIED_EVERY: Duration = Duration::from_secs(1);
/// Period, in attempts, at which the rows of a batch are written one by one.
const TRIES_TOGETHER: u32 = 3;
/// Single-row calls in flight.
const ALONE_AT_A_TIME: usize = 8;
/// Minimum interval between two replays that write a failing batch row by row.
const REPLAYED_ALONE_EVERY: Duration = Duration::from_secs(5);

pub(super) struct RowWriter {
    stores: Stores,
    pub(super) disk: Option<Arc<SpillDirs>>,
    pub(super) ledger: Arc<Ledger>,
    /// While it lapses, other nodes may end jobs of this node.
    pub(super) lease: Arc<NodeLease>,
    pub(super) metrics: Arc<Metrics>,
    /// The log table, where a disk can take its rows.
    availability: Availability,
    table: Mutex<TableState>,
    failing: Mutex<FailingRows>,
    /// All rows written so far. Shows whether others were written while one failed.
    written: AtomicU64,
    /// Set at shutdown: there is no time for retries.
    is_ending: AtomicBool,
}

/// The state of the log table.
#[derive(Default)]
struct TableState {
    /// Rows that took part in every failed call since the last success: one of them may be the cause.
    suspects: Vec<JobId>,
    /// When a batch was last replayed row by row.
    alone_at: Option<Instant>,
}

impl RowWriter {
    pub(super) fn new(
        stores: Stores,
        disk: Option<Arc<SpillDirs>>,
        ledger: Arc<Ledger>,
        lease: Arc<NodeLease>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            stores,
            disk,
            ledger,
            lease,
            metrics,
            availability: Availability::new(AWAY_AFTER, TRIED_EVERY),
            table: Mutex::default(),
            failing: Mutex::default(),
            written: AtomicU64::new(0),
            is_ending: AtomicBool::new(false),
        }
    }

    /// Shutdown begins: rows that fail are spilled immediately.
    pub(super) fn end(&self) {
        self.is_ending.store(true, Ordering::Relaxed);
    }

    /// Whether rows on the disk wait to be written to the table.
    pub(super) fn has_rows_on_disk(&self) -> bool {
        self.disk.as_ref().is_some_and(|disk| !disk.is_empty())
    }

    /// Writes a batch until each row is in the table, on the disk, or rejected as invalid.
    pub(super) async fn write(self: Arc<Self>, batch: Batch) -> WriteOutcome {
        let mut attempt = 0;
        let mut tried = WriteOutcome::default();
        let mut left = batch;
        let (began, mut tries, mut seen) = (Instant::now(), 0, self.rows_written());
        loop {
            if self.may_try() {
                let (now, later) = left.split_repeats();
                tries += 1;
                let are_alone = now.ids.len() == 1 || tries % TRIES_TOGETHER == 0;
                let CallOutcome { written, failed, untried, .. } =
                    if are_alone { self.put_alone(now).await } else { self.put(now).await };
                tried.written.append(written);
                left = later;
                match self.spill(untried, |disk| &disk.waiting).await {
                    Ok(spilled) => tried.spilled.append(spilled),
                    Err(back) => left.append(back),
                }
                let is_well = failed.is_empty();
                // If others were written since these rows failed last, the table is not at fault. A single
                // row whose cause is unknown is safe on the disk too.
                let is_row = self.rows_written() > seen || began.elapsed() >= AWAY_AFTER && !self.is_away();
                if are_alone && tries >= TRIES_TOGETHER && is_row {
                    match self.spill(failed, |disk| &disk.failing).await {
                        Ok(spilled) => tried.spilled.append(spilled),
                        Err(back) => left.append(back),
                    }
                } else {
                    left.append(failed);
                }
                seen = self.rows_written();
                if is_well && !left.is_empty() {
                    continue;
                }
            }
            if left.is_empty() || self.is_away() {
                match self.spill(left, |disk| &disk.waiting).await {
                    Ok(spilled) => {
                        tried.spilled.append(spilled);
                        self.keep(&tried.written).await;
                        return tried;
                    }
                    Err(back) => left = back,
                }
            }
            attempt += 1;
            RETRIES.sleep(attempt).await;
        }
    }

    pub(super) fn rows_written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Attempts all rows in one call.
    pub(super) async fn put(&self, batch: Batch) -> CallOutcome {
        let ids = batch.ids.clone();
        let put = self.call(batch).await;
        if !put.written.is_empty() {
            self.table_is_there();
        }
        if put.failure.is_some() {
            self.table_failed(if put.written.is_empty() { &ids } else { &put.failed.ids });
        }
        self.settle(put).await
    }

    /// Attempts each row in a call of its own.
    pub(super) async fn put_alone(&self, batch: Batch) -> CallOutcome {
        let (put, failures) = self.call_alone(batch).await;
        if !put.written.is_empty() {
            self.table_is_there();
        }
        for (record, _) in &failures {
            self.table_failed(&[record.id]);
        }
        let failed = CallOutcome { failed: batch_of(failures.into_iter().map(|(record, _)| record)), ..put };
        self.settle(failed).await
    }

    /// Returns the failed rows, each with its error.
    pub(super) async fn call_alone(&self, batch: Batch) -> (CallOutcome, Vec<(Record, BackendError)>) {
        let calls: Vec<_> =
            batch.into_records().map(|record| self.call(Batch::of(std::iter::once(record)))).collect();
        let mut calls = stream::iter(calls).buffer_unordered(ALONE_AT_A_TIME);
        let (mut all, mut failures) = (CallOutcome::default(), Vec::new());
        while let Some(mut put) = calls.next().await {
            if let Some(error) = &put.failure {
                let failed = std::mem::take(&mut put.failed);
                failures.extend(failed.into_records().map(|record| (record, error.clone())));
            }
            all.append(put);
        }
        (all, failures)
    }

    async fn call(&self, batch: Batch) -> CallOutcome {
        let (mut batch, untried) = self.entrust_late(batch).await;
        if batch.is_empty() {
            return CallOutcome { untried, ..CallOutcome::default() };
        }
        let results = self.put_rows(&mut batch).await;
        let put = CallOutcome { untried, ..batch.split(results, &self.metrics) };
        self.written.fetch_add(put.written.ids.len() as u64, Ordering::Relaxed);
        put
    }

    /// Prepares for the rows of late results of other nodes, which may be dead and have left the list. If
    /// this process dies before it has counted such a result, the next adopter does that. Returns the rows
    /// that may be written now, and the others.
    async fn entrust_late(&self, batch: Batch) -> (Batch, Batch) {
        let late = batch.ids.iter().zip(&batch.origins).filter(|(_, origin)| origin.is_late);
        let nodes: BTreeSet<NodeId> = late.map(|(id, _)| id.node()).collect();
        let mut silent = BTreeSet::new();
        for node in nodes {
            if let Err(e) = self.stores.entrust(node).await {
                tracing::debug!(%node, error = %e, "Rows of late results wait for an answer of Redis");
                silent.insert(node);
            }
        }
        if silent.is_empty() { (batch, Batch::default()) } else { batch.split_late(&silent) }
    }

    /// Writes rows. Returns one result per row, in order. A row that another node may write too is written
    /// only if it is the first. Otherwise the batch gets the row that is in the table, because that one
    /// counts.
    async fn put_rows(&self, batch: &mut Batch) -> Vec<Result<(), BackendError>> {
        let now = now_ms();
        for row in &mut batch.rows {
            row.life.complete();
            // The clock may have been set back.
            row.life.written_at = Some(row.completed_at.map_or(now, |heard| now.max(heard)));
        }
        let executions = &self.stores.executions;
        let is_shared: Vec<bool> = (0..batch.ids.len()).map(|n| self.is_shared(batch, n)).collect();
        if !is_shared.contains(&true) {
            return executions.put(&batch.rows).await;
        }
        // The journal must know it too.
        batch
            .origins
            .iter_mut()
            .zip(&is_shared)
            .for_each(|(origin, is_shared)| origin.is_shared = *is_shared);
        let of = |shared: bool| batch.rows.iter().zip(&is_shared).filter(move |(_, is)| **is == shared);
        let own: Vec<Execution> = of(false).map(|(row, _)| row.clone()).collect();
        let shared: Vec<_> = of(true).map(|(row, _)| executions.put_first(row)).collect();
        let shared: Vec<_> = stream::iter(shared).buffered(ALONE_AT_A_TIME).collect().await;
        let own = if own.is_empty() { Vec::new() } else { executions.put(&own).await };
        let (mut shared, mut own) = (shared.into_iter(), own.into_iter());
        let mut results = Vec::with_capacity(is_shared.len());
        for (n, is_shared) in is_shared.into_iter().enumerate() {
            if !is_shared {
                results.extend(own.next());
                continue;
            }
            results.extend(shared.next().map(|kept| kept.map(|kept| batch.keep(n, kept))));
        }
        results
    }

    /// Whether another node may write a row of this execution too.
    fn is_shared(&self, batch: &Batch, n: usize) -> bool {
        let RowOrigin { is_late, is_shared, since, .. } = batch.origins[n];
        is_late || is_shared || batch.rows[n].is_lost() || self.lease.is_shared_since(since)
    }

    /// Puts invalid rows aside, because a retry is useless, and logs failures that are retried.
    pub(super) async fn settle(&self, mut put: CallOutcome) -> CallOutcome {
        for record in self.put_aside(std::mem::take(&mut put.refused)).await {
            // If there is no room for them, that is logged; nothing else can be done.
            put.written.push(record);
        }
        if let Some(error) = put.failure.as_ref().filter(|_| !put.failed.is_empty()) {
            self.metrics.audit.retries.inc_by(put.failed.ids.len() as u64);
            tracing::warn!(rows = put.failed.ids.len(), %error, "Log rows not written; retrying");
        }
        put
    }

    /// Returns the batch as an error if there is no disk or it does not accept the rows.
    pub(super) async fn spill(
        &self,
        batch: Batch,
        place: impl FnOnce(&SpillDirs) -> &Spill + Send + 'static,
    ) -> Result<Batch, Batch> {
        if batch.is_empty() {
            return Ok(batch);
        }
        let Some(disk) = self.disk.clone() else { return Err(batch) };
        let records: Vec<Record> = batch.into_records().collect();
        let (result, records) = blocking(move || (place(&disk).append(&records), records)).await;
        let batch = Batch::of(records.into_iter());
        match result {
            Ok(()) => Ok(batch),
            Err(_) => Err(batch),
        }
    }

    /// Stores rows for the operator if there is a disk that accepts them. Returns the rows.
    async fn put_aside(&self, records: Vec<Record>) -> Vec<Record> {
        let Some(disk) = self.disk.clone().filter(|_| !records.is_empty()) else { return records };
        let (result, records) = blocking(move || (disk.aside.append(&records), records)).await;
        match result {
            Ok(()) => self.metrics.audit.rows_put_aside.inc_by(records.len() as u64),
            Err(e) => tracing::error!(
                rows = records.len(),
                error = %e,
                "Rejected rows cannot be put aside and are lost; check the disk and spill/aside"
            ),
        }
        records
    }

    /// 25 calls instead of one must be rare while the table may be unavailable.
    pub(super) fn may_replay_alone(&self) -> bool {
        let mut table = self.table();
        let may = table.alone_at.is_none_or(|at| at.elapsed() >= REPLAYED_ALONE_EVERY);
        if may {
            table.alone_at = Some(Instant::now());
        }
        may
    }

    /// Stores results for requests with an idempotency key. Few rows have one, so each is written alone.
    pub(super) async fn keep(&self, batch: &Batch) {
        for (id, kept) in batch.ids.iter().zip(&batch.kept) {
            let Some(kept) = kept else { continue };
            let mut attempt = 0;
            while let Err(e) = self.stores.claims.keep(&kept.key, *id, &kept.result).await {
                tracing::warn!(requestId = %id, error = %e, "Result not stored with its idempotency key");
                if !e.is_transient() {
                    break;
                }
                attempt += 1;
                RETRIES.sleep(attempt).await;
            }
        }
    }

    /// Whether to call the table: always, but rarely while it is unavailable.
    pub(super) fn may_try(&self) -> bool {
        if !self.is_away() {
            return true;
        }
        self.availability.take_probe()
    }

    fn is_away(&self) -> bool {
        if self.disk.is_none() {
            return false;
        }
        let is_ending = self.is_ending.load(Ordering::Relaxed);
        let after = if is_ending { Duration::ZERO } else { AWAY_AFTER };
        let is_failing = self.availability.failing_for().is_some_and(|failing| failing >= after);
        is_failing && (is_ending || self.table().suspects.is_empty())
    }

    pub(super) fn table_is_there(&self) {
        self.availability.succeeded();
        *self.table() = TableState::default();
    }

    /// A call for these rows has failed, and none of them was written.
    fn table_failed(&self, ids: &[JobId]) {
        let mut table = self.table();
        if self.availability.failing_for().is_none() {
            table.suspects = ids.to_vec();
        } else {
            table.suspects.retain(|id| ids.contains(id));
        }
        self.availability.failed();
    }

    pub(super) fn failing(&self) -> MutexGuard<'_, FailingRows> {
        self.failing.lock()
    }

    fn table(&self) -> MutexGuard<'_, TableState> {
        self.table.lock()
    }
}
