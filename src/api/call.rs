//! A request, as handlers read it.

use Call;
use bytes::{Bytes, BytesMut};
use crate::limiter::Counted;
use crate::model::{Caller, FunctionId};
use http::{HeaderMap, StatusCode, Uri};
use http::header::{ETAG, HeaderName, HeaderValue};
use serde_json::{Value, json};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use super::problem::ApiError;

/// What a handler reads of a request.
#[derive(Debug, Default)]
pub struct Call {
    /// The parts of the path that the route's pattern names, decoded, in order.
    pub params: Vec<String>,
    pub uri: Uri,
    pub headers: CallHeaders,
    /// Empty on routes that read it piece by piece, or not at all.
    pub body: Bytes,
    /// `None` on routes that ask for no key.
    pub caller: Option<Arc<Caller>>,
    /// What the rate limits have said so far.
    pub counted: Counted,
}

impl Call {
    /// The prefix of the path that the client used, which what it is pointed to keeps.
    pub fn prefix(&self) -> &'static str {
        routes::split_prefix(self.uri.path()).0
    }

    /// The name of the API key, which stands for it; empty on routes that ask for none.
    pub fn key_name(&self) -> &str {
        self.caller.as_ref().map_or("", |caller| &caller.name)
    }
}

/// A body that is read piece by piece; whoever gives it has bounded its length and its time.
pub trait BodyStream: Send {
    /// `None`: it has ended.
    fn next(&mut self) -> impl Future<Output = Result<Option<Bytes>, ApiError>> + Send;
}

/// A whole body, of at most `bytes_max` bytes.
pub async fn whole(body: &mut impl BodyStream, bytes_max: usize) -> Result<Bytes, ApiError> {
    let fits = |bytes: usize| (bytes <= bytes_max).then_some(()).ok_or(ApiError::BodyTooLarge { bytes_max });
    let Some(first) = body.next().await? else { return Ok(Bytes::new()) };
    fits(first.len())?;
    // Most bodies come in one piece, which is then not copied.
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

/// The header fields that handlers read; a few shared values instead of a copy of the map.
#[derive(Debug, Default)]
pub struct CallHeaders {
    pub prefer: Vec<HeaderValue>,
    pub x_async: Option<HeaderValue>,
    pub content_type: Option<HeaderValue>,
    pub traceparent: Option<HeaderValue>,
    pub idempotency_key: Option<HeaderValue>,
    pub if_match: Vec<HeaderValue>,
    pub if_none_match: Vec<HeaderValue>,
    pub x_runtime: Option<HeaderValue>,
    pub x_memory_mb: Option<HeaderValue>,
    pub x_function_name: Option<HeaderValue>,
}

impl CallHeaders {
    /// One pass: requests have few fields, and most of these are among none of them. What may stand once does.
    pub fn of(map: &HeaderMap) -> Self {
        let mut found = Self::default();
        let mut traces = 0;
        for (name, value) in map {
            let place = match name.as_str() {
                "prefer" => {
                    found.prefer.push(value.clone());
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
                    // Two are as good as none (W3C Trace Context, section 3.2).
                    found.traceparent = (traces == 1).then(|| value.clone());
                    continue;
                }
                "idempotency-key" => &mut found.idempotency_key,
                "x-runtime" => &mut found.x_runtime,
                "x-memory-mb" => &mut found.x_memory_mb,
                "x-function-name" => &mut found.x_function_name,
                _ => continue,
            };
            *place = Some(value.clone());
        }
        found
    }

    /// Whether the body is said to be JSON. A missing `Content-Type` is taken as JSON, as the body says clearly
    /// enough whether it is.
    pub fn is_json(&self) -> bool {
        let Some(value) = &self.content_type else { return true };
        if value.as_bytes() == b"application/json" {
            return true; // the usual case, without a copy
        }
        let essence = essence(value);
        essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"))
    }

    pub fn is_form(&self) -> bool {
        self.content_type.as_ref().is_some_and(|value| essence(value) == "multipart/form-data")
    }
}

/// A media type without its parameters, in small letters.
fn essence(value: &HeaderValue) -> String {
    let essence = value.to_str().unwrap_or_default().split(';').next().unwrap_or_default();
    essence.trim().to_ascii_lowercase()
}

/// The id in the path; what cannot be an id cannot be a function.
pub fn function_id(call: &Call) -> Result<FunctionId, ApiError> {
    call.params.first().and_then(|raw| FunctionId::parse(raw)).ok_or(ApiError::NoSuchFunction)
}

#[cfg(test)]
mod tests {
    use super::*;

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
