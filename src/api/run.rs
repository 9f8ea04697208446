//! `POST /run`: the way every run of every function takes.

use super::once::{self, Known, Once, Turn, Watched};
use super::prefer::Prefer;
use super::{ApiError, Call, Reply};
use crate::audit::{Event, Tail};
use crate::backend::{Claim, Claimed, QueueTraits};
use crate::config::{Live, WaitsConf};
use crate::dispatch::{Dispatcher, Held, Sending, SubmitError, Submitted, Waiter};
use crate::functions::Functions;
use crate::lifecycle::{Lifecycle, Phase};
use crate::limiter::RateLimiter;
use crate::model::{
    BodyHash, Execution, FunctionId, IdempotencyKey, Job, JobDraft, JobId, JobTemplate, RunRequest, UnixMs,
    now_ms,
};
use http::StatusCode;
use http::header::{HeaderName, HeaderValue, LOCATION};
use serde_json::json;
use std::time::Duration;
use tokio::time::Instant;

/// Longest name of a model that is shown to those who look on, in characters.
const MODEL_CHARS_SHOWN: usize = 128;

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
    tail: Tail,
}

impl Run {
    #[expect(clippy::too_many_arguments, reason = "a run takes part in all of these")]
    pub fn new(
        waits: Live<WaitsConf>,
        queue: QueueTraits,
        dispatcher: Dispatcher,
        once: Once,
        functions: Functions,
        limiter: RateLimiter,
        lifecycle: Lifecycle,
        tail: Tail,
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
            tail,
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
        let Some(template) = template else {
            return Box::pin(self.answer_without_function(&request.function, call)).await;
        };
        if !call.caller.as_ref().is_none_or(|caller| caller.may_run(&template.function)) {
            return Err(ApiError::FunctionForbidden);
        }
        // Only functions that exist are counted: names made up by a client take no room.
        self.limiter.check_function(&template.function, &call.counted).await?;
        let order = Order { template: &template, request: &request, call, wish: Wish::of(call) };
        match once::key_of(&call.headers)? {
            None => {
                let id = self.dispatcher.new_id();
                let job = self.job(&order, id, id.accepted_at())?;
                self.log(&order, id, id.accepted_at());
                let held = self.hold(&order)?;
                if order.wish.asynchronous {
                    self.accept(job, held, order.wish).await
                } else {
                    self.answer(job, held, order.wish).await
                }
            }
            // In a box: requests without a key, which are most, need no room for it.
            Some(key) => {
                let key = IdempotencyKey::of(call.key_name(), key);
                Box::pin(self.carry_out_once(key, &order)).await
            }
        }
    }

    async fn carry_out_once(&self, key: IdempotencyKey, order: &Order<'_>) -> Result<Reply, ApiError> {
        let wish = order.wish;
        let id = self.dispatcher.new_id();
        let job = self.job(order, id, id.accepted_at())?;
        let body = BodyHash::of(&order.call.body);
        let claim = Claim { key, body, job: job.id, function: job.function.clone() };
        let turn = self.once.turn(&claim, self.job_lasts()).await?;
        let keyed = |job: Job| Job { idempotency_key: Some(Box::new(key)), ..job };
        match turn {
            Turn::Again(before, known) => self.answer_again(&before, known, wish).await,
            Turn::First(attempt) => {
                self.log(order, job.id, job.id.accepted_at());
                // Only now: who comes again holds no place of its own.
                let held = match self.hold(order) {
                    Ok(held) => held,
                    Err(e) => {
                        let mut released = self.once.follow(attempt, claim, Err(SubmitError::Overloaded));
                        let _ = released.outcome().await;
                        return Err(e);
                    }
                };
                let (sending, waiter) = if wish.asynchronous {
                    (self.dispatcher.submit(keyed(job), held), None)
                } else {
                    match self.dispatcher.submit_waiting(keyed(job), held) {
                        Ok(Submitted { sent, waiter }) => (Ok(sent), Some(waiter)),
                        Err(e) => (Err(e), None),
                    }
                };
                let id = claim.job;
                let watched = self.once.follow(attempt, claim, sending);
                self.answer_attempt(id, watched, waiter, wish).await
            }
            Turn::SendAgain(attempt, before, resend) => {
                let id = before.claim.job;
                self.log(order, id, now_ms());
                // The journal, and whoever has the job in its table, go by the deadline that it had at first.
                let since = if resend.is_journaled { id.accepted_at() } else { resend.since };
                let job = keyed(self.job(order, id, since)?);
                let submitted = self.dispatcher.submit_again(job, resend, !wish.asynchronous).await;
                let (sending, waiter) = match submitted {
                    Ok((sending, waiter)) => (Ok(sending), waiter),
                    Err(e) => (Err(e), None),
                };
                let watched = self.once.follow(attempt, before.claim, sending);
                self.answer_attempt(id, watched, waiter, wish).await
            }
        }
    }

    /// Answers the request whose attempt to send the job is under way.
    async fn answer_attempt(
        &self,
        id: JobId,
        mut watched: Watched,
        waiter: Option<Waiter>,
        wish: Wish,
    ) -> Result<Reply, ApiError> {
        let Some(waiter) = waiter else {
            watched.outcome().await.map_err(ApiError::Submit)?;
            return Ok(if wish.asynchronous { accepted(id, wish) } else { still_running(id, wish) });
        };
        self.answer_waiting(id, watched.outcome(), waiter, wish).await
    }

    /// A request for a function that does not exist: if it came before, when there was one, it has its answer.
    async fn answer_without_function(&self, function: &FunctionId, call: &Call) -> Result<Reply, ApiError> {
        let Some(key) = once::key_of(&call.headers)? else { return Err(ApiError::NoSuchFunction) };
        if !call.caller.as_ref().is_none_or(|caller| caller.may_run(function)) {
            return Err(ApiError::NoSuchFunction);
        }
        let key = IdempotencyKey::of(call.key_name(), key);
        match self.once.before(key, BodyHash::of(&call.body)).await? {
            Some((before, known)) => self.answer_again(&before, known, Wish::of(call)).await,
            None => Err(ApiError::NoSuchFunction),
        }
    }

    /// Answers a request that came before with what its job has come to.
    async fn answer_again(&self, before: &Claimed, known: Known, wish: Wish) -> Result<Reply, ApiError> {
        let id = before.claim.job;
        let mut pending = match known {
            // It ended as LOST, and nobody knows that the queue ever had it: no 202 for that.
            Known::Result(lost) if lost.is_unconfirmed() && !before.is_sent => {
                return Ok(Reply::json(StatusCode::OK, lost.body()));
            }
            Known::Ended(row) if row.is_lost() && !before.is_sent => return Ok(of_row(id, &row)),
            _ if wish.asynchronous => return Ok(accepted(id, wish)),
            Known::Result(outcome) => return Ok(Reply::json(StatusCode::OK, outcome.body())),
            Known::Ended(row) => return Ok(of_row(id, &row)),
            Known::Pending(None) => return Ok(still_running(id, wish)),
            Known::Pending(Some(pending)) => pending,
        };
        tokio::select! {
            biased;
            outcome = pending.outcome() => Ok(match outcome {
                Some(outcome) => Reply::json(StatusCode::OK, outcome.body()),
                None => still_running(id, wish),
            }),
            () = tokio::time::sleep(self.wait(wish.prefer)) => Ok(self.timed_out(id, wish)),
            () = self.lifecycle.reached(Phase::Closing) => Ok(still_running(id, wish)),
        }
    }

    /// The places that a job needs, if its function or its key have caps.
    fn hold(&self, order: &Order<'_>) -> Result<Held, ApiError> {
        let Some(caller) = &order.call.caller else { return Ok(Held::new()) };
        let template = order.template;
        let held =
            self.dispatcher.hold(&template.function, template.max_concurrency, &caller.name, caller.jobs_max);
        held.map_err(ApiError::TooManyJobs)
    }

    /// From acceptance until a result is no longer expected.
    fn job_lasts(&self) -> Duration {
        self.waits.get().job_deadline_s.map_or(self.retention, Duration::from_secs)
    }

    /// `since`: when its time begins, in Unix milliseconds.
    fn job(&self, order: &Order<'_>, id: JobId, since: UnixMs) -> Result<Job, ApiError> {
        let lasts = u64::try_from(self.job_lasts().as_millis()).unwrap_or(u64::MAX);
        let deadline = since.saturating_add(lasts);
        let traceparent = order.call.headers.traceparent.as_ref();
        let traceparent = traceparent.and_then(|v| v.to_str().ok()).filter(|t| is_traceparent(t));
        let (template, request) = (order.template, order.request);
        let job = JobDraft { id, template, deadline, request, traceparent }.build();
        let fits = job.message.len() <= self.message_bytes_max;
        fits.then_some(job).ok_or(ApiError::BodyTooLarge { bytes_max: self.message_bytes_max })
    }

    fn wait(&self, prefer: Prefer) -> Duration {
        let waits = self.waits.get();
        Duration::from_secs(prefer.wait_s.unwrap_or(waits.sync_default_s).min(waits.sync_max_s))
    }

    async fn accept(&self, job: Job, held: Held, wish: Wish) -> Result<Reply, ApiError> {
        let id = job.id;
        // The 202 leaves only after the queue has confirmed the message.
        let sending = self.dispatcher.submit(job, held).map_err(ApiError::Submit)?;
        outcome_of(sending).await.map_err(ApiError::Submit)?;
        Ok(accepted(id, wish))
    }

    async fn answer(&self, job: Job, held: Held, wish: Wish) -> Result<Reply, ApiError> {
        let id = job.id;
        let Submitted { sent, waiter } =
            self.dispatcher.submit_waiting(job, held).map_err(ApiError::Submit)?;
        self.answer_waiting(id, outcome_of(sent), waiter, wish).await
    }

    /// Waits for the queue's confirmation, and then for the result.
    async fn answer_waiting(
        &self,
        id: JobId,
        sent: impl Future<Output = Result<(), SubmitError>>,
        mut waiter: Waiter,
        wish: Wish,
    ) -> Result<Reply, ApiError> {
        let give_up = Instant::now() + self.wait(wish.prefer);
        // A result that comes first is as good: then the queue has the job.
        tokio::select! {
            biased;
            Some(outcome) = waiter.outcome() => return Ok(Reply::json(StatusCode::OK, outcome.body())),
            sent = sent => sent.map_err(ApiError::Submit)?,
        }
        tokio::select! {
            biased;
            outcome = waiter.outcome() => match outcome {
                Some(outcome) => Ok(Reply::json(StatusCode::OK, outcome.body())),
                // It ended as the waiter came, or too many wait.
                None => Ok(still_running(id, wish)),
            },
            () = tokio::time::sleep_until(give_up) => Ok(self.timed_out(id, wish)),
            () = self.lifecycle.reached(Phase::Closing) => Ok(still_running(id, wish)),
        }
    }

    fn log(&self, order: &Order<'_>, id: JobId, at: UnixMs) {
        let (function, is_async) = (&order.template.function, order.wish.asynchronous);
        let mode = mode_of(is_async);
        tracing::info!(requestId = %id, functionId = %function, mode, "Run Request");
        self.tail.note(at, || {
            let model = order.request.model().chars().take(MODEL_CHARS_SHOWN).collect();
            Event::Requested { id, function: function.clone(), model, is_async }
        });
    }

    /// The wait has ended before the job.
    fn timed_out(&self, id: JobId, wish: Wish) -> Reply {
        self.tail.note(now_ms(), || Event::WaitTimedOut(id));
        still_running(id, wish)
    }
}

/// What the log and the list of events call it.
pub fn mode_of(is_async: bool) -> &'static str {
    if is_async { "ASYNC" } else { "SYNC" }
}

/// A request for a run that may be carried out.
struct Order<'a> {
    template: &'a JobTemplate,
    request: &'a RunRequest<'a>,
    call: &'a Call,
    wish: Wish,
}

/// How the client would be answered.
#[derive(Clone, Copy)]
struct Wish {
    prefer: Prefer,
    asynchronous: bool,
    /// Of the path that it used.
    prefix: &'static str,
}

impl Wish {
    fn of(call: &Call) -> Self {
        let prefer = Prefer::of(&call.headers.prefer);
        let asynchronous = prefer.respond_async || is_true(call.headers.x_async.as_ref());
        Self { prefer, asynchronous, prefix: call.prefix() }
    }
}

/// The loop answers every job; a closed channel means that it was stopped.
async fn outcome_of(sending: Sending) -> Result<(), SubmitError> {
    sending.await.unwrap_or(Err(SubmitError::Stopping))
}

fn accepted(id: JobId, wish: Wish) -> Reply {
    let reply = later(id, wish, format!("{{\"status\":\"ACCEPTED\",\"jobId\":\"{id}\"}}"));
    let applied = HeaderValue::from_static("respond-async");
    if wish.prefer.respond_async { reply.with(PREFERENCE_APPLIED, applied) } else { reply }
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

fn still_running(id: JobId, wish: Wish) -> Reply {
    let message = "The job is still running. Ask for its result at /status/ and its id.";
    later(id, wish, format!("{{\"status\":\"TIMEOUT\",\"jobId\":\"{id}\",\"message\":\"{message}\"}}"))
}

/// 202 with the place of the result, under the prefix that the client used: the other may lead nowhere
/// through its proxy.
fn later(id: JobId, wish: Wish, body: String) -> Reply {
    let reply = Reply::json(StatusCode::ACCEPTED, body);
    match HeaderValue::try_from(format!("{}/status/{id}", wish.prefix)) {
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
