//! A request that is passed on: what its upstream sees of it, and what its client hears when the upstream fails.

use super::api_key::{Pass, X_API_KEY};
use super::origin::Origin;
use super::request_id::X_REQUEST_ID;
use super::upstreams::Upstream;
use super::via::Pseudonym;
use crate::api::ApiError;
use crate::limiter::Counted;
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

/// Addresses that are tried before the client is told that none can be reached.
const TRIES_MAX: usize = 3;

/// A request on its way to an upstream.
pub struct Passage {
    pub upstream: Arc<Upstream>,
    pub origin: Origin,
    pub request_id: HeaderValue,
    /// The key that let it through. `None`: none is asked for.
    pub pass: Option<Pass>,
    /// The address that was chosen last, if the client may not have said whom it asks.
    pub address: Option<String>,
    /// What the limits said.
    pub counted: Counted,
    body_bytes: usize,
    body_deadline: Instant,
    /// Connections that could not be made.
    tries: usize,
}

impl Passage {
    /// # Errors
    /// The declared length of the body is too large.
    pub fn new(
        upstream: Arc<Upstream>,
        origin: Origin,
        request_id: HeaderValue,
        pass: Option<Pass>,
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
            counted: Counted::default(),
            body_bytes: 0,
            body_deadline,
            tries: 0,
        })
    }

    pub fn body_deadline(&self) -> Instant {
        self.body_deadline
    }

    /// A piece of the body, on its way.
    ///
    /// # Errors
    /// The body is too large, or has taken too long.
    pub fn count_body(&mut self, bytes: usize) -> pingora::Result<()> {
        self.body_bytes += bytes;
        if self.body_bytes > self.upstream.conf.body_bytes_max {
            return Error::e_explain(HTTPStatus(413), "the body is too large");
        }
        if Instant::now() > self.body_deadline {
            return Error::e_explain(HTTPStatus(408), "the body has taken too long");
        }
        Ok(())
    }

    /// Whether another address may be tried: nothing was sent to the one that could not be reached.
    pub fn may_try_again(&mut self) -> bool {
        self.tries += 1;
        self.tries < TRIES_MAX
    }

    /// Makes of the request what the upstream is to see; `received` is as it came.
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
            // A client of HTTP/1.0 need not say it, and a server of HTTP/1.1 must be told.
            request.insert_header(HOST, self.address.as_deref().unwrap_or_default())?;
        }
        for (name, value) in &conf.add_headers {
            request.insert_header(name.clone(), value)?;
        }
        Ok(())
    }
}

/// What the client has called the server.
fn client_host(received: &RequestHeader) -> Option<HeaderValue> {
    received.headers.get(HOST).filter(|host| !host.is_empty()).cloned().or_else(|| {
        let authority = received.uri.authority()?;
        HeaderValue::from_str(authority.as_str()).ok()
    })
}

/// Makes of an upstream's answer what its client can read.
///
/// # Errors
/// The upstream has switched to another protocol that nobody has asked for.
pub fn adapt_answer(answer: &mut ResponseHeader, session: &mut Session) -> pingora::Result<()> {
    if answer.status == StatusCode::SWITCHING_PROTOCOLS {
        if !session.is_upgrade_req() {
            return Err(Error::explain(InvalidHTTPHeader, "101, and no upgrade was asked for").into_up());
        }
        // In a tunnel the client may be silent for as long as it likes; the upstream may for `read_timeout_s`.
        session.set_read_timeout(None);
    }
    // Pingora reads past trailers, so they are not announced either.
    answer.remove_header(&TRAILER);
    if session.req_header().version == Version::HTTP_10 && answer.remove_header(&TRANSFER_ENCODING).is_some()
    {
        // Chunks are unknown to it: what is sent ends with the connection.
        session.set_keepalive(None);
    }
    Ok(())
}

/// What a client hears of a failure. `None`: it has left.
pub fn failure(error: &Error, bytes_max: usize) -> Option<ApiError> {
    let is_timeout = |kind: &ErrorType| {
        matches!(kind, ReadTimedout | WriteTimedout | ConnectTimedout | TLSHandshakeTimedout)
    };
    Some(match (error.esource(), error.etype()) {
        (_, HTTPStatus(413)) => ApiError::BodyTooLarge { bytes_max },
        (_, HTTPStatus(408)) => ApiError::BodyTimeout,
        (_, HTTPStatus(503)) => ApiError::UpstreamAway,
        (ErrorSource::Downstream, ReadTimedout) => ApiError::BodyTimeout,
        (ErrorSource::Downstream, WriteTimedout | WriteError | ConnectionClosed) => return None,
        // Pingora's own look at it, before it is passed on.
        (ErrorSource::Downstream, InvalidHTTPHeader) => {
            ApiError::MalformedHeader("fields that cannot be passed on")
        }
        (ErrorSource::Downstream, _) => ApiError::BodyBroken,
        (_, kind) if is_timeout(kind) => ApiError::UpstreamTimeout,
        (_, ErrorType::ConnectRefused | ErrorType::ConnectNoRoute | ErrorType::ConnectError) => {
            ApiError::UpstreamAway
        }
        _ => ApiError::UpstreamBroken,
    })
}
