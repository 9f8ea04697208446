//! Sums and advice on their way to the functions they belong to.
//!
//! One update a second for each function with runs was rejected: with 100,000 functions in play it is nearly one call a run.
//! Here updates have a pace, and the function that has waited longest goes first. A function that waits already only adds
//! up, so up to [`UPDATES_PER_ROUND`] functions are written about once a second, and more of them less often, but no sum is
//! ever dropped for it.

use crate::backend::{BackendError, FunctionStore};
use crate::metrics::Metrics;
use crate::model::{Counters, Execution, FunctionId, Recommendation};
use ahash::RandomState;
use futures_util::stream::{FuturesUnordered, StreamExt};
use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

/// How often updates go out, at most.
pub(super) const ROUND: Duration = Duration::from_secs(1);
/// Functions written in one round.
const UPDATES_PER_ROUND: usize = 256;
/// Functions that may wait; about 40 MB of memory. From half of it on the rounds follow one another without a pause. Full:
/// no rows are written, so that no more functions come.
pub(super) const WAITING_MAX: usize = 262_144;
/// Updates in flight at a time; more of them at the end, when somebody waits.
const UPDATES_MAX: usize = 8;
const LAST_UPDATES_MAX: usize = 64;

/// What is to be written to one function.
#[derive(Default)]
pub(super) struct Note {
    sums: Counters,
    /// The newest; few functions have any, and many may wait.
    recommendation: Option<Box<Recommendation>>,
}

impl Note {
    pub(super) fn of(row: &Execution, recommendation: Option<Recommendation>) -> Self {
        let sums = Counters {
            invocations: 1,
            errors: u64::from(!row.status.is_success()),
            total_duration_ms: row.duration_ms,
            handler_invocations: u64::from(row.handler_duration_ms.is_some()),
            total_handler_duration_ms: row.handler_duration_ms.unwrap_or(0.0),
        };
        Self { sums, recommendation: recommendation.map(Box::new) }
    }

    fn add(&mut self, other: Self) {
        self.sums += other.sums;
        let newest = |r: &Option<Box<Recommendation>>| r.as_ref().map(|r| r.at);
        if newest(&other.recommendation) >= newest(&self.recommendation) {
            self.recommendation = other.recommendation;
        }
    }

    /// What could not be written is left in it.
    async fn write(&mut self, store: &dyn FunctionStore, function: &FunctionId) -> Result<(), BackendError> {
        if self.sums != Counters::default() {
            store.add_counters(function, self.sums).await?;
            self.sums = Counters::default();
        }
        if let Some(recommendation) = &self.recommendation {
            store.recommend(function, recommendation).await?;
            self.recommendation = None;
        }
        Ok(())
    }
}

/// The functions that wait.
pub(super) struct Notes {
    by_function: HashMap<FunctionId, Note, RandomState>,
    /// Each of them once, the one that has waited longest first.
    order: VecDeque<FunctionId>,
    /// Functions of the round that is under way: they may come back.
    under_way: usize,
    max: usize,
    metrics: Arc<Metrics>,
}

impl Notes {
    pub(super) fn new(max: usize, metrics: Arc<Metrics>) -> Self {
        Self { by_function: HashMap::default(), order: VecDeque::new(), under_way: 0, max, metrics }
    }

    pub(super) fn add(&mut self, function: FunctionId, note: Note) {
        if self.wait(function, note) {
            self.metrics.audit.waiting_functions.inc();
        }
    }

    /// The round is over; those that could not be written wait for another.
    pub(super) fn put_back(&mut self, left: Vec<(FunctionId, Note)>) {
        self.under_way = 0;
        for (function, note) in left {
            if !self.wait(function, note) {
                // It was counted as one that waits, and so was the one it is added to.
                self.metrics.audit.waiting_functions.dec();
            }
        }
    }

    /// Whether the function did not wait already.
    fn wait(&mut self, function: FunctionId, note: Note) -> bool {
        match self.by_function.entry(function) {
            Entry::Occupied(mut noted) => {
                noted.get_mut().add(note);
                false
            }
            Entry::Vacant(place) => {
                self.order.push_back(place.key().clone());
                place.insert(note);
                true
            }
        }
    }

    pub(super) fn are_full(&self) -> bool {
        self.len() >= self.max
    }

    /// So many wait that the pace is too slow for them.
    pub(super) fn are_many(&self) -> bool {
        self.len() >= self.max / 2
    }

    fn len(&self) -> usize {
        self.order.len() + self.under_way
    }

    /// One round: writes those that have waited longest. Gives those back that could not be written, for
    /// [`Self::put_back`].
    pub(super) fn write_some(
        &mut self,
        store: Arc<dyn FunctionStore>,
    ) -> impl Future<Output = Vec<(FunctionId, Note)>> + use<> {
        let notes = self.take(UPDATES_PER_ROUND);
        self.under_way = notes.len();
        write(store, notes, UPDATES_MAX, Arc::clone(&self.metrics))
    }

    /// Writes all of them, for the last time.
    pub(super) fn write_all(
        &mut self,
        store: Arc<dyn FunctionStore>,
    ) -> impl Future<Output = Vec<(FunctionId, Note)>> + use<> {
        write(store, self.take(usize::MAX), LAST_UPDATES_MAX, Arc::clone(&self.metrics))
    }

    fn take(&mut self, max: usize) -> Vec<(FunctionId, Note)> {
        let functions = self.order.drain(..max.min(self.order.len()));
        functions.filter_map(|function| self.by_function.remove_entry(&function)).collect()
    }
}

/// Writes notes, at most `at_a_time` of them; gives those back that could not be written.
async fn write(
    store: Arc<dyn FunctionStore>,
    notes: Vec<(FunctionId, Note)>,
    at_a_time: usize,
    metrics: Arc<Metrics>,
) -> Vec<(FunctionId, Note)> {
    let mut notes = notes.into_iter();
    let mut updates = FuturesUnordered::new();
    let (mut left, mut failure) = (Vec::new(), None);
    loop {
        let free = at_a_time - updates.len();
        updates.extend(notes.by_ref().take(free).map(async |(function, mut note)| {
            let written = note.write(&*store, &function).await;
            (function, note, written)
        }));
        match updates.next().await {
            None => break,
            Some((_, _, Ok(()))) => metrics.audit.waiting_functions.dec(),
            Some((function, note, Err(e))) => {
                failure = Some(e);
                left.push((function, note));
            }
        }
    }
    if let Some(e) = failure {
        // One line for all of them: there may be hundreds, of one cause.
        tracing::warn!(functions = left.len(), error = %e, "Counters Not Written");
    }
    left
}
