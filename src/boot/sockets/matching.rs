//! Matches inherited sockets to wanted addresses, and finds the addresses that must still be bound.
//!
//! A socket is identified by its address, never by its position in a list, because the list of the
//! predecessor depends on its own settings. A socket that covers only a part of a wanted address is kept, and
//! the missing part is bound as well. Closing it would reset the connections in its queue.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Most sockets for one wanted address.
pub const SOCKETS_OF_ONE_MAX: usize = 4;

/// The address and port of a listening socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketAddress {
    pub ip: IpAddr,
    /// 0 in a wanted endpoint: any port.
    pub port: u16,
    /// Only for `[::]`: it accepts IPv4 as well.
    pub takes_ipv4: bool,
}

impl SocketAddress {
    /// `[::]` accepts IPv4 as well, unless [`Self::ipv6_only`] is called.
    pub fn new(ip: IpAddr, port: u16) -> Self {
        Self { ip, port, takes_ipv4: ip == IpAddr::V6(Ipv6Addr::UNSPECIFIED) }
    }

    pub fn ipv6_only(self) -> Self {
        Self { takes_ipv4: false, ..self }
    }

    pub fn address(self) -> SocketAddr {
        SocketAddr::new(self.ip, self.port)
    }

    /// Whether this endpoint would get every connection of `other` if `other` did not exist.
    fn covers(self, other: Self) -> bool {
        let covers_ip = match (self.ip, other.ip) {
            (IpAddr::V4(ours), IpAddr::V4(theirs)) => ours == theirs || ours.is_unspecified(),
            (IpAddr::V6(ours), IpAddr::V6(theirs)) if ours == theirs => self.takes_ipv4 || !other.takes_ipv4,
            (IpAddr::V6(ours), IpAddr::V6(_)) => ours.is_unspecified(),
            (IpAddr::V6(_), IpAddr::V4(_)) => self.takes_ipv4,
            (IpAddr::V4(_), IpAddr::V6(_)) => false,
        };
        covers_ip && self.port == other.port
    }

    /// Whether the kernel rejects two sockets on both. Two addresses are either nested or disjoint.
    pub fn overlaps(self, other: Self) -> bool {
        self.covers(other) || other.covers(self)
    }
}

impl fmt::Display for SocketAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_ipv6_only = self.ip == IpAddr::V6(Ipv6Addr::UNSPECIFIED) && !self.takes_ipv4;
        write!(f, "{}{}", self.address(), if is_ipv6_only { " (IPv6 only)" } else { "" })
    }
}

/// The result of a match. Numbers are indices into the wanted and the inherited endpoints.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct SocketPlan {
    /// (inherited, wanted). Inherited sockets in no pair are closed.
    pub kept: Vec<(usize, usize)>,
    /// (endpoint to bind, wanted)
    pub bound: Vec<(SocketAddress, usize)>,
}

/// Returns two wanted endpoints that conflict, if there are any.
pub fn conflict(wanted: &[SocketAddress]) -> Option<(SocketAddress, SocketAddress)> {
    let pairs = wanted.iter().enumerate().flat_map(|(n, a)| wanted[..n].iter().map(move |b| (*b, *a)));
    pairs.into_iter().find(|(a, b)| a.port != 0 && a.overlaps(*b))
}

/// Matches `wanted` to `inherited`. `wanted` must have no [`conflict`].
pub fn matched(wanted: &[SocketAddress], inherited: &[SocketAddress]) -> SocketPlan {
    let mut matching = SocketPlan::default();
    // Endpoints with a port choose before those that take any port.
    let (named, any): (Vec<_>, Vec<_>) = wanted.iter().enumerate().partition(|(_, wanted)| wanted.port != 0);
    for (n, wanted) in named.into_iter().chain(any) {
        let is_free = |matching: &SocketPlan, at: usize| matching.kept.iter().all(|(kept, _)| *kept != at);
        let free = inherited.iter().enumerate().filter(|(at, _)| is_free(&matching, *at));
        let free: Vec<(usize, SocketAddress)> = free.map(|(at, inherited)| (at, *inherited)).collect();
        let wanted = with_port(*wanted, &free);
        let mut parts: Vec<_> = free.into_iter().filter(|(_, part)| wanted.covers(*part)).collect();
        // Wider addresses first, because not all of them may fit.
        parts.sort_by_key(|(_, part)| (*part != wanted, !part.ip.is_unspecified()));
        if parts.first().is_some_and(|(_, part)| *part == wanted) {
            // It covers the others, but they are kept for the connections in their queues.
            parts.truncate(SOCKETS_OF_ONE_MAX);
        } else {
            parts.truncate(SOCKETS_OF_ONE_MAX - 1);
        }
        let endpoints: Vec<SocketAddress> = parts.iter().map(|(_, part)| *part).collect();
        matching.bound.extend(missing(wanted, &endpoints).map(|missing| (missing, n)));
        matching.kept.extend(parts.iter().map(|(at, _)| (*at, n)));
    }
    matching
}

/// An endpoint for any port takes the port of the first inherited endpoint that matches it.
fn with_port(wanted: SocketAddress, inherited: &[(usize, SocketAddress)]) -> SocketAddress {
    if wanted.port != 0 {
        return wanted;
    }
    let on = |port| SocketAddress { port, ..wanted };
    let same = inherited.iter().find(|(_, inherited)| on(inherited.port) == *inherited);
    let part = || inherited.iter().find(|(_, inherited)| on(inherited.port).covers(*inherited));
    same.or_else(part).map_or(wanted, |(_, inherited)| on(inherited.port))
}

/// The part of `wanted` that has no socket yet.
fn missing(wanted: SocketAddress, kept: &[SocketAddress]) -> Option<SocketAddress> {
    let has = |part: SocketAddress| kept.contains(&part);
    if has(wanted) {
        return None;
    }
    if !wanted.takes_ipv4 {
        return Some(wanted);
    }
    let ipv4 = SocketAddress::new(Ipv4Addr::UNSPECIFIED.into(), wanted.port);
    match (has(ipv4), has(wanted.ipv6_only())) {
        (true, true) => None,
        (true, false) => Some(wanted.ipv6_only()),
        (false, true) => Some(ipv4),
        (false, false) => Some(wanted),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `[::]:80` accepts IPv4 as well; `[::]:80!6` does not.
    fn endpoints(list: &str) -> Vec<SocketAddress> {
        let endpoint = |text: &str| {
            let address: SocketAddr = text.trim_end_matches("!6").parse().expect(text);
            let endpoint = SocketAddress::new(address.ip(), address.port());
            if text.ends_with("!6") { endpoint.ipv6_only() } else { endpoint }
        };
        list.split_whitespace().map(endpoint).collect()
    }

    #[test]
    fn sockets_are_kept_or_bound() {
        for (inherited, wanted, kept, bound) in [
            // A first start, and an upgrade with the same settings.
            ("", "0.0.0.0:80 0.0.0.0:443", &[][..], "0.0.0.0:80 0.0.0.0:443"),
            ("0.0.0.0:80 0.0.0.0:443", "0.0.0.0:80 0.0.0.0:443", &[(0, 0), (1, 1)], ""),
            ("0.0.0.0:443 0.0.0.0:80", "0.0.0.0:80 0.0.0.0:443", &[(1, 0), (0, 1)], ""),
            // A port or an address changes, is added, or is removed.
            ("0.0.0.0:80", "0.0.0.0:80 0.0.0.0:443", &[(0, 0)], "0.0.0.0:443"),
            ("0.0.0.0:80 0.0.0.0:443", "0.0.0.0:80", &[(0, 0)], ""),
            ("0.0.0.0:80 0.0.0.0:443", "0.0.0.0:80 0.0.0.0:444", &[(0, 0)], "0.0.0.0:444"),
            ("0.0.0.0:80 0.0.0.0:443", "0.0.0.0:80 127.0.0.1:444", &[(0, 0)], "127.0.0.1:444"),
            ("0.0.0.0:80", "127.0.0.1:80", &[], "127.0.0.1:80"),
            ("127.0.0.1:80", "127.0.0.2:80", &[], "127.0.0.2:80"),
            // A socket that covers a part stays.
            ("127.0.0.1:80", "0.0.0.0:80", &[(0, 0)], "0.0.0.0:80"),
            ("127.0.0.1:80 0.0.0.0:80", "0.0.0.0:80", &[(1, 0), (0, 0)], ""),
            ("127.0.0.1:80 [::1]:80", "[::]:80", &[(0, 0), (1, 0)], "[::]:80"),
            // Both families.
            ("", "[::]:80", &[], "[::]:80"),
            ("0.0.0.0:80", "[::]:80", &[(0, 0)], "[::]:80!6"),
            ("[::]:80!6", "[::]:80", &[(0, 0)], "0.0.0.0:80"),
            ("0.0.0.0:80 [::]:80!6", "[::]:80", &[(0, 0), (1, 0)], ""),
            ("0.0.0.0:80 [::]:80!6", "0.0.0.0:80", &[(0, 0)], ""),
            ("[::]:80", "[::]:80", &[(0, 0)], ""),
            ("[::]:80", "0.0.0.0:80", &[], "0.0.0.0:80"),
            ("0.0.0.0:80 0.0.0.0:443", "[::]:80 [::]:443", &[(0, 0), (1, 1)], "[::]:80!6 [::]:443!6"),
            // Any port means the port of the predecessor; named ports choose first.
            ("127.0.0.1:9", "127.0.0.1:0", &[(0, 0)], ""),
            ("127.0.0.1:9 127.0.0.1:8", "127.0.0.1:0 127.0.0.1:0", &[(0, 0), (1, 1)], ""),
            ("127.0.0.1:9 127.0.0.1:8", "127.0.0.1:0 127.0.0.1:9", &[(0, 1), (1, 0)], ""),
            ("0.0.0.0:9", "[::]:0", &[(0, 0)], "[::]:9!6"),
            ("0.0.0.0:9", "127.0.0.1:0", &[], "127.0.0.1:0"),
        ] {
            let matching = matched(&endpoints(wanted), &endpoints(inherited));
            let found: Vec<SocketAddress> = matching.bound.iter().map(|(endpoint, _)| *endpoint).collect();
            let mut sorted = matching.kept.clone();
            sorted.sort_unstable();
            let mut expected = kept.to_vec();
            expected.sort_unstable();
            assert_eq!((sorted, found), (expected, endpoints(bound)), "{inherited:?} → {wanted:?}");
        }
    }

    #[test]
    fn overlapping_endpoints_conflict() {
        for (wanted, is_conflict) in [
            ("0.0.0.0:80 0.0.0.0:443", false),
            ("0.0.0.0:80 127.0.0.1:80", true),
            ("127.0.0.1:80 0.0.0.0:80", true),
            ("127.0.0.1:80 127.0.0.2:80", false),
            ("[::]:80 127.0.0.1:80", true),
            ("0.0.0.0:80 [::1]:80", false),
            ("0.0.0.0:0 0.0.0.0:0", false),
        ] {
            assert_eq!(conflict(&endpoints(wanted)).is_some(), is_conflict, "{wanted}");
        }
    }

    #[test]
    fn one_address_has_a_bounded_number_of_sockets() {
        let inherited: Vec<SocketAddress> =
            (1..9).map(|n| SocketAddress::new(Ipv4Addr::new(127, 0, 0, n).into(), 80)).collect();
        let matching = matched(&endpoints("0.0.0.0:80"), &inherited);
        assert_eq!(matching.kept.len() + matching.bound.len(), SOCKETS_OF_ONE_MAX);
    }
}
