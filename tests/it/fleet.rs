//! What the nodes of a fleet tell each other of functions, and how seldom they read them.

use crate::harness::platform::HELLO;
use crate::harness::proxy::Policy;
use crate::harness::{Gateway, SOON, Setup, eventually, join_all, spawn};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// By then a change is in force on every node.
const IN_FORCE: Duration = Duration::from_secs(1);

async fn admit(gateway: &Gateway, function: &str) -> u16 {
    gateway.run(function, &json!(1)).header("x-async", "true").send().await.status
}

/// The memory that a run admitted now is queued with. For a queue without a worker.
async fn queued_memory(gateway: &Gateway, cloud: &crate::harness::aws::Cloud) -> u64 {
    assert_eq!(admit(gateway, HELLO).await, 202);
    let (_, body) = cloud.receive().await;
    let message: Value = serde_json::from_str(&body).expect("a message in JSON");
    message["memoryMb"].as_u64().expect("a number")
}

async fn in_force(gateway: &Gateway, cloud: &crate::harness::aws::Cloud, memory_mb: u64) {
    eventually("the new size", IN_FORCE, || async {
        let queued = queued_memory(gateway, cloud).await;
        if queued == memory_mb { Ok(()) } else { Err(format!("queued with {queued} MB")) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_is_in_force_on_every_node_within_a_second() {
    let mut platform = Setup::serve().no_worker().policy(Policy::PassAndCount).start().await;
    let there = platform.fleet().start_gateway().await;
    let heard = "infra_function_changes_heard";
    there.wait_for_metric(heard, 1.0).await;
    let cloud = &platform.fleet().cloud;
    assert_eq!(queued_memory(&there, cloud).await, 256);

    // Past the short age: what follows is not found because the node would have looked anyway.
    let reads = || platform.fleet().proxy.as_ref().expect("a proxy").count("GetItem").passed;
    let (before, until) = (reads(), Instant::now() + Duration::from_millis(1500));
    while Instant::now() < until {
        assert_eq!(queued_memory(&there, cloud).await, 256);
    }
    assert_eq!(reads(), before, "a known function is not read again while changes are heard");

    let resize =
        |mb: u64| platform.gateway.request("PUT", "/functions/hello").json(&json!({ "memoryMb": mb }));
    resize(512).send().await.expect(200);
    in_force(&there, cloud, 512).await;

    // Redis goes and comes back empty: what happened meanwhile was not heard.
    platform.fleet_mut().redis.kill();
    let resize =
        |mb: u64| platform.gateway.request("PUT", "/functions/hello").json(&json!({ "memoryMb": mb }));
    resize(768).send().await.expect(200);
    there.wait_for_metric(heard, 0.0).await;
    platform.fleet_mut().redis.restart();
    there.wait_for_metric(heard, 1.0).await;
    let cloud = &platform.fleet().cloud;
    eventually("runs again", SOON, || async {
        match admit(&there, HELLO).await {
            202 => Ok(()),
            status => Err(status.to_string()),
        }
    })
    .await;
    let (_, body) = cloud.receive().await;
    assert!(body.contains("\"memoryMb\":768"), "{body}");

    platform.gateway.request("DELETE", "/functions/hello").send().await.expect(200);
    eventually("404", IN_FORCE, || async {
        match admit(&there, HELLO).await {
            404 => Ok(()),
            status => Err(status.to_string()),
        }
    })
    .await;
    there.stop().await;
    platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stampede_for_a_cold_function_reads_it_once() {
    let platform = Setup::serve().policy(Policy::PassAndCount).start().await;
    platform.fleet().cloud.put_function("cold").await;
    let reads = || platform.fleet().proxy.as_ref().expect("a proxy").count("GetItem").passed;
    let before = reads();
    let clients = (0..1000).map(|_| {
        let run = platform.gateway.run("cold", &json!(1)).header("x-async", "true");
        spawn(async move { run.send().await.status })
    });
    let statuses = join_all("1,000 runs", Duration::from_secs(120), clients.collect()).await;
    assert!(statuses.iter().all(|status| *status == 202), "{:?}", statuses.iter().find(|s| **s != 202));
    assert_eq!(reads(), before + 1);
    platform.stop().await;
}
