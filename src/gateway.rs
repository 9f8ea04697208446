//! The HTTP edge, as a Pingora application.
//!
//! A request passes these steps: request id, route, API key, rate limit, bounded body, then `api` or an
//! upstream, and the response. `request_filter` answers the gateway's own routes, without Pingora's proxy
//! phases. Other paths may belong to an upstream; Pingora forwards those. Errors are written as ordinary
//! responses, because Pingora's `respond_error` always closes the connection.
//!
//! In reading order:
//!
//! - [`guard`] — the limits on connections, and the only reader of messages from the network
//! - [`tls`] — the settings of the TLS listener
//! - [`fields`] — header fields that may occur only once
//! - [`client`] — the client's address behind trusted proxies
//! - [`api_key`] — authentication
//! - [`body`], [`inflate`] — request bodies, bounded in size and time
//! - [`respond`], [`rate_limit`] and [`cors`] — responses of the gateway itself and their header fields
//! - [`streaming`] — bodies that are produced while they are sent
//! - [`upstream`] and [`timed_body`] — requests forwarded to upstreams
//! - [`settings`] — the settings that may change while the process runs
//! - [`trace`] — the span of a request, if it is recorded
//! - [`descriptors`] — the connection limit that the limit of open files allows

mod api_key;
mod body;
mod client;
mod cors;
mod descriptors;
mod fields;
mod guard;
mod inflate;
pub mod rate_limit;
mod request_id;
mod respond;
mod settings;
mod streaming;
mod timed_body;
mod tls;
mod trace;
mod upstream;

pub use guard::{Accepted, GuardState, ListenerApp};
pub use settings::{GatewaySettings, tls_of};
pub use tls::certificate_ends;
pub use upstream::pool::HealthLoop;
pub use upstream::via::Pseudonym;

use crate::api::{
    Api, ApiError, BodyMode, Call, CallHeaders, Endpoint, Reply, ReplyStream, Route, RouteMatch, find,
};
use crate::lifecycle::{Lifecycle, Phase, RequestGuard};
use crate::limiter::{RateLimitState, RateLimiter};
use crate::metrics::{self, Metrics};
use crate::model::Scope;
use crate::traces::Traces;
use api_key::X_API_KEY;
use async_trait::async_trait;
use bytes::Bytes;
use guard::refused_over_http2;
use http::header::{ACCEPT_ENCODING, EXPECT, HeaderName, HeaderValue, UPGRADE, VARY};
use http::{Method, StatusCode, Version};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::modules::http::HttpModules;
use pingora::prelude::{HttpPeer, ProxyHttp, Session};
use pingora::protocols::http::ServerSession;
use pingora::proxy::FailToProxy;
use pingora::upstreams::peer::Peer;
use request_id::{RequestId, X_REQUEST_ID};
use respond::{CLIENT_GONE, is_http2};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use streaming::StreamEnd;
use trace::{RequestOutcome, TracedRequest};
use upstream::forward::ForwardedRequest;
use upstream::origin::RequestSource;
use upstream::pool::Upstream;

/// The metric label of paths that match no route.
const NO_ROUTE: &str = "(none)";
/// The Pingora application: the filters in front of the API and the upstreams.
pub struct Gateway {
    api: Api,
    edge: GatewaySettings,
    limiter: RateLimiter,
    lifecycle: Lifecycle,
    traces: Traces,
    metrics: Arc<Metrics>,
}

/// The state of one request, which Pingora hands to each phase.
pub struct RequestContext {
    started: Instant,
    route: &'static str,
    /// Set if the request is forwarded to an upstream.
    passage: Option<Box<ForwardedRequest>>,
    /// The CORS fields of the response.
    cors: Vec<(HeaderName, HeaderValue)>,
    /// The matching row of the route table, if any.
    found: Option<&'static Route>,
    status: u16,
    /// Whether the connection closes after the response.
    is_last: bool,
    /// When the body of a stream began. Its life is no response time.
    streamed_at: Option<Instant>,
    /// Counts the request as in flight.
    counted: Option<RequestGuard>,
    /// `None`: the request is not recorded.
    trace: Option<Box<TracedRequest>>,
}

/// A response of the gateway itself, and the rate-limit state for its header fields.
type GatewayResponse = (Result<Reply, ApiError>, RateLimitState);

/// Why the gateway itself does not respond.
enum NotAnswered {
    Forwarded,
    /// The client has disconnected.
    ClientDisconnected,
}

impl Gateway {
    pub fn new(
        api: Api,
        edge: GatewaySettings,
        limiter: RateLimiter,
        lifecycle: Lifecycle,
        traces: Traces,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { api, edge, limiter, lifecycle, traces, metrics }
    }

    /// Answers a request, unless an upstream does. Returns whether it was answered.
    async fn serve(
        &self,
        session: &mut Session,
        ctx: &mut RequestContext,
        id: RequestId,
    ) -> pingora::Result<bool> {
        let request = session.req_header();
        ctx.cors = cors::fields(&self.edge.http.get(), &request.headers);
        let refusal = refusal_of_head(request).map(|error| self.refused(session, error, &id));
        if let Some(reply) = refusal.or_else(|| self.preflight(session.req_header(), ctx)) {
            self.keep_alive(session);
            self.finish(session, ctx, reply, id).await;
            return Ok(true);
        }
        let (answer, counted) = match self.answer(session, ctx, &id).await {
            Ok(answer) => answer,
            Err(NotAnswered::Forwarded) => {
                self.keep_alive(session);
                return Ok(false);
            }
            Err(NotAnswered::ClientDisconnected) => {
                session.set_keepalive(None);
                return Ok(true);
            }
        };
        self.keep_alive(session);
        if ctx.is_last {
            session.set_keepalive(None);
        }
        let mut reply = answer.unwrap_or_else(|error| self.refused(session, error, &id));
        rate_limit::add_fields(&counted, &mut reply.headers);
        debug_assert!(
            ctx.found.is_none_or(|route| route.statuses().any(|status| status == reply.status.as_u16())),
            "{} {} has the response status {}, which the route table does not list",
            session.req_header().method,
            ctx.route,
            reply.status,
        );
        self.finish(session, ctx, reply, id).await;
        Ok(true)
    }

    /// Runs the filters in order, then the handler.
    async fn answer(
        &self,
        session: &mut Session,
        ctx: &mut RequestContext,
        id: &RequestId,
    ) -> Result<GatewayResponse, NotAnswered> {
        let mut counted = RateLimitState::default();
        let (route, mut call) = match self.admit(session, ctx, &mut counted).await {
            Ok(admitted) => admitted,
            Err(ApiError::NoSuchRoute) => {
                // Boxed, so that the futures of other requests stay small.
                return Box::pin(self.forward(session, ctx, id)).await;
            }
            Err(e) => return Ok((Err(e), counted)),
        };
        call.counted = counted;
        let reply = match route.takes {
            // Boxed: uploads are rare, and their large future must not enlarge that of a run.
            BodyMode::Stream => Box::pin(self.call_streaming(session, route, &call)).await,
            BodyMode::Nothing if !self.discard_body(session).await => {
                ctx.is_last = true;
                self.api.call(route.endpoint, &call).await
            }
            // A write runs to completion even if the client disconnects: once stored, it must be announced.
            BodyMode::Nothing | BodyMode::Whole if route.scope == Some(Scope::Write) => {
                self.api.call(route.endpoint, &call).await
            }
            BodyMode::Nothing | BodyMode::Whole => tokio::select! {
                biased;
                reply = self.api.call(route.endpoint, &call) => reply,
                // The body has been read, so this read completes only when the client disconnects.
                _ = session.downstream_session.read_body_or_idle(true) => {
                    return Err(NotAnswered::ClientDisconnected);
                }
            },
        };
        Ok((reply, call.counted))
    }

    async fn call_streaming(
        &self,
        session: &mut Session,
        route: &Route,
        call: &Call,
    ) -> Result<Reply, ApiError> {
        let bytes_max = self.api.body_bytes_max(route.endpoint);
        let timeout = Duration::from_secs(self.edge.http.get().upload_timeout_s);
        let mut body = body::BodyReader::wanted(session, bytes_max, timeout)?;
        self.api.call_streaming(route.endpoint, call, &mut body).await
    }

    async fn admit(
        &self,
        session: &mut Session,
        ctx: &mut RequestContext,
        counted: &mut RateLimitState,
    ) -> Result<(&'static Route, Call), ApiError> {
        let header = session.req_header();
        let (route, params) = match find(&header.method, header.uri.path()) {
            RouteMatch::Route(route, params) => (route, params),
            RouteMatch::OtherMethod { pattern, allow } => {
                ctx.route = pattern;
                return Err(ApiError::MethodNotAllowed { allow });
            }
            RouteMatch::Nothing => return Err(ApiError::NoSuchRoute),
        };
        ctx.route = route.pattern;
        ctx.found = Some(route);
        let mut caller = None;
        if let Some(scope) = self.scope_of(route) {
            let client = || self.client_of(session);
            let presented = header.headers.get(X_API_KEY);
            let known = self.edge.keys.check_either(presented, scope, route.or_scope, client)?;
            self.limiter.check(route.pattern, Some(&known.name), client, counted).await?;
            caller = Some(known);
        }
        let header = session.req_header();
        let mut call = Call {
            params,
            uri: header.uri.clone(),
            headers: CallHeaders::of(&header.headers),
            body: Bytes::new(),
            caller,
            counted: RateLimitState::default(),
            is_head: header.method == Method::HEAD,
            accepts_gzip: route.endpoint == Endpoint::Metrics
                && metrics::accepts_gzip(header.headers.get_all(ACCEPT_ENCODING)),
            trace: ctx.trace.as_ref().map(|traced| traced.shared()),
        };
        if route.takes == BodyMode::Whole {
            let timeout = Duration::from_secs(self.edge.http.get().body_timeout_s);
            call.body = body::read(session, self.api.body_bytes_max(route.endpoint), timeout).await?;
        }
        Ok((route, call))
    }

    fn scope_of(&self, route: &Route) -> Option<Scope> {
        let needs_key = route.endpoint == Endpoint::Metrics && self.edge.auth.get().metrics_need_key;
        if needs_key { Some(Scope::Metrics) } else { route.scope }
    }

    /// The client's address, behind trusted proxies. `None`: the peer has no IP address.
    fn client_of(&self, session: &Session) -> Option<IpAddr> {
        let peer = peer_of(session)?;
        Some(client::client_of(peer, &session.req_header().headers, &self.edge.http.get().trusted_proxies))
    }

    /// Runs the same filters for a path that is not a route of the gateway but may belong to an upstream.
    async fn forward(
        &self,
        session: &mut Session,
        ctx: &mut RequestContext,
        id: &RequestId,
    ) -> Result<GatewayResponse, NotAnswered> {
        let mut counted = RateLimitState::default();
        let found = self.edge.upstreams.find(session.req_header().uri.path());
        let Some(upstream) = found else {
            return Ok((Err(ApiError::NoSuchRoute), counted));
        };
        match self.admit_passage(session, upstream, id, &mut counted).await {
            Ok(mut passage) => {
                passage.counted = counted;
                ctx.passage = Some(Box::new(passage));
                Err(NotAnswered::Forwarded)
            }
            Err(e) => Ok((Err(e), counted)),
        }
    }

    async fn admit_passage(
        &self,
        session: &mut Session,
        upstream: Arc<Upstream>,
        id: &RequestId,
        counted: &mut RateLimitState,
    ) -> Result<ForwardedRequest, ApiError> {
        upstream::via::check(&session.req_header().headers, &self.edge.pseudonym)?;
        let presented = session.req_header().headers.get(X_API_KEY);
        let client = || self.client_of(session);
        let caller =
            upstream.conf.scope.map(|scope| self.edge.keys.check(presented, scope, client)).transpose()?;
        // Only a tunnel outlives its request and needs the key later.
        let presented = presented.filter(|_| session.is_upgrade_req());
        let pass = upstream.conf.scope.zip(presented).map(|(scope, key)| self.edge.keys.pass(key, scope));
        let key_name = caller.as_ref().map(|caller| &caller.name);
        self.limiter.check(&upstream.pattern, key_name, client, counted).await?;
        let peer = peer_of(session);
        let is_peer_trusted = {
            let http = self.edge.http.get();
            peer.is_some_and(|peer| client::is_trusted(peer.to_canonical(), &http.trusted_proxies))
        };
        let origin = RequestSource { peer, is_peer_trusted, has_tls: has_tls(session) };
        let passage =
            ForwardedRequest::new(upstream, origin, id.value().clone(), pass, session.req_header())?;
        // Over HTTP/1.1 this timeout bounds each read. The total deadline is checked as each piece arrives.
        if session.is_http2() {
            timed_body::bound_body(session, passage.body_deadline());
        } else {
            session.set_read_timeout(Some(Duration::from_secs(passage.upstream.conf.body_timeout_s)));
        }
        Ok(passage)
    }

    /// Keeps the connection open for the next request, unless the node drains.
    ///
    /// Each request needs this, since Pingora starts each with an unlimited keep-alive. It must run just
    /// before the response: a `100 Continue` resets the value, and a drain may begin while the handler runs.
    fn keep_alive(&self, session: &mut Session) {
        let stopping = self.lifecycle.phase() >= Phase::Draining;
        let request = session.req_header();
        // HTTP/1.0 closes the connection unless the client asks for keep-alive.
        let closes =
            request.version == Version::HTTP_10 && !fields::connection_names(&request.headers, b"keep-alive");
        session.set_keepalive((!stopping && !closes).then_some(self.edge.http.get().keepalive_s));
    }

    /// The response to a CORS preflight request of a known origin. `None`: the request is not one.
    fn preflight(&self, request: &RequestHeader, ctx: &RequestContext) -> Option<Reply> {
        // Only a known origin gets more CORS fields than `Vary`.
        let is_known = ctx.cors.len() > 1;
        if !is_known || !cors::is_preflight(&request.method, &request.headers) {
            return None;
        }
        let upstream = self.edge.upstreams.find(request.uri.path());
        let mut reply = Reply::json(StatusCode::NO_CONTENT, "");
        reply.headers = cors::preflight_fields(upstream.as_ref().map(|upstream| &upstream.conf));
        Some(reply)
    }

    fn refused(&self, session: &mut Session, error: ApiError, id: &RequestId) -> Reply {
        self.metrics.refused.with_label_values(&[error.code()]).inc();
        if matches!(error, ApiError::Unauthorized | ApiError::KeyNotValidNow) {
            self.api.note_unauthorized(self.client_of(session));
        }
        if matches!(error, ApiError::BodyTimeout | ApiError::BodyBroken) {
            // The next bytes may be the rest of the body, not a request.
            session.set_keepalive(None);
        }
        error.into_reply(id.as_str())
    }

    async fn finish(&self, session: &mut Session, ctx: &mut RequestContext, reply: Reply, id: RequestId) {
        let mut reply = reply;
        reply.headers.append(&mut ctx.cors);
        ctx.status = respond::finish(session, &mut reply, id, self.drain_timeout()).await;
        let is_head = session.req_header().method == Method::HEAD;
        if let Some(stream) = reply.stream.take().filter(|_| !is_head && ctx.status != CLIENT_GONE) {
            // Boxed, so that the futures of other requests stay small.
            Box::pin(self.stream(session, ctx, stream)).await;
        }
    }

    async fn stream(&self, session: &mut Session, ctx: &mut RequestContext, stream: ReplyStream) {
        ctx.streamed_at = Some(Instant::now());
        let scope = ctx.found.and_then(|route| self.scope_of(route));
        let presented = session.req_header().headers.get(X_API_KEY);
        let pass = scope.zip(presented).map(|(scope, key)| self.edge.keys.pass(key, scope));
        let key = pass.map(|pass| (&*self.edge.keys, pass));
        match streaming::write(session, stream, key, &self.lifecycle).await {
            StreamEnd::Complete => {}
            StreamEnd::Key => self.metrics.events.watchers_dropped.with_label_values(&["key"]).inc(),
            StreamEnd::Broken => {
                session.set_keepalive(None);
                // Pingora may still wait for a client that takes nothing. A drain must not.
                ctx.counted = None;
            }
        }
    }

    async fn discard_body(&self, session: &mut Session) -> bool {
        body::discard(session, self.drain_timeout()).await
    }

    fn drain_timeout(&self) -> Duration {
        Duration::from_millis(self.edge.http.get().drain_body_timeout_ms)
    }

    /// Sets Pingora's timeouts for draining the body and, over HTTP/2, for writing the response.
    fn set_timeouts(&self, session: &mut Session) {
        let http = self.edge.http.get();
        session.set_total_drain_timeout(Some(self.drain_timeout()));
        if session.is_http2() {
            // Over HTTP/1.1 the guard enforces it.
            session.set_write_timeout(Some(Duration::from_secs(http.write_timeout_s)));
        }
    }
}

#[async_trait]
impl ProxyHttp for Gateway {
    type CTX = RequestContext;

    fn new_ctx(&self) -> RequestContext {
        RequestContext {
            started: Instant::now(),
            route: NO_ROUTE,
            passage: None,
            cors: Vec::new(),
            found: None,
            status: CLIENT_GONE,
            is_last: false,
            streamed_at: None,
            counted: Some(self.lifecycle.request()),
            trace: None,
        }
    }

    /// Adds no module: by default Pingora sets up a disabled compression module for each request.
    fn init_downstream_modules(&self, _: &mut HttpModules) {}

    async fn request_filter(&self, session: &mut Session, ctx: &mut RequestContext) -> pingora::Result<bool> {
        session.set_close_on_response_before_downstream_finish(false);
        self.set_timeouts(session);
        adapt_to_version(session);
        let fields = &session.req_header().headers;
        let id = RequestId::of(fields);
        ctx.trace = TracedRequest::begin(&self.traces, fields, &id);
        match ctx.trace.as_ref().map(|traced| traced.log_context()) {
            None => self.serve(session, ctx, id).await,
            Some(context) => Box::pin(context.scope(self.serve(session, ctx, id))).await,
        }
    }

    async fn upstream_peer(
        &self,
        session: &mut Session,
        ctx: &mut RequestContext,
    ) -> pingora::Result<Box<HttpPeer>> {
        let mut peer = match &ctx.passage {
            Some(passage) => passage.upstream.peer().await,
            None => None,
        };
        if let (Some(peer), Some(passage)) = (&mut peer, &mut ctx.passage) {
            if session.req_header().version == Version::HTTP_10 {
                passage.address = Some(peer.address().to_string());
            }
            if session.is_upgrade_req() {
                let pass = passage.pass.clone().map(|pass| (Arc::clone(&self.edge.keys), pass));
                upstream::tunnel::tunnel(peer, pass);
            }
        }
        let no_peer = || pingora::Error::explain(pingora::ErrorType::HTTPStatus(503), "no healthy address");
        peer.map(Box::new).ok_or_else(no_peer)
    }

    async fn request_body_filter(
        &self,
        session: &mut Session,
        body: &mut Option<Bytes>,
        _: bool,
        ctx: &mut RequestContext,
    ) -> pingora::Result<()> {
        match (&mut ctx.passage, body) {
            // Tunnel traffic is not a body: neither the size limit nor the deadline applies.
            (Some(passage), Some(bytes)) if !session.was_upgraded() => passage.count_body(bytes.len()),
            _ => Ok(()),
        }
    }

    async fn upstream_request_filter(
        &self,
        session: &mut Session,
        request: &mut RequestHeader,
        ctx: &mut RequestContext,
    ) -> pingora::Result<()> {
        let pseudonym = &self.edge.pseudonym;
        if let Some(passage) = &ctx.passage {
            passage.adapt(request, session.req_header(), pseudonym)?;
        }
        ctx.trace.as_ref().map_or(Ok(()), |traced| traced.name_to_upstream(request))
    }

    async fn response_filter(
        &self,
        session: &mut Session,
        response: &mut ResponseHeader,
        ctx: &mut RequestContext,
    ) -> pingora::Result<()> {
        if response.status.is_informational() && response.status != StatusCode::SWITCHING_PROTOCOLS {
            return Ok(()); // an interim response; the final one follows
        }
        ctx.status = response.status.as_u16();
        upstream::forward::adapt_answer(response, session)?;
        let is_awaited = session.req_header().headers.contains_key(EXPECT);
        if is_awaited && !session.is_body_done() {
            // The client may omit the body now, so the next bytes may be body or the next request.
            session.set_keepalive(None);
        }
        let Some(passage) = &ctx.passage else { return Ok(()) };
        let mut fields = vec![(X_REQUEST_ID, passage.request_id.clone())];
        fields.append(&mut ctx.cors);
        rate_limit::add_fields(&passage.counted, &mut fields);
        fields.into_iter().try_for_each(|(name, value)| {
            // The upstream may have set a `Vary` of its own.
            if name == VARY {
                response.append_header(name, value).map(|_| ())
            } else {
                response.insert_header(name, value)
            }
        })
    }

    /// No byte of the request was sent, so it may be retried at another address.
    fn fail_to_connect(
        &self,
        _: &mut Session,
        _: &HttpPeer,
        ctx: &mut RequestContext,
        mut error: Box<pingora::Error>,
    ) -> Box<pingora::Error> {
        error.set_retry(ctx.passage.as_mut().is_some_and(|passage| passage.may_try_again()));
        error
    }

    /// The upstream may have closed a pooled connection just before the request. It may also have read the
    /// request already, so only safe methods are retried.
    fn error_while_proxy(
        &self,
        _: &HttpPeer,
        session: &mut Session,
        mut error: Box<pingora::Error>,
        _: &mut RequestContext,
        is_reused: bool,
    ) -> Box<pingora::Error> {
        if session.req_header().method.is_safe() && !session.as_ref().retry_buffer_truncated() {
            error.retry.decide_reuse(is_reused);
        } else {
            error.set_retry(false);
        }
        error
    }

    async fn fail_to_proxy(
        &self,
        session: &mut Session,
        error: &pingora::Error,
        ctx: &mut RequestContext,
    ) -> FailToProxy {
        let (id, bytes_max) = match &ctx.passage {
            Some(passage) => (RequestId::from(&passage.request_id), passage.upstream.conf.body_bytes_max),
            None => (RequestId::ours(), 0),
        };
        session.set_keepalive(None);
        // No further response can follow a 101.
        let is_last =
            |status: StatusCode| !status.is_informational() || status == StatusCode::SWITCHING_PROTOCOLS;
        let is_answered = session.response_written().is_some_and(|head| is_last(head.status));
        match upstream::forward::failure(error, bytes_max) {
            Some(refusal) if !is_answered => {
                let upstream = ctx.passage.as_ref().map_or("", |passage| passage.upstream.conf.name.as_str());
                let warn = || {
                    tracing::warn!(
                        upstream,
                        code = refusal.code(),
                        kind = error.etype().as_str(),
                        "Forwarded request failed; the client receives the problem that `code` names"
                    );
                };
                match &ctx.trace {
                    Some(traced) => traced.log_context().run(warn),
                    None => warn(),
                }
                let reply = self.refused(session, refusal, &id);
                self.finish(session, ctx, reply, id).await;
                if !is_http2(session) {
                    // Pingora would drop the connection. Unread bytes behind the request would then reset it.
                    session.downstream_session.shutdown().await;
                }
            }
            // The response has begun, so it is cut short. Over HTTP/1 the end of the connection does that.
            _ if is_http2(session) => session.downstream_session.shutdown().await,
            _ => {}
        }
        FailToProxy { error_code: ctx.status, can_reuse_downstream: false }
    }

    async fn logging(&self, session: &mut Session, _: Option<&pingora::Error>, ctx: &mut RequestContext) {
        // Clients may send any method name. Only these become labels, which bounds the number of series.
        let method = session.req_header().method.as_str();
        let known = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"];
        let is_known_method = known.contains(&method);
        let method = if is_known_method { method } else { "other" };
        let route = ctx.passage.as_ref().map_or(ctx.route, |passage| &passage.upstream.pattern);
        let took = ctx.streamed_at.unwrap_or_else(Instant::now) - ctx.started;
        self.metrics.observe_http(method, route, ctx.status, took);
        if let Some(traced) = &ctx.trace {
            let (route, has_tls) = (Some(route).filter(|route| *route != NO_ROUTE), has_tls(session));
            let outcome = RequestOutcome { is_known_method, route, status: ctx.status, has_tls };
            traced.end(&self.traces, session.req_header(), &outcome);
        }
        if !is_http2(session) && !session.is_body_done() {
            // Pingora would drop the connection. Unread bytes would then reset it, and the client might lose
            // the response.
            session.set_keepalive(None);
            session.downstream_session.shutdown().await;
        }
    }
}

/// Removes fields that have no meaning in the client's version of HTTP.
///
/// HTTP/1.0 has no interim responses, so none are sent to it and `Expect` is ignored (RFC 9110, sections
/// 10.1.1 and 15.2). `Upgrade` without `Connection: upgrade` is ignored too (section 7.8); Pingora does not
/// check that.
fn adapt_to_version(session: &mut Session) {
    let request = session.req_header();
    if request.headers.contains_key(UPGRADE) && !wants_upgrade(request) {
        session.req_header_mut().remove_header(&UPGRADE);
    }
    if session.req_header().version != Version::HTTP_10 {
        return;
    }
    session.req_header_mut().remove_header(&EXPECT);
    if let ServerSession::H1(session) = &mut *session.downstream_session {
        session.set_ignore_info_resp(true);
    }
}

fn wants_upgrade(request: &RequestHeader) -> bool {
    request.version == Version::HTTP_11 && fields::connection_names(&request.headers, b"upgrade")
}

/// The reason to reject a request by its head alone, whatever its route.
fn refusal_of_head(request: &RequestHeader) -> Option<ApiError> {
    let malformed = (request.version == Version::HTTP_2).then(|| refused_over_http2(request)).flatten();
    malformed.or_else(|| fields::repeated(&request.headers).map(ApiError::RepeatedField))
}

fn has_tls(session: &Session) -> bool {
    session.digest().is_some_and(|digest| digest.ssl_digest.is_some())
}

/// The address at the other end of the connection, which may be a proxy.
fn peer_of(session: &Session) -> Option<IpAddr> {
    session.client_addr().and_then(|address| address.as_inet()).map(std::net::SocketAddr::ip)
}
