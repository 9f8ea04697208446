//! Functions: found by id through a cache, changed, and their old code swept away.
//!
//! `moka` gives the cache what one of our own would have to: a bound, expiry, and single flight, so that a stampede
//! for one cold function makes one read. That a function does not exist is remembered as well.

mod editor;
mod sweep;

pub use editor::{Change, EditError, Editor, NewCode, NewFunction};
pub use sweep::Sweeper;

use crate::backend::{BackendError, FunctionStore};
use crate::config::CacheConf;
use crate::model::{Function, FunctionId};
use dashmap::DashMap;
use moka::future::Cache;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// How long it is remembered that a function was changed here: longer than a load takes and an entry lives.
const CHANGES_KEPT: Duration = Duration::from_secs(30);
/// Changes remembered; when so many are fresh, the whole cache is dropped instead.
const CHANGES_MAX: usize = 10_000;

/// Looks functions up: a run costs no read of the table in the usual case. Cheap to clone.
#[derive(Clone)]
pub struct Functions {
    store: Arc<dyn FunctionStore>,
    cache: Cache<FunctionId, Cached>,
    changes: Arc<Changes>,
}

#[derive(Clone)]
struct Cached {
    function: Option<Arc<Function>>,
    /// How many changes there had been when the load began.
    loaded_after: u64,
}

/// The functions that were changed a moment ago. A load that began before a change may end after it, and must not
/// be believed then.
#[derive(Default)]
struct Changes {
    count: AtomicU64,
    fresh: DashMap<FunctionId, (u64, Instant)>,
}

impl Functions {
    pub fn new(conf: &CacheConf, store: Arc<dyn FunctionStore>) -> Self {
        let cache = Cache::builder()
            .max_capacity(conf.functions_max)
            .time_to_live(Duration::from_millis(conf.function_ttl_ms))
            .build();
        Self { store, cache, changes: Arc::default() }
    }

    /// The function as it was at most the configured time ago, and not before its last change on this node; `None`
    /// if there is none.
    pub async fn get(&self, id: &FunctionId) -> Result<Option<Arc<Function>>, BackendError> {
        loop {
            let load = async {
                let loaded_after = self.changes.count.load(Ordering::Acquire);
                let function = self.store.get(id).await?.map(Arc::new);
                Ok(Cached { function, loaded_after })
            };
            let found = self.cache.try_get_with_by_ref(id, load).await;
            let found = found.map_err(|e: Arc<BackendError>| (*e).clone())?;
            if !self.changes.outdate(id, found.loaded_after) {
                return Ok(found.function);
            }
            self.cache.invalidate(id).await;
        }
    }

    /// Makes this node forget what it knows of a function, after its table entry was changed.
    pub async fn forget(&self, id: &FunctionId) {
        if !self.changes.note(id) {
            self.cache.invalidate_all();
        }
        self.cache.invalidate(id).await;
    }
}

impl Changes {
    /// Notes a change; `false`: there is no room.
    fn note(&self, id: &FunctionId) -> bool {
        let number = self.count.fetch_add(1, Ordering::AcqRel) + 1;
        if self.fresh.len() >= CHANGES_MAX {
            self.fresh.retain(|_, (_, at)| at.elapsed() < CHANGES_KEPT);
        }
        let room = self.fresh.len() < CHANGES_MAX;
        if room {
            self.fresh.insert(id.clone(), (number, Instant::now()));
        }
        room
    }

    /// Whether what was loaded after that many changes is older than the function's last one.
    fn outdate(&self, id: &FunctionId, loaded_after: u64) -> bool {
        // The usual case: nobody has changed anything.
        if self.count.load(Ordering::Acquire) == loaded_after {
            return false;
        }
        self.fresh.get(id).is_some_and(|change| loaded_after < change.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::embedded;
    use crate::backend::{FunctionPage, FunctionWrite, Written};
    use crate::model::{ConfigAction, Counters, Recommendation};
    use async_trait::async_trait;
    use std::sync::Mutex;
    use tokio::sync::Semaphore;

    /// Answers with what it held when it was asked, once it may.
    struct Slow {
        function: Mutex<Function>,
        may_answer: Semaphore,
        asked: Semaphore,
    }

    #[async_trait]
    impl FunctionStore for Slow {
        async fn get(&self, _: &FunctionId) -> Result<Option<Function>, BackendError> {
            let function = self.function.lock().unwrap().clone();
            self.asked.add_permits(1);
            self.may_answer.acquire().await.unwrap().forget();
            Ok(Some(function))
        }

        async fn list(&self, _: usize, _: Option<&str>) -> Result<FunctionPage, BackendError> {
            Ok(FunctionPage::default())
        }

        async fn write(&self, _: &FunctionWrite) -> Result<Written, BackendError> {
            Ok(Written::Conflict)
        }

        async fn add_counters(&self, _: &FunctionId, _: Counters) -> Result<(), BackendError> {
            Ok(())
        }

        async fn recommend(&self, _: &FunctionId, _: &Recommendation) -> Result<(), BackendError> {
            Ok(())
        }

        async fn probe(&self) -> Result<(), BackendError> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn a_load_that_began_before_a_change_is_not_believed_after_it() {
        let store = Arc::new(Slow {
            function: Mutex::new(Function::sample("f")),
            may_answer: Semaphore::new(0),
            asked: Semaphore::new(0),
        });
        let mut conf = crate::config::Conf::shipped().unwrap().cache;
        conf.function_ttl_ms = 60_000;
        let functions = Functions::new(&conf, Arc::clone(&store) as _);
        let id = store.function.lock().unwrap().id.clone();

        let change = async {
            store.asked.acquire().await.unwrap().forget();
            store.function.lock().unwrap().memory_mb = 512;
            functions.forget(&id).await;
            // The load of before answers only now, and then the one of after.
            store.may_answer.add_permits(1);
            store.asked.acquire().await.unwrap().forget();
            store.may_answer.add_permits(1);
        };
        let both = async { tokio::join!(functions.get(&id), change) };
        let (before, ()) = tokio::time::timeout(Duration::from_secs(10), both).await.expect("it asks again");
        assert_eq!(before.unwrap().unwrap().memory_mb, 512);
        assert_eq!(functions.get(&id).await.unwrap().unwrap().memory_mb, 512, "from the cache");
        assert_eq!(store.asked.available_permits(), 0);
    }

    #[tokio::test]
    async fn a_change_here_is_seen_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let opened = embedded::open(dir.path()).unwrap();
        let mut conf = crate::config::Conf::shipped().unwrap().cache;
        conf.function_ttl_ms = 60_000;
        let functions = Functions::new(&conf, Arc::clone(&opened.backend.functions));
        let id = FunctionId::parse("hello").unwrap();
        assert!(functions.get(&id).await.unwrap().is_some());
        let resize = |_: &Function| Ok::<_, ()>(Change { memory_mb: Some(512), ..Change::default() });
        let editor = Editor::new(&opened.backend, functions.clone());
        editor.change("tester", &id, ConfigAction::Update, None, resize).await.unwrap();
        assert!(functions.get(&id).await.unwrap().is_some_and(|f| f.memory_mb == 512));
    }
}
