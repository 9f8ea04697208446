//! The fields by which an upstream learns where a forwarded request came from.
//!
//! Only this gateway and the proxies that it trusts may set them. An upstream would trust forged fields of a
//! client.

use crate::gateway::client::X_FORWARDED_FOR;
use http::header::{HeaderName, HeaderValue};
use pingora::http::RequestHeader;
use std::net::IpAddr;

const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// Fields by which proxies pass on the client's identity and original request. Any client can send them, and
/// this gateway does not set them itself, so it removes them. Sorted: each field of a request is looked up by
/// binary search.
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
/// Prefixes of further such fields.
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
pub struct RequestSource {
    pub peer: Option<IpAddr>,
    /// The peer is a trusted proxy, so its fields about the client are kept.
    pub is_peer_trusted: bool,
    pub has_tls: bool,
}

impl RequestSource {
    /// Removes untrusted fields about the client, and adds what this gateway knows. `host`: the host that the
    /// client asked for.
    pub fn write_to(self, request: &mut RequestHeader, host: Option<HeaderValue>) -> pingora::Result<()> {
        let Self { peer, is_peer_trusted, has_tls } = self;
        let mut chain = Vec::new();
        if is_peer_trusted {
            let received = request.headers.get_all(X_FORWARDED_FOR);
            chain.extend(received.iter().filter_map(|value| value.to_str().ok().map(str::to_owned)));
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

/// Whether the field describes the client or its original request, which only a proxy can do reliably.
fn is_claim(name: &HeaderName) -> bool {
    let name = name.as_str();
    CLAIMS.binary_search(&name).is_ok() || CLAIM_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// Whether the field is removed even if a trusted proxy sent it.
///
/// Services that read fields as CGI variables do not distinguish `_` from `-`, so `x_api_key` would pass for
/// `x-api-key`. There, `Proxy` would redirect the service's own requests (CVE-2016-5385). Neither has a
/// legitimate use.
fn is_never_passed(name: &HeaderName) -> bool {
    name.as_str().contains('_') || name == "proxy"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forwarded_fields(is_peer_trusted: bool, sent: &[(&'static str, &'static str)]) -> Vec<String> {
        let mut request = RequestHeader::build("GET", b"/", None).unwrap();
        for (name, value) in sent {
            request.append_header(*name, *value).unwrap();
        }
        let origin = RequestSource { peer: "::ffff:10.0.0.1".parse().ok(), is_peer_trusted, has_tls: true };
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
    fn fields_about_the_client_are_removed_from_untrusted_peers() {
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
            let fields = forwarded_fields(false, &[(name, "1.1.1.1"), (name, "2.2.2.2")]);
            assert_eq!(fields, ours, "{name}");
        }
        for other in ["x-other", "x-original-filename", "user-agent"] {
            let fields = forwarded_fields(false, &[(other, "1")]);
            assert!(fields.contains(&format!("{other}: 1")), "{other}");
        }
    }

    #[test]
    fn fields_of_trusted_proxies_are_kept() {
        for name in CLAIMS.into_iter().chain(["x-forwarded-port", "x-forwarded-prefix"]) {
            let fields = forwarded_fields(true, &[(name, "1")]);
            assert!(fields.contains(&format!("{name}: 1")), "{name}: {fields:?}");
        }
        let sent =
            [("x-forwarded-for", "9.9.9.9"), ("x-forwarded-proto", "http"), ("x-forwarded-host", "b.test")];
        let expected =
            ["x-forwarded-for: 9.9.9.9, 10.0.0.1", "x-forwarded-host: b.test", "x-forwarded-proto: http"];
        assert_eq!(forwarded_fields(true, &sent), expected);
        for never in ["proxy", "x_api_key"] {
            let fields = forwarded_fields(true, &[(never, "1")]);
            assert!(!fields.contains(&format!("{never}: 1")), "{never}");
        }
    }
}
