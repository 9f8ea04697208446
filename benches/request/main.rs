//! What a request costs, piece by piece: `make bench`, or `cargo bench --bench request -- NAME` for one piece.
//!
//! Each says what it took on 2 shared cores of an AMD EPYC (x86-64, Linux 6.18) on 2026-11-23, with everything in the cache
//! of the processor, which it is not in a server under load.

mod house;

use criterion::{Criterion, Throughput};
use futures_util::future::join_all;
use house::{House, RESULT};
use infra_controller::dispatch::Permits;
use infra_controller::limiter::RateLimitState;
use infra_controller::log;
use infra_controller::model::{
    Execution, FunctionId, JobDraft, JobId, JobTemplate, NodeId, Outcome, Recommendation, RunRequest, now_ms,
};
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

// As the server has it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Jobs under way at a time where a loop works in batches.
const TOGETHER: usize = 100;

fn main() {
    let mut criterion = Criterion::default().configure_from_args().without_plots();
    parse_and_build(&mut criterion);
    limiter_spend(&mut criterion);
    function_cache_hit(&mut criterion);
    asynchronous_run(&mut criterion);
    synchronous_run(&mut criterion);
    result_to_row(&mut criterion);
    row_to_table(&mut criterion);
    metrics(&mut criterion);
    log_line(&mut criterion);
    criterion.final_summary();
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

fn id() -> JobId {
    JobId::new(NodeId(1), now_ms(), 7)
}

/// From the body of `POST /run` to the message for the queue: 450 ns.
fn parse_and_build(criterion: &mut Criterion) {
    let body = br#"{"functionId":"bench","inputData":{"name":"Ada","numbers":[1,2,3,4,5,6,7,8],"text":"some words to carry along"}}"#;
    let template = JobTemplate::of(&house::function(), "code");
    criterion.bench_function("parse_and_build", |b| {
        b.iter(|| {
            let request = RunRequest::parse(black_box(body)).expect("it is well formed");
            let (id, deadline) = (id(), 1_795_305_600_123);
            JobDraft { id, template: &template, deadline, request: &request, traceparent: None }.build()
        });
    });
}

/// One request against a leased limit: 145 ns.
fn limiter_spend(criterion: &mut Criterion) {
    let runtime = runtime();
    let mut loops = JoinSet::new();
    let _inside = runtime.enter();
    let limiter = house::limiter(&mut loops);
    let key: Arc<str> = "master".into();
    criterion.bench_function("limiter_spend", |b| {
        b.iter_custom(|iters| {
            runtime.block_on(async {
                let started = Instant::now();
                for _ in 0..iters {
                    let mut counted = RateLimitState::default();
                    limiter
                        .check(black_box("/run"), Some(&key), || None, &mut counted)
                        .await
                        .expect("the limit is high");
                    black_box(counted);
                }
                started.elapsed()
            })
        });
    });
}

/// A function that is known: 55 ns.
fn function_cache_hit(criterion: &mut Criterion) {
    let runtime = runtime();
    let _inside = runtime.enter();
    let house = House::start();
    let id = FunctionId::parse("bench").expect("a function id");
    criterion.bench_function("function_cache_hit", |b| {
        b.iter_custom(|iters| {
            runtime.block_on(async {
                let started = Instant::now();
                for _ in 0..iters {
                    black_box(house.functions.get(black_box(&id)).await.expect("the store answers"));
                }
                started.elapsed()
            })
        });
    });
}

/// All that an asynchronous run needs of the core: table, batcher, journal, and on the way back settling, the audit,
/// and leaving; 100 at a time, over a backend that answers at once: 2.8 µs each.
fn asynchronous_run(criterion: &mut Criterion) {
    let runtime = runtime();
    let _inside = runtime.enter();
    let house = House::start();
    let run = async || {
        let job = house.job();
        let id = job.id;
        let sending = house.dispatcher.submit(job, Permits::new()).expect("there is room");
        sending.await.expect("the loop runs").expect("the queue takes it");
        house.publish(id).await;
    };
    let mut group = criterion.benchmark_group("asynchronous_run");
    group.throughput(Throughput::Elements(TOGETHER as u64));
    group.bench_function("100", |b| {
        b.iter_custom(|iters| {
            runtime.block_on(async {
                let started = Instant::now();
                for _ in 0..iters {
                    join_all((0..TOGETHER).map(|_| run())).await;
                }
                started.elapsed()
            })
        });
    });
    group.finish();
}

/// The same with somebody who waits: register, send, settle, answer: 3.1 µs each.
fn synchronous_run(criterion: &mut Criterion) {
    let runtime = runtime();
    let _inside = runtime.enter();
    let house = House::start();
    let run = async || {
        let job = house.job();
        let id = job.id;
        let mut submitted = house.dispatcher.submit_waiting(job, Permits::new()).expect("there is room");
        submitted.sent.await.expect("the loop runs").expect("the queue takes it");
        house.publish(id).await;
        black_box(submitted.waiter.outcome().await.expect("a result").body());
    };
    let mut group = criterion.benchmark_group("synchronous_run");
    group.throughput(Throughput::Elements(TOGETHER as u64));
    group.bench_function("100", |b| {
        b.iter_custom(|iters| {
            runtime.block_on(async {
                let started = Instant::now();
                for _ in 0..iters {
                    join_all((0..TOGETHER).map(|_| run())).await;
                }
                started.elapsed()
            })
        });
    });
    group.finish();
}

/// From what a worker published, 500 bytes, to a row: 950 ns.
fn result_to_row(criterion: &mut Criterion) {
    let function = FunctionId::parse("bench").expect("a function id");
    let (id, outcome) = (id(), Outcome::new(RESULT.into()));
    criterion.bench_function("result_to_row", |b| {
        b.iter(|| {
            let fields = black_box(&outcome).fields();
            (Execution::of(id, function.clone(), &fields), Recommendation::of(id, &fields))
        });
    });
}

/// A row's way through the audit, into a table that answers at once: 240 ns each.
fn row_to_table(criterion: &mut Criterion) {
    let runtime = runtime();
    let mut loops = JoinSet::new();
    let _inside = runtime.enter();
    let (audit, _dir) = house::audit(&mut loops);
    let outcome = Outcome::new(RESULT.into());
    let row = Execution::of(id(), FunctionId::parse("bench").expect("a function id"), &outcome.fields());
    let mut group = criterion.benchmark_group("row_to_table");
    group.throughput(Throughput::Elements(TOGETHER as u64));
    group.bench_function("100", |b| {
        b.iter_custom(|iters| {
            runtime.block_on(async {
                let started = Instant::now();
                for _ in 0..iters {
                    for n in 0..TOGETHER {
                        let id = JobId::new(NodeId(1), 1, n as u64);
                        audit.record(id, row.clone(), Some(0), None, None).expect("there is room");
                    }
                    // The loop takes them all before this goes on.
                    tokio::task::yield_now().await;
                }
                started.elapsed()
            })
        });
    });
    group.finish();
}

/// What is counted of a run, 30 ns, and of its request, 30 ns.
fn metrics(criterion: &mut Criterion) {
    let metrics = house::metrics();
    let outcome = Outcome::new(RESULT.into());
    let row = Execution::of(id(), FunctionId::parse("bench").expect("a function id"), &outcome.fields());
    criterion.bench_function("metrics/execution", |b| b.iter(|| metrics.observe_execution(black_box(&row))));
    let took = Duration::from_millis(8);
    criterion.bench_function("metrics/http", |b| {
        b.iter(|| metrics.observe_http(black_box("POST"), black_box("/run"), black_box(202), took));
    });
}

/// The line of an execution, formatted and thrown away: 330 ns.
fn log_line(criterion: &mut Criterion) {
    let subscriber = tracing_subscriber::fmt().with_writer(std::io::sink).event_format(log::Json).finish();
    let id = id();
    tracing::subscriber::with_default(subscriber, || {
        criterion.bench_function("log_line", |b| {
            b.iter(|| tracing::info!(requestId = %id, functionId = "bench", duration = 12.5, "Execution Success"));
        });
    });
}
