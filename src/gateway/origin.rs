//! Where a request that is passed on came from, as its upstream is told: by this gateway and by proxies it trusts, and by
//! nobody else.

use http::header::{HeaderName, HeaderValue};
use pingora::http::RequestHeader;
use std::net::IpAddr;

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// By which services let themselves be told who the client is, what it has asked for, and how: as much as anybody's word
/// as `X-Forwarded-For`, and not rewritten by this gateway. Names that begin with `x-forwarded-` are among them.
const SAID_BY_PROXIES: [&str; 26] = [
    "cf-connecting-ip",
    "cf-connecting-ipv6",
    "cf-visitor",
    "client-ip",
    "fastly-client-ip",
    "fly-client-ip",
    "forwarded",
    "front-end-https",
    "true-client-ip",
    "x-appengine-user-ip",
    "x-arr-ssl",
    "x-azure-clientip",
    "x-azure-socketip",
    "x-client-ip",
    "x-cluster-client-ip",
    "x-envoy-external-address",
    "x-host",
    "x-original-forwarded-for",
    "x-original-host",
    "x-original-uri",
    "x-original-url",
    "x-real-ip",
    "x-remote-addr",
    "x-rewrite-url",
    "x-scheme",
    "x-url-scheme",
];

/// Where a request came from.
#[derive(Clone, Copy, Debug)]
pub struct Origin {
    pub peer: Option<IpAddr>,
    /// The peer is a proxy that says who called it.
    pub is_peer_trusted: bool,
    pub has_tls: bool,
}

impl Origin {
    /// Leaves out what a stranger says of itself, and says what is known here. `host`: what the client has called the
    /// server.
    pub fn tell(self, request: &mut RequestHeader, host: Option<HeaderValue>) -> pingora::Result<()> {
        let Self { peer, is_peer_trusted, has_tls } = self;
        let mut chain = Vec::new();
        if is_peer_trusted {
            let said = request.headers.get_all(X_FORWARDED_FOR);
            chain.extend(said.iter().filter_map(|value| value.to_str().ok().map(str::to_owned)));
        }
        let is_unwanted = |name: &&HeaderName| is_never_passed(name) || (!is_peer_trusted && is_claim(name));
        let unwanted: Vec<HeaderName> = request.headers.keys().filter(is_unwanted).cloned().collect();
        for name in &unwanted {
            request.remove_header(name);
        }
        chain.extend(peer.map(|peer| peer.to_canonical().to_string()));
        request.insert_header(X_FORWARDED_FOR, chain.join(", "))?;
        if !request.headers.contains_key(X_FORWARDED_PROTO) {
            request.insert_header(X_FORWARDED_PROTO, if has_tls { "https" } else { "http" })?;
        }
        if let Some(host) = host.filter(|_| !request.headers.contains_key(X_FORWARDED_HOST)) {
            request.insert_header(X_FORWARDED_HOST, host)?;
        }
        Ok(())
    }
}

/// A word on who asks, and for what, that only a proxy can know.
fn is_claim(name: &HeaderName) -> bool {
    name.as_str().starts_with("x-forwarded-") || SAID_BY_PROXIES.contains(&name.as_str())
}

/// `_` and `-` are the same to services that read fields as variables of CGI, so `x_api_key` would be `x-api-key` there; and
/// `Proxy` would be where their own requests go (CVE-2016-5385). Nobody needs either.
fn is_never_passed(name: &HeaderName) -> bool {
    name.as_str().contains('_') || name == "proxy"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(is_peer_trusted: bool, sent: &[(&'static str, &'static str)]) -> Vec<String> {
        let mut request = RequestHeader::build("GET", b"/", None).unwrap();
        for (name, value) in sent {
            request.append_header(*name, *value).unwrap();
        }
        let origin = Origin { peer: "::ffff:10.0.0.1".parse().ok(), is_peer_trusted, has_tls: true };
        origin.tell(&mut request, Some(HeaderValue::from_static("a.test"))).unwrap();
        let mut fields: Vec<String> = request
            .headers
            .iter()
            .map(|(name, value)| format!("{name}: {}", value.to_str().unwrap()))
            .collect();
        fields.sort();
        fields
    }

    #[test]
    fn strangers_say_nothing_of_themselves() {
        let ours = ["x-forwarded-for: 10.0.0.1", "x-forwarded-host: a.test", "x-forwarded-proto: https"];
        for name in SAID_BY_PROXIES.into_iter().chain([
            "x-forwarded-for",
            "x-forwarded-host",
            "x-forwarded-proto",
            "x-forwarded-port",
            "x-forwarded-prefix",
            "x-forwarded-server",
            "x-forwarded-anything",
            "proxy",
            "x_api_key",
            "x_forwarded_for",
            "a_b",
        ]) {
            assert_eq!(told(false, &[(name, "1.1.1.1"), (name, "2.2.2.2")]), ours, "{name}");
        }
        assert_eq!(told(false, &[("x-other", "1")])[3], "x-other: 1");
    }

    #[test]
    fn trusted_proxies_are_believed() {
        for name in SAID_BY_PROXIES.into_iter().chain(["x-forwarded-port", "x-forwarded-prefix"]) {
            let told = told(true, &[(name, "1")]);
            assert!(told.contains(&format!("{name}: 1")), "{name}: {told:?}");
        }
        let sent =
            [("x-forwarded-for", "9.9.9.9"), ("x-forwarded-proto", "http"), ("x-forwarded-host", "b.test")];
        let expected =
            ["x-forwarded-for: 9.9.9.9, 10.0.0.1", "x-forwarded-host: b.test", "x-forwarded-proto: http"];
        assert_eq!(told(true, &sent), expected);
        for never in ["proxy", "x_api_key"] {
            assert!(!told(true, &[(never, "1")]).contains(&format!("{never}: 1")), "{never}");
        }
    }
}
