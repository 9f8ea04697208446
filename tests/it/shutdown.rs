//! The end of a gateway: on a signal, with work in hand, and by force.

use crate::harness::gateway::{Conf, run_to_end, start_process};
use crate::harness::http::Answer;
use crate::harness::platform::{Backend, Fleet, HELLO, new_key};
use crate::harness::process::{Scratch, Stream};
use crate::harness::{Gateway, Platform, SOON, Setup, eventually, join_all, spawn};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::Duration;
use tokio::task::JoinHandle;

const RUNS: usize = 50;

over_both!(fifty_waiting_runs_are_answered);

/// Starts synchronous runs; returns when the gateway has accepted all of them.
async fn waiting_runs(
    gateway: &Gateway,
    count: usize,
    input: impl Fn(usize) -> Value,
) -> Vec<JoinHandle<Answer>> {
    let client = |n| {
        let run = gateway.run(HELLO, &input(n));
        spawn(async move { run.send().await })
    };
    let clients = (0..count).map(client).collect();
    eventually("all runs accepted", SOON, || async {
        let accepted = gateway.log().iter().filter(|line| line["msg"] == "Run Request").count();
        if accepted == count { Ok(()) } else { Err(format!("{accepted} accepted")) }
    })
    .await;
    clients
}

async fn fifty_waiting_runs_are_answered(setup: Setup) {
    let is_dev = setup.backend == Backend::Dev;
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    let input = |n: usize| json!({ "behave": "sleep", "ms": 2000, "token": format!("waiting-{n}-end") });
    let clients = waiting_runs(gateway, RUNS, input).await;
    gateway.signal(Signal::SIGTERM);
    let answers = join_all("50 runs", Duration::from_secs(60), clients).await;
    for (n, answer) in answers.into_iter().enumerate() {
        let answer = answer.expect(200);
        assert_eq!(answer.need("connection"), "close", "nobody may come again");
        let result = answer.json();
        let printed = result["stdout"].as_str().unwrap_or_default();
        assert!(printed.contains(&format!("waiting-{n}-end")), "{result}");
    }
    let status = gateway.ended(Duration::from_secs(30)).await;
    assert_eq!(status.code(), Some(0), "{}", gateway.output().tail(30));
    // The rows were flushed before the end: nobody is left to write them.
    if !is_dev {
        assert_eq!(platform.fleet().cloud.log_rows(HELLO).await.len(), RUNS);
        let item = platform.fleet().cloud.function_item(HELLO).await;
        assert_eq!(item["invocations"]["N"], "50", "{item}");
    }
}

/// Who still waits when the drain time ends gets the id of the job, which goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runs_past_the_drain_time_get_their_job_id() {
    let conf =
        Conf { server: "[shutdown]\ndrain_timeout_s = 1\nlame_duck_ms = 0\n".into(), ..Conf::default() };
    let platform = Setup::serve().conf(conf).no_worker().start().await;
    let gateway = &platform.gateway;
    let clients = waiting_runs(gateway, 5, |n| json!(n)).await;
    gateway.wait_for_metric("infra_waiters", 5.0).await;
    gateway.signal(Signal::SIGINT);
    let answers = join_all("5 runs", SOON, clients).await;
    let mut ids = BTreeSet::new();
    for answer in answers {
        let answer = answer.expect(202);
        let id = answer.json()["jobId"].as_str().expect("an id").to_owned();
        assert_eq!(answer.need("location"), format!("/status/{id}"));
        ids.insert(id);
    }
    let status = gateway.ended(SOON).await;
    assert_eq!(status.code(), Some(0), "{}", gateway.output().tail(30));
    let mut queued = BTreeSet::new();
    for _ in 0..5 {
        let (_, body) = platform.fleet().cloud.receive().await;
        let message: Value = serde_json::from_str(&body).expect("JSON");
        queued.insert(message["requestId"].as_str().expect("an id").to_owned());
    }
    assert_eq!(queued, ids, "the jobs go on");
}

/// First `/readyz` says so, to the load balancer; then the listener closes; then the run is answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_lame_duck_says_that_it_is_not_ready() {
    let conf =
        Conf { server: "[shutdown]\ndrain_timeout_s = 30\nlame_duck_ms = 3000\n".into(), ..Conf::default() };
    let platform = Setup::serve().conf(conf).start().await;
    let gateway = &platform.gateway;
    let input = |_| json!({ "behave": "sleep", "ms": 5000, "token": "patient" });
    let clients = waiting_runs(gateway, 1, input).await;
    gateway.signal(Signal::SIGTERM);
    let ready = gateway.anonymous("GET", "/readyz");
    let not_ready = || async {
        match ready.try_send().await {
            Ok(answer) if answer.status == 503 => Ok(()),
            other => Err(format!("{other:?}")),
        }
    };
    eventually("/readyz 503", Duration::from_secs(3), not_ready).await;
    gateway.anonymous("GET", "/livez").send().await.expect(200);
    eventually("the listener closes", SOON, || closed(gateway)).await;
    let answers = join_all("the run", SOON, clients).await;
    assert!(answers[0].text().contains("patient"), "{}", answers[0].text());
    let status = gateway.ended(SOON).await;
    assert_eq!(status.code(), Some(0), "{}", gateway.output().tail(30));
}

async fn closed(gateway: &Gateway) -> Result<(), String> {
    match tokio::net::TcpStream::connect(gateway.addr()).await {
        // A port of the ephemeral range can connect to itself; that is not the gateway.
        Ok(stream) if stream.local_addr().ok() != stream.peer_addr().ok() => Err("it accepts".to_owned()),
        _ => Ok(()),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_signal_ends_it_at_once() {
    let platform = Setup::serve().no_worker().start().await;
    let gateway = &platform.gateway;
    let clients = waiting_runs(gateway, 1, |n| json!(n)).await;
    gateway.signal(Signal::SIGTERM);
    // The first signal has been seen; with a waiting run it would take the whole drain time, 30 s.
    eventually("the listener closes", SOON, || closed(gateway)).await;
    gateway.signal(Signal::SIGTERM);
    gateway.ended(Duration::from_secs(10)).await;
    for client in clients {
        client.abort();
    }
}

/// Killed in the middle of its work, `dev` has everything when it is started again, and finishes it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dev_killed_and_started_again() {
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
    assert_eq!(gateway.get("/functions/hello").await.expect(200).json(), before, "seeded once");
    for (n, id) in ids[1..].iter().enumerate() {
        let result = gateway.result_of(id).await.json();
        let printed = result["stdout"].as_str().unwrap_or_default();
        assert!(printed.contains(&format!("job-{n}-end")), "{id}: {result}");
    }
    let rows = eventually("a row of each", SOON, || async {
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

/// A node that is killed goes on with its jobs when it is started again on its `STATE_DIR`, whatever `check` did there
/// in between.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn serve_killed_and_started_again() {
    const JOBS: usize = 20;
    let state = Scratch::new("state");
    let state_dir = state.path().to_str().expect("the path is UTF-8");
    let platform = Setup::serve().no_worker().env("STATE_DIR", state_dir).start().await;
    let mut ids = Vec::new();
    for n in 0..JOBS {
        ids.push(platform.gateway.run_async(HELLO, &json!(n)).await);
    }
    assert_eq!(platform.fleet().redis.journaled(&ids[0]).await, JOBS as i64);
    let check = |env: &[(String, String)]| {
        let dir = Scratch::new("check");
        let run = tokio::task::block_in_place(|| run_to_end(&["check"], env, dir.path(), SOON, || {}));
        assert_eq!(run.code, Some(0), "{}", run.output);
    };
    check(&platform.fleet().gateway_env());
    let meanwhile = async |fleet: &Fleet| {
        check(&fleet.gateway_env());
        for id in &ids {
            let result = format!(r#"{{"requestId":"{id}","status":"SUCCESS","stdout":"meanwhile"}}"#);
            fleet.redis.store_result(id, result.as_bytes()).await;
        }
    };
    let platform = platform.kill_and_restart(meanwhile).await;
    let rows = platform.fleet().cloud.wait_for_rows(HELLO, JOBS).await;
    assert!(rows.iter().all(|row| row["status"]["S"] == "SUCCESS"), "{rows:?}");
    platform.gateway.idle().await;
    eventually("an empty journal", SOON, || async {
        let left = platform.fleet().redis.journaled(&ids[0]).await;
        if left == 0 { Ok(()) } else { Err(format!("{left} left")) }
    })
    .await;
    platform.finish().await;
}

/// `::1`, as the kernel writes it.
const LOOPBACK_V6: &str = "00000000000000000000000001000000";

/// Without a key in the environment `dev` makes one, and says where it is. It listens on this machine only.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dev_keeps_its_key() {
    let dir = Scratch::new("dev");
    let data = dir.path().join("data");
    let args = ["dev", "--port", "0", "--data-dir", data.to_str().expect("the path is UTF-8")];
    let gateway = Gateway::start(&args, &[], "no-such-key", &[]).await;
    let on = crate::harness::process::listening_on(gateway.addr().port());
    let beyond = on.iter().filter(|address| !["0100007F", LOOPBACK_V6].contains(&address.as_str()));
    assert_eq!(beyond.count(), 0, "127.0.0.1 and ::1 and nothing else: {on:?}");

    let file = data.join("api-key");
    let key = std::fs::read_to_string(&file).expect("made at the first start");
    let key = key.trim();
    gateway.until_printed(&file.display().to_string()).await;
    // Its output goes to no terminal.
    assert!(!gateway.output().contains(key), "{}", gateway.output().tail(20));

    // The other example is there where its runtime is.
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

    // Bad arguments end it, and say why.
    let process = start_process(&["dev", "--port", "seventy"], &[], dir.path());
    let status = tokio::task::block_in_place(|| process.wait(SOON)).expect("it ends");
    assert_ne!(status.code(), Some(0));
    assert!(!process.output().lines(Stream::Err).is_empty());
}

/// `Platform` is dropped here with its gateway ended by the test: the harness asserts that it has ended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_gateway_ends_at_once() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let platform: Platform = Setup::serve().no_worker().start().await;
        platform.gateway.signal(signal);
        let status = platform.gateway.ended(Duration::from_secs(10)).await;
        assert_eq!(status.code(), Some(0), "{signal}: {}", platform.gateway.output().tail(30));
    }
}
