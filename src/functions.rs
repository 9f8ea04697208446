//! Functions: cached lookup by id, changes, change notices to other nodes, and the deletion of old code.

mod announcer;
mod cache;
mod change_loop;
mod editor;
mod freshness;
mod sweep;

pub use cache::FunctionCache;
pub use change_loop::ChangeLoop;
pub use editor::{EditError, Editor, FunctionChange, NewCode, NewFunction};
pub use sweep::Sweeper;

use crate::backend::Backend;
use crate::config::CacheConf;
use crate::metrics::Metrics;
use announcer::Announcer;
use std::sync::Arc;

/// Creates the cache, and the loop that receives the changes of other nodes. `bucket`: the S3 bucket with the
/// code of the functions.
pub fn new(
    conf: &CacheConf,
    backend: &Backend,
    bucket: String,
    metrics: &Arc<Metrics>,
) -> (FunctionCache, ChangeLoop) {
    let announcer = Announcer::new(backend.changes.clone());
    let functions = FunctionCache::new(
        conf,
        Arc::clone(&backend.functions),
        bucket,
        announcer.clone(),
        Arc::clone(metrics),
    );
    let changes = ChangeLoop::new(announcer, functions.clone(), Arc::clone(metrics));
    (functions, changes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::embedded;
    use crate::model::{ConfigAction, Function, FunctionId};

    #[tokio::test]
    async fn a_local_change_is_visible_immediately() {
        let dir = tempfile::tempdir().unwrap();
        let backend = embedded::open(dir.path(), false).unwrap().backend;
        let conf = crate::config::Conf::shipped().unwrap().cache;
        let (functions, _) = new(&conf, &backend, String::new(), &Arc::new(Metrics::new(1).unwrap()));
        let id = FunctionId::parse("hello").unwrap();
        assert!(functions.get(&id).await.unwrap().is_some());
        let resize =
            |_: &Function| Ok::<_, ()>(FunctionChange { memory_mb: Some(512), ..FunctionChange::default() });
        let editor = Editor::new(&backend, functions.clone());
        editor.change("tester", &id, ConfigAction::Update, None, resize).await.unwrap();
        assert!(functions.get(&id).await.unwrap().is_some_and(|f| f.sample()["memoryMb"] == 512));
    }
}
