//! The period in which this node may admit jobs: slightly shorter than its lease.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// The share of the lease that a node uses, in percent. It ends the lease early by its own clock, because
/// clocks drift.
const TRUSTED_PERCENT: u32 = 99;

/// The time until which this node may admit jobs.
pub struct NodeLease {
    epoch: Instant,
    /// In milliseconds since `epoch`.
    until: AtomicU64,
    /// The number of live nodes, this one included, at the last renewal.
    nodes: AtomicUsize,
    is_lost: AtomicBool,
    /// When it was last known that others may have had the jobs of this node, in milliseconds since `epoch`.
    /// 0: never.
    shared_at: AtomicU64,
}

impl NodeLease {
    /// The lease of a node at its start: lapsed if there are other nodes, else endless.
    pub fn of_fleet(has_other_nodes: bool) -> Arc<Self> {
        Arc::new(if has_other_nodes { Self::lapsed() } else { Self::endless() })
    }

    /// A lease that never lapses, for a node without others.
    pub fn endless() -> Self {
        Self::until(u64::MAX)
    }

    /// A lease that has lapsed. It must be renewed before jobs are admitted.
    pub fn lapsed() -> Self {
        Self::until(0)
    }

    fn until(until: u64) -> Self {
        let (until, nodes) = (AtomicU64::new(until), AtomicUsize::new(1));
        Self {
            epoch: Instant::now(),
            until,
            nodes,
            is_lost: AtomicBool::new(false),
            shared_at: AtomicU64::new(0),
        }
    }

    /// The number of live nodes; at least 1.
    pub fn nodes(&self) -> usize {
        self.nodes.load(Ordering::Relaxed).max(1)
    }

    /// Whether jobs may be admitted now.
    pub fn holds(&self) -> bool {
        u128::from(self.until.load(Ordering::Relaxed)) > self.epoch.elapsed().as_millis()
    }

    /// Whether another node or process may have had the jobs of this node at any time since `at`, because the
    /// lease had lapsed. It may then have ended jobs that this node had at that time. While the lease is
    /// lapsed, that is not known.
    pub fn is_shared_since(&self, at: Instant) -> bool {
        let at = at.saturating_duration_since(self.epoch).as_millis();
        !self.holds() || u128::from(self.shared_at.load(Ordering::Relaxed)) >= at.max(1)
    }

    /// The same for the whole life of this process.
    pub fn is_ever_shared(&self) -> bool {
        self.is_shared_since(self.epoch)
    }

    /// Another node or process has had the jobs of this node until now.
    pub fn shared(&self) {
        let now = u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.shared_at.store(now.max(1), Ordering::Relaxed);
    }

    /// Another process holds the lease. No jobs are admitted until it is renewed.
    pub fn lost(&self) {
        self.until.store(0, Ordering::Relaxed);
        self.is_lost.store(true, Ordering::Relaxed);
    }

    /// Whether another process held the lease at the last attempt to renew it.
    pub fn is_lost(&self) -> bool {
        self.is_lost.load(Ordering::Relaxed)
    }

    /// The lease was renewed by a call that began at `asked`, when `nodes` nodes were alive.
    pub fn renewed(&self, asked: Instant, lease: Duration, nodes: usize) {
        self.nodes.store(nodes, Ordering::Relaxed);
        self.is_lost.store(false, Ordering::Relaxed);
        let until = asked + lease * TRUSTED_PERCENT / 100 - self.epoch;
        self.until.store(u64::try_from(until.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_lease_ends_slightly_before_others_see_it_lapse() {
        let lease = NodeLease::lapsed();
        assert!(!lease.holds() && NodeLease::endless().holds());
        let asked = Instant::now();
        tokio::time::advance(Duration::from_secs(1)).await;
        lease.renewed(asked, Duration::from_secs(10), 3);
        assert_eq!(lease.nodes(), 3);
        for (ms, holds) in [(8899, true), (2, false)] {
            tokio::time::advance(Duration::from_millis(ms)).await;
            assert_eq!(lease.holds(), holds, "{ms}");
        }
        lease.renewed(Instant::now(), Duration::from_secs(10), 3);
        lease.lost();
        assert!(lease.is_lost() && !lease.holds(), "immediately");
        lease.renewed(Instant::now(), Duration::from_secs(10), 3);
        assert!(!lease.is_lost() && lease.holds());
        tokio::time::advance(Duration::from_millis(1)).await;
        let before = Instant::now();
        tokio::time::advance(Duration::from_secs(1)).await;
        lease.renewed(Instant::now(), Duration::from_secs(10), 3);
        assert!(!lease.is_shared_since(before) && !lease.is_ever_shared());
        tokio::time::advance(Duration::from_secs(20)).await;
        assert!(lease.is_shared_since(Instant::now()), "it is lapsed now");
        lease.renewed(Instant::now(), Duration::from_secs(10), 3);
        assert!(!lease.is_shared_since(before), "nobody has adopted the jobs");
        lease.shared();
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(lease.is_shared_since(before) && !lease.is_shared_since(Instant::now()));
        assert!(lease.is_ever_shared() && !NodeLease::endless().is_ever_shared());
    }
}
