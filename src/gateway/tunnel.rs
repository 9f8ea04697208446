//! Connections to upstreams that may become tunnels, for requests that ask for another protocol (WebSocket).
//!
//! Pingora takes the end of the request, which has no body, for the end of the tunnel if it reads the upstream's 101
//! before it (github.com/cloudflare/pingora/issues/946), and a quick upstream on a busy machine is enough for that. It
//! looks for both at once; so on these connections the first look for an answer finds none yet, and the end of the
//! request is what it reads first.

use async_trait::async_trait;
use pingora::ErrorType::ConnectError;
use pingora::connectors::l4::Connect;
use pingora::protocols::l4::socket::SocketAddr;
use pingora::protocols::l4::stream::Stream;
use pingora::protocols::l4::virt::{VirtualSockOpt, VirtualSocket, VirtualSocketStream};
use pingora::upstreams::peer::HttpPeer;
use pingora::{OkOrErr, OrErr};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// Has the request go over a connection of its own that may become a tunnel.
pub fn tunnel(peer: &mut HttpPeer) {
    static TUNNELS: AtomicU64 = AtomicU64::new(1);
    peer.options.custom_l4 = Some(Arc::new(Patiently));
    // None that others left, and none for others.
    peer.group_key = TUNNELS.fetch_add(1, Ordering::Relaxed);
    peer.options.idle_timeout = Some(Duration::ZERO);
}

/// How such a connection is made.
#[derive(Debug)]
struct Patiently;

#[async_trait]
impl Connect for Patiently {
    async fn connect(&self, address: &SocketAddr) -> pingora::Result<Stream> {
        let address = address.as_inet().or_err(ConnectError, "not an internet address")?;
        let tcp = TcpStream::connect(address).await.or_err(ConnectError, "no connection")?;
        Ok(VirtualSocketStream::new(Box::new(Patient { tcp, has_written: false })).into())
    }
}

#[derive(Debug)]
struct Patient {
    tcp: TcpStream,
    /// Nobody has looked for an answer since.
    has_written: bool,
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
