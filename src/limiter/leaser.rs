//! The loop that calls the shared store for leases. It is separate from the requests, so that a client that
//! disconnects does not cancel a call that others wait for.

use super::lease::{AfterAnswer, IDLE, Micros};
use super::limit::Limit;
use super::store::SharedStore;
use super::who::LimitIdentity;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

/// Maximum number of calls that are due but not begun. Beyond it calls count as unanswered.
pub const DUE_MAX: usize = 16_384;
/// Maximum number of calls in flight.
const CALLS_MAX: usize = 1024;
/// Maximum number of leases watched for idleness. Others are not returned early and expire.
const WATCHED_MAX: usize = 131_072;
/// How often watched leases are checked.
const TICK: Duration = Duration::from_millis(100);
/// Spent leases are removed once in this many ticks.
const SWEEP_TICKS: u32 = 10;

/// A lease for which a call is due.
pub struct DueCall {
    pub limit: Arc<Limit>,
    pub who: LimitIdentity,
}

struct WatchedLease {
    due: DueCall,
    seq: u64,
    from: Micros,
}

/// The limits whose spent leases are swept. Limits of an old configuration are dropped with their last user.
pub type Swept = Arc<Mutex<Vec<Weak<Limit>>>>;

/// The loop. It runs as long as the limiter is used.
pub struct Leaser {
    pub due: mpsc::Receiver<DueCall>,
    pub store: Arc<SharedStore>,
    pub limits: Swept,
}

impl Leaser {
    pub async fn run(mut self) {
        let mut calls = FuturesUnordered::new();
        // Sorted by time, because all leases are watched equally long.
        let mut watched: VecDeque<WatchedLease> = VecDeque::new();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut ticks = 0_u32;
        loop {
            tokio::select! {
                biased;
                // First, because new calls may never stop arriving.
                _ = tick.tick() => {
                    let now = self.store.now();
                    while calls.len() < CALLS_MAX
                        && let Some(first) = watched.pop_front_if(|first| now >= first.from + IDLE)
                    {
                        if first.due.limit.is_idle_since(&first.due.who, first.seq) {
                            calls.push(call(&self.store, first.due));
                        }
                    }
                    ticks += 1;
                    if ticks >= SWEEP_TICKS {
                        ticks = 0;
                        self.sweep(now);
                    }
                }
                Some(left) = calls.next() => watched.extend(left.filter(|_| watched.len() < WATCHED_MAX)),
                due = self.due.recv(), if calls.len() < CALLS_MAX => match due {
                    Some(due) => calls.push(call(&self.store, due)),
                    None => return,
                },
            }
        }
    }

    fn sweep(&self, now: Micros) {
        let mut limits = self.limits.lock();
        limits.retain(|limit| limit.upgrade().map(|limit| limit.sweep(now)).is_some());
    }
}

/// Makes calls for the lease until no request waits. Returns the lease if it has tokens left.
async fn call(store: &SharedStore, due: DueCall) -> Option<WatchedLease> {
    let DueCall { limit, who } = &due;
    while let Some(ask) = limit.begin(who, store.now()) {
        let grant = store.lease(&ask).await;
        let (next, seq) = limit.settle(who, store.now(), grant.as_ref());
        match next {
            AfterAnswer::Call => {}
            AfterAnswer::Watch => return Some(WatchedLease { seq, from: store.now(), due }),
            AfterAnswer::Rest => return None,
        }
    }
    None
}
