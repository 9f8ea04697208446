//! One SQLite file: a writer thread that commits in groups, and a few connections that read.
//!
//! A commit waits for the disk, so the rate of commits is bounded and the rate of records is not: whatever waits
//! while one commit is under way goes into the next. A fixed linger was rejected, since it adds its own length to
//! every lone call; instead the writer waits for as many writes as the last commit had, and 2 ms at the most.
//!
//! Each write stands in its own savepoint, so one that fails takes no other with it.

mod writer;

use crate::backend::BackendError;
use nix::fcntl::{Flock, FlockArg};
use rusqlite::{Connection, OpenFlags};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use writer::{Pending, Queued, Writer};

/// Most writes that wait for the writer. When so many wait, the next caller waits too (asynchronously).
const WRITES_MAX: usize = 4_096;
/// Most reads at once, and most connections that read. Further readers wait.
const READS_MAX: usize = 4;
/// How long SQLite waits for a lock. Only a checkpoint or an outside tool can hold one.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Most prepared statements a connection keeps; more than there are statements in this backend.
const STATEMENTS_MAX: usize = 64;
/// What `PRAGMA user_version` says of a file this program can read.
const SCHEMA_VERSION: i64 = 1;

const DATABASE_FILE: &str = "infra.sqlite";
const LOCK_FILE: &str = "lock";

/// Why a directory could not be opened.
#[derive(Debug)]
pub(super) enum OpenError {
    /// Another process works in it.
    Locked,
    /// The file was written by a later version of this program, with this schema.
    Newer(i64),
    Failed(BackendError),
}

impl From<rusqlite::Error> for OpenError {
    fn from(e: rusqlite::Error) -> Self {
        Self::Failed(failed(&e))
    }
}

impl From<std::io::Error> for OpenError {
    fn from(e: std::io::Error) -> Self {
        Self::Failed(BackendError::Invalid(e.to_string()))
    }
}

/// Why a write is not (known to be) durable.
#[derive(Clone, Debug)]
pub(super) enum WriteError {
    /// Nothing of it will ever be seen.
    NotApplied(BackendError),
    /// The commit itself failed, or was not heard of.
    Unknown(BackendError),
}

impl From<WriteError> for BackendError {
    fn from(e: WriteError) -> Self {
        match e {
            WriteError::NotApplied(e) | WriteError::Unknown(e) => e,
        }
    }
}

/// A handle; clones share one file, one writer and one lock. Dropping the last one commits what waits, ends the
/// writer thread and then frees the directory.
#[derive(Clone)]
pub(super) struct Database(Arc<Shared>);

struct Shared {
    /// `None` only while it is being dropped.
    inbox: Option<SyncSender<Queued>>,
    room: Arc<Semaphore>,
    writer: Option<JoinHandle<()>>,
    readers: Arc<Readers>,
    /// The last field, so that it is freed last.
    _lock: Flock<File>,
}

struct Readers {
    path: PathBuf,
    turns: Arc<Semaphore>,
    idle: Mutex<Vec<Connection>>,
}

impl Database {
    /// Locks `dir`, opens or makes the file in it, and starts the writer thread: SQLite connections are bound to
    /// no runtime, and a file that is open without its writer could be read but never repaired.
    pub(super) fn open(dir: &Path) -> Result<Self, OpenError> {
        std::fs::create_dir_all(dir)?;
        let file = File::options().create(true).truncate(false).write(true).open(dir.join(LOCK_FILE))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| match e {
            nix::errno::Errno::EWOULDBLOCK => OpenError::Locked,
            e => OpenError::Failed(BackendError::Invalid(e.to_string())),
        })?;
        let path = dir.join(DATABASE_FILE);
        let mut connection = Connection::open(&path)?;
        prepare(&connection)?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        migrate(&mut connection)?;

        let (inbox, outbox) = sync_channel(WRITES_MAX);
        let writer = Writer::new(connection, outbox);
        let writer = std::thread::Builder::new().name("sqlite-writer".into()).spawn(move || writer.run())?;
        Ok(Self(Arc::new(Shared {
            inbox: Some(inbox),
            room: Arc::new(Semaphore::new(WRITES_MAX)),
            writer: Some(writer),
            readers: Arc::new(Readers {
                path,
                turns: Arc::new(Semaphore::new(READS_MAX)),
                idle: Mutex::new(Vec::new()),
            }),
            _lock: lock,
        })))
    }

    /// Runs `op` in the next transaction and returns after its commit. `records` is how many rows it writes, for
    /// the size of a transaction. Once it has been handed over it is done even if this future is dropped.
    pub(super) async fn write<T: Send + 'static>(
        &self,
        records: usize,
        op: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, WriteError> {
        let room = self.0.room.clone().acquire_owned().await.map_err(|_| stopped())?;
        let (reply, outcome) = oneshot::channel();
        let write = Pending::new(op, records, reply);
        let inbox = self.0.inbox.as_ref().ok_or_else(stopped)?;
        // It never blocks: there are as many places as there are permits.
        inbox.send(Queued { write: Box::new(write), room }).map_err(|_| stopped())?;
        let lost = || WriteError::Unknown(BackendError::Unavailable("the writer broke off".into()));
        outcome.await.map_err(|_| lost())?
    }

    /// Runs `op` on a connection of its own, off the asynchronous threads. It sees every write that has returned.
    pub(super) async fn read<T: Send + 'static>(
        &self,
        op: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, BackendError> {
        let readers = self.0.readers.clone();
        let turn = readers.turns.clone().acquire_owned().await;
        let turn = turn.map_err(|_| BackendError::Unavailable("the readers have stopped".into()))?;
        // The turn goes along: if this future is dropped, the thread still has the connection.
        let read = tokio::task::spawn_blocking(move || readers.run(turn, op));
        match read.await {
            Ok(outcome) => outcome.map_err(|e| failed(&e)),
            Err(_) => Err(BackendError::Unavailable("a read broke off".into())),
        }
    }
}

impl Drop for Shared {
    /// Blocks for the length of the last commits: who drops the last handle wants them done.
    fn drop(&mut self) {
        drop(self.inbox.take());
        if let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            tracing::error!("the database writer panicked");
        }
    }
}

impl Readers {
    fn run<T>(
        &self,
        _turn: OwnedSemaphorePermit,
        op: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<T> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let connection = idle.map_or_else(|| self.connect(), Ok)?;
        let outcome = op(&connection);
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
        outcome
    }

    fn connect(&self) -> rusqlite::Result<Connection> {
        // Not read-only: a reader of a WAL file takes part in its locks.
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(&self.path, flags)?;
        prepare(&connection)?;
        connection.pragma_update(None, "query_only", true)?;
        Ok(connection)
    }
}

fn prepare(connection: &Connection) -> rusqlite::Result<()> {
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.set_prepared_statement_cache_capacity(STATEMENTS_MAX);
    Ok(())
}

fn migrate(connection: &mut Connection) -> Result<(), OpenError> {
    let found: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    match found {
        SCHEMA_VERSION => Ok(()),
        0 => {
            let tx = connection.transaction()?;
            tx.execute_batch(include_str!("schema.sql"))?;
            tx.pragma_update(None, "user_version", SCHEMA_VERSION)?;
            Ok(tx.commit()?)
        }
        newer => Err(OpenError::Newer(newer)),
    }
}

/// Our error for SQLite's. Its text names tables and codes, never values.
fn failed(e: &rusqlite::Error) -> BackendError {
    let text = format!("SQLite: {e}");
    match e.sqlite_error_code() {
        Some(rusqlite::ErrorCode::TooBig | rusqlite::ErrorCode::NotADatabase) => BackendError::Invalid(text),
        _ => BackendError::Unavailable(text),
    }
}

fn stopped() -> WriteError {
    WriteError::NotApplied(BackendError::Unavailable("the writer has stopped".into()))
}

/// SQLite's integers are signed; what is larger is kept as the largest.
pub(super) fn integer(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// The inverse of [`integer`]: no column of ours holds a negative number.
pub(super) fn unsigned(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}
