//! Keeps recent results in memory for `/status`.
//!
//! A worker stores its copy of a result slightly after it publishes it. In between, only this node has the
//! result. Without it a `/status` request could find neither a job in flight nor a stored result.

use crate::model::{JobId, Outcome};
use ahash::RandomState;
use dashmap::DashMap;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::time::Duration;
use tokio::time::Instant;

/// How long a result is kept. The worker stores its copy well within this time.
pub const SETTLED_KEPT: Duration = Duration::from_secs(60);

/// The overhead of one result in bytes, in addition to its text: its entries in the map and the queue.
pub const SETTLED_BYTES: usize = 256;

/// Maximum initial capacity of the queue, in results.
pub const QUEUED_AT_FIRST_MAX: usize = 1 << 20;

/// The recent results, bounded in time and in bytes. When it is full the oldest are evicted, and `/status`
/// then answers `pending` until the worker has stored its copy.
pub struct RecentResults {
    pub outcomes: DashMap<JobId, Outcome, RandomState>,
    pub order: Mutex<KeptOrder>,
    pub bytes_max: usize,
}

pub struct KeptOrder {
    pub queue: VecDeque<(Instant, JobId, usize)>,
    pub bytes: usize,
}

impl RecentResults {
    pub fn new(bytes_max: usize) -> Self {
        // Allocated at once, because growing copies all entries. The kernel provides a page on first use.
        let queue = VecDeque::with_capacity((bytes_max / SETTLED_BYTES).min(QUEUED_AT_FIRST_MAX));
        Self {
            outcomes: DashMap::with_hasher_and_shard_amount(RandomState::new(), SHARDS),
            order: Mutex::new(KeptOrder { queue, bytes: 0 }),
            bytes_max,
        }
    }

    pub fn get(&self, id: JobId) -> Option<Outcome> {
        self.outcomes.get(&id).map(|outcome| outcome.clone())
    }

    pub fn keep(&self, id: JobId, outcome: Outcome) {
        let bytes = outcome.published().len() + SETTLED_BYTES;
        if bytes > self.bytes_max {
            return;
        }
        self.outcomes.insert(id, outcome);
        let mut order = self.order();
        order.queue.push_back((Instant::now(), id, bytes));
        order.bytes += bytes;
        while order.bytes > self.bytes_max {
            self.drop_oldest(&mut order);
        }
    }

    pub fn prune(&self, now: Instant) {
        let mut order = self.order();
        while order.queue.front().is_some_and(|(kept, _, _)| now.duration_since(*kept) >= SETTLED_KEPT) {
            self.drop_oldest(&mut order);
        }
    }

    pub fn drop_oldest(&self, order: &mut KeptOrder) {
        if let Some((_, id, bytes)) = order.queue.pop_front() {
            order.bytes -= bytes;
            self.outcomes.remove(&id);
        }
    }

    pub fn order(&self) -> parking_lot::MutexGuard<'_, KeptOrder> {
        self.order.lock()
    }
}

/// Number of shards of a table. A shard that grows moves all its entries and blocks its users meanwhile, so
/// each must stay small: a few thousand entries.
pub const SHARDS: usize = 256;
