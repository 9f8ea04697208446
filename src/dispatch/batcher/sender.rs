//! Sends the batches of the loop, and decides what becomes of each job.

use super::steps;
use crate::backend::{BackendError, JobQueue, SendError};
use crate::backoff::Backoff;
use crate::dispatch::breaker::Breaker;
use crate::dispatch::in_flight::{InFlight, SendEvidence};
use crate::dispatch::journal::NodeJournal;
use crate::dispatch::shedder::Shedder;
use crate::log::within_trace;
use crate::metrics::Metrics;
use crate::model::{FunctionId, Job, now_ms};
use crate::traces::Traces;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// The pauses before retries of a job.
pub const RETRIES: Backoff = Backoff::new(Duration::from_millis(25), Duration::from_secs(1));
/// Why no further attempt is made for a job that ended as LOST meanwhile.
const LOST: &str = "the deadline of the job has passed";

/// Why a job is not known to be on the queue.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    #[error("too many jobs wait to be sent")]
    Overloaded,
    #[error("the queue rejected the job")]
    Refused,
    #[error("the queue is not available")]
    Unavailable,
    /// The job may still run.
    #[error("the queue did not answer in time")]
    Unknown,
    #[error("the server is stopping")]
    Stopping,
}

/// A job that waits to be sent.
pub struct PendingSend {
    pub job: Job,
    pub done: oneshot::Sender<Result<(), SubmitError>>,
    pub give_up: Instant,
    pub attempts: u32,
    /// The job is in the journal. It must not enter twice, or the entry could outlive the job.
    pub journaled: bool,
    /// An attempt may have put the job on the queue.
    pub maybe_sent: bool,
    /// The job was sent before, by this or another process, with an unknown result.
    pub is_resend: bool,
}

/// The dependencies of a send.
pub struct BatchSender {
    pub queue: Arc<dyn JobQueue>,
    pub journal: Arc<NodeJournal>,
    pub in_flight: Arc<InFlight>,
    pub breaker: Arc<Breaker>,
    pub shedder: Arc<Shedder>,
    pub traces: Traces,
    pub metrics: Arc<Metrics>,
}

/// What remains to be done after a batch was sent.
pub struct BatchOutcome {
    pub functions: Vec<FunctionId>,
    pub again: Vec<PendingSend>,
}

impl BatchSender {
    pub async fn send(self: Arc<Self>, batch: Vec<PendingSend>) -> BatchOutcome {
        let functions = batch.iter().map(|pending| pending.job.function.clone()).collect();
        let mut tried = BatchOutcome { functions, again: Vec::new() };
        // The result of a retried job may have arrived meanwhile: then only the queue's answer was late.
        let mut awaited = Vec::with_capacity(batch.len());
        for pending in batch {
            match self.fate(&pending) {
                SendEvidence::Awaited => awaited.push(pending),
                SendEvidence::HasResult => self.sent(pending),
                SendEvidence::Lost => self.give_up_lost(pending),
            }
        }
        let mut batch = awaited;
        if batch.is_empty() {
            return tried;
        }
        let jobs: Vec<Job> = batch.iter().map(|pending| pending.job.clone()).collect();
        self.metrics.batch_jobs.observe(jobs.len() as f64);
        let span = self.traces.begin_send(&jobs);
        let started = Instant::now();
        let results = match self.enter(&mut batch).await {
            Ok(()) => self.send_now(&jobs).await,
            Err(e) => vec![Err(SendError::NotSent(format!("journal: {e}"))); jobs.len()],
        };
        self.metrics.send_seconds.observe(started.elapsed().as_secs_f64());
        if let Some(span) = span {
            let error = results.iter().find_map(|result| result.as_ref().err());
            self.traces.end_send(span, error.map(SendError::kind));
        }
        // A rejected job counts as an answer of the queue.
        if results.iter().any(|result| matches!(result, Ok(()) | Err(SendError::Refused(_)))) {
            self.breaker.succeeded();
            let youngest = jobs.iter().map(|job| job.id.accepted_at()).max().unwrap_or_default();
            self.shedder.confirmed(Duration::from_millis(now_ms().saturating_sub(youngest)));
        } else {
            self.breaker.failed();
        }
        let again =
            batch.into_iter().zip(results).filter_map(|(pending, result)| self.after_try(pending, result));
        tried.again.extend(again);
        tried
    }

    /// Sends a batch, and records when.
    async fn send_now(&self, jobs: &[Job]) -> Vec<Result<(), SendError>> {
        steps::note_sent(jobs);
        let results = self.queue.send_batch(jobs).await;
        steps::note_answered(jobs, &results);
        results
    }

    /// Enters those jobs in the journal that are not in it yet.
    async fn enter(&self, batch: &mut [PendingSend]) -> Result<(), BackendError> {
        let new: Vec<Job> =
            batch.iter().filter(|pending| !pending.journaled).map(|pending| pending.job.clone()).collect();
        if !new.is_empty() {
            self.journal.enter(&new).await?;
        }
        batch.iter_mut().for_each(|pending| pending.journaled = true);
        Ok(())
    }

    fn fate(&self, pending: &PendingSend) -> SendEvidence {
        self.in_flight.fate(pending.job.id)
    }

    fn sent(&self, pending: PendingSend) {
        self.metrics.jobs_sent.inc();
        if pending.is_resend {
            self.in_flight.note_send(pending.job.id, true);
        }
        let _ = pending.done.send(Ok(())); // the caller may be gone
    }

    /// Handles the result of an attempt. Returns the job if it is to be retried.
    fn after_try(&self, mut pending: PendingSend, result: Result<(), SendError>) -> Option<PendingSend> {
        pending.attempts += 1;
        let error = match (result, self.fate(&pending)) {
            (Err(e), SendEvidence::Awaited) => e,
            (Err(_), SendEvidence::Lost) => {
                self.give_up_lost(pending);
                return None;
            }
            // A result proves that the queue had the job, whatever the queue answered.
            (Ok(()), _) | (Err(_), SendEvidence::HasResult) => {
                self.sent(pending);
                return None;
            }
        };
        pending.maybe_sent |= matches!(error, SendError::Unknown(_));
        let refused = matches!(error, SendError::Refused(_));
        let in_time = Instant::now() + RETRIES.pause(pending.attempts) < pending.give_up;
        if !refused && in_time {
            self.metrics.sends.with_label_values(&["retried"]).inc();
            return Some(pending);
        }
        self.give_up(pending, &error);
        None
    }

    /// Ends the attempts for a job that ended as LOST meanwhile and has its row.
    fn give_up_lost(&self, pending: PendingSend) {
        self.give_up(PendingSend { maybe_sent: true, ..pending }, &SendError::Unknown(LOST.into()));
    }

    /// Ends a job that was not sent, as far as is known.
    pub fn give_up(&self, pending: PendingSend, error: &SendError) {
        let refused = matches!(error, SendError::Refused(_));
        // A resent job may belong to another node. Once it is in that node's journal, others may have taken
        // it over and wait for its result, so it must not be withdrawn.
        let is_kept = pending.maybe_sent || pending.is_resend && pending.journaled;
        let (outcome, reply) = match (refused, is_kept) {
            (_, true) => ("unknown", SubmitError::Unknown),
            (true, false) => ("refused", SubmitError::Refused),
            (false, false) => ("not_sent", SubmitError::Unavailable),
        };
        self.metrics.sends.with_label_values(&[outcome]).inc();
        within_trace(pending.job.trace.as_ref(), || {
            tracing::warn!(
                requestId = %pending.job.id,
                functionId = %pending.job.function,
                attempts = pending.attempts,
                error = %error,
                "Sending a job to the queue failed"
            );
        });
        if is_kept {
            // The job stays in flight until its result or its deadline ends it.
            self.in_flight.note_send(pending.job.id, false);
        } else if pending.job.idempotency_key.is_none() {
            let must_stay = self.in_flight.remove_unsent(pending.job.id);
            self.journal.leave_unsent(pending.job.id, must_stay);
        } else {
            self.in_flight.note_unsent(pending.job.id);
        }
        // A job with an idempotency key is removed when its key is released; until then a repeat may resend
        // it.
        let _ = pending.done.send(Err(reply));
    }
}
