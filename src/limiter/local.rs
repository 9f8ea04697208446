//! Counts limits in this process: without a shared store, and while the shared store is down.

use super::who::LimitIdentity;
use crate::backend::Decision;
use crate::model::Quota;
use governor::clock::{Clock, DefaultClock};
use governor::middleware::StateInformationMiddleware;
use governor::state::keyed::DashMapStateStore;
use parking_lot::Mutex;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Maximum number of identities counted in this process, per limit. Further identities share one bucket, so
/// that memory is bounded and no request goes uncounted.
const IDENTITIES_MAX: usize = 100_000;
/// With that many identities, those with a full bucket are removed at this interval; finding them takes
/// milliseconds.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

type Buckets = governor::RateLimiter<
    LimitIdentity,
    DashMapStateStore<LimitIdentity>,
    DefaultClock,
    StateInformationMiddleware,
>;

/// The buckets of one limit, with this node's share of it.
pub struct LocalBuckets {
    quota: Quota,
    buckets: Mutex<Arc<Part>>,
}

struct Part {
    nodes: u32,
    buckets: Buckets,
    swept: Mutex<Option<Instant>>,
}

impl LocalBuckets {
    pub fn new(quota: Quota) -> Self {
        Self { quota, buckets: Mutex::new(Arc::new(Part::new(&quota, 1))) }
    }

    /// Counts one request of a limit that `nodes` nodes share.
    pub fn take(&self, who: &LimitIdentity, nodes: u32) -> Decision {
        let part = {
            let mut part = self.buckets.lock();
            if part.nodes != nodes {
                *part = Arc::new(Part::new(&self.quota, nodes));
            }
            Arc::clone(&part)
        };
        part.take(who)
    }
}

impl Part {
    fn new(quota: &Quota, nodes: u32) -> Self {
        let nodes = nodes.max(1);
        let burst = NonZeroU32::new(quota.burst / nodes).unwrap_or(NonZeroU32::MIN);
        let interval = (quota.period * nodes / quota.rate.max(1)).max(Duration::from_nanos(1));
        let quota = governor::Quota::with_period(interval)
            .unwrap_or_else(|| governor::Quota::per_second(burst))
            .allow_burst(burst);
        let buckets = governor::RateLimiter::dashmap(quota).with_middleware::<StateInformationMiddleware>();
        Self { nodes, buckets, swept: Mutex::new(None) }
    }

    fn is_sweep_due(&self) -> bool {
        let mut swept = self.swept.lock();
        let is_due = swept.is_none_or(|at| at.elapsed() >= SWEEP_EVERY);
        if is_due {
            *swept = Some(Instant::now());
        }
        is_due
    }

    fn take(&self, who: &LimitIdentity) -> Decision {
        if self.buckets.len() >= IDENTITIES_MAX && self.is_sweep_due() {
            self.buckets.retain_recent();
        }
        let who = if self.buckets.len() >= IDENTITIES_MAX { &LimitIdentity::Overflow } else { who };
        match self.buckets.check_key(who) {
            Ok(state) => Decision {
                allowed: true,
                remaining: state.remaining_burst_capacity(),
                retry_after: Duration::ZERO,
            },
            Err(until) => {
                let retry_after = until.wait_time_from(DefaultClock::default().now());
                Decision { allowed: false, remaining: 0, retry_after }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_admits_its_share_but_at_least_one() {
        let quota = Quota { rate: 8, period: Duration::from_secs(3600), burst: 8 };
        for (nodes, allowed) in [(1, 8), (3, 2), (8, 1), (9, 1)] {
            let local = LocalBuckets::new(quota);
            let through = (0..20).filter(|_| local.take(&LimitIdentity::Global, nodes).allowed).count();
            assert_eq!(through, allowed, "{nodes} nodes");
            let refused = local.take(&LimitIdentity::Global, nodes);
            let token = 3600 / 8 * nodes;
            assert!(refused.retry_after > Duration::from_secs(u64::from(token) - 1), "{nodes}: {refused:?}");
        }
    }

    #[test]
    fn identities_beyond_the_bound_share_a_bucket() {
        let local = LocalBuckets::new(Quota { rate: 1, period: Duration::from_secs(3600), burst: 1 });
        let who = |n: usize| LimitIdentity::Ip(u128::try_from(n).unwrap().to_be_bytes());
        for n in 0..IDENTITIES_MAX {
            assert!(local.take(&who(n), 1).allowed);
        }
        assert!(local.take(&who(IDENTITIES_MAX), 1).allowed, "the shared bucket has a token for the first");
        assert!(!local.take(&who(IDENTITIES_MAX + 1), 1).allowed, "the second finds it empty");
    }
}
