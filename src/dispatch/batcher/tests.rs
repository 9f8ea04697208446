use super::*;
use crate::backend::{BackendError, EndOutcome, EndedJob, Journal, JournalEntry, QueueTraits};
use crate::config::Conf;
use crate::dispatch::Permits;
use crate::model::{IdempotencyKey, JobId, JobOrigin, JobProgress, NodeId, Outcome, RowLife};
use crate::node_lease::NodeLease;
use async_trait::async_trait;
use parking_lot::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Takes 8 ms per batch. Answers from a script, one entry per batch, then `Ok`.
struct ScriptedQueue {
    fifo: bool,
    script: Mutex<VecDeque<Result<(), SendError>>>,
    batches: Mutex<Vec<Vec<(String, u64)>>>,
    in_flight: AtomicUsize,
    in_flight_most: AtomicUsize,
}

impl ScriptedQueue {
    fn new(fifo: bool, script: &[Result<(), SendError>]) -> Arc<Self> {
        Arc::new(Self {
            fifo,
            script: Mutex::new(script.iter().cloned().collect()),
            batches: Mutex::default(),
            in_flight: AtomicUsize::new(0),
            in_flight_most: AtomicUsize::new(0),
        })
    }

    fn sizes(&self) -> Vec<usize> {
        self.batches.lock().iter().map(Vec::len).collect()
    }
}

#[async_trait]
impl JobQueue for ScriptedQueue {
    async fn send_batch(&self, jobs: &[Job]) -> Vec<Result<(), SendError>> {
        let seen = jobs.iter().map(|job| (job.function.to_string(), job.deadline)).collect();
        self.batches.lock().push(seen);
        let now = self.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
        self.in_flight_most.fetch_max(now, Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(8)).await;
        self.in_flight.fetch_sub(1, Ordering::SeqCst);
        let result = self.script.lock().pop_front().unwrap_or(Ok(()));
        vec![result; jobs.len()]
    }

    fn traits(&self) -> QueueTraits {
        QueueTraits { message_bytes_max: 1000, retention: Duration::from_secs(60), fifo: self.fifo }
    }

    async fn depth(&self) -> Result<u64, BackendError> {
        Ok(0)
    }
}

#[derive(Default)]
struct SetJournal {
    held: Mutex<HashSet<JobId>>,
    broken: bool,
}

#[async_trait]
impl Journal for SetJournal {
    async fn enter(&self, jobs: &[Job]) -> Result<(), BackendError> {
        if self.broken {
            return Err(BackendError::Unavailable("broken".into()));
        }
        self.held.lock().extend(jobs.iter().map(|job| job.id));
        Ok(())
    }

    async fn leave(&self, ids: &[JobId]) -> Result<(), BackendError> {
        tokio::task::yield_now().await; // other tasks run while a store works
        self.held.lock().retain(|id| !ids.contains(id));
        Ok(())
    }

    async fn end(&self, _: NodeId, _: &[EndedJob]) -> Result<EndOutcome, BackendError> {
        Ok(EndOutcome::AllAdded)
    }

    async fn given_up(&self, _: NodeId) -> Result<Vec<(JobId, FunctionId)>, BackendError> {
        Ok(Vec::new())
    }

    async fn contains(&self, id: JobId) -> Result<bool, BackendError> {
        Ok(self.held.lock().contains(&id))
    }

    async fn entries(&self, _: NodeId) -> Result<Vec<JournalEntry>, BackendError> {
        Ok(Vec::new())
    }
}

struct Fixture {
    batcher: Batcher,
    queue: Arc<ScriptedQueue>,
    journal: Arc<SetJournal>,
    leaves: Arc<NodeJournal>,
    in_flight: Arc<InFlight>,
}

const CONF: BatchConf =
    BatchConf { linger_ms: 10, sends_eager: 2, sends_max: 4, queue_jobs_max: 100, send_deadline_ms: 2000 };

/// Creates the loop; it ends when the handle is dropped.
fn fixture(queue: Arc<ScriptedQueue>, journal: SetJournal) -> (Fixture, impl Future<Output = ()>) {
    fixture_of(CONF, queue, journal)
}

fn fixture_of(
    conf: BatchConf,
    queue: Arc<ScriptedQueue>,
    journal: SetJournal,
) -> (Fixture, impl Future<Output = ()>) {
    let metrics = Arc::new(Metrics::new(1).unwrap());
    let in_flight = Arc::new(InFlight::new(1000, 0, Arc::clone(&metrics)));
    let journal = Arc::new(journal);
    let leaves = Arc::new(NodeJournal::new(Arc::clone(&journal) as _, Arc::new(NodeLease::endless())));
    let overload = Conf::shipped().unwrap().overload;
    let shedder = Arc::new(Shedder::new(Live::new(overload), Arc::clone(&metrics)));
    let (batcher, batch_loop) = new(
        Live::new(conf),
        Arc::clone(&queue) as _,
        Arc::clone(&leaves),
        Arc::clone(&in_flight),
        shedder,
        Traces::default(),
        metrics,
    );
    (Fixture { batcher, queue, journal, leaves, in_flight }, batch_loop.run(std::future::pending()))
}

impl Fixture {
    fn send(&self, n: u64, function: &str, bytes: usize) -> oneshot::Receiver<Result<(), SubmitError>> {
        let function = FunctionId::parse(function).unwrap();
        let job = Job {
            progress: None,
            id: JobId::new(NodeId(1), 1, n),
            function,
            idempotency_key: None,
            is_promised: true,
            deadline: n,
            message: vec![b' '; bytes].into(),
            trace: None,
        };
        self.in_flight.enter(&job, Permits::new()).unwrap();
        self.batcher.send(job, None).unwrap()
    }
}

#[tokio::test(start_paused = true)]
async fn an_idle_batcher_adds_no_delay_and_a_busy_one_fills_batches() {
    let (fixture, run) = fixture(ScriptedQueue::new(false, &[]), SetJournal::default());
    let started = Instant::now();
    let work = async {
        assert_eq!(fixture.send(0, "f", 1).await.unwrap(), Ok(()));
        assert_eq!(started.elapsed(), Duration::from_millis(8), "only the time of the queue");
        let results: Vec<_> = (1..=40).map(|n| fixture.send(n, "f", 1)).collect();
        for result in results {
            assert_eq!(result.await.unwrap(), Ok(()));
        }
        assert_eq!(fixture.queue.sizes(), [1, 10, 10, 10, 10]);
        assert_eq!(fixture.queue.in_flight_most.load(Ordering::SeqCst), 4);
        assert_eq!(fixture.journal.held.lock().len(), 41, "jobs stay until their rows are written");
        drop(fixture);
    };
    tokio::join!(run, work);
}

#[tokio::test(start_paused = true)]
async fn a_batch_respects_the_size_limit() {
    let (fixture, run) = fixture(ScriptedQueue::new(false, &[]), SetJournal::default());
    let work = async {
        let results: Vec<_> = (0..5).map(|n| fixture.send(n, "f", 400)).collect();
        for result in results {
            assert_eq!(result.await.unwrap(), Ok(()));
        }
        assert_eq!(fixture.queue.sizes(), [2, 2, 1]);
        drop(fixture);
    };
    tokio::join!(run, work);
}

#[tokio::test(start_paused = true)]
async fn jobs_that_wait_past_their_deadline_fail_and_are_not_sent() {
    let conf = BatchConf { sends_eager: 1, sends_max: 1, send_deadline_ms: 12, ..CONF };
    let (fixture, run) = fixture_of(conf, ScriptedQueue::new(false, &[]), SetJournal::default());
    let started = Instant::now();
    let work = async {
        // One job per call, and a call takes 8 ms.
        let results = (0..5).map(|n| {
            let result = fixture.send(n, "f", 1000);
            async move { (result.await.unwrap(), started.elapsed().as_millis()) }
        });
        let results = futures_util::future::join_all(results).await;
        let late = vec![(Err(SubmitError::Unavailable), 12); 3];
        assert_eq!(results, [vec![(Ok(()), 8), (Ok(()), 16)], late].concat());
        assert_eq!(fixture.queue.sizes(), [1, 1]);
        assert_eq!(fixture.in_flight.unsettled().len(), 2);
        drop(fixture);
    };
    tokio::join!(run, work);
}

#[tokio::test(start_paused = true)]
async fn failures_reach_their_callers_and_are_cleaned_up() {
    let not_sent = Err(SendError::NotSent("x".into()));
    for (script, expected, kept) in [
        (vec![not_sent.clone(), not_sent.clone()], Ok(()), true),
        (vec![Err(SendError::Refused("x".into()))], Err(SubmitError::Refused), false),
        (vec![not_sent.clone(); 100], Err(SubmitError::Unavailable), false),
        (vec![Err(SendError::Unknown("x".into())); 100], Err(SubmitError::Unknown), true),
        (
            [vec![Err(SendError::Unknown("x".into()))], vec![not_sent; 100]].concat(),
            Err(SubmitError::Unknown),
            true,
        ),
    ] {
        let (fixture, run) = fixture(ScriptedQueue::new(false, &script), SetJournal::default());
        let work = async {
            let id = JobId::new(NodeId(1), 1, 7);
            assert_eq!(fixture.send(7, "f", 1).await.unwrap(), expected);
            assert_eq!(fixture.in_flight.awaited(id).is_some(), kept, "{expected:?}");
            tokio::task::yield_now().await; // the caller gets its result before the journal is updated
            fixture.leaves.clear().await;
            assert_eq!(fixture.journal.contains(id).await.unwrap(), kept, "{expected:?}");
            drop(fixture);
        };
        tokio::join!(run, work);
    }
}

/// A job with an idempotency key is kept until its key is released; a resent job has an unknown state.
#[tokio::test(start_paused = true)]
async fn a_keyed_job_is_kept_until_its_key_is_released() {
    let not_sent = vec![Err(SendError::NotSent("x".into())); 100];
    let again = |is_journaled| Some(Resend { since: now_ms(), is_journaled, maybe_sent: is_journaled });
    for (resend, script, expected, is_unconfirmed) in [
        (None, &not_sent[..], Err(SubmitError::Unavailable), false),
        (again(false), &not_sent, Err(SubmitError::Unknown), true),
        (again(true), &not_sent, Err(SubmitError::Unknown), true),
        (again(true), &[], Ok(()), false),
        // The send deadline has passed: the process was frozen since the claim.
        (
            Some(Resend { since: 1, is_journaled: true, maybe_sent: true }),
            &[],
            Err(SubmitError::Unknown),
            true,
        ),
    ] {
        let (fixture, run) = fixture(ScriptedQueue::new(false, script), SetJournal::default());
        let work = async {
            let id = JobId::new(NodeId(2), now_ms(), 7);
            let job = Job {
                progress: None,
                id,
                function: FunctionId::parse("f").unwrap(),
                deadline: 0,
                idempotency_key: Some(Box::new(IdempotencyKey::of("a", "b"))),
                is_promised: true,
                message: "{}".into(),
                trace: None,
            };
            match resend {
                None => fixture.in_flight.enter(&job, Permits::new()).unwrap(),
                Some(_) => drop(fixture.in_flight.enter_again(&job, false).unwrap()),
            }
            let sending = fixture.batcher.send(job, resend).unwrap();
            // A job that is being resent is not returned to its node meanwhile.
            if resend.is_some() {
                assert_eq!(fixture.in_flight.give_back([id]), []);
            }
            assert_eq!(sending.await.unwrap(), expected, "{resend:?}");
            fixture.leaves.clear().await;
            assert_eq!(fixture.in_flight.is_unconfirmed(id), Some(is_unconfirmed), "{resend:?}");
            drop(fixture);
        };
        tokio::join!(run, work);
    }
}

/// The deadline of a job gives no information about the queue, so no caller may get the answer that the queue
/// has the job.
#[tokio::test(start_paused = true)]
async fn a_job_that_is_lost_during_its_send_has_an_unknown_result() {
    let failed = Err(SendError::NotSent("throttled".into()));
    for lost_after_ms in [4, 12] {
        let (fixture, run) =
            fixture(ScriptedQueue::new(false, std::slice::from_ref(&failed)), SetJournal::default());
        let work = async {
            let id = JobId::new(NodeId(1), 1, 7);
            let sending = fixture.send(7, "f", 1);
            tokio::time::sleep(Duration::from_millis(lost_after_ms)).await;
            fixture.in_flight.settle(id, Outcome::lost(true));
            fixture.in_flight.remember(id, FunctionId::parse("f").unwrap(), RowLife::default());
            assert_eq!(sending.await.unwrap(), Err(SubmitError::Unknown));
            drop(fixture);
        };
        tokio::join!(run, work);
    }
}

#[tokio::test(start_paused = true)]
async fn a_job_that_ended_is_neither_resent_nor_kept_in_the_journal() {
    let late = Err(SendError::Unknown("no answer in time".into()));
    // The row may be written before the retry, or while the late answer is in flight.
    for ends_after_ms in [4, 12] {
        let (fixture, run) =
            fixture(ScriptedQueue::new(false, &[late.clone(), late.clone()]), SetJournal::default());
        let work = async {
            let id = JobId::new(NodeId(1), 1, 7);
            let mut sent = fixture.send(7, "f", 1);
            tokio::time::sleep(Duration::from_millis(ends_after_ms)).await;
            fixture.in_flight.remove(id);
            fixture.leaves.leave([id], Instant::now());
            fixture.leaves.clear().await; // as at the end of a job
            assert_eq!((&mut sent).await.unwrap(), Ok(()), "the job was on the queue");
            fixture.leaves.clear().await;
            assert!(!fixture.journal.contains(id).await.unwrap());
            assert_eq!(fixture.queue.sizes(), [1]);
            drop(fixture);
        };
        tokio::join!(run, work);
    }
}

/// Another node may have adopted an unsent job while this one stood still. It ends the job then.
#[tokio::test(start_paused = true)]
async fn an_unsent_job_stays_in_the_journal_if_another_node_may_have_it() {
    let not_sent = vec![Err(SendError::NotSent("x".into())); 100];
    for is_shared in [false, true] {
        let (fixture, run) = fixture(ScriptedQueue::new(false, &not_sent), SetJournal::default());
        let work = async {
            let id = JobId::new(NodeId(1), 1, 7);
            let sending = fixture.send(7, "f", 1);
            tokio::time::sleep(Duration::from_millis(4)).await;
            if is_shared {
                fixture.in_flight.share_all(); // as after a lapse of the lease
            }
            assert_eq!(sending.await.unwrap(), Err(SubmitError::Unavailable));
            fixture.leaves.clear().await;
            assert!(!fixture.in_flight.contains(id));
            assert_eq!(fixture.journal.contains(id).await.unwrap(), is_shared);
            assert_eq!(fixture.leaves.take_has_strangers(), is_shared);
            drop(fixture);
        };
        tokio::join!(run, work);
    }
}

#[tokio::test(start_paused = true)]
async fn a_job_stays_in_the_journal_if_its_node_was_adopted_meanwhile() {
    let (second, lease_s) = (Duration::from_secs(1), 10);
    let lease = Arc::new(NodeLease::lapsed());
    let renew = || lease.renewed(Instant::now(), lease_s * second, 2);
    let store = Arc::new(SetJournal::default());
    let journal = NodeJournal::new(Arc::clone(&store) as _, Arc::clone(&lease));
    renew();
    let before = Instant::now();
    let [a, b, c, d] = [1, 2, 3, 4].map(|n| JobId::new(NodeId(1), 1, n));
    store.held.lock().extend([a, b, c, d]);
    let leave = async |id, since| {
        journal.leave([id], since);
        journal.clear().await;
        (store.held.lock().contains(&id), journal.take_has_strangers())
    };
    assert_eq!(leave(a, before).await, (false, false));
    tokio::time::advance(2 * lease_s * second).await;
    assert_eq!(leave(b, Instant::now()).await, (true, false), "it is lapsed, so the job waits");
    renew();
    assert_eq!(leave(c, before).await, (false, false), "nobody has adopted the jobs");
    assert!(!store.held.lock().contains(&b));
    lease.shared();
    tokio::time::advance(second).await;
    assert_eq!(leave(d, before).await, (true, true), "another node has adopted it");
    assert_eq!(leave(d, Instant::now()).await, (false, false));
}

/// A job that was to leave is sent again before that.
#[tokio::test(start_paused = true)]
async fn a_job_that_enters_again_does_not_leave() {
    let (fixture, _run) = fixture(ScriptedQueue::new(false, &[]), SetJournal::default());
    let jobs = [1, 2, 3].map(|n| JobId::new(NodeId(1), 1, n));
    fixture.journal.held.lock().extend(jobs);
    fixture.leaves.leave(jobs, Instant::now());
    assert!(fixture.leaves.keep(jobs[0]) && !fixture.leaves.keep(jobs[0]));
    let job = Job {
        progress: None,
        id: jobs[1],
        function: FunctionId::parse("f").unwrap(),
        idempotency_key: None,
        is_promised: true,
        deadline: 0,
        message: "{}".into(),
        trace: None,
    };
    fixture.leaves.enter(&[job]).await.unwrap();
    fixture.leaves.clear().await;
    let held = jobs.map(|id| fixture.journal.held.lock().contains(&id));
    assert_eq!(held, [true, true, false]);
}

/// A job that has ended while its send failed leaves the journal with its row.
#[tokio::test(start_paused = true)]
async fn a_job_that_has_ended_is_not_taken_for_unsent() {
    let (fixture, _run) = fixture(ScriptedQueue::new(false, &[]), SetJournal::default());
    let id = JobId::new(NodeId(1), 1, 7);
    drop(fixture.send(7, "f", 1));
    fixture.in_flight.settle(id, Outcome::lost(true));
    assert!(fixture.in_flight.remove_unsent(id) && fixture.in_flight.contains(id));
    fixture.in_flight.remove(id);
    assert!(fixture.in_flight.remove_unsent(id), "its row is written, and its entry belongs to the ledger");
}

/// At shutdown the loop of look-ups may clear the journal too.
#[tokio::test(start_paused = true)]
async fn the_journal_may_be_cleared_twice_at_once() {
    let (fixture, _run) = fixture(ScriptedQueue::new(false, &[]), SetJournal::default());
    let jobs = [1, 2].map(|n| JobId::new(NodeId(1), 1, n));
    fixture.journal.held.lock().extend(jobs);
    fixture.leaves.leave(jobs, Instant::now());
    tokio::join!(fixture.leaves.clear(), fixture.leaves.clear());
    assert!(fixture.leaves.leaving().is_empty() && fixture.journal.held.lock().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_job_that_cannot_enter_the_journal_is_not_sent() {
    let journal = SetJournal { broken: true, ..Default::default() };
    let (fixture, run) = fixture(ScriptedQueue::new(false, &[]), journal);
    let work = async {
        assert_eq!(fixture.send(1, "f", 1).await.unwrap(), Err(SubmitError::Unavailable));
        assert!(fixture.queue.sizes().is_empty());
        drop(fixture);
    };
    tokio::join!(run, work);
}

#[tokio::test(start_paused = true)]
async fn a_fifo_queue_keeps_the_order_of_each_function() {
    let script = [Err(SendError::NotSent("x".into())), Ok(()), Err(SendError::NotSent("x".into()))];
    let (fixture, run) = fixture(ScriptedQueue::new(true, &script), SetJournal::default());
    let work = async {
        let results: Vec<_> = (0..60).map(|n| fixture.send(n, ["a", "b", "c"][n as usize % 3], 1)).collect();
        for result in results {
            assert_eq!(result.await.unwrap(), Ok(()));
        }
        let batches = fixture.queue.batches.lock().clone();
        for function in ["a", "b", "c"] {
            let mut sent: Vec<u64> =
                batches.iter().flatten().filter(|j| j.0 == function).map(|j| j.1).collect();
            sent.dedup(); // a batch that failed as a whole is sent twice
            let mut once = sent.clone();
            once.sort_unstable();
            once.dedup();
            assert!(sent.windows(2).all(|w| w[0] < w[1] || once.contains(&w[1])), "{function}: {sent:?}");
            assert_eq!(once.len(), 20);
            assert_eq!(sent.last(), once.last());
        }
        drop(fixture);
    };
    tokio::join!(run, work);
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_rejects_jobs_immediately() {
    let (fixture, run) = fixture(ScriptedQueue::new(false, &[]), SetJournal::default());
    for n in 0..100 {
        drop(fixture.send(n, "f", 1));
    }
    let job = Job {
        progress: None,
        id: JobId::new(NodeId(1), 1, 200),
        function: FunctionId::parse("f").unwrap(),
        idempotency_key: None,
        is_promised: true,
        deadline: 0,
        message: "{}".into(),
        trace: None,
    };
    assert_eq!(fixture.batcher.send(job, None).err(), Some(SubmitError::Overloaded));
    let sent = Arc::clone(&fixture.queue);
    drop(fixture);
    run.await;
    assert_eq!(sent.sizes().iter().sum::<usize>(), 100, "queued jobs are sent although no caller waits");
}

#[tokio::test(start_paused = true)]
async fn a_job_knows_when_it_was_sent_and_confirmed() {
    let (fixture, run) = fixture(ScriptedQueue::new(false, &[]), SetJournal::default());
    let work = async {
        let progress = Arc::new(JobProgress::new(JobOrigin::default(), 1000, false));
        let id = JobId::new(NodeId(1), 1000, 1);
        let job = Job {
            progress: Some(Arc::clone(&progress)),
            id,
            function: FunctionId::parse("f").unwrap(),
            idempotency_key: None,
            is_promised: true,
            deadline: 1,
            message: "{}".into(),
            trace: None,
        };
        fixture.in_flight.enter(&job, Permits::new()).unwrap();
        fixture.batcher.send(job, None).unwrap().await.unwrap().unwrap();
        let life = fixture.in_flight.entry_life(id).unwrap().life;
        assert_eq!((life.sent_at, life.confirmed_at), (Some(1000), Some(1008)), "the queue takes 8 ms");
        drop(fixture);
    };
    tokio::join!(run, work);
}
