//! Finishes executions whose rows are written: removes their jobs from the journal, and adds their counters
//! to the totals of their functions, each exactly once.
//!
//! The journal stores both durably (see [`crate::backend::Journal`]). The ledger keeps only the pending work
//! in memory. After a crash the restarted process, or the node that adopts the jobs, resumes from the
//! journal.
//!
//! Updating each function once per second was rejected: with 100,000 active functions that is almost one call
//! per run. Posts are paced instead, and the function that has waited longest goes first. While a function
//! waits, its new sums are added to the pending ones. So up to [`POSTED_MAX`] functions are updated about
//! once per second, and more functions less often. Pacing never drops a sum.
//!
//! A journal can lose its data. It is then restored from memory (see [`Ledger::tell_outstanding`]). For that
//! the ledger must hold exactly what the journal holds, or an execution is counted twice or never:
//!
//! * Sums, numbered or not, are copies of the journal's sums. Each answer of the journal replaces them. A
//!   lost answer is harmless, because the next one has the complete state.
//! * A journal that has lost its data assigns no numbers. Otherwise a round between the loss and the restore
//!   would be answered "nothing to post", and the ledger would discard the only copy of the sums.
//! * While the outcome of an `end` call is unknown, no sums are numbered. What that call may have added is
//!   still in the ledger as ended jobs, and a restore would write both.
//! * A job moves from the table of jobs in flight to the spill, and then to the ledger. For a moment it is in
//!   two places. To find all jobs, read the places in that order; any other order can miss a job.

use super::SpillDirs;
use super::batch::{Batch, RowOrigin};
use super::record::Stores;
use crate::ambient;
use crate::backend::{
    Addition, BackendError, ENDED_MAX, EndOutcome, EndedJob, GIVEN_UP_KEPT, NumberedSums, POSTED_MAX,
    UnpostedSums,
};
use crate::metrics::Metrics;
use crate::model::{FunctionId, JobId, NodeId, Recommendation, Sums};
use ahash::RandomState;
use futures_util::stream::{FuturesUnordered, StreamExt};
use parking_lot::{Mutex, MutexGuard};
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex as AsyncMutex;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};

/// How often ended jobs are removed from the journal.
const CLOSING_EVERY: Duration = Duration::from_millis(100);
/// Minimum interval between two rounds of posts.
pub(super) const ROUND: Duration = Duration::from_secs(1);
/// Timeout of one round. The next round retries what is left.
const ROUND_MAX: Duration = Duration::from_secs(10);
/// Maximum number of waiting functions, and of ended jobs that are still in the journal; about 40 MB of
/// memory each. Above half of it rounds follow one another without a pause. When it is reached no more rows
/// are written.
pub(super) const WAITING_MAX: usize = 262_144;
/// How long a LOST row may be on its way behind the late result of its job, and how often older ones are
/// looked for.
const OVERTAKEN_KEPT: Duration = GIVEN_UP_KEPT;
const OVERTAKEN_SWEPT_EVERY: Duration = Duration::from_secs(60);
/// Posts in flight; more of them during shutdown.
const POSTS_MAX: usize = 8;
const LAST_POSTS_MAX: usize = 64;
/// Time limits during shutdown: first for the jobs, then for the sums.
const CLOSING_END_MAX: Duration = Duration::from_secs(2);
pub(super) const POSTING_END_MAX: Duration = Duration::from_secs(3);

/// The sums of one function in the journal of one node.
type NodeFunction = (NodeId, FunctionId);

/// The newest recommendation for a function, if there is one. Boxed because few functions have one.
type PendingRecommendation = Option<Box<Recommendation>>;

/// The pending work for the journal of this node, and for those of nodes whose jobs it has adopted.
pub struct Ledger {
    stores: Stores,
    disk: Option<Arc<SpillDirs>>,
    metrics: Arc<Metrics>,
    max: usize,
    books: Mutex<LedgerState>,
    /// Held while jobs end or sums are numbered, so that the ledger and the journal agree.
    turn: AsyncMutex<()>,
    /// Held while numbered sums are added to their functions.
    posting: AsyncMutex<()>,
}

/// A job whose row is written, and that is still to leave the journal.
struct PendingEnd {
    job: EndedJob,
    /// It left the journal as LOST before, and this is its late result.
    is_late: bool,
}

struct LedgerState {
    /// By the node whose journal holds them.
    ended: BTreeMap<NodeId, VecDeque<PendingEnd>>,
    ended_len: usize,
    /// The functions to be written, with their recommendations.
    notes: HashMap<NodeFunction, PendingRecommendation, RandomState>,
    /// Each account once, the one that has waited longest first.
    order: VecDeque<NodeFunction>,
    /// Copies of the journal's sums that have no number yet.
    sums: HashMap<NodeFunction, Sums, RandomState>,
    /// Copies of the journal's numbered sums.
    numbered: HashMap<NodeFunction, NumberedSums, RandomState>,
    /// The largest number seen so far.
    last_number: u64,
    /// Nodes with an `end` call whose outcome is unknown.
    unsure: HashSet<NodeId>,
    /// Jobs with a late result, from the moment its row is queued until the job leaves the journal. The bound
    /// on queued rows bounds them too.
    late: HashMap<JobId, FunctionId, RandomState>,
    /// Jobs whose late result has left the journal before their LOST row was written, and since when. They
    /// must not enter it again. At most [`WAITING_MAX`], each for [`OVERTAKEN_KEPT`].
    overtaken: HashMap<JobId, Instant, RandomState>,
    /// When old ones of them were last removed.
    swept_at: Instant,
}

impl LedgerState {
    fn new() -> Self {
        Self {
            ended: BTreeMap::new(),
            ended_len: 0,
            notes: HashMap::with_hasher(ambient::hash_keys()),
            order: VecDeque::new(),
            sums: HashMap::with_hasher(ambient::hash_keys()),
            numbered: HashMap::with_hasher(ambient::hash_keys()),
            last_number: 0,
            unsure: HashSet::new(),
            late: HashMap::with_hasher(ambient::hash_keys()),
            overtaken: HashMap::with_hasher(ambient::hash_keys()),
            swept_at: Instant::now(),
        }
    }

    fn note(&mut self, account: NodeFunction, advice: PendingRecommendation) {
        match self.notes.entry(account) {
            Entry::Occupied(mut noted) => {
                let at = |advice: &PendingRecommendation| advice.as_ref().map(|r| r.at);
                if at(&advice) >= at(noted.get()) && advice.is_some() {
                    *noted.get_mut() = advice;
                }
            }
            Entry::Vacant(place) => {
                self.order.push_back(place.key().clone());
                place.insert(advice);
            }
        }
    }

    /// Takes the accounts that have waited longest, grouped by node.
    fn take_notes(&mut self) -> Vec<(NodeFunction, PendingRecommendation)> {
        let accounts = self.order.drain(..POSTED_MAX.min(self.order.len()));
        let mut notes: Vec<_> = accounts.filter_map(|account| self.notes.remove_entry(&account)).collect();
        notes.sort_by_key(|((node, _), _)| *node);
        notes
    }

    /// Replaces the sums of these functions by those of the journal.
    fn copy(&mut self, node: NodeId, functions: &[FunctionId], unposted: &UnpostedSums) {
        for function in functions {
            let account = (node, function.clone());
            self.sums.remove(&account);
            self.numbered.remove(&account);
        }
        self.add_copies(node, unposted);
    }

    fn add_copies(&mut self, node: NodeId, unposted: &UnpostedSums) {
        for (function, sums) in &unposted.sums {
            self.sums.insert((node, function.clone()), *sums);
        }
        for numbered in &unposted.numbered {
            self.last_number = self.last_number.max(numbered.number);
            self.numbered.insert((node, numbered.function.clone()), numbered.clone());
        }
    }

    /// What the journal of `node` should hold according to the ledger. Rows on the disk are not included.
    fn outstanding(&self, node: NodeId) -> Outstanding {
        let of_node = |(of, function): &NodeFunction| (*of == node).then(|| function.clone());
        let ended = self.ended.get(&node).into_iter().flatten();
        // A job with a late result left the journal as LOST before. If it did not, its LOST entry is in this
        // list too.
        let held = ended.filter(|ended| !ended.is_late && !self.overtaken.contains_key(&ended.job.id));
        let held = held.map(|ended| ended.job.clone());
        let late = self.late.iter().filter(|(id, _)| id.node() == node);
        let sums = self.sums.iter().filter_map(|(account, sums)| Some((of_node(account)?, *sums)));
        let numbered = self.numbered.iter().filter(|((of, _), _)| *of == node);
        Outstanding {
            ended: held.collect(),
            late: late.map(|(id, function)| (*id, function.clone())).collect(),
            sums: sums.collect(),
            numbered: numbered.map(|(_, numbered)| numbered.clone()).collect(),
            spilled: Vec::new(),
            overtaken: self.overtaken.keys().copied().filter(|id| id.node() == node).collect(),
        }
    }
}

/// What a journal should hold for jobs and sums that the ledger and the disk know.
#[derive(Default)]
pub struct Outstanding {
    /// Jobs whose rows are written, and that are still in the journal.
    pub ended: Vec<EndedJob>,
    pub sums: Vec<(FunctionId, Sums)>,
    pub numbered: Vec<NumberedSums>,
    /// Jobs that ended as LOST and then got a result.
    pub late: Vec<(JobId, FunctionId)>,
    /// Jobs whose rows are on this node's disk.
    pub spilled: Vec<(JobId, FunctionId)>,
    /// Jobs that have left the journal, although a LOST row of theirs is still to be written.
    pub overtaken: HashSet<JobId>,
}

impl Ledger {
    pub(super) fn new(
        stores: Stores,
        disk: Option<Arc<SpillDirs>>,
        metrics: Arc<Metrics>,
        max: usize,
    ) -> Self {
        let (turn, posting) = (AsyncMutex::default(), AsyncMutex::default());
        let mut books = LedgerState::new();
        books.late.extend(disk.iter().flat_map(|disk| disk.late()));
        let books = Mutex::new(books);
        Self { stores, disk, metrics, max, books, turn, posting }
    }

    /// Adds executions whose rows are written.
    pub(super) fn take(&self, batch: Batch) {
        let mut books = self.books();
        let Batch { ids, rows, recommendations, origins, .. } = batch;
        let advised = rows.into_iter().zip(recommendations);
        for ((id, RowOrigin { is_late, is_shared, .. }), (row, recommendation)) in
            ids.into_iter().zip(origins).zip(advised)
        {
            if let Some(recommendation) = recommendation {
                books.note((id.node(), row.function.clone()), Some(Box::new(recommendation)));
            }
            let (adds, is_lost) = (Sums::of(&row), row.is_lost());
            let job = EndedJob { id, adds, is_lost, is_shared, function: row.function };
            books.ended.entry(id.node()).or_default().push_back(PendingEnd { job, is_late });
            books.ended_len += 1;
        }
        self.publish(&books);
    }

    /// Remembers that the row of a late result is queued for this job.
    pub(super) fn expect_late(&self, id: JobId, function: &FunctionId) {
        self.books().late.insert(id, function.clone());
    }

    /// Undoes [`Self::expect_late`]: the queue of rows was full.
    pub(super) fn forget_late(&self, id: JobId) {
        self.books().late.remove(&id);
    }

    /// Resumes posting the sums that a node left in its journal. Returns the number of functions.
    pub async fn take_over(&self, node: NodeId) -> Result<usize, BackendError> {
        let _turn = self.turn.lock().await;
        self.is_sure(node)?;
        let unposted = self.stores.journal.unposted(node).await?.ok_or_else(lost)?;
        let functions: BTreeSet<FunctionId> = unposted
            .sums
            .iter()
            .map(|(function, _)| function)
            .chain(unposted.numbered.iter().map(|numbered| &numbered.function))
            .cloned()
            .collect();
        let mut books = self.books();
        // The answer is complete. It replaces copies that are out of date because another answer was lost.
        books.sums.retain(|(of, _), _| *of != node);
        books.numbered.retain(|(of, _), _| *of != node);
        books.add_copies(node, &unposted);
        let n = functions.len();
        functions.into_iter().for_each(|function| books.note((node, function), None));
        self.publish(&books);
        Ok(n)
    }

    /// Restores the journal of a node, which has lost its data. `moving` returns the node's jobs that have
    /// not reached the spill or the ledger yet. It is called first, because jobs move in that direction. The
    /// ledger's copy does not change until `tell` returns.
    pub async fn tell_outstanding<M, T>(
        &self,
        node: NodeId,
        moving: impl FnOnce() -> M,
        tell: impl AsyncFnOnce(M, Outstanding) -> Result<T, BackendError>,
    ) -> Result<T, BackendError> {
        let _posting = self.posting.lock().await;
        let _turn = self.turn.lock().await;
        let moving = moving();
        let spilled: Vec<_> = self.spilled_jobs().filter(|(id, _)| id.node() == node).collect();
        let mut outstanding = self.books().outstanding(node);
        let is_counted = |id: &JobId| outstanding.overtaken.contains(id);
        outstanding.spilled = spilled.into_iter().filter(|(id, _)| !is_counted(id)).collect();
        let told = tell(moving, outstanding).await?;
        let mut books = self.books();
        // All that was restored must be posted, even if its note was removed meanwhile.
        let accounts: Vec<NodeFunction> =
            books.sums.keys().chain(books.numbered.keys()).filter(|(of, _)| *of == node).cloned().collect();
        accounts.into_iter().for_each(|account| books.note(account, None));
        self.publish(&books);
        Ok(told)
    }

    /// The nodes in whose journals work is pending.
    pub fn nodes(&self) -> BTreeSet<NodeId> {
        let books = self.books();
        books.ended.keys().copied().chain(books.notes.keys().map(|(node, _)| *node)).collect()
    }

    /// The ended jobs that are still in the journal of `node`.
    pub fn ended(&self, node: NodeId) -> HashSet<JobId> {
        self.books().ended.get(&node).into_iter().flatten().map(|ended| ended.job.id).collect()
    }

    /// The jobs whose rows are on this node's disk.
    pub fn spilled(&self) -> Vec<JobId> {
        self.spilled_jobs().map(|(id, _)| id).collect()
    }

    /// The jobs that an earlier process ended as LOST, and whose rows were on this node's disk at start.
    pub fn spilled_lost(&self) -> Vec<(JobId, FunctionId)> {
        self.disk.iter().flat_map(|disk| disk.lost()).collect()
    }

    /// Whether rows have vanished from the disk since the last call.
    pub fn take_has_lost_rows(&self) -> bool {
        self.disk.as_ref().is_some_and(|disk| disk.take_has_lost_rows())
    }

    fn spilled_jobs(&self) -> impl Iterator<Item = (JobId, FunctionId)> {
        self.disk.iter().flat_map(|disk| disk.jobs())
    }

    /// Fails while the outcome of an `end` call for the journal of `node` is unknown.
    fn is_sure(&self, node: NodeId) -> Result<(), BackendError> {
        match self.books().unsure.contains(&node) {
            false => Ok(()),
            true => Err(BackendError::Unavailable(
                "the outcome of an earlier journal call is not known yet".into(),
            )),
        }
    }

    /// Whether no more rows may be written for now.
    pub(super) fn is_full(&self) -> bool {
        let books = self.books();
        books.ended_len >= self.max || books.order.len() >= self.max
    }

    /// Runs until `stop` resolves, then finishes the pending work within a time limit.
    pub async fn run(self: Arc<Self>, stop: impl Future<Output = ()>) {
        tokio::select! {
            biased;
            () = self.close_often() => {}
            () = self.post_often() => {}
            () = stop => {}
        }
        let _ = timeout(CLOSING_END_MAX, self.close()).await;
        let _ = timeout(POSTING_END_MAX, self.post_all()).await;
        let books = self.books();
        let (jobs, functions) = (books.ended_len, books.order.len());
        if jobs + functions > 0 {
            // Nothing is lost: the journal has them.
            tracing::warn!(
                jobs,
                functions,
                "Ledger not finished at shutdown; the next start or another node resumes from the journal"
            );
        }
    }

    async fn close_often(&self) {
        let mut tick = interval(CLOSING_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            self.close().await;
        }
    }

    /// Removes ended jobs from the journal. Those that it does not accept are retried in the next round.
    async fn close(&self) {
        let nodes: Vec<NodeId> = self.books().ended.keys().copied().collect();
        for node in nodes {
            while let Some(ended) = self.some_ended(node) {
                let _turn = self.turn.lock().await;
                if let Err(e) = self.stores.entrust(node).await {
                    tracing::debug!(error = %e, "Ended jobs of another node stay in its journal; retrying");
                    break;
                }
                // Set before the call, so that it is also set if the future is dropped.
                self.books().unsure.insert(node);
                match self.stores.journal.end(node, &ended).await {
                    // It has lost the effect of earlier calls too.
                    Ok(EndOutcome::Incomplete) => {
                        self.books().unsure.remove(&node);
                        break;
                    }
                    Ok(EndOutcome::AllAdded) => self.closed(node, &vec![Addition::Whole; ended.len()]),
                    Ok(EndOutcome::Each(added)) => self.closed(node, &added),
                    Err(e) => {
                        let jobs = ended.len();
                        tracing::debug!(jobs, error = %e, "Ended jobs stay in the journal; retrying");
                        return;
                    }
                }
            }
        }
    }

    /// Copies the next ended jobs. They stay in the ledger until they have left the journal.
    fn some_ended(&self, node: NodeId) -> Option<Vec<EndedJob>> {
        let books = self.books();
        Some(books.ended.get(&node)?.iter().take(ENDED_MAX).map(|ended| ended.job.clone()).collect())
    }

    /// The first ended jobs have left the journal and added these amounts.
    fn closed(&self, node: NodeId, added: &[Addition]) {
        let mut books = self.books();
        books.unsure.remove(&node);
        let jobs = added.len();
        let ended: Vec<PendingEnd> = match books.ended.get_mut(&node) {
            Some(waiting) => waiting.drain(..jobs).collect(),
            None => Vec::new(),
        };
        if books.ended.get(&node).is_some_and(VecDeque::is_empty) {
            books.ended.remove(&node);
        }
        books.ended_len -= jobs;
        // Summed by function first: there are few functions, and the steps below are done for each.
        let mut sums: HashMap<FunctionId, Sums, RandomState> = HashMap::with_hasher(ambient::hash_keys());
        for (PendingEnd { job, is_late }, added) in ended.into_iter().zip(added) {
            // The LOST row may still be on its way. If the call was repeated, that is not known.
            let counts_alone = *added != Addition::Difference;
            // Nothing usually means that the call was repeated, because the answer to the first was lost.
            let added = match added {
                Addition::Nothing if books.overtaken.contains_key(&job.id) => Addition::Nothing,
                Addition::Nothing if is_late => Addition::Difference,
                Addition::Nothing => Addition::Whole,
                added => *added,
            };
            *sums.entry(job.function).or_default() += added.of(job.adds);
            if !is_late {
                books.overtaken.remove(&job.id);
                continue;
            }
            books.late.remove(&job.id);
            if counts_alone && books.overtaken.len() < WAITING_MAX {
                books.overtaken.insert(job.id, Instant::now());
            }
        }
        if books.swept_at.elapsed() >= OVERTAKEN_SWEPT_EVERY {
            // The LOST row of some never comes, because another node has written it.
            books.overtaken.retain(|_, since| since.elapsed() < OVERTAKEN_KEPT);
            books.swept_at = Instant::now();
        }
        for (function, adds) in sums {
            let account = (node, function);
            *books.sums.entry(account.clone()).or_default() += adds;
            books.note(account, None);
        }
        self.publish(&books);
    }

    async fn post_often(&self) {
        let mut is_going_well = false;
        loop {
            let are_many = self.books().order.len() >= self.max / 2;
            if !(is_going_well && are_many) {
                sleep(ROUND).await;
            }
            is_going_well = self.round(POSTS_MAX).await;
        }
    }

    async fn post_all(&self) {
        while !self.books().order.is_empty() {
            if !self.round(LAST_POSTS_MAX).await {
                sleep(CLOSING_EVERY).await;
            }
        }
    }

    /// Posts the functions that have waited longest. Returns `false` if something could not be written.
    async fn round(&self, at_a_time: usize) -> bool {
        let mut taken = RoundGuard { notes: self.books().take_notes(), ledger: self };
        let mut failure = None;
        let mut left = HashSet::new();
        for notes in taken.notes.chunk_by(|((a, _), _), ((b, _), _)| a == b) {
            let node = notes[0].0.0;
            let functions: Vec<FunctionId> =
                notes.iter().map(|((_, function), _)| function.clone()).collect();
            let posted = match timeout(ROUND_MAX, self.post(node, &functions, at_a_time)).await {
                Ok(posted) => posted,
                Err(_) => Err((functions, no_answer())),
            };
            let unposted = match posted {
                Ok(more) => more,
                Err((unposted, e)) => {
                    failure = Some(e);
                    unposted
                }
            };
            left.extend(unposted.into_iter().map(|function| (node, function)));
        }
        failure = self.recommend(&mut taken.notes, at_a_time).await.err().or(failure);
        taken.notes.retain(|(account, advice)| advice.is_some() || left.contains(account));
        if let Some(e) = &failure {
            // One line for all functions: there may be hundreds, with one cause.
            tracing::warn!(functions = taken.notes.len(), error = %e, "Counters not written; retrying");
        }
        failure.is_none()
    }

    /// Returns the functions for which more is to be posted.
    async fn post(
        &self,
        node: NodeId,
        functions: &[FunctionId],
        at_a_time: usize,
    ) -> Result<Vec<FunctionId>, (Vec<FunctionId>, BackendError)> {
        let _posting = self.posting.lock().await;
        let UnpostedSums { numbered, sums } = {
            let _turn = self.turn.lock().await;
            self.number(node, functions).await.map_err(|e| (functions.to_vec(), e))?
        };
        let tried: Vec<NodeFunction> = numbered.iter().map(|n| (node, n.function.clone())).collect();
        let (unposted, failure) = self.stores.journal.post(node, numbered, at_a_time).await;
        let unposted: Vec<FunctionId> = unposted.into_iter().map(|numbered| numbered.function).collect();
        let mut books = self.books();
        for account in tried.iter().filter(|(_, function)| !unposted.contains(function)) {
            books.numbered.remove(account);
        }
        let left = [unposted, sums.into_iter().map(|(function, _)| function).collect()].concat();
        match failure {
            None => Ok(left),
            Some(e) => Err((left, e)),
        }
    }

    async fn number(&self, node: NodeId, functions: &[FunctionId]) -> Result<UnpostedSums, BackendError> {
        self.is_sure(node)?;
        let floor = self.books().last_number;
        let unposted = self.stores.journal.number(node, functions, floor).await?.ok_or_else(lost)?;
        self.books().copy(node, functions, &unposted);
        Ok(unposted)
    }

    /// Writes recommendations. One that cannot be written stays in its note.
    async fn recommend(
        &self,
        notes: &mut [(NodeFunction, PendingRecommendation)],
        at_a_time: usize,
    ) -> Result<(), BackendError> {
        let mut advised = notes.iter_mut().filter(|(_, advice)| advice.is_some());
        let mut writes = FuturesUnordered::new();
        let mut result = Ok(());
        loop {
            let free = at_a_time - writes.len();
            writes.extend(advised.by_ref().take(free).map(async |((_, function), advice)| {
                let Some(recommendation) = advice else { return Ok(()) };
                self.stores.functions.recommend(function, recommendation).await?;
                *advice = None;
                Ok(())
            }));
            match writes.next().await {
                None => return result,
                Some(Ok(())) => {}
                Some(Err(e)) => result = Err(e),
            }
        }
    }

    fn publish(&self, books: &LedgerState) {
        self.metrics.audit.waiting_functions.set(gauge(books.order.len()));
        self.metrics.audit.waiting_ends.set(gauge(books.ended_len));
    }

    fn books(&self) -> MutexGuard<'_, LedgerState> {
        self.books.lock()
    }
}

fn lost() -> BackendError {
    BackendError::Unavailable("the journal has lost its data and is not restored yet".into())
}

fn no_answer() -> BackendError {
    BackendError::Unavailable("no answer in time".into())
}

fn gauge(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// The notes of one round. Drop puts what is left back into the ledger, also after a cancellation.
struct RoundGuard<'a> {
    notes: Vec<(NodeFunction, PendingRecommendation)>,
    ledger: &'a Ledger,
}

impl Drop for RoundGuard<'_> {
    fn drop(&mut self) {
        let mut books = self.ledger.books();
        self.notes.drain(..).for_each(|(account, advice)| books.note(account, advice));
        self.ledger.publish(&books);
    }
}
