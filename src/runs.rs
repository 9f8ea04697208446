//! The use case behind `POST /run`: admit, look up, claim, submit, wait. It does not depend on HTTP.
//!
//! ```text
//! admit          reject a part of the jobs while the queue is slow
//! look up        the function, its permission and its rate limit
//! claim          the idempotency key, if the request has one → first attempt, repeat or resend
//! submit         concurrency caps → journal → queue
//! wait           queue confirmation (asynchronous), result (synchronous)
//! ```
//!
//! * [`Runs`] — the use case
//! * [`idempotency`] — requests with an idempotency key: claim, repeat, resend
//! * [`error`] — the errors of a run

mod error;
mod idempotency;

pub use error::{InvalidKey, RunError};

use crate::audit::{Event, RecentEvents};
use crate::backend::{Backend, Claim, StoredClaim};
use crate::config::{BatchConf, Live, WaitsConf};
use crate::dispatch::{Dispatcher, Permits, Sending, SubmitError, Submitted, Waiter};
use crate::functions::FunctionCache;
use crate::lifecycle::{Lifecycle, Phase};
use crate::limiter::{RateLimitState, RateLimiter};
use crate::metrics::Metrics;
use crate::model::{
    BodyHash, Caller, Execution, FunctionId, IdempotencyKey, Job, JobDraft, JobId, JobOrigin, JobProgress,
    JobTemplate, JobTrace, Outcome, RequestTrace, RunRequest, TraceContext, UnixMs, now_ms,
};
use crate::traces::Traces;
use idempotency::{AttemptWatcher, ClaimOutcome, Idempotency, KnownState};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Maximum length of a model name in the list of recent events, in characters.
const MODEL_CHARS_SHOWN: usize = 128;

/// The shortest wait in which a backend certainly writes what it holds back. After it, a client may be told
/// that its job still runs.
const UNPROMISED_WAIT_MIN: Duration = Duration::from_secs(5);

/// One request for a run.
pub struct RunOrder<'a> {
    pub request: &'a RunRequest<'a>,
    /// The whole request body. Its hash distinguishes a repeat from a reused idempotency key.
    pub body: &'a [u8],
    /// A malformed key is reported only after the checks of the function, so that it never hides one of them.
    pub idempotency_key: Result<Option<&'a str>, InvalidKey>,
    pub caller: Option<&'a Caller>,
    /// The rate-limit state of the request so far.
    pub counted: &'a RateLimitState,
    /// The span of the client, if it named one.
    pub traceparent: Option<TraceContext>,
    /// The client's `tracestate`, if it is valid.
    pub tracestate: Option<&'a str>,
    /// The span of the request. `None`: it is not recorded.
    pub request_trace: Option<&'a RequestTrace>,
    /// Return once the queue has confirmed the job.
    pub is_async: bool,
    /// How long to wait for the result, in seconds. `None`: the configured default.
    pub wait_s: Option<u64>,
}

impl RunOrder<'_> {
    fn key_name(&self) -> &str {
        self.caller.map_or("", |caller| &caller.name)
    }

    fn may_run(&self, function: &FunctionId) -> bool {
        self.caller.is_none_or(|caller| caller.may_run(function))
    }

    /// The part of the life of its job that is known now.
    fn origin(&self, template: &JobTemplate, trace: Option<&JobTrace>) -> JobOrigin {
        let named = trace.map(|trace| trace.context).or(self.traceparent);
        JobOrigin {
            key_name: self.caller.map(|caller| Arc::clone(&caller.name)),
            config_version: template.version,
            memory_mb: template.memory_mb,
            trace_id: named.map(|span| format!("{:032x}", span.trace_id()).into()),
        }
    }

    fn key(&self) -> Result<Option<IdempotencyKey>, RunError> {
        let key = self.idempotency_key.map_err(RunError::InvalidKey)?;
        Ok(key.map(|key| IdempotencyKey::of(self.key_name(), key)))
    }
}

/// How a run was carried out.
pub enum RunOutcome {
    /// The queue has confirmed the job.
    Accepted(JobId),
    Finished(Outcome),
    /// The job has finished. Only its row is left.
    Recorded(JobId, Box<Execution>),
    /// The wait ended before the job.
    StillRunning(JobId),
}

/// The parts of [`Runs`].
pub struct RunParts<'a> {
    pub backend: &'a Backend,
    pub waits: Live<WaitsConf>,
    pub batch: Live<BatchConf>,
    pub dispatcher: Dispatcher,
    pub functions: FunctionCache,
    pub limiter: RateLimiter,
    pub lifecycle: Lifecycle,
    pub tail: RecentEvents,
    pub traces: Traces,
    pub metrics: Arc<Metrics>,
}

/// Carries out runs.
pub struct Runs {
    dispatcher: Dispatcher,
    idempotency: Idempotency,
    functions: FunctionCache,
    limiter: RateLimiter,
    lifecycle: Lifecycle,
    message_bytes_max: usize,
    /// The retention period of the queue.
    retention: Duration,
    waits: Live<WaitsConf>,
    tail: RecentEvents,
    traces: Traces,
}

impl Runs {
    pub fn new(parts: RunParts<'_>) -> Self {
        let RunParts { backend, waits, batch, dispatcher, functions, limiter, lifecycle, .. } = parts;
        let RunParts { tail, traces, metrics, .. } = parts;
        let idempotency = Idempotency::new(backend, dispatcher.clone(), batch, lifecycle.clone(), metrics);
        let queue = backend.queue.traits();
        Self {
            dispatcher,
            idempotency,
            functions,
            limiter,
            lifecycle,
            message_bytes_max: queue.message_bytes_max,
            retention: queue.retention,
            waits,
            tail,
            traces,
        }
    }

    /// Checks whether the node accepts a job. Called before the body is parsed, so that overload costs
    /// little.
    ///
    /// # Errors
    /// `Shed`.
    pub fn admit(&self) -> Result<(), RunError> {
        self.dispatcher.admit().map_err(|retry_after| RunError::Shed { retry_after })
    }

    /// Carries out one request. The job continues if the returned future is dropped after the submission.
    pub async fn run(&self, order: &RunOrder<'_>) -> Result<RunOutcome, RunError> {
        let template = self.functions.get(&order.request.function).await;
        let template = template.map_err(|error| RunError::Backend { store: "the function table", error })?;
        let Some(template) = template else {
            return Box::pin(self.repeat_without_function(order)).await;
        };
        if !order.may_run(&template.function) {
            return Err(RunError::FunctionForbidden);
        }
        // Only existing functions are counted: invented names must not fill the limiter.
        self.limiter.check_function(&template.function, order.counted).await.map_err(RunError::RateLimit)?;
        match order.key()? {
            None => {
                let id = self.dispatcher.new_id();
                let job = self.job(order, &template, id, id.accepted_at())?;
                self.log(order, &template, id, id.accepted_at());
                let held = self.hold(order, &template)?;
                if order.is_async {
                    self.accept(job, held).await
                } else {
                    self.wait_for(job, held, order).await
                }
            }
            // Boxed, so that the future stays small for requests without a key, which are the majority.
            Some(key) => Box::pin(self.run_once(key, order, &template)).await,
        }
    }

    async fn run_once(
        &self,
        key: IdempotencyKey,
        order: &RunOrder<'_>,
        template: &JobTemplate,
    ) -> Result<RunOutcome, RunError> {
        let id = self.dispatcher.new_id();
        let job = self.job(order, template, id, id.accepted_at())?;
        let body = BodyHash::of(order.body);
        let claim = Claim { key, body, job: job.id, function: job.function.clone() };
        let claimed = self.idempotency.claim(&claim, self.job_lifetime()).await?;
        let keyed = |job: Job| Job { idempotency_key: Some(Box::new(key)), is_promised: true, ..job };
        match claimed {
            ClaimOutcome::Repeated(before, known) => self.repeat(&before, known, order).await,
            ClaimOutcome::First(attempt) => {
                self.log(order, template, job.id, job.id.accepted_at());
                // After the claim, so that a repeat does not count against a cap.
                let held = match self.hold(order, template) {
                    Ok(held) => held,
                    Err(e) => {
                        let rejected = Err(SubmitError::Overloaded);
                        let mut released = self.idempotency.follow(attempt, claim, rejected);
                        let _ = released.outcome().await;
                        return Err(e);
                    }
                };
                let (sending, waiter) = if order.is_async {
                    (self.dispatcher.submit(keyed(job), held), None)
                } else {
                    match self.dispatcher.submit_waiting(keyed(job), held) {
                        Ok(Submitted { sent, waiter }) => (Ok(sent), Some(waiter)),
                        Err(e) => (Err(e), None),
                    }
                };
                let id = claim.job;
                let attempt = self.idempotency.follow(attempt, claim, sending);
                self.finish_attempt(id, attempt, waiter, order).await
            }
            ClaimOutcome::Resend(attempt, before, resend) => {
                let id = before.claim.job;
                self.log(order, template, id, now_ms());
                // The journal, and the node that has the job in its table, use the original deadline.
                let since = if resend.is_journaled { id.accepted_at() } else { resend.since };
                let mut job = keyed(self.job(order, template, id, since)?);
                // The clocks of two nodes differ.
                let now = now_ms().max(id.accepted_at());
                let origin = order.origin(template, job.trace.as_deref());
                job.progress = Some(Arc::new(JobProgress::new(origin, now, resend.maybe_sent)));
                let submitted = self.dispatcher.submit_again(job, resend, !order.is_async).await;
                let (sending, waiter) = match submitted {
                    Ok((sending, waiter)) => (Ok(sending), waiter),
                    Err(e) => (Err(e), None),
                };
                let attempt = self.idempotency.follow(attempt, before.claim, sending);
                self.finish_attempt(id, attempt, waiter, order).await
            }
        }
    }

    /// Completes the request whose attempt to send the job is in flight.
    async fn finish_attempt(
        &self,
        id: JobId,
        mut attempt: AttemptWatcher,
        waiter: Option<Waiter>,
        order: &RunOrder<'_>,
    ) -> Result<RunOutcome, RunError> {
        let Some(waiter) = waiter else {
            attempt.outcome().await.map_err(RunError::Submit)?;
            return Ok(if order.is_async { RunOutcome::Accepted(id) } else { RunOutcome::StillRunning(id) });
        };
        self.wait_with(id, attempt.outcome(), waiter, order).await
    }

    /// Handles a request for a function that does not exist. A repeat of a request from before its deletion
    /// is still answered.
    async fn repeat_without_function(&self, order: &RunOrder<'_>) -> Result<RunOutcome, RunError> {
        let Some(key) = order.key()? else { return Err(RunError::NoSuchFunction) };
        if !order.may_run(&order.request.function) {
            return Err(RunError::NoSuchFunction);
        }
        match self.idempotency.find(key, BodyHash::of(order.body)).await? {
            Some((before, known)) => self.repeat(&before, known, order).await,
            None => Err(RunError::NoSuchFunction),
        }
    }

    /// Answers a repeated request with the state of its job.
    async fn repeat(
        &self,
        before: &StoredClaim,
        known: KnownState,
        order: &RunOrder<'_>,
    ) -> Result<RunOutcome, RunError> {
        let id = before.claim.job;
        let mut pending = match known {
            // The job ended as LOST and possibly was never queued, so it is not reported as accepted.
            KnownState::Result(lost) if lost.is_unconfirmed() && !before.is_sent => {
                return Ok(RunOutcome::Finished(lost));
            }
            KnownState::Ended(row) if row.is_lost() && !before.is_sent => {
                return Ok(RunOutcome::Recorded(id, row));
            }
            _ if order.is_async => return Ok(RunOutcome::Accepted(id)),
            KnownState::Result(outcome) => return Ok(RunOutcome::Finished(outcome)),
            KnownState::Ended(row) => return Ok(RunOutcome::Recorded(id, row)),
            KnownState::Pending(None) => return Ok(RunOutcome::StillRunning(id)),
            KnownState::Pending(Some(pending)) => pending,
        };
        tokio::select! {
            biased;
            outcome = pending.outcome() => {
                Ok(outcome.map_or(RunOutcome::StillRunning(id), RunOutcome::Finished))
            }
            () = tokio::time::sleep(self.wait(order)) => Ok(self.timed_out(id)),
            () = self.lifecycle.reached(Phase::Closing) => Ok(RunOutcome::StillRunning(id)),
        }
    }

    /// Reserves the places of a job under the caps of its function and its key.
    fn hold(&self, order: &RunOrder<'_>, template: &JobTemplate) -> Result<Permits, RunError> {
        let Some(caller) = order.caller else { return Ok(Permits::new()) };
        let held =
            self.dispatcher.hold(&template.function, template.max_concurrency, &caller.name, caller.jobs_max);
        held.map_err(RunError::TooManyJobs)
    }

    /// Time from acceptance to the deadline of a job.
    fn job_lifetime(&self) -> Duration {
        self.waits.get().job_deadline_s.map_or(self.retention, Duration::from_secs)
    }

    /// Builds the job. `since`: when its lifetime starts, in Unix milliseconds.
    fn job(
        &self,
        order: &RunOrder<'_>,
        template: &JobTemplate,
        id: JobId,
        since: UnixMs,
    ) -> Result<Job, RunError> {
        let lifetime = u64::try_from(self.job_lifetime().as_millis()).unwrap_or(u64::MAX);
        let deadline = since.saturating_add(lifetime);
        let RunOrder { request, tracestate, .. } = *order;
        let trace = self.traces.of_job(order.request_trace, order.traceparent, tracestate);
        let traceparent = trace.as_ref().map_or(order.traceparent, |trace| Some(trace.context));
        let job = JobDraft { id, template, deadline, request, traceparent, tracestate }.build();
        let is_promised = order.is_async || self.wait(order) < UNPROMISED_WAIT_MIN;
        let origin = order.origin(template, trace.as_deref());
        let progress = Some(Arc::new(JobProgress::new(origin, id.accepted_at(), false)));
        let job = Job { trace, is_promised, progress, ..job };
        let bytes_max = self.message_bytes_max;
        (job.message.len() <= bytes_max).then_some(job).ok_or(RunError::MessageTooLarge { bytes_max })
    }

    /// Longest wait for the result.
    fn wait(&self, order: &RunOrder<'_>) -> Duration {
        let waits = self.waits.get();
        Duration::from_secs(order.wait_s.unwrap_or(waits.sync_default_s).min(waits.sync_max_s))
    }

    async fn accept(&self, job: Job, held: Permits) -> Result<RunOutcome, RunError> {
        let id = job.id;
        // Accepted only after the queue has confirmed the message.
        let sending = self.dispatcher.submit(job, held).map_err(RunError::Submit)?;
        outcome_of(sending).await.map_err(RunError::Submit)?;
        Ok(RunOutcome::Accepted(id))
    }

    async fn wait_for(&self, job: Job, held: Permits, order: &RunOrder<'_>) -> Result<RunOutcome, RunError> {
        let id = job.id;
        let Submitted { sent, waiter } =
            self.dispatcher.submit_waiting(job, held).map_err(RunError::Submit)?;
        self.wait_with(id, outcome_of(sent), waiter, order).await
    }

    /// Waits for the queue's confirmation, and then for the result.
    async fn wait_with(
        &self,
        id: JobId,
        sent: impl Future<Output = Result<(), SubmitError>>,
        mut waiter: Waiter,
        order: &RunOrder<'_>,
    ) -> Result<RunOutcome, RunError> {
        let give_up = Instant::now() + self.wait(order);
        // A result that comes before the confirmation proves that the queue has the job.
        tokio::select! {
            biased;
            Some(outcome) = waiter.outcome() => return Ok(RunOutcome::Finished(outcome)),
            sent = sent => sent.map_err(RunError::Submit)?,
        }
        tokio::select! {
            biased;
            // `None`: the job ended while the waiter was registered, or too many requests wait for it.
            outcome = waiter.outcome() => {
                Ok(outcome.map_or(RunOutcome::StillRunning(id), RunOutcome::Finished))
            }
            () = tokio::time::sleep_until(give_up) => Ok(self.timed_out(id)),
            () = self.lifecycle.reached(Phase::Closing) => Ok(RunOutcome::StillRunning(id)),
        }
    }

    fn log(&self, order: &RunOrder<'_>, template: &JobTemplate, id: JobId, at: UnixMs) {
        let (function, is_async) = (&template.function, order.is_async);
        tracing::info!(requestId = %id, functionId = %function, mode = mode_of(is_async), "Run Request");
        self.tail.note(at, || {
            let model = order.request.model().chars().take(MODEL_CHARS_SHOWN).collect();
            Event::Requested { id, function: function.clone(), model, is_async }
        });
    }

    /// The wait ended before the job.
    fn timed_out(&self, id: JobId) -> RunOutcome {
        self.tail.note(now_ms(), || Event::WaitTimedOut(id));
        RunOutcome::StillRunning(id)
    }
}

/// The name of a mode in the log and in the list of recent events.
pub fn mode_of(is_async: bool) -> &'static str {
    if is_async { "ASYNC" } else { "SYNC" }
}

/// The outcome of a send. The batch loop answers every job; a closed channel means that it has stopped.
async fn outcome_of(sending: Sending) -> Result<(), SubmitError> {
    sending.await.unwrap_or(Err(SubmitError::Stopping))
}
