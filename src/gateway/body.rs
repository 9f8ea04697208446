//! The request body: capped, and within one deadline.

use super::inflate::Inflating;
use crate::api::{ApiError, BodyStream, whole};
use bytes::Bytes;
use http::header::{CONTENT_LENGTH, EXPECT};
use pingora::prelude::Session;
use std::time::Duration;
use tokio::time::Instant;

/// Reads the whole body.
pub async fn read(session: &mut Session, bytes_max: usize, timeout: Duration) -> Result<Bytes, ApiError> {
    whole(&mut Streamed::wanted(session, bytes_max, timeout)?, bytes_max).await
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

/// Whether nobody waits for what is still to come of the body: it is long, or its client waits to be told to send it, and
/// need not send it after another answer.
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

/// The body as it comes.
pub struct Streamed<'a> {
    session: &'a mut Session,
    bytes_max: usize,
    bytes: usize,
    deadline: Instant,
    /// The client waits to be told that its body is wanted.
    is_awaited: bool,
    /// `None`: it is given on as it comes.
    inflating: Option<Inflating>,
}

impl<'a> Streamed<'a> {
    /// A declared length that is too large is refused before anything is read.
    pub fn open(session: &'a mut Session, bytes_max: usize, timeout: Duration) -> Result<Self, ApiError> {
        if declared(session).is_some_and(|length| length > bytes_max as u64) {
            return Err(ApiError::BodyTooLarge { bytes_max });
        }
        let is_awaited = expects(session) && !session.is_body_empty();
        let deadline = Instant::now() + timeout;
        Ok(Self { session, bytes_max, bytes: 0, deadline, is_awaited, inflating: None })
    }

    /// As `open`, of a body that is read: what is compressed is inflated, and its length is that in the clear.
    pub fn wanted(session: &'a mut Session, bytes_max: usize, timeout: Duration) -> Result<Self, ApiError> {
        let inflating = if session.is_body_empty() {
            None
        } else {
            Inflating::of(&session.req_header().headers, bytes_max)?
        };
        Ok(Self { inflating, ..Self::open(session, bytes_max, timeout)? })
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

impl Streamed<'_> {
    /// The next piece, as it was sent.
    async fn piece(&mut self) -> Result<Option<Bytes>, ApiError> {
        if self.bytes > 0 && self.session.is_body_done() {
            return Ok(None); // without setting a timer
        }
        // Pingora's own timeout is per read; a body sent byte by byte would never meet it.
        tokio::time::timeout_at(self.deadline, self.read()).await.unwrap_or(Err(ApiError::BodyTimeout))
    }
}

impl BodyStream for Streamed<'_> {
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
