//! Where a request that is passed on came from, as its upstream is told: by this gateway and by proxies it trusts, and by
//! nobody else.

use super::client::X_FORWARDED_FOR;
use http::header::{HeaderName, HeaderValue};
use pingora::http::RequestHeader;
use std::net::IpAddr;

const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// Fields by which proxies tell services who the client is, and what it has asked for: anybody can send them, and this
/// gateway does not rewrite them. In order, as they are searched for each field of a request.
const CLAIMS: [&str; 40] = [
    "ali-cdn-real-ip",
    "cdn-src-ip",
    "cf-connecting-ip",
    "cf-connecting-ipv6",
    "cf-visitor",
    "client-ip",
    "do-connecting-ip",
    "fastly-client-ip",
    "fly-client-ip",
    "forwarded",
    "forwarded-for",
    "front-end-https",
    "proxy-client-ip",
    "remote-user",
    "ssl-client-cert",
    "true-client-ip",
    "wl-proxy-client-ip",
    "x-appengine-user-ip",
    "x-arr-ssl",
    "x-azure-clientip",
    "x-azure-fdid",
    "x-azure-socketip",
    "x-client-cert",
    "x-client-ip",
    "x-cluster-client-ip",
    "x-forward-for",
    "x-host",
    "x-http-host-override",
    "x-nf-client-connection-ip",
    "x-originating-ip",
    "x-override-url",
    "x-proxyuser-ip",
    "x-real-ip",
    "x-real-port",
    "x-rewrite-url",
    "x-scheme",
    "x-true-client-ip",
    "x-url-scheme",
    "x-vercel-forwarded-for",
    "x-vercel-ip",
];
/// How others of them begin.
const CLAIM_PREFIXES: [&str; 15] = [
    "cf-access-",
    "x-amzn-oidc-",
    "x-auth-request-",
    "x-envoy-",
    "x-forwarded",
    "x-goog-authenticated-user-",
    "x-goog-iap-",
    "x-ms-client-principal",
    "x-original-forwarded",
    "x-original-host",
    "x-original-method",
    "x-original-ur",
    "x-remote-",
    "x-ssl-client-",
    "x-webauth-",
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
    /// Removes what a stranger claims of itself, and adds what is known here. `host`: what the client has called the
    /// server.
    pub fn write_to(self, request: &mut RequestHeader, host: Option<HeaderValue>) -> pingora::Result<()> {
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

/// Whether it says who asks, and for what: what only a proxy can know.
fn is_claim(name: &HeaderName) -> bool {
    let name = name.as_str();
    CLAIMS.binary_search(&name).is_ok() || CLAIM_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
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
        origin.write_to(&mut request, Some(HeaderValue::from_static("a.test"))).unwrap();
        let mut fields: Vec<String> = request
            .headers
            .iter()
            .map(|(name, value)| format!("{name}: {}", value.to_str().unwrap()))
            .collect();
        fields.sort();
        fields
    }

    #[test]
    fn claims_of_strangers_are_removed() {
        assert!(CLAIMS.is_sorted());
        let ours = ["x-forwarded-for: 10.0.0.1", "x-forwarded-host: a.test", "x-forwarded-proto: https"];
        for name in CLAIMS.into_iter().chain([
            "x-forwarded-for",
            "x-forwarded-host",
            "x-forwarded-proto",
            "x-forwarded-port",
            "x-forwarded-prefix",
            "x-forwarded-server",
            "x-forwarded-anything",
            "x-forwarded",
            "x-original-url",
            "x-original-forwarded-for",
            "x-auth-request-user",
            "x-ssl-client-cert",
            "x-ssl-client-verify",
            "x-ssl-client-s-dn",
            "x-amzn-oidc-identity",
            "x-remote-group",
            "x-remote-extra-scopes",
            "x-goog-iap-jwt-assertion",
            "cf-access-jwt-assertion",
            "x-ms-client-principal-name",
            "x-envoy-internal",
            "proxy",
            "x_api_key",
            "x_forwarded_for",
            "a_b",
        ]) {
            assert_eq!(told(false, &[(name, "1.1.1.1"), (name, "2.2.2.2")]), ours, "{name}");
        }
        for other in ["x-other", "x-original-filename", "user-agent"] {
            assert!(told(false, &[(other, "1")]).contains(&format!("{other}: 1")), "{other}");
        }
    }

    #[test]
    fn trusted_proxies_are_believed() {
        for name in CLAIMS.into_iter().chain(["x-forwarded-port", "x-forwarded-prefix"]) {
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
