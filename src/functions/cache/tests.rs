use super::super::ChangeLoop;
use super::*;
use crate::backend::{ChangeEvent, ChangeFeed, FunctionPage, FunctionWrite, FunctionWriteOutcome};
use crate::functions::freshness::{CHANGES_KEPT, CHANGES_MAX};
use crate::model::{Function, Recommendation};
use async_trait::async_trait;
use parking_lot::Mutex;
use std::sync::atomic::AtomicUsize;

/// A table that reads its function at once, and answers when it has a permit.
struct Table {
    function: Mutex<Option<Function>>,
    is_away: AtomicBool,
    asked: AtomicUsize,
    /// Closed: every read is answered immediately.
    may_answer: Semaphore,
}

impl Table {
    fn new() -> Arc<Self> {
        let may_answer = Semaphore::new(0);
        may_answer.close();
        let function = Function { memory_mb: 128, ..Function::sample("f") };
        Arc::new(Self {
            function: Mutex::new(Some(function)),
            is_away: AtomicBool::new(false),
            asked: AtomicUsize::new(0),
            may_answer,
        })
    }

    fn slow() -> Arc<Self> {
        let mut table = Self::new();
        Arc::get_mut(&mut table).unwrap().may_answer = Semaphore::new(0);
        table
    }

    fn resize(&self, memory_mb: u64) {
        self.function.lock().as_mut().unwrap().memory_mb = memory_mb;
    }

    async fn was_asked(&self, times: usize) {
        while self.asked() < times {
            tokio::task::yield_now().await;
        }
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

#[async_trait]
impl FunctionStore for Table {
    async fn get(&self, _: &FunctionId) -> Result<Option<Function>, BackendError> {
        let function = self.function.lock().clone();
        self.asked.fetch_add(1, Ordering::SeqCst);
        if let Ok(permit) = self.may_answer.acquire().await {
            permit.forget();
        }
        if self.is_away.load(Ordering::SeqCst) { Err(slow()) } else { Ok(function) }
    }

    async fn list(&self, _: usize, _: Option<&str>) -> Result<FunctionPage, BackendError> {
        Ok(FunctionPage::default())
    }

    async fn write(&self, _: &FunctionWrite) -> Result<FunctionWriteOutcome, BackendError> {
        Ok(FunctionWriteOutcome::Conflict)
    }

    async fn recommend(&self, _: &FunctionId, _: &Recommendation) -> Result<(), BackendError> {
        Ok(())
    }

    async fn probe(&self) -> Result<(), BackendError> {
        Ok(())
    }
}

/// Accepts every announcement and returns no event.
struct Silent;

#[async_trait]
impl ChangeFeed for Silent {
    async fn announce(&self, _: &str) -> Result<(), BackendError> {
        Ok(())
    }

    async fn next(&self) -> ChangeEvent {
        std::future::pending().await
    }
}

fn functions(table: &Arc<Table>) -> FunctionCache {
    let conf = crate::config::Conf::shipped().unwrap().cache;
    assert_eq!((conf.function_ttl_ms, conf.function_backstop_s), (1000, 300));
    let feed = Announcer::new(Some(Arc::new(Silent)));
    FunctionCache::new(&conf, Arc::clone(table) as _, String::new(), feed, Arc::new(Metrics::new(1).unwrap()))
}

fn id() -> FunctionId {
    FunctionId::parse("f").unwrap()
}

async fn memory_mb(functions: &FunctionCache) -> Option<u64> {
    functions.get(&id()).await.unwrap().and_then(|template| template.sample()["memoryMb"].as_u64())
}

fn note_others(functions: &FunctionCache, count: usize) {
    for n in 0..count {
        functions.0.changes.note(&FunctionId::parse(&format!("other-{n}")).unwrap());
    }
}

async fn pass(duration: Duration) {
    tokio::time::advance(duration).await;
}

#[tokio::test(start_paused = true)]
async fn concurrent_look_ups_share_one_read() {
    let table = Table::slow();
    let functions = functions(&table);
    for round in 1..=2 {
        let all = futures_util::future::join_all((0..1000).map(|_| memory_mb(&functions)));
        let answer = async {
            table.was_asked(round).await;
            table.may_answer.add_permits(1);
        };
        let (all, ()) = tokio::join!(all, answer);
        assert!(all.iter().all(|found| *found == Some(128)));
        assert_eq!(table.asked(), round);
        pass(Duration::from_secs(2)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn entries_are_kept_longer_while_announcements_are_received() {
    let table = Table::new();
    let functions = functions(&table);
    functions.announcements_resumed();
    assert_eq!(memory_mb(&functions).await, Some(128));
    table.resize(256);
    pass(Duration::from_secs(299)).await;
    assert_eq!(memory_mb(&functions).await, Some(128));
    functions.announcements_interrupted();
    assert_eq!(memory_mb(&functions).await, Some(256), "too old without announcements");
    table.resize(512);
    pass(Duration::from_millis(999)).await;
    assert_eq!(memory_mb(&functions).await, Some(256));
    functions.announcements_resumed();
    assert_eq!(memory_mb(&functions).await, Some(512), "an announcement may have been missed");
    table.resize(1024);
    pass(Duration::from_secs(301)).await;
    assert_eq!(memory_mb(&functions).await, Some(1024), "the maximum age");
}

#[tokio::test(start_paused = true)]
async fn absent_functions_are_cached_briefly() {
    let table = Table::new();
    let made = table.function.lock().take();
    let functions = functions(&table);
    functions.announcements_resumed();
    for _ in 0..10 {
        assert_eq!(memory_mb(&functions).await, None);
    }
    assert_eq!(table.asked(), 1);
    *table.function.lock() = made;
    pass(Duration::from_secs(1)).await;
    assert_eq!(memory_mb(&functions).await, Some(128));
}

#[tokio::test(start_paused = true)]
async fn stale_entries_are_used_while_the_table_is_unavailable() {
    let table = Table::new();
    let functions = functions(&table);
    assert_eq!(memory_mb(&functions).await, Some(128));
    table.is_away.store(true, Ordering::SeqCst);
    for _ in 0..5 {
        pass(Duration::from_secs(2)).await;
        let asked = table.asked();
        for _ in 0..10 {
            assert_eq!(memory_mb(&functions).await, Some(128));
        }
        assert_eq!(table.asked(), asked + 1, "one read per second");
    }
    table.resize(256);
    table.is_away.store(false, Ordering::SeqCst);
    pass(Duration::from_secs(1)).await;
    assert_eq!(memory_mb(&functions).await, Some(256));

    table.is_away.store(true, Ordering::SeqCst);
    functions.forget(&id());
    assert!(functions.get(&id()).await.is_err(), "it is known to have changed");
    table.is_away.store(false, Ordering::SeqCst);
    assert_eq!(memory_mb(&functions).await, Some(256), "a failure is not cached");
    table.is_away.store(true, Ordering::SeqCst);
    pass(STALE_MAX).await;
    assert!(functions.get(&id()).await.is_err(), "it is too old");
}

#[tokio::test(start_paused = true)]
async fn a_read_that_began_before_a_change_is_not_used_after_it() {
    let table = Table::slow();
    let functions = functions(&table);
    functions.announcements_resumed();
    // Both join the read from before the change. The second caller asks after the change.
    let change = async {
        table.was_asked(1).await;
        table.resize(512);
        functions.forget(&id());
        let joined = memory_mb(&functions);
        table.may_answer.add_permits(2);
        joined.await
    };
    let both = async { tokio::join!(memory_mb(&functions), change) };
    let both = tokio::time::timeout(Duration::from_secs(10), both).await.expect("it reads again");
    assert_eq!(both, (Some(512), Some(512)));
    assert_eq!((memory_mb(&functions).await, table.asked()), (Some(512), 2), "from the cache");
}

#[tokio::test(start_paused = true)]
async fn endless_changes_do_not_block_a_look_up() {
    let table = Table::slow();
    let functions = functions(&table);
    functions.announcements_resumed();
    let changes = async {
        for n in 1..=100 {
            table.was_asked(n).await;
            functions.forget(&id());
            table.may_answer.add_permits(1);
        }
    };
    let found = tokio::select! {
        biased;
        found = memory_mb(&functions) => found,
        () = changes => None,
    };
    assert_eq!((found, table.asked()), (Some(128), 2));
}

/// An outdated entry can stay in the cache, for example if a caller is dropped halfway. No look-up has
/// used it since the change.
#[tokio::test(start_paused = true)]
async fn a_forgotten_change_still_makes_its_entry_stale() {
    let table = Table::new();
    let functions = functions(&table);
    functions.announcements_resumed();
    assert_eq!(memory_mb(&functions).await, Some(128));
    table.resize(256);
    functions.0.changes.note(&id());
    pass(CHANGES_KEPT).await;
    note_others(&functions, CHANGES_MAX);
    assert!(!functions.0.changes.fresh.contains_key(&id()));
    assert_eq!(memory_mb(&functions).await, Some(256));
}

#[tokio::test(start_paused = true)]
async fn of_two_concurrent_changes_the_later_one_counts() {
    let changes = Changes::default();
    changes.note(&id());
    changes.fresh.get_mut(&id()).unwrap().0 = 7; // by another thread that got a higher number
    changes.note(&id());
    assert!(changes.changed_since(&id(), 6));
}

#[tokio::test(start_paused = true)]
async fn a_write_that_takes_effect_late_becomes_visible() {
    for feed in [Announcer::new(None), Announcer::new(Some(Arc::new(Silent)))] {
        let table = Table::new();
        let metrics = Arc::new(Metrics::new(1).unwrap());
        let conf = crate::config::Conf::shipped().unwrap().cache;
        let functions = FunctionCache::new(
            &conf,
            Arc::clone(&table) as _,
            String::new(),
            feed.clone(),
            Arc::clone(&metrics),
        );
        functions.announcements_resumed();
        let test = async {
            functions.may_change(&id()).await;
            assert_eq!(memory_mb(&functions).await, Some(128));
            table.resize(256);
            tokio::time::sleep(Duration::from_secs(9)).await;
            assert_eq!(memory_mb(&functions).await, Some(128), "read before the write took effect");
            tokio::time::sleep(Duration::from_secs(2)).await;
            assert_eq!(memory_mb(&functions).await, Some(256));
        };
        tokio::select! {
            () = test => {}
            () = ChangeLoop::new(feed, functions.clone(), metrics).run() => {}
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_age_of_an_entry_counts_from_the_start_of_its_read() {
    let table = Table::slow();
    let functions = functions(&table);
    let answer = async {
        table.was_asked(1).await;
        pass(Duration::from_millis(900)).await;
        table.may_answer.close();
    };
    assert_eq!(tokio::join!(memory_mb(&functions), answer).0, Some(128));
    table.resize(256);
    pass(Duration::from_millis(200)).await;
    assert_eq!(memory_mb(&functions).await, Some(256));
}

#[tokio::test(start_paused = true)]
async fn too_many_changes_invalidate_the_whole_cache() {
    let table = Table::new();
    let functions = functions(&table);
    functions.announcements_resumed();
    assert_eq!(memory_mb(&functions).await, Some(128));
    table.resize(256);
    note_others(&functions, CHANGES_MAX + 1);
    assert_eq!(memory_mb(&functions).await, Some(256));
    assert_eq!(functions.0.changes.fresh.len(), CHANGES_MAX);
    // A change without room in the list counts too.
    table.resize(512);
    functions.0.changes.note(&id());
    table.is_away.store(true, Ordering::SeqCst);
    assert!(functions.get(&id()).await.is_err(), "it may have changed");
    table.is_away.store(false, Ordering::SeqCst);
    assert_eq!(memory_mb(&functions).await, Some(512));
}

#[tokio::test(start_paused = true)]
async fn new_settings_apply_immediately() {
    let table = Table::new();
    let functions = functions(&table);
    functions.announcements_resumed();
    assert_eq!(memory_mb(&functions).await, Some(128));
    table.resize(256);
    let mut conf = crate::config::Conf::shipped().unwrap().cache;
    conf.function_backstop_s = 10;
    functions.set_conf(&conf);
    pass(Duration::from_secs(9)).await;
    assert_eq!(memory_mb(&functions).await, Some(128));
    pass(Duration::from_secs(1)).await;
    assert_eq!(memory_mb(&functions).await, Some(256));
    let fill = async |functions: &FunctionCache| {
        for n in 0..500 {
            functions.get(&FunctionId::parse(&format!("f-{n}")).unwrap()).await.unwrap();
        }
        functions.0.entries.len()
    };
    assert_eq!(fill(&functions).await, 501);
    conf.functions_max = 64;
    functions.set_conf(&conf);
    assert!(functions.0.entries.len() <= 64 + functions.0.entries.num_shards());
    assert!(fill(&functions).await <= 64 + functions.0.entries.num_shards());
}

#[tokio::test]
async fn concurrent_look_ups_share_a_failure() {
    let table = Table::slow();
    let (functions, id) = (functions(&table), id());
    table.is_away.store(true, Ordering::SeqCst);
    let all = futures_util::future::join_all((0..100).map(|_| functions.get(&id)));
    let open = async {
        table.was_asked(1).await;
        table.may_answer.close();
    };
    let (all, ()) = tokio::join!(all, open);
    assert!(all.iter().all(Result::is_err));
    // Callers that arrived during the first read may need a second one.
    assert!(table.asked() <= 2, "{}", table.asked());
}

#[tokio::test]
async fn a_client_that_leaves_does_not_cancel_a_look_up() {
    let table = Table::slow();
    let (functions, id) = (functions(&table), id());
    let others = futures_util::future::join_all((0..10).map(|_| memory_mb(&functions)));
    tokio::pin!(others);
    for _ in 0..300 {
        tokio::select! {
            biased;
            _ = functions.get(&id) => panic!("the table has not answered"),
            _ = &mut others => panic!("the table has not answered"),
            () = tokio::task::yield_now() => {}
        }
    }
    table.may_answer.close();
    assert_eq!(others.await, [Some(128); 10]);
    assert_eq!(table.asked(), 1);
}
