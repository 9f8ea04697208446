//! Results on their way back: heard by the pump, found by look-ups, settled once, handed to the audit.

use super::in_flight::{InFlight, Settled};
use super::lookups::{self, Schedule};
use crate::audit::{Audit, Ledger};
use crate::backend::{Backend, BackendError, Journal, ResultEvent, Results, STORED_MAX};
use crate::metrics::Metrics;
use crate::model::{Execution, JobId, Outcome, Status, now_ms};
use bytes::Bytes;
use futures_util::stream::{FuturesUnordered, StreamExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Calls for stored results in flight at a time.
const LOOKUP_CALLS_MAX: usize = 4;
/// Most jobs that leave the journal in one call.
const JOURNAL_LEAVES_MAX: usize = 1024;
/// How often due look-ups are collected.
const LOOKUP_TICK: Duration = Duration::from_millis(100);
/// Most look-ups of one tick: paces the storm after a resubscribe to about 20,000 keys a second.
const LOOKUPS_PER_TICK: usize = 2048;

/// What settling a result needs; shared by the pump, the look-ups and `/status`.
pub struct Settler {
    pub in_flight: Arc<InFlight>,
    pub schedule: Schedule,
    pub results: Arc<dyn Results>,
    pub journal: Arc<dyn Journal>,
    audit: Audit,
    pub metrics: Arc<Metrics>,
    /// The subscription stands again: every job in flight is to be looked up.
    resubscribed: AtomicBool,
    /// Jobs whose rows are written but which the journal still holds.
    leaving: Mutex<Vec<JobId>>,
}

impl Settler {
    pub fn new(in_flight: Arc<InFlight>, backend: &Backend, audit: Audit, metrics: Arc<Metrics>) -> Self {
        Self {
            in_flight,
            schedule: Schedule::default(),
            results: Arc::clone(&backend.results),
            journal: Arc::clone(&backend.journal),
            audit,
            metrics,
            resubscribed: AtomicBool::new(false),
            leaving: Mutex::default(),
        }
    }

    pub async fn stored(&self, id: JobId) -> Result<Option<Bytes>, BackendError> {
        Ok(self.results.stored(&[id]).await?.pop().flatten())
    }

    /// Takes a result from wherever it came: answers those who wait, and hands the row to the audit.
    pub fn settle(&self, id: JobId, outcome: &Outcome) {
        let kind = match self.in_flight.settle(id, outcome) {
            Settled::Repeated => "repeated",
            Settled::UnknownJob => "unknown_job",
            Settled::First(function) => {
                let row = Execution::of(id, function, outcome);
                log_execution(&row);
                self.record(id, row)
            }
        };
        self.metrics.results.with_label_values(&[kind]).inc();
    }

    fn record(&self, id: JobId, row: Execution) -> &'static str {
        if self.audit.record(id, row).is_ok() {
            return "settled";
        }
        // Full means that the log table does not keep up. The stored result outlives the jam: look again later.
        self.in_flight.unsettle(id);
        "deferred"
    }

    /// Ends a job whose deadline has passed without a result.
    fn give_up(&self, id: JobId) {
        let lost = Outcome::new(Bytes::from_static(b"{\"status\":\"LOST\"}"));
        if let Settled::First(function) = self.in_flight.settle(id, &lost) {
            tracing::warn!(requestId = %id, functionId = %function, "Job Lost");
            let kind = self.record(id, Execution::lost(id, function));
            self.metrics.results.with_label_values(&[if kind == "settled" { "lost" } else { kind }]).inc();
        }
    }
}

fn log_execution(row: &Execution) {
    let (request, function, status) = (row.request_id.as_str(), row.function.as_str(), row.status.as_str());
    if status == Status::SUCCESS {
        tracing::info!(
            requestId = request,
            functionId = function,
            duration = row.duration_ms,
            "Execution Success"
        );
    } else {
        tracing::info!(
            requestId = request,
            functionId = function,
            duration = row.duration_ms,
            status,
            "Execution Failed"
        );
    }
}

impl Ledger for Settler {
    fn rows_written(&self, ids: &[JobId]) {
        for id in ids {
            self.in_flight.remove(*id);
        }
        self.leaving().extend_from_slice(ids);
    }
}

/// Hears the results of this node's jobs. Never pauses: what is published meanwhile would pile up in memory.
pub struct Pump(Arc<Settler>);

impl Pump {
    pub fn new(settler: Arc<Settler>) -> Self {
        Self(settler)
    }

    pub async fn run(self) {
        let settler = self.0;
        loop {
            match settler.results.next().await {
                ResultEvent::Published { id, payload } => settler.settle(id, &Outcome::new(payload)),
                ResultEvent::Malformed => settler.metrics.results.with_label_values(&["malformed"]).inc(),
                ResultEvent::Subscribed => settler.resubscribed.store(true, Ordering::Release),
            }
        }
    }
}

/// Finds results whose publication was missed, and clears the journal of jobs whose rows are written.
pub struct Lookups(Arc<Settler>);

impl Lookups {
    pub fn new(settler: Arc<Settler>) -> Self {
        Self(settler)
    }

    pub async fn run(self) {
        let settler = self.0;
        let mut tick = tokio::time::interval(LOOKUP_TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // All that were in flight at the last (re)subscribe and are not looked up since.
        let mut missed: Vec<JobId> = Vec::new();
        loop {
            tick.tick().await;
            settler.in_flight.forget_old();
            settler.clear_journal().await;
            if settler.resubscribed.swap(false, Ordering::AcqRel) {
                missed = settler.in_flight.unsettled();
            }
            let now = missed.split_off(missed.len().saturating_sub(LOOKUPS_PER_TICK));
            if !settler.look_up(&now).await {
                missed.extend(now);
            }
            settler.look_up_due().await;
        }
    }
}

impl Settler {
    /// The planned look-ups.
    async fn look_up_due(&self) {
        let mut awaited = self.schedule.take_due(LOOKUPS_PER_TICK);
        awaited.retain(|due| self.in_flight.awaited(due.id).is_some());
        let ids: Vec<JobId> = awaited.iter().map(|due| due.id).collect();
        // One that failed is looked up at its next turn, or when the subscription stands again.
        self.look_up(&ids).await;
        for due in awaited {
            self.plan_next(due.id, due.stage);
        }
    }

    /// Whether every call was answered.
    pub async fn look_up(&self, ids: &[JobId]) -> bool {
        let mut chunks = ids.chunks(STORED_MAX);
        let mut calls = FuturesUnordered::new();
        let mut answered = true;
        loop {
            let free = LOOKUP_CALLS_MAX - calls.len();
            calls.extend(chunks.by_ref().take(free).map(|chunk| self.look_up_chunk(chunk)));
            match calls.next().await {
                Some(ok) => answered &= ok,
                None => return answered,
            }
        }
    }

    async fn look_up_chunk(&self, ids: &[JobId]) -> bool {
        let found = match self.results.stored(ids).await {
            Ok(found) => found,
            Err(e) => {
                // The subscriber tells the operator that Redis is away; once is enough.
                tracing::debug!(error = %e, "Results Not Looked Up");
                return false;
            }
        };
        for (id, payload) in ids.iter().zip(found) {
            let Some(payload) = payload else { continue };
            self.metrics.results_looked_up.inc();
            self.settle(*id, &Outcome::new(payload));
            self.in_flight.forget_settled(*id);
        }
        true
    }

    /// Takes the jobs whose rows are written out of the journal. What it does not take stays for the next time.
    pub async fn clear_journal(&self) {
        let leaving = std::mem::take(&mut *self.leaving());
        for ids in leaving.chunks(JOURNAL_LEAVES_MAX) {
            if let Err(e) = self.journal.leave(ids).await {
                tracing::debug!(jobs = ids.len(), error = %e, "Journal Not Cleared");
                self.leaving().extend_from_slice(ids);
            }
        }
    }

    fn leaving(&self) -> MutexGuard<'_, Vec<JobId>> {
        self.leaving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn plan_next(&self, id: JobId, stage: usize) {
        let Some(awaited) = self.in_flight.awaited(id) else { return };
        if awaited.deadline < now_ms() {
            self.give_up(id);
        } else {
            let next = if awaited.waited_for { lookups::FIRST } else { stage + 1 };
            self.schedule.plan(id, next);
        }
    }
}
