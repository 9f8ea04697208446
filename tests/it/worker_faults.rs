//! `infra-controller worker` through faults: Redis, the queue or the bucket is away, or the worker is killed.
//! Each job has one result in the record, and nothing is left on the queue.

use crate::harness::aws_proxy::{AwsProxy, Faults, Policy};
use crate::harness::gateway::is_pending;
use crate::harness::hold::Hold;
use crate::harness::leftovers::Leftovers;
use crate::harness::own_worker::{OwnWorker, WorkerSetup};
use crate::harness::platform::HELLO;
use crate::harness::redis_proxy::RedisProxy;
use crate::harness::{Gateway, Platform, SOON, Setup, eventually};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// The variable with the number of jobs that run when a worker is killed.
const JOBS: &str = "SOAK_JOBS";
const JOBS_DEFAULT: usize = 20;
/// Everything is down.
const DOWN: Faults = Faults {
    batches: 0,
    entries: 0,
    lost_answers: 0,
    throttled: 0,
    unprocessed: 0,
    queue_down: 100,
    tables_down: 100,
};

async fn fleet() -> Platform {
    Setup::serve().no_worker().start().await
}

fn worker_of(platform: &Platform) -> WorkerSetup {
    WorkerSetup::new(&platform.fleet().cloud, &platform.fleet().redis)
}

/// Accepts jobs that are held, one after the other.
async fn accept(gateway: &Gateway, hold: &Hold, jobs: usize) -> Vec<String> {
    let mut ids = Vec::new();
    for n in 0..jobs {
        ids.push(gateway.run_async(&hold.function, &hold.input(&format!("run-{n}-end"))).await);
    }
    ids
}

/// Waits until each job has its own result and one row, and the queue is empty.
async fn settle(platform: &Platform, ids: &[String], rows: usize) {
    for (n, id) in ids.iter().enumerate() {
        let result = platform.gateway.result_of(id).await.json();
        assert_eq!((&result["status"], &result["requestId"]), (&json!("SUCCESS"), &json!(id)), "{result}");
        let token = format!("run-{n}-end");
        assert!(result["stdout"].as_str().is_some_and(|text| text.contains(&token)), "{token}: {result}");
    }
    let cloud = &platform.fleet().cloud;
    let stored = cloud.wait_for_rows(HELLO, rows).await;
    assert!(stored.iter().all(|row| row["status"]["S"] == "SUCCESS"), "{stored:?}");
    eventually("an empty queue", 3 * SOON, || async {
        let left = cloud.messages(&cloud.queue_url).await;
        if left == 0 { Ok(()) } else { Err(format!("{left} messages")) }
    })
    .await;
}

/// Waits until `/health` reports this check as failed.
async fn wait_for_error(worker: &OwnWorker, check: &str, status: u16) {
    let is_failed =
        |given, health: &Value| given == status && health["checks"][check]["status"] == json!("ERROR");
    worker.wait_for_health(&format!("{check} is away"), is_failed).await;
}

async fn wait_for_health(worker: &OwnWorker) {
    worker.wait_for_health("all is well", |_, health| health["status"] == "OK").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn results_survive_an_outage_of_redis() {
    let platform = fleet().await;
    let redis = RedisProxy::to(&platform.fleet().redis).await;
    let worker = worker_of(&platform).env("REDIS_URL", &redis.url()).start().await;
    let hold = platform.hold().await;
    let ids = accept(&platform.gateway, &hold, 3).await;
    hold.wait_for_runs(3).await;
    redis.cut();
    hold.release();
    worker.wait_for_metric_at_least("infra_worker_results_retried_total", 1.0).await;
    wait_for_error(&worker, "results", 503).await;
    for id in &ids {
        assert!(is_pending(&platform.gateway.get(&format!("/status/{id}")).await), "there is no result yet");
    }
    redis.restore();
    settle(&platform, &ids, 3).await;
    wait_for_health(&worker).await;
    assert_eq!(hold.begun().len(), 3, "each job runs once");
    worker.stop().await;
    platform.finish().await;
}

/// Redis restarts without data, as after a failover without a replica.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn results_survive_a_redis_that_loses_its_data() {
    let mut platform = fleet().await;
    let worker = worker_of(&platform).start().await;
    let hold = platform.hold().await;
    let ids = accept(&platform.gateway, &hold, 3).await;
    hold.wait_for_runs(3).await;
    platform.fleet_mut().redis.kill();
    hold.release();
    wait_for_error(&worker, "results", 503).await;
    platform.fleet_mut().redis.restart().await;
    platform.gateway.wait_for_health("Redis is back", |status, _| status == 200).await;
    settle(&platform, &ids, 3).await;
    assert_eq!(hold.begun().len(), 3, "each job runs once");
    worker.stop().await;
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_survive_an_outage_of_the_queue() {
    let platform = fleet().await;
    let sqs = AwsProxy::start(&platform.fleet().cloud, Policy::Fail(1)).await;
    let endpoint = format!("http://{}", sqs.addr());
    let worker = worker_of(&platform).env("AWS_ENDPOINT_URL_SQS", &endpoint).start().await;
    let hold = platform.hold().await;
    let mut ids = accept(&platform.gateway, &hold, 3).await;
    hold.wait_for_runs(3).await;
    sqs.inject(DOWN);
    hold.release();
    // Clients have their results, although no message can be deleted.
    for id in &ids {
        platform.gateway.result_of(id).await;
    }
    worker.wait_for_metric_at_least("infra_worker_receive_failures_total", 1.0).await;
    wait_for_error(&worker, "queue", 503).await;
    let late = platform.gateway.run_async(HELLO, &json!({ "token": "run-3-end" })).await;
    assert!(is_pending(&platform.gateway.get(&format!("/status/{late}")).await), "nobody can receive it");
    sqs.inject(Faults::default());
    ids.push(late);
    settle(&platform, &ids, 4).await;
    wait_for_health(&worker).await;
    assert_eq!(hold.begun().len(), 3, "each job runs once");
    worker.stop().await;
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_wait_for_a_bucket_that_is_away() {
    let platform = fleet().await;
    let s3 = AwsProxy::start(&platform.fleet().cloud, Policy::Fail(1)).await;
    let endpoint = format!("http://{}", s3.addr());
    let worker = worker_of(&platform).env("AWS_ENDPOINT_URL_S3", &endpoint).start().await;
    s3.inject(DOWN);
    let id = platform.gateway.run_async(HELLO, &json!({ "token": "run-0-end" })).await;
    // Jobs whose code is on the disk still run, so the worker is not unhealthy. It tries again for a while.
    // That the job goes back after that is part of the test of the metrics.
    wait_for_error(&worker, "code", 200).await;
    assert!(is_pending(&platform.gateway.get(&format!("/status/{id}")).await), "there is no result yet");
    s3.inject(Faults::default());
    settle(&platform, &[id], 1).await;
    wait_for_health(&worker).await;
    worker.stop().await;
    platform.finish().await;
}

/// A run that takes longer than its lease is not delivered again: the lease is extended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_run_keeps_its_job() {
    // The shortest lease is 30 s, and it is extended when a third of it has passed.
    const EXTENSIONS: f64 = 4.0;
    let platform = fleet().await;
    let worker = worker_of(&platform).with("jobs.visibility_s", 30).start().await;
    let hold = platform.hold().await;
    let ids = accept(&platform.gateway, &hold, 1).await;
    hold.wait_for_runs(1).await;
    worker.wait_for_metric_at_least("infra_worker_leases_extended_total", EXTENSIONS).await;
    hold.release();
    settle(&platform, &ids, 1).await;
    assert_eq!(hold.begun(), ids, "it has begun once");
    worker.stop().await;
    platform.finish().await;
}

/// With SIGKILL, while many jobs run. Each runs again, once, on another worker. In `make soak-worker` there
/// are more of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_of_a_killed_worker_run_again_once() {
    let jobs = std::env::var(JOBS).map_or(JOBS_DEFAULT, |n| n.parse().expect("SOAK_JOBS is a number"));
    let platform = fleet().await;
    let gateway = &platform.gateway;
    // As many places as jobs: otherwise the emulator may hand a job to the connection of the dead worker. The
    // jobs use a small part of the memory that they may have.
    let setup = || worker_of(&platform).with("capacity.runs_max", jobs).with("capacity.memory_mb", 1_000_000);
    let first = setup().start().await;
    let hold = platform.hold().await;
    let ids = accept(gateway, &hold, jobs).await;
    hold.wait_for_runs(jobs).await;
    let (pid, runs_dir) = (first.process().pid(), first.runs_dir());
    first.kill();
    hold.wait_for_none().await;

    let second = setup().start().await;
    Leftovers::wait_for_none_after(pid, &runs_dir).await;
    hold.wait_for_runs(2 * jobs).await;
    hold.release();
    settle(&platform, &ids, jobs).await;
    let mut begun: BTreeMap<String, usize> = BTreeMap::new();
    for id in hold.begun() {
        *begun.entry(id).or_default() += 1;
    }
    assert!(ids.iter().all(|id| begun.get(id) == Some(&2)) && begun.len() == jobs, "{begun:?}");
    gateway.wait_until_idle().await;
    platform.fleet().cloud.wait_for_invocations(HELLO, jobs).await;
    second.stop().await;
    platform.finish().await;
}
