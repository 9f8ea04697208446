//! The request body: capped, and within one deadline.

use crate::api::{ApiError, BodyStream, whole};
use bytes::Bytes;
use http::header::{CONTENT_LENGTH, EXPECT};
use pingora::prelude::Session;
use std::time::Duration;
use tokio::time::Instant;

/// Reads the whole body.
pub async fn read(session: &mut Session, bytes_max: usize, timeout: Duration) -> Result<Bytes, ApiError> {
    whole(&mut Streamed::open(session, bytes_max, timeout)?, bytes_max).await
}

/// Longest body that is read past, in bytes, on routes that take none.
const UNWANTED_BYTES_MAX: usize = 64 << 10;

/// Reads past a body that nobody wants. `false`: it is still on its way, so the connection cannot be used again, and
/// must not be listened to: Pingora would take the next bytes of the body for those of a request.
pub async fn discard(session: &mut Session, timeout: Duration) -> bool {
    if session.is_body_empty() {
        return true;
    }
    match Streamed::open(session, UNWANTED_BYTES_MAX, timeout) {
        // A client that waits to be told to send it is not told.
        Ok(body) if body.is_awaited => false,
        Ok(mut body) => loop {
            match body.next().await {
                Ok(Some(_)) => {}
                Ok(None) => break true,
                Err(_) => break false,
            }
        },
        Err(_) => false,
    }
}

/// Whether so much of the body is still to come that nobody waits for it.
pub fn is_long(session: &mut Session) -> bool {
    !session.is_body_done() && declared(session).is_some_and(|length| length > UNWANTED_BYTES_MAX as u64)
}

fn declared(session: &Session) -> Option<u64> {
    session.req_header().headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// The body as it comes.
pub struct Streamed<'a> {
    session: &'a mut Session,
    bytes_max: usize,
    bytes: usize,
    deadline: Instant,
    /// The client waits to be told that its body is wanted.
    is_awaited: bool,
}

impl<'a> Streamed<'a> {
    /// A declared length that is too large is refused before anything is read.
    pub fn open(session: &'a mut Session, bytes_max: usize, timeout: Duration) -> Result<Self, ApiError> {
        if declared(session).is_some_and(|length| length > bytes_max as u64) {
            return Err(ApiError::BodyTooLarge { bytes_max });
        }
        let headers = &session.req_header().headers;
        let expects = headers.get(EXPECT).is_some_and(|v| v.as_bytes().eq_ignore_ascii_case(b"100-continue"));
        let is_awaited = expects && !session.is_body_empty();
        Ok(Self { session, bytes_max, bytes: 0, deadline: Instant::now() + timeout, is_awaited })
    }

    async fn read(&mut self) -> Result<Option<Bytes>, ApiError> {
        if std::mem::take(&mut self.is_awaited) {
            // Only now, after every filter has let the request through, is the body asked for.
            self.session.write_continue_response().await.map_err(|_| ApiError::BodyBroken)?;
        }
        let read = self.session.downstream_session.read_request_body().await;
        let Some(bytes) = read.map_err(|_| ApiError::BodyBroken)? else { return Ok(None) };
        self.bytes += bytes.len();
        let fits = self.bytes <= self.bytes_max;
        fits.then_some(Some(bytes)).ok_or(ApiError::BodyTooLarge { bytes_max: self.bytes_max })
    }
}

impl BodyStream for Streamed<'_> {
    async fn next(&mut self) -> Result<Option<Bytes>, ApiError> {
        if self.bytes > 0 && self.session.is_body_done() {
            return Ok(None); // without setting a timer
        }
        // Pingora's own timeout is per read; a body sent byte by byte would never meet it.
        tokio::time::timeout_at(self.deadline, self.read()).await.unwrap_or(Err(ApiError::BodyTimeout))
    }
}
