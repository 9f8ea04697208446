//! Execution rows and counters, written in the background.
//!
//! [`Audit::record`] puts a row into a bounded queue and never waits. When the queue is full, the caller
//! keeps the job in flight and retries. So a slow log table costs a bounded amount of memory and delays no
//! client. One loop writes the rows in batches of 25. Then the [`ledger`] counts the executions and removes
//! their jobs from the journal.

mod batch;
mod disk;
mod failing;
mod flusher;
mod ledger;
mod record;
mod replay;
mod spill;
mod tail;
mod writer;

pub use disk::SpillDirs;
pub use flusher::Flusher;
#[cfg(test)]
pub use flusher::WRITES_MAX;
pub use ledger::{Ledger, Outstanding};
pub use record::{KeyedResult, QueueFull, RowsStored, Stores};
pub use tail::{Event, EventEntry, Executed, RecentEvents};

use crate::config::MemoryConf;
use crate::metrics::Metrics;
use crate::model::{Execution, JobId, NodeId, Recommendation, now_ms};
use crate::node_lease::NodeLease;
use record::Record;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::mpsc;
use tokio::time::Instant;
use writer::RowWriter;

/// Accepts rows. Cheap to clone.
#[derive(Clone)]
pub struct Audit {
    sender: mpsc::Sender<Record>,
    bytes: Arc<AtomicUsize>,
    bytes_max: usize,
    metrics: Arc<Metrics>,
    tail: RecentEvents,
    ledger: Arc<Ledger>,
    /// This node.
    node: NodeId,
}

impl Audit {
    /// Queues a row, with the recommendation of the execution and the result to be stored with its
    /// idempotency key, and counts it. `is_shared`: another node may end the job too.
    ///
    /// # Errors
    /// The queue is full. The caller must retry later.
    pub fn record(
        &self,
        id: JobId,
        row: Execution,
        exit_code: Option<i64>,
        recommendation: Option<Recommendation>,
        kept: Option<Box<KeyedResult>>,
        is_shared: bool,
    ) -> Result<(), QueueFull> {
        self.queue(
            Record {
                id,
                row,
                recommendation,
                kept,
                is_late: false,
                is_shared,
                since: Instant::now(),
                counted: 0,
            },
            exit_code,
        )
    }

    /// Like [`Self::record`], for a job that ended as LOST. The row replaces the LOST row.
    pub fn record_late(
        &self,
        id: JobId,
        row: Execution,
        exit_code: Option<i64>,
        recommendation: Option<Recommendation>,
    ) -> Result<(), QueueFull> {
        self.ledger.expect_late(id, &row.function);
        let record = Record {
            id,
            row,
            recommendation,
            kept: None,
            is_late: true,
            is_shared: true,
            since: Instant::now(),
            counted: 0,
        };
        let queued = self.queue(record, exit_code);
        queued.inspect_err(|_| self.ledger.forget_late(id))
    }

    fn queue(&self, mut record: Record, exit_code: Option<i64>) -> Result<(), QueueFull> {
        let bytes = record.bytes();
        record.counted = bytes;
        if self.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes > self.bytes_max {
            self.bytes.fetch_sub(bytes, Ordering::Relaxed);
            return Err(QueueFull);
        }
        let permit = self.sender.try_reserve().map_err(|_| {
            self.bytes.fetch_sub(bytes, Ordering::Relaxed);
            QueueFull
        })?;
        record.row.life.exit_code = exit_code;
        record.row.life.ended_by = (record.id.node() != self.node).then_some(self.node);
        self.metrics.observe_execution(&record.row);
        let row = &record.row;
        self.tail.note_execution(row.completed_at.unwrap_or_else(now_ms), || Executed {
            id: record.id,
            function: row.function.clone(),
            status: row.status.clone(),
            duration_ms: row.duration_ms,
            handler_duration_ms: row.handler_duration_ms,
            memory_mb: row.memory_mb,
            exit_code,
        });
        self.metrics.audit.waiting_rows.inc();
        permit.send(record);
        Ok(())
    }
}

impl Audit {
    /// The recent events, with the last executions.
    pub fn tail(&self) -> RecentEvents {
        self.tail.clone()
    }
}

/// The loops behind [`Audit`]. `flusher` must stop before `ledger`, because it passes its executions on to
/// it.
pub struct AuditLoops {
    pub flusher: Flusher,
    pub ledger: Arc<Ledger>,
    /// The directory for rows that the table does not accept. Must be probed at intervals.
    pub disk: Option<Arc<SpillDirs>>,
}

/// Creates the handle and its loops. `disk`: stores rows that the table does not accept; without it they stay
/// in memory.
pub fn new(
    conf: &MemoryConf,
    stores: Stores,
    disk: Option<SpillDirs>,
    lease: Arc<NodeLease>,
    metrics: Arc<Metrics>,
) -> (Audit, AuditLoops) {
    let (sender, receiver) = mpsc::channel(conf.audit_rows_max);
    let bytes = Arc::new(AtomicUsize::new(0));
    let disk = disk.map(Arc::new);
    let ledger = Ledger::new(stores.clone(), disk.clone(), Arc::clone(&metrics), ledger::WAITING_MAX);
    let ledger = Arc::new(ledger);
    let node = stores.node;
    let audit = Audit {
        sender,
        bytes: Arc::clone(&bytes),
        bytes_max: conf.audit_bytes_max,
        metrics: Arc::clone(&metrics),
        tail: RecentEvents::default(),
        ledger: Arc::clone(&ledger),
        node,
    };
    let writer = RowWriter::new(stores, disk.clone(), Arc::clone(&ledger), lease, Arc::clone(&metrics));
    let flusher = Flusher { receiver, bytes, writer: Arc::new(writer), metrics, ledger: Arc::clone(&ledger) };
    (audit, AuditLoops { flusher, ledger, disk })
}

#[cfg(test)]
mod tests;
