//! Decides how long cached functions may be used, and remembers recent changes.
//!
//! A read of the table that began before a change may end after it. Its result is outdated and must not be
//! used. So changes are numbered, and each cache entry contains the number of the last change before its read
//! began. The comparison of the two shows whether the entry includes a change.

use crate::model::FunctionId;
use dashmap::DashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// How long a change is remembered; longer than a read takes.
pub const CHANGES_KEPT: Duration = Duration::from_secs(30);

/// Maximum number of remembered changes. When it is reached, a further change counts as a change of all
/// functions.
pub const CHANGES_MAX: usize = 10_000;

/// The maximum ages of cache entries.
pub struct Ages {
    /// While announcements are received, in milliseconds.
    pub backstop_ms: AtomicU64,
    /// While they are not, and for absent functions, in milliseconds.
    pub ttl_ms: AtomicU64,
    /// Whether announcements of other nodes are received.
    pub heard: AtomicBool,
}

/// The recent changes, numbered from 1.
#[derive(Default)]
pub struct Changes {
    /// The number of the last change.
    pub count: AtomicU64,
    /// The last change of each function: its number and its time.
    pub fresh: DashMap<FunctionId, (u64, Instant)>,
    /// Entries whose read began before this change may be outdated. Its function is no longer remembered.
    pub unsure_before: AtomicU64,
    /// Entries whose read began before this change count as outdated. There was no room to remember its
    /// function.
    pub all_before: AtomicU64,
}

impl Ages {
    /// The maximum age of an entry. `is_there`: its function exists.
    pub fn of(&self, is_there: bool) -> Duration {
        let is_told = is_there && self.heard.load(Ordering::Acquire);
        let age = if is_told { &self.backstop_ms } else { &self.ttl_ms };
        Duration::from_millis(age.load(Ordering::Relaxed))
    }
}

impl Changes {
    /// Records a change of a function.
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
        // Of two concurrent changes, the one with the higher number may get here first.
        if change.0 < number {
            *change = (number, Instant::now());
        }
    }

    /// Removes changes older than [`CHANGES_KEPT`].
    pub fn drop_old(&self) {
        self.fresh.retain(|_, (number, at)| {
            let is_fresh = at.elapsed() < CHANGES_KEPT;
            if !is_fresh {
                // The cache may still contain an entry from before the change, if it was not used since.
                self.unsure_before.fetch_max(*number, Ordering::AcqRel);
            }
            is_fresh
        });
    }

    /// Records that any function may have changed.
    pub fn note_all(&self) {
        let number = self.count.fetch_add(1, Ordering::AcqRel) + 1;
        self.unsure_before.fetch_max(number, Ordering::AcqRel);
    }

    /// Whether the function is known to have changed since a read that began after change `loaded_after`.
    pub fn changed_since(&self, id: &FunctionId, loaded_after: u64) -> bool {
        // The usual case: no function has changed.
        if self.count.load(Ordering::Acquire) == loaded_after {
            return false;
        }
        loaded_after < self.all_before.load(Ordering::Acquire)
            || self.fresh.get(id).is_some_and(|change| loaded_after < change.0)
    }

    /// Whether any function may have changed since such a read, according to changes that are no longer
    /// known.
    pub fn may_have_changed_since(&self, loaded_after: u64) -> bool {
        loaded_after < self.unsure_before.load(Ordering::Acquire)
    }
}
