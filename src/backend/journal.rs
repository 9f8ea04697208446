//! The port for the journal: the durable set of the jobs in flight of each node, and the counters of ended
//! jobs until they are added to their functions.
//!
//! The journal makes a job survive its process. A job enters before it is sent, and leaves after its row is
//! written or after its send has definitely failed. A restarted process, or a node that adopts the jobs,
//! resumes from the entries.
//!
//! `aws` uses Redis, which can lose its data. A completeness marker per node shows the loss, and then nothing
//! ends until the node has restored its journal (see [`Membership`](crate::backend::Membership)). `embedded`
//! uses a table of its database, which loses nothing, and adds counters in the same transaction. So it has no
//! sums to post, and the default methods of the trait suffice.

use crate::backend::BackendError;
use crate::model::{FunctionId, IdempotencyKey, Job, JobId, NodeId, Sums, UnixMs};
use async_trait::async_trait;
use std::time::Duration;

/// Maximum number of jobs per [`Journal::end`].
pub const ENDED_MAX: usize = 512;

/// Maximum number of functions per [`Journal::number`].
pub const POSTED_MAX: usize = 256;

/// Maximum number of lost jobs of a node that are remembered for late results. A late result of any other job
/// is counted as unknown and ignored.
pub const GIVEN_UP_MAX: usize = 65_536;

/// How long a lost job is remembered.
pub const GIVEN_UP_KEPT: Duration = Duration::from_secs(6 * 3600);

/// The journal entry of one job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JournalEntry {
    pub id: JobId,
    pub function: FunctionId,
    pub deadline: UnixMs,
    pub idempotency_key: Option<Box<IdempotencyKey>>,
}

/// A job whose row is written, and the amounts that it adds to the counters of its function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndedJob {
    pub id: JobId,
    pub function: FunctionId,
    pub adds: Sums,
    /// It ended as LOST. A late result may still arrive.
    pub is_lost: bool,
    /// Several nodes may have sent it.
    pub is_shared: bool,
}

/// What [`Journal::end`] has done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EndOutcome {
    /// Nothing, because the store has lost its data.
    Incomplete,
    /// Every job added its amounts.
    AllAdded,
    /// For each job, what it added.
    Each(Vec<Addition>),
}

/// What an ended job adds to the counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Addition {
    /// Its amounts.
    Whole,
    /// The difference between its amounts and those of LOST, which it added before.
    Difference,
    /// Nothing: it was not in the journal, so it has counted before, perhaps in an earlier call without an
    /// answer.
    Nothing,
}

impl Addition {
    /// What of the amounts of a job is added.
    pub fn of(self, adds: Sums) -> Sums {
        match self {
            Self::Whole => adds,
            Self::Difference => adds.after_lost(),
            Self::Nothing => Sums::default(),
        }
    }
}

/// Sums of one function, with a number that identifies them among all sums of the same node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NumberedSums {
    pub function: FunctionId,
    pub number: u64,
    pub sums: Sums,
}

/// Sums that are not added to their functions yet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UnpostedSums {
    /// Sums with a number, which do not change any more.
    pub numbered: Vec<NumberedSums>,
    /// Sums without a number, to which jobs still add.
    pub sums: Vec<(FunctionId, Sums)>,
}

/// The state of a job in the journal of its node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JournalState {
    /// It has left the journal, or was never in it.
    Absent,
    /// The journal does not hold it, but has lost its data and is not restored yet.
    Unknown,
    /// The journal holds it. The process that accepted it is running and knows the outcome of its send.
    Held,
    /// The journal holds it, but that process has ended or its node was adopted. It is not known whether the
    /// queue received the job.
    Orphaned,
}

impl JournalState {
    /// Whether the journal holds the job.
    pub fn is_held(self) -> bool {
        matches!(self, Self::Held | Self::Orphaned)
    }
}

/// The journals of all nodes. Every call may be repeated after a lost answer.
///
/// Sums are posted in two steps. First they get a number, and from then on they do not change. Then they are
/// added to their function, which stores the number and accepts only higher ones. The numbered sums are kept
/// until the function is known to have them. So they are added exactly once, even if several nodes post them,
/// or one node repeatedly. A store that adds the counters when a job ends has nothing to post.
///
/// A store that has lost its data rejects [`Self::end`] and [`Self::number`] until it is restored (see
/// [`Membership::finish_restore`](crate::backend::Membership::finish_restore)). Before that its answers would
/// look complete, and the caller would discard the only copy of its jobs and sums.
#[async_trait]
pub trait Journal: Send + Sync {
    /// Adds jobs to the journals of the nodes that their ids name. `Ok` means that the store has confirmed
    /// all of them.
    async fn enter(&self, jobs: &[Job]) -> Result<(), BackendError>;

    /// Removes jobs that are certainly not on the queue.
    async fn leave(&self, ids: &[JobId]) -> Result<(), BackendError>;

    /// Removes at most [`ENDED_MAX`] jobs of `node` whose rows are written. In the same step it adds the
    /// amounts of the jobs that it removed to the unposted sums. So each job adds once, even if several nodes
    /// end it. A late result of a job that ended as LOST adds the difference, once.
    async fn end(&self, node: NodeId, ended: &[EndedJob]) -> Result<EndOutcome, BackendError>;

    /// The lost jobs of `node` that are remembered and have no late result; at most [`GIVEN_UP_MAX`].
    async fn given_up(&self, node: NodeId) -> Result<Vec<(JobId, FunctionId)>, BackendError>;

    /// An atomic snapshot of all unposted sums of `node`. `None`: the store has lost its data.
    async fn unposted(&self, _node: NodeId) -> Result<Option<UnpostedSums>, BackendError> {
        Ok(Some(UnpostedSums::default()))
    }

    /// Assigns numbers to the unposted sums of at most [`POSTED_MAX`] functions of `node`. A function whose
    /// earlier sums have a number keeps it, and its new sums wait. New numbers are above `floor` and above
    /// all earlier numbers. Returns all unposted sums of these functions. Returns `None`, and changes
    /// nothing, if the store has lost its data.
    async fn number(
        &self,
        _node: NodeId,
        _functions: &[FunctionId],
        _floor: u64,
    ) -> Result<Option<UnpostedSums>, BackendError> {
        Ok(Some(UnpostedSums::default()))
    }

    /// Adds numbered sums of `node` to their functions, with up to `at_a_time` calls in flight. Sums of
    /// deleted functions are discarded. Returns the sums that are not known to be added, and the last error.
    async fn post(
        &self,
        _node: NodeId,
        _numbered: Vec<NumberedSums>,
        _at_a_time: usize,
    ) -> (Vec<NumberedSums>, Option<BackendError>) {
        (Vec::new(), None)
    }

    /// Whether the journal of the node that the id names holds the job.
    async fn contains(&self, id: JobId) -> Result<bool, BackendError>;

    /// The state of a job in the journal of the node that its id names.
    async fn standing(&self, id: JobId) -> Result<JournalState, BackendError> {
        Ok(if self.contains(id).await? { JournalState::Held } else { JournalState::Absent })
    }

    /// The entry of a job in the journal of the node that its id names.
    async fn entry(&self, id: JobId) -> Result<Option<JournalEntry>, BackendError> {
        Ok(self.entries(id.node()).await?.into_iter().find(|entry| entry.id == id))
    }

    /// The node that has adopted the jobs of `node`.
    async fn adopter(&self, _node: NodeId) -> Result<Option<NodeId>, BackendError> {
        Ok(None)
    }

    /// Records the start of this process as `node`. Jobs that were accepted before are
    /// [`JournalState::Orphaned`].
    async fn started(&self, _node: NodeId) -> Result<(), BackendError> {
        Ok(())
    }

    /// All entries of the journal of `node`, in no order. A restarted process, or an adopter, resumes from
    /// them.
    async fn entries(&self, node: NodeId) -> Result<Vec<JournalEntry>, BackendError>;
}

/// A part of the contents of a journal that is being restored.
#[derive(Clone, Copy, Debug)]
pub enum JournalPart<'a> {
    Jobs(&'a [JournalEntry]),
    Sums(&'a [(FunctionId, Sums)]),
    Numbered(&'a [NumberedSums]),
    GivenUp(&'a [(JobId, FunctionId)]),
}
