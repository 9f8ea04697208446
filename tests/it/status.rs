//! `GET /status/:jobId`, and runs that outlast their wait.

use crate::harness::gateway::is_pending;
use crate::harness::http::Conn;
use crate::harness::job::IdParts;
use crate::harness::platform::HELLO;
use crate::harness::{SOON, Setup, eventually, spawn, within};
use serde_json::json;
use std::time::{Duration, Instant};

on_both_backends!(unknown_jobs_are_404);

async fn unknown_jobs_are_404(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    // Unknown ids of this node, of another node, and of the old controller.
    let ours = gateway.run_async(HELLO, &json!(1)).await;
    gateway.result_of(&ours).await;
    let never =
        format!("{}{}", &ours[..24], if ours.ends_with('0') { "000000000001" } else { "000000000000" });
    for id in [&never, "00000000-0000-8000-8000-000000000000", "67e55044-10b1-426f-9247-bb680e5fe0c8"] {
        for target in [format!("/status/{id}"), format!("/api/status/{id}")] {
            gateway.get(&target).await.expect_problem(404);
        }
    }
    for target in [format!("/status/{}", ours.to_uppercase()), format!("/api/status/{}", ours.to_uppercase())]
    {
        let result = gateway.get(&target).await.expect(200).json();
        assert_eq!(result["requestId"], *ours, "ids are case-insensitive");
    }
    gateway.get("/status/").await.expect_problem(400);
    let status = format!("/status/{ours}");
    for bad in ["wait=", "wait", "wait=-1", "wait=+1", "wait=1.0", "wait=soon", "wait=1&wait=1", "wait=%ff"] {
        gateway.get(&format!("{status}?{bad}")).await.expect_problem(400);
    }
    // Escapes are decoded, and long waits are clamped.
    for good in ["wait=%31", "wait=99999999999999999999999999", "other=1&other=2"] {
        gateway.get(&format!("{status}?{good}")).await.expect(200);
    }
    for id in ["garbage", "..%2f..", "%00", &"x".repeat(300)] {
        let answer = gateway.get(&format!("/status/{id}")).await;
        assert!([400, 404].contains(&answer.status), "{id}: {}", answer.status);
    }
    platform.finish().await;
}

/// A result as published by a worker.
fn result_for(id: &str) -> String {
    format!(r#"{{"requestId":"{id}","status":"SUCCESS","exitCode":0,"stdout":"by hand","durationMs":1}}"#)
}

/// Receives the next message from the queue. Returns the id of the job.
async fn take_job(platform: &crate::harness::Platform) -> String {
    let (_, body) = platform.fleet().cloud.receive().await;
    let message: serde_json::Value = serde_json::from_str(&body).expect("JSON");
    message["requestId"].as_str().expect("an id").to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_poll_returns_pending_and_then_the_result() {
    let platform = Setup::serve().no_worker().start().await;
    let gateway = &platform.gateway;
    let id = gateway.run_async(HELLO, &json!(1)).await;
    assert_eq!(take_job(&platform).await, id);
    for target in [format!("/status/{id}"), format!("/api/status/{id}")] {
        let now = gateway.get(&target).await.expect(200);
        assert!(is_pending(&now), "{}", now.text());
    }
    // A long poll without a result ends after its wait.
    for ask in [gateway.request("GET", &format!("/status/{id}")).header("prefer", "wait=1"), {
        gateway.request("GET", &format!("/status/{id}?wait=1"))
    }] {
        // Before the gateway starts its timer.
        let begun = Instant::now();
        let still = ask.send().await.expect(200);
        assert!(is_pending(&still), "{}", still.text());
        assert!(begun.elapsed() >= Duration::from_secs(1), "{:?}", begun.elapsed());
    }
    let long_poll = {
        let ask = gateway.request("GET", &format!("/status/{id}?wait=60"));
        spawn(async move { ask.send().await })
    };
    gateway.wait_for_metric("infra_waiters", 1.0).await;
    let result = result_for(&id);
    let redis = &platform.fleet().redis;
    // Workers publish a result before they store it.
    redis.publish(&format!("result:{id}"), result.as_bytes()).await;
    redis.store_result(&id, result.as_bytes()).await;
    let answer = within("the long poll", SOON, long_poll).await.expect("no panic").expect(200);
    assert_eq!(answer.text(), result);
    assert_eq!(gateway.get(&format!("/status/{id}")).await.expect(200).text(), result);
    platform.fleet().cloud.wait_for_rows(HELLO, 1).await;
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_published_result_is_found_for_a_while_without_a_stored_one() {
    let platform = Setup::serve().python_worker().start().await;
    let gateway = &platform.gateway;
    let id = gateway.run_async(HELLO, &json!({ "behave": "publish_only" })).await;
    assert_eq!(gateway.result_of(&id).await.json()["requestId"], *id);
    platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn results_of_the_old_controller_are_found() {
    let platform = Setup::serve().no_worker().start().await;
    let id = "67e55044-10b1-426f-9247-bb680e5fe0c8";
    let result = r#"{"requestId": "67e55044-10b1-426f-9247-bb680e5fe0c8", "stdout":"old"}"#;
    platform.fleet().redis.store_result(id, result.as_bytes()).await;
    assert_eq!(platform.gateway.get(&format!("/status/{id}")).await.expect(200).text(), result);
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_of_another_node_are_found() {
    let platform = Setup::serve().no_worker().start().await;
    let other = platform.fleet().start_gateway().await;
    let id = platform.gateway.run_async(HELLO, &json!(1)).await;
    assert_eq!(take_job(&platform).await, id);
    let now = other.get(&format!("/status/{id}")).await.expect(200);
    assert!(is_pending(&now), "{}", now.text());
    let long_poll = {
        let ask = other.request("GET", &format!("/status/{id}?wait=60"));
        spawn(async move { ask.send().await })
    };
    let redis = &platform.fleet().redis;
    // The other node subscribes to the channel of this job.
    let channel = format!("result:{id}");
    eventually("the other node's subscription", SOON, || async {
        let count = redis.command(&[b"PUBSUB", b"NUMSUB", channel.as_bytes()]).await;
        if format!("{count:?}").contains("Integer(1)") { Ok(()) } else { Err(format!("{count:?}")) }
    })
    .await;
    let result = result_for(&id);
    redis.publish(&channel, result.as_bytes()).await;
    redis.store_result(&id, result.as_bytes()).await;
    let answer = within("the long poll", SOON, long_poll).await.expect("no panic").expect(200);
    assert_eq!(answer.text(), result);

    let theirs = other.run_async(HELLO, &json!(2)).await;
    assert_ne!(IdParts::of(&theirs).node, IdParts::of(&id).node, "both nodes have one id");
    assert_eq!(take_job(&platform).await, theirs);
    let result = result_for(&theirs);
    redis.publish(&format!("result:{theirs}"), result.as_bytes()).await;
    redis.store_result(&theirs, result.as_bytes()).await;
    assert_eq!(platform.gateway.result_of(&theirs).await.text(), result);
    // Each job has one row.
    platform.fleet().cloud.wait_for_rows(HELLO, 2).await;
    other.finish().await;
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_continues_after_its_wait_has_ended() {
    let platform = Setup::serve().start().await;
    let gateway = &platform.gateway;
    let hold = platform.hold().await;
    let run = gateway.run(&hold.function, &hold.input("late"));
    let answer = run.header("prefer", "wait=1").send().await.expect(202);
    let timeout = answer.json();
    assert_eq!(timeout["status"], "TIMEOUT");
    assert!(timeout["message"].is_string(), "{timeout}");
    let id = timeout["jobId"].as_str().expect("an id");
    assert_eq!(answer.need("location"), format!("/status/{id}"));
    hold.release();
    let result = gateway.result_of(id).await.json();
    assert!(result["stdout"].as_str().is_some_and(|printed| printed.contains("late")), "{result}");
    let rows = platform.fleet().cloud.wait_for_rows(HELLO, 1).await;
    assert_eq!(rows[0]["status"]["S"], "SUCCESS", "the job has not completed");
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disconnected_client_leaves_no_waiter() {
    let platform = Setup::serve().no_worker().start().await;
    let gateway = &platform.gateway;
    let mut conns = Vec::new();
    for _ in 0..5 {
        let mut conn = Conn::open(gateway.addr()).await.expect("the gateway accepts connections");
        conn.write(&gateway.run(HELLO, &json!(1)).to_bytes()).await.expect("the gateway reads");
        conns.push(conn);
    }
    gateway.wait_for_metric("infra_waiters", 5.0).await;
    drop(conns);
    gateway.wait_for_metric("infra_waiters", 0.0).await;
    // The jobs continue without their clients.
    gateway.wait_for_metric("infra_jobs_in_flight", 5.0).await;
    for _ in 0..5 {
        let id = take_job(&platform).await;
        let result = result_for(&id);
        platform.fleet().redis.publish(&format!("result:{id}"), result.as_bytes()).await;
        platform.fleet().redis.store_result(&id, result.as_bytes()).await;
    }
    platform.fleet().cloud.wait_for_rows(HELLO, 5).await;
    platform.finish().await;
}
