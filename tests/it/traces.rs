//! Spans, as a collector receives them.

use crate::harness::collector::Collector;
use crate::harness::own_worker::WorkerSetup;
use crate::harness::platform::{Backend, HELLO};
use crate::harness::{Platform, Setup};
use futures_util::future::join_all;
use serde_json::{Value, json};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CALLER: &str = "b7ad6b7169203331";
// Kinds in OTLP.
const SERVER: u64 = 2;
const CLIENT: u64 = 3;
const PRODUCER: u64 = 4;
const CONSUMER: u64 = 5;
/// The status of a failed operation in OTLP.
const ERROR: u64 = 2;

fn caller(is_sampled: bool) -> String {
    format!("00-{TRACE}-{CALLER}-0{}", u8::from(is_sampled))
}

/// Exports quickly, and never tries long.
fn exporting(setup: Setup, url: &str) -> Setup {
    setup.env("OTEL_EXPORTER_OTLP_ENDPOINT", url).env("OTEL_BSP_SCHEDULE_DELAY", "50")
}

fn named<'a>(spans: &'a [Value], beginning: &str) -> &'a Value {
    let is_it = |span: &&Value| span["name"].as_str().is_some_and(|name| name.starts_with(beginning));
    spans.iter().find(is_it).unwrap_or_else(|| panic!("no span {beginning:?} in {spans:#?}"))
}

/// The parent of each span is there, and they end in the span of the caller.
fn assert_is_tree(spans: &[Value]) {
    for span in spans {
        let parent = &span["parentSpanId"];
        let is_known = *parent == CALLER || spans.iter().any(|other| other["spanId"] == *parent);
        assert!(is_known && span["start"].as_u64() <= span["end"].as_u64(), "{span} in {spans:#?}");
    }
}

async fn run_traced(platform: &Platform, is_sampled: bool) -> Value {
    let request = platform.gateway.run(HELLO, &json!(1)).header("x-request-id", "request-1");
    let request = request.header("traceparent", &caller(is_sampled)).header("tracestate", "vendor=1");
    request.send().await.expect(200).json()
}

/// Checks the four spans of a synchronous run.
fn assert_spans_of_a_run(spans: &[Value], id: &str, system: &str) {
    assert_is_tree(spans);
    let (server, create) = (named(spans, "POST /run"), named(spans, "create "));
    let (send, process) = (named(spans, "send "), named(spans, "process "));
    for (span, kind, parent) in [
        (server, SERVER, &json!(CALLER)),
        (create, PRODUCER, &server["spanId"]),
        (send, CLIENT, &server["spanId"]),
        (process, CONSUMER, &create["spanId"]),
    ] {
        assert_eq!((&span["kind"], &span["parentSpanId"]), (&json!(kind), parent), "{span}");
        assert_ne!(span["status"], ERROR, "{span}");
    }
    for linked in [send, process] {
        let links: Vec<&Value> = linked["links"].as_array().expect("the links").iter().collect();
        assert!(links.iter().all(|link| link["spanId"] == create["spanId"]), "{linked}");
        assert_eq!(links.len(), 1, "{linked}");
    }
    assert_eq!(process["traceState"], "vendor=1");
    let server = &server["attributes"];
    for (name, expected) in [
        ("http.request.method", json!("POST")),
        ("http.route", json!("/run")),
        ("url.path", json!("/run")),
        ("url.scheme", json!("http")),
        ("http.response.status_code", json!(200)),
        ("http.response.header.x-request-id", json!(["request-1"])),
    ] {
        assert_eq!(server[name], expected, "{name}: {server}");
    }
    for (span, operation) in [(create, "create"), (send, "send"), (process, "process")] {
        let of = &span["attributes"];
        assert_eq!(
            (&of["messaging.system"], &of["messaging.operation.type"]),
            (&json!(system), &json!(operation))
        );
        let name = format!("{operation} {}", of["messaging.destination.name"].as_str().expect("a name"));
        assert_eq!((&span["name"], &of["messaging.operation.name"]), (&json!(name), &json!(operation)));
    }
    assert_eq!(create["attributes"]["messaging.message.id"], id);
    assert_eq!(send["attributes"]["messaging.batch.message_count"], 1);
    let process = &process["attributes"];
    for (name, expected) in [
        ("messaging.message.id", json!(id)),
        ("faas.name", json!(HELLO)),
        ("faas.invocation_id", json!(id)),
        ("faas.trigger", json!("pubsub")),
    ] {
        assert_eq!(process[name], expected, "{name}: {process}");
    }
    assert!(process["faas.coldstart"].is_boolean(), "{process}");
}

fn assert_log_has_ids(log: &[Value], msg: &str, request_id: Option<&str>) {
    let is_it = |line: &&Value| line["msg"] == msg && line["traceId"] == TRACE;
    let line = log.iter().find(is_it).unwrap_or_else(|| panic!("{msg} has no trace id: {log:#?}"));
    assert_eq!(line["httpRequestId"].as_str(), request_id, "{line}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_through_serve_and_our_worker_is_one_tree() {
    let collector = Collector::start().await;
    let setup = exporting(Setup::serve().no_worker(), &collector.url());
    // Requests without a trace, such as those for metrics, are not recorded.
    let setup = setup.env("OTEL_TRACES_SAMPLER", "parentbased_always_off");
    let platform = setup.env("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test").start().await;
    let fleet = platform.fleet();
    let worker = WorkerSetup::new(&fleet.cloud, &fleet.redis)
        .env("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", &format!("{}/v1/traces", collector.url()))
        .env("OTEL_BSP_SCHEDULE_DELAY", "50")
        .env("OTEL_SERVICE_NAME", "my-worker");
    let worker = worker.start().await;
    let result = run_traced(&platform, true).await;
    let id = result["requestId"].as_str().expect("an id");
    let spans = collector.trace(TRACE, 4).await;
    assert_spans_of_a_run(&spans, id, "aws_sqs");
    let (server, process) = (named(&spans, "POST /run"), named(&spans, "process "));
    let of_run = format!("00-{TRACE}-{}-01", process["spanId"].as_str().expect("an id"));
    assert_eq!(result["traceparent"], of_run);
    assert_eq!(server["resource"]["service.name"], "infra-controller");
    assert_eq!(server["resource"]["deployment.environment.name"], "test");
    assert_eq!(process["resource"]["service.name"], "my-worker");
    assert_log_has_ids(&platform.gateway.log(), "Run Request", Some("request-1"));
    assert_log_has_ids(&platform.gateway.log(), "Execution Success", Some("request-1"));

    // A caller that does not record its trace: nothing is recorded, and its ids are passed on.
    let exported = "infra_trace_spans_total{result=\"exported\"}";
    let before = platform.gateway.metric(exported).await;
    let result = run_traced(&platform, false).await;
    assert_eq!(result["traceparent"], caller(false));
    assert_eq!(platform.gateway.metric(exported).await, before);
    worker.stop().await;
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_in_dev_is_one_tree() {
    let collector = Collector::start().await;
    let platform = exporting(Setup::new(Backend::Dev), &collector.url()).start().await;
    let result = run_traced(&platform, true).await;
    let spans = collector.trace(TRACE, 4).await;
    assert_spans_of_a_run(&spans, result["requestId"].as_str().expect("an id"), "infra_embedded");
    platform.finish().await;
}

/// Each job of a batch has its own `create` span, and exactly one `send` span links to it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_links_to_each_of_its_jobs() {
    let collector = Collector::start().await;
    let platform = exporting(Setup::serve().no_worker(), &collector.url()).start().await;
    let runs = (0..20).map(|n| {
        let request = platform.gateway.run(HELLO, &json!(n)).header("x-async", "true");
        async move { request.header("traceparent", &caller(true)).send().await.expect(202).json() }
    });
    let jobs = join_all(runs).await;
    collector.trace(TRACE, 2 * jobs.len() + 1).await;
    let all_are_linked = || {
        let spans = collector.spans();
        let sends = spans.iter().filter(|span| span["kind"] == CLIENT);
        let links: Vec<Value> =
            sends.flat_map(|span| span["links"].as_array().cloned().unwrap_or_default()).collect();
        jobs.iter().all(|job| {
            let created = spans.iter().find(|span| {
                span["kind"] == PRODUCER && span["attributes"]["messaging.message.id"] == job["jobId"]
            });
            let is_it = |link: &&Value| created.is_some_and(|created| link["spanId"] == created["spanId"]);
            links.iter().filter(is_it).count() == 1
        })
    };
    crate::harness::eventually("a link to each job", 3 * crate::harness::SOON, || async {
        if all_are_linked() { Ok(()) } else { Err(format!("{:#?}", collector.spans())) }
    })
    .await;
    platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_is_away_or_slow_changes_nothing_for_requests() {
    let hanging = Collector::start_hanging().await;
    for url in ["http://127.0.0.1:1".to_owned(), hanging.url()] {
        let setup = exporting(Setup::new(Backend::Dev), &url);
        let setup = setup.env("OTEL_BSP_MAX_QUEUE_SIZE", "4").env("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "2");
        let platform = setup.env("OTEL_EXPORTER_OTLP_TIMEOUT", "200").start().await;
        for _ in 0..5 {
            run_traced(&platform, true).await;
        }
        let dropped = "infra_trace_spans_total{result=\"dropped\"}";
        platform.gateway.wait_for_metric_at_least(dropped, 1.0).await;
        platform.gateway.wait_for_output("Spans dropped; requests are not affected").await;
        // A clean end, although spans wait.
        platform.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_sent_unless_a_variable_asks_for_it() {
    let collector = Collector::start().await;
    let disabled = exporting(Setup::new(Backend::Dev), &collector.url()).env("OTEL_SDK_DISABLED", "true");
    for setup in [Setup::new(Backend::Dev).env("OTEL_SERVICE_NAME", "x"), disabled] {
        let platform = setup.start().await;
        let result = run_traced(&platform, true).await;
        assert_eq!(result["traceparent"], caller(true), "it is passed on");
        let exported = platform.gateway.metric("infra_trace_spans_total{result=\"exported\"}").await;
        assert_eq!(exported, Some(0.0));
        platform.finish().await;
    }
    assert!(collector.spans().is_empty(), "{:#?}", collector.spans());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_job_is_traced_at_its_end() {
    let collector = Collector::start().await;
    let setup = exporting(Setup::new(Backend::Dev), &collector.url());
    let setup = setup.conf(crate::harness::gateway::Conf {
        server: "[traces]\nfailed = true\n".to_owned(),
        ..Default::default()
    });
    let platform = setup.env("OTEL_TRACES_SAMPLER", "parentbased_always_off").start().await;
    let failing = crate::harness::upload::Function::python("raise SystemExit(3)");
    let result = platform.gateway.create_and_run(&failing, &json!(1)).await;
    assert_eq!(result["status"], "FAILED", "{result}");
    let id = result["requestId"].as_str().expect("an id");
    let spans = collector.trace(&id.replace('-', ""), 2).await;
    let (whole, create) = (named(&spans, "run"), named(&spans, "create jobs"));
    assert_eq!((&create["parentSpanId"], &whole["status"]), (&whole["spanId"], &json!(ERROR)));
    assert_eq!(whole["attributes"]["infra.job.status"], "FAILED");
    platform.finish().await;
}
