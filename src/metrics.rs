//! Every metric, in one struct. The names of CONTRACT §7 are fixed; ours begin with `infra_`.

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

/// Seconds; from a refusal (0.5 ms) to the longest wait of a synchronous run.
const HTTP_BUCKETS: &[f64] = &[
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
    300.0,
];
/// Seconds; from a handler that does nothing to the execution time limit.
const FUNCTION_BUCKETS: &[f64] =
    &[0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0];
const BATCH_BUCKETS: &[f64] = &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0];
const SEND_BUCKETS: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0];

/// The label of functions beyond the bound, and of statuses nobody knows.
const OTHER: &str = "other";

/// All metrics of the process.
pub struct Metrics {
    registry: Registry,
    functions: FunctionMetrics,
    http: HistogramVec,
    /// Requests being answered.
    pub requests_in_flight: IntGauge,
    /// Synchronous runs and long polls that wait for a result.
    pub waiters: IntGauge,
    pub jobs: JobMetrics,
    /// Jobs waiting to be sent.
    pub queue_waiting: IntGauge,
    pub sends_in_flight: IntGauge,
    /// 1 while new jobs are refused because nothing can be sent.
    pub queue_refuses: IntGauge,
    pub batch_jobs: Histogram,
    pub send_seconds: Histogram,
    /// By `outcome`: `sent` ([`Self::jobs_sent`]), `retried`, `refused`, `not_sent`, `unknown`.
    pub sends: IntCounterVec,
    /// What the usual case counts is looked up once, at start.
    pub jobs_sent: IntCounter,
    /// By `kind`: `settled` ([`Self::results_settled`]), `repeated`, `unknown_job`, `malformed`, `deferred`, `lost`,
    /// `late`.
    pub results: IntCounterVec,
    pub results_settled: IntCounter,
    /// Requests with an idempotency key, by `outcome`: `new`, `repeated`, `reused` (refused), `taken_over` (the job was
    /// certainly never sent), `sent_again` (the outcome of its send is unknown: there may be a second message).
    pub idempotency: IntCounterVec,
    /// Jobs whose result was found by a look-up, not by publication.
    pub results_looked_up: IntCounter,
    /// By `decision`: `allowed`, `limited`, and by `source`: `lease`, `refusal_memory`, `exact`, `local`, `closed`.
    pub limiter: IntCounterVec,
    /// Calls to the shared count, by `mode`: `lease`, `exact`.
    pub limiter_calls: IntCounterVec,
    pub queue_shed_permille: IntGauge,
    pub edge: EdgeMetrics,
    /// By `code`: that of the problem.
    pub refused: IntCounterVec,
    pub audit: AuditMetrics,
    pub code_deleted: IntCounter,
    /// Files whose new settings were put in force while the process runs, and those that could not be used.
    pub conf_reloads: IntCounterVec,
    /// Unix seconds.
    pub conf_applied_at: IntGauge,
    pub cache: CacheMetrics,
    pub subscriptions: SubscriptionMetrics,
    /// By `check`: 1 healthy, 0 not, as of the last look.
    pub health: IntGaugeVec,
    pub log_lines_dropped: IntGauge,
}

/// How functions are found.
pub struct CacheMetrics {
    pub hits: IntCounter,
    /// Reads of the table that took the place of what was known.
    pub loads: IntCounter,
    /// Looks at a known function that failed, so that it was used as known.
    pub stale: IntCounter,
    /// Announcements of changed functions.
    pub changes: IntCounter,
    /// 1 while such announcements are heard.
    pub changes_heard: IntGauge,
}

impl CacheMetrics {
    fn new(r: &Registry) -> Result<Self, prometheus::Error> {
        Ok(Self {
            hits: counter(r, "infra_function_cache_hits_total", "Functions found in the cache")?,
            loads: counter(r, "infra_function_cache_loads_total", "Functions read from the table")?,
            stale: counter(
                r,
                "infra_function_cache_stale_total",
                "Failed reads of functions that were then used as known",
            )?,
            changes: counter(r, "infra_function_changes_total", "Changes of functions heard of")?,
            changes_heard: gauge(r, "infra_function_changes_heard", "1 while changes are heard of")?,
        })
    }
}

/// The metrics of what a node is subscribed to, by `subscription`: `results`, `changes`.
pub struct SubscriptionMetrics {
    lost: IntGaugeVec,
    beat_off: IntGaugeVec,
    /// Subscriptions that were made again because beats did not arrive.
    pub missed: IntCounterVec,
}

impl SubscriptionMetrics {
    fn new(r: &Registry) -> Result<Self, prometheus::Error> {
        let labels = &["subscription"];
        let missed = ("infra_subscription_beats_missed_total", "Reconnects because beats did not arrive");
        Ok(Self {
            lost: gauges(r, "infra_subscription_lost", "1 while nothing is received", labels)?,
            beat_off: gauges(r, "infra_subscription_beat_off", "1 while beats are denied", labels)?,
            missed: counters(r, missed.0, missed.1, labels)?,
        })
    }

    /// What is known of a subscription.
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
    /// At most `function_labels_max` function ids get series of their own.
    pub fn new(function_labels_max: usize) -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let r = &registry;
        let http_labels = &["method", "route", "status_code"];
        let http = ("http_request_duration_seconds", "Time to answer a request");
        let sends = counters(r, "infra_queue_jobs_total", "Jobs handed to the queue", &["outcome"])?;
        let results = counters(r, "infra_results_total", "Results, by what became of them", &["kind"])?;
        let metrics = Self {
            functions: FunctionMetrics::new(r, function_labels_max)?,
            http: histogram_vec(r, http.0, http.1, HTTP_BUCKETS, http_labels)?,
            requests_in_flight: gauge(r, "infra_requests_in_flight", "Requests being answered")?,
            waiters: gauge(r, "infra_waiters", "Clients that wait for a result")?,
            jobs: JobMetrics::new(r)?,
            queue_waiting: gauge(r, "infra_queue_waiting_jobs", "Jobs waiting to be sent")?,
            sends_in_flight: gauge(r, "infra_queue_sends_in_flight", "Batches being sent")?,
            queue_refuses: gauge(
                r,
                "infra_queue_breaker_open",
                "1 while jobs are refused: the queue is away",
            )?,
            queue_shed_permille: gauge(r, "infra_queue_shed_permille", "Jobs of 1000 that are refused")?,
            batch_jobs: histogram(r, "infra_queue_batch_jobs", "Jobs in a batch", BATCH_BUCKETS)?,
            send_seconds: histogram(r, "infra_queue_send_seconds", "Time to send a batch", SEND_BUCKETS)?,
            jobs_sent: sends.with_label_values(&["sent"]),
            sends,
            results_settled: results.with_label_values(&["settled"]),
            results,
            idempotency: counters(
                r,
                "infra_idempotent_requests_total",
                "Requests with an idempotency key; sent_again: a second message may be on the queue",
                &["outcome"],
            )?,
            results_looked_up: counter(r, "infra_results_looked_up_total", "Results found by a look-up")?,
            limiter: counters(
                r,
                "infra_limiter_decisions_total",
                "Rate limit decisions",
                &["decision", "source"],
            )?,
            limiter_calls: counters(r, "infra_limiter_calls_total", "Calls to the shared count", &["mode"])?,
            edge: EdgeMetrics::new(r)?,
            refused: counters(r, "infra_requests_refused_total", "Refused requests, by code", &["code"])?,
            audit: AuditMetrics::new(r)?,
            conf_reloads: counters(
                r,
                "infra_conf_reloads_total",
                "Files of conf/ read again after a change",
                &["file", "result"],
            )?,
            conf_applied_at: gauge(
                r,
                "infra_conf_applied_timestamp_seconds",
                "When the settings in force were put in force",
            )?,
            cache: CacheMetrics::new(r)?,
            subscriptions: SubscriptionMetrics::new(r)?,
            code_deleted: counter(r, "infra_code_deleted_total", "Code archives swept away")?,
            health: gauges(r, "infra_healthy", "1 if the last check of this part succeeded", &["check"])?,
            log_lines_dropped: gauge(r, "infra_log_lines_dropped", "Log lines dropped: nobody read them")?,
            registry,
        };
        #[cfg(target_os = "linux")]
        metrics.registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
        Ok(metrics)
    }

    /// The Prometheus text format.
    pub fn text(&self) -> Vec<u8> {
        let mut text = Vec::new();
        // Encoding to memory fails only on a metric without a name; `new` registered them all.
        let _ = TextEncoder::new().encode(&self.registry.gather(), &mut text);
        text
    }

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

/// The metrics of connections.
pub struct EdgeMetrics {
    pub connections: IntGauge,
    pub connections_refused: IntCounter,
    pub handshakes_failed: IntCounter,
    /// Tries to accept a connection for which there was no file descriptor.
    pub accepts_failed: IntCounter,
    /// 1 while there are too few.
    pub descriptors_short: IntGauge,
    /// By `upstream`: its name.
    pub upstream_healthy: IntGaugeVec,
}

impl EdgeMetrics {
    fn new(r: &Registry) -> Result<Self, prometheus::Error> {
        let healthy = ("infra_upstream_healthy_addresses", "Addresses of an upstream that are healthy");
        let counted = |name, what| counter(r, name, what);
        Ok(Self {
            connections: gauge(r, "infra_connections", "Open connections of clients")?,
            connections_refused: counted("infra_connections_refused_total", "Connections without room")?,
            accepts_failed: counted(
                "infra_accepts_failed_total",
                "Connections that could not be accepted at once: no file descriptor was left",
            )?,
            descriptors_short: gauge(
                r,
                "infra_file_descriptors_short",
                "1 while too few file descriptors are left to accept connections",
            )?,
            handshakes_failed: counted("infra_tls_handshakes_failed_total", "TLS handshakes that failed")?,
            upstream_healthy: gauges(r, healthy.0, healthy.1, &["upstream"])?,
        })
    }
}

/// The metrics of jobs in flight.
pub struct JobMetrics {
    /// Accepted jobs whose row is not written yet.
    pub in_flight: IntGauge,
    /// Jobs that have entered the table, those of earlier lives and of other nodes included.
    pub accepted: IntCounter,
    /// Jobs that have left it again.
    pub finished: IntCounter,
    /// Accepted, less finished, less those in the table: not 0, and something is amiss.
    pub unaccounted: IntGauge,
    /// Nodes that were gone, and whose jobs this one has looked after.
    pub adopted_nodes: IntCounter,
    /// Jobs that the queue has given up.
    pub dead_letters: IntCounter,
    /// 1 while another process holds the lease of this node's id, and this one admits nothing.
    pub node_id_lost: IntGauge,
}

impl JobMetrics {
    fn new(r: &Registry) -> Result<Self, prometheus::Error> {
        let counted = |name, what| counter(r, name, what);
        Ok(Self {
            in_flight: gauge(r, "infra_jobs_in_flight", "Accepted jobs without a row")?,
            accepted: counted("infra_jobs_accepted_total", "Jobs that entered the table of jobs in flight")?,
            finished: counted("infra_jobs_finished_total", "Jobs that left the table of jobs in flight")?,
            unaccounted: gauge(r, "infra_jobs_unaccounted", "Jobs accepted, not finished and not in flight")?,
            adopted_nodes: counted("infra_nodes_adopted_total", "Nodes that were gone, and were adopted")?,
            dead_letters: counted("infra_dead_letters_total", "Jobs that the queue had given up")?,
            node_id_lost: gauge(r, "infra_node_id_lost", "1 while another process holds this node's id")?,
        })
    }
}

/// The metrics of rows in one place on the disk.
#[derive(Clone)]
pub struct DiskMetrics {
    pub rows: IntGauge,
    pub bytes: IntGauge,
    /// 1 while no more are taken.
    pub full: IntGauge,
    /// `None`: rows come and go there more than once.
    pub appended: Option<IntCounter>,
    pub replayed: Option<IntCounter>,
}

impl DiskMetrics {
    fn new(r: &Registry, place: &str, which: &str) -> Result<Self, prometheus::Error> {
        let named = |part: &str, what: String| gauge(r, &format!("infra_audit_{place}_{part}"), &what);
        Ok(Self {
            rows: named("rows", format!("Rows on the disk {which}"))?,
            bytes: named("bytes", format!("Bytes of rows on the disk {which}"))?,
            full: named("full", format!("1 while no more rows are taken of those {which}"))?,
            appended: None,
            replayed: None,
        })
    }
}

/// The metrics of rows and sums on their way to the tables.
pub struct AuditMetrics {
    pub waiting_rows: IntGauge,
    pub rows: IntCounter,
    /// Rows on the disk that wait for the table to be there.
    pub spill: DiskMetrics,
    /// Rows on the disk that the table does not take, though it takes others.
    pub failing: DiskMetrics,
    /// Rows on the disk that are for the operator.
    pub aside: DiskMetrics,
    /// Rows that were put there.
    pub rows_put_aside: IntCounter,
    /// Bytes on the disk that hold no whole row.
    pub spill_torn_bytes: IntCounter,
    /// Writes that failed and are tried again.
    pub retries: IntCounter,
    /// Rows that the table will never take.
    pub rows_refused: IntCounter,
    /// Jobs whose rows are written and that have not left the journal.
    pub waiting_ends: IntGauge,
    /// Functions whose sums, or whose advice, wait to be written.
    pub waiting_functions: IntGauge,
}

impl AuditMetrics {
    fn new(r: &Registry) -> Result<Self, prometheus::Error> {
        Ok(Self {
            spill: DiskMetrics {
                rows: gauge(r, "infra_audit_spill_rows", "Rows on the disk, waiting for the log table")?,
                bytes: gauge(r, "infra_audit_spill_bytes", "Bytes of rows on the disk")?,
                full: gauge(r, "infra_audit_spill_full", "1 while the disk takes no more rows")?,
                appended: Some(counter(r, "infra_audit_spilled_rows_total", "Rows that went to the disk")?),
                replayed: Some(counter(
                    r,
                    "infra_audit_replayed_rows_total",
                    "Rows that came from the disk",
                )?),
            },
            failing: DiskMetrics::new(
                r,
                "failing",
                "that the log table does not take though it takes others; they are tried again",
            )?,
            aside: DiskMetrics::new(r, "aside", "that were put aside for the operator")?,
            rows_put_aside: counter(
                r,
                "infra_audit_rows_put_aside_total",
                "Rows that the log table never took, and that are kept on the disk for the operator",
            )?,
            spill_torn_bytes: counter(
                r,
                "infra_audit_spill_torn_bytes_total",
                "Bytes that hold no whole row",
            )?,
            waiting_rows: gauge(r, "infra_audit_waiting_rows", "Rows waiting for the log table")?,
            rows: counter(r, "infra_audit_rows_total", "Rows written to the log table")?,
            retries: counter(r, "infra_audit_retries_total", "Row writes that failed and are tried again")?,
            rows_refused: counter(r, "infra_audit_rows_refused_total", "Rows the table refused for good")?,
            waiting_ends: gauge(
                r,
                "infra_audit_waiting_ends",
                "Jobs whose rows are written and that wait to leave the journal",
            )?,
            waiting_functions: gauge(
                r,
                "infra_audit_waiting_functions",
                "Functions whose sums wait to be written",
            )?,
        })
    }
}

/// The metrics of executions; the BFF reads them by regular expression.
struct FunctionMetrics {
    duration: HistogramVec,
    handler_duration: HistogramVec,
    invocations: IntCounterVec,
    /// The function ids that have series of their own, with those of their successes: what nearly every execution counts
    /// is found by one look-up. First come, first served: a scanner cannot push out a function that runs, because only
    /// executed functions get here.
    own: DashMap<FunctionId, Successes, RandomState>,
    /// `DashMap::len` locks every shard; the counter beside it does not.
    own_len: AtomicUsize,
    own_max: usize,
    /// Of the other functions.
    other: Successes,
}

/// The series of one function and the status SUCCESS. Each appears with its first value, not before.
#[derive(Default)]
struct Successes {
    counted: OnceLock<(IntCounter, Histogram)>,
    handler_duration: OnceLock<Histogram>,
}

impl FunctionMetrics {
    fn new(r: &Registry, own_max: usize) -> Result<Self, prometheus::Error> {
        let labels = &["functionId", "status"];
        let whole = ("function_duration_seconds", "Execution time that workers reported");
        let handler = ("function_handler_duration_seconds", "Handler time that workers reported");
        Ok(Self {
            duration: histogram_vec(r, whole.0, whole.1, FUNCTION_BUCKETS, labels)?,
            handler_duration: histogram_vec(r, handler.0, handler.1, FUNCTION_BUCKETS, labels)?,
            invocations: counters(r, "function_invocations_total", "Finished executions", labels)?,
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
    fn fixed_names_and_labels() {
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
