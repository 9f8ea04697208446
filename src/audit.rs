//! Execution rows and counters, written in the background.
//!
//! A bounded queue in front: [`Audit::record`] never waits. When it is full the caller keeps the job in flight
//! and comes again, so a slow log table costs memory up to the bound and nothing else. Behind it one loop writes
//! rows 25 at a time. Then the books of these executions are closed ([`ledger`]).

mod disk;
mod flusher;
mod ledger;
mod record;
mod spill;
mod tail;
mod writer;

pub use disk::SpillDirs;
pub use flusher::Flusher;
pub use ledger::{Ledger, Outstanding};
pub use record::{KeyedResult, QueueFull, RowsStored, Stores};
pub use tail::{Event, EventEntry, Executed, RecentEvents};

use crate::config::MemoryConf;
use crate::metrics::Metrics;
use crate::model::{Execution, JobId, Recommendation, now_ms};
use record::Record;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::mpsc;
use writer::RowWriter;

/// Takes rows. Cheap to clone.
#[derive(Clone)]
pub struct Audit {
    sender: mpsc::Sender<Record>,
    bytes: Arc<AtomicUsize>,
    bytes_max: usize,
    metrics: Arc<Metrics>,
    tail: RecentEvents,
    ledger: Arc<Ledger>,
}

impl Audit {
    /// Queues a row with what the execution recommends and what is to be kept of it, and counts it. The exit
    /// code is only shown to those who look on: rows have none.
    pub fn record(
        &self,
        id: JobId,
        row: Execution,
        exit_code: Option<i64>,
        recommendation: Option<Recommendation>,
        kept: Option<Box<KeyedResult>>,
    ) -> Result<(), QueueFull> {
        self.queue(Record { id, row, recommendation, kept, is_late: false }, exit_code)
    }

    /// The same for a job whose row says LOST, or will.
    pub fn record_late(
        &self,
        id: JobId,
        row: Execution,
        exit_code: Option<i64>,
        recommendation: Option<Recommendation>,
    ) -> Result<(), QueueFull> {
        self.ledger.expect_late(id, &row.function);
        let record = Record { id, row, recommendation, kept: None, is_late: true };
        let queued = self.queue(record, exit_code);
        queued.inspect_err(|_| self.ledger.forget_late(id))
    }

    fn queue(&self, record: Record, exit_code: Option<i64>) -> Result<(), QueueFull> {
        let bytes = record.bytes();
        if self.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes > self.bytes_max {
            self.bytes.fetch_sub(bytes, Ordering::Relaxed);
            return Err(QueueFull);
        }
        let permit = self.sender.try_reserve().map_err(|_| {
            self.bytes.fetch_sub(bytes, Ordering::Relaxed);
            QueueFull
        })?;
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
    /// The last executions.
    pub fn tail(&self) -> RecentEvents {
        self.tail.clone()
    }
}

/// The loops behind [`Audit`]: `flusher` first, as what it writes is then closed by `ledger`.
pub struct AuditLoops {
    pub flusher: Flusher,
    pub ledger: Arc<Ledger>,
    /// To be probed now and then.
    pub disk: Option<Arc<SpillDirs>>,
}

/// A handle and its loops. `disk`: for rows that the table does not take; without it they stay in memory.
pub fn new(
    conf: &MemoryConf,
    stores: Stores,
    disk: Option<SpillDirs>,
    metrics: Arc<Metrics>,
) -> (Audit, AuditLoops) {
    let (sender, receiver) = mpsc::channel(conf.audit_rows_max);
    let bytes = Arc::new(AtomicUsize::new(0));
    let disk = disk.map(Arc::new);
    let ledger = Ledger::new(stores.clone(), disk.clone(), Arc::clone(&metrics), ledger::WAITING_MAX);
    let ledger = Arc::new(ledger);
    let audit = Audit {
        sender,
        bytes: Arc::clone(&bytes),
        bytes_max: conf.audit_bytes_max,
        metrics: Arc::clone(&metrics),
        tail: RecentEvents::default(),
        ledger: Arc::clone(&ledger),
    };
    let writer = RowWriter::new(stores, disk.clone(), Arc::clone(&ledger), Arc::clone(&metrics));
    let flusher = Flusher { receiver, bytes, writer: Arc::new(writer), metrics, ledger: Arc::clone(&ledger) };
    (audit, AuditLoops { flusher, ledger, disk })
}

#[cfg(test)]
mod tests;
