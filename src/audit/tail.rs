//! The last executions of this node, for people who look on.

use crate::model::{Execution, FunctionId, Status, UnixMs, now_ms};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

/// Executions that are kept; the oldest goes.
const ENTRIES_MAX: usize = 100;

/// One of them, without its message.
#[derive(Clone, Debug, PartialEq)]
pub struct TailEntry {
    pub request_id: String,
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
    pub(super) fn push(&self, row: &Execution) {
        let entry = TailEntry {
            request_id: row.request_id.clone(),
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
    use crate::model::{JobId, NodeId};

    #[test]
    fn the_last_hundred_newest_first() {
        let tail = Tail::default();
        for n in 0..250 {
            tail.push(&Execution::lost(JobId::new(NodeId(1), 0, n), FunctionId::parse("f").unwrap()));
        }
        let ids: Vec<String> = tail.entries().into_iter().map(|entry| entry.request_id).collect();
        let expected: Vec<String> =
            (150..250).rev().map(|n| JobId::new(NodeId(1), 0, n).to_string()).collect();
        assert_eq!(ids, expected);
    }
}
