//! `Idempotency-Key`: a repeated request runs once, however the first attempt failed.

use crate::harness::aws_proxy::{Faults, Policy};
use crate::harness::gateway::Conf;
use crate::harness::http::{Answer, Request};
use crate::harness::platform::{Backend, HELLO};
use crate::harness::redis::Reply;
use crate::harness::redis_proxy::RedisProxy;
use crate::harness::{Gateway, Platform, SOON, Setup, eventually, join_all, spawn};
use serde_json::{Value, json};
use std::collections::BTreeSet;

on_all_workers!(concurrent_repeats_run_once);
on_both_backends!(
    a_repeated_request_returns_the_same_job,
    a_repeat_is_answered_after_the_function_is_deleted
);

fn keyed(gateway: &Gateway, key: &str, input: &Value) -> Request {
    gateway.run(HELLO, input).header("idempotency-key", key)
}

/// Number of executions of [`HELLO`].
async fn executions(platform: &Platform) -> u64 {
    executions_of(platform, HELLO).await
}

async fn executions_of(platform: &Platform, function: &str) -> u64 {
    platform.gateway.wait_until_idle().await;
    let target = format!("/functions/{function}/logs?limit=100");
    let logs = platform.gateway.get(&target).await.expect(200).json();
    logs.as_array().expect("an array").len() as u64
}

async fn a_repeated_request_returns_the_same_job(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    let input = json!({ "token": "once" });
    let first = keyed(gateway, "k1", &input).send().await.expect(200);
    // A string of structured fields is the same key.
    let again = keyed(gateway, "\"k1\"", &input).send().await.expect(200);
    assert_eq!(again.text(), first.text());
    let id = first.json()["requestId"].as_str().expect("an id").to_owned();
    let later = keyed(gateway, "k1", &input).header("x-async", "true").send().await.expect(202);
    assert_eq!(later.json(), json!({ "status": "ACCEPTED", "jobId": id }));
    assert_eq!(later.need("location"), format!("/status/{id}"));

    let accepted = keyed(gateway, "k2", &input).header("x-async", "true").send().await.expect(202);
    let id = accepted.json()["jobId"].as_str().expect("an id").to_owned();
    let result = keyed(gateway, "k2", &input).send().await.expect(200).json();
    assert_eq!(result["requestId"], *id);
    let other = keyed(gateway, "k2", &json!({ "token": "another" })).send().await.expect_problem(422);
    assert_eq!(other.json()["code"], "idempotency_key_reused");

    // A rejected request does not claim its key.
    let unknown = gateway.request("POST", "/run").json(&json!({ "functionId": "no-such-function" }));
    unknown.header("idempotency-key", "k3").send().await.expect(404);
    keyed(gateway, "k3", &input).send().await.expect(200);
    assert_eq!(executions(&platform).await, 3);
    for (outcome, count) in [("new", 3.0), ("repeated", 3.0), ("reused", 1.0)] {
        let series = format!("infra_idempotent_requests_total{{outcome=\"{outcome}\"}}");
        assert_eq!(gateway.metric(&series).await, Some(count), "{outcome}");
    }
    platform.finish().await;
}

async fn concurrent_repeats_run_once(setup: Setup) {
    let is_serve = setup.backend == Backend::Serve;
    let platform = setup.start().await;
    // In a fleet half of them are sent to another node.
    let other = if is_serve { Some(platform.fleet().start_gateway().await) } else { None };
    let hold = platform.hold().await;
    let clients = (0..20).map(|n| {
        let gateway = other.as_ref().filter(|_| n % 2 == 0).unwrap_or(&platform.gateway);
        let run = gateway.run(&hold.function, &hold.input("many")).header("idempotency-key", "all");
        let run = if n % 4 == 0 { run.header("x-async", "true") } else { run };
        spawn(async move { run.send().await })
    });
    let clients = clients.collect();
    // Until all are received: they are accepted, or wait for the result.
    eventually("20 requests", SOON, || async {
        let mut received = 0.0;
        for gateway in [&platform.gateway].into_iter().chain(&other) {
            let accepted =
                r#"http_request_duration_seconds_count{method="POST",route="/run",status_code="202"}"#;
            received += gateway.metric(accepted).await.unwrap_or_default();
            // Without the metrics request.
            received += gateway.metric("infra_requests_in_flight").await.unwrap_or_default() - 1.0;
        }
        if received >= 20.0 { Ok(()) } else { Err(received.to_string()) }
    })
    .await;
    hold.release();
    let answers = join_all("20 runs", SOON, clients).await;
    let id = |answer: &Answer| {
        let member = if answer.status == 202 { "jobId" } else { "requestId" };
        answer.json()[member].as_str().unwrap_or_else(|| panic!("{answer:?}")).to_owned()
    };
    let ids: BTreeSet<String> = answers.iter().map(id).collect();
    assert_eq!(ids.len(), 1, "{ids:?}");
    assert!(answers.iter().any(|answer| answer.status == 200));
    if let Some(other) = other {
        other.finish().await;
    }
    assert_eq!(executions_of(&platform, &hold.function).await, 1);
    platform.finish().await;
}

async fn a_repeat_is_answered_after_the_function_is_deleted(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    let (input, other) = (json!({ "token": "x" }), json!({ "token": "another" }));
    let first = keyed(gateway, "gone", &input).send().await.expect(200).text();
    gateway.request("DELETE", &format!("/functions/{HELLO}")).send().await.expect(200);
    let again = || keyed(gateway, "gone", &input);
    assert_eq!(again().send().await.expect(200).text(), first);
    again().header("x-async", "true").send().await.expect(202);
    let reused = keyed(gateway, "gone", &other).send().await.expect_problem(422).json();
    assert_eq!(reused["code"], "idempotency_key_reused");
    keyed(gateway, "new", &input).send().await.expect_problem(404);
    gateway.run(HELLO, &input).send().await.expect_problem(404);
    platform.finish().await;
}

/// The result is stored with the key, longer than the copy of the worker in Redis.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_result_outlives_its_copy_in_redis() {
    let platform = Setup::serve().start().await;
    let gateway = &platform.gateway;
    let first = keyed(gateway, "kept", &json!({ "token": "x" })).send().await.expect(200);
    let huge = json!({ "behave": "huge", "bytes": 500_000 });
    let huge_id = keyed(gateway, "huge", &huge).send().await.expect(200).json()["requestId"].clone();
    gateway.wait_until_idle().await;
    platform.fleet().redis.command(&[b"FLUSHALL"]).await;
    // The node restores its journal, which contains the job until its end is known there.
    let huge_id = huge_id.as_str().expect("an id");
    let entry = format!("HSET inflight:{{{}}} {huge_id} 4000000000000:{HELLO}", &huge_id[..8]);
    platform.fleet().redis.order(&entry).await;
    // Another node does not have the result in memory.
    let there = platform.fleet().start_gateway().await;
    let again = keyed(&there, "kept", &json!({ "token": "x" })).send().await.expect(200);
    assert_eq!(again.text(), first.text());
    // A result that is too large to store is answered from its row.
    let of_row = keyed(&there, "huge", &huge).send().await.expect(200).json();
    assert_eq!((&of_row["status"], &of_row["functionId"]), (&json!("SUCCESS"), &json!(HELLO)));
    assert_eq!(executions(&platform).await, 2);
    there.finish().await;
    platform.finish().await;
}

/// The node dies after it has claimed the key, before it has sent the job. When the attempt is over the job
/// has passed its deadline, so it is sent with a new one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_of_a_dead_node_is_taken_over() {
    // The node is killed before the send deadline, also on a busy machine.
    let limits = "[waits]\njob_deadline_s = 18\n[batch]\nsend_deadline_ms = 15000\n".into();
    let conf = Conf { limits, ..Conf::default() };
    let platform = Setup::serve().conf(conf).start().await;
    let redis_proxy = RedisProxy::to(&platform.fleet().redis).await;
    let doomed = platform.fleet().start_gateway_with(&[("REDIS_URL".into(), redis_proxy.url())]).await;
    let input = json!({ "token": "x" });
    // The node cannot write the journal, so it does not send the job.
    redis_proxy.cut();
    let run = keyed(&doomed, "dead", &input);
    let client = spawn(async move { run.try_send().await.is_ok() });
    let claimed = claimed_job(&platform).await;
    doomed.kill();
    assert!(!client.await.expect("no panic"), "the connection broke");
    let again = keyed(&platform.gateway, "dead", &input).send().await.expect(200).json();
    assert!(again["stdout"].as_str().is_some_and(|printed| printed.contains('x')), "{again}");
    assert_eq!(again["requestId"], *claimed);
    assert_eq!(platform.gateway.metric(&outcome("taken_over")).await, Some(1.0));
    assert_eq!(executions(&platform).await, 1);
    platform.finish().await;
}

fn outcome(outcome: &str) -> String {
    format!("infra_idempotent_requests_total{{outcome=\"{outcome}\"}}")
}

/// The job id of the only claim.
async fn claimed_job(platform: &Platform) -> String {
    let claims = || async {
        let claims = platform.fleet().cloud.claim_items().await;
        match &claims[..] {
            [claim] => Ok(claim["requestId"]["S"].as_str().expect("a text").to_owned()),
            _ => Err(format!("{} claims", claims.len())),
        }
    };
    eventually("the claim", SOON, claims).await
}

/// Settings with this send deadline.
fn send_deadline(ms: u64) -> Conf {
    Conf { limits: format!("limit = []\n[batch]\nsend_deadline_ms = {ms}\n"), ..Conf::default() }
}

/// The first answer that is not 503: after errors of the queue new jobs are rejected for a while.
async fn until_admitted(run: &Request) -> Answer {
    eventually("an answer", 2 * SOON, || async {
        let answer = run.send().await;
        if answer.status == 503 { Err(answer.text()) } else { Ok(answer) }
    })
    .await
}

/// A claim does not prove that the queue has the job. A repeat waits for the outcome of the first send.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn repeats_of_an_unconfirmed_run_get_the_answer_of_the_first() {
    let platform = Setup::serve().policy(Policy::Fail(1)).conf(send_deadline(4000)).start().await;
    let other = platform.fleet().start_gateway().await;
    let proxy = platform.fleet().proxy.as_ref().expect("the policy has a proxy");
    let input = json!({ "token": "x" });
    proxy.inject(Faults { entries: 100, ..Faults::default() });
    let ask = |gateway: &Gateway, is_async: &str| {
        let run = keyed(gateway, "unconfirmed", &input).header("x-async", is_async);
        spawn(async move { run.send().await })
    };
    let first = ask(&platform.gateway, "true");
    let claimed = claimed_job(&platform).await;
    let mut clients = vec![first];
    for gateway in [&platform.gateway, &other] {
        clients.extend([ask(gateway, "true"), ask(gateway, "false")]);
    }
    for answer in join_all("5 refusals", SOON, clients).await {
        assert_eq!(answer.expect_problem(503).json()["code"], "queue_unavailable");
    }
    // The key is released, and the job is unknown.
    let status = platform.gateway.get(&format!("/status/{claimed}")).await;
    status.expect_problem(404);
    assert_eq!(platform.fleet().cloud.claims().await, 0);
    proxy.inject(Faults::default());
    let again = until_admitted(&keyed(&other, "unconfirmed", &input)).await.expect(200).json();
    assert_ne!(again["requestId"], *claimed);
    platform.fleet().cloud.wait_for_rows(HELLO, 1).await;
    for gateway in [&platform.gateway, &other] {
        let series = outcome("sent_again");
        assert_eq!(
            gateway.metric(&series).await.unwrap_or_default(),
            0.0,
            "the outcome of the first send was known"
        );
    }
    other.finish().await;
    platform.finish().await;
}

/// The key is released although its client disconnects and the node stops.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopping_node_leaves_no_unsent_job() {
    let platform = Setup::serve().policy(Policy::Fail(1)).conf(send_deadline(3000)).start().await;
    let proxy = platform.fleet().proxy.as_ref().expect("the policy has a proxy");
    proxy.inject(Faults { entries: 100, ..Faults::default() });
    for key in ["left-1", "left-2", "left-3"] {
        let leaving = platform.fleet().start_gateway().await;
        let attempts = || proxy.count("SendMessageBatch").passed;
        let before = attempts();
        let run = keyed(&leaving, key, &json!({ "token": "x" })).header("x-async", "true");
        let client = spawn(async move { run.try_send().await.is_ok() });
        // A job is journaled before it is sent.
        eventually("an attempt to send", SOON, || async {
            if attempts() > before { Ok(()) } else { Err("none".to_owned()) }
        })
        .await;
        client.abort();
        leaving.stop().await;
        assert_eq!(platform.fleet().cloud.claims().await, 0, "the key is released");
        let journals = platform.fleet().redis.command(&[b"KEYS", b"inflight:{*"]).await;
        assert_eq!(journals, Reply::Array(Vec::new()));
    }
    platform.finish().await;
}

/// The node dies after it has journaled the job. It is unknown whether the queue has the job.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unconfirmed_job_of_a_dead_node_is_resent_under_its_id() {
    let platform = Setup::serve().policy(Policy::Fail(1)).conf(send_deadline(10_000)).start().await;
    let proxy = platform.fleet().proxy.as_ref().expect("the policy has a proxy");
    for is_async in ["true", "false"] {
        let doomed = platform.fleet().start_gateway().await;
        proxy.inject(Faults { entries: 100, ..Faults::default() });
        let input = json!({ "token": is_async });
        let run = keyed(&doomed, is_async, &input);
        let client = spawn(async move { run.try_send().await.is_ok() });
        let id = journaled_job(&platform).await;
        doomed.kill();
        assert!(!client.await.expect("no panic"), "the connection broke");
        proxy.inject(Faults::default());
        let again = keyed(&platform.gateway, is_async, &input).header("x-async", is_async);
        let again = until_admitted(&again).await;
        if is_async == "true" {
            assert_eq!(again.expect(202).json(), json!({ "status": "ACCEPTED", "jobId": id }));
        } else {
            assert_eq!(again.expect(200).json()["requestId"], *id);
        }
        let result = platform.gateway.get(&format!("/status/{id}?wait=20")).await.expect(200).json();
        assert_eq!((&result["requestId"], &result["status"]), (&json!(id), &json!("SUCCESS")));
        platform.gateway.wait_until_idle().await;
    }
    assert_eq!(platform.gateway.metric(&outcome("sent_again")).await, Some(2.0));
    // Each has one row and counts once, although its node is gone.
    assert_eq!(executions(&platform).await, 2);
    platform.fleet().cloud.wait_for_invocations(HELLO, 2).await;
    platform.finish().await;
}

/// The node dies before the queue has confirmed the job, and no client repeats the request.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unconfirmed_job_is_reported_as_unconfirmed() {
    let limits = "limit = []\n[waits]\njob_deadline_s = 26\n[batch]\nsend_deadline_ms = 15000\n".into();
    let server = "[fleet]\nlease_s = 10\n".into();
    let conf = Conf { limits, server, ..Conf::default() };
    let platform = Setup::serve().policy(Policy::Fail(1)).conf(conf).start().await;
    let other = platform.fleet().start_gateway().await;
    let proxy = platform.fleet().proxy.as_ref().expect("the policy has a proxy");
    let doomed = platform.fleet().start_gateway().await;
    proxy.inject(Faults { entries: 100, ..Faults::default() });
    let input = json!({ "token": "x" });
    let run = keyed(&doomed, "unsure", &input).header("x-async", "true");
    let client = spawn(async move { run.try_send().await.is_ok() });
    let id = journaled_job(&platform).await;
    let path = format!("/status/{id}");
    // While its node is alive the outcome will be known.
    let answer = platform.gateway.get(&path).await.expect(200).json();
    assert_eq!((&answer["status"], answer.get("confirmed")), (&json!("pending"), None), "{answer}");
    doomed.kill();
    assert!(!client.await.expect("no panic"), "the connection broke");
    proxy.inject(Faults::default());
    // On both nodes, from the adoption to the deadline of the job, 15 s later.
    for gateway in [&platform.gateway, &other] {
        eventually("an unconfirmed job", SOON, || async {
            let answer = gateway.get(&path).await.json();
            if answer["confirmed"] == json!(false) { Ok(()) } else { Err(answer.to_string()) }
        })
        .await;
    }
    let rows = platform.fleet().cloud.wait_for_rows(HELLO, 1).await;
    assert_eq!(rows[0]["status"]["S"], "LOST");
    let message = rows[0]["message"]["S"].as_str().expect("a text");
    assert!(message.starts_with("unconfirmed: "), "{message}");
    // A repeat gets this result. An answer of 202 would mean that the queue has the job.
    for gateway in [&platform.gateway, &other] {
        for is_async in ["true", "false"] {
            let again = keyed(gateway, "unsure", &input).header("x-async", is_async).send().await.expect(200);
            assert_eq!(again.json()["status"], "LOST");
        }
    }
    assert_eq!(platform.fleet().cloud.log_rows(HELLO).await.len(), 1);
    other.finish().await;
    platform.finish().await;
}

/// The id of the only job in a journal.
async fn journaled_job(platform: &Platform) -> String {
    let find = || async {
        let text = |reply: &Reply| match reply {
            Reply::Bulk(text) => String::from_utf8(text.clone()).expect("text"),
            other => panic!("{other:?}"),
        };
        let redis = &platform.fleet().redis;
        let Reply::Array(keys) = redis.command(&[b"KEYS", b"inflight:{*"]).await else { panic!("an array") };
        let [key] = &keys[..] else { return Err(format!("{} journals", keys.len())) };
        let Reply::Array(ids) = redis.command(&[b"HKEYS", text(key).as_bytes()]).await else {
            panic!("an array")
        };
        match &ids[..] {
            [id] => Ok(text(id)),
            _ => Err(format!("{} jobs", ids.len())),
        }
    };
    eventually("a job in a journal", SOON, find).await
}

/// A send that has failed releases the key at once. A send without an answer does not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_send_releases_its_key() {
    let conf = Conf { limits: "[batch]\nsend_deadline_ms = 1000\n".into(), ..Conf::default() };
    let platform = Setup::serve().policy(Policy::Fail(1)).conf(conf).start().await;
    let proxy = platform.fleet().proxy.as_ref().expect("the policy has a proxy");
    let input = json!({ "token": "x" });
    proxy.inject(Faults { entries: 100, ..Faults::default() });
    keyed(&platform.gateway, "freed", &input).send().await.expect_problem(503);
    assert_eq!(platform.fleet().cloud.claims().await, 0);
    proxy.inject(Faults { lost_answers: 100, ..Faults::default() });
    // On a busy machine the send deadline may pass before the result arrives: then the answer is 504.
    let held = keyed(&platform.gateway, "held", &input);
    let result = eventually("the result", SOON, || async {
        let answer = held.send().await;
        if answer.status == 504 { Err(answer.text()) } else { Ok(answer.expect(200).text()) }
    })
    .await;
    proxy.inject(Faults::default());
    assert_eq!(held.send().await.expect(200).text(), result);
    keyed(&platform.gateway, "freed", &input).send().await.expect(200);
    assert_eq!(executions(&platform).await, 2);
    platform.finish().await;
}
