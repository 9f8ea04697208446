//! A forwarded request: how it and its response are adapted, and which error the client gets if the upstream
//! fails.

use super::origin::RequestSource;
use super::pool::Upstream;
use super::via::Pseudonym;
use crate::api::ApiError;
use crate::gateway::api_key::{AuthorizedKey, X_API_KEY};
use crate::gateway::request_id::X_REQUEST_ID;
use crate::limiter::RateLimitState;
use http::header::{CONTENT_LENGTH, HOST, HeaderValue, TRAILER, TRANSFER_ENCODING};
use http::{StatusCode, Version};
use pingora::ErrorType::{
    ConnectTimedout, ConnectionClosed, HTTPStatus, InvalidHTTPHeader, ReadTimedout, TLSHandshakeTimedout,
    WriteError, WriteTimedout,
};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::prelude::Session;
use pingora::{Error, ErrorSource, ErrorType};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// The most addresses tried before the client gets an error.
const TRIES_MAX: usize = 3;

/// The state of a request that is forwarded to an upstream.
pub struct ForwardedRequest {
    pub upstream: Arc<Upstream>,
    pub origin: RequestSource,
    pub request_id: HeaderValue,
    /// The key that authorized it, for tunnels only. `None`: the request is no upgrade, or needs no key.
    pub pass: Option<AuthorizedKey>,
    /// The address chosen last: the `Host` of a request over HTTP/1.0 that has none.
    pub address: Option<String>,
    /// The rate-limit state for the header fields of the response.
    pub counted: RateLimitState,
    body_bytes: usize,
    body_deadline: Instant,
    /// Failed attempts to connect.
    tries: usize,
}

impl ForwardedRequest {
    /// # Errors
    /// The declared length of the body is too large.
    pub fn new(
        upstream: Arc<Upstream>,
        origin: RequestSource,
        request_id: HeaderValue,
        pass: Option<AuthorizedKey>,
        request: &RequestHeader,
    ) -> Result<Self, ApiError> {
        let bytes_max = upstream.conf.body_bytes_max;
        let declared = request.headers.get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
        if declared.is_some_and(|length| length > bytes_max as u64) {
            return Err(ApiError::BodyTooLarge { bytes_max });
        }
        let body_deadline = Instant::now() + Duration::from_secs(upstream.conf.body_timeout_s);
        Ok(Self {
            upstream,
            origin,
            request_id,
            pass,
            address: None,
            counted: RateLimitState::default(),
            body_bytes: 0,
            body_deadline,
            tries: 0,
        })
    }

    pub fn body_deadline(&self) -> Instant {
        self.body_deadline
    }

    /// Counts a piece of the body, in bytes, before it is forwarded.
    ///
    /// # Errors
    /// The body is too large, or has taken too long.
    pub fn count_body(&mut self, bytes: usize) -> pingora::Result<()> {
        self.body_bytes += bytes;
        if self.body_bytes > self.upstream.conf.body_bytes_max {
            return Error::e_explain(HTTPStatus(413), "the body is too large");
        }
        if Instant::now() > self.body_deadline {
            return Error::e_explain(HTTPStatus(408), "the body missed its deadline");
        }
        Ok(())
    }

    /// Counts a failed attempt to connect. Whether another address may be tried.
    pub fn may_try_again(&mut self) -> bool {
        self.tries += 1;
        self.tries < TRIES_MAX
    }

    /// Adapts the request for the upstream. `received`: the request as the client sent it.
    pub fn adapt(
        &self,
        request: &mut RequestHeader,
        received: &RequestHeader,
        pseudonym: &Pseudonym,
    ) -> pingora::Result<()> {
        let conf = &self.upstream.conf;
        let path = request.uri.path_and_query().map_or("/", |path| path.as_str());
        let path = self.upstream.path(path);
        request.set_raw_path(path.as_bytes())?;
        if !conf.pass_key {
            request.remove_header(&X_API_KEY);
        }
        for name in &conf.remove_headers {
            request.remove_header(name.as_str());
        }
        self.origin.write_to(request, client_host(received))?;
        request.insert_header(X_REQUEST_ID, &self.request_id)?;
        if let Some((name, value)) = pseudonym.via(&received.headers, received.version) {
            request.insert_header(name, value)?;
        }
        if let Some(host) = &conf.host {
            request.insert_header(HOST, host)?;
        } else if request.headers.get(HOST).is_none_or(HeaderValue::is_empty) {
            // Optional in HTTP/1.0, but the upstream is asked over HTTP/1.1, which requires it.
            request.insert_header(HOST, self.address.as_deref().unwrap_or_default())?;
        }
        for (name, value) in &conf.add_headers {
            request.insert_header(name.clone(), value)?;
        }
        Ok(())
    }
}

/// The host that the client asked for.
fn client_host(received: &RequestHeader) -> Option<HeaderValue> {
    received.headers.get(HOST).filter(|host| !host.is_empty()).cloned().or_else(|| {
        let authority = received.uri.authority()?;
        HeaderValue::from_str(authority.as_str()).ok()
    })
}

/// Adapts the response of an upstream for the client.
///
/// # Errors
/// The upstream switched to another protocol, but the client did not ask for that.
pub fn adapt_answer(answer: &mut ResponseHeader, session: &mut Session) -> pingora::Result<()> {
    if answer.status == StatusCode::SWITCHING_PROTOCOLS {
        if !session.is_upgrade_req() {
            return Err(Error::explain(InvalidHTTPHeader, "101 without a request to upgrade").into_up());
        }
        // In a tunnel the client may be idle without limit, and the upstream for `read_timeout_s`.
        session.set_read_timeout(None);
    }
    // Pingora drops trailers, so they must not be announced.
    answer.remove_header(&TRAILER);
    if session.req_header().version == Version::HTTP_10 && answer.remove_header(&TRANSFER_ENCODING).is_some()
    {
        // HTTP/1.0 has no chunked coding: the end of the connection ends the body.
        session.set_keepalive(None);
    }
    Ok(())
}

/// The error that the client gets if forwarding fails. `None`: the client has disconnected.
pub fn failure(error: &Error, bytes_max: usize) -> Option<ApiError> {
    let is_timeout = |kind: &ErrorType| {
        matches!(kind, ReadTimedout | WriteTimedout | ConnectTimedout | TLSHandshakeTimedout)
    };
    Some(match (error.esource(), error.etype()) {
        (_, HTTPStatus(413)) => ApiError::BodyTooLarge { bytes_max },
        (_, HTTPStatus(408)) => ApiError::BodyTimeout,
        (_, HTTPStatus(503)) => ApiError::UpstreamUnavailable,
        (ErrorSource::Downstream, ReadTimedout) => ApiError::BodyTimeout,
        (ErrorSource::Downstream, WriteTimedout | WriteError | ConnectionClosed) => return None,
        // Pingora's own check of the request before it is forwarded.
        (ErrorSource::Downstream, InvalidHTTPHeader) => {
            ApiError::MalformedHeader("fields that cannot be forwarded")
        }
        (ErrorSource::Downstream, _) => ApiError::BodyBroken,
        (_, kind) if is_timeout(kind) => ApiError::UpstreamTimeout,
        (_, ErrorType::ConnectRefused | ErrorType::ConnectNoRoute | ErrorType::ConnectError) => {
            ApiError::UpstreamUnavailable
        }
        _ => ApiError::UpstreamBroken,
    })
}
