//! The loop that exports spans in batches: OTLP, protobuf over HTTP.
//!
//! Nothing waits for it. While the collector is slow or not reachable, the queue fills, and further spans are
//! dropped. They are counted, and reported at most once a minute.

use super::collector::CollectorClient;
use super::recorder::Recorder;
use crate::config::TraceExport;
use crate::metrics::TraceMetrics;
use opentelemetry::KeyValue;
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::resource::TelemetryResourceDetector;
use opentelemetry_sdk::trace::{SpanData, SpanExporter as _};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

/// Deadline for the last spans at the end of the process.
const FLUSH_MAX: Duration = Duration::from_secs(2);
/// How often dropped spans are reported.
const REPORT_EVERY: Duration = Duration::from_secs(60);

/// Creates the handle that queues spans, and the loop that exports them.
pub fn new(
    conf: &TraceExport,
    service: &'static str,
    instance: String,
    metrics: TraceMetrics,
) -> Result<(Recorder, ExportLoop), String> {
    let client = CollectorClient::new(conf.timeout)?;
    let headers = conf.headers.iter().map(|(name, value)| (name.clone(), value.reveal().to_owned()));
    let mut exporter = SpanExporter::builder()
        .with_http()
        .with_http_client(client.clone())
        .with_protocol(Protocol::HttpBinary)
        .with_endpoint(conf.endpoint.reveal())
        .with_timeout(conf.timeout)
        .with_headers(headers.collect())
        .build()
        // The text could contain the URL, and that a password.
        .map_err(|_| "the URL or the compression is not supported".to_owned())?;
    exporter.set_resource(&resource(conf, service, instance));
    let (sender, receiver) = mpsc::channel(conf.queue_spans_max);
    let recorder = Recorder::new(sender, metrics.clone());
    let export_loop = ExportLoop {
        receiver,
        exporter,
        client,
        batch_spans_max: conf.batch_spans_max,
        delay: conf.delay,
        timeout: conf.export_timeout,
        dropped: Dropped { reported: metrics.dropped.get(), next: None },
        metrics,
    };
    Ok((recorder, export_loop))
}

/// The attributes of this process. Those of the operator win.
fn resource(conf: &TraceExport, service: &'static str, instance: String) -> Resource {
    let own = [
        KeyValue::new("service.name", service),
        KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
        KeyValue::new("service.instance.id", instance),
    ];
    let theirs = conf.resource.iter().map(|(name, value)| KeyValue::new(name.clone(), value.clone()));
    let name = conf.service_name.clone().map(|name| KeyValue::new("service.name", name));
    Resource::builder_empty()
        .with_detector(Box::new(TelemetryResourceDetector))
        .with_attributes(own)
        .with_attributes(theirs)
        .with_attributes(name)
        .build()
}

/// The loop behind the recorder.
pub struct ExportLoop {
    receiver: mpsc::Receiver<SpanData>,
    exporter: SpanExporter,
    client: CollectorClient,
    batch_spans_max: usize,
    delay: Duration,
    timeout: Duration,
    dropped: Dropped,
    metrics: TraceMetrics,
}

/// What was reported about dropped spans.
struct Dropped {
    /// The count at the last report.
    reported: u64,
    /// When the next report may be made. `None`: immediately.
    next: Option<Instant>,
}

impl ExportLoop {
    /// Runs until `stop` resolves, and then exports what is left, for at most [`FLUSH_MAX`].
    pub async fn run(mut self, stop: impl Future<Output = ()>) {
        tokio::pin!(stop);
        let mut spans = Vec::new();
        let mut flush_by = None;
        while flush_by.is_none() {
            tokio::select! {
                biased;
                () = &mut stop => flush_by = Some(Instant::now() + FLUSH_MAX),
                is_open = gather(&mut self.receiver, &mut spans, self.batch_spans_max, self.delay) => {
                    flush_by = (!is_open).then(|| Instant::now() + FLUSH_MAX);
                }
            }
            if flush_by.is_some() || spans.is_empty() {
                continue;
            }
            let batch = std::mem::take(&mut spans);
            let count = batch.len() as u64;
            let is_cut_short = {
                let export = self.export(batch, Instant::now() + self.timeout);
                tokio::pin!(export);
                tokio::select! {
                    biased;
                    () = &mut export => false,
                    () = &mut stop => {
                        let by = *flush_by.insert(Instant::now() + FLUSH_MAX);
                        timeout_at(by, export).await.is_err()
                    }
                }
            };
            if is_cut_short {
                self.metrics.dropped.inc_by(count);
            }
            self.report();
        }
        self.flush(spans, flush_by.unwrap_or_else(Instant::now)).await;
    }

    /// Exports the spans that wait. Spans that end from now on are dropped.
    async fn flush(&mut self, mut spans: Vec<SpanData>, deadline: Instant) {
        self.receiver.close();
        loop {
            while spans.len() < self.batch_spans_max
                && let Ok(span) = self.receiver.try_recv()
            {
                spans.push(span);
            }
            if spans.is_empty() {
                break;
            }
            self.export(std::mem::take(&mut spans), deadline).await;
        }
        self.dropped.next = None;
        self.report();
    }

    async fn export(&self, spans: Vec<SpanData>, deadline: Instant) {
        let count = spans.len() as u64;
        let exported = timeout_at(deadline, self.exporter.export(spans)).await;
        let of = if matches!(exported, Ok(Ok(()))) { &self.metrics.exported } else { &self.metrics.dropped };
        of.inc_by(count);
    }

    fn report(&mut self) {
        let (count, now) = (self.metrics.dropped.get(), Instant::now());
        if count == self.dropped.reported || self.dropped.next.is_some_and(|next| now < next) {
            return;
        }
        let (spans, status) = (count - self.dropped.reported, self.client.last_status());
        self.dropped = Dropped { reported: count, next: Some(now + REPORT_EVERY) };
        tracing::warn!(
            spans,
            status,
            "Spans dropped; requests are not affected. Check OTEL_EXPORTER_OTLP_ENDPOINT and the collector: \
             status is that of its last response, 0 if it did not answer"
        );
    }
}

/// Collects a batch: until it is full, or `delay` after its first span. Returns `false` at the end of the
/// queue. Nothing is lost if this future is dropped.
async fn gather(
    receiver: &mut mpsc::Receiver<SpanData>,
    spans: &mut Vec<SpanData>,
    spans_max: usize,
    delay: Duration,
) -> bool {
    if receiver.recv_many(spans, spans_max).await == 0 {
        return false;
    }
    let due = Instant::now() + delay;
    while spans.len() < spans_max {
        let room = spans_max - spans.len();
        match timeout_at(due, receiver.recv_many(spans, room)).await {
            Ok(0) => return false,
            Ok(_) => {}
            Err(_) => break,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{SAMPLING_RANGE, Secret, TraceSampling};
    use crate::metrics::Metrics;
    use crate::model::TraceContext;
    use crate::traces::recorder::FinishedSpan;
    use opentelemetry::trace::SpanKind;
    use std::future::pending;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio::sync::oneshot;

    fn conf(endpoint: String) -> TraceExport {
        TraceExport {
            endpoint: Secret::new(endpoint),
            headers: vec![("x-token".to_owned(), Secret::new("hunter2".to_owned()))],
            timeout: Duration::from_secs(30),
            service_name: Some("theirs".to_owned()),
            resource: vec![("k".to_owned(), "v".to_owned())],
            sampling: TraceSampling { follows_parent: true, threshold: SAMPLING_RANGE },
            queue_spans_max: 8,
            batch_spans_max: 2,
            delay: Duration::from_millis(1),
            export_timeout: Duration::from_secs(30),
        }
    }

    fn span() -> FinishedSpan<'static> {
        FinishedSpan {
            context: TraceContext::new(1, 2, true),
            parent: None,
            has_remote_parent: false,
            state: None,
            kind: SpanKind::Internal,
            name: "a span".into(),
            began: Duration::ZERO,
            ended: Duration::from_secs(1),
            attributes: Vec::new(),
            links: Vec::new(),
            error: None,
        }
    }

    #[tokio::test]
    async fn a_batch_is_posted_with_the_header_fields_and_the_resource() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let metrics = Metrics::new(1).unwrap().traces;
        let conf = conf(format!("http://{}/v1/traces", listener.local_addr().unwrap()));
        let (recorder, export) = new(&conf, "ours", "i-1".to_owned(), metrics.clone()).unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let collector = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut received = Vec::new();
            while !received.windows(6).any(|part| part == b"a span") {
                assert_ne!(stream.read_buf(&mut received).await.unwrap(), 0);
            }
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
            while metrics.exported.get() == 0 {
                tokio::task::yield_now().await;
            }
            drop(stop);
            String::from_utf8_lossy(&received).into_owned()
        };
        recorder.record(span());
        let (received, ()) = tokio::join!(collector, export.run(async { drop(stopped.await) }));
        assert!(received.starts_with("POST /v1/traces HTTP/1.1\r\n"), "{received}");
        for part in ["content-type: application/x-protobuf", "x-token: hunter2", "theirs", "i-1"] {
            assert!(received.contains(part), "{part}: {received}");
        }
        assert!(!received.contains("ours"), "{received}");
        assert_eq!((metrics.exported.get(), metrics.dropped.get()), (1, 0));
    }

    /// The listener accepts connections and never answers.
    #[tokio::test(start_paused = true)]
    async fn a_slow_collector_delays_neither_the_recorder_nor_the_end() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let metrics = Metrics::new(1).unwrap().traces;
        let conf = conf(format!("http://{}/v1/traces", listener.local_addr().unwrap()));
        let (recorder, export) = new(&conf, "ours", "i-1".to_owned(), metrics.clone()).unwrap();
        for _ in 0..20 {
            recorder.record(span());
        }
        assert_eq!(metrics.dropped.get(), 12);
        let began = Instant::now();
        export.run(tokio::time::sleep(Duration::from_secs(1))).await;
        assert!(began.elapsed() <= Duration::from_secs(1) + 2 * FLUSH_MAX, "{:?}", began.elapsed());
        assert_eq!((metrics.exported.get(), metrics.dropped.get()), (0, 20));
        recorder.record(span());
        assert_eq!(metrics.dropped.get(), 21);
    }

    #[tokio::test(start_paused = true)]
    async fn dropped_spans_are_counted_if_no_collector_listens() {
        let metrics = Metrics::new(1).unwrap().traces;
        let conf = conf("http://127.0.0.1:1/v1/traces".to_owned());
        let (recorder, export) = new(&conf, "ours", "i-1".to_owned(), metrics.clone()).unwrap();
        recorder.record(span());
        drop(recorder);
        tokio::time::timeout(Duration::from_secs(120), export.run(pending())).await.unwrap();
        assert_eq!(metrics.dropped.get(), 1);
    }
}
