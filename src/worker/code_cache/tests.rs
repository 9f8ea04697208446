//! Tests of the code cache with a source in memory and directories on the disk.

use super::*;
use crate::backend::BackendError;
use crate::backend::embedded::scratch::{in_time, zipped};
use crate::metrics::WorkerProcessMetrics;
use crate::worker::code_version::PROGRAM;
use async_trait::async_trait;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;
use tempfile::TempDir;
use tokio::sync::Barrier;

/// Size on the disk of a version with one short file.
const VERSION_BYTES: i64 = 2 * 4096;

/// A source in memory. Its keys are the contents of the file `main.py`.
struct MemorySource {
    fetched: AtomicU64,
    /// One permit per fetch that may go on.
    gate: Semaphore,
    failure: Mutex<Option<BackendError>>,
}

#[async_trait]
impl CodeSource for MemorySource {
    async fn fetch(&self, bucket: &str, s3_key: &str, to: &Path) -> Result<(), FetchError> {
        self.fetched.fetch_add(1, Ordering::Relaxed);
        self.gate.acquire().await.unwrap().forget();
        if let Some(error) = self.failure.lock().take() {
            return Err(error.into());
        }
        let zip = match (bucket, s3_key) {
            ("bucket", "absent") => return Err(FetchError::Missing("There is no such code.".into())),
            ("bucket", "bad") => b"no zip".to_vec(),
            ("bucket", key) => zipped(&[("main.py", key)]),
            (other, _) => zipped(&[("main.py", other)]),
        };
        fs::write(to, zip).unwrap();
        Ok(())
    }
}

/// A cache in a scratch directory.
struct Fixture {
    scratch: TempDir,
    source: Arc<MemorySource>,
    cache: CodeCache,
}

impl Fixture {
    /// `fetches`: how many fetches need no [`Self::let_go`].
    fn new(bytes_max: u64, fetches: usize) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let source = Arc::new(MemorySource {
            fetched: AtomicU64::new(0),
            gate: Semaphore::new(fetches),
            failure: Mutex::default(),
        });
        let cache = open(scratch.path().join("cache"), bytes_max, source.clone());
        Self { scratch, source, cache }
    }

    async fn get(&self, key: &str) -> Result<CachedCode, FetchError> {
        in_time(self.cache.get("bucket", key)).await
    }

    fn fetched(&self) -> u64 {
        self.source.fetched.load(Ordering::Relaxed)
    }

    fn let_go(&self) {
        self.source.gate.add_permits(1);
    }

    fn dir(&self) -> PathBuf {
        self.scratch.path().join("cache")
    }

    fn directories(&self) -> usize {
        fs::read_dir(self.dir()).unwrap().count()
    }

    /// Size of the cache in bytes, number of its versions, and number of those that were deleted.
    fn counts(&self) -> (i64, i64, u64) {
        let metrics = &self.cache.0.metrics.code;
        (metrics.bytes.get(), metrics.versions.get(), metrics.evicted.get())
    }

    fn is_known(&self, key: &str) -> bool {
        let key = VersionKey { bucket: "bucket".into(), s3_key: key.into() };
        self.cache.0.versions.lock().ready.contains_key(&key)
    }
}

fn open(dir: PathBuf, bytes_max: u64, source: Arc<MemorySource>) -> CodeCache {
    let metrics = WorkerProcessMetrics::new().unwrap();
    CodeCache::open(dir, bytes_max, source, metrics.worker).unwrap()
}

async fn until(what: impl Fn() -> bool) {
    in_time(async {
        while !what() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

fn text(code: &CachedCode) -> String {
    fs::read_to_string(code.dir().join("main.py")).unwrap()
}

#[tokio::test]
async fn concurrent_requests_share_one_fetch() {
    let fixture = Fixture::new(u64::MAX, 0);
    let go = async {
        until(|| fixture.fetched() == 1).await;
        fixture.let_go();
    };
    let (a, b, c, ()) = tokio::join!(fixture.get("k"), fixture.get("k"), fixture.get("k"), go);
    let (a, b, c) = (a.unwrap(), b.unwrap(), c.unwrap());
    assert!(a.dir() == b.dir() && b.dir() == c.dir());
    assert_eq!(text(&a), "k");
    assert_eq!(a.file("main.py"), Some(&CodeFile { path: "main.py".into(), is_executable: false }));
    assert_eq!((a.file("main"), a.files().len()), (None, 1));
    drop((a, b, c));
    fixture.get("k").await.unwrap();
    assert_eq!((fixture.fetched(), fixture.counts()), (1, (VERSION_BYTES, 1, 0)));
    // The key of another bucket is another version.
    fixture.let_go();
    let other = in_time(fixture.cache.get("other", "k")).await.unwrap();
    assert_eq!((text(&other), fixture.fetched()), ("other".to_owned(), 2));
}

#[tokio::test]
async fn failures_are_shared_and_not_kept() {
    let fixture = Fixture::new(u64::MAX, 0);
    let away = BackendError::Unavailable("S3 does not answer".into());
    *fixture.source.failure.lock() = Some(away.clone());
    let go = async {
        until(|| fixture.fetched() == 1).await;
        fixture.let_go();
    };
    let (a, b, ()) = tokio::join!(fixture.get("k"), fixture.get("k"), go);
    for failed in [a, b] {
        assert!(matches!(failed, Err(FetchError::Away(e)) if e == away));
    }
    assert!(fixture.cache.0.versions.lock().fetching.is_empty());
    fixture.let_go();
    assert_eq!(text(&fixture.get("k").await.unwrap()), "k");
    assert_eq!(fixture.fetched(), 2);
    for (key, told) in [("absent", "no such code"), ("bad", "not a valid zip")] {
        fixture.let_go();
        let Err(FetchError::Missing(reason)) = fixture.get(key).await else { panic!("{key}") };
        assert!(reason.contains(told), "{key}: {reason}");
    }
    assert_eq!((fixture.directories(), fixture.counts()), (1, (VERSION_BYTES, 1, 0)));
}

#[tokio::test]
async fn a_fetch_ends_when_nobody_waits_for_it() {
    let fixture = Fixture::new(u64::MAX, 0);
    {
        let (first, second) = (fixture.get("k"), fixture.get("k"));
        tokio::pin!(second);
        tokio::select! {
            _ = first => panic!("nothing was let go"),
            _ = &mut second => panic!("nothing was let go"),
            () = until(|| fixture.fetched() == 1) => {}
        }
        // One of the two is gone, so the fetch goes on.
        assert_eq!((&mut second).now_or_never().map(drop), None);
        assert_eq!((fixture.fetched(), fixture.directories()), (1, 1));
    }
    assert!(fixture.cache.0.versions.lock().fetching.is_empty());
    until(|| fixture.directories() == 0).await;
    fixture.let_go();
    assert_eq!(text(&fixture.get("k").await.unwrap()), "k");
    assert_eq!(fixture.fetched(), 2);
}

#[tokio::test]
async fn a_waiter_that_leaves_does_not_cancel_the_others() {
    let fixture = Fixture::new(u64::MAX, 0);
    let second = fixture.get("k");
    tokio::pin!(second);
    {
        let first = fixture.get("k");
        tokio::select! {
            biased;
            _ = first => panic!("nothing was let go"),
            _ = &mut second => panic!("nothing was let go"),
            () = until(|| fixture.fetched() == 1) => {}
        }
    }
    fixture.let_go();
    assert_eq!(text(&second.await.unwrap()), "k");
    assert_eq!(fixture.fetched(), 1);
}

#[tokio::test]
async fn the_least_recently_used_version_is_deleted() {
    let fixture = Fixture::new(2 * VERSION_BYTES as u64, 100);
    let first = fixture.get("first").await.unwrap();
    fixture.get("second").await.unwrap();
    // Its use ends now, after that of the second one.
    drop(first);
    fixture.get("third").await.unwrap();
    assert!(fixture.is_known("first") && !fixture.is_known("second") && fixture.is_known("third"));
    assert_eq!(fixture.counts(), (2 * VERSION_BYTES, 2, 1));
    until(|| fixture.directories() == 2).await;
    fixture.cache.set_bytes_max(VERSION_BYTES as u64);
    assert!(!fixture.is_known("first") && fixture.is_known("third"));
    until(|| fixture.directories() == 1).await;
}

#[tokio::test]
async fn code_in_use_is_not_deleted() {
    let fixture = Fixture::new(0, 100);
    let held = fixture.get("held").await.unwrap();
    let clone = held.clone();
    let other = fixture.get("other").await.unwrap();
    drop(held);
    assert_eq!(fixture.counts(), (2 * VERSION_BYTES, 2, 0));
    assert_eq!((text(&clone), text(&other)), ("held".to_owned(), "other".to_owned()));
    drop(other);
    assert!(fixture.is_known("held") && !fixture.is_known("other"));
    let slot = fixture.scratch.path().join("slot");
    fs::create_dir(&slot).unwrap();
    clone.link_into(&slot, false).unwrap();
    drop(clone);
    until(|| fixture.directories() == 0).await;
    assert_eq!(fixture.counts(), (0, 0, 2));
    // A link keeps its file.
    assert_eq!(fs::read_to_string(slot.join("main.py")).unwrap(), "held");
}

#[test]
fn a_cache_without_a_runtime_deletes_on_the_spot() {
    let fixture = Fixture::new(u64::MAX, 100);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let code = runtime.block_on(fixture.get("k")).unwrap();
    fixture.cache.set_bytes_max(0);
    assert_eq!(fixture.directories(), 1);
    drop(code);
    assert_eq!(fixture.directories(), 0);
}

#[tokio::test]
async fn a_start_deletes_what_it_finds() {
    let fixture = Fixture::new(u64::MAX, 100);
    let Fixture { scratch, source, cache } = fixture;
    let dir = scratch.path().join("cache");
    drop(cache);
    fs::create_dir_all(dir.join("new-7/code/deep")).unwrap();
    fs::write(dir.join("new-7/code/deep/half"), "").unwrap();
    let cache = open(dir.clone(), u64::MAX, source);
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
    assert_eq!(fs::metadata(&dir).unwrap().permissions().mode() & 0o777, 0o711);
    in_time(cache.get("bucket", "k")).await.unwrap();
}

#[tokio::test]
async fn an_error_of_the_disk_names_the_directory() {
    let fixture = Fixture::new(u64::MAX, 100);
    fs::remove_dir(fixture.dir()).unwrap();
    let Err(FetchError::Away(e)) = fixture.get("k").await else { panic!() };
    assert!(e.to_string().contains(fixture.dir().to_str().unwrap()), "{e}");
    fs::create_dir(fixture.dir()).unwrap();
    fixture.get("k").await.unwrap();
    let full = fixture.cache.0.disk_failed(&io::ErrorKind::StorageFull.into());
    assert!(full.to_string().contains("is full"), "{full}");
    assert_eq!(fixture.counts(), (0, 0, 1));
    until(|| fixture.directories() == 0).await;
}

#[tokio::test]
async fn a_version_is_compiled_once() {
    let fixture = Fixture::new(u64::MAX, 100);
    let code = fixture.get("k").await.unwrap();
    let compiled = AtomicU64::new(0);
    let meeting = Barrier::new(2);
    let (compiled, meeting) = (&compiled, &meeting);
    let compile = move |dir: PathBuf| async move {
        compiled.fetch_add(1, Ordering::Relaxed);
        meeting.wait().await;
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
        fs::write(dir.join(PROGRAM), "program").unwrap();
        Ok::<(), FetchError>(())
    };
    let both = async { tokio::join!(code.compiled(compile), code.compiled(compile), meeting.wait()) };
    let (a, b, _) = in_time(both).await;
    assert!(a.is_ok() && b.is_ok() && compiled.load(Ordering::Relaxed) == 1);
    assert_eq!(fixture.counts(), (VERSION_BYTES + 2 * 4096, 1, 0));
    let slot = tempfile::tempdir().unwrap();
    code.link_into(slot.path(), false).unwrap();
    assert_eq!(fs::read_to_string(slot.path().join(PROGRAM)).unwrap(), "program");
    let version = code.dir().parent().unwrap().to_owned();
    assert_eq!(fs::read_dir(version).unwrap().count(), 1, "only the code is left");
    drop(code);
    fixture.cache.set_bytes_max(0);
    assert_eq!(fixture.counts(), (0, 0, 1));
}

#[tokio::test]
async fn only_an_error_of_the_code_is_kept() {
    let fixture = Fixture::new(u64::MAX, 100);
    let code = fixture.get("k").await.unwrap();
    let away = || FetchError::Away(BackendError::Unavailable("no memory".into()));
    let failed = in_time(code.compiled(|_| async move { Err(away()) })).await;
    assert!(matches!(failed, Err(FetchError::Away(_))));
    for text in ["line 7: unknown name", "not called"] {
        let failed = in_time(code.compiled(|_| async move { Err(FetchError::Missing(text.into())) })).await;
        let Err(FetchError::Missing(reason)) = failed else { panic!("{text}") };
        assert_eq!(reason, "line 7: unknown name");
    }
    let slot = tempfile::tempdir().unwrap();
    code.link_into(slot.path(), false).unwrap();
    assert!(!slot.path().join(PROGRAM).exists());
    assert_eq!(fixture.counts(), (VERSION_BYTES, 1, 0));
}
