//! The disk of the node in `/health`: every condition clears when its cause is gone.

use crate::harness::aws_proxy::{Faults, Policy};
use crate::harness::gateway::Conf;
use crate::harness::platform::HELLO;
use crate::harness::process::Scratch;
use crate::harness::{Gateway, SOON, Setup, eventually};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Rows written during each outage.
const ROWS: usize = 3;

async fn wait_for_health(gateway: &Gateway, what: &str, is_it: impl Fn(&Value) -> bool) -> Value {
    gateway.wait_for_health(what, |_, health| is_it(health)).await
}

/// `/health` reports the disk only. Rows may still wait in memory, or as failing rows.
async fn wait_for_all_rows(gateway: &Gateway) {
    gateway.wait_until_idle().await;
    gateway.wait_for_metric("infra_audit_failing_rows", 0.0).await;
}

/// The directory of the only node under `STATE_DIR`.
fn node_dir(state: &Path) -> PathBuf {
    let entries = std::fs::read_dir(state).expect("it exists").flatten();
    let mut dirs = entries.map(|entry| entry.path()).filter(|path| path.is_dir());
    dirs.next().expect("a node runs")
}

/// No job is sent afterwards: a load balancer that checks `/health` would send none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_recovers_without_new_jobs() {
    let server = "[audit]\nspill_bytes_max = 1000\n".into();
    let limits = "[batch]\nsend_deadline_ms = 5000\n".into();
    let conf = Conf { server, limits, ..Conf::default() };
    let platform = Setup::serve().conf(conf).policy(Policy::Fail(1)).start().await;
    let (gateway, proxy) =
        (&platform.gateway, platform.fleet().proxy.as_ref().expect("the policy has a proxy"));
    gateway.run(HELLO, &json!(0)).send().await.expect(200);
    gateway.wait_until_idle().await;
    proxy.inject(Faults { tables_down: 100, ..Faults::default() });
    for n in 0..10 {
        gateway.run_async(HELLO, &json!(n)).await;
    }
    wait_for_health(gateway, "the spill is full", |health| health["checks"]["spill"]["status"] == "ERROR")
        .await;
    proxy.inject(Faults { tables_down: 100, queue_down: 100, ..Faults::default() });
    eventually("an open circuit breaker", SOON, || async {
        gateway.run(HELLO, &json!(1)).header("x-async", "true").send().await.expect(503);
        let open = gateway.metric("infra_queue_breaker_open").await;
        if open == Some(1.0) { Ok(()) } else { Err(format!("{open:?}")) }
    })
    .await;
    wait_for_health(gateway, "the queue is down", |health| health["checks"]["queue"]["status"] == "ERROR")
        .await;

    proxy.inject(Faults::default());
    let health = wait_for_health(gateway, "OK", |health| health["status"] == "OK").await;
    assert_eq!(health["checks"].get("spill"), None);
    for series in ["infra_audit_spill_full", "infra_audit_spill_rows", "infra_queue_breaker_open"] {
        assert_eq!(gateway.metric(series).await, Some(0.0), "{series}");
    }
    // Jobs with an unknown outcome of their send are still in flight.
    platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_state_dir_that_returns_is_used_again() {
    let parent = Scratch::new("parent");
    let (state, away) = (parent.path().join("state"), parent.path().join("away"));
    let state_dir = state.to_str().expect("the path is UTF-8");
    let platform = Setup::serve().policy(Policy::Fail(1)).env("STATE_DIR", state_dir).start().await;
    let (gateway, proxy) =
        (&platform.gateway, platform.fleet().proxy.as_ref().expect("the policy has a proxy"));
    gateway.run(HELLO, &json!(0)).send().await.expect(200);
    gateway.wait_until_idle().await;

    // The whole directory is gone, so rows cannot be spilled.
    std::fs::rename(&state, &away).expect("it exists");
    proxy.inject(Faults { tables_down: 100, ..Faults::default() });
    // More than one row: otherwise the row may be at fault, and not the table.
    let mut ids = Vec::new();
    for n in 0..ROWS {
        ids.push(gateway.run_async(HELLO, &json!(n)).await);
    }
    wait_for_health(gateway, "rows cannot be spilled", |health| {
        health["checks"]["spill"]["status"] == "ERROR"
    })
    .await;
    assert!(!state.exists(), "a new directory would replace the one that returns");
    std::fs::rename(&away, &state).expect("it was renamed above");
    wait_for_health(gateway, "rows are spilled", |health| health["checks"]["spill"]["status"] == "DEGRADED")
        .await;
    proxy.inject(Faults::default());
    wait_for_health(gateway, "OK", |health| health["status"] == "OK").await;
    wait_for_all_rows(gateway).await;

    // Parts of it are deleted.
    let node = node_dir(&state);
    std::fs::remove_dir_all(node.join("spool")).expect("it exists");
    gateway.upload("spooled").await;
    std::fs::remove_dir_all(&node).expect("it exists");
    eventually("the directory and its lock", SOON, || async {
        if node.join("lock").exists() { Ok(()) } else { Err("no lock".to_owned()) }
    })
    .await;
    gateway.upload("spooled again").await;
    proxy.inject(Faults { tables_down: 100, ..Faults::default() });
    for n in 0..ROWS {
        ids.push(gateway.run_async(HELLO, &json!(n)).await);
    }
    wait_for_health(gateway, "rows are spilled again", |health| health["checks"]["spill"]["rows"] == ROWS)
        .await;
    proxy.inject(Faults::default());
    wait_for_health(gateway, "OK again", |health| health["status"] == "OK").await;
    wait_for_all_rows(gateway).await;

    // It is deleted with rows in it. Their results are still in Redis.
    proxy.inject(Faults { tables_down: 100, ..Faults::default() });
    for n in 0..ROWS {
        ids.push(gateway.run_async(HELLO, &json!(n)).await);
    }
    wait_for_health(gateway, "rows are spilled once more", |health| {
        health["checks"]["spill"]["rows"] == ROWS
    })
    .await;
    std::fs::remove_dir_all(&node).expect("it exists");
    proxy.inject(Faults::default());
    gateway.wait_for_output("Spilled rows are gone").await;
    wait_for_health(gateway, "OK in the end", |health| health["status"] == "OK").await;
    platform.fleet().cloud.wait_for_rows(HELLO, 1 + ids.len()).await;
    platform.finish().await;
}
