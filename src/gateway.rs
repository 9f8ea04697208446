//! The Pingora side: request id → route → API key → rate limit → capped body → `api` → response.
//!
//! All routes are local so far, so everything happens in `request_filter`, which costs no more than a bare HTTP
//! app would. Errors are written as ordinary responses: Pingora's own `respond_error` always closes the connection.

mod api_key;
mod body;
mod request_id;

pub use api_key::ApiKeys;

use crate::api::{Api, ApiError, Call, CallHeaders, Found, Reply, Route, Scope, Takes, find};
use crate::config::HttpConf;
use crate::lifecycle::{Lifecycle, Phase, RequestGuard};
use crate::limiter::{Counted, RateLimiter};
use crate::metrics::Metrics;
use async_trait::async_trait;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderName, HeaderValue};
use http::{Method, StatusCode, Version};
use pingora::http::ResponseHeader;
use pingora::modules::http::HttpModules;
use pingora::prelude::{HttpPeer, ProxyHttp, Session};
use request_id::RequestId;
use std::sync::Arc;
use std::time::{Duration, Instant};

const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");
const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The metric label of a path that is no route.
const NO_ROUTE: &str = "(none)";
/// The metric label of a request whose client left before the answer.
const CLIENT_GONE: u16 = 499;

/// The server's application.
pub struct Gateway {
    api: Api,
    keys: ApiKeys,
    limiter: RateLimiter,
    lifecycle: Lifecycle,
    metrics: Arc<Metrics>,
    http: HttpConf,
}

/// One request.
pub struct Ctx {
    started: Instant,
    route: &'static str,
    /// The row of the table, if the request leads to one.
    found: Option<&'static Route>,
    status: u16,
    /// No other request can follow on the connection.
    is_last: bool,
    _counted: RequestGuard,
}

impl Gateway {
    pub fn new(
        api: Api,
        keys: ApiKeys,
        limiter: RateLimiter,
        lifecycle: Lifecycle,
        metrics: Arc<Metrics>,
        http: HttpConf,
    ) -> Self {
        Self { api, keys, limiter, lifecycle, metrics, http }
    }

    /// The filters in order, then the handler. With the answer, what the limits said. `None`: the client has left.
    async fn answer(
        &self,
        session: &mut Session,
        ctx: &mut Ctx,
    ) -> Option<(Result<Reply, ApiError>, Counted)> {
        let mut counted = Counted::default();
        let (route, mut call) = match self.admit(session, ctx, &mut counted).await {
            Ok(admitted) => admitted,
            Err(e) => return Some((Err(e), counted)),
        };
        call.counted = counted;
        let reply = match route.takes {
            // Uploads are few and large: no run is to take their room.
            Takes::Stream => Box::pin(self.call_streaming(session, route, &call)).await,
            Takes::Nothing if !self.discard_body(session).await => {
                ctx.is_last = true;
                self.api.call(route.endpoint, &call).await
            }
            // A change that has begun goes to its end, whoever waits for it: it must be announced if it was written.
            Takes::Nothing | Takes::Whole if route.scope == Some(Scope::Write) => {
                self.api.call(route.endpoint, &call).await
            }
            Takes::Nothing | Takes::Whole => tokio::select! {
                biased;
                reply = self.api.call(route.endpoint, &call) => reply,
                // Reading on is how a client that leaves is noticed. The body is done, so this is the next request.
                _ = session.downstream_session.read_body_or_idle(true) => return None,
            },
        };
        Some((reply, call.counted))
    }

    async fn discard_body(&self, session: &mut Session) -> bool {
        body::discard(session, Duration::from_millis(self.http.drain_body_timeout_ms)).await
    }

    async fn call_streaming(
        &self,
        session: &mut Session,
        route: &Route,
        call: &Call,
    ) -> Result<Reply, ApiError> {
        let bytes_max = self.api.body_bytes_max(route.endpoint);
        let timeout = Duration::from_secs(self.http.upload_timeout_s);
        let mut body = body::Streamed::open(session, bytes_max, timeout)?;
        self.api.call_streaming(route.endpoint, call, &mut body).await
    }

    async fn admit(
        &self,
        session: &mut Session,
        ctx: &mut Ctx,
        counted: &mut Counted,
    ) -> Result<(&'static Route, Call), ApiError> {
        let header = session.req_header();
        let (route, params) = match find(&header.method, header.uri.path()) {
            Found::Route(route, params) => (route, params),
            Found::OtherMethod { pattern, allow } => {
                ctx.route = pattern;
                return Err(ApiError::MethodNotAllowed { allow });
            }
            Found::Nothing => return Err(ApiError::NoSuchRoute),
        };
        ctx.route = route.pattern;
        ctx.found = Some(route);
        let mut key_name = Arc::default();
        if route.scope.is_some() {
            let key = self.keys.check(header.headers.get(X_API_KEY))?;
            key_name = Arc::clone(&key.key_name);
            let client = || session.client_addr().and_then(|a| a.as_inet()).map(std::net::SocketAddr::ip);
            self.limiter.check(route.pattern, &key_name, client, counted).await?;
        }
        let header = session.req_header();
        let mut call = Call {
            params,
            uri: header.uri.clone(),
            headers: CallHeaders::of(&header.headers),
            body: bytes::Bytes::new(),
            key_name,
            counted: Counted::default(),
        };
        if route.takes == Takes::Whole {
            let timeout = Duration::from_secs(self.http.body_timeout_s);
            call.body = body::read(session, self.api.body_bytes_max(route.endpoint), timeout).await?;
        }
        Ok((route, call))
    }

    /// Must be set on every request, as Pingora starts each with an endless keepalive; and just before the answer, as
    /// answering `Expect` resets it and a drain may begin while the handler runs.
    fn keep_alive(&self, session: &mut Session) {
        let stopping = self.lifecycle.phase() >= Phase::Draining;
        let header = session.req_header();
        // HTTP/1.0 keeps a connection only if asked to.
        let asks = |field: &HeaderValue| {
            field.as_bytes().split(|b| *b == b',').any(|t| t.trim_ascii().eq_ignore_ascii_case(b"keep-alive"))
        };
        let old = header.version == Version::HTTP_10
            && !header.headers.get_all(http::header::CONNECTION).iter().any(asks);
        session.set_keepalive((!stopping && !old).then_some(self.http.keepalive_s));
    }

    async fn write(&self, session: &mut Session, reply: Reply, id: RequestId) -> pingora::Result<()> {
        let (mut head, ()) = http::Response::new(()).into_parts();
        head.status = reply.status;
        // And what Pingora adds: `date` and `connection`.
        head.headers.reserve(reply.headers.len() + 5);
        head.headers.insert(X_REQUEST_ID, id.into_value());
        for (name, value) in reply.headers {
            head.headers.append(name, value);
        }
        let bodyless = reply.status == StatusCode::NOT_MODIFIED;
        if !bodyless {
            head.headers.insert(CONTENT_TYPE, HeaderValue::from_static(reply.content_type));
            head.headers.insert(CONTENT_LENGTH, reply.body.len().into());
        }
        let no_body = bodyless || reply.body.is_empty() || session.req_header().method == Method::HEAD;
        // Names go out in small letters, as HTTP/2 wants them: Pingora would keep another spelling in a second map, and
        // reads each name anew if it is given one by one.
        let header = Box::new(ResponseHeader::from(head));
        session.write_response_header(header, no_body).await?;
        if !no_body {
            session.write_response_body(Some(reply.body), true).await?;
        }
        Ok(())
    }
}

#[async_trait]
impl ProxyHttp for Gateway {
    type CTX = Ctx;

    fn new_ctx(&self) -> Ctx {
        Ctx {
            started: Instant::now(),
            route: NO_ROUTE,
            found: None,
            status: CLIENT_GONE,
            is_last: false,
            _counted: self.lifecycle.request(),
        }
    }

    /// None: Pingora would set up compression for each request, which nobody asked for.
    fn init_downstream_modules(&self, _: &mut HttpModules) {}

    async fn request_filter(&self, session: &mut Session, ctx: &mut Ctx) -> pingora::Result<bool> {
        session.set_pipelining_enabled(true);
        session.set_close_on_response_before_downstream_finish(false);
        session.set_total_drain_timeout(Some(Duration::from_millis(self.http.drain_body_timeout_ms)));
        let id = RequestId::of(session.req_header().headers.get(X_REQUEST_ID));
        let Some((answer, counted)) = self.answer(session, ctx).await else {
            session.set_keepalive(None);
            return Ok(true);
        };
        self.keep_alive(session);
        if ctx.is_last {
            session.set_keepalive(None);
        }
        let mut reply = answer.unwrap_or_else(|error| {
            self.metrics.refused.with_label_values(&[error.code()]).inc();
            if matches!(error, ApiError::BodyTimeout | ApiError::BodyBroken) {
                // What follows on this connection cannot be told from the rest of the body.
                session.set_keepalive(None);
            }
            error.into_reply(id.as_str())
        });
        counted.add_fields(&mut reply.headers);
        ctx.status = reply.status.as_u16();
        debug_assert!(
            ctx.found.is_none_or(|route| route.statuses().any(|status| status == ctx.status)),
            "{} {} answers {}, which the route table does not say",
            session.req_header().method,
            ctx.route,
            ctx.status,
        );
        if self.write(session, reply, id).await.is_err() {
            // The client has left in the middle; nothing more can be said to it.
            ctx.status = CLIENT_GONE;
            session.set_keepalive(None);
        }
        Ok(true)
    }

    /// No upstreams are configured yet, and `request_filter` answers everything.
    async fn upstream_peer(&self, _: &mut Session, _: &mut Ctx) -> pingora::Result<Box<HttpPeer>> {
        pingora::Error::e_explain(pingora::ErrorType::HTTPStatus(502), "no upstream")
    }

    async fn logging(&self, session: &mut Session, _: Option<&pingora::Error>, ctx: &mut Ctx) {
        // Any method name may be sent; only those we serve become a label.
        let method = session.req_header().method.as_str();
        let known = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"];
        let method = if known.contains(&method) { method } else { "other" };
        self.metrics.observe_http(method, ctx.route, ctx.status, ctx.started.elapsed());
    }
}
