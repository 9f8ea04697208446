//! Identifies repeated requests: the stored form of a client's `Idempotency-Key`, and the hash of a body.
//!
//! Only hashes are stored, so a table or a journal reveals neither the keys of clients nor their requests.

use sha2::{Digest, Sha256};
use std::fmt;

/// The SHA-256 of an idempotency key together with its owner. Neither can be derived from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IdempotencyKey([u8; 32]);

impl IdempotencyKey {
    /// `owner`: the name of the API key that sent the idempotency key. Each owner has its own namespace.
    pub fn of(owner: &str, key: &str) -> Self {
        let mut hash = Sha256::new();
        // The length prefix prevents another owner and key from producing the same bytes.
        hash.update((owner.len() as u64).to_be_bytes());
        hash.update(owner);
        hash.update(key);
        Self(hash.finalize().into())
    }

    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Parses the text that [`fmt::Display`] writes: 64 hexadecimal digits.
    pub fn parse(text: &str) -> Option<Self> {
        let mut bytes = [0; 32];
        if text.len() != 2 * bytes.len() {
            return None;
        }
        for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
        }
        Some(Self(bytes))
    }
}

impl fmt::Display for IdempotencyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The SHA-256 of a request body. It distinguishes a repeated request from a reused key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BodyHash(pub [u8; 32]);

impl BodyHash {
    pub fn of(body: &[u8]) -> Self {
        Self(Sha256::digest(body).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_distinct_and_survive_a_round_trip() {
        let key = IdempotencyKey::of("api-key", "k1");
        assert_eq!(IdempotencyKey::parse(&key.to_string()), Some(key));
        for (owner, other) in [("api-key", "k2"), ("api-keyk", "1"), ("other", "k1")] {
            assert_ne!(IdempotencyKey::of(owner, other), key, "{owner} {other}");
        }
        for bad in ["", "ab", &"g".repeat(64), &"+1".repeat(32)[..63]] {
            assert_eq!(IdempotencyKey::parse(bad), None, "{bad}");
        }
    }
}
