//! The HTTP client of the exporter: that of this program, in place of one that the exporter would bring.

use crate::https::{self, HttpsClient};
use async_trait::async_trait;
use http_body_util::{BodyExt, Full, Limited};
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

/// Longest response of a collector, in bytes. It names what it rejects.
const RESPONSE_BYTES_MAX: usize = 64 * 1024;

/// A client for one collector. Redirects are not followed.
#[derive(Clone)]
pub struct CollectorClient {
    client: HttpsClient,
    timeout: Duration,
    last_status: Arc<AtomicU16>,
}

impl CollectorClient {
    pub fn new(timeout: Duration) -> Result<Self, String> {
        let client = https::client(timeout).map_err(|e| e.to_string())?;
        Ok(Self { client, timeout, last_status: Arc::default() })
    }

    /// The status of the last response. 0: there was none.
    pub fn last_status(&self) -> u16 {
        self.last_status.load(Ordering::Relaxed)
    }

    async fn send(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let response = self.client.request(request.map(Full::new)).await?;
        let (head, body) = response.into_parts();
        self.last_status.store(head.status.as_u16(), Ordering::Relaxed);
        let body = Limited::new(body, RESPONSE_BYTES_MAX).collect().await?;
        Ok(Response::from_parts(head, body.to_bytes()))
    }
}

/// Without the client: its fields say nothing, and a request has secrets.
impl std::fmt::Debug for CollectorClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CollectorClient")
    }
}

#[async_trait]
impl HttpClient for CollectorClient {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        self.last_status.store(0, Ordering::Relaxed);
        tokio::time::timeout(self.timeout, self.send(request)).await?
    }
}
