//! The jobs of this node and of the nodes that it adopts, for `fleet`.

use super::in_flight::InFlight;
use super::journal::NodeJournal;
use super::settler::Settler;
use crate::backend::{BackendError, JournalEntry};
use crate::model::{FunctionId, JobId, NodeId};
use std::collections::HashSet;
use std::sync::Arc;
use tokio::time::Instant;

/// The table of jobs in flight and the journal, by node. Cheap to clone.
#[derive(Clone)]
pub struct NodeJobs {
    settler: Arc<Settler>,
    in_flight: Arc<InFlight>,
    journal: Arc<NodeJournal>,
}

impl NodeJobs {
    pub fn new(settler: Arc<Settler>, in_flight: Arc<InFlight>, journal: Arc<NodeJournal>) -> Self {
        Self { settler, in_flight, journal }
    }

    /// Records the start of this process as `node`. All entries in its journal now count as left by an
    /// earlier process.
    pub async fn started(&self, node: NodeId) -> Result<(), BackendError> {
        self.journal.started(node).await
    }

    /// The jobs in the journal of `node`.
    pub async fn journaled(&self, node: NodeId) -> Result<Vec<JournalEntry>, BackendError> {
        self.journal.entries(node).await
    }

    /// The jobs of `node` that ended as LOST and may still get a late result.
    pub async fn given_up(&self, node: NodeId) -> Result<Vec<(JobId, FunctionId)>, BackendError> {
        self.journal.given_up(node).await
    }

    /// Queues jobs for the next round of removals from the journal.
    pub fn remove_from_journal(&self, jobs: impl IntoIterator<Item = JobId>) {
        self.journal.leave(jobs, Instant::now());
    }

    /// The jobs that are queued for removal from the journal.
    pub fn being_removed(&self) -> HashSet<JobId> {
        self.journal.leaving()
    }

    /// Resumes a job of an earlier process or of another node. Returns `false` if the table has it.
    pub fn restore(&self, entry: &JournalEntry) -> bool {
        self.settler.restore(entry)
    }

    /// Remembers a job that ended as LOST, for a late result.
    pub fn remember(&self, id: JobId, function: FunctionId) {
        self.settler.remember(id, function);
    }

    /// Whether jobs that this process does not know have stayed in its journal since the last call.
    pub fn take_has_strangers(&self) -> bool {
        self.journal.take_has_strangers()
    }

    /// Marks all jobs as ones that another node may end too.
    pub fn share_all(&self) {
        self.in_flight.share_all();
    }

    pub fn contains(&self, id: JobId) -> bool {
        self.in_flight.contains(id)
    }

    /// The number of jobs for which the table still has room.
    pub fn room(&self) -> usize {
        self.in_flight.room()
    }

    /// The jobs of `node` in the table, as journal entries, and its jobs that are remembered as LOST.
    pub fn of_node(&self, node: NodeId) -> (Vec<JournalEntry>, Vec<(JobId, FunctionId)>) {
        (self.in_flight.of_node(node), self.in_flight.given_up_of(node))
    }

    pub fn ids_of_node(&self, node: NodeId) -> Vec<JobId> {
        self.in_flight.ids_of_node(node)
    }

    /// Removes adopted jobs whose node is back. Returns those for which clients still wait here.
    pub fn give_back(&self, ids: impl IntoIterator<Item = JobId>) -> Vec<JobId> {
        self.in_flight.give_back(ids)
    }
}

/// For the tests of `fleet`: a dispatcher without a queue and without publications.
#[cfg(test)]
impl NodeJobs {
    pub fn without_queue(
        journal: Arc<dyn crate::backend::Journal>,
        results: Arc<dyn crate::backend::Results>,
        lease: &Arc<crate::node_lease::NodeLease>,
        audit: crate::audit::Audit,
        metrics: &Arc<crate::metrics::Metrics>,
    ) -> (Self, super::Lookups, Arc<dyn crate::audit::RowsStored>) {
        let in_flight = Arc::new(InFlight::new(1000, 1 << 20, Arc::clone(metrics)));
        let journal = Arc::new(NodeJournal::new(journal, Arc::clone(lease)));
        let settler = Settler::new(super::settler::SettlerParts {
            in_flight: Arc::clone(&in_flight),
            schedule: Arc::default(),
            results,
            audit,
            lease: Arc::clone(lease),
            events: crate::events::EventBus::default(),
            traces: crate::traces::Traces::default(),
            metrics: Arc::clone(metrics),
        });
        let settler = Arc::new(settler);
        let lookups = super::Lookups::new(Arc::clone(&settler), Arc::clone(&in_flight), Arc::clone(&journal));
        (Self::new(Arc::clone(&settler), in_flight, journal), lookups, settler)
    }

    pub fn enter(&self, job: &crate::model::Job) {
        self.in_flight.enter(job, super::Permits::new()).unwrap();
        self.settler.plan(job.id);
    }

    pub fn settle(&self, id: JobId, outcome: crate::model::Outcome) {
        self.settler.settle(id, outcome);
    }

    /// A client that waits for the job.
    pub fn wait_for(&self, id: JobId) -> super::Waiter {
        let super::in_flight::JoinOutcome::Pending(waiter) = self.in_flight.join(id) else {
            panic!("pending")
        };
        waiter
    }
}
