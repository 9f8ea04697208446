//! A second process takes over the port: no client notices.

use crate::harness::gateway::run_to_end;
use crate::harness::http::{Conn, Request};
use crate::harness::platform::HELLO;
use crate::harness::process::Scratch;
use crate::harness::{Gateway, Platform, SOON, Setup, join_all, spawn};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::sync::watch;

const STEADY_CLIENTS: usize = 6;
const ONE_SHOT_CLIENTS: usize = 2;

async fn start(state: &Scratch) -> Platform {
    let state_dir = state.path().to_str().expect("the path is UTF-8");
    Setup::serve().env("STATE_DIR", state_dir).start().await
}

/// Asks one request after the other, and gives the ids of what was accepted. Any failure is a panic.
async fn ask(
    addr: SocketAddr,
    key: String,
    keeps_alive: bool,
    stopped: watch::Receiver<bool>,
) -> Vec<String> {
    let mut ids = Vec::new();
    let mut conn = None;
    while !*stopped.borrow() {
        let run = Request::new(addr, "POST", "/run").described().header("x-api-key", &key);
        let run = run.json(&json!({ "functionId": HELLO, "inputData": ids.len() }));
        let run = if ids.len() % 2 == 0 { run.header("x-async", "true") } else { run };
        let mut used = match conn.take() {
            Some(conn) => conn,
            None => Conn::open(addr).await.expect("somebody listens"),
        };
        used.write(&run.to_bytes()).await.expect("the connection stands");
        let answer = used.answer(false).await.expect("an answer comes");
        run.check(&answer);
        let member = if ids.len() % 2 == 0 { "jobId" } else { "requestId" };
        let status = if ids.len() % 2 == 0 { 202 } else { 200 };
        ids.push(answer.clone().expect(status).json()[member].as_str().expect("an id").to_owned());
        // A client that is told so opens another one.
        let is_closed = answer.header("connection").is_some_and(|v| v.eq_ignore_ascii_case("close"));
        conn = (keeps_alive && !is_closed).then_some(used);
        tokio::time::sleep(Duration::from_millis(15)).await;
    }
    ids
}

async fn upgrade(platform: &mut Platform) {
    let successor = platform.fleet().start_successor().await;
    assert_eq!(successor.addr(), platform.gateway.addr());
    let old = std::mem::replace(&mut platform.gateway, successor);
    let status = old.ended(SOON).await;
    assert_eq!(status.code(), Some(0), "it ends by itself: {}", old.output().tail(30));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_upgrades_under_load_fail_no_request() {
    let state = Scratch::new("state");
    let mut platform = start(&state).await;
    let (stop, stopped) = watch::channel(false);
    let clients = (0..STEADY_CLIENTS + ONE_SHOT_CLIENTS).map(|n| {
        let (addr, key) = (platform.gateway.addr(), platform.gateway.key().to_owned());
        spawn(ask(addr, key, n < STEADY_CLIENTS, stopped.clone()))
    });
    let clients: Vec<_> = clients.collect();
    for _ in 0..2 {
        tokio::time::sleep(Duration::from_millis(500)).await;
        upgrade(&mut platform).await;
    }
    stop.send_replace(true);
    let ids: Vec<String> = join_all("the clients", SOON, clients).await.concat();
    assert!(ids.len() > 100, "{} requests", ids.len());

    platform.gateway.idle().await;
    let mut rows: BTreeMap<String, usize> = BTreeMap::new();
    for row in platform.fleet().cloud.wait_for_rows(HELLO, ids.len()).await {
        assert_eq!(row["status"]["S"], "SUCCESS", "{row}");
        *rows.entry(row["requestId"]["S"].as_str().expect("an id").to_owned()).or_default() += 1;
    }
    assert!(ids.iter().all(|id| rows.get(id) == Some(&1)), "each has its row");
    platform.finish().await;
}

/// A job of the one that goes is known to the one that comes, and who waits for it there is answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_and_waiting_clients_survive() {
    let state = Scratch::new("state");
    let state_dir = state.path().to_str().expect("the path is UTF-8");
    let mut platform = Setup::serve().no_worker().env("STATE_DIR", state_dir).start().await;
    let run = platform.gateway.run(HELLO, &json!(1));
    let client = spawn(async move { run.send().await });
    let (_, message) = platform.fleet().cloud.receive().await;
    let message: Value = serde_json::from_str(&message).expect("JSON");
    let id = message["requestId"].as_str().expect("an id").to_owned();
    let successor = platform.fleet().start_successor().await;
    let old = std::mem::replace(&mut platform.gateway, successor);
    let pending = platform.gateway.get(&format!("/status/{id}")).await.expect(200).json();
    assert_eq!(pending["status"], "pending");

    let result = format!(r#"{{"requestId":"{id}","status":"SUCCESS","stdout":"slow"}}"#);
    let redis = &platform.fleet().redis;
    redis.publish(&format!("result:{id}"), result.as_bytes()).await;
    redis.store_result(&id, result.as_bytes()).await;
    assert_eq!(client.await.expect("no panic").expect(200).text(), result);
    assert_eq!(platform.gateway.result_of(&id).await.text(), result);
    assert_eq!(old.ended(SOON).await.code(), Some(0));
    platform.fleet().cloud.wait_for_rows(HELLO, 1).await;
    platform.finish().await;
}

/// What cannot work takes nothing over; and where nobody runs, `--upgrade` just starts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_that_cannot_work_changes_nothing() {
    let state = Scratch::new("state");
    let state_dir = ("STATE_DIR".to_owned(), state.path().display().to_string());
    let platform = start(&state).await;
    let mut env = platform.fleet().gateway_env();
    env.push(("SQS_URL".into(), "http://127.0.0.1:9/000000000000/none".into()));
    env.push(("AWS_ENDPOINT_URL_SQS".into(), "http://127.0.0.1:9".into()));
    env.push(state_dir);
    let dir = Scratch::new("broken");
    let run =
        tokio::task::block_in_place(|| run_to_end(&["serve", "--upgrade"], &env, dir.path(), SOON, || {}));
    assert_eq!(run.code, Some(69), "{}", run.output);
    platform.gateway.run(HELLO, &json!(1)).send().await.expect(200);
    platform.gateway.idle().await;

    // As after SIGKILL: the socket is still there, and nobody waits at it.
    platform.gateway.signal(Signal::SIGKILL);
    platform.gateway.ended(SOON).await;
    let alone: Gateway = platform.fleet().start_successor().await;
    alone.run(HELLO, &json!(1)).send().await.expect(200);
    alone.finish().await;
}
