//! Rows that the log table does not take, though it takes others.

use crate::harness::gateway::Conf;
use crate::harness::platform::{HELLO, Platform};
use crate::harness::process::Scratch;
use crate::harness::proxy::{Poison, Policy};
use crate::harness::{SOON, Setup, eventually};
use serde_json::json;
use std::cell::Cell;
use std::time::Duration;

/// Rows are put aside after five seconds, and a few tries at a pace of seconds; much longer on a busy machine.
const PUT_ASIDE: Duration = Duration::from_secs(120);

const POISONS: [(&str, Poison); 3] = [
    ("row-that-breaks-the-table", Poison::ServerError),
    ("row-that-is-not-allowed", Poison::Denied),
    ("row-that-is-throttled", Poison::Throttled),
];

async fn start(state: &Scratch) -> Platform {
    let server = "[audit]\naside_after_s = 5\n".to_owned();
    let platform = Setup::serve()
        .policy(Policy::Fail(1))
        .conf(Conf { server, limits: "limit = []\n".into(), ..Conf::default() })
        .env("STATE_DIR", state.path().to_str().expect("the path is UTF-8"))
        .start()
        .await;
    let proxy = platform.fleet().proxy.as_ref().expect("asked for");
    POISONS.iter().for_each(|(text, poison)| proxy.poison(text, *poison));
    platform
}

/// Many at once: so some go in one batch.
async fn run_some(platform: &Platform, n: usize) {
    for n in 0..n {
        platform.gateway.run_async(HELLO, &json!({ "n": n })).await;
    }
}

fn batches(platform: &Platform) -> u32 {
    platform.fleet().proxy.as_ref().expect("asked for").count("BatchWriteItem").passed
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_always_fails_holds_up_no_other_and_is_put_aside() {
    let state = Scratch::new("state");
    let mut platform = start(&state).await;
    let mut ids = Vec::new();
    for (text, _) in POISONS {
        run_some(&platform, 5).await;
        ids.push(platform.gateway.run_async(HELLO, &json!({ "token": text })).await);
        run_some(&platform, 5).await;
    }
    let mut expected = 30;
    platform.fleet().cloud.wait_for_rows(HELLO, expected).await;
    platform.gateway.wait_for_metric("infra_audit_failing_rows", 3.0).await;
    // The table is not away, and batches go on.
    assert_eq!(platform.gateway.metric("infra_audit_spilled_rows_total").await, Some(0.0));
    let before = batches(&platform);
    run_some(&platform, 10).await;
    expected += 10;
    platform.fleet().cloud.wait_for_rows(HELLO, expected).await;
    assert!(batches(&platform) > before, "one row that is denied is not the role");
    // In the next life they hold up nobody, too.
    platform = platform.kill_and_restart(async |_| {}).await;
    // A row that is tried again is in two places for a moment.
    platform.gateway.wait_for_metric("infra_audit_failing_rows", 3.0).await;
    // Others are written meanwhile: so it is not the table.
    let written = Cell::new(expected);
    eventually("the rows put aside", PUT_ASIDE, || async {
        run_some(&platform, 1).await;
        written.set(written.get() + 1);
        platform.fleet().cloud.wait_for_rows(HELLO, written.get()).await;
        let aside = platform.gateway.metric("infra_audit_aside_rows").await;
        if aside == Some(3.0) { Ok(()) } else { Err(format!("{aside:?}")) }
    })
    .await;
    expected = written.get();
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
        let says_so = |line: &serde_json::Value| {
            let line = line.to_string();
            line.contains("Row Put Aside") && line.contains(id.as_str())
        };
        let said = || async {
            let said = platform.gateway.log().iter().any(says_so);
            said.then_some(()).ok_or_else(|| platform.gateway.output().tail(50))
        };
        eventually("the row that was put aside", SOON, said).await;
    }
    // They ran, and so they count; nothing of them is left in the journal.
    let runs = (expected + ids.len()).to_string();
    eventually("the counters", PUT_ASIDE, || async {
        let item = platform.fleet().cloud.function_item(HELLO).await;
        if item["invocations"]["N"] == runs.as_str() { Ok(()) } else { Err(format!("{runs}: {item}")) }
    })
    .await;
    assert_eq!(platform.fleet().redis.journaled(&ids[0]).await, 0);
    platform.finish().await;
}
