//! The connection guard, between the network and Pingora's server.
//!
//! Pingora has a timeout for each read of a header or body but none for the whole. It has no limit on
//! connections, and repairs some ambiguous requests instead of rejecting them. So each connection is counted
//! here, and its TLS handshake has a deadline. Over HTTP/1.1 the server sees only well-formed messages whose
//! heads arrived in time. HTTP/2 is checked frame by frame and has limits of its own.
//!
//! In reading order:
//!
//! - [`census`]: the number of connections and their limits
//! - [`stream`], with [`head`] and [`chunks`]: HTTP/1.1, one message at a time
//! - [`http2`], with [`hpack`]: HTTP/2, frame by frame
//! - [`grammar`]: the syntax that both versions share

mod census;
mod chunks;
mod grammar;
mod head;
mod hpack;
mod http2;
mod stream;

pub use census::{Accepted, ConnectionSlot};
pub use grammar::has_member;

use super::client::is_trusted;
use super::request_id::RequestId;
use super::respond::head_of;
use super::settings::GatewaySettings;
use super::tls::Tls;
use crate::api::{ApiError, Endpoint, Reply, RouteMatch, find};
use crate::config::{Http2Conf, HttpConf, Live};
use crate::metrics::Metrics;
use census::{Caps, ConnectionCounter};
use head::{HeadLimits, HeadRejection};
use http::Method;
use pingora::apps::{HttpPersistentSettings, HttpServerApp, HttpServerOptions, ServerApp};
use pingora::http::RequestHeader;
use pingora::prelude::ProxyHttp;
use pingora::protocols::http::ServerSession;
use pingora::protocols::http::v2::server::H2Options;
use pingora::protocols::l4::stream::Stream as L4Stream;
use pingora::protocols::{ALPN, GetSocketDigest, SocketDigest, Stream};
use pingora::proxy::HttpProxy;
use pingora::server::ShutdownWatch;
use std::fmt::Write;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;
use stream::{GuardedStream, NextHeadError};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::Instant;

/// The most streams that an HTTP/2 client may open and reset before the server has accepted them. More end
/// the connection.
const HTTP2_RESETS_MAX: usize = 20;

/// How much a header list may grow when the guard rewrites it, in bytes.
const REWRITTEN_MORE_BYTES: u32 = 256;

/// The state that all listeners share.
pub struct GuardState<P> {
    proxy: Arc<HttpProxy<P>>,
    census: Arc<ConnectionCounter>,
    edge: GatewaySettings,
    /// The limit for a request over HTTP/2, counted as in RFC 9113, section 6.5.2.
    header_list_bytes_max: usize,
    metrics: Arc<Metrics>,
    /// Becomes true when idle connections must close.
    closing: watch::Sender<bool>,
}

/// The Pingora application of one listener.
pub struct ListenerApp<P> {
    shared: Arc<GuardState<P>>,
    /// `None`: a plain-text listener.
    tls: Option<Tls>,
}

impl<P> GuardState<P>
where
    P: ProxyHttp + Send + Sync + 'static,
    P::CTX: Send + Sync,
{
    pub fn new(
        mut proxy: HttpProxy<P>,
        edge: GatewaySettings,
        http2: &Http2Conf,
        metrics: Arc<Metrics>,
    ) -> Self {
        let mut server = HttpServerOptions::default();
        server.h2_idle_timeout = Some(Duration::from_secs(http2.idle_timeout_s));
        proxy.server_options = Some(server);
        let mut options = H2Options::default();
        options
            .max_concurrent_streams(http2.streams_max)
            // Above the guard's own limit: the guard rejects larger lists with a problem, h2 would send a
            // bare 431.
            .max_header_list_size(http2.header_list_bytes_max.saturating_add(REWRITTEN_MORE_BYTES))
            .max_pending_accept_reset_streams(HTTP2_RESETS_MAX);
        proxy.h2_options = Some(options);
        let closing = watch::Sender::new(false);
        let census = Arc::new(ConnectionCounter::new(metrics.edge.connections.clone()));
        let header_list_bytes_max = http2.header_list_bytes_max as usize;
        Self { proxy: Arc::new(proxy), census, edge, header_list_bytes_max, metrics, closing }
    }

    /// The application of the plain-text listener.
    pub fn plain(self: &Arc<Self>) -> ListenerApp<P> {
        ListenerApp { shared: Arc::clone(self), tls: None }
    }

    /// The application of the TLS listener, if one is configured.
    pub fn tls(self: &Arc<Self>) -> Option<ListenerApp<P>> {
        let tls = self.edge.tls.clone()?;
        Some(ListenerApp { shared: Arc::clone(self), tls: Some(tls) })
    }

    fn caps(&self) -> Caps {
        let (room, one) = (self.edge.room.get(), self.edge.http.get().connections_per_address_max);
        Caps { all: room.connections_max, reserve: room.reserve, one }
    }

    fn place(&self, client: IpAddr, accepted: Accepted) -> Option<ConnectionSlot> {
        let http = self.edge.http.get();
        let untrusted = (!is_trusted(client.to_canonical(), &http.trusted_proxies)).then_some(client);
        let place = self.census.enter(untrusted, self.caps(), accepted);
        if place.as_ref().is_none_or(|place| place.is_reserve) {
            self.metrics.edge.connections_refused.inc();
        }
        place
    }

    /// Serves HTTP/1.1, message by message.
    async fn serve(&self, stream: GuardedStream, place: &ConnectionSlot, shutdown: &ShutdownWatch) {
        let mut stream = Box::new(stream);
        let mut persistent: Option<HttpPersistentSettings> = None;
        let mut closing = self.closing.subscribe();
        let opened = Instant::now();
        loop {
            let Timing { limits, header_timeout, idle } = Timing::of(&self.edge.http, persistent.is_some());
            if !stream.has_more() {
                let begins = pingora::time::timeout(idle, stream.begins());
                let begun = tokio::select! {
                    biased;
                    begun = begins => begun.unwrap_or(false),
                    _ = closing.wait_for(|closing| *closing) => false,
                };
                if !begun {
                    return stream.close().await;
                }
            }
            let is_first = persistent.is_none();
            let start = || if is_first { opened } else { Instant::now() };
            let deadline = || start() + header_timeout;
            let (head, bytes) = match stream.next_message(limits, deadline).await {
                Ok(message) => message,
                Err(NextHeadError::Closed) => return,
                Err(NextHeadError::Timeout) => return self.refuse(stream, ApiError::HeaderTimeout).await,
                Err(NextHeadError::Bad(bad)) => return self.refuse(stream, refusal(bad)).await,
            };
            if place.is_reserve {
                if !is_always_answered(&bytes[head.target.0..head.target.1]) {
                    return self.refuse(stream, ApiError::TooManyConnections).await;
                }
                place.asks();
            }
            let mut session = ServerSession::new_http1(stream);
            if let Some(persistent) = persistent {
                persistent.apply_to_session(&mut session);
            }
            session.set_pipelined_prefix(bytes);
            let Some(reused) = self.proxy.process_new_http(session, shutdown).await else { return };
            let (inner, settings) = reused.consume();
            let Ok(own) = inner.into_any().downcast::<GuardedStream>() else { return };
            // The rest of a body must never be parsed as the head of a request.
            if place.is_reserve || !own.is_between_messages() {
                return own.close().await;
            }
            stream = own;
            persistent = settings;
        }
    }

    /// Sends the problem, and closes the connection so that the client can read it.
    async fn refuse(&self, mut stream: Box<GuardedStream>, error: ApiError) {
        self.metrics.refused.with_label_values(&[error.code()]).inc();
        let id = RequestId::ours();
        let answer = last_answer(error.into_reply(id.as_str()), id);
        if stream.write_all(&answer).await.is_ok() {
            stream.close().await;
        }
    }
}

struct Timing {
    limits: HeadLimits,
    header_timeout: Duration,
    /// How long the connection may be idle before the first byte of the request.
    idle: Duration,
}

impl Timing {
    fn of(http: &Live<HttpConf>, is_kept: bool) -> Self {
        let http = http.get();
        let header_timeout = Duration::from_secs(http.header_timeout_s);
        // 0 means unlimited, as in Pingora.
        let keepalive = if http.keepalive_s == 0 { u64::from(u32::MAX) } else { http.keepalive_s };
        Self {
            limits: HeadLimits { bytes_max: http.header_bytes_max, fields_max: http.header_fields_max },
            header_timeout,
            idle: if is_kept { Duration::from_secs(keepalive) } else { header_timeout },
        }
    }
}

fn refusal(bad: HeadRejection) -> ApiError {
    match bad {
        HeadRejection::Malformed(what) => ApiError::MalformedHeader(what),
        HeadRejection::Framing(what) => ApiError::BadFraming(what),
        HeadRejection::TransferCoding => ApiError::TransferCodingUnknown,
        HeadRejection::TargetTooLong => ApiError::TargetTooLong,
        HeadRejection::TooLarge => ApiError::HeaderTooLarge,
        HeadRejection::Version => ApiError::VersionNotSupported,
        HeadRejection::Connect => {
            ApiError::MethodNotAllowed { allow: "GET, HEAD, POST, PUT, DELETE".to_owned() }
        }
        HeadRejection::Expectation => ApiError::ExpectationFailed,
    }
}

/// The reason why the guard rejected a request over HTTP/2, read from the marker field that it wrote.
pub fn refused_over_http2(request: &RequestHeader) -> Option<ApiError> {
    http2::request::refusal_of(&request.headers).map(refusal)
}

/// Whether a request is answered even at the connection limit: health checks and metrics must work then, too.
fn is_always_answered(target: &[u8]) -> bool {
    let Ok(target) = std::str::from_utf8(target) else { return false };
    let path = target.split('?').next().unwrap_or_default();
    let RouteMatch::Route(route, _) = find(&Method::GET, path) else { return false };
    matches!(route.endpoint, Endpoint::Health | Endpoint::Livez | Endpoint::Readyz | Endpoint::Metrics)
}

/// The bytes of a response after which the connection closes.
fn last_answer(mut reply: Reply, id: RequestId) -> Vec<u8> {
    let mut head = format!("HTTP/1.1 {}\r\n", reply.status);
    for (name, value) in &head_of(&mut reply, id) {
        let _ = write!(head, "{name}: {}\r\n", value.to_str().unwrap_or_default());
    }
    head += "connection: close\r\n\r\n";
    let mut answer = head.into_bytes();
    answer.extend_from_slice(&reply.body);
    answer
}

impl<P> ListenerApp<P>
where
    P: ProxyHttp + Send + Sync + 'static,
    P::CTX: Send + Sync,
{
    /// Performs the TLS handshake on a TLS listener. `None`: the handshake failed.
    async fn open(&self, tcp: L4Stream) -> Option<Stream> {
        let Some(tls) = &self.tls else { return Some(Box::new(tcp)) };
        let within = Duration::from_secs(self.shared.edge.http.get().header_timeout_s);
        let opened = tls.handshake(tcp, within).await;
        if opened.is_none() {
            self.shared.metrics.edge.handshakes_failed.inc();
        }
        opened.map(|stream| Box::new(stream) as Stream)
    }

    /// Waits until there is room for one more connection, if only to reject it.
    pub async fn has_room(&self) {
        self.shared.census.has_room(self.shared.caps()).await;
    }

    /// Closes the oldest idle connection of the reserve, to free its descriptor.
    pub fn evict(&self) {
        self.shared.census.evict();
    }

    /// Registers an accepted connection. `None`: it must be closed without a response.
    pub fn admit(&self, client: IpAddr, accepted: Accepted) -> Option<ConnectionSlot> {
        self.shared.place(client, accepted)
    }

    /// Serves a connection to its end.
    pub async fn serve(
        &self,
        tcp: TcpStream,
        client: SocketAddr,
        mut place: ConnectionSlot,
        stop: &ShutdownWatch,
    ) {
        let evicted = place.evicted();
        tokio::select! {
            biased;
            () = self.converse(stream_of(tcp, client), &place, stop) => {}
            () = evicted => {}
        }
    }

    async fn converse(&self, tcp: L4Stream, place: &ConnectionSlot, stop: &ShutdownWatch) {
        let shared = &self.shared;
        let Some(stream) = self.open(tcp).await else { return };
        let is_http2 = matches!(stream.selected_alpn_proto(), Some(ALPN::H2));
        let (header_timeout, write_timeout, fields_max) = {
            let http = shared.edge.http.get();
            let seconds = Duration::from_secs;
            (seconds(http.header_timeout_s), seconds(http.write_timeout_s), http.header_fields_max)
        };
        let mut stream = GuardedStream::new(stream, write_timeout);
        if !is_http2 {
            shared.serve(stream, place, stop).await;
            return;
        }
        let limits = HeadLimits { bytes_max: shared.header_list_bytes_max, fields_max };
        if !place.is_reserve && stream.open_http2(limits, header_timeout).await {
            shared.proxy.process_new(Box::new(stream), stop).await;
        }
    }

    /// Closes idle connections. Connections with a request in flight close after its response.
    pub async fn close(&self) {
        self.shared.closing.send_replace(true);
        self.shared.proxy.cleanup().await;
    }
}

/// A stream as Pingora's own listener makes it, but without its buffers: [`GuardedStream`] has its own.
fn stream_of(tcp: TcpStream, client: SocketAddr) -> L4Stream {
    let mut stream = L4Stream::from(tcp);
    // Fails only if the client has disconnected.
    let _ = stream.set_nodelay();
    let digest = SocketDigest::from_raw_fd(stream.as_raw_fd());
    let _ = digest.peer_addr.set(Some(client.into()));
    stream.set_socket_digest(digest);
    stream
}
