//! Settled results, kept for a moment.

use ahash::RandomState;
use crate::dispatch::in_flight::SHARDS;
use crate::model::{JobId, Outcome};
use dashmap::DashMap;
use dashmap::mapref::entry::Entry as MapEntry;
use smallvec::SmallVec;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// How long a settled result is kept for `/status`: the worker stores its own copy a moment after publishing.
const SETTLED_KEPT: Duration = Duration::from_secs(60);

/// What a settled result takes beside its text: its place in table and queue, and what was read of it.
const SETTLED_BYTES: usize = 256;

/// Most places for settled results that are set apart at the start.
const QUEUED_AT_FIRST_MAX: usize = 1 << 20;

/// Settled results, for `/status` in the moment before the worker has stored its copy. Bounded in time and in
/// bytes: when full, the oldest go first, and `/status` says pending until the stored copy is there.
struct Recent {
    outcomes: DashMap<JobId, Outcome, RandomState>,
    order: Mutex<Order>,
    bytes_max: usize,
}

struct Order {
    queue: VecDeque<(Instant, JobId, usize)>,
    bytes: usize,
}

impl Recent {
    fn new(bytes_max: usize) -> Self {
        // All the room it may need: the kernel gives memory once it is used, and to grow would mean to copy all.
        let queue = VecDeque::with_capacity((bytes_max / SETTLED_BYTES).min(QUEUED_AT_FIRST_MAX));
        Self {
            outcomes: DashMap::with_hasher_and_shard_amount(RandomState::new(), SHARDS),
            order: Mutex::new(Order { queue, bytes: 0 }),
            bytes_max,
        }
    }

    fn get(&self, id: JobId) -> Option<Outcome> {
        self.outcomes.get(&id).map(|outcome| outcome.clone())
    }

    fn keep(&self, id: JobId, outcome: Outcome) {
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

    fn prune(&self, now: Instant) {
        let mut order = self.order();
        while order.queue.front().is_some_and(|(kept, _, _)| now.duration_since(*kept) >= SETTLED_KEPT) {
            self.drop_oldest(&mut order);
        }
    }

    fn drop_oldest(&self, order: &mut Order) {
        if let Some((_, id, bytes)) = order.queue.pop_front() {
            order.bytes -= bytes;
            self.outcomes.remove(&id);
        }
    }

    fn order(&self) -> std::sync::MutexGuard<'_, Order> {
        // Nothing panics while the lock is held; if something did, the queue would still be whole.
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
