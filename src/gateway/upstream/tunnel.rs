//! Connections to upstreams for requests that upgrade to another protocol, such as WebSocket.
//!
//! These connections work around a race in Pingora (github.com/cloudflare/pingora/issues/946). Pingora polls
//! the end of the request and the upstream's 101 at the same time. If it sees the 101 first, it takes the end
//! of the request for the end of the tunnel. A fast upstream on a busy machine is enough for that. So the
//! first read after a write reports that no data is available yet, and Pingora sees the end of the request
//! first.
//!
//! A tunnel carries no further requests that would present a key. So the key that opened it is checked
//! periodically, and the tunnel ends when the key is removed, expires or loses its scope.

use crate::gateway::api_key::{ApiKeys, AuthorizedKey};
use async_trait::async_trait;
use pingora::ErrorType::ConnectError;
use pingora::connectors::l4::Connect;
use pingora::protocols::l4::socket::SocketAddr;
use pingora::protocols::l4::stream::Stream;
use pingora::protocols::l4::virt::{VirtualSockOpt, VirtualSocket, VirtualSocketStream};
use pingora::upstreams::peer::HttpPeer;
use pingora::{OkOrErr, OrErr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use std::{fmt, io};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Interval, interval_at};

/// How often the key of a tunnel is checked.
const KEY_CHECK_EVERY: Duration = Duration::from_secs(15);

/// Gives the request a connection of its own, which may become a tunnel. `key`: the key that authorized the
/// request. `None`: the upstream requires no key.
pub fn tunnel(peer: &mut HttpPeer, key: Option<(Arc<ApiKeys>, AuthorizedKey)>) {
    static TUNNELS: AtomicU64 = AtomicU64::new(1);
    peer.options.custom_l4 = Some(Arc::new(TunnelConnector { key }));
    // A unique group and no idle time: the connection is neither taken from the pool nor returned to it.
    peer.group_key = TUNNELS.fetch_add(1, Ordering::Relaxed);
    peer.options.idle_timeout = Some(Duration::ZERO);
}

/// Makes such connections.
struct TunnelConnector {
    key: Option<(Arc<ApiKeys>, AuthorizedKey)>,
}

impl fmt::Debug for TunnelConnector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TunnelConnector").finish_non_exhaustive()
    }
}

#[async_trait]
impl Connect for TunnelConnector {
    async fn connect(&self, address: &SocketAddr) -> pingora::Result<Stream> {
        let address = address.as_inet().or_err(ConnectError, "not an IP address")?;
        let tcp = TcpStream::connect(address).await.or_err(ConnectError, "cannot connect")?;
        let guard = self.key.clone().map(|(keys, pass)| KeyGuard {
            keys,
            pass,
            timer: interval_at(Instant::now() + KEY_CHECK_EVERY, KEY_CHECK_EVERY),
        });
        Ok(VirtualSocketStream::new(Box::new(Patient { tcp, has_written: false, guard })).into())
    }
}

#[derive(Debug)]
struct Patient {
    tcp: TcpStream,
    /// No read followed the last write yet.
    has_written: bool,
    guard: Option<KeyGuard>,
}

/// Checks the key of a tunnel periodically.
struct KeyGuard {
    keys: Arc<ApiKeys>,
    pass: AuthorizedKey,
    timer: Interval,
}

impl KeyGuard {
    /// Whether the key was removed, has expired, or has lost its scope. Wakes `cx` for the next check.
    fn has_ended(&mut self, cx: &mut Context<'_>) -> bool {
        while self.timer.poll_tick(cx).is_ready() {
            if !self.keys.still_opens(&self.pass) {
                return true;
            }
        }
        false
    }
}

impl fmt::Debug for KeyGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyGuard").finish_non_exhaustive()
    }
}

impl VirtualSocket for Patient {
    fn set_socket_option(&self, option: VirtualSockOpt) -> io::Result<()> {
        match option {
            VirtualSockOpt::NoDelay => self.tcp.set_nodelay(true),
            _ => Ok(()),
        }
    }
}

impl AsyncRead for Patient {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.guard.as_mut().is_some_and(|guard| guard.has_ended(cx)) {
            this.guard = None;
            tracing::info!("Tunnel closed because the key that opened it is no longer valid");
            return Poll::Ready(Ok(())); // reads as the end of the upstream's data
        }
        if std::mem::take(&mut this.has_written) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Pin::new(&mut this.tcp).poll_read(cx, buf)
    }
}

impl AsyncWrite for Patient {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.has_written = true;
        Pin::new(&mut this.tcp).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().tcp).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().tcp).poll_shutdown(cx)
    }
}
