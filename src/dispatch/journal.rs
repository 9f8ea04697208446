//! The node's journal, and the jobs that are to leave it.
//!
//! Entering is part of a send and waited for. Leaving is not: ids are collected and leave together, ten times a
//! second, so that neither a client nor the next row waits for it, and what the backend does not take is tried again.

use crate::backend::{BackendError, Journal, JournalEntry};
use crate::model::{Job, JobId, NodeId};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Most jobs that leave in one call.
const LEAVES_MAX: usize = 1024;

pub struct NodeJournal {
    store: Arc<dyn Journal>,
    /// At most as many as are in flight: a job leaves once.
    leaving: Mutex<Vec<JobId>>,
}

impl NodeJournal {
    pub fn new(store: Arc<dyn Journal>) -> Self {
        Self { store, leaving: Mutex::default() }
    }

    pub async fn enter(&self, jobs: &[Job]) -> Result<(), BackendError> {
        self.store.enter(jobs).await
    }

    /// The jobs leave with the next [`Self::clear`].
    pub fn leave(&self, ids: &[JobId]) {
        self.leaving().extend_from_slice(ids);
    }

    /// Takes out what is to leave. What the backend does not take stays for the next time.
    pub async fn clear(&self) {
        let leaving = std::mem::take(&mut *self.leaving());
        for ids in leaving.chunks(LEAVES_MAX) {
            if let Err(e) = self.store.leave(ids).await {
                tracing::debug!(jobs = ids.len(), error = %e, "Journal Not Cleared");
                self.leave(ids);
            }
        }
    }

    pub async fn contains(&self, id: JobId) -> Result<bool, BackendError> {
        self.store.contains(id).await
    }

    pub async fn entries(&self, node: NodeId) -> Result<Vec<JournalEntry>, BackendError> {
        self.store.entries(node).await
    }

    fn leaving(&self) -> MutexGuard<'_, Vec<JobId>> {
        self.leaving.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
