//! The sockets that a node listens on: inherited from its predecessor, or newly bound.
//!
//! A successor keeps the inherited sockets that it needs, binds the missing ones, and closes its copies of
//! the others, which end with the predecessor.
//!
//! An address that overlaps an inherited one (`127.0.0.1` and `0.0.0.0` on one port) can be bound only while
//! both sockets have SO_REUSEPORT set. The option is set for that moment only, because later it would let a
//! second process listen on the same address by mistake. The kernel gives each connection to the socket with
//! the narrower address, so connections are not divided between the two.
//!
//! `[::]` accepts IPv4 as well. On a machine without IPv6, `[::]` becomes `0.0.0.0`, and a second IPv6
//! address is left out.

mod matching;

use super::plan::{Exit, NodeSettings};
use super::upgrade::{self, Handover, SocketOffer};
use matching::{SocketAddress, SocketPlan, conflict, matched};
use nix::errno::Errno;
use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use tokio::net::TcpSocket;

const _: () = assert!(Transport::ALL.len() * matching::SOCKETS_OF_ONE_MAX <= upgrade::SOCKETS_MAX);

/// Most connections that the kernel queues while the accept loop is busy.
const BACKLOG: u32 = 4096;
/// Most attempts to find a port that is free on all addresses of a listener.
const PORT_TRIES_MAX: usize = 8;

/// The protocol of a socket's clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Plain,
    Tls,
}

impl Transport {
    const ALL: [Self; 2] = [Self::Plain, Self::Tls];
}

/// A listening socket.
pub struct Socket {
    pub listener: TcpListener,
    pub bound: SocketAddr,
    pub speaks: Transport,
}

pub struct BoundSockets {
    /// The sockets of the configured port come first.
    pub sockets: Vec<Socket>,
    /// The connection to the predecessor, if sockets were inherited.
    pub heir: Option<Handover>,
}

/// Inherits the sockets of a running process, or binds new ones.
pub async fn listening(settings: &NodeSettings) -> Result<BoundSockets, Exit> {
    let wanted = wanted(settings, has_ipv6);
    let endpoints: Vec<SocketAddress> = wanted.iter().map(|(endpoint, _)| *endpoint).collect();
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
                eprintln!("infra-controller: the running process does not hand over its sockets: {e}");
                return Err(Exit::Unavailable);
            }
        }
    }
    let sockets = taken_or_bound(&wanted, inherited).map_err(|problem| {
        eprintln!("infra-controller: {problem}");
        Exit::Config
    })?;
    Ok(BoundSockets { sockets, heir })
}

/// Binds the only socket of a process that is no gateway. The error says why it cannot be bound, and what to
/// do.
#[cfg(feature = "aws")]
pub fn bound_to(listen: IpAddr, port: u16) -> Result<TcpListener, String> {
    let address = addresses(listen, None, has_ipv6).into_iter().next().unwrap_or(listen);
    let bound = TcpListener::bind(SocketAddr::new(address, port)).and_then(|socket| {
        socket.set_nonblocking(true)?;
        Ok(socket)
    });
    bound.map_err(|e| format!("{e}. {}", bind_advice(&e)))
}

/// The endpoints that the settings ask for. `has`: whether this machine has an IPv6 address.
fn wanted(settings: &NodeSettings, has: impl Fn(Ipv6Addr) -> bool) -> Vec<(SocketAddress, Transport)> {
    let on = |address, port, speaks| (SocketAddress::new(address, port), speaks);
    let addresses = addresses(settings.conf.listen.address, settings.listen_beside, &has);
    let mut wanted: Vec<_> =
        addresses.iter().map(|address| on(*address, settings.port, Transport::Plain)).collect();
    if let Some(tls) = &settings.conf.tls {
        let own = tls.address.map(|address| self::addresses(address, None, &has));
        wanted.extend(
            own.unwrap_or(addresses).into_iter().map(|address| on(address, tls.port, Transport::Tls)),
        );
    }
    wanted
}

/// The addresses to listen on, as far as this machine has them.
fn addresses(listen: IpAddr, beside: Option<Ipv6Addr>, has: impl Fn(Ipv6Addr) -> bool) -> Vec<IpAddr> {
    let any = Ipv6Addr::UNSPECIFIED;
    let first = if listen == IpAddr::V6(any) && !has(any) { Ipv4Addr::UNSPECIFIED.into() } else { listen };
    let beside = beside.filter(|address| has(*address)).map(IpAddr::V6);
    std::iter::once(first).chain(beside).collect()
}

/// Whether sockets can listen on an IPv6 address. The kernel may lack IPv6, or no interface may have the
/// address.
fn has_ipv6(address: Ipv6Addr) -> bool {
    let bound = TcpSocket::new_v6().and_then(|socket| socket.bind(SocketAddr::new(address.into(), 0)));
    let errno = bound.err().and_then(|e| e.raw_os_error()).map(Errno::from_raw);
    // Other errors are reported when the address is bound.
    let is_missing = matches!(errno, Some(Errno::EAFNOSUPPORT | Errno::EADDRNOTAVAIL));
    if is_missing {
        tracing::info!(%address, "IPv6 address not available; listening on IPv4 only");
    }
    !is_missing
}

/// Warns of processes on other ports. An upgrade finds its predecessor by port, so a changed port leaves the
/// old process running.
fn nobody_waits(other_ports: &[u16]) {
    if other_ports.is_empty() {
        return tracing::info!("No predecessor found; nothing to take over");
    }
    let ports = other_ports.iter().map(u16::to_string).collect::<Vec<_>>().join(", ");
    tracing::warn!(
        other_ports = ports,
        "No predecessor found on this port. Processes on other ports keep running; stop them by hand"
    );
}

/// Advice for an address that cannot be bound.
fn bind_advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => "Free the port, or set another one.",
        io::ErrorKind::AddrNotAvailable => "Name an address of this machine.",
        io::ErrorKind::PermissionDenied => "Set a port above 1023, or let the process bind such ports.",
        _ => "Fix the cause. If it is the limit of open files, raise it (ulimit -n, LimitNOFILE=).",
    }
}

/// Returns a socket for each wanted endpoint. The error says which one cannot be bound, and why.
fn taken_or_bound(
    wanted: &[(SocketAddress, Transport)],
    inherited: Vec<TcpListener>,
) -> Result<Vec<Socket>, String> {
    let endpoints: Vec<SocketAddress> = wanted.iter().map(|(endpoint, _)| *endpoint).collect();
    let held: io::Result<Vec<SocketAddress>> = inherited.iter().map(endpoint_of).collect();
    let held =
        held.map_err(|e| format!("the running process hands over a socket that does not listen: {e}"))?;
    let SocketPlan { kept, bound } = matched(&endpoints, &held);
    let mut tries = 1;
    let made = loop {
        match bind_all(wanted, &bound, &held, &inherited) {
            Ok(made) => break made,
            // The port that the kernel chose on one address may be in use on another one.
            Err(unbound) if unbound.is_port_of_kernel && tries < PORT_TRIES_MAX => tries += 1,
            Err(unbound) => return Err(unbound.problem),
        }
    };
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
    all.into_iter().map(socket).collect::<io::Result<_>>().map_err(|e| format!("socket without address: {e}"))
}

/// Why an address cannot be bound.
struct Unbound {
    problem: String,
    /// The kernel chose the port, so another attempt may succeed.
    is_port_of_kernel: bool,
}

/// Binds each endpoint of `bound`, and returns the sockets with the indices in `wanted`. All addresses of one
/// listener get the same port.
fn bind_all(
    wanted: &[(SocketAddress, Transport)],
    bound: &[(SocketAddress, usize)],
    held: &[SocketAddress],
    inherited: &[TcpListener],
) -> Result<Vec<(TcpListener, usize)>, Unbound> {
    let mut made: Vec<(TcpListener, usize)> = Vec::new();
    for (endpoint, wanted_at) in bound {
        let of_same = made.iter().find(|(_, at)| wanted[*at].1 == wanted[*wanted_at].1);
        let chosen = of_same.and_then(|(listener, _)| listener.local_addr().ok()).map(|at| at.port());
        let is_port_of_kernel = endpoint.port == 0 && chosen.is_some();
        let port = if endpoint.port == 0 { chosen.unwrap_or(0) } else { endpoint.port };
        let endpoint = SocketAddress { port, ..*endpoint };
        let beside: Vec<usize> = (0..held.len()).filter(|at| held[*at].overlaps(endpoint)).collect();
        let sockets: Vec<&TcpListener> = beside.iter().map(|at| &inherited[*at]).collect();
        let listener = bind(endpoint, &sockets).map_err(|e| {
            let problem = match beside.first() {
                None => format!("cannot listen on {endpoint}: {e}. {}", bind_advice(&e)),
                Some(at) => format!(
                    "cannot listen on {endpoint} while the running process listens on {}: {e}. Nothing was \
                     taken over. Stop that process and start this one without --upgrade, or set another \
                     port.",
                    held[*at]
                ),
            };
            let is_port_of_kernel = is_port_of_kernel && e.kind() == io::ErrorKind::AddrInUse;
            Unbound { problem, is_port_of_kernel }
        })?;
        made.push((listener, *wanted_at));
    }
    Ok(made)
}

fn report(held: &[SocketAddress], kept: &[(usize, usize)], bound: &[(SocketAddress, usize)]) {
    let list = |endpoints: &mut dyn Iterator<Item = SocketAddress>| {
        endpoints.map(|endpoint| endpoint.to_string()).collect::<Vec<_>>().join(", ")
    };
    let is_kept = |at: &usize| kept.iter().any(|(kept, _)| kept == at);
    tracing::info!(
        kept = list(&mut kept.iter().map(|(at, _)| held[*at])),
        bound = list(&mut bound.iter().map(|(endpoint, _)| *endpoint)),
        closed = list(&mut (0..held.len()).filter(|at| !is_kept(at)).map(|at| held[at])),
        "Sockets taken over"
    );
}

/// The endpoint of an inherited socket, as the kernel reports it.
fn endpoint_of(socket: &TcpListener) -> io::Result<SocketAddress> {
    if !getsockopt(socket, sockopt::AcceptConn)? {
        return Err(io::ErrorKind::NotConnected.into());
    }
    let address = socket.local_addr()?;
    let endpoint = SocketAddress::new(address.ip(), address.port());
    let is_ipv6_only = address.is_ipv6() && getsockopt(socket, sockopt::Ipv6V6Only)?;
    Ok(if is_ipv6_only { endpoint.ipv6_only() } else { endpoint })
}

/// Offers the sockets to a successor. Best effort: the process works without it.
pub fn heritage(settings: &NodeSettings, sockets: &[Socket]) -> Option<SocketOffer> {
    let dir = settings.meet_in.as_ref()?;
    let clones: io::Result<Vec<_>> =
        sockets.iter().map(|socket| socket.listener.try_clone().map(OwnedFd::from)).collect();
    let offered = clones.and_then(|sockets| SocketOffer::offer(dir, settings.port, sockets));
    offered.inspect_err(|e| tracing::warn!(error = %e, "Sockets not offered; --upgrade will fail")).ok()
}

/// Binds before any request is served, so that a port in use is an error at start. `beside`: sockets whose
/// endpoints overlap this one.
fn bind(endpoint: SocketAddress, beside: &[&TcpListener]) -> io::Result<TcpListener> {
    let socket = if endpoint.ip.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    if endpoint.ip == IpAddr::V6(Ipv6Addr::UNSPECIFIED) {
        // The default is a system setting.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_ipv6_only_ipv4_addresses_remain() {
        let (all, none) = (&["::", "::1"][..], &[][..]);
        for (listen, beside, has, expected) in [
            ("::", None, all, &["::"][..]),
            ("::", None, none, &["0.0.0.0"]),
            // The kernel has IPv6, but no interface has an IPv6 address.
            ("::", None, &["::"], &["::"]),
            ("127.0.0.1", Some("::1"), all, &["127.0.0.1", "::1"]),
            ("127.0.0.1", Some("::1"), none, &["127.0.0.1"]),
            ("127.0.0.1", Some("::1"), &["::"], &["127.0.0.1"]),
            // A named address is never replaced.
            ("0.0.0.0", None, all, &["0.0.0.0"]),
            ("::1", None, none, &["::1"]),
        ] {
            let has = |address: Ipv6Addr| has.contains(&address.to_string().as_str());
            let beside = beside.map(|address| address.parse().unwrap());
            let found = addresses(listen.parse().unwrap(), beside, has);
            let found: Vec<String> = found.iter().map(IpAddr::to_string).collect();
            assert_eq!(found, expected, "{listen} and {beside:?}");
        }
    }

    /// The sockets of tokio need a runtime.
    #[tokio::test]
    async fn the_addresses_of_one_listener_share_a_port() {
        let on = |ip: [u8; 4], speaks| (SocketAddress::new(IpAddr::from(ip), 0), speaks);
        let wanted = [
            on([127, 0, 0, 1], Transport::Plain),
            on([127, 0, 0, 2], Transport::Plain),
            on([127, 0, 0, 1], Transport::Tls),
        ];
        let sockets = taken_or_bound(&wanted, Vec::new()).unwrap();
        let bound: Vec<SocketAddr> = sockets.iter().map(|socket| socket.bound).collect();
        assert_eq!(bound[0].port(), bound[1].port(), "{bound:?}");
        assert_ne!(bound[0].port(), bound[2].port(), "{bound:?}");
        assert_eq!(bound[1].ip(), IpAddr::from([127, 0, 0, 2]));
    }

    /// Whether this machine has `::1` or not, the result agrees with the kernel.
    #[tokio::test]
    async fn an_ipv6_address_that_no_interface_has_is_reported() {
        assert!(!has_ipv6("2001:db8::7".parse().unwrap()));
        let bound = std::net::TcpListener::bind("[::1]:0");
        assert_eq!(has_ipv6(Ipv6Addr::LOCALHOST), bound.is_ok());
    }
}
