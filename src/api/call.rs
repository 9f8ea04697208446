//! A request as handlers see it: path parameters, header fields, body and caller.

use super::problem::ApiError;
use crate::limiter::RateLimitState;
use crate::model::{Caller, FunctionId, RequestTrace, TraceContext, tracestate};
use bytes::{Bytes, BytesMut};
use http::header::HeaderValue;
use http::{HeaderMap, Uri};
use std::borrow::Cow;
use std::sync::Arc;

/// The parts of a request that handlers use.
#[derive(Debug, Default)]
pub struct Call {
    /// Path parameters in the order of the route's pattern, percent-decoded.
    pub params: Vec<String>,
    pub uri: Uri,
    pub headers: CallHeaders,
    /// Empty on routes that stream the body or take none.
    pub body: Bytes,
    /// `None` on routes without a key.
    pub caller: Option<Arc<Caller>>,
    /// The rate-limit state of the request so far.
    pub counted: RateLimitState,
    /// Whether the client wants no body.
    pub is_head: bool,
    /// Whether the response may be compressed. Only set for `/metrics`: other requests need not read the
    /// field.
    pub accepts_gzip: bool,
    /// `None`: the request is not recorded.
    pub trace: Option<RequestTrace>,
}

impl Call {
    /// `/api` if the client used that prefix, else empty. `Location` and `Link` keep it.
    pub fn prefix(&self) -> &'static str {
        super::routes::split_prefix(self.uri.path()).0
    }

    /// The name of the API key. Empty on routes without a key.
    pub fn key_name(&self) -> &str {
        self.caller.as_ref().map_or("", |caller| &caller.name)
    }
}

/// A request body that is read in pieces. Implementations bound its length and its duration.
pub trait BodyStream: Send {
    /// The next piece. `None`: the body has ended.
    fn next(&mut self) -> impl Future<Output = Result<Option<Bytes>, ApiError>> + Send;
}

/// Reads a whole body.
///
/// # Errors
/// `BodyTooLarge` above `bytes_max` bytes, and the errors of the stream.
pub async fn whole(body: &mut impl BodyStream, bytes_max: usize) -> Result<Bytes, ApiError> {
    let fits = |bytes: usize| (bytes <= bytes_max).then_some(()).ok_or(ApiError::BodyTooLarge { bytes_max });
    let Some(first) = body.next().await? else { return Ok(Bytes::new()) };
    fits(first.len())?;
    // Most bodies arrive in one piece. It is returned without a copy.
    let Some(second) = body.next().await? else { return Ok(first) };
    let mut whole = BytesMut::from(first);
    let mut next = Some(second);
    while let Some(piece) = next {
        fits(whole.len() + piece.len())?;
        whole.extend_from_slice(&piece);
        next = body.next().await?;
    }
    Ok(whole.freeze())
}

/// The header fields that handlers read. The values are shared, which is cheaper than a copy of the map.
#[derive(Debug, Default)]
pub struct CallHeaders {
    pub prefer: Vec<HeaderValue>,
    pub x_async: Option<HeaderValue>,
    pub content_type: Option<HeaderValue>,
    pub traceparent: Option<HeaderValue>,
    pub tracestate: Vec<HeaderValue>,
    pub idempotency_key: Option<HeaderValue>,
    pub if_match: Vec<HeaderValue>,
    pub if_none_match: Vec<HeaderValue>,
    pub x_runtime: Option<HeaderValue>,
    pub x_memory_mb: Option<HeaderValue>,
    pub x_function_name: Option<HeaderValue>,
    pub x_handler: Option<HeaderValue>,
    pub last_event_id: Option<HeaderValue>,
}

impl CallHeaders {
    /// Collects the fields in one pass: requests have few fields, and most of those are not needed here. The
    /// gateway has already rejected repeated fields that may occur once.
    pub fn of(map: &HeaderMap) -> Self {
        let mut found = Self::default();
        let mut traces = 0;
        for (name, value) in map {
            let place = match name.as_str() {
                "prefer" => {
                    found.prefer.push(value.clone());
                    continue;
                }
                "tracestate" => {
                    found.tracestate.push(value.clone());
                    continue;
                }
                "if-match" => {
                    found.if_match.push(value.clone());
                    continue;
                }
                "if-none-match" => {
                    found.if_none_match.push(value.clone());
                    continue;
                }
                "x-async" => &mut found.x_async,
                "content-type" => &mut found.content_type,
                "traceparent" => {
                    traces += 1;
                    // Several values count as none (W3C Trace Context, section 3.2).
                    found.traceparent = (traces == 1).then(|| value.clone());
                    continue;
                }
                "idempotency-key" => &mut found.idempotency_key,
                "x-runtime" => &mut found.x_runtime,
                "x-memory-mb" => &mut found.x_memory_mb,
                "x-function-name" => &mut found.x_function_name,
                "x-handler" => &mut found.x_handler,
                "last-event-id" => &mut found.last_event_id,
                _ => continue,
            };
            *place = Some(value.clone());
        }
        found
    }

    /// The client's span, if it sent a valid `traceparent`.
    pub fn client_span(&self) -> Option<TraceContext> {
        self.traceparent.as_ref()?.to_str().ok().and_then(TraceContext::parse)
    }

    /// The client's `tracestate`, if it is valid. Without a valid `traceparent` it has no meaning.
    pub fn client_state(&self) -> Option<Cow<'_, str>> {
        self.client_span()?;
        tracestate(self.tracestate.iter().map(|value| value.to_str().unwrap_or_default()))
    }

    /// Whether `Content-Type` is JSON. A missing field counts as JSON, because parsing shows whether it is.
    pub fn is_json(&self) -> bool {
        let Some(value) = &self.content_type else { return true };
        if value.as_bytes() == b"application/json" {
            return true; // the usual case, without an allocation
        }
        let essence = essence(value);
        essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"))
    }

    /// Whether `Content-Type` is `multipart/form-data`.
    pub fn is_form(&self) -> bool {
        self.content_type.as_ref().is_some_and(|value| essence(value) == "multipart/form-data")
    }
}

/// A media type without its parameters, in lower case.
fn essence(value: &HeaderValue) -> String {
    let essence = value.to_str().unwrap_or_default().split(';').next().unwrap_or_default();
    essence.trim().to_ascii_lowercase()
}

/// The function id in the path. An invalid id is answered like an unknown function.
pub fn function_id(call: &Call) -> Result<FunctionId, ApiError> {
    call.params.first().and_then(|raw| FunctionId::parse(raw)).ok_or(ApiError::NoSuchFunction)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_needs_one_valid_traceparent() {
        let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        for (parents, states, span, state) in [
            (&[good][..], &["a=1", "b=2"][..], Some(good), Some("a=1,b=2")),
            (&[good], &[], Some(good), None),
            (&[good], &["?"], Some(good), None),
            (&[good, good], &["a=1"], None, None),
            (&["00-x"], &["a=1"], None, None),
            (&[], &["a=1"], None, None),
        ] {
            let mut map = HeaderMap::new();
            for (name, values) in [("traceparent", parents), ("tracestate", states)] {
                for value in values {
                    map.append(name, HeaderValue::from_str(value).unwrap());
                }
            }
            let headers = CallHeaders::of(&map);
            let found = headers.client_span().map(|span| span.to_string());
            assert_eq!((found.as_deref(), headers.client_state().as_deref()), (span, state), "{parents:?}");
        }
    }

    #[test]
    fn content_types() {
        let of = |value| CallHeaders { content_type: value, ..CallHeaders::default() };
        assert!(of(None).is_json() && !of(None).is_form());
        for (value, json, form) in [
            ("application/json", true, false),
            ("Application/JSON; charset=utf-8", true, false),
            ("application/cloudevents+json", true, false),
            ("text/plain", false, false),
            ("application/x-www-form-urlencoded", false, false),
            ("application/jsonp", false, false),
            ("multipart/form-data; boundary=x", false, true),
            ("multipart/mixed; boundary=x", false, false),
            ("", false, false),
        ] {
            let headers = of(Some(HeaderValue::from_static(value)));
            assert_eq!((headers.is_json(), headers.is_form()), (json, form), "{value}");
        }
    }
}
