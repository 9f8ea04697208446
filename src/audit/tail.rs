//! The last executions of this node, for people who look on.

use crate::model::{Execution, FunctionId, JobId, Status, UnixMs, now_ms};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

/// Executions that are kept; the oldest goes.
const ENTRIES_MAX: usize = 100;

/// One of them, without its message.
#[derive(Clone, Debug, PartialEq)]
pub struct TailEntry {
    pub id: JobId,
    pub function: FunctionId,
    pub status: Status,
    pub duration_ms: f64,
    /// When it ended.
    pub at: UnixMs,
}

/// A ring of the last executions. Cheap to clone; clones share it.
#[derive(Clone, Default)]
pub struct Tail(Arc<Mutex<VecDeque<TailEntry>>>);

impl Tail {
    pub(super) fn push(&self, id: JobId, row: &Execution) {
        let entry = TailEntry {
            id,
            function: row.function.clone(),
            status: row.status.clone(),
            duration_ms: row.duration_ms,
            at: row.completed_at.unwrap_or_else(now_ms),
        };
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if entries.len() == ENTRIES_MAX {
            entries.pop_front();
        }
        entries.push_back(entry);
    }

    /// The newest first.
    pub fn entries(&self) -> Vec<TailEntry> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().rev().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::NodeId;

    #[test]
    fn the_last_hundred_newest_first() {
        let tail = Tail::default();
        for n in 0..250 {
            let id = JobId::new(NodeId(1), 0, n);
            tail.push(id, &Execution::lost(id, FunctionId::parse("f").unwrap(), false));
        }
        let ids: Vec<JobId> = tail.entries().into_iter().map(|entry| entry.id).collect();
        let expected: Vec<JobId> = (150..250).rev().map(|n| JobId::new(NodeId(1), 0, n)).collect();
        assert_eq!(ids, expected);
    }
}
