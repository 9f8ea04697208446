//! Requests that are carried out once: `Idempotency-Key` (draft-ietf-httpapi-idempotency-key-header).
//!
//! A request claims its key for its job before the job is sent. A later request with the key and the same body finds
//! that job, wherever it is: its result with the claim, its result or the job itself in flight on any node, or its row.
//!
//! A claim, a journal entry or an entry in flight is no proof that the queue has the job. Until the claim says that the
//! queue confirmed it, a repeated request waits for the outcome of the attempt that is under way, and answers as the
//! first request does. If nobody can know that outcome (the queue did not answer, or the node died), the repeated
//! request claims the next attempt and sends the same body again, under the same job id. So one key has one job id and
//! one row; a second message goes out only where the outcome of the first send was never known.
//!
//! ```text
//! claim ─ none before ──────────────────────────────→ first: send
//!       └ before ─ confirmed, or a result, or a row ─→ answer
//!                ├ attempt under way ────────────────→ wait for its outcome, look again
//!                ├ released ─────────────────────────→ 503, as the first
//!                └ attempt is over, outcome unknown ──→ claim the next attempt: send again
//! ```

use super::error::RunError;
use crate::backend::{Backend, BackendError, Claim, Claimed, Claims, ExecutionStore, Standing};
use crate::config::{BatchConf, Live};
use crate::dispatch::{Dispatcher, JobState, Pending, PendingJob, Resend, Sending, SubmitError};
use crate::lifecycle::{Lifecycle, Phase};
use crate::metrics::Metrics;
use crate::model::{BodyHash, Execution, IdempotencyKey, JobId, Outcome, now_ms};
use dashmap::DashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

/// Pauses between two looks at a claim while another node sends its job: doubled from the first to the longest.
const LOOK_PAUSE_FIRST: Duration = Duration::from_millis(100);
const LOOK_PAUSE_MAX: Duration = Duration::from_secs(1);
/// Beyond its deadline: how long a send may still be under way, and how far the clocks of nodes may differ.
const SEND_MARGIN: Duration = Duration::from_secs(5);
/// Pauses between tries to write the outcome of an attempt to its claim: doubled from the first to the longest.
const NOTE_PAUSE_FIRST: Duration = Duration::from_millis(100);
const NOTE_PAUSE_MAX: Duration = Duration::from_secs(5);

/// What is known of the job of a request that came before.
pub enum KnownState {
    Result(Outcome),
    /// The queue has, or had, the job.
    Pending(Option<PendingJob>),
    /// It has ended, and its result is no longer kept.
    Ended(Box<Execution>),
}

/// What a request is to do.
pub enum ClaimOutcome {
    /// The request is the first of its key: it sends its job.
    First(Attempt),
    /// It came before.
    Repeated(Box<Claimed>, KnownState),
    /// It came before, and nobody can know whether the queue has its job: it sends that job again.
    Resend(Attempt, Box<Claimed>, Resend),
}

/// What became of an attempt. `None`: it is under way.
type AttemptOutcome = Option<Result<(), SubmitError>>;

/// The attempts that this process makes now. As many as there are requests with a key under way.
type Attempts = DashMap<JobId, watch::Receiver<AttemptOutcome>>;

/// An attempt of this process to send a job. Requests with the same key wait for its outcome. It is registered before
/// it is claimed, so that no request of this process takes a claim for one that nobody works on.
pub struct Attempt {
    id: JobId,
    /// If it fails the queue certainly does not have the job.
    is_first: bool,
    outcome: watch::Sender<AttemptOutcome>,
    attempts: Arc<Attempts>,
}

impl Drop for Attempt {
    fn drop(&mut self) {
        self.attempts.remove(&self.id);
    }
}

/// Hears what becomes of an attempt.
pub struct AttemptWatcher(watch::Receiver<AttemptOutcome>);

impl AttemptWatcher {
    pub async fn outcome(&mut self) -> Result<(), SubmitError> {
        let outcome = self.0.wait_for(Option::is_some).await.ok().and_then(|outcome| outcome.clone());
        outcome.unwrap_or(Err(SubmitError::Unknown))
    }
}

/// Cheap to clone.
#[derive(Clone)]
pub struct Idempotency(Arc<Inner>);

struct Inner {
    claims: Arc<dyn Claims>,
    executions: Arc<dyn ExecutionStore>,
    dispatcher: Dispatcher,
    batch: Live<BatchConf>,
    lifecycle: Lifecycle,
    metrics: Arc<Metrics>,
    attempts: Arc<Attempts>,
}

impl Idempotency {
    pub fn new(
        backend: &Backend,
        dispatcher: Dispatcher,
        batch: Live<BatchConf>,
        lifecycle: Lifecycle,
        metrics: Arc<Metrics>,
    ) -> Self {
        let (claims, executions) = (Arc::clone(&backend.claims), Arc::clone(&backend.executions));
        let attempts = Arc::default();
        Self(Arc::new(Inner { claims, executions, dispatcher, batch, lifecycle, metrics, attempts }))
    }

    /// Claims the key, or finds the job that has it and waits until it is known what became of its send. A job lasts
    /// `job_lasts` from when it was accepted.
    pub async fn claim(&self, claim: &Claim, job_lasts: Duration) -> Result<ClaimOutcome, RunError> {
        let attempt = self.begin(claim.job, true);
        let Some(mut before) = self.0.claims.claim(claim).await.map_err(unavailable)? else {
            self.count("new");
            return Ok(ClaimOutcome::First(attempt));
        };
        drop(attempt);
        let started = Instant::now();
        let mut pause = LOOK_PAUSE_FIRST;
        loop {
            if before.claim.body != claim.body {
                self.count("reused");
                return Err(RunError::KeyReused);
            }
            if let Some(known) = self.known(&before).await.map_err(unavailable)? {
                self.count("repeated");
                return Ok(ClaimOutcome::Repeated(Box::new(before), known));
            }
            if let Some(mut attempt) = self.watched(before.attempt) {
                match attempt.outcome().await {
                    Ok(()) => {
                        before.is_sent = true;
                        continue;
                    }
                    Err(SubmitError::Unknown) => {}
                    Err(e) => return Err(RunError::Submit(e)),
                }
            }
            if self.may_send_again(&before, job_lasts).await? {
                if let Some(turn) = self.send_again(&before).await? {
                    return Ok(turn);
                }
            } else if started.elapsed() > 2 * self.attempt_max() {
                // By the clocks of the nodes it is younger than it can be, or nobody ends a job that is over.
                return Err(RunError::AttemptUnresolved);
            } else {
                tokio::select! {
                    () = sleep(pause) => pause = (2 * pause).min(LOOK_PAUSE_MAX),
                    () = self.0.lifecycle.reached(Phase::Closing) => {
                        return Err(RunError::Submit(SubmitError::Stopping));
                    }
                }
            }
            let found = self.0.claims.find(&claim.key).await.map_err(unavailable)?;
            // Released: its send has definitely failed.
            before = found.ok_or(RunError::Submit(SubmitError::Unavailable))?;
        }
    }

    /// Whether the last attempt is over, and another one may come.
    async fn may_send_again(&self, before: &Claimed, job_lasts: Duration) -> Result<bool, RunError> {
        if self.0.attempts.contains_key(&before.attempt) || !self.is_over(before.attempt) {
            return Ok(false);
        }
        // A worker drops what is past its deadline. Whoever has the job in its table ends it as lost; a job that nobody
        // has is sent with a new deadline.
        let job = before.claim.job;
        if age(job) <= job_lasts {
            return Ok(true);
        }
        let standing = self.0.dispatcher.standing(job).await.map_err(unavailable)?;
        Ok(!standing.is_held() && !self.0.dispatcher.is_in_flight(job))
    }

    /// The answer to a request whose function is gone, if it came before.
    pub async fn find(
        &self,
        key: IdempotencyKey,
        body: BodyHash,
    ) -> Result<Option<(Box<Claimed>, KnownState)>, RunError> {
        let Some(before) = self.0.claims.find(&key).await.map_err(unavailable)? else { return Ok(None) };
        if before.claim.body != body {
            return Err(RunError::KeyReused);
        }
        if let Some(mut attempt) = self.watched(before.attempt) {
            attempt.outcome().await.map_err(RunError::Submit)?;
            return Ok(Some((Box::new(Claimed { is_sent: true, ..before }), KnownState::Pending(None))));
        }
        // It was there when the request came first, so it is not said to be missing.
        let known = self.known(&before).await.map_err(unavailable)?.ok_or(RunError::Submit(SubmitError::Unknown))?;
        Ok(Some((Box::new(before), known)))
    }

    /// Claims the next attempt. `None`: another request was faster, or the outcome of the last one is known by now.
    async fn send_again(&self, before: &Claimed) -> Result<Option<ClaimOutcome>, RunError> {
        let id = before.claim.job;
        let attempt_id = self.0.dispatcher.new_id();
        let mut attempt = self.begin(attempt_id, false);
        if !self.0.claims.try_again(before, attempt_id).await.map_err(unavailable)? {
            return Ok(None);
        }
        // In this order: a job leaves the table and the journal after its row is written.
        let is_here = self.0.dispatcher.is_in_flight(id);
        let standing = self.0.dispatcher.standing(id).await.map_err(unavailable)?;
        if let Some(known) = self.known(before).await.map_err(unavailable)? {
            self.count("repeated");
            return Ok(Some(ClaimOutcome::Repeated(Box::new(before.clone()), known)));
        }
        let is_journaled = standing.is_held();
        let maybe_sent = is_here || standing != Standing::Absent;
        attempt.is_first = !maybe_sent;
        self.count(if maybe_sent { "sent_again" } else { "taken_over" });
        tracing::info!(requestId = %id, journaled = is_journaled, "Unconfirmed Job Sent Again");
        let resend = Resend { since: attempt_id.accepted_at(), is_journaled, maybe_sent };
        Ok(Some(ClaimOutcome::Resend(attempt, Box::new(before.clone()), resend)))
    }

    fn begin(&self, id: JobId, is_first: bool) -> Attempt {
        let (outcome, watched) = watch::channel(None);
        self.0.attempts.insert(id, watched);
        Attempt { id, is_first, outcome, attempts: Arc::clone(&self.0.attempts) }
    }

    /// An attempt that this process makes.
    fn watched(&self, attempt: JobId) -> Option<AttemptWatcher> {
        self.0.attempts.get(&attempt).map(|watched| AttemptWatcher(watched.clone()))
    }

    /// Whether an attempt that this process does not make can no longer be under way.
    fn is_over(&self, attempt: JobId) -> bool {
        // One of this node is over at once: an earlier process of it has ended.
        self.0.dispatcher.is_own(attempt) || age(attempt) > self.attempt_max()
    }

    /// Longest time that a send can be under way.
    fn attempt_max(&self) -> Duration {
        Duration::from_millis(self.0.batch.get().send_deadline_ms) + SEND_MARGIN
    }

    /// `None`: nothing says that the queue has the job.
    async fn known(&self, before: &Claimed) -> Result<Option<KnownState>, BackendError> {
        if let Some(result) = &before.result {
            return Ok(Some(KnownState::Result(Outcome::new(result.clone()))));
        }
        let Claim { job, function, .. } = &before.claim;
        let place = match self.0.dispatcher.state(*job).await? {
            JobState::Done(outcome) => return Ok(Some(KnownState::Result(outcome))),
            JobState::Pending(Pending { place, .. }) => place,
            JobState::Unknown => None,
        };
        // A job that its node has ended stays in the journal for a moment: with its row, though nobody publishes its
        // result any more.
        if place.as_ref().is_none_or(PendingJob::is_foreign)
            && let Some(row) = self.0.executions.get(function, &job.to_string()).await?
        {
            return Ok(Some(KnownState::Ended(Box::new(row))));
        }
        // One that was sent, and of which only the memory is gone, must not be sent again.
        Ok(before.is_sent.then_some(KnownState::Pending(place)))
    }

    /// Follows an attempt to its end, also if its client leaves, and writes its outcome to the claim: before those who
    /// wait hear of it, if the claim can be written.
    pub fn follow(
        &self,
        mut attempt: Attempt,
        claim: Claim,
        sending: Result<Sending, SubmitError>,
    ) -> AttemptWatcher {
        let watched = AttemptWatcher(attempt.outcome.subscribe());
        let this = self.clone();
        // The process does not end before the outcome has been written, or could not be.
        let counted = self.0.lifecycle.request();
        #[expect(
            clippy::disallowed_methods,
            reason = "an attempt outlives its client; there are as many as keyed jobs in flight, and each ends with its job"
        )]
        tokio::spawn(async move {
            let sent = match sending {
                // A closed channel means that the loop was stopped in the middle.
                Ok(sending) => sending.await.unwrap_or(Err(SubmitError::Unknown)),
                Err(e) => Err(e),
            };
            let mut noted = this.note(&claim, &mut attempt, &sent).await;
            if let Err(e) = &noted {
                tracing::warn!(requestId = %claim.job, error = %e, "Idempotency Key Not Updated");
            }
            attempt.outcome.send_replace(Some(sent.clone()));
            drop(counted);
            let mut pause = NOTE_PAUSE_FIRST;
            // Bounded by the job: it ends by a result or at its deadline, and the claim with it.
            while noted.is_err() && this.0.dispatcher.is_in_flight(claim.job) {
                sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
                pause = (2 * pause).min(NOTE_PAUSE_MAX);
                noted = this.note(&claim, &mut attempt, &sent).await;
            }
        });
        watched
    }

    /// An error: the claim could not be written.
    async fn note(
        &self,
        claim: &Claim,
        attempt: &mut Attempt,
        sent: &Result<(), SubmitError>,
    ) -> Result<(), BackendError> {
        match sent {
            Ok(()) => self.0.claims.confirm(claim).await,
            // The job may be on the queue.
            Err(SubmitError::Unknown) => Ok(()),
            Err(_) if !attempt.is_first => Ok(()),
            Err(_) => self.release(claim, attempt).await,
        }
    }

    /// Frees the key of a job that is certainly not on the queue. The job leaves the journal first: if this process
    /// ends in between, a repeated request finds the claim, and sends the job under its id. The other way round the
    /// journal would hold a job whose key another one has.
    async fn release(&self, claim: &Claim, attempt: &mut Attempt) -> Result<(), BackendError> {
        let dispatcher = &self.0.dispatcher;
        // Until the key is free no other request may take this attempt for one that is over.
        let renewed = dispatcher.new_id();
        let before = Claimed { claim: claim.clone(), attempt: attempt.id, is_sent: false, result: None };
        self.0.attempts.insert(renewed, attempt.outcome.subscribe());
        let is_renewed = self.0.claims.try_again(&before, renewed).await;
        let is_claimed = matches!(is_renewed, Ok(true));
        let unused = if is_claimed { std::mem::replace(&mut attempt.id, renewed) } else { renewed };
        self.0.attempts.remove(&unused);
        if is_renewed? {
            dispatcher.leave_journal(claim.job).await?;
            if self.0.claims.release(claim, attempt.id).await? {
                dispatcher.withdraw(claim.job);
                return Ok(());
            }
        }
        // Either another request sends the job again by now, or an earlier call has done it and was not answered.
        match self.0.claims.find(&claim.key).await? {
            Some(found) if found.claim.job == claim.job => dispatcher.note_send(claim.job, found.is_sent),
            _ => dispatcher.withdraw(claim.job),
        }
        Ok(())
    }

    fn count(&self, outcome: &str) {
        self.0.metrics.idempotency.with_label_values(&[outcome]).inc();
    }
}

fn age(id: JobId) -> Duration {
    Duration::from_millis(now_ms().saturating_sub(id.accepted_at()))
}

fn unavailable(error: BackendError) -> RunError {
    RunError::Backend { store: "the log table", error }
}
