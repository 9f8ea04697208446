//! Counts rate limits in Redis by GCRA, exact or leased.
//!
//! Exact: one script call per request for all its buckets. In a Redis Cluster these buckets would have to
//! share a slot; cluster mode is not supported. One call per bucket was rejected, because a second call would
//! be needed to return the tokens when another bucket rejects the request. A call that runs twice, because
//! the connection broke, counts twice: too strict by one request, never too lax.
//!
//! Leased: occasional script calls for one bucket. A call that runs twice counts once; see `leases.lua`.

use super::connection::CommandConnection;
use crate::backend::{BackendError, Decision, Grant, LeaseCall, LimitStore};
use crate::model::Quota;
use async_trait::async_trait;
use redis::Script;
use std::sync::Arc;
use std::time::Duration;

pub struct RedisLimits {
    commands: Arc<CommandConnection>,
    take: Script,
    lease: Script,
}

impl RedisLimits {
    pub fn new(commands: Arc<CommandConnection>) -> Self {
        let take = Script::new(include_str!("limits.lua"));
        Self { commands, take, lease: Script::new(include_str!("leases.lua")) }
    }
}

#[async_trait]
impl LimitStore for RedisLimits {
    async fn take(&self, buckets: &[(String, Quota)]) -> Result<Vec<Decision>, BackendError> {
        if buckets.is_empty() {
            return Ok(Vec::new());
        }
        let mut call = self.take.prepare_invoke();
        for (name, quota) in buckets {
            let (rate, cost) = quota.drain();
            call.key(format!("limit:{{{name}}}")).arg(rate).arg(cost).arg(quota.burst.max(1));
        }
        let call = &call;
        let answer: Vec<i64> =
            self.commands.run(async |mut connection| call.invoke_async(&mut connection).await).await?;
        if answer.len() != 3 * buckets.len() {
            return Err(BackendError::Invalid(
                "the answer of the limit script has an unexpected length".into(),
            ));
        }
        Ok(answer.chunks_exact(3).map(decision).collect())
    }

    async fn lease(&self, call: &LeaseCall) -> Result<Grant, BackendError> {
        let (rate, cost) = call.quota.drain();
        let mut script = self.lease.prepare_invoke();
        // The hash tag is the whole name. The suffix keeps the two kinds of buckets apart.
        script.key(format!("limit:{{{}}}:lease", call.bucket)).arg(format!("{:016x}", call.holder));
        script.arg(call.seq).arg(call.held).arg(call.back).arg(call.need).arg(call.want);
        script.arg(rate).arg(cost).arg(call.quota.burst.max(1)).arg(micros(call.ttl));
        let script = &script;
        let answer: [i64; 6] =
            self.commands.run(async |mut connection| script.invoke_async(&mut connection).await).await?;
        let number = |i: usize| answer.get(i).and_then(|n| u64::try_from(*n).ok()).unwrap_or(0);
        let tokens = |i: usize| u32::try_from(number(i)).unwrap_or(u32::MAX);
        Ok(Grant {
            applied: number(0) == 1,
            amount: tokens(1),
            taken: tokens(2),
            left: tokens(3),
            retry_after: Duration::from_micros(number(4)),
            nodes: tokens(5),
        })
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
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
    fn answers_are_parsed_into_decisions() {
        let refused = Decision { allowed: false, remaining: 0, retry_after: Duration::from_micros(5) };
        assert_eq!(decision(&[0, 0, 5]), refused);
        assert_eq!(
            decision(&[1, 9, 0]),
            Decision { allowed: true, remaining: 9, retry_after: Duration::ZERO }
        );
    }
}
