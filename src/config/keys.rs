//! `keys.toml`: the API keys with their scopes and limits, and the creation of new keys.

use super::checks::{is_countable, within};
use super::error::ConfigError;
use super::secret::Secret;
use crate::model::{FunctionId, Quota, Scope, parse_rfc3339_ms, rfc3339_ms};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest, Sha256};
use std::fmt;
use std::time::Duration;

/// Name of the key in `INFRA_API_KEY`.
const MASTER: &str = "master";
/// Most keys in a file.
const KEYS_MAX: usize = 10_000;
/// Most function names and prefixes that a key may list.
const FUNCTIONS_MAX: usize = 1_000;

/// `[[key]]`: an API key.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct KeyConf {
    /// Name in limits, logs and records: 1 to 64 of `[A-Za-z0-9._-]`. Keys with one name count as one.
    pub name: String,
    /// SHA-256 of the key. Unique.
    pub sha256: KeyHash,
    /// What the key may do. Not empty.
    pub scopes: Vec<Scope>,
    /// Functions that the key may run. A name that ends in `*` is a prefix. `None`: all functions.
    pub functions: Option<Vec<String>>,
    /// Start of its validity, in Unix milliseconds.
    #[serde(default, deserialize_with = "moment")]
    pub not_before: Option<u64>,
    /// End of its validity, in Unix milliseconds.
    #[serde(default, deserialize_with = "moment")]
    pub expires: Option<u64>,
    /// Replaces the numbers of all limits by key.
    pub limit: Option<KeyLimitConf>,
    /// Maximum number of jobs in flight on this node. 0: no cap. `None`: `overload.jobs_per_key_max`.
    pub jobs_max: Option<usize>,
}

/// The rate limit of a key. It replaces the limits with the identity `key`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct KeyLimitConf {
    /// Requests per period.
    pub rate: u32,
    /// The period, in seconds.
    pub period_s: u64,
    /// Requests at once.
    pub burst: u32,
}

impl KeyLimitConf {
    pub fn quota(&self) -> Quota {
        Quota { rate: self.rate, period: Duration::from_secs(self.period_s), burst: self.burst }
    }
}

/// The SHA-256 of a key. Never logged or serialized.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct KeyHash(pub [u8; 32]);

impl fmt::Debug for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

impl Serialize for KeyHash {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str("(secret)")
    }
}

impl<'de> Deserialize<'de> for KeyHash {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let bad = || serde::de::Error::custom("must be 64 hexadecimal digits: the SHA-256 of the key");
        let text = String::deserialize(from).map_err(|_| bad())?;
        let digits: Option<Vec<u8>> =
            text.chars().map(|c| c.to_digit(16).and_then(|digit| u8::try_from(digit).ok())).collect();
        let digits = digits.filter(|digits| digits.len() == 64).ok_or_else(bad)?;
        let mut hash = [0; 32];
        for (byte, pair) in hash.iter_mut().zip(digits.chunks(2)) {
            *byte = pair[0] << 4 | pair[1];
        }
        Ok(Self(hash))
    }
}

/// Parses a TOML date and time with an offset into Unix milliseconds.
fn moment<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    let text = toml::value::Datetime::deserialize(from)?.to_string();
    let bad = || serde::de::Error::custom("must be a date and time with an offset: 2027-01-01T00:00:00Z");
    parse_rfc3339_ms(&text).map(Some).ok_or_else(bad)
}

/// A newly created key.
pub struct NewKey {
    /// Not stored. If it is lost, issue a new key.
    pub key: Secret,
    /// The entry to append to `keys.toml`.
    pub lines: String,
}

/// Creates a key of 256 random bits.
///
/// # Errors
/// If `keys.toml` would be rejected with such an entry.
pub fn new_key(
    name: String,
    scopes: Vec<Scope>,
    functions: Option<Vec<String>>,
    expires: Option<&str>,
) -> Result<NewKey, ConfigError> {
    let key = format!("ic_{}", URL_SAFE_NO_PAD.encode(rand::random::<[u8; 32]>()));
    let hash: [u8; 32] = Sha256::digest(&key).into();
    let expires_ms =
        expires.map(|text| parse_rfc3339_ms(text).ok_or_else(|| bad_moment(text))).transpose()?;
    let conf = KeyConf {
        name,
        sha256: KeyHash(hash),
        scopes,
        functions,
        not_before: None,
        expires: expires_ms,
        limit: None,
        jobs_max: None,
    };
    let problems = key_problems(std::slice::from_ref(&conf));
    if !problems.is_empty() {
        let text = |(path, problem): (String, String)| format!("{} {problem}", path.replace("key[0].", ""));
        return Err(ConfigError(problems.into_iter().map(text).collect()));
    }
    let digits: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    let scopes: Vec<_> = conf.scopes.iter().map(|scope| scope.name()).collect();
    // A line break first, because the last line of the file may lack one.
    let mut lines =
        format!("\n[[key]]\nname = {:?}\nsha256 = \"{digits}\"\nscopes = {scopes:?}\n", conf.name);
    if let Some(functions) = &conf.functions {
        lines.push_str(&format!("functions = {functions:?}\n"));
    }
    if let Some(expires) = expires_ms {
        lines.push_str(&format!("expires = {}\n", rfc3339_ms(expires)));
    }
    Ok(NewKey { key: Secret::new(key), lines })
}

fn bad_moment(text: &str) -> ConfigError {
    ConfigError(vec![format!(
        "expires must be a date and time with an offset, such as 2027-01-01T00:00:00Z, not {text}"
    )])
}

/// Returns every problem as (path, problem).
pub(super) fn key_problems(keys: &[KeyConf]) -> Vec<(String, String)> {
    let mut problems = Vec::new();
    if keys.len() > KEYS_MAX {
        problems.push(("key".to_owned(), format!("there may be {KEYS_MAX} keys at most")));
    }
    let mut hashes = std::collections::HashMap::new();
    for (n, key) in keys.iter().enumerate() {
        let mut problem =
            |name: &str, problem: &str| problems.push((format!("key[{n}].{name}"), problem.to_owned()));
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        if key.name.is_empty() || key.name.len() > 64 || !key.name.bytes().all(plain) {
            problem("name", "must be 1 to 64 of [A-Za-z0-9._-]");
        }
        if key.name == MASTER {
            problem("name", "is reserved for INFRA_API_KEY");
        }
        if let Some(before) = hashes.insert(key.sha256, n) {
            problem("sha256", &format!("is the same as that of key[{before}]"));
        }
        if key.scopes.is_empty() {
            problem("scopes", "must list at least one scope");
        }
        if key.not_before.zip(key.expires).is_some_and(|(from, to)| from >= to) {
            problem("expires", "must be after not_before");
        }
        let functions = key.functions.as_deref().unwrap_or_default();
        if key.functions.as_ref().is_some_and(Vec::is_empty) || functions.len() > FUNCTIONS_MAX {
            problem(
                "functions",
                &format!("must list 1 to {FUNCTIONS_MAX} functions; leave it out to allow all"),
            );
        }
        for function in functions {
            let name = function.strip_suffix('*').unwrap_or(function);
            if !(name.is_empty() && function == "*") && FunctionId::parse(name).is_none() {
                problem("functions", "must be function names, or prefixes followed by *");
            }
        }
        for (name, value) in key.limit.iter().flat_map(|limit| {
            [("rate", limit.rate.into()), ("period_s", limit.period_s), ("burst", limit.burst.into())]
        }) {
            problems.extend(within(&format!("key[{n}].limit.{name}"), value, 1..=u64::MAX));
        }
        if key.limit.as_ref().is_some_and(|limit| limit.rate > 0 && !is_countable(&limit.quota())) {
            problems
                .push((format!("key[{n}].limit.burst"), "is too large together with period_s".to_owned()));
        }
    }
    problems
}

/// The contents of `keys.toml`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeysFile {
    #[serde(default)]
    pub key: Vec<KeyConf>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct File {
        pub key: Vec<KeyConf>,
    }

    fn read(lines: &str) -> Result<Vec<KeyConf>, String> {
        toml::from_str(lines).map(|file: File| file.key).map_err(|e| e.message().to_owned())
    }

    const HASH: &str = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";

    #[test]
    fn the_entry_of_a_new_key_is_valid() {
        let scopes = vec![Scope::Run, Scope::Read];
        let made = new_key(
            "edge".into(),
            scopes.clone(),
            Some(vec!["a".into(), "b-*".into()]),
            Some("2030-01-01T01:00:00+01:00"),
        );
        let made = made.unwrap();
        let [key] = &read(&made.lines).unwrap()[..] else { panic!("{}", made.lines) };
        assert_eq!(key.sha256.0, <[u8; 32]>::from(Sha256::digest(made.key.reveal())));
        assert_eq!((key.name.as_str(), &key.scopes, key.expires), ("edge", &scopes, Some(1_893_456_000_000)));
        assert_eq!(key.functions.as_deref(), Some(&["a".to_owned(), "b-*".to_owned()][..]));
        assert!(!made.lines.contains(made.key.reveal()) && made.key.reveal().len() > 43);
        let other = new_key("edge".into(), scopes, None, None).unwrap();
        assert_ne!(other.key, made.key);
        for bad in [
            new_key("master".into(), vec![Scope::Run], None, None),
            new_key("a b".into(), vec![Scope::Run], None, None),
            new_key("a".into(), vec![], None, None),
            new_key("a".into(), vec![Scope::Run], Some(vec!["a b".into()]), None),
            new_key("a".into(), vec![Scope::Run], None, Some("soon")),
        ] {
            assert!(bad.is_err());
        }
    }

    #[test]
    fn problems_name_the_path_and_never_contain_the_hash() {
        let problems = |lines: &str| key_problems(&read(lines).unwrap());
        let key =
            |more: &str| format!("[[key]]\nname = \"a\"\nsha256 = {HASH:?}\nscopes = [\"run\"]\n{more}");
        assert_eq!(problems(&key("")), []);
        for (lines, path) in [
            (key("").replace("\"a\"", "\"master\""), "key[0].name"),
            (key("") + &key(""), "key[1].sha256"),
            (key("").replace("\"run\"", ""), "key[0].scopes"),
            (key("functions = []"), "key[0].functions"),
            (key("functions = [\"a b\"]"), "key[0].functions"),
            (key("functions = [\"*a\"]"), "key[0].functions"),
            (key("not_before = 2030-01-01T00:00:00Z\nexpires = 2029-01-01T00:00:00Z"), "key[0].expires"),
            (key("limit = { rate = 0, period_s = 1, burst = 1 }"), "key[0].limit.rate"),
            (key("limit = { rate = 1, period_s = 9223372036854775807, burst = 1 }"), "key[0].limit.burst"),
            (key("limit = { rate = 1, period_s = 31536000, burst = 4000000000 }"), "key[0].limit.burst"),
        ] {
            let found = problems(&lines);
            assert_eq!(found.first().map(|(path, _)| path.as_str()), Some(path), "{lines}: {found:?}");
        }
        for lines in [
            key("").replace(HASH, "9f86"),
            key("").replace("9f86", "9g86"),
            key("expires = 2030-01-01"),
            key("expires = 2030-01-01T00:00:00"),
            key("").replace("run", "runs"),
        ] {
            let error = read(&lines).unwrap_err();
            assert!(!error.contains("81884c7d"), "{error}");
        }
        assert!(!format!("{:?}", read(&key("")).unwrap()).contains("81884c7d"));
    }
}
