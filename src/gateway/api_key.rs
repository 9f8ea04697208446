//! The API key: checked before any body is read.

use crate::api::ApiError;
use crate::config::Secret;
use http::HeaderValue;
use sha2::{Digest, Sha256};
use std::sync::Arc;
use subtle::ConstantTimeEq;

/// The name the master key counts under. Names stand for keys wherever something is stored or shown.
const MASTER: &str = "master";

/// The keys that are let in. So far this is the master key, which has every scope.
pub struct ApiKeys {
    /// `None`: there is no key, so nobody is let in.
    master_sha256: Option<[u8; 32]>,
    master_name: Arc<str>,
}

/// A caller whose key was found.
#[derive(Clone, Debug)]
pub struct Caller {
    pub key_name: Arc<str>,
}

impl ApiKeys {
    pub fn new(master: &Secret) -> Self {
        let master_sha256 = (!master.reveal().is_empty()).then(|| Sha256::digest(master.reveal()).into());
        Self { master_sha256, master_name: MASTER.into() }
    }

    /// Compares hashes in constant time, so that neither content nor length of the key shows in the time taken.
    pub fn check(&self, presented: Option<&HeaderValue>) -> Result<Caller, ApiError> {
        let presented = presented.ok_or(ApiError::Unauthorized)?;
        let hash: [u8; 32] = Sha256::digest(presented.as_bytes()).into();
        let known = self.master_sha256.is_some_and(|master| bool::from(hash.ct_eq(&master)));
        known.then(|| Caller { key_name: Arc::clone(&self.master_name) }).ok_or(ApiError::Unauthorized)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_key_opens() {
        let keys = ApiKeys::new(&Secret::new("k-123".into()));
        assert!(keys.check(Some(&HeaderValue::from_static("k-123"))).is_ok());
        for wrong in ["", "k-12", "k-1234", "K-123", " k-123"] {
            assert!(keys.check(Some(&HeaderValue::from_str(wrong).unwrap())).is_err(), "{wrong:?}");
        }
        assert!(keys.check(None).is_err());
        let none = ApiKeys::new(&Secret::new(String::new()));
        assert!(none.check(Some(&HeaderValue::from_static(""))).is_err(), "an empty key opens nothing");
    }
}
