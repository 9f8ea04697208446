//! CORS: lets browsers allow scripts of other origins, if the configuration names their origin or `*`.
//!
//! Off by default: without configured origins no response has a CORS field.

use crate::config::{ANY_ORIGIN, HttpConf, UpstreamConf};
use http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_METHOD, HeaderName,
    HeaderValue, ORIGIN, VARY,
};
use http::{HeaderMap, Method};

type CorsFields = Vec<(HeaderName, HeaderValue)>;

/// Methods and header fields that a script may send, and fields that it may read.
const METHODS: &str = "GET, HEAD, POST, PUT, DELETE";
const SENT: &str = "content-type, x-api-key, x-async, prefer, idempotency-key, if-match, if-none-match, \
    x-request-id, traceparent, tracestate, x-runtime, x-memory-mb, x-function-name, \
    x-handler, last-event-id";
const READ: &str = "x-request-id, location, retry-after, etag, link, x-ratelimit-limit, \
    x-ratelimit-remaining, ratelimit, ratelimit-policy";
/// How long a browser may cache the response to a preflight request, in seconds.
const REMEMBERED_S: u64 = 600;

/// The CORS fields of every response. Empty if CORS is off. Only `Vary` if the request has no `Origin`, or
/// one that is not configured.
pub fn fields(conf: &HttpConf, headers: &HeaderMap) -> CorsFields {
    if conf.cors_origins.is_empty() {
        return CorsFields::new();
    }
    let expose = (ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(READ));
    if conf.cors_origins.iter().any(|origin| origin == ANY_ORIGIN) {
        // The same with and without `Origin`, so caches may reuse the response and no `Vary` is needed.
        return vec![(ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static(ANY_ORIGIN)), expose];
    }
    let vary = (VARY, HeaderValue::from_static("origin"));
    match headers
        .get(ORIGIN)
        .filter(|origin| conf.cors_origins.iter().any(|known| known.as_bytes() == origin.as_bytes()))
    {
        Some(origin) => vec![(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone()), expose, vary],
        // Caches must not reuse this response for a configured origin.
        None => vec![vary],
    }
}

/// Whether the request is a CORS preflight.
pub fn is_preflight(method: &Method, headers: &HeaderMap) -> bool {
    *method == Method::OPTIONS
        && headers.contains_key(ORIGIN)
        && headers.contains_key(ACCESS_CONTROL_REQUEST_METHOD)
}

/// Further fields of the response to a preflight request of a known origin. `upstream`: the one that the path
/// belongs to, whose methods and fields may be configured.
pub fn preflight_fields(upstream: Option<&UpstreamConf>) -> CorsFields {
    let list = |set: Option<&Vec<String>>, otherwise: &'static str| {
        let set = set.and_then(|list| HeaderValue::from_str(&list.join(", ")).ok());
        set.unwrap_or(HeaderValue::from_static(otherwise))
    };
    vec![
        (ACCESS_CONTROL_ALLOW_METHODS, list(upstream.and_then(|conf| conf.cors_methods.as_ref()), METHODS)),
        (ACCESS_CONTROL_ALLOW_HEADERS, list(upstream.and_then(|conf| conf.cors_headers.as_ref()), SENT)),
        (ACCESS_CONTROL_MAX_AGE, REMEMBERED_S.into()),
    ]
}
