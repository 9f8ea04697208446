//! Jobs that ended as LOST, remembered for late results.

use crate::backend::{GIVEN_UP_KEPT, GIVEN_UP_MAX};
use crate::model::{FunctionId, JobId};
use ahash::RandomState;
use dashmap::DashMap;
use dashmap::mapref::entry::Entry as MapEntry;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::time::Instant;

/// Jobs that were given up, for the results that come late; bounded like the store's own list of them.
pub struct GivenUpJobs {
    pub jobs: DashMap<JobId, GivenUp, RandomState>,
    /// Beside the map, as nearly always there are none and every job asks.
    pub len: AtomicUsize,
}

pub struct GivenUp {
    pub function: FunctionId,
    pub since: Instant,
    /// A late result was taken; its row is not queued yet.
    pub settled: bool,
}

impl GivenUpJobs {
    pub fn insert(&self, id: JobId, function: FunctionId) {
        if self.len.load(Ordering::Relaxed) >= GIVEN_UP_MAX {
            return;
        }
        if let MapEntry::Vacant(place) = self.jobs.entry(id) {
            place.insert(GivenUp { function, since: Instant::now(), settled: false });
            self.len.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub fn remove(&self, id: JobId) {
        if self.len.load(Ordering::Relaxed) > 0 && self.jobs.remove(&id).is_some() {
            self.len.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Takes the first late result of a job.
    pub fn settle(&self, id: JobId) -> Option<FunctionId> {
        if self.len.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let mut job = self.jobs.get_mut(&id).filter(|job| !job.settled)?;
        job.settled = true;
        Some(job.function.clone())
    }

    pub fn unsettle(&self, id: JobId) {
        if let Some(mut job) = self.jobs.get_mut(&id) {
            job.settled = false;
        }
    }

    /// Whether it is there; one of long ago is forgotten.
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
