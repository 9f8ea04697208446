//! A reply, as handlers write it.

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, StatusCode, Uri};
use http::header::{HeaderName, HeaderValue};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

/// An answer.
#[derive(Debug)]
pub struct Reply {
    pub status: StatusCode,
    pub content_type: &'static str,
    pub headers: Vec<(HeaderName, HeaderValue)>,
    pub body: Bytes,
}

impl Reply {
    pub const JSON: &'static str = "application/json; charset=utf-8";

    /// JSON bytes as they are.
    pub fn json(status: StatusCode, body: impl Into<Bytes>) -> Self {
        Self { status, content_type: Self::JSON, headers: Vec::new(), body: body.into() }
    }

    /// A JSON value.
    pub fn value(status: StatusCode, value: &serde_json::Value) -> Self {
        Self::json(status, value.to_string())
    }

    pub fn with(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }
}
