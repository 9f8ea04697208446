//! Redis fails over: what a node publishes and what it listens to may then lead to different servers. Nobody
//! may be left on the old one.

use crate::harness::link::Link;
use crate::harness::platform::HELLO;
use crate::harness::process::Scratch;
use crate::harness::redis::{Redis, Reply};
use crate::harness::{Gateway, Platform, SOON, Setup, eventually, spawn, within};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const CHANGES: &str = "infra_function_changes_total";

fn missed(subscription: &str) -> String {
    format!("infra_subscription_beats_missed_total{{subscription=\"{subscription}\"}}")
}

/// Two servers, and a node whose connections go over a link.
struct Stage {
    platform: Platform,
    new: Redis,
    link: Link,
    gateway: Gateway,
}

impl Stage {
    async fn set() -> Self {
        let platform = Setup::serve().no_worker().start().await;
        let new = tokio::task::block_in_place(|| Redis::start(None));
        let link = Link::to(&platform.fleet().redis).await;
        let gateway = platform.fleet().start_gateway_with(&[("REDIS_URL".into(), link.url())]).await;
        gateway.wait_for_metric("infra_function_changes_heard", 1.0).await;
        Self { platform, new, link, gateway }
    }

    fn old(&self) -> &Redis {
        &self.platform.fleet().redis
    }

    /// The new primary has the data of the old one, and the name leads there from now on.
    async fn fail_over(&self) {
        self.new.follow(self.old()).await;
        self.new.order("REPLICAOF NO ONE").await;
        self.link.lead_to(&self.new);
    }

    async fn both_have_reconnected(&self) {
        for subscription in ["results", "changes"] {
            eventually(&missed(subscription), SOON, || async {
                let count = self.gateway.metric(&missed(subscription)).await;
                if count >= Some(1.0) { Ok(()) } else { Err(format!("{count:?}")) }
            })
            .await;
        }
        self.gateway.until_printed("Beats missed").await;
    }

    /// Publishes on the new server until somebody receives it there, as workers do after a fail-over.
    async fn publish(&self, channel: &str, payload: &[u8]) {
        eventually(&format!("a subscriber of {channel}"), SOON, || async {
            match self.new.publish(channel, payload).await {
                0 => Err("nobody".to_owned()),
                _ => Ok(()),
            }
        })
        .await;
    }

    /// A run whose result is published on the new server, and not stored, is answered.
    async fn a_run_is_answered(&self) {
        let run = self.gateway.run(HELLO, &json!("after"));
        let client = spawn(async move { run.send().await });
        let (_, message) = self.platform.fleet().cloud.receive().await;
        let message: Value = serde_json::from_str(&message).expect("JSON");
        let id = message["requestId"].as_str().expect("an id").to_owned();
        let result = format!(r#"{{"requestId":"{id}","status":"SUCCESS","stdout":"new"}}"#);
        self.publish(&format!("result:{id}"), result.as_bytes()).await;
        let answer = within("the client's answer", SOON, client).await.expect("no panic").expect(200);
        assert_eq!(answer.text(), result);
    }

    async fn stop(self) {
        self.gateway.stop().await;
        self.platform.stop().await;
    }
}

/// The old primary lives on, and answers PINGs. Only the commands have noticed that there is a new one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_subscription_stays_on_the_old_primary() {
    let stage = Stage::set().await;
    let gateway = &stage.gateway;
    // A client waits here for a job of the other node.
    let foreign = stage.platform.gateway.run_async(HELLO, &json!(1)).await;
    stage.platform.fleet().cloud.receive().await;
    let wait = gateway.request("GET", &format!("/status/{foreign}?wait=60"));
    let client = spawn(async move { wait.send().await });
    eventually("the channel of that job", SOON, || async {
        let heard = stage.old().order(&format!("PUBSUB NUMSUB result:{foreign}")).await;
        let Reply::Array(counts) = heard else { panic!("{heard:?}") };
        if counts[1] == Reply::Integer(1) { Ok(()) } else { Err(format!("{counts:?}")) }
    })
    .await;

    stage.fail_over().await;
    stage.old().order("CLIENT KILL TYPE normal").await;
    eventually("/health that says so", SOON, || async {
        let health = gateway.anonymous("GET", "/health").send().await.json();
        let lost = health["checks"]["resultsSubscription"]["status"] == "ERROR";
        if lost && health["status"] == "DEGRADED" { Ok(()) } else { Err(health.to_string()) }
    })
    .await;
    stage.both_have_reconnected().await;

    stage.a_run_is_answered().await;
    let result = format!(r#"{{"requestId":"{foreign}","status":"SUCCESS","stdout":"foreign"}}"#);
    stage.publish(&format!("result:{foreign}"), result.as_bytes()).await;
    let answer = within("the answer of the long poll", SOON, client).await.expect("no panic").expect(200);
    assert_eq!(answer.text(), result);
    let table = &stage.platform.fleet().cloud.functions_table;
    let before = gateway.metric(CHANGES).await.expect("a number");
    stage.publish(&format!("functions:changed:{table}"), HELLO.as_bytes()).await;
    gateway.wait_for_metric(CHANGES, before + 1.0).await;
    eventually("/health that is well again", SOON, || async {
        let health = gateway.anonymous("GET", "/health").send().await.json();
        let is_well = ["resultsSubscription", "changesSubscription"]
            .iter()
            .all(|name| health["checks"][name] == json!({ "status": "OK", "beat": "ON" }));
        if is_well { Ok(()) } else { Err(health.to_string()) }
    })
    .await;
    stage.stop().await;
}

/// The other way round: the subscriptions have moved, and the commands have not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_command_stays_on_the_old_primary() {
    let stage = Stage::set().await;
    stage.fail_over().await;
    stage.old().order("CLIENT KILL TYPE pubsub").await;
    stage.both_have_reconnected().await;
    stage.a_run_is_answered().await;
    let id = stage.gateway.run_async(HELLO, &json!(2)).await;
    let entry = format!("HEXISTS inflight:{{{}}} {id}", &id[..8]);
    assert_eq!(stage.new.order(&entry).await, Reply::Integer(1), "the journal is on the new primary");
    stage.stop().await;
}

/// The old primary follows the new one: what is published there reaches the subscriptions through it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscription_on_a_replica_stays() {
    let stage = Stage::set().await;
    stage.fail_over().await;
    stage.old().follow(&stage.new).await;
    // READONLY sends the commands to the new primary.
    eventually("runs on the new primary", SOON, || async {
        let run = stage.gateway.run(HELLO, &json!(1)).header("x-async", "true").send().await;
        if run.status != 202 {
            return Err(run.text());
        }
        let id = run.json()["jobId"].as_str().expect("an id").to_owned();
        match stage.new.journaled(&id).await {
            0 => Err("not journaled there".to_owned()),
            _ => Ok(()),
        }
    })
    .await;
    stage.gateway.wait_for_metric("infra_subscription_lost{subscription=\"results\"}", 0.0).await;
    stage.stop().await;
}

/// As a careful operator may have set Redis up for an earlier version: the beats are not among the channels.
/// (Redis holds a pattern against the allowed patterns as a text, so the operator knows the node ids.)
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_without_the_channel_of_the_beats() {
    let platform = Setup::serve().no_worker().start().await;
    let redis = &platform.fleet().redis;
    let (node, state) = ("0000abcd", Scratch::new("state"));
    std::fs::create_dir(state.path().join(node)).expect("the scratch directory is writable");
    let channels = format!("&result:{node}* &functions:changed:*");
    redis.order(&format!("ACL SETUSER infra on >secret-of-infra ~* +@all resetchannels {channels}")).await;
    let link = Link::to(redis).await;
    let url = link.url_of("infra", "secret-of-infra");
    let state_dir = state.path().display().to_string();
    let env = [("REDIS_URL".into(), url), ("STATE_DIR".into(), state_dir)];
    let gateway = platform.fleet().start_gateway_with(&env).await;
    gateway.wait_for_metric("infra_function_changes_heard", 1.0).await;
    for subscription in ["results", "changes"] {
        let series = format!("infra_subscription_beat_off{{subscription=\"{subscription}\"}}");
        gateway.wait_for_metric(&series, 1.0).await;
    }
    let subscribers = async || {
        let Reply::Bulk(list) = redis.order("CLIENT LIST TYPE pubsub").await else { panic!("a list") };
        let list = String::from_utf8(list).expect("text");
        let ours = list.lines().filter(|line| line.contains("user=infra"));
        ours.map(|line| line.split(' ').next().expect("an id").to_owned()).collect::<Vec<_>>()
    };
    let before = subscribers().await;
    assert_eq!(before.len(), 2, "{before:?}");
    // Longer than two beats, and all that follows from missing them.
    let until = Instant::now() + Duration::from_secs(5);
    while Instant::now() < until {
        let health = gateway.anonymous("GET", "/health").send().await.expect(200).json();
        assert_eq!(health["status"], "OK", "{health}");
        assert_eq!(health["checks"]["resultsSubscription"], json!({ "status": "OK", "beat": "OFF" }));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(subscribers().await, before, "nobody reconnects");
    let said = gateway.log().iter().filter(|line| line["msg"].to_string().contains("Beats are off")).count();
    assert_eq!(said, 1, "{}", gateway.output().tail(30));
    // What it is subscribed to arrives.
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
