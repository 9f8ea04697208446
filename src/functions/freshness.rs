//! How long cached functions may be used.

use crate::model::FunctionId;
use dashmap::DashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// How long it is remembered that a function was changed: longer than a load takes.
pub const CHANGES_KEPT: Duration = Duration::from_secs(30);

/// Changes remembered; while so many are fresh, one more means that anything has changed.
pub const CHANGES_MAX: usize = 10_000;

/// How long entries are believed.
pub struct Ages {
    /// While the changes of other nodes are heard, in milliseconds.
    pub backstop_ms: AtomicU64,
    /// Otherwise, and for functions that are not there.
    pub ttl_ms: AtomicU64,
    /// Whether the changes of other nodes are heard.
    pub heard: AtomicBool,
}

/// What changed a moment ago. A load that began before a change may end after it, and must not be believed then.
#[derive(Default)]
pub struct Changes {
    pub count: AtomicU64,
    pub fresh: DashMap<FunctionId, (u64, Instant)>,
    /// Whatever was loaded before this many changes may have changed: so much is not known any more.
    pub unsure_before: AtomicU64,
    /// Whatever was loaded before this many changes has changed: there were too many to remember which.
    pub all_before: AtomicU64,
}

impl Ages {
    pub fn of(&self, is_there: bool) -> Duration {
        let is_told = is_there && self.heard.load(Ordering::Acquire);
        let age = if is_told { &self.backstop_ms } else { &self.ttl_ms };
        Duration::from_millis(age.load(Ordering::Relaxed))
    }
}

impl Changes {
    pub fn note(&self, id: &FunctionId) {
        let number = self.count.fetch_add(1, Ordering::AcqRel) + 1;
        if self.fresh.len() >= CHANGES_MAX {
            self.drop_old();
        }
        if self.fresh.len() >= CHANGES_MAX {
            self.all_before.fetch_max(number, Ordering::AcqRel);
            return;
        }
        let mut change = self.fresh.entry(id.clone()).or_insert((number, Instant::now()));
        // Of two changes at once the later may come here first.
        if change.0 < number {
            *change = (number, Instant::now());
        }
    }

    pub fn drop_old(&self) {
        self.fresh.retain(|_, (number, at)| {
            let is_fresh = at.elapsed() < CHANGES_KEPT;
            if !is_fresh {
                // An entry that was loaded before it may still be there, if nobody has asked for it since.
                self.unsure_before.fetch_max(*number, Ordering::AcqRel);
            }
            is_fresh
        });
    }

    pub fn note_all(&self) {
        let number = self.count.fetch_add(1, Ordering::AcqRel) + 1;
        self.unsure_before.fetch_max(number, Ordering::AcqRel);
    }

    /// Whether the function is known to have changed since a load that began after so many changes.
    pub fn changed_since(&self, id: &FunctionId, loaded_after: u64) -> bool {
        // The usual case: nobody has changed anything.
        if self.count.load(Ordering::Acquire) == loaded_after {
            return false;
        }
        loaded_after < self.all_before.load(Ordering::Acquire)
            || self.fresh.get(id).is_some_and(|change| loaded_after < change.0)
    }

    pub fn may_have_changed_since(&self, loaded_after: u64) -> bool {
        loaded_after < self.unsure_before.load(Ordering::Acquire)
    }
}
