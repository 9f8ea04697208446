//! API keys for a `keys.toml`.

use sha2::{Digest, Sha256};

/// The lines that let `key` in.
pub fn key_lines(name: &str, key: &str, scopes: &[&str]) -> String {
    let hash: String = Sha256::digest(key).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("[[key]]\nname = {name:?}\nsha256 = \"{hash}\"\nscopes = {scopes:?}\n")
}
