//! Counts requests with a missing or wrong key by client address, so that guessing keys is slow.
//!
//! Counts in this process. A shared store was rejected, because a call to it would cost more than the
//! rejected request.

use super::local::LocalBuckets;
use super::state::seconds_up;
use super::who::LimitIdentity;
use crate::config::AuthConf;
use crate::model::Quota;
use arc_swap::ArcSwap;
use std::net::IpAddr;
use std::time::Duration;

const MINUTE: Duration = Duration::from_secs(60);

pub struct AuthFailureLimit(ArcSwap<(Quota, LocalBuckets)>);

/// When the address may fail again, in seconds and at least 1; and the burst of the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooManyFailures {
    pub retry_after_s: u64,
    pub burst: u32,
}

impl AuthFailureLimit {
    pub fn new(conf: &AuthConf) -> Self {
        Self(ArcSwap::from_pointee(buckets(quota(conf))))
    }

    /// Applies a new configuration. If its numbers differ, all counts are reset.
    pub fn set_conf(&self, conf: &AuthConf) {
        let quota = quota(conf);
        if self.0.load().0 != quota {
            self.0.store(buckets(quota).into());
        }
    }

    /// Counts a failure of `client`.
    ///
    /// # Errors
    /// The address has failed too often.
    pub fn count(&self, client: IpAddr) -> Result<(), TooManyFailures> {
        let buckets = self.0.load();
        let decision = buckets.1.take(&LimitIdentity::ip(client), 1);
        let retry_after_s = seconds_up(decision.retry_after).max(1);
        if decision.allowed { Ok(()) } else { Err(TooManyFailures { retry_after_s, burst: buckets.0.burst }) }
    }
}

fn quota(conf: &AuthConf) -> Quota {
    Quota { rate: conf.failures_a_minute, period: MINUTE, burst: conf.failures_burst }
}

fn buckets(quota: Quota) -> (Quota, LocalBuckets) {
    (quota, LocalBuckets::new(quota))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_with_too_many_failures_gets_a_retry_time() {
        let conf = |burst| AuthConf { failures_a_minute: 6, failures_burst: burst, metrics_need_key: false };
        let failures = AuthFailureLimit::new(&conf(2));
        let count = |ip: &str| failures.count(ip.parse().unwrap());
        assert_eq!((count("2001:db8::1"), count("2001:db8::2")), (Ok(()), Ok(())));
        assert_eq!(
            count("2001:db8::3"),
            Err(TooManyFailures { retry_after_s: 10, burst: 2 }),
            "the same /64"
        );
        assert_eq!(count("10.0.0.1"), Ok(()));
        failures.set_conf(&conf(2));
        assert!(count("2001:db8::3").is_err());
        failures.set_conf(&conf(3));
        assert!(count("2001:db8::3").is_ok());
    }
}
