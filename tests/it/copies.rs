//! Two processes on copies of one `STATE_DIR`, so with one node id. Each accepted run has its row, whichever
//! process dies.

use crate::harness::gateway::Conf;
use crate::harness::platform::HELLO;
use crate::harness::process::Scratch;
use crate::harness::redis::Reply;
use crate::harness::{Gateway, Platform, SOON, Setup, eventually, pause};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Long enough that a busy machine does not keep a live node from renewing its lease.
const LEASE_S: u64 = 10;
/// The start-up deadline: longer than a start waits for a lease to expire.
const START_S: u64 = 60;
/// Deadline for the rows: by then every job has passed its own deadline.
const SETTLED: Duration = Duration::from_secs(90);

const LOST: &str = "infra_node_id_lost";

async fn start(state: &Scratch, lease_s: u64, start_s: u64) -> Platform {
    let conf = Conf {
        server: format!("[fleet]\nlease_s = {lease_s}\n[start]\ndeadline_s = {start_s}\n"),
        limits: "limit = []\n[waits]\njob_deadline_s = 6\n[batch]\nsend_deadline_ms = 1000\n".into(),
        ..Conf::default()
    };
    Setup::serve().no_worker().conf(conf).env("STATE_DIR", &state.path().display().to_string()).start().await
}

/// A copy as made by an operator.
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

/// Waits until each job has one row, and there are no other rows.
async fn have_rows(platform: &Platform, ids: &BTreeSet<String>, deadline: Duration) {
    eventually("a row for each accepted run", deadline, || async {
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
    gateway.wait_for_exit(SOON).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_of_a_live_node_takes_another_id() {
    let state = Scratch::new("state");
    let platform = start(&state, LEASE_S, START_S).await;
    let mut ids = BTreeSet::new();
    accept(&platform.gateway, 3, &mut ids).await;
    let copy = copied(&state);
    let other = start_on(&platform, &copy).await;
    assert_ne!(node(&other), node(&platform.gateway));
    other.wait_for_output("Node id is in use").await;
    accept(&platform.gateway, 3, &mut ids).await;
    accept(&other, 3, &mut ids).await;
    assert_eq!(platform.gateway.metric(LOST).await, Some(0.0), "the first process keeps its id");
    kill(&platform.gateway).await;
    have_rows(&platform, &ids, SETTLED).await;
    other.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_two_copies_of_a_dead_node_takes_its_id() {
    let state = Scratch::new("state");
    let platform = start(&state, LEASE_S, START_S).await;
    let mut ids = BTreeSet::new();
    accept(&platform.gateway, 3, &mut ids).await;
    let dead = node(&platform.gateway);
    kill(&platform.gateway).await;
    let (one, two) = (copied(&state), copied(&state));
    let (one, two) = tokio::join!(start_on(&platform, &one), start_on(&platform, &two));
    assert_ne!(node(&one), node(&two));
    let (heir, other) = if node(&one) == dead { (one, two) } else { (two, one) };
    assert_eq!(node(&heir), dead, "its lease has expired");
    for gateway in [&heir, &other] {
        gateway.wait_for_output("Node id is held by another process").await;
        accept(gateway, 2, &mut ids).await;
    }
    kill(&heir).await;
    have_rows(&platform, &ids, SETTLED).await;
    other.finish().await;
}

/// A copy that starts while the original is frozen takes over the id. The original must not admit jobs under
/// it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_lost_its_id_admits_nothing_until_it_regains_it() {
    let state = Scratch::new("state");
    let platform = start(&state, LEASE_S, START_S).await;
    let gateway = &platform.gateway;
    let mut ids = BTreeSet::new();
    accept(gateway, 2, &mut ids).await;
    gateway.signal(Signal::SIGSTOP);
    let copy = copied(&state);
    let heir = start_on(&platform, &copy).await;
    assert_eq!(node(&heir), node(gateway), "the lease has expired");
    gateway.signal(Signal::SIGCONT);
    gateway.wait_for_metric(LOST, 1.0).await;
    gateway.wait_for_output("Node id lost").await;
    let is_lost = |status, health: &Value| status == 503 && health["checks"]["nodeId"]["status"] == "ERROR";
    gateway.wait_for_health("the node id is lost", is_lost).await;
    gateway.anonymous("GET", "/readyz").send().await.expect(503);
    for is_async in ["true", "false"] {
        let refused = gateway.run(HELLO, &json!(1)).header("x-async", is_async).send().await.expect(503);
        assert_eq!(refused.json()["code"], "not_ready");
    }
    accept(&heir, 3, &mut ids).await;
    assert_eq!(heir.metric(LOST).await, Some(0.0));
    kill(&heir).await;

    gateway.wait_for_metric(LOST, 0.0).await;
    // It has regained its id, and admits jobs when its journal is complete.
    eventually("a ready node", SOON, || async {
        let ready = gateway.anonymous("GET", "/readyz").send().await;
        if ready.status == 200 { Ok(()) } else { Err(ready.text()) }
    })
    .await;
    accept(gateway, 1, &mut ids).await;
    have_rows(&platform, &ids, SETTLED).await;
    platform.finish().await;
}

/// The lease of the killed process expires in an hour. A restart keeps the id only if it need not wait for
/// that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_in_the_same_directory_keeps_the_id() {
    let state = Scratch::new("state");
    let platform = start(&state, 3600, LEASE_S).await;
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
            !platform.gateway.output().contains("Node id is held"),
            "{}",
            platform.gateway.output().tail(20)
        );
    }
    have_rows(&platform, &ids, SETTLED).await;

    // Without the file nothing proves that the last process is gone.
    platform.gateway.wait_until_idle().await;
    std::fs::remove_file(state.path().join(&before).join("holder")).expect("the last process has written it");
    platform = platform.kill_and_restart(async |_| {}).await;
    assert_ne!(node(&platform.gateway), before);
    platform.gateway.wait_for_output("The lease of a node id did not expire").await;
    platform.finish().await;
}

/// The holder of an id reads its journal again when another process has tried to renew its lease.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_of_another_process_with_this_id_are_taken_over() {
    let state = Scratch::new("state");
    // Every process reads its journal again when it has held its lease for this long. The mark makes it read
    // earlier.
    const LASTS_S: u64 = 60;
    let platform = start(&state, LASTS_S, START_S).await;
    let (gateway, fleet) = (&platform.gateway, platform.fleet());
    let mut ids = BTreeSet::new();
    accept(gateway, 1, &mut ids).await;
    let id = ids.first().expect("one").clone();
    // A job with other last digits, which this process has not entered.
    let stranger = format!("{}{:04x}", &id[..32], u16::from_str_radix(&id[32..], 16).expect("hex") ^ 1);
    fleet.redis.order(&format!("HSET inflight:{{{}}} {stranger} 1:{HELLO}", node(gateway))).await;
    let mark = format!("nodes:{{{}}}:contested:{}", fleet.cloud.logs_table, node(gateway));
    fleet.redis.order(&format!("SET {mark} 1 EX {LASTS_S}")).await;
    ids.insert(stranger);
    have_rows(&platform, &ids, Duration::from_secs(LASTS_S - 15)).await;
    platform.finish().await;
}

/// Nodes of an earlier version renew their leases without a token. Their ids, too, are taken over only when
/// they are dead.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ids_without_a_token_are_taken_over_only_without_renewals() {
    // A process without a token counts as dead when it has not renewed for three tenths of its lease: 12 s.
    let platform = start(&Scratch::new("state"), 40, START_S).await;
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
        // Longer than the start takes.
        renew(3600).await;
        let renewed = async {
            let mut more_s = 3600;
            loop {
                more_s += 10;
                renew(more_s).await;
                pause(Duration::from_millis(100)).await;
            }
        };
        let gateway = tokio::select! {
            gateway = start_on(&platform, &state) => gateway,
            () = renewed, if is_alive => unreachable!("it renews without end"),
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
