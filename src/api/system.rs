//! `/`, `/health`, `/livez`, `/readyz` and `/metrics`: the state of this node and of its backends.

use super::problem::ApiError;
use super::queue_depth::{QueueDepth, timed};
use super::reply::Reply;
use super::routes;
use crate::backend::{Backend, BackendError, ExecutionStore, FunctionStore, Results};
use crate::lifecycle::{Lifecycle, Phase};
use crate::log;
use crate::metrics::{self, Metrics};
use http::StatusCode;
use http::header::{CONTENT_ENCODING, HeaderValue, VARY};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::time::Instant;

const VERSION: &str = env!("CARGO_PKG_VERSION");
/// How long a report is reused. Anyone may request it without a key, and that must not load the backends.
const REPORT_KEPT: Duration = Duration::from_secs(1);

/// The checks of subscriptions: (name in the report, label in the metrics).
const SUBSCRIPTIONS: [(&str, &str); 2] =
    [("resultsSubscription", "results"), ("changesSubscription", "changes")];

/// The handlers of the node's state.
pub struct System {
    health: Health,
    lifecycle: Lifecycle,
    metrics: Arc<Metrics>,
}

impl System {
    pub fn new(health: Health, lifecycle: Lifecycle, metrics: Arc<Metrics>) -> Self {
        Self { health, lifecycle, metrics }
    }

    /// 200 or 503 with the result of each check.
    pub async fn health(&self) -> Reply {
        let report = self.health.report().await;
        Reply::value(report.status, &report.body)
    }

    /// 200 while the process runs.
    pub fn livez(&self) -> Reply {
        Reply::json(StatusCode::OK, r#"{"status":"OK"}"#)
    }

    /// 200 if the node accepts requests.
    ///
    /// # Errors
    /// `NotReady` during start and drain, and while another process holds the node id.
    pub fn readyz(&self) -> Result<Reply, ApiError> {
        let is_lost = self.metrics.jobs.node_id_lost.get() != 0;
        let ready = self.lifecycle.phase() == Phase::Ready && !is_lost;
        ready.then(|| Reply::json(StatusCode::OK, r#"{"status":"READY"}"#)).ok_or(ApiError::NotReady)
    }

    /// All metrics in the Prometheus text format, compressed if the client accepts that.
    pub fn metrics(&self, accepts_gzip: bool) -> Reply {
        let requests = i64::try_from(self.lifecycle.requests_in_flight()).unwrap_or(i64::MAX);
        self.metrics.requests_in_flight.set(requests);
        self.metrics.log_lines_dropped.set(i64::try_from(log::lines_dropped()).unwrap_or(i64::MAX));
        let text = self.metrics.text();
        let packed = accepts_gzip.then(|| metrics::gzip(&text).ok()).flatten();
        let coding = packed.is_some().then(|| (CONTENT_ENCODING, HeaderValue::from_static("gzip")));
        let mut reply = Reply::json(StatusCode::OK, packed.unwrap_or(text));
        reply.content_type = prometheus::TEXT_FORMAT;
        reply.headers.push((VARY, HeaderValue::from_static("accept-encoding")));
        reply.headers.extend(coding);
        reply
    }
}

/// Name, version and routes of the service.
pub fn index() -> Reply {
    let endpoints: Vec<String> = routes::all().map(|r| format!("{} {}", r.method, r.pattern)).collect();
    let body = json!({ "service": "infra-controller", "version": VERSION, "endpoints": endpoints });
    Reply::value(StatusCode::OK, &body)
}

/// Checks every backend, at most once per [`REPORT_KEPT`] for all clients together.
pub struct Health {
    depth: Arc<QueueDepth>,
    results: Arc<dyn Results>,
    functions: Arc<dyn FunctionStore>,
    executions: Arc<dyn ExecutionStore>,
    /// Whether there can be other nodes. If so, node id and subscriptions are checked as well.
    is_fleet: bool,
    metrics: Arc<Metrics>,
    last: Mutex<Option<(Instant, Report)>>,
}

#[derive(Clone)]
struct Report {
    status: StatusCode,
    body: Value,
}

impl Health {
    pub fn new(backend: &Backend, depth: Arc<QueueDepth>, metrics: Arc<Metrics>) -> Self {
        Self {
            depth,
            results: Arc::clone(&backend.results),
            functions: Arc::clone(&backend.functions),
            executions: Arc::clone(&backend.executions),
            is_fleet: backend.membership.is_some(),
            metrics,
            last: Mutex::const_new(None),
        }
    }

    async fn report(&self) -> Report {
        // Held during the checks, so that concurrent requests share their report.
        let mut last = self.last.lock().await;
        if let Some((at, report)) = last.as_ref()
            && at.elapsed() < REPORT_KEPT
        {
            return report.clone();
        }
        let report = self.ask().await;
        *last = Some((Instant::now(), report.clone()));
        report
    }

    async fn ask(&self) -> Report {
        let (queue, results, functions, executions) = tokio::join!(
            self.depth.get(),
            timed(self.results.ping()),
            timed(self.functions.probe()),
            timed(self.executions.probe()),
        );
        let depth = queue.as_ref().ok().copied();
        if let Some(depth) = depth {
            self.metrics.queue_depth.set(i64::try_from(depth).unwrap_or(i64::MAX));
        }
        let away = || BackendError::Unavailable("the queue accepts no jobs".into());
        let queue =
            queue.and_then(|_| (self.metrics.queue_refuses.get() == 0).then_some(()).ok_or_else(away));
        let mut checks = Map::new();
        let mut check = |name: &str, result: Result<(), BackendError>| {
            let healthy = result.is_ok();
            self.metrics.health.with_label_values(&[name]).set(healthy.into());
            if let Err(e) = result {
                tracing::warn!(check = name, error = %e, "Health check failed");
            }
            checks.insert(name.to_owned(), json!({ "status": if healthy { "OK" } else { "ERROR" } }));
            healthy
        };
        // Without queue or results nothing runs. Without the tables cached functions run, and rows wait.
        let mut vital = vec![check("queue", queue), check(self.results.store_name(), results)];
        let mut useful = vec![check("functionsTable", functions), check("logsTable", executions)];
        if self.is_fleet {
            // A node admits nothing while another process holds its id.
            vital.push(check("nodeId", self.node_id()));
            // Without subscriptions results are looked up, and functions are read more often.
            useful.extend(SUBSCRIPTIONS.map(|(name, of)| check(name, self.subscription(of))));
        }
        if let (Some(depth), Some(Value::Object(queue))) = (depth, checks.get_mut("queue")) {
            queue.insert("depth".to_owned(), json!(depth));
        }
        for (name, of) in SUBSCRIPTIONS {
            if let Some(Value::Object(subscription)) = checks.get_mut(name) {
                let beat = if self.metrics.subscriptions.is_beat_off(of) { "OFF" } else { "ON" };
                subscription.insert("beat".to_owned(), json!(beat));
            }
        }
        let spilled = self.spilled();
        let is_spilling = spilled.is_some();
        checks.extend(spilled.map(|check| ("spill".to_owned(), check)));
        let is_open = self.metrics.worker().is_some_and(|worker| !worker.is_isolated());
        if is_open {
            checks.insert("sandbox".to_owned(), json!({ "status": "DEGRADED" }));
        }
        let (status, word) = if vital.contains(&false) {
            (StatusCode::SERVICE_UNAVAILABLE, "ERROR")
        } else if useful.contains(&false) || is_spilling || is_open {
            (StatusCode::OK, "DEGRADED")
        } else {
            (StatusCode::OK, "OK")
        };
        Report { status, body: json!({ "status": word, "version": VERSION, "checks": checks }) }
    }
}

impl Health {
    fn node_id(&self) -> Result<(), BackendError> {
        let held = || BackendError::Unavailable("another process holds this node's id".into());
        (self.metrics.jobs.node_id_lost.get() == 0).then_some(()).ok_or_else(held)
    }

    fn subscription(&self, subscription: &str) -> Result<(), BackendError> {
        let lost = || BackendError::Unavailable("published messages do not arrive".into());
        self.metrics.subscriptions.is_receiving(subscription).then_some(()).ok_or_else(lost)
    }

    /// The check of rows on the node's disk. `None` without such rows.
    fn spilled(&self) -> Option<Value> {
        let audit = &self.metrics.audit;
        let (rows, is_full) = (audit.spill.rows.get(), audit.spill.full.get() != 0);
        let word = if is_full { "ERROR" } else { "DEGRADED" };
        (rows > 0 || is_full).then(|| json!({ "status": word, "rows": rows }))
    }
}
