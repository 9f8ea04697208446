//! The header fields of a response that report the rate limits of its request.

use crate::api::{X_RATELIMIT_LIMIT, X_RATELIMIT_REMAINING};
use crate::config::LimitConf;
use crate::limiter::{RateLimitState, seconds_up};
use http::header::{HeaderName, HeaderValue};
use std::fmt::Write;
use std::time::Duration;

const RATELIMIT: HeaderName = HeaderName::from_static("ratelimit");
const RATELIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
/// Initial capacity of the field value, in bytes: enough for two limits.
const STATE_BYTES: usize = 96;

/// Adds the legacy `X-RateLimit-*` fields of the tightest limit, and `RateLimit` and `RateLimit-Policy` (IETF
/// draft) of all counted limits.
pub fn add_fields(counted: &RateLimitState, fields: &mut Vec<(HeaderName, HeaderValue)>) {
    let Some((tightest, decision)) = counted.decisions().min_by_key(|(_, d)| (d.allowed, d.remaining)) else {
        return;
    };
    let mut state = String::with_capacity(STATE_BYTES);
    for (limit, decision) in counted.decisions() {
        let sep = if state.is_empty() { "" } else { ", " };
        let (name, remaining) = (&limit.name, decision.remaining);
        // Writing to a String cannot fail.
        let _ = write!(state, "{sep}\"{name}\";r={remaining};t={}", seconds_up(refill(limit, remaining)));
    }
    fields.reserve(5);
    // A rejection may have set these for another bound.
    if !fields.iter().any(|(name, _)| *name == X_RATELIMIT_LIMIT) {
        fields.push((X_RATELIMIT_LIMIT, tightest.burst.into()));
        fields.push((X_RATELIMIT_REMAINING, decision.remaining.into()));
    }
    fields.extend(HeaderValue::try_from(state).ok().map(|value| (RATELIMIT, value)));
    let policy = counted.policy().and_then(|policy| HeaderValue::from_maybe_shared(policy).ok());
    fields.extend(policy.map(|value| (RATELIMIT_POLICY, value)));
}

/// The time until the bucket is full.
fn refill(limit: &LimitConf, remaining: u32) -> Duration {
    let used = limit.burst.saturating_sub(remaining);
    limit.quota().period.mul_f64(f64::from(used) / f64::from(limit.rate.max(1)))
}
