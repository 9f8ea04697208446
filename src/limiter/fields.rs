//! What a client is told of the limits its request counted against.

use super::limit::Limit;
use super::Counted;
use super::plan::Plan;
use crate::backend::Decision;
use crate::config::LimitConf;
use http::header::{HeaderName, HeaderValue};
use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

const X_RATELIMIT_LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit");
const X_RATELIMIT_REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining");
const RATELIMIT: HeaderName = HeaderName::from_static("ratelimit");
const RATELIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
/// Room for the state of two limits, in bytes.
const STATE_BYTES: usize = 96;

impl Counted {
    /// The header fields: the old `X-RateLimit-*` of the tightest limit, and `RateLimit` and `RateLimit-Policy` (IETF
    /// draft) of all.
    pub fn add_fields(&self, fields: &mut Vec<(HeaderName, HeaderValue)>) {
        let Some(plan) = &self.plan else { return };
        let Some((tightest, decision)) = self.decisions(plan).min_by_key(|(_, d)| (d.allowed, d.remaining))
        else {
            return;
        };
        let mut state = String::with_capacity(STATE_BYTES);
        let mut count = 0;
        for (limit, decision) in self.decisions(plan) {
            let sep = if count == 0 { "" } else { ", " };
            let (name, remaining) = (&limit.conf.name, decision.remaining);
            // Writing to a String cannot fail.
            let _ = write!(
                state,
                "{sep}\"{name}\";r={remaining};t={}",
                seconds_up(refill(&limit.conf, &decision))
            );
            count += 1;
        }
        fields.reserve(5);
        // A refusal may have said what else was too much.
        if !fields.iter().any(|(name, _)| *name == X_RATELIMIT_LIMIT) {
            fields.push((X_RATELIMIT_LIMIT, tightest.burst.clone()));
            fields.push((X_RATELIMIT_REMAINING, decision.remaining.into()));
        }
        fields.extend(HeaderValue::try_from(state).ok().map(|value| (RATELIMIT, value)));
        let policy = match count {
            n if n == plan.limits.len() => plan.policy.clone(),
            n if n == plan.early && self.late.get().is_none() => plan.policy_early.clone(),
            _ => policy(self.decisions(plan).map(|(limit, _)| quota(limit))),
        };
        fields.extend(policy.map(|value| (RATELIMIT_POLICY, value)));
    }

    fn decisions<'a>(&'a self, plan: &'a Plan) -> impl Iterator<Item = (&'a Arc<Limit>, Decision)> {
        let late = self.late.get().into_iter().flatten();
        self.early.iter().chain(late).filter_map(|(n, decision)| Some((plan.limits.get(*n)?, *decision)))
    }
}

/// What `RateLimit-Policy` says of one limit.
pub(super) fn quota(limit: &Limit) -> String {
    let LimitConf { name, rate, period_s, .. } = &limit.conf;
    format!("\"{name}\";q={rate};w={period_s}")
}

/// The `RateLimit-Policy` of some limits. `None`: there are none, or it is no header value.
pub(super) fn policy(quotas: impl Iterator<Item = String>) -> Option<HeaderValue> {
    let all: Vec<String> = quotas.collect();
    if all.is_empty() { None } else { HeaderValue::try_from(all.join(", ")).ok() }
}

/// Until the bucket would be full again.
fn refill(conf: &LimitConf, decision: &Decision) -> Duration {
    let used = conf.burst.saturating_sub(decision.remaining);
    conf.quota().period.mul_f64(f64::from(used) / f64::from(conf.rate.max(1)))
}

/// Whole seconds, rounded up: a client that waits as told must not be refused again.
pub(super) fn seconds_up(duration: Duration) -> u64 {
    duration.as_secs() + u64::from(duration.subsec_nanos() > 0)
}
