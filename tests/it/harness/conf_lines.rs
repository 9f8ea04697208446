//! Entries for files in `conf/`.

use sha2::{Digest, Sha256};
use std::net::SocketAddr;

/// An entry of `keys.toml` that admits `key`.
pub fn key_lines(name: &str, key: &str, scopes: &[&str]) -> String {
    let hash: String = Sha256::digest(key).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("[[key]]\nname = {name:?}\nsha256 = \"{hash}\"\nscopes = {scopes:?}\n")
}

/// An entry of `limits.toml` for one route. `more` has at least rate, period, burst and `on_redis_loss`.
pub fn limit_lines(name: &str, identity: &str, route: &str, more: &str) -> String {
    format!("[[limit]]\nname = {name:?}\nidentity = {identity:?}\nroutes = [{route:?}]\n{more}\n")
}

/// An entry of `upstreams.toml` with the prefix `/<name>`. `more` has at least the scope.
pub fn upstream_lines(name: &str, addresses: &[SocketAddr], more: &str) -> String {
    let addresses: Vec<String> = addresses.iter().map(SocketAddr::to_string).collect();
    format!("[[upstream]]\nname = {name:?}\nprefix = \"/{name}\"\naddresses = {addresses:?}\n{more}\n")
}

/// A setting of an upstream: no health check during a test.
pub const NO_HEALTH_CHECKS: &str = "health = { path = \"/\", every_s = 3600 }\n";
