//! The journal of this node, and the jobs that leave it because they were never sent. Jobs that have run are
//! removed by the ledger of the audit.
//!
//! A send waits until its jobs have entered. It does not wait for jobs to leave: their ids are collected and
//! removed together ten times per second, so that no client waits. Ids that the backend does not accept are
//! retried.

use crate::backend::{BackendError, Journal, JournalEntry, JournalState};
use crate::model::{FunctionId, Job, JobId, NodeId};
use crate::node_lease::NodeLease;
use parking_lot::{Mutex, MutexGuard};
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::time::Instant;

/// Maximum number of jobs removed in one call.
const LEAVES_MAX: usize = 1024;

/// A job that is to leave the journal.
struct Leaving {
    id: JobId,
    /// Before that, no other node had adopted it.
    since: Instant,
}

pub struct NodeJournal {
    store: Arc<dyn Journal>,
    lease: Arc<NodeLease>,
    /// Bounded by the number of jobs in flight, because a job leaves once.
    leaving: Mutex<Vec<Leaving>>,
    /// Jobs that this process does not know any more stay in its journal.
    has_strangers: AtomicBool,
}

impl NodeJournal {
    pub fn new(store: Arc<dyn Journal>, lease: Arc<NodeLease>) -> Self {
        Self { store, lease, leaving: Mutex::default(), has_strangers: AtomicBool::new(false) }
    }

    /// Enters jobs. Fails if the lease of this node has lapsed, because then no node might track them.
    pub async fn enter(&self, jobs: &[Job]) -> Result<(), BackendError> {
        if !self.lease.holds() {
            return Err(BackendError::Unavailable("the lease of this node has lapsed".into()));
        }
        self.cancel_leave(|id| jobs.iter().any(|job| job.id == id));
        self.store.enter(jobs).await
    }

    /// Keeps a job that is about to be sent again, although it was to leave. Returns whether it was: then it
    /// may have left, and must enter again.
    pub fn keep(&self, id: JobId) -> bool {
        self.cancel_leave(|leaving| leaving == id)
    }

    fn cancel_leave(&self, is_kept: impl Fn(JobId) -> bool) -> bool {
        let mut leaves = self.leaves();
        let before = leaves.len();
        leaves.retain(|leaving| !is_kept(leaving.id));
        leaves.len() < before
    }

    /// Removes jobs with the next [`Self::clear`], unless another node may have adopted them since `since`;
    /// before that, none had. That node then ends them as LOST at their deadline, and a job counts when it
    /// leaves the journal there. If the other node gives them back first, this node ends them.
    pub fn leave(&self, jobs: impl IntoIterator<Item = JobId>, since: Instant) {
        self.leaves().extend(jobs.into_iter().map(|id| Leaving { id, since }));
    }

    /// The same for a job whose send has definitely failed and that has left the table. `must_stay`: another
    /// node may have adopted it, or it has ended.
    pub fn leave_unsent(&self, id: JobId, must_stay: bool) {
        if must_stay {
            self.has_strangers.store(true, Ordering::Relaxed);
        } else {
            self.leave([id], Instant::now());
        }
    }

    /// Removes a job immediately.
    pub async fn leave_now(&self, id: JobId) -> Result<(), BackendError> {
        self.store.leave(&[id]).await
    }

    /// Removes the collected jobs. Jobs that the backend does not accept stay for the next call, also if the
    /// future is dropped.
    pub async fn clear(&self) {
        loop {
            if !self.lease.holds() {
                // Whether another node has adopted them is known after the next renewal.
                return;
            }
            let before = self.leaves().len();
            self.leaves().retain(|leaving| !self.lease.is_shared_since(leaving.since));
            if self.leaves().len() < before {
                self.has_strangers.store(true, Ordering::Relaxed);
            }
            let ids: Vec<JobId> = self.leaves().iter().take(LEAVES_MAX).map(|leaving| leaving.id).collect();
            if ids.is_empty() {
                return;
            }
            if let Err(e) = self.store.leave(&ids).await {
                tracing::debug!(jobs = ids.len(), error = %e, "Unsent jobs stay in the journal; retrying");
                return;
            }
            // Not the first ones: the shutdown and the loop of look-ups may both be here.
            let left: HashSet<JobId> = ids.into_iter().collect();
            self.leaves().retain(|leaving| !left.contains(&leaving.id));
        }
    }

    /// Whether jobs that this process does not know have stayed in its journal since the last call.
    pub fn take_has_strangers(&self) -> bool {
        self.has_strangers.swap(false, Ordering::Relaxed)
    }

    pub async fn standing(&self, id: JobId) -> Result<JournalState, BackendError> {
        self.store.standing(id).await
    }

    /// The entry of a job in the journal of the node that its id names.
    pub async fn entry(&self, id: JobId) -> Result<Option<JournalEntry>, BackendError> {
        self.store.entry(id).await
    }

    /// The node that has adopted the jobs of `node`.
    pub async fn adopter(&self, node: NodeId) -> Result<Option<NodeId>, BackendError> {
        self.store.adopter(node).await
    }

    /// Records that an earlier process left what the journal of `node` holds now.
    pub async fn started(&self, node: NodeId) -> Result<(), BackendError> {
        self.store.started(node).await
    }

    /// The jobs that the next [`Self::clear`] removes.
    pub fn leaving(&self) -> HashSet<JobId> {
        self.leaves().iter().map(|leaving| leaving.id).collect()
    }

    pub async fn given_up(&self, node: NodeId) -> Result<Vec<(JobId, FunctionId)>, BackendError> {
        self.store.given_up(node).await
    }

    pub async fn entries(&self, node: NodeId) -> Result<Vec<JournalEntry>, BackendError> {
        self.store.entries(node).await
    }

    fn leaves(&self) -> MutexGuard<'_, Vec<Leaving>> {
        self.leaving.lock()
    }
}
