//! The loop that writes queued rows in batches.

use super::batch::{Batch, WriteOutcome};
use super::record::Record;
use super::writer::RowWriter;
use crate::audit::{Ledger, RowsStored};
use crate::backend::ROWS_MAX;
use crate::metrics::Metrics;
use crate::model::JobId;
use futures_util::stream::{FuturesUnordered, StreamExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// Maximum time that a row waits for its batch to fill.
pub const ROWS_LINGER: Duration = Duration::from_millis(50);

/// Maximum number of batches in flight. At 5 ms per write that is 80,000 rows per second.
pub const WRITES_MAX: usize = 16;

/// Interval at which the flusher checks whether it may write, replay or retry.
pub const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Time for which rows accumulate in the queue, so that one wake-up takes many.
pub const ROWS_GATHER: Duration = Duration::from_millis(5);

/// Deadline for the remaining rows during shutdown.
pub const ROWS_END_MAX: Duration = Duration::from_secs(7);

/// The loop that writes the rows of an [`Audit`](super::Audit).
pub struct Flusher {
    pub(super) receiver: mpsc::Receiver<Record>,
    pub(super) bytes: Arc<AtomicUsize>,
    pub(super) writer: Arc<RowWriter>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) ledger: Arc<Ledger>,
}

impl Flusher {
    /// Runs until `stop` resolves, then writes the rows that were accepted, for at most [`ROWS_END_MAX`].
    /// `told` receives the ids of jobs whose rows are stored.
    pub async fn run(mut self, told: Arc<dyn RowsStored>, stop: impl Future<Output = ()>) {
        tokio::pin!(stop);
        let mut end = None;
        let mut writes = FuturesUnordered::new();
        // At most one replay and one retry at a time, because new rows have priority.
        let mut replays = FuturesUnordered::new();
        let mut retries = FuturesUnordered::new();
        let mut gathered = Vec::with_capacity(ROWS_MAX);
        let (mut oldest, mut look_at) = (Instant::now(), Instant::now());
        // A deadline instead of a pause, because each new row would restart a pause.
        let mut look_at_disk = Instant::now();
        let mut open = true;
        while open || !gathered.is_empty() || !writes.is_empty() {
            let room = ROWS_MAX - gathered.len();
            let is_full = self.ledger.is_full();
            let may_write = writes.len() < WRITES_MAX && !is_full;
            let may_replay = !is_full && end.is_none();
            let looks = may_replay && self.writer.has_rows_on_disk();
            tokio::select! {
                biased;
                // First, because rows may never stop arriving.
                () = &mut stop, if end.is_none() => {
                    end = Some(Instant::now() + ROWS_END_MAX);
                    look_at = Instant::now();
                    self.receiver.close();
                    self.writer.end();
                }
                () = over(end) => break,
                Some(tried) = writes.next() => self.after_write(tried, told.as_ref()),
                Some::<Vec<JobId>>(ids) = replays.next() => told.rows_written(&ids),
                Some::<Vec<JobId>>(ids) = retries.next() => told.rows_written(&ids),
                () = tokio::time::sleep_until(look_at_disk),
                    if looks && (replays.is_empty() || retries.is_empty()) =>
                {
                    look_at_disk = Instant::now() + LOOK_AGAIN;
                    if replays.is_empty() && self.writer.may_replay() {
                        replays.push(Arc::clone(&self.writer).replay());
                    }
                    if retries.is_empty() && self.writer.may_retry() {
                        retries.push(Arc::clone(&self.writer).retry());
                    }
                }
                n = take(&mut self.receiver, &mut gathered, look_at), if open && room > 0 => {
                    open = n > 0;
                    if gathered.len() == n {
                        oldest = Instant::now();
                    }
                    if n < room {
                        look_at = Instant::now() + ROWS_GATHER;
                    }
                }
                () = tokio::time::sleep_until(oldest + ROWS_LINGER),
                    if !gathered.is_empty() && may_write => {}
                () = tokio::time::sleep(LOOK_AGAIN), if is_full => {}
            }
            let due = gathered.len() == ROWS_MAX || !open || oldest.elapsed() >= ROWS_LINGER;
            if due && !gathered.is_empty() && writes.len() < WRITES_MAX && !self.ledger.is_full() {
                let batch = Batch::of(gathered.drain(..));
                writes.push(Arc::clone(&self.writer).write(batch));
            }
        }
        let rows = self.metrics.audit.waiting_rows.get();
        if rows > 0 {
            // Their jobs stay in the journal, so the next start finds their results again.
            tracing::error!(
                rows,
                "Log rows not written before the deadline; the next start writes them. Check the log table"
            );
        }
    }

    fn after_write(&mut self, tried: WriteOutcome, told: &dyn RowsStored) {
        let WriteOutcome { written, spilled } = tried;
        self.bytes.fetch_sub(written.bytes + spilled.bytes, Ordering::Relaxed);
        self.metrics.audit.waiting_rows.sub((written.ids.len() + spilled.ids.len()) as i64);
        // Into the ledger before out of the table of jobs, so that a snapshot of both finds every job.
        let ended = written.ended();
        self.ledger.take(written);
        told.rows_written(&ended);
        told.rows_written(&spilled.ended());
    }
}

/// Waits until `at` and for the first row, then takes the queued rows that fit the batch. Returns their
/// number; 0: the queue is closed.
pub async fn take(receiver: &mut mpsc::Receiver<Record>, gathered: &mut Vec<Record>, at: Instant) -> usize {
    tokio::time::sleep_until(at).await;
    receiver.recv_many(gathered, ROWS_MAX - gathered.len()).await
}

/// Resolves at `end`; never if it is `None`.
pub async fn over(end: Option<Instant>) {
    match end {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
