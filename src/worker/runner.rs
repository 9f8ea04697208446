//! One job: runs its function, and hands the result on.

use super::function_runner::{FunctionRunner, NotRun};
use super::message::{Message, MessageTrace};
use super::monitor::RunUsage;
use super::result::RunResult;
use super::run_end::RunEnd;
use crate::backend::{BackendError, JobSource, ReceivedJob, WorkerActivity, WorkerPart};
use crate::backoff::Backoff;
use crate::log::LogContext;
use crate::metrics::WorkerMetrics;
use crate::model::{Runtime, now_ms};
use crate::traces::{ProcessEnd, ProcessSpan, Traces};
use bytes::Bytes;
use futures_util::FutureExt;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

/// The pauses between attempts to record the state of a job.
const RETRIES: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));

/// The parts that all jobs share.
pub(super) struct Runner {
    pub(super) jobs: Arc<dyn JobSource>,
    pub(super) functions: FunctionRunner,
    pub(super) activity: Arc<WorkerActivity>,
    pub(super) traces: Traces,
    pub(super) metrics: Arc<WorkerMetrics>,
    pub(super) worker_id: String,
}

/// How the work on a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RunEnded {
    /// The job has left the queue.
    Finished,
    /// The job was not run, and stays on the queue. It is delivered again when its lease ends. It is not
    /// given back: it would return at once, and soon be delivered so often that the queue gives it up.
    Unfinished,
}

/// Why a job has no result.
enum NotExecuted {
    /// This worker cannot run it now. Another one might.
    Away(String),
    /// Its deadline has passed.
    Expired,
}

impl Runner {
    /// Runs a job and removes it from the queue. Retries until that is written, because nothing else would.
    pub(super) async fn settle(self: Arc<Self>, job: Arc<ReceivedJob>, gauge: Arc<RunUsage>) -> RunEnded {
        let span = self.traces.begin_process(|| {
            let MessageTrace { context, state } = MessageTrace::of(&job.message);
            (context, state)
        });
        match &span {
            None => self.work(&job, &gauge, None).await,
            Some(span) => {
                let work = self.work(&job, &gauge, Some(span));
                LogContext::new(span.context, None).scope(Box::pin(work)).await
            }
        }
    }

    /// `span`: the span of the run, if it is recorded. A job that is not run has none.
    async fn work(&self, job: &ReceivedJob, gauge: &RunUsage, span: Option<&ProcessSpan>) -> RunEnded {
        if job.deadline <= now_ms() {
            return self.drop_expired(job).await;
        }
        let result = match self.has_ended_us(job) {
            Some(reason) => {
                let memory_mb = Message::memory_mb_of(&job.message);
                RunResult::failed(job, &self.worker_id, Some(memory_mb), reason).to_json()
            }
            None => {
                until_written(|| self.jobs.start(job), |_| {}).await;
                match self.execute(job, gauge, span).await {
                    Ok(result) => result,
                    Err(NotExecuted::Expired) => return self.drop_expired(job).await,
                    Err(NotExecuted::Away(reason)) => {
                        tracing::warn!(
                            job = job.request_id,
                            function = job.function,
                            reason,
                            "Job not run; it stays on the queue until its lease ends"
                        );
                        return RunEnded::Unfinished;
                    }
                }
            }
        };
        gauge.rest();
        let note = |outcome: &Result<(), BackendError>| {
            self.activity.note(WorkerPart::Results, outcome.is_ok());
            if outcome.is_err() {
                self.metrics.jobs.results_retried.inc();
            }
        };
        until_written(|| self.jobs.finish(job, result.clone()), note).await;
        RunEnded::Finished
    }

    async fn drop_expired(&self, job: &ReceivedJob) -> RunEnded {
        let (job_id, function) = (&job.request_id, &job.function);
        tracing::warn!(job = job_id, function, "Job dropped: its deadline has passed");
        self.metrics.jobs.expired.inc();
        until_written(|| self.jobs.discard(job), |_| {}).await;
        RunEnded::Finished
    }

    /// The error of a job that was started too often. `None`: it may start.
    fn has_ended_us(&self, job: &ReceivedJob) -> Option<String> {
        let starts_max = self.jobs.traits().starts_max?;
        let reason = || {
            format!(
                "the run was started {starts_max} times, and each time the worker was killed before the run \
                 ended; the function may be the cause"
            )
        };
        (job.starts >= starts_max).then(reason)
    }

    /// Runs the function of a job. Returns the result as JSON.
    ///
    /// # Errors
    /// If the job has no result.
    async fn execute(
        &self,
        job: &ReceivedJob,
        gauge: &RunUsage,
        span: Option<&ProcessSpan>,
    ) -> Result<Bytes, NotExecuted> {
        let message = match Message::parse(&job.message) {
            Ok(message) => message,
            Err(reason) => return Ok(RunResult::failed(job, &self.worker_id, None, reason).to_json()),
        };
        let memory_mb = message.memory_mb;
        let context = span.map(|span| span.context).or_else(|| message.trace());
        let failed = |reason, error| {
            self.end_span(span, job, &message, (None, Some(error)));
            let result = RunResult::failed(job, &self.worker_id, Some(memory_mb), reason);
            Ok(result.with_trace(context).to_json())
        };
        // A panic must not become a job that is delivered again and again.
        let ran = AssertUnwindSafe(self.functions.run(job, &message, gauge)).catch_unwind().await;
        match ran {
            Ok(Ok(ended)) => {
                self.count(&message, &ended);
                self.end_span(span, job, &message, (Some(ended.is_cold), ended.error_type()));
                let result = RunResult::ended(job, &self.worker_id, memory_mb, ended);
                Ok(result.with_trace(context).to_json())
            }
            Ok(Err(NotRun::Failed(reason))) => failed(reason, "not_started"),
            // Without leases there is no other worker, and nobody would deliver the job again.
            Ok(Err(NotRun::Away(reason))) if self.jobs.traits().lease.is_none() => {
                failed(reason, "not_started")
            }
            Ok(Err(NotRun::Away(reason))) => Err(NotExecuted::Away(reason)),
            Ok(Err(NotRun::Expired)) => Err(NotExecuted::Expired),
            Err(_) => {
                tracing::error!(job = job.request_id, function = job.function, "Run failed: a task panicked");
                failed("the worker failed while it ran the function".to_owned(), "panic")
            }
        }
    }

    fn end_span(
        &self,
        span: Option<&ProcessSpan>,
        job: &ReceivedJob,
        message: &Message<'_>,
        (is_cold, error): (Option<bool>, Option<&'static str>),
    ) {
        let Some(span) = span else { return };
        let end = ProcessEnd {
            request_id: &job.request_id,
            function: &job.function,
            version: message.config_version,
            memory_mb: message.memory_mb,
            worker_id: &self.worker_id,
            is_cold,
            error,
        };
        self.traces.end_process(span, &end);
    }

    fn count(&self, message: &Message<'_>, ended: &RunEnd) {
        let runtime = Runtime::parse(&message.runtime);
        self.metrics.runs.ended(runtime, ended.is_success(), ended.duration);
        if let Some(stopped) = ended.stopped {
            self.metrics.runs.stopped(stopped.kind());
        }
    }
}

/// Repeats a write until it succeeds. Logs the first error only. `note` gets the outcome of each attempt.
async fn until_written<F: Future<Output = Result<(), BackendError>>>(
    write: impl Fn() -> F,
    note: impl Fn(&Result<(), BackendError>),
) {
    let mut attempt = 0;
    loop {
        let outcome = write().await;
        note(&outcome);
        let Err(error) = outcome else { return };
        attempt += 1;
        if attempt == 1 {
            tracing::warn!(%error, "State of a job not written; retrying");
        }
        RETRIES.sleep(attempt).await;
    }
}
