//! Writes the responses of the gateway itself, and decides whether the connection stays open.
//!
//! Responses of upstreams do not pass through here; Pingora writes them.

use crate::api::{ApiError, Reply};
use crate::lifecycle::Phase;
use http::{HeaderMap, Method, StatusCode, Version};
use http::header::{CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, ETAG, HeaderValue, X_CONTENT_TYPE_OPTIONS};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::prelude::Session;
use std::time::Duration;
use super::{CLIENT_GONE, Ctx, Gateway, body, connection_names, cors, fields, is_http2};
use super::guard::refused_over_http2;
use super::request_id::{RequestId, X_REQUEST_ID};

/// Fields that Pingora adds: `date` and `connection`. Counted so that the map need not grow.
const FIELDS_OF_SERVER: usize = 2;
/// Fields that `head_of` adds.
const FIELDS_OF_OURS: usize = 5;

/// The header fields of a response. Drains `reply.headers`.
pub fn head_of(reply: &mut Reply, id: RequestId) -> HeaderMap {
    let mut head = HeaderMap::with_capacity(reply.headers.len() + FIELDS_OF_OURS + FIELDS_OF_SERVER);
    head.insert(X_REQUEST_ID, id.into_value());
    for (name, value) in reply.headers.drain(..) {
        head.append(name, value);
    }
    if !is_bodyless(reply.status) {
        head.insert(CONTENT_TYPE, HeaderValue::from_static(reply.content_type));
        head.insert(CONTENT_LENGTH, reply.body.len().into());
    }
    // The body may contain data of any client: browsers must not sniff it as a page or a script.
    head.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    // A response with a tag may be cached and revalidated.
    if !head.contains_key(ETAG) {
        head.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    }
    head
}

fn is_bodyless(status: StatusCode) -> bool {
    matches!(status, StatusCode::NOT_MODIFIED | StatusCode::NO_CONTENT)
}

/// The reason to reject a request by its head alone, whatever its route.
pub fn refusal_of_head(request: &RequestHeader) -> Option<ApiError> {
    let malformed = (request.version == Version::HTTP_2).then(|| refused_over_http2(request)).flatten();
    malformed.or_else(|| fields::repeated(&request.headers).map(ApiError::RepeatedField))
}

impl Gateway {
    /// Keeps the connection open for the next request, unless the node drains.
    ///
    /// Each request needs this, since Pingora starts each with an unlimited keep-alive. It must run just
    /// before the response: a `100 Continue` resets the value, and a drain may begin while the handler runs.
    pub(super) fn keep_alive(&self, session: &mut Session) {
        let stopping = self.lifecycle.phase() >= Phase::Draining;
        let request = session.req_header();
        // HTTP/1.0 closes the connection unless the client asks for keep-alive.
        let closes = request.version == Version::HTTP_10 && !connection_names(request, b"keep-alive");
        session.set_keepalive((!stopping && !closes).then_some(self.edge.http.get().keepalive_s));
    }

    /// The response to a CORS preflight request of a known origin. `None`: the request is not one.
    pub(super) fn preflight(&self, request: &RequestHeader, ctx: &Ctx) -> Option<Reply> {
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

    pub(super) fn refused(&self, session: &mut Session, error: ApiError, id: &RequestId) -> Reply {
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

    /// Writes the response.
    ///
    /// Over HTTP/1, a body that is still arriving is first discarded for a short time. The response states
    /// whether the connection stays open, and it can stay open only once the body is complete.
    pub(super) async fn finish(&self, session: &mut Session, ctx: &mut Ctx, reply: Reply, id: RequestId) {
        ctx.status = reply.status.as_u16();
        if !is_http2(session) && session.get_keepalive().is_some() {
            let is_read = session.is_body_done()
                || (!body::is_left_unread(session) && self.discard_body(session).await);
            if !is_read {
                session.set_keepalive(None);
            }
        }
        let mut reply = reply;
        reply.headers.append(&mut ctx.cors);
        if self.write(session, reply, id).await.is_err() {
            // The client disconnected during the response.
            ctx.status = CLIENT_GONE;
            session.set_keepalive(None);
        }
    }

    async fn write(&self, session: &mut Session, mut reply: Reply, id: RequestId) -> pingora::Result<()> {
        let (mut head, ()) = http::Response::new(()).into_parts();
        head.status = reply.status;
        head.headers = head_of(&mut reply, id);
        let no_body =
            is_bodyless(reply.status) || reply.body.is_empty() || session.req_header().method == Method::HEAD;
        // Built from the parts: names stay in lower case, as HTTP/2 requires. Pingora would keep another
        // spelling in a second map, and `insert_header` would parse each name again.
        let header = Box::new(ResponseHeader::from(head));
        session.write_response_header(header, no_body).await?;
        if !no_body {
            session.write_response_body(Some(reply.body), true).await?;
        }
        Ok(())
    }

    pub(super) async fn discard_body(&self, session: &mut Session) -> bool {
        let timeout = Duration::from_millis(self.edge.http.get().drain_body_timeout_ms);
        body::discard(session, timeout).await
    }
}
