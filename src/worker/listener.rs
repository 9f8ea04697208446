//! The HTTP listener of `worker`: `GET /health` and `GET /metrics`. In `dev` the gateway answers both.
//!
//! hyper serves it. The process links hyper already, as the HTTP client, so its server adds no crate to the
//! build. Pingora was rejected: it brings its own process model (runtime, signals, grace periods), for two
//! routes without a body. So was a parser of our own: these requests come from the network.
//!
//! A connection is for one request. Nothing here waits for a job, and no job waits for anything here.

use crate::backend::{LoneStatusStore, WorkerActivity, WorkerPart};
use crate::log;
use crate::metrics::{WorkerProcessMetrics, accepts_gzip, gzip};
use bytes::Bytes;
use http::header::{
    ACCEPT_ENCODING, ALLOW, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_TYPE, HeaderValue, VARY,
};
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Map, Value, json};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Most open connections. Others wait in the queue of the socket.
const CONNECTIONS_MAX: usize = 64;
/// Time for a connection, from the first byte of the request to the last one of the response.
const CONNECTION_MAX: Duration = Duration::from_secs(10);
/// Time for the head of the request. Clients that send none must not keep others away for long.
const HEAD_MAX: Duration = Duration::from_secs(2);
/// Most bytes of a request head. hyper accepts no smaller bound.
const HEAD_BYTES_MAX: usize = 8 << 10;
const HEAD_FIELDS_MAX: usize = 64;
/// Pause after a connection that could not be accepted: most often no descriptor is free.
const ERROR_PAUSE: Duration = Duration::from_secs(1);
/// Deadline of the call that checks the store of the results.
const CHECK_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the outcome of that call is reused. Anyone may ask, and that must not load Redis.
const CHECK_KEPT: Duration = Duration::from_secs(1);

/// The loop that answers.
pub struct WorkerListener {
    pub socket: TcpListener,
    pub health: WorkerHealth,
    pub metrics: Arc<WorkerProcessMetrics>,
}

/// What is known of the sandbox since the start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SandboxReport {
    pub is_isolated: bool,
    pub why_not: Option<String>,
    pub network: &'static str,
    pub cgroups: &'static str,
}

impl WorkerListener {
    /// Answers until it is dropped, and then drops its connections.
    pub async fn run(self) {
        let Self { socket, health, metrics } = self;
        let state = Arc::new(ListenerState { health, metrics });
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                accepted = socket.accept(), if connections.len() < CONNECTIONS_MAX => match accepted {
                    Ok((stream, _)) => drop(connections.spawn(serve(stream, Arc::clone(&state)))),
                    Err(error) => {
                        tracing::warn!(%error, "Connection for /health or /metrics not accepted");
                        sleep(ERROR_PAUSE).await;
                    }
                },
                Some(_) = connections.join_next() => {}
            }
        }
    }
}

async fn serve(stream: TcpStream, state: Arc<ListenerState>) {
    let service = service_fn(move |request: Request<Incoming>| {
        let state = Arc::clone(&state);
        async move { Ok::<_, Infallible>(state.answer(&request).await) }
    });
    let mut http = http1::Builder::new();
    http.keep_alive(false).max_buf_size(HEAD_BYTES_MAX).max_headers(HEAD_FIELDS_MAX);
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_MAX);
    // A client that leaves, or sends no HTTP, concerns nobody.
    let _ = timeout(CONNECTION_MAX, http.serve_connection(TokioIo::new(stream), service)).await;
}

/// What all connections share.
struct ListenerState {
    health: WorkerHealth,
    metrics: Arc<WorkerProcessMetrics>,
}

impl ListenerState {
    async fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let (method, path) = (request.method(), request.uri().path());
        if !matches!(path, "/" | "/health" | "/metrics") {
            return response(StatusCode::NOT_FOUND, JSON, r#"{"error":"Not Found"}"#);
        }
        if !matches!(*method, Method::GET | Method::HEAD) {
            let mut response =
                response(StatusCode::METHOD_NOT_ALLOWED, JSON, r#"{"error":"Method Not Allowed"}"#);
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        if path == "/metrics" {
            let dropped = i64::try_from(log::lines_dropped()).unwrap_or(i64::MAX);
            self.metrics.log_lines_dropped.set(dropped);
            let accepts = accepts_gzip(request.headers().get_all(ACCEPT_ENCODING));
            return metrics_response(self.metrics.text(), accepts);
        }
        // `/` as well: health checks of the Python agent ask for it.
        let (status, body) = self.health.report().await;
        response(status, JSON, body.to_string())
    }
}

fn metrics_response(text: Vec<u8>, accepts: bool) -> Response<Full<Bytes>> {
    let packed = accepts.then(|| gzip(&text).ok()).flatten();
    let is_packed = packed.is_some();
    let mut response = response(StatusCode::OK, prometheus::TEXT_FORMAT, packed.unwrap_or(text));
    response.headers_mut().insert(VARY, HeaderValue::from_static("accept-encoding"));
    if is_packed {
        response.headers_mut().insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    response
}

const JSON: &str = "application/json; charset=utf-8";

fn response(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// The state of a worker, as `/health` shows it.
pub struct WorkerHealth {
    worker_id: String,
    activity: Arc<WorkerActivity>,
    /// The store of the results. `None`: it is not asked.
    store: Option<Arc<dyn LoneStatusStore>>,
    sandbox: SandboxReport,
    /// When the store was last asked, and whether it answered.
    asked: Mutex<Option<(Instant, bool)>>,
}

impl WorkerHealth {
    pub fn new(
        worker_id: String,
        activity: Arc<WorkerActivity>,
        store: Option<Arc<dyn LoneStatusStore>>,
        sandbox: SandboxReport,
    ) -> Self {
        Self { worker_id, activity, store, sandbox, asked: Mutex::const_new(None) }
    }

    /// 503 if this worker runs nothing, or nobody gets its results. Queue and code show the outcome of the
    /// last call, because the worker calls them all the time. A worker that drains is still healthy: a
    /// supervisor must not kill it for that.
    async fn report(&self) -> (StatusCode, Value) {
        let works = |part| !self.activity.is_failing_in(part);
        let is_running = self.activity.uptime().is_some();
        let (queue, code) = (works(WorkerPart::Queue), works(WorkerPart::Code));
        let results = works(WorkerPart::Results) && self.store_answers().await;
        let (status, word) = if !(is_running && queue && results) {
            (StatusCode::SERVICE_UNAVAILABLE, "ERROR")
        } else if !(code && self.sandbox.is_isolated) {
            (StatusCode::OK, "DEGRADED")
        } else {
            (StatusCode::OK, "OK")
        };
        let check = |is_good: bool| json!({ "status": if is_good { "OK" } else { "ERROR" } });
        let body = json!({
            "status": word,
            "version": VERSION,
            "workerId": self.worker_id,
            "draining": self.activity.is_draining(),
            "runs": self.activity.runs(),
            "checks": {
                "worker": check(is_running),
                "queue": check(queue),
                "results": check(results),
                "code": check(code),
                "sandbox": self.sandbox.shown(),
            },
        });
        (status, body)
    }

    /// Asks the store, at most once per [`CHECK_KEPT`] for all clients together.
    async fn store_answers(&self) -> bool {
        let Some(store) = &self.store else { return true };
        // Held during the call, so that concurrent requests share its outcome.
        let mut asked = self.asked.lock().await;
        if let Some((at, answers)) = *asked
            && at.elapsed() < CHECK_KEPT
        {
            return answers;
        }
        let answers = timeout(CHECK_TIMEOUT, store.ping()).await.is_ok_and(|answer| answer.is_ok());
        *asked = Some((Instant::now(), answers));
        answers
    }
}

impl SandboxReport {
    fn shown(&self) -> Value {
        let mut shown = Map::new();
        shown.insert("status".to_owned(), json!(if self.is_isolated { "OK" } else { "DEGRADED" }));
        shown.insert("isolated".to_owned(), json!(self.is_isolated));
        shown.insert("network".to_owned(), json!(self.network));
        shown.insert("cgroups".to_owned(), json!(self.cgroups));
        if let Some(why_not) = &self.why_not {
            shown.insert("whyNot".to_owned(), json!(why_not));
        }
        Value::Object(shown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::BackendError;
    use async_trait::async_trait;
    use std::net::SocketAddr;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// A store that counts how often it is asked.
    #[derive(Default)]
    struct CountedStore {
        asked: AtomicUsize,
        is_away: AtomicBool,
    }

    #[async_trait]
    impl LoneStatusStore for CountedStore {
        async fn put(&self, _: &str) -> Result<(), BackendError> {
            Ok(())
        }

        async fn ping(&self) -> Result<(), BackendError> {
            self.asked.fetch_add(1, Ordering::Relaxed);
            match self.is_away.load(Ordering::Relaxed) {
                true => Err(BackendError::Unavailable("away".into())),
                false => Ok(()),
            }
        }
    }

    fn isolated() -> SandboxReport {
        SandboxReport { is_isolated: true, why_not: None, network: "public", cgroups: "v2" }
    }

    fn health(store: &Arc<CountedStore>, sandbox: SandboxReport) -> WorkerHealth {
        WorkerHealth::new("w-1".to_owned(), Arc::default(), Some(store.clone()), sandbox)
    }

    #[tokio::test(start_paused = true)]
    async fn each_part_has_its_weight() {
        let open = SandboxReport {
            is_isolated: false,
            why_not: Some("bubblewrap is not installed".to_owned()),
            network: "full",
            cgroups: "none",
        };
        for (failing, is_away, sandbox, expected) in [
            (None, false, isolated(), (200, "OK")),
            (None, false, open.clone(), (200, "DEGRADED")),
            (Some(WorkerPart::Code), false, isolated(), (200, "DEGRADED")),
            (Some(WorkerPart::Queue), false, isolated(), (503, "ERROR")),
            (Some(WorkerPart::Results), false, isolated(), (503, "ERROR")),
            (None, true, open, (503, "ERROR")),
        ] {
            let store = Arc::new(CountedStore::default());
            store.is_away.store(is_away, Ordering::Relaxed);
            let health = health(&store, sandbox);
            assert_eq!(health.report().await.0, 503, "its loop does not run");
            let active = health.activity.begin();
            if let Some(part) = failing {
                health.activity.note(part, false);
            }
            active.show_draining();
            let (status, body) = health.report().await;
            assert_eq!((status.as_u16(), body["status"].as_str().unwrap()), expected, "{body}");
            assert_eq!((&body["draining"], &body["runs"]), (&json!(true), &json!(0)));
            assert_eq!(body["checks"]["sandbox"]["whyNot"].is_string(), !health.sandbox.is_isolated);
            assert_eq!(store.asked.load(Ordering::Relaxed), 1, "the outcome is reused");
        }
    }

    async fn ask(at: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(at).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).await.unwrap();
        response
    }

    #[tokio::test]
    async fn routes_are_answered_and_heads_are_bounded() {
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = socket.local_addr().unwrap();
        let metrics = Arc::new(WorkerProcessMetrics::new().unwrap());
        let health = health(&Arc::default(), isolated());
        let _active = health.activity.begin();
        let mut loops = JoinSet::new();
        loops.spawn(WorkerListener { socket, health, metrics }.run());
        for (request, status, words) in [
            ("GET /health", "200 OK", "\"status\":\"OK\""),
            ("GET /", "200 OK", "\"workerId\":\"w-1\""),
            ("GET /metrics", "200 OK", "infra_worker_isolated 0"),
            ("HEAD /health", "200 OK", ""),
            ("POST /health", "405 Method Not Allowed", "allow: GET, HEAD"),
            ("GET /other", "404 Not Found", "Not Found"),
        ] {
            let response = ask(at, &format!("{request} HTTP/1.1\r\nhost: w\r\n\r\n")).await;
            assert!(response.starts_with(&format!("HTTP/1.1 {status}\r\n")), "{request}: {response}");
            assert!(response.contains(words) && response.contains("connection: close"), "{response}");
        }
        for (accepted, is_packed) in [("deflate, gzip;q=0.5", true), ("gzip;q=0", false)] {
            let head = format!("HEAD /metrics HTTP/1.1\r\nhost: w\r\naccept-encoding: {accepted}\r\n\r\n");
            let response = ask(at, &head).await;
            assert!(response.contains("vary: accept-encoding"), "{response}");
            assert_eq!(response.contains("content-encoding: gzip"), is_packed, "{response}");
        }
        // The connection may be reset, because the rest of the head is not read.
        let mut stream = TcpStream::connect(at).await.unwrap();
        let long = format!("GET / HTTP/1.1\r\nhost: {}\r\n\r\n", "w".repeat(1 << 20));
        let _ = stream.write_all(long.as_bytes()).await;
        let mut response = Vec::new();
        let _ = stream.read_to_end(&mut response).await;
        assert!(!response.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&response));
    }
}
