//! Reports what this worker does: to the gateway, or to Redis if no gateway is known.
//!
//! Reports are for operators and never delay a job. A report that fails is not repeated: the next one follows
//! within seconds. Only the first failure of an outage is logged.

use crate::backend::{BackendError, LoneStatusStore, WarmPools, WorkerActivity};
use crate::config::ControllerAddress;
use crate::https::{self, HttpsClient};
use crate::metrics::WorkerMetrics;
use crate::model::{now_ms, rfc3339_ms};
use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{Request, StatusCode, Uri};
use http_body_util::{BodyExt, Full, Limited};
use serde::Serialize;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, timeout};

/// Interval of heartbeats to a gateway, which counts a worker as healthy for 30 s.
const BEAT_EVERY: Duration = Duration::from_secs(10);
/// Interval of the status in Redis, a fraction of [`crate::backend::LONE_STATUS_TTL`].
const STORE_EVERY: Duration = Duration::from_secs(2);
/// Deadline of a report.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// Most of an answer that is read so that the connection can be used again, in bytes.
const ANSWER_BYTES_MAX: usize = 64 << 10;
/// With the prefix that the controllers before this gateway require.
const PATH: &str = "/api/worker/heartbeat";
/// Ends of `CONTROLLER_URL` that [`PATH`] contains.
const PREFIX: &str = "/api";

/// The loop that reports.
pub struct Heartbeats {
    pub to: HeartbeatTarget,
    pub worker_id: String,
    pub activity: Arc<WorkerActivity>,
    pub metrics: Arc<WorkerMetrics>,
}

/// Who receives the reports.
pub enum HeartbeatTarget {
    Gateway(Box<GatewayTarget>),
    Store(Arc<dyn LoneStatusStore>),
}

/// A gateway, over HTTP.
pub struct GatewayTarget {
    client: HttpsClient,
    uri: Uri,
    key: HeaderValue,
}

/// Why a report failed. No text contains the URL of the gateway, which may contain a password.
#[derive(Debug, thiserror::Error)]
pub enum HeartbeatFailure {
    #[error("no response in time")]
    TimeOut,
    #[error("the connection failed")]
    Connection,
    #[error("status {0}")]
    Status(u16),
    #[error(transparent)]
    Store(#[from] BackendError),
}

/// The body of a heartbeat, as docs/worker-protocol.md describes it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct HeartbeatBody<'a> {
    worker_id: &'a str,
    status: &'static str,
    pools: WarmPools,
    active_jobs: usize,
    uptime_seconds: u64,
    timestamp: String,
}

impl GatewayTarget {
    /// # Errors
    /// Why the address or the key cannot be used, as text to append to `CONTROLLER_URL`.
    pub fn new(address: &ControllerAddress) -> Result<Self, String> {
        let base = address.url.reveal().trim_end_matches('/');
        let base = base.strip_suffix(PREFIX).unwrap_or(base);
        let uri: Option<Uri> = format!("{base}{PATH}").parse().ok();
        let uri = uri.filter(|uri| uri.host().is_some_and(|host| !host.is_empty()));
        let uri = uri.ok_or("is not a URL of the form http://host:port")?;
        let key = HeaderValue::from_str(address.api_key.reveal());
        let mut key = key.map_err(|_| "needs a key in INFRA_API_KEY that a header field can carry")?;
        key.set_sensitive(true);
        let client = https::client(ANSWER_MAX).map_err(|e| format!("cannot be called: {e}"))?;
        Ok(Self { client, uri, key })
    }

    async fn send(&self, body: String) -> Result<(), HeartbeatFailure> {
        let mut request = Request::new(Full::new(Bytes::from(body)));
        *request.method_mut() = http::Method::POST;
        *request.uri_mut() = self.uri.clone();
        request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        request.headers_mut().insert("x-api-key", self.key.clone());
        let response = self.client.request(request).await.map_err(|_| HeartbeatFailure::Connection)?;
        let status = response.status();
        let _ = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        // Redirects are not followed: the key is for the host that the operator has named.
        if status == StatusCode::OK { Ok(()) } else { Err(HeartbeatFailure::Status(status.as_u16())) }
    }
}

impl HeartbeatTarget {
    fn every(&self) -> Duration {
        match self {
            Self::Gateway(_) => BEAT_EVERY,
            Self::Store(_) => STORE_EVERY,
        }
    }
}

impl Heartbeats {
    /// Reports until it is dropped. Once `stop` turns true, it reports that the worker drains.
    pub async fn run(self, mut stop: watch::Receiver<bool>) {
        let mut tick = interval(self.to.every());
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut is_draining, mut is_failing) = (false, false);
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                // Reported at once: the drain may be short.
                _ = stop.wait_for(|stop| *stop), if !is_draining => is_draining = true,
            }
            let outcome = timeout(ANSWER_MAX, self.report(is_draining)).await;
            match outcome.unwrap_or(Err(HeartbeatFailure::TimeOut)) {
                Ok(()) if std::mem::take(&mut is_failing) => tracing::info!("Heartbeats are accepted again"),
                Ok(()) => {}
                Err(error) => {
                    self.metrics.heartbeats_failed.inc();
                    if !std::mem::replace(&mut is_failing, true) {
                        tracing::warn!(%error, "Heartbeat not accepted; jobs still run. {}", self.advice());
                    }
                }
            }
        }
    }

    fn advice(&self) -> &'static str {
        match self.to {
            HeartbeatTarget::Gateway(_) => {
                "Check CONTROLLER_URL, and that INFRA_API_KEY is a key with the scope worker"
            }
            HeartbeatTarget::Store(_) => "Check Redis, and that its user may write system:status",
        }
    }

    async fn report(&self, is_draining: bool) -> Result<(), HeartbeatFailure> {
        match &self.to {
            HeartbeatTarget::Gateway(gateway) => gateway.send(self.body(is_draining)).await,
            HeartbeatTarget::Store(store) => match self.activity.lone_status() {
                Some(status) => store.put(&status).await.map_err(HeartbeatFailure::from),
                // The loop has not begun yet.
                None => Ok(()),
            },
        }
    }

    fn body(&self, is_draining: bool) -> String {
        let status = match is_draining {
            true => "draining",
            false if self.activity.is_failing() => "unhealthy",
            false => "healthy",
        };
        let body = HeartbeatBody {
            worker_id: &self.worker_id,
            status,
            pools: self.activity.pools(),
            active_jobs: self.activity.runs(),
            uptime_seconds: self.activity.uptime().unwrap_or_default().as_secs(),
            timestamp: rfc3339_ms(now_ms()),
        };
        // Text and numbers can always be serialized.
        serde_json::to_string(&body).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::WorkerPart;
    use crate::config::Secret;
    use crate::metrics::WorkerProcessMetrics;
    use async_trait::async_trait;
    use parking_lot::Mutex;
    use serde_json::{Value, json};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio::time::{advance, sleep};

    fn address(url: &str) -> ControllerAddress {
        let (url, api_key) = (Secret::new(url.to_owned()), Secret::new("a-key".to_owned()));
        ControllerAddress { url, api_key }
    }

    fn heartbeats(to: HeartbeatTarget) -> Heartbeats {
        let metrics = Arc::clone(&WorkerProcessMetrics::new().unwrap().worker);
        Heartbeats { to, worker_id: "w-1".to_owned(), activity: Arc::default(), metrics }
    }

    #[test]
    fn addresses_are_those_of_the_agent() {
        for (url, expected) in [
            ("http://10.0.1.5:8080", Some("http://10.0.1.5:8080/api/worker/heartbeat")),
            ("https://gateway.example/", Some("https://gateway.example/api/worker/heartbeat")),
            ("http://gateway/api", Some("http://gateway/api/worker/heartbeat")),
            ("http://gateway/infra/api/", Some("http://gateway/infra/api/worker/heartbeat")),
            ("http://", None),
            ("http://two words", None),
        ] {
            let uri = GatewayTarget::new(&address(url)).ok().map(|target| target.uri.to_string());
            assert_eq!(uri.as_deref(), expected, "{url}");
        }
    }

    /// Answers one request, and returns it.
    async fn answer(listener: &TcpListener, status: &str) -> String {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = Vec::new();
        while !request.ends_with(b"}") {
            assert!(stream.read_buf(&mut request).await.unwrap() > 0, "the request is incomplete");
        }
        let response = format!("HTTP/1.1 {status}\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{{}}");
        stream.write_all(response.as_bytes()).await.unwrap();
        String::from_utf8(request).unwrap()
    }

    #[tokio::test]
    async fn the_gateway_gets_the_documented_body() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let beats =
            heartbeats(HeartbeatTarget::Gateway(Box::new(GatewayTarget::new(&address(&url)).unwrap())));
        let active = beats.activity.begin();
        active.show_runs(2);
        beats.activity.show_pools(WarmPools { python: 3, nodejs: 1, ..WarmPools::default() });
        let (sent, request) = tokio::join!(beats.report(false), answer(&listener, "200 OK"));
        sent.unwrap();
        assert!(request.starts_with("POST /api/worker/heartbeat HTTP/1.1\r\n"), "{request}");
        assert!(request.contains("x-api-key: a-key\r\n"), "{request}");
        let body = request.split_once("\r\n\r\n").unwrap().1;
        let mut body: Value = serde_json::from_str(body).unwrap();
        let at = body.as_object_mut().unwrap().remove("timestamp").unwrap();
        assert!(crate::model::parse_rfc3339_ms(at.as_str().unwrap()).is_some(), "{at}");
        let pools = json!({ "python": 3, "nodejs": 1, "cpp": 0, "go": 0 });
        let expected = json!({
            "workerId": "w-1", "status": "healthy", "pools": pools, "activeJobs": 2, "uptimeSeconds": 0,
        });
        assert_eq!(body, expected);

        let (sent, _) = tokio::join!(beats.report(false), answer(&listener, "403 Forbidden"));
        assert!(matches!(sent, Err(HeartbeatFailure::Status(403))), "{sent:?}");
        drop(listener);
        let sent = beats.report(false).await;
        assert!(matches!(sent, Err(HeartbeatFailure::Connection)), "{sent:?}");
    }

    #[test]
    fn the_status_tells_the_gateway_what_to_expect() {
        let beats = heartbeats(HeartbeatTarget::Store(Arc::new(MemoryStore::default())));
        let status = |is_draining| {
            let body: Value = serde_json::from_str(&beats.body(is_draining)).unwrap();
            body["status"].as_str().unwrap().to_owned()
        };
        assert_eq!((status(false), status(true)), ("healthy".into(), "draining".into()));
        beats.activity.note(WorkerPart::Queue, false);
        assert_eq!((status(false), status(true)), ("unhealthy".into(), "draining".into()));
        beats.activity.note(WorkerPart::Queue, true);
        assert_eq!(status(false), "healthy");
    }

    /// Keeps what was stored, unless it is away.
    #[derive(Default)]
    struct MemoryStore {
        stored: Mutex<Vec<String>>,
        is_away: Mutex<bool>,
    }

    #[async_trait]
    impl LoneStatusStore for MemoryStore {
        async fn put(&self, status: &str) -> Result<(), BackendError> {
            if *self.is_away.lock() {
                // Longer than a report may take.
                sleep(ANSWER_MAX * 2).await;
            }
            self.stored.lock().push(status.to_owned());
            Ok(())
        }

        async fn ping(&self) -> Result<(), BackendError> {
            Ok(())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_lone_worker_stores_its_status_and_survives_an_outage() {
        let store = Arc::new(MemoryStore::default());
        let beats = heartbeats(HeartbeatTarget::Store(store.clone()));
        let (activity, metrics) = (beats.activity.clone(), beats.metrics.clone());
        let _active = activity.begin();
        let (_stop, stopped) = watch::channel(false);
        let mut loops = tokio::task::JoinSet::new();
        loops.spawn(beats.run(stopped));
        sleep(STORE_EVERY * 3 + Duration::from_millis(1)).await;
        assert_eq!(store.stored.lock().len(), 4);
        let status: Value = serde_json::from_str(&store.stored.lock()[0]).unwrap();
        assert_eq!((&status["worker_count"], &status["active_jobs"]), (&json!(1), &json!(0)));
        *store.is_away.lock() = true;
        sleep(ANSWER_MAX * 4).await;
        assert_eq!((store.stored.lock().len(), metrics.heartbeats_failed.get() > 1), (4, true));
        *store.is_away.lock() = false;
        advance(ANSWER_MAX).await;
        sleep(STORE_EVERY * 2).await;
        assert!(store.stored.lock().len() > 4);
    }
}
