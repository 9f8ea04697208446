//! The writer thread: commits the pending writes as one transaction, and returns to each caller its own
//! result.

use super::error::{WriteError, failed, integer};
use crate::model::now_ms;
use rusqlite::{Connection, TransactionBehavior};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, oneshot};

/// Most records in one transaction. A single larger write is not split.
const RECORDS_MAX: usize = 256;
/// Longest wait for as many writes as the last commit had.
const LINGER_MAX: Duration = Duration::from_micros(2_000);
/// Interval between deletions of expired rows.
const PRUNE_EVERY: Duration = Duration::from_secs(60);
/// Most expired rows of a table in one deletion, so that no write waits long for it.
const PRUNED_ROWS_MAX: usize = 256;

/// A pending write, with its permit for a slot of the channel.
pub(super) struct QueuedWrite {
    pub(super) write: Box<dyn Write>,
    pub(super) room: OwnedSemaphorePermit,
}

pub(super) trait Write: Send {
    fn records(&self) -> usize;
    /// Runs the write. `false`: it failed, and its savepoint must be rolled back.
    fn apply(&mut self, connection: &Connection) -> bool;
    /// Returns the result to the caller, after the commit.
    fn reply(self: Box<Self>, commit: Result<(), WriteError>);
}

pub(super) struct PendingWrite<T, F> {
    op: Option<F>,
    records: usize,
    outcome: Option<rusqlite::Result<T>>,
    reply: oneshot::Sender<Result<T, WriteError>>,
}

impl<T, F: FnOnce(&Connection) -> rusqlite::Result<T>> PendingWrite<T, F> {
    pub(super) fn new(op: F, records: usize, reply: oneshot::Sender<Result<T, WriteError>>) -> Self {
        Self { op: Some(op), records, outcome: None, reply }
    }
}

impl<T: Send, F: FnOnce(&Connection) -> rusqlite::Result<T> + Send> Write for PendingWrite<T, F> {
    fn records(&self) -> usize {
        self.records
    }

    fn apply(&mut self, connection: &Connection) -> bool {
        self.outcome = self.op.take().map(|op| op(connection));
        matches!(self.outcome, Some(Ok(_)))
    }

    fn reply(self: Box<Self>, commit: Result<(), WriteError>) {
        let outcome = match (self.outcome, commit) {
            (Some(Err(e)), _) => Err(WriteError::NotApplied(failed(&e))),
            (_, Err(e)) => Err(e),
            (Some(Ok(value)), Ok(())) => Ok(value),
            (None, Ok(())) => unreachable!("a transaction is committed only when every write was applied"),
        };
        // The write is done even if the caller has left.
        let _ = self.reply.send(outcome);
    }
}

pub(super) struct DatabaseWriter {
    connection: Connection,
    inbox: Receiver<QueuedWrite>,
    prune_at: Instant,
}

impl DatabaseWriter {
    pub(super) fn new(connection: Connection, inbox: Receiver<QueuedWrite>) -> Self {
        Self { connection, inbox, prune_at: Instant::now() }
    }

    /// Runs until every sender is gone and their writes are committed.
    pub(super) fn run(mut self) {
        let mut last_batch_len = 1;
        loop {
            let until_prune = self.prune_at.saturating_duration_since(Instant::now());
            match self.inbox.recv_timeout(until_prune) {
                Ok(first) => {
                    let mut batch = self.gather(first, last_batch_len);
                    last_batch_len = batch.len();
                    let commit = self.commit(&mut batch);
                    batch.into_iter().for_each(|write| write.reply(commit.clone()));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if self.prune_at <= Instant::now() {
                self.prune();
            }
        }
    }

    fn gather(&self, first: QueuedWrite, company: usize) -> Vec<Box<dyn Write>> {
        let until = Instant::now() + LINGER_MAX;
        let mut records = first.write.records();
        let mut batch = vec![first.write];
        drop(first.room);
        while records < RECORDS_MAX {
            // Pending writes are taken without a wait. The batch waits only up to the size of the last one.
            let patience =
                if batch.len() < company { until - Instant::now().min(until) } else { Duration::ZERO };
            let Ok(next) = self.inbox.recv_timeout(patience) else { break };
            records += next.write.records();
            batch.push(next.write);
            drop(next.room);
        }
        batch
    }

    fn commit(&mut self, batch: &mut [Box<dyn Write>]) -> Result<(), WriteError> {
        let not_applied = |e: rusqlite::Error| WriteError::NotApplied(failed(&e));
        let begun = self.connection.transaction_with_behavior(TransactionBehavior::Immediate);
        let mut tx = begun.map_err(not_applied)?;
        for write in batch {
            let mut savepoint = tx.savepoint().map_err(not_applied)?;
            savepoint.set_drop_behavior(rusqlite::DropBehavior::Ignore);
            let closed = if write.apply(&savepoint) {
                savepoint.commit()
            } else {
                savepoint.rollback().and_then(|()| savepoint.commit())
            };
            // Some errors, such as a full disk, make SQLite roll back the whole transaction. The savepoint is
            // then gone and cannot be closed. Continuing would commit the next writes one by one, outside a
            // transaction.
            closed.map_err(not_applied)?;
        }
        tx.commit().map_err(|e| WriteError::Unknown(failed(&e)))
    }

    /// Deletes some expired rows. This only frees space, because readers never return them.
    fn prune(&mut self) {
        let now = now_ms();
        let tables = [
            ("executions", "expires_at_s", now / 1000),
            ("config_records", "expires_at_s", now / 1000),
            ("results", "expires_at_ms", now),
            ("idempotency", "expires_at_ms", now),
        ];
        let mut more = false;
        for (table, expiry, now) in tables {
            let sql = format!(
                "DELETE FROM {table} WHERE rowid IN
                 (SELECT rowid FROM {table} WHERE {expiry} <= ?1 LIMIT {PRUNED_ROWS_MAX})"
            );
            match self.connection.execute(&sql, [integer(now)]) {
                Ok(deleted) => more |= deleted == PRUNED_ROWS_MAX,
                Err(e) => tracing::warn!(table, error = %e, "Expired rows not deleted; retrying in 60 s"),
            }
        }
        // If more rows have expired, continue after the next commit, or now if no write is pending.
        self.prune_at = Instant::now() + if more { Duration::ZERO } else { PRUNE_EVERY };
    }
}
