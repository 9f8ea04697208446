//! What the nodes of a fleet tell each other of functions, and how seldom they read them.

use crate::harness::aws::Cloud;
use crate::harness::gateway::Conf;
use crate::harness::link::Link;
use crate::harness::platform::HELLO;
use crate::harness::proxy::Policy;
use crate::harness::upload::{Part, form, printing};
use crate::harness::{Gateway, Platform, SOON, Setup, eventually, join_all, spawn};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// 1 while a node hears of the changes of the others.
const HEARD: &str = "infra_function_changes_heard";

/// By then a change is in force on every node.
const IN_FORCE: Duration = Duration::from_secs(1);

async fn admit(gateway: &Gateway, function: &str) -> u16 {
    gateway.run(function, &json!(1)).header("x-async", "true").send().await.status
}

/// What a run admitted now is queued with. For a queue without a worker.
async fn queued(gateway: &Gateway, cloud: &Cloud, function: &str) -> Value {
    assert_eq!(admit(gateway, function).await, 202);
    let (_, body) = cloud.receive().await;
    serde_json::from_str(&body).expect("a message in JSON")
}

async fn queued_memory(gateway: &Gateway, cloud: &Cloud) -> u64 {
    queued(gateway, cloud, HELLO).await["memoryMb"].as_u64().expect("a number")
}

async fn in_force(gateway: &Gateway, cloud: &Cloud, memory_mb: u64, deadline: Duration) {
    eventually("the new size", deadline, || async {
        let queued = queued_memory(gateway, cloud).await;
        if queued == memory_mb { Ok(()) } else { Err(format!("queued with {queued} MB")) }
    })
    .await;
}

async fn unknown(gateway: &Gateway, function: &str, deadline: Duration) {
    eventually("404", deadline, || async {
        match admit(gateway, function).await {
            404 => Ok(()),
            status => Err(status.to_string()),
        }
    })
    .await;
}

/// One more node, which has its own line to Redis.
async fn start_behind_link(platform: &Platform) -> (Gateway, Link) {
    let link = Link::to(&platform.fleet().redis).await;
    let gateway = platform.fleet().start_gateway_with(&[("REDIS_URL".into(), link.url())]).await;
    gateway.wait_for_metric(HEARD, 1.0).await;
    (gateway, link)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_is_in_force_on_every_node_within_a_second() {
    let mut platform = Setup::serve().no_worker().policy(Policy::PassAndCount).start().await;
    let there = platform.fleet().start_gateway().await;
    there.wait_for_metric(HEARD, 1.0).await;
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
    in_force(&there, cloud, 512, IN_FORCE).await;

    // Redis goes and comes back empty: what happened meanwhile was not heard.
    platform.fleet_mut().redis.kill();
    let resize =
        |mb: u64| platform.gateway.request("PUT", "/functions/hello").json(&json!({ "memoryMb": mb }));
    resize(768).send().await.expect(200);
    there.wait_for_metric(HEARD, 0.0).await;
    platform.fleet_mut().redis.restart();
    there.wait_for_metric(HEARD, 1.0).await;
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
    unknown(&there, HELLO, IN_FORCE).await;
    there.stop().await;
    platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stampede_for_a_cold_function_reads_it_once() {
    let platform = Setup::serve().no_worker().policy(Policy::PassAndCount).start().await;
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_code_and_new_functions_are_in_force_on_every_node() {
    let platform = Setup::serve().no_worker().start().await;
    let here = &platform.gateway;
    let there = platform.fleet().start_gateway().await;
    there.wait_for_metric(HEARD, 1.0).await;
    let cloud = &platform.fleet().cloud;

    let id = here.upload("first-code").await;
    let first = queued(&there, cloud, &id).await["s3Key"].clone();
    let parts = [Part::File("code.zip", &printing("second-code"))];
    form(here.request("PUT", &format!("/functions/{id}")), &parts).send().await.expect(200);
    eventually("the new code", IN_FORCE, || async {
        let key = queued(&there, cloud, &id).await["s3Key"].clone();
        if key == first { Err(key.to_string()) } else { Ok(()) }
    })
    .await;
    there.stop().await;
    platform.stop().await;
}

/// The client of a DELETE leaves while the table takes its time to answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_whose_client_left_is_in_force_as_well() {
    const WRITE: &str = "TransactWriteItems";
    let platform = Setup::serve().no_worker().policy(Policy::Hold(WRITE)).start().await;
    let there = platform.fleet().start_gateway().await;
    there.wait_for_metric(HEARD, 1.0).await;
    assert_eq!(admit(&there, HELLO).await, 202);
    let proxy = platform.fleet().proxy.as_ref().expect("asked for");

    let delete = platform.gateway.request("DELETE", "/functions/hello");
    let client = spawn(async move { delete.send().await.status });
    eventually("the write is held", SOON, || async {
        if proxy.count(WRITE).held > 0 { Ok(()) } else { Err("not yet".to_owned()) }
    })
    .await;
    client.abort();
    // By then the node has heard that the client is gone.
    for _ in 0..20 {
        platform.gateway.anonymous("GET", "/livez").send().await.expect(200);
    }
    proxy.release();
    unknown(&there, HELLO, SOON).await;
    unknown(&platform.gateway, HELLO, SOON).await;
    there.stop().await;
    platform.stop().await;
}

/// The others hear each other, and would use what they know for minutes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_without_redis_announces_its_changes_later() {
    let platform = Setup::serve().no_worker().start().await;
    let (lonely, link) = start_behind_link(&platform).await;
    let (there, cloud) = (&platform.gateway, &platform.fleet().cloud);
    there.wait_for_metric(HEARD, 1.0).await;
    assert_eq!(queued_memory(there, cloud).await, 256);

    link.cut();
    let resize = lonely.request("PUT", "/functions/hello").json(&json!({ "memoryMb": 512 }));
    resize.send().await.expect(200);
    assert_eq!(queued_memory(there, cloud).await, 256, "nobody could tell it");
    link.restore();
    in_force(there, cloud, 512, SOON).await;
    lonely.stop().await;
    platform.stop().await;
}

/// A network that loses everything ends no connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_hears_nothing_looks_by_itself() {
    let platform = Setup::serve().no_worker().start().await;
    let (lonely, link) = start_behind_link(&platform).await;
    assert_eq!(admit(&lonely, HELLO).await, 202);
    link.silence();
    platform.gateway.request("DELETE", "/functions/hello").send().await.expect(200);
    unknown(&lonely, HELLO, SOON).await;
    assert_eq!(lonely.metric(HEARD).await, Some(0.0));
    link.restore();
    lonely.wait_for_metric(HEARD, 1.0).await;
    lonely.stop().await;
    platform.stop().await;
}

/// As the old controller changes functions, or a hand in the console.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_that_nobody_announces_is_found_by_the_backstop() {
    let conf = Conf { limits: "[cache]\nfunction_backstop_s = 2\n".into(), ..Conf::default() };
    let platform = Setup::serve().no_worker().conf(conf).start().await;
    let (gateway, cloud) = (&platform.gateway, &platform.fleet().cloud);
    gateway.wait_for_metric(HEARD, 1.0).await;
    assert_eq!(queued_memory(gateway, cloud).await, 256);
    let mut item = cloud.function_item(HELLO).await;
    item["memoryMb"] = json!({ "N": "512" });
    cloud.put_item(&cloud.functions_table, item).await;
    in_force(gateway, cloud, 512, SOON).await;
    platform.stop().await;
}
