//! The jobs in flight, one hash a node: `inflight:{<node>}`, job id → `<deadline in Unix ms>:<function id>`.
//! The braces keep all keys of a node in one slot of a Redis Cluster.

use super::redis::Commands;
use crate::backend::{BackendError, Journal, JournalEntry};
use crate::model::{FunctionId, Job, JobId, NodeId};
use async_trait::async_trait;
use redis::{Cmd, cmd};
use std::collections::HashMap;
use std::fmt::Write;
use std::sync::Arc;

/// Entries of one page of a hash, roughly.
const PAGE_ENTRIES: usize = 1000;

/// Room for an entry, in bytes: more is found if it is needed.
const ENTRY_BYTES: usize = 96;

pub(super) struct RedisJournal {
    commands: Arc<Commands>,
    node: NodeId,
}

impl RedisJournal {
    pub(super) fn new(commands: Arc<Commands>, node: NodeId) -> Self {
        Self { commands, node }
    }
}

#[async_trait]
impl Journal for RedisJournal {
    async fn enter(&self, jobs: &[Job]) -> Result<(), BackendError> {
        if jobs.is_empty() {
            return Ok(());
        }
        let mut command = Cmd::with_capacity(2 + 2 * jobs.len(), ENTRY_BYTES * (jobs.len() + 1));
        command.arg("HSET").arg(key(self.node));
        let (mut place, mut value) = ([0; JobId::TEXT_BYTES], String::with_capacity(ENTRY_BYTES));
        for job in jobs {
            value.clear();
            let _ = write!(value, "{}:{}", job.deadline, job.function); // to a String: cannot fail
            command.arg(job.id.text(&mut place)).arg(&value);
        }
        self.commands.query(&command).await
    }

    async fn leave(&self, ids: &[JobId]) -> Result<(), BackendError> {
        if ids.is_empty() {
            return Ok(());
        }
        let mut command = Cmd::with_capacity(2 + ids.len(), JobId::TEXT_BYTES * (ids.len() + 1));
        command.arg("HDEL").arg(key(self.node));
        let mut place = [0; JobId::TEXT_BYTES];
        for id in ids {
            command.arg(id.text(&mut place));
        }
        self.commands.query(&command).await
    }

    async fn contains(&self, id: JobId) -> Result<bool, BackendError> {
        self.commands.query(cmd("HEXISTS").arg(key(id.node())).arg(id.to_string())).await
    }

    async fn entries(&self, node: NodeId) -> Result<Vec<JournalEntry>, BackendError> {
        // A map: while the hash is being resized HSCAN may give an entry twice.
        let mut entries = HashMap::new();
        let mut odd = 0_usize;
        let mut cursor = 0_u64;
        loop {
            let mut command = cmd("HSCAN");
            command.arg(key(node)).arg(cursor).arg("COUNT").arg(PAGE_ENTRIES);
            let (next, page): (u64, Vec<(Vec<u8>, Vec<u8>)>) = self.commands.query(&command).await?;
            for (field, value) in page {
                match entry(&field, &value) {
                    Some(entry) => drop(entries.insert(entry.id, entry)),
                    None => odd += 1,
                }
            }
            cursor = next;
            if cursor == 0 {
                break;
            }
        }
        if odd > 0 {
            tracing::warn!(%node, entries = odd, "Foreign Journal Entries Left Alone");
        }
        Ok(entries.into_values().collect())
    }
}

fn key(node: NodeId) -> String {
    format!("inflight:{{{node}}}")
}

fn entry(field: &[u8], value: &[u8]) -> Option<JournalEntry> {
    let id = JobId::parse(std::str::from_utf8(field).ok()?)?;
    let (deadline, function) = std::str::from_utf8(value).ok()?.split_once(':')?;
    Some(JournalEntry { id, deadline: deadline.parse().ok()?, function: FunctionId::parse(function)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_read_and_others_left() {
        let id = JobId::new(NodeId(0xab), 5, 6);
        let read = entry(id.to_string().as_bytes(), b"17:f.1").unwrap();
        assert_eq!((read.id, read.deadline, read.function.as_str()), (id, 17, "f.1"));
        assert_eq!(key(id.node()), "inflight:{000000ab}");
        for bad in ["", "17", ":f", "x:f", "17:", "17:a/b"] {
            assert_eq!(entry(id.to_string().as_bytes(), bad.as_bytes()), None, "{bad}");
        }
        assert_eq!(entry(b"x", b"17:f"), None);
    }
}
