//! All metrics of the process, in one struct.
//!
//! Existing dashboards parse `http_request_duration_seconds` and the metrics `function_*` with regular
//! expressions, so their names, labels and label order must not change. All others begin with `infra_`,
//! except `process_*` of the Prometheus crate. `docs/metrics.md` describes every metric with the same words
//! as its help text here.
//!
//! Metrics are fields, not looked up by name, so a misspelled name does not compile. One expression gives a
//! metric its name, help text, labels and buckets, and registers it. That expression is in the file of its
//! subject:
//!
//! * [`requests`] and [`edge`], which holds connections and upstreams
//! * [`executions`], by function
//! * [`jobs`], [`results`] and [`queue`]
//! * [`limiter`]
//! * [`audit`]: the execution log; [`events`] and their watchers
//! * [`functions`]: the cache and code archives
//! * [`health`], which holds the subscriptions and the log, and [`conf`]
//! * [`traces`]: spans that are exported
//! * [`worker`]: the worker of `dev`, and the process of `worker`
//! * [`load`] and [`latency`]: what the overview of the fleet takes, and `/metrics` does not show
//! * [`register`]: makes and registers one metric
//! * [`exposition`]: the text of all of them, compressed for clients that accept it

mod audit;
mod conf;
mod edge;
mod events;
mod executions;
mod exposition;
mod functions;
mod health;
mod jobs;
mod latency;
mod limiter;
mod load;
mod queue;
mod register;
mod requests;
mod results;
mod traces;
mod worker;

pub use audit::{AuditMetrics, DiskMetrics};
pub use conf::ConfMetrics;
pub use edge::EdgeMetrics;
pub use events::EventMetrics;
pub use exposition::{accepts_gzip, gzip};
pub use functions::CacheMetrics;
pub use health::SubscriptionMetrics;
pub use jobs::JobMetrics;
pub use latency::LatencyHistogram;
pub use load::{LoadRecorder, LoadSample};
pub use traces::TraceMetrics;
pub use worker::{
    CodeMetrics, GiveBackReason, HeldJobMetrics, RunMetrics, RunStop, StartKind, WarmEnd, WarmMetrics,
    WorkerMetrics, WorkerProcessMetrics,
};

use crate::model::Execution;
use executions::FunctionMetrics;
use prometheus::{
    Encoder, Histogram, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry, TextEncoder,
};
use requests::HttpMetrics;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// All metrics of a process that is a gateway.
pub struct Metrics {
    registry: Registry,
    functions: FunctionMetrics,
    http: HttpMetrics,
    /// Set when the metrics are read.
    pub requests_in_flight: IntGauge,
    pub waiters: IntGauge,
    pub jobs: JobMetrics,
    pub queue_waiting: IntGauge,
    /// As old as the last request for `/health`.
    pub queue_depth: IntGauge,
    pub sends_in_flight: IntGauge,
    pub queue_refuses: IntGauge,
    pub batch_jobs: Histogram,
    /// In seconds; the journal entry is included.
    pub send_seconds: Histogram,
    /// By `outcome`: `sent` ([`Self::jobs_sent`]), `retried`, `refused`, `not_sent`, `unknown`.
    pub sends: IntCounterVec,
    /// The usual outcome of [`Self::sends`]. Its label is looked up once, at start.
    pub jobs_sent: IntCounter,
    /// By `kind`: `settled` ([`Self::results_settled`]), `repeated`, `unknown_job`, `malformed`, `deferred`,
    /// `lost`, `late`.
    pub results: IntCounterVec,
    /// The usual kind of [`Self::results`].
    pub results_settled: IntCounter,
    /// By `outcome`: `new`, `repeated`, `reused` (rejected), `taken_over` (the job was certainly never sent),
    /// `sent_again` (the outcome of its send is unknown, so the queue may hold two messages).
    pub idempotency: IntCounterVec,
    pub results_looked_up: IntCounter,
    /// By `decision`: `allowed`, `limited`; and by `source`: `lease`, `refusal_memory`, `exact`, `local`,
    /// `closed`.
    pub limiter: IntCounterVec,
    /// By `mode`: `lease`, `exact`.
    pub limiter_calls: IntCounterVec,
    pub queue_shed_permille: IntGauge,
    pub edge: EdgeMetrics,
    pub events: EventMetrics,
    /// By `code`, that of the problem.
    pub refused: IntCounterVec,
    pub audit: AuditMetrics,
    pub code_deleted: IntCounter,
    pub conf: ConfMetrics,
    pub cache: CacheMetrics,
    pub subscriptions: SubscriptionMetrics,
    pub traces: TraceMetrics,
    /// By `check`. As old as the last request for `/health`.
    pub health: IntGaugeVec,
    /// Set when the metrics are read.
    pub log_lines_dropped: IntGauge,
    /// Taken by the overview of the fleet.
    pub load: LoadRecorder,
    /// Those of the worker in this process, if there is one.
    worker: OnceLock<Arc<WorkerMetrics>>,
}

impl Metrics {
    /// Registers all metrics. At most `function_labels_max` function ids get series of their own; the others
    /// share the label value `other`.
    ///
    /// # Errors
    /// If two metrics have the same name, or a name is invalid.
    pub fn new(function_labels_max: usize) -> prometheus::Result<Self> {
        let registry = Registry::new();
        let r = &registry;
        let (sends, results) = (queue::by_outcome(r)?, results::by_kind(r)?);
        let metrics = Self {
            functions: FunctionMetrics::new(r, function_labels_max)?,
            http: HttpMetrics::new(r)?,
            requests_in_flight: requests::in_flight(r)?,
            waiters: requests::waiters(r)?,
            jobs: JobMetrics::new(r)?,
            queue_waiting: queue::waiting_jobs(r)?,
            queue_depth: queue::depth(r)?,
            sends_in_flight: queue::sends_in_flight(r)?,
            queue_refuses: queue::breaker_open(r)?,
            batch_jobs: queue::batch_jobs(r)?,
            send_seconds: queue::send_seconds(r)?,
            jobs_sent: sends.with_label_values(&["sent"]),
            sends,
            results_settled: results.with_label_values(&["settled"]),
            results,
            idempotency: results::idempotent_requests(r)?,
            results_looked_up: results::looked_up(r)?,
            limiter: limiter::decisions(r)?,
            limiter_calls: limiter::calls(r)?,
            queue_shed_permille: queue::shed_permille(r)?,
            edge: EdgeMetrics::new(r)?,
            events: EventMetrics::new(r)?,
            refused: requests::refused(r)?,
            audit: AuditMetrics::new(r)?,
            code_deleted: functions::code_deleted(r)?,
            conf: ConfMetrics::new(r)?,
            cache: CacheMetrics::new(r)?,
            subscriptions: SubscriptionMetrics::new(r)?,
            traces: TraceMetrics::new(r)?,
            health: health::healthy(r)?,
            log_lines_dropped: health::log_lines_dropped(r)?,
            load: LoadRecorder::default(),
            worker: OnceLock::new(),
            registry,
        };
        #[cfg(target_os = "linux")]
        metrics.registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
        Ok(metrics)
    }

    /// Registers the metrics of a worker in this process. A process has at most one.
    ///
    /// # Errors
    /// If they are registered already.
    pub fn add_worker(&self) -> prometheus::Result<Arc<WorkerMetrics>> {
        let worker = Arc::new(WorkerMetrics::new(&self.registry)?);
        Ok(Arc::clone(self.worker.get_or_init(|| worker)))
    }

    /// The metrics of the worker in this process, if there is one.
    pub fn worker(&self) -> Option<&WorkerMetrics> {
        self.worker.get().map(Arc::as_ref)
    }

    /// All metrics in the Prometheus text format.
    pub fn text(&self) -> Vec<u8> {
        let mut text = Vec::new();
        // Encoding to memory fails only for a metric without a name, and `new` would have rejected that.
        let _ = TextEncoder::new().encode(&self.registry.gather(), &mut text);
        text
    }

    /// Counts a request. `route` is the pattern of its route.
    pub fn observe_http(&self, method: &str, route: &str, status: u16, took: Duration) {
        self.http.observe(method, route, status, took);
        self.load.request(status, took);
    }

    /// Counts a finished execution.
    pub fn observe_execution(&self, row: &Execution) {
        self.functions.observe(row);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{FunctionId, JobId, NodeId, Outcome};

    fn row(function: &str, result: &str) -> Execution {
        let outcome = Outcome::new(result.to_owned().into());
        let id = JobId::new(NodeId(0), 0, 0);
        Execution::of(id, FunctionId::parse(function).unwrap(), &outcome.fields())
    }

    #[test]
    fn no_series_appears_before_its_first_value() {
        let metrics = Metrics::new(10).unwrap();
        let text = || String::from_utf8(metrics.text()).unwrap();
        metrics.observe_execution(&row("f-1", r#"{"status":"FAILED"}"#));
        assert!(!text().contains(r#"functionId="f-1",status="SUCCESS""#));
        metrics.observe_execution(&row("f-1", r#"{"status":"SUCCESS","durationMs":1}"#));
        assert!(text().contains(r#"function_invocations_total{functionId="f-1",status="SUCCESS"} 1"#));
        assert!(!text().contains("function_handler_duration_seconds"));
    }

    #[test]
    fn names_and_labels_are_fixed() {
        let metrics = Metrics::new(1).unwrap();
        let outcome = Outcome::new(r#"{"status":"SUCCESS","durationMs":5,"handlerDurationMs":2}"#.into());
        for (n, function) in ["f-1", "f-2", "f-1"].into_iter().enumerate() {
            let id = JobId::new(NodeId(0), 0, n as u64);
            metrics.observe_execution(&Execution::of(
                id,
                FunctionId::parse(function).unwrap(),
                &outcome.fields(),
            ));
        }
        let odd = Outcome::new(r#"{"status":"☠"}"#.into());
        metrics.observe_execution(&Execution::of(
            JobId::new(NodeId(0), 0, 9),
            FunctionId::parse("f-1").unwrap(),
            &odd.fields(),
        ));
        metrics.observe_http("POST", "/run", 202, Duration::from_millis(1));
        let text = String::from_utf8(metrics.text()).unwrap();
        for line in [
            "function_invocations_total{functionId=\"f-1\",status=\"SUCCESS\"} 2",
            "function_invocations_total{functionId=\"other\",status=\"SUCCESS\"} 1",
            "function_invocations_total{functionId=\"f-1\",status=\"other\"} 1",
            "function_duration_seconds_sum{functionId=\"f-1\",status=\"SUCCESS\"} 0.01",
            "function_handler_duration_seconds_count{functionId=\"f-1\",status=\"SUCCESS\"} 2",
            "http_request_duration_seconds_count{method=\"POST\",route=\"/run\",status_code=\"202\"} 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }
}
