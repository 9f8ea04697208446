//! A request that is passed on: what its upstream sees of it, and what its client hears when the upstream fails.

use super::upstreams::Upstream;
use crate::api::ApiError;
use crate::limiter::Counted;
use http::header::{CONTENT_LENGTH, FORWARDED, HOST, HeaderName, HeaderValue};
use pingora::ErrorSource;
use pingora::ErrorType::{
    ConnectTimedout, ConnectionClosed, HTTPStatus, InvalidHTTPHeader, ReadTimedout, TLSHandshakeTimedout,
    WriteError, WriteTimedout,
};
use pingora::http::RequestHeader;
use pingora::{Error, ErrorType};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");
const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Addresses that are tried before the client is told that none can be reached.
const TRIES_MAX: usize = 3;

/// A request on its way to an upstream.
pub struct Passage {
    pub upstream: Arc<Upstream>,
    pub origin: Origin,
    pub request_id: HeaderValue,
    /// What the limits said.
    pub counted: Counted,
    body_bytes: usize,
    body_deadline: Instant,
    /// Connections that could not be made.
    tries: usize,
}

/// Where a request came from.
#[derive(Clone, Copy, Debug)]
pub struct Origin {
    pub peer: Option<IpAddr>,
    /// The peer is a proxy that says who called it.
    pub is_peer_trusted: bool,
    pub has_tls: bool,
}

impl Passage {
    /// # Errors
    /// The declared length of the body is too large.
    pub fn new(
        upstream: Arc<Upstream>,
        origin: Origin,
        request_id: HeaderValue,
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
            counted: Counted::default(),
            body_bytes: 0,
            body_deadline,
            tries: 0,
        })
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

    /// Makes of the request what the upstream is to see.
    pub fn adapt(
        &self,
        request: &mut RequestHeader,
        client_host: Option<HeaderValue>,
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
        self.tell_origin(request, client_host)?;
        request.insert_header(X_REQUEST_ID, &self.request_id)?;
        if let Some(host) = &conf.host {
            request.insert_header(HOST, host)?;
        }
        for (name, value) in &conf.add_headers {
            request.insert_header(name.clone(), value)?;
        }
        Ok(())
    }

    fn tell_origin(
        &self,
        request: &mut RequestHeader,
        client_host: Option<HeaderValue>,
    ) -> pingora::Result<()> {
        let Origin { peer, is_peer_trusted, has_tls } = self.origin;
        // What strangers say of themselves stays here.
        let mut chain = Vec::new();
        if is_peer_trusted {
            let said = request.headers.get_all(X_FORWARDED_FOR);
            chain.extend(said.iter().filter_map(|value| value.to_str().ok().map(str::to_owned)));
        } else {
            request.remove_header(&FORWARDED);
        }
        chain.extend(peer.map(|peer| peer.to_canonical().to_string()));
        request.insert_header(X_FORWARDED_FOR, chain.join(", "))?;
        if !is_peer_trusted || !request.headers.contains_key(X_FORWARDED_PROTO) {
            request.insert_header(X_FORWARDED_PROTO, if has_tls { "https" } else { "http" })?;
        }
        if let Some(host) =
            client_host.filter(|_| !is_peer_trusted || !request.headers.contains_key(X_FORWARDED_HOST))
        {
            request.insert_header(X_FORWARDED_HOST, host)?;
        }
        Ok(())
    }
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
