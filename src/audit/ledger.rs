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

use crate::backend::{BackendError, ENDED_MAX, Ended, FunctionStore, Journal, POSTED_MAX, Unposted};
use crate::metrics::Metrics;
use crate::model::{Counters, Execution, FunctionId, JobId, NodeId, Recommendation};
use ahash::RandomState;
use futures_util::stream::{FuturesUnordered, StreamExt};
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
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

/// What is to be written to one function. The sums themselves are in the journal.
#[derive(Default)]
struct Note {
    /// As far as they are known here.
    sums: Counters,
    /// The newest; few functions have any, and many may wait.
    recommendation: Option<Box<Recommendation>>,
}

impl Note {
    fn add(&mut self, other: Self) {
        self.sums += other.sums;
        let newest = |r: &Option<Box<Recommendation>>| r.as_ref().map(|r| r.at);
        if newest(&other.recommendation) >= newest(&self.recommendation) {
            self.recommendation = other.recommendation;
        }
    }
}

/// What one execution adds to its function.
fn adds(row: &Execution) -> Counters {
    Counters {
        invocations: 1,
        errors: u64::from(!row.status.is_success()),
        total_duration_ms: row.duration_ms,
        handler_invocations: u64::from(row.handler_duration_ms.is_some()),
        total_handler_duration_ms: row.handler_duration_ms.unwrap_or(0.0),
    }
}

/// The books of this node, and of those whose jobs it has adopted.
pub struct Ledger {
    journal: Arc<dyn Journal>,
    functions: Arc<dyn FunctionStore>,
    metrics: Arc<Metrics>,
    max: usize,
    books: Mutex<Books>,
}

#[derive(Default)]
struct Books {
    /// By the node whose journal they are to leave.
    ended: BTreeMap<NodeId, VecDeque<Ended>>,
    ended_len: usize,
    notes: HashMap<Account, Note, RandomState>,
    /// Each of them once, the one that has waited longest first.
    order: VecDeque<Account>,
}

impl Books {
    fn note(&mut self, account: Account, note: Note) {
        match self.notes.entry(account) {
            Entry::Occupied(mut noted) => noted.get_mut().add(note),
            Entry::Vacant(place) => {
                self.order.push_back(place.key().clone());
                place.insert(note);
            }
        }
    }

    /// Those that have waited longest, by node.
    fn take_notes(&mut self) -> Vec<(Account, Note)> {
        let accounts = self.order.drain(..POSTED_MAX.min(self.order.len()));
        let mut notes: Vec<_> = accounts.filter_map(|account| self.notes.remove_entry(&account)).collect();
        notes.sort_by_key(|((node, _), _)| *node);
        notes
    }
}

impl Ledger {
    pub(super) fn new(
        journal: Arc<dyn Journal>,
        functions: Arc<dyn FunctionStore>,
        metrics: Arc<Metrics>,
        max: usize,
    ) -> Self {
        Self { journal, functions, metrics, max, books: Mutex::default() }
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
                let note = Note { recommendation: Some(Box::new(recommendation)), ..Note::default() };
                books.note((id.node(), row.function.clone()), note);
            }
            let ended = Ended { id: *id, adds: adds(&row), function: row.function };
            books.ended.entry(id.node()).or_default().push_back(ended);
            books.ended_len += 1;
        }
        self.publish(&books);
    }

    /// Goes on with sums that a node has left in its journal.
    pub async fn take_over(&self, node: NodeId) -> Result<usize, BackendError> {
        let functions = self.journal.unposted(node).await?;
        let mut books = self.books();
        let n = functions.len();
        functions.into_iter().for_each(|function| books.note((node, function), Note::default()));
        self.publish(&books);
        Ok(n)
    }

    /// What the journal of a node should hold for the books: jobs that are to leave it, and sums that are not posted.
    pub fn outstanding(&self, node: NodeId) -> (Vec<Ended>, Vec<(FunctionId, Counters)>) {
        let books = self.books();
        let ended = books.ended.get(&node).into_iter().flatten().cloned().collect();
        let noted = books.notes.iter().filter(|((of, _), note)| *of == node && note.sums.invocations > 0);
        (ended, noted.map(|((_, function), note)| (function.clone(), note.sums)).collect())
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
                match self.journal.end(node, &ended).await {
                    Ok(true) => self.closed(node, ended),
                    Ok(false) => break,
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

    fn closed(&self, node: NodeId, ended: Vec<Ended>) {
        let mut books = self.books();
        if let Some(waiting) = books.ended.get_mut(&node) {
            waiting.drain(..ended.len());
            if waiting.is_empty() {
                books.ended.remove(&node);
            }
        }
        books.ended_len -= ended.len();
        for Ended { function, adds, .. } in ended {
            books.note((node, function), Note { sums: adds, recommendation: None });
        }
        self.publish(&books);
    }

    async fn post_often(&self) {
        loop {
            let is_going_well = self.round(POSTS_MAX).await;
            let are_many = self.books().order.len() >= self.max / 2;
            if !(is_going_well && are_many) {
                sleep(ROUND).await;
            }
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
        for notes in taken.notes.chunk_by_mut(|((a, _), _), ((b, _), _)| a == b) {
            let node = notes[0].0.0;
            let functions: Vec<FunctionId> =
                notes.iter().map(|((_, function), _)| function.clone()).collect();
            let unposted = match timeout(ROUND_MAX, self.journal.post(node, &functions, at_a_time)).await {
                Ok(unposted) => unposted,
                Err(_) => Unposted { left: functions, failure: Some(no_answer()) },
            };
            failure = unposted.failure.or(failure);
            left.extend(unposted.left.into_iter().map(|function| (node, function)));
        }
        for (account, note) in &mut taken.notes {
            if !left.contains(account) {
                note.sums = Counters::default();
            }
        }
        failure = self.recommend(&mut taken.notes, at_a_time).await.err().or(failure);
        taken.notes.retain(|(account, note)| note.recommendation.is_some() || left.contains(account));
        if let Some(e) = &failure {
            // One line for all of them: there may be hundreds, of one cause.
            tracing::warn!(functions = taken.notes.len(), error = %e, "Sums Not Posted");
        }
        failure.is_none()
    }

    /// Writes what is recommended; what could not be written stays in its note.
    async fn recommend(&self, notes: &mut [(Account, Note)], at_a_time: usize) -> Result<(), BackendError> {
        let mut advised = notes.iter_mut().filter(|(_, note)| note.recommendation.is_some());
        let mut writes = FuturesUnordered::new();
        let mut result = Ok(());
        loop {
            let free = at_a_time - writes.len();
            writes.extend(advised.by_ref().take(free).map(async |((_, function), note)| {
                let Some(recommendation) = &note.recommendation else { return Ok(()) };
                self.functions.recommend(function, recommendation).await?;
                note.recommendation = None;
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

fn no_answer() -> BackendError {
    BackendError::Unavailable("no answer in time".into())
}

fn gauge(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// Notes of a round; those that are left in it when it ends, however it ends, wait for another.
struct Taken<'a> {
    notes: Vec<(Account, Note)>,
    ledger: &'a Ledger,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let mut books = self.ledger.books();
        self.notes.drain(..).for_each(|(account, note)| books.note(account, note));
        self.ledger.publish(&books);
    }
}
