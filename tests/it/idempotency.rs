//! `Idempotency-Key`: a request that is repeated is carried out once, whatever broke off the first time.

use crate::harness::gateway::Conf;
use crate::harness::http::{Answer, Request};
use crate::harness::link::Link;
use crate::harness::platform::{Backend, HELLO};
use crate::harness::proxy::{Faults, Policy};
use crate::harness::{Gateway, Platform, SOON, Setup, eventually, join_all, spawn};
use serde_json::{Value, json};
use std::collections::BTreeSet;

over_both!(a_repeated_run_is_the_same_job, one_of_many_at_once_is_carried_out);

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

/// The result is kept with the key, longer than the worker's own copy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_result_outlives_the_workers_copy() {
    let platform = Setup::serve().start().await;
    let gateway = &platform.gateway;
    let first = keyed(gateway, "kept", &json!({ "token": "x" })).send().await.expect(200);
    let huge = json!({ "behave": "huge", "bytes": 500_000 });
    keyed(gateway, "huge", &huge).send().await.expect(200);
    gateway.idle().await;
    platform.fleet().redis.command(&[b"FLUSHALL"]).await;
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

/// The node dies when the key is claimed and nothing is sent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_of_a_dead_node_is_taken_over() {
    let conf = Conf { limits: "[batch]\nsend_deadline_ms = 3000\n".into(), ..Conf::default() };
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
    doomed.kill();
    assert!(!client.await.expect("no panic"), "the connection broke");
    let again = keyed(&platform.gateway, "dead", &input).send().await.expect(200).json();
    assert!(again["stdout"].as_str().is_some_and(|printed| printed.contains('x')), "{again}");
    let series = r#"infra_idempotent_requests_total{outcome="taken_over"}"#;
    assert_eq!(platform.gateway.metric(series).await, Some(1.0));
    assert_eq!(executions(&platform).await, 1);
    platform.finish().await;
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
