//! Changes of functions between nodes, and how rarely nodes read functions.

use crate::harness::aws::Cloud;
use crate::harness::aws_proxy::Policy;
use crate::harness::gateway::Conf;
use crate::harness::http::Conn;
use crate::harness::platform::HELLO;
use crate::harness::process::is_connected;
use crate::harness::redis::Redis;
use crate::harness::redis_proxy::RedisProxy;
use crate::harness::upload::{Part, form, printing};
use crate::harness::{Gateway, Platform, SOON, Setup, eventually, join_all, spawn};
use serde_json::{Value, json};
use std::cell::Cell;
use std::time::Duration;

/// 1 while a node receives the changes of the others.
const HEARD: &str = "infra_function_changes_heard";

/// A cached function is valid for an hour while the node receives changes, and for 1 ms while it does not. So
/// a change that takes effect within [`SOON`] was announced.
const CACHE: &str = "limit = []\n[cache]\nfunction_backstop_s = 3600\nfunction_ttl_ms = 1\n";

/// The status of an asynchronous run.
async fn admit(gateway: &Gateway, function: &str) -> u16 {
    gateway.run(function, &json!(1)).header("x-async", "true").send().await.status
}

/// Starts a run, and receives its message from the queue. For a platform without a worker.
async fn queued(gateway: &Gateway, cloud: &Cloud, function: &str) -> Value {
    assert_eq!(admit(gateway, function).await, 202);
    let (_, body) = cloud.receive().await;
    serde_json::from_str(&body).expect("a message in JSON")
}

async fn queued_memory(gateway: &Gateway, cloud: &Cloud) -> u64 {
    queued(gateway, cloud, HELLO).await["memoryMb"].as_u64().expect("a number")
}

async fn wait_for_memory(gateway: &Gateway, cloud: &Cloud, memory_mb: u64) {
    eventually("the new size", SOON, || async {
        let queued = queued_memory(gateway, cloud).await;
        if queued == memory_mb { Ok(()) } else { Err(format!("queued with {queued} MB")) }
    })
    .await;
}

async fn wait_for_404(gateway: &Gateway, function: &str) {
    eventually("404", SOON, || async {
        match admit(gateway, function).await {
            404 => Ok(()),
            status => Err(status.to_string()),
        }
    })
    .await;
}

/// Repeats `look` until all subscriptions persist meanwhile. A node on a busy machine may lose a
/// subscription, and then reads functions again.
async fn while_subscribed<T>(redis: &Redis, look: impl AsyncFn() -> T) -> T {
    eventually("subscriptions that persist", 3 * SOON, || async {
        let before = redis.subscribers().await;
        let seen = look().await;
        if redis.subscribers().await == before {
            Ok(seen)
        } else {
            Err("a node has subscribed again".to_owned())
        }
    })
    .await
}

fn start() -> Setup {
    Setup::serve().no_worker().conf(Conf { limits: CACHE.into(), ..Conf::default() })
}

/// Starts one more node, which is connected to Redis through a proxy.
async fn start_behind_proxy(platform: &Platform) -> (Gateway, RedisProxy) {
    let redis_proxy = RedisProxy::to(&platform.fleet().redis).await;
    let gateway = platform.fleet().start_gateway_with(&[("REDIS_URL".into(), redis_proxy.url())]).await;
    gateway.wait_for_metric(HEARD, 1.0).await;
    (gateway, redis_proxy)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_is_announced_to_every_node() {
    let mut platform = start().policy(Policy::PassAndCount).start().await;
    let there = platform.fleet().start_gateway().await;
    there.wait_for_metric(HEARD, 1.0).await;
    let cloud = &platform.fleet().cloud;
    assert_eq!(queued_memory(&there, cloud).await, 256);

    // The node does not read the function again without a change.
    let reads = || platform.fleet().proxy.as_ref().expect("the policy has a proxy").count("GetItem").passed;
    let again = while_subscribed(&platform.fleet().redis, async || {
        let before = reads();
        for _ in 0..10 {
            assert_eq!(queued_memory(&there, cloud).await, 256);
        }
        reads() - before
    });
    assert_eq!(again.await, 0, "a cached function is read again while changes are received");

    let resize =
        |mb: u64| platform.gateway.request("PUT", "/functions/hello").json(&json!({ "memoryMb": mb }));
    resize(512).send().await.expect(200);
    wait_for_memory(&there, cloud, 512).await;

    // Redis restarts without data. Changes during the outage were not received.
    platform.fleet_mut().redis.kill();
    let resize =
        |mb: u64| platform.gateway.request("PUT", "/functions/hello").json(&json!({ "memoryMb": mb }));
    resize(768).send().await.expect(200);
    there.wait_for_metric(HEARD, 0.0).await;
    platform.fleet_mut().redis.restart().await;
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
    wait_for_404(&there, HELLO).await;
    there.stop().await;
    platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_runs_of_an_uncached_function_read_it_once() {
    let platform = start().policy(Policy::PassAndCount).start().await;
    platform.gateway.wait_for_metric(HEARD, 1.0).await;
    let reads = || platform.fleet().proxy.as_ref().expect("the policy has a proxy").count("GetItem").passed;
    let attempt = Cell::new(0);
    let reads_of_runs = while_subscribed(&platform.fleet().redis, async || {
        let function = format!("cold-{}", attempt.replace(attempt.get() + 1));
        platform.fleet().cloud.put_function(&function).await;
        let before = reads();
        let clients = (0..200).map(|_| {
            let run = platform.gateway.run(&function, &json!(1)).header("x-async", "true");
            spawn(async move { run.send().await.expect(202) })
        });
        join_all("200 runs", Duration::from_secs(300), clients.collect()).await;
        reads() - before
    });
    assert_eq!(reads_of_runs.await, 1);
    platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_code_is_used_on_every_node() {
    let platform = start().start().await;
    let here = &platform.gateway;
    let there = platform.fleet().start_gateway().await;
    there.wait_for_metric(HEARD, 1.0).await;
    let cloud = &platform.fleet().cloud;

    let id = here.upload("first-code").await;
    let first = queued(&there, cloud, &id).await["s3Key"].clone();
    let parts = [Part::File("code.zip", &printing("second-code"))];
    form(here.request("PUT", &format!("/functions/{id}")), &parts).send().await.expect(200);
    eventually("the new code", SOON, || async {
        let key = queued(&there, cloud, &id).await["s3Key"].clone();
        if key == first { Err(key.to_string()) } else { Ok(()) }
    })
    .await;
    there.stop().await;
    platform.stop().await;
}

/// The client of a DELETE disconnects before the table has answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_is_completed_after_its_client_disconnects() {
    const WRITE: &str = "TransactWriteItems";
    let platform = Setup::serve().no_worker().policy(Policy::Hold(WRITE)).start().await;
    let there = platform.fleet().start_gateway().await;
    there.wait_for_metric(HEARD, 1.0).await;
    assert_eq!(admit(&there, HELLO).await, 202);
    let proxy = platform.fleet().proxy.as_ref().expect("the policy has a proxy");

    let mut client = Conn::open(platform.gateway.addr()).await.expect("the gateway accepts connections");
    let delete = platform.gateway.request("DELETE", "/functions/hello").to_bytes();
    client.write(&delete).await.expect("the gateway reads");
    eventually("the write is held", SOON, || async {
        if proxy.count(WRITE).held > 0 { Ok(()) } else { Err("not yet".to_owned()) }
    })
    .await;
    let ports = (platform.gateway.addr().port(), client.port());
    drop(client);
    eventually("the end of the connection", SOON, || async {
        if is_connected(ports.0, ports.1) { Err("it is established".to_owned()) } else { Ok(()) }
    })
    .await;
    // By the next answer the gateway has polled that connection.
    platform.gateway.anonymous("GET", "/livez").send().await.expect(200);
    proxy.release();
    wait_for_404(&there, HELLO).await;
    wait_for_404(&platform.gateway, HELLO).await;
    there.stop().await;
    platform.stop().await;
}

/// The other nodes receive changes, and would use their cached function for an hour.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_announces_its_changes_when_redis_is_back() {
    let platform = start().start().await;
    let (isolated, redis_proxy) = start_behind_proxy(&platform).await;
    let (there, cloud) = (&platform.gateway, &platform.fleet().cloud);
    there.wait_for_metric(HEARD, 1.0).await;
    assert_eq!(queued_memory(there, cloud).await, 256);

    redis_proxy.cut();
    let redis = &platform.fleet().redis;
    let subscribers = eventually("the subscriptions of one node", SOON, || async {
        let subscribers = redis.subscribers().await;
        if subscribers.len() == 2 { Ok(subscribers) } else { Err(format!("{subscribers:?}")) }
    })
    .await;
    let resize = isolated.request("PUT", "/functions/hello").json(&json!({ "memoryMb": 512 }));
    resize.send().await.expect(200);
    let queued = queued_memory(there, cloud).await;
    // Unless the other node has subscribed again, which makes it read again.
    if redis.subscribers().await == subscribers {
        assert_eq!(queued, 256, "the change is not announced yet");
    }
    redis_proxy.restore();
    wait_for_memory(there, cloud, 512).await;
    isolated.stop().await;
    platform.stop().await;
}

/// A network that loses all packets does not end connections.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_receives_no_changes_reads_functions_again() {
    // A run that is admitted from the cache fails soon, because the node cannot write its journal.
    let limits = "[batch]\nsend_deadline_ms = 5000\n".into();
    let conf = Conf { limits, ..Conf::default() };
    let platform = Setup::serve().no_worker().conf(conf).start().await;
    let (isolated, redis_proxy) = start_behind_proxy(&platform).await;
    assert_eq!(admit(&isolated, HELLO).await, 202);
    redis_proxy.black_hole();
    platform.gateway.request("DELETE", "/functions/hello").send().await.expect(200);
    wait_for_404(&isolated, HELLO).await;
    assert_eq!(isolated.metric(HEARD).await, Some(0.0));
    redis_proxy.restore();
    isolated.wait_for_metric(HEARD, 1.0).await;
    isolated.stop().await;
    platform.stop().await;
}

/// A change made by the old controller, or in the AWS console.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unannounced_change_is_found_after_the_backstop() {
    let conf = Conf { limits: "[cache]\nfunction_backstop_s = 2\n".into(), ..Conf::default() };
    let platform = Setup::serve().no_worker().conf(conf).start().await;
    let (gateway, cloud) = (&platform.gateway, &platform.fleet().cloud);
    gateway.wait_for_metric(HEARD, 1.0).await;
    assert_eq!(queued_memory(gateway, cloud).await, 256);
    let mut item = cloud.function_item(HELLO).await;
    item["memoryMb"] = json!({ "N": "512" });
    cloud.put_item(&cloud.functions_table, item).await;
    wait_for_memory(gateway, cloud, 512).await;
    platform.stop().await;
}
