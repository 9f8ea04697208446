//! Faults under load. Afterwards every accepted job has exactly one row, with the status that its worker
//! reported. The counters of its function agree, and nothing is left in queue or journal.
//!
//! `make test` injects each fault once, for a short time. `make chaos` sets `CHAOS_SEED`: then there are ten
//! kills, and outages last up to a minute.

use crate::harness::aws_proxy::{Faults, Policy};
use crate::harness::gateway::Conf;
use crate::harness::load_clients::{ClientMix, FUNCTIONS, LoadClients, Reconciliation};
use crate::harness::platform::new_key;
use crate::harness::process::Scratch;
use crate::harness::retrying_clients::RetryingClients;
use crate::harness::{Gateway, Platform, Setup, pause};
use nix::sys::signal::Signal;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;
use std::time::Duration;

/// The seed of the faults; set by `make chaos`.
const SEED: &str = "CHAOS_SEED";
/// The lease of the nodes in these tests.
const LEASE: Duration = Duration::from_secs(2);
/// Deadline for everything to settle after the last fault. A job that was never sent is lost at its deadline,
/// which a look-up notices.
const SETTLED: Duration = Duration::from_secs(60);

/// From the recovery to the result of the last request of each client. Without a retry that takes the job
/// over, a result would come at the deadline of the job, after two minutes.
const LAST_REQUESTS: Duration = Duration::from_secs(60);

/// The number and the length of the faults.
struct Scale {
    seed: u64,
    kills: u32,
    /// Length of the outages in seconds; one round each.
    outages_s: &'static [u64],
}

impl Scale {
    fn of_this_run() -> Self {
        match std::env::var(SEED) {
            Ok(seed) => Self {
                seed: seed.parse().expect("CHAOS_SEED is a number"),
                kills: 10,
                outages_s: &[1, 10, 60],
            },
            Err(_) => Self { seed: 1, kills: 1, outages_s: &[4] },
        }
    }
}

/// No limits, and short deadlines of jobs.
fn limits() -> String {
    "limit = []\n[waits]\njob_deadline_s = 12\n[batch]\nsend_deadline_ms = 3000\n".into()
}

/// A platform under load, with a second node on request.
struct Fixture {
    name: &'static str,
    platform: Platform,
    other: Option<Gateway>,
    clients: LoadClients,
    rng: SmallRng,
    scale: Scale,
    _state: Scratch,
}

impl Fixture {
    async fn start(name: &'static str, policy: impl FnOnce(u64) -> Policy, mix: ClientMix) -> Self {
        let scale = Scale::of_this_run();
        let state = Scratch::new("state");
        let setup = Setup::serve();
        // Our own worker reports nothing unusual.
        let setup = if mix.fault_percent > 0 { setup.python_worker() } else { setup };
        let platform = setup
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
        let clients = LoadClients::start(&[&platform.gateway], scale.seed, mix);
        let rng = SmallRng::seed_from_u64(scale.seed);
        Self { name, platform, other: None, clients, rng, scale, _state: state }
    }

    /// Starts one more node, and sends it a part of the load.
    async fn add_node(&mut self) {
        let other = self.platform.fleet().start_gateway().await;
        self.clients.targets.set(&[&self.platform.gateway, &other]);
        self.other = Some(other);
    }

    /// Kills the first gateway and starts it again.
    async fn restart_gateway(self) -> Self {
        let platform = self.platform.kill_and_restart(async |_| {}).await;
        self.clients.targets.set(&[&platform.gateway]);
        Self { platform, ..self }
    }

    fn inject(&self, faults: Faults) {
        self.platform.fleet().proxy.as_ref().expect("the policy has a proxy").inject(faults);
    }

    /// Waits for some more requests, a different number each time.
    async fn run_load(&mut self) {
        self.clients.counts.wait_for_more(self.rng.random_range(30..60)).await;
    }

    /// Stops the load and reconciles.
    async fn reconcile(self) -> Reconciliation {
        let Self { name, platform, other, clients, scale, .. } = self;
        let record = clients.stop().await;
        let gateways: Vec<&Gateway> = [&platform.gateway].into_iter().chain(&other).collect();
        let found = record.reconcile(platform.fleet(), &gateways, SETTLED).await;
        println!("{name}, seed {}: {found:?}", scale.seed);
        if let Some(other) = other {
            other.finish().await;
        }
        platform.finish().await;
        found
    }
}

fn no_proxy(_: u64) -> Policy {
    Policy::PassAll
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_survive_the_kill_of_one_of_two_nodes() {
    let mut fixture = Fixture::start("one of two nodes killed", no_proxy, ClientMix::default()).await;
    for _ in 0..fixture.scale.kills {
        fixture.add_node().await;
        fixture.run_load().await;
        let other = fixture.other.take().expect("added above");
        other.kill();
        fixture.clients.targets.set(&[&fixture.platform.gateway]);
        fixture.run_load().await;
    }
    // A node that starts in the directory of a killed node resumes the jobs itself. The last killed node has
    // no successor.
    fixture.platform.gateway.wait_for_metric_at_least("infra_nodes_adopted_total", 1.0).await;
    fixture.reconcile().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_survive_restarts_of_the_only_node() {
    let mut fixture = Fixture::start("the only node killed", no_proxy, ClientMix::default()).await;
    for _ in 0..fixture.scale.kills {
        fixture.run_load().await;
        fixture = fixture.restart_gateway().await;
    }
    fixture.run_load().await;
    fixture.reconcile().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_survive_a_node_frozen_past_its_lease() {
    let mut fixture = Fixture::start("a node frozen", no_proxy, ClientMix::default()).await;
    fixture.add_node().await;
    fixture.run_load().await;
    fixture.other.as_ref().expect("added above").signal(Signal::SIGSTOP);
    fixture.platform.gateway.wait_for_metric_at_least("infra_nodes_adopted_total", 1.0).await;
    // Not more load: every client may wait for the frozen node.
    pause(Duration::from_secs(1)).await;
    fixture.other.as_ref().expect("added above").signal(Signal::SIGCONT);
    fixture.run_load().await;
    fixture.reconcile().await;
}

/// Clients retry through kills of nodes and errors of the queue. Each has its result soon after the recovery,
/// each key has one id, and each id has one row.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retried_requests_run_once_through_kills_and_queue_errors() {
    let scale = Scale::of_this_run();
    let mut rng = SmallRng::seed_from_u64(scale.seed);
    let is_chaos = scale.kills > 1;
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
    let clients = RetryingClients::start(&[&platform.gateway, &other], clients, scale.seed);
    let inject = |platform: &Platform, faults| {
        platform.fleet().proxy.as_ref().expect("the policy has a proxy").inject(faults);
    };
    let some = Faults { entries: 20, batches: 10, lost_answers: 5, ..Faults::default() };
    for n in 0..kills {
        inject(&platform, if n % 2 == 0 { some } else { Faults { entries: 100, ..Faults::default() } });
        clients.counts.wait_for_more(rng.random_range(5..20)).await;
        if n % 3 == 2 {
            platform = platform.kill_and_restart(async |_| {}).await;
        } else {
            other.kill();
            clients.targets.set(&[&platform.gateway]);
            other = platform.fleet().start_gateway().await;
        }
        clients.targets.set(&[&platform.gateway, &other]);
        inject(&platform, Faults::default());
        clients.counts.wait_for_more(rng.random_range(5..20)).await;
    }
    inject(&platform, Faults { entries: 100, ..Faults::default() });
    pause(Duration::from_secs(errors_s)).await;
    clients.counts.wait_for_unavailable().await;
    inject(&platform, Faults::default());
    let record = clients.finish(LAST_REQUESTS).await;
    let found = record.reconcile(platform.fleet(), &[&platform.gateway, &other], SETTLED).await;
    println!("retried requests, seed {}: {found:?}", scale.seed);
    assert_eq!(found.rows.keys().collect::<Vec<_>>(), ["SUCCESS"]);
    other.finish().await;
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_survive_restarts_of_dev() {
    let scale = Scale::of_this_run();
    let mut rng = SmallRng::seed_from_u64(scale.seed);
    let dir = Scratch::new("dev");
    // Each kill interrupts runs, and a busy machine runs them slowly.
    let limits = limits().replace("job_deadline_s = 12", "job_deadline_s = 45");
    let conf = Conf { limits, ..Conf::default() };
    conf.write(&dir.path().join("conf"));
    let path = |name: &str| dir.path().join(name).display().to_string();
    let args = ["dev", "--port", "0", "--data-dir", &path("data"), "--conf", &path("conf")];
    let key = new_key();
    let env = [("INFRA_API_KEY".to_owned(), key.clone())];
    let mut gateway = Gateway::start(&args, &env, &key, &[]).await;
    let mix = ClientMix { disconnect_percent: 10, echo_only: true, ..ClientMix::default() };
    let clients = LoadClients::start(&[&gateway], scale.seed, mix);
    for _ in 0..scale.kills {
        clients.counts.wait_for_more(rng.random_range(20..40)).await;
        gateway.kill();
        gateway = Gateway::start(&args, &env, &key, &[]).await;
        clients.targets.set(&[&gateway]);
    }
    clients.counts.wait_for_more(20).await;
    let found = clients.stop().await.reconcile_dev(&gateway, 2 * SETTLED).await;
    println!("dev killed, seed {}: {found:?}", scale.seed);
    gateway.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_survive_a_redis_that_loses_its_data() {
    let mut fixture = Fixture::start("Redis killed", no_proxy, ClientMix::default()).await;
    for seconds in fixture.scale.outages_s {
        fixture.run_load().await;
        fixture.platform.fleet_mut().redis.kill();
        pause(Duration::from_secs(*seconds)).await;
        fixture.clients.counts.wait_for_unavailable().await;
        fixture.platform.fleet_mut().redis.restart().await;
        fixture.run_load().await;
    }
    fixture.reconcile().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_survive_a_frozen_redis() {
    let mut fixture = Fixture::start("Redis frozen", no_proxy, ClientMix::default()).await;
    fixture.run_load().await;
    fixture.platform.fleet().redis.signal(Signal::SIGSTOP);
    pause(Duration::from_secs(5)).await;
    fixture.platform.fleet().redis.signal(Signal::SIGCONT);
    fixture.run_load().await;
    fixture.reconcile().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_survive_queue_errors() {
    let mut fixture = Fixture::start("queue errors", Policy::Fail, ClientMix::default()).await;
    for faults in [
        Faults { batches: 30, ..Faults::default() },
        Faults { entries: 30, ..Faults::default() },
        Faults { lost_answers: 30, ..Faults::default() },
    ] {
        fixture.inject(faults);
        for _ in 0..2 * fixture.scale.kills {
            fixture.run_load().await;
        }
    }
    fixture.inject(Faults { queue_down: 100, ..Faults::default() });
    // Until sends are given up.
    fixture.clients.counts.wait_for_unavailable().await;
    fixture.inject(Faults::default());
    fixture.reconcile().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_survive_table_errors() {
    let mut fixture = Fixture::start("table errors", Policy::Fail, ClientMix::default()).await;
    fixture.inject(Faults { unprocessed: 50, throttled: 30, ..Faults::default() });
    for _ in 0..2 * fixture.scale.kills {
        fixture.run_load().await;
    }
    fixture.inject(Faults { tables_down: 100, ..Faults::default() });
    let seconds = fixture.scale.outages_s.last().expect("at least one");
    pause(Duration::from_secs(*seconds)).await;
    // Rows are spilled to the disk, and `/health` reports it.
    let is_spilling = |status, health: &Value| {
        let rows = health["checks"]["spill"]["rows"].as_u64();
        status == 200 && health["status"] == "DEGRADED" && rows > Some(0)
    };
    fixture.platform.gateway.wait_for_health("rows are on the disk", is_spilling).await;
    // Cached functions keep running.
    let accepted = "infra_jobs_accepted_total";
    let before = fixture.platform.gateway.metric(accepted).await.expect("the series exists");
    fixture.platform.gateway.wait_for_metric_at_least(accepted, before + 1.0).await;
    let platform = fixture.platform.kill_and_restart(async |fleet| {
        fleet.proxy.as_ref().expect("the policy has a proxy").inject(Faults::default());
    });
    fixture.platform = platform.await;
    fixture.clients.targets.set(&[&fixture.platform.gateway]);
    fixture.run_load().await;
    fixture.reconcile().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_survive_disconnects_and_faulty_workers() {
    let mix = ClientMix { disconnect_percent: 30, fault_percent: 50, echo_only: false };
    let mut fixture = Fixture::start("disconnects and faulty workers", no_proxy, mix).await;
    for _ in 0..3 * fixture.scale.kills {
        fixture.run_load().await;
    }
    let gateway = &fixture.platform.gateway;
    for kind in ["repeated", "unknown_job"] {
        gateway.wait_for_metric_at_least(&format!("infra_results_total{{kind=\"{kind}\"}}"), 1.0).await;
    }
    fixture.reconcile().await;
}
