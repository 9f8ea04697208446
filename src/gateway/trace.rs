//! The span of a request that is recorded, from its head to the end of its response.

use super::request_id::RequestId;
use super::respond::CLIENT_GONE;
use crate::api::CallHeaders;
use crate::log::LogContext;
use crate::model::{RequestTrace, TraceContext};
use crate::traces::{RequestEnd, RequestSpan, Traces};
use http::header::{HOST, HeaderName, HeaderValue, USER_AGENT};
use http::uri::Authority;
use http::{HeaderMap, Version};
use pingora::http::RequestHeader;
use std::sync::Arc;

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// A request that is recorded.
pub struct TracedRequest {
    span: RequestSpan,
    request_id: Arc<str>,
}

/// How a request was answered.
pub struct RequestOutcome<'a> {
    pub is_known_method: bool,
    pub route: Option<&'a str>,
    pub status: u16,
    pub has_tls: bool,
}

impl TracedRequest {
    /// `None`: the request is not recorded. Without a collector this is one branch.
    pub fn begin(traces: &Traces, fields: &HeaderMap, id: &RequestId) -> Option<Box<Self>> {
        let mut sent = None;
        let caller = || sent.insert(CallHeaders::of(fields)).client_span();
        let mut span = traces.begin_request(caller)?;
        span.state = sent.as_ref().and_then(|sent| Some(Box::from(&*sent.client_state()?)));
        Some(Box::new(Self { span, request_id: id.as_str().into() }))
    }

    /// The fields of log lines.
    pub fn log_context(&self) -> LogContext {
        LogContext::new(self.span.context, Some(&self.request_id))
    }

    /// What the spans below this one need.
    pub fn shared(&self) -> RequestTrace {
        RequestTrace { context: self.span.context, request_id: Arc::clone(&self.request_id) }
    }

    /// Names this span to an upstream, in place of its caller.
    pub fn name_to_upstream(&self, request: &mut RequestHeader) -> pingora::Result<()> {
        let text: [u8; TraceContext::TEXT_BYTES] = self.span.context.text();
        match HeaderValue::from_bytes(&text) {
            Ok(value) => request.insert_header(TRACEPARENT, value),
            Err(_) => Ok(()), // it is hexadecimal digits and hyphens
        }
    }

    pub fn end(&self, traces: &Traces, request: &RequestHeader, outcome: &RequestOutcome<'_>) {
        let field = |name| request.headers.get(name).and_then(|value| value.to_str().ok());
        let end = RequestEnd {
            method: request.method.as_str(),
            is_known_method: outcome.is_known_method,
            route: outcome.route,
            path: request.uri.path(),
            has_tls: outcome.has_tls,
            version: version(request.version),
            authority: request.uri.authority().map(Authority::as_str).or_else(|| field(HOST)),
            user_agent: field(USER_AGENT),
            status: (outcome.status != CLIENT_GONE).then_some(outcome.status),
            request_id: &self.request_id,
        };
        traces.end_request(&self.span, &end);
    }
}

fn version(of: Version) -> &'static str {
    match of {
        Version::HTTP_10 => "1.0",
        Version::HTTP_2 => "2",
        _ => "1.1",
    }
}
