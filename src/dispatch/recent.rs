//! Settled results, kept for a moment.

use crate::dispatch::in_flight::SHARDS;
use crate::model::{JobId, Outcome};
use ahash::RandomState;
use dashmap::DashMap;
use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// How long a settled result is kept for `/status`: the worker stores its own copy a moment after publishing.
pub const SETTLED_KEPT: Duration = Duration::from_secs(60);

/// What a settled result takes beside its text: its place in table and queue, and what was read of it.
pub const SETTLED_BYTES: usize = 256;

/// Most places for settled results that are set apart at the start.
pub const QUEUED_AT_FIRST_MAX: usize = 1 << 20;

/// Settled results, for `/status` in the moment before the worker has stored its copy. Bounded in time and in
/// bytes: when full, the oldest go first, and `/status` says pending until the stored copy is there.
pub struct Recent {
    pub outcomes: DashMap<JobId, Outcome, RandomState>,
    pub order: Mutex<Order>,
    pub bytes_max: usize,
}

pub struct Order {
    pub queue: VecDeque<(Instant, JobId, usize)>,
    pub bytes: usize,
}

impl Recent {
    pub fn new(bytes_max: usize) -> Self {
        // All the room it may need: the kernel gives memory once it is used, and to grow would mean to copy all.
        let queue = VecDeque::with_capacity((bytes_max / SETTLED_BYTES).min(QUEUED_AT_FIRST_MAX));
        Self {
            outcomes: DashMap::with_hasher_and_shard_amount(RandomState::new(), SHARDS),
            order: Mutex::new(Order { queue, bytes: 0 }),
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

    pub fn drop_oldest(&self, order: &mut Order) {
        if let Some((_, id, bytes)) = order.queue.pop_front() {
            order.bytes -= bytes;
            self.outcomes.remove(&id);
        }
    }

    pub fn order(&self) -> std::sync::MutexGuard<'_, Order> {
        // Nothing panics while the lock is held; if something did, the queue would still be whole.
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
