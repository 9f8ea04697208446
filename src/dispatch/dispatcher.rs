//! The handle that requests use to submit jobs, wait for their results, and query their state.

use super::batcher::{Batcher, Resend, Sending, SubmitError};
use super::caps::{CapKey, ConcurrencyCaps, TooManyJobs};
use super::in_flight::{EnteredAgain, InFlight, JoinOutcome, Permits, Waiter};
use super::journal::NodeJournal;
use super::lives::JobLives;
use super::oldest::OldestJob;
use super::schedule::{self, LookupSchedule};
use super::settler::Settler;
use super::shedder::Shedder;
use crate::ambient;
use crate::backend::{BackendError, JournalState, Membership, Results};
use crate::config::{Live, OverloadConf};
use crate::events::{EventBus, FleetEvent};
use crate::model::{FunctionId, Job, JobId, NodeId, Outcome, now_ms};
use crate::node_lease::NodeLease;
use rand::Rng;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Interval at which a long poll looks up the stored result of its job.
const POLLED_EVERY: Duration = Duration::from_secs(1);

/// Submits jobs and finds their results. Cheap to clone.
#[derive(Clone)]
pub struct Dispatcher(Arc<DispatcherParts>);

/// The parts of a [`Dispatcher`].
pub struct DispatcherParts {
    pub node: NodeId,
    pub batcher: Batcher,
    pub in_flight: Arc<InFlight>,
    pub schedule: Arc<LookupSchedule>,
    pub journal: Arc<NodeJournal>,
    pub results: Arc<dyn Results>,
    pub settler: Arc<Settler>,
    pub shedder: Arc<Shedder>,
    pub slots: ConcurrencyCaps,
    pub lease: Arc<NodeLease>,
    pub membership: Option<Arc<dyn Membership>>,
    pub overload: Live<OverloadConf>,
    pub events: EventBus,
    pub lives: JobLives,
}

/// A job that is being sent, and the waiter for its result.
pub struct Submitted {
    /// Resolves with the outcome of the send.
    pub sent: Sending,
    pub waiter: Waiter,
}

/// The state of a job, as far as this node can find out.
pub enum JobState {
    Done(Outcome),
    Pending(Pending),
    Unknown,
}

/// A job without a result.
pub struct Pending {
    /// The wait for its result. `None`: the job has the maximum number of waiters.
    pub place: Option<PendingJob>,
    /// It is not known whether the queue received the job, because its send was not answered or its process
    /// ended. Also `false` if only another node knows the outcome of the send.
    pub is_unconfirmed: bool,
}

/// A wait for the result of a job.
pub struct PendingJob {
    id: JobId,
    results: Arc<dyn Results>,
    settler: Arc<Settler>,
    /// `None`: the job is not in the table of this node.
    own: Option<Waiter>,
}

impl PendingJob {
    /// Whether the job is not in the table of this node.
    pub fn is_foreign(&self) -> bool {
        self.own.is_none()
    }

    /// Waits for the result. Returns `None` if waiting is no longer possible: the job was removed, it has too
    /// many waiters, or the store of results failed.
    pub async fn outcome(&mut self) -> Option<Outcome> {
        let Some(waiter) = &mut self.own else {
            let heard = self.results.wait_for(self.id).await;
            let heard = heard.inspect_err(
                |e| tracing::warn!(requestId = %self.id, error = %e, "Wait for another node's job failed"),
            );
            return heard.ok().map(Outcome::new);
        };
        loop {
            tokio::select! {
                biased;
                outcome = waiter.outcome() => return outcome,
                () = tokio::time::sleep(POLLED_EVERY) => {}
            }
            // For an old job the next scheduled look-up may be a minute away.
            self.settler.look_up(&[self.id]).await;
        }
    }
}

impl Dispatcher {
    #[cfg(test)]
    pub fn settler(&self) -> &Settler {
        &self.0.settler
    }

    #[cfg(test)]
    pub fn shown_jobs(&self) -> Vec<String> {
        self.0.in_flight.shown()
    }

    pub fn new(parts: DispatcherParts) -> Self {
        Self(Arc::new(parts))
    }

    /// Finds the oldest job of this node.
    pub fn oldest_job(&self) -> OldestJob {
        OldestJob::new(Arc::clone(&self.0.in_flight))
    }

    /// Returns a new id for a job accepted now.
    pub fn new_id(&self) -> JobId {
        JobId::new(self.0.node, now_ms(), ambient::rng().random())
    }

    /// Decides whether a new job is admitted or shed.
    ///
    /// # Errors
    /// The current confirmation latency of the queue, if the job should be shed.
    pub fn admit(&self) -> Result<(), Duration> {
        self.0.shedder.admit()
    }

    /// Takes the slots that a job needs under its caps. `function_max`: maximum number of jobs of the
    /// function on all nodes together; 0: no cap. `key_max`: maximum number of jobs of the key on this node;
    /// 0: no cap; `None`: the configured default.
    ///
    /// # Errors
    /// A cap is reached. Slots that were already taken are returned.
    pub fn hold(
        &self,
        function: &FunctionId,
        function_max: usize,
        key: &Arc<str>,
        key_max: Option<usize>,
    ) -> Result<Permits, TooManyJobs> {
        let mut held = Permits::new();
        let key_max = key_max.unwrap_or_else(|| self.0.overload.get().jobs_per_key_max);
        if key_max > 0 {
            let slot = self.0.slots.take(CapKey::Key(Arc::clone(key)), key_max);
            held.push(slot.ok_or(TooManyJobs::OfKey { max: key_max })?);
        }
        if function_max > 0 {
            // The share of this node.
            let max = function_max.div_ceil(self.0.lease.nodes());
            let slot = self.0.slots.take(CapKey::Function(function.clone()), max);
            held.push(slot.ok_or(TooManyJobs::OfFunction { max: function_max })?);
        }
        Ok(held)
    }

    /// Sends a job without a waiter.
    pub fn submit(&self, job: Job, held: Permits) -> Result<Sending, SubmitError> {
        self.0.in_flight.enter(&job, held).map_err(|_| SubmitError::Overloaded)?;
        self.send_first(job)
    }

    /// Sends a job and registers a waiter for its result. Registers first, because a fast worker may publish
    /// before the send returns.
    pub fn submit_waiting(&self, job: Job, held: Permits) -> Result<Submitted, SubmitError> {
        let waiter = self.0.in_flight.enter_waiting(&job, held).map_err(|_| SubmitError::Overloaded)?;
        let sent = self.send_first(job)?;
        Ok(Submitted { sent, waiter })
    }

    /// Sends a job again under its existing id. `waits`: whether to register a waiter.
    pub async fn submit_again(
        &self,
        mut job: Job,
        mut resend: Resend,
        waits: bool,
    ) -> Result<(Sending, Option<Waiter>), SubmitError> {
        let since = Instant::now();
        resend.is_journaled &= !self.0.journal.keep(job.id);
        let is_entered = resend.maybe_sent && !resend.is_journaled;
        let node = job.id.node();
        if let Some(membership) = self.0.membership.as_ref().filter(|_| node != self.0.node) {
            // Its journal gets a job that it does not know.
            membership.entrust(node).await.map_err(|_| SubmitError::Unavailable)?;
        }
        if is_entered {
            // Before anything else, because it may end as LOST, and only jobs of the journal are counted.
            let journal = &self.0.journal;
            journal.enter(std::slice::from_ref(&job)).await.map_err(|_| {
                // Only the answer may be missing.
                self.leave_again(job.id, since);
                SubmitError::Unavailable
            })?;
            resend.is_journaled = true;
        }
        let entered = self.0.in_flight.enter_again(&job, waits).map_err(|_| {
            if is_entered {
                self.leave_again(job.id, since);
            }
            SubmitError::Overloaded
        })?;
        let EnteredAgain { is_new, waiter, progress } = entered;
        job.progress = progress;
        let id = job.id;
        let sending = self.hand_over(job, Some(resend)).inspect_err(|_| {
            match (resend.maybe_sent, is_new) {
                (false, true) => return self.0.in_flight.remove(id),
                (false, false) => return self.0.in_flight.note_unsent(id),
                (true, _) => {}
            }
            self.0.in_flight.note_send(id, false);
            // Only look-ups can end it here, because its result may be published to its own node.
            if is_new {
                self.0.schedule.plan(id, schedule::FIRST);
            }
        })?;
        Ok((sending, waiter))
    }

    /// Removes a job from the journal that was entered after `since`. It stays if the table has the job from
    /// an earlier attempt. It also stays in the journal of another node, which may have taken the job over.
    fn leave_again(&self, id: JobId, since: Instant) {
        if id.node() == self.0.node && !self.0.in_flight.contains(id) {
            self.0.journal.leave([id], since);
        }
    }

    /// Sends a job that was never sent before.
    fn send_first(&self, job: Job) -> Result<Sending, SubmitError> {
        let id = job.id;
        let watched = self.0.events.is_watched().then(|| job.function.clone());
        let sending = self.hand_over(job, None).inspect_err(|_| self.0.in_flight.remove(id))?;
        if let Some(function) = watched {
            self.0.events.report(|| FleetEvent::JobAccepted { id, function });
        }
        Ok(sending)
    }

    /// Passes a job to the batcher. A job that is rejected stays in the table.
    fn hand_over(&self, job: Job, resend: Option<Resend>) -> Result<Sending, SubmitError> {
        let id = job.id;
        // A send is impossible while another process holds the id of this node. Clients must not wait for it.
        let is_lost = self.0.lease.is_lost();
        let sent = if is_lost { Err(SubmitError::Stopping) } else { self.0.batcher.send(job, resend) };
        let sent = sent?;
        self.0.schedule.plan(id, schedule::FIRST);
        Ok(sent)
    }

    /// Removes a job whose send has definitely failed from the journal. Returns `false` if another node may
    /// have adopted the job. Then it stays and ends as LOST, here or there, and counts once.
    ///
    /// # Errors
    /// The store does not answer, or the lease has lapsed.
    pub async fn leave_journal(&self, id: JobId) -> Result<bool, BackendError> {
        if self.0.lease.is_lost() {
            // The process that holds the node id takes the entry over.
            self.0.in_flight.note_send(id, false);
            return Ok(false);
        }
        if !self.0.lease.holds() {
            return Err(BackendError::Unavailable("the lease of this node has lapsed".into()));
        }
        if self.0.in_flight.is_shared(id) && self.standing(id).await?.is_held() {
            self.0.in_flight.note_send(id, false);
            return Ok(false);
        }
        self.0.journal.leave_now(id).await.map(|()| true)
    }

    /// Removes a job whose send has definitely failed from the table. Must be called after the job has left
    /// the journal and its idempotency key is released.
    pub fn withdraw(&self, id: JobId) {
        let must_stay = self.0.in_flight.remove_unsent(id);
        // Once more, because a restore of a lost journal may have entered it again meanwhile.
        self.0.journal.leave_unsent(id, must_stay);
    }

    /// Leaves a job whose send has definitely failed to the node of another request, which sends it again.
    /// While it is in the journal, this node tracks it too. If it has left, the other node enters it again.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn leave_to_other(&self, id: JobId) -> Result<(), BackendError> {
        if self.standing(id).await?.is_held() {
            self.0.in_flight.share_unsent(id);
        } else {
            self.0.in_flight.abandon_unsent(id);
        }
        Ok(())
    }

    /// Records the outcome of a send: the queue confirmed the job, or the outcome is unknown.
    pub fn note_send(&self, id: JobId, is_confirmed: bool) {
        self.0.in_flight.note_send(id, is_confirmed);
    }

    /// Records that the claim of a job says that it was sent.
    pub fn note_claimed_sent(&self, id: JobId) {
        self.0.in_flight.note_claimed_sent(id);
    }

    /// The state of a job in the journal of the node that its id names.
    pub async fn standing(&self, id: JobId) -> Result<JournalState, BackendError> {
        self.0.journal.standing(id).await
    }

    /// Whether the job is in the table of this node. It stays there until its row is written.
    pub fn is_in_flight(&self, id: JobId) -> bool {
        self.0.in_flight.contains(id)
    }

    /// Whether the job is in the table of this node, and its send has definitely failed.
    pub fn is_unsent(&self, id: JobId) -> bool {
        self.0.in_flight.awaited(id).is_some_and(|awaited| awaited.is_unsent)
    }

    /// Whether the id names this node.
    pub fn is_own(&self, id: JobId) -> bool {
        id.node() == self.0.node
    }

    /// Finds the state of a job. Sources, in order: the recent results of this node, the stored result, the
    /// table of this node, and the journal of the node that the id names.
    pub async fn state(&self, id: JobId) -> Result<JobState, BackendError> {
        let settler = &self.0.settler;
        let joined = self.0.in_flight.join(id);
        if let JoinOutcome::Settled(outcome) = joined {
            return Ok(JobState::Done(outcome));
        }
        let stored = match settler.stored(id).await {
            // The job is in the table, so it is pending even if the store does not answer. Its waiter gets
            // the result later.
            Err(_) if matches!(joined, JoinOutcome::Pending(_) | JoinOutcome::Crowded) => None,
            stored => stored?,
        };
        if let Some(payload) = stored {
            let outcome = Outcome::new(payload);
            if !matches!(joined, JoinOutcome::Unknown) {
                settler.settle(id, outcome.clone());
                self.0.in_flight.forget_settled(id);
            }
            return Ok(JobState::Done(outcome));
        }
        let place = |own| {
            Some(PendingJob { id, results: Arc::clone(&self.0.results), settler: Arc::clone(settler), own })
        };
        let is_unconfirmed = self.0.in_flight.is_unconfirmed(id).unwrap_or(false);
        match joined {
            JoinOutcome::Pending(waiter) => {
                return Ok(JobState::Pending(Pending { place: place(Some(waiter)), is_unconfirmed }));
            }
            JoinOutcome::Crowded => return Ok(JobState::Pending(Pending { place: None, is_unconfirmed })),
            JoinOutcome::Settled(_) | JoinOutcome::Unknown => {}
        }
        match self.0.journal.standing(id).await? {
            JournalState::Absent | JournalState::Unknown => {}
            standing => {
                let is_unconfirmed = standing == JournalState::Orphaned;
                return Ok(JobState::Pending(Pending { place: place(None), is_unconfirmed }));
            }
        }
        // The job may have ended between the reads of the stored result and of the journal.
        let stored = settler.stored(id).await?;
        Ok(stored.map_or(JobState::Unknown, |payload| JobState::Done(Outcome::new(payload))))
    }

    /// What is known of the lives of jobs.
    pub fn lives(&self) -> &JobLives {
        &self.0.lives
    }

    /// The stored result for a request id that is not a [`JobId`].
    pub async fn foreign_result(&self, request_id: &str) -> Result<Option<Outcome>, BackendError> {
        Ok(self.0.results.stored_foreign(request_id).await?.map(Outcome::new))
    }

    /// Removes jobs that were never sent from the journal. The loop of look-ups does that at intervals; the
    /// shutdown calls this for the rest.
    pub async fn clear_journal(&self) {
        self.0.journal.clear().await;
    }
}
