//! The table of accepted jobs, and of those who wait for them.
//!
//! Every accepted job stays here until its row is written. A waiter is registered *before* the job is sent: a
//! fast worker may publish before the send returns. Its guard frees the oneshot on drop (answered, timed out,
//! client gone); the job stays.
//!
//! DashMap guards are taken and dropped within one statement or block and never held over an await.

use super::caps::Slot;
use crate::audit::Kept;
use crate::backend::{JournalEntry, KEPT_BYTES_MAX};
use crate::dispatch::given_up::GivenUpJobs;
use crate::dispatch::recent::Recent;
use crate::metrics::Metrics;
use crate::model::{FunctionId, IdempotencyKey, Job, JobId, NodeId, Outcome, UnixMs};
use ahash::RandomState;
use dashmap::DashMap;
use dashmap::mapref::entry::Entry as MapEntry;
use smallvec::SmallVec;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::oneshot;
use tokio::time::Instant;

/// Most clients that may wait for one job; one more is told to poll.
pub const WAITERS_PER_JOB_MAX: usize = 16;

/// Parts of a table. While one grows all of its entries move, and its users wait: so it holds a few thousand at most.
pub const SHARDS: usize = 256;
/// Tries to count jobs while none comes or goes.
const RECKONINGS_MAX: usize = 32;

/// The table has no room for another job.
#[derive(Debug, PartialEq, Eq)]
pub struct Full;

/// One accepted job. 64 bytes with its key, as a queue may hold a million.
struct Entry {
    function: FunctionId,
    deadline: UnixMs,
    /// What few jobs have.
    more: Option<Box<More>>,
    waiters: Vec<oneshot::Sender<Outcome>>,
    /// A result was taken; its row is on the way.
    settled: bool,
    /// Nobody can know whether the queue has the job: its send was not answered, or its process ended.
    unconfirmed: bool,
    /// This process sends the job again. Meanwhile the entry is not given back to another node.
    resending: bool,
}

#[derive(Default)]
struct More {
    idempotency_key: Option<IdempotencyKey>,
    /// Its places among the jobs of its function and of its key, if they have caps.
    held: Held,
}

/// Places that a job holds.
pub type Held = SmallVec<[Slot; 2]>;

impl Entry {
    fn of(job: &Job, held: Held, waiters: Vec<oneshot::Sender<Outcome>>) -> Self {
        Self::new(job.function.clone(), job.deadline, job.idempotency_key.as_deref().copied(), held, waiters)
    }

    fn new(
        function: FunctionId,
        deadline: UnixMs,
        idempotency_key: Option<IdempotencyKey>,
        held: Held,
        waiters: Vec<oneshot::Sender<Outcome>>,
    ) -> Self {
        let has_more = idempotency_key.is_some() || !held.is_empty();
        let more = has_more.then(|| Box::new(More { idempotency_key, held }));
        Self { function, deadline, more, waiters, settled: false, unconfirmed: false, resending: false }
    }

    fn idempotency_key(&self) -> Option<IdempotencyKey> {
        self.more.as_ref().and_then(|more| more.idempotency_key)
    }

    /// What is to be kept with the key of the request, if it has one.
    fn kept(&self, outcome: &Outcome) -> Option<Box<Kept>> {
        let result = outcome.published();
        let key = self.idempotency_key().filter(|_| result.len() <= KEPT_BYTES_MAX)?;
        Some(Box::new(Kept { key, result: result.clone() }))
    }
}

/// What [`InFlight::join`] found.
pub enum Joined {
    /// The result is known.
    Settled(Outcome),
    /// The job runs; the waiter hears of its result.
    Pending(Waiter),
    /// The job runs, but too many wait for it already.
    Crowded,
    /// No such job on this node.
    Unknown,
}

/// See [`InFlight::enter_again`].
pub struct EnteredAgain {
    /// The job was not in the table.
    pub is_new: bool,
    pub waiter: Option<Waiter>,
}

/// What [`InFlight::settle`] did.
#[derive(Debug, PartialEq, Eq)]
pub enum Settled {
    /// First result of the job: a row is due.
    First(FunctionId, Option<Box<Kept>>),
    /// First result of a job that was given up: its row is to be replaced.
    Late(FunctionId),
    /// A result was taken before.
    Repeated,
    /// The job is not of this node, or its row is written already.
    UnknownJob,
}

pub struct InFlight {
    jobs: DashMap<JobId, Entry, RandomState>,
    len: AtomicUsize,
    jobs_max: usize,
    recent: Recent,
    given_up: GivenUpJobs,
    metrics: Arc<Metrics>,
}

impl InFlight {
    pub fn new(jobs_max: usize, settled_bytes_max: usize, metrics: Arc<Metrics>) -> Self {
        let jobs = DashMap::with_hasher_and_shard_amount(RandomState::new(), SHARDS);
        let given_up =
            GivenUpJobs { jobs: DashMap::with_hasher(RandomState::new()), len: AtomicUsize::new(0) };
        Self {
            jobs,
            len: AtomicUsize::new(0),
            jobs_max,
            recent: Recent::new(settled_bytes_max),
            given_up,
            metrics,
        }
    }

    /// Enters a job nobody waits for.
    pub fn enter(&self, job: &Job, held: Held) -> Result<(), Full> {
        self.insert(job, held, Vec::new())
    }

    /// Enters a job together with one who waits for it.
    pub fn enter_waiting(self: &Arc<Self>, job: &Job, held: Held) -> Result<Waiter, Full> {
        let (sender, receiver) = oneshot::channel();
        self.insert(job, held, vec![sender])?;
        Ok(self.waiter(job.id, receiver))
    }

    /// Enters a job of an earlier life of this node, or of another one that is gone. There is always room: it was
    /// accepted before. `false`: it is there already.
    pub fn restore(&self, entry: &JournalEntry) -> bool {
        match self.jobs.entry(entry.id) {
            MapEntry::Occupied(_) => return false,
            MapEntry::Vacant(place) => {
                let JournalEntry { function, deadline, idempotency_key, .. } = entry.clone();
                let key = idempotency_key.map(|key| *key);
                let mut restored = Entry::new(function, deadline, key, Held::new(), Vec::new());
                // The journal does not say whether the queue confirmed it: that would cost a command a job.
                restored.unconfirmed = true;
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

    /// Enters a job that is to be sent again, together with one who waits for it if `waits`. The job may be here
    /// already, and may belong to another node. It holds no place under a cap: it was admitted before.
    pub fn enter_again(self: &Arc<Self>, job: &Job, waits: bool) -> Result<EnteredAgain, Full> {
        let (sender, receiver) = oneshot::channel();
        let waiters = if waits { vec![sender] } else { Vec::new() };
        let is_new = match self.jobs.entry(job.id) {
            MapEntry::Occupied(mut place) => {
                let entry = place.get_mut();
                entry.resending = true;
                // A waiter that finds no place hears at once that there is none: its sender is dropped.
                let room = WAITERS_PER_JOB_MAX.saturating_sub(entry.waiters.len());
                entry.waiters.extend(waiters.into_iter().take(if entry.settled { 0 } else { room }));
                false
            }
            MapEntry::Vacant(_) if self.room() == 0 => return Err(Full),
            MapEntry::Vacant(place) => {
                let mut entry = Entry::of(job, Held::new(), waiters);
                (entry.unconfirmed, entry.resending) = (true, true);
                place.insert(entry);
                true
            }
        };
        if is_new {
            self.count_one_more();
        }
        Ok(EnteredAgain { is_new, waiter: waits.then(|| self.waiter(job.id, receiver)) })
    }

    /// Notes what became of the send of a job: it was confirmed, or nobody can know.
    pub fn note_send(&self, id: JobId, is_confirmed: bool) {
        if let Some(mut entry) = self.jobs.get_mut(&id) {
            (entry.unconfirmed, entry.resending) = (!is_confirmed, false);
        }
    }

    /// What is known of a job whose send failed or was not answered.
    pub fn fate(&self, id: JobId) -> Fate {
        if self.awaited(id).is_some() {
            Fate::Awaited
        } else if self.given_up.contains(id) || self.recent.get(id).is_some_and(|outcome| outcome.is_lost()) {
            Fate::Lost
        } else {
            Fate::HasResult
        }
    }

    /// Whether nobody can know if the queue has the job. `None`: the job is not here.
    pub fn is_unconfirmed(&self, id: JobId) -> Option<bool> {
        self.jobs.get(&id).map(|entry| entry.unconfirmed && !entry.settled)
    }

    /// The jobs of a node, as its journal holds them.
    pub fn of_node(&self, node: NodeId) -> Vec<JournalEntry> {
        let jobs = self.jobs.iter().filter(|entry| entry.key().node() == node);
        let entry = |id, of: &Entry| JournalEntry {
            id,
            function: of.function.clone(),
            deadline: of.deadline,
            idempotency_key: of.idempotency_key().map(Box::new),
        };
        jobs.map(|job| entry(*job.key(), job.value())).collect()
    }

    /// Leaves jobs to the node that they are of, but for those whose result is taken or that are sent again here. Gives
    /// those that somebody waits for here: they are to be given back later, as their node may withdraw them.
    pub fn give_back(&self, jobs: impl IntoIterator<Item = JobId>) -> Vec<JobId> {
        let mut waited_for = Vec::new();
        for id in jobs {
            let may_leave = |_: &JobId, entry: &Entry| {
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

    /// Jobs that may still enter.
    pub fn room(&self) -> usize {
        self.jobs_max.saturating_sub(self.len.load(Ordering::Relaxed))
    }

    fn insert(&self, job: &Job, held: Held, waiters: Vec<oneshot::Sender<Outcome>>) -> Result<(), Full> {
        if self.len.fetch_add(1, Ordering::Relaxed) >= self.jobs_max {
            self.len.fetch_sub(1, Ordering::Relaxed);
            return Err(Full);
        }
        if self.jobs.insert(job.id, Entry::of(job, held, waiters)).is_some() {
            self.len.fetch_sub(1, Ordering::Relaxed); // the same job again: it was counted before
        } else {
            self.metrics.jobs.accepted.inc();
        }
        self.metrics.jobs.in_flight.set(self.len());
        Ok(())
    }

    /// Waits for a job that was entered before.
    pub fn join(self: &Arc<Self>, id: JobId) -> Joined {
        // Settled results first: a job that settles between the two looks is then found by the second.
        if let Some(outcome) = self.recent.get(id) {
            return Joined::Settled(outcome);
        }
        let receiver = match self.jobs.get_mut(&id) {
            None => return self.recent.get(id).map_or(Joined::Unknown, Joined::Settled),
            Some(entry) if entry.waiters.len() >= WAITERS_PER_JOB_MAX => return Joined::Crowded,
            Some(mut entry) => {
                let (sender, receiver) = oneshot::channel();
                entry.waiters.push(sender);
                receiver
            }
        };
        match self.recent.get(id) {
            Some(outcome) => Joined::Settled(outcome),
            None => Joined::Pending(self.waiter(id, receiver)),
        }
    }

    fn waiter(self: &Arc<Self>, id: JobId, receiver: oneshot::Receiver<Outcome>) -> Waiter {
        self.metrics.waiters.inc();
        Waiter { id, receiver: Some(receiver), table: Arc::clone(self) }
    }

    /// Takes a result: answers those who wait, and says whether a row is due.
    pub fn settle(&self, id: JobId, outcome: Outcome) -> Settled {
        let (function, kept, told) = match self.jobs.get_mut(&id) {
            None => return self.settle_late(id, outcome).unwrap_or(Settled::UnknownJob),
            Some(entry) if entry.settled => {
                drop(entry);
                return self.settle_late(id, outcome).unwrap_or(Settled::Repeated);
            }
            Some(mut entry) => {
                let waiters = std::mem::take(&mut entry.waiters);
                let kept = entry.kept(&outcome);
                // The worker is done with it, though its row is not written yet.
                if let Some(more) = &mut entry.more {
                    more.held.clear();
                }
                // The first copy of a buffer is an allocation, and mostly nobody waits.
                let told = (!waiters.is_empty()).then(|| outcome.clone());
                // Kept before anyone is told, so that a `/status` right after an answer finds it.
                self.recent.keep(id, outcome);
                entry.settled = true;
                (entry.function.clone(), kept, told.map(|outcome| (outcome, waiters)))
            }
        };
        if let Some((outcome, waiters)) = told {
            for waiter in waiters {
                // A receiver that is gone is a client that is gone.
                let _ = waiter.send(outcome.clone());
            }
        }
        Settled::First(function, kept)
    }

    fn settle_late(&self, id: JobId, outcome: Outcome) -> Option<Settled> {
        let function = self.given_up.settle(id)?;
        self.recent.keep(id, outcome);
        Some(Settled::Late(function))
    }

    /// Remembers a job that was given up.
    pub fn remember(&self, id: JobId, function: FunctionId) {
        self.given_up.insert(id, function);
    }

    /// The row of a late result is queued (or that of the job as lost is not): the job is remembered no more.
    pub fn forget(&self, id: JobId) {
        self.given_up.remove(id);
    }

    /// Undoes the taking of a late result whose row found no room.
    pub fn unsettle_late(&self, id: JobId) {
        self.given_up.unsettle(id);
    }

    /// Whether a result of a job that was given up may still come.
    pub fn is_remembered(&self, id: JobId) -> bool {
        self.given_up.contains(id)
    }

    /// The jobs of a node that were given up.
    pub fn given_up_of(&self, node: NodeId) -> Vec<(JobId, FunctionId)> {
        let jobs = self.given_up.jobs.iter().filter(|job| job.key().node() == node);
        jobs.map(|job| (*job.key(), job.function.clone())).collect()
    }

    /// Undoes the taking of a result whose row found no room: a later look-up takes it again.
    pub fn unsettle(&self, id: JobId) {
        if let Some(mut entry) = self.jobs.get_mut(&id) {
            entry.settled = false;
        }
    }

    /// Removes a job whose row is written, or that is certainly not on the queue.
    pub fn remove(&self, id: JobId) {
        if self.jobs.remove(&id).is_some() {
            self.len.fetch_sub(1, Ordering::Relaxed);
            self.metrics.jobs.finished.inc();
            self.metrics.jobs.in_flight.set(self.len());
        }
    }

    /// If the job waits for a result: its deadline and whether somebody waits for it.
    pub fn awaited(&self, id: JobId) -> Option<Awaited> {
        let entry = self.jobs.get(&id).filter(|entry| !entry.settled)?;
        Some(Awaited { deadline: entry.deadline, waited_for: !entry.waiters.is_empty() })
    }

    /// Whether the row of the job is still to be written.
    pub fn contains(&self, id: JobId) -> bool {
        self.jobs.contains_key(&id)
    }

    /// The jobs that wait for a result.
    pub fn unsettled(&self) -> Vec<JobId> {
        self.jobs.iter().filter(|entry| !entry.settled).map(|entry| *entry.key()).collect()
    }

    /// Forgets settled results that are old enough; called from time to time.
    pub fn forget_old(&self) {
        self.recent.prune(Instant::now());
    }

    /// Forgets a settled result that the worker's own store has.
    pub fn forget_settled(&self, id: JobId) {
        self.recent.outcomes.remove(&id);
    }

    /// Reckons whether every accepted job has finished or is in the table, for the metric of it.
    pub fn reckon(&self) {
        let counts = || (self.metrics.jobs.accepted.get(), self.metrics.jobs.finished.get());
        let mut unaccounted = 0;
        for _ in 0..RECKONINGS_MAX {
            let before = counts();
            let len = self.jobs.len() as u64;
            // Jobs that came or went meanwhile stand on one side only.
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

    /// `DashMap::len` locks every shard; the counter beside it does not.
    fn len(&self) -> i64 {
        i64::try_from(self.len.load(Ordering::Relaxed)).unwrap_or(i64::MAX)
    }

    fn leave(&self, id: JobId) {
        if let MapEntry::Occupied(mut entry) = self.jobs.entry(id) {
            entry.get_mut().waiters.retain(|waiter| !waiter.is_closed());
        }
    }
}

/// See [`InFlight::awaited`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Awaited {
    pub deadline: UnixMs,
    pub waited_for: bool,
}

/// See [`InFlight::fate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Awaited,
    /// It has a result, which proves that the queue had the job.
    HasResult,
    /// Its deadline has passed without a result, which says nothing of the queue.
    Lost,
}

/// One who waits for a result. Dropping it frees its place.
pub struct Waiter {
    id: JobId,
    /// `None`: it has been heard, or nothing will be.
    receiver: Option<oneshot::Receiver<Outcome>>,
    table: Arc<InFlight>,
}

impl Waiter {
    /// The result. `None`: the job was given up (it never reached the queue), or this waiter found no place. May be
    /// called again after having been cancelled, and after a `None`.
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
    use crate::dispatch::recent::SETTLED_BYTES;
    use crate::dispatch::recent::SETTLED_KEPT;
    use crate::model::NodeId;

    fn table(jobs_max: usize, settled_bytes_max: usize) -> Arc<InFlight> {
        Arc::new(InFlight::new(jobs_max, settled_bytes_max, Arc::new(Metrics::new(10).unwrap())))
    }

    fn job(n: u64) -> Job {
        let id = JobId::new(NodeId(1), 1000, n);
        Job {
            id,
            function: FunctionId::parse("f").unwrap(),
            deadline: 2000,
            idempotency_key: None,
            message: "{}".into(),
        }
    }

    fn outcome(text: &str) -> Outcome {
        Outcome::new(text.to_owned().into())
    }

    #[tokio::test]
    async fn a_waiter_hears_the_first_result() {
        let table = table(10, 1000);
        let mut waiter = table.enter_waiting(&job(1), Held::new()).unwrap();
        assert_eq!(table.settle(job(1).id, outcome("a")), Settled::First(job(1).function, None));
        assert_eq!(table.settle(job(1).id, outcome("b")), Settled::Repeated);
        assert_eq!(table.settle(job(2).id, outcome("b")), Settled::UnknownJob);
        assert_eq!(waiter.outcome().await, Some(outcome("a")));
        let Joined::Settled(again) = table.join(job(1).id) else { panic!("settled") };
        assert_eq!(again, outcome("a"));
    }

    /// As a request does that first waits for the queue and then for the result.
    #[tokio::test]
    async fn a_waiter_without_a_place_may_ask_twice() {
        let table = table(10, 1000);
        table.enter(&job(1), Held::new()).unwrap();
        let _others: Vec<Joined> = (0..WAITERS_PER_JOB_MAX).map(|_| table.join(job(1).id)).collect();
        let mut crowded = table.enter_again(&job(1), true).unwrap().waiter.unwrap();
        assert_eq!((crowded.outcome().await, crowded.outcome().await), (None, None));
        table.settle(job(1).id, outcome("a"));
        let mut late = table.enter_again(&job(1), true).unwrap().waiter.unwrap();
        assert_eq!((late.outcome().await, late.outcome().await), (None, None));
    }

    #[tokio::test]
    async fn a_dropped_waiter_leaves_the_job() {
        let table = table(10, 1000);
        drop(table.enter_waiting(&job(1), Held::new()).unwrap());
        assert_eq!(table.awaited(job(1).id), Some(Awaited { deadline: 2000, waited_for: false }));
        assert_eq!(table.metrics.waiters.get(), 0);
        let Joined::Pending(mut late) = table.join(job(1).id) else { panic!("pending") };
        table.settle(job(1).id, outcome("a"));
        assert_eq!(late.outcome().await, Some(outcome("a")));
    }

    #[tokio::test(start_paused = true)]
    async fn a_job_that_was_lost_takes_one_late_result() {
        let table = table(10, 1000);
        table.enter(&job(1), Held::new()).unwrap();
        assert!(matches!(table.settle(job(1).id, outcome("lost")), Settled::First(..)));
        table.remember(job(1).id, job(1).function);
        // Its row may be on the way still, or be written.
        assert_eq!(table.settle(job(1).id, outcome("a")), Settled::Late(job(1).function));
        assert_eq!(table.settle(job(1).id, outcome("b")), Settled::Repeated);
        // Its row found no room.
        table.unsettle_late(job(1).id);
        table.remove(job(1).id);
        assert!(table.is_remembered(job(1).id));
        assert_eq!(table.given_up_of(NodeId(1)), [(job(1).id, job(1).function)]);
        tokio::time::advance(GIVEN_UP_KEPT).await;
        assert!(!table.is_remembered(job(1).id));
        assert_eq!(table.settle(job(1).id, outcome("c")), Settled::UnknownJob);
    }

    #[tokio::test]
    async fn a_job_given_up_wakes_its_waiter() {
        let table = table(10, 1000);
        let mut waiter = table.enter_waiting(&job(1), Held::new()).unwrap();
        table.remove(job(1).id);
        assert_eq!(waiter.outcome().await, None);
        assert!(matches!(table.join(job(1).id), Joined::Unknown));
        assert_eq!(table.metrics.jobs.in_flight.get(), 0);
    }

    #[test]
    fn the_table_is_bounded() {
        let table = table(2, 1000);
        table.enter(&job(1), Held::new()).unwrap();
        table.enter(&job(2), Held::new()).unwrap();
        assert_eq!(table.enter(&job(3), Held::new()), Err(Full));
        table.remove(job(1).id);
        table.enter(&job(3), Held::new()).unwrap();
    }

    #[test]
    fn waiters_of_one_job_are_bounded() {
        let table = table(2, 1000);
        table.enter(&job(1), Held::new()).unwrap();
        let joined: Vec<_> = (0..WAITERS_PER_JOB_MAX).map(|_| table.join(job(1).id)).collect();
        assert!(matches!(table.join(job(1).id), Joined::Crowded));
        drop(joined);
        assert!(matches!(table.join(job(1).id), Joined::Pending(_)));
    }

    #[tokio::test(start_paused = true)]
    async fn settled_results_are_bounded_in_bytes_and_time() {
        let table = table(10, 2 * (5 + SETTLED_BYTES));
        for n in 1..=3 {
            table.enter(&job(n), Held::new()).unwrap();
            table.settle(job(n).id, outcome("12345"));
            table.remove(job(n).id);
        }
        assert!(matches!(table.join(job(1).id), Joined::Unknown), "the oldest made room");
        assert!(matches!(table.join(job(2).id), Joined::Settled(_)));
        tokio::time::advance(SETTLED_KEPT).await;
        table.forget_old();
        assert!(matches!(table.join(job(3).id), Joined::Unknown));
    }
}
