//! Caches the job template of each function, so that a run usually needs no read of the function table.
//!
//! `quick_cache` provides the bound and single flight: concurrent look-ups of one function share one read.
//! `moka` was rejected, because it spreads an entry over five allocations, which is slow with many entries.
//! Absent functions are cached too.
//!
//! Entries have no fixed expiry. Whether an entry is fresh is decided when it is used. Its maximum age is
//! longer while this node receives the change announcements of other nodes. While the table is unavailable, a
//! stale entry is used for up to an hour, unless the function is known to have changed.

use super::announcer::Announcer;
use crate::ambient;
use crate::backend::{BackendError, FunctionStore};
use crate::config::CacheConf;
use crate::functions::freshness::{Ages, Changes};
use crate::metrics::Metrics;
use crate::model::{FunctionId, JobTemplate};
use ahash::RandomState;
use quick_cache::UnitWeighter;
use quick_cache::sync::{Cache, DefaultLifecycle, EntryAction, EntryResult};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};

/// Maximum age of an entry that is used while the table is unavailable.
const STALE_MAX: Duration = Duration::from_secs(3600);
/// Maximum number of look-ups in flight, counting each caller. Further ones get
/// [`BackendError::Unavailable`].
const LOOK_UPS_MAX: usize = 16_384;
/// Timeout for reading a function that is cached but stale.
const REFRESH_MAX: Duration = Duration::from_millis(500);
/// After a failed read, the stale entry is used for this long without another read.
const REFRESH_PAUSE: Duration = Duration::from_secs(1);

/// Looks up functions. Cheap to clone.
#[derive(Clone)]
pub struct FunctionCache(Arc<CacheState>);

struct CacheState {
    store: Arc<dyn FunctionStore>,
    /// The bucket of the code, for the job templates.
    bucket: String,
    announcer: Announcer,
    entries: Cache<FunctionId, CacheEntry, UnitWeighter, RandomState>,
    /// One permit per look-up in flight.
    look_ups: Arc<Semaphore>,
    ages: Ages,
    changes: Changes,
    metrics: Arc<Metrics>,
}

#[derive(Clone)]
struct CacheEntry {
    /// `Ok(None)`: the function does not exist. An error is shared by the callers that waited for this read,
    /// but never used later.
    found: Result<Option<Arc<JobTemplate>>, BackendError>,
    /// When the read began. The table may have been read at any time since then.
    loaded_at: Instant,
    /// The number of the last change when the read began.
    loaded_after: u64,
    /// The last read failed. The entry counts as fresh until this time.
    retry_at: Option<Instant>,
}

impl FunctionCache {
    /// If `announcer` has no other nodes, changes count as received from the beginning.
    pub fn new(
        conf: &CacheConf,
        store: Arc<dyn FunctionStore>,
        bucket: String,
        announcer: Announcer,
        metrics: Arc<Metrics>,
    ) -> Self {
        let ages = Ages {
            backstop_ms: AtomicU64::new(0),
            ttl_ms: AtomicU64::new(0),
            heard: AtomicBool::new(announcer.is_alone()),
        };
        let expected = usize::try_from(conf.functions_max).unwrap_or(usize::MAX);
        let entries = Cache::with(
            expected,
            conf.functions_max,
            UnitWeighter,
            RandomState::new(),
            DefaultLifecycle::default(),
        );
        let functions = Self(Arc::new(CacheState {
            store,
            bucket,
            announcer,
            entries,
            look_ups: Arc::new(Semaphore::new(LOOK_UPS_MAX)),
            ages,
            changes: Changes::default(),
            metrics,
        }));
        functions.set_conf(conf);
        functions
    }

    /// Applies new settings. If the capacity shrinks, entries are evicted.
    pub fn set_conf(&self, conf: &CacheConf) {
        let ages = &self.0.ages;
        ages.ttl_ms.store(conf.function_ttl_ms, Ordering::Relaxed);
        ages.backstop_ms.store(conf.function_backstop_s.saturating_mul(1000), Ordering::Relaxed);
        self.0.entries.set_capacity(conf.functions_max);
    }

    /// The job template of a function; `None` if the function does not exist. It includes every change that
    /// was announced to this node. A change without an announcement is included after the maximum age of an
    /// entry.
    ///
    /// # Errors
    /// If the table cannot be read and no usable entry is cached, or if too many look-ups are in flight.
    pub async fn get(&self, id: &FunctionId) -> Result<Option<Arc<JobTemplate>>, BackendError> {
        let this = &*self.0;
        let known = this.entries.get(id);
        if let Some(entry) = &known
            && this.is_believed(id, entry)
        {
            this.metrics.cache.hits.inc();
            return entry.found.clone();
        }
        let crowded = |_| BackendError::Unavailable("too many functions are being looked up".into());
        let permit = Arc::clone(&this.look_ups).try_acquire_owned().map_err(crowded)?;
        let (this, id) = (Arc::clone(&self.0), id.clone());
        let look_up = async move {
            let _permit = permit;
            this.look_up(&id, known).await
        };
        // A task, because other callers wait for the same read. It must not be cancelled when this client
        // leaves. It ends by itself, and `LOOK_UPS_MAX` bounds the tasks.
        #[expect(clippy::disallowed_methods, reason = "`LOOK_UPS_MAX` bounds the tasks")]
        let look_up = ambient::spawn(look_up);
        look_up.await.unwrap_or_else(|_| Err(BackendError::Unavailable("the look-up was aborted".into())))
    }

    /// Invalidates a function on all nodes, after this node has changed it in the table.
    pub async fn changed(&self, id: &FunctionId) {
        self.forget(id);
        self.0.announcer.announce(id).await;
    }

    /// The same after a write without an answer. It may take effect later, so the function is invalidated now
    /// and once more when the write can no longer take effect.
    pub async fn may_change(&self, id: &FunctionId) {
        self.0.announcer.doubt(id);
        self.changed(id).await;
    }

    /// Invalidates a function on this node.
    pub fn forget(&self, id: &FunctionId) {
        self.0.changes.note(id);
        self.0.entries.remove(id);
    }

    /// Marks every entry as stale.
    pub fn doubt_all(&self) {
        self.0.changes.note_all();
    }

    /// Announcements are received from now on. Earlier ones may have been missed, so every entry becomes
    /// stale.
    pub fn announcements_resumed(&self) {
        self.doubt_all();
        self.0.ages.heard.store(true, Ordering::Release);
        self.0.metrics.cache.changes_heard.set(1);
    }

    /// Announcements are no longer received.
    pub fn announcements_interrupted(&self) {
        self.0.ages.heard.store(false, Ordering::Release);
        self.0.metrics.cache.changes_heard.set(0);
    }
}

impl CacheState {
    /// Whether an entry may be used without a read.
    fn is_believed(&self, id: &FunctionId, entry: &CacheEntry) -> bool {
        if self.changes.changed_since(id, entry.loaded_after) {
            return false;
        }
        let now = Instant::now();
        let is_fresh = match &entry.found {
            Ok(found) => {
                !self.changes.may_have_changed_since(entry.loaded_after)
                    && now.duration_since(entry.loaded_at) < self.ages.of(found.is_some())
            }
            Err(_) => false,
        };
        is_fresh || entry.retry_at.is_some_and(|at| now < at)
    }

    /// Reads a function, or joins a read in flight. `known`: the stale entry, if there is one.
    async fn look_up(
        &self,
        id: &FunctionId,
        known: Option<CacheEntry>,
    ) -> Result<Option<Arc<JobTemplate>>, BackendError> {
        let (asked_at, asked_after) = (Instant::now(), self.changes.count.load(Ordering::Acquire));
        let mut again = false;
        loop {
            let look = |_: &FunctionId, entry: &mut CacheEntry| {
                // A read of another caller that began after this call can be used, even if it failed.
                let is_ours =
                    entry.loaded_at > asked_at && !self.changes.changed_since(id, entry.loaded_after);
                match is_ours || self.is_believed(id, entry) {
                    true => EntryAction::<CacheEntry>::Retain(entry.clone()),
                    false => EntryAction::ReplaceWithGuard,
                }
            };
            let (place, before) = match self.entries.entry_async(id, look).await {
                EntryResult::Retained(entry) => (None, Some(entry)),
                EntryResult::Vacant(place) => (Some(place), None),
                EntryResult::Replaced(place, entry) => (Some(place), Some(entry)),
                EntryResult::Removed(..) | EntryResult::Timeout => continue, // cannot happen here
            };
            let entry = match (place, before) {
                (None, Some(entry)) => entry,
                (place, before) => {
                    let entry = self.load(id, before.as_ref().or(known.as_ref())).await;
                    // Fails if the function was invalidated during the read. The entry is then not stored.
                    let _ = place.map(|place| place.insert(entry.clone()));
                    entry
                }
            };
            if !self.changes.changed_since(id, entry.loaded_after) {
                return entry.found;
            }
            // A read that began after this call includes all changes before the call. A change during the
            // read causes one more read, but not a third: a function that changes all the time would never be
            // returned.
            if again && entry.loaded_after >= asked_after {
                return entry.found;
            }
            again = true;
        }
    }

    /// Reads a function from the table. If that fails, returns `known`, if it may still be used.
    async fn load(&self, id: &FunctionId, known: Option<&CacheEntry>) -> CacheEntry {
        let (loaded_at, loaded_after) = (Instant::now(), self.changes.count.load(Ordering::Acquire));
        // The stale entry may be used if the function exists, and is not known to have changed.
        let known = known.filter(|entry| {
            matches!(entry.found, Ok(Some(_)))
                && entry.loaded_at.elapsed() < STALE_MAX
                && !self.changes.changed_since(id, entry.loaded_after)
        });
        let asked = self.store.get(id);
        let loaded = match known {
            Some(_) => timeout(REFRESH_MAX, asked).await.unwrap_or_else(|_| Err(slow())),
            None => asked.await,
        };
        match (loaded, known) {
            (Err(error), Some(known)) if error.is_transient() => {
                self.metrics.cache.stale.inc();
                tracing::debug!(functionId = %id, %error, "Function not read; using the cached one");
                CacheEntry { retry_at: Some(Instant::now() + REFRESH_PAUSE), ..known.clone() }
            }
            (loaded, _) => {
                self.metrics.cache.loads.inc();
                let template = |function| Arc::new(JobTemplate::of(&function, &self.bucket));
                let found = loaded.map(|function| function.map(template));
                CacheEntry { found, loaded_at, loaded_after, retry_at: None }
            }
        }
    }
}

fn slow() -> BackendError {
    BackendError::Unavailable("the function table did not answer in time".into())
}

#[cfg(test)]
mod tests;
