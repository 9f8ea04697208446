//! The journal of jobs in flight.

use crate::backend::BackendError;
use crate::model::{FunctionId, IdempotencyKey, Job, JobId, NodeId, Sums, UnixMs};
use async_trait::async_trait;
use std::time::Duration;

/// Most jobs in one [`Journal::end`].
pub const ENDED_MAX: usize = 512;

/// Most functions in one [`Journal::number`].
pub const POSTED_MAX: usize = 256;

/// Most jobs of a node that are remembered after they were given up. The results of others that come late are only
/// counted.
pub const GIVEN_UP_MAX: usize = 65_536;

/// For how long they are remembered.
pub const GIVEN_UP_KEPT: Duration = Duration::from_secs(6 * 3600);

/// What the journal keeps of one job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JournalEntry {
    pub id: JobId,
    pub function: FunctionId,
    pub deadline: UnixMs,
    pub idempotency_key: Option<Box<IdempotencyKey>>,
}

/// A job whose row is written, and what its execution adds to its function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    pub id: JobId,
    pub function: FunctionId,
    pub adds: Sums,
    /// It was given up without a result. A late one may still come.
    pub is_lost: bool,
}

/// Sums of one function under the number by which they are told from others of the same node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Numbered {
    pub function: FunctionId,
    pub number: u64,
    pub sums: Sums,
}

/// The sums of some functions that are still to be posted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unposted {
    /// Sums with a number.
    pub numbered: Vec<Numbered>,
    /// Sums without a number.
    pub sums: Vec<(FunctionId, Sums)>,
}

/// Where a job stands in the journal of its node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It has left the journal, or has never been in it.
    Absent,
    /// The journal does not hold it, and has lost what it held.
    Unknown,
    /// The process that accepted it knows what became of its send.
    Held,
    /// That process has ended, or its lease has: nobody can know whether the queue has the job.
    Left,
}

impl Standing {
    /// Whether the journal holds the job.
    pub fn is_held(self) -> bool {
        matches!(self, Self::Held | Self::Left)
    }
}

/// The durable set of a node's jobs in flight, and what ended jobs add to their functions until that is posted. A
/// job enters before it is sent, and leaves when its row is written or its send has definitely failed.
///
/// Sums are posted in two steps: they get a number, and then they are added to their function, which remembers the
/// number. Until that is known the number stays with them, so whoever posts them, and however often, adds once. A
/// store that adds at once, with the end of the job, has nothing to post.
///
/// A store that has lost its data does nothing with jobs that end, and with sums, until it has been told again what it
/// had (see [`Membership::retold`]). An answer from before that would be taken for the truth.
#[async_trait]
pub trait Journal: Send + Sync {
    async fn enter(&self, jobs: &[Job]) -> Result<(), BackendError>;

    /// Takes out jobs that never ran.
    async fn leave(&self, ids: &[JobId]) -> Result<(), BackendError>;

    /// Takes out jobs of `node` whose rows are written; at most [`ENDED_MAX`]. In the same step it keeps what those of
    /// them add that were still there, so each job adds once, whoever ends it and however often; and what a result
    /// changes that came after its job was given up. `false`: the store has lost its data, and nothing was done.
    async fn end(&self, node: NodeId, ended: &[Ended]) -> Result<bool, BackendError>;

    /// Jobs of `node` that were given up lately, and for which no result has come; at most [`GIVEN_UP_MAX`].
    async fn given_up(&self, node: NodeId) -> Result<Vec<(JobId, FunctionId)>, BackendError>;

    /// All sums of `node` that are to be posted, as they are at one moment. `None`: the store has lost its data.
    async fn unposted(&self, _node: NodeId) -> Result<Option<Unposted>, BackendError> {
        Ok(Some(Unposted::default()))
    }

    /// Gives the sums of these functions of `node` their numbers, unless earlier ones have a number already; at most
    /// [`POSTED_MAX`] functions. The numbers are above `floor`, and above all that the store has given. Gives all that is
    /// to be posted for these functions now. `None`: the store has lost its data, and nothing was done.
    async fn number(
        &self,
        _node: NodeId,
        _functions: &[FunctionId],
        _floor: u64,
    ) -> Result<Option<Unposted>, BackendError> {
        Ok(Some(Unposted::default()))
    }

    /// Adds sums of `node` to their functions, if those (still) exist, up to `at_a_time` side by side. Gives back what
    /// is not known to be added, and why.
    async fn post(
        &self,
        _node: NodeId,
        _numbered: Vec<Numbered>,
        _at_a_time: usize,
    ) -> (Vec<Numbered>, Option<BackendError>) {
        (Vec::new(), None)
    }

    /// Whether the node that the id names holds the job.
    async fn contains(&self, id: JobId) -> Result<bool, BackendError>;

    /// The same, and what the node can know of it.
    async fn standing(&self, id: JobId) -> Result<Standing, BackendError> {
        Ok(if self.contains(id).await? { Standing::Held } else { Standing::Absent })
    }

    /// The process that runs `node` has started: what the journal holds by now was left by an earlier one.
    async fn started(&self, _node: NodeId) -> Result<(), BackendError> {
        Ok(())
    }

    /// All that `node` holds: what a restarted node goes on with.
    async fn entries(&self, node: NodeId) -> Result<Vec<JournalEntry>, BackendError>;
}

/// A part of what a journal should hold.
#[derive(Clone, Copy, Debug)]
pub enum Told<'a> {
    Jobs(&'a [JournalEntry]),
    Sums(&'a [(FunctionId, Sums)]),
    Numbered(&'a [Numbered]),
    GivenUp(&'a [(JobId, FunctionId)]),
}
