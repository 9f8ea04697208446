//! Fail-over of Redis. Afterwards commands and subscriptions of a node may be connected to different servers.
//! Both must follow the new primary.

use crate::harness::platform::HELLO;
use crate::harness::process::Scratch;
use crate::harness::redis::{Redis, Reply};
use crate::harness::redis_proxy::RedisProxy;
use crate::harness::{Gateway, Platform, SOON, Setup, eventually, spawn, within};
use serde_json::{Value, json};

const CHANGES: &str = "infra_function_changes_total";

fn missed(subscription: &str) -> String {
    format!("infra_subscription_beats_missed_total{{subscription=\"{subscription}\"}}")
}

/// Two servers, and a node that is connected through a proxy.
struct Fixture {
    platform: Platform,
    new: Redis,
    redis_proxy: RedisProxy,
    gateway: Gateway,
}

impl Fixture {
    async fn start() -> Self {
        let platform = Setup::serve().no_worker().start().await;
        let new = Redis::start(None).await;
        let redis_proxy = RedisProxy::to(&platform.fleet().redis).await;
        let gateway = platform.fleet().start_gateway_with(&[("REDIS_URL".into(), redis_proxy.url())]).await;
        gateway.wait_for_metric("infra_function_changes_heard", 1.0).await;
        Self { platform, new, redis_proxy, gateway }
    }

    fn old(&self) -> &Redis {
        &self.platform.fleet().redis
    }

    /// Replicates the data to the new primary, and redirects new connections to it.
    async fn fail_over(&self) {
        self.new.follow(self.old()).await;
        self.new.order("REPLICAOF NO ONE").await;
        self.redis_proxy.redirect_to(&self.new);
    }

    async fn wait_for_reconnects(&self) {
        for subscription in ["results", "changes"] {
            self.gateway.wait_for_metric_at_least(&missed(subscription), 1.0).await;
        }
        self.gateway.wait_for_output("Beats missed").await;
    }

    /// Asserts that a result is delivered that is published on the new server, and not stored.
    async fn assert_a_run_is_answered(&self) {
        let run = self.gateway.run(HELLO, &json!("after"));
        let client = spawn(async move { run.send().await });
        let (_, message) = self.platform.fleet().cloud.receive().await;
        let message: Value = serde_json::from_str(&message).expect("JSON");
        let id = message["requestId"].as_str().expect("an id").to_owned();
        let result = format!(r#"{{"requestId":"{id}","status":"SUCCESS","stdout":"new"}}"#);
        self.new.publish_until_received(&format!("result:{id}"), result.as_bytes()).await;
        let answer = within("the client's answer", SOON, client).await.expect("no panic").expect(200);
        assert_eq!(answer.text(), result);
    }

    async fn stop(self) {
        self.gateway.stop().await;
        self.platform.stop().await;
    }
}

/// The old primary stays up and answers PINGs. Only the command connection has moved to the new one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn subscriptions_follow_the_commands_to_the_new_primary() {
    let fixture = Fixture::start().await;
    let gateway = &fixture.gateway;
    // A client waits for a job of the other node.
    let foreign = fixture.platform.gateway.run_async(HELLO, &json!(1)).await;
    fixture.platform.fleet().cloud.receive().await;
    let wait = gateway.request("GET", &format!("/status/{foreign}?wait=60"));
    let client = spawn(async move { wait.send().await });
    eventually("the channel of that job", SOON, || async {
        let reply = fixture.old().order(&format!("PUBSUB NUMSUB result:{foreign}")).await;
        let Reply::Array(counts) = reply else { panic!("{reply:?}") };
        if counts[1] == Reply::Integer(1) { Ok(()) } else { Err(format!("{counts:?}")) }
    })
    .await;

    fixture.fail_over().await;
    fixture.old().order("CLIENT KILL TYPE normal").await;
    // Lasts from the missed beat to the second beat on the new primary: two seconds by the timer of the node.
    let is_lost = |_, health: &Value| {
        health["checks"]["resultsSubscription"]["status"] == "ERROR" && health["status"] == "DEGRADED"
    };
    gateway.wait_for_health("a subscription is lost", is_lost).await;
    fixture.wait_for_reconnects().await;

    fixture.assert_a_run_is_answered().await;
    let result = format!(r#"{{"requestId":"{foreign}","status":"SUCCESS","stdout":"foreign"}}"#);
    fixture.new.publish_until_received(&format!("result:{foreign}"), result.as_bytes()).await;
    let answer = within("the answer of the long poll", SOON, client).await.expect("no panic").expect(200);
    assert_eq!(answer.text(), result);
    let table = &fixture.platform.fleet().cloud.functions_table;
    let before = gateway.metric(CHANGES).await.expect("a number");
    fixture.new.publish_until_received(&format!("functions:changed:{table}"), HELLO.as_bytes()).await;
    gateway.wait_for_metric(CHANGES, before + 1.0).await;
    let is_well = |_, health: &Value| {
        let is_on = |name| health["checks"][name] == json!({ "status": "OK", "beat": "ON" });
        is_on("resultsSubscription") && is_on("changesSubscription")
    };
    gateway.wait_for_health("both subscriptions receive beats", is_well).await;
    fixture.stop().await;
}

/// Only the subscriptions have moved to the new primary.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_follow_the_subscriptions_to_the_new_primary() {
    let fixture = Fixture::start().await;
    fixture.fail_over().await;
    fixture.old().order("CLIENT KILL TYPE pubsub").await;
    fixture.wait_for_reconnects().await;
    fixture.assert_a_run_is_answered().await;
    let id = fixture.gateway.run_async(HELLO, &json!(2)).await;
    let entry = format!("HEXISTS inflight:{{{}}} {id}", &id[..8]);
    assert_eq!(fixture.new.order(&entry).await, Reply::Integer(1), "the journal is on the new primary");
    fixture.stop().await;
}

/// The old primary is a replica of the new one, so it forwards publications.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn subscriptions_on_a_replica_are_kept() {
    let fixture = Fixture::start().await;
    fixture.fail_over().await;
    fixture.old().follow(&fixture.new).await;
    // The READONLY error moves the commands to the new primary.
    eventually("runs on the new primary", SOON, || async {
        let run = fixture.gateway.run(HELLO, &json!(1)).header("x-async", "true").send().await;
        if run.status != 202 {
            return Err(run.text());
        }
        let id = run.json()["jobId"].as_str().expect("an id").to_owned();
        match fixture.new.journaled(&id).await {
            0 => Err("not in the journal there".to_owned()),
            _ => Ok(()),
        }
    })
    .await;
    fixture.gateway.wait_for_metric("infra_subscription_lost{subscription=\"results\"}", 0.0).await;
    fixture.stop().await;
}

/// An ACL for an earlier version does not allow the channel of the beats. (Redis compares patterns with the
/// allowed patterns as texts, so such an ACL names node ids.)
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_beat_channel_subscriptions_are_kept() {
    let platform = Setup::serve().no_worker().start().await;
    let redis = &platform.fleet().redis;
    let (node, state) = ("0000abcd", Scratch::new("state"));
    std::fs::create_dir(state.path().join(node)).expect("the scratch directory is writable");
    let channels = format!("&result:{node}* &functions:changed:*");
    redis.order(&format!("ACL SETUSER infra on >secret-of-infra ~* +@all resetchannels {channels}")).await;
    let redis_proxy = RedisProxy::to(redis).await;
    let url = redis_proxy.url_of("infra", "secret-of-infra");
    let state_dir = state.path().display().to_string();
    let env = [("REDIS_URL".into(), url), ("STATE_DIR".into(), state_dir)];
    let gateway = platform.fleet().start_gateway_with(&env).await;
    gateway.wait_for_metric("infra_function_changes_heard", 1.0).await;
    for subscription in ["results", "changes"] {
        let series = format!("infra_subscription_beat_off{{subscription=\"{subscription}\"}}");
        gateway.wait_for_metric(&series, 1.0).await;
    }
    // The node renews its lease once per second. By the sixth renewal it would have missed two beats and
    // reconnected.
    let nodes = format!("nodes:{{{}}}", platform.fleet().cloud.logs_table);
    let lease_until_ms = async || match redis.order(&format!("ZSCORE {nodes} {node}")).await {
        Reply::Bulk(score) => String::from_utf8_lossy(&score).parse::<f64>().expect("a number"),
        other => panic!("{other:?}"),
    };
    let first = lease_until_ms().await;
    eventually("six renewals of the lease", SOON, || async {
        let renewed_ms = lease_until_ms().await - first;
        if renewed_ms >= 6000.0 { Ok(()) } else { Err(format!("{renewed_ms} ms")) }
    })
    .await;
    for subscription in ["results", "changes"] {
        let missed = gateway.metric(&missed(subscription)).await.unwrap_or_default();
        assert_eq!(missed, 0.0, "{subscription}: reconnected for missed beats");
    }
    let is_off = |_, health: &Value| {
        let check = &health["checks"]["resultsSubscription"];
        health["status"] == "OK" && *check == json!({ "status": "OK", "beat": "OFF" })
    };
    gateway.wait_for_health("beats are off", is_off).await;
    let lines = gateway.log().iter().filter(|line| line["msg"].to_string().contains("Beats are off")).count();
    assert_eq!(lines, 1, "{}", gateway.output().tail(30));
    // The subscriptions still receive results.
    let run = gateway.run(HELLO, &json!(1));
    let client = spawn(async move { run.send().await });
    let (_, message) = platform.fleet().cloud.receive().await;
    let message: Value = serde_json::from_str(&message).expect("JSON");
    let id = message["requestId"].as_str().expect("an id");
    redis.publish(&format!("result:{id}"), b"{}").await;
    assert_eq!(within("the answer", SOON, client).await.expect("no panic").expect(200).text(), "{}");
    gateway.stop().await;
    platform.stop().await;
}
