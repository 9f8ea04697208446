//! A worker on a queue with leases, such as that of a fleet: groups, leases, jobs that go back.

use super::*;
use crate::backend::{BackendError, FetchError, JobSourceTraits, Receipt, ReceivedJob};
use crate::model::UnixMs;
use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::atomic::AtomicBool;
use tokio::sync::Notify;

/// A queue that records what a worker does with it. It delivers each job once.
struct StubQueue {
    lease: Duration,
    state: Mutex<StubState>,
    arrived: Notify,
}

#[derive(Default)]
struct StubState {
    pending: VecDeque<ReceivedJob>,
    extended: Vec<Receipt>,
    given_back: Vec<String>,
    discarded: Vec<String>,
    finished: Vec<(String, Value)>,
    /// Calls of `finish` that fail from now on.
    failures: usize,
}

impl StubQueue {
    fn new(lease: Duration) -> Arc<Self> {
        Arc::new(Self { lease, state: Mutex::default(), arrived: Notify::new() })
    }

    fn send(&self, id: &str, group: Option<&str>, message: &Value) {
        self.send_until(id, group, message, UnixMs::MAX);
    }

    fn send_until(&self, id: &str, group: Option<&str>, message: &Value, deadline: UnixMs) {
        self.state.lock().pending.push_back(job_with(id, group, message, deadline));
        self.arrived.notify_one();
    }

    /// Sends jobs that can be received together.
    fn send_together(&self, ids: &[&str], group: &str, message: &Value) {
        let jobs = ids.iter().map(|id| job_with(id, Some(group), message, UnixMs::MAX));
        self.state.lock().pending.extend(jobs);
        self.arrived.notify_one();
    }

    async fn until_finished(&self, count: usize) -> Vec<(String, Value)> {
        until(|| self.state.lock().finished.len() == count).await;
        self.state.lock().finished.clone()
    }
}

fn job_with(id: &str, group: Option<&str>, message: &Value, deadline: UnixMs) -> ReceivedJob {
    let (group, message) = (group.map(str::to_owned), Bytes::from(message.to_string()));
    ReceivedJob { deadline, group, message, ..ReceivedJob::sample(id) }
}

#[async_trait]
impl JobSource for StubQueue {
    fn traits(&self) -> JobSourceTraits {
        JobSourceTraits { lease: Some(self.lease), starts_max: None, receive_max: 10 }
    }

    async fn receive(&self, max: usize) -> Result<Vec<ReceivedJob>, BackendError> {
        assert!((1..=10).contains(&max));
        loop {
            let jobs: Vec<ReceivedJob> = {
                let mut state = self.state.lock();
                let count = state.pending.len().min(max);
                state.pending.drain(..count).collect()
            };
            if !jobs.is_empty() {
                return Ok(jobs);
            }
            self.arrived.notified().await;
        }
    }

    async fn start(&self, _job: &ReceivedJob) -> Result<(), BackendError> {
        Ok(())
    }

    async fn extend(&self, receipts: &[Receipt]) -> Result<(), BackendError> {
        self.state.lock().extended.extend_from_slice(receipts);
        Ok(())
    }

    async fn give_back(&self, jobs: &[ReceivedJob]) -> Result<(), BackendError> {
        self.state.lock().given_back.extend(jobs.iter().map(|job| job.request_id.clone()));
        Ok(())
    }

    async fn finish(&self, job: &ReceivedJob, result: Bytes) -> Result<(), BackendError> {
        let mut state = self.state.lock();
        if state.failures > 0 {
            state.failures -= 1;
            return Err(BackendError::Unavailable("no Redis".to_owned()));
        }
        state.finished.push((job.request_id.clone(), serde_json::from_slice(&result).unwrap()));
        Ok(())
    }

    async fn discard(&self, job: &ReceivedJob) -> Result<(), BackendError> {
        self.state.lock().discarded.push(job.request_id.clone());
        Ok(())
    }
}

/// The zips in a directory, unless they are away.
struct StubCode {
    dir: PathBuf,
    is_away: AtomicBool,
}

#[async_trait]
impl CodeSource for StubCode {
    async fn fetch(&self, _bucket: &str, s3_key: &str, to: &Path) -> Result<(), FetchError> {
        if self.is_away.load(Ordering::Relaxed) {
            return Err(BackendError::Unavailable("no S3".to_owned()).into());
        }
        fs::copy(self.dir.join(s3_key), to).map(drop).map_err(|e| FetchError::Missing(e.to_string()))
    }
}

/// A worker on a [`StubQueue`], with code that [`install`] has stored.
struct Station {
    queue: Arc<StubQueue>,
    code: Arc<StubCode>,
    metrics: WorkerProcessMetrics,
    stop: watch::Sender<bool>,
    worker: JoinHandle<()>,
}

impl Station {
    #[expect(clippy::disallowed_methods, reason = "the test starts the loop instead of boot")]
    async fn start(scratch: &Scratch, lease: Duration, change: impl FnOnce(&mut Settings)) -> Self {
        let mut settings = Settings::new();
        change(&mut settings);
        let queue = StubQueue::new(lease);
        let code = Arc::new(StubCode { dir: scratch.path().join("code"), is_away: AtomicBool::new(false) });
        let runs_dir = scratch.path().join("runs");
        fs::create_dir(&runs_dir).unwrap();
        let activity = Arc::new(WorkerActivity::default());
        let work = LocalWork { jobs: queue.clone(), code: code.clone(), activity, runs_dir };
        let (worker, metrics, _) = settings.worker(work).await;
        let (stop, stopped) = watch::channel(false);
        Self { queue, code, metrics, stop, worker: tokio::spawn(worker.run(stopped)) }
    }

    fn metric(&self, name: &str) -> f64 {
        let text = String::from_utf8(self.metrics.text()).unwrap();
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.map_or(0.0, |value| value.parse().unwrap())
    }

    async fn stop(self) -> Arc<StubQueue> {
        self.stop.send(true).unwrap();
        in_time(self.worker).await.unwrap();
        self.queue
    }
}

const LEASE: Duration = Duration::from_secs(300);

/// Waits until the file `GO` exists.
const WAITS: &str = "import os, time
while not os.path.exists(os.environ['GO']):
    time.sleep(0.01)
print('done')";

#[tokio::test]
async fn jobs_of_a_group_run_one_after_the_other() {
    let scratch = Scratch::new();
    install(
        &scratch,
        "main.py",
        "import time\nbegan = time.monotonic()\ntime.sleep(0.2)\nprint(began, time.monotonic())",
    );
    let station = Station::start(&scratch, LEASE, |settings| settings.busy_max = Some(100)).await;
    for (id, group) in [("a1", "a"), ("a2", "a"), ("b1", "b"), ("a3", "a"), ("b2", "b")] {
        station.queue.send(id, Some(group), &message());
    }
    let finished = station.queue.until_finished(5).await;
    let times = |id: &str| -> (f64, f64) {
        let (_, result) = finished.iter().find(|(finished, _)| finished == id).unwrap();
        let text = result["stdout"].as_str().unwrap_or_default();
        let (began, ended) = text.trim().split_once(' ').unwrap_or_else(|| panic!("{result}"));
        (began.parse().unwrap(), ended.parse().unwrap())
    };
    for (earlier, later) in [("a1", "a2"), ("a2", "a3"), ("b1", "b2")] {
        assert!(times(earlier).1 <= times(later).0, "{later} began before {earlier} had ended");
    }
    station.stop().await;
}

#[tokio::test]
async fn jobs_go_back_when_the_worker_stops() {
    let scratch = Scratch::new();
    install(&scratch, "main.py", "import time; print('begun', flush=True); time.sleep(600)");
    let station = Station::start(&scratch, LEASE, |settings| settings.memory_mb = Some(128)).await;
    for id in ["1", "2", "3"] {
        station.queue.send(id, None, &with(json!({ "timeoutMs": 600_000 })));
    }
    // One runs, and one waits. The third one is left to other workers.
    until(|| station.queue.state.lock().pending.len() == 1).await;
    until(|| station.metric("infra_worker_jobs_held") == 2.0).await;
    until(|| station.metric("infra_worker_runs_in_progress") == 1.0).await;
    let queue = station.stop().await;
    let state = queue.state.lock();
    let mut given_back = state.given_back.clone();
    given_back.sort();
    assert_eq!(given_back, ["1", "2"]);
    assert!(state.finished.is_empty() && state.discarded.is_empty());
}

#[tokio::test]
async fn runs_may_end_while_the_worker_drains() {
    let scratch = Scratch::new();
    install(&scratch, "main.py", WAITS);
    let go = scratch.path().join("go");
    let drain = |settings: &mut Settings| settings.drain = Duration::from_secs(60);
    let station = Station::start(&scratch, LEASE, drain).await;
    station.queue.send("1", None, &with(json!({ "envVars": { "GO": go } })));
    until(|| station.metric("infra_worker_runs_in_progress") == 1.0).await;
    station.stop.send(true).unwrap();
    fs::write(&go, "").unwrap();
    in_time(station.worker).await.unwrap();
    let state = station.queue.state.lock();
    assert_eq!((state.finished.len(), state.given_back.len()), (1, 0));
}

#[tokio::test]
async fn a_job_whose_code_is_away_stays_on_the_queue() {
    let scratch = Scratch::new();
    install(&scratch, "main.py", "print('done')");
    let station = Station::start(&scratch, LEASE, |settings| settings.fetch_max = Some(Duration::ZERO)).await;
    station.code.is_away.store(true, Ordering::Relaxed);
    station.queue.send_together(&["1", "2"], "a", &message());
    until(|| station.metric("infra_worker_jobs_given_back_total{reason=\"group\"}") == 1.0).await;
    assert_eq!(station.metric("infra_worker_jobs_given_back_total{reason=\"code\"}"), 1.0);
    station.code.is_away.store(false, Ordering::Relaxed);
    station.queue.send("3", Some("b"), &message());
    let finished = station.queue.until_finished(1).await;
    assert_eq!((finished[0].0.as_str(), &finished[0].1["stdout"]), ("3", &json!("done\n")));
    let queue = station.stop().await;
    // The first one is not given back, because it would return at once. The second one must not pass it.
    assert_eq!(queue.state.lock().given_back, ["2"]);
}

#[tokio::test]
async fn code_that_was_away_for_a_moment_delays_its_run() {
    let scratch = Scratch::new();
    install(&scratch, "main.py", "print('done')");
    let station = Station::start(&scratch, LEASE, |_| {}).await;
    station.code.is_away.store(true, Ordering::Relaxed);
    station.queue.send("1", None, &message());
    until(|| station.metric("infra_worker_code_lookups_total{outcome=\"miss\"}") > 1.0).await;
    station.code.is_away.store(false, Ordering::Relaxed);
    assert_eq!(station.queue.until_finished(1).await[0].1["stdout"], "done\n");
    station.stop().await;
}

#[tokio::test]
async fn leases_are_extended_until_the_results_are_stored() {
    let scratch = Scratch::new();
    install(&scratch, "main.py", WAITS);
    let go = scratch.path().join("go");
    let station =
        Station::start(&scratch, Duration::from_secs(1), |settings| settings.memory_mb = Some(128)).await;
    station.queue.state.lock().failures = 3;
    for id in ["1", "2"] {
        station.queue.send(id, None, &with(json!({ "envVars": { "GO": go } })));
    }
    let extensions = |id: &str| {
        let state = station.queue.state.lock();
        state.extended.iter().filter(|receipt| *receipt.text() == format!("receipt of {id}")).count()
    };
    // Also that of a job that waits for memory.
    until(|| extensions("1") >= 3 && extensions("2") >= 3).await;
    fs::write(&go, "").unwrap();
    let finished = station.queue.until_finished(2).await;
    assert!(finished.iter().all(|(_, result)| result["status"] == "SUCCESS"), "{finished:?}");
    assert_eq!(station.metric("infra_worker_results_retried_total"), 3.0);
    station.stop().await;
}

#[tokio::test]
async fn a_job_past_its_deadline_never_runs() {
    let scratch = Scratch::new();
    install(&scratch, "main.py", "print('done')");
    let station = Station::start(&scratch, LEASE, |_| {}).await;
    station.queue.send_until("late", None, &message(), now_ms() - 1);
    station.queue.send("1", None, &message());
    station.queue.until_finished(1).await;
    until(|| station.queue.state.lock().discarded == ["late"]).await;
    assert_eq!(station.metric("infra_worker_jobs_expired_total"), 1.0);
    let queue = station.stop().await;
    assert_eq!(queue.state.lock().finished.len(), 1);
}

/// A queue that did not answer for longer than the lease delivers the jobs in progress once more.
#[tokio::test]
async fn a_job_that_is_delivered_again_runs_once() {
    let scratch = Scratch::new();
    install(&scratch, "main.py", WAITS);
    let go = scratch.path().join("go");
    let station = Station::start(&scratch, Duration::from_secs(1), |_| {}).await;
    let waits = with(json!({ "envVars": { "GO": go } }));
    station.queue.send("1", None, &waits);
    until(|| station.metric("infra_worker_runs_in_progress") == 1.0).await;
    let again = job_with("1", None, &waits, UnixMs::MAX);
    again.receipt.renew(&Receipt::new("the second receipt"));
    station.queue.state.lock().pending.push_back(again);
    station.queue.arrived.notify_one();
    // The first receipt is not valid any more.
    let is_second = |receipt: &Receipt| &*receipt.text() == "the second receipt";
    until(|| station.queue.state.lock().extended.last().is_some_and(is_second)).await;
    fs::write(&go, "").unwrap();
    station.queue.until_finished(1).await;
    station.queue.send("2", None, &with(json!({ "envVars": { "GO": go } })));
    let finished = station.queue.until_finished(2).await;
    assert_eq!([&*finished[0].0, &*finished[1].0], ["1", "2"]);
    station.stop().await;
}

#[tokio::test]
async fn jobs_that_wait_for_their_group_keep_no_other_away() {
    let scratch = Scratch::new();
    install(&scratch, "main.py", WAITS);
    install_as(&scratch, "other.zip", &[("main.py", "print('other')")]);
    let go = scratch.path().join("go");
    let station = Station::start(&scratch, LEASE, |_| {}).await;
    let ids: Vec<String> = (0..80).map(|n| n.to_string()).collect();
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    station.queue.send_together(&ids, "a", &with(json!({ "envVars": { "GO": go } })));
    station.queue.send("other", Some("b"), &with(json!({ "s3Key": "other.zip" })));
    let finished = station.queue.until_finished(1).await;
    assert_eq!((&*finished[0].0, &finished[0].1["stdout"]), ("other", &json!("other\n")));
    station.stop().await;
}

/// The first job has all the memory, and ends only when the second one has run.
#[tokio::test]
async fn a_job_is_taken_whatever_runs() {
    let scratch = Scratch::new();
    install(&scratch, "main.py", WAITS);
    let go = scratch.path().join("go");
    let source = "import os; open(os.environ['GO'], 'w').close()";
    install_as(&scratch, "opens.zip", &[("main.py", source)]);
    let station = Station::start(&scratch, LEASE, |settings| {
        (settings.memory_mb, settings.stall) = (Some(128), Some(Duration::from_millis(500)));
    });
    let station = station.await;
    let env_vars = json!({ "GO": go });
    station.queue.send("caller", None, &with(json!({ "envVars": env_vars })));
    until(|| station.metric("infra_worker_runs_in_progress") == 1.0).await;
    station.queue.send("called", None, &with(json!({ "envVars": env_vars, "s3Key": "opens.zip" })));
    let finished = station.queue.until_finished(2).await;
    assert!(finished.iter().all(|(_, result)| result["status"] == "SUCCESS"), "{finished:?}");
    station.stop().await;
}
