//! The Pingora side: request id → route → API key → rate limit → capped body → `api` or an upstream → response.
//!
//! Routes of our own are answered in `request_filter`, which costs no more than a bare HTTP app would; other paths may belong to an
//! upstream, to which Pingora passes them on. Errors are written as ordinary responses: Pingora's own `respond_error`
//! always closes the connection.
//!
//! In reading order: [`guard`]: what becomes a request; [`fields`]: those that may stand once; [`client`]: who is calling;
//! [`api_key`]; [`body`] and [`inflate`]; [`respond`]: the way back; [`upstreams`], [`passage`], [`origin`], [`via`],
//! [`timed_body`] and [`tunnel`]: what is passed on; [`edge`]: what of all that changes while the process runs;
//! [`descriptors`]: how many connections there is room for.

mod api_key;
mod body;
mod client;
mod cors;
mod descriptors;
mod edge;
mod fields;
mod guard;
mod inflate;
mod origin;
mod passage;
mod request_id;
mod respond;
mod timed_body;
mod tunnel;
mod upstreams;
mod via;

pub use edge::{Edge, tls_of};
pub use guard::{Accepted, Guard, Guarded};
pub use upstreams::Tending;
pub use via::Pseudonym;

use crate::api::{Api, ApiError, Call, CallHeaders, Endpoint, Found, Reply, Route, Takes, find};
use crate::lifecycle::{Lifecycle, RequestGuard};
use crate::limiter::{Counted, RateLimiter};
use crate::metrics::Metrics;
use crate::model::Scope;
use api_key::X_API_KEY;
use async_trait::async_trait;
use bytes::Bytes;
use guard::has_member;
use http::header::{CONNECTION, EXPECT, HeaderName, HeaderValue, UPGRADE, VARY};
use http::{Method, StatusCode, Version};
use origin::Origin;
use passage::Passage;
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::modules::http::HttpModules;
use pingora::prelude::{HttpPeer, ProxyHttp, Session};
use pingora::protocols::http::ServerSession;
use pingora::proxy::FailToProxy;
use pingora::upstreams::peer::Peer;
use request_id::{RequestId, X_REQUEST_ID};
use respond::refusal_of_head;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use upstreams::Upstream;

/// The metric label of a path that is no route.
const NO_ROUTE: &str = "(none)";
/// The metric label of a request whose client left before the answer.
const CLIENT_GONE: u16 = 499;

/// The server's application.
pub struct Gateway {
    api: Api,
    edge: Edge,
    limiter: RateLimiter,
    lifecycle: Lifecycle,
    metrics: Arc<Metrics>,
}

/// One request.
pub struct Ctx {
    started: Instant,
    route: &'static str,
    /// It is passed on.
    passage: Option<Box<Passage>>,
    /// What a script of another origin is told.
    cors: Vec<(HeaderName, HeaderValue)>,
    /// The row of the table, if the request leads to one.
    found: Option<&'static Route>,
    status: u16,
    /// No other request can follow on the connection.
    is_last: bool,
    _counted: RequestGuard,
}

/// An answer of our own, and what the limits said.
type Answer = (Result<Reply, ApiError>, Counted);

/// Why there is no answer of our own.
enum NoAnswer {
    PassedOn,
    /// The client has left.
    Gone,
}

impl Gateway {
    pub fn new(
        api: Api,
        edge: Edge,
        limiter: RateLimiter,
        lifecycle: Lifecycle,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { api, edge, limiter, lifecycle, metrics }
    }

    /// The filters in order, then the handler.
    async fn answer(&self, session: &mut Session, ctx: &mut Ctx, id: &RequestId) -> Result<Answer, NoAnswer> {
        let mut counted = Counted::default();
        let (route, mut call) = match self.admit(session, ctx, &mut counted).await {
            Ok(admitted) => admitted,
            Err(ApiError::NoSuchRoute) => {
                // In a box: what is answered here needs no room for it.
                return Box::pin(self.pass_on(session, ctx, id)).await;
            }
            Err(e) => return Ok((Err(e), counted)),
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
                _ = session.downstream_session.read_body_or_idle(true) => return Err(NoAnswer::Gone),
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
        let mut body = body::Streamed::wanted(session, bytes_max, timeout)?;
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
        let mut caller = None;
        if let Some(scope) = self.scope_of(route) {
            let client = || self.client_of(session);
            let known = self.edge.keys.check(header.headers.get(X_API_KEY), scope, client)?;
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
            counted: Counted::default(),
        };
        if route.takes == Takes::Whole {
            let timeout = Duration::from_secs(self.edge.http.get().body_timeout_s);
            call.body = body::read(session, self.api.body_bytes_max(route.endpoint), timeout).await?;
        }
        Ok((route, call))
    }

    fn scope_of(&self, route: &Route) -> Option<Scope> {
        let asks = route.endpoint == Endpoint::Metrics && self.edge.auth.get().metrics_need_key;
        if asks { Some(Scope::Metrics) } else { route.scope }
    }

    /// The address of the client, as far as it can be known.
    fn client_of(&self, session: &Session) -> Option<IpAddr> {
        let peer = peer_of(session)?;
        Some(client::client_of(peer, &session.req_header().headers, &self.edge.http.get().trusted_proxies))
    }

    /// The same filters for a path that is no route here, but an upstream's.
    async fn pass_on(
        &self,
        session: &mut Session,
        ctx: &mut Ctx,
        id: &RequestId,
    ) -> Result<Answer, NoAnswer> {
        let mut counted = Counted::default();
        let found = self.edge.upstreams.find(session.req_header().uri.path());
        let Some(upstream) = found else {
            return Ok((Err(ApiError::NoSuchRoute), counted));
        };
        match self.admit_passage(session, upstream, id, &mut counted).await {
            Ok(mut passage) => {
                passage.counted = counted;
                ctx.passage = Some(Box::new(passage));
                Err(NoAnswer::PassedOn)
            }
            Err(e) => Ok((Err(e), counted)),
        }
    }

    async fn admit_passage(
        &self,
        session: &mut Session,
        upstream: Arc<Upstream>,
        id: &RequestId,
        counted: &mut Counted,
    ) -> Result<Passage, ApiError> {
        via::check(&session.req_header().headers, &self.edge.pseudonym)?;
        let shown = session.req_header().headers.get(X_API_KEY);
        let client = || self.client_of(session);
        let caller =
            upstream.conf.scope.map(|scope| self.edge.keys.check(shown, scope, client)).transpose()?;
        // Of use to a tunnel only: every other request shows its key anew.
        let shown = shown.filter(|_| session.is_upgrade_req());
        let pass = upstream.conf.scope.zip(shown).map(|(scope, shown)| self.edge.keys.pass(shown, scope));
        let key_name = caller.as_ref().map(|caller| &caller.name);
        self.limiter.check(&upstream.pattern, key_name, client, counted).await?;
        let peer = peer_of(session);
        let is_peer_trusted = {
            let http = self.edge.http.get();
            peer.is_some_and(|peer| client::is_trusted(peer.to_canonical(), &http.trusted_proxies))
        };
        let has_tls = session.digest().is_some_and(|digest| digest.ssl_digest.is_some());
        let origin = Origin { peer, is_peer_trusted, has_tls };
        let passage = Passage::new(upstream, origin, id.value().clone(), pass, session.req_header())?;
        // One that comes byte by byte is met by the deadline of the whole.
        if session.is_http2() {
            timed_body::bound_body(session, passage.body_deadline());
        } else {
            session.set_read_timeout(Some(Duration::from_secs(passage.upstream.conf.body_timeout_s)));
        }
        Ok(passage)
    }

    /// What bounds the parts of the request that Pingora reads and writes.
    fn set_timeouts(&self, session: &mut Session) {
        let http = self.edge.http.get();
        session.set_total_drain_timeout(Some(Duration::from_millis(http.drain_body_timeout_ms)));
        if session.is_http2() {
            // Over HTTP/1.1 the guard sees to it.
            session.set_write_timeout(Some(Duration::from_secs(http.write_timeout_s)));
        }
    }
}

#[async_trait]
impl ProxyHttp for Gateway {
    type CTX = Ctx;

    fn new_ctx(&self) -> Ctx {
        Ctx {
            started: Instant::now(),
            route: NO_ROUTE,
            passage: None,
            cors: Vec::new(),
            found: None,
            status: CLIENT_GONE,
            is_last: false,
            _counted: self.lifecycle.request(),
        }
    }

    /// None: Pingora would set up compression for each request, which nobody asked for.
    fn init_downstream_modules(&self, _: &mut HttpModules) {}

    async fn request_filter(&self, session: &mut Session, ctx: &mut Ctx) -> pingora::Result<bool> {
        session.set_close_on_response_before_downstream_finish(false);
        self.set_timeouts(session);
        adapt_to_version(session);
        let request = session.req_header();
        let id = RequestId::of(&request.headers);
        ctx.cors = cors::fields(&self.edge.http.get(), &request.headers);
        let refusal = refusal_of_head(request).map(|error| self.refused(session, error, &id));
        if let Some(reply) = refusal.or_else(|| self.preflight(session.req_header(), ctx)) {
            self.keep_alive(session);
            self.finish(session, ctx, reply, id).await;
            return Ok(true);
        }
        let (answer, counted) = match self.answer(session, ctx, &id).await {
            Ok(answer) => answer,
            Err(NoAnswer::PassedOn) => {
                self.keep_alive(session);
                return Ok(false);
            }
            Err(NoAnswer::Gone) => {
                session.set_keepalive(None);
                return Ok(true);
            }
        };
        self.keep_alive(session);
        if ctx.is_last {
            session.set_keepalive(None);
        }
        let mut reply = answer.unwrap_or_else(|error| self.refused(session, error, &id));
        counted.add_fields(&mut reply.headers);
        debug_assert!(
            ctx.found.is_none_or(|route| route.statuses().any(|status| status == reply.status.as_u16())),
            "{} {} answers {}, which the route table does not say",
            session.req_header().method,
            ctx.route,
            reply.status,
        );
        self.finish(session, ctx, reply, id).await;
        Ok(true)
    }

    async fn upstream_peer(&self, session: &mut Session, ctx: &mut Ctx) -> pingora::Result<Box<HttpPeer>> {
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
                tunnel::tunnel(peer, pass);
            }
        }
        let none = || pingora::Error::explain(pingora::ErrorType::HTTPStatus(503), "no healthy address");
        peer.map(Box::new).ok_or_else(none)
    }

    async fn request_body_filter(
        &self,
        session: &mut Session,
        body: &mut Option<Bytes>,
        _: bool,
        ctx: &mut Ctx,
    ) -> pingora::Result<()> {
        match (&mut ctx.passage, body) {
            // What goes through a tunnel is no body: it may be as much, and take as long, as it likes.
            (Some(passage), Some(bytes)) if !session.was_upgraded() => passage.count_body(bytes.len()),
            _ => Ok(()),
        }
    }

    async fn upstream_request_filter(
        &self,
        session: &mut Session,
        request: &mut RequestHeader,
        ctx: &mut Ctx,
    ) -> pingora::Result<()> {
        let pseudonym = &self.edge.pseudonym;
        ctx.passage.as_ref().map_or(Ok(()), |passage| passage.adapt(request, session.req_header(), pseudonym))
    }

    async fn response_filter(
        &self,
        session: &mut Session,
        response: &mut ResponseHeader,
        ctx: &mut Ctx,
    ) -> pingora::Result<()> {
        if response.status.is_informational() && response.status != StatusCode::SWITCHING_PROTOCOLS {
            return Ok(()); // the answer is still to come
        }
        ctx.status = response.status.as_u16();
        passage::adapt_answer(response, session)?;
        let is_awaited = session.req_header().headers.contains_key(EXPECT);
        if is_awaited && !session.is_body_done() {
            // The client need not send the body now: what comes next cannot be told from it.
            session.set_keepalive(None);
        }
        let Some(passage) = &ctx.passage else { return Ok(()) };
        let mut fields = vec![(X_REQUEST_ID, passage.request_id.clone())];
        fields.append(&mut ctx.cors);
        passage.counted.add_fields(&mut fields);
        fields.into_iter().try_for_each(|(name, value)| {
            // An upstream has reasons of its own to vary.
            if name == VARY {
                response.append_header(name, value).map(|_| ())
            } else {
                response.insert_header(name, value)
            }
        })
    }

    /// Nothing was sent yet, so another address may be tried.
    fn fail_to_connect(
        &self,
        _: &mut Session,
        _: &HttpPeer,
        ctx: &mut Ctx,
        mut error: Box<pingora::Error>,
    ) -> Box<pingora::Error> {
        error.set_retry(ctx.passage.as_mut().is_some_and(|passage| passage.may_try_again()));
        error
    }

    /// A connection that was kept may have been closed by its upstream just now. The request may have been read, so only
    /// one that changes nothing is sent again.
    fn error_while_proxy(
        &self,
        _: &HttpPeer,
        session: &mut Session,
        mut error: Box<pingora::Error>,
        _: &mut Ctx,
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
        ctx: &mut Ctx,
    ) -> FailToProxy {
        let (id, bytes_max) = match &ctx.passage {
            Some(passage) => (RequestId::from(&passage.request_id), passage.upstream.conf.body_bytes_max),
            None => (RequestId::ours(), 0),
        };
        session.set_keepalive(None);
        // What follows a 101 is no HTTP any more.
        let is_last =
            |status: StatusCode| !status.is_informational() || status == StatusCode::SWITCHING_PROTOCOLS;
        let is_answered = session.response_written().is_some_and(|head| is_last(head.status));
        match passage::failure(error, bytes_max) {
            Some(refusal) if !is_answered => {
                let upstream = ctx.passage.as_ref().map_or("", |passage| passage.upstream.conf.name.as_str());
                tracing::warn!(
                    upstream,
                    code = refusal.code(),
                    kind = error.etype().as_str(),
                    "Passage Failed"
                );
                let reply = self.refused(session, refusal, &id);
                self.finish(session, ctx, reply, id).await;
                if !is_http2(session) {
                    // Pingora would drop the connection, and what the client has sent behind the request would reset it.
                    session.downstream_session.shutdown().await;
                }
            }
            // An answer that breaks off is all that can be said. Over HTTP/1 the connection does, too.
            _ if is_http2(session) => session.downstream_session.shutdown().await,
            _ => {}
        }
        FailToProxy { error_code: ctx.status, can_reuse_downstream: false }
    }

    async fn logging(&self, session: &mut Session, _: Option<&pingora::Error>, ctx: &mut Ctx) {
        // Any method name may be sent; only those we serve become a label.
        let method = session.req_header().method.as_str();
        let known = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"];
        let method = if known.contains(&method) { method } else { "other" };
        let route = ctx.passage.as_ref().map_or(ctx.route, |passage| &passage.upstream.pattern);
        self.metrics.observe_http(method, route, ctx.status, ctx.started.elapsed());
        if !is_http2(session) && !session.is_body_done() {
            // Pingora would drop the connection: closed with something unread it would be reset, and the client might
            // never read why.
            session.set_keepalive(None);
            session.downstream_session.shutdown().await;
        }
    }
}

/// Also of one that is passed on as a session of ours.
fn is_http2(session: &Session) -> bool {
    session.req_header().version == Version::HTTP_2
}

/// Removes what the client's version of HTTP does not have: HTTP/1.0 has no interim answers, so none are sent to it and
/// `Expect` is not meant (RFC 9110, sections 10.1.1 and 15.2); and without `Connection: upgrade`, `Upgrade` is none
/// (section 7.8), which Pingora does not look at.
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
    request.version == Version::HTTP_11 && connection_names(request, b"upgrade")
}

fn connection_names(request: &RequestHeader, option: &[u8]) -> bool {
    request.headers.get_all(CONNECTION).iter().any(|value| has_member(value.as_bytes(), option))
}

/// Who is on the other side of the connection.
fn peer_of(session: &Session) -> Option<IpAddr> {
    session.client_addr().and_then(|address| address.as_inet()).map(std::net::SocketAddr::ip)
}

/// Whether a request is answered however many connections there are: whoever looks after the process must see it.
fn is_always_answered(target: &[u8]) -> bool {
    let Ok(target) = std::str::from_utf8(target) else { return false };
    let path = target.split('?').next().unwrap_or_default();
    let Found::Route(route, _) = find(&Method::GET, path) else { return false };
    matches!(route.endpoint, Endpoint::Health | Endpoint::Livez | Endpoint::Readyz | Endpoint::Metrics)
}
