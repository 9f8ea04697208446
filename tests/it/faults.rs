//! What breaks under load, and what must be true afterwards: every job that was accepted has exactly one row with the
//! status that its worker gave, the counters of its function say the same, and nothing is left over.
//!
//! `make test` has each fault once, and short. `make chaos` sets `CHAOS_SEED`: then kills come ten times and outages
//! last up to a minute.

use crate::harness::crowd::{Crowd, FUNCTIONS, Manners, Reckoning};
use crate::harness::gateway::Conf;
use crate::harness::orders::Orders;
use crate::harness::platform::new_key;
use crate::harness::process::Scratch;
use crate::harness::proxy::{Faults, Policy};
use crate::harness::{Gateway, Platform, Setup, eventually};
use nix::sys::signal::Signal;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::time::Duration;

/// Says which faults come when; set by `make chaos`.
const SEED: &str = "CHAOS_SEED";
/// Of the nodes in these tests.
const LEASE: Duration = Duration::from_secs(2);
/// By then everything is settled after the last fault: a job that was never sent is lost at its deadline, and found so
/// by a look-up.
const SETTLED: Duration = Duration::from_secs(60);

/// From when all is well to the result of the last order of each client.
const LAST_ORDERS: Duration = Duration::from_secs(30);

/// How much of it.
struct Scale {
    seed: u64,
    /// Kills.
    times: u32,
    /// Seconds for which something is away, one round each.
    outages_s: &'static [u64],
}

impl Scale {
    fn of_this_run() -> Self {
        match std::env::var(SEED) {
            Ok(seed) => Self {
                seed: seed.parse().expect("CHAOS_SEED is a number"),
                times: 10,
                outages_s: &[1, 10, 60],
            },
            Err(_) => Self { seed: 1, times: 1, outages_s: &[4] },
        }
    }
}

/// No limits, and jobs that are given up soon.
fn limits() -> String {
    "limit = []\n[waits]\njob_deadline_s = 12\n[batch]\nsend_deadline_ms = 3000\n".into()
}

/// A platform under load, and a second node if asked for.
struct Stage {
    name: &'static str,
    platform: Platform,
    other: Option<Gateway>,
    crowd: Crowd,
    rng: SmallRng,
    scale: Scale,
    _state: Scratch,
}

impl Stage {
    async fn set(name: &'static str, policy: impl FnOnce(u64) -> Policy, manners: Manners) -> Self {
        let scale = Scale::of_this_run();
        let state = Scratch::new("state");
        let platform = Setup::serve()
            .policy(policy(scale.seed))
            .conf(Conf {
                server: format!("[fleet]\nlease_s = {}\n", LEASE.as_secs()),
                limits: limits(),
                ..Conf::default()
            })
            .env("STATE_DIR", state.path().to_str().expect("the path is UTF-8"))
            .start()
            .await;
        for function in FUNCTIONS {
            platform.fleet().cloud.put_function(function).await;
        }
        let crowd = Crowd::start(&[&platform.gateway], scale.seed, manners);
        let rng = SmallRng::seed_from_u64(scale.seed);
        Self { name, platform, other: None, crowd, rng, scale, _state: state }
    }

    /// One more node, which takes its part of the load.
    async fn add_node(&mut self) {
        let other = self.platform.fleet().start_gateway().await;
        self.crowd.knock_at(&[&self.platform.gateway, &other]);
        self.other = Some(other);
    }

    /// Some load, for a time that is not the same each time.
    async fn go_on(&mut self) {
        tokio::time::sleep(Duration::from_millis(self.rng.random_range(700..1500))).await;
    }

    /// Lets those that ask be answered, and reckons.
    async fn reckon(self) -> Reckoning {
        let Self { name, platform, other, crowd, scale, .. } = self;
        let record = crowd.stop().await;
        let gateways: Vec<&Gateway> = [&platform.gateway].into_iter().chain(&other).collect();
        let reckoning = record.reckon(platform.fleet(), &gateways, SETTLED).await;
        println!("{name}, seed {}: {reckoning:?}", scale.seed);
        if let Some(other) = other {
            other.finish().await;
        }
        platform.finish().await;
        reckoning
    }
}

fn none(_: u64) -> Policy {
    Policy::PassAll
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_two_nodes_is_killed() {
    let mut stage = Stage::set("one of two nodes killed", none, Manners::default()).await;
    for _ in 0..stage.scale.times {
        stage.add_node().await;
        stage.go_on().await;
        let other = stage.other.take().expect("added above");
        other.kill();
        stage.crowd.knock_at(&[&stage.platform.gateway]);
        stage.go_on().await;
    }
    // One that is started again on the directory of the one before goes on with its jobs itself; the last is not.
    eventually("an adoption", SETTLED, || async {
        let adopted = stage.platform.gateway.metric("infra_nodes_adopted_total").await;
        if adopted >= Some(1.0) { Ok(()) } else { Err(format!("{adopted:?}")) }
    })
    .await;
    stage.reckon().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_only_node_is_killed_and_started_again() {
    let mut stage = Stage::set("the only node killed", none, Manners::default()).await;
    for _ in 0..stage.scale.times {
        stage.go_on().await;
        stage.platform = stage.platform.kill_and_restart(async |_| {}).await;
        stage.crowd.knock_at(&[&stage.platform.gateway]);
    }
    stage.go_on().await;
    stage.reckon().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_is_frozen_past_its_lease() {
    let mut stage = Stage::set("a node frozen", none, Manners::default()).await;
    stage.add_node().await;
    stage.go_on().await;
    let other = stage.other.as_ref().expect("added above");
    other.signal(Signal::SIGSTOP);
    stage.platform.gateway.wait_for_metric("infra_nodes_adopted_total", 1.0).await;
    stage.go_on().await;
    stage.other.as_ref().expect("added above").signal(Signal::SIGCONT);
    stage.go_on().await;
    stage.reckon().await;
}

/// Clients that repeat their orders through kills of nodes and errors of the queue: each has its result soon after all
/// is well, each key has one id, and each id one row.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orders_are_repeated_through_kills_and_queue_errors() {
    let scale = Scale::of_this_run();
    let mut rng = SmallRng::seed_from_u64(scale.seed);
    let is_chaos = scale.times > 1;
    let (clients, kills, errors_s) = if is_chaos { (24, 8, 8) } else { (8, 2, 2) };
    let state = Scratch::new("state");
    let limits = "limit = []\n[waits]\njob_deadline_s = 120\n[batch]\nsend_deadline_ms = 3000\n".into();
    let server = format!("[fleet]\nlease_s = {}\n", LEASE.as_secs());
    let mut platform = Setup::serve()
        .policy(Policy::Fail(scale.seed))
        .conf(Conf { server, limits, ..Conf::default() })
        .env("STATE_DIR", state.path().to_str().expect("the path is UTF-8"))
        .start()
        .await;
    for function in FUNCTIONS {
        platform.fleet().cloud.put_function(function).await;
    }
    let mut other = platform.fleet().start_gateway().await;
    let orders = Orders::start(&[&platform.gateway, &other], clients, scale.seed);
    let fail = |platform: &Platform, faults| platform.fleet().proxy.as_ref().expect("asked for").fail(faults);
    let some = Faults { entries: 20, batches: 10, answers: 5, ..Faults::default() };
    for n in 0..kills {
        fail(&platform, if n % 2 == 0 { some } else { Faults { entries: 100, ..Faults::default() } });
        tokio::time::sleep(Duration::from_millis(rng.random_range(500..1500))).await;
        if n % 3 == 2 {
            platform = platform.kill_and_restart(async |_| {}).await;
        } else {
            other.kill();
            orders.knock_at(&[&platform.gateway]);
            other = platform.fleet().start_gateway().await;
        }
        orders.knock_at(&[&platform.gateway, &other]);
        fail(&platform, Faults::default());
        tokio::time::sleep(Duration::from_millis(rng.random_range(500..1500))).await;
    }
    fail(&platform, Faults { entries: 100, ..Faults::default() });
    tokio::time::sleep(Duration::from_secs(errors_s)).await;
    fail(&platform, Faults::default());
    let record = orders.finish(LAST_ORDERS).await;
    let reckoning = record.reckon(platform.fleet(), &[&platform.gateway, &other], SETTLED).await;
    println!("orders, seed {}: {reckoning:?}", scale.seed);
    assert_eq!(reckoning.rows.keys().collect::<Vec<_>>(), ["SUCCESS"]);
    other.finish().await;
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dev_is_killed_and_started_again() {
    let scale = Scale::of_this_run();
    let mut rng = SmallRng::seed_from_u64(scale.seed);
    let dir = Scratch::new("dev");
    // The runs share the machine with whatever else it does, and each kill breaks some off: they need their time.
    let limits = limits().replace("job_deadline_s = 12", "job_deadline_s = 45");
    let conf = Conf { limits, ..Conf::default() };
    conf.write(&dir.path().join("conf"));
    let path = |name: &str| dir.path().join(name).display().to_string();
    let args = ["dev", "--port", "0", "--data-dir", &path("data"), "--conf", &path("conf")];
    let key = new_key();
    let env = [("INFRA_API_KEY".to_owned(), key.clone())];
    let mut gateway = Gateway::start(&args, &env, &key, &[]).await;
    let manners = Manners { leave_percent: 10, is_plain: true, ..Manners::default() };
    let crowd = Crowd::start(&[&gateway], scale.seed, manners);
    for _ in 0..scale.times {
        tokio::time::sleep(Duration::from_millis(rng.random_range(1000..2000))).await;
        gateway.kill();
        gateway = Gateway::start(&args, &env, &key, &[]).await;
        crowd.knock_at(&[&gateway]);
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let reckoning = crowd.stop().await.reckon_dev(&gateway, 2 * SETTLED).await;
    println!("dev killed, seed {}: {reckoning:?}", scale.seed);
    gateway.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_is_killed_and_comes_back_empty() {
    let mut stage = Stage::set("Redis killed", none, Manners::default()).await;
    for seconds in stage.scale.outages_s {
        stage.go_on().await;
        stage.platform.fleet_mut().redis.kill();
        tokio::time::sleep(Duration::from_secs(*seconds)).await;
        stage.platform.fleet_mut().redis.restart();
        stage.go_on().await;
    }
    let reckoning = stage.reckon().await;
    assert!(reckoning.refused.contains_key(&503), "{reckoning:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_is_frozen() {
    let mut stage = Stage::set("Redis frozen", none, Manners::default()).await;
    stage.go_on().await;
    stage.platform.fleet().redis.signal(Signal::SIGSTOP);
    tokio::time::sleep(Duration::from_secs(5)).await;
    stage.platform.fleet().redis.signal(Signal::SIGCONT);
    stage.go_on().await;
    stage.reckon().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_queue_fails() {
    let mut stage = Stage::set("the queue fails", Policy::Fail, Manners::default()).await;
    for faults in [
        Faults { batches: 30, ..Faults::default() },
        Faults { entries: 30, ..Faults::default() },
        Faults { answers: 30, ..Faults::default() },
    ] {
        stage.platform.fleet().proxy.as_ref().expect("asked for").fail(faults);
        for _ in 0..2 * stage.scale.times {
            stage.go_on().await;
        }
    }
    let away = Faults { queue_away: 100, ..Faults::default() };
    stage.platform.fleet().proxy.as_ref().expect("asked for").fail(away);
    // Longer than a send is tried.
    tokio::time::sleep(Duration::from_secs(4)).await;
    stage.platform.fleet().proxy.as_ref().expect("asked for").fail(Faults::default());
    let reckoning = stage.reckon().await;
    assert!(reckoning.refused.contains_key(&503), "{reckoning:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_tables_fail() {
    let mut stage = Stage::set("the tables fail", Policy::Fail, Manners::default()).await;
    let unprocessed = Faults { unprocessed: 50, throttled: 30, ..Faults::default() };
    stage.platform.fleet().proxy.as_ref().expect("asked for").fail(unprocessed);
    for _ in 0..2 * stage.scale.times {
        stage.go_on().await;
    }
    let away = Faults { tables_away: 100, ..Faults::default() };
    stage.platform.fleet().proxy.as_ref().expect("asked for").fail(away);
    let seconds = stage.scale.outages_s.last().expect("at least one");
    tokio::time::sleep(Duration::from_secs(*seconds)).await;
    // Cached functions keep running.
    let accepted = stage.platform.gateway.metric("infra_jobs_accepted_total").await;
    stage.go_on().await;
    assert!(stage.platform.gateway.metric("infra_jobs_accepted_total").await > accepted);
    // Rows wait on the disk, and the node says so.
    let health = stage.platform.gateway.anonymous("GET", "/health").send().await.expect(200).json();
    assert_eq!(health["status"], "DEGRADED", "{health}");
    assert!(health["checks"]["spill"]["rows"].as_u64() > Some(0), "{health}");
    stage.platform = stage
        .platform
        .kill_and_restart(async |fleet| {
            fleet.proxy.as_ref().expect("asked for").fail(Faults::default());
        })
        .await;
    stage.crowd.knock_at(&[&stage.platform.gateway]);
    stage.go_on().await;
    stage.reckon().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_leave_and_workers_are_odd() {
    let manners = Manners { leave_percent: 30, odd_percent: 50, is_plain: false };
    let mut stage = Stage::set("odd clients and workers", none, manners).await;
    for _ in 0..3 * stage.scale.times {
        stage.go_on().await;
    }
    let gateway = &stage.platform.gateway;
    for kind in ["repeated", "unknown_job"] {
        let series = format!("infra_results_total{{kind=\"{kind}\"}}");
        eventually(kind, SETTLED, || async {
            let count = gateway.metric(&series).await;
            if count > Some(0.0) { Ok(()) } else { Err(format!("{count:?}")) }
        })
        .await;
    }
    stage.reckon().await;
}
