//! The node's journal, and the jobs that are to leave it because they were never sent. Those that have run leave it by
//! the audit's ledger.
//!
//! Entering is part of a send and waited for. Leaving is not: ids are collected and leave together, ten times a
//! second, so that no client waits for it, and what the backend does not take is tried again.

use super::lease::Lease;
use crate::backend::{BackendError, Journal, JournalEntry, Standing};
use crate::model::{FunctionId, Job, JobId, NodeId};
use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Most jobs that leave in one call.
const LEAVES_MAX: usize = 1024;

pub struct NodeJournal {
    store: Arc<dyn Journal>,
    lease: Arc<Lease>,
    /// At most as many as are in flight: a job leaves once.
    leaving: Mutex<Vec<JobId>>,
}

impl NodeJournal {
    pub fn new(store: Arc<dyn Journal>, lease: Arc<Lease>) -> Self {
        Self { store, lease, leaving: Mutex::default() }
    }

    /// Enters jobs, unless the lease of this node has lapsed: then nobody might look for them.
    pub async fn enter(&self, jobs: &[Job]) -> Result<(), BackendError> {
        if !self.lease.holds() {
            return Err(BackendError::Unavailable("the lease of this node has lapsed".into()));
        }
        self.store.enter(jobs).await
    }

    /// The jobs leave with the next [`Self::clear`].
    pub fn leave(&self, ids: &[JobId]) {
        self.leaves().extend_from_slice(ids);
    }

    /// Takes a job out at once.
    pub async fn leave_now(&self, id: JobId) -> Result<(), BackendError> {
        self.store.leave(&[id]).await
    }

    /// Takes out what is to leave. What the backend does not take stays for the next time, and so does everything
    /// where this is broken off. One caller at a time.
    pub async fn clear(&self) {
        loop {
            let ids: Vec<JobId> = self.leaves().iter().take(LEAVES_MAX).copied().collect();
            if ids.is_empty() {
                return;
            }
            if let Err(e) = self.store.leave(&ids).await {
                tracing::debug!(jobs = ids.len(), error = %e, "Journal Not Cleared");
                return;
            }
            self.leaves().drain(..ids.len());
        }
    }

    pub async fn standing(&self, id: JobId) -> Result<Standing, BackendError> {
        self.store.standing(id).await
    }

    /// Says that what the journal of `node` holds was left by an earlier process.
    pub async fn started(&self, node: NodeId) -> Result<(), BackendError> {
        self.store.started(node).await
    }

    /// The jobs that are to leave with the next [`Self::clear`].
    pub fn leaving(&self) -> HashSet<JobId> {
        self.leaves().iter().copied().collect()
    }

    pub async fn given_up(&self, node: NodeId) -> Result<Vec<(JobId, FunctionId)>, BackendError> {
        self.store.given_up(node).await
    }

    pub async fn entries(&self, node: NodeId) -> Result<Vec<JournalEntry>, BackendError> {
        self.store.entries(node).await
    }

    fn leaves(&self) -> MutexGuard<'_, Vec<JobId>> {
        self.leaving.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
