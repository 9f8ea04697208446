//! Results on their way back: heard by the pump, found by look-ups, settled once, handed to the audit.

use super::in_flight::{InFlight, SettleOutcome};
use super::schedule::{self, LookupSchedule};
use crate::audit::{Audit, KeyedResult, RowsStored};
use crate::backend::{BackendError, JournalEntry, Results, STORED_MAX, SubscriptionState};
use crate::metrics::Metrics;
use crate::model::{Execution, ExecutionEnd, FunctionId, JobId, Outcome, Recommendation, now_ms};
use bytes::Bytes;
use futures_util::stream::{FuturesUnordered, StreamExt};
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Calls for stored results in flight at a time.
const LOOKUP_CALLS_MAX: usize = 4;
/// Most look-ups of one tick: paces the storm after a resubscribe to about 20,000 keys a second.
pub const LOOKUPS_PER_TICK: usize = 2048;

/// What settling a result needs; shared by the pump, the look-ups and `/status`.
pub struct Settler {
    in_flight: Arc<InFlight>,
    schedule: Arc<LookupSchedule>,
    results: Arc<dyn Results>,
    audit: Audit,
    metrics: Arc<Metrics>,
    /// The subscription stands again: every job in flight is to be looked up.
    resubscribed: AtomicBool,
}

impl Settler {
    pub fn new(
        in_flight: Arc<InFlight>,
        schedule: Arc<LookupSchedule>,
        results: Arc<dyn Results>,
        audit: Audit,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { in_flight, schedule, results, audit, metrics, resubscribed: AtomicBool::new(false) }
    }

    #[cfg(test)]
    pub fn plan(&self, id: JobId) {
        self.schedule.plan(id, schedule::FIRST);
    }

    /// Goes on with a job that another life, or another node, has left. `false`: it is known.
    pub fn restore(&self, entry: &JournalEntry) -> bool {
        let is_new = self.in_flight.restore(entry);
        if is_new {
            self.schedule.plan(entry.id, schedule::FIRST);
        }
        is_new
    }

    /// Goes on looking for the result of a job that was given up.
    pub fn remember(&self, id: JobId, function: FunctionId) {
        self.in_flight.remember(id, function);
        self.schedule.plan(id, schedule::LAST);
    }

    pub async fn stored(&self, id: JobId) -> Result<Option<Bytes>, BackendError> {
        Ok(self.results.stored(&[id]).await?.pop().flatten())
    }

    /// Takes a result from wherever it came: answers those who wait, and hands the row to the audit.
    pub fn settle(&self, id: JobId, outcome: Outcome) {
        // Read before it is handed on: those who wait then need not read it again.
        let (outcome, (ending, exit_code, recommendation)) = outcome
            .into_read(|fields| (ExecutionEnd::of(fields), fields.exit_code, Recommendation::of(id, fields)));
        match self.in_flight.settle(id, outcome) {
            SettleOutcome::Repeated => self.metrics.results.with_label_values(&["repeated"]).inc(),
            SettleOutcome::UnknownJob => self.metrics.results.with_label_values(&["unknown_job"]).inc(),
            SettleOutcome::First(function, kept) => {
                let row = Execution::ended(id, function, ending);
                log_execution(id, &row);
                if self.record(id, row, exit_code, recommendation, kept) {
                    self.metrics.results_settled.inc();
                }
            }
            SettleOutcome::Late(function) => {
                let row = Execution::ended(id, function, ending);
                log_execution(id, &row);
                if self.audit.record_late(id, row, exit_code, recommendation).is_ok() {
                    self.in_flight.forget(id);
                    self.metrics.results.with_label_values(&["late"]).inc();
                } else {
                    self.in_flight.unsettle_late(id);
                    self.schedule.plan(id, schedule::LAST);
                    self.metrics.results.with_label_values(&["deferred"]).inc();
                }
            }
        }
    }

    /// `false`: the audit has no room, and the job is to be settled again.
    fn record(
        &self,
        id: JobId,
        row: Execution,
        exit_code: Option<i64>,
        recommendation: Option<Recommendation>,
        kept: Option<Box<KeyedResult>>,
    ) -> bool {
        if self.audit.record(id, row, exit_code, recommendation, kept).is_ok() {
            return true;
        }
        // Full means that the log table does not keep up. The stored result outlives the jam: look again later.
        self.in_flight.unsettle(id);
        self.metrics.results.with_label_values(&["deferred"]).inc();
        false
    }

    /// Ends a job whose deadline has passed without a result. It stays planned in case its row finds no room.
    fn give_up(&self, id: JobId) {
        let is_unconfirmed = self.in_flight.is_unconfirmed(id).unwrap_or(false);
        let lost = Outcome::lost(is_unconfirmed);
        // Not kept with the key of its request: whoever repeats that sees the row, and a late result in it.
        if let SettleOutcome::First(function, _) = self.in_flight.settle(id, lost) {
            tracing::warn!(requestId = %id, functionId = %function, unconfirmed = is_unconfirmed, "Job Lost");
            // Before the row can be written: whoever looks for all jobs finds it here or among those in flight.
            self.in_flight.remember(id, function.clone());
            if self.record(id, Execution::lost(id, function, is_unconfirmed), None, None, None) {
                self.metrics.results.with_label_values(&["lost"]).inc();
            } else {
                self.in_flight.forget(id);
            }
        }
        self.schedule.plan(id, schedule::FIRST);
    }
}

fn log_execution(id: JobId, row: &Execution) {
    let mut place = [0; JobId::TEXT_BYTES];
    let (request, function) = (id.text(&mut place), row.function.as_str());
    let (duration, status) = (row.duration_ms, row.status.as_str());
    if row.status.is_success() {
        tracing::info!(requestId = request, functionId = function, duration, "Execution Success");
    } else {
        tracing::info!(requestId = request, functionId = function, duration, status, "Execution Failed");
    }
}

impl RowsStored for Settler {
    fn rows_written(&self, ids: &[JobId]) {
        for id in ids {
            self.in_flight.remove(*id);
        }
    }
}

impl Settler {
    /// Counts a payload that belongs to no job.
    pub fn count_malformed(&self) {
        self.metrics.results.with_label_values(&["malformed"]).inc();
    }

    /// The subscription was established. Publications before that may have been missed, so every job in flight
    /// is to be looked up.
    pub fn subscribed(&self) {
        self.resubscribed.store(true, Ordering::Release);
    }

    /// Whether [`Self::subscribed`] was called since the last call of this.
    pub fn take_resubscribed(&self) -> bool {
        self.resubscribed.swap(false, Ordering::AcqRel)
    }

    pub fn hears(&self, hearing: SubscriptionState) {
        self.metrics.subscriptions.note(
            "results",
            hearing.is_receiving(),
            hearing == SubscriptionState::Unverified,
        );
        if hearing == SubscriptionState::BeatsMissed {
            self.metrics.subscriptions.missed.with_label_values(&["results"]).inc();
        }
    }

    /// The planned look-ups.
    pub async fn look_up_due(&self) {
        // A settled job stays planned until its row is written: it may yet find no room for the row.
        let is_wanted = |id| self.in_flight.contains(id) || self.in_flight.is_remembered(id);
        let due = self.schedule.take_due(LOOKUPS_PER_TICK, is_wanted);
        let ids: Vec<JobId> = due.iter().map(|due| due.id).collect();
        let failed: HashSet<JobId> = self.look_up(&ids).await.into_iter().collect();
        for due in due {
            match self.in_flight.awaited(due.id) {
                // Only a look-up that was answered tells that there is no result.
                Some(awaited) if awaited.deadline < now_ms() && !failed.contains(&due.id) => {
                    self.give_up(due.id);
                }
                Some(awaited) if awaited.waited_for => self.schedule.plan(due.id, schedule::FIRST),
                _ => self.schedule.plan(due.id, due.stage + 1),
            }
        }
    }

    /// The jobs that could not be looked up.
    pub async fn look_up(&self, ids: &[JobId]) -> Vec<JobId> {
        let mut chunks = ids.chunks(STORED_MAX);
        let mut calls = FuturesUnordered::new();
        let mut failed = Vec::new();
        loop {
            let free = LOOKUP_CALLS_MAX - calls.len();
            calls.extend(chunks.by_ref().take(free).map(|chunk| self.look_up_chunk(chunk)));
            match calls.next().await {
                Some(Ok(())) => {}
                Some(Err(chunk)) => failed.extend_from_slice(chunk),
                None => return failed,
            }
        }
    }

    /// The chunk back if the call was not answered.
    async fn look_up_chunk<'a>(&self, ids: &'a [JobId]) -> Result<(), &'a [JobId]> {
        let found = self.results.stored(ids).await.map_err(|e| {
            // The subscriber tells the operator that Redis is away; once is enough.
            tracing::debug!(error = %e, "Results Not Looked Up");
            ids
        })?;
        for (id, payload) in ids.iter().zip(found) {
            let Some(payload) = payload else { continue };
            // A row that is already on its way needs no second look.
            if self.in_flight.awaited(*id).is_some() || self.in_flight.is_remembered(*id) {
                self.metrics.results_looked_up.inc();
                self.settle(*id, Outcome::new(payload));
            }
            self.in_flight.forget_settled(*id);
        }
        Ok(())
    }
}
