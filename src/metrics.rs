//! All metrics of the process, in one struct.
//!
//! Existing dashboards parse `http_request_duration_seconds` and the metrics `function_*` with regular
//! expressions, so their names, labels and label order must not change. All others begin with `infra_`,
//! except `process_*` of the Prometheus crate. `docs/metrics.md` describes every metric with the same words
//! as its help text here.
//!
//! Metrics are fields, not looked up by name, so a misspelled name does not compile.

use crate::model::{Execution, FunctionId};
use ahash::RandomState;
use dashmap::DashMap;
use dashmap::mapref::entry::Entry;
use prometheus::{
    Encoder, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// In seconds, from a rejected request (0.5 ms) to the longest wait of a synchronous run.
const HTTP_BUCKETS: &[f64] = &[
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
    300.0,
];
/// In seconds, from a handler that does nothing to the time limit of a run.
const FUNCTION_BUCKETS: &[f64] =
    &[0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0];
const BATCH_BUCKETS: &[f64] = &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0];
/// In seconds.
const SEND_BUCKETS: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0];

/// The label value of functions beyond the bound, of unknown statuses, and of invalid status codes.
const OTHER: &str = "other";

/// All metrics of the process.
pub struct Metrics {
    registry: Registry,
    functions: FunctionMetrics,
    http: HistogramVec,
    /// Set when the metrics are read.
    pub requests_in_flight: IntGauge,
    pub waiters: IntGauge,
    pub jobs: JobMetrics,
    pub queue_waiting: IntGauge,
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
    /// By `code`, that of the problem.
    pub refused: IntCounterVec,
    pub audit: AuditMetrics,
    pub code_deleted: IntCounter,
    /// By `file`, and by `result`: `applied`, `refused`.
    pub conf_reloads: IntCounterVec,
    /// In Unix seconds.
    pub conf_applied_at: IntGauge,
    pub cache: CacheMetrics,
    pub subscriptions: SubscriptionMetrics,
    /// By `check`. As old as the last request for `/health`.
    pub health: IntGaugeVec,
    /// Set when the metrics are read.
    pub log_lines_dropped: IntGauge,
}

/// The metrics of the function cache.
pub struct CacheMetrics {
    pub hits: IntCounter,
    /// Reads that replaced an entry. A failed read counts unless the cached function was used instead.
    pub loads: IntCounter,
    pub stale: IntCounter,
    /// Announcements of changed functions, those of this node included.
    pub changes: IntCounter,
    pub changes_heard: IntGauge,
}

impl CacheMetrics {
    fn new(r: &Registry) -> Result<Self, prometheus::Error> {
        Ok(Self {
            hits: counter(r, "infra_function_cache_hits_total", "Lookups answered by the cache.")?,
            loads: counter(
                r,
                "infra_function_cache_loads_total",
                "Reads of the function table whose outcome was used.",
            )?,
            stale: counter(
                r,
                "infra_function_cache_stale_total",
                "Failed reads; the cached function was used.",
            )?,
            changes: counter(
                r,
                "infra_function_changes_total",
                "Change announcements received, own ones included.",
            )?,
            changes_heard: gauge(
                r,
                "infra_function_changes_heard",
                "1 while change announcements are received.",
            )?,
        })
    }
}

/// The metrics of the subscriptions of this node, by `subscription`: `results`, `changes`.
pub struct SubscriptionMetrics {
    lost: IntGaugeVec,
    beat_off: IntGaugeVec,
    pub missed: IntCounterVec,
}

impl SubscriptionMetrics {
    fn new(r: &Registry) -> Result<Self, prometheus::Error> {
        let labels = &["subscription"];
        let lost = ("infra_subscription_lost", "1 while the subscription receives nothing.");
        let beat_off = ("infra_subscription_beat_off", "1 while the ACL of Redis denies the beats.");
        let missed = ("infra_subscription_beats_missed_total", "Reconnects after missed beats.");
        Ok(Self {
            lost: gauges(r, lost.0, lost.1, labels)?,
            beat_off: gauges(r, beat_off.0, beat_off.1, labels)?,
            missed: counters(r, missed.0, missed.1, labels)?,
        })
    }

    /// Sets the state of a subscription.
    pub fn note(&self, subscription: &str, is_heard: bool, is_beat_off: bool) {
        self.lost.with_label_values(&[subscription]).set((!is_heard).into());
        self.beat_off.with_label_values(&[subscription]).set(is_beat_off.into());
    }

    pub fn is_heard(&self, subscription: &str) -> bool {
        self.lost.with_label_values(&[subscription]).get() == 0
    }

    pub fn is_beat_off(&self, subscription: &str) -> bool {
        self.beat_off.with_label_values(&[subscription]).get() != 0
    }
}

impl Metrics {
    /// Registers all metrics. At most `function_labels_max` function ids get series of their own; the others
    /// share the label value `other`.
    ///
    /// # Errors
    /// If two metrics have the same name, or a name is invalid.
    pub fn new(function_labels_max: usize) -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let r = &registry;
        let http_labels = &["method", "route", "status_code"];
        let http = ("http_request_duration_seconds", "Response time in seconds.");
        let sends = ("infra_queue_jobs_total", "Attempts to send a job, by their outcome.");
        let sends = counters(r, sends.0, sends.1, &["outcome"])?;
        let results = counters(r, "infra_results_total", "Results, by their outcome.", &["kind"])?;
        let metrics = Self {
            functions: FunctionMetrics::new(r, function_labels_max)?,
            http: histogram_vec(r, http.0, http.1, HTTP_BUCKETS, http_labels)?,
            requests_in_flight: gauge(r, "infra_requests_in_flight", "Requests being answered.")?,
            waiters: gauge(r, "infra_waiters", "Synchronous runs and long polls that wait for a result.")?,
            jobs: JobMetrics::new(r)?,
            queue_waiting: gauge(r, "infra_queue_waiting_jobs", "Jobs that wait to be sent or retried.")?,
            sends_in_flight: gauge(r, "infra_queue_sends_in_flight", "Batches being sent.")?,
            queue_refuses: gauge(
                r,
                "infra_queue_breaker_open",
                "1 while new jobs are rejected: nothing can be sent.",
            )?,
            queue_shed_permille: gauge(
                r,
                "infra_queue_shed_permille",
                "Jobs per thousand that are shed: the queue is slow.",
            )?,
            batch_jobs: histogram(r, "infra_queue_batch_jobs", "Jobs per batch, 1 to 10.", BATCH_BUCKETS)?,
            send_seconds: histogram(
                r,
                "infra_queue_send_seconds",
                "Seconds to journal and send a batch.",
                SEND_BUCKETS,
            )?,
            jobs_sent: sends.with_label_values(&["sent"]),
            sends,
            results_settled: results.with_label_values(&["settled"]),
            results,
            idempotency: counters(
                r,
                "infra_idempotent_requests_total",
                "Requests with an Idempotency-Key.",
                &["outcome"],
            )?,
            results_looked_up: counter(
                r,
                "infra_results_looked_up_total",
                "Results found by a lookup instead of a publication.",
            )?,
            limiter: counters(
                r,
                "infra_limiter_decisions_total",
                "Decisions, one per request and limit.",
                &["decision", "source"],
            )?,
            limiter_calls: counters(
                r,
                "infra_limiter_calls_total",
                "Calls to Redis: lease or exact.",
                &["mode"],
            )?,
            edge: EdgeMetrics::new(r)?,
            refused: counters(
                r,
                "infra_requests_refused_total",
                "Requests answered with a problem, by its code.",
                &["code"],
            )?,
            audit: AuditMetrics::new(r)?,
            conf_reloads: counters(
                r,
                "infra_conf_reloads_total",
                "Configuration changes, applied or rejected.",
                &["file", "result"],
            )?,
            conf_applied_at: gauge(
                r,
                "infra_conf_applied_timestamp_seconds",
                "Unix time of the last applied configuration.",
            )?,
            cache: CacheMetrics::new(r)?,
            subscriptions: SubscriptionMetrics::new(r)?,
            code_deleted: counter(r, "infra_code_deleted_total", "Unused code archives that were deleted.")?,
            health: gauges(
                r,
                "infra_healthy",
                "1 if the last health check of this part succeeded, else 0.",
                &["check"],
            )?,
            log_lines_dropped: gauge(r, "infra_log_lines_dropped", "Log lines lost since the start.")?,
            registry,
        };
        #[cfg(target_os = "linux")]
        metrics.registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
        Ok(metrics)
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
        let mut digits = *b"000";
        for (place, value) in digits.iter_mut().zip([status / 100, status / 10, status]) {
            *place += (value % 10) as u8;
        }
        let status = std::str::from_utf8(&digits).unwrap_or(OTHER);
        self.http.with_label_values(&[method, route, status]).observe(took.as_secs_f64());
    }

    /// Counts a finished execution.
    pub fn observe_execution(&self, row: &Execution) {
        self.functions.observe(row);
    }
}

/// The metrics of connections and upstreams.
pub struct EdgeMetrics {
    pub connections: IntGauge,
    pub connections_refused: IntCounter,
    pub handshakes_failed: IntCounter,
    pub accepts_failed: IntCounter,
    pub descriptors_short: IntGauge,
    /// By `upstream`, its name.
    pub upstream_healthy: IntGaugeVec,
}

impl EdgeMetrics {
    fn new(r: &Registry) -> Result<Self, prometheus::Error> {
        let healthy = ("infra_upstream_healthy_addresses", "Healthy addresses of an upstream.");
        let counted = |name, what| counter(r, name, what);
        Ok(Self {
            connections: gauge(r, "infra_connections", "Open client connections.")?,
            connections_refused: counted(
                "infra_connections_refused_total",
                "Connections beyond the connection limits.",
            )?,
            accepts_failed: counted(
                "infra_accepts_failed_total",
                "Failed accepts: no file descriptor was free.",
            )?,
            descriptors_short: gauge(
                r,
                "infra_file_descriptors_short",
                "1 while file descriptors are exhausted.",
            )?,
            handshakes_failed: counted(
                "infra_tls_handshakes_failed_total",
                "TLS handshakes that failed or timed out.",
            )?,
            upstream_healthy: gauges(r, healthy.0, healthy.1, &["upstream"])?,
        })
    }
}

/// The metrics of jobs in flight and of membership.
pub struct JobMetrics {
    pub in_flight: IntGauge,
    /// Jobs that were restored or adopted are included.
    pub accepted: IntCounter,
    pub finished: IntCounter,
    /// A check of the table: accepted − finished − in flight is always 0.
    pub unaccounted: IntGauge,
    pub adopted_nodes: IntCounter,
    pub dead_letters: IntCounter,
    /// While it is 1, this process admits no jobs.
    pub node_id_lost: IntGauge,
}

impl JobMetrics {
    fn new(r: &Registry) -> Result<Self, prometheus::Error> {
        let counted = |name, what| counter(r, name, what);
        Ok(Self {
            in_flight: gauge(r, "infra_jobs_in_flight", "Accepted jobs whose row is not written yet.")?,
            accepted: counted("infra_jobs_accepted_total", "Jobs that entered the table of jobs in flight.")?,
            finished: counted("infra_jobs_finished_total", "Jobs that left the table of jobs in flight.")?,
            unaccounted: gauge(
                r,
                "infra_jobs_unaccounted",
                "Accepted minus finished minus in flight. Not 0: an internal error.",
            )?,
            adopted_nodes: counted(
                "infra_nodes_adopted_total",
                "Dead nodes whose jobs this node has adopted.",
            )?,
            dead_letters: counted("infra_dead_letters_total", "Jobs ended because the queue gave them up.")?,
            node_id_lost: gauge(r, "infra_node_id_lost", "1 while another process holds this node's id.")?,
        })
    }
}

/// The metrics of the rows in one directory on the disk.
#[derive(Clone)]
pub struct DiskMetrics {
    pub rows: IntGauge,
    pub bytes: IntGauge,
    /// 1 while no more rows can be stored.
    pub full: IntGauge,
    /// `None`, here and below: the same row may enter and leave the directory several times.
    pub appended: Option<IntCounter>,
    pub replayed: Option<IntCounter>,
}

impl DiskMetrics {
    /// `place` is a part of the names, and `which` completes `rows …` in the help texts.
    fn new(r: &Registry, place: &str, which: &str) -> Result<Self, prometheus::Error> {
        let named = |part: &str, what: String| gauge(r, &format!("infra_audit_{place}_{part}"), &what);
        Ok(Self {
            rows: named("rows", format!("Rows {which}."))?,
            bytes: named("bytes", format!("Size of the rows {which}, in bytes."))?,
            full: named("full", format!("1 while no more rows {which} can be stored."))?,
            appended: None,
            replayed: None,
        })
    }
}

/// The metrics of rows and counters that are being written.
pub struct AuditMetrics {
    pub waiting_rows: IntGauge,
    pub rows: IntCounter,
    /// Rows that wait until the log table is available.
    pub spill: DiskMetrics,
    /// Rows that the log table rejects while it accepts others.
    pub failing: DiskMetrics,
    /// Rows that are kept for the operator.
    pub aside: DiskMetrics,
    pub rows_put_aside: IntCounter,
    /// The bytes of incomplete rows.
    pub spill_torn_bytes: IntCounter,
    pub retries: IntCounter,
    pub rows_refused: IntCounter,
    pub waiting_ends: IntGauge,
    /// Functions with a recommendation that waits are included.
    pub waiting_functions: IntGauge,
}

impl AuditMetrics {
    fn new(r: &Registry) -> Result<Self, prometheus::Error> {
        Ok(Self {
            spill: DiskMetrics {
                rows: gauge(r, "infra_audit_spill_rows", "Rows on disk because the log table is away.")?,
                bytes: gauge(r, "infra_audit_spill_bytes", "Size of the spilled rows, in bytes.")?,
                full: gauge(r, "infra_audit_spill_full", "1 while no more rows can be spilled.")?,
                appended: Some(counter(r, "infra_audit_spilled_rows_total", "Rows written to the disk.")?),
                replayed: Some(counter(
                    r,
                    "infra_audit_replayed_rows_total",
                    "Rows moved from the disk to the table.",
                )?),
            },
            failing: DiskMetrics::new(r, "failing", "that fail alone")?,
            aside: DiskMetrics::new(r, "aside", "set aside for the operator")?,
            rows_put_aside: counter(
                r,
                "infra_audit_rows_put_aside_total",
                "Rows that were set aside for the operator.",
            )?,
            spill_torn_bytes: counter(
                r,
                "infra_audit_spill_torn_bytes_total",
                "Bytes on disk that a crash left unreadable.",
            )?,
            waiting_rows: gauge(
                r,
                "infra_audit_waiting_rows",
                "Rows in memory that wait for the log table.",
            )?,
            rows: counter(r, "infra_audit_rows_total", "Rows written to the log table.")?,
            retries: counter(r, "infra_audit_retries_total", "Row writes that failed and are retried.")?,
            rows_refused: counter(
                r,
                "infra_audit_rows_refused_total",
                "Rows that the table rejected as invalid.",
            )?,
            waiting_ends: gauge(
                r,
                "infra_audit_waiting_ends",
                "Jobs with a row that are still in the journal.",
            )?,
            waiting_functions: gauge(
                r,
                "infra_audit_waiting_functions",
                "Functions whose counters wait to be written.",
            )?,
        })
    }
}

/// The metrics of executions. Their names, labels and label order are fixed.
struct FunctionMetrics {
    duration: HistogramVec,
    handler_duration: HistogramVec,
    invocations: IntCounterVec,
    /// The functions with series of their own, and their series for SUCCESS, which nearly every execution
    /// needs. So one look-up suffices. Functions are added in the order of their first execution. Requests
    /// for unknown functions cannot displace them, because only executed functions are added.
    own: DashMap<FunctionId, Successes, RandomState>,
    /// The length of `own`. `DashMap::len` would lock every shard.
    own_len: AtomicUsize,
    own_max: usize,
    /// The series of all other functions.
    other: Successes,
}

/// The series of one function with the status SUCCESS. Each series appears with its first value.
#[derive(Default)]
struct Successes {
    counted: OnceLock<(IntCounter, Histogram)>,
    handler_duration: OnceLock<Histogram>,
}

impl FunctionMetrics {
    fn new(r: &Registry, own_max: usize) -> Result<Self, prometheus::Error> {
        let labels = &["functionId", "status"];
        let whole = ("function_duration_seconds", "Seconds of a run, as reported.");
        let handler = ("function_handler_duration_seconds", "Seconds in the handler alone.");
        Ok(Self {
            duration: histogram_vec(r, whole.0, whole.1, FUNCTION_BUCKETS, labels)?,
            handler_duration: histogram_vec(r, handler.0, handler.1, FUNCTION_BUCKETS, labels)?,
            invocations: counters(r, "function_invocations_total", "Finished executions.", labels)?,
            own: DashMap::default(),
            own_len: AtomicUsize::new(0),
            own_max,
            other: Successes::default(),
        })
    }

    fn observe(&self, row: &Execution) {
        if let Some(own) = self.own.get(&row.function) {
            return self.add(row, row.function.as_str(), &own);
        }
        if self.own_len.load(Ordering::Relaxed) < self.own_max
            && let Entry::Vacant(place) = self.own.entry(row.function.clone())
            && self.own_len.fetch_add(1, Ordering::Relaxed) < self.own_max
        {
            place.insert(Successes::default());
        }
        match self.own.get(&row.function) {
            Some(own) => self.add(row, row.function.as_str(), &own),
            None => self.add(row, OTHER, &self.other),
        }
    }

    fn add(&self, row: &Execution, function: &str, successes: &Successes) {
        let (seconds, handler_seconds) =
            (row.duration_ms / 1000.0, row.handler_duration_ms.map(|ms| ms / 1000.0));
        let labels = &[function, row.status.known().unwrap_or(OTHER)];
        if !row.status.is_success() {
            self.invocations.with_label_values(labels).inc();
            self.duration.with_label_values(labels).observe(seconds);
            handler_seconds.inspect(|s| self.handler_duration.with_label_values(labels).observe(*s));
            return;
        }
        let (invocations, duration) = successes.counted.get_or_init(|| {
            (self.invocations.with_label_values(labels), self.duration.with_label_values(labels))
        });
        invocations.inc();
        duration.observe(seconds);
        if let Some(seconds) = handler_seconds {
            let handler =
                successes.handler_duration.get_or_init(|| self.handler_duration.with_label_values(labels));
            handler.observe(seconds);
        }
    }
}

fn histogram_vec(
    r: &Registry,
    name: &str,
    help: &str,
    buckets: &[f64],
    labels: &[&str],
) -> Result<HistogramVec, prometheus::Error> {
    let metric = HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), labels)?;
    r.register(Box::new(metric.clone()))?;
    Ok(metric)
}

fn histogram(r: &Registry, name: &str, help: &str, buckets: &[f64]) -> Result<Histogram, prometheus::Error> {
    let metric = Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec()))?;
    r.register(Box::new(metric.clone()))?;
    Ok(metric)
}

fn counters(
    r: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> Result<IntCounterVec, prometheus::Error> {
    let metric = IntCounterVec::new(Opts::new(name, help), labels)?;
    r.register(Box::new(metric.clone()))?;
    Ok(metric)
}

fn counter(r: &Registry, name: &str, help: &str) -> Result<IntCounter, prometheus::Error> {
    let metric = IntCounter::new(name, help)?;
    r.register(Box::new(metric.clone()))?;
    Ok(metric)
}

fn gauges(r: &Registry, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, prometheus::Error> {
    let metric = IntGaugeVec::new(Opts::new(name, help), labels)?;
    r.register(Box::new(metric.clone()))?;
    Ok(metric)
}

fn gauge(r: &Registry, name: &str, help: &str) -> Result<IntGauge, prometheus::Error> {
    let metric = IntGauge::new(name, help)?;
    r.register(Box::new(metric.clone()))?;
    Ok(metric)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{JobId, NodeId, Outcome};

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
