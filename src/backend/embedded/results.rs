//! Results of jobs: stored when the job leaves the queue, then published in this process.
//!
//! The workers of a fleet publish first and store afterwards, as the protocol requires. Here the result is
//! stored first, so that nothing is published that a crash may still lose.

use super::database::Database;
use super::database::error::integer;
use crate::backend::{BackendError, ResultEvent, Results, STORED_MAX};
use crate::model::{JobId, UnixMs, now_ms};
use async_trait::async_trait;
use bytes::Bytes;
use rusqlite::{OptionalExtension, params};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::{Mutex, broadcast, mpsc};

/// How long a result is kept, as in Redis. The writer deletes expired results.
const KEPT_MS: UnixMs = 3_600_000;
/// Most publications that wait for [`Results::next`]. When it is full, a publication is dropped, and the next
/// event is `Subscribed`. The dispatcher then looks up the stored results, as after a broken subscription.
const PUBLISHED_MAX: usize = 256;
/// Most ids that a waiter may lag behind. A waiter that lags further reads the table instead.
const STORED_IDS_MAX: usize = 1_024;

/// The table `results`, and the channels of its subscribers.
pub(super) struct LocalResults {
    database: Database,
    publish: mpsc::Sender<(JobId, Bytes)>,
    published: Mutex<mpsc::Receiver<(JobId, Bytes)>>,
    /// A publication was dropped. Initially true, because a subscription starts with `Subscribed`.
    missed: AtomicBool,
    /// Ids only, because a waiter reads its own result from the table.
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

    /// Stores the result of the job with number `seq`, removes the job from the queue in the same
    /// transaction, and then publishes the result. A second run of the same job replaces the first result.
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
        // An error means that there is no waiter.
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
            // Impossible, because `self` owns the sender. Pending avoids a busy loop.
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

    /// Always `None`: the old controller never used this database.
    async fn stored_foreign(&self, _request_id: &str) -> Result<Option<Bytes>, BackendError> {
        Ok(None)
    }

    async fn wait_for(&self, id: JobId) -> Result<Bytes, BackendError> {
        // Subscribe first: a result that is stored between a look-up and the subscription would be missed.
        let mut stored = self.stored.subscribe();
        loop {
            if let Some(payload) = self.stored(&[id]).await?.pop().flatten() {
                return Ok(payload);
            }
            // A lagging receiver may have missed its id, so it reads the table again.
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
    async fn a_result_removes_its_job_and_survives_a_restart() {
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
        assert_eq!(in_time(results.wait_for(b)).await, Ok(Bytes::from_static(b"b")), "stored before");
        assert_eq!(results.stored.receiver_count(), 0);
    }

    #[tokio::test]
    async fn publications_beyond_the_buffer_are_dropped_and_reported() {
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
