//! `Idempotency-Key`: a request that is repeated is carried out once, whatever broke off the first time.

use crate::harness::gateway::Conf;
use crate::harness::http::{Answer, Request};
use crate::harness::link::Link;
use crate::harness::platform::{Backend, HELLO};
use crate::harness::proxy::{Faults, Policy};
use crate::harness::redis::Reply;
use crate::harness::{Gateway, Platform, SOON, Setup, eventually, join_all, spawn};
use serde_json::{Value, json};
use std::collections::BTreeSet;

over_both!(
    a_repeated_run_is_the_same_job,
    one_of_many_at_once_is_carried_out,
    a_repeat_has_its_answer_when_the_function_is_gone
);

fn keyed(gateway: &Gateway, key: &str, input: &Value) -> Request {
    gateway.run(HELLO, input).header("idempotency-key", key)
}

/// How many jobs were carried out, as both backends say it.
async fn executions(platform: &Platform) -> u64 {
    platform.gateway.idle().await;
    let logs = platform.gateway.get(&format!("/functions/{HELLO}/logs?limit=100")).await.expect(200).json();
    logs.as_array().expect("an array").len() as u64
}

async fn a_repeated_run_is_the_same_job(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    let input = json!({ "token": "once" });
    let first = keyed(gateway, "k1", &input).send().await.expect(200);
    // As a string of structured fields it is the same key.
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

    // What is refused claims no key.
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

async fn one_of_many_at_once_is_carried_out(setup: Setup) {
    let is_serve = setup.backend == Backend::Serve;
    let platform = setup.start().await;
    // In a fleet the others come to another node.
    let other = if is_serve { Some(platform.fleet().start_gateway().await) } else { None };
    let clients = (0..20).map(|n| {
        let gateway = other.as_ref().filter(|_| n % 2 == 0).unwrap_or(&platform.gateway);
        let run = keyed(gateway, "all", &json!({ "behave": "sleep", "ms": 300, "token": "many" }));
        let run = if n % 4 == 0 { run.header("x-async", "true") } else { run };
        spawn(async move { run.send().await })
    });
    let answers = join_all("20 runs", SOON, clients.collect()).await;
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
    assert_eq!(executions(&platform).await, 1);
    platform.finish().await;
}

async fn a_repeat_has_its_answer_when_the_function_is_gone(setup: Setup) {
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

/// The result is kept with the key, longer than the worker's own copy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_result_outlives_the_workers_copy() {
    let platform = Setup::serve().start().await;
    let gateway = &platform.gateway;
    let first = keyed(gateway, "kept", &json!({ "token": "x" })).send().await.expect(200);
    let huge = json!({ "behave": "huge", "bytes": 500_000 });
    let huge_id = keyed(gateway, "huge", &huge).send().await.expect(200).json()["requestId"].clone();
    gateway.idle().await;
    platform.fleet().redis.command(&[b"FLUSHALL"]).await;
    // As its node tells the journal again, until that knows that the job has ended.
    let huge_id = huge_id.as_str().expect("an id");
    let entry = format!("HSET inflight:{{{}}} {huge_id} 4000000000000:{HELLO}", &huge_id[..8]);
    platform.fleet().redis.order(&entry).await;
    // Nor may it be in the memory of the node that settled it.
    let there = platform.fleet().start_gateway().await;
    let again = keyed(&there, "kept", &json!({ "token": "x" })).send().await.expect(200);
    assert_eq!(again.text(), first.text());
    // Of a result that is too large to be kept there is the row.
    let of_row = keyed(&there, "huge", &huge).send().await.expect(200).json();
    assert_eq!((&of_row["status"], &of_row["functionId"]), (&json!("SUCCESS"), &json!(HELLO)));
    assert_eq!(executions(&platform).await, 2);
    there.finish().await;
    platform.finish().await;
}

/// The node dies when the key is claimed and nothing is sent. When that can be known the job is past its deadline: it is
/// sent with a new one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_of_a_dead_node_is_taken_over() {
    let limits = "[waits]\njob_deadline_s = 7\n[batch]\nsend_deadline_ms = 3000\n".into();
    let conf = Conf { limits, ..Conf::default() };
    let platform = Setup::serve().conf(conf).start().await;
    let link = Link::to(&platform.fleet().redis).await;
    let doomed = platform.fleet().start_gateway_with(&[("REDIS_URL".into(), link.url())]).await;
    let input = json!({ "token": "x" });
    // It cannot journal the job, and so cannot send it.
    link.cut();
    let run = keyed(&doomed, "dead", &input);
    let client = spawn(async move { run.try_send().await.is_ok() });
    eventually("the claim", SOON, || async {
        if platform.fleet().cloud.claims().await == 1 { Ok(()) } else { Err("none".to_owned()) }
    })
    .await;
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

/// The job id of the one claim that there is.
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

/// Sends are tried for so long.
fn send_deadline(ms: u64) -> Conf {
    Conf { limits: format!("limit = []\n[batch]\nsend_deadline_ms = {ms}\n"), ..Conf::default() }
}

/// A claim and a place in flight are no proof that the queue has the job: who repeats it waits with the first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_repeats_an_unconfirmed_run_is_answered_as_the_first() {
    let platform = Setup::serve().policy(Policy::Fail(1)).conf(send_deadline(4000)).start().await;
    let other = platform.fleet().start_gateway().await;
    let proxy = platform.fleet().proxy.as_ref().expect("asked for");
    let input = json!({ "token": "x" });
    proxy.fail(Faults { entries: 100, ..Faults::default() });
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
    // The job is released: nothing is left of it, and the key is free.
    let status = platform.gateway.get(&format!("/status/{claimed}")).await;
    status.expect_problem(404);
    assert_eq!(platform.fleet().cloud.claims().await, 0);
    proxy.fail(Faults::default());
    let again = keyed(&other, "unconfirmed", &input).send().await.expect(200).json();
    assert_ne!(again["requestId"], *claimed);
    platform.fleet().cloud.wait_for_rows(HELLO, 1).await;
    for gateway in [&platform.gateway, &other] {
        let series = outcome("sent_again");
        assert_eq!(gateway.metric(&series).await.unwrap_or_default(), 0.0, "its outcome was known");
    }
    other.finish().await;
    platform.finish().await;
}

/// A client that has left does not end the book-keeping of its key, and nor does the end of the node.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_stops_leaves_no_job_that_was_not_sent() {
    let platform = Setup::serve().policy(Policy::Fail(1)).conf(send_deadline(2000)).start().await;
    let proxy = platform.fleet().proxy.as_ref().expect("asked for");
    proxy.fail(Faults { entries: 100, ..Faults::default() });
    for key in ["left-1", "left-2", "left-3"] {
        let leaving = platform.fleet().start_gateway().await;
        let run = keyed(&leaving, key, &json!({ "token": "x" })).header("x-async", "true");
        let client = spawn(async move { run.try_send().await.is_ok() });
        journaled_job(&platform).await;
        client.abort();
        leaving.stop().await;
        assert_eq!(platform.fleet().cloud.claims().await, 0, "the key is free");
        let journals = platform.fleet().redis.command(&[b"KEYS", b"inflight:{*"]).await;
        assert_eq!(journals, Reply::Array(Vec::new()));
    }
    platform.finish().await;
}

/// The node dies when its job is in the journal, and nobody knows whether the queue has it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unconfirmed_job_of_a_dead_node_is_sent_again_under_its_id() {
    let platform = Setup::serve().policy(Policy::Fail(1)).conf(send_deadline(6000)).start().await;
    let proxy = platform.fleet().proxy.as_ref().expect("asked for");
    for is_async in ["true", "false"] {
        let doomed = platform.fleet().start_gateway().await;
        proxy.fail(Faults { entries: 100, ..Faults::default() });
        let input = json!({ "token": is_async });
        let run = keyed(&doomed, is_async, &input);
        let client = spawn(async move { run.try_send().await.is_ok() });
        let id = journaled_job(&platform).await;
        doomed.kill();
        assert!(!client.await.expect("no panic"), "the connection broke");
        proxy.fail(Faults::default());
        // The queue was slow, so new jobs may be refused for a while.
        let again = eventually("an answer", SOON, || async {
            let again = keyed(&platform.gateway, is_async, &input).header("x-async", is_async).send().await;
            if again.status == 503 { Err(again.text()) } else { Ok(again) }
        });
        let again = again.await;
        if is_async == "true" {
            assert_eq!(again.expect(202).json(), json!({ "status": "ACCEPTED", "jobId": id }));
        } else {
            assert_eq!(again.expect(200).json()["requestId"], *id);
        }
        let result = platform.gateway.get(&format!("/status/{id}?wait=20")).await.expect(200).json();
        assert_eq!((&result["requestId"], &result["status"]), (&json!(id), &json!("SUCCESS")));
        platform.gateway.idle().await;
    }
    assert_eq!(platform.gateway.metric(&outcome("sent_again")).await, Some(2.0));
    // One row and one count each, though they name a node that is gone.
    assert_eq!(executions(&platform).await, 2);
    let counted = || async {
        let item = platform.fleet().cloud.function_item(HELLO).await;
        let invocations = item["invocations"]["N"].as_str().unwrap_or("0").to_owned();
        if invocations == "2" { Ok(()) } else { Err(invocations) }
    };
    eventually("both are counted", SOON, counted).await;
    platform.finish().await;
}

/// A job without a key whose node died before the queue confirmed it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unconfirmed_job_is_said_to_be_that() {
    let limits = "limit = []\n[waits]\njob_deadline_s = 16\n[batch]\nsend_deadline_ms = 8000\n".into();
    let server = "[fleet]\nlease_s = 2\n".into();
    let conf = Conf { limits, server, ..Conf::default() };
    let platform = Setup::serve().policy(Policy::Fail(1)).conf(conf).start().await;
    let other = platform.fleet().start_gateway().await;
    let proxy = platform.fleet().proxy.as_ref().expect("asked for");
    let doomed = platform.fleet().start_gateway().await;
    proxy.fail(Faults { entries: 100, ..Faults::default() });
    let input = json!({ "token": "x" });
    let run = keyed(&doomed, "unsure", &input).header("x-async", "true");
    let client = spawn(async move { run.try_send().await.is_ok() });
    let id = journaled_job(&platform).await;
    let path = format!("/status/{id}");
    // Its own process is to say what becomes of it.
    let said = platform.gateway.get(&path).await.expect(200).json();
    assert_eq!((&said["status"], said.get("confirmed")), (&json!("pending"), None), "{said}");
    doomed.kill();
    assert!(!client.await.expect("no panic"), "the connection broke");
    proxy.fail(Faults::default());
    // Whoever has adopted it, and whoever has not.
    for gateway in [&platform.gateway, &other] {
        eventually("an unconfirmed job", SOON, || async {
            let said = gateway.get(&path).await.json();
            if said["confirmed"] == json!(false) { Ok(()) } else { Err(said.to_string()) }
        })
        .await;
    }
    let rows = platform.fleet().cloud.wait_for_rows(HELLO, 1).await;
    assert_eq!(rows[0]["status"]["S"], "LOST");
    let message = rows[0]["message"]["S"].as_str().expect("a text");
    assert!(message.starts_with("unconfirmed: "), "{message}");
    // Who repeats it hears that. An answer of 202 would say that the queue has it.
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

/// The id of the one job that is in a journal.
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

/// A send that has definitely failed frees the key at once; one that is not answered does not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_send_frees_its_key() {
    let conf = Conf { limits: "[batch]\nsend_deadline_ms = 1000\n".into(), ..Conf::default() };
    let platform = Setup::serve().policy(Policy::Fail(1)).conf(conf).start().await;
    let proxy = platform.fleet().proxy.as_ref().expect("asked for");
    let input = json!({ "token": "x" });
    proxy.fail(Faults { entries: 100, ..Faults::default() });
    keyed(&platform.gateway, "freed", &input).send().await.expect_problem(503);
    assert_eq!(platform.fleet().cloud.claims().await, 0);
    proxy.fail(Faults { answers: 100, ..Faults::default() });
    let held = keyed(&platform.gateway, "held", &input).send().await.expect(200).text();
    proxy.fail(Faults::default());
    assert_eq!(keyed(&platform.gateway, "held", &input).send().await.expect(200).text(), held);
    keyed(&platform.gateway, "freed", &input).send().await.expect(200);
    assert_eq!(executions(&platform).await, 2);
    platform.finish().await;
}
