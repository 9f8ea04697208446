//! Rows that the log table rejects while it accepts others.

use crate::harness::aws_proxy::{Poison, Policy};
use crate::harness::gateway::Conf;
use crate::harness::platform::{HELLO, LONG_START, Platform};
use crate::harness::process::Scratch;
use crate::harness::{SOON, Setup, eventually};
use serde_json::json;
use std::cell::Cell;
use std::time::Duration;

/// Deadline for rows to be set aside: that takes five seconds, and several attempts some seconds apart.
const SET_ASIDE: Duration = Duration::from_secs(180);

/// Failing rows are set aside after this time, if others are written meanwhile.
fn server(aside_after_s: u64) -> String {
    format!("{LONG_START}[audit]\naside_after_s = {aside_after_s}\n")
}

const POISONS: [(&str, Poison); 3] = [
    ("row-that-breaks-the-table", Poison::ServerError),
    ("row-that-is-not-allowed", Poison::Denied),
    ("row-that-is-throttled", Poison::Throttled),
];

async fn start(state: &Scratch) -> Platform {
    let platform = Setup::serve()
        .policy(Policy::Fail(1))
        .conf(Conf { server: server(3600), limits: "limit = []\n".into(), ..Conf::default() })
        .env("STATE_DIR", state.path().to_str().expect("the path is UTF-8"))
        .start()
        .await;
    let proxy = platform.fleet().proxy.as_ref().expect("the policy has a proxy");
    POISONS.iter().for_each(|(text, poison)| proxy.poison(text, *poison));
    platform
}

/// Starts several runs, so that some rows share a batch.
async fn run_some(platform: &Platform, n: usize) {
    for n in 0..n {
        platform.gateway.run_async(HELLO, &json!({ "n": n })).await;
    }
}

/// Starts one run after the other, and waits for its row, until `series` is 3. `written` is the number of
/// rows so far. Returns the new number.
async fn write_rows_until_three(platform: &Platform, written: usize, series: &str) -> usize {
    let written = Cell::new(written);
    eventually(series, SET_ASIDE, || async {
        platform.fleet().cloud.wait_for_rows(HELLO, written.get()).await;
        let rows = platform.gateway.metric(series).await;
        if rows == Some(3.0) {
            return Ok(written.get());
        }
        run_some(platform, 1).await;
        written.set(written.get() + 1);
        Err(format!("{rows:?}"))
    })
    .await
}

fn batches(platform: &Platform) -> u32 {
    platform.fleet().proxy.as_ref().expect("the policy has a proxy").count("BatchWriteItem").passed
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failing_rows_block_no_others_and_are_set_aside() {
    let state = Scratch::new("state");
    let mut platform = start(&state).await;
    let mut ids = Vec::new();
    for (text, _) in POISONS {
        run_some(&platform, 5).await;
        ids.push(platform.gateway.run_async(HELLO, &json!({ "token": text })).await);
        run_some(&platform, 5).await;
    }
    // Other rows are written meanwhile, so the table does not count as unavailable.
    let mut expected = write_rows_until_three(&platform, 30, "infra_audit_failing_rows").await;
    assert_eq!(platform.gateway.metric("infra_audit_spilled_rows_total").await, Some(0.0));
    let before = batches(&platform);
    run_some(&platform, 10).await;
    expected += 10;
    platform.fleet().cloud.wait_for_rows(HELLO, expected).await;
    assert!(batches(&platform) > before, "one denied row has ended the use of batches");
    // The same after a restart.
    platform.put_conf("server.toml", &server(5));
    platform = platform.kill_and_restart(async |_| {}).await;
    // A row that is retried is counted twice for a moment.
    platform.gateway.wait_for_metric("infra_audit_failing_rows", 3.0).await;
    // Other rows are written meanwhile: only then rows are set aside.
    expected = write_rows_until_three(&platform, expected, "infra_audit_aside_rows").await;
    for (series, value) in [
        ("infra_audit_failing_rows", 0.0),
        ("infra_audit_rows_put_aside_total", 3.0),
        ("infra_audit_waiting_ends", 0.0),
        ("infra_jobs_unaccounted", 0.0),
        ("infra_jobs_in_flight", 0.0),
    ] {
        platform.gateway.wait_for_metric(series, value).await;
    }
    for id in &ids {
        let is_expected = |line: &serde_json::Value| {
            let line = line.to_string();
            line.contains("Row Put Aside") && line.contains(id.as_str())
        };
        let logged = || async {
            let logged = platform.gateway.log().iter().any(is_expected);
            logged.then_some(()).ok_or_else(|| platform.gateway.output().tail(50))
        };
        eventually("the log line", SOON, logged).await;
    }
    // Their jobs ran, so they count. Nothing is left in the journal.
    platform.fleet().cloud.wait_for_invocations(HELLO, expected + ids.len()).await;
    assert_eq!(platform.fleet().redis.journaled(&ids[0]).await, 0);
    platform.finish().await;
}
