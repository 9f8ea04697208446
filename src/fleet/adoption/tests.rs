//! The counts must survive a store that loses its data at any moment. Each test is one interleaving that once
//! produced wrong counts.

use super::*;
use crate::audit::{self, Stores};
use crate::backend::{
    Addition, Claim, Claims, EndOutcome, EndedJob, ExecutionStore, FleetState, FunctionPage, FunctionStore,
    FunctionWrite, FunctionWriteOutcome, Journal, LeaseOutcome, LeaseRenewal, LogPage, LogQuery,
    NumberedSums, Predecessor, ResultEvent, Results, StoredClaim, UnpostedSums,
};
use crate::config::Conf;
use crate::model::{Execution, Function, IdempotencyKey, Job, Outcome, Recommendation, RowId, Sums};
use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use tokio::task::JoinSet;

const NODE: NodeId = NodeId(1);

/// The data of one node in Redis. The methods behave like the scripts.
#[derive(Default)]
struct Data {
    is_whole: bool,
    telling: Option<u64>,
    in_flight: HashMap<JobId, JournalEntry>,
    sums: HashMap<FunctionId, Sums>,
    numbered: HashMap<FunctionId, NumberedSums>,
    last_number: u64,
    given_up: HashMap<JobId, FunctionId>,
}

/// Redis and the tables, with faults that can be injected.
#[derive(Default)]
struct Store {
    nodes: Mutex<HashMap<NodeId, Data>>,
    listed: Mutex<HashSet<NodeId>>,
    /// The last number and the sums of each function and node.
    functions: Mutex<HashMap<(FunctionId, NodeId), (u64, Sums)>>,
    rows: Mutex<HashMap<String, Execution>>,
    clock: AtomicU64,
    /// These calls take effect, but their answers are lost.
    ends_unanswered: AtomicBool,
    numbers_unanswered: AtomicBool,
    /// These calls fail without an effect.
    ends_fail: AtomicBool,
    rows_fail: AtomicBool,
    /// The number of restored parts after which the data is lost again; 0: never.
    lost_after: AtomicUsize,
}

fn unavailable() -> BackendError {
    BackendError::Unavailable("x".into())
}

impl Store {
    fn with<T>(&self, node: NodeId, work: impl FnOnce(&mut Data) -> T) -> T {
        work(self.nodes.lock().entry(node).or_default())
    }

    fn lose_all(&self) {
        self.nodes.lock().clear();
        self.listed.lock().clear();
    }

    fn answer<T>(&self, is_lost: &AtomicBool, answer: T) -> Result<T, BackendError> {
        if is_lost.load(Ordering::Relaxed) { Err(unavailable()) } else { Ok(answer) }
    }

    /// The invocations and errors that the functions have.
    fn counted(&self) -> (i64, i64) {
        let functions = self.functions.lock();
        functions.values().fold((0, 0), |(n, e), (_, sums)| (n + sums.invocations, e + sums.errors))
    }
}

#[async_trait]
impl Journal for Store {
    async fn enter(&self, jobs: &[Job]) -> Result<(), BackendError> {
        for job in jobs {
            let (function, deadline) = (job.function.clone(), job.deadline);
            let entry = JournalEntry { id: job.id, function, deadline, idempotency_key: None };
            self.with(job.id.node(), |data| data.in_flight.insert(job.id, entry));
        }
        Ok(())
    }

    async fn leave(&self, ids: &[JobId]) -> Result<(), BackendError> {
        ids.iter().for_each(|id| drop(self.with(id.node(), |data| data.in_flight.remove(id))));
        Ok(())
    }

    async fn end(&self, node: NodeId, ended: &[EndedJob]) -> Result<EndOutcome, BackendError> {
        if self.ends_fail.load(Ordering::Relaxed) {
            return Err(unavailable());
        }
        let outcome = self.with(node, |data| {
            if !data.is_whole {
                return EndOutcome::Incomplete;
            }
            let mut added = Vec::new();
            for EndedJob { id, function, adds, is_lost, .. } in ended {
                let addition = if data.in_flight.remove(id).is_some() {
                    if *is_lost {
                        data.given_up.insert(*id, function.clone());
                    }
                    Addition::Whole
                } else if !is_lost && data.given_up.remove(id).is_some() {
                    Addition::Difference
                } else {
                    Addition::Nothing
                };
                *data.sums.entry(function.clone()).or_default() += addition.of(*adds);
                added.push(addition);
            }
            EndOutcome::Each(added)
        });
        self.answer(&self.ends_unanswered, outcome)
    }

    async fn given_up(&self, node: NodeId) -> Result<Vec<(JobId, FunctionId)>, BackendError> {
        Ok(self.with(node, |data| data.given_up.clone().into_iter().collect()))
    }

    async fn unposted(&self, node: NodeId) -> Result<Option<UnpostedSums>, BackendError> {
        Ok(self.with(node, |data| {
            let sums = data.sums.clone().into_iter().collect();
            let numbered = data.numbered.values().cloned().collect();
            data.is_whole.then_some(UnpostedSums { numbered, sums })
        }))
    }

    async fn number(
        &self,
        node: NodeId,
        functions: &[FunctionId],
        floor: u64,
    ) -> Result<Option<UnpostedSums>, BackendError> {
        let clock = self.clock.fetch_add(1, Ordering::Relaxed);
        let unposted = self.with(node, |data| {
            let mut unposted = UnpostedSums::default();
            for function in functions {
                if !data.numbered.contains_key(function)
                    && let Some(sums) = data.sums.remove(function)
                {
                    data.last_number = data.last_number.max(clock).max(floor) + 1;
                    let numbered =
                        NumberedSums { function: function.clone(), number: data.last_number, sums };
                    data.numbered.insert(function.clone(), numbered);
                }
                unposted.numbered.extend(data.numbered.get(function).cloned());
                unposted.sums.extend(data.sums.get(function).map(|sums| (function.clone(), *sums)));
            }
            data.is_whole.then_some(unposted)
        });
        self.answer(&self.numbers_unanswered, unposted)
    }

    async fn post(
        &self,
        node: NodeId,
        numbered: Vec<NumberedSums>,
        _: usize,
    ) -> (Vec<NumberedSums>, Option<BackendError>) {
        for posted in numbered {
            let mut functions = self.functions.lock();
            let (number, sums) = functions.entry((posted.function.clone(), node)).or_default();
            if posted.number > *number {
                *number = posted.number;
                *sums += posted.sums;
            }
            self.with(node, |data| {
                if data.numbered.get(&posted.function) == Some(&posted) {
                    data.numbered.remove(&posted.function);
                }
            });
        }
        (Vec::new(), None)
    }

    async fn contains(&self, id: JobId) -> Result<bool, BackendError> {
        Ok(self.with(id.node(), |data| data.in_flight.contains_key(&id)))
    }

    async fn entries(&self, node: NodeId) -> Result<Vec<JournalEntry>, BackendError> {
        Ok(self.with(node, |data| data.in_flight.values().cloned().collect()))
    }
}

#[async_trait]
impl Membership for Store {
    async fn take(&self, _: NodeId, _: Duration, _: Predecessor) -> Result<LeaseOutcome, BackendError> {
        Ok(LeaseOutcome::Yes)
    }

    async fn renew(&self, node: NodeId, _: Duration) -> Result<LeaseRenewal, BackendError> {
        self.listed.lock().insert(node);
        let others = FleetState { lapsed: Vec::new(), alive: 1 };
        Ok(LeaseRenewal::Renewed { others, is_contested: false, adoptions: 0 })
    }

    async fn adopt(&self, _: NodeId, _: NodeId, _: Duration) -> Result<AdoptOutcome, BackendError> {
        Ok(AdoptOutcome::Adopted)
    }

    async fn dismiss(&self, dead: NodeId) -> Result<bool, BackendError> {
        Ok(self.listed.lock().remove(&dead))
    }

    async fn entrust(&self, _: NodeId) -> Result<(), BackendError> {
        Ok(())
    }

    async fn relist(&self, node: NodeId) -> Result<bool, BackendError> {
        Ok(self.listed.lock().insert(node))
    }

    async fn is_complete(&self, node: NodeId) -> Result<bool, BackendError> {
        Ok(self.with(node, |data| data.is_whole))
    }

    async fn begin_restore(&self, node: NodeId, token: u64) -> Result<bool, BackendError> {
        Ok(self.with(node, |data| {
            if !data.is_whole {
                data.telling = Some(token);
            }
            !data.is_whole
        }))
    }

    async fn restore(&self, node: NodeId, token: u64, told: JournalPart<'_>) -> Result<bool, BackendError> {
        let is_told = self.with(node, |data| {
            if data.telling != Some(token) {
                return false;
            }
            match told {
                JournalPart::Jobs(jobs) => {
                    data.in_flight.extend(jobs.iter().map(|job| (job.id, job.clone())));
                }
                JournalPart::Sums(sums) => data.sums.extend(sums.iter().cloned()),
                JournalPart::Numbered(all) => {
                    data.numbered.extend(all.iter().map(|n| (n.function.clone(), n.clone())));
                }
                JournalPart::GivenUp(jobs) => data.given_up.extend(jobs.iter().cloned()),
            }
            true
        });
        if self.lost_after.load(Ordering::Relaxed) > 0 && self.lost_after.fetch_sub(1, Ordering::Relaxed) == 1
        {
            self.lose_all();
        }
        Ok(is_told)
    }

    async fn finish_restore(&self, node: NodeId, token: u64) -> Result<bool, BackendError> {
        Ok(self.with(node, |data| {
            let is_told = data.telling.take() == Some(token);
            data.is_whole |= is_told;
            is_told
        }))
    }
}

#[async_trait]
impl ExecutionStore for Store {
    async fn put(&self, rows: &[Execution]) -> Vec<Result<(), BackendError>> {
        if self.rows_fail.load(Ordering::Relaxed) {
            return vec![Err(unavailable()); rows.len()];
        }
        self.rows.lock().extend(rows.iter().map(|row| (row.id.key().into_owned(), row.clone())));
        vec![Ok(()); rows.len()]
    }

    async fn list(&self, _: &LogQuery) -> Result<LogPage, BackendError> {
        Ok(LogPage::default())
    }

    async fn get(&self, _: &FunctionId, _: &str) -> Result<Option<Execution>, BackendError> {
        Ok(None)
    }

    async fn probe(&self) -> Result<(), BackendError> {
        Ok(())
    }
}

#[async_trait]
impl FunctionStore for Store {
    async fn get(&self, _: &FunctionId) -> Result<Option<Function>, BackendError> {
        Ok(None)
    }

    async fn list(&self, _: usize, _: Option<&str>) -> Result<FunctionPage, BackendError> {
        Ok(FunctionPage::default())
    }

    async fn write(&self, _: &FunctionWrite) -> Result<FunctionWriteOutcome, BackendError> {
        Ok(FunctionWriteOutcome::Conflict)
    }

    async fn recommend(&self, _: &FunctionId, _: &Recommendation) -> Result<(), BackendError> {
        Ok(())
    }

    async fn probe(&self) -> Result<(), BackendError> {
        Ok(())
    }
}

#[async_trait]
impl Claims for Store {
    async fn claim(&self, _: &Claim) -> Result<Option<StoredClaim>, BackendError> {
        Ok(None)
    }

    async fn find(&self, _: &IdempotencyKey) -> Result<Option<StoredClaim>, BackendError> {
        Ok(None)
    }

    async fn try_again(&self, _: &StoredClaim, _: JobId) -> Result<bool, BackendError> {
        Ok(false)
    }

    async fn confirm(&self, _: &Claim) -> Result<(), BackendError> {
        Ok(())
    }

    async fn release(&self, _: &Claim, _: JobId) -> Result<bool, BackendError> {
        Ok(false)
    }

    async fn keep(&self, _: &IdempotencyKey, _: JobId, _: &Bytes) -> Result<(), BackendError> {
        Ok(())
    }
}

#[async_trait]
impl Results for Store {
    fn store_name(&self) -> &'static str {
        "store"
    }

    async fn next(&self) -> ResultEvent {
        std::future::pending().await
    }

    async fn stored(&self, ids: &[JobId]) -> Result<Vec<Option<Bytes>>, BackendError> {
        Ok(vec![None; ids.len()])
    }

    async fn stored_foreign(&self, _: &str) -> Result<Option<Bytes>, BackendError> {
        Ok(None)
    }

    async fn wait_for(&self, _: JobId) -> Result<Bytes, BackendError> {
        std::future::pending().await
    }

    async fn ping(&self) -> Result<(), BackendError> {
        Ok(())
    }
}

/// A node over the store. The tests drive its membership; all other loops run, in virtual time.
struct Fixture {
    store: Arc<Store>,
    members: Adopter,
    _loops: JoinSet<()>,
}

const LEASE: Duration = Duration::from_secs(10);
/// After this time rows are written, and their jobs have left the journal.
const CLOSED: Duration = Duration::from_millis(400);
/// After this time all sums are posted.
const POSTED: Duration = Duration::from_secs(5);
const LATER: u64 = 4_000_000_000_000;

impl Fixture {
    async fn start(store: &Arc<Store>, node: NodeId) -> Self {
        let conf = Conf::shipped().unwrap();
        let metrics = Arc::new(Metrics::new(10).unwrap());
        let of = || Arc::clone(store);
        let (executions, claims, journal, functions) = (of(), of(), of(), of());
        let stores = Stores { executions, claims, journal, functions, node, membership: Some(of()) };
        let lease = Arc::new(NodeLease::lapsed());
        let (audit, books) = audit::new(&conf.memory, stores, None, Arc::clone(&lease), Arc::clone(&metrics));
        let (jobs, lookups, rows) = NodeJobs::without_queue(of(), of(), &lease, audit, &metrics);
        let ledger = Arc::clone(&books.ledger);
        let fleet = FleetConf { lease_s: LEASE.as_secs() };
        let mut members = Adopter::new(node, &fleet, Some(of()), lease, jobs, ledger, metrics);
        members.begin().await.unwrap();
        let lapses_at = u64::try_from(members.metrics.jobs.lease_ends_at.get()).unwrap();
        assert!(lapses_at * 1000 > now_ms(), "{lapses_at}");
        let mut loops = JoinSet::new();
        loops.spawn(books.flusher.run(rows, std::future::pending()));
        loops.spawn(books.ledger.run(std::future::pending()));
        loops.spawn(lookups.run());
        Self { store: of(), members, _loops: loops }
    }

    async fn accept(&self, n: u64, deadline: u64) -> JobId {
        let id = JobId::new(self.members.node, 1000, n);
        let function = FunctionId::parse("f").unwrap();
        let job = Job {
            id,
            function,
            deadline,
            progress: None,
            idempotency_key: None,
            is_promised: true,
            message: "{}".into(),
            trace: None,
        };
        self.members.jobs.enter(&job);
        self.store.enter(&[job]).await.unwrap();
        id
    }

    fn settle(&self, id: JobId) {
        self.members.jobs.settle(id, Outcome::new(r#"{"status":"SUCCESS","durationMs":1}"#.into()));
    }

    async fn run(&self, n: u64) {
        let id = self.accept(n, LATER).await;
        self.settle(id);
        tokio::time::sleep(CLOSED).await;
    }

    async fn mend(&self) -> Result<(), BackendError> {
        self.members.mend(self.store.as_ref(), self.members.node).await
    }

    /// Restores the journal, waits until all sums are posted, and returns the counts.
    async fn counted(&self) -> (i64, i64) {
        assert_eq!(self.mend().await, Ok(()));
        tokio::time::sleep(POSTED).await;
        self.store.counted()
    }
}

fn set(flag: &AtomicBool, is_set: bool) {
    flag.store(is_set, Ordering::Relaxed);
}

async fn fixture() -> Fixture {
    Fixture::start(&Arc::default(), NODE).await
}

/// A round of posts before the restore treated the empty answer of the store as complete.
#[tokio::test(start_paused = true)]
async fn a_round_of_posts_between_the_loss_and_the_restore_loses_no_sums() {
    let fixture = fixture().await;
    fixture.run(1).await;
    assert_eq!(fixture.store.counted(), (0, 0), "not posted yet");
    fixture.store.lose_all();
    tokio::time::sleep(POSTED).await;
    assert_eq!(fixture.counted().await, (1, 0));
}

/// An `end` took effect without an answer, and its amounts were posted. Then the job, which was still in the
/// ledger, was restored and counted again.
#[tokio::test(start_paused = true)]
async fn sums_are_not_posted_while_the_outcome_of_an_end_is_unknown() {
    let fixture = fixture().await;
    fixture.run(1).await;
    set(&fixture.store.ends_unanswered, true);
    fixture.run(2).await;
    tokio::time::sleep(POSTED).await;
    fixture.store.lose_all();
    set(&fixture.store.ends_unanswered, false);
    assert_eq!(fixture.counted().await, (2, 0));
}

/// The answer that assigned the numbers was lost, so the ledger held the sums twice.
#[tokio::test(start_paused = true)]
async fn sums_numbered_without_an_answer_are_restored_once() {
    let fixture = fixture().await;
    set(&fixture.store.numbers_unanswered, true);
    fixture.run(1).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    fixture.run(2).await;
    set(&fixture.store.numbers_unanswered, false);
    while fixture.store.counted() == (0, 0) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    fixture.store.lose_all();
    assert_eq!(fixture.counted().await, (2, 0));
}

/// The store lost its data between the jobs and the sums of a restore, and was then taken as complete.
#[tokio::test(start_paused = true)]
async fn a_restore_that_is_interrupted_by_another_loss_is_repeated() {
    let fixture = fixture().await;
    fixture.run(1).await;
    let id = fixture.accept(2, LATER).await;
    fixture.store.lose_all();
    fixture.store.lost_after.store(1, Ordering::Relaxed);
    assert!(fixture.mend().await.is_err());
    assert_eq!(fixture.mend().await, Ok(()));
    fixture.settle(id);
    assert_eq!(fixture.counted().await, (2, 0));
}

/// The job was counted as lost. Only its row, queued or written but not counted yet, showed the late result.
#[tokio::test(start_paused = true)]
async fn a_late_result_in_flight_corrects_the_counts() {
    for is_row_written in [false, true] {
        let fixture = fixture().await;
        let id = fixture.accept(1, 1).await;
        tokio::time::sleep(POSTED).await;
        assert_eq!(fixture.store.counted(), (1, 1), "lost");
        let stuck = if is_row_written { &fixture.store.ends_fail } else { &fixture.store.rows_fail };
        set(stuck, true);
        fixture.settle(id);
        tokio::time::sleep(CLOSED).await;
        fixture.store.lose_all();
        assert_eq!(fixture.mend().await, Ok(()));
        set(stuck, false);
        tokio::time::sleep(POSTED).await;
        assert_eq!(fixture.counted().await, (1, 0), "the row is written: {is_row_written}");
    }
}

/// A restarted node knew that its predecessor had left sums, but not their amounts.
#[tokio::test(start_paused = true)]
async fn a_restarted_node_restores_the_sums_of_its_predecessor() {
    let store = Arc::default();
    let first = Fixture::start(&store, NODE).await;
    first.run(1).await;
    drop(first);
    assert_eq!(store.counted(), (0, 0), "not posted yet");
    let second = Fixture::start(&store, NODE).await;
    store.lose_all();
    assert_eq!(second.counted().await, (1, 0));
}

/// The clock of the new store is behind. A function ignores a number that is not above its last one.
#[tokio::test(start_paused = true)]
async fn numbers_grow_although_the_new_store_has_an_earlier_clock() {
    let fixture = fixture().await;
    fixture.store.clock.store(1_000_000, Ordering::Relaxed);
    fixture.run(1).await;
    assert_eq!(fixture.counted().await, (1, 0));
    fixture.store.lose_all();
    fixture.store.clock.store(1000, Ordering::Relaxed);
    assert_eq!(fixture.mend().await, Ok(()));
    fixture.run(2).await;
    assert_eq!(fixture.counted().await, (2, 0));
}

/// The node is dead and its listing was lost with the data, so no other node would restore its journal.
#[tokio::test(start_paused = true)]
async fn a_job_of_an_unlisted_dead_node_ends() {
    let mut fixture = Fixture::start(&Arc::default(), NodeId(2)).await;
    let store = Arc::clone(&fixture.store);
    let id = JobId::new(NODE, 1000, 1);
    let function = FunctionId::parse("f").unwrap();
    let job = Job {
        id,
        function,
        deadline: LATER,
        progress: None,
        idempotency_key: None,
        is_promised: true,
        message: "{}".into(),
        trace: None,
    };
    store.enter(&[job]).await.unwrap();
    fixture.members.adopt(store.as_ref(), NODE).await.unwrap();
    fixture.members.adopted.clear();
    set(&store.ends_fail, true);
    fixture.settle(id);
    tokio::time::sleep(CLOSED).await;
    store.lose_all();
    set(&store.ends_fail, false);
    for _ in 0..3 * RENEWALS {
        fixture.members.renew(store.as_ref()).await.unwrap();
        fixture.members.look_after(store.as_ref(), Vec::new()).await.unwrap();
        tokio::time::sleep(LEASE / RENEWALS).await;
    }
    assert_eq!(fixture.counted().await, (1, 0));
    assert!(fixture.members.ledger.nodes().is_empty());
    assert!(store.rows.lock().contains_key(&*RowId::Job(id).key()));
}

/// The node is back and may withdraw its job without notice to other nodes. A job that had a waiter at that
/// moment must not stay here until its deadline and then end as LOST.
#[tokio::test(start_paused = true)]
async fn a_job_with_a_waiter_is_given_back_later() {
    let mut fixture = Fixture::start(&Arc::default(), NodeId(2)).await;
    let store = Arc::clone(&fixture.store);
    let jobs = fixture.members.jobs.clone();
    let function = FunctionId::parse("f").unwrap();
    let job = |n| {
        let id = JobId::new(NODE, 1000, n);
        Job {
            progress: None,
            id,
            function: function.clone(),
            deadline: LATER,
            idempotency_key: None,
            is_promised: true,
            message: "{}".into(),
            trace: None,
        }
    };
    store.enter(&[job(1), job(2)]).await.unwrap();
    fixture.members.adopt(store.as_ref(), NODE).await.unwrap();
    let waiter = jobs.wait_for(job(1).id);
    store.relist(NODE).await.unwrap();
    fixture.members.look_after(store.as_ref(), Vec::new()).await.unwrap();
    assert_eq!(jobs.ids_of_node(NODE), [job(1).id]);
    drop(waiter);
    fixture.members.look_after(store.as_ref(), Vec::new()).await.unwrap();
    assert_eq!(jobs.ids_of_node(NODE), []);
}
