use super::*;
use crate::audit::flusher::{ROWS_LINGER, WRITES_MAX};
use crate::backend::{
    AdoptOutcome, BackendError, Claim, Claims, EndOutcome, EndedJob, ExecutionStore, FunctionPage,
    FunctionStore, FunctionWrite, FunctionWriteOutcome, Journal, JournalEntry, JournalPart, LeaseOutcome,
    LeaseRenewal, LogPage, LogQuery, Membership, NumberedSums, Predecessor, ROWS_MAX, StoredClaim,
    UnpostedSums,
};
use crate::config::AuditConf;
use crate::model::{Function, FunctionId, IdempotencyKey, Job, NodeId, Outcome, RowId, Sums};
use crate::node_lease::NodeLease;
use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use tokio::time::Instant;

/// Tables in memory that return the given failures, one per call. After the last one every call succeeds.
#[derive(Default)]
struct Tables {
    failures: Mutex<Vec<BackendError>>,
    rows: Mutex<HashMap<String, Execution>>,
    puts: Mutex<Vec<usize>>,
    /// As a journal keeps them.
    unposted: Mutex<HashMap<FunctionId, Sums>>,
    sums: Mutex<HashMap<FunctionId, Sums>>,
    ends_fail: AtomicBool,
    /// In the order of the updates.
    updated: Mutex<Vec<(Instant, FunctionId)>>,
    sums_fail: AtomicBool,
    sums_hang: AtomicBool,
    left: Mutex<Vec<JobId>>,
    failed_recommendations: Mutex<Vec<BackendError>>,
    recommended: Mutex<Vec<(FunctionId, Recommendation)>>,
    failed_keeps: Mutex<Vec<BackendError>>,
    kept: Mutex<Vec<JobId>>,
    /// A row that LOST did not replace.
    kept_row: Mutex<Option<Execution>>,
    /// Calls with one of these rows fail as a whole.
    poison: Mutex<HashMap<JobId, BackendError>>,
}

#[async_trait]
impl ExecutionStore for Tables {
    async fn put(&self, rows: &[Execution]) -> Vec<Result<(), BackendError>> {
        self.puts.lock().push(rows.len());
        if let Some(error) = self.failures.lock().pop() {
            return vec![Err(error); rows.len()];
        }
        let poison = self.poison.lock().clone();
        let found = poison.into_iter().find(|(id, _)| rows.iter().any(|row| row.id == RowId::Job(*id)));
        if let Some((_, error)) = found {
            return vec![Err(error); rows.len()];
        }
        self.rows.lock().extend(rows.iter().map(|row| (row.id.key().into_owned(), row.clone())));
        vec![Ok(()); rows.len()]
    }

    async fn list(&self, _: &LogQuery) -> Result<LogPage, BackendError> {
        Ok(LogPage::default())
    }

    async fn get(&self, _: &FunctionId, id: &str) -> Result<Option<Execution>, BackendError> {
        Ok(self.kept_row.lock().clone().filter(|row| row.id.request_id() == id))
    }

    async fn probe(&self) -> Result<(), BackendError> {
        Ok(())
    }
}

#[async_trait]
impl FunctionStore for Tables {
    async fn get(&self, _: &FunctionId) -> Result<Option<Function>, BackendError> {
        Ok(None)
    }

    async fn list(&self, _: usize, _: Option<&str>) -> Result<FunctionPage, BackendError> {
        Ok(FunctionPage::default())
    }

    async fn write(&self, _: &FunctionWrite) -> Result<FunctionWriteOutcome, BackendError> {
        Ok(FunctionWriteOutcome::Conflict)
    }

    async fn recommend(&self, id: &FunctionId, r: &Recommendation) -> Result<(), BackendError> {
        if let Some(error) = self.failed_recommendations.lock().pop() {
            return Err(error);
        }
        self.recommended.lock().push((id.clone(), r.clone()));
        Ok(())
    }

    async fn probe(&self) -> Result<(), BackendError> {
        Ok(())
    }
}

#[async_trait]
impl Journal for Tables {
    async fn enter(&self, _: &[Job]) -> Result<(), BackendError> {
        Ok(())
    }

    async fn leave(&self, _: &[JobId]) -> Result<(), BackendError> {
        Ok(())
    }

    async fn end(&self, _: NodeId, ended: &[EndedJob]) -> Result<EndOutcome, BackendError> {
        if self.ends_fail.load(Ordering::Relaxed) {
            return Err(BackendError::Unavailable("x".into()));
        }
        let mut unposted = self.unposted.lock();
        for EndedJob { function, adds, .. } in ended {
            *unposted.entry(function.clone()).or_default() += *adds;
        }
        Ok(EndOutcome::AllAdded)
    }

    async fn given_up(&self, _: NodeId) -> Result<Vec<(JobId, FunctionId)>, BackendError> {
        Ok(Vec::new())
    }

    async fn number(
        &self,
        _: NodeId,
        functions: &[FunctionId],
        _: u64,
    ) -> Result<Option<UnpostedSums>, BackendError> {
        let unposted = self.unposted.lock();
        let numbered = functions.iter().filter_map(|function| {
            Some(NumberedSums { function: function.clone(), number: 1, sums: *unposted.get(function)? })
        });
        Ok(Some(UnpostedSums { numbered: numbered.collect(), sums: Vec::new() }))
    }

    async fn post(
        &self,
        _: NodeId,
        numbered: Vec<NumberedSums>,
        _: usize,
    ) -> (Vec<NumberedSums>, Option<BackendError>) {
        if self.sums_hang.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        if self.sums_fail.load(Ordering::Relaxed) {
            return (numbered, Some(BackendError::Unavailable("x".into())));
        }
        for NumberedSums { function, sums, .. } in numbered {
            self.unposted.lock().remove(&function);
            self.updated.lock().push((Instant::now(), function.clone()));
            *self.sums.lock().entry(function).or_default() += sums;
        }
        (Vec::new(), None)
    }

    async fn contains(&self, _: JobId) -> Result<bool, BackendError> {
        Ok(false)
    }

    async fn entries(&self, _: NodeId) -> Result<Vec<JournalEntry>, BackendError> {
        Ok(Vec::new())
    }
}

#[async_trait]
impl Claims for Tables {
    async fn claim(&self, _: &Claim) -> Result<Option<StoredClaim>, BackendError> {
        Ok(None)
    }

    async fn find(&self, _: &IdempotencyKey) -> Result<Option<StoredClaim>, BackendError> {
        Ok(None)
    }

    async fn try_again(&self, _: &StoredClaim, _: JobId) -> Result<bool, BackendError> {
        Ok(false)
    }

    async fn confirm(&self, _: &Claim) -> Result<(), BackendError> {
        Ok(())
    }

    async fn release(&self, _: &Claim, _: JobId) -> Result<bool, BackendError> {
        Ok(false)
    }

    async fn keep(&self, _: &IdempotencyKey, id: JobId, _: &Bytes) -> Result<(), BackendError> {
        match self.failed_keeps.lock().pop() {
            Some(error) => Err(error),
            None => {
                self.kept.lock().push(id);
                Ok(())
            }
        }
    }
}

impl RowsStored for Tables {
    fn rows_written(&self, ids: &[JobId]) {
        self.left.lock().extend_from_slice(ids);
    }
}

fn audit(tables: &Arc<Tables>, rows_max: usize, bytes_max: usize) -> (Audit, AuditLoops) {
    audit_with(tables, None, rows_max, bytes_max)
}

fn audit_with(
    tables: &Arc<Tables>,
    disk: Option<&Path>,
    rows_max: usize,
    bytes_max: usize,
) -> (Audit, AuditLoops) {
    let mut conf = crate::config::Conf::shipped().unwrap().memory;
    (conf.audit_rows_max, conf.audit_bytes_max) = (rows_max, bytes_max);
    let metrics = Arc::new(Metrics::new(10).unwrap());
    let disk = disk.map(|dir| open_disk(dir, &metrics));
    new(&conf, stores(tables), disk, Arc::new(NodeLease::endless()), metrics)
}

fn open_disk(dir: &Path, metrics: &Arc<Metrics>) -> SpillDirs {
    SpillDirs::open(dir, &AuditConf { spill_bytes_max: 1 << 20, aside_after_s: 60 }, metrics).unwrap()
}

fn stores(tables: &Arc<Tables>) -> Stores {
    let tables = || Arc::clone(tables);
    Stores {
        executions: tables(),
        claims: tables(),
        journal: tables(),
        functions: tables(),
        node: NodeId(1),
        membership: None,
    }
}

/// Both loops until `stop`, and to their ends.
async fn run(tables: &Arc<Tables>, loops: AuditLoops, stop: impl Future<Output = ()>) {
    let (stop_ledger, ledger_stopped) = tokio::sync::oneshot::channel::<()>();
    let rows = async {
        loops.flusher.run(Arc::clone(tables) as _, stop).await;
        drop(stop_ledger);
    };
    tokio::join!(rows, loops.ledger.run(async { drop(ledger_stopped.await) }));
}

fn record(audit: &Audit, n: u64) -> Result<(), QueueFull> {
    record_of("f", audit, n)
}

fn record_of(function: &str, audit: &Audit, n: u64) -> Result<(), QueueFull> {
    let id = JobId::new(NodeId(1), 1, n);
    let outcome = Outcome::new(r#"{"status":"SUCCESS","durationMs":3,"handlerDurationMs":2}"#.into());
    let fields = outcome.fields();
    let row = Execution::of(id, FunctionId::parse(function).unwrap(), &fields);
    audit.record(id, row, fields.exit_code, Recommendation::of(id, &fields), None, false)
}

#[tokio::test(start_paused = true)]
async fn every_row_is_written_and_counted_once_whatever_fails_on_the_way() {
    let tables = Arc::new(Tables::default());
    let unavailable = BackendError::Unavailable("x".into());
    *tables.failures.lock() = vec![unavailable; 5];
    let (audit, loops) = audit(&tables, 1000, 1 << 20);
    for n in 0..60 {
        record(&audit, n).unwrap();
    }
    run(&tables, loops, async {}).await;
    assert_eq!(tables.rows.lock().len(), 60);
    assert_eq!(tables.left.lock().len(), 60);
    let puts = tables.puts.lock().clone();
    assert_eq!(puts.iter().max(), Some(&ROWS_MAX), "{puts:?}");
    let sums = Sums {
        invocations: 60,
        errors: 0,
        duration_us: 180_000,
        handler_invocations: 60,
        handler_us: 120_000,
        cold_starts: 0,
    };
    assert_eq!(tables.sums.lock().get(&FunctionId::parse("f").unwrap()), Some(&sums));
    assert_eq!(audit.metrics.audit.waiting_rows.get(), 0);
    assert_eq!(audit.bytes.load(Ordering::Relaxed), 0);
}

#[tokio::test(start_paused = true)]
async fn a_call_takes_no_key_twice() {
    let tables = Arc::new(Tables::default());
    let (audit, loops) = audit(&tables, 100, 1 << 20);
    for n in [1, 2, 1, 3, 1] {
        record(&audit, n).unwrap();
    }
    run(&tables, loops, async {}).await;
    assert_eq!(*tables.puts.lock(), [3, 1, 1]);
    assert_eq!(tables.left.lock().len(), 5);
}

#[tokio::test(start_paused = true)]
async fn a_row_that_is_refused_for_good_holds_nothing_up() {
    let tables = Arc::new(Tables::default());
    *tables.failures.lock() = vec![BackendError::Invalid("x".into())];
    let (audit, loops) = audit(&tables, 10, 1 << 20);
    record(&audit, 1).unwrap();
    run(&tables, loops, async {}).await;
    assert_eq!((tables.rows.lock().len(), tables.left.lock().len()), (0, 1));
    assert_eq!(audit.metrics.audit.rows_refused.get(), 1);
}

#[tokio::test(start_paused = true)]
async fn the_newest_recommendation_is_kept_and_written_again_after_a_failure() {
    let tables = Arc::new(Tables::default());
    *tables.failed_recommendations.lock() = vec![BackendError::Unavailable("x".into())];
    let (audit, loops) = audit(&tables, 10, 1 << 20);
    let f = FunctionId::parse("f").unwrap();
    for (at, mb) in [(1, Some(128)), (3, Some(256)), (2, Some(512)), (4, None)] {
        let id = JobId::new(NodeId(1), at, at);
        let result = mb.map_or("{}".to_owned(), |mb| format!("{{\"recommendedMemoryMb\":{mb}}}"));
        let outcome = Outcome::new(result.into());
        let row = Execution::of(id, f.clone(), &outcome.fields());
        audit.record(id, row, None, Recommendation::of(id, &outcome.fields()), None, false).unwrap();
    }
    let later = tokio::time::sleep(3 * ledger::ROUND);
    run(&tables, loops, later).await;
    let recommended = tables.recommended.lock().clone();
    let [(id, r)] = &recommended[..] else { panic!("{recommended:?}") };
    assert_eq!((id, r.memory_mb, r.at), (&f, Some(256), 3));
    assert_eq!(tables.sums.lock()[&f].errors, 4, "a result without a status is an error");
}

#[tokio::test(start_paused = true)]
async fn a_job_ends_when_its_result_is_kept_with_its_key_too() {
    let tables = Arc::new(Tables::default());
    *tables.failed_keeps.lock() = vec![BackendError::Unavailable("x".into()); 3];
    let (audit, loops) = audit(&tables, 10, 1 << 20);
    let id = JobId::new(NodeId(1), 1, 1);
    let row = Execution::lost(id, FunctionId::parse("f").unwrap(), false);
    let kept = KeyedResult { key: IdempotencyKey::of("a", "b"), result: "{}".into() };
    audit.record(id, row, None, None, Some(Box::new(kept)), false).unwrap();
    let (written, left) = (ROWS_LINGER * 2, ROWS_LINGER * 20);
    let load = async {
        tokio::time::sleep(written).await;
        assert_eq!((tables.rows.lock().len(), tables.left.lock().len()), (1, 0));
        tokio::time::sleep(left).await;
    };
    run(&tables, loops, load).await;
    assert_eq!((&*tables.kept.lock(), &*tables.left.lock()), (&vec![id], &vec![id]));
}

#[tokio::test(start_paused = true)]
async fn what_another_node_has_written_of_a_lost_job_counts() {
    let tables = Arc::new(Tables::default());
    let (audit, loops) = audit(&tables, 10, 1 << 20);
    let f = FunctionId::parse("f").unwrap();
    let [ended, lost] = [1, 2].map(|n| JobId::new(NodeId(1), 1, n));
    let outcome = Outcome::new(r#"{"status":"SUCCESS","durationMs":3}"#.into());
    *tables.kept_row.lock() = Some(Execution::of(ended, f.clone(), &outcome.fields()));
    for id in [ended, lost] {
        audit.record(id, Execution::lost(id, f.clone(), false), None, None, None, true).unwrap();
    }
    run(&tables, loops, async {}).await;
    let sums = Sums { invocations: 2, errors: 1, duration_us: 3000, ..Sums::default() };
    assert_eq!(tables.sums.lock()[&f], sums);
}

/// Real time and files, virtual pauses: the clock stands still while a thread works on a file.
#[tokio::test(start_paused = true)]
async fn rows_spill_while_the_table_is_away_and_all_are_written_and_counted_once() {
    let dir = tempfile::tempdir().unwrap();
    let tables = Arc::new(Tables::default());
    *tables.failures.lock() = vec![BackendError::Unavailable("x".into()); 1000];
    let (audit, loops) = audit_with(&tables, Some(dir.path()), 1000, 1 << 20);
    let load = async {
        for n in 0..400 {
            record(&audit, n).unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let spilled = audit.metrics.audit.spill.rows.get();
        assert!(tables.rows.lock().is_empty() && spilled > 200, "{spilled} on the disk");
    };
    run(&tables, loops, load).await;
    // What was still in memory at the end is on the disk as well, and memory is free.
    assert_eq!((audit.metrics.audit.waiting_rows.get(), audit.bytes.load(Ordering::Relaxed)), (0, 0));
    assert_eq!(tables.left.lock().len(), 400);
    assert!(tables.rows.lock().is_empty());

    tables.failures.lock().clear();
    let (again, loops) = audit_with(&tables, Some(dir.path()), 1000, 1 << 20);
    let later = async {
        while again.metrics.audit.spill.rows.get() > 0 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        tokio::time::sleep(3 * ledger::ROUND).await;
    };
    run(&tables, loops, later).await;
    assert_eq!(tables.rows.lock().len(), 400);
    assert_eq!(tables.sums.lock()[&FunctionId::parse("f").unwrap()].invocations, 400);
    assert_eq!(segments(dir.path()), 0);
}

fn segments(dir: &Path) -> usize {
    let names = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
    names.filter(|name| name.to_str().unwrap().ends_with(".rows")).count()
}

fn id(n: u64) -> JobId {
    JobId::new(NodeId(1), 1, n)
}

impl Tables {
    fn poison(&self, ids: &[u64]) {
        let error = BackendError::Unavailable("x".into());
        *self.poison.lock() = ids.iter().map(|n| (id(*n), error.clone())).collect();
    }

    fn has(&self, n: u64) -> bool {
        self.rows.lock().contains_key(&*RowId::Job(id(n)).key())
    }

    fn invocations(&self) -> i64 {
        self.sums.lock().values().map(|sums| sums.invocations).sum()
    }
}

/// A row each 100 ms.
async fn trickle(audit: &Audit, rows: std::ops::Range<u64>) {
    for n in rows {
        record(audit, n).unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_row_that_fails_holds_up_no_other_and_is_written_when_it_can_be() {
    let dir = tempfile::tempdir().unwrap();
    let tables = Arc::new(Tables::default());
    tables.poison(&[3, 17, 40]);
    let (audit, loops) = audit_with(&tables, Some(dir.path()), 1000, 1 << 20);
    let of = &audit.metrics.audit;
    let load = async {
        for n in 0..60 {
            record(&audit, n).unwrap();
        }
        trickle(&audit, 60..160).await;
        assert_eq!((0..160).filter(|n| !tables.has(*n)).collect::<Vec<_>>(), [3, 17, 40]);
        assert_eq!((of.failing.rows.get(), of.spill.rows.get(), of.waiting_rows.get()), (3, 0, 0));
        assert_eq!(of.spill.appended.as_ref().unwrap().get(), 0, "the table is not away");
        assert_eq!(tables.left.lock().len(), 160, "their rows are safe");
        tokio::time::sleep(3 * ledger::ROUND).await;
        assert_eq!(tables.invocations(), 157);
        tables.poison(&[]);
        trickle(&audit, 160..260).await;
    };
    run(&tables, loops, load).await;
    assert!((0..260).all(|n| tables.has(n)));
    assert_eq!((of.failing.rows.get(), of.rows_put_aside.get(), tables.invocations()), (0, 0, 260));
    assert_eq!(segments(&dir.path().join("failing")), 0);
}

#[tokio::test(start_paused = true)]
async fn a_row_that_never_passes_is_put_aside_and_counts_and_stays_there() {
    let dir = tempfile::tempdir().unwrap();
    let tables = Arc::new(Tables::default());
    let denied = BackendError::Denied("x".into());
    tables.poison.lock().insert(id(5), denied.clone());
    let (audit, loops) = audit_with(&tables, Some(dir.path()), 1000, 1 << 20);
    let of = &audit.metrics.audit;
    let load = async {
        trickle(&audit, 0..500).await;
        assert_eq!((of.failing.rows.get(), of.aside.rows.get()), (1, 0), "a minute has not passed");
        // A table that is away is no reason, however long it lasts.
        let away = BackendError::Unavailable("x".into());
        *tables.failures.lock() = vec![away; 100_000];
        trickle(&audit, 500..1000).await;
        assert_eq!((of.failing.rows.get(), of.aside.rows.get()), (1, 0));
        assert!(of.spill.rows.get() > 100, "different rows fail");
        tables.failures.lock().clear();
        trickle(&audit, 1000..1500).await;
    };
    run(&tables, loops, load).await;
    assert_eq!((of.failing.rows.get(), of.aside.rows.get(), of.rows_put_aside.get()), (0, 1, 1));
    assert_eq!(of.spill.rows.get(), 0);
    assert_eq!((0..1500).filter(|n| !tables.has(*n)).collect::<Vec<_>>(), [5]);
    assert_eq!(tables.invocations(), 1500, "it did run");
    tables.poison(&[]);
    let (again, loops) = audit_with(&tables, Some(dir.path()), 1000, 1 << 20);
    run(&tables, loops, trickle(&again, 1500..1600)).await;
    assert_eq!((again.metrics.audit.aside.rows.get(), tables.has(5)), (1, false));
    // The operator moves it back.
    let [aside, failing] = ["aside", "failing"].map(|name| dir.path().join(name));
    for entry in std::fs::read_dir(&aside).unwrap() {
        let name = entry.unwrap().file_name();
        std::fs::rename(aside.join(&name), failing.join(&name)).unwrap();
    }
    let (third, loops) = audit_with(&tables, Some(dir.path()), 1000, 1 << 20);
    run(&tables, loops, trickle(&third, 1600..1650)).await;
    assert_eq!((third.metrics.audit.aside.rows.get(), tables.has(5)), (0, true));
}

#[tokio::test(start_paused = true)]
async fn rows_that_fail_hold_up_none_behind_them_in_another_life() {
    let dir = tempfile::tempdir().unwrap();
    let tables = Arc::new(Tables::default());
    *tables.failures.lock() = vec![BackendError::Unavailable("x".into()); 10_000];
    let (audit, loops) = audit_with(&tables, Some(dir.path()), 1000, 1 << 20);
    run(&tables, loops, trickle(&audit, 0..80)).await;
    assert_eq!(audit.metrics.audit.spill.rows.get() + audit.metrics.audit.failing.rows.get(), 80);
    tables.failures.lock().clear();
    tables.poison(&[0, 1, 30]);
    // Nothing else is written now: what tells the rows from the table is the rows behind them.
    let (again, loops) = audit_with(&tables, Some(dir.path()), 1000, 1 << 20);
    run(&tables, loops, tokio::time::sleep(Duration::from_secs(60))).await;
    assert_eq!((0..80).filter(|n| !tables.has(*n)).collect::<Vec<_>>(), [0, 1, 30]);
    let of = &again.metrics.audit;
    assert_eq!((of.failing.rows.get(), of.spill.rows.get(), of.aside.rows.get()), (3, 0, 0));
    assert_eq!(tables.invocations(), 77);
}

#[tokio::test(start_paused = true)]
async fn one_row_alone_does_not_say_that_the_table_is_away() {
    let dir = tempfile::tempdir().unwrap();
    let tables = Arc::new(Tables::default());
    tables.poison(&[1]);
    let (audit, loops) = audit_with(&tables, Some(dir.path()), 1000, 1 << 20);
    let of = &audit.metrics.audit;
    let load = async {
        record(&audit, 1).unwrap();
        tokio::time::sleep(Duration::from_secs(120)).await;
        assert_eq!((of.failing.rows.get(), of.aside.rows.get(), of.spill.rows.get()), (1, 0, 0));
        record(&audit, 2).unwrap();
        tokio::time::sleep(2 * ROWS_LINGER).await;
        assert!(tables.has(2), "at once");
    };
    run(&tables, loops, load).await;
    assert_eq!(of.spill.appended.as_ref().unwrap().get(), 0);
}

#[tokio::test(start_paused = true)]
async fn without_a_disk_a_row_that_fails_holds_up_no_other() {
    let tables = Arc::new(Tables::default());
    tables.poison(&[0, 30]);
    let (audit, loops) = audit(&tables, 1000, 1 << 20);
    let load = async {
        for n in 0..60 {
            record(&audit, n).unwrap();
        }
        trickle(&audit, 60..160).await;
        assert_eq!((0..160).filter(|n| !tables.has(*n)).collect::<Vec<_>>(), [0, 30]);
        tables.poison(&[]);
        tokio::time::sleep(Duration::from_secs(10)).await;
    };
    run(&tables, loops, load).await;
    assert!((0..160).all(|n| tables.has(n)));
}

/// The other nodes of a fleet that answers, or does not.
#[derive(Default)]
struct Fleet {
    is_away: AtomicBool,
    entrusted: Mutex<Vec<NodeId>>,
}

#[async_trait]
impl Membership for Fleet {
    async fn take(&self, _: NodeId, _: Duration, _: Predecessor) -> Result<LeaseOutcome, BackendError> {
        Ok(LeaseOutcome::Yes)
    }

    async fn renew(&self, _: NodeId, _: Duration) -> Result<LeaseRenewal, BackendError> {
        Ok(LeaseRenewal::Lost)
    }

    async fn adopt(&self, _: NodeId, _: NodeId, _: Duration) -> Result<AdoptOutcome, BackendError> {
        Ok(AdoptOutcome::Alive)
    }

    async fn dismiss(&self, _: NodeId) -> Result<bool, BackendError> {
        Ok(false)
    }

    async fn relist(&self, _: NodeId) -> Result<bool, BackendError> {
        Ok(false)
    }

    async fn entrust(&self, node: NodeId) -> Result<(), BackendError> {
        if self.is_away.load(Ordering::Relaxed) {
            // As a full Redis answers.
            return Err(BackendError::Invalid("Redis answered ERR".into()));
        }
        self.entrusted.lock().push(node);
        Ok(())
    }

    async fn is_complete(&self, _: NodeId) -> Result<bool, BackendError> {
        Ok(true)
    }

    async fn begin_restore(&self, _: NodeId, _: u64) -> Result<bool, BackendError> {
        Ok(false)
    }

    async fn restore(&self, _: NodeId, _: u64, _: JournalPart<'_>) -> Result<bool, BackendError> {
        Ok(false)
    }

    async fn finish_restore(&self, _: NodeId, _: u64) -> Result<bool, BackendError> {
        Ok(false)
    }
}

/// A late result of a job of another node is written only after [`Membership::entrust`]. If that call fails,
/// neither the log table nor the row is at fault.
#[tokio::test(start_paused = true)]
async fn a_late_result_waits_for_the_fleet_and_no_other_row_does() {
    let dir = tempfile::tempdir().unwrap();
    let (tables, fleet) = (Arc::new(Tables::default()), Arc::new(Fleet::default()));
    fleet.is_away.store(true, Ordering::Relaxed);
    let metrics = Arc::new(Metrics::new(10).unwrap());
    let stores = Stores { membership: Some(Arc::clone(&fleet) as _), ..stores(&tables) };
    let conf = crate::config::Conf::shipped().unwrap().memory;
    let disk = open_disk(dir.path(), &metrics);
    let lease = Arc::new(NodeLease::endless());
    let (audit, loops) = new(&conf, stores, Some(disk), lease, Arc::clone(&metrics));
    let of = &metrics.audit;
    let late = [1, 2].map(|node| JobId::new(NodeId(node), 1, 100));
    let load = async {
        for id in late {
            let row = Execution::lost(id, FunctionId::parse("f").unwrap(), false);
            audit.record_late(id, row, None, None).unwrap();
        }
        trickle(&audit, 0..60).await;
        tokio::time::sleep(Duration::from_secs(120)).await;
        assert!((0..60).all(|n| tables.has(n)));
        let has = |id: JobId| tables.rows.lock().contains_key(&*RowId::Job(id).key());
        assert_eq!(late.map(has), [true, false], "only the node itself is known to live");
        assert_eq!((of.spill.rows.get(), of.failing.rows.get(), of.aside.rows.get()), (1, 0, 0));
        assert_eq!((of.rows_refused.get(), of.rows_put_aside.get()), (0, 0));
        fleet.is_away.store(false, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_secs(10)).await;
        assert_eq!(late.map(has), [true, true]);
    };
    run(&tables, loops, load).await;
    assert!(fleet.entrusted.lock().iter().all(|node| *node == NodeId(2)), "{:?}", fleet.entrusted);
    assert!(fleet.entrusted.lock().len() >= 2, "before the row, and before the sums");
}

#[tokio::test(start_paused = true)]
async fn a_row_that_is_refused_for_good_is_put_aside_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let tables = Arc::new(Tables::default());
    tables.poison.lock().insert(id(1), BackendError::Invalid("x".into()));
    let (audit, loops) = audit_with(&tables, Some(dir.path()), 1000, 1 << 20);
    record(&audit, 1).unwrap();
    run(&tables, loops, async {}).await;
    let of = &audit.metrics.audit;
    assert_eq!((of.rows_refused.get(), of.rows_put_aside.get(), of.aside.rows.get()), (1, 1, 1));
    assert_eq!(tables.left.lock().len(), 1);
}

/// While a journal is restored, a job may move from the table to the ledger. The restore must not miss it.
#[tokio::test(start_paused = true)]
async fn no_job_passes_behind_the_one_who_looks_for_all() {
    let tables = Arc::new(Tables::default());
    let (_audit, loops) = audit(&tables, 10, 1 << 20);
    let mut in_flight = vec![id(1)];
    let row = Execution::lost(id(1), FunctionId::parse("f").unwrap(), false);
    let since = Instant::now();
    let record = Record {
        id: id(1),
        row,
        recommendation: None,
        kept: None,
        is_late: false,
        is_shared: true,
        since,
        counted: 0,
    };
    let look = || {
        loops.ledger.take(batch::Batch::of(std::iter::once(record)));
        in_flight.clear();
        in_flight.len()
    };
    let found = async |in_flight, books: Outstanding| Ok(in_flight + books.ended.len());
    assert_eq!(loops.ledger.tell_outstanding(NodeId(1), look, found).await, Ok(1));
}

async fn record_range(audit: &Audit, functions: std::ops::Range<u64>) {
    for n in functions {
        record_of(&format!("f{n}"), audit, n).unwrap();
    }
    // The rows are written, and the functions wait.
    tokio::time::sleep(ROWS_LINGER * 3).await;
}

#[tokio::test(start_paused = true)]
async fn many_functions_are_written_at_a_pace_and_the_longest_waiting_first() {
    let tables = Arc::new(Tables::default());
    let (audit, loops) = audit(&tables, 10_000, 1 << 30);
    let load = async {
        record_range(&audit, 0..300).await;
        record_range(&audit, 300..600).await;
        // Those that wait already only add up, and keep their place.
        record_range(&audit, 0..300).await;
        tokio::time::sleep(10 * ledger::ROUND).await;
    };
    let started = Instant::now();
    run(&tables, loops, load).await;
    let updated = tables.updated.lock().clone();
    assert_eq!(updated.len(), 600, "one update each");
    let is_early = |id: &FunctionId| id.as_str()[1..].parse::<u64>().unwrap() < 300;
    let in_second = |n: u64| updated.iter().filter(move |(at, _)| (*at - started).as_secs() == n);
    assert_eq!([0, 1, 2, 3, 4].map(|n| in_second(n).count()), [0, 256, 256, 88, 0]);
    // Those of one second are written side by side, in no order.
    let early = [1, 2, 3].map(|n| in_second(n).filter(|(_, id)| is_early(id)).count());
    assert_eq!(early, [256, 44, 0]);
    let invocations: i64 = tables.sums.lock().values().map(|sums| sums.invocations).sum();
    assert_eq!(invocations, 900);
    assert_eq!(audit.metrics.audit.waiting_functions.get(), 0);
}

#[tokio::test(start_paused = true)]
async fn functions_that_wait_are_bounded_and_many_are_written_faster() {
    let tables = Arc::new(Tables::default());
    tables.sums_fail.store(true, Ordering::Relaxed);
    let (audit, mut loops) = audit(&tables, 10_000, 1 << 30);
    let max = 600;
    let (stores, metrics) = (stores(&tables), Arc::clone(&audit.metrics));
    loops.ledger = Arc::new(Ledger::new(stores.clone(), None, Arc::clone(&metrics), max));
    loops.flusher.ledger = Arc::clone(&loops.ledger);
    let lease = Arc::new(NodeLease::endless());
    loops.flusher.writer = Arc::new(RowWriter::new(stores, None, Arc::clone(&loops.ledger), lease, metrics));
    let load = async {
        record_range(&audit, 0..2000).await;
        tokio::time::sleep(5 * ledger::ROUND).await;
        let rows = tables.rows.lock().len();
        assert!((max..max + WRITES_MAX * ROWS_MAX).contains(&rows), "{rows} rows are written");
        tables.sums_fail.store(false, Ordering::Relaxed);
        tokio::time::sleep(4 * ledger::ROUND).await;
        let written = tables.sums.lock().len();
        assert!(written > 1500, "{written} functions are written; at the usual pace it is 1,024");
    };
    run(&tables, loops, load).await;
    assert_eq!((tables.rows.lock().len(), tables.sums.lock().len()), (2000, 2000));
}

#[tokio::test(start_paused = true)]
async fn a_table_that_hangs_does_not_keep_the_end_from_coming() {
    let tables = Arc::new(Tables::default());
    tables.sums_hang.store(true, Ordering::Relaxed);
    let (audit, loops) = audit(&tables, 10, 1 << 20);
    record(&audit, 1).unwrap();
    let started = Instant::now();
    run(&tables, loops, async {}).await;
    assert_eq!(started.elapsed().as_secs(), ledger::POSTING_END_MAX.as_secs());
    assert_eq!((audit.metrics.audit.waiting_rows.get(), audit.metrics.audit.waiting_functions.get()), (0, 1));
}

#[tokio::test]
async fn the_queue_is_bounded_in_rows_and_bytes() {
    let tables = Arc::new(Tables::default());
    let (audit, _loops) = self::audit(&tables, 2, 1 << 20);
    assert_eq!([record(&audit, 1), record(&audit, 2), record(&audit, 3)], [Ok(()), Ok(()), Err(QueueFull)]);
    let (audit, _loops) = self::audit(&tables, 10, 1000);
    assert_eq!([record(&audit, 1), record(&audit, 2)], [Ok(()), Err(QueueFull)]);
}
