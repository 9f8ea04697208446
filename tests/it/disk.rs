//! The node's own disk, and what `/health` says: a condition that is over ends by itself.

use crate::harness::gateway::Conf;
use crate::harness::platform::HELLO;
use crate::harness::process::Scratch;
use crate::harness::proxy::{Faults, Policy};
use crate::harness::{Gateway, SOON, Setup, eventually};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Of a time without a table.
const ROWS: usize = 3;

async fn health(gateway: &Gateway) -> Value {
    gateway.anonymous("GET", "/health").send().await.json()
}

async fn wait_for_health(gateway: &Gateway, what: &str, is_it: impl Fn(&Value) -> bool) {
    eventually(what, 3 * SOON, || async {
        let health = health(gateway).await;
        if is_it(&health) { Ok(()) } else { Err(health.to_string()) }
    })
    .await;
}

/// `/health` speaks of the disk. Rows may still be tried from memory, or alone, as rows that fail.
async fn rows_are_written(gateway: &Gateway) {
    gateway.idle().await;
    gateway.wait_for_metric("infra_audit_failing_rows", 0.0).await;
}

/// The one node's directory under `STATE_DIR`.
fn node_dir(state: &Path) -> PathBuf {
    let entries = std::fs::read_dir(state).expect("it is there").flatten();
    let mut dirs = entries.map(|entry| entry.path()).filter(|path| path.is_dir());
    dirs.next().expect("a node runs")
}

/// Nobody sends a job afterwards, as nobody would through a load balancer that asks `/health`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_is_well_again_by_itself() {
    let conf = Conf { server: "[audit]\nspill_bytes_max = 1000\n".into(), ..Conf::default() };
    let platform = Setup::serve().conf(conf).policy(Policy::Fail(1)).start().await;
    let (gateway, proxy) = (&platform.gateway, platform.fleet().proxy.as_ref().expect("asked for"));
    gateway.run(HELLO, &json!(0)).send().await.expect(200);
    gateway.idle().await;
    proxy.fail(Faults { tables_away: 100, ..Faults::default() });
    for n in 0..10 {
        gateway.run_async(HELLO, &json!(n)).await;
    }
    wait_for_health(gateway, "a spill that is full", |health| health["checks"]["spill"]["status"] == "ERROR")
        .await;
    proxy.fail(Faults { tables_away: 100, queue_away: 100, ..Faults::default() });
    eventually("a queue that is away", SOON, || async {
        gateway.run(HELLO, &json!(1)).header("x-async", "true").send().await.expect(503);
        let open = gateway.metric("infra_queue_breaker_open").await;
        if open == Some(1.0) { Ok(()) } else { Err(format!("{open:?}")) }
    })
    .await;
    wait_for_health(gateway, "an error", |health| health["checks"]["queue"]["status"] == "ERROR").await;

    proxy.fail(Faults::default());
    wait_for_health(gateway, "health", |health| health["status"] == "OK").await;
    assert_eq!(health(gateway).await["checks"].get("spill"), None);
    for series in ["infra_audit_spill_full", "infra_audit_spill_rows", "infra_queue_breaker_open"] {
        assert_eq!(gateway.metric(series).await, Some(0.0), "{series}");
    }
    // What the queue may have taken while it was away is still in flight.
    platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_state_dir_that_was_away_is_used_again() {
    let parent = Scratch::new("parent");
    let (state, away) = (parent.path().join("state"), parent.path().join("away"));
    let state_dir = state.to_str().expect("the path is UTF-8");
    let platform = Setup::serve().policy(Policy::Fail(1)).env("STATE_DIR", state_dir).start().await;
    let (gateway, proxy) = (&platform.gateway, platform.fleet().proxy.as_ref().expect("asked for"));
    gateway.run(HELLO, &json!(0)).send().await.expect(200);
    gateway.idle().await;

    // All of it is away, and rows have nowhere to go.
    std::fs::rename(&state, &away).expect("it is there");
    proxy.fail(Faults { tables_away: 100, ..Faults::default() });
    // Of a single row the table may be away, or the row at fault.
    let mut ids = Vec::new();
    for n in 0..ROWS {
        ids.push(gateway.run_async(HELLO, &json!(n)).await);
    }
    wait_for_health(gateway, "rows without a disk", |health| health["checks"]["spill"]["status"] == "ERROR")
        .await;
    assert!(!state.exists(), "it would stand in the way of the one that comes back");
    std::fs::rename(&away, &state).expect("it was put there");
    wait_for_health(gateway, "rows on the disk", |health| health["checks"]["spill"]["status"] == "DEGRADED")
        .await;
    proxy.fail(Faults::default());
    wait_for_health(gateway, "health", |health| health["status"] == "OK").await;
    rows_are_written(gateway).await;

    // Parts of it are gone for good.
    let node = node_dir(&state);
    std::fs::remove_dir_all(node.join("spool")).expect("it is there");
    gateway.upload("spooled").await;
    std::fs::remove_dir_all(&node).expect("it is there");
    eventually("the directory and its lock", SOON, || async {
        if node.join("lock").exists() { Ok(()) } else { Err("no lock".to_owned()) }
    })
    .await;
    gateway.upload("spooled again").await;
    proxy.fail(Faults { tables_away: 100, ..Faults::default() });
    for n in 0..ROWS {
        ids.push(gateway.run_async(HELLO, &json!(n)).await);
    }
    wait_for_health(gateway, "rows on the disk again", |health| health["checks"]["spill"]["rows"] == ROWS)
        .await;
    proxy.fail(Faults::default());
    wait_for_health(gateway, "health again", |health| health["status"] == "OK").await;
    rows_are_written(gateway).await;

    // And with rows in it: their results are still where the worker stored them.
    proxy.fail(Faults { tables_away: 100, ..Faults::default() });
    for n in 0..ROWS {
        ids.push(gateway.run_async(HELLO, &json!(n)).await);
    }
    wait_for_health(gateway, "rows on the disk once more", |health| {
        health["checks"]["spill"]["rows"] == ROWS
    })
    .await;
    std::fs::remove_dir_all(&node).expect("it is there");
    proxy.fail(Faults::default());
    gateway.until_printed("Spilled rows are gone").await;
    wait_for_health(gateway, "health in the end", |health| health["status"] == "OK").await;
    platform.fleet().cloud.wait_for_rows(HELLO, 1 + ids.len()).await;
    platform.finish().await;
}
