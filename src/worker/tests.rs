//! Tests of the worker over SQLite, with real interpreters, processes and a database on the disk.

use super::*;
use crate::backend::Backend;
use crate::backend::ResultEvent;
use crate::backend::embedded::scratch::{Scratch, in_time, job_of, zipped};
use crate::backend::embedded::{Embedded, LocalWork, open};
use crate::config::{Conf, Network, SandboxMode};
use crate::metrics::WorkerProcessMetrics;
use crate::model::{Job, JobId, NodeId, now_ms, parse_rfc3339_ms};
use serde_json::{Value, json};
use std::fs;
use std::sync::atomic::{AtomicU32, Ordering};
use tokio::task::JoinHandle;

mod fleet;
mod handlers;
mod warm;

/// User ids of the functions of one test. Tests run at the same time, and a limit counts the processes of a
/// user.
const UIDS_EACH: u32 = 4_096;
static UID_NEXT: AtomicU32 = AtomicU32::new(1_000_000);

/// What a test changes. By default there is no sandbox, so that functions and tests share files, and no
/// interpreter is started ahead.
struct Settings {
    conf: WorkerConf,
    memory_mb: Option<u64>,
    busy_max: Option<usize>,
    stall: Option<Duration>,
    passing_max: Option<Duration>,
    fetch_max: Option<Duration>,
    outputs: Option<Arc<dyn OutputStore>>,
    drain: Duration,
}

impl Settings {
    fn new() -> Self {
        let mut conf = Conf::shipped().unwrap().worker;
        conf.sandbox.mode = Some(SandboxMode::Off);
        conf.sandbox.network = Network::None;
        conf.sandbox.uid_first = UID_NEXT.fetch_add(UIDS_EACH, Ordering::Relaxed);
        conf.sandbox.work_mb_max = 16;
        conf.warm.interpreters = 0;
        let (memory_mb, busy_max, stall, passing_max, fetch_max) = (None, None, None, None, None);
        let (outputs, drain) = (None, Duration::ZERO);
        Self { conf, memory_mb, busy_max, stall, passing_max, fetch_max, outputs, drain }
    }

    /// With a sandbox, which every machine for tests can make.
    fn sandboxed(&mut self) {
        self.conf.sandbox.mode = Some(SandboxMode::Required);
    }

    /// A worker with these settings, and its metrics.
    async fn worker(self, work: LocalWork) -> (Worker, WorkerProcessMetrics, Live<WorkerConf>) {
        let LocalWork { jobs, code, activity, runs_dir } = work;
        let sandbox = &self.conf.sandbox;
        let settings = SandboxSettings {
            mode: sandbox.mode.unwrap(),
            network: sandbox.network,
            work_mb_max: sandbox.work_mb_max,
            uid_first: sandbox.uid_first,
            runs_dir: runs_dir.clone(),
            hidden_dirs: Vec::new(),
        };
        let sandbox = Sandbox::probe(&settings).await.expect("scripts/setup.sh test installs what it needs");
        let metrics = WorkerProcessMetrics::new().unwrap();
        let live = Live::new(self.conf);
        let parts = WorkerParts {
            jobs,
            code,
            outputs: self.outputs,
            sandbox,
            activity,
            settings: live.clone(),
            code_dir: runs_dir.with_file_name("code-cache"),
            runs_dir,
            worker_id: "local".to_owned(),
            ai_endpoint: None,
            traces: crate::traces::Traces::default(),
            metrics: Arc::clone(&metrics.worker),
            drain: self.drain,
        };
        let mut worker = Worker::new(parts);
        worker.memory_mb = self.memory_mb.unwrap_or(worker.memory_mb);
        worker.busy_max = self.busy_max.unwrap_or(worker.busy_max);
        worker.stall = self.stall.unwrap_or(worker.stall);
        worker.passing_max = self.passing_max.unwrap_or(worker.passing_max);
        worker.fetch_max = self.fetch_max.unwrap_or(worker.fetch_max);
        (worker, metrics, live)
    }
}

/// A data directory with a running worker.
struct Floor {
    node: NodeId,
    backend: Backend,
    runs_dir: PathBuf,
    activity: Arc<WorkerActivity>,
    metrics: WorkerProcessMetrics,
    settings: Live<WorkerConf>,
    stop: watch::Sender<bool>,
    worker: JoinHandle<()>,
}

impl Floor {
    async fn start(scratch: &Scratch) -> Self {
        Self::start_with(scratch, |_| {}).await
    }

    #[expect(clippy::disallowed_methods, reason = "the test starts the loop instead of boot")]
    async fn start_with(scratch: &Scratch, change: impl FnOnce(&mut Settings)) -> Self {
        let mut settings = Settings::new();
        change(&mut settings);
        let Embedded { node, backend, work } = open(scratch.path(), on_path("node").is_some()).unwrap();
        let (runs_dir, activity) = (work.runs_dir.clone(), Arc::clone(&work.activity));
        let (worker, metrics, settings) = settings.worker(work).await;
        let (stop, stopped) = watch::channel(false);
        let worker = tokio::spawn(worker.run(stopped));
        Self { node, backend, runs_dir, activity, metrics, settings, stop, worker }
    }

    /// Ends the worker and frees the directory. No run leaves anything.
    async fn stop(self) {
        self.stop.send(true).unwrap();
        in_time(self.worker).await.unwrap();
        assert_eq!(fs::read_dir(&self.runs_dir).unwrap().count(), 0, "a run left its directory");
    }

    async fn send(&self, message: &Value) -> JobId {
        let job = job_of(self.node, rand::random(), &message.to_string());
        self.send_job(&job).await;
        job.id
    }

    async fn send_job(&self, job: &Job) {
        assert_eq!(self.backend.queue.send_batch(std::slice::from_ref(job)).await, [Ok(())]);
    }

    async fn result(&self, id: JobId) -> Value {
        let payload = in_time(self.backend.results.wait_for(id)).await.unwrap();
        serde_json::from_slice(&payload).unwrap()
    }

    async fn call(&self, message: &Value) -> Value {
        let id = self.send(message).await;
        self.result(id).await
    }

    /// A run that must succeed.
    async fn succeed(&self, message: &Value) -> Value {
        let result = self.call(message).await;
        assert_eq!(result["status"], "SUCCESS", "{result}");
        result
    }

    /// Waits until this many processes are idle.
    async fn until_idle(&self, python: usize) {
        until(|| self.activity.pools().python == python).await;
    }

    /// The value of a metric, with its labels. 0: it is not there.
    fn metric(&self, name: &str) -> f64 {
        let text = String::from_utf8(self.metrics.text()).unwrap();
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.map_or(0.0, |value| value.parse().unwrap())
    }
}

fn message() -> Value {
    json!({
        "runtime": "python", "memoryMb": 128, "s3Key": "f.zip", "timeoutMs": 20_000, "input": {},
        "modelId": "llama3:8b", "envVars": {},
    })
}

fn with(changes: Value) -> Value {
    let mut message = message();
    message.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    message
}

/// Starts without an end after which a job fails.
const STARTS_MAX: u32 = 3;

/// Sends jobs before a worker runs.
async fn send_before(scratch: &Scratch, jobs: &[Job]) {
    let backend = open(scratch.path(), false).unwrap().backend;
    assert!(backend.queue.send_batch(jobs).await.iter().all(Result::is_ok));
}

/// Stores code under the key of [`message`].
fn install(scratch: &Scratch, entry: &str, source: &str) {
    install_as(scratch, "f.zip", &[(entry, source)]);
}

/// Stores code under a key, whose contents never change while a worker runs.
fn install_as(scratch: &Scratch, s3_key: &str, files: &[(&str, &str)]) {
    let code = scratch.path().join("code");
    fs::create_dir_all(&code).unwrap();
    fs::write(code.join(s3_key), zipped(files)).unwrap();
}

/// Runs a Python source once, in a new directory.
async fn python(source: &str, changes: Value) -> Value {
    let scratch = Scratch::new();
    install(&scratch, "main.py", source);
    let floor = Floor::start(&scratch).await;
    let result = floor.call(&with(changes)).await;
    floor.stop().await;
    result
}

fn stderr(result: &Value) -> &str {
    result["stderr"].as_str().unwrap()
}

async fn until(what: impl Fn() -> bool) {
    in_time(async {
        while !what() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn the_examples_run_with_small_and_large_inputs() {
    let scratch = Scratch::new();
    let floor = Floor::start_with(&scratch, |settings| {
        settings.sandboxed();
        settings.conf.warm.interpreters = 1;
    });
    let floor = floor.await;
    let mut examples = vec![("hello", "python", None), ("hello-handler", "python", Some("main.handler"))];
    if on_path("node").is_some() {
        examples.push(("hello-node", "nodejs", None));
    }
    let large = json!({ "name": "Ada", "pad": "x".repeat(300_000) });
    for (example, runtime, handler) in examples {
        for (input, name) in [
            (json!({ "name": "Grüße" }), "Grüße"),
            (json!({ "name": 5 }), "world"),
            (json!(null), "world"),
            (json!([0, false, ""]), "world"),
            (large.clone(), "Ada"),
        ] {
            let s3_key = format!("functions/{example}/code.zip");
            let changes = json!({ "runtime": runtime, "s3Key": s3_key, "input": input, "handler": handler });
            let result = floor.succeed(&with(changes)).await;
            let output: Value = serde_json::from_str(result["stdout"].as_str().unwrap()).unwrap();
            assert_eq!(output, json!({ "message": format!("Hello, {name}!"), "input": input }));
            assert_eq!(result["data"], if handler.is_some() { output } else { json!(null) }, "{example}");
        }
    }
    floor.stop().await;
}

#[tokio::test]
async fn a_result_has_exactly_the_members_of_the_protocol() {
    let scratch = Scratch::new();
    install(&scratch, "main.py", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)");
    let floor = Floor::start(&scratch).await;
    assert_eq!(in_time(floor.backend.results.next()).await, ResultEvent::Subscribed);
    let id = floor.send(&message()).await;
    let ResultEvent::Published { id: published, payload } = in_time(floor.backend.results.next()).await
    else {
        panic!("no publication");
    };
    assert_eq!(published, id);
    let result: Value = serde_json::from_slice(&payload).unwrap();
    let mut members: Vec<_> = result.as_object().unwrap().keys().map(String::as_str).collect();
    members.sort_unstable();
    let mut expected: Vec<_> = "requestId, functionId, workerId, status, exitCode, stdout, stderr, \
        durationMs, handlerDurationMs, peakMemoryBytes, allocatedMemoryMb, optimizationTip, \
        estimatedSavings, recommendedMemoryMb, cpuUsage, networkRx, networkTx, diskRead, diskWrite, \
        outputFiles, llm_token_count, startedAt, coldStart, traceparent, data"
        .split(", ")
        .collect();
    expected.sort_unstable();
    assert_eq!(members, expected);
    assert_eq!(result["requestId"], id.to_string());
    assert_eq!((&result["functionId"], &result["workerId"]), (&json!("f"), &json!("local")));
    assert_eq!((&result["status"], &result["exitCode"]), (&json!("FAILED"), &json!(3)));
    assert_eq!((&result["stdout"], &result["stderr"]), (&json!("out\n"), &json!("err\n")));
    assert_eq!((&result["allocatedMemoryMb"], &result["coldStart"]), (&json!(128), &json!(true)));
    assert!(result["durationMs"].as_f64().unwrap() > 0.0);
    assert!(parse_rfc3339_ms(result["startedAt"].as_str().unwrap()).unwrap().abs_diff(now_ms()) < 60_000);
    assert_eq!(floor.backend.queue.depth().await, Ok(0));
    floor.stop().await;
}

#[tokio::test]
async fn the_environment_contains_only_the_variables_of_the_run() {
    let source = "import os, json; print(json.dumps(dict(os.environ)))";
    let env_vars = json!({
        "MINE": "ä=1", "NUMBER": 5, "NONE": null, "PAYLOAD_FILE": "theirs", "REQUEST_ID": "theirs",
    });
    let result = python(source, json!({ "envVars": env_vars, "modelId": "m", "input": [1] })).await;
    assert_eq!(result["status"], "SUCCESS", "{}", stderr(&result));
    let env: Value = serde_json::from_str(result["stdout"].as_str().unwrap()).unwrap();
    // The environment of the test has variables that a run must not see, such as those of cargo.
    assert!(std::env::var_os("CARGO_PKG_NAME").is_some());
    let mut names: Vec<_> = env.as_object().unwrap().keys().map(String::as_str).collect();
    // Python sets it when there is no locale.
    names.retain(|name| *name != "LC_CTYPE");
    names.sort_unstable();
    let expected =
        "FUNCTION_ID HOME JOB_ID LLM_MODEL MEMORY_MB MINE MODEL_ID NUMBER OUTPUT_DIR PATH PAYLOAD \
         PYTHONUNBUFFERED REQUEST_ID TMPDIR"
            .split(' ');
    assert_eq!(names, expected.collect::<Vec<_>>());
    assert_eq!((&env["MINE"], &env["NUMBER"]), (&json!("ä=1"), &json!("5")));
    assert_eq!((&env["PAYLOAD"], &env["MODEL_ID"]), (&json!("[1]"), &json!("m")));
    assert_eq!(env["REQUEST_ID"], result["requestId"]);
}

#[tokio::test]
async fn the_time_limit_kills_children_and_grandchildren() {
    let scratch = Scratch::new();
    let pid_file = scratch.path().join("pid");
    let source = "import os, subprocess, time
child = subprocess.Popen(['sleep', '600'])
open(os.environ['PID_FILE'], 'w').write(str(child.pid))
print('begun', flush=True)
time.sleep(600)";
    install(&scratch, "main.py", source);
    let floor = Floor::start(&scratch).await;
    let result = floor.call(&with(json!({ "timeoutMs": 1_500, "envVars": { "PID_FILE": pid_file } }))).await;
    assert_eq!((&result["status"], &result["exitCode"]), (&json!("FAILED"), &json!(124)));
    assert_eq!(result["stdout"], "begun\n");
    assert!(stderr(&result).contains("time limit of 1500 ms"), "{result}");
    assert!(result["durationMs"].as_f64().unwrap() >= 1_500.0);
    let grandchild = fs::read_to_string(&pid_file).unwrap();
    until(|| !is_alive(&grandchild)).await;
    floor.stop().await;
}

/// Whether a process runs. A zombie has ended, and its reaper is not part of the test.
fn is_alive(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

#[tokio::test]
async fn a_process_that_a_run_leaves_neither_delays_it_nor_survives() {
    let source = "import subprocess
print(subprocess.Popen(['sleep', '600']).pid)";
    let result = python(source, json!({})).await;
    assert_eq!(result["status"], "SUCCESS");
    assert!(result["durationMs"].as_f64().unwrap() < 15_000.0);
    let pid = result["stdout"].as_str().unwrap().trim().to_owned();
    until(|| !is_alive(&pid)).await;
}

/// A process that leaves the session and loses its parent becomes a child of the supervisor.
#[tokio::test]
async fn a_process_that_leaves_the_session_is_killed() {
    let scratch = Scratch::new();
    let pids = scratch.path().join("pids");
    let source = "import os, subprocess, sys, time
daemon = 'import os, time; open(os.environ[\"PIDS\"], \"a\").write(str(os.getpid()) + \" \"); time.sleep(600)'
for _ in range(3):
    if os.fork() == 0:
        subprocess.Popen([sys.executable, '-c', daemon], start_new_session=True)
        os._exit(0)
while len(open(os.environ['PIDS']).read().split()) < 3:
    time.sleep(0.01)
print('begun')
time.sleep(float(os.environ['REST']))";
    install(&scratch, "main.py", source);
    let floor = Floor::start(&scratch).await;
    for (rest, code) in [("0", 0), ("600", 124)] {
        fs::write(&pids, "").unwrap();
        let env_vars = json!({ "PIDS": pids, "REST": rest });
        let result = floor.call(&with(json!({ "timeoutMs": 15_000, "envVars": env_vars }))).await;
        assert_eq!((&result["exitCode"], &result["stdout"]), (&json!(code), &json!("begun\n")), "{result}");
        // No wait: they have ended before the result of the run is written.
        let daemons = fs::read_to_string(&pids).unwrap();
        assert_eq!(daemons.split_whitespace().count(), 3);
        daemons.split_whitespace().for_each(|pid| assert!(!is_alive(pid), "{pid} still runs"));
    }
    floor.stop().await;
}

#[tokio::test]
async fn only_memory_in_use_counts() {
    // (source, memoryMb, exit code, in stderr)
    let rest = "
import time
time.sleep(20)";
    let cases = [
        // Address space is not memory: the stack of a thread takes 8 MiB of it.
        (
            "import threading
threads = [threading.Thread(target=threading.Event().wait, args=(0.5,)) for _ in range(64)]
[t.start() for t in threads]; [t.join() for t in threads]"
                .to_owned(),
            128,
            0,
            "",
        ),
        ("import mmap; mmap.mmap(-1, 4 << 30, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)".to_owned(), 128, 0, ""),
        (format!("x = b'x' * (300 << 20){rest}"), 128, 137, "its function has 128"),
        // The limit is for all processes of a run together.
        (
            format!(
                "import subprocess, sys
hold = 'import time; x = b\"x\" * (90 << 20); time.sleep(20)'
children = [subprocess.Popen([sys.executable, '-c', hold], start_new_session=True) for _ in range(2)]{rest}"
            ),
            128,
            137,
            "its function has 128",
        ),
        // Pages that they share count once.
        (
            "import os, time
x = b'x' * (80 << 20)
children = [os.fork() for _ in range(1)]
time.sleep(0.7)"
                .to_owned(),
            128,
            0,
            "",
        ),
        // A request for more memory than any machine has fails.
        ("x = bytearray(1 << 40)".to_owned(), 128, 1, "MemoryError"),
    ];
    for (source, memory_mb, code, reason) in cases {
        let result = python(&source, json!({ "memoryMb": memory_mb })).await;
        assert_eq!(result["exitCode"], code, "{source}: {result}");
        assert_eq!(result["status"], if code == 0 { "SUCCESS" } else { "FAILED" });
        assert!(stderr(&result).contains(reason), "{source}: {result}");
    }
}

#[tokio::test]
async fn peak_memory_is_measured() {
    let source = "import time; x = bytearray(200 << 20); time.sleep(0.6)";
    let modest = python(source, json!({ "memoryMb": 512 })).await;
    assert_eq!(modest["status"], "SUCCESS", "{modest}");
    let peak = modest["peakMemoryBytes"].as_u64().unwrap();
    assert!((200 << 20..600 << 20).contains(&peak), "{peak}");
}

/// Shared pages count once, also while processes start and exit.
#[tokio::test]
async fn shared_pages_count_once_in_runs_that_fork() {
    const EXITS: &str = "import os, time
x = b'x' * (80 << 20)
for _ in range(8):
    for n in range(4):
        if os.fork() == 0:
            time.sleep(0.06 + 0.004 * n)
            os._exit(0)
    for _ in range(4):
        os.wait()
print('done')";
    const POOL: &str = "import multiprocessing
x = b'x' * (60 << 20)
def length(n):
    return len(x) * n
if __name__ == '__main__':
    for _ in range(2):
        with multiprocessing.get_context('fork').Pool(4) as pool:
            pool.map(length, range(400))
    print('done')";
    // Other processes in each sample, and always above the limit.
    const CHANGING: &str = "import os, time
x = b'x' * (70 << 20)
for _ in range(3):
    if os.fork() == 0:
        y = b'y' * (40 << 20)
        time.sleep(20)
        os._exit(0)
end = time.monotonic() + 20
while time.monotonic() < end:
    if os.fork() == 0:
        time.sleep(0.003)
        os._exit(0)
    os.wait()";
    let scratch = Scratch::new();
    let floor = Floor::start(&scratch).await;
    for (key, source, times, code) in
        [("exits.zip", EXITS, 5, 0), ("pool.zip", POOL, 5, 0), ("changing.zip", CHANGING, 1, 137)]
    {
        install_as(&scratch, key, &[("main.py", source)]);
        for _ in 0..times {
            let result = floor.call(&with(json!({ "s3Key": key }))).await;
            assert_eq!(result["exitCode"], code, "{source}: {result}");
            let peak = result["peakMemoryBytes"].as_u64().unwrap();
            assert!(code != 0 || peak < 128 << 20, "{source}: {peak}");
        }
    }
    floor.stop().await;
}

/// Most of the resident memory of Node.js is its own program.
#[tokio::test]
async fn node_runs_in_32_mb() {
    let scratch = Scratch::new();
    if on_path("node").is_none() {
        return;
    }
    let source = "console.log('done'); setTimeout(() => {}, 300)";
    install(&scratch, "index.js", source);
    let floor = Floor::start(&scratch).await;
    let result = floor.call(&with(json!({ "runtime": "nodejs", "memoryMb": 32 }))).await;
    assert_eq!((&result["exitCode"], &result["stdout"]), (&json!(0), &json!("done\n")), "{result}");
    let source = "const x = Buffer.alloc(80 << 20, 1); setTimeout(() => x, 20_000)";
    install_as(&scratch, "large.zip", &[("index.js", source)]);
    let large = json!({ "runtime": "nodejs", "memoryMb": 32, "s3Key": "large.zip" });
    let result = floor.call(&with(large)).await;
    assert_eq!(result["exitCode"], 137, "{result}");
    floor.stop().await;
}

#[tokio::test]
async fn the_output_of_a_killed_run_is_kept() {
    let kill = "import os
print('step 1 done')
os.kill(os.getpid(), 11)";
    for (env_vars, stdout) in [
        (json!({}), "step 1 done\n"),
        (json!({ "PYTHONUNBUFFERED": null }), "step 1 done\n"),
        // A function can override it.
        (json!({ "PYTHONUNBUFFERED": "" }), ""),
    ] {
        let result = python(kill, json!({ "envVars": env_vars })).await;
        assert_eq!((&result["exitCode"], &result["stdout"]), (&json!(139), &json!(stdout)), "{env_vars}");
    }
}

#[tokio::test]
async fn runs_are_bounded_by_memory_and_not_by_cores() {
    let scratch = Scratch::new();
    // Each run waits until all have started.
    let source = "import os, pathlib, time
dir = pathlib.Path(os.environ['DIR'])
(dir / os.environ['REQUEST_ID']).write_text('')
while len(list(dir.iterdir())) < int(os.environ['TOGETHER']):
    time.sleep(0.01)";
    install(&scratch, "main.py", source);
    let together = 4 * std::thread::available_parallelism().unwrap().get();
    let dir = scratch.path().join("begun");
    fs::create_dir(&dir).unwrap();
    let enough = Some(128 * together as u64);
    let floor = Floor::start_with(&scratch, |settings| settings.memory_mb = enough).await;
    let message = with(json!({ "envVars": { "DIR": dir, "TOGETHER": together } }));
    let mut ids = Vec::new();
    for _ in 0..together {
        ids.push(floor.send(&message).await);
    }
    for id in ids {
        let result = floor.result(id).await;
        assert_eq!(result["status"], "SUCCESS", "{result}");
    }
    floor.stop().await;
}

/// While many runs are busy, others start one by one. The gateway keeps its share of the CPU, and no job
/// waits forever.
#[tokio::test]
async fn busy_runs_are_bounded_but_do_not_block_others() {
    const JOBS: usize = 30;
    let scratch = Scratch::new();
    let source = "import os, pathlib, time
me = pathlib.Path(os.environ['DIR']) / os.environ['REQUEST_ID']
me.write_text('')
until = time.process_time() + 0.1
most = 0
while time.process_time() < until:
    most = max(most, len(list(me.parent.iterdir())))
me.unlink()
print(most)";
    install(&scratch, "main.py", source);
    let dir = scratch.path().join("begun");
    fs::create_dir(&dir).unwrap();
    let few = |settings: &mut Settings| {
        (settings.busy_max, settings.memory_mb) = (Some(1), Some(128 * JOBS as u64));
    };
    let floor = Floor::start_with(&scratch, few).await;
    let message = with(json!({ "envVars": { "DIR": dir } }));
    let mut ids = Vec::new();
    for _ in 0..JOBS {
        ids.push(floor.send(&message).await);
    }
    let mut most = 0;
    for id in ids {
        let result = floor.result(id).await;
        most = most.max(result["stdout"].as_str().unwrap().trim().parse::<usize>().unwrap());
    }
    assert!(most <= JOBS / 2, "{most} at once");
    floor.stop().await;

    // A run polls until another one has run.
    let source = "import os, pathlib
begun = pathlib.Path(os.environ['DIR']) / 'begun'
waits = os.environ['WAITS'] == '1'
while waits and not begun.exists():
    pass
begun.write_text('')";
    install(&scratch, "main.py", source);
    let floor = Floor::start_with(&scratch, few).await;
    let message = |waits| with(json!({ "envVars": { "DIR": dir, "WAITS": waits } }));
    let first = floor.send(&message("1")).await;
    assert_eq!(floor.call(&message("0")).await["status"], "SUCCESS");
    assert_eq!(floor.result(first).await["status"], "SUCCESS");
    floor.stop().await;
}

/// Fills `MB` MiB of memory, creates a file `REQUEST_ID` in `DIR`, and ends when the file `UNTIL` exists
/// there, or after `SECONDS`. Prints the number of other files in `DIR`: one for each other run, and `UNTIL`.
const HOLDS_ITS_PLACE: &str = "import os, pathlib, time
env = os.environ
me = pathlib.Path(env['DIR']) / env['REQUEST_ID']
x = b'x' * (int(env['MB']) << 20)
me.write_text('')
end = time.monotonic() + float(env['SECONDS'])
while time.monotonic() < end and not (me.parent / env['UNTIL']).exists():
    time.sleep(0.01) if env['WORK'] == 'idle' else sum(range(1000))
print(len(list(me.parent.iterdir())) - 1)";

/// A message for [`HOLDS_ITS_PLACE`] with the directory `dir`.
fn holds(dir: &Path, memory_mb: u64, changes: Value) -> Value {
    let mut env_vars = json!({ "DIR": dir, "MB": 0, "SECONDS": 600, "UNTIL": "end", "WORK": "idle" });
    env_vars.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    with(json!({ "memoryMb": memory_mb, "timeoutMs": 600_000, "envVars": env_vars }))
}

fn place(scratch: &Scratch) -> PathBuf {
    install(scratch, "main.py", HOLDS_ITS_PLACE);
    let dir = scratch.path().join("begun");
    fs::create_dir(&dir).unwrap();
    dir
}

/// The first run reserves all memory, and ends only when others have run, whether it idles or polls.
#[tokio::test]
async fn a_job_starts_beyond_reserved_memory_that_is_not_in_use() {
    for work in ["idle", "busy"] {
        let scratch = Scratch::new();
        let dir = place(&scratch);
        let floor = Floor::start_with(&scratch, |settings| {
            settings.memory_mb = Some(256);
            settings.stall = Some(Duration::from_secs(1));
        });
        let floor = floor.await;
        let first = floor.send(&holds(&dir, 256, json!({ "WORK": work }))).await;
        until(|| fs::read_dir(&dir).unwrap().count() == 1).await;
        // Two more jobs, one after the other.
        let seconds = [(); 2].map(|()| holds(&dir, 256, json!({ "SECONDS": 0 })));
        let seconds = [floor.send(&seconds[0]).await, floor.send(&seconds[1]).await];
        for id in seconds {
            let second = floor.result(id).await;
            assert_eq!(second["status"], "SUCCESS", "{work}: {second}");
        }
        fs::write(dir.join("end"), "").unwrap();
        assert_eq!(floor.result(first).await["stdout"], "3\n", "{work}");
        floor.stop().await;
    }
}

#[tokio::test]
async fn a_job_waits_for_memory_that_is_in_use() {
    let scratch = Scratch::new();
    let dir = place(&scratch);
    let floor = Floor::start_with(&scratch, |settings| {
        settings.memory_mb = Some(64);
        settings.stall = Some(Duration::from_millis(500));
    });
    let floor = floor.await;
    let first = floor.send(&holds(&dir, 256, json!({ "MB": 100, "SECONDS": 4 }))).await;
    until(|| fs::read_dir(&dir).unwrap().count() == 1).await;
    let second = floor.call(&holds(&dir, 256, json!({ "SECONDS": 0 }))).await;
    assert_eq!(second["status"], "SUCCESS", "it does not fail: {second}");
    assert_eq!(floor.result(first).await["stdout"], "0\n", "the second waited for the first");
    floor.stop().await;
}

/// The first job has 200 of 256 MiB. The second one does not fit, and the third one does.
#[tokio::test]
async fn small_jobs_pass_a_waiting_job_for_a_limited_time() {
    for (passing_max, is_passed) in [(Duration::MAX, true), (Duration::ZERO, false)] {
        let scratch = Scratch::new();
        let dir = place(&scratch);
        let floor = Floor::start_with(&scratch, |settings| {
            (settings.memory_mb, settings.stall) = (Some(256), Some(Duration::MAX));
            settings.passing_max = Some(passing_max);
        });
        let floor = floor.await;
        let first = holds(&dir, 200, json!({ "SECONDS": if is_passed { 600 } else { 3 } }));
        let first = floor.send(&first).await;
        until(|| fs::read_dir(&dir).unwrap().count() == 1).await;
        let second = floor.send(&holds(&dir, 256, json!({ "SECONDS": 0 }))).await;
        let third = floor.send(&holds(&dir, 50, json!({ "SECONDS": 0 }))).await;
        if is_passed {
            assert_eq!(floor.result(third).await["stdout"], "1\n");
            fs::write(dir.join("end"), "").unwrap();
        }
        let began = |result: &Value| result["stdout"].as_str().unwrap().trim().parse::<u32>().unwrap();
        assert_eq!(began(&floor.result(first).await), if is_passed { 2 } else { 0 });
        assert_eq!(floor.result(second).await["status"], "SUCCESS");
        assert_eq!(floor.result(third).await["status"], "SUCCESS");
        floor.stop().await;
    }
}

#[tokio::test]
async fn starts_are_counted_unless_the_worker_stops_the_run() {
    let scratch = Scratch::new();
    let marker = scratch.path().join("marker");
    install(&scratch, "main.py", SLOW_ONCE);
    let floor = Floor::start(&scratch).await;
    let slow = with(json!({ "timeoutMs": 600_000, "envVars": { "MARKER": marker } }));
    let id = floor.send(&slow).await;
    written(&marker).await;
    assert_eq!(scratch.starts(), [(id, 1)]);
    floor.stop().await;

    // After three starts without a recorded end, it is not started again.
    assert_eq!(scratch.starts(), [(id, 0)], "a start that the worker stops does not count");
    scratch.set_starts(&[(id, STARTS_MAX)]);
    let floor = Floor::start(&scratch).await;
    let result = floor.result(id).await;
    assert_eq!((&result["status"], &result["exitCode"]), (&json!("FAILED"), &Value::Null));
    assert!(stderr(&result).contains("was started 3 times"), "{result}");
    floor.stop().await;
}

#[tokio::test]
async fn last_starts_run_one_at_a_time_and_do_not_block_others() {
    let scratch = Scratch::new();
    // Ends when another file than its own exists.
    let source = "import os, pathlib, time
me = pathlib.Path(os.environ['DIR']) / os.environ['REQUEST_ID']
me.write_text('')
others = lambda: [p for p in me.parent.iterdir() if p != me]
end = time.monotonic() + float(os.environ['SECONDS'])
while not others() and time.monotonic() < end:
    time.sleep(0.01)
print(len(others()))
me.unlink()";
    install(&scratch, "main.py", source);
    let dir = scratch.path().join("begun");
    fs::create_dir(&dir).unwrap();
    let message = with(json!({ "envVars": { "DIR": dir, "SECONDS": "1" } })).to_string();
    let jobs: Vec<Job> = (0..3).map(|n| job_of(NodeId(1), n, &message)).collect();
    send_before(&scratch, &jobs).await;
    scratch.set_starts(&jobs.iter().map(|job| (job.id, STARTS_MAX - 1)).collect::<Vec<_>>());
    let floor = Floor::start(&scratch).await;
    for job in &jobs {
        assert_eq!(floor.result(job.id).await["stdout"], "0\n", "another one ran beside it");
    }
    floor.stop().await;

    // A new job runs beside a last start, because that one may wait for it.
    let message = with(json!({ "envVars": { "DIR": dir, "SECONDS": "15" } })).to_string();
    let jobs: Vec<Job> = (10..12).map(|n| job_of(NodeId(1), n, &message)).collect();
    send_before(&scratch, &jobs).await;
    scratch.set_starts(&[(jobs[0].id, STARTS_MAX - 1)]);
    let floor = Floor::start(&scratch).await;
    let outputs = [floor.result(jobs[0].id).await, floor.result(jobs[1].id).await];
    assert!(outputs.iter().any(|result| result["stdout"] == "1\n"), "{outputs:?}");
    floor.stop().await;
}

#[tokio::test]
async fn long_output_is_cut_and_the_run_continues() {
    let source = "import sys
sys.stdout.write('\u{e4}' * 5_000_000)
sys.stderr.write('e' * 10)
sys.exit(7)";
    let result = python(source, json!({})).await;
    assert_eq!(result["exitCode"], 7, "{}", stderr(&result));
    let stdout = result["stdout"].as_str().unwrap();
    assert!(stdout.ends_with("ää\n[cut: the whole output has 10000000 bytes]"));
    assert!(stdout.len() < (1 << 20) + 100);
    assert_eq!(stderr(&result), "eeeeeeeeee");
}

#[tokio::test]
async fn a_job_that_cannot_run_fails_with_a_reason() {
    let scratch = Scratch::new();
    install(&scratch, "other.py", "");
    fs::write(scratch.path().join("code/bad.zip"), "no zip").unwrap();
    fs::write(scratch.path().join("code/evil.zip"), zipped(&[("../evil", "")])).unwrap();
    let floor = Floor::start(&scratch).await;
    for (changes, reason) in [
        (json!({ "runtime": "cpp" }), "neither a program `main` nor main.cpp"),
        (json!({ "runtime": "ruby" }), "has no runtime \"ruby\""),
        (json!({ "handler": "main" }), "is not a valid handler"),
        (json!({ "handler": "main.handler" }), "neither main.py nor main/__init__.py"),
        (json!({ "handler": "main.handler", "runtime": "go" }), "cannot have a handler"),
        (json!({ "s3Key": "absent.zip" }), "cannot be opened"),
        (json!({ "s3Key": "bad.zip" }), "not a valid zip"),
        (json!({ "s3Key": "evil.zip" }), "leads out"),
        (json!({ "s3Key": "../lock" }), "outside the store"),
        (json!({ "s3Key": 5 }), "cannot be read"),
        (json!({ "envVars": { "": "x" } }), "envVars"),
        (json!({ "envVars": { "X": "x".repeat(200_000) } }), "longer than 128 KiB"),
        (json!({}), "main.py"),
    ] {
        let result = floor.call(&with(changes.clone())).await;
        assert_eq!(result["status"], "FAILED", "{changes}");
        assert!(stderr(&result).contains(reason), "{changes}: {result}");
    }
    floor.stop().await;
}

/// Sleeps in its first run, and ends immediately in its second.
const SLOW_ONCE: &str = "import os, pathlib, time
marker = pathlib.Path(os.environ['MARKER'])
if marker.exists():
    print('second run')
else:
    marker.write_text(str(os.getpid()))
    time.sleep(600)";

#[tokio::test]
async fn an_unfinished_job_runs_again_after_a_restart() {
    let scratch = Scratch::new();
    let marker = scratch.path().join("marker");
    install(&scratch, "main.py", SLOW_ONCE);
    let floor = Floor::start(&scratch).await;
    let id = floor.send(&with(json!({ "timeoutMs": 600_000, "envVars": { "MARKER": marker } }))).await;
    let mut late = job_of(floor.node, 1, &message().to_string());
    late.deadline = now_ms();
    let first_run = written(&marker).await;
    floor.stop().await;
    until(|| !is_alive(&first_run)).await;

    let floor = Floor::start(&scratch).await;
    let result = floor.result(id).await;
    assert_eq!(result["stdout"], "second run\n", "{result}");

    // A job past its deadline is dropped.
    floor.send_job(&late).await;
    in_time(async {
        while floor.backend.queue.depth().await.unwrap() > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(floor.backend.results.stored(&[late.id]).await, Ok(vec![None]));
    floor.stop().await;
}

#[tokio::test]
async fn the_status_counts_the_runs_in_progress() {
    let scratch = Scratch::new();
    let marker = scratch.path().join("marker");
    install(&scratch, "main.py", SLOW_ONCE);
    let floor = Floor::start(&scratch).await;
    let workers = floor.backend.workers.clone();
    let active_jobs = async || {
        let status = workers.lone_status().await.unwrap()?;
        serde_json::from_slice::<Value>(&status).unwrap()["active_jobs"].as_u64()
    };
    let become_active = async |jobs| {
        in_time(async {
            while active_jobs().await != Some(jobs) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    };
    become_active(0).await;
    let slow = with(json!({ "timeoutMs": 3_000, "envVars": { "MARKER": marker } }));
    let id = floor.send(&slow).await;
    written(&marker).await;
    become_active(1).await;
    assert_eq!(floor.result(id).await["exitCode"], 124);
    become_active(0).await;
    floor.stop().await;
    assert_eq!(workers.lone_status().await, Ok(None));
}

#[tokio::test]
async fn many_jobs_run_and_leave_the_queue() {
    let scratch = Scratch::new();
    install(&scratch, "main.py", "print('done')");
    let floor = Floor::start(&scratch).await;
    let mut ids = Vec::new();
    for _ in 0..12 {
        ids.push(floor.send(&message()).await);
    }
    for id in ids {
        assert_eq!(floor.result(id).await["stdout"], "done\n");
    }
    assert_eq!(floor.backend.queue.depth().await, Ok(0));
    floor.stop().await;
}

async fn written(path: &Path) -> String {
    let read = || fs::read_to_string(path).unwrap_or_default();
    until(|| !read().is_empty()).await;
    read()
}

const VICTIM_DIR: &str = "INFRA_TEST_VICTIM_DIR";

#[tokio::test]
async fn a_gateway_killed_outright_loses_no_job_and_leaves_no_run() {
    // The test starts itself again, as the process that is killed.
    if let Some(dir) = std::env::var_os(VICTIM_DIR) {
        return be_the_victim(Path::new(&dir)).await;
    }
    let scratch = Scratch::new();
    install(&scratch, "main.py", SLOW_ONCE);
    let this_module = module_path!().split_once("::").unwrap().1;
    let this_test = format!("{this_module}::a_gateway_killed_outright_loses_no_job_and_leaves_no_run");
    let mut victim = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &this_test])
        .env(VICTIM_DIR, scratch.path())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let first_run = written(&scratch.path().join("marker")).await;
    victim.kill().unwrap();
    victim.wait().unwrap();
    until(|| !is_alive(&first_run)).await;

    let floor = Floor::start(&scratch).await;
    assert_eq!(in_time(floor.backend.results.next()).await, ResultEvent::Subscribed);
    let ResultEvent::Published { id, .. } = in_time(floor.backend.results.next()).await else {
        panic!("no publication");
    };
    assert_eq!(id.node(), floor.node);
    assert_eq!(floor.result(id).await["stdout"], "second run\n");
    floor.stop().await;
}

async fn be_the_victim(dir: &Path) {
    let Embedded { node, backend, work } = open(dir, false).unwrap();
    let (worker, _metrics, _settings) = Settings::new().worker(work).await;
    let env_vars = json!({ "MARKER": dir.join("marker") });
    let job = job_of(node, 1, &with(json!({ "timeoutMs": 600_000, "envVars": env_vars })).to_string());
    assert_eq!(backend.queue.send_batch(&[job]).await, [Ok(())]);
    let (_stop, stopped) = watch::channel(false);
    in_time(worker.run(stopped)).await;
}
