//! `keys.toml`: who may call.

use super::conf::at_least_one;
use crate::model::{FunctionId, Scope, parse_rfc3339_ms};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// The name of the key of the environment.
const MASTER: &str = "master";
/// Most keys in a file.
const KEYS_MAX: usize = 10_000;
/// Most names of functions, and prefixes of names, that a key may name.
const FUNCTIONS_MAX: usize = 1_000;

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct KeyConf {
    pub name: String,
    pub sha256: KeyHash,
    pub scopes: Vec<Scope>,
    /// Names of functions; one that ends in `*` stands for all that begin so. `None`: all functions.
    pub functions: Option<Vec<String>>,
    /// Unix milliseconds.
    #[serde(default, deserialize_with = "moment")]
    pub not_before: Option<u64>,
    #[serde(default, deserialize_with = "moment")]
    pub expires: Option<u64>,
    pub limit: Option<KeyLimitConf>,
    pub jobs_max: Option<usize>,
}

/// What a key may ask, in place of the limits by key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct KeyLimitConf {
    pub rate: u32,
    pub period_s: u64,
    pub burst: u32,
}

/// The SHA-256 of a key. It is nobody's business: neither shown nor written.
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

/// A date and time of TOML, with its offset, as Unix milliseconds.
fn moment<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    let text = toml::value::Datetime::deserialize(from)?.to_string();
    let bad = || serde::de::Error::custom("must be a date and time with its offset: 2027-01-01T00:00:00Z");
    parse_rfc3339_ms(&text).map(Some).ok_or_else(bad)
}

/// (path, problem) of each.
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
            problem("name", "is that of INFRA_API_KEY");
        }
        if let Some(before) = hashes.insert(key.sha256, n) {
            problem("sha256", &format!("is that of key[{before}]"));
        }
        if key.scopes.is_empty() {
            problem("scopes", "must name a scope");
        }
        if key.not_before.zip(key.expires).is_some_and(|(from, to)| from >= to) {
            problem("expires", "must be after not_before");
        }
        let functions = key.functions.as_deref().unwrap_or_default();
        if key.functions.as_ref().is_some_and(Vec::is_empty) || functions.len() > FUNCTIONS_MAX {
            problem(
                "functions",
                &format!("must name 1 to {FUNCTIONS_MAX} functions; without it the key may run all"),
            );
        }
        for function in functions {
            let name = function.strip_suffix('*').unwrap_or(function);
            if !(name.is_empty() && function == "*") && FunctionId::parse(name).is_none() {
                problem("functions", "must be names of functions, or beginnings of them with a * behind");
            }
        }
        for (name, value) in key.limit.iter().flat_map(|limit| {
            [("rate", limit.rate.into()), ("period_s", limit.period_s), ("burst", limit.burst.into())]
        }) {
            problems.extend(at_least_one(&format!("key[{n}].limit.{name}"), value));
        }
    }
    problems
}
