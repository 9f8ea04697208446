//! Reads request bodies within a size limit and a total deadline.
//!
//! Pingora has neither: its timeout is for one read, and a body that is sent byte by byte never exceeds it.

use super::inflate::BodyDecoder;
use crate::api::{ApiError, BodyStream, whole};
use bytes::Bytes;
use http::header::{CONTENT_LENGTH, EXPECT};
use pingora::prelude::Session;
use std::time::Duration;
use tokio::time::Instant;

/// Reads the whole body, decompressed, of at most `bytes_max` bytes.
pub async fn read(session: &mut Session, bytes_max: usize, timeout: Duration) -> Result<Bytes, ApiError> {
    whole(&mut BodyReader::wanted(session, bytes_max, timeout)?, bytes_max).await
}

/// The longest body that is read and discarded to keep the connection usable, in bytes.
const UNWANTED_BYTES_MAX: usize = 64 << 10;

/// Reads and discards a body that is not needed. `false`: the body is incomplete, so the connection cannot be
/// reused. It must not be read either: Pingora would take the next bytes of the body for a request.
pub async fn discard(session: &mut Session, timeout: Duration) -> bool {
    if session.is_body_empty() {
        return true;
    }
    match BodyReader::open(session, UNWANTED_BYTES_MAX, timeout) {
        // The client waits for a `100 Continue` before it sends the body, and gets none.
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

/// Whether the rest of the body is left unread instead of discarded: it is long, or its client waits for a
/// `100 Continue` and need not send the body after a final response.
pub fn is_left_unread(session: &mut Session) -> bool {
    let is_long = |session: &Session| declared(session).is_some_and(|len| len > UNWANTED_BYTES_MAX as u64);
    !session.is_body_done() && (expects(session) || is_long(session))
}

fn expects(session: &Session) -> bool {
    let expected = session.req_header().headers.get(EXPECT);
    expected.is_some_and(|v| v.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

fn declared(session: &Session) -> Option<u64> {
    session.req_header().headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// The body as a stream of pieces, in the order of arrival.
pub struct BodyReader<'a> {
    session: &'a mut Session,
    bytes_max: usize,
    bytes: usize,
    deadline: Instant,
    /// The client waits for a `100 Continue` before it sends the body.
    is_awaited: bool,
    /// `None`: the body is not compressed.
    inflating: Option<BodyDecoder>,
}

impl<'a> BodyReader<'a> {
    /// Starts the deadline; reads nothing yet.
    ///
    /// # Errors
    /// The declared length exceeds `bytes_max`.
    pub fn open(session: &'a mut Session, bytes_max: usize, timeout: Duration) -> Result<Self, ApiError> {
        if declared(session).is_some_and(|length| length > bytes_max as u64) {
            return Err(ApiError::BodyTooLarge { bytes_max });
        }
        let is_awaited = expects(session) && !session.is_body_empty();
        let deadline = Instant::now() + timeout;
        Ok(Self { session, bytes_max, bytes: 0, deadline, is_awaited, inflating: None })
    }

    /// As `open`, but decompresses the body. `bytes_max` bounds both forms.
    ///
    /// # Errors
    /// The declared length exceeds `bytes_max`, or the content coding is not supported.
    pub fn wanted(session: &'a mut Session, bytes_max: usize, timeout: Duration) -> Result<Self, ApiError> {
        let inflating = if session.is_body_empty() {
            None
        } else {
            BodyDecoder::of(&session.req_header().headers, bytes_max)?
        };
        Ok(Self { inflating, ..Self::open(session, bytes_max, timeout)? })
    }

    async fn read(&mut self) -> Result<Option<Bytes>, ApiError> {
        if std::mem::take(&mut self.is_awaited) {
            // Sent only now: every filter has accepted the request.
            self.session.write_continue_response().await.map_err(|_| ApiError::BodyBroken)?;
        }
        let read = self.session.downstream_session.read_request_body().await;
        let Some(bytes) = read.map_err(|_| ApiError::BodyBroken)? else { return Ok(None) };
        self.bytes += bytes.len();
        let fits = self.bytes <= self.bytes_max;
        fits.then_some(Some(bytes)).ok_or(ApiError::BodyTooLarge { bytes_max: self.bytes_max })
    }
}

impl BodyReader<'_> {
    /// The next piece, not decompressed.
    async fn piece(&mut self) -> Result<Option<Bytes>, ApiError> {
        if self.bytes > 0 && self.session.is_body_done() {
            return Ok(None); // saves a timer
        }
        tokio::time::timeout_at(self.deadline, self.read()).await.unwrap_or(Err(ApiError::BodyTimeout))
    }
}

impl BodyStream for BodyReader<'_> {
    async fn next(&mut self) -> Result<Option<Bytes>, ApiError> {
        loop {
            if let Some(inflating) = &mut self.inflating
                && let Some(clear) = inflating.next()?
            {
                return Ok(Some(clear));
            }
            let piece = self.piece().await?;
            match (&mut self.inflating, piece) {
                (None, piece) => return Ok(piece),
                (Some(inflating), Some(piece)) => inflating.feed(piece),
                (Some(inflating), None) => {
                    let last = inflating.end()?;
                    self.inflating = None;
                    return Ok(Some(last).filter(|last| !last.is_empty()));
                }
            }
        }
    }
}
