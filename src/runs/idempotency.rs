//! Carries out each request with an `Idempotency-Key` only once (draft-ietf-httpapi-idempotency-key-header).
//!
//! A request claims its key for its job before the job is sent. A later request with the same key and body
//! finds that job: by the result kept with the claim, by its stored result, in flight on any node, or by its
//! row.
//!
//! A claim, a journal entry or an entry in flight does not prove that the queue has the job. Until the claim
//! records the confirmation, a repeated request waits for the outcome of the attempt in flight, and is
//! answered as the first request is. The outcome stays unknown if the queue does not answer or the node dies.
//! Then the repeated request claims the next attempt and sends the same body again, under the same job id. So
//! a key has one job id and one row. A second message is sent only if the outcome of the first send is
//! unknown.
//!
//! ```text
//! claim ─ new ──────────────────────────────────────→ first attempt: send
//!       └ exists ─ confirmed, or a result, or a row ─→ answer
//!                ├ attempt in flight ────────────────→ wait for its outcome, check again
//!                ├ released ─────────────────────────→ 503, as the first request
//!                └ attempt over, outcome unknown ────→ claim the next attempt: send again
//! ```

use super::error::RunError;
use crate::ambient;
use crate::backend::{Backend, BackendError, Claim, Claims, ExecutionStore, JournalState, StoredClaim};
use crate::backoff::Backoff;
use crate::config::{BatchConf, Live};
use crate::dispatch::{Dispatcher, JobState, Pending, PendingJob, Resend, Sending, SubmitError};
use crate::lifecycle::{Lifecycle, Phase};
use crate::metrics::Metrics;
use crate::model::{BodyHash, Execution, IdempotencyKey, JobId, Outcome, now_ms};
use dashmap::DashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// Pauses between two reads of a claim while another node sends its job.
const POLLS: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
/// How long a send may be in flight beyond its deadline, plus the clock differences between nodes.
const SEND_MARGIN: Duration = Duration::from_secs(5);
/// Pauses between retries to write an outcome to its claim.
const WRITES: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));

/// The known state of the job of an earlier request.
pub enum KnownState {
    Result(Outcome),
    /// The queue has or had the job. `None`: there is no way to wait for its result.
    Pending(Option<PendingJob>),
    /// The job has ended, and its result is no longer stored.
    Ended(Box<Execution>),
}

/// What the request has to do after its claim.
pub enum ClaimOutcome {
    /// Send its job: the request is the first with its key.
    First(Attempt),
    /// Answer with the state of the earlier job.
    Repeated(Box<StoredClaim>, KnownState),
    /// Send the earlier job again: it is unknown whether the queue has it.
    Resend(Attempt, Box<StoredClaim>, Resend),
}

/// The outcome of an attempt. `None`: it is in flight.
type AttemptOutcome = Option<Result<(), SubmitError>>;

/// The attempts of this process in flight. There are at most as many as requests with a key in flight.
type Attempts = DashMap<JobId, watch::Receiver<AttemptOutcome>>;

/// An attempt of this process to send a job. Requests with the same key wait for its outcome. It is
/// registered before it is claimed, so that no request of this process considers the claim abandoned.
pub struct Attempt {
    id: JobId,
    /// No earlier attempt can have reached the queue. If this one fails, the queue does not have the job.
    is_first: bool,
    /// The id under which the attempt is being renewed, if the answer to that is missing. The claim may have
    /// it, so it is used again.
    renewed: Option<JobId>,
    outcome: watch::Sender<AttemptOutcome>,
    attempts: Arc<Attempts>,
}

impl Drop for Attempt {
    fn drop(&mut self) {
        self.attempts.remove(&self.id);
        if let Some(renewed) = self.renewed {
            self.attempts.remove(&renewed);
        }
    }
}

/// Waits for the outcome of an attempt.
pub struct AttemptWatcher(watch::Receiver<AttemptOutcome>);

impl AttemptWatcher {
    /// The outcome; `Unknown` if the attempt ended without one.
    pub async fn outcome(&mut self) -> Result<(), SubmitError> {
        let outcome = self.0.wait_for(Option::is_some).await.ok().and_then(|outcome| outcome.clone());
        outcome.unwrap_or(Err(SubmitError::Unknown))
    }
}

/// Claims idempotency keys, and follows the attempts to send their jobs. Cheap to clone.
#[derive(Clone)]
pub struct Idempotency(Arc<IdempotencyState>);

struct IdempotencyState {
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
        Self(Arc::new(IdempotencyState {
            claims,
            executions,
            dispatcher,
            batch,
            lifecycle,
            metrics,
            attempts,
        }))
    }

    /// Claims the key. If another job has it, waits until the outcome of that job's send is known.
    /// `job_lasts` is the time from acceptance to the deadline of a job.
    ///
    /// # Errors
    /// `KeyReused`, `AttemptUnresolved`, `Backend`, and `Submit` if the send of the earlier job has failed.
    pub async fn claim(&self, claim: &Claim, job_lasts: Duration) -> Result<ClaimOutcome, RunError> {
        let attempt = self.begin(claim.job, true);
        let Some(mut before) = self.0.claims.claim(claim).await.map_err(unavailable)? else {
            self.count("new");
            return Ok(ClaimOutcome::First(attempt));
        };
        drop(attempt);
        let started = Instant::now();
        let mut polls = 1;
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
                // The clocks of the nodes differ too much, or no node ends a job past its deadline.
                tracing::warn!(
                    requestId = %before.claim.job,
                    "A repeated run was answered 503: the state of its first attempt did not become known. \
                     Compare the clocks of the nodes"
                );
                return Err(RunError::AttemptUnresolved);
            } else {
                tokio::select! {
                    biased;
                    () = POLLS.sleep(polls) => polls += 1,
                    () = self.0.lifecycle.reached(Phase::Closing) => {
                        return Err(RunError::Submit(SubmitError::Stopping));
                    }
                }
            }
            let found = self.0.claims.find(&claim.key).await.map_err(unavailable)?;
            // A claim that is missing was released, because the send has definitely failed.
            before = found.ok_or(RunError::Submit(SubmitError::Unavailable))?;
        }
    }

    /// Whether the last attempt is over, and another one may begin.
    async fn may_send_again(&self, before: &StoredClaim, job_lasts: Duration) -> Result<bool, RunError> {
        if self.0.attempts.contains_key(&before.attempt) || !self.is_over(before.attempt) {
            return Ok(false);
        }
        // Workers drop jobs past their deadline. A node that has the job in its table ends it as lost. A job
        // that no node has is sent with a new deadline.
        let job = before.claim.job;
        if age(job) <= job_lasts {
            return Ok(true);
        }
        let standing = self.0.dispatcher.standing(job).await.map_err(unavailable)?;
        Ok(!standing.is_held() && !self.0.dispatcher.is_in_flight(job))
    }

    /// The state of an earlier request whose function no longer exists. `None`: there is no such request.
    ///
    /// # Errors
    /// `KeyReused`, `Backend`, and `Submit` if the send has failed or its outcome is unknown.
    pub async fn find(
        &self,
        key: IdempotencyKey,
        body: BodyHash,
    ) -> Result<Option<(Box<StoredClaim>, KnownState)>, RunError> {
        let Some(before) = self.0.claims.find(&key).await.map_err(unavailable)? else { return Ok(None) };
        if before.claim.body != body {
            return Err(RunError::KeyReused);
        }
        if let Some(mut attempt) = self.watched(before.attempt) {
            attempt.outcome().await.map_err(RunError::Submit)?;
            return Ok(Some((Box::new(StoredClaim { is_sent: true, ..before }), KnownState::Pending(None))));
        }
        // The function existed when the first request arrived, so it is not reported as missing.
        let known =
            self.known(&before).await.map_err(unavailable)?.ok_or(RunError::Submit(SubmitError::Unknown))?;
        Ok(Some((Box::new(before), known)))
    }

    /// Claims the next attempt. `None`: another request was faster, or the outcome of the last attempt has
    /// become known.
    async fn send_again(&self, before: &StoredClaim) -> Result<Option<ClaimOutcome>, RunError> {
        let id = before.claim.job;
        let attempt_id = self.0.dispatcher.new_id();
        let mut attempt = self.begin(attempt_id, false);
        if !self.0.claims.try_again(before, attempt_id).await.map_err(unavailable)? {
            return Ok(None);
        }
        // In this order, because a job leaves the table and the journal after its row is written.
        let is_here = self.0.dispatcher.is_in_flight(id) && !self.0.dispatcher.is_unsent(id);
        let standing = self.0.dispatcher.standing(id).await.map_err(unavailable)?;
        if let Some(known) = self.known(before).await.map_err(unavailable)? {
            self.count("repeated");
            return Ok(Some(ClaimOutcome::Repeated(Box::new(before.clone()), known)));
        }
        let is_journaled = standing.is_held();
        let maybe_sent = is_here || standing != JournalState::Absent;
        attempt.is_first = !maybe_sent;
        self.count(if maybe_sent { "sent_again" } else { "taken_over" });
        tracing::info!(
            requestId = %id,
            journaled = is_journaled,
            "Unconfirmed job sent again for a repeated request"
        );
        let resend = Resend { since: attempt_id.accepted_at(), is_journaled, maybe_sent };
        Ok(Some(ClaimOutcome::Resend(attempt, Box::new(before.clone()), resend)))
    }

    /// Registers an attempt of this process.
    fn begin(&self, id: JobId, is_first: bool) -> Attempt {
        let (outcome, watched) = watch::channel(None);
        self.0.attempts.insert(id, watched);
        Attempt { id, is_first, renewed: None, outcome, attempts: Arc::clone(&self.0.attempts) }
    }

    /// Watches an attempt, if this process makes it.
    fn watched(&self, attempt: JobId) -> Option<AttemptWatcher> {
        self.0.attempts.get(&attempt).map(|watched| AttemptWatcher(watched.clone()))
    }

    /// Whether an attempt that this process does not make can no longer be in flight.
    fn is_over(&self, attempt: JobId) -> bool {
        // An attempt of this node, but not of this process, is over: the earlier process has ended.
        self.0.dispatcher.is_own(attempt) || age(attempt) > self.attempt_max()
    }

    /// Maximum time that a send can be in flight.
    fn attempt_max(&self) -> Duration {
        Duration::from_millis(self.0.batch.get().send_deadline_ms) + SEND_MARGIN
    }

    /// The state of the job. `None`: there is no proof that the queue has it.
    async fn known(&self, before: &StoredClaim) -> Result<Option<KnownState>, BackendError> {
        if let Some(result) = &before.result {
            return Ok(Some(KnownState::Result(Outcome::new(result.clone()))));
        }
        let Claim { job, function, .. } = &before.claim;
        let place = match self.0.dispatcher.state(*job).await? {
            JobState::Done(outcome) => return Ok(Some(KnownState::Result(outcome))),
            JobState::Pending(Pending { place, .. }) => place,
            JobState::Unknown => None,
        };
        // A job that its node has ended stays in the journal for a moment. It has a row then, but its result
        // is not published again.
        if place.as_ref().is_none_or(PendingJob::is_foreign)
            && let Some(row) = self.0.executions.get(function, &job.to_string()).await?
        {
            return Ok(Some(KnownState::Ended(Box::new(row))));
        }
        // A job that was sent must not be sent again, even if no node remembers it.
        Ok(before.is_sent.then_some(KnownState::Pending(place)))
    }

    /// Follows an attempt to its end, even if its client disconnects, and writes the outcome to the claim.
    /// Waiting requests receive the outcome after the first write, whether that succeeds or not.
    pub fn follow(
        &self,
        mut attempt: Attempt,
        claim: Claim,
        sending: Result<Sending, SubmitError>,
    ) -> AttemptWatcher {
        let watched = AttemptWatcher(attempt.outcome.subscribe());
        let this = self.clone();
        // Counts as a request, so that the process does not end before the first write.
        let counted = self.0.lifecycle.request();
        // An attempt outlives its client. Each ends with its job, and jobs in flight are bounded.
        #[expect(clippy::disallowed_methods, reason = "jobs in flight bound the tasks")]
        ambient::spawn(async move {
            let sent = match sending {
                // A closed channel means that the batch loop has stopped during the send.
                Ok(sending) => sending.await.unwrap_or(Err(SubmitError::Unknown)),
                Err(e) => Err(e),
            };
            let mut noted = this.note(&claim, &mut attempt, &sent).await;
            if let Err(e) = &noted {
                tracing::warn!(
                    requestId = %claim.job, error = %e,
                    "Idempotency key not updated; retrying while its job is in flight"
                );
            }
            attempt.outcome.send_replace(Some(sent.clone()));
            drop(counted);
            let mut writes = 1;
            // Bounded, because the job ends with a result or at its deadline.
            while noted.is_err() && this.0.dispatcher.is_in_flight(claim.job) {
                WRITES.sleep(writes).await;
                writes += 1;
                noted = this.note(&claim, &mut attempt, &sent).await;
            }
        });
        watched
    }

    /// Writes the outcome of an attempt to the claim.
    ///
    /// # Errors
    /// The claim could not be written.
    async fn note(
        &self,
        claim: &Claim,
        attempt: &mut Attempt,
        sent: &Result<(), SubmitError>,
    ) -> Result<(), BackendError> {
        match sent {
            Ok(()) => {
                self.0.claims.confirm(claim).await?;
                // Later, another node may have considered the attempt over and sent the job again.
                if age(attempt.id) + SEND_MARGIN < self.attempt_max() {
                    self.0.dispatcher.note_claimed_sent(claim.job);
                }
                Ok(())
            }
            // The job may be on the queue, so the claim stays.
            Err(SubmitError::Unknown) => Ok(()),
            Err(_) if !attempt.is_first => Ok(()),
            Err(_) => self.release(claim, attempt).await,
        }
    }

    /// Releases the key of a job that is certainly not on the queue. The job leaves the journal first. If
    /// this process ends in between, a repeated request finds the claim and sends the job under its id. In
    /// the other order the journal could hold a job whose key belongs to another job.
    async fn release(&self, claim: &Claim, attempt: &mut Attempt) -> Result<(), BackendError> {
        let dispatcher = &self.0.dispatcher;
        // Until the key is free, no other request may consider this attempt over.
        let renewed = *attempt.renewed.get_or_insert_with(|| dispatcher.new_id());
        let before = StoredClaim { claim: claim.clone(), attempt: attempt.id, is_sent: false, result: None };
        self.0.attempts.insert(renewed, attempt.outcome.subscribe());
        let is_renewed = self.0.claims.try_again(&before, renewed).await?;
        attempt.renewed = None;
        let unused = if is_renewed { std::mem::replace(&mut attempt.id, renewed) } else { renewed };
        self.0.attempts.remove(&unused);
        if is_renewed {
            if !dispatcher.leave_journal(claim.job).await? {
                return Ok(());
            }
            if self.0.claims.release(claim, attempt.id).await? {
                dispatcher.withdraw(claim.job);
                return Ok(());
            }
        }
        // Either another request already sends the job again, or an earlier call released the key without an
        // answer.
        match self.0.claims.find(&claim.key).await? {
            Some(found) if found.claim.job == claim.job && found.is_sent => {
                dispatcher.note_send(claim.job, true);
            }
            Some(found) if found.claim.job == claim.job => dispatcher.leave_to_other(claim.job).await?,
            _ => dispatcher.withdraw(claim.job),
        }
        Ok(())
    }

    fn count(&self, outcome: &str) {
        self.0.metrics.idempotency.with_label_values(&[outcome]).inc();
    }
}

/// Time since the acceptance in the id.
fn age(id: JobId) -> Duration {
    Duration::from_millis(now_ms().saturating_sub(id.accepted_at()))
}

fn unavailable(error: BackendError) -> RunError {
    RunError::Backend { store: "the log table", error }
}
