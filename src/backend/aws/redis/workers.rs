//! Registers workers in Redis: a hash with their last heartbeats and a sorted set with the times, both in one
//! slot. All times are those of Redis, so node clocks need not agree.
//!
//! One key per worker with its own expiry was rejected: listing them would require a scan of all keys.

use super::connection::CommandConnection;
use crate::backend::{
    BackendError, HeartbeatOutcome, SILENCE_FORGOTTEN, WORKER_TTL, WORKERS_MAX, WorkerRecord, WorkerRegistry,
};
use crate::model::UnixMs;
use async_trait::async_trait;
use bytes::Bytes;
use redis::{Script, cmd};
use std::sync::Arc;
use std::time::Duration;

const STATES_KEY: &str = "workers:{fleet}";
const SEEN_KEY: &str = "workers:seen:{fleet}";
/// Up to when silent workers were looked for.
const SILENT_KEY: &str = "workers:silent:{fleet}";
/// Written by a worker that sends no heartbeats.
pub const LONE_STATUS_KEY: &str = "system:status";
/// Expiry of both keys, longer than any worker is listed. The keys of a fleet that is gone expire.
const KEYS_EXPIRE: Duration = WORKER_TTL.saturating_add(Duration::from_secs(60));

pub struct RedisWorkers {
    commands: Arc<CommandConnection>,
    put: Script,
    all: Script,
    silent: Script,
}

impl RedisWorkers {
    pub fn new(commands: Arc<CommandConnection>) -> Self {
        let put = Script::new(include_str!("workers_put.lua"));
        let all = Script::new(include_str!("workers_all.lua"));
        let silent = Script::new(include_str!("workers_silent.lua"));
        Self { commands, put, all, silent }
    }
}

#[async_trait]
impl WorkerRegistry for RedisWorkers {
    async fn put(&self, worker_id: &str, state: &str) -> Result<HeartbeatOutcome, BackendError> {
        let mut call = self.put.key(STATES_KEY);
        call.key(SEEN_KEY).arg(worker_id).arg(state);
        call.arg(ms(WORKER_TTL)).arg(WORKERS_MAX).arg(ms(KEYS_EXPIRE));
        let call = &call;
        let answer: StoredRow =
            self.commands.run(async |mut connection| call.invoke_async(&mut connection).await).await?;
        Ok(stored(answer))
    }

    async fn newly_silent(&self, silence: Duration) -> Result<Vec<Bytes>, BackendError> {
        let mut call = self.silent.key(STATES_KEY);
        call.key(SEEN_KEY).key(SILENT_KEY).arg(ms(silence)).arg(ms(SILENCE_FORGOTTEN));
        let call = &call;
        self.commands.run(async |mut connection| call.invoke_async(&mut connection).await).await
    }

    async fn all(&self) -> Result<Vec<WorkerRecord>, BackendError> {
        let mut call = self.all.key(STATES_KEY);
        call.key(SEEN_KEY).arg(ms(WORKER_TTL));
        let call = &call;
        let answer: Vec<HeartbeatRow> =
            self.commands.run(async |mut connection| call.invoke_async(&mut connection).await).await?;
        Ok(by_id(answer))
    }

    async fn lone_status(&self) -> Result<Option<Bytes>, BackendError> {
        self.commands.query(cmd("GET").arg(LONE_STATUS_KEY)).await
    }
}

/// Id, state, age in milliseconds, time of the heartbeat in Unix milliseconds.
type HeartbeatRow = (Bytes, Bytes, u64, UnixMs);

/// 1 if the heartbeat was stored; the state before, its age in milliseconds (-1: there was none), and its
/// time in Unix milliseconds.
type StoredRow = (u8, Bytes, i64, UnixMs);

fn stored((is_stored, state, age, at): StoredRow) -> HeartbeatOutcome {
    if is_stored == 0 {
        return HeartbeatOutcome::TooMany;
    }
    let age = u64::try_from(age).ok();
    let before = age.map(|age| WorkerRecord { state, age: Duration::from_millis(age), at });
    HeartbeatOutcome::Stored { before }
}

fn by_id(mut heard: Vec<HeartbeatRow>) -> Vec<WorkerRecord> {
    heard.sort_by(|(a, ..), (b, ..)| a.cmp(b));
    let seen = |(_, state, age, at)| WorkerRecord { state, age: Duration::from_millis(age), at };
    heard.into_iter().map(seen).collect()
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_are_listed_by_id() {
        let seen = |state: &'static str, age| WorkerRecord {
            state: Bytes::from_static(state.as_bytes()),
            age: Duration::from_millis(age),
            at: 100 - age,
        };
        let heard = vec![
            ("w2".into(), "b".into(), 7, 93),
            ("w10".into(), "c".into(), 0, 100),
            ("w1".into(), "a".into(), 9, 91),
        ];
        assert_eq!(by_id(heard), [seen("a", 9), seen("c", 0), seen("b", 7)]);
        assert!(ms(KEYS_EXPIRE) > ms(WORKER_TTL));
    }

    #[test]
    fn the_heartbeat_before_is_known() {
        let before = WorkerRecord { state: "a".into(), age: Duration::from_millis(7), at: 93 };
        for (answer, outcome) in [
            ((0, "".into(), -1, 0), HeartbeatOutcome::TooMany),
            ((1, "".into(), -1, 0), HeartbeatOutcome::Stored { before: None }),
            ((1, "a".into(), 7, 93), HeartbeatOutcome::Stored { before: Some(before) }),
        ] {
            assert_eq!(stored(answer), outcome);
        }
    }
}
