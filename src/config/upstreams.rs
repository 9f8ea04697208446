//! `upstreams.toml`: which requests are forwarded, and to which upstreams.

use super::checks::{SECONDS_MAX, within};
use crate::model::Scope;
use http::{HeaderName, HeaderValue};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Most upstreams, and most addresses of one upstream.
const UPSTREAMS_MAX: usize = 100;
const ADDRESSES_MAX: usize = 100;

/// `[[upstream]]`: a service behind the gateway.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct UpstreamConf {
    /// Unique name: 1 to 64 of `[A-Za-z0-9._-]`.
    pub name: String,
    /// Paths that are forwarded. Starts, but does not end, with `/`. Unique.
    pub prefix: String,
    /// Addresses as `host:port`, used in turn.
    pub addresses: Vec<String>,
    /// The scope that a key needs. `None`: no key is required.
    #[serde(deserialize_with = "scope_or_none", serialize_with = "none_or_scope")]
    pub scope: Option<Scope>,
    /// Replaces the prefix of forwarded paths. Empty: removes it. `None`: keeps it.
    pub replace_prefix: Option<String>,
    /// `Host` of forwarded requests, with an optional port. `None`: that of the client.
    pub host: Option<String>,
    /// Time to connect, in ms.
    #[serde(default = "connect_timeout_ms")]
    pub connect_timeout_ms: u64,
    /// Longest silence of the service, in seconds.
    #[serde(default = "read_timeout_s")]
    pub read_timeout_s: u64,
    /// Maximum size of a request body, in bytes.
    #[serde(default = "body_bytes_max")]
    pub body_bytes_max: usize,
    /// Time for a complete request body, in seconds.
    #[serde(default = "body_timeout_s")]
    pub body_timeout_s: u64,
    /// Header fields to remove from requests.
    #[serde(default)]
    pub remove_headers: Vec<String>,
    /// Header fields to set in requests.
    #[serde(default)]
    pub add_headers: BTreeMap<String, String>,
    /// Whether `x-api-key` is forwarded.
    #[serde(default)]
    pub pass_key: bool,
    /// Methods that scripts of allowed origins may use. `None`: the same as for the gateway.
    pub cors_methods: Option<Vec<String>>,
    /// Header fields that scripts of allowed origins may send. `None`: the same as for the gateway.
    pub cors_headers: Option<Vec<String>>,
    /// TLS to the service. `None`: plain HTTP.
    pub tls: Option<UpstreamTlsConf>,
    /// The health check. `None`: an address is healthy if it accepts connections.
    pub health: Option<HealthConf>,
}

/// `upstream.tls`: TLS to the service.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct UpstreamTlsConf {
    /// Host name of the certificate. Its root must be one of the system, or in SSL_CERT_FILE.
    pub name: String,
}

/// `upstream.health`: the health check.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct HealthConf {
    /// Path of the check. Starts with `/`.
    pub path: String,
    /// Interval of the check, in seconds.
    #[serde(default = "health_every_s")]
    pub every_s: u64,
}

fn connect_timeout_ms() -> u64 {
    1000
}

fn read_timeout_s() -> u64 {
    60
}

fn body_bytes_max() -> usize {
    10 << 20
}

fn body_timeout_s() -> u64 {
    60
}

fn health_every_s() -> u64 {
    5
}

fn scope_or_none<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<Scope>, D::Error> {
    let text = String::deserialize(from)?;
    if text == "none" {
        return Ok(None);
    }
    Scope::parse(&text).map(Some).ok_or_else(|| serde::de::Error::custom("must be a scope or \"none\""))
}

#[expect(clippy::ref_option, reason = "serde requires this signature")]
fn none_or_scope<S: serde::Serializer>(scope: &Option<Scope>, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(scope.map_or("none", Scope::name))
}

impl UpstreamConf {
    /// The route pattern of this upstream in limits and metrics.
    pub fn pattern(&self) -> String {
        format!("{}/*", self.prefix)
    }

    fn problems(&self) -> Vec<(&'static str, String)> {
        let mut problems = Vec::new();
        let mut unless = |is_good: bool, name, problem: &str| {
            if !is_good {
                problems.push((name, problem.to_owned()));
            }
        };
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        let is_name = !self.name.is_empty() && self.name.len() <= 64 && self.name.bytes().all(plain);
        unless(is_name, "name", "must be 1 to 64 of [A-Za-z0-9._-]");
        unless(is_path(&self.prefix), "prefix", "must start, but not end, with /; allowed: [A-Za-z0-9._~/-]");
        let replaced = self.replace_prefix.as_deref().is_none_or(|path| path.is_empty() || is_path(path));
        unless(replaced, "replace_prefix", "must be empty, or start with / and not end with /");
        let are_some = (1..=ADDRESSES_MAX).contains(&self.addresses.len());
        unless(are_some, "addresses", &format!("must list 1 to {ADDRESSES_MAX}"));
        let form = "must be host:port, without a scheme or path (for https, set tls = { name = … })";
        unless(self.addresses.iter().all(|address| is_address(address)), "addresses", form);
        let is_good = self.host.as_deref().is_none_or(|host| is_host(host) || is_address(host));
        unless(is_good, "host", "must be a host or host:port, without a scheme or path");
        let is_good = self.tls.as_ref().is_none_or(|tls| is_host(&tls.name));
        unless(is_good, "tls", "must have a host name, without a scheme or port");
        let are_names = self.remove_headers.iter().all(|name| is_field(name));
        unless(
            are_names,
            "remove_headers",
            "must be names of header fields that do not control the connection",
        );
        let are_fields = self
            .add_headers
            .iter()
            .all(|(name, value)| is_field(name) && HeaderValue::from_str(value).is_ok());
        unless(are_fields, "add_headers", "must be header fields that do not control the connection");
        let are_methods =
            self.cors_methods.as_ref().is_none_or(|methods| methods.iter().all(|m| is_method(m)));
        unless(are_methods, "cors_methods", "must be methods in upper case");
        let are_names = self
            .cors_headers
            .as_ref()
            .is_none_or(|names| names.iter().all(|name| HeaderName::from_bytes(name.as_bytes()).is_ok()));
        unless(are_names, "cors_headers", "must be names of header fields");
        let has_path =
            self.health.as_ref().is_none_or(|health| is_target(&health.path) && health.every_s > 0);
        unless(has_path, "health", "must have a valid path, and every_s must be at least 1");
        problems
    }
}

/// Host and port. IPv6 addresses are in brackets.
fn is_address(text: &str) -> bool {
    text.rsplit_once(':')
        .is_some_and(|(host, port)| is_host(host) && port.parse::<u16>().is_ok_and(|n| n > 0))
}

/// A name, an IPv4 address, or an IPv6 address in brackets.
fn is_host(text: &str) -> bool {
    if let Some(address) = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')) {
        let address = address.split_once('%').map_or(address, |(address, _)| address);
        return address.parse::<std::net::Ipv6Addr>().is_ok();
    }
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    !text.is_empty() && text.bytes().all(plain)
}

fn is_target(path: &str) -> bool {
    path.starts_with('/') && path.parse::<http::Uri>().is_ok()
}

fn is_path(path: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._~/-".contains(&b);
    path.starts_with('/') && !path.ends_with('/') && !path.contains("//") && path.bytes().all(plain)
}

/// Whether a script can send this method. Browsers forbid some.
fn is_method(name: &str) -> bool {
    let is_forbidden = matches!(name, "CONNECT" | "TRACE" | "TRACK");
    !is_forbidden && !name.is_empty() && name.bytes().all(|b| b.is_ascii_uppercase() || b == b'-')
}

/// Whether the settings may add or remove this field. Fields that frame a message are excluded.
fn is_field(name: &str) -> bool {
    const OURS: [&str; 7] =
        ["connection", "content-length", "host", "keep-alive", "te", "transfer-encoding", "upgrade"];
    HeaderName::from_bytes(name.as_bytes()).is_ok_and(|name| !OURS.contains(&name.as_str()))
}

/// Returns every problem as (path, problem).
pub(super) fn upstream_problems(upstreams: &[UpstreamConf]) -> Vec<(String, String)> {
    let mut problems = Vec::new();
    if upstreams.len() > UPSTREAMS_MAX {
        problems.push(("upstream".to_owned(), format!("at most {UPSTREAMS_MAX} are allowed")));
    }
    for (n, upstream) in upstreams.iter().enumerate() {
        let path = |name: &str| format!("upstream[{n}].{name}");
        let before = &upstreams[..n];
        let twice = [
            ("name", before.iter().any(|other| other.name == upstream.name)),
            ("prefix", before.iter().any(|other| other.prefix == upstream.prefix)),
        ];
        let twice = twice.into_iter().filter(|(_, is_twice)| *is_twice);
        problems
            .extend(twice.map(|(name, _)| (path(name), "is already used by another upstream".to_owned())));
        problems.extend(upstream.problems().into_iter().map(|(name, problem)| (path(name), problem)));
        for (name, value) in
            [("connect_timeout_ms", upstream.connect_timeout_ms), ("body_timeout_s", upstream.body_timeout_s)]
        {
            problems.extend(within(&path(name), value, 1..=SECONDS_MAX));
        }
        problems.extend(within(&path("read_timeout_s"), upstream.read_timeout_s, 1..=SECONDS_MAX));
    }
    problems
}

/// The contents of `upstreams.toml`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UpstreamsFile {
    #[serde(default)]
    pub upstream: Vec<UpstreamConf>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_hosts_and_ports() {
        #[derive(Deserialize)]
        struct File {
            pub upstream: Vec<UpstreamConf>,
        }
        const GOOD: &str = "name = \"u\"\nprefix = \"/u\"\nscope = \"none\"\n";
        for (line, wrong) in [
            (
                "addresses = [\"127.0.0.1:80\", \"host_1.example:8080\", \"[::1]:80\", \"[fe80::1%eth0]:1\"]",
                "",
            ),
            ("addresses = [\"http://127.0.0.1:80\"]", "addresses"),
            ("addresses = [\"https://host\"]", "addresses"),
            ("addresses = [\"//host:80\"]", "addresses"),
            ("addresses = [\"host:80/path\"]", "addresses"),
            ("addresses = [\"u:p@host:80\"]", "addresses"),
            ("addresses = [\"host\"]", "addresses"),
            ("addresses = [\"host:http\"]", "addresses"),
            ("addresses = [\"host:0\"]", "addresses"),
            ("addresses = [\" host:80\"]", "addresses"),
            ("addresses = [\"::1:80\"]", "addresses"),
            ("addresses = [\"a:1\"]\ncors_methods = [\"GET\", \"M-SEARCH\"]\ncors_headers = [\"x-a\"]", ""),
            ("addresses = [\"a:1\"]\ncors_methods = [\"get\"]", "cors_methods"),
            ("addresses = [\"a:1\"]\ncors_methods = [\"GET, PUT\"]", "cors_methods"),
            ("addresses = [\"a:1\"]\ncors_methods = [\"CONNECT\"]", "cors_methods"),
            ("addresses = [\"a:1\"]\ncors_headers = [\"a b\"]", "cors_headers"),
            ("addresses = [\"a:1\"]\ncors_headers = [\"\"]", "cors_headers"),
            ("addresses = [\"a:1\"]\nhost = \"models.internal:8080\"", ""),
            ("addresses = [\"a:1\"]\nhost = \"[::1]\"", ""),
            ("addresses = [\"a:1\"]\nhost = \"http://models.internal\"", "host"),
            ("addresses = [\"a:1\"]\nhost = \"models.internal/v1\"", "host"),
            ("addresses = [\"a:1\"]\ntls = { name = \"models.internal\" }", ""),
            ("addresses = [\"a:1\"]\ntls = { name = \"https://models.internal\" }", "tls"),
            ("addresses = [\"a:1\"]\ntls = { name = \"models.internal:443\" }", "tls"),
        ] {
            let file: File = toml::from_str(&format!("[[upstream]]\n{GOOD}{line}")).unwrap();
            let paths: Vec<_> = upstream_problems(&file.upstream).into_iter().map(|(path, _)| path).collect();
            let expected = if wrong.is_empty() { vec![] } else { vec![format!("upstream[0].{wrong}")] };
            assert_eq!(paths, expected, "{line}");
        }
    }
}
