//! The nodes of a fleet and their leases.

use crate::backend::BackendError;
use crate::backend::journal::Told;
use crate::model::{NodeId, ProcessToken, UnixMs};
use async_trait::async_trait;
use std::time::Duration;

/// The nodes of a fleet: who lives, and who goes on with the jobs of those that do not.
///
/// A lease says when others may look after a node's jobs. It need not keep two from doing so at once: a row
/// is the same whoever writes it, and a job ends once (see [`Journal::end`]). But it belongs to one process:
/// two that admit jobs under one id would leave the jobs of the one that dies to nobody, because the other
/// renews their lease.
#[async_trait]
pub trait Membership: Send + Sync {
    /// Takes the lease of `node` for this process, if it has lapsed or `predecessor` holds it. By the clock
    /// of the store.
    async fn take(
        &self,
        node: NodeId,
        lease: Duration,
        predecessor: Predecessor,
    ) -> Result<Taken, BackendError>;

    /// Renews the lease of `node`, by the clock of the store, unless another process holds it: that one is
    /// told.
    async fn renew(&self, node: NodeId, lease: Duration) -> Result<Renewal, BackendError>;

    /// Takes, or renews, the part of the one that looks after the jobs of `dead`. `false`: another node has it.
    async fn adopt(&self, dead: NodeId, by: NodeId, lease: Duration) -> Result<bool, BackendError>;

    /// Lists `dead` no more, if its journal is empty and its lease has not been renewed. `false`: it is still listed.
    async fn dismiss(&self, dead: NodeId) -> Result<bool, BackendError>;

    /// Lists a node as one whose lease has lapsed, if it is not listed. `false`: it is.
    async fn relist(&self, node: NodeId) -> Result<bool, BackendError>;

    /// Whether the journal of `node` holds all that was told; if not, the store has lost its data, and nothing ends
    /// there until [`Self::retold`].
    async fn is_whole(&self, node: NodeId) -> Result<bool, BackendError>;

    /// Begins to tell the journal of `node` again what it has lost. `token`: another one each time.
    async fn begin_retelling(&self, node: NodeId, token: u64) -> Result<(), BackendError>;

    /// Tells the journal of `node` again what it has lost.
    async fn retell(&self, node: NodeId, told: Told<'_>) -> Result<(), BackendError>;

    /// The journal of `node` has been told all since it was begun under `token`. `false`: the store has lost its data
    /// again since then, or another node tells it, and it still counts as incomplete.
    async fn retold(&self, node: NodeId, token: u64) -> Result<bool, BackendError>;
}

/// Whose lease may be taken although it has not lapsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Predecessor {
    Nobody,
    /// A process that is known to be gone.
    Process(ProcessToken),
    /// A process without a token: one of an earlier version.
    Unnamed,
}

/// What becomes of a [`Membership::take`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    Yes,
    No(HeldBy),
}

/// A lease that another process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldBy {
    /// `None`: a process without a token, of an earlier version.
    pub process: Option<ProcessToken>,
    /// When the lease lapses, by the clock of the store; later with each renewal.
    pub until: UnixMs,
    /// Until then.
    pub left: Duration,
}

/// What becomes of a [`Membership::renew`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Renewal {
    Renewed {
        others: Others,
        /// Another process has lately tried to renew the lease: it may have jobs in the journal that only it
        /// knows.
        is_contested: bool,
    },
    /// Another process holds the lease.
    Lost,
}

/// What a node hears of the others when it renews its lease.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Others {
    /// Those whose lease has lapsed, a few at a time.
    pub lapsed: Vec<NodeId>,
    /// Nodes whose lease holds, the one that asks included.
    pub alive: usize,
}
