//! Authentication by API key, before any body is read.
//!
//! Only the SHA-256 of a key is known. A key is looked up by its hash, so the time of the look-up reveals
//! nothing about a key: clients cannot choose the hash. Requests with a missing or wrong key are counted by
//! client address and limited. A valid key is always accepted, also from an address over that limit, since
//! clients may share an address.

use crate::api::ApiError;
use crate::config::{API_KEY_BYTES_MAX, AuthConf, KeyConf, Live, Secret};
use crate::limiter::{AuthFailureLimit, TooManyFailures};
use crate::model::{AllowedFunctions, Caller, Scope, UnixMs, now_ms};
use ahash::AHashMap;
use http::{HeaderName, HeaderValue};
use sha2::{Digest, Sha256};
use std::net::IpAddr;
use std::sync::Arc;
use subtle::ConstantTimeEq;

pub const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");
/// The name of the master key. Stored data, metrics and logs identify keys by name, never by the key itself.
const MASTER: &str = "master";

/// The accepted keys, and the failures by address.
pub struct ApiKeys {
    master: Option<Hash>,
    keys: Live<Keys>,
    failures: AuthFailureLimit,
}

type Hash = [u8; 32];
type Keys = AHashMap<Hash, KeyEntry>;

/// A key and the scope it was accepted for, to check later whether both are still valid.
#[derive(Clone, Debug)]
pub struct AuthorizedKey {
    hash: Hash,
    scope: Scope,
}

struct KeyEntry {
    caller: Arc<Caller>,
    not_before: UnixMs,
    expires: UnixMs,
}

impl ApiKeys {
    pub fn new(master: &Secret, keys: &[KeyConf], auth: &AuthConf) -> Self {
        // An empty master key means that there is none. It must not accept an empty key.
        let master = (!master.reveal().is_empty()).then(|| Sha256::digest(master.reveal()).into());
        Self { master, keys: Live::new(made(master, keys)), failures: AuthFailureLimit::new(auth) }
    }

    pub fn set_conf(&self, keys: &[KeyConf], auth: &AuthConf) {
        self.keys.set(made(self.master, keys));
        self.failures.set_conf(auth);
    }

    /// The caller that the key identifies. `client` is called only if the key is missing, unknown or not
    /// valid now.
    ///
    /// # Errors
    /// `Unauthorized`, `KeyNotValidNow` or, if the scope is missing, `Forbidden`. Once the address has failed
    /// too often, `TooManyFailures` replaces the first two.
    pub fn check(
        &self,
        presented: Option<&HeaderValue>,
        scope: Scope,
        client: impl FnOnce() -> Option<IpAddr>,
    ) -> Result<Arc<Caller>, ApiError> {
        let failed = match self.find(presented, now_ms) {
            Ok(caller) if caller.may(scope) => return Ok(caller),
            Ok(_) => return Err(ApiError::Forbidden { scope }),
            Err(failed) => failed,
        };
        match client().map(|client| self.failures.count(client)) {
            Some(Err(TooManyFailures { retry_after_s, burst })) => {
                Err(ApiError::TooManyFailures { retry_after_s, burst })
            }
            _ => Err(failed),
        }
    }

    /// The same for a route for which another scope is sufficient too. `Forbidden` names the first one.
    pub fn check_either(
        &self,
        presented: Option<&HeaderValue>,
        scope: Scope,
        or_scope: Option<Scope>,
        client: impl FnOnce() -> Option<IpAddr>,
    ) -> Result<Arc<Caller>, ApiError> {
        let checked = self.check(presented, scope, client);
        let (Err(ApiError::Forbidden { .. }), Some(other)) = (&checked, or_scope) else { return checked };
        // The key is known, so no failure is counted.
        self.check(presented, other, || None).or(checked)
    }

    /// Remembers an accepted key for `still_opens`.
    pub fn pass(&self, presented: &HeaderValue, scope: Scope) -> AuthorizedKey {
        AuthorizedKey { hash: Sha256::digest(presented.as_bytes()).into(), scope }
    }

    /// Whether the key is still configured and valid, and still has the scope.
    pub fn still_opens(&self, pass: &AuthorizedKey) -> bool {
        self.caller_of(pass).is_some()
    }

    /// The caller that the key identifies now, if it is still valid and has the scope.
    pub fn caller_of(&self, pass: &AuthorizedKey) -> Option<Arc<Caller>> {
        self.find_hash(&pass.hash, now_ms).ok().filter(|caller| caller.may(pass.scope))
    }

    fn find(
        &self,
        presented: Option<&HeaderValue>,
        now: impl FnOnce() -> UnixMs,
    ) -> Result<Arc<Caller>, ApiError> {
        // The length is checked first: hashing must cost a bounded time.
        let presented =
            presented.filter(|key| key.len() <= API_KEY_BYTES_MAX).ok_or(ApiError::Unauthorized)?;
        self.find_hash(&Sha256::digest(presented.as_bytes()).into(), now)
    }

    fn find_hash(&self, hash: &Hash, now: impl FnOnce() -> UnixMs) -> Result<Arc<Caller>, ApiError> {
        let keys = self.keys.get();
        let (known, key) = keys.get_key_value(hash).ok_or(ApiError::Unauthorized)?;
        if !bool::from(known.ct_eq(hash)) {
            return Err(ApiError::Unauthorized);
        }
        let is_timed = key.not_before > 0 || key.expires < UnixMs::MAX;
        if is_timed && !(key.not_before..key.expires).contains(&now()) {
            return Err(ApiError::KeyNotValidNow);
        }
        Ok(Arc::clone(&key.caller))
    }
}

fn made(master: Option<Hash>, keys: &[KeyConf]) -> Keys {
    let of_conf = |conf: &KeyConf| {
        let caller = Caller {
            name: conf.name.as_str().into(),
            scopes: conf.scopes.clone(),
            functions: conf.functions.as_deref().map(AllowedFunctions::new),
            jobs_max: conf.jobs_max,
        };
        let (not_before, expires) = (conf.not_before.unwrap_or(0), conf.expires.unwrap_or(UnixMs::MAX));
        (conf.sha256.0, KeyEntry { caller: Arc::new(caller), not_before, expires })
    };
    let mut made: Keys = keys.iter().map(of_conf).collect();
    if let Some(master) = master {
        let caller =
            Caller { name: MASTER.into(), scopes: vec![Scope::Admin], functions: None, jobs_max: None };
        made.insert(master, KeyEntry { caller: Arc::new(caller), not_before: 0, expires: UnixMs::MAX });
    }
    made
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::KeyHash;

    const AUTH: AuthConf = AuthConf { failures_a_minute: 1, failures_burst: 2, metrics_need_key: false };

    fn key(name: &str, key: &str, scopes: &[Scope]) -> KeyConf {
        KeyConf {
            name: name.into(),
            sha256: KeyHash(Sha256::digest(key).into()),
            scopes: scopes.to_vec(),
            functions: None,
            not_before: None,
            expires: None,
            limit: None,
            jobs_max: None,
        }
    }

    fn show(keys: &ApiKeys, key: &str, scope: Scope) -> Result<String, &'static str> {
        let key = HeaderValue::from_str(key).unwrap();
        keys.check(Some(&key), scope, || None).map(|caller| caller.name.to_string()).map_err(|e| e.code())
    }

    #[test]
    fn only_the_exact_master_key_is_accepted() {
        let keys = ApiKeys::new(&Secret::new("k-123".into()), &[], &AUTH);
        assert_eq!(show(&keys, "k-123", Scope::Write), Ok("master".into()));
        for wrong in ["", "k-12", "k-1234", "K-123", " k-123", &"k".repeat(5000)] {
            assert_eq!(show(&keys, wrong, Scope::Run), Err("unauthorized"), "{wrong:?}");
        }
        assert!(keys.check(None, Scope::Run, || None).is_err());
        let none = ApiKeys::new(&Secret::new(String::new()), &[], &AUTH);
        assert_eq!(show(&none, "", Scope::Run), Err("unauthorized"), "an empty key is rejected");
    }

    #[test]
    fn scopes_validity_and_removal_are_enforced() {
        let mut late = key("late", "l", &[Scope::Run]);
        late.not_before = Some(now_ms() + 60_000);
        let mut old = key("old", "o", &[Scope::Run]);
        old.expires = Some(now_ms());
        let now = KeyConf {
            not_before: Some(1),
            expires: Some(now_ms() + 60_000),
            ..key("now", "n", &[Scope::Run])
        };
        let two =
            [key("edge", "a", &[Scope::Run]), key("edge", "b", &[Scope::Run, Scope::Read]), late, old, now];
        let keys = ApiKeys::new(&Secret::new("m".into()), &two, &AUTH);
        for (shown, scope, expected) in [
            ("a", Scope::Run, Ok("edge")),
            ("a", Scope::Read, Err("forbidden")),
            ("b", Scope::Read, Ok("edge")),
            ("l", Scope::Run, Err("key_not_valid_now")),
            ("o", Scope::Run, Err("key_not_valid_now")),
            ("n", Scope::Run, Ok("now")),
            ("m", Scope::Metrics, Ok("master")),
        ] {
            assert_eq!(show(&keys, shown, scope), expected.map(str::to_owned), "{shown}");
        }
        keys.set_conf(&two[1..], &AUTH);
        assert_eq!(show(&keys, "a", Scope::Run), Err("unauthorized"), "the key was removed");
        assert_eq!(show(&keys, "m", Scope::Run), Ok("master".into()));
    }

    #[test]
    fn a_pass_is_valid_as_long_as_its_key() {
        let mut short = key("short", "s", &[Scope::Read]);
        short.expires = Some(now_ms() + 60_000);
        let keys = ApiKeys::new(&Secret::new("m".into()), &[short.clone()], &AUTH);
        let pass = |key: &'static str, scope| keys.pass(&HeaderValue::from_static(key), scope);
        let (one, master) = (pass("s", Scope::Read), pass("m", Scope::Write));
        assert!(keys.still_opens(&one) && keys.still_opens(&master));
        assert!(!keys.still_opens(&pass("s", Scope::Write)));
        for changed in [
            vec![],
            vec![KeyConf { expires: Some(now_ms()), ..short.clone() }],
            vec![KeyConf { scopes: vec![Scope::Run], ..short.clone() }],
        ] {
            keys.set_conf(&changed, &AUTH);
            assert!(!keys.still_opens(&one) && keys.still_opens(&master), "{changed:?}");
        }
        keys.set_conf(&[short], &AUTH);
        assert!(keys.still_opens(&one));
    }

    #[test]
    fn only_failures_count_against_an_address() {
        let keys = ApiKeys::new(&Secret::new("m".into()), &[key("a", "a", &[Scope::Run])], &AUTH);
        let show = |key: &'static str, scope| {
            let client = || Some("10.0.0.1".parse().unwrap());
            keys.check(Some(&HeaderValue::from_static(key)), scope, client).map(|_| ()).map_err(|e| e.code())
        };
        for expected in ["unauthorized", "unauthorized", "too_many_failures"] {
            assert_eq!(show("x", Scope::Run), Err(expected));
        }
        assert_eq!(show("a", Scope::Run), Ok(()));
        assert_eq!(show("a", Scope::Write), Err("forbidden"), "a known key is not a failure");
    }
}
