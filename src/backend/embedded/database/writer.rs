//! The writer thread: commits the pending writes as one transaction, and returns to each caller its own
//! result.
//!
//! A write that is alone is committed at once: the next ones go into the next commit. Only under load does a
//! commit wait for company, because each costs a flush of the disk: if the last one had many writes, their
//! callers have their results now, and most of them write again at once. It waits while they come, and no
//! longer. A wait for as many writes as before, for a fixed time, was rejected: after each small burst, a
//! lone write would wait for the whole time.

use super::error::{WriteError, failed, integer};
use crate::model::now_ms;
use rusqlite::{Connection, TransactionBehavior};
use std::fs::File;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, oneshot};

/// Most records in one transaction. A single larger write is not split.
const RECORDS_MAX: usize = 256;
/// A commit with at least this many writes shows load. A single run makes fewer writes at a time.
const COMPANY_MIN: usize = 4;
/// Longest wait for as many writes as the last commit had.
const LINGER_MAX: Duration = Duration::from_micros(2_000);
/// Longest wait for the next one of them.
const GAP_MAX: Duration = Duration::from_micros(200);
/// How long a commit that was not flushed waits for one that is. Then the log is flushed for it alone.
const FLUSHED_AFTER: Duration = Duration::from_millis(20);
/// The pause after a flush that failed.
const FLUSH_RETRIED_AFTER: Duration = Duration::from_secs(1);
/// Interval between deletions of expired rows.
const PRUNE_EVERY: Duration = Duration::from_secs(60);
/// Most expired rows of a table in one deletion, so that no write waits long for it.
const PRUNED_ROWS_MAX: usize = 256;

/// A pending write, with its permit for a slot of the channel.
pub(super) struct QueuedWrite {
    pub(super) write: Box<dyn Write>,
    pub(super) room: OwnedSemaphorePermit,
}

/// When a write returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// When it is on the disk.
    Flushed,
    /// When it is in the file. The next flushed write flushes it too; without one it is flushed soon.
    Ordered,
}

pub(super) trait Write: Send {
    fn records(&self) -> usize;
    fn durability(&self) -> Durability;
    /// Runs the write. `false`: it failed, and its savepoint must be rolled back.
    fn apply(&mut self, connection: &Connection) -> bool;
    /// Returns the result to the caller, after the commit.
    fn reply(self: Box<Self>, commit: Result<(), WriteError>);
}

pub(super) struct PendingWrite<T, F> {
    op: Option<F>,
    records: usize,
    durability: Durability,
    outcome: Option<rusqlite::Result<T>>,
    reply: oneshot::Sender<Result<T, WriteError>>,
}

impl<T, F: FnOnce(&Connection) -> rusqlite::Result<T>> PendingWrite<T, F> {
    pub(super) fn new(
        op: F,
        records: usize,
        durability: Durability,
        reply: oneshot::Sender<Result<T, WriteError>>,
    ) -> Self {
        Self { op: Some(op), records, durability, outcome: None, reply }
    }
}

impl<T: Send, F: FnOnce(&Connection) -> rusqlite::Result<T> + Send> Write for PendingWrite<T, F> {
    fn records(&self) -> usize {
        self.records
    }

    fn durability(&self) -> Durability {
        self.durability
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
    /// The write-ahead log, which contains all commits since the last checkpoint.
    log: PathBuf,
    prune_at: Instant,
    /// Of the next commit.
    durability: Durability,
    /// When the log must be flushed. `None`: it is.
    flush_at: Option<Instant>,
}

/// How long a batch of this length waits for the next write, if it has waited for `waited` already.
fn patience(batch_len: usize, last_batch_len: usize, waited: Duration) -> Duration {
    let is_loaded = last_batch_len >= COMPANY_MIN;
    if is_loaded && batch_len < last_batch_len {
        LINGER_MAX.saturating_sub(waited).min(GAP_MAX)
    } else {
        Duration::ZERO
    }
}

impl DatabaseWriter {
    pub(super) fn new(connection: Connection, inbox: Receiver<QueuedWrite>, log: PathBuf) -> Self {
        let (prune_at, durability) = (Instant::now(), Durability::Flushed);
        Self { connection, inbox, log, prune_at, durability, flush_at: None }
    }

    /// Runs until every sender is gone and their writes are committed.
    pub(super) fn run(mut self) {
        let mut last_batch_len = 1;
        loop {
            let wake_at = self.flush_at.map_or(self.prune_at, |at| at.min(self.prune_at));
            match self.inbox.recv_timeout(wake_at.saturating_duration_since(Instant::now())) {
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
            if self.flush_at.is_some_and(|at| at <= Instant::now()) {
                self.flush();
            }
        }
    }

    /// Takes the pending writes. `last_batch_len`: number of writes of the last commit.
    fn gather(&self, first: QueuedWrite, last_batch_len: usize) -> Vec<Box<dyn Write>> {
        let began = Instant::now();
        let mut records = first.write.records();
        let mut batch = vec![first.write];
        drop(first.room);
        while records < RECORDS_MAX {
            let wait = patience(batch.len(), last_batch_len, began.elapsed());
            let Ok(next) = self.inbox.recv_timeout(wait) else { break };
            records += next.write.records();
            batch.push(next.write);
            drop(next.room);
        }
        batch
    }

    fn commit(&mut self, batch: &mut [Box<dyn Write>]) -> Result<(), WriteError> {
        let not_applied = |e: rusqlite::Error| WriteError::NotApplied(failed(&e));
        let is_ordered = batch.iter().all(|write| write.durability() == Durability::Ordered);
        self.set_durability(if is_ordered { Durability::Ordered } else { Durability::Flushed })
            .map_err(not_applied)?;
        let changes = self.connection.total_changes();
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
        tx.commit().map_err(|e| WriteError::Unknown(failed(&e)))?;
        // A commit without a change flushes nothing.
        if self.connection.total_changes() != changes {
            self.flush_at = match self.durability {
                Durability::Flushed => None,
                Durability::Ordered => self.flush_at.or_else(|| Some(Instant::now() + FLUSHED_AFTER)),
            };
        }
        Ok(())
    }

    /// Flushes the commits that were not flushed.
    fn flush(&mut self) {
        // A checkpoint flushes the log before it moves its contents, so a log that is gone needs nothing.
        let flushed = match File::open(&self.log) {
            Ok(log) => log.sync_data(),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
            Err(e) => Err(e),
        };
        self.flush_at = flushed.is_err().then(|| Instant::now() + FLUSH_RETRIED_AFTER);
        if let Err(e) = flushed {
            tracing::warn!(error = %e, "Last writes of the database not flushed; retrying in 1 s");
        }
    }

    fn set_durability(&mut self, durability: Durability) -> rusqlite::Result<()> {
        if self.durability != durability {
            // With a WAL, a commit is flushed with FULL only. A flush covers all commits before it.
            let synchronous = match durability {
                Durability::Flushed => "FULL",
                Durability::Ordered => "NORMAL",
            };
            self.connection.pragma_update(None, "synchronous", synchronous)?;
            self.durability = durability;
        }
        Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::embedded::scratch::Scratch;

    #[test]
    fn only_under_load_a_batch_waits_for_company() {
        let us = Duration::from_micros;
        for (batch_len, last_batch_len, waited, expected) in [
            // The callers of one run.
            (1, 1, us(0), us(0)),
            (1, 2, us(0), us(0)),
            (1, 3, us(0), us(0)),
            (1, 4, us(0), us(200)),
            (3, 4, us(100), us(200)),
            (4, 4, us(0), us(0)),
            (9, 4, us(0), us(0)),
            (40, 64, us(1_900), us(100)),
            (63, 64, us(2_000), us(0)),
            (63, 64, us(9_000), us(0)),
        ] {
            let found = patience(batch_len, last_batch_len, waited);
            assert_eq!(found, expected, "{batch_len} of {last_batch_len} after {waited:?}");
        }
    }
    #[test]
    fn what_was_not_flushed_is_flushed_soon() {
        let scratch = Scratch::new();
        let file = scratch.path().join("x.sqlite");
        let connection = Connection::open(&file).unwrap();
        connection.execute_batch("PRAGMA journal_mode = WAL; CREATE TABLE t (n)").unwrap();
        let (_inbox, outbox) = std::sync::mpsc::sync_channel(1);
        let mut writer = DatabaseWriter::new(connection, outbox, scratch.path().join("x.sqlite-wal"));
        let mut commit = |durability, sql: &'static str| {
            let (reply, _) = oneshot::channel();
            let write = PendingWrite::new(move |c: &Connection| c.execute(sql, []), 1, durability, reply);
            writer.commit(&mut [Box::new(write)]).unwrap();
            writer.flush_at
        };
        use Durability::{Flushed, Ordered};
        let (insert, nothing) = ("INSERT INTO t VALUES (1)", "DELETE FROM t WHERE n = 2");
        assert_eq!(commit(Flushed, insert), None);
        assert_eq!(commit(Ordered, nothing), None);
        let due = commit(Ordered, insert);
        assert!(due.is_some_and(|at| at <= Instant::now() + FLUSHED_AFTER));
        assert_eq!(commit(Ordered, insert), due, "the first one does not wait longer");
        assert_eq!(commit(Flushed, nothing), due, "such a commit flushes nothing");
        assert_eq!(commit(Flushed, insert), None);
        assert!(commit(Ordered, insert).is_some());
        writer.flush();
        assert_eq!(writer.flush_at, None);
        writer.log = scratch.path().join("gone");
        writer.flush();
        assert_eq!(writer.flush_at, None, "a checkpoint has flushed it");
        writer.log = scratch.path().join("x.sqlite/x");
        writer.flush();
        assert!(writer.flush_at.is_some(), "it is tried again");
    }
}
