//! Two processes and one node id: a `STATE_DIR` that was copied. Each accepted run has its row, whichever of
//! them dies.

use crate::harness::gateway::Conf;
use crate::harness::platform::HELLO;
use crate::harness::process::Scratch;
use crate::harness::redis::Reply;
use crate::harness::{Gateway, Platform, SOON, Setup, eventually};
use nix::sys::signal::Signal;
use serde_json::json;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Of the nodes in these tests.
const LEASE_S: u64 = 3;
/// By then every job is given up, whoever looks after it.
const SETTLED: Duration = Duration::from_secs(90);

const LOST: &str = "infra_node_id_lost";

async fn start(state: &Scratch, lease_s: u64) -> Platform {
    let conf = Conf {
        server: format!("[fleet]\nlease_s = {lease_s}\n"),
        limits: "limit = []\n[waits]\njob_deadline_s = 6\n[batch]\nsend_deadline_ms = 1000\n".into(),
        ..Conf::default()
    };
    Setup::serve().no_worker().conf(conf).env("STATE_DIR", &state.path().display().to_string()).start().await
}

/// As an operator copies it.
fn copied(state: &Scratch) -> Scratch {
    let copy = Scratch::new("copy");
    let from = format!("{}/.", state.path().display());
    let done = Command::new("cp").args(["-a", &from]).arg(copy.path()).status().expect("cp is there");
    assert!(done.success());
    copy
}

async fn start_on(platform: &Platform, state: &Scratch) -> Gateway {
    let env = [("STATE_DIR".to_owned(), state.path().display().to_string())];
    platform.fleet().start_gateway_with(&env).await
}

fn node(gateway: &Gateway) -> String {
    let log = gateway.log();
    let started = log.iter().find(|line| line["msg"].as_str().is_some_and(|msg| msg.ends_with(" Started")));
    started.expect("it has started")["node"].as_str().expect("the id of the node").to_owned()
}

async fn accept(gateway: &Gateway, count: usize, ids: &mut BTreeSet<String>) {
    for n in 0..count {
        ids.insert(gateway.run_async(HELLO, &json!(n)).await);
    }
}

/// Each of them has one row, and nobody else has.
async fn have_rows(platform: &Platform, ids: &BTreeSet<String>) {
    eventually("a row for each accepted run", SETTLED, || async {
        let rows = platform.fleet().cloud.log_rows(HELLO).await;
        let of: BTreeSet<String> =
            rows.iter().map(|row| row["requestId"]["S"].as_str().expect("an id").to_owned()).collect();
        let missing: Vec<_> = ids.difference(&of).collect();
        if of == *ids && rows.len() == ids.len() {
            Ok(())
        } else {
            Err(format!("{} rows, no {missing:?}", rows.len()))
        }
    })
    .await;
}

async fn kill(gateway: &Gateway) {
    gateway.signal(Signal::SIGKILL);
    gateway.ended(SOON).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_of_a_live_node_takes_an_id_of_its_own() {
    let state = Scratch::new("state");
    let platform = start(&state, LEASE_S).await;
    let mut ids = BTreeSet::new();
    accept(&platform.gateway, 3, &mut ids).await;
    let copy = copied(&state);
    let other = start_on(&platform, &copy).await;
    assert_ne!(node(&other), node(&platform.gateway));
    other.until_printed("Node Id In Use").await;
    accept(&platform.gateway, 3, &mut ids).await;
    accept(&other, 3, &mut ids).await;
    assert_eq!(platform.gateway.metric(LOST).await, Some(0.0), "the one that was first is left alone");
    kill(&platform.gateway).await;
    have_rows(&platform, &ids).await;
    other.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_copies_of_a_dead_node_one_has_its_id() {
    let state = Scratch::new("state");
    let platform = start(&state, LEASE_S).await;
    let mut ids = BTreeSet::new();
    accept(&platform.gateway, 3, &mut ids).await;
    let dead = node(&platform.gateway);
    kill(&platform.gateway).await;
    let (one, two) = (copied(&state), copied(&state));
    let (one, two) = tokio::join!(start_on(&platform, &one), start_on(&platform, &two));
    assert_ne!(node(&one), node(&two));
    let (heir, other) = if node(&one) == dead { (one, two) } else { (two, one) };
    assert_eq!(node(&heir), dead, "its lease had lapsed");
    for gateway in [&heir, &other] {
        gateway.until_printed("Node Id Held By Another Process").await;
        accept(gateway, 2, &mut ids).await;
    }
    kill(&heir).await;
    have_rows(&platform, &ids).await;
    other.finish().await;
}

/// A copy that is started while the original is frozen has its id. The original must not admit under it any
/// more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_node_that_lost_its_id_admits_nothing_until_it_has_it_again() {
    let state = Scratch::new("state");
    let platform = start(&state, LEASE_S).await;
    let gateway = &platform.gateway;
    let mut ids = BTreeSet::new();
    accept(gateway, 2, &mut ids).await;
    gateway.signal(Signal::SIGSTOP);
    let copy = copied(&state);
    let heir = start_on(&platform, &copy).await;
    assert_eq!(node(&heir), node(gateway), "the lease had lapsed");
    gateway.signal(Signal::SIGCONT);
    gateway.wait_for_metric(LOST, 1.0).await;
    gateway.until_printed("Node id lost").await;
    eventually("/health that says so", SOON, || async {
        let health = gateway.anonymous("GET", "/health").send().await;
        let said = health.json()["checks"]["nodeId"]["status"] == "ERROR";
        if health.status == 503 && said { Ok(()) } else { Err(health.text()) }
    })
    .await;
    gateway.anonymous("GET", "/readyz").send().await.expect(503);
    for is_async in ["true", "false"] {
        let refused = gateway.run(HELLO, &json!(1)).header("x-async", is_async).send().await.expect(503);
        assert_eq!(refused.json()["code"], "not_ready");
    }
    accept(&heir, 3, &mut ids).await;
    assert_eq!(heir.metric(LOST).await, Some(0.0));
    kill(&heir).await;

    gateway.wait_for_metric(LOST, 0.0).await;
    // It has its id again, and admits once its journal is known to be whole.
    eventually("a node that admits", SOON, || async {
        let ready = gateway.anonymous("GET", "/readyz").send().await;
        if ready.status == 200 { Ok(()) } else { Err(ready.text()) }
    })
    .await;
    accept(gateway, 1, &mut ids).await;
    have_rows(&platform, &ids).await;
    platform.finish().await;
}

/// The lease of the dead process has an hour to go: only one that must not wait for it has the same id.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_in_its_own_directory_does_not_wait() {
    let state = Scratch::new("state");
    let platform = start(&state, 3600).await;
    let mut ids = BTreeSet::new();
    let before = node(&platform.gateway);
    for _ in 0..3 {
        accept(&platform.gateway, 1, &mut ids).await;
    }
    let mut platform = platform;
    for _ in 0..2 {
        platform = platform.kill_and_restart(async |_| {}).await;
        assert_eq!(node(&platform.gateway), before);
        assert!(
            !platform.gateway.output().contains("Node Id Held"),
            "{}",
            platform.gateway.output().tail(20)
        );
    }
    have_rows(&platform, &ids).await;

    // Without that word nothing proves that the process before is gone.
    platform.gateway.idle().await;
    std::fs::remove_file(state.path().join(&before).join("holder")).expect("it was left");
    platform = platform.kill_and_restart(async |_| {}).await;
    assert_ne!(node(&platform.gateway), before);
    platform.gateway.until_printed("Node Id Not Free").await;
    platform.finish().await;
}

/// What the holder of an id does when another process has tried to renew its lease.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_that_another_process_left_under_this_id_are_taken_over() {
    let state = Scratch::new("state");
    let platform = start(&state, LEASE_S).await;
    let (gateway, fleet) = (&platform.gateway, platform.fleet());
    let mut ids = BTreeSet::new();
    accept(gateway, 1, &mut ids).await;
    let id = ids.first().expect("one").clone();
    // One that differs in its last digits, entered by nobody whom this process knows.
    let stranger = format!("{}{:04x}", &id[..32], u16::from_str_radix(&id[32..], 16).expect("hex") ^ 1);
    fleet.redis.order(&format!("HSET inflight:{{{}}} {stranger} 1:{HELLO}", node(gateway))).await;
    let mark = format!("nodes:{{{}}}:contested:{}", fleet.cloud.logs_table, node(gateway));
    fleet.redis.order(&format!("SET {mark} 1 PX 2000")).await;
    ids.insert(stranger);
    have_rows(&platform, &ids).await;
    platform.finish().await;
}

/// Nodes of an earlier version renew their lease without a token. Their ids, too, are left alone while they
/// live, and taken over when they are gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_of_an_earlier_version_is_told_from_a_dead_one() {
    let platform = start(&Scratch::new("state"), LEASE_S).await;
    let redis = &platform.fleet().redis;
    let nodes = format!("nodes:{{{}}}", platform.fleet().cloud.logs_table);
    for (is_alive, id) in [(true, "0000abcd"), (false, "0000abce")] {
        let state = Scratch::new("earlier");
        leave_directory(state.path(), id);
        let renew = async |more_s: u64| {
            let Reply::Array(time) = redis.order("TIME").await else { panic!("TIME is an array") };
            let Reply::Bulk(seconds) = &time[0] else { panic!("TIME has seconds") };
            let now: u64 = String::from_utf8_lossy(seconds).parse().expect("a number");
            redis.order(&format!("ZADD {nodes} {} {id}", (now + more_s) * 1000)).await;
        };
        // Longer than the start may take.
        renew(3600).await;
        let renewed = async {
            let mut more_s = 3600;
            loop {
                more_s += 10;
                renew(more_s).await;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        let gateway = tokio::select! {
            gateway = start_on(&platform, &state) => gateway,
            () = renewed, if is_alive => unreachable!("it renews for ever"),
        };
        assert_eq!(node(&gateway) == id, !is_alive, "{}", gateway.output().tail(20));
        gateway.finish().await;
    }
    platform.finish().await;
}

fn leave_directory(state: &Path, node: &str) {
    let dir = state.join(node);
    std::fs::create_dir_all(&dir).expect("the scratch directory is writable");
    std::fs::write(dir.join("lock"), "").expect("the scratch directory is writable");
}
