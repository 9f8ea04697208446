//! The request body: capped, and within one deadline.

use crate::api::ApiError;
use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, EXPECT};
use pingora::prelude::Session;
use std::time::Duration;

/// Reads the whole body. A declared length that is too large is refused before anything is read.
pub async fn read(session: &mut Session, bytes_max: usize, timeout: Duration) -> Result<Bytes, ApiError> {
    let header = session.req_header();
    let declared = header.headers.get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if declared.is_some_and(|length| length > bytes_max as u64) {
        return Err(ApiError::BodyTooLarge { bytes_max });
    }
    let expects =
        header.headers.get(EXPECT).is_some_and(|v| v.as_bytes().eq_ignore_ascii_case(b"100-continue"));
    if expects && !session.is_body_empty() {
        // Only now, after every filter has let the request through, is the body asked for.
        session.write_continue_response().await.map_err(|_| ApiError::BodyBroken)?;
    }
    // Pingora's own timeout is per read; a body sent byte by byte would never meet it.
    tokio::time::timeout(timeout, read_all(session, bytes_max)).await.unwrap_or(Err(ApiError::BodyTimeout))
}

async fn read_all(session: &mut Session, bytes_max: usize) -> Result<Bytes, ApiError> {
    let Some(first) = chunk(session).await? else { return Ok(Bytes::new()) };
    if first.len() > bytes_max {
        return Err(ApiError::BodyTooLarge { bytes_max });
    }
    // Most bodies come in one piece, which is then not copied.
    let Some(second) = chunk(session).await? else { return Ok(first) };
    let mut body = BytesMut::from(first);
    let mut next = Some(second);
    while let Some(bytes) = next {
        if body.len() + bytes.len() > bytes_max {
            return Err(ApiError::BodyTooLarge { bytes_max });
        }
        body.extend_from_slice(&bytes);
        next = chunk(session).await?;
    }
    Ok(body.freeze())
}

async fn chunk(session: &mut Session) -> Result<Option<Bytes>, ApiError> {
    session.downstream_session.read_request_body().await.map_err(|_| ApiError::BodyBroken)
}
