//! Writes rows of the disk to the table: spilled ones in batches, failing ones each alone.

use super::batch::{Batch, CallOutcome, batch_of};
use super::record::Record;
use super::spill::Replay;
use super::writer::{RowWriter, TRIED_EVERY};
use crate::ambient::blocking;
use crate::backend::{BackendError, ROWS_MAX};
use crate::model::JobId;
use std::io;
use std::sync::Arc;

impl RowWriter {
    /// Whether spilled rows may be replayed now.
    pub(super) fn may_replay(&self) -> bool {
        self.disk.as_ref().is_some_and(|disk| !disk.waiting.is_empty()) && self.may_try()
    }

    /// Replays spilled rows. Returns the jobs whose rows are now in the table.
    pub(super) async fn replay(self: Arc<Self>) -> Vec<JobId> {
        match self.try_replay().await {
            Ok(ids) => ids,
            Err(e) => {
                tracing::error!(error = %e, "Spilled rows cannot be replayed; retrying. Check the disk");
                tokio::time::sleep(TRIED_EVERY).await;
                Vec::new()
            }
        }
    }

    async fn try_replay(&self) -> io::Result<Vec<JobId>> {
        let Some(disk) = self.disk.clone() else { return Ok(Vec::new()) };
        let reading = Arc::clone(&disk);
        let Some(replay) = blocking(move || reading.waiting.next(ROWS_MAX)).await? else {
            return Ok(Vec::new());
        };
        let (segment, end) = replay.place();
        let rows = replay.records.len();
        let mut left = Batch::of(self.of_replay(replay).into_iter());
        let (mut done, mut moved) = (Batch::default(), Vec::new());
        while !left.is_empty() {
            let (now, later) = left.split_repeats();
            let CallOutcome { written, failed, untried, .. } = self.put(now).await;
            if !untried.is_empty() {
                // All of them are replayed again later; row writes are idempotent.
                tokio::time::sleep(TRIED_EVERY).await;
                return Ok(Vec::new());
            }
            let Ok(ids) = self.replay_alone(failed, &mut done, !written.is_empty()).await else {
                return Ok(Vec::new());
            };
            moved.extend(ids);
            done.append(written);
            left = later;
        }
        self.keep(&done).await;
        let ended = done.ended();
        moved.extend(&done.ids);
        // Added to the ledger before they leave the spill, so that a reader of both finds each job in at
        // least one.
        self.ledger.take(done);
        blocking(move || disk.waiting.replayed(segment, end, rows, &moved)).await?;
        Ok(ended)
    }

    /// The rows of a replay. While they were on the disk, another node may have ended the jobs of this one.
    fn of_replay(&self, replay: Replay) -> Vec<Record> {
        let is_shared = replay.is_inherited || self.lease.is_ever_shared();
        let mut records = replay.records;
        records.iter_mut().for_each(|record| record.is_shared |= is_shared);
        records
    }

    /// Writes the rows of a failed batch one by one. Rows that still fail move to the failing rows, provided
    /// that another row is written, because then the table is not at fault. Returns the jobs of the moved
    /// rows. On an error the table may be at fault.
    async fn replay_alone(
        &self,
        failed: Batch,
        done: &mut Batch,
        are_some_written: bool,
    ) -> Result<Vec<JobId>, ()> {
        if failed.is_empty() {
            return Ok(Vec::new());
        }
        if !are_some_written && !self.may_replay_alone() {
            return Err(());
        }
        let CallOutcome { written, failed, untried, .. } = self.put_alone(failed).await;
        if !untried.is_empty() || written.is_empty() && !are_some_written {
            return Err(());
        }
        let moved = self.spill(failed, |disk| &disk.failing).await.map_err(drop)?;
        done.append(written);
        Ok(moved.ids)
    }

    /// Whether failing rows may be retried now.
    pub(super) fn may_retry(&self) -> bool {
        // As a probe, too: there may be no other rows that would show that the table is back.
        self.failing().is_due()
            && self.disk.as_ref().is_some_and(|disk| !disk.failing.is_empty())
            && self.may_try()
    }

    /// Retries failing rows, each alone. Returns the jobs whose rows are now in the table or put aside.
    pub(super) async fn retry(self: Arc<Self>) -> Vec<JobId> {
        match self.try_retry().await {
            Ok(ids) => ids,
            Err(e) => {
                tracing::error!(error = %e, "Failing rows cannot be read or moved; retrying. Check the disk");
                self.failing().pause();
                Vec::new()
            }
        }
    }

    async fn try_retry(&self) -> io::Result<Vec<JobId>> {
        let Some(disk) = self.disk.clone() else { return Ok(Vec::new()) };
        let reading = Arc::clone(&disk);
        let next = blocking(move || (reading.failing.rows(), reading.failing.next(ROWS_MAX))).await;
        let (all, Some(replay)) = (next.0, next.1?) else { return Ok(Vec::new()) };
        let (segment, end) = replay.place();
        let rows = replay.records.len();
        // Failures of these rows say nothing about the table.
        let (mut put, failures) = self.call_alone(batch_of(self.of_replay(replay).into_iter())).await;
        let untried = std::mem::take(&mut put.untried);
        if put.written.is_empty() {
            self.failing().pause_for(rows, all);
        } else {
            self.table_is_there();
        }
        let mut done = self.settle(put).await.written;
        self.metrics.audit.retries.inc_by(failures.len() as u64);
        for (record, error) in &failures {
            tracing::debug!(requestId = %record.id, %error, "Row failed again");
        }
        let (hopeless, mut failing) = self.failing().count(failures, self.rows_written(), disk.aside_after);
        let aside = Arc::clone(&disk);
        let (reports, records): (Vec<_>, Vec<Record>) =
            hopeless.into_iter().map(|(record, error)| ((record.id, error), record)).unzip();
        let (result, records) = blocking(move || (aside.aside.append(&records), records)).await;
        match result {
            Ok(()) => {
                self.report_aside(&reports, &records);
                records.into_iter().for_each(|record| done.push(record));
            }
            Err(_) => failing.extend(records),
        }
        // Appended behind the other failing rows before the originals are removed.
        failing.extend(untried.into_records());
        let again = Arc::clone(&disk);
        blocking(move || again.failing.put_back(&failing)).await?;
        self.keep(&done).await;
        let (ids, ended) = (done.ids.clone(), done.ended());
        self.ledger.take(done);
        self.failing().remove(&ids);
        blocking(move || disk.failing.replayed(segment, end, rows, &ids)).await?;
        Ok(ended)
    }

    fn report_aside(&self, reports: &[(JobId, BackendError)], records: &[Record]) {
        self.metrics.audit.rows_put_aside.inc_by(records.len() as u64);
        for ((id, error), record) in reports.iter().zip(records) {
            tracing::error!(
                requestId = %id,
                functionId = %record.row.function,
                %error,
                hint = "fix the cause, then move spill/aside/* to spill/failing while the node is stopped",
                "Row Put Aside: the log table rejects it while it accepts others"
            );
        }
    }
}
