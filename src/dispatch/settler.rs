//! Settles results: each result from a publication or a look-up answers the waiters and becomes one audit
//! row.

use super::in_flight::{FirstResult, InFlight, SettleOutcome};
use super::schedule::{self, LookupSchedule};
use crate::ambient;
use crate::audit::{Audit, KeyedResult, RowsStored};
use crate::backend::{BackendError, JournalEntry, Results, STORED_MAX, SubscriptionState};
use crate::events::{EventBus, FleetEvent};
use crate::log::within_trace;
use crate::metrics::Metrics;
use crate::model::{
    Execution, ExecutionEnd, FunctionId, JobId, JobTrace, Outcome, Recommendation, RowLife, Status, now_ms,
};
use crate::node_lease::NodeLease;
use crate::traces::{JobLife, Traces};
use bytes::Bytes;
use futures_util::stream::{FuturesUnordered, StreamExt};
use parking_lot::Mutex;
use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Maximum number of calls for stored results in flight.
const LOOKUP_CALLS_MAX: usize = 4;
/// Maximum number of look-ups per tick. It limits the burst after a resubscription to about 20,000 keys per
/// second.
pub const LOOKUPS_PER_TICK: usize = 2048;

/// Maximum number of late results that wait to be stored.
const HEARD_LATE_MAX: usize = 1024;

/// Settles results. Shared by the pump, the look-ups and `/status`.
pub struct Settler {
    in_flight: Arc<InFlight>,
    schedule: Arc<LookupSchedule>,
    results: Arc<dyn Results>,
    audit: Audit,
    lease: Arc<NodeLease>,
    events: EventBus,
    traces: Traces,
    metrics: Arc<Metrics>,
    /// Late results that were published, and are not stored yet.
    heard_late: Mutex<VecDeque<(JobId, Bytes)>>,
    /// The subscription was established again, so every job in flight must be looked up.
    resubscribed: AtomicBool,
}

/// The parts of a [`Settler`].
pub struct SettlerParts {
    pub in_flight: Arc<InFlight>,
    pub schedule: Arc<LookupSchedule>,
    pub results: Arc<dyn Results>,
    pub audit: Audit,
    pub lease: Arc<NodeLease>,
    pub events: EventBus,
    pub traces: Traces,
    pub metrics: Arc<Metrics>,
}

/// What [`Settler::trace`] needs of a row.
struct FollowedEnd {
    function: FunctionId,
    status: Status,
    sent: Option<Duration>,
    confirmed: Option<Duration>,
}

impl Settler {
    pub fn new(parts: SettlerParts) -> Self {
        let SettlerParts { in_flight, schedule, results, audit, lease, events, traces, metrics } = parts;
        let (heard_late, resubscribed) = (Mutex::default(), AtomicBool::new(false));
        Self { in_flight, schedule, results, audit, lease, events, traces, metrics, heard_late, resubscribed }
    }

    #[cfg(test)]
    pub fn plan(&self, id: JobId) {
        self.schedule.plan(id, schedule::FIRST);
    }

    /// Resumes a job of an earlier process or of another node. Returns `false` if the table has it.
    pub fn restore(&self, entry: &JournalEntry) -> bool {
        let is_new = self.in_flight.restore(entry);
        if is_new {
            self.schedule.plan(entry.id, schedule::FIRST);
        }
        is_new
    }

    /// Keeps looking up the result of a job that ended as LOST.
    pub fn remember(&self, id: JobId, function: FunctionId) {
        self.in_flight.remember(id, function, RowLife::default());
        self.schedule.plan(id, schedule::LAST);
    }

    pub async fn stored(&self, id: JobId) -> Result<Option<Bytes>, BackendError> {
        Ok(self.results.stored(&[id]).await?.pop().flatten())
    }

    /// Accepts a publication. A late result counts only after it is stored, because a process that takes its
    /// job over must find it again. Its worker may have died before it stored it, so this node does that.
    pub fn hear(&self, id: JobId, payload: Bytes) {
        let is_late = self.in_flight.is_remembered(id) && self.in_flight.awaited(id).is_none();
        if !is_late {
            return self.settle(id, Outcome::new(payload));
        }
        let mut heard_late = self.heard_late.lock();
        // Beyond the bound a scheduled look-up finds the result, if it is stored.
        if heard_late.len() < HEARD_LATE_MAX {
            heard_late.push_back((id, payload));
        }
    }

    /// Stores the late results that were published, and settles them.
    pub async fn store_late(&self) {
        // Not those that arrive meanwhile: jobs are looked up by the same task.
        let due = self.heard_late.lock().len();
        for _ in 0..due {
            let Some((id, payload)) = self.heard_late.lock().front().cloned() else { return };
            if self.in_flight.is_remembered(id)
                && let Err(e) = self.results.store(id, &payload).await
            {
                tracing::debug!(requestId = %id, error = %e, "Late result not stored; retrying");
                return;
            }
            self.settle(id, Outcome::new(payload));
            // Only one task takes them.
            self.heard_late.lock().pop_front();
        }
    }

    /// Accepts a result from any source. Answers the waiters, and queues the row in the audit.
    pub fn settle(&self, id: JobId, outcome: Outcome) {
        // Parsed before the waiters get it, so that they need not parse it again.
        let (outcome, (ending, exit_code, recommendation)) = outcome
            .into_read(|fields| (ExecutionEnd::of(fields), fields.exit_code, Recommendation::of(id, fields)));
        match self.in_flight.settle(id, outcome) {
            SettleOutcome::Repeated => self.metrics.results.with_label_values(&["repeated"]).inc(),
            SettleOutcome::UnknownJob => self.metrics.results.with_label_values(&["unknown_job"]).inc(),
            SettleOutcome::First(FirstResult { function, kept, is_shared, heard_at, life, trace }) => {
                let row = Execution::ended(id, function, ending).with_life(heard_at, life);
                within_trace(trace.as_ref(), || log_execution(id, &row));
                let end = self.followed(&row);
                let is_shared = is_shared || !self.lease.holds();
                let is_success = row.status.is_success();
                if self.record(id, row, exit_code, recommendation, kept, is_shared) {
                    self.metrics.results_settled.inc();
                    let took = Duration::from_millis(now_ms().saturating_sub(id.accepted_at()));
                    self.metrics.load.run(took, is_success);
                    self.trace(id, end, trace.as_deref());
                }
            }
            SettleOutcome::Late(function, life) => {
                let row = Execution::ended(id, function, ending).with_life(None, life);
                log_execution(id, &row);
                let ended = self.ended(id, &row);
                if self.audit.record_late(id, row, exit_code, recommendation).is_ok() {
                    self.report(ended);
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

    /// `None`: no end of a job is traced.
    fn followed(&self, row: &Execution) -> Option<FollowedEnd> {
        self.traces.follows_jobs().then(|| FollowedEnd {
            function: row.function.clone(),
            status: row.status.clone(),
            sent: row.life.sent_at.map(Duration::from_millis),
            confirmed: row.life.confirmed_at.map(Duration::from_millis),
        })
    }

    /// Records the spans of a job that was not traced from its start, if its end asks for it. Called after
    /// its row was queued: without room for the row, the job is settled again.
    fn trace(&self, id: JobId, end: Option<FollowedEnd>, trace: Option<&JobTrace>) {
        if let Some(FollowedEnd { function, status, sent, confirmed }) = &end {
            let (status, is_success) = (status.as_str(), status.is_success());
            let (sent, confirmed, heard) = (*sent, *confirmed, ambient::unix_time());
            let life = JobLife { id, function, trace, status, is_success, sent, confirmed, heard };
            self.traces.job_ended(&life);
        }
    }

    /// Queues a row. Returns `false` if the audit is full; the job is then unsettled and settled again later.
    fn record(
        &self,
        id: JobId,
        row: Execution,
        exit_code: Option<i64>,
        recommendation: Option<Recommendation>,
        kept: Option<Box<KeyedResult>>,
        is_shared: bool,
    ) -> bool {
        let ended = self.ended(id, &row);
        if self.audit.record(id, row, exit_code, recommendation, kept, is_shared).is_ok() {
            self.report(ended);
            return true;
        }
        // The log table does not keep up. The stored result outlives that, so a later look-up settles the
        // job.
        self.in_flight.unsettle(id);
        self.metrics.results.with_label_values(&["deferred"]).inc();
        false
    }

    /// The event of the end of a job, if anybody watches.
    fn ended(&self, id: JobId, row: &Execution) -> Option<FleetEvent> {
        self.events.is_watched().then(|| FleetEvent::job_ended(id, row))
    }

    fn report(&self, event: Option<FleetEvent>) {
        if let Some(event) = event {
            self.events.report(|| event);
        }
    }

    /// Ends a job as LOST whose deadline has passed without a result. A look-up stays scheduled, because the
    /// audit may have no room for the row.
    fn give_up(&self, id: JobId) {
        let is_unconfirmed = self.in_flight.is_unconfirmed(id).unwrap_or(false);
        let lost = Outcome::lost(is_unconfirmed);
        // LOST is not stored with the idempotency key. A repeated request reads the row instead, which may
        // show a late result.
        let settled = self.in_flight.settle(id, lost);
        if let SettleOutcome::First(FirstResult { function, heard_at, life, trace, .. }) = settled {
            within_trace(trace.as_ref(), || {
                tracing::warn!(
                    requestId = %id,
                    functionId = %function,
                    unconfirmed = is_unconfirmed,
                    "Job lost: no result by its deadline"
                );
            });
            // Before the row can be written, so that a snapshot of all jobs finds the job here or in the
            // table.
            self.in_flight.remember(id, function.clone(), life.clone());
            let row = Execution::lost(id, function, is_unconfirmed).with_life(heard_at, life);
            let end = self.followed(&row);
            if self.record(id, row, None, None, None, true) {
                self.trace(id, end, trace.as_deref());
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

    /// Records that the subscription was established. Publications before that may have been missed, so every
    /// job in flight is looked up.
    pub fn subscribed(&self) {
        self.resubscribed.store(true, Ordering::Release);
    }

    /// Whether [`Self::subscribed`] was called since the last call of this method.
    pub fn take_resubscribed(&self) -> bool {
        self.resubscribed.swap(false, Ordering::AcqRel)
    }

    /// Updates the metrics of the subscription.
    pub fn note_subscription(&self, state: SubscriptionState) {
        self.metrics.subscriptions.note(
            "results",
            state.is_receiving(),
            state == SubscriptionState::Unverified,
            state == SubscriptionState::BeatsMissed,
        );
    }

    /// Does the look-ups that are due. Ends jobs as LOST whose deadline has passed.
    pub async fn look_up_due(&self) {
        // A settled job stays scheduled until its row is written, because the audit may have no room for it.
        let is_wanted = |id| self.in_flight.contains(id) || self.in_flight.is_remembered(id);
        let due = self.schedule.take_due(LOOKUPS_PER_TICK, is_wanted);
        let ids: Vec<JobId> = due.iter().map(|due| due.id).collect();
        let failed: HashSet<JobId> = self.look_up(&ids).await.into_iter().collect();
        for due in due {
            match self.in_flight.awaited(due.id) {
                // Only a look-up that was answered proves that there is no result.
                Some(awaited)
                    if awaited.deadline < now_ms() && !failed.contains(&due.id) && !awaited.is_unsent =>
                {
                    self.give_up(due.id);
                }
                Some(awaited) if awaited.waited_for => self.schedule.plan(due.id, schedule::FIRST),
                _ => self.schedule.plan(due.id, due.stage + 1),
            }
        }
    }

    /// Looks up the results of jobs and settles them. Returns the jobs that could not be looked up.
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

    /// Looks up one chunk. Returns it as the error if the call failed.
    async fn look_up_chunk<'a>(&self, ids: &'a [JobId]) -> Result<(), &'a [JobId]> {
        let found = self.results.stored(ids).await.map_err(|e| {
            // At debug level, because the subscriber already warns that the store is unavailable.
            tracing::debug!(error = %e, "Look-up of results failed; retrying");
            ids
        })?;
        for (id, payload) in ids.iter().zip(found) {
            let Some(payload) = payload else { continue };
            // A job whose row is queued is already settled.
            if self.in_flight.awaited(*id).is_some() || self.in_flight.is_remembered(*id) {
                self.metrics.results_looked_up.inc();
                self.settle(*id, Outcome::new(payload));
            }
            self.in_flight.forget_settled(*id);
        }
        Ok(())
    }
}
