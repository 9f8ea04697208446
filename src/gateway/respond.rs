//! Writes the responses of the gateway itself.
//!
//! Responses of upstreams do not pass through here; Pingora writes them.

use super::body;
use super::request_id::{RequestId, X_REQUEST_ID};
use crate::api::Reply;
use http::header::{
    CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, ETAG, HeaderValue, TRANSFER_ENCODING, X_CONTENT_TYPE_OPTIONS,
};
use http::{HeaderMap, Method, StatusCode, Version};
use pingora::http::ResponseHeader;
use pingora::prelude::Session;
use std::time::Duration;

/// The status label of requests whose client disconnected before the response, as in nginx.
pub const CLIENT_GONE: u16 = 499;

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
        if reply.stream.is_none() {
            head.insert(CONTENT_LENGTH, reply.body.len().into());
        }
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

/// Writes the response, and returns the status for the metrics. Of a response with a stream, writes the head.
///
/// Over HTTP/1, a body that is still arriving is first discarded for at most `drain_timeout`. The response
/// states whether the connection stays open, and it can stay open only once the body is complete.
pub async fn finish(session: &mut Session, reply: &mut Reply, id: RequestId, drain_timeout: Duration) -> u16 {
    let status = reply.status.as_u16();
    if !is_http2(session) && session.get_keepalive().is_some() {
        let is_read = session.is_body_done()
            || (!body::is_left_unread(session) && body::discard(session, drain_timeout).await);
        if !is_read {
            session.set_keepalive(None);
        }
    }
    match write(session, reply, id).await {
        Ok(()) => status,
        Err(_) => {
            // The client disconnected during the response.
            session.set_keepalive(None);
            CLIENT_GONE
        }
    }
}

async fn write(session: &mut Session, reply: &mut Reply, id: RequestId) -> pingora::Result<()> {
    let (mut head, ()) = http::Response::new(()).into_parts();
    head.status = reply.status;
    head.headers = head_of(reply, id);
    let is_streamed = reply.stream.is_some();
    if is_streamed && session.req_header().version == Version::HTTP_11 {
        head.headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
    let is_empty = reply.body.is_empty() && !is_streamed;
    let no_body = is_bodyless(reply.status) || is_empty || session.req_header().method == Method::HEAD;
    // Built from the parts: names stay in lower case, as HTTP/2 requires. Pingora would keep another
    // spelling in a second map, and `insert_header` would parse each name again.
    let header = Box::new(ResponseHeader::from(head));
    session.write_response_header(header, no_body).await?;
    if !no_body && !is_streamed {
        session.write_response_body(Some(std::mem::take(&mut reply.body)), true).await?;
    }
    Ok(())
}

/// Unlike `Session::is_http2`, this covers sessions that are wrapped to give their body a deadline, too.
pub fn is_http2(session: &Session) -> bool {
    session.req_header().version == Version::HTTP_2
}
