//! The address of the client, behind trusted proxies.
//!
//! Any client can send `X-Forwarded-For`, so it is used only if the peer is a trusted proxy. Each proxy
//! appends the address of its own peer. So the list is read from the right, and the first address that is not
//! a trusted proxy is the client: a trusted proxy saw it.

use http::HeaderMap;
use http::header::{FORWARDED, HeaderName};
use ipnet::IpNet;
use std::net::{IpAddr, SocketAddr};

pub const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

pub fn is_trusted(address: IpAddr, proxies: &[IpNet]) -> bool {
    proxies.iter().any(|net| net.contains(&address))
}

/// The client of a request that came from `peer`. Reads `X-Forwarded-For` or, without it, `Forwarded`.
///
/// An address that cannot be parsed ends the list: the last good one is the client.
pub fn client_of(peer: IpAddr, headers: &HeaderMap, proxies: &[IpNet]) -> IpAddr {
    let peer = peer.to_canonical();
    if proxies.is_empty() || !is_trusted(peer, proxies) {
        return peer;
    }
    let mut client = peer;
    let name = if headers.contains_key(X_FORWARDED_FOR) { X_FORWARDED_FOR } else { FORWARDED };
    let values: Vec<&str> =
        headers.get_all(&name).iter().map(|value| value.to_str().unwrap_or("?")).collect();
    for hop in values.iter().rev().flat_map(|value| value.rsplit(',')) {
        let hop = if name == FORWARDED { forwarded_for(hop) } else { Some(hop.trim()) };
        // No trusted proxy vouches for the entries to the left of a malformed one.
        let Some(address) = hop.and_then(address_in) else { break };
        client = address;
        if !is_trusted(client, proxies) {
            break;
        }
    }
    client
}

/// The `for` of one element of `Forwarded` (RFC 7239).
fn forwarded_for(element: &str) -> Option<&str> {
    let pairs = element.split(';').filter_map(|pair| pair.trim().split_once('='));
    let (_, value) = pairs.into_iter().find(|(name, _)| name.trim().eq_ignore_ascii_case("for"))?;
    Some(value.trim().trim_matches('"'))
}

/// Parses an address as proxies write it: with or without a port, IPv6 with or without brackets.
fn address_in(text: &str) -> Option<IpAddr> {
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    let address = bare.parse().ok().or_else(|| text.parse::<SocketAddr>().ok().map(|at| at.ip()))?;
    Some(IpAddr::to_canonical(&address))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn client(peer: &str, fields: &[(&'static str, &str)]) -> String {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(*name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        let proxies = ["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()];
        client_of(peer.parse().unwrap(), &headers, &proxies).to_string()
    }

    #[test]
    fn fields_of_untrusted_peers_are_ignored() {
        assert_eq!(client("1.2.3.4", &[("x-forwarded-for", "9.9.9.9")]), "1.2.3.4");
        assert_eq!(client("::ffff:1.2.3.4", &[("forwarded", "for=9.9.9.9")]), "1.2.3.4");
    }

    #[test]
    fn the_rightmost_untrusted_address_is_the_client() {
        let xff = |value| client("10.0.0.1", &[("x-forwarded-for", value)]);
        for (value, expected) in [
            ("9.9.9.9", "9.9.9.9"),
            ("6.6.6.6, 9.9.9.9", "9.9.9.9"),
            ("6.6.6.6, 9.9.9.9, 10.1.1.1", "9.9.9.9"),
            ("10.2.2.2, 10.1.1.1", "10.2.2.2"),
            ("9.9.9.9:1234", "9.9.9.9"),
            ("2001:db8::1", "2001:db8::1"),
            ("[2001:db8::1]:80", "2001:db8::1"),
            ("::ffff:9.9.9.9", "9.9.9.9"),
            ("9.9.9.9, evil", "10.0.0.1"),
            ("9.9.9.9, \u{e4}", "10.0.0.1"),
            ("", "10.0.0.1"),
            ("9.9.9.9,", "10.0.0.1"),
        ] {
            assert_eq!(xff(value), expected, "{value:?}");
        }
        let two = [("x-forwarded-for", "6.6.6.6"), ("x-forwarded-for", "9.9.9.9, 10.3.3.3")];
        assert_eq!(client("10.0.0.1", &two), "9.9.9.9");
        assert_eq!(client("::ffff:10.0.0.1", &two), "9.9.9.9");
        assert_eq!(client("10.0.0.1", &[]), "10.0.0.1");
    }

    #[test]
    fn forwarded_is_read_without_x_forwarded_for() {
        for (value, expected) in [
            ("for=9.9.9.9", "9.9.9.9"),
            ("for=6.6.6.6, For=\"9.9.9.9:80\";proto=https;by=10.0.0.1", "9.9.9.9"),
            ("for=\"[2001:db8::1]:80\"", "2001:db8::1"),
            ("for=9.9.9.9, for=unknown", "fd00::1"),
            ("proto=https", "fd00::1"),
        ] {
            assert_eq!(client("fd00::1", &[("forwarded", value)]), expected, "{value:?}");
        }
    }
}
