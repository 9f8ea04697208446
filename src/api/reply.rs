//! A response as handlers build it. `gateway` adds the header fields that all responses have.

use bytes::Bytes;
use futures_util::stream::{Stream, StreamExt};
use http::StatusCode;
use http::header::{HeaderName, HeaderValue};
use std::fmt;
use std::pin::Pin;

/// A response.
#[derive(Debug)]
pub struct Reply {
    pub status: StatusCode,
    pub content_type: &'static str,
    pub headers: Vec<(HeaderName, HeaderValue)>,
    pub body: Bytes,
    /// A body that is produced while it is sent. `body` is empty then.
    pub stream: Option<ReplyStream>,
}

/// A body in pieces. It is dropped when the client leaves, or when the node drains.
pub struct ReplyStream(Pin<Box<dyn Stream<Item = Bytes> + Send>>);

impl ReplyStream {
    pub fn new(pieces: impl Stream<Item = Bytes> + Send + 'static) -> Self {
        Self(Box::pin(pieces))
    }

    /// The next piece. `None`: the body ends. Nothing is lost if the future is dropped.
    pub async fn next(&mut self) -> Option<Bytes> {
        self.0.next().await
    }
}

impl fmt::Debug for ReplyStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReplyStream").finish_non_exhaustive()
    }
}

impl Reply {
    /// The media type of JSON.
    pub const JSON: &'static str = "application/json; charset=utf-8";

    /// A response with JSON bytes, unchanged.
    pub fn json(status: StatusCode, body: impl Into<Bytes>) -> Self {
        Self { status, content_type: Self::JSON, headers: Vec::new(), body: body.into(), stream: None }
    }

    /// A response with a JSON value.
    pub fn value(status: StatusCode, value: &serde_json::Value) -> Self {
        Self::json(status, value.to_string())
    }

    /// A response whose body is produced while it is sent.
    pub fn stream(content_type: &'static str, stream: ReplyStream) -> Self {
        let (status, headers, body) = (StatusCode::OK, Vec::new(), Bytes::new());
        Self { status, content_type, headers, body, stream: Some(stream) }
    }

    /// Adds a header field.
    pub fn with(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }
}
