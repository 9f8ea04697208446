//! The table of accepted jobs, and of the requests that wait for their results.
//!
//! Every accepted job stays in the table until its row is written. A waiter is registered *before* the job is
//! sent, because a fast worker may publish the result before the send returns. Dropping a [`Waiter`]
//! unregisters it, whether it was answered, timed out or its client has left. The job stays.
//!
//! A DashMap guard locks a shard, so none is held across an await.

mod entry;
mod settled;

pub use entry::Permits;
pub use settled::{FirstResult, SettleOutcome};

use crate::ambient;
use crate::backend::JournalEntry;
use crate::dispatch::given_up::LostJobs;
use crate::dispatch::recent::{RecentResults, SHARDS};
use crate::metrics::Metrics;
use crate::model::{FunctionId, Job, JobId, JobProgress, NodeId, Outcome, RowLife, UnixMs};
use ahash::RandomState;
use dashmap::DashMap;
use dashmap::mapref::entry::Entry as MapEntry;
use entry::{EntryLife, InFlightJob};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::oneshot;
use tokio::time::Instant;

/// Maximum number of waiters per job. A further client must poll.
pub const WAITERS_PER_JOB_MAX: usize = 16;

/// Shards of the table of lost jobs, which is nearly always empty.
const LOST_SHARDS: usize = 16;

/// Maximum number of attempts to count the jobs at a moment when none enters or leaves.
const RECKONINGS_MAX: usize = 32;

/// The table has no room for another job.
#[derive(Debug, PartialEq, Eq)]
pub struct TableFull;

/// The outcome of [`InFlight::join`].
pub enum JoinOutcome {
    /// The result is known.
    Settled(Outcome),
    /// The job is in flight. The waiter receives its result.
    Pending(Waiter),
    /// The job is in flight and has [`WAITERS_PER_JOB_MAX`] waiters.
    Crowded,
    /// The job is not on this node.
    Unknown,
}

/// The outcome of [`InFlight::enter_again`].
pub struct EnteredAgain {
    /// The job was not in the table.
    pub is_new: bool,
    pub waiter: Option<Waiter>,
    /// The progress that the job has now.
    pub progress: Option<Arc<JobProgress>>,
}

/// The table of accepted jobs. Also holds recent results and lost jobs.
pub struct InFlight {
    jobs: DashMap<JobId, InFlightJob, RandomState>,
    len: AtomicUsize,
    jobs_max: usize,
    recent: RecentResults,
    given_up: LostJobs,
    metrics: Arc<Metrics>,
}

impl InFlight {
    /// `jobs_max`: maximum number of jobs, restored ones excepted. `settled_bytes_max`: memory for recent
    /// results, in bytes.
    pub fn new(jobs_max: usize, settled_bytes_max: usize, metrics: Arc<Metrics>) -> Self {
        let jobs = DashMap::with_hasher_and_shard_amount(ambient::hash_keys(), SHARDS);
        let given_up = LostJobs {
            jobs: DashMap::with_hasher_and_shard_amount(ambient::hash_keys(), LOST_SHARDS),
            len: AtomicUsize::new(0),
        };
        Self {
            jobs,
            len: AtomicUsize::new(0),
            jobs_max,
            recent: RecentResults::new(settled_bytes_max),
            given_up,
            metrics,
        }
    }

    /// Adds a job without a waiter.
    pub fn enter(&self, job: &Job, held: Permits) -> Result<(), TableFull> {
        self.insert(job, held, Vec::new())
    }

    /// Adds a job together with a waiter for it.
    pub fn enter_waiting(self: &Arc<Self>, job: &Job, held: Permits) -> Result<Waiter, TableFull> {
        let (sender, receiver) = oneshot::channel();
        self.insert(job, held, vec![sender])?;
        Ok(self.waiter(job.id, receiver))
    }

    /// Adds a job of an earlier process of this node, or of an adopted node. It was accepted before, so it
    /// may exceed the maximum. Returns `false` if the table has the job.
    pub fn restore(&self, entry: &JournalEntry) -> bool {
        match self.jobs.entry(entry.id) {
            MapEntry::Occupied(_) => return false,
            MapEntry::Vacant(place) => {
                let JournalEntry { function, deadline, idempotency_key, .. } = entry.clone();
                let key = idempotency_key.map(|key| *key);
                let mut restored = InFlightJob::new(function, deadline, key, Permits::new(), Vec::new());
                // The journal does not record confirmations: that would cost one Redis command per job.
                (restored.unconfirmed, restored.shared) = (true, true);
                place.insert(restored);
            }
        }
        self.count_one_more();
        true
    }

    fn count_one_more(&self) {
        self.len.fetch_add(1, Ordering::Relaxed);
        self.metrics.jobs.accepted.inc();
        self.metrics.jobs.in_flight.set(self.len());
    }

    fn count_one_less(&self) {
        self.len.fetch_sub(1, Ordering::Relaxed);
        self.metrics.jobs.finished.inc();
        self.metrics.jobs.in_flight.set(self.len());
    }

    /// Adds a job that is sent again, with a waiter if `waits`. The table may have the job already, and the
    /// job may belong to another node. It takes no slot under a cap, because it was admitted before.
    pub fn enter_again(self: &Arc<Self>, job: &Job, waits: bool) -> Result<EnteredAgain, TableFull> {
        let (sender, receiver) = oneshot::channel();
        let waiters = if waits { vec![sender] } else { Vec::new() };
        let mut progress = job.progress.clone();
        let is_new = match self.jobs.entry(job.id) {
            MapEntry::Occupied(mut place) => {
                let entry = place.get_mut();
                (entry.resending, entry.unsent, entry.shared) = (true, false, true);
                entry.progress = entry.progress.take().or(progress);
                progress = entry.progress.clone();
                // Without room the sender is dropped, so the waiter gets `None` immediately.
                let room = WAITERS_PER_JOB_MAX.saturating_sub(entry.waiters.len());
                entry.waiters.extend(waiters.into_iter().take(if entry.settled { 0 } else { room }));
                false
            }
            MapEntry::Vacant(_) if self.room() == 0 => return Err(TableFull),
            MapEntry::Vacant(place) => {
                let mut entry = InFlightJob::of(job, Permits::new(), waiters);
                (entry.unconfirmed, entry.resending, entry.shared) = (true, true, true);
                place.insert(entry);
                true
            }
        };
        if is_new {
            self.count_one_more();
        }
        Ok(EnteredAgain { is_new, waiter: waits.then(|| self.waiter(job.id, receiver)), progress })
    }

    /// Records that the send of a job has definitely failed. Until its idempotency key is released, a repeat
    /// may send it again, so it stays, and it does not end as LOST.
    pub fn note_unsent(&self, id: JobId) {
        if let Some(mut entry) = self.jobs.get_mut(&id) {
            (entry.unsent, entry.resending) = (true, false);
        }
    }

    /// Marks all jobs as ones that another node may end too.
    pub fn share_all(&self) {
        self.jobs.iter_mut().for_each(|mut entry| entry.shared = true);
    }

    /// Records the outcome of a send: the queue has confirmed the job, or it is not known whether it received
    /// it.
    pub fn note_send(&self, id: JobId, is_confirmed: bool) {
        if let Some(mut entry) = self.jobs.get_mut(&id) {
            (entry.unconfirmed, entry.unsent, entry.resending) = (!is_confirmed, false, false);
        }
    }

    /// Records that the claim of a job says that it was sent.
    pub fn note_claimed_sent(&self, id: JobId) {
        if let Some(mut entry) = self.jobs.get_mut(&id) {
            entry.claimed_sent = true;
        }
    }

    /// The state of a job whose send is about to be attempted or has failed.
    pub fn fate(&self, id: JobId) -> SendEvidence {
        if self.awaited(id).is_some() {
            SendEvidence::Awaited
        } else if self.given_up.contains(id) || self.recent.get(id).is_some_and(|outcome| outcome.is_lost()) {
            SendEvidence::Lost
        } else {
            SendEvidence::HasResult
        }
    }

    /// Whether it is not known if the queue received the job. `None`: the job is not in the table.
    pub fn is_unconfirmed(&self, id: JobId) -> Option<bool> {
        self.jobs.get(&id).map(|entry| entry.unconfirmed && !entry.settled)
    }

    /// The jobs of a node, as entries of its journal.
    pub fn of_node(&self, node: NodeId) -> Vec<JournalEntry> {
        let jobs = self.jobs.iter().filter(|entry| entry.key().node() == node);
        let entry = |id, of: &InFlightJob| JournalEntry {
            id,
            function: of.function.clone(),
            deadline: of.deadline,
            idempotency_key: of.idempotency_key().map(Box::new),
        };
        jobs.map(|job| entry(*job.key(), job.value())).collect()
    }

    /// Removes adopted jobs, because their node is back. Settled jobs and jobs that are being sent again
    /// stay. Returns the jobs that have waiters here. The caller must try again later, because their node
    /// tracks them now.
    pub fn give_back(&self, jobs: impl IntoIterator<Item = JobId>) -> Vec<JobId> {
        let mut waited_for = Vec::new();
        for id in jobs {
            let may_leave = |_: &JobId, entry: &InFlightJob| {
                let is_idle = !entry.settled && !entry.resending;
                if is_idle && !entry.waiters.is_empty() {
                    waited_for.push(id);
                }
                is_idle && entry.waiters.is_empty()
            };
            if self.jobs.remove_if(&id, may_leave).is_some() {
                self.len.fetch_sub(1, Ordering::Relaxed);
                self.metrics.jobs.finished.inc();
            }
        }
        self.metrics.jobs.in_flight.set(self.len());
        waited_for
    }

    /// The ids of the jobs of a node.
    pub fn ids_of_node(&self, node: NodeId) -> Vec<JobId> {
        self.jobs.iter().map(|job| *job.key()).filter(|id| id.node() == node).collect()
    }

    /// How many more jobs may enter.
    pub fn room(&self) -> usize {
        self.jobs_max.saturating_sub(self.len.load(Ordering::Relaxed))
    }

    fn insert(
        &self,
        job: &Job,
        held: Permits,
        waiters: Vec<oneshot::Sender<Outcome>>,
    ) -> Result<(), TableFull> {
        if self.len.fetch_add(1, Ordering::Relaxed) >= self.jobs_max {
            self.len.fetch_sub(1, Ordering::Relaxed);
            return Err(TableFull);
        }
        if self.jobs.insert(job.id, InFlightJob::of(job, held, waiters)).is_some() {
            self.len.fetch_sub(1, Ordering::Relaxed); // the job was in the table, and counted, before
        } else {
            self.metrics.jobs.accepted.inc();
        }
        self.metrics.jobs.in_flight.set(self.len());
        Ok(())
    }

    /// Registers a waiter for a job that is in the table, or returns its recent result.
    pub fn join(self: &Arc<Self>, id: JobId) -> JoinOutcome {
        // A job may settle, and even leave the table, between two look-ups. So the recent results are read
        // both before and after the table.
        if let Some(outcome) = self.recent.get(id) {
            return JoinOutcome::Settled(outcome);
        }
        let receiver = match self.jobs.get_mut(&id) {
            None => return self.recent.get(id).map_or(JoinOutcome::Unknown, JoinOutcome::Settled),
            Some(entry) if entry.waiters.len() >= WAITERS_PER_JOB_MAX => return JoinOutcome::Crowded,
            Some(mut entry) => {
                let (sender, receiver) = oneshot::channel();
                entry.waiters.push(sender);
                receiver
            }
        };
        match self.recent.get(id) {
            Some(outcome) => JoinOutcome::Settled(outcome),
            None => JoinOutcome::Pending(self.waiter(id, receiver)),
        }
    }

    fn waiter(self: &Arc<Self>, id: JobId, receiver: oneshot::Receiver<Outcome>) -> Waiter {
        self.metrics.waiters.inc();
        Waiter { id, receiver: Some(receiver), table: Arc::clone(self) }
    }

    /// Accepts a result: stores it for `/status`, sends it to the waiters, and returns whether a row must be
    /// written.
    pub fn settle(&self, id: JobId, outcome: Outcome) -> SettleOutcome {
        let (first, told) = match self.jobs.get_mut(&id) {
            None => return self.settle_late(id, outcome).unwrap_or(SettleOutcome::UnknownJob),
            Some(entry) if entry.settled => {
                drop(entry);
                return self.settle_late(id, outcome).unwrap_or(SettleOutcome::Repeated);
            }
            Some(mut entry) => {
                let waiters = std::mem::take(&mut entry.waiters);
                let kept = entry.kept(&outcome);
                // The worker has finished, so the slots are free although the row is not written yet.
                if let Some(more) = &mut entry.more {
                    more.held.clear();
                }
                // Cloned only if there are waiters, because the first clone of a buffer allocates.
                let told = (!waiters.is_empty()).then(|| outcome.clone());
                // Before the waiters are answered, so that a `/status` after the response finds the result.
                self.recent.keep(id, outcome);
                entry.settled = true;
                let (function, is_shared, life) = (entry.function.clone(), entry.is_shared(id), entry.life());
                let heard_at = entry.progress.as_ref().map(|progress| progress.now());
                let trace = entry.trace();
                let first = FirstResult { function, kept, is_shared, heard_at, life, trace };
                (first, told.map(|outcome| (outcome, waiters)))
            }
        };
        if let Some((outcome, waiters)) = told {
            for waiter in waiters {
                // An error means that the client has left.
                let _ = waiter.send(outcome.clone());
            }
        }
        SettleOutcome::First(first)
    }

    fn settle_late(&self, id: JobId, outcome: Outcome) -> Option<SettleOutcome> {
        let (function, life) = self.given_up.settle(id)?;
        self.recent.keep(id, outcome);
        Some(SettleOutcome::Late(function, life))
    }

    /// Remembers a job that ended as LOST, for a late result.
    pub fn remember(&self, id: JobId, function: FunctionId, life: RowLife) {
        self.given_up.insert(id, function, life);
    }

    /// Forgets a lost job: the row of its late result is queued, or its LOST row could not be queued.
    pub fn forget(&self, id: JobId) {
        self.given_up.remove(id);
    }

    /// Undoes [`Self::settle`] for a late result whose row could not be queued.
    pub fn unsettle_late(&self, id: JobId) {
        self.given_up.unsettle(id);
    }

    /// Whether the job ended as LOST and a late result is still accepted.
    pub fn is_remembered(&self, id: JobId) -> bool {
        self.given_up.contains(id)
    }

    /// The lost jobs of a node that are remembered.
    pub fn given_up_of(&self, node: NodeId) -> Vec<(JobId, FunctionId)> {
        let jobs = self.given_up.jobs.iter().filter(|job| job.key().node() == node);
        jobs.map(|job| (*job.key(), job.function.clone())).collect()
    }

    /// Undoes [`Self::settle`] for a result whose row could not be queued. A later look-up settles it again.
    pub fn unsettle(&self, id: JobId) {
        if let Some(mut entry) = self.jobs.get_mut(&id) {
            entry.settled = false;
        }
    }

    /// Removes a job whose row is written, or that is certainly not on the queue. Its waiters get `None`.
    pub fn remove(&self, id: JobId) {
        if self.jobs.remove(&id).is_some() {
            self.count_one_less();
        }
    }

    /// Removes a job that is certainly not on the queue. Returns whether its entry in the journal must stay,
    /// because another node may have adopted the job, or because it has ended meanwhile.
    pub fn remove_unsent(&self, id: JobId) -> bool {
        let removed = self.jobs.remove_if(&id, |_, entry| !entry.settled);
        removed.is_none_or(|(_, entry)| {
            self.count_one_less();
            entry.shared
        })
    }

    /// Whether another node may end the job too.
    pub fn is_shared(&self, id: JobId) -> bool {
        self.jobs.get(&id).is_some_and(|entry| entry.shared)
    }

    /// Records that another node sends a job again whose send has definitely failed here. Either may end it.
    pub fn share_unsent(&self, id: JobId) {
        if let Some(mut entry) = self.jobs.get_mut(&id) {
            (entry.unconfirmed, entry.unsent, entry.shared) = (true, false, true);
        }
    }

    /// Removes a job whose send has definitely failed, unless it is being sent again.
    pub fn abandon_unsent(&self, id: JobId) {
        if self.jobs.remove_if(&id, |_, entry| entry.unsent && !entry.settled && !entry.resending).is_some() {
            self.count_one_less();
        }
    }

    /// The state of a job without a result. `None`: it has one, or is not in the table.
    pub fn awaited(&self, id: JobId) -> Option<Awaited> {
        let entry = self.jobs.get(&id).filter(|entry| !entry.settled)?;
        let waited_for = !entry.waiters.is_empty();
        Some(Awaited { deadline: entry.deadline, waited_for, is_unsent: entry.unsent })
    }

    /// What the table knows of a job.
    pub fn entry_life(&self, id: JobId) -> Option<EntryLife> {
        self.jobs.get(&id).map(|entry| entry.entry_life())
    }

    /// The recent result of a job.
    pub fn recent(&self, id: JobId) -> Option<Outcome> {
        self.recent.get(id)
    }

    /// The function of a job that ended as LOST, if the job is remembered.
    pub fn lost_function(&self, id: JobId) -> Option<FunctionId> {
        self.given_up.jobs.get(&id).map(|job| job.function.clone())
    }

    /// Whether the job is in the table, with or without a result.
    pub fn contains(&self, id: JobId) -> bool {
        self.jobs.contains_key(&id)
    }

    /// The jobs without a result.
    pub fn unsettled(&self) -> Vec<JobId> {
        self.jobs.iter().filter(|entry| !entry.settled).map(|entry| *entry.key()).collect()
    }

    /// The jobs and their states, for the report of a simulation.
    #[cfg(test)]
    pub fn shown(&self) -> Vec<String> {
        let show = |id: &JobId, job: &InFlightJob| {
            let states = [
                (job.settled, "settled"),
                (job.unconfirmed, "unconfirmed"),
                (job.unsent, "unsent"),
                (job.shared, "shared"),
                (job.resending, "resending"),
            ];
            let states: Vec<&str> = states.iter().filter(|(is, _)| *is).map(|(_, state)| *state).collect();
            format!("{id} ({}, {} waiters)", states.join(" "), job.waiters.len())
        };
        let mut all: Vec<String> = self.jobs.iter().map(|job| show(job.key(), job.value())).collect();
        all.sort();
        all
    }

    /// Evicts expired results. Must be called at intervals.
    pub fn forget_old(&self) {
        self.recent.prune(Instant::now());
    }

    /// Evicts a result that the worker has stored.
    pub fn forget_settled(&self, id: JobId) {
        self.recent.outcomes.remove(&id);
    }

    /// Checks that every accepted job has finished or is in the table, and sets the metric for it.
    pub fn reckon(&self) {
        let counts = || (self.metrics.jobs.accepted.get(), self.metrics.jobs.finished.get());
        let mut unaccounted = 0;
        for _ in 0..RECKONINGS_MAX {
            let before = counts();
            let len = self.jobs.len() as u64;
            // A job that entered or left in between may be in one of the numbers only.
            if counts() != before {
                continue;
            }
            unaccounted = before.0.wrapping_sub(before.1).wrapping_sub(len).cast_signed();
            if unaccounted == 0 {
                break;
            }
        }
        self.metrics.jobs.unaccounted.set(unaccounted);
    }

    /// The number of jobs. `DashMap::len` would lock every shard.
    fn len(&self) -> i64 {
        i64::try_from(self.len.load(Ordering::Relaxed)).unwrap_or(i64::MAX)
    }

    fn leave(&self, id: JobId) {
        if let MapEntry::Occupied(mut entry) = self.jobs.entry(id) {
            entry.get_mut().waiters.retain(|waiter| !waiter.is_closed());
        }
    }
}

/// The state of a job without a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Awaited {
    pub deadline: UnixMs,
    /// The job has a waiter.
    pub waited_for: bool,
    /// Its send has definitely failed.
    pub is_unsent: bool,
}

/// The outcome of [`InFlight::fate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendEvidence {
    /// The job has no result yet.
    Awaited,
    /// The job has a result, which proves that the queue received it.
    HasResult,
    /// The job ended as LOST, which does not prove whether the queue received it.
    Lost,
}

/// A registered wait for a result. Dropping it unregisters it.
pub struct Waiter {
    id: JobId,
    /// `None` after [`Self::outcome`] has returned.
    receiver: Option<oneshot::Receiver<Outcome>>,
    table: Arc<InFlight>,
}

impl Waiter {
    /// Waits for the result. Returns `None` if the job was removed because it never reached the queue, or if
    /// the job had too many waiters. Cancel safe; may be called again after `None`.
    pub async fn outcome(&mut self) -> Option<Outcome> {
        let outcome = self.receiver.as_mut()?.await.ok();
        self.receiver = None;
        outcome
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.receiver.iter_mut().for_each(oneshot::Receiver::close);
        self.table.leave(self.id);
        self.table.metrics.waiters.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::GIVEN_UP_KEPT;
    use crate::dispatch::recent::{SETTLED_BYTES, SETTLED_KEPT};
    use crate::model::NodeId;

    fn table(jobs_max: usize, settled_bytes_max: usize) -> Arc<InFlight> {
        Arc::new(InFlight::new(jobs_max, settled_bytes_max, Arc::new(Metrics::new(10).unwrap())))
    }

    fn job(n: u64) -> Job {
        let id = JobId::new(NodeId(1), 1000, n);
        Job {
            progress: None,
            id,
            function: FunctionId::parse("f").unwrap(),
            deadline: 2000,
            idempotency_key: None,
            is_promised: true,
            message: "{}".into(),
            trace: None,
        }
    }

    fn outcome(text: &str) -> Outcome {
        Outcome::new(text.to_owned().into())
    }

    #[tokio::test]
    async fn a_waiter_receives_the_first_result() {
        let table = table(10, 1000);
        let mut waiter = table.enter_waiting(&job(1), Permits::new()).unwrap();
        assert_eq!(
            table.settle(job(1).id, outcome("a")),
            SettleOutcome::First(FirstResult {
                function: job(1).function,
                kept: None,
                is_shared: false,
                trace: None,
                heard_at: None,
                life: RowLife::default(),
            })
        );
        assert_eq!(table.settle(job(1).id, outcome("b")), SettleOutcome::Repeated);
        assert_eq!(table.settle(job(2).id, outcome("b")), SettleOutcome::UnknownJob);
        assert_eq!(waiter.outcome().await, Some(outcome("a")));
        let JoinOutcome::Settled(again) = table.join(job(1).id) else { panic!("settled") };
        assert_eq!(again, outcome("a"));
    }

    /// A request calls `outcome` while it waits for the queue, and again afterwards.
    #[tokio::test]
    async fn a_waiter_without_room_may_be_polled_twice() {
        let table = table(10, 1000);
        table.enter(&job(1), Permits::new()).unwrap();
        let _others: Vec<JoinOutcome> = (0..WAITERS_PER_JOB_MAX).map(|_| table.join(job(1).id)).collect();
        let mut crowded = table.enter_again(&job(1), true).unwrap().waiter.unwrap();
        assert_eq!((crowded.outcome().await, crowded.outcome().await), (None, None));
        table.settle(job(1).id, outcome("a"));
        let mut late = table.enter_again(&job(1), true).unwrap().waiter.unwrap();
        assert_eq!((late.outcome().await, late.outcome().await), (None, None));
    }

    #[tokio::test]
    async fn a_dropped_waiter_leaves_the_job() {
        let table = table(10, 1000);
        drop(table.enter_waiting(&job(1), Permits::new()).unwrap());
        assert_eq!(
            table.awaited(job(1).id),
            Some(Awaited { deadline: 2000, waited_for: false, is_unsent: false })
        );
        assert_eq!(table.metrics.waiters.get(), 0);
        let JoinOutcome::Pending(mut late) = table.join(job(1).id) else { panic!("pending") };
        table.settle(job(1).id, outcome("a"));
        assert_eq!(late.outcome().await, Some(outcome("a")));
    }

    #[tokio::test(start_paused = true)]
    async fn a_lost_job_accepts_one_late_result() {
        let table = table(10, 1000);
        table.enter(&job(1), Permits::new()).unwrap();
        assert!(matches!(table.settle(job(1).id, outcome("lost")), SettleOutcome::First(..)));
        table.remember(job(1).id, job(1).function, RowLife::default());
        // Its LOST row may be queued or written.
        assert_eq!(
            table.settle(job(1).id, outcome("a")),
            SettleOutcome::Late(job(1).function, RowLife::default())
        );
        assert_eq!(table.settle(job(1).id, outcome("b")), SettleOutcome::Repeated);
        // The row of the late result could not be queued.
        table.unsettle_late(job(1).id);
        table.remove(job(1).id);
        assert!(table.is_remembered(job(1).id));
        assert_eq!(table.given_up_of(NodeId(1)), [(job(1).id, job(1).function)]);
        tokio::time::advance(GIVEN_UP_KEPT).await;
        assert!(!table.is_remembered(job(1).id));
        assert_eq!(table.settle(job(1).id, outcome("c")), SettleOutcome::UnknownJob);
    }

    #[tokio::test]
    async fn a_removed_job_wakes_its_waiter() {
        let table = table(10, 1000);
        let mut waiter = table.enter_waiting(&job(1), Permits::new()).unwrap();
        table.remove(job(1).id);
        assert_eq!(waiter.outcome().await, None);
        assert!(matches!(table.join(job(1).id), JoinOutcome::Unknown));
        assert_eq!(table.metrics.jobs.in_flight.get(), 0);
    }

    #[test]
    fn the_table_is_bounded() {
        let table = table(2, 1000);
        table.enter(&job(1), Permits::new()).unwrap();
        table.enter(&job(2), Permits::new()).unwrap();
        assert_eq!(table.enter(&job(3), Permits::new()), Err(TableFull));
        table.remove(job(1).id);
        table.enter(&job(3), Permits::new()).unwrap();
    }

    #[test]
    fn waiters_of_one_job_are_bounded() {
        let table = table(2, 1000);
        table.enter(&job(1), Permits::new()).unwrap();
        let joined: Vec<_> = (0..WAITERS_PER_JOB_MAX).map(|_| table.join(job(1).id)).collect();
        assert!(matches!(table.join(job(1).id), JoinOutcome::Crowded));
        drop(joined);
        assert!(matches!(table.join(job(1).id), JoinOutcome::Pending(_)));
    }

    #[tokio::test(start_paused = true)]
    async fn settled_results_are_bounded_in_bytes_and_time() {
        let table = table(10, 2 * (5 + SETTLED_BYTES));
        for n in 1..=3 {
            table.enter(&job(n), Permits::new()).unwrap();
            table.settle(job(n).id, outcome("12345"));
            table.remove(job(n).id);
        }
        assert!(matches!(table.join(job(1).id), JoinOutcome::Unknown), "the oldest is evicted");
        assert!(matches!(table.join(job(2).id), JoinOutcome::Settled(_)));
        tokio::time::advance(SETTLED_KEPT).await;
        table.forget_old();
        assert!(matches!(table.join(job(3).id), JoinOutcome::Unknown));
    }
}
