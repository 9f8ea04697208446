//! Many concurrent runs.

use crate::harness::gateway::Conf;
use crate::harness::job::IdParts;
use crate::harness::platform::{Backend, HELLO};
use crate::harness::{SOON, Setup, eventually, join_all, spawn};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::Duration;

const RUNS: usize = 500;

on_both_backends!(five_hundred_concurrent_runs_get_their_own_results);

/// Each run also has one row.
async fn five_hundred_concurrent_runs_get_their_own_results(setup: Setup) {
    let is_dev = setup.backend == Backend::Dev;
    // A busy machine makes the queue slow. No job is shed for that.
    let limits = "limit = []\n[overload]\nconfirm_target_ms = 0\n".into();
    let platform = setup.conf(Conf { limits, ..Conf::default() }).start().await;
    let gateway = &platform.gateway;
    // Reads the function: on a busy machine the emulated table may be too slow while 500 runs arrive at once.
    let first = gateway.run(HELLO, &json!({ "token": "first" })).send().await.expect(200).json();
    let first = first["requestId"].as_str().expect("an id").to_owned();
    let clients = (0..RUNS).map(|n| {
        let token = format!("client-{n}-end");
        let run = gateway.run(HELLO, &json!({ "token": token }));
        spawn(async move {
            let result = run.send().await.expect(200).json();
            let printed = result["stdout"].as_str().unwrap_or_default();
            assert!(printed.contains(&token), "{token} got {result}");
            result["requestId"].as_str().expect("an id").to_owned()
        })
    });
    let clients = clients.collect();
    let ids = join_all("500 runs", Duration::from_secs(280), clients).await;
    let distinct: BTreeSet<&String> = ids.iter().chain([&first]).collect();
    assert_eq!(distinct.len(), RUNS + 1);

    let rows = eventually("501 rows", 3 * SOON, || async {
        let rows = gateway.get(&format!("/functions/{HELLO}/logs?limit=1000")).await.expect(200).json();
        let rows = rows.as_array().expect("an array").clone();
        if rows.len() == RUNS + 1 { Ok(rows) } else { Err(format!("{} rows", rows.len())) }
    })
    .await;
    let logged: BTreeSet<&str> = rows.iter().filter_map(|row| row["requestId"].as_str()).collect();
    assert!(distinct.iter().all(|id| logged.contains(id.as_str())), "each run has its row");
    for n in 0..RUNS {
        let token = format!("client-{n}-end");
        let is_its = |row: &&Value| row["message"].as_str().is_some_and(|message| message.contains(&token));
        assert_eq!(rows.iter().filter(is_its).count(), 1, "one row of {token}");
    }
    let invocations = format!(r#"function_invocations_total{{functionId="{HELLO}",status="SUCCESS"}}"#);
    gateway.wait_for_metric(&invocations, 501.0).await;
    if !is_dev {
        let cloud = &platform.fleet().cloud;
        let keys: BTreeSet<String> = distinct.iter().map(|id| IdParts::of(id).row_key()).collect();
        let rows = cloud.wait_for_rows(HELLO, RUNS + 1).await;
        let stored = rows.iter().map(|row| row["timestamp"]["S"].as_str().unwrap_or_default().to_owned());
        assert_eq!(stored.collect::<BTreeSet<_>>(), keys);
        cloud.wait_for_invocations(HELLO, RUNS + 1).await;
    }
    platform.finish().await;
}
