//! The handle that requests use: submits jobs, waits for their results, and looks up their state.

use super::batcher::{Batcher, Resend, Sending, SubmitError};
use super::caps::{CapKey, ConcurrencyCaps, TooManyJobs};
use super::in_flight::{EnteredAgain, InFlight, JoinOutcome, Permits, Waiter};
use super::journal::NodeJournal;
use super::schedule::{self, LookupSchedule};
use super::settler::Settler;
use super::shedder::Shedder;
use crate::backend::{BackendError, JournalState, Membership, Results};
use crate::config::{Live, OverloadConf};
use crate::model::{FunctionId, Job, JobId, NodeId, Outcome, now_ms};
use crate::node_lease::NodeLease;
use std::sync::Arc;
use std::time::Duration;

/// How often a long poll looks for the stored result of its job.
const POLLED_EVERY: Duration = Duration::from_secs(1);

/// The handle that requests use.
#[derive(Clone)]
pub struct Dispatcher(Arc<DispatcherParts>);

/// What a [`Dispatcher`] is made of.
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
}

/// A job on its way to the queue, and the place of the one who waits for it.
pub struct Submitted {
    /// What became of the send.
    pub sent: Sending,
    pub waiter: Waiter,
}

/// What is known of a job.
pub enum JobState {
    Done(Outcome),
    Pending(Pending),
    Unknown,
}

/// A job without a result.
pub struct Pending {
    /// A place to wait in, if there was one.
    pub place: Option<PendingJob>,
    /// Nobody can know whether the queue has the job: its send was not answered, or its process ended. `false` also
    /// where another node knows more.
    pub is_unconfirmed: bool,
}

/// A place to wait in.
pub struct PendingJob {
    id: JobId,
    results: Arc<dyn Results>,
    settler: Arc<Settler>,
    /// `None`: a job of another node.
    own: Option<Waiter>,
}

impl PendingJob {
    /// Whether the job is not in the table of this node.
    pub fn is_foreign(&self) -> bool {
        self.own.is_none()
    }

    /// The result; `None` if it cannot be waited for any longer.
    pub async fn outcome(&mut self) -> Option<Outcome> {
        let Some(waiter) = &mut self.own else {
            let heard = self.results.wait_for(self.id).await;
            let heard = heard.inspect_err(
                |e| tracing::warn!(requestId = %self.id, error = %e, "Foreign Job Not Waited For"),
            );
            return heard.ok().map(Outcome::new);
        };
        loop {
            tokio::select! {
                biased;
                outcome = waiter.outcome() => return outcome,
                () = tokio::time::sleep(POLLED_EVERY) => {}
            }
            // The job may be so old that its next planned look-up is a minute away.
            self.settler.look_up(&[self.id]).await;
        }
    }
}

impl Dispatcher {
    #[cfg(test)]
    pub fn settler(&self) -> &Settler {
        &self.0.settler
    }

    pub fn new(parts: DispatcherParts) -> Self {
        Self(Arc::new(parts))
    }

    /// A new id for a job accepted now.
    pub fn new_id(&self) -> JobId {
        JobId::new(self.0.node, now_ms(), rand::random())
    }

    /// Whether a job may come in now.
    ///
    /// # Errors
    /// The queue is slow, and takes so long.
    pub fn admit(&self) -> Result<(), Duration> {
        self.0.shedder.admit()
    }

    /// The places that a job needs. `function_max`: most jobs of the function on all nodes together, 0 for no cap; `key_max`: most of the
    /// key on this node, if that is said for this key.
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
            // This node's part.
            let max = function_max.div_ceil(self.0.lease.nodes());
            let slot = self.0.slots.take(CapKey::Function(function.clone()), max);
            held.push(slot.ok_or(TooManyJobs::OfFunction { max: function_max })?);
        }
        Ok(held)
    }

    /// Sends a job that nobody waits for.
    pub fn submit(&self, job: Job, held: Permits) -> Result<Sending, SubmitError> {
        self.0.in_flight.enter(&job, held).map_err(|_| SubmitError::Overloaded)?;
        self.send_first(job)
    }

    /// Sends a job and waits in line for its result. Registers first: a fast worker may publish before the
    /// send returns.
    pub fn submit_waiting(&self, job: Job, held: Permits) -> Result<Submitted, SubmitError> {
        let waiter = self.0.in_flight.enter_waiting(&job, held).map_err(|_| SubmitError::Overloaded)?;
        let sent = self.send_first(job)?;
        Ok(Submitted { sent, waiter })
    }

    /// Sends a job again, under the id that it has; `waits`: somebody waits for its result here.
    pub async fn submit_again(
        &self,
        job: Job,
        resend: Resend,
        waits: bool,
    ) -> Result<(Sending, Option<Waiter>), SubmitError> {
        let node = job.id.node();
        if let Some(membership) = self.0.membership.as_ref().filter(|_| node != self.0.node) {
            // A node that is listed no more has left nothing, as far as anybody knew. Now others must look after it
            // if this one ends, too.
            membership.relist(node).await.map_err(|_| SubmitError::Unavailable)?;
        }
        let entered = self.0.in_flight.enter_again(&job, waits).map_err(|_| SubmitError::Overloaded)?;
        let EnteredAgain { is_new, waiter } = entered;
        let id = job.id;
        let sending = self.hand_over(job, Some(resend)).inspect_err(|_| {
            if is_new && !resend.maybe_sent {
                self.0.in_flight.remove(id);
                return;
            }
            self.0.in_flight.note_send(id, false);
            // Nothing else would end it here: its result is published for its own node.
            if is_new {
                self.0.schedule.plan(id, schedule::FIRST);
            }
        })?;
        Ok((sending, waiter))
    }

    /// Sends a job that was never sent before.
    fn send_first(&self, job: Job) -> Result<Sending, SubmitError> {
        let id = job.id;
        self.hand_over(job, None).inspect_err(|_| self.0.in_flight.remove(id))
    }

    /// A job that is not taken stays in the table.
    fn hand_over(&self, job: Job, resend: Option<Resend>) -> Result<Sending, SubmitError> {
        let id = job.id;
        // A node whose id another process holds does not let its clients wait for a send that cannot be made.
        let is_lost = self.0.lease.is_lost();
        let sent = if is_lost { Err(SubmitError::Stopping) } else { self.0.batcher.send(job, resend) };
        let sent = sent?;
        self.0.schedule.plan(id, schedule::FIRST);
        Ok(sent)
    }

    /// Takes a job whose send has definitely failed out of the journal.
    pub async fn leave_journal(&self, id: JobId) -> Result<(), BackendError> {
        self.0.journal.leave_now(id).await
    }

    /// Forgets a job whose send has definitely failed, once it is out of the journal and its key is free.
    pub fn withdraw(&self, id: JobId) {
        self.0.in_flight.remove(id);
    }

    /// Notes what is known of the send of a job: that the queue confirmed it, or nothing.
    pub fn note_send(&self, id: JobId, is_confirmed: bool) {
        self.0.in_flight.note_send(id, is_confirmed);
    }

    /// What the journal of the node that the id names says of the job.
    pub async fn standing(&self, id: JobId) -> Result<JournalState, BackendError> {
        self.0.journal.standing(id).await
    }

    /// Whether this node has the job, until its row is written.
    pub fn is_in_flight(&self, id: JobId) -> bool {
        self.0.in_flight.contains(id)
    }

    /// Whether this node is the one of the id.
    pub fn is_own(&self, id: JobId) -> bool {
        id.node() == self.0.node
    }

    /// What is known of a job, asked in order: a settled result, the stored result, this node's table, the
    /// journal of the node that the id names.
    pub async fn state(&self, id: JobId) -> Result<JobState, BackendError> {
        let settler = &self.0.settler;
        let joined = self.0.in_flight.join(id);
        if let JoinOutcome::Settled(outcome) = joined {
            return Ok(JobState::Done(outcome));
        }
        let stored = match settler.stored(id).await {
            // It is known to run, whatever the store says when it is back; the waiter will hear.
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
        // The job may have ended between the two looks.
        let stored = settler.stored(id).await?;
        Ok(stored.map_or(JobState::Unknown, |payload| JobState::Done(Outcome::new(payload))))
    }

    /// The stored result of a job whose id is not of our kind.
    pub async fn foreign_result(&self, request_id: &str) -> Result<Option<Outcome>, BackendError> {
        Ok(self.0.results.stored_foreign(request_id).await?.map(Outcome::new))
    }

    /// Takes the jobs that were never sent out of the journal; the look-ups do so from time to time. For the end.
    pub async fn clear_journal(&self) {
        self.0.journal.clear().await;
    }
}
