//! Results: stored with the end of their job, then announced in this process.
//!
//! The fleet's workers publish first and store then; here the store comes first, because both are ours and an
//! announcement of what may yet be lost helps nobody.

use super::database::{Database, integer};
use crate::backend::{BackendError, ResultEvent, Results, STORED_MAX};
use crate::model::{JobId, UnixMs, now_ms};
use async_trait::async_trait;
use bytes::Bytes;
use rusqlite::{OptionalExtension, params};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::{Mutex, broadcast, mpsc};

/// How long a result is kept, as in Redis. The writer deletes what is older.
const KEPT_MS: UnixMs = 3_600_000;
/// Most publications that wait for [`Results::next`]. When it is full a publication is dropped, and the next event
/// is `Subscribed`: the dispatcher then looks up what is stored, as it does after a broken subscription.
const PUBLISHED_MAX: usize = 256;
/// Most ids a long poll may lag behind before it looks for itself.
const STORED_IDS_MAX: usize = 1_024;

/// The table `results`, and who waits for it.
pub(super) struct LocalResults {
    database: Database,
    publish: mpsc::Sender<(JobId, Bytes)>,
    published: Mutex<mpsc::Receiver<(JobId, Bytes)>>,
    /// Something was published that [`Results::next`] will not tell of. True at first: a subscription begins so.
    missed: AtomicBool,
    /// Ids only, so that a waiter reads the table just for its own.
    stored: broadcast::Sender<JobId>,
}

impl LocalResults {
    pub(super) fn new(database: Database) -> Arc<Self> {
        let (publish, published) = mpsc::channel(PUBLISHED_MAX);
        Arc::new(Self {
            database,
            publish,
            published: Mutex::new(published),
            missed: AtomicBool::new(true),
            stored: broadcast::Sender::new(STORED_IDS_MAX),
        })
    }

    /// Stores the result of job number `seq`, takes the job off the queue in the same transaction, and tells those
    /// who wait. A second run of the same job replaces the first one's result.
    pub(super) async fn finish(&self, seq: i64, id: JobId, payload: Bytes) -> Result<(), BackendError> {
        let stored = payload.clone();
        let expires_at = integer(now_ms() + KEPT_MS);
        let write = self.database.write(2, move |c| {
            c.prepare_cached(
                "INSERT OR REPLACE INTO results (id, payload, expires_at_ms) VALUES (?1, ?2, ?3)",
            )?
            .execute(params![id.as_bytes(), &stored[..], expires_at])?;
            c.prepare_cached("DELETE FROM jobs WHERE seq = ?1")?.execute([seq]).map(drop)
        });
        write.await?;
        if self.publish.try_send((id, payload)).is_err() {
            self.missed.store(true, Ordering::Release);
        }
        // An error says that nobody waits.
        let _ = self.stored.send(id);
        Ok(())
    }
}

#[async_trait]
impl Results for LocalResults {
    async fn next(&self) -> ResultEvent {
        let mut published = self.published.lock().await;
        if self.missed.swap(false, Ordering::AcqRel) {
            return ResultEvent::Subscribed;
        }
        match published.recv().await {
            Some((id, payload)) => ResultEvent::Published { id, payload },
            // Cannot be: the sender is beside the receiver. But this must not become a busy loop.
            None => std::future::pending().await,
        }
    }

    async fn stored(&self, ids: &[JobId]) -> Result<Vec<Option<Bytes>>, BackendError> {
        debug_assert!(ids.len() <= STORED_MAX);
        let ids = ids.to_vec();
        let read = self.database.read(move |c| {
            let mut select =
                c.prepare_cached("SELECT payload FROM results WHERE id = ?1 AND expires_at_ms > ?2")?;
            let now = integer(now_ms());
            let stored = ids.iter().map(|id| {
                let payload = select.query_row(params![id.as_bytes(), now], |row| row.get::<_, Vec<u8>>(0));
                Ok(payload.optional()?.map(Bytes::from))
            });
            stored.collect()
        });
        read.await
    }

    /// Always `None`: no old controller ever worked on this file.
    async fn stored_foreign(&self, _request_id: &str) -> Result<Option<Bytes>, BackendError> {
        Ok(None)
    }

    async fn wait_for(&self, id: JobId) -> Result<Bytes, BackendError> {
        // Subscribe first: a result stored between a look-up and the subscription would never be heard of.
        let mut stored = self.stored.subscribe();
        loop {
            if let Some(payload) = self.stored(&[id]).await?.pop().flatten() {
                return Ok(payload);
            }
            // Whoever has lagged may have missed its own id, and looks again.
            while matches!(stored.recv().await, Ok(other) if other != id) {}
        }
    }

    fn store_name(&self) -> &'static str {
        "database"
    }

    async fn ping(&self) -> Result<(), BackendError> {
        self.stored(&[]).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::JobQueue;
    use crate::backend::embedded::queue::Queue;
    use crate::backend::embedded::scratch::{Scratch, in_time, job};

    fn published(id: JobId, payload: &'static str) -> ResultEvent {
        ResultEvent::Published { id, payload: Bytes::from_static(payload.as_bytes()) }
    }

    #[tokio::test]
    async fn a_result_takes_its_job_off_the_queue_and_survives() {
        let scratch = Scratch::new();
        let database = scratch.database();
        let (queue, results) = (Queue::new(database.clone()), LocalResults::new(database));
        let (a, b) = (job(1, "{}"), job(2, "{}"));
        assert!(queue.send_batch(&[a.clone(), b.clone()]).await.iter().all(Result::is_ok));
        let seq = queue.after(0, 1).await.unwrap()[0].seq;

        assert_eq!(in_time(results.next()).await, ResultEvent::Subscribed);
        results.finish(seq, a.id, Bytes::from_static(b"{}")).await.unwrap();
        assert_eq!(in_time(results.next()).await, published(a.id, "{}"));
        assert_eq!(queue.depth().await, Ok(1));
        drop((queue, results));

        let results = LocalResults::new(scratch.database());
        let stored = results.stored(&[b.id, a.id]).await.unwrap();
        assert_eq!(stored, [None, Some(Bytes::from_static(b"{}"))]);
        assert_eq!(results.stored_foreign("x").await, Ok(None));
        assert_eq!(results.ping().await, Ok(()));
    }

    #[tokio::test]
    async fn a_long_poll_ends_with_its_result() {
        let scratch = Scratch::new();
        let results = LocalResults::new(scratch.database());
        let (a, b) = (job(1, "{}").id, job(2, "{}").id);
        let finish = async {
            results.finish(1, b, Bytes::from_static(b"b")).await.unwrap();
            results.finish(2, a, Bytes::from_static(b"a")).await.unwrap();
        };
        let (waited, ()) = in_time(async { tokio::join!(results.wait_for(a), finish) }).await;
        assert_eq!(waited, Ok(Bytes::from_static(b"a")));
        assert_eq!(in_time(results.wait_for(b)).await, Ok(Bytes::from_static(b"b")), "long since stored");
        assert_eq!(results.stored.receiver_count(), 0);
    }

    #[tokio::test]
    async fn what_nobody_takes_is_dropped_and_told() {
        let scratch = Scratch::new();
        let results = LocalResults::new(scratch.database());
        assert_eq!(in_time(results.next()).await, ResultEvent::Subscribed);
        let id = job(1, "{}").id;
        for _ in 0..=PUBLISHED_MAX {
            results.finish(1, id, Bytes::from_static(b"r")).await.unwrap();
        }
        assert_eq!(in_time(results.next()).await, ResultEvent::Subscribed);
        for _ in 0..PUBLISHED_MAX {
            assert_eq!(in_time(results.next()).await, published(id, "r"));
        }
        assert!(!results.missed.load(Ordering::Acquire));
    }
}
