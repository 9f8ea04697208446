//! The port for the membership of a fleet: leases of node ids, adoption of dead nodes, and restoring a
//! journal that was lost.
//!
//! Only `aws` has it, on Redis. `embedded` has one node, whose data directory is locked.

use crate::backend::BackendError;
use crate::backend::journal::JournalPart;
use crate::model::{NodeId, ProcessToken, UnixMs};
use async_trait::async_trait;
use std::time::Duration;

/// The leases of the nodes, and the adoption of nodes whose lease has lapsed.
///
/// While a lease is valid no other node adopts the jobs of its node. The lease is not a fence: two nodes may
/// end the same jobs, because rows are idempotent and each job is counted once (see
/// [`Journal::end`](crate::backend::Journal::end)). But a lease belongs to one process. If two processes
/// admitted jobs under one id, each would renew the lease of the other. The jobs of the one that dies would
/// never be adopted.
///
/// All times are those of the store, so the clocks of nodes need not agree.
#[async_trait]
pub trait Membership: Send + Sync {
    /// Takes the lease of `node` for this process, for the duration `lease`. Succeeds if the lease has
    /// lapsed, or if this process or `predecessor` holds it.
    async fn take(
        &self,
        node: NodeId,
        lease: Duration,
        predecessor: Predecessor,
    ) -> Result<LeaseOutcome, BackendError>;

    /// Renews the lease of `node`, also after it has lapsed. If another process holds it, marks it as
    /// contested and returns [`LeaseRenewal::Lost`].
    async fn renew(&self, node: NodeId, lease: Duration) -> Result<LeaseRenewal, BackendError>;

    /// Makes `by` the adopter of `dead` for the duration `lease`, or renews that.
    async fn adopt(&self, dead: NodeId, by: NodeId, lease: Duration) -> Result<AdoptOutcome, BackendError>;

    /// Removes `dead` from the list of nodes, if its journal has no entries and no unposted sums, and its
    /// lease has lapsed. Returns `false` if it stays listed.
    async fn dismiss(&self, dead: NodeId) -> Result<bool, BackendError>;

    /// Adds a node to the list as one whose lease has lapsed. Returns `false`, and changes nothing, if it is
    /// listed.
    async fn relist(&self, node: NodeId) -> Result<bool, BackendError>;

    /// Prepares for a change that this node makes in the journal of `node`: a job, or sums.
    ///
    /// For some time, `node` stays in the list of nodes. If it is not listed, this call adds it, as a node
    /// whose lease lapses after that time. So if this node dies, another one adopts `node` and finds the
    /// change. For the same time the lease of `node` counts as contested, so a live `node` finds it too.
    async fn entrust(&self, node: NodeId) -> Result<(), BackendError>;

    /// Whether the journal of `node` is complete. If not, the store has lost its data, and no job of the node
    /// ends until [`Self::finish_restore`] succeeds.
    async fn is_complete(&self, node: NodeId) -> Result<bool, BackendError>;

    /// Begins to restore the journal of `node`. `token` identifies this restore and must be unique. Returns
    /// `false`, and begins nothing, if the journal is complete: another node has restored it.
    async fn begin_restore(&self, node: NodeId, token: u64) -> Result<bool, BackendError>;

    /// Writes a part of the journal of `node`. Returns `false`, and writes nothing, if the restore `token` is
    /// not the current one any more.
    async fn restore(&self, node: NodeId, token: u64, told: JournalPart<'_>) -> Result<bool, BackendError>;

    /// Marks the journal of `node` as complete. Returns `false`, and the journal stays incomplete, if the
    /// store has lost its data since the restore `token` began, or if another restore has begun.
    async fn finish_restore(&self, node: NodeId, token: u64) -> Result<bool, BackendError>;
}

/// The process from which a lease may be taken before it lapses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Predecessor {
    Nobody,
    /// A process that is known to have ended.
    Process(ProcessToken),
    /// A process without a token, which runs an earlier version.
    Unnamed,
}

/// The outcome of [`Membership::take`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseOutcome {
    Yes,
    No(LeaseHolder),
}

/// The holder of a lease that was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseHolder {
    /// `None`: a process without a token, which runs an earlier version.
    pub process: Option<ProcessToken>,
    /// When the lease lapses, by the clock of the store. Each renewal increases it.
    pub until: UnixMs,
    /// The time until then.
    pub left: Duration,
}

/// The outcome of [`Membership::adopt`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdoptOutcome {
    Adopted,
    /// Another node is its adopter.
    ByAnother,
    /// The node has renewed its lease.
    Alive,
}

/// The outcome of [`Membership::renew`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LeaseRenewal {
    Renewed {
        others: FleetState,
        /// Another process has tried to renew the lease within the duration of a lease. It may have entered
        /// jobs in the journal that this process does not know.
        is_contested: bool,
        /// Changes with each adoption of the node. If it has not changed while the lease was lapsed, no other
        /// node has its jobs.
        adoptions: u64,
    },
    /// Another process holds the lease.
    Lost,
}

/// The state of the fleet when a lease was renewed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FleetState {
    /// Nodes whose lease has lapsed; `aws` returns at most 16 of them.
    pub lapsed: Vec<NodeId>,
    /// The number of nodes with a valid lease, this node included.
    pub alive: usize,
}
