//! The code of functions, fetched and unpacked once a version.
//!
//! A version is an archive: a key never changes its contents. Concurrent requests for one version share one
//! fetch. If all of them are dropped, the fetch is cancelled. A failure is shared by those who wait for it,
//! and not kept: the next request fetches again.
//!
//! Code in use is never deleted. The bound of bytes holds for the rest, so the cache exceeds it only while
//! the code in use does. Archives that are being unpacked come on top.
//!
//! A start deletes what it finds. Keeping it would need checksums of all files, because nothing is synced and
//! a crash may leave empty ones. Reading them takes as long as fetching those that are needed.

use super::code_version::{ARCHIVE, CodeFile, CodeVersion, UnpackError, disk_away};
use super::owned_dir::{self, OwnedDir};
use crate::ambient;
use crate::backend::{CodeSource, FetchError};
use crate::metrics::WorkerMetrics;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared, WeakShared};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::time::Instant;

/// Most versions in the cache.
const VERSIONS_MAX: usize = 1_000;
/// Most archives that are fetched and unpacked at once. Each may take the size of the archive and of its
/// contents on the disk, and a thread. Further ones wait.
const FETCHES_MAX: usize = 4;
/// Mode of the directory: functions that run as other users find their code, but cannot list the rest.
const DIRECTORY_MODE: u32 = 0o711;

/// The cache of a worker. Clones share it.
#[derive(Clone)]
pub(super) struct CodeCache(Arc<CodeCacheState>);

struct CodeCacheState {
    source: Arc<dyn CodeSource>,
    dir: PathBuf,
    bytes_max: AtomicU64,
    versions: Mutex<Versions>,
    /// One permit per fetch.
    fetches: Semaphore,
    /// Counts requests and fetches. Its values order uses, and name directories.
    clock: AtomicU64,
    metrics: Arc<WorkerMetrics>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct VersionKey {
    bucket: String,
    s3_key: String,
}

type VersionFetch = BoxFuture<'static, Result<Arc<CodeVersion>, FetchError>>;

#[derive(Default)]
struct Versions {
    ready: HashMap<VersionKey, Arc<CodeVersion>>,
    /// Fetches in progress, with their numbers. Only those who wait keep a fetch alive.
    fetching: HashMap<VersionKey, (u64, WeakShared<VersionFetch>)>,
    /// Size of the versions that are ready.
    bytes: u64,
}

/// Code in use. It is not deleted before the last clone is dropped.
#[derive(Clone)]
pub(super) struct CachedCode {
    version: Arc<CodeVersion>,
    // Dropped after `version`, so that the version counts as unused.
    cache: TrimOnDrop,
}

/// Applies the bounds of the cache on drop: code that was in use may have exceeded them.
#[derive(Clone)]
struct TrimOnDrop(Arc<CodeCacheState>);

/// Takes a fetch off the list, when it has ended or was cancelled.
struct FetchEntry {
    cache: Arc<CodeCacheState>,
    key: VersionKey,
    number: u64,
}

impl CodeCache {
    /// Creates the directory, and deletes what an earlier process has left in it. `bytes_max`: most bytes on
    /// the disk. Blocks.
    pub(super) fn open(
        dir: PathBuf,
        bytes_max: u64,
        source: Arc<dyn CodeSource>,
        metrics: Arc<WorkerMetrics>,
    ) -> io::Result<Self> {
        owned_dir::make_empty(&dir, DIRECTORY_MODE)
            .map_err(|e| io::Error::new(e.kind(), format!("the code cache in {}: {e}", dir.display())))?;
        Ok(Self(Arc::new(CodeCacheState {
            source,
            dir,
            bytes_max: AtomicU64::new(bytes_max),
            versions: Mutex::default(),
            fetches: Semaphore::new(FETCHES_MAX),
            clock: AtomicU64::new(0),
            metrics,
        })))
    }

    /// The code under `s3_key` of `bucket`.
    ///
    /// # Errors
    /// [`FetchError::Missing`] if there is no such code, or if it is not a valid archive: a sentence for the
    /// owner of the function. [`FetchError::Away`] if the source does not answer, or if the disk of this
    /// worker fails or is full: the job stays on the queue.
    pub(super) async fn get(&self, bucket: &str, s3_key: &str) -> Result<CachedCode, FetchError> {
        let key = VersionKey { bucket: bucket.to_owned(), s3_key: s3_key.to_owned() };
        let version = match self.0.find(key) {
            Found::Ready(version) => version,
            Found::Fetch(fetch) => fetch.await?,
        };
        Ok(CachedCode { version, cache: TrimOnDrop(self.0.clone()) })
    }

    /// Sets the most bytes on the disk.
    pub(super) fn set_bytes_max(&self, bytes_max: u64) {
        self.0.bytes_max.store(bytes_max, Ordering::Relaxed);
        self.0.trim();
    }
}

enum Found {
    Ready(Arc<CodeVersion>),
    Fetch(Shared<VersionFetch>),
}

impl CodeCacheState {
    fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::Relaxed)
    }

    fn find(self: &Arc<Self>, key: VersionKey) -> Found {
        let now = self.tick();
        let mut versions = self.versions.lock();
        if let Some(version) = versions.ready.get(&key) {
            self.metrics.code.looked_up(true);
            version.used_at.store(now, Ordering::Relaxed);
            return Found::Ready(version.clone());
        }
        if let Some(fetch) = versions.fetching.get(&key).and_then(|(_, fetch)| fetch.upgrade()) {
            self.metrics.code.looked_up(true);
            return Found::Fetch(fetch);
        }
        self.metrics.code.looked_up(false);
        let fetch = self.clone().fetch(key.clone(), now).boxed().shared();
        if let Some(weak) = fetch.downgrade() {
            versions.fetching.insert(key, (now, weak));
        }
        Found::Fetch(fetch)
    }

    async fn fetch(self: Arc<Self>, key: VersionKey, number: u64) -> Result<Arc<CodeVersion>, FetchError> {
        let _entry = FetchEntry { cache: self.clone(), key: key.clone(), number };
        let started = Instant::now();
        let version = Arc::new(self.make(&key, number).await?);
        self.metrics.code.fetch_seconds.observe(started.elapsed().as_secs_f64());
        self.add(key, &version);
        Ok(version)
    }

    async fn make(&self, key: &VersionKey, number: u64) -> Result<CodeVersion, FetchError> {
        // Never closed.
        let _permit = self.fetches.acquire().await;
        let draft = self.dir.join(format!("new-{number}"));
        let draft = ambient::blocking(move || OwnedDir::create(draft, 0o700)).await;
        let draft = draft.map_err(|e| self.disk_failed(&e))?;
        self.source.fetch(&key.bucket, &key.s3_key, &draft.path().join(ARCHIVE)).await?;
        let place = self.dir.join(number.to_string());
        // The thread owns the directory, because it still unpacks into it if this future is dropped.
        let version = ambient::blocking(move || CodeVersion::unpack(draft, place)).await;
        version.map_err(|e| match e {
            UnpackError::Archive(reason) => FetchError::Missing(reason),
            UnpackError::Disk(e) => self.disk_failed(&e),
        })
    }

    /// If the disk is full, deletes all that is not in use: the cache is not the only user of the disk.
    fn disk_failed(&self, e: &io::Error) -> FetchError {
        if e.kind() == io::ErrorKind::StorageFull {
            self.evict(0, 0);
        }
        disk_away(&self.dir, e)
    }

    fn add(&self, key: VersionKey, version: &Arc<CodeVersion>) {
        version.used_at.store(self.tick(), Ordering::Relaxed);
        let mut versions = self.versions.lock();
        versions.bytes += version.bytes();
        // There is none: as long as a fetch lasts, no other one of this version begins.
        let twin = versions.ready.insert(key, version.clone());
        versions.bytes -= twin.as_ref().map_or(0, |twin| twin.bytes());
        drop(versions);
        delete(twin.into_iter().collect());
        self.trim();
    }

    /// Deletes code that is not in use, until the bounds hold.
    fn trim(&self) {
        self.evict(self.bytes_max.load(Ordering::Relaxed), VERSIONS_MAX);
    }

    fn evict(&self, bytes_max: u64, versions_max: usize) {
        let mut versions = self.versions.lock();
        let evicted = versions.evict(bytes_max, versions_max);
        let metrics = &self.metrics.code;
        metrics.bytes.set(versions.bytes.try_into().unwrap_or(i64::MAX));
        metrics.versions.set(versions.ready.len() as i64);
        drop(versions);
        metrics.evicted.inc_by(evicted.len() as u64);
        delete(evicted);
    }

    /// Counts a program that was compiled from code in use.
    fn grow(&self, bytes: u64) {
        self.versions.lock().bytes += bytes;
        self.trim();
    }
}

/// Deletes directories, on a thread that may block.
fn delete(evicted: Vec<Arc<CodeVersion>>) {
    if evicted.is_empty() {
        return;
    }
    match Handle::try_current() {
        Ok(runtime) => {
            runtime.spawn_blocking(move || drop(evicted));
        }
        Err(_) => drop(evicted),
    }
}

impl Versions {
    /// Takes out versions that are not in use, the least recently used one first, until the bounds hold.
    fn evict(&mut self, bytes_max: u64, versions_max: usize) -> Vec<Arc<CodeVersion>> {
        let mut evicted = Vec::new();
        while self.bytes > bytes_max || self.ready.len() > versions_max {
            // Nobody else can get a reference to it, because this is locked.
            let unused = self.ready.iter().filter(|(_, version)| Arc::strong_count(version) == 1);
            let oldest = unused.min_by_key(|(_, version)| version.used_at.load(Ordering::Relaxed));
            let Some(key) = oldest.map(|(key, _)| key.clone()) else { break };
            if let Some(version) = self.ready.remove(&key) {
                self.bytes -= version.bytes();
                evicted.push(version);
            }
        }
        evicted
    }
}

impl Drop for FetchEntry {
    fn drop(&mut self) {
        let mut versions = self.cache.versions.lock();
        // After a cancelled fetch, the next one may be on the list already.
        if versions.fetching.get(&self.key).is_some_and(|(number, _)| *number == self.number) {
            versions.fetching.remove(&self.key);
        }
    }
}

impl Drop for TrimOnDrop {
    fn drop(&mut self) {
        self.0.trim();
    }
}

impl Drop for CachedCode {
    fn drop(&mut self) {
        // An instance may have used it since the request.
        self.version.used_at.store(self.cache.0.tick(), Ordering::Relaxed);
    }
}

impl CachedCode {
    /// The directory of the code. Nobody may write in it.
    pub(super) fn dir(&self) -> &Path {
        self.version.code()
    }

    /// The files of the archive, in the order of their paths.
    pub(super) fn files(&self) -> &[CodeFile] {
        self.version.files()
    }

    /// The file at `path` in the archive.
    pub(super) fn file(&self, path: &str) -> Option<&CodeFile> {
        let files = self.files();
        let at = files.binary_search_by(|file| file.path.as_path().cmp(Path::new(path))).ok()?;
        Some(&files[at])
    }

    /// Makes the code appear in an empty directory of a slot, by hard links. `as_copies`: by copies, because
    /// the function could change the linked files. Blocks.
    ///
    /// # Errors
    /// Names the directory, in which some of the files may be.
    pub(super) fn link_into(&self, slot_function_dir: &Path, as_copies: bool) -> io::Result<()> {
        self.version.link_into(slot_function_dir, as_copies)
    }

    /// Compiles the code, unless that is done. `compile` gets an empty directory, which only the user of the
    /// worker may enter, and writes the program there as the file `main`. From then on `main` is part of
    /// [`Self::dir`] and of [`Self::link_into`], as long as the version is cached. Concurrent callers share
    /// one compilation.
    ///
    /// # Errors
    /// [`FetchError::Missing`]: the owner of the function can correct it. It is kept with the version,
    /// because the same code fails again. [`FetchError::Away`] is not kept.
    pub(super) async fn compiled<F>(&self, compile: impl FnOnce(PathBuf) -> F) -> Result<(), FetchError>
    where
        F: Future<Output = Result<(), FetchError>>,
    {
        self.version.compiled(compile, |bytes| self.cache.0.grow(bytes)).await
    }
}

#[cfg(test)]
mod tests;
