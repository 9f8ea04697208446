//! The cost of a request and of its parts: `make bench`, or `cargo bench --bench request -- NAME` for one.
//!
//! Each benchmark states its time on 2 shared cores of an AMD EPYC (x86-64, Linux 6.18) on 2026-11-23. Code
//! and data are in the caches of the processor, which is not so in a server under load.

mod fixture;

use criterion::{Criterion, Throughput};
use fixture::{
    Execution, Fixture, FunctionId, JobDraft, JobId, JobTemplate, Json, NodeId, Outcome, Permits, RESULT,
    RUN_REQUEST, RateLimitState, Recommendation, RunRequest, now_ms,
};
use futures_util::future::join_all;
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

// As in the server.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Jobs at a time where a loop works in batches.
const TOGETHER: usize = 100;

fn main() {
    let mut criterion = Criterion::default().configure_from_args().without_plots();
    parse_and_build(&mut criterion);
    limiter_spend(&mut criterion);
    function_cache_hit(&mut criterion);
    asynchronous_run(&mut criterion);
    synchronous_run(&mut criterion);
    whole_request(&mut criterion, "asynchronous_request", true);
    whole_request(&mut criterion, "synchronous_request", false);
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
    let template = JobTemplate::of(&fixture::function(), "code");
    criterion.bench_function("parse_and_build", |b| {
        b.iter(|| {
            let request = RunRequest::parse(black_box(RUN_REQUEST.as_bytes())).expect("it is well formed");
            let (id, deadline) = (id(), 1_795_305_600_123);
            JobDraft {
                id,
                template: &template,
                deadline,
                request: &request,
                traceparent: None,
                tracestate: None,
            }
            .build()
        });
    });
}

/// One request against a leased limit: 145 ns.
fn limiter_spend(criterion: &mut Criterion) {
    let runtime = runtime();
    let mut loops = JoinSet::new();
    let _inside = runtime.enter();
    let limiter = fixture::limiter(&mut loops, &Arc::new(fixture::metrics()));
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

/// A lookup of a cached function: 55 ns.
fn function_cache_hit(criterion: &mut Criterion) {
    let runtime = runtime();
    let _inside = runtime.enter();
    let fixture = Fixture::start();
    let id = FunctionId::parse("bench").expect("a function id");
    criterion.bench_function("function_cache_hit", |b| {
        b.iter_custom(|iters| {
            runtime.block_on(async {
                let started = Instant::now();
                for _ in 0..iters {
                    black_box(fixture.functions.get(black_box(&id)).await.expect("the store answers"));
                }
                started.elapsed()
            })
        });
    });
}

/// The core's part of an asynchronous run: in-flight table, batcher, journal; then settler, audit and
/// journal. 100 at a time, over a backend that answers immediately: 2.8 µs each.
fn asynchronous_run(criterion: &mut Criterion) {
    let runtime = runtime();
    let _inside = runtime.enter();
    let fixture = Fixture::start();
    let run = async || {
        let sending = fixture.dispatcher.submit(fixture.job(), Permits::new()).expect("there is room");
        sending.await.expect("the loop runs").expect("the queue takes it");
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

/// The same with a waiting client: register, send, settle, answer: 3.1 µs each.
fn synchronous_run(criterion: &mut Criterion) {
    let runtime = runtime();
    let _inside = runtime.enter();
    let fixture = Fixture::start();
    let run = async || {
        let submitted = fixture.dispatcher.submit_waiting(fixture.job(), Permits::new());
        let mut submitted = submitted.expect("there is room");
        submitted.sent.await.expect("the loop runs").expect("the queue takes it");
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

/// A whole request over a loopback connection, one at a time: from the guard to the row, with the client's
/// and the kernel's part.
fn whole_request(criterion: &mut Criterion, name: &str, is_async: bool) {
    let runtime = runtime();
    let _inside = runtime.enter();
    let mut fixture = Fixture::start();
    let mut client = runtime.block_on(fixture.client(is_async));
    criterion.bench_function(name, |b| {
        b.iter_custom(|iters| {
            runtime.block_on(async {
                let started = Instant::now();
                for _ in 0..iters {
                    client.run().await;
                }
                started.elapsed()
            })
        });
    });
}

/// From a published result of 500 bytes to a row: 950 ns.
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

/// From the audit's queue to a table that answers immediately: 240 ns a row.
fn row_to_table(criterion: &mut Criterion) {
    let runtime = runtime();
    let mut loops = JoinSet::new();
    let _inside = runtime.enter();
    let (audit, _dir) = fixture::audit(&mut loops);
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
                        audit.record(id, row.clone(), Some(0), None, None, false).expect("there is room");
                    }
                    // The loop takes all of them before this task continues.
                    tokio::task::yield_now().await;
                }
                started.elapsed()
            })
        });
    });
    group.finish();
}

/// The metrics of an execution, 30 ns, and of its request, 30 ns.
fn metrics(criterion: &mut Criterion) {
    let metrics = fixture::metrics();
    let outcome = Outcome::new(RESULT.into());
    let row = Execution::of(id(), FunctionId::parse("bench").expect("a function id"), &outcome.fields());
    criterion.bench_function("metrics/execution", |b| b.iter(|| metrics.observe_execution(black_box(&row))));
    let took = Duration::from_millis(8);
    criterion.bench_function("metrics/http", |b| {
        b.iter(|| metrics.observe_http(black_box("POST"), black_box("/run"), black_box(202), took));
    });
}

/// The log line of an execution, formatted and dropped: 330 ns.
fn log_line(criterion: &mut Criterion) {
    let subscriber = tracing_subscriber::fmt().with_writer(std::io::sink).event_format(Json).finish();
    let id = id();
    tracing::subscriber::with_default(subscriber, || {
        criterion.bench_function("log_line", |b| {
            let (function, duration) = ("bench", 12.5);
            b.iter(|| tracing::info!(requestId = %id, functionId = function, duration, "Execution Success"));
        });
    });
}
