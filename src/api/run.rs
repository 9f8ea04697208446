//! `POST /run`: the way every run of every function takes.

use super::once::{self, Known, Once, Turn};
use super::prefer::Prefer;
use super::{ApiError, Call, Reply};
use crate::backend::{Claim, QueueTraits};
use crate::config::{Live, WaitsConf};
use crate::dispatch::{Dispatcher, Held, SubmitError, Submitted};
use crate::functions::Functions;
use crate::lifecycle::{Lifecycle, Phase};
use crate::limiter::RateLimiter;
use crate::model::{
    BodyHash, Execution, IdempotencyKey, Job, JobDraft, JobId, JobTemplate, Outcome, RunRequest,
};
use http::StatusCode;
use http::header::{HeaderName, HeaderValue, LOCATION};
use serde_json::json;
use std::time::Duration;
use tokio::time::Instant;

const PREFERENCE_APPLIED: HeaderName = HeaderName::from_static("preference-applied");

pub struct Run {
    dispatcher: Dispatcher,
    once: Once,
    functions: Functions,
    limiter: RateLimiter,
    lifecycle: Lifecycle,
    message_bytes_max: usize,
    /// How long the queue keeps a message.
    retention: Duration,
    waits: Live<WaitsConf>,
}

impl Run {
    pub fn new(
        waits: Live<WaitsConf>,
        queue: QueueTraits,
        dispatcher: Dispatcher,
        once: Once,
        functions: Functions,
        limiter: RateLimiter,
        lifecycle: Lifecycle,
    ) -> Self {
        Self {
            dispatcher,
            once,
            functions,
            limiter,
            lifecycle,
            message_bytes_max: queue.message_bytes_max,
            retention: queue.retention,
            waits,
        }
    }

    pub async fn post(&self, call: &Call) -> Result<Reply, ApiError> {
        if !call.headers.is_json() {
            return Err(ApiError::NotJson);
        }
        self.dispatcher.admit().map_err(|delay| ApiError::Shed { retry_after_s: delay.as_secs() + 1 })?;
        let request = RunRequest::parse(&call.body).map_err(|e| ApiError::invalid(e.to_string()))?;
        let template = self.functions.get(&request.function).await;
        let template = template.map_err(|e| ApiError::backend("the function table", &e))?;
        let template = template.ok_or(ApiError::NoSuchFunction)?;
        if !call.caller.as_ref().is_none_or(|caller| caller.may_run(&template.function)) {
            return Err(ApiError::FunctionForbidden);
        }
        // Only functions that exist are counted: names made up by a client take no room.
        self.limiter.check_function(&template.function, &call.counted).await?;
        let key = once::key_of(&call.headers)?;
        let job = self.job(&template, &request, call)?;

        let prefer = Prefer::of(&call.headers.prefer);
        let asynchronous = prefer.respond_async || is_true(call.headers.x_async.as_ref());
        let mode = if asynchronous { "ASYNC" } else { "SYNC" };
        tracing::info!(requestId = %job.id, functionId = %job.function, mode, "Run Request");
        match key {
            None => {
                let held = self.hold(&template, call)?;
                if asynchronous {
                    self.accept(job, held, prefer).await
                } else {
                    self.answer(job, held, prefer).await
                }
            }
            // In a box: requests without a key, which are most, need no room for it.
            Some(key) => {
                let key = IdempotencyKey::of(call.key_name(), key);
                let again = || self.job(&template, &request, call);
                let hold = || self.hold(&template, call);
                Box::pin(self.carry_out_once(key, call, job, (again, hold), asynchronous, prefer)).await
            }
        }
    }

    async fn carry_out_once(
        &self,
        key: IdempotencyKey,
        call: &Call,
        mut job: Job,
        (again, hold): (impl Fn() -> Result<Job, ApiError>, impl FnOnce() -> Result<Held, ApiError>),
        asynchronous: bool,
        prefer: Prefer,
    ) -> Result<Reply, ApiError> {
        let body = BodyHash::of(&call.body);
        let claim = |job: &Job| Claim { key, body, job: job.id, function: job.function.clone() };
        let started = Instant::now();
        loop {
            match self.once.turn(&claim(&job), started.elapsed()).await? {
                Turn::First => break,
                Turn::Again(before, _) if asynchronous => return Ok(accepted(before.claim.job, prefer)),
                Turn::Again(before, known) => {
                    return self.answer_again(before.claim.job, known, prefer).await;
                }
                Turn::NotYet => {
                    tokio::time::sleep(once::LOOK_EVERY).await;
                    job = again()?;
                }
                Turn::Abandoned(before) => {
                    // With an id of now: by its age others tell whether its send may be under way.
                    job = again()?;
                    if self.once.take_over(&claim(&job), before).await? {
                        break;
                    }
                }
            }
        }
        let claim = claim(&job);
        job.idempotency_key = Some(Box::new(key));
        // Only now: who comes again holds no place of its own.
        let result = match hold() {
            Ok(held) if asynchronous => self.accept(job, held, prefer).await,
            Ok(held) => self.answer(job, held, prefer).await,
            Err(e) => Err(e),
        };
        self.once.note(&claim, &result).await;
        result
    }

    /// Answers a request that came before with what its job has come to.
    async fn answer_again(&self, id: JobId, known: Known, prefer: Prefer) -> Result<Reply, ApiError> {
        let mut pending = match known {
            Known::Result(outcome) => return Ok(Reply::json(StatusCode::OK, outcome.body())),
            Known::Ended(row) => return Ok(of_row(id, &row)),
            Known::Pending(None) => return Ok(still_running(id)),
            Known::Pending(Some(pending)) => pending,
        };
        tokio::select! {
            biased;
            outcome = pending.outcome() => Ok(match outcome {
                Some(outcome) => Reply::json(StatusCode::OK, outcome.body()),
                None => still_running(id),
            }),
            () = tokio::time::sleep(self.wait(prefer)) => Ok(still_running(id)),
            () = self.lifecycle.reached(Phase::Closing) => Ok(still_running(id)),
        }
    }

    /// The places that a job needs, if its function or its key have caps.
    fn hold(&self, template: &JobTemplate, call: &Call) -> Result<Held, ApiError> {
        let Some(caller) = &call.caller else { return Ok(Held::new()) };
        let held =
            self.dispatcher.hold(&template.function, template.max_concurrency, &caller.name, caller.jobs_max);
        held.map_err(ApiError::TooManyJobs)
    }

    fn job(&self, template: &JobTemplate, request: &RunRequest<'_>, call: &Call) -> Result<Job, ApiError> {
        let id = self.dispatcher.new_id();
        // From acceptance until a result is no longer expected.
        let deadline = self.waits.get().job_deadline_s.map_or(self.retention, Duration::from_secs);
        let deadline =
            id.accepted_at().saturating_add(u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX));
        let traceparent =
            call.headers.traceparent.as_ref().and_then(|v| v.to_str().ok()).filter(|t| is_traceparent(t));
        let job = JobDraft { id, template, deadline, request, traceparent }.build();
        let fits = job.message.len() <= self.message_bytes_max;
        fits.then_some(job).ok_or(ApiError::BodyTooLarge { bytes_max: self.message_bytes_max })
    }

    fn wait(&self, prefer: Prefer) -> Duration {
        let waits = self.waits.get();
        Duration::from_secs(prefer.wait_s.unwrap_or(waits.sync_default_s).min(waits.sync_max_s))
    }

    async fn accept(&self, job: Job, held: Held, prefer: Prefer) -> Result<Reply, ApiError> {
        let id = job.id;
        // The 202 leaves only after the queue has confirmed the message.
        self.dispatcher.submit(job, held).await.map_err(ApiError::Submit)?;
        Ok(accepted(id, prefer))
    }

    async fn answer(&self, job: Job, held: Held, prefer: Prefer) -> Result<Reply, ApiError> {
        let id = job.id;
        let give_up = Instant::now() + self.wait(prefer);
        let mut submitted = self.dispatcher.submit_waiting(job, held).map_err(ApiError::Submit)?;
        if let Some(outcome) = confirmed_or_done(&mut submitted).await? {
            return Ok(Reply::json(StatusCode::OK, outcome.body()));
        }
        tokio::select! {
            biased;
            outcome = submitted.waiter.outcome() => match outcome {
                Some(outcome) => Ok(Reply::json(StatusCode::OK, outcome.body())),
                None => Err(ApiError::Submit(SubmitError::Unavailable)),
            },
            () = tokio::time::sleep_until(give_up) => Ok(still_running(id)),
            () = self.lifecycle.reached(Phase::Closing) => Ok(still_running(id)),
        }
    }
}

/// Waits for the queue's confirmation. A result that comes first is as good: then the queue has the job.
async fn confirmed_or_done(submitted: &mut Submitted) -> Result<Option<Outcome>, ApiError> {
    let sent = tokio::select! {
        biased;
        Some(outcome) = submitted.waiter.outcome() => return Ok(Some(outcome)),
        sent = &mut submitted.sent => sent,
    };
    match sent.unwrap_or(Err(SubmitError::Stopping)) {
        Ok(()) => Ok(None),
        Err(e) => Err(ApiError::Submit(e)),
    }
}

fn accepted(id: JobId, prefer: Prefer) -> Reply {
    let reply = later(id, format!("{{\"status\":\"ACCEPTED\",\"jobId\":\"{id}\"}}"));
    let applied = HeaderValue::from_static("respond-async");
    if prefer.respond_async { reply.with(PREFERENCE_APPLIED, applied) } else { reply }
}

/// What is left of a job whose result is no longer kept.
fn of_row(id: JobId, row: &Execution) -> Reply {
    let (function, status) = (row.function.as_str(), row.status.as_str());
    let body = json!({
        "requestId": id.to_string(), "functionId": function, "status": status, "durationMs": row.duration_ms,
        "message": row.message,
    });
    Reply::value(StatusCode::OK, &body)
}

fn still_running(id: JobId) -> Reply {
    let message = "The job is still running. Ask for its result at /status/ and its id.";
    later(id, format!("{{\"status\":\"TIMEOUT\",\"jobId\":\"{id}\",\"message\":\"{message}\"}}"))
}

/// 202 with the place of the result.
fn later(id: JobId, body: String) -> Reply {
    let reply = Reply::json(StatusCode::ACCEPTED, body);
    match HeaderValue::try_from(format!("/status/{id}")) {
        Ok(location) => reply.with(LOCATION, location),
        Err(_) => reply, // an id is always visible ASCII
    }
}

fn is_true(value: Option<&HeaderValue>) -> bool {
    value.is_some_and(|v| v.as_bytes().trim_ascii().eq_ignore_ascii_case(b"true"))
}

/// W3C Trace Context, version 00: `00-<32 hex>-<16 hex>-<2 hex>`, neither id all zeros.
fn is_traceparent(text: &str) -> bool {
    let hex = |part: &str, len: usize| {
        part.len() == len && part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    let parts: Vec<&str> = text.split('-').collect();
    let [version, trace, span, flags] = parts[..] else { return false };
    let some = |part: &str| part.bytes().any(|b| b != b'0');
    version == "00" && hex(trace, 32) && hex(span, 16) && hex(flags, 2) && some(trace) && some(span)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traceparents() {
        let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert!(is_traceparent(good));
        for bad in [
            "",
            "00",
            &good.to_uppercase(),
            &good.replace("00-0a", "ff-0a"),
            &format!("{good}-x"),
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
        ] {
            assert!(!is_traceparent(bad), "{bad}");
        }
    }
}
