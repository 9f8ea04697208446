//! One configured limit, and the leases of its identities on this node.

use super::lease::{
    AfterAnswer, CallAmounts, LeaseThresholds, Micros, RejectionPacing, Spend, TTL, TokenLease, Verdict,
};
use super::local::LocalBuckets;
use super::who::LimitIdentity;
use crate::ambient;
use crate::backend::{Grant, LeaseCall};
use crate::config::LimitConf;
use crate::model::Quota;
use ahash::RandomState;
use dashmap::DashMap;
use rand::Rng;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::oneshot;

/// Maximum number of identities with a lease, per limit. Beyond it each request calls the shared store.
pub const LEASES_MAX: usize = 131_072;
/// Shards of the table of leases. While a shard grows, all its leases move and its users wait.
const SHARDS: usize = 256;

/// The table shrinks when its capacity exceeds this number of leases, and this multiple of the leases it
/// holds.
const ROOM_MIN: usize = 16_384;
const ROOM_MAX_OF_LEFT: usize = 8;

/// The immediate answer to a request, or how it waits for one.
pub enum TakeOutcome {
    Allowed {
        remaining: u32,
        seq: u64,
        /// A call is due.
        call: bool,
    },
    Refused {
        retry: Micros,
    },
    /// `call`: a call is due.
    Waiting {
        verdict: oneshot::Receiver<Verdict>,
        call: bool,
    },
    /// The lease is spent, and the request must not wait for the shared store. `call`: a call is due.
    Empty {
        call: bool,
    },
    /// The table has no room for another lease.
    Full,
    /// Too many requests wait for this lease already.
    TooManyWaiters,
}

/// What to do if a lease is spent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnEmpty {
    Wait,
    /// Make a call due, but do not wait for it.
    Probe,
    Leave,
}

pub struct Limit {
    pub conf: LimitConf,
    pub quota: Quota,
    pub local: LocalBuckets,
    pace: RejectionPacing,
    worth: LeaseThresholds,
    /// Identifies this limit in this process. An earlier definition of the limit had another holder id.
    holder: u64,
    /// Shared by all leases, so that a lease that was dropped and created again continues with larger
    /// numbers.
    seq: AtomicU64,
    leases: DashMap<LimitIdentity, TokenLease<oneshot::Sender<Verdict>>, RandomState>,
    /// The same as `leases.len()`, which would lock all shards.
    count: AtomicUsize,
}

impl Limit {
    pub fn new(conf: LimitConf) -> Self {
        let quota = conf.quota();
        Self {
            quota,
            local: LocalBuckets::new(quota),
            pace: RejectionPacing::of(&quota),
            worth: LeaseThresholds::of(&quota),
            holder: ambient::rng().random(),
            seq: AtomicU64::new(1),
            leases: DashMap::with_hasher_and_shard_amount(ambient::hash_keys(), SHARDS),
            count: AtomicUsize::new(0),
            conf,
        }
    }

    /// Takes one token. Locks one shard briefly, and allocates only if the lease is spent or new.
    pub fn try_take(
        &self,
        who: &LimitIdentity,
        now: Micros,
        on_empty: impl FnOnce() -> OnEmpty,
    ) -> TakeOutcome {
        if let Some(mut lease) = self.leases.get_mut(who) {
            return try_lease(&mut lease, now, on_empty);
        }
        // Several threads may pass at once: the bound limits memory, and may be exceeded by the number of
        // threads.
        if self.count.load(Ordering::Relaxed) >= LEASES_MAX {
            return TakeOutcome::Full;
        }
        let mut lease = self.leases.entry(who.clone()).or_insert_with(|| {
            self.count.fetch_add(1, Ordering::Relaxed);
            TokenLease::default()
        });
        try_lease(&mut lease, now, on_empty)
    }

    /// Returns a token that a request took before another limit rejected it.
    pub fn refund(&self, who: &LimitIdentity, seq: u64, now: Micros) {
        if let Some(mut lease) = self.leases.get_mut(who) {
            lease.refund(seq, now);
        }
    }

    /// Returns the call that is due for `who`.
    pub fn begin(&self, who: &LimitIdentity, now: Micros) -> Option<LeaseCall> {
        let mut lease = self.leases.get_mut(who)?;
        // Numbered under the lock, so that the calls of one lease are numbered in order.
        let seq = self.seq.fetch_add(1, Ordering::Relaxed);
        let ask = lease.begin(now, seq, self.worth)?;
        drop(lease);
        Some(self.call(who, &ask))
    }

    fn call(&self, who: &LimitIdentity, ask: &CallAmounts) -> LeaseCall {
        let CallAmounts { seq, held, back, need, want } = *ask;
        let ttl = Duration::from_micros(TTL);
        LeaseCall {
            bucket: self.bucket(who),
            quota: self.quota,
            holder: self.holder,
            seq,
            held,
            back,
            need,
            want,
            ttl,
        }
    }

    /// A call for one request of an identity without a lease.
    pub fn call_without_lease(&self, who: &LimitIdentity) -> LeaseCall {
        self.call(who, &CallAmounts { seq: 0, held: 0, back: 0, need: 1, want: 0 })
    }

    pub fn bucket(&self, who: &LimitIdentity) -> String {
        format!("{}:{who}", self.conf.name)
    }

    /// Passes the answer to the waiting requests. Returns the next step and the number of the answered call.
    pub fn settle(&self, who: &LimitIdentity, now: Micros, grant: Option<&Grant>) -> (AfterAnswer, u64) {
        let Some(mut lease) = self.leases.get_mut(who) else { return (AfterAnswer::Rest, 0) };
        let next = lease.settle(now, grant, &self.pace, |waiter: oneshot::Sender<_>, verdict| {
            waiter.send(verdict).is_ok()
        });
        (next, lease.seq())
    }

    /// Whether a lease not renewed since call `seq` should be returned. If so, a call is due.
    pub fn is_idle_since(&self, who: &LimitIdentity, seq: u64) -> bool {
        self.leases.get_mut(who).is_some_and(|mut lease| lease.is_idle_since(seq, self.worth))
    }

    /// Removes leases that hold nothing.
    pub fn sweep(&self, now: Micros) {
        if self.count.load(Ordering::Relaxed) == 0 {
            return;
        }
        self.leases.retain(|_, lease| !lease.is_spent(now));
        let left = self.leases.len();
        self.count.store(left, Ordering::Relaxed);
        // After many leases have gone, the remaining ones would be scattered in its memory.
        if self.leases.capacity() > ROOM_MIN.max(ROOM_MAX_OF_LEFT * left) {
            self.leases.shrink_to_fit();
        }
    }

    /// Makes the table appear full.
    #[cfg(test)]
    pub fn fill(&self) {
        self.count.store(LEASES_MAX, Ordering::Relaxed);
    }

    #[cfg(test)]
    pub fn leases(&self) -> usize {
        self.leases.len()
    }
}

fn try_lease(
    lease: &mut TokenLease<oneshot::Sender<Verdict>>,
    now: Micros,
    on_empty: impl FnOnce() -> OnEmpty,
) -> TakeOutcome {
    match lease.spend(now) {
        Spend::Allowed { remaining, seq, call } => TakeOutcome::Allowed { remaining, seq, call },
        Spend::Refused { retry } => TakeOutcome::Refused { retry },
        Spend::Empty => match on_empty() {
            OnEmpty::Leave => TakeOutcome::Empty { call: false },
            OnEmpty::Probe => TakeOutcome::Empty { call: lease.probe() },
            OnEmpty::Wait => {
                let (waiter, verdict) = oneshot::channel();
                lease
                    .wait(waiter)
                    .map_or(TakeOutcome::TooManyWaiters, |call| TakeOutcome::Waiting { verdict, call })
            }
        },
    }
}
