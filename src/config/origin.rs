//! Normalizes the web origins (RFC 6454) of `cors_origins`.
//!
//! The `Origin` field of a request is compared byte by byte, and a browser sends one spelling of each origin.
//! So other spellings are normalized to that one. An entry that no browser sends is an error, because it
//! would never match.

use std::net::{Ipv4Addr, Ipv6Addr};

/// Any origin.
pub const ANY: &str = "*";
/// What browsers send for a page without an origin, such as a local file.
const OPAQUE: &str = "null";

/// Returns the origin as browsers spell it.
///
/// # Errors
/// Why no browser sends this origin.
pub(super) fn normalized(text: &str) -> Result<String, String> {
    let problem = |problem: &str| Err(format!("{text:?} {problem}"));
    let origin = text.trim();
    if matches!(origin, ANY | OPAQUE) {
        return Ok(origin.to_owned());
    }
    let Some((scheme, rest)) = origin.split_once("://") else {
        return problem("has no scheme; write it as https://host or https://host:port");
    };
    let scheme = scheme.to_ascii_lowercase();
    let is_of_scheme = |b: u8| b.is_ascii_alphanumeric() || b"+.-".contains(&b);
    if !scheme.starts_with(|c: char| c.is_ascii_alphabetic()) || !scheme.bytes().all(is_of_scheme) {
        return problem("has no scheme; write it as https://host or https://host:port");
    }
    let authority = rest.strip_suffix('/').unwrap_or(rest);
    if authority.contains(['/', '?', '#']) {
        return problem("has a path; an origin has only a scheme, a host and a port");
    }
    if authority.contains('@') {
        return Err("must not contain a user: an origin has only a scheme, a host and a port".to_owned());
    }
    if authority.contains('*') {
        return problem("is a pattern; list each origin, or use \"*\" for any origin");
    }
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, Some(port)),
        _ => (authority, None),
    };
    let Some(host) = normalized_host(host) else {
        return problem("has no host that browsers send: use an ASCII name (xn--… for others) or an address");
    };
    let default_port = match scheme.as_str() {
        "http" => Some(80),
        "https" => Some(443),
        _ => None,
    };
    match port.filter(|port| !port.is_empty()).map(str::parse::<u16>) {
        None => Ok(format!("{scheme}://{host}")),
        Some(Ok(port)) if default_port == Some(port) => Ok(format!("{scheme}://{host}")),
        Some(Ok(port)) if port > 0 => Ok(format!("{scheme}://{host}:{port}")),
        Some(_) => problem("has no valid port number after the colon"),
    }
}

fn normalized_host(host: &str) -> Option<String> {
    if let Some(address) = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        return address.parse::<Ipv6Addr>().ok().map(|address| format!("[{address}]"));
    }
    if let Ok(address) = host.parse::<Ipv4Addr>() {
        return Some(address.to_string());
    }
    // Browsers parse a host whose last label is a number as an IPv4 address, and send its four-part form.
    let last = host.trim_end_matches('.').rsplit('.').next().unwrap_or_default();
    let hex = last.strip_prefix("0x").or_else(|| last.strip_prefix("0X"));
    let is_decimal = !last.is_empty() && last.bytes().all(|b| b.is_ascii_digit());
    if is_decimal || hex.is_some_and(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit())) {
        return None;
    }
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    (!host.is_empty() && host.bytes().all(plain)).then(|| host.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_as_browsers_send_them() {
        for (text, expected) in [
            ("https://a.example", Ok("https://a.example")),
            ("*", Ok("*")),
            ("null", Ok("null")),
            (" https://a.example ", Ok("https://a.example")),
            ("https://a.example/", Ok("https://a.example")),
            ("HTTPS://A.Example", Ok("https://a.example")),
            ("https://a.example:443", Ok("https://a.example")),
            ("http://a.example:80/", Ok("http://a.example")),
            ("http://a.example:443", Ok("http://a.example:443")),
            ("https://a.example:08443", Ok("https://a.example:8443")),
            ("http://localhost:3000", Ok("http://localhost:3000")),
            ("http://3000.example", Ok("http://3000.example")),
            ("http://127.0.0.1:3000", Ok("http://127.0.0.1:3000")),
            ("http://127.0.0.1:3000", Ok("http://127.0.0.1:3000")),
            ("http://[0:0::1]:3000", Ok("http://[::1]:3000")),
            ("http://[::1]", Ok("http://[::1]")),
            ("chrome-extension://abcdef", Ok("chrome-extension://abcdef")),
            ("", Err("scheme")),
            ("a.example", Err("scheme")),
            ("//a.example", Err("scheme")),
            ("localhost:3000", Err("scheme")),
            ("1://a", Err("scheme")),
            ("https://", Err("host")),
            ("https://:1", Err("host")),
            ("file:///", Err("host")),
            ("https://a.example/app", Err("path")),
            ("https://a.example//", Err("path")),
            ("https://a.example?x", Err("path")),
            ("https://u:hunter2@a.example", Err("user")),
            ("https://*.a.example", Err("pattern")),
            ("https://b\u{fc}cher.example", Err("xn--")),
            ("https://a b", Err("host")),
            ("https://a.example, https://b.example", Err("path")),
            ("https://a.example:x", Err("port")),
            ("https://a.example:0", Err("port")),
            ("https://a.example:70000", Err("port")),
        ] {
            match (normalized(text), expected) {
                (Ok(origin), Ok(expected)) => assert_eq!(origin, expected, "{text:?}"),
                (Err(problem), Err(word)) => {
                    assert!(problem.contains(word) && !problem.contains("hunter2"), "{text:?}: {problem}");
                }
                (origin, _) => panic!("{text:?}: {origin:?} is not {expected:?}"),
            }
        }
    }
}
