//! The task queue as a table. Jobs enter in order, and leave with their result in one transaction.
//!
//! Only the worker knows, in memory, which jobs it has taken. After a crash, every job in the table runs
//! again, as at-least-once delivery allows. So no leases have to be written or to expire. Only the number of
//! starts is stored, so that a job that kills the gateway does not do so forever.

use super::database::error::{WriteError, integer};
use super::database::{Database, Durability, unsigned};
use crate::backend::{BATCH_JOBS_MAX, BackendError, JobQueue, QueueTraits, SendError};
use crate::model::{Job, JobId, UnixMs};
use async_trait::async_trait;
use bytes::Bytes;
use rusqlite::{Row, params};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;

/// The limits of SQS, so that a function that works here also works in a fleet.
const MESSAGE_BYTES_MAX: usize = 1 << 20;
const RETENTION: Duration = Duration::from_secs(4 * 24 * 3600);

/// The table `jobs`, shared by the gateway and the worker.
#[derive(Clone)]
pub(super) struct Queue {
    database: Database,
    /// Wakes the worker.
    pub(super) arrived: Arc<Notify>,
}

/// A job on the queue.
pub(super) struct QueuedJob {
    /// Number of the job in order of arrival.
    pub(super) seq: i64,
    pub(super) id: JobId,
    pub(super) function: String,
    pub(super) deadline: UnixMs,
    /// Starts whose end was not recorded.
    pub(super) starts: u32,
    pub(super) message: Bytes,
}

impl Queue {
    pub(super) fn new(database: Database) -> Self {
        Self { database, arrived: Arc::new(Notify::new()) }
    }

    /// Returns up to `limit` jobs after number `seq`, in order of arrival.
    pub(super) async fn after(&self, seq: i64, limit: usize) -> Result<Vec<QueuedJob>, BackendError> {
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let read = self.database.read(move |c| {
            let mut select = c.prepare_cached(
                "SELECT seq, id, function_id, deadline_ms, message, starts FROM jobs
                 WHERE seq > ?1 ORDER BY seq LIMIT ?2",
            )?;
            select.query_map([seq, limit], queued)?.collect()
        });
        read.await
    }

    /// Removes a job from the queue without a result.
    pub(super) async fn remove(&self, seq: i64) -> Result<(), BackendError> {
        let write = self
            .database
            .write(1, move |c| c.prepare_cached("DELETE FROM jobs WHERE seq = ?1")?.execute([seq]).map(drop));
        Ok(write.await?)
    }

    /// Stores that a job starts for the first time, without waiting for that.
    pub(super) async fn begin_first_start(&self, seq: i64) -> Result<(), BackendError> {
        let write = self.database.begin_ordered(1, move |c| {
            c.prepare_cached("UPDATE jobs SET starts = 1 WHERE seq = ?1")?.execute([seq]).map(drop)
        });
        Ok(write.await?)
    }

    /// Stores the numbers of starts of these jobs: (`seq`, starts). Jobs that have left the queue are
    /// ignored.
    pub(super) async fn set_starts(&self, starts: Vec<(i64, u32)>) -> Result<(), BackendError> {
        // The end of a process loses nothing that is in the file, and no function can do more.
        let write = self.database.write_ordered(starts.len(), move |c| {
            let mut update = c.prepare_cached("UPDATE jobs SET starts = ?2 WHERE seq = ?1")?;
            starts.iter().try_for_each(|(seq, starts)| update.execute(params![seq, starts]).map(drop))
        });
        Ok(write.await?)
    }
}

fn queued(row: &Row<'_>) -> rusqlite::Result<QueuedJob> {
    Ok(QueuedJob {
        seq: row.get(0)?,
        id: JobId::from_bytes(row.get(1)?),
        function: row.get(2)?,
        deadline: unsigned(row.get(3)?),
        message: Bytes::from(row.get::<_, Vec<u8>>(4)?),
        starts: row.get(5)?,
    })
}

#[async_trait]
impl JobQueue for Queue {
    async fn send_batch(&self, jobs: &[Job]) -> Vec<Result<(), SendError>> {
        debug_assert!(jobs.len() <= BATCH_JOBS_MAX);
        let fits = |job: &&Job| job.message.len() <= MESSAGE_BYTES_MAX;
        let sent: Vec<Job> = jobs.iter().filter(fits).cloned().collect();
        let durability = match sent.iter().any(|job| job.is_promised) {
            true => Durability::Flushed,
            // The result of the job is flushed before anybody learns that there was one.
            false => Durability::Ordered,
        };
        let write = self.database.write_as(durability, sent.len(), move |c| {
            // A job that is sent again after an unknown outcome is still one job.
            let mut insert = c.prepare_cached(
                "INSERT OR IGNORE INTO jobs (id, function_id, deadline_ms, message) VALUES (?1, ?2, ?3, ?4)",
            )?;
            for job in &sent {
                let deadline = integer(job.deadline);
                insert.execute(params![
                    job.id.as_bytes(),
                    job.function.as_str(),
                    deadline,
                    &job.message[..]
                ])?;
            }
            Ok(())
        });
        let sent = write.await.map_err(|e| match e {
            WriteError::NotApplied(e) => SendError::NotSent(e.to_string()),
            WriteError::Unknown(e) => SendError::Unknown(e.to_string()),
        });
        self.arrived.notify_one();
        let too_large = || SendError::Refused(format!("the message is over {MESSAGE_BYTES_MAX} bytes"));
        jobs.iter().map(|job| if fits(&job) { sent.clone() } else { Err(too_large()) }).collect()
    }

    fn traits(&self) -> QueueTraits {
        QueueTraits { message_bytes_max: MESSAGE_BYTES_MAX, retention: RETENTION, fifo: false }
    }

    /// Number of jobs without a result, including the running ones.
    async fn depth(&self) -> Result<u64, BackendError> {
        let read = self.database.read(|c| {
            // SQLite counts in the index on `id`, which contains no messages.
            c.prepare_cached("SELECT count(*) FROM jobs")?.query_row([], |row| row.get(0))
        });
        read.await.map(unsigned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::embedded::scratch::{Scratch, job};

    #[tokio::test]
    async fn jobs_survive_a_restart_in_order() {
        let scratch = Scratch::new();
        let jobs: Vec<Job> = (0..10).map(|n| job(n, "{}")).collect();
        let queue = Queue::new(scratch.database());
        assert!(queue.send_batch(&jobs).await.iter().all(Result::is_ok));
        assert!(queue.send_batch(&jobs[3..4]).await[0].is_ok(), "sent again");
        drop(queue);

        let queue = Queue::new(scratch.database());
        assert_eq!(queue.depth().await, Ok(10));
        let first = queue.after(0, 4).await.unwrap();
        let rest = queue.after(first[3].seq, 100).await.unwrap();
        let ids: Vec<JobId> = first.iter().chain(&rest).map(|q| q.id).collect();
        assert_eq!(ids, jobs.iter().map(|j| j.id).collect::<Vec<_>>());
        assert_eq!((&rest[5].message, rest[5].deadline), (&jobs[9].message, jobs[9].deadline));

        assert!(first.iter().all(|job| job.starts == 0));
        let gone = rest[5].seq + 1_000;
        queue.set_starts(vec![(first[0].seq, 2), (first[1].seq, 1), (gone, 3)]).await.unwrap();
        drop(queue);
        let queue = Queue::new(scratch.database());
        let starts: Vec<u32> = queue.after(0, 100).await.unwrap().iter().map(|job| job.starts).collect();
        assert_eq!(starts, [2, 1, 0, 0, 0, 0, 0, 0, 0, 0], "starts are counted across restarts");

        queue.remove(rest[5].seq).await.unwrap();
        assert!(queue.send_batch(&[job(77, "{}")]).await[0].is_ok());
        let last = queue.after(rest[4].seq, 1).await.unwrap();
        assert!(last[0].seq > rest[5].seq, "no number is used twice");
    }

    #[tokio::test]
    async fn a_message_that_is_too_large_does_not_fail_others() {
        let scratch = Scratch::new();
        let queue = Queue::new(scratch.database());
        let large = "x".repeat(MESSAGE_BYTES_MAX + 1);
        let sent = queue.send_batch(&[job(1, "{}"), job(2, &large), job(3, &large[1..])]).await;
        assert_eq!(sent.iter().map(Result::is_ok).collect::<Vec<_>>(), [true, false, true]);
        assert!(matches!(sent[1], Err(SendError::Refused(_))));
        assert_eq!(queue.depth().await, Ok(2));
    }
}
