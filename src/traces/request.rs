//! The SERVER span of a request, by the conventions for HTTP.

use super::destination::host_and_port;
use super::recorder::{FinishedSpan, text};
use crate::ambient;
use crate::model::TraceContext;
use opentelemetry::trace::SpanKind;
use opentelemetry::{Array, KeyValue, StringValue, Value};
use std::borrow::Cow;
use std::time::Duration;

/// A request in progress that is recorded.
pub struct RequestSpan {
    pub context: TraceContext,
    /// The caller.
    pub(super) parent: Option<TraceContext>,
    /// The caller's `tracestate`.
    pub state: Option<Box<str>>,
    pub(super) began: Duration,
}

/// A request that has been answered.
pub struct RequestEnd<'a> {
    pub method: &'a str,
    /// Any client may invent a method, so others do not become names.
    pub is_known_method: bool,
    /// The pattern of the route. `None`: no route matches.
    pub route: Option<&'a str>,
    pub path: &'a str,
    pub has_tls: bool,
    /// `1.0`, `1.1` or `2`.
    pub version: &'static str,
    /// Host and port as the client named them.
    pub authority: Option<&'a str>,
    pub user_agent: Option<&'a str>,
    /// `None`: the client disconnected before the response.
    pub status: Option<u16>,
    /// `X-Request-Id`.
    pub request_id: &'a str,
}

pub(super) fn finished<'a>(span: &'a RequestSpan, end: &RequestEnd<'_>) -> FinishedSpan<'a> {
    let (scheme, port) = if end.has_tls { ("https", 443) } else { ("http", 80) };
    let mut attributes = vec![text("url.path", end.path), KeyValue::new("url.scheme", scheme)];
    if end.is_known_method {
        attributes.push(text("http.request.method", end.method));
    } else {
        attributes.push(KeyValue::new("http.request.method", "_OTHER"));
        attributes.push(text("http.request.method_original", end.method));
    }
    attributes.extend(end.route.map(|route| text("http.route", route)));
    attributes.push(KeyValue::new("network.protocol.version", end.version));
    if let Some(authority) = end.authority {
        let (host, port) = host_and_port(authority, port);
        attributes.push(text("server.address", &host));
        attributes.push(KeyValue::new("server.port", i64::from(port)));
    }
    attributes.extend(end.user_agent.map(|agent| text("user_agent.original", agent)));
    attributes.extend(end.status.map(|status| KeyValue::new("http.response.status_code", i64::from(status))));
    let id = Value::Array(Array::String(vec![StringValue::from(end.request_id.to_owned())]));
    attributes.push(KeyValue::new("http.response.header.x-request-id", id));
    let error = match end.status {
        None => Some(Cow::Borrowed("client_disconnected")),
        // A rejected request is an error of the client, not of this server.
        Some(status) if status >= 500 => Some(Cow::Owned(status.to_string())),
        Some(_) => None,
    };
    let method = if end.is_known_method { end.method } else { "HTTP" };
    FinishedSpan {
        context: span.context,
        parent: span.parent.map(|parent| parent.span_id()),
        has_remote_parent: span.parent.is_some(),
        state: span.state.as_deref(),
        kind: SpanKind::Server,
        name: end.route.map_or_else(|| method.to_owned(), |route| format!("{method} {route}")).into(),
        began: span.began,
        ended: ambient::unix_time(),
        attributes,
        links: Vec::new(),
        error,
    }
}
