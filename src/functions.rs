//! Functions by id, cached: a run costs no read of the table in the usual case.
//!
//! `moka` gives what a cache of our own would have to: a bound, expiry, and single flight, so that a stampede for
//! one cold function makes one read. That a function does not exist is remembered as well.

use crate::backend::{BackendError, FunctionStore};
use crate::config::CacheConf;
use crate::model::{Function, FunctionId};
use moka::future::Cache;
use std::sync::Arc;
use std::time::Duration;

/// Looks functions up. Cheap to clone.
#[derive(Clone)]
pub struct Functions {
    store: Arc<dyn FunctionStore>,
    cache: Cache<FunctionId, Option<Arc<Function>>>,
}

impl Functions {
    pub fn new(conf: &CacheConf, store: Arc<dyn FunctionStore>) -> Self {
        let cache = Cache::builder()
            .max_capacity(conf.functions_max)
            .time_to_live(Duration::from_millis(conf.function_ttl_ms))
            .build();
        Self { store, cache }
    }

    /// The function as it was at most the configured time ago; `None` if there is none.
    pub async fn get(&self, id: &FunctionId) -> Result<Option<Arc<Function>>, BackendError> {
        let load = async { Ok(self.store.get(id).await?.map(Arc::new)) };
        self.cache.try_get_with_by_ref(id, load).await.map_err(|e: Arc<BackendError>| (*e).clone())
    }
}
