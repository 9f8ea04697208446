//! `limits.toml`: rate limits, waits, batches, cache and overload.

use super::checks::within;
use crate::config::checks::{SECONDS_MAX, is_countable};
use crate::model::Quota;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// The contents of `limits.toml`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimitsFile {
    #[serde(default)]
    pub limit: Vec<LimitConf>,
    pub waits: WaitsConf,
    pub batch: BatchConf,
    pub cache: CacheConf,
    pub overload: OverloadConf,
}

/// `[overload]`: the cap on jobs of a key, and load shedding.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct OverloadConf {
    /// Maximum number of jobs in flight of an API key on this node. 0: no cap.
    pub jobs_per_key_max: usize,
    /// Target of the confirmation latency, in ms. Above it a part of new jobs is shed. 0: never.
    pub confirm_target_ms: u64,
}

/// `[[limit]]`: a rate limit.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct LimitConf {
    /// Unique name: 1 to 64 of `[A-Za-z0-9._-]`.
    pub name: String,
    /// What the counted requests have in common.
    pub identity: Identity,
    /// How nodes share the count.
    #[serde(default)]
    pub mode: LimitMode,
    /// Patterns of routes (`/run`) and upstreams (`/prefix/*`).
    pub routes: Vec<String>,
    /// Requests per period.
    pub rate: u32,
    /// The period, in seconds.
    pub period_s: u64,
    /// Requests at once.
    pub burst: u32,
    /// What happens without Redis.
    pub on_redis_loss: OnRedisLoss,
}

impl LimitConf {
    /// The numbers of the limit.
    pub fn quota(&self) -> Quota {
        Quota { rate: self.rate, period: Duration::from_secs(self.period_s), burst: self.burst }
    }
}

/// Which requests a limit counts together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Identity {
    /// Those with one name of the API key.
    Key,
    /// Those of one client address (IPv6: one /64).
    Ip,
    /// Runs of one function.
    Function,
    /// All requests.
    Global,
}

/// How nodes share a count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LimitMode {
    /// Each node takes tokens from Redis in advance.
    #[default]
    Leased,
    /// Each request asks Redis.
    Exact,
}

/// What a limit does without Redis.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OnRedisLoss {
    /// Counts this node's share in memory.
    Local,
    /// Rejects with 503.
    Closed,
}

/// `[waits]`: how long clients wait, and when a job is lost.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct WaitsConf {
    /// Wait of a run without `Prefer: wait`, in seconds.
    pub sync_default_s: u64,
    /// Longest wait of a run, in seconds.
    pub sync_max_s: u64,
    /// Longest long poll of `/status`, in seconds.
    pub status_max_s: u64,
    /// Time until a job without a result is lost, in seconds. `None`: the retention of the queue.
    pub job_deadline_s: Option<u64>,
}

/// `[batch]`: how jobs are sent to the queue.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct BatchConf {
    /// Longest wait of a job for a fuller batch, in ms.
    pub linger_ms: u64,
    /// With fewer sends in flight a job is sent immediately.
    pub sends_eager: usize,
    /// Maximum number of concurrent sends.
    pub sends_max: usize,
    /// Maximum number of jobs that wait to be sent. Further jobs are answered 503.
    pub queue_jobs_max: usize,
    /// Time to send a job, in ms. After that it is answered 503.
    pub send_deadline_ms: u64,
}

/// `[cache]`: the cache of functions.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct CacheConf {
    /// Maximum number of cached functions, about 500 bytes each.
    pub functions_max: u64,
    /// Age limit of a cached function without change announcements, in ms.
    pub function_ttl_ms: u64,
    /// Age limit of a cached function while change announcements arrive, in seconds.
    pub function_backstop_s: u64,
}

/// Upper bound of `send_deadline_ms`, and of other times of a send, in ms. A longer send would delay the end
/// of the process.
pub const SEND_DEADLINE_MS_MAX: u64 = 60_000;

/// How long a send that begins just before its deadline may take, in seconds.
pub const CALL_S: u64 = 3;

/// Upper bound of the age of a cached function, in seconds.
pub const FUNCTION_AGE_S_MAX: u64 = 3600;

impl BatchConf {
    /// Upper bound of `queue_jobs_max`: about 2 GB of waiting jobs.
    pub const QUEUE_JOBS_MAX: usize = 1 << 20;
}

impl LimitConf {
    /// Whether the limit can be counted exactly.
    pub fn is_countable(&self) -> bool {
        is_countable(&self.quota())
    }

    /// Returns each problem as (key, problem).
    pub fn problems(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        // The name is part of a header field and of a Redis key.
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        let is_named = !self.name.is_empty() && self.name.len() <= 64 && self.name.bytes().all(plain);
        let is_by_function = self.identity == Identity::Function;
        [
            (!is_named, "name", "must be 1 to 64 of [A-Za-z0-9._-]"),
            (self.routes.is_empty(), "routes", "must list at least one route"),
            (!self.is_countable(), "burst", "is too large together with period_s"),
            (
                is_by_function && self.routes.iter().any(|route| route != "/run"),
                "routes",
                "must be only \"/run\" with the identity \"function\"",
            ),
        ]
        .into_iter()
        .filter_map(|(is_wrong, key, problem)| is_wrong.then_some((key, problem)))
    }
}

impl LimitsFile {
    /// Returns (path, problem) of each value out of bounds, and of each limit that cannot be used.
    pub fn problems(&self) -> Vec<(String, String)> {
        let send_deadline_s = self.batch.send_deadline_ms.div_ceil(1000);
        let mut problems: Vec<_> = [
            within(
                "batch.queue_jobs_max",
                self.batch.queue_jobs_max as u64,
                1..=BatchConf::QUEUE_JOBS_MAX as u64,
            ),
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
            // A job must not end as LOST while it may still be sent.
            self.waits
                .job_deadline_s
                .and_then(|s| within("waits.job_deadline_s", s, send_deadline_s + CALL_S..=u32::MAX.into())),
        ]
        .into_iter()
        .flatten()
        .collect();
        for (n, limit) in self.limit.iter().enumerate() {
            let numbers =
                [("rate", limit.rate.into()), ("burst", limit.burst.into()), ("period_s", limit.period_s)];
            problems.extend(
                numbers
                    .into_iter()
                    .filter_map(|(name, value)| within(&format!("limit[{n}].{name}"), value, 1..=u64::MAX)),
            );
            let is_named_before = self.limit.iter().take(n).any(|other| other.name == limit.name);
            let not_unique = is_named_before.then_some(("name", "is already used by another limit"));
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
