//! Remembers jobs that ended as LOST, so that a late result replaces their row.
//!
//! Bounded like the list in the journal: at most [`GIVEN_UP_MAX`] jobs, for [`GIVEN_UP_KEPT`] each. When it
//! is full, further jobs are not remembered, and their late results are ignored.

use crate::backend::{GIVEN_UP_KEPT, GIVEN_UP_MAX};
use crate::model::{FunctionId, JobId, RowLife};
use ahash::RandomState;
use dashmap::DashMap;
use dashmap::mapref::entry::Entry as MapEntry;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::time::Instant;

/// The lost jobs of this node.
pub struct LostJobs {
    pub jobs: DashMap<JobId, LostJob, RandomState>,
    /// The length of the map, which every job reads. It is nearly always 0, and then no shard is locked.
    pub len: AtomicUsize,
}

/// A lost job.
pub struct LostJob {
    pub function: FunctionId,
    pub since: Instant,
    /// What its LOST row tells.
    pub life: RowLife,
    /// A late result has arrived, and its row is not queued yet.
    pub settled: bool,
}

impl LostJobs {
    pub fn insert(&self, id: JobId, function: FunctionId, life: RowLife) {
        if self.len.load(Ordering::Relaxed) >= GIVEN_UP_MAX {
            return;
        }
        if let MapEntry::Vacant(place) = self.jobs.entry(id) {
            place.insert(LostJob { function, since: Instant::now(), life, settled: false });
            self.len.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub fn remove(&self, id: JobId) {
        if self.len.load(Ordering::Relaxed) > 0 && self.jobs.remove(&id).is_some() {
            self.len.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Accepts the first late result of a job. `None`: the job is not remembered, or has one already.
    pub fn settle(&self, id: JobId) -> Option<(FunctionId, RowLife)> {
        if self.len.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let mut job = self.jobs.get_mut(&id).filter(|job| !job.settled)?;
        job.settled = true;
        Some((job.function.clone(), job.life.clone()))
    }

    pub fn unsettle(&self, id: JobId) {
        if let Some(mut job) = self.jobs.get_mut(&id) {
            job.settled = false;
        }
    }

    /// Whether a late result of the job is still accepted. An expired job is removed.
    pub fn contains(&self, id: JobId) -> bool {
        if self.len.load(Ordering::Relaxed) == 0 {
            return false;
        }
        let age = self.jobs.get(&id).filter(|job| !job.settled).map(|job| job.since.elapsed());
        if age.is_some_and(|age| age >= GIVEN_UP_KEPT) {
            self.remove(id);
        }
        age.is_some_and(|age| age < GIVEN_UP_KEPT)
    }
}
