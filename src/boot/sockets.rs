//! The sockets that a node listens on: inherited from its predecessor, or bound.

use super::upgrade::{self, Heir, Heritage};
use super::{Exit, Settings};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;

/// Pending connections the kernel holds while the accept loop is busy.
const BACKLOG: u32 = 4096;

/// A socket that listens, and where.
pub type Socket = (TcpListener, SocketAddr);

/// The sockets to accept on.
pub struct Sockets {
    pub plain: Socket,
    pub tls: Option<Socket>,
}

pub struct Listening {
    pub sockets: Sockets,
    /// The predecessor whose sockets they are.
    pub heir: Option<Heir>,
}

/// Inherits the sockets of a running process, or binds.
pub async fn listening(settings: &Settings) -> Result<Listening, Exit> {
    let (mut inherited, mut heir) = (Vec::new(), None);
    if let (true, Some(dir)) = (settings.is_upgrade, &settings.meet_in) {
        match upgrade::inherit(dir, settings.port).await {
            Ok(Some((sockets, of))) => (inherited, heir) = (sockets, Some(of)),
            Ok(None) => tracing::info!("Nobody To Take Over From"),
            Err(e) => {
                eprintln!("infra-controller: the running process does not hand its socket over: {e}");
                return Err(Exit::Unavailable);
            }
        }
    }
    let listen = settings.conf.listen.address;
    let mut inherited = inherited.into_iter();
    let plain = inherited_or_bound(inherited.next(), SocketAddr::new(listen, settings.port))?;
    let tls = settings.conf.tls.as_ref().map(|tls| {
        let address = SocketAddr::new(tls.address.unwrap_or(listen), tls.port);
        inherited_or_bound(inherited.next(), address)
    });
    Ok(Listening { sockets: Sockets { plain, tls: tls.transpose()? }, heir })
}

fn inherited_or_bound(inherited: Option<TcpListener>, address: SocketAddr) -> Result<Socket, Exit> {
    let socket = match inherited {
        Some(listener) => Ok(listener),
        None => bind(address),
    };
    let socket = socket.and_then(|listener| Ok((listener.local_addr()?, listener)));
    socket.map(|(bound, listener)| (listener, bound)).map_err(|e| {
        eprintln!("infra-controller: cannot listen on {address}: {e}. Free the port, or set another one.");
        Exit::Config
    })
}

/// Offers the sockets to a successor. Without that the process works as well.
pub fn heritage(settings: &Settings, sockets: &Sockets) -> Option<Heritage> {
    let dir = settings.meet_in.as_ref()?;
    let all = std::iter::once(&sockets.plain).chain(&sockets.tls);
    let clones: std::io::Result<Vec<_>> =
        all.map(|(socket, _)| socket.try_clone().map(OwnedFd::from)).collect();
    let offered = clones.and_then(|sockets| Heritage::offer(dir, settings.port, sockets));
    offered.inspect_err(|e| tracing::warn!(error = %e, "No Successor Can Take Over")).ok()
}

/// Binds before anything is served, so that a taken port is an error message and not a panic in Pingora.
fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket =
        if address.is_ipv4() { tokio::net::TcpSocket::new_v4() } else { tokio::net::TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)?.into_std()
}
