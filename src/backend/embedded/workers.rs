//! The workers that send heartbeats, and the local worker, which sends none because it is a part of this
//! process.
//!
//! The heartbeats are kept in memory. A restart loses them, but they would soon expire in any case.

use crate::backend::{
    BackendError, HeartbeatOutcome, SILENCE_FORGOTTEN, WORKER_TTL, WORKERS_MAX, WorkerActivity, WorkerRecord,
    WorkerRegistry,
};
use crate::model::{UnixMs, now_ms};
use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

pub(super) struct LocalWorkers {
    /// The last heartbeat of each worker, by worker id.
    seen: Mutex<HashMap<String, LastHeartbeat>>,
    own: Arc<WorkerActivity>,
    /// When silent workers were last looked for.
    silent_at: Mutex<Option<Instant>>,
}

/// The last heartbeat of a worker, and its time by the monotonic and by the wall clock.
struct LastHeartbeat {
    state: Bytes,
    since: Instant,
    at: UnixMs,
}

impl LastHeartbeat {
    fn record(&self) -> WorkerRecord {
        WorkerRecord { state: self.state.clone(), age: self.since.elapsed(), at: self.at }
    }
}

impl LocalWorkers {
    /// `own`: the state of the local worker.
    pub(super) fn new(own: Arc<WorkerActivity>) -> Self {
        Self { seen: Mutex::default(), own, silent_at: Mutex::default() }
    }

    /// The workers whose heartbeats have not expired.
    fn known(&self) -> MutexGuard<'_, HashMap<String, LastHeartbeat>> {
        let mut seen = self.seen.lock();
        seen.retain(|_, said| said.since.elapsed() < WORKER_TTL);
        seen
    }
}

#[async_trait]
impl WorkerRegistry for LocalWorkers {
    async fn put(&self, worker_id: &str, state: &str) -> Result<HeartbeatOutcome, BackendError> {
        let mut known = self.known();
        if known.len() >= WORKERS_MAX && !known.contains_key(worker_id) {
            return Ok(HeartbeatOutcome::TooMany);
        }
        let before = known.get(worker_id).map(LastHeartbeat::record);
        let state = Bytes::copy_from_slice(state.as_bytes());
        known.insert(worker_id.to_owned(), LastHeartbeat { state, since: Instant::now(), at: now_ms() });
        Ok(HeartbeatOutcome::Stored { before })
    }

    async fn newly_silent(&self, silence: Duration) -> Result<Vec<Bytes>, BackendError> {
        let now = Instant::now();
        let last = self.silent_at.lock().replace(now);
        let Some(last) = last.filter(|last| now - *last < SILENCE_FORGOTTEN) else { return Ok(Vec::new()) };
        let is_new = |said: &&LastHeartbeat| {
            let silent_at = said.since + silence;
            silent_at > last && silent_at <= now
        };
        Ok(self.known().values().filter(is_new).map(|said| said.state.clone()).collect())
    }

    async fn all(&self) -> Result<Vec<WorkerRecord>, BackendError> {
        let known = self.known();
        let by_id: BTreeMap<_, _> = known.iter().collect();
        Ok(by_id.into_values().map(LastHeartbeat::record).collect())
    }

    async fn lone_status(&self) -> Result<Option<Bytes>, BackendError> {
        Ok(self.own.lone_status().map(Bytes::from))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use tokio::time::advance;

    fn seen(state: &str, age_s: u64) -> (String, Duration) {
        (state.to_owned(), Duration::from_secs(age_s))
    }

    async fn all(workers: &LocalWorkers) -> Vec<(String, Duration)> {
        let text = |state: &Bytes| String::from_utf8(state.to_vec()).unwrap();
        let all = workers.all().await.unwrap();
        assert!(all.iter().all(|seen| now_ms() - seen.at < 60_000), "the time by the wall clock is recent");
        all.iter().map(|seen| (text(&seen.state), seen.age)).collect()
    }

    fn is_new(outcome: Result<HeartbeatOutcome, BackendError>) -> bool {
        outcome == Ok(HeartbeatOutcome::Stored { before: None })
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_worker_is_reported_once() {
        let workers = LocalWorkers::new(Arc::default());
        let silence = Duration::from_secs(30);
        let silent = async || workers.newly_silent(silence).await.unwrap();
        assert!(is_new(workers.put("a", "a").await));
        assert_eq!(silent().await, [""; 0]);
        advance(Duration::from_secs(20)).await;
        assert!(is_new(workers.put("b", "b").await));
        assert_eq!(silent().await, [""; 0]);
        advance(Duration::from_secs(20)).await;
        assert_eq!(silent().await, ["a"]);
        assert_eq!(silent().await, [""; 0]);
        advance(SILENCE_FORGOTTEN).await;
        assert_eq!(silent().await, [""; 0], "nobody has looked for too long");
    }

    #[tokio::test(start_paused = true)]
    async fn workers_expire_without_heartbeats() {
        let workers = LocalWorkers::new(Arc::default());
        assert_eq!(all(&workers).await, []);
        assert!(is_new(workers.put("b", "1").await));
        advance(Duration::from_secs(200)).await;
        assert!(is_new(workers.put("a", "2").await));
        assert!(is_new(workers.put("c", "3").await));
        assert_eq!(all(&workers).await, [seen("2", 0), seen("1", 200), seen("3", 0)]);
        advance(Duration::from_secs(99)).await;
        let Ok(HeartbeatOutcome::Stored { before: Some(before) }) = workers.put("c", "4").await else {
            panic!("a heartbeat before")
        };
        assert_eq!((&before.state[..], before.age), (&b"3"[..], Duration::from_secs(99)));
        assert_eq!(all(&workers).await, [seen("2", 99), seen("1", 299), seen("4", 0)]);
        advance(Duration::from_secs(1)).await;
        assert_eq!(all(&workers).await, [seen("2", 100), seen("4", 1)]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_number_of_workers_is_bounded() {
        let workers = LocalWorkers::new(Arc::default());
        for n in 0..WORKERS_MAX {
            assert!(is_new(workers.put(&n.to_string(), "{}").await));
        }
        assert_eq!(workers.put("one more", "{}").await, Ok(HeartbeatOutcome::TooMany));
        advance(WORKER_TTL / 2).await;
        assert!(workers.put("7", "still there").await.is_ok());
        assert_eq!(workers.all().await.unwrap().len(), WORKERS_MAX);
        advance(WORKER_TTL / 2).await;
        assert!(is_new(workers.put("one more", "{}").await));
        assert_eq!(workers.all().await.unwrap().len(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn the_local_worker_is_shown_while_its_loop_runs() {
        let activity = Arc::new(WorkerActivity::default());
        let workers = LocalWorkers::new(activity.clone());
        assert_eq!(workers.lone_status().await, Ok(None));
        let active = activity.begin();
        active.show_runs(3);
        advance(Duration::from_millis(2_900)).await;
        let text = workers.lone_status().await.unwrap().unwrap();
        let mut status: Value = serde_json::from_slice(&text).unwrap();
        let at = status.as_object_mut().unwrap().remove("timestamp").unwrap();
        let at = at.as_f64().unwrap();
        assert!((now_ms() as f64 / 1000.0 - at).abs() < 60.0, "{at}");
        let pools = json!({ "python": 0, "nodejs": 0, "cpp": 0, "go": 0 });
        let expected = json!({
            "status": "healthy", "worker_count": 1, "active_jobs": 3, "pools": pools, "uptime_seconds": 2,
        });
        assert_eq!(status, expected);
        drop(active);
        assert_eq!(workers.lone_status().await, Ok(None));
    }
}
