//! Shutdown: signals, drain, lame duck, kills.

use crate::harness::gateway::{Conf, run_to_end, start_process};
use crate::harness::http::Answer;
use crate::harness::platform::{Backend, Fleet, HELLO, new_key};
use crate::harness::process::{Scratch, Stream};
use crate::harness::{Gateway, Platform, SOON, Setup, eventually, join_all, spawn};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use tokio::task::JoinHandle;

const RUNS: usize = 50;

on_all_workers!(waiting_runs_are_answered_before_the_exit);

/// A drain timeout that is longer than any deadline of a test.
const LONG_DRAIN: &str = "[shutdown]\ndrain_timeout_s = 3600\n";

fn conf(server: &str) -> Conf {
    // A busy machine makes the queue slow. No job is shed for that.
    let limits = "limit = []\n[overload]\nconfirm_target_ms = 0\n".into();
    Conf { server: server.into(), limits, ..Conf::default() }
}

/// Starts synchronous runs, and waits until all of them wait for their results.
async fn waiting_runs(
    gateway: &Gateway,
    function: &str,
    count: usize,
    input: impl Fn(usize) -> Value,
) -> Vec<JoinHandle<Answer>> {
    let client = |n| {
        let run = gateway.run(function, &input(n));
        spawn(async move { run.send().await })
    };
    let clients = (0..count).map(client).collect();
    gateway.wait_for_metric("infra_waiters", count as f64).await;
    clients
}

async fn waiting_runs_are_answered_before_the_exit(setup: Setup) {
    let is_dev = setup.backend == Backend::Dev;
    let platform = setup.conf(conf(LONG_DRAIN)).start().await;
    let gateway = &platform.gateway;
    let hold = platform.hold().await;
    let input = |n: usize| hold.input(&format!("waiting-{n}-end"));
    let clients = waiting_runs(gateway, &hold.function, RUNS, input).await;
    gateway.signal(Signal::SIGTERM);
    eventually("the listener closes", SOON, || closed(gateway)).await;
    hold.release();
    let answers = join_all("50 runs", 6 * SOON, clients).await;
    for (n, answer) in answers.into_iter().enumerate() {
        let answer = answer.expect(200);
        assert_eq!(answer.need("connection"), "close", "the connection persists");
        let result = answer.json();
        let printed = result["stdout"].as_str().unwrap_or_default();
        assert!(printed.contains(&format!("waiting-{n}-end")), "{result}");
    }
    let status = gateway.wait_for_exit(2 * SOON).await;
    assert_eq!(status.code(), Some(0), "{}", gateway.output().tail(30));
    if is_dev {
        return;
    }
    let cloud = &platform.fleet().cloud;
    // The tables of a busy machine may not have answered in time. Another node writes what is left then.
    let has_failed_calls = |line: &Value| line["level"] == "WARN" && line["error"].is_string();
    if gateway.log().iter().any(has_failed_calls) {
        let other = platform.fleet().start_gateway().await;
        cloud.wait_for_rows(HELLO, RUNS).await;
        cloud.wait_for_invocations(HELLO, RUNS).await;
        other.finish().await;
    } else {
        assert_eq!(cloud.log_rows(HELLO).await.len(), RUNS, "the rows are not flushed");
        let item = cloud.function_item(HELLO).await;
        assert_eq!(item["invocations"]["N"], RUNS.to_string(), "the counters are not flushed: {item}");
    }
}

/// Their jobs continue.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runs_past_the_drain_timeout_get_their_job_id() {
    let conf = conf("[shutdown]\ndrain_timeout_s = 1\nlame_duck_ms = 0\n");
    let platform = Setup::serve().conf(conf).no_worker().start().await;
    let gateway = &platform.gateway;
    let clients = waiting_runs(gateway, HELLO, 5, |n| json!(n)).await;
    gateway.signal(Signal::SIGINT);
    let answers = join_all("5 runs", SOON, clients).await;
    let mut ids = BTreeSet::new();
    for answer in answers {
        let answer = answer.expect(202);
        let id = answer.json()["jobId"].as_str().expect("an id").to_owned();
        assert_eq!(answer.need("location"), format!("/status/{id}"));
        ids.insert(id);
    }
    let status = gateway.wait_for_exit(SOON).await;
    assert_eq!(status.code(), Some(0), "{}", gateway.output().tail(30));
    let mut queued = BTreeSet::new();
    for _ in 0..5 {
        let (_, body) = platform.fleet().cloud.receive().await;
        let message: Value = serde_json::from_str(&body).expect("JSON");
        queued.insert(message["requestId"].as_str().expect("an id").to_owned());
    }
    assert_eq!(queued, ids, "the jobs are not on the queue");
}

/// First `/readyz` is 503, for the load balancer. Then the listener closes, and then the run is answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lame_duck_is_not_ready_and_still_serves() {
    // Long enough for two requests, also on a busy machine.
    let conf = conf(&format!("{LONG_DRAIN}lame_duck_ms = 15000\n"));
    let platform = Setup::serve().conf(conf).start().await;
    let gateway = &platform.gateway;
    let hold = platform.hold().await;
    let clients = waiting_runs(gateway, &hold.function, 1, |_| hold.input("patient")).await;
    gateway.signal(Signal::SIGTERM);
    let ready = gateway.anonymous("GET", "/readyz");
    let not_ready = || async {
        match ready.try_send().await {
            Ok(answer) if answer.status == 503 => Ok(()),
            other => Err(format!("{other:?}")),
        }
    };
    eventually("/readyz 503", SOON, not_ready).await;
    gateway.anonymous("GET", "/livez").send().await.expect(200);
    eventually("the listener closes", SOON, || closed(gateway)).await;
    hold.release();
    let answers = join_all("the run", SOON, clients).await;
    assert!(answers[0].text().contains("patient"), "{}", answers[0].text());
    let status = gateway.wait_for_exit(SOON).await;
    assert_eq!(status.code(), Some(0), "{}", gateway.output().tail(30));
}

async fn closed(gateway: &Gateway) -> Result<(), String> {
    match tokio::net::TcpStream::connect(gateway.addr()).await {
        // A client may get the port of the listener as its own, and connect to itself.
        Ok(stream) if stream.local_addr().ok() != stream.peer_addr().ok() => {
            Err("it accepts connections".to_owned())
        }
        _ => Ok(()),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_signal_exits_at_once() {
    let platform = Setup::serve().conf(conf(LONG_DRAIN)).no_worker().start().await;
    let gateway = &platform.gateway;
    let clients = waiting_runs(gateway, HELLO, 1, |n| json!(n)).await;
    gateway.signal(Signal::SIGTERM);
    // The first signal is handled. With a waiting run the drain would take an hour.
    eventually("the listener closes", SOON, || closed(gateway)).await;
    gateway.signal(Signal::SIGTERM);
    gateway.wait_for_exit(SOON).await;
    for client in clients {
        client.abort();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dev_completes_its_jobs_after_a_kill() {
    const JOBS: usize = 40;
    let dir = Scratch::new("data");
    let data = dir.path().join("data");
    let args = ["dev", "--port", "0", "--data-dir", data.to_str().expect("the path is UTF-8")];
    let key = new_key();
    let env = [("INFRA_API_KEY".to_owned(), key.clone())];
    let gateway = Gateway::start(&args, &env, &key, &[]).await;
    let before = gateway.get("/functions/hello").await.expect(200).json();
    let first = gateway.run(HELLO, &json!({ "token": "before" })).send().await.expect(200).json();
    let mut ids = vec![first["requestId"].as_str().expect("an id").to_owned()];
    for n in 0..JOBS {
        ids.push(gateway.run_async(HELLO, &json!({ "token": format!("job-{n}-end") })).await);
    }
    gateway.kill();

    let gateway = Gateway::start(&args, &env, &key, &[]).await;
    assert_eq!(
        gateway.get("/functions/hello").await.expect(200).json(),
        before,
        "the function was seeded again"
    );
    for (n, id) in ids[1..].iter().enumerate() {
        let result = gateway.result_of(id).await.json();
        let printed = result["stdout"].as_str().unwrap_or_default();
        assert!(printed.contains(&format!("job-{n}-end")), "{id}: {result}");
    }
    let rows = eventually("a row for each run", SOON, || async {
        let rows = gateway.get("/functions/hello/logs?limit=1000").await.expect(200).json();
        let count = rows.as_array().map_or(0, Vec::len);
        if count == JOBS + 1 { Ok(rows) } else { Err(format!("{count} rows")) }
    })
    .await;
    for row in rows.as_array().expect("an array") {
        assert!(ids.iter().any(|id| row["requestId"] == **id), "{row}");
        assert_eq!(row["status"], "SUCCESS", "{row}");
    }
    gateway.finish().await;
}

/// It is started again with the same `STATE_DIR`. `check` in the meantime changes nothing there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn serve_completes_its_jobs_after_a_kill() {
    const JOBS: usize = 20;
    let state = Scratch::new("state");
    let state_dir = state.path().to_str().expect("the path is UTF-8");
    let platform = Setup::serve().no_worker().env("STATE_DIR", state_dir).start().await;
    let mut ids = Vec::new();
    for n in 0..JOBS {
        ids.push(platform.gateway.run_async(HELLO, &json!(n)).await);
    }
    assert_eq!(platform.fleet().redis.journaled(&ids[0]).await, JOBS as i64);
    let check = async |fleet: &Fleet| {
        let dir = Scratch::new("check");
        let run = run_to_end(&["check"], &fleet.gateway_env(), dir.path(), SOON).await;
        assert_eq!(run.code, Some(0), "{}", run.output);
    };
    check(platform.fleet()).await;
    let meanwhile = async |fleet: &Fleet| {
        check(fleet).await;
        for id in &ids {
            let result = format!(r#"{{"requestId":"{id}","status":"SUCCESS","stdout":"meanwhile"}}"#);
            fleet.redis.store_result(id, result.as_bytes()).await;
        }
    };
    let platform = platform.kill_and_restart(meanwhile).await;
    let rows = platform.fleet().cloud.wait_for_rows(HELLO, JOBS).await;
    assert!(rows.iter().all(|row| row["status"]["S"] == "SUCCESS"), "{rows:?}");
    platform.gateway.wait_until_idle().await;
    eventually("an empty journal", SOON, || async {
        let left = platform.fleet().redis.journaled(&ids[0]).await;
        if left == 0 { Ok(()) } else { Err(format!("{left} left")) }
    })
    .await;
    platform.finish().await;
}

/// `::1` in the hexadecimal form of the kernel.
const LOOPBACK_V6: &str = "00000000000000000000000001000000";

/// Without a key in the environment `dev` creates one, and prints its file.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dev_creates_a_key_and_listens_on_loopback_only() {
    let dir = Scratch::new("dev");
    let data = dir.path().join("data");
    let args = ["dev", "--port", "0", "--data-dir", data.to_str().expect("the path is UTF-8")];
    let gateway = Gateway::start(&args, &[], "no-such-key", &[]).await;
    let on = crate::harness::process::listening_on(gateway.addr().port());
    let beyond = on.iter().filter(|address| !["0100007F", LOOPBACK_V6].contains(&address.as_str()));
    assert_eq!(beyond.count(), 0, "other addresses than 127.0.0.1 and ::1: {on:?}");

    let file = data.join("api-key");
    let key = std::fs::read_to_string(&file).expect("created at the first start");
    let key = key.trim();
    gateway.wait_for_output(&file.display().to_string()).await;
    // The output is not a terminal.
    assert!(!gateway.output().contains(key), "{}", gateway.output().tail(20));

    // The second example exists if its runtime does.
    let has_node = std::process::Command::new("node").arg("--version").output().is_ok();
    let run = gateway.anonymous("POST", "/run").header("x-api-key", key);
    let run = run.json(&json!({ "functionId": "hello-node", "inputData": { "token": "from-node" } }));
    let answer = run.send().await;
    if has_node {
        let result = answer.expect(200).json();
        assert!(result["stdout"].as_str().is_some_and(|printed| printed.contains("from-node")), "{result}");
    } else {
        answer.expect(404);
    }
    gateway.finish().await;

    // Invalid arguments end it, with a reason.
    let process = start_process(&["dev", "--port", "seventy"], &[], dir.path());
    assert_ne!(process.wait_for_exit(SOON).await.code(), Some(0));
    assert!(!process.output().lines(Stream::Err).is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_gateway_exits_at_once() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let platform: Platform = Setup::serve().conf(conf(LONG_DRAIN)).no_worker().start().await;
        platform.gateway.signal(signal);
        // Not after the drain timeout, an hour.
        let status = platform.gateway.wait_for_exit(SOON).await;
        assert_eq!(status.code(), Some(0), "{signal}: {}", platform.gateway.output().tail(30));
    }
}
