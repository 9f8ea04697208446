use super::*;
use crate::config::SAMPLING_RANGE;
use crate::metrics::Metrics;
use crate::model::{FunctionId, JobId, NodeId, now_ms};
use opentelemetry::trace::{SpanId, SpanKind, Status};
use opentelemetry_sdk::trace::SpanData;
use std::time::Duration;
use tokio::sync::mpsc;

const CALLER: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

fn traces(conf: TracesConf, spans_max: usize) -> (Traces, mpsc::Receiver<SpanData>, TraceMetrics) {
    let (sender, receiver) = mpsc::channel(spans_max);
    let metrics = Metrics::new(1).unwrap().traces;
    let sampling = TraceSampling { follows_parent: true, threshold: SAMPLING_RANGE };
    let destination = Destination::sqs("https://sqs.eu-west-1.amazonaws.com/1/jobs");
    let recorder = Recorder::new(sender, metrics.clone());
    (Traces(Some(Arc::new(Tracing { sampling, conf, destination, recorder }))), receiver, metrics)
}

fn job(n: u64, trace: Option<Arc<JobTrace>>) -> Job {
    Job {
        id: JobId::new(NodeId(1), now_ms(), n),
        function: FunctionId::parse("f").unwrap(),
        deadline: 0,
        progress: None,
        idempotency_key: None,
        is_promised: true,
        message: "{}".into(),
        trace,
    }
}

fn end() -> RequestEnd<'static> {
    RequestEnd {
        method: "POST",
        is_known_method: true,
        route: Some("/run"),
        path: "/api/run",
        has_tls: false,
        version: "1.1",
        authority: Some("gateway:8080"),
        user_agent: None,
        status: Some(200),
        request_id: "r-1",
    }
}

fn attribute(span: &SpanData, name: &str) -> Option<String> {
    let found = span.attributes.iter().find(|attribute| attribute.key.as_str() == name);
    found.map(|attribute| attribute.value.to_string())
}

#[tokio::test]
async fn the_spans_of_a_run_are_one_tree() {
    let (traces, mut receiver, _) = traces(TracesConf::default(), 16);
    let caller = TraceContext::parse(CALLER);
    let request = traces.begin_request(|| caller).unwrap();
    let shared = RequestTrace { context: request.context, request_id: "r-1".into() };
    let trace = traces.of_job(Some(&shared), caller, Some("a=1"));
    let jobs = [job(1, None), job(2, trace.clone()), job(3, traces.of_job(Some(&shared), None, None))];
    traces.created(&jobs[1]);
    let send = traces.begin_send(&jobs).unwrap();
    traces.end_send(send, None);
    let message = trace.as_ref().map(|trace| trace.context);
    let process = traces.begin_process(|| (message, Some("a=1".into()))).unwrap();
    traces.end_process(
        &process,
        &ProcessEnd {
            request_id: "j",
            function: "f",
            version: 3,
            memory_mb: 128,
            worker_id: "w",
            is_cold: Some(true),
            error: Some("timeout"),
        },
    );
    traces.end_request(&request, &end());
    let spans: Vec<SpanData> = std::iter::from_fn(|| receiver.try_recv().ok()).collect();
    let [create, send, process, server] = &spans[..] else { panic!("{spans:#?}") };
    for (span, name, kind, parent) in [
        (server, "POST /run", SpanKind::Server, SpanId::from(caller.unwrap().span_id())),
        (create, "create jobs", SpanKind::Producer, server.span_context.span_id()),
        (send, "send jobs", SpanKind::Client, server.span_context.span_id()),
        (process, "process jobs", SpanKind::Consumer, create.span_context.span_id()),
    ] {
        assert_eq!((&*span.name, &span.span_kind, span.parent_span_id), (name, &kind, parent));
        assert_eq!(span.span_context.trace_id().to_string(), CALLER[3..35]);
        assert!(span.span_context.is_sampled() && span.end_time >= span.start_time);
    }
    let linked: Vec<SpanId> = send.links.iter().map(|link| link.span_context.span_id()).collect();
    let third = jobs[2].trace.as_ref().unwrap().context.span_id();
    assert_eq!(linked, [create.span_context.span_id(), SpanId::from(third)]);
    assert_eq!(process.links[0].span_context.span_id(), create.span_context.span_id());
    assert_eq!(process.span_context.trace_state().header(), "a=1");
    for (span, name, value) in [
        (server, "http.request.method", "POST"),
        (server, "http.route", "/run"),
        (server, "url.path", "/api/run"),
        (server, "server.port", "8080"),
        (server, "http.response.status_code", "200"),
        (create, "messaging.system", "aws_sqs"),
        (create, "messaging.destination.name", "jobs"),
        (create, "messaging.operation.type", "create"),
        (create, "faas.invoked_name", "f"),
        (send, "messaging.batch.message_count", "3"),
        (send, "server.address", "sqs.eu-west-1.amazonaws.com"),
        (process, "faas.coldstart", "true"),
        (process, "faas.max_memory", "134217728"),
        (process, "error.type", "timeout"),
    ] {
        assert_eq!(attribute(span, name).as_deref(), Some(value), "{name}");
    }
    assert!(matches!(process.status, Status::Error { .. }) && server.status == Status::Unset);
}

#[tokio::test]
async fn a_trace_that_is_not_sampled_is_not_recorded() {
    let (on, mut receiver, _) = traces(TracesConf::default(), 16);
    let caller = TraceContext::parse(&CALLER.replace("-01", "-00"));
    for traces in [&on, &Traces::default()] {
        assert!(traces.begin_request(|| caller).is_none() && !traces.follows_jobs());
        assert!(traces.begin_process(|| (caller, None)).is_none());
        assert_eq!(traces.of_job(None, caller, Some("a=1")), None);
        traces.created(&job(1, None));
        assert!(traces.begin_send(&[job(1, None)]).is_none());
    }
    assert!(receiver.try_recv().is_err());
}

#[tokio::test]
async fn failed_and_slow_jobs_are_traced_at_their_end() {
    let slow = TracesConf { failed: false, slow_ms: 1000 };
    let failed = TracesConf { failed: true, slow_ms: 0 };
    for (conf, is_success, after_ms, expected) in [
        (slow, true, 999, 0),
        (slow, true, 1000, 2),
        (slow, false, 1, 0),
        (failed, false, 1, 2),
        (failed, true, 5000, 0),
    ] {
        let (traces, mut receiver, _) = traces(conf, 16);
        assert!(traces.follows_jobs());
        let caller = TraceContext::parse(&CALLER.replace("-01", "-00"));
        for trace in [None, traces.of_job(None, caller, None)] {
            let ended = job(7, trace.clone());
            let status = if is_success { "SUCCESS" } else { "FAILED" };
            let heard = Duration::from_millis(ended.id.accepted_at() + after_ms);
            let (function, trace) = (&ended.function, trace.as_deref());
            let accepted = Duration::from_millis(ended.id.accepted_at());
            let sent = trace.is_some().then_some(accepted + Duration::from_millis(1));
            let confirmed = sent.map(|sent| sent + Duration::from_millis(2));
            let id = ended.id;
            let life = JobLife { id, function, trace, status, is_success, sent, confirmed, heard };
            traces.job_ended(&life);
            let spans: Vec<SpanData> = std::iter::from_fn(|| receiver.try_recv().ok()).collect();
            let expected = expected + usize::from(expected > 0 && sent.is_some());
            assert_eq!(spans.len(), expected, "{conf:?} {status} {after_ms}");
            let [whole, create, send @ ..] = &spans[..] else { continue };
            if let [send] = send {
                assert_eq!(send.parent_span_id, whole.span_context.span_id());
                assert_eq!(send.links[0].span_context.span_id(), create.span_context.span_id());
                let took = send.end_time.duration_since(send.start_time).unwrap();
                assert_eq!(took, Duration::from_millis(2));
            }
            let id = trace.map_or_else(|| ended.id.trace(), |trace| trace.context);
            for span in [whole, create] {
                assert_eq!(span.span_context.trace_id(), id.trace_id().into());
                assert!(span.span_context.is_sampled());
            }
            assert_eq!(create.parent_span_id, whole.span_context.span_id());
            match trace {
                Some(_) => assert_eq!(whole.parent_span_id, id.span_id().into()),
                None => assert_eq!(create.span_context.span_id(), id.span_id().into()),
            }
            assert_eq!(matches!(whole.status, Status::Error { .. }), !is_success);
        }
        let request = traces.begin_request(|| None).unwrap();
        let shared = RequestTrace { context: request.context, request_id: "r".into() };
        let ended = job(8, traces.of_job(Some(&shared), None, None));
        let (function, trace) = (&ended.function, ended.trace.as_deref());
        let heard = Duration::from_secs(u64::from(u32::MAX));
        let (id, status, sent, confirmed) = (ended.id, "LOST", None, None);
        traces.job_ended(&JobLife { id, function, trace, status, is_success, sent, confirmed, heard });
        assert!(receiver.try_recv().is_err(), "it is recorded already");
    }
}

#[tokio::test]
async fn a_full_queue_drops_and_counts() {
    let (traces, mut receiver, metrics) = traces(TracesConf::default(), 1);
    let request = traces.begin_request(|| None).unwrap();
    for _ in 0..3 {
        traces.end_request(&request, &end());
    }
    assert_eq!(metrics.dropped.get(), 2);
    assert!(receiver.try_recv().is_ok());
}
