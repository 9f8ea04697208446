//! A response as handlers build it. `gateway` adds the header fields that all responses have.

use bytes::Bytes;
use http::StatusCode;
use http::header::{HeaderName, HeaderValue};

/// A response.
#[derive(Debug)]
pub struct Reply {
    pub status: StatusCode,
    pub content_type: &'static str,
    pub headers: Vec<(HeaderName, HeaderValue)>,
    pub body: Bytes,
}

impl Reply {
    /// The media type of JSON.
    pub const JSON: &'static str = "application/json; charset=utf-8";

    /// A response with JSON bytes, unchanged.
    pub fn json(status: StatusCode, body: impl Into<Bytes>) -> Self {
        Self { status, content_type: Self::JSON, headers: Vec::new(), body: body.into() }
    }

    /// A response with a JSON value.
    pub fn value(status: StatusCode, value: &serde_json::Value) -> Self {
        Self::json(status, value.to_string())
    }

    /// Adds a header field.
    pub fn with(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }
}
