//! Rate limits counted in Redis: GCRA, one script call a request for all its buckets.
//!
//! One call for several keys means that the buckets of a request must share a slot in a Redis Cluster, which this
//! design does not draw; a call for each bucket would need a second one to give back what the others refuse.
//! A call that runs twice, because the connection broke, takes twice: too strict by one, never too lax.

use super::redis::Commands;
use crate::backend::{BackendError, Decision, LimitStore, Quota};
use async_trait::async_trait;
use redis::Script;
use std::sync::Arc;
use std::time::Duration;

pub(super) struct RedisLimits {
    commands: Arc<Commands>,
    script: Script,
}

impl RedisLimits {
    pub(super) fn new(commands: Arc<Commands>) -> Self {
        Self { commands, script: Script::new(include_str!("limits.lua")) }
    }
}

#[async_trait]
impl LimitStore for RedisLimits {
    async fn take(&self, buckets: &[(String, Quota)]) -> Result<Vec<Decision>, BackendError> {
        if buckets.is_empty() {
            return Ok(Vec::new());
        }
        let mut call = self.script.prepare_invoke();
        for (name, quota) in buckets {
            let (rate, cost) = drain(quota);
            call.key(format!("limit:{{{name}}}")).arg(rate).arg(cost).arg(quota.burst.max(1));
        }
        let call = &call;
        let answer: Vec<i64> =
            self.commands.run(async |mut connection| call.invoke_async(&mut connection).await).await?;
        if answer.len() != 3 * buckets.len() {
            return Err(BackendError::Invalid("the limiter's answer has another length".into()));
        }
        Ok(answer.chunks_exact(3).map(decision).collect())
    }
}

/// What drains in a microsecond and what a request costs, in the smallest whole numbers that stand in the
/// quota's proportion. A period counts in whole microseconds, and no quota is slower than one request in it.
fn drain(quota: &Quota) -> (u64, u64) {
    let rate = u64::from(quota.rate.max(1));
    let period = u64::try_from(quota.period.as_micros()).unwrap_or(u64::MAX).max(1);
    let divisor = gcd(rate, period);
    (rate / divisor, period / divisor)
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn decision(answer: &[i64]) -> Decision {
    let number = |i: usize| answer.get(i).and_then(|n| u64::try_from(*n).ok()).unwrap_or(0);
    Decision {
        allowed: number(0) == 1,
        remaining: u32::try_from(number(1)).unwrap_or(u32::MAX),
        retry_after: Duration::from_micros(number(2)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotas_are_reduced() {
        for (rate, period_s, reduced) in [
            (3000, 60, (1, 20_000)),
            (7, 1, (7, 1_000_000)),
            (0, 1, (1, 1_000_000)),
            (100_000, 86_400, (1, 864_000)),
        ] {
            let quota = Quota { rate, period: Duration::from_secs(period_s), burst: 1 };
            assert_eq!(drain(&quota), reduced);
        }
    }

    #[test]
    fn answers_become_decisions() {
        let refused = Decision { allowed: false, remaining: 0, retry_after: Duration::from_micros(5) };
        assert_eq!(decision(&[0, 0, 5]), refused);
        assert_eq!(
            decision(&[1, 9, 0]),
            Decision { allowed: true, remaining: 9, retry_after: Duration::ZERO }
        );
    }
}
