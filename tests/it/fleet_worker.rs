//! `infra-controller worker` in a fleet: start, health, heartbeats, stop, settings, and its neighbours.

use crate::harness::aws::{Cloud, SECRET_ACCESS_KEY};
use crate::harness::aws_proxy::{AwsProxy, Faults, Policy};
use crate::harness::gateway::reloads;
use crate::harness::http::Request;
use crate::harness::leftovers::Leftovers;
use crate::harness::own_worker::{OwnWorker, WorkerSetup};
use crate::harness::platform::HELLO;
use crate::harness::process::{Scratch, free_port};
use crate::harness::redis::{Redis, Reply};
use crate::harness::upload::Function;
use crate::harness::worker::PythonWorker;
use crate::harness::{Gateway, Platform, SOON, Setup, eventually, join_all, spawn, within};
use crate::tidy::markdown::{Document, code_in};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::Path;

const CONFIG: i32 = 78;
const UNAVAILABLE: i32 = 69;

/// A gateway with its services. The test adds the workers.
async fn fleet() -> Platform {
    Setup::serve().no_worker().start().await
}

fn worker_of(platform: &Platform) -> WorkerSetup {
    WorkerSetup::new(&platform.fleet().cloud, &platform.fleet().redis)
}

async fn run(gateway: &Gateway, function: &str, input: &Value) -> Value {
    gateway.run(function, input).send().await.expect(200).json()
}

fn document(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// One reason not to start: (name, setup, exit code, words of one line of stderr).
type StartCase = (&'static str, WorkerSetup, i32, Vec<String>);

async fn check_starts(cases: Vec<StartCase>) {
    // Concurrently, because some wait for a deadline.
    let checks = cases.into_iter().map(|(name, setup, code, words)| {
        spawn(async move {
            let run = setup.run_to_end().await;
            assert_eq!(run.code, Some(code), "{name}: {}", run.output);
            let has_all = |line: &String| words.iter().all(|word| line.contains(word.as_str()));
            assert!(run.stderr.iter().any(has_all), "{name}: no line has all of {words:?}: {}", run.output);
            assert!(!run.output.contains(SECRET_ACCESS_KEY), "{name}: {}", run.output);
        })
    });
    join_all("the starts", 6 * SOON, checks.collect()).await;
}

fn words(all: &[&str]) -> Vec<String> {
    all.iter().map(|&word| word.to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_environment_is_exit_78() {
    let (redis, cloud) = (Redis::start(None).await, Cloud::start(&[]).await);
    // They are found before a sandbox is tried.
    let good = || WorkerSetup::new(&cloud, &redis).with("sandbox.mode", "off");
    let required = ["AWS_REGION", "SQS_URL", "REDIS_URL", "BUCKET_NAME"];
    let all = words(&["AWS_REGION", "SQS_URL", "REDIS_HOST", "BUCKET_NAME"]);
    let mut cases = vec![("all missing", good().without_env(&required), CONFIG, all)];
    for (name, shown) in required.iter().zip(["AWS_REGION", "SQS_URL", "REDIS_HOST", "BUCKET_NAME"]) {
        cases.push(("one missing", good().without_env(&[name]), CONFIG, words(&[shown])));
    }
    let keyless = good().env("CONTROLLER_URL", "http://127.0.0.1:1");
    cases.push(("no key for heartbeats", keyless, CONFIG, words(&["INFRA_API_KEY"])));
    for (name, value) in [
        ("SQS_URL", "not a url"),
        ("REDIS_URL", "http://127.0.0.1"),
        ("CONTROLLER_URL", "127.0.0.1:8080"),
        ("MAX_OUTPUT_SIZE", "1 MB"),
        ("MAX_OUTPUT_SIZE", "0"),
        ("WORKER_ID", "two words"),
        ("AI_ENDPOINT", "10.0.20.100"),
    ] {
        let setup = good().env("INFRA_API_KEY", "a-key-of-a-test").env(name, value);
        cases.push(("a malformed variable", setup, CONFIG, words(&[name])));
    }
    for (key, value, shown) in [
        ("capacity.runs_max", json!(1025), "worker.toml"),
        ("warm.idle_s", json!(0), "worker.toml"),
        ("sandbox.network", json!("private"), "worker.toml"),
        ("sandbox.unknown", json!(1), "worker.toml"),
    ] {
        cases.push(("an invalid setting", good().with(key, value), CONFIG, words(&[shown])));
    }
    check_starts(cases).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn backends_that_cannot_be_used_end_the_start() {
    let (redis, cloud) = (Redis::start(None).await, Cloud::start(&[]).await);
    let guarded = Redis::start(Some("right-password-31")).await;
    let good = || WorkerSetup::new(&cloud, &redis).with("sandbox.mode", "off");
    let wrong = format!("redis://:wrong-password-77@{}", guarded.addr());
    let closed = free_port();
    // The kernel accepts connections, but there is no answer.
    let mute = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("loopback has a free port");
    let mute_port = mute.local_addr().expect("it is bound").port();
    let taken = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("loopback has a free port");
    let taken_port = taken.local_addr().expect("it is bound").port();
    let http = |port: u16| format!("http://127.0.0.1:{port}");
    let no_queue = format!("{}-gone", cloud.queue_url);
    let mut cases = vec![
        ("no such queue", good().env("SQS_URL", &no_queue), CONFIG, words(&["queue"])),
        ("a wrong password", good().env("REDIS_URL", &wrong), CONFIG, words(&["Redis"])),
        (
            "no password",
            good().env("REDIS_URL", &format!("redis://{}", guarded.addr())),
            CONFIG,
            words(&["Redis"]),
        ),
        (
            "the port of the listener is in use",
            good().with("listener.port", taken_port),
            CONFIG,
            words(&["listener.port"]),
        ),
    ];
    for port in [closed, mute_port] {
        let redis = format!("redis://127.0.0.1:{port}");
        cases.push(("no Redis", good().env("REDIS_URL", &redis), UNAVAILABLE, words(&["Redis"])));
        let setup = good().env("AWS_ENDPOINT_URL_SQS", &http(port));
        cases.push(("no SQS", setup, UNAVAILABLE, words(&["queue"])));
    }
    check_starts(cases).await;
}

/// The names of the agent before, in its file. A bucket that cannot be read is a warning, and so is a queue
/// without a dead-letter queue.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_env_file_of_the_agent_works_unchanged() {
    let platform = fleet().await;
    let (cloud, redis) = (&platform.fleet().cloud, &platform.fleet().redis);
    let endpoint = format!("http://{}", cloud.addr());
    let controller = format!("http://{}/api", platform.gateway.addr());
    let port = redis.port().to_string();
    let new_names = ["AWS_ENDPOINT_URL", "BUCKET_NAME", "REDIS_URL", "WORKER_ID"];
    let mut setup = worker_of(&platform).without_env(&new_names).in_env_file();
    for (name, value) in [
        ("S3_CODE_BUCKET", "no-such-bucket"),
        ("REDIS_HOST", "127.0.0.1"),
        ("REDIS_PORT", port.as_str()),
        ("SQS_ENDPOINT", endpoint.as_str()),
        ("S3_ENDPOINT", endpoint.as_str()),
        ("CONTROLLER_URL", controller.as_str()),
        ("INFRA_API_KEY", platform.gateway.key()),
        ("MAX_OUTPUT_SIZE", "2048"),
        ("WARM_POOL_PYTHON_SIZE", "8"),
        ("DOCKER_WORK_DIR_ROOT", "/home/ec2-user/faas_workspace"),
    ] {
        setup = setup.env(name, value);
    }
    let worker = setup.start().await;
    for text in ["no-such-bucket", "RedrivePolicy"] {
        let is_warning = |line: &Value| line["level"] == "WARN" && line.to_string().contains(text);
        assert!(worker.log().iter().any(is_warning), "{text}: {}", worker.process().output().tail(30));
    }
    // The message names the bucket of the gateway.
    let long = json!({ "behave": "stdout", "text": "x", "times": 5000 });
    let result = run(&platform.gateway, HELLO, &long).await;
    assert_eq!(result["status"], "SUCCESS", "{result}");
    let length = result["stdout"].as_str().map_or(0, str::len);
    assert!((2048..2048 + 256).contains(&length), "MAX_OUTPUT_SIZE: {length}");
    // Its name is that of the machine.
    eventually("a heartbeat", SOON, || async {
        let workers = platform.gateway.get("/workers").await.expect(200).json();
        if workers["workers"][0]["workerId"] == result["workerId"] {
            Ok(())
        } else {
            Err(workers.to_string())
        }
    })
    .await;
    worker.stop().await;
    platform.finish().await;
}

/// All members of a JSON text, such as `checks.queue.status`.
fn members(value: &Value, path: &str, found: &mut BTreeSet<String>) {
    for (name, value) in value.as_object().into_iter().flatten() {
        let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        members(value, &path, found);
        found.insert(path);
    }
}

/// The names and types in the table of the worker's metrics.
fn documented_metrics() -> Vec<(String, String)> {
    let text = document("docs/metrics.md");
    let document = Document::read(&text);
    let is_of_worker = |table: &&crate::tidy::markdown::Table| {
        table.under.last().is_some_and(|heading| heading == "Worker") && table.header[0] == "metric"
    };
    let table = document.tables.iter().find(is_of_worker).expect("the table");
    table.rows.iter().map(|row| (code_in(&row[0])[0].clone(), row[1].clone())).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_and_metrics_are_those_of_the_documents() {
    let platform = fleet().await;
    let gateway = &platform.gateway;
    let s3 = AwsProxy::start(&platform.fleet().cloud, Policy::Fail(1)).await;
    let worker =
        worker_of(&platform).env("AWS_ENDPOINT_URL_S3", &format!("http://{}", s3.addr())).start().await;

    let health = worker.wait_for_health("all is well", |status, _| status == 200).await;
    let text = document("docs/worker.md");
    let shown = Document::read(&text).blocks.into_iter().find(|block| block.language() == "json");
    let shown: Value = serde_json::from_str(&shown.expect("the answer").text).expect("JSON");
    let (mut documented, mut found) = (BTreeSet::new(), BTreeSet::new());
    members(&shown, "", &mut documented);
    members(&health, "", &mut found);
    assert_eq!(found, documented);
    let expected = (&json!("OK"), &json!(worker.name()), &json!(true));
    let sandbox = &health["checks"]["sandbox"];
    assert_eq!((&health["status"], &health["workerId"], &sandbox["isolated"]), expected, "{health}");
    assert_eq!(sandbox["network"], "full", "{health}");
    // The agent before had `/` as well.
    assert_eq!(worker.get("/").await.expect(200).json()["status"], "OK");
    worker.get("/run").await.expect(404);
    let post = Request::new(worker.addr().await, "POST", "/health").header("content-length", "0");
    assert!(post.send().await.expect(405).need("allow").contains("GET"));
    let head = Request::new(worker.addr().await, "HEAD", "/metrics").send().await.expect(200);
    assert!(head.body().is_empty());

    exercise(gateway).await;
    s3.inject(Faults { queue_down: 100, ..Faults::default() });
    let away = gateway.upload("code that is away").await;
    let job = gateway.run_async(&away, &json!({})).await;
    worker.wait_for_metric_at_least("infra_worker_jobs_given_back_total{reason=\"code\"}", 1.0).await;
    s3.inject(Faults::default());
    assert_eq!(gateway.result_of(&job).await.json()["status"], "SUCCESS");

    let answer = worker.get("/metrics").await.expect(200);
    assert!(answer.need("content-type").starts_with("text/plain"));
    let text = answer.text();
    let documented = documented_metrics();
    assert!(documented.len() > 20, "{documented:?}");
    for (name, kind) in &documented {
        assert!(text.contains(&format!("# TYPE {name} {kind}\n")), "{name} is not a {kind} of the worker");
    }
    for name in ["infra_conf_reloads_total", "infra_log_lines_dropped", "process_open_fds"] {
        assert!(text.contains(&format!("\n{name}")), "{name}");
    }
    for series in [
        r#"infra_worker_runs_total{runtime="python",status="SUCCESS"}"#,
        r#"infra_worker_runs_total{runtime="nodejs",status="SUCCESS"}"#,
        r#"infra_worker_runs_total{runtime="python",status="FAILED"}"#,
        r#"infra_worker_runs_stopped_total{reason="memory"}"#,
        r#"infra_worker_starts_total{runtime="python",start="warm"}"#,
        r#"infra_worker_warm_ended_total{reason="failed"}"#,
        r#"infra_worker_output_files_total{outcome="stored"}"#,
        r#"infra_worker_code_lookups_total{outcome="hit"}"#,
        r#"infra_worker_code_lookups_total{outcome="miss"}"#,
        "infra_worker_memory_limit_bytes",
        "infra_worker_code_cache_bytes",
        "infra_worker_isolated",
    ] {
        assert!(worker.metric(series).await >= Some(1.0), "{series}");
    }
    for series in ["infra_worker_runs_in_progress", "infra_worker_jobs_held"] {
        eventually(series, SOON, || async {
            let value = worker.metric(series).await;
            if value == Some(0.0) { Ok(()) } else { Err(format!("{value:?}")) }
        })
        .await;
    }
    worker.stop().await;
    platform.finish().await;
}

/// Runs that count in all metrics of runs and of processes.
async fn exercise(gateway: &Gateway) {
    let hello = Function::new("nodejs", "index.js", "console.log('hello')", None);
    assert_eq!(gateway.create_and_run(&hello, &json!({})).await["status"], "SUCCESS");
    let writes = Function::python("import os; open(os.environ['OUTPUT_DIR'] + '/a', 'w').write('a')");
    let writes = gateway.create(&writes).await;
    for _ in 0..2 {
        assert_eq!(run(gateway, &writes, &json!({})).await["outputFiles"], json!(["a"]));
    }
    let grows = Function::python("import time; x = b'x' * (400 << 20); time.sleep(30)");
    assert_eq!(gateway.create_and_run(&grows, &json!({})).await["exitCode"], 137);
    let handler = "def handler(event, context):\n    return 1 // event";
    let handler = gateway.create(&Function::python_handler(handler)).await;
    // The third run finds the process of the first two, and ends it.
    for (event, status) in [(1, "SUCCESS"), (1, "SUCCESS"), (0, "FAILED")] {
        assert_eq!(run(gateway, &handler, &json!(event)).await["status"], status);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heartbeats_show_the_worker_to_operators() {
    let platform = fleet().await;
    let gateway = &platform.gateway;
    // Without a gateway its status is in Redis.
    let alone = worker_of(&platform).start().await;
    assert_eq!(run(gateway, HELLO, &json!(1)).await["status"], "SUCCESS");
    eventually("the status of a lone worker", SOON, || async {
        let status = gateway.get("/system/status").await.expect(200).json();
        let is_told = status["status"] == "online" && status["worker_count"] == 1;
        let has_pools = status["pools"]["python"].as_u64() >= Some(1);
        if is_told && has_pools { Ok(()) } else { Err(status.to_string()) }
    })
    .await;
    assert_eq!(gateway.get("/workers").await.expect(200).json()["totalWorkers"], 0);
    alone.stop().await;

    let worker = worker_of(&platform).heartbeats_to(gateway).start().await;
    let hold = platform.hold().await;
    let job = gateway.run_async(&hold.function, &hold.input("held")).await;
    let beat = eventually("a heartbeat with the run", 2 * SOON, || async {
        let workers = gateway.get("/workers").await.expect(200).json();
        let beat = workers["workers"][0].clone();
        let is_told = beat["activeJobs"] == 1 && beat["pools"]["python"].as_u64() >= Some(1);
        if is_told { Ok(beat) } else { Err(workers.to_string()) }
    })
    .await;
    assert_eq!((&beat["workerId"], &beat["status"]), (&json!(worker.name()), &json!("healthy")), "{beat}");
    assert_eq!(beat["healthStatus"], "healthy", "{beat}");
    assert!(beat["uptimeSeconds"].is_number() && beat["timestamp"].is_string(), "{beat}");
    let pools: Vec<&String> = beat["pools"].as_object().expect("an object").keys().collect();
    assert_eq!(pools, ["python", "nodejs", "cpp", "go"]);
    assert_eq!(worker.metric("infra_worker_heartbeats_failed_total").await, Some(0.0));
    hold.release();
    gateway.result_of(&job).await;
    worker.stop().await;

    // Jobs run without heartbeats.
    let url = format!("http://{}", gateway.addr());
    let setup = worker_of(&platform).env("CONTROLLER_URL", &url).env("INFRA_API_KEY", "a-wrong-key-0123456");
    let worker = setup.start().await;
    worker.wait_for_metric_at_least("infra_worker_heartbeats_failed_total", 1.0).await;
    assert_eq!(run(gateway, HELLO, &json!(1)).await["status"], "SUCCESS");
    let warned = |line: &Value| line["level"] == "WARN" && line.to_string().contains("CONTROLLER_URL");
    assert_eq!(worker.log().iter().filter(|line| warned(line)).count(), 1, "once");
    worker.stop().await;
    platform.finish().await;
}

/// Waits until the worker has begun to drain.
async fn wait_for_drain(worker: &OwnWorker) {
    let is_draining = |status, health: &Value| status == 200 && health["draining"] == true;
    worker.wait_for_health("it drains", is_draining).await;
}

/// What runs is finished. The rest stays on the queue for others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_waits_for_runs() {
    let platform = fleet().await;
    let gateway = &platform.gateway;
    // While it has no place for the second job, the worker does not ask for one: the emulator would hand it
    // to the connection of a worker that has ended.
    let setup = worker_of(&platform).with("jobs.drain_s", 3600).with("capacity.runs_max", 1);
    let worker = setup.heartbeats_to(gateway).start().await;
    let hold = platform.hold().await;
    let held = gateway.run_async(&hold.function, &hold.input("patient")).await;
    hold.wait_for_runs(1).await;
    let later = gateway.run_async(HELLO, &json!({ "token": "later" })).await;
    wait_for_held_jobs(&worker, 1).await;
    worker.signal(Signal::SIGTERM);
    wait_for_drain(&worker).await;
    eventually("the heartbeat of the drain", SOON, || async {
        let workers = gateway.get("/workers").await.expect(200).json();
        let beat = &workers["workers"][0];
        let is_told = beat["status"] == "draining" && beat["healthStatus"] == "unhealthy";
        if is_told { Ok(()) } else { Err(workers.to_string()) }
    })
    .await;
    hold.release();
    let result = gateway.result_of(&held).await.json();
    assert_eq!((&result["status"], &result["workerId"]), (&json!("SUCCESS"), &json!(worker.name())));
    let status = worker.wait_for_exit(3 * SOON).await;
    assert_eq!(status.code(), Some(0), "{}", worker.process().output().tail(30));

    let other = worker_of(&platform).start().await;
    let result = gateway.result_of(&later).await.json();
    assert_eq!((&result["status"], &result["workerId"]), (&json!("SUCCESS"), &json!(other.name())));
    other.stop().await;
    platform.finish().await;
}

/// Waits until the worker has so many jobs. It must not have more.
async fn wait_for_held_jobs(worker: &OwnWorker, jobs: usize) {
    worker.wait_for_metric_at_least("infra_worker_jobs_held", jobs as f64).await;
    assert_eq!(worker.metric("infra_worker_jobs_held").await, Some(jobs as f64));
}

/// After `jobs.drain_s` the jobs go back, long before their leases end. One more was never taken.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_gives_back_what_does_not_end() {
    const RUNS: usize = 3;
    const JOBS: usize = RUNS + 1;
    let platform = fleet().await;
    let gateway = &platform.gateway;
    let setup = || worker_of(&platform).with("jobs.visibility_s", 43_200);
    let first = setup().with("jobs.drain_s", 1).with("capacity.runs_max", RUNS).start().await;
    let hold = platform.hold().await;
    let mut ids = Vec::new();
    for n in 0..JOBS {
        ids.push(gateway.run_async(&hold.function, &hold.input(&format!("run-{n}-end"))).await);
    }
    hold.wait_for_runs(RUNS).await;
    wait_for_held_jobs(&first, RUNS).await;
    let begun: BTreeSet<String> = hold.begun().into_iter().collect();
    let (pid, runs_dir) = (first.process().pid(), first.runs_dir());
    first.stop().await;
    hold.wait_for_none().await;

    let second = setup().start().await;
    hold.wait_for_runs(RUNS + JOBS).await;
    Leftovers::wait_for_none_after(pid, &runs_dir).await;
    hold.release();
    for id in &ids {
        let result = gateway.result_of(id).await.json();
        assert_eq!((&result["status"], &result["workerId"]), (&json!("SUCCESS"), &json!(second.name())));
        let starts = hold.begun().iter().filter(|begun| *begun == id).count();
        assert_eq!(starts, if begun.contains(id) { 2 } else { 1 }, "{id}");
    }
    platform.fleet().cloud.wait_for_rows(HELLO, JOBS).await;
    second.stop().await;
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_signal_ends_it_at_once() {
    let platform = fleet().await;
    let worker = worker_of(&platform).with("jobs.drain_s", 3600).start().await;
    let hold = platform.hold().await;
    let job = platform.gateway.run_async(&hold.function, &hold.input("again")).await;
    hold.wait_for_runs(1).await;
    worker.signal(Signal::SIGINT);
    wait_for_drain(&worker).await;
    worker.signal(Signal::SIGTERM);
    // Not after the drain, an hour.
    worker.wait_for_exit(SOON).await;
    hold.wait_for_none().await;
    // The message is delivered again when its lease ends.
    let other = worker_of(&platform).start().await;
    hold.wait_for_runs(2).await;
    hold.release();
    assert_eq!(platform.gateway.result_of(&job).await.json()["workerId"], other.name());
    other.stop().await;
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn settings_are_reloaded() {
    let platform = fleet().await;
    let worker = worker_of(&platform).start().await;
    let printed = async || {
        let long = json!({ "behave": "stdout", "text": "x", "times": 9000 });
        let result = run(&platform.gateway, HELLO, &long).await;
        result["stdout"].as_str().map_or(0, str::len)
    };
    assert_eq!(printed().await, 9000);
    let shorter = worker.settings().with("output.bytes_max", 2000);
    worker.put_conf(&shorter.to_toml());
    worker.signal(Signal::SIGHUP);
    worker.wait_for_metric_at_least(&reloads("worker.toml", "applied"), 1.0).await;
    assert!((2000..2256).contains(&printed().await));
    // A file with an error changes nothing. Neither does a setting that is read at start only.
    worker.put_conf("output.bytes_max = 1\n");
    worker.wait_for_metric_at_least(&reloads("worker.toml", "refused"), 1.0).await;
    assert!((2000..2256).contains(&printed().await));
    worker.change(&shorter.with("output.bytes_max", 4000).with("sandbox.network", "none")).await;
    assert!((4000..4256).contains(&printed().await));
    let sandbox = worker.get("/health").await.expect(200).json()["checks"]["sandbox"].clone();
    assert_eq!(sandbox["network"], "full", "{sandbox}");
    worker.stop_after(&["Configuration Refused"]).await;
    platform.finish().await;
}

/// Both take jobs from one queue. Each has less places than there are jobs, so neither takes all of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_works_beside_the_python_worker() {
    const JOBS: usize = 30;
    let platform = fleet().await;
    let (gateway, fleet) = (&platform.gateway, platform.fleet());
    // The Python worker receives up to ten jobs at a time with each of its two pollers, and runs two.
    let python = PythonWorker::start(&fleet.cloud, &fleet.redis, &[("RUNS_MAX", "2")]);
    let own = worker_of(&platform).with("capacity.runs_max", 4).start().await;
    python.wait_ready().await;
    let hold = platform.hold().await;
    let mut ids = Vec::new();
    for n in 0..JOBS {
        ids.push(gateway.run_async(&hold.function, &hold.input(&format!("run-{n}-end"))).await);
    }
    hold.wait_for_runs(2 + 4).await;
    hold.release();
    let mut workers = BTreeSet::new();
    for (n, id) in ids.iter().enumerate() {
        let result = gateway.result_of(id).await.json();
        assert_eq!(result["status"], "SUCCESS", "{result}");
        assert!(
            result["stdout"].as_str().is_some_and(|text| text.contains(&format!("run-{n}-end"))),
            "{result}"
        );
        workers.insert(result["workerId"].as_str().expect("a name").to_owned());
    }
    assert!(workers.len() == 2 && workers.contains(own.name()), "{workers:?}");
    fleet.cloud.wait_for_rows(HELLO, JOBS).await;
    assert_eq!(hold.begun().len(), JOBS, "each job runs once");
    own.stop().await;
    python.stop().await;
    platform.finish().await;
}

/// The jobs of a function run one after the other. Those of another function do not wait for them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_of_a_fifo_queue_keep_their_order() {
    const JOBS: usize = 5;
    let platform = Setup::serve().queue_attribute("FifoQueue", "true").no_worker().start().await;
    let gateway = &platform.gateway;
    platform.fleet().cloud.put_function("second").await;
    let worker = worker_of(&platform).start().await;
    let hold = platform.hold().await;
    let mut ids = Vec::new();
    for n in 0..JOBS {
        ids.push(gateway.run_async(HELLO, &hold.input(&format!("run-{n}-end"))).await);
    }
    let other = gateway.run_async("second", &hold.input("second")).await;
    hold.wait_for_runs(2).await;
    // The second one was sent last. So the others would have begun, if they did not wait.
    let begun: BTreeSet<String> = hold.begun().into_iter().collect();
    assert_eq!(begun, BTreeSet::from([ids[0].clone(), other.clone()]));
    hold.release();
    for id in ids.iter().chain([&other]) {
        assert_eq!(gateway.result_of(id).await.json()["status"], "SUCCESS");
    }
    let begun: Vec<String> = hold.begun().into_iter().filter(|id| *id != other).collect();
    assert_eq!(begun, ids);
    worker.stop().await;
    platform.finish().await;
}

/// A result is confirmed by a replica before its message is deleted. Without a replica nothing is confirmed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn results_are_confirmed_by_a_replica() {
    let platform = fleet().await;
    let (gateway, redis) = (&platform.gateway, &platform.fleet().redis);
    let worker = worker_of(&platform).start().await;
    assert_eq!(run(gateway, HELLO, &json!({ "token": "alone" })).await["status"], "SUCCESS");
    assert_eq!(redis.calls(&["wait"]).await, 0);
    worker.stop().await;

    let replica = Redis::start(None).await;
    replica.follow(redis).await;
    let worker = worker_of(&platform).start().await;
    let result = run(gateway, HELLO, &json!({ "token": "confirmed" })).await;
    let cloud = &platform.fleet().cloud;
    eventually("an empty queue", SOON, || async {
        let left = cloud.messages(&cloud.queue_url).await;
        if left == 0 { Ok(()) } else { Err(format!("{left} messages")) }
    })
    .await;
    let key = format!("job:{}", result["requestId"].as_str().expect("an id"));
    assert_ne!(replica.order(&format!("GET {key}")).await, Reply::Nil, "the replica has no result");
    assert!(redis.calls(&["wait"]).await >= 1);
    worker.stop().await;
    platform.finish().await;
}

/// The queue may hold messages of others. Its dead-letter queue gets them in the end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_that_are_no_jobs_are_left_alone() {
    let platform = fleet().await;
    let cloud = &platform.fleet().cloud;
    for body in ["no JSON", "{}", r#"{"requestId":"a b","functionId":"hello"}"#] {
        cloud.send_message(body).await;
    }
    let worker = worker_of(&platform).start().await;
    let result = run(&platform.gateway, HELLO, &json!({ "token": "a job" })).await;
    assert_eq!(result["status"], "SUCCESS", "{result}");
    eventually("the job has left the queue", SOON, || async {
        let left = cloud.messages(&cloud.queue_url).await;
        if left == 3 { Ok(()) } else { Err(format!("{left} messages")) }
    })
    .await;
    assert!(!worker.process().output().contains("no JSON"), "a message is in the log");
    worker.stop().await;
    platform.finish().await;
}

/// With one environment, as two instances of one unit.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_of_one_machine_share_a_state_directory() {
    let platform = fleet().await;
    let state = Scratch::new("state");
    let state_dir = state.path().to_str().expect("the path is UTF-8");
    let setup = || worker_of(&platform).env("STATE_DIR", state_dir).env("WORKER_ID", "twin");
    let (first, second) = (setup().start().await, setup().start().await);
    let mut names = BTreeSet::new();
    for worker in [&first, &second] {
        names.insert(worker.get("/health").await.expect(200).json()["workerId"].to_string());
    }
    assert_eq!(names, BTreeSet::from([r#""twin""#.to_owned(), r#""twin-1""#.to_owned()]));
    let hold = platform.hold().await;
    let mut ids = Vec::new();
    for n in 0..4 {
        ids.push(platform.gateway.run_async(HELLO, &hold.input(&format!("run-{n}-end"))).await);
    }
    hold.wait_for_runs(4).await;
    // The one that starts now takes the place of the one that has ended, and empties only that.
    first.kill();
    let third = setup().start().await;
    assert_eq!(third.get("/health").await.expect(200).json()["workerId"], "twin");
    hold.release();
    for id in &ids {
        assert_eq!(platform.gateway.result_of(id).await.json()["status"], "SUCCESS");
    }
    for worker in [second, third] {
        worker.stop().await;
    }
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_service_manager_is_notified() {
    let platform = fleet().await;
    // The address of a Unix socket has 107 bytes at most, and the scratch directory may have more.
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("notify");
    let socket = tokio::net::UnixDatagram::bind(&path).expect("a socket");
    let next = async || {
        let mut message = [0; 256];
        let read = within("a message to the service manager", SOON, socket.recv(&mut message)).await;
        String::from_utf8_lossy(&message[..read.expect("a message")]).into_owned()
    };
    let worker = worker_of(&platform).env("NOTIFY_SOCKET", path.to_str().expect("ASCII")).start().await;
    assert_eq!(next().await, "READY=1\n");
    worker.signal(Signal::SIGHUP);
    assert!(next().await.starts_with("RELOADING=1\n"));
    assert_eq!(next().await, "READY=1\n");
    worker.stop().await;
    assert_eq!(next().await, "STOPPING=1\n");
    platform.finish().await;
}
