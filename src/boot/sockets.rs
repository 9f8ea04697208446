//! The sockets that a node listens on: inherited from its predecessor, or bound.
//!
//! A successor keeps those that listen where it is to listen, binds what is new, and closes its copy of the
//! others, which end with the predecessor. An address that overlaps an inherited one (`127.0.0.1` beside
//! `0.0.0.0`, on one port) can be bound only while both sockets say SO_REUSEPORT. They say it for that moment
//! alone: later it would let a second process listen on the same address by mistake. The kernel gives each
//! connection to the socket with the narrower address, so nothing is shared out between the two.

mod matching;

use super::upgrade::{self, Heir, Heritage};
use super::{Exit, Settings};
use matching::{Endpoint, Matching, conflict, matched};
use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use tokio::net::TcpSocket;

const _: () = assert!(Speaks::ALL.len() * matching::SOCKETS_OF_ONE_MAX <= upgrade::SOCKETS_MAX);

/// Pending connections the kernel holds while the accept loop is busy.
const BACKLOG: u32 = 4096;

/// What the clients of a socket speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speaks {
    Plain,
    Tls,
}

impl Speaks {
    const ALL: [Self; 2] = [Self::Plain, Self::Tls];
}

/// A socket that listens.
pub struct Socket {
    pub listener: TcpListener,
    pub bound: SocketAddr,
    pub speaks: Speaks,
}

pub struct Listening {
    /// That of the configured port first.
    pub sockets: Vec<Socket>,
    /// The predecessor whose sockets some of them are.
    pub heir: Option<Heir>,
}

/// Inherits the sockets of a running process, or binds.
pub async fn listening(settings: &Settings) -> Result<Listening, Exit> {
    let wanted = wanted(settings);
    let endpoints: Vec<Endpoint> = wanted.iter().map(|(endpoint, _)| *endpoint).collect();
    if let Some((a, b)) = conflict(&endpoints) {
        eprintln!(
            "infra-controller: cannot listen on both {a} and {b}. Set another port or address for one."
        );
        return Err(Exit::Config);
    }
    let (mut inherited, mut heir) = (Vec::new(), None);
    if let (true, Some(dir)) = (settings.is_upgrade, &settings.meet_in) {
        match upgrade::inherit(dir, settings.port).await {
            Ok(Some((sockets, of))) => (inherited, heir) = (sockets, Some(of)),
            Ok(None) => nobody_waits(&upgrade::other_ports(dir, settings.port)),
            Err(e) => {
                eprintln!("infra-controller: the running process does not hand its socket over: {e}");
                return Err(Exit::Unavailable);
            }
        }
    }
    let sockets = taken_or_bound(&wanted, inherited).map_err(|problem| {
        eprintln!("infra-controller: {problem}");
        Exit::Config
    })?;
    Ok(Listening { sockets, heir })
}

/// Where the settings say that a node listens.
fn wanted(settings: &Settings) -> Vec<(Endpoint, Speaks)> {
    let listen = settings.conf.listen.address;
    let plain = (Endpoint::new(listen, settings.port), Speaks::Plain);
    let tls = settings.conf.tls.as_ref();
    let tls = tls.map(|tls| (Endpoint::new(tls.address.unwrap_or(listen), tls.port), Speaks::Tls));
    std::iter::once(plain).chain(tls).collect()
}

/// Processes meet by the configured port. Whoever changed that has two of them now, and may not know.
fn nobody_waits(other_ports: &[u16]) {
    if other_ports.is_empty() {
        return tracing::info!("Nobody To Take Over From");
    }
    let ports = other_ports.iter().map(u16::to_string).collect::<Vec<_>>().join(", ");
    tracing::warn!(
        other_ports = ports,
        "Nobody To Take Over From On This Port: Processes With Another PORT Go On And Must Be Stopped By Hand"
    );
}

/// A socket for each wanted endpoint, or why there is none.
/// What helps against an address that cannot be bound.
fn bind_advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => "Free the port, or set another one.",
        io::ErrorKind::AddrNotAvailable => "Name an address of this machine.",
        io::ErrorKind::PermissionDenied => "Set a port above 1023, or let the process bind such ports.",
        _ => "Mend the cause; if it is the limit of open files, raise it (ulimit -n, LimitNOFILE=).",
    }
}

fn taken_or_bound(wanted: &[(Endpoint, Speaks)], inherited: Vec<TcpListener>) -> Result<Vec<Socket>, String> {
    let endpoints: Vec<Endpoint> = wanted.iter().map(|(endpoint, _)| *endpoint).collect();
    let held: io::Result<Vec<Endpoint>> = inherited.iter().map(endpoint_of).collect();
    let held =
        held.map_err(|e| format!("what the running process hands over is no socket that listens: {e}"))?;
    let Matching { kept, bound } = matched(&endpoints, &held);
    let mut made = Vec::new();
    for (endpoint, wanted_at) in &bound {
        let beside: Vec<usize> = (0..held.len()).filter(|at| held[*at].overlaps(*endpoint)).collect();
        let sockets: Vec<&TcpListener> = beside.iter().map(|at| &inherited[*at]).collect();
        let listener = bind(*endpoint, &sockets).map_err(|e| match beside.first() {
            None => format!("cannot listen on {endpoint}: {e}. {}", bind_advice(&e)),
            Some(at) => format!(
                "cannot listen on {endpoint} while the running process listens on {}: {e}. Nothing was taken over. \
                 Stop that process and start this one without --upgrade, or set another port.",
                held[*at]
            ),
        })?;
        made.push((listener, *wanted_at));
    }
    if !held.is_empty() {
        report(&held, &kept, &bound);
    }
    let taken = inherited.into_iter().enumerate().filter_map(|(at, listener)| {
        let of = kept.iter().find(|(kept, _)| *kept == at)?;
        Some((listener, of.1))
    });
    let mut all: Vec<_> = made.into_iter().chain(taken).collect();
    all.sort_by_key(|(_, wanted_at)| *wanted_at);
    let socket = |(listener, at): (TcpListener, usize)| {
        let bound = listener.local_addr()?;
        Ok(Socket { listener, bound, speaks: wanted[at].1 })
    };
    all.into_iter().map(socket).collect::<io::Result<_>>().map_err(|e| format!("no socket: {e}"))
}

fn report(held: &[Endpoint], kept: &[(usize, usize)], bound: &[(Endpoint, usize)]) {
    let list = |endpoints: &mut dyn Iterator<Item = Endpoint>| {
        endpoints.map(|endpoint| endpoint.to_string()).collect::<Vec<_>>().join(", ")
    };
    let is_kept = |at: &usize| kept.iter().any(|(kept, _)| kept == at);
    tracing::info!(
        kept = list(&mut kept.iter().map(|(at, _)| held[*at])),
        bound = list(&mut bound.iter().map(|(endpoint, _)| *endpoint)),
        closed = list(&mut (0..held.len()).filter(|at| !is_kept(at)).map(|at| held[at])),
        "Sockets Taken Over"
    );
}

/// Where an inherited socket listens, as the kernel says.
fn endpoint_of(socket: &TcpListener) -> io::Result<Endpoint> {
    if !getsockopt(socket, sockopt::AcceptConn)? {
        return Err(io::ErrorKind::NotConnected.into());
    }
    let address = socket.local_addr()?;
    let endpoint = Endpoint::new(address.ip(), address.port());
    let is_ipv6_only = address.is_ipv6() && getsockopt(socket, sockopt::Ipv6V6Only)?;
    Ok(if is_ipv6_only { endpoint.ipv6_only() } else { endpoint })
}

/// Offers the sockets to a successor. Without that the process works as well.
pub fn heritage(settings: &Settings, sockets: &[Socket]) -> Option<Heritage> {
    let dir = settings.meet_in.as_ref()?;
    let clones: io::Result<Vec<_>> =
        sockets.iter().map(|socket| socket.listener.try_clone().map(OwnedFd::from)).collect();
    let offered = clones.and_then(|sockets| Heritage::offer(dir, settings.port, sockets));
    offered.inspect_err(|e| tracing::warn!(error = %e, "No Successor Can Take Over")).ok()
}

/// Binds before anything is served, so that a taken port is an error message. `beside`: sockets that listen
/// on a part of it, or it on a part of theirs.
fn bind(endpoint: Endpoint, beside: &[&TcpListener]) -> io::Result<TcpListener> {
    let socket = if endpoint.ip.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    if endpoint.ip == IpAddr::V6(Ipv6Addr::UNSPECIFIED) {
        // Else the system's setting says.
        setsockopt(&socket, sockopt::Ipv6V6Only, &!endpoint.takes_ipv4)?;
    }
    if beside.is_empty() {
        socket.bind(endpoint.address())?;
        return socket.listen(BACKLOG)?.into_std();
    }
    let share = |is_shared: bool| -> io::Result<()> {
        beside.iter().try_for_each(|other| setsockopt(other, sockopt::ReusePort, &is_shared))?;
        Ok(())
    };
    let listened = share(true).and_then(|()| {
        setsockopt(&socket, sockopt::ReusePort, &true)?;
        socket.bind(endpoint.address())?;
        socket.listen(BACKLOG)?.into_std()
    });
    share(false)?;
    let listener = listened?;
    setsockopt(&listener, sockopt::ReusePort, &false)?;
    Ok(listener)
}
