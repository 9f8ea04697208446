//! The overview of the fleet: of one node, of several, of a node that dies, and without Redis.

use crate::harness::gateway::Conf;
use crate::harness::job::now_ms;
use crate::harness::platform::{Backend, HELLO};
use crate::harness::{Gateway, SOON, Setup, eventually};
use serde_json::{Value, json};

on_both_backends!(runs_appear_in_the_overview);

async fn overview(gateway: &Gateway) -> Value {
    gateway.get("/system/overview").await.expect(200).json()
}

/// The number of events in a window of one node.
fn counted(window: &Value, rate: &str) -> u64 {
    let number = |name: &str| window[name].as_f64().unwrap_or_else(|| panic!("{name} in {window}"));
    (number(rate) * number("seconds")).round() as u64
}

/// The id of each node, and how many jobs it accepted and finished in the last hour.
fn jobs_by_node(overview: &Value) -> Vec<(String, u64, u64)> {
    let nodes = overview["nodes"].as_array().expect("a list");
    let jobs = |node: &Value| {
        let hour = &node["windows"]["1h"];
        let id = node["id"].as_str().expect("an id").to_owned();
        (id, counted(hour, "acceptedPerS"), counted(hour, "finishedPerS"))
    };
    nodes.iter().map(jobs).collect()
}

#[track_caller]
fn are_percentiles(times: &Value) {
    let [p50, p95, p99] = ["p50", "p95", "p99"].map(|name| times[name].as_f64().expect("a number"));
    // No run takes longer, even on a busy machine.
    assert!(0.0 < p50 && p50 <= p95 && p95 <= p99 && p99 < 600_000.0, "{times}");
}

async fn runs_appear_in_the_overview(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    for n in 0..10 {
        gateway.run(HELLO, &json!(n)).send().await.expect(200);
    }
    gateway.wait_until_idle().await;
    let seen = eventually("ten finished runs", SOON, || async {
        let seen = gateway.get("/api/system/overview").await.expect(200).json();
        let is_expected = match &jobs_by_node(&seen)[..] {
            [(_, accepted, finished)] => (*accepted, *finished) == (10, 10),
            _ => false,
        };
        // The runs, and at least one request for the metrics.
        let is_answered = counted(&seen["fleet"]["windows"]["1h"], "requestsPerS") > 10;
        if is_expected && is_answered && seen["complete"] == true { Ok(seen) } else { Err(seen.to_string()) }
    })
    .await;
    let (node, fleet) = (&seen["nodes"][0], &seen["fleet"]);
    assert_eq!((&node["phase"], &node["leaseHeld"]), (&json!("ready"), &json!(true)), "{node}");
    assert_eq!(node["version"], env!("CARGO_PKG_VERSION"));
    for at in [&node["startedAt"], &seen["at"]] {
        assert!(at.as_u64().is_some_and(|at| now_ms().abs_diff(at) < 600_000), "{at}");
    }
    assert_eq!(fleet["windows"], node["windows"], "the only node is the fleet");
    let hour = &fleet["windows"]["1h"];
    assert_eq!((&hour["jobErrorShare"], &hour["requestErrorShare"]), (&json!(0.0), &json!(0.0)), "{hour}");
    are_percentiles(&hour["runMs"]);
    are_percentiles(&hour["requestMs"]);
    assert_eq!(
        (&fleet["jobs"]["inFlight"], &fleet["jobs"]["oldestMs"]),
        (&json!(0), &json!(null)),
        "{fleet}"
    );
    assert_eq!(
        (&fleet["nodes"], &fleet["breakersOpen"], &fleet["leasesLost"], &fleet["limits"]),
        (&json!(1), &json!(0), &json!(0), &json!([])),
        "{fleet}"
    );
    assert!(fleet["queue"]["depth"].is_u64() && fleet["workers"]["pools"].is_object(), "{fleet}");
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_node_shows_all_nodes_until_one_dies() {
    let platform = Setup::serve().start().await;
    let (here, there) = (&platform.gateway, platform.fleet().start_gateway().await);
    for (node, runs) in [(here, 3), (&there, 2)] {
        for n in 0..runs {
            node.run(HELLO, &json!(n)).send().await.expect(200);
        }
        node.wait_until_idle().await;
    }
    let (one, two) = eventually("the same figures of both nodes on each", SOON, || async {
        let (one, two) = (overview(here).await, overview(&there).await);
        let jobs = jobs_by_node(&one);
        let mut finished: Vec<u64> = jobs.iter().map(|(_, _, finished)| *finished).collect();
        finished.sort_unstable();
        let is_complete = one["complete"] == true && two["complete"] == true;
        if is_complete && finished == [2, 3] && jobs == jobs_by_node(&two) {
            Ok((one, two))
        } else {
            Err(format!("{one}\n{two}"))
        }
    })
    .await;
    for seen in [&one, &two] {
        let fleet = &seen["fleet"];
        assert_eq!(fleet["nodes"], 2, "{fleet}");
        let nodes = seen["nodes"].as_array().expect("a list");
        let rates = nodes.iter().map(|node| node["windows"]["1h"]["finishedPerS"].as_f64());
        let sum: f64 = rates.map(|rate| rate.expect("a number")).sum();
        let rate = fleet["windows"]["1h"]["finishedPerS"].as_f64().expect("a number");
        assert!((rate - sum).abs() < 0.01, "{rate} is not the sum {sum}");
        are_percentiles(&fleet["windows"]["1h"]["runMs"]);
    }
    // Of the merged histograms, which no later run has changed.
    assert_eq!(one["fleet"]["windows"]["1h"]["runMs"], two["fleet"]["windows"]["1h"]["runMs"]);

    there.kill();
    eventually("one node", 3 * SOON, || async {
        let seen = overview(here).await;
        let is_alone = seen["fleet"]["nodes"] == 1 && seen["complete"] == true;
        if is_alone && jobs_by_node(&seen)[0].2 == 3 { Ok(()) } else { Err(seen.to_string()) }
    })
    .await;
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_redis_a_node_shows_itself() {
    let mut platform = Setup::serve().no_worker().start().await;
    let complete = async |gateway: &Gateway, is_complete: bool| {
        eventually(&format!("complete: {is_complete}"), 3 * SOON, || async {
            let seen = overview(gateway).await;
            let is_expected = seen["complete"] == is_complete && seen["fleet"]["nodes"] == 1;
            if is_expected { Ok(seen) } else { Err(seen.to_string()) }
        })
        .await
    };
    complete(&platform.gateway, true).await;
    // An entry of another program.
    let table = &platform.fleet().cloud.logs_table;
    let redis = &platform.fleet().redis;
    redis.order(&format!("HSET overview:{{{table}}} 0000002a no-summary")).await;
    redis.order(&format!("ZADD overview:seen:{{{table}}} {} 0000002a", now_ms())).await;
    complete(&platform.gateway, true).await;

    platform.fleet_mut().redis.kill();
    let alone = complete(&platform.gateway, false).await;
    assert_eq!(alone["fleet"]["workers"], json!(null), "{alone}");
    assert!(alone["fleet"]["queue"]["depth"].is_u64(), "{alone}");
    platform.gateway.wait_for_output("Summary of this node not written").await;
    platform.fleet_mut().redis.restart().await;
    let again = complete(&platform.gateway, true).await;
    assert_eq!(again["nodes"][0]["id"], alone["nodes"][0]["id"]);
    platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_near_exhaustion_are_named() {
    let limits = "[[limit]]\nname = \"lists\"\nidentity = \"key\"\nroutes = [\"/functions\"]\nrate = 2\n\
                  period_s = 3600\nburst = 2\non_redis_loss = \"local\"\n";
    let conf = Conf { limits: limits.to_owned(), ..Conf::default() };
    let platform = Setup::new(Backend::Dev).conf(conf).start().await;
    let gateway = &platform.gateway;
    for status in [200, 200, 429] {
        gateway.get("/functions").await.expect(status);
    }
    let seen = eventually("the limit", SOON, || async {
        let seen = overview(gateway).await;
        let is_named = seen["fleet"]["limits"].as_array().is_some_and(|limits| !limits.is_empty());
        let is_counted = counted(&seen["fleet"]["windows"]["1h"], "refusedPerS") == 1;
        if is_named && is_counted { Ok(seen) } else { Err(seen.to_string()) }
    })
    .await;
    let level = &seen["fleet"]["limits"][0];
    assert_eq!((&level["limit"], &level["identity"]), (&json!("lists"), &json!("key")), "{level}");
    assert_eq!((&level["level"], level["name"].is_string()), (&json!(1.0), true), "{level}");
    assert!(!seen.to_string().contains(gateway.key()), "a key is shown");
    platform.finish().await;
}
