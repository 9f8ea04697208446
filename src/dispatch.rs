//! Submit, wait, settle: the way of a job from acceptance to its row. Knows nothing of HTTP.
//!
//! ```text
//! submit  enter the table (with the waiter) → batcher → journal → queue
//! settle  pump or look-up → waiters → audit row
//! end     row written → journal and table forget the job
//! ```
//!
//! [`new`] builds a [`Dispatcher`], the handle that requests use, and the [`DispatchLoops`] that `boot` starts.

mod batcher;
mod breaker;
mod caps;
mod dead_letters;
mod given_up;
mod in_flight;
mod journal;
mod recent;
mod result_loops;
mod schedule;
mod settler;
mod shedder;

pub use batcher::{Resend, Sending, SubmitError};
pub use dead_letters::Undertaker;
pub use in_flight::{Held, Waiter};
pub use crate::fleet::adoption::Members;
pub use result_loops::{Lookups, Pump};

use crate::audit::{Audit, Ledger, RowsWritten};
use crate::backend::{Backend, BackendError, Membership, Standing};
use crate::config::{BatchConf, DeadLetterConf, FleetConf, Live, MemoryConf, OverloadConf};
use crate::metrics::Metrics;
use crate::model::{FunctionId, Job, JobId, NodeId, Outcome, now_ms};
use batcher::{BatchLoop, Batcher};
use in_flight::{EnteredAgain, InFlight, Joined};
use journal::NodeJournal;
use crate::node_lease::Lease;
use settler::Settler;
use shedder::Shedder;
use caps::{Holder, Slots};
use std::sync::Arc;
use std::time::Duration;

/// How often a long poll looks for the stored result of its job.
const POLLED_EVERY: Duration = Duration::from_secs(1);

/// The handle that requests use.
#[derive(Clone)]
pub struct Dispatcher(Arc<Inner>);

struct Inner {
    node: NodeId,
    batcher: Batcher,
    settler: Arc<Settler>,
    shedder: Arc<Shedder>,
    slots: Slots,
    lease: Arc<Lease>,
    membership: Option<Arc<dyn Membership>>,
    overload: Live<OverloadConf>,
}

/// The loops of the dispatcher. `boot` runs each; `batches` ends when told to, the others never do. `members` begins
/// before any of them runs.
pub struct DispatchLoops {
    pub batches: BatchLoop,
    pub pump: Pump,
    pub lookups: Lookups,
    pub members: Members,
    pub undertaker: Undertaker,
    /// Told by the audit when rows are written.
    pub rows: Arc<dyn RowsWritten>,
}

/// What a dispatcher is made of.
pub struct Parts<'a> {
    pub node: NodeId,
    pub memory: &'a MemoryConf,
    pub fleet: &'a FleetConf,
    pub dead_letter: &'a DeadLetterConf,
    pub batch: Live<BatchConf>,
    pub overload: Live<OverloadConf>,
    pub backend: &'a Backend,
    pub audit: Audit,
    pub ledger: Arc<Ledger>,
    pub metrics: Arc<Metrics>,
}

/// Builds the dispatcher of a node.
pub fn new(parts: Parts<'_>) -> (Dispatcher, DispatchLoops) {
    let Parts { node, memory, fleet, dead_letter, batch, overload, backend, audit, ledger, metrics } = parts;
    let shedder = Arc::new(Shedder::new(overload.clone(), Arc::clone(&metrics)));
    let in_flight =
        Arc::new(InFlight::new(memory.jobs_in_flight_max, memory.settled_bytes_max, Arc::clone(&metrics)));
    let lease = Arc::new(if backend.membership.is_some() { Lease::lapsed() } else { Lease::endless() });
    let journal = Arc::new(NodeJournal::new(Arc::clone(&backend.journal), Arc::clone(&lease)));
    let (batcher, batches) = batcher::new(
        batch,
        Arc::clone(&backend.queue),
        Arc::clone(&journal),
        Arc::clone(&in_flight),
        Arc::clone(&shedder),
        Arc::clone(&metrics),
    );
    let undertaker = Undertaker::new(dead_letter, backend.dead_letters.clone(), Arc::clone(&metrics));
    let settler = Arc::new(Settler::new(in_flight, journal, Arc::clone(&backend.results), audit, metrics));
    let membership = backend.membership.clone();
    let loops = DispatchLoops {
        batches,
        pump: Pump::new(Arc::clone(&settler)),
        lookups: Lookups::new(Arc::clone(&settler)),
        members: Members::new(
            node,
            fleet,
            membership.clone(),
            Arc::clone(&lease),
            Arc::clone(&settler),
            ledger,
        ),
        undertaker,
        rows: Arc::clone(&settler) as Arc<dyn RowsWritten>,
    };
    let slots = Slots::default();
    let inner = Inner { node, batcher, settler, shedder, slots, lease, membership, overload };
    (Dispatcher(Arc::new(inner)), loops)
}

/// There are as many jobs in flight as there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TooManyJobs {
    OfKey { max: usize },
    OfFunction { max: usize },
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
            let heard = self.settler.results.wait_for(self.id).await;
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
    ) -> Result<Held, TooManyJobs> {
        let mut held = Held::new();
        let key_max = key_max.unwrap_or_else(|| self.0.overload.get().jobs_per_key_max);
        if key_max > 0 {
            let slot = self.0.slots.take(Holder::Key(Arc::clone(key)), key_max);
            held.push(slot.ok_or(TooManyJobs::OfKey { max: key_max })?);
        }
        if function_max > 0 {
            // This node's part.
            let max = function_max.div_ceil(self.0.lease.nodes());
            let slot = self.0.slots.take(Holder::Function(function.clone()), max);
            held.push(slot.ok_or(TooManyJobs::OfFunction { max: function_max })?);
        }
        Ok(held)
    }

    /// Sends a job that nobody waits for.
    pub fn submit(&self, job: Job, held: Held) -> Result<Sending, SubmitError> {
        let settler = &self.0.settler;
        settler.in_flight.enter(&job, held).map_err(|_| SubmitError::Overloaded)?;
        self.send_first(job)
    }

    /// Sends a job and waits in line for its result. Registers first: a fast worker may publish before the
    /// send returns.
    pub fn submit_waiting(&self, job: Job, held: Held) -> Result<Submitted, SubmitError> {
        let waiter =
            self.0.settler.in_flight.enter_waiting(&job, held).map_err(|_| SubmitError::Overloaded)?;
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
        let (settler, node) = (&self.0.settler, job.id.node());
        if let Some(membership) = self.0.membership.as_ref().filter(|_| node != self.0.node) {
            // A node that is listed no more has left nothing, as far as anybody knew. Now others must look after it
            // if this one ends, too.
            membership.relist(node).await.map_err(|_| SubmitError::Unavailable)?;
        }
        let entered = settler.in_flight.enter_again(&job, waits).map_err(|_| SubmitError::Overloaded)?;
        let EnteredAgain { is_new, waiter } = entered;
        let id = job.id;
        let sending = self.hand_over(job, Some(resend)).inspect_err(|_| {
            if is_new && !resend.maybe_sent {
                settler.in_flight.remove(id);
                return;
            }
            settler.in_flight.note_send(id, false);
            // Nothing else would end it here: its result is published for its own node.
            if is_new {
                settler.schedule.plan(id, lookups::FIRST);
            }
        })?;
        Ok((sending, waiter))
    }

    /// Sends a job that was never sent before.
    fn send_first(&self, job: Job) -> Result<Sending, SubmitError> {
        let id = job.id;
        self.hand_over(job, None).inspect_err(|_| self.0.settler.in_flight.remove(id))
    }

    /// A job that is not taken stays in the table.
    fn hand_over(&self, job: Job, resend: Option<Resend>) -> Result<Sending, SubmitError> {
        let id = job.id;
        // A node whose id another process holds does not let its clients wait for a send that cannot be made.
        let is_lost = self.0.lease.is_lost();
        let sent = if is_lost { Err(SubmitError::Stopping) } else { self.0.batcher.send(job, resend) };
        let sent = sent?;
        self.0.settler.schedule.plan(id, lookups::FIRST);
        Ok(sent)
    }

    /// Takes a job whose send has definitely failed out of the journal.
    pub async fn leave_journal(&self, id: JobId) -> Result<(), BackendError> {
        self.0.settler.journal.leave_now(id).await
    }

    /// Forgets a job whose send has definitely failed, once it is out of the journal and its key is free.
    pub fn withdraw(&self, id: JobId) {
        self.0.settler.in_flight.remove(id);
    }

    /// Notes what is known of the send of a job: that the queue confirmed it, or nothing.
    pub fn note_send(&self, id: JobId, is_confirmed: bool) {
        self.0.settler.in_flight.note_send(id, is_confirmed);
    }

    /// What the journal of the node that the id names says of the job.
    pub async fn standing(&self, id: JobId) -> Result<Standing, BackendError> {
        self.0.settler.journal.standing(id).await
    }

    /// Whether this node has the job, until its row is written.
    pub fn is_in_flight(&self, id: JobId) -> bool {
        self.0.settler.in_flight.contains(id)
    }

    /// Whether this node is the one of the id.
    pub fn is_own(&self, id: JobId) -> bool {
        id.node() == self.0.node
    }

    /// What is known of a job, asked in order: a settled result, the stored result, this node's table, the
    /// journal of the node that the id names.
    pub async fn state(&self, id: JobId) -> Result<JobState, BackendError> {
        let settler = &self.0.settler;
        let joined = settler.in_flight.join(id);
        if let Joined::Settled(outcome) = joined {
            return Ok(JobState::Done(outcome));
        }
        let stored = match settler.stored(id).await {
            // It is known to run, whatever the store says when it is back; the waiter will hear.
            Err(_) if matches!(joined, Joined::Pending(_) | Joined::Crowded) => None,
            stored => stored?,
        };
        if let Some(payload) = stored {
            let outcome = Outcome::new(payload);
            if !matches!(joined, Joined::Unknown) {
                settler.settle(id, outcome.clone());
                settler.in_flight.forget_settled(id);
            }
            return Ok(JobState::Done(outcome));
        }
        let place = |own| Some(PendingJob { id, settler: Arc::clone(settler), own });
        let is_unconfirmed = settler.in_flight.is_unconfirmed(id).unwrap_or(false);
        match joined {
            Joined::Pending(waiter) => {
                return Ok(JobState::Pending(Pending { place: place(Some(waiter)), is_unconfirmed }));
            }
            Joined::Crowded => return Ok(JobState::Pending(Pending { place: None, is_unconfirmed })),
            Joined::Settled(_) | Joined::Unknown => {}
        }
        match settler.journal.standing(id).await? {
            Standing::Absent | Standing::Unknown => {}
            standing => {
                let is_unconfirmed = standing == Standing::Left;
                return Ok(JobState::Pending(Pending { place: place(None), is_unconfirmed }));
            }
        }
        // The job may have ended between the two looks.
        let stored = settler.stored(id).await?;
        Ok(stored.map_or(JobState::Unknown, |payload| JobState::Done(Outcome::new(payload))))
    }

    /// The stored result of a job whose id is not of our kind.
    pub async fn foreign_result(&self, request_id: &str) -> Result<Option<Outcome>, BackendError> {
        Ok(self.0.settler.results.stored_foreign(request_id).await?.map(Outcome::new))
    }

    /// Takes the jobs that were never sent out of the journal; the look-ups do so from time to time. For the end.
    pub async fn clear_journal(&self) {
        self.0.settler.journal.clear().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit;
    use crate::backend::{JournalEntry, LogQuery, ResultEvent, Results, embedded};
    use crate::config::Conf;
    use crate::model::UnixMs;
    use async_trait::async_trait;
    use bytes::Bytes;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use tokio::task::JoinSet;

    /// A dispatcher over the embedded backend, with its loops running. The worker does not run: the tests
    /// publish or store what they want to be found.
    struct House {
        dispatcher: Dispatcher,
        backend: Backend,
        node: NodeId,
        _loops: JoinSet<()>,
        _dir: tempfile::TempDir,
    }

    impl House {
        async fn start(change: impl FnOnce(&mut Conf)) -> Self {
            Self::start_all(change, |_| {}, &[]).await
        }

        async fn start_with(change: impl FnOnce(&mut Backend)) -> Self {
            Self::start_all(|_| {}, change, &[]).await
        }

        /// `before`: jobs that an earlier life of the node left in the journal.
        async fn start_after(before: &[(u64, UnixMs)]) -> Self {
            Self::start_all(|_| {}, |_| {}, before).await
        }

        async fn start_all(
            change_conf: impl FnOnce(&mut Conf),
            change_backend: impl FnOnce(&mut Backend),
            before: &[(u64, UnixMs)],
        ) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let embedded::Embedded { node, mut backend, .. } = embedded::open(dir.path()).unwrap();
            let mut conf = Conf::shipped().unwrap();
            change_conf(&mut conf);
            change_backend(&mut backend);
            let metrics = Arc::new(Metrics::new(10).unwrap());
            let (audit, books) = audit::new(&conf.memory, (&backend).into(), None, Arc::clone(&metrics));
            let (dispatcher, mut loops) = new(Parts {
                node,
                memory: &conf.memory,
                fleet: &conf.fleet,
                dead_letter: &conf.dead_letter,
                batch: Live::new(conf.batch),
                overload: Live::new(conf.overload),
                backend: &backend,
                audit,
                ledger: Arc::clone(&books.ledger),
                metrics,
            });
            let left: Vec<Job> = before.iter().map(|(n, deadline)| job(node, *n, *deadline)).collect();
            backend.journal.enter(&left).await.unwrap();
            assert_eq!(loops.members.begin().await, Ok(before.len()));
            let mut running = JoinSet::new();
            running.spawn(loops.batches.run(std::future::pending()));
            running.spawn(loops.pump.run());
            running.spawn(loops.lookups.run());
            running.spawn(books.flusher.run(loops.rows, std::future::pending()));
            running.spawn(books.ledger.run(std::future::pending()));
            Self { dispatcher, backend, node, _loops: running, _dir: dir }
        }

        async fn row_status(&self, id: JobId) -> String {
            let function = FunctionId::parse("hello").unwrap();
            eventually(async || {
                let row = self.backend.executions.get(&function, &id.to_string()).await.unwrap()?;
                Some(row.status.to_string())
            })
            .await
        }

        async fn is_forgotten(&self, id: JobId) {
            eventually(async || (!self.backend.journal.contains(id).await.unwrap()).then_some(())).await;
        }
    }

    async fn eventually<T>(look: impl AsyncFn() -> Option<T>) -> T {
        let found = async {
            loop {
                if let Some(found) = look().await {
                    return found;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), found).await.expect("in time")
    }

    fn job(node: NodeId, n: u64, deadline: UnixMs) -> Job {
        let id = JobId::new(node, now_ms(), n);
        Job {
            id,
            function: FunctionId::parse("hello").unwrap(),
            deadline,
            idempotency_key: None,
            message: "{}".into(),
        }
    }

    fn outcome(text: &str) -> Outcome {
        Outcome::new(text.to_owned().into())
    }

    const LATER: UnixMs = 4_000_000_000_000;

    #[tokio::test]
    async fn a_result_answers_the_waiter_and_becomes_one_row() {
        let house = House::start(|_| {}).await;
        let job = job(house.node, 1, LATER);
        let id = job.id;
        let mut submitted = house.dispatcher.submit_waiting(job, Held::new()).unwrap();
        submitted.sent.await.unwrap().unwrap();
        for published in [r#"{"status":"SUCCESS"}"#, r#"{"status":"FAILED"}"#] {
            house.dispatcher.0.settler.settle(id, outcome(published));
        }
        assert_eq!(submitted.waiter.outcome().await, Some(outcome(r#"{"status":"SUCCESS"}"#)));
        assert_eq!(house.row_status(id).await, "SUCCESS");
        house.is_forgotten(id).await;
        let function = FunctionId::parse("hello").unwrap();
        let query = LogQuery { function, limit: 10, start: None, end: None, status: None, after: None };
        assert_eq!(house.backend.executions.list(&query).await.unwrap().rows.len(), 1);
        assert!(matches!(house.dispatcher.state(id).await, Ok(JobState::Done(_))), "kept for /status");
    }

    #[tokio::test]
    async fn a_job_past_its_deadline_ends_as_lost() {
        let house = House::start(|_| {}).await;
        let job = job(house.node, 1, now_ms());
        let id = job.id;
        house.dispatcher.submit(job, Held::new()).unwrap().await.unwrap().unwrap();
        assert_eq!(house.row_status(id).await, "LOST");
        house.is_forgotten(id).await;
    }

    /// Results that cannot be asked for while `away`.
    struct Flaky {
        inner: Arc<dyn Results>,
        away: AtomicBool,
        refused: AtomicUsize,
    }

    #[async_trait]
    impl Results for Flaky {
        /// Without the look at all jobs that follows a subscription: only the planned look-ups are to be seen.
        async fn next(&self) -> ResultEvent {
            loop {
                let event = self.inner.next().await;
                if event != ResultEvent::Subscribed {
                    return event;
                }
            }
        }

        async fn stored(&self, ids: &[JobId]) -> Result<Vec<Option<Bytes>>, BackendError> {
            if self.away.load(Ordering::Relaxed) {
                self.refused.fetch_add(1, Ordering::Relaxed);
                return Err(BackendError::Unavailable("away".into()));
            }
            self.inner.stored(ids).await
        }

        async fn stored_foreign(&self, request_id: &str) -> Result<Option<Bytes>, BackendError> {
            self.inner.stored_foreign(request_id).await
        }

        async fn wait_for(&self, id: JobId) -> Result<Bytes, BackendError> {
            self.inner.wait_for(id).await
        }

        fn store_name(&self) -> &'static str {
            self.inner.store_name()
        }

        async fn ping(&self) -> Result<(), BackendError> {
            self.inner.ping().await
        }
    }

    #[tokio::test]
    async fn no_job_is_lost_because_its_result_could_not_be_asked_for() {
        let flaky = Arc::new(std::sync::OnceLock::new());
        let house = House::start_with(|backend| {
            let flaky = flaky.get_or_init(|| {
                let (away, refused) = (AtomicBool::new(true), AtomicUsize::new(0));
                Arc::new(Flaky { inner: Arc::clone(&backend.results), away, refused })
            });
            backend.results = Arc::clone(flaky) as _;
        })
        .await;
        let job = job(house.node, 1, now_ms());
        let id = job.id;
        house.dispatcher.submit(job, Held::new()).unwrap().await.unwrap().unwrap();
        let state = house.dispatcher.state(id).await;
        assert!(matches!(state, Ok(JobState::Pending(_))), "what this node holds is known without the store");
        let flaky = flaky.get().unwrap();
        let before = flaky.refused.load(Ordering::Relaxed);
        // The second look-up is planned only if the first, unanswered, has not ended the job.
        eventually(async || (flaky.refused.load(Ordering::Relaxed) >= before + 2).then_some(())).await;
        assert!(house.dispatcher.0.settler.in_flight.awaited(id).is_some());
        flaky.away.store(false, Ordering::Relaxed);
        assert_eq!(house.row_status(id).await, "LOST");
    }

    #[tokio::test]
    async fn a_restarted_node_goes_on_with_its_jobs() {
        let house = House::start_after(&[(1, LATER), (2, 1)]).await;
        let entries: Vec<JournalEntry> = house.backend.journal.entries(house.node).await.unwrap();
        let due = entries.iter().find(|entry| entry.deadline == 1).unwrap().id;
        let open = entries.iter().find(|entry| entry.deadline == LATER).unwrap().id;
        assert_eq!(house.row_status(due).await, "LOST");
        assert!(matches!(
            house.dispatcher.state(open).await,
            Ok(JobState::Pending(Pending { place: Some(_), .. }))
        ));
        house.dispatcher.0.settler.settle(open, outcome(r#"{"exitCode":0}"#));
        assert_eq!(house.row_status(open).await, "SUCCESS");
    }

    /// Its result is published for its own node: only look-ups end it here.
    #[tokio::test]
    async fn a_job_of_another_node_that_could_not_be_sent_again_ends() {
        let house = House::start(|conf| conf.batch.queue_jobs_max = 0).await;
        let job = job(NodeId(99), 1, now_ms());
        let id = job.id;
        house.backend.journal.enter(std::slice::from_ref(&job)).await.unwrap();
        let resend = Resend { since: now_ms(), is_journaled: true, maybe_sent: true };
        let sent = house.dispatcher.submit_again(job, resend, false).await;
        assert_eq!(sent.map(drop), Err(SubmitError::Overloaded));
        assert_eq!(house.row_status(id).await, "LOST");
        house.is_forgotten(id).await;
    }

    #[tokio::test]
    async fn a_row_without_room_is_taken_up_again_later() {
        let house = House::start(|conf| conf.memory.audit_bytes_max = 1).await;
        let job = job(house.node, 1, LATER);
        let id = job.id;
        let mut submitted = house.dispatcher.submit_waiting(job, Held::new()).unwrap();
        submitted.sent.await.unwrap().unwrap();
        let settler = &house.dispatcher.0.settler;
        settler.settle(id, outcome("{}"));
        assert_eq!(
            submitted.waiter.outcome().await,
            Some(outcome("{}")),
            "the client does not wait for the row"
        );
        assert!(settler.in_flight.awaited(id).is_some(), "but the job is not forgotten");
        assert_eq!(settler.metrics.results.with_label_values(&["deferred"]).get(), 1);
    }

    #[tokio::test]
    async fn no_more_jobs_than_there_is_room_for() {
        let house = House::start(|conf| conf.memory.jobs_in_flight_max = 1).await;
        house.dispatcher.submit(job(house.node, 1, LATER), Held::new()).unwrap().await.unwrap().unwrap();
        assert_eq!(
            house.dispatcher.submit(job(house.node, 2, LATER), Held::new()).map(drop),
            Err(SubmitError::Overloaded)
        );
        assert!(matches!(house.dispatcher.state(job(house.node, 3, LATER).id).await, Ok(JobState::Unknown)));
    }
}
