//! `limits.toml`: rate limits, waits, batches, cache and overload.

use crate::config::checks::is_countable;
use crate::model::Quota;
use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize};
use serde::de::DeserializeOwned;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;
use super::checks::within;
use toml::Table;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LimitsFile {
    #[serde(default)]
    limit: Vec<LimitConf>,
    waits: WaitsConf,
    batch: BatchConf,
    cache: CacheConf,
    overload: OverloadConf,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct OverloadConf {
    pub jobs_per_key_max: usize,
    pub confirm_target_ms: u64,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct LimitConf {
    pub name: String,
    pub identity: Identity,
    #[serde(default)]
    pub mode: LimitMode,
    pub routes: Vec<String>,
    pub rate: u32,
    pub period_s: u64,
    pub burst: u32,
    pub on_redis_loss: OnRedisLoss,
}

impl LimitConf {
    pub fn quota(&self) -> Quota {
        Quota { rate: self.rate, period: Duration::from_secs(self.period_s), burst: self.burst }
    }
}

/// Whose requests a limit counts together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Identity {
    Key,
    Ip,
    /// The function that is run.
    Function,
    /// All requests together.
    Global,
}

/// How nodes count together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LimitMode {
    /// Each node takes requests in advance.
    #[default]
    Leased,
    /// Redis is asked on every request.
    Exact,
}

/// What a limit does while Redis is away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OnRedisLoss {
    /// Counts in this process.
    Local,
    /// Refuses.
    Closed,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct WaitsConf {
    pub sync_default_s: u64,
    pub sync_max_s: u64,
    pub status_max_s: u64,
    pub job_deadline_s: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct BatchConf {
    pub linger_ms: u64,
    pub sends_eager: usize,
    pub sends_max: usize,
    pub queue_jobs_max: usize,
    pub send_deadline_ms: u64,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct CacheConf {
    pub functions_max: u64,
    pub function_ttl_ms: u64,
    pub function_backstop_s: u64,
}

/// A send that takes longer holds up the end of the process.
const SEND_DEADLINE_MS_MAX: u64 = 60_000;

/// A send that began just before its deadline may take so long.
const CALL_S: u64 = 3;

/// Functions are not known for longer, whatever is configured.
const FUNCTION_AGE_S_MAX: u64 = 3600;

impl BatchConf {
    /// Most that `queue_jobs_max` may be: some 2 GB of waiting jobs.
    pub const QUEUE_JOBS_MAX: usize = 1 << 20;
}

impl LimitConf {
    pub fn is_countable(&self) -> bool {
        is_countable(&self.quota())
    }

    /// (key, problem) of each.
    fn problems(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        // The name goes into a header field and a Redis key.
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        let is_named = !self.name.is_empty() && self.name.len() <= 64 && self.name.bytes().all(plain);
        let is_by_function = self.identity == Identity::Function;
        [
            (!is_named, "name", "must be 1 to 64 of [A-Za-z0-9._-]"),
            (self.routes.is_empty(), "routes", "must name a route"),
            (!self.is_countable(), "burst", "is too large together with period_s"),
            (
                is_by_function && self.routes.iter().any(|route| route != "/run"),
                "routes",
                "may be \"/run\" alone where the identity is \"function\"",
            ),
        ]
        .into_iter()
        .filter_map(|(is_wrong, key, problem)| is_wrong.then_some((key, problem)))
    }
}

impl LimitsFile {
    /// (path, problem) of each value out of its bounds, and of each limit that cannot be used.
    pub fn problems(&self) -> Vec<(String, String)> {
        let send_deadline_s = self.batch.send_deadline_ms.div_ceil(1000);
        let mut problems: Vec<_> = [
            within("batch.queue_jobs_max", self.batch.queue_jobs_max as u64, 1..=BatchConf::QUEUE_JOBS_MAX as u64),
            within("batch.send_deadline_ms", self.batch.send_deadline_ms, 1..=SEND_DEADLINE_MS_MAX),
            within("batch.linger_ms", self.batch.linger_ms, 0..=SEND_DEADLINE_MS_MAX),
            within("waits.sync_default_s", self.waits.sync_default_s, 0..=SECONDS_MAX),
            within("waits.sync_max_s", self.waits.sync_max_s, 0..=SECONDS_MAX),
            within("waits.status_max_s", self.waits.status_max_s, 0..=SECONDS_MAX),
            within("cache.function_ttl_ms", self.cache.function_ttl_ms, 0..=FUNCTION_AGE_S_MAX * 1000),
            within("cache.function_backstop_s", self.cache.function_backstop_s, 1..=FUNCTION_AGE_S_MAX),
            within("overload.confirm_target_ms", self.overload.confirm_target_ms, 0..=SEND_DEADLINE_MS_MAX),
            within("batch.sends_eager", self.batch.sends_eager as u64, 1..=u64::MAX),
            within("batch.sends_max", self.batch.sends_max as u64, 1..=u64::MAX),
            within("cache.functions_max", self.cache.functions_max, 1..=u64::MAX),
            // A job must not be lost while it may still be sent.
            self.waits.job_deadline_s.and_then(|s| {
                within("waits.job_deadline_s", s, send_deadline_s + CALL_S..=u32::MAX.into())
            }),
        ]
        .into_iter()
        .flatten()
        .collect();
        for (n, limit) in self.limit.iter().enumerate() {
            let numbers =
                [("rate", limit.rate.into()), ("burst", limit.burst.into()), ("period_s", limit.period_s)];
            problems.extend(numbers.into_iter().filter_map(|(name, value)| {
                within(&format!("limit[{n}].{name}"), value, 1..=u64::MAX)
            }));
            let is_named_before = self.limit.iter().take(n).any(|other| other.name == limit.name);
            let not_unique = is_named_before.then_some(("name", "stands for another limit already"));
            problems.extend(
                not_unique
                    .into_iter()
                    .chain(limit.problems())
                    .map(|(name, problem)| (format!("limit[{n}].{name}"), problem.to_owned())),
            );
        }
        problems
    }
}
