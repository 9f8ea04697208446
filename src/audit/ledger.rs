//! Closes the books of executions whose rows are written: their jobs leave the journal, and what they add is
//! posted to the functions they belong to, each exactly once.
//!
//! The journal keeps both durably (see [`Journal`]), so what is held here is only what is to be done next, and a
//! node that dies leaves nothing behind that its next life, or another node, would not find.
//!
//! One update a second for each function with runs was rejected: with 100,000 functions in play it is nearly one call a
//! run. Here posts have a pace, and the function that has waited longest goes first. A function that waits already only
//! adds up, so up to [`POSTED_MAX`] functions are written about once a second, and more of them less often, but no sum
//! is ever dropped for it.
//!
//! A journal may lose its data, and is then told again what it had (`dispatch::members`). What the books hold for that is
//! what the journal holds, no more and no less, or something would be counted twice or not at all:
//!
//! * Sums without a number, and those with one, are copies of the journal's, made anew by each of its answers. So a lost
//!   answer costs nothing: the next one says the same.
//! * A journal that has lost its data gives no numbers. Before this was so, the round that came between the loss and the
//!   retelling was answered "nothing to be posted", and the books forgot the sums that they alone still had.
//! * While the answer to an `end` is outstanding nothing is numbered: what it may have added is also still in the books as
//!   jobs that have ended, and those would be told again beside the sums.
//! * A job moves from the table of jobs in flight to the spill, and to the books, and is in both for a moment. Whoever looks
//!   for all jobs looks in that same order, so that none passes behind.

use super::{RowDisk, Stores};
use crate::backend::{
    BackendError, ENDED_MAX, Ended, FunctionStore, Journal, Numbered, POSTED_MAX, Unposted,
};
use crate::metrics::Metrics;
use crate::model::{Execution, FunctionId, JobId, NodeId, Recommendation, Sums};
use ahash::RandomState;
use futures_util::stream::{FuturesUnordered, StreamExt};
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Mutex as AsyncMutex;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

/// How often jobs leave the journal.
const CLOSING_EVERY: Duration = Duration::from_millis(100);
/// How often sums are posted, at most.
pub(super) const ROUND: Duration = Duration::from_secs(1);
/// How long a round may take before it is given up, and tried again.
const ROUND_MAX: Duration = Duration::from_secs(10);
/// Functions, and jobs that have ended, that may wait; about 40 MB of memory each. From half of it on the rounds follow
/// one another without a pause. Full: no rows are written, so that no more come.
pub(super) const WAITING_MAX: usize = 262_144;
/// Posts in flight at a time; more of them at the end, when somebody waits.
const POSTS_MAX: usize = 8;
const LAST_POSTS_MAX: usize = 64;
/// How long the end may take: first for the jobs, then for the sums.
const CLOSING_END_MAX: Duration = Duration::from_secs(2);
pub(super) const POSTING_END_MAX: Duration = Duration::from_secs(3);

/// What was counted where: the sums of one function in the journal of one node.
type Account = (NodeId, FunctionId);

/// The newest of a function, if it has any: few have.
type Advice = Option<Box<Recommendation>>;

/// The books of this node, and of those whose jobs it has adopted.
pub struct Ledger {
    journal: Arc<dyn Journal>,
    functions: Arc<dyn FunctionStore>,
    disk: Option<Arc<RowDisk>>,
    metrics: Arc<Metrics>,
    max: usize,
    books: Mutex<Books>,
    /// Held while jobs end, or sums get their numbers, so that what is held here is what the journal holds.
    turn: AsyncMutex<()>,
    /// Held while sums with a number are added to their functions.
    posting: AsyncMutex<()>,
}

#[derive(Default)]
struct Books {
    /// By the node whose journal they are to leave.
    ended: BTreeMap<NodeId, VecDeque<Ended>>,
    ended_len: usize,
    /// What is to be written, with what is advised.
    notes: HashMap<Account, Advice, RandomState>,
    /// Each of them once, the one that has waited longest first.
    order: VecDeque<Account>,
    /// Sums without a number, as the journal holds them.
    sums: HashMap<Account, Sums, RandomState>,
    /// Sums with a number, as the journal holds them.
    numbered: HashMap<Account, Numbered, RandomState>,
    /// The largest number that was seen.
    last_number: u64,
    /// The nodes in whose journal jobs may have ended without an answer.
    unsure: HashSet<NodeId>,
    /// Jobs with a late result, from when its row is queued until it has left the journal. Bounded as the rows are.
    late: HashMap<JobId, FunctionId, RandomState>,
}

impl Books {
    fn note(&mut self, account: Account, advice: Advice) {
        match self.notes.entry(account) {
            Entry::Occupied(mut noted) => {
                let at = |advice: &Advice| advice.as_ref().map(|r| r.at);
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

    /// Those that have waited longest, by node.
    fn take_notes(&mut self) -> Vec<(Account, Advice)> {
        let accounts = self.order.drain(..POSTED_MAX.min(self.order.len()));
        let mut notes: Vec<_> = accounts.filter_map(|account| self.notes.remove_entry(&account)).collect();
        notes.sort_by_key(|((node, _), _)| *node);
        notes
    }

    /// Copies what the journal says of these functions.
    fn copy(&mut self, node: NodeId, functions: &[FunctionId], unposted: &Unposted) {
        for function in functions {
            let account = (node, function.clone());
            self.sums.remove(&account);
            self.numbered.remove(&account);
        }
        self.add_copies(node, unposted);
    }

    fn add_copies(&mut self, node: NodeId, unposted: &Unposted) {
        for (function, sums) in &unposted.sums {
            self.sums.insert((node, function.clone()), *sums);
        }
        for numbered in &unposted.numbered {
            self.last_number = self.last_number.max(numbered.number);
            self.numbered.insert((node, numbered.function.clone()), numbered.clone());
        }
    }

    /// What the journal of a node should hold for them, but for what is on the disk.
    fn outstanding(&self, node: NodeId) -> Outstanding {
        let of_node = |(of, function): &Account| (*of == node).then(|| function.clone());
        let ended = self.ended.get(&node).into_iter().flatten();
        // One with a late result has left as lost before. If it has not, that one is among them, too.
        let is_held = |ended: &&Ended| ended.is_lost || !self.late.contains_key(&ended.id);
        let late = self.late.iter().filter(|(id, _)| id.node() == node);
        let sums = self.sums.iter().filter_map(|(account, sums)| Some((of_node(account)?, *sums)));
        let numbered = self.numbered.iter().filter(|((of, _), _)| *of == node);
        Outstanding {
            ended: ended.filter(is_held).cloned().collect(),
            late: late.map(|(id, function)| (*id, function.clone())).collect(),
            sums: sums.collect(),
            numbered: numbered.map(|(_, numbered)| numbered.clone()).collect(),
            spilled: Vec::new(),
        }
    }
}

/// What a journal should hold for the books.
#[derive(Default)]
pub struct Outstanding {
    /// Their rows are written, and they are still in it.
    pub ended: Vec<Ended>,
    pub sums: Vec<(FunctionId, Sums)>,
    pub numbered: Vec<Numbered>,
    /// They were given up, and a result has come after all.
    pub late: Vec<(JobId, FunctionId)>,
    /// Their rows are on this node's disk.
    pub spilled: Vec<(JobId, FunctionId)>,
}

impl Ledger {
    pub(super) fn new(stores: Stores, disk: Option<Arc<RowDisk>>, metrics: Arc<Metrics>, max: usize) -> Self {
        let Stores { journal, functions, .. } = stores;
        let (turn, posting) = (AsyncMutex::default(), AsyncMutex::default());
        let late = disk.iter().flat_map(|disk| disk.late()).collect();
        let books = Mutex::new(Books { late, ..Books::default() });
        Self { journal, functions, disk, metrics, max, books, turn, posting }
    }

    /// Takes executions whose rows are written.
    pub(super) fn take(
        &self,
        ids: &[JobId],
        rows: Vec<Execution>,
        recommendations: Vec<Option<Recommendation>>,
    ) {
        let mut books = self.books();
        for ((id, row), recommendation) in ids.iter().zip(rows).zip(recommendations) {
            if let Some(recommendation) = recommendation {
                books.note((id.node(), row.function.clone()), Some(Box::new(recommendation)));
            }
            let ended =
                Ended { id: *id, adds: Sums::of(&row), is_lost: row.is_lost(), function: row.function };
            books.ended.entry(id.node()).or_default().push_back(ended);
            books.ended_len += 1;
        }
        self.publish(&books);
    }

    /// A result of this job has come after it was given up, and its row is queued.
    pub(super) fn expect_late(&self, id: JobId, function: &FunctionId) {
        self.books().late.insert(id, function.clone());
    }

    /// Its row found no room.
    pub(super) fn forget_late(&self, id: JobId) {
        self.books().late.remove(&id);
    }

    /// Goes on with sums that a node has left in its journal. Gives of how many functions.
    pub async fn take_over(&self, node: NodeId) -> Result<usize, BackendError> {
        let _turn = self.turn.lock().await;
        self.is_sure(node)?;
        let unposted = self.journal.unposted(node).await?.ok_or_else(lost)?;
        let functions: BTreeSet<FunctionId> = unposted
            .sums
            .iter()
            .map(|(function, _)| function)
            .chain(unposted.numbered.iter().map(|numbered| &numbered.function))
            .cloned()
            .collect();
        let mut books = self.books();
        books.add_copies(node, &unposted);
        let n = functions.len();
        functions.into_iter().for_each(|function| books.note((node, function), None));
        self.publish(&books);
        Ok(n)
    }

    /// Tells what the journal of a node should hold, which has lost it. `moving` gives what is held of the node's jobs
    /// where they are before they come to the spill and the books; it is asked first. Nothing of what is told changes in the
    /// books until `tell` is done.
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
        outstanding.spilled = spilled;
        let told = tell(moving, outstanding).await?;
        let mut books = self.books();
        // What was told is to be posted, whatever became of the notes meanwhile.
        let accounts: Vec<Account> =
            books.sums.keys().chain(books.numbered.keys()).filter(|(of, _)| *of == node).cloned().collect();
        accounts.into_iter().for_each(|account| books.note(account, None));
        self.publish(&books);
        Ok(told)
    }

    /// The nodes of which something is to be done in their journals.
    pub fn nodes(&self) -> BTreeSet<NodeId> {
        let books = self.books();
        books.ended.keys().copied().chain(books.notes.keys().map(|(node, _)| *node)).collect()
    }

    /// The jobs that are still to leave the journal of a node.
    pub fn ended(&self, node: NodeId) -> HashSet<JobId> {
        self.books().ended.get(&node).into_iter().flatten().map(|ended| ended.id).collect()
    }

    /// The jobs whose rows are on this node's disk.
    pub fn spilled(&self) -> Vec<JobId> {
        self.spilled_jobs().map(|(id, _)| id).collect()
    }

    /// Whether rows have vanished from the disk since the last call.
    pub fn take_has_lost_rows(&self) -> bool {
        self.disk.as_ref().is_some_and(|disk| disk.take_has_lost_rows())
    }

    fn spilled_jobs(&self) -> impl Iterator<Item = (JobId, FunctionId)> {
        self.disk.iter().flat_map(|disk| disk.jobs())
    }

    /// An error: jobs may have ended in the journal of this node, and it is not known yet whether.
    fn is_sure(&self, node: NodeId) -> Result<(), BackendError> {
        match self.books().unsure.contains(&node) {
            false => Ok(()),
            true => Err(BackendError::Unavailable("jobs wait to leave the journal".into())),
        }
    }

    /// Whether more may not come for the time being.
    pub(super) fn is_full(&self) -> bool {
        let books = self.books();
        books.ended_len >= self.max || books.order.len() >= self.max
    }

    /// Runs until `stop` resolves, and then until all is written, but not for ever.
    pub async fn run(self: Arc<Self>, stop: impl Future<Output = ()>) {
        tokio::select! {
            () = self.close_often() => {}
            () = self.post_often() => {}
            () = stop => {}
        }
        let _ = timeout(CLOSING_END_MAX, self.close()).await;
        let _ = timeout(POSTING_END_MAX, self.post_all()).await;
        let books = self.books();
        let (jobs, functions) = (books.ended_len, books.order.len());
        if jobs + functions > 0 {
            // The journal has them: the next start, or another node, goes on.
            tracing::warn!(jobs, functions, "Books Not Closed In Time");
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

    /// Takes jobs that have ended out of the journal. What it does not take stays for the next time.
    async fn close(&self) {
        let nodes: Vec<NodeId> = self.books().ended.keys().copied().collect();
        for node in nodes {
            while let Some(ended) = self.some_ended(node) {
                let _turn = self.turn.lock().await;
                // Also where this is broken off.
                self.books().unsure.insert(node);
                match self.journal.end(node, &ended).await {
                    Ok(true) => self.closed(node, &ended),
                    // It has lost what it may have been told, too.
                    Ok(false) => {
                        self.books().unsure.remove(&node);
                        break;
                    }
                    Err(e) => {
                        tracing::debug!(jobs = ended.len(), error = %e, "Journal Not Cleared");
                        return;
                    }
                }
            }
        }
    }

    /// They stay in the books until they have left the journal.
    fn some_ended(&self, node: NodeId) -> Option<Vec<Ended>> {
        let books = self.books();
        Some(books.ended.get(&node)?.iter().take(ENDED_MAX).cloned().collect())
    }

    fn closed(&self, node: NodeId, ended: &[Ended]) {
        // By function first: they are few, and what follows is looked up for each.
        let mut sums: HashMap<&FunctionId, Sums, RandomState> = HashMap::default();
        for Ended { function, adds, .. } in ended {
            *sums.entry(function).or_default() += *adds;
        }
        let mut books = self.books();
        books.unsure.remove(&node);
        for ended in ended.iter().filter(|ended| !ended.is_lost) {
            books.late.remove(&ended.id);
        }
        if let Some(waiting) = books.ended.get_mut(&node) {
            waiting.drain(..ended.len());
            if waiting.is_empty() {
                books.ended.remove(&node);
            }
        }
        books.ended_len -= ended.len();
        for (function, adds) in sums {
            let account = (node, function.clone());
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

    /// One round: posts what has waited longest. `false`: something could not be written.
    async fn round(&self, at_a_time: usize) -> bool {
        let mut taken = Taken { notes: self.books().take_notes(), ledger: self };
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
            // One line for all of them: there may be hundreds, of one cause.
            tracing::warn!(functions = taken.notes.len(), error = %e, "Sums Not Posted");
        }
        failure.is_none()
    }

    /// Gives the functions for which more is to be posted.
    async fn post(
        &self,
        node: NodeId,
        functions: &[FunctionId],
        at_a_time: usize,
    ) -> Result<Vec<FunctionId>, (Vec<FunctionId>, BackendError)> {
        let _posting = self.posting.lock().await;
        let Unposted { numbered, sums } = {
            let _turn = self.turn.lock().await;
            self.number(node, functions).await.map_err(|e| (functions.to_vec(), e))?
        };
        let tried: Vec<Account> = numbered.iter().map(|n| (node, n.function.clone())).collect();
        let (unposted, failure) = self.journal.post(node, numbered, at_a_time).await;
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

    async fn number(&self, node: NodeId, functions: &[FunctionId]) -> Result<Unposted, BackendError> {
        self.is_sure(node)?;
        let floor = self.books().last_number;
        let unposted = self.journal.number(node, functions, floor).await?.ok_or_else(lost)?;
        self.books().copy(node, functions, &unposted);
        Ok(unposted)
    }

    /// Writes what is recommended; what could not be written stays in its note.
    async fn recommend(&self, notes: &mut [(Account, Advice)], at_a_time: usize) -> Result<(), BackendError> {
        let mut advised = notes.iter_mut().filter(|(_, advice)| advice.is_some());
        let mut writes = FuturesUnordered::new();
        let mut result = Ok(());
        loop {
            let free = at_a_time - writes.len();
            writes.extend(advised.by_ref().take(free).map(async |((_, function), advice)| {
                let Some(recommendation) = advice else { return Ok(()) };
                self.functions.recommend(function, recommendation).await?;
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

    fn publish(&self, books: &Books) {
        self.metrics.audit.waiting_functions.set(gauge(books.order.len()));
        self.metrics.audit.waiting_ends.set(gauge(books.ended_len));
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn lost() -> BackendError {
    BackendError::Unavailable("the journal has lost its data and is not told again yet".into())
}

fn no_answer() -> BackendError {
    BackendError::Unavailable("no answer in time".into())
}

fn gauge(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// Notes of a round; those that are left in it when it ends, however it ends, wait for another.
struct Taken<'a> {
    notes: Vec<(Account, Advice)>,
    ledger: &'a Ledger,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let mut books = self.ledger.books();
        self.notes.drain(..).for_each(|(account, advice)| books.note(account, advice));
        self.ledger.publish(&books);
    }
}
