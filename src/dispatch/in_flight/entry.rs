//! One entry of the table of accepted jobs.

use crate::audit::KeyedResult;
use crate::backend::STORED_RESULT_BYTES_MAX;
use crate::dispatch::caps::Permit;
use crate::model::{
    FunctionId, IdempotencyKey, Job, JobId, JobProgress, JobTrace, Outcome, RowLife, UnixMs, now_ms,
};
use smallvec::SmallVec;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;

/// Another node sends a job with an idempotency key again this long after its acceptance at the earliest.
const RESENT_AFTER: Duration = Duration::from_secs(2);

fn age(id: JobId) -> Duration {
    Duration::from_millis(now_ms().saturating_sub(id.accepted_at()))
}

/// One accepted job. It takes 72 bytes with its key, and its progress about 112, because a million jobs may
/// be in flight.
pub struct InFlightJob {
    pub function: FunctionId,
    pub deadline: UnixMs,
    /// Boxed, because few jobs have it.
    pub more: Option<Box<OptionalParts>>,
    /// `None`: an earlier process or another node accepted it.
    pub progress: Option<Arc<JobProgress>>,
    pub waiters: Vec<oneshot::Sender<Outcome>>,
    /// A result has arrived, and its row is not written yet.
    pub settled: bool,
    /// It is not known whether the queue received the job, because its send was not answered or its process
    /// ended.
    pub unconfirmed: bool,
    /// The send has definitely failed, and the idempotency key of the job is not released yet.
    pub unsent: bool,
    /// Another node may end the job too: it was restored, sent again, or the lease of this node has lapsed.
    pub shared: bool,
    /// This process is sending the job again. Until that is done, the entry is not returned to another node.
    pub resending: bool,
    /// Its claim says that it was sent, so no other node sends it again.
    pub claimed_sent: bool,
}

/// What the table knows of a job in flight.
pub struct EntryLife {
    pub function: FunctionId,
    pub deadline: UnixMs,
    /// A result has arrived, and its row is not written yet.
    pub is_settled: bool,
    /// It is not known whether the queue received the job.
    pub is_unconfirmed: bool,
    pub life: RowLife,
}

/// The parts of an entry that few jobs have.
#[derive(Default)]
pub struct OptionalParts {
    pub idempotency_key: Option<IdempotencyKey>,
    pub held: Permits,
    pub trace: Option<Arc<JobTrace>>,
}

/// The slots that a job holds under the caps of its function and its API key.
pub type Permits = SmallVec<[Permit; 2]>;

impl InFlightJob {
    pub fn of(job: &Job, held: Permits, waiters: Vec<oneshot::Sender<Outcome>>) -> Self {
        let key = job.idempotency_key.as_deref().copied();
        let mut entry = Self::new(job.function.clone(), job.deadline, key, held, waiters);
        if job.trace.is_some() {
            entry.more.get_or_insert_default().trace.clone_from(&job.trace);
        }
        entry.progress.clone_from(&job.progress);
        entry
    }

    pub fn new(
        function: FunctionId,
        deadline: UnixMs,
        idempotency_key: Option<IdempotencyKey>,
        held: Permits,
        waiters: Vec<oneshot::Sender<Outcome>>,
    ) -> Self {
        let has_more = idempotency_key.is_some() || !held.is_empty();
        let more = has_more.then(|| Box::new(OptionalParts { idempotency_key, held, trace: None }));
        Self {
            function,
            deadline,
            more,
            progress: None,
            waiters,
            settled: false,
            unconfirmed: false,
            unsent: false,
            shared: false,
            resending: false,
            claimed_sent: false,
        }
    }

    /// Whether another node may end the job too. It may also have sent it again without this node knowing it
    /// yet, if the claim did not say in time that it was sent.
    pub fn is_shared(&self, id: JobId) -> bool {
        let may_be_resent =
            || self.idempotency_key().is_some() && !self.claimed_sent && age(id) >= RESENT_AFTER;
        self.shared || may_be_resent()
    }

    pub fn trace(&self) -> Option<Arc<JobTrace>> {
        self.more.as_ref().and_then(|more| more.trace.clone())
    }

    /// What is known of the steps of the job.
    pub fn life(&self) -> RowLife {
        self.progress.as_ref().map(JobProgress::life).unwrap_or_default()
    }

    /// A copy of what is known of the job.
    pub fn entry_life(&self) -> EntryLife {
        EntryLife {
            function: self.function.clone(),
            deadline: self.deadline,
            is_settled: self.settled,
            is_unconfirmed: self.unconfirmed && !self.settled,
            life: self.life(),
        }
    }

    pub fn idempotency_key(&self) -> Option<IdempotencyKey> {
        self.more.as_ref().and_then(|more| more.idempotency_key)
    }

    /// The result to be stored with the idempotency key, if the job has one and the result is not too large.
    pub fn kept(&self, outcome: &Outcome) -> Option<Box<KeyedResult>> {
        let result = outcome.published();
        let key = self.idempotency_key().filter(|_| result.len() <= STORED_RESULT_BYTES_MAX)?;
        Some(Box::new(KeyedResult { key, result: result.clone() }))
    }
}
