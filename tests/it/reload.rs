//! Settings that change while the server runs.

use crate::harness::gateway::Conf;
use crate::harness::platform::{HELLO, Platform};
use crate::harness::{Gateway, SOON, Setup, eventually, spawn, within};
use nix::sys::signal::Signal;
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

/// By then a change is in force.
const IN_FORCE: Duration = Duration::from_secs(1);

const APPLIED: &str = r#"infra_conf_reloads_total{result="applied"}"#;
const REFUSED: &str = r#"infra_conf_reloads_total{result="refused"}"#;

fn write(platform: &Platform, limits: &str) {
    std::fs::write(platform.conf_file("limits.toml"), limits).expect("the scratch directory is writable");
}

async fn start(limits: &str) -> Platform {
    Setup::serve().no_worker().conf(Conf { limits: limits.into(), ..Conf::default() }).start().await
}

/// A limit of so many requests a minute, and no longer wait than a second.
fn settings(limit: u32) -> String {
    format!(
        "[waits]\nsync_max_s = 1\n[[limit]]\nname = \"test\"\nidentity = \"key\"\nroutes = [\"/run\"]\nrate = {limit}\nperiod_s = 60\nburst = {limit}\non_redis_loss = \"local\"\n"
    )
}

async fn count(gateway: &Gateway, series: &str) -> u32 {
    gateway.metric(series).await.unwrap_or_default() as u32
}

async fn counted(gateway: &Gateway, series: &str, expected: u32, deadline: Duration) {
    eventually(&format!("{series} {expected}"), deadline, || async {
        let seen = count(gateway, series).await;
        if seen == expected { Ok(()) } else { Err(seen.to_string()) }
    })
    .await;
}

/// One field of the first such line; lines come a moment after what they tell of.
async fn logged(gateway: &Gateway, message: &str, field: &str) -> String {
    eventually(message, SOON, || async {
        let lines = gateway.log();
        let line = lines.iter().find(|line| line["msg"] == message);
        line.and_then(|line| line[field].as_str()).map(str::to_owned).ok_or_else(|| "no line".to_owned())
    })
    .await
}

async fn limit_of(gateway: &Gateway) -> Option<String> {
    let answer = gateway.run(HELLO, &json!(1)).header("x-async", "true").send().await;
    answer.header("x-ratelimit-limit").map(str::to_owned)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_saved_file_is_in_force_within_a_second() {
    let platform = start("").await;
    let gateway = &platform.gateway;
    assert_eq!(limit_of(gateway).await, None);
    write(&platform, &settings(77));
    eventually("the new limit", IN_FORCE, || async {
        let limit = limit_of(gateway).await;
        if limit.as_deref() == Some("77") { Ok(()) } else { Err(format!("{limit:?}")) }
    })
    .await;
    // Nobody works: the run ends with the longest wait, which was 290 s.
    let run = gateway.run(HELLO, &json!(1)).header("prefer", "wait=100");
    let answer = within("the end of the wait", SOON, run.send()).await.expect(202);
    assert_eq!(answer.json()["status"], "TIMEOUT");
    let changes = logged(gateway, "Configuration Applied", "changes").await;
    assert!(
        changes.contains("waits.sync_max_s 290 → 1") && changes.contains("limit.test.rate (none) → 77"),
        "{changes}"
    );
    platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_file_is_refused_whole_and_told_once() {
    let platform = start(&settings(50)).await;
    let gateway = &platform.gateway;
    write(&platform, &format!("{}\n[batch]\nsends_max = 0\n", settings(60)));
    counted(gateway, REFUSED, 1, IN_FORCE).await;
    let problem = logged(gateway, "Configuration Refused", "problem").await;
    assert!(problem.ends_with("limits.toml:13: batch.sends_max must be at least 1"), "{problem}");
    assert_eq!(limit_of(gateway).await.as_deref(), Some("50"), "the old settings");

    // A file that is gone lifts no limit.
    std::fs::remove_file(platform.conf_file("limits.toml")).expect("it is there");
    counted(gateway, REFUSED, 2, IN_FORCE).await;
    assert_eq!(limit_of(gateway).await.as_deref(), Some("50"));
    gateway.signal(Signal::SIGHUP);
    counted(gateway, REFUSED, 3, IN_FORCE).await;

    write(&platform, &settings(60));
    counted(gateway, APPLIED, 1, IN_FORCE).await;
    assert_eq!(limit_of(gateway).await.as_deref(), Some("60"));
    assert_eq!(count(gateway, REFUSED).await, 3, "each is told once");
    platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_are_all_lifted_only_by_saying_so() {
    let platform = start(&settings(50)).await;
    let gateway = &platform.gateway;
    // As a file is for a moment while it is written.
    for (n, text) in [(1, ""), (2, "# soon\n"), (3, "[waits]\nsync_max_s = 5\n")] {
        write(&platform, text);
        counted(gateway, REFUSED, n, IN_FORCE).await;
        assert_eq!(limit_of(gateway).await.as_deref(), Some("50"), "{text:?}");
    }
    write(&platform, "limit = []\n");
    counted(gateway, APPLIED, 1, IN_FORCE).await;
    assert_eq!(limit_of(gateway).await, None);
    platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_read_at_start_only_says_so() {
    let platform = start(&settings(50)).await;
    std::fs::write(platform.conf_file("server.toml"), "[shutdown]\ndrain_timeout_s = 7\n").expect("writable");
    counted(&platform.gateway, APPLIED, 1, IN_FORCE).await;
    let changes = logged(&platform.gateway, "Restart Needed", "changes").await;
    assert_eq!(changes, "shutdown.drain_timeout_s 30 → 7");
    platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_environment_goes_before_a_new_file_as_well() {
    let conf = Conf { limits: settings(50), ..Conf::default() };
    let platform = Setup::serve().no_worker().conf(conf).env("RATE_LIMIT", "33").start().await;
    assert_eq!(limit_of(&platform.gateway).await.as_deref(), Some("33"));
    write(&platform, &settings(60).replace("sync_max_s = 1", "sync_max_s = 2"));
    counted(&platform.gateway, APPLIED, 1, IN_FORCE).await;
    assert_eq!(limit_of(&platform.gateway).await.as_deref(), Some("33"));
    platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_fails_while_settings_change() {
    const RELOADS: u32 = 100;
    let platform = Setup::serve().conf(Conf { limits: settings(1_000_000), ..Conf::default() }).start().await;
    let gateway = &platform.gateway;
    let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let (stop, answered) = (Arc::clone(&stop), Arc::clone(&answered));
            let request = gateway.run(HELLO, &json!(1)).header("x-async", "true");
            spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    request.clone().send().await.expect(202);
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    for n in 1..=RELOADS {
        write(&platform, &settings(1_000_000 + n));
        gateway.signal(Signal::SIGHUP);
        counted(gateway, APPLIED, n, SOON).await;
    }
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        within("the client's end", SOON, client).await.expect("no request failed");
    }
    assert!(answered.load(Ordering::Relaxed) > RELOADS, "{answered:?} requests");
    assert_eq!(limit_of(gateway).await.as_deref(), Some("1000100"));
    platform.finish().await;
}
