//! One SQLite file: a writer thread with group commit, and a few connections for reads.
//!
//! A commit waits for the disk. So the rate of commits is bounded, but the rate of records is not: writes
//! that arrive during a commit go into the next one. A write that is alone does not wait; see [`writer`].
//!
//! Each write has its own savepoint, so that a failed write does not affect the others.

pub mod error;
mod writer;

use crate::backend::BackendError;
use crate::backend::embedded::database::error::{WriteError, failed, integer};
use nix::fcntl::{Flock, FlockArg};
use parking_lot::Mutex;
use rusqlite::{Connection, ErrorCode, OpenFlags};
use std::fs::{self, File};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
pub(super) use writer::Durability;
use writer::{DatabaseWriter, PendingWrite, QueuedWrite};

/// Most pending writes. When it is full, the next caller waits asynchronously.
const WRITES_MAX: usize = 4_096;
/// Most concurrent reads, and most connections for reads. Further readers wait.
const READS_MAX: usize = 4;
/// How long SQLite waits for a lock. Only a checkpoint or an external tool can hold one.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Most cached prepared statements of a connection. This backend has fewer statements.
const STATEMENTS_MAX: usize = 64;
/// The migrations from an empty file to the current tables. `PRAGMA user_version` counts those applied.
const SCHEMA_STEPS: [&str; 8] = [
    include_str!("schema.sql"),
    include_str!("schema_2.sql"),
    include_str!("schema_3.sql"),
    include_str!("schema_4.sql"),
    include_str!("schema_5.sql"),
    include_str!("schema_6.sql"),
    include_str!("schema_7.sql"),
    include_str!("schema_8.sql"),
];
pub(super) const SCHEMA_VERSION: usize = SCHEMA_STEPS.len();

/// Largest file that is checked for damage at start, in bytes. The check of such a file takes about 0.1 s.
const CHECKED_BYTES_MAX: u64 = 64 << 20;

pub(super) const DATABASE_FILE: &str = "infra.sqlite";
const LOCK_FILE: &str = "lock";

/// Why a directory could not be opened.
#[derive(Debug)]
pub enum OpenError {
    /// Another process uses it.
    Locked,
    /// The file was written by a later version of this program, with this schema.
    Newer(i64),
    /// The file contains the tables of another program.
    Foreign(String),
    Corrupt(String),
    /// (name, kind): a file of this backend is not a regular file.
    NotAFile(&'static str, &'static str),
    Io(std::io::Error),
    Sqlite(rusqlite::Error),
}

impl From<rusqlite::Error> for OpenError {
    fn from(e: rusqlite::Error) -> Self {
        match e.sqlite_error_code() {
            Some(ErrorCode::DatabaseCorrupt) => Self::Corrupt(e.to_string()),
            // The statements or types of this program do not match the tables.
            Some(ErrorCode::Unknown) | None => Self::Foreign(match e {
                rusqlite::Error::SqlInputError { msg, .. } => msg,
                e => e.to_string(),
            }),
            Some(_) => Self::Sqlite(e),
        }
    }
}

impl From<std::io::Error> for OpenError {
    fn from(e: std::io::Error) -> Self {
        Self::Io(e)
    }
}

impl From<WriteError> for BackendError {
    fn from(e: WriteError) -> Self {
        match e {
            WriteError::NotApplied(e) | WriteError::Unknown(e) => e,
        }
    }
}

/// The outcome of a write that is queued.
type QueuedOutcome<T> = oneshot::Receiver<Result<T, WriteError>>;

async fn done<T>(outcome: QueuedOutcome<T>) -> Result<T, WriteError> {
    let lost = || WriteError::Unknown(BackendError::Unavailable("the database writer panicked".into()));
    outcome.await.map_err(|_| lost())?
}

/// A handle. Clones share one file, one writer and one lock. Dropping the last clone commits the pending
/// writes, ends the writer thread, and then frees the directory.
#[derive(Clone)]
pub(super) struct Database(Arc<SharedDatabase>);

struct SharedDatabase {
    /// `None` only during the drop.
    inbox: Option<SyncSender<QueuedWrite>>,
    room: Arc<Semaphore>,
    writer: Option<JoinHandle<()>>,
    readers: Arc<Readers>,
    /// The last field, so that it is released last.
    _lock: Flock<File>,
}

struct Readers {
    path: PathBuf,
    turns: Arc<Semaphore>,
    idle: Mutex<Vec<Connection>>,
}

impl Database {
    /// Locks `dir`, opens or creates the database in it, calls `first`, and starts the writer thread. `boot`
    /// does not start the thread, because it must outlive the runtime to commit the writes of the last tasks.
    pub(super) fn open<T>(
        dir: &Path,
        first: impl FnOnce(&Connection) -> Result<T, OpenError>,
    ) -> Result<(Self, T), OpenError> {
        // Opening a FIFO or a device could block forever.
        [LOCK_FILE, DATABASE_FILE].into_iter().try_for_each(|name| check_kind(dir, name))?;
        let file = File::options().create(true).truncate(false).write(true).open(dir.join(LOCK_FILE))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| match e {
            nix::errno::Errno::EWOULDBLOCK => OpenError::Locked,
            e => OpenError::Io(e.into()),
        })?;
        let path = dir.join(DATABASE_FILE);
        let mut connection = Connection::open(&path)?;
        prepare(&connection)?;
        check(&connection, &path)?;
        // Check the version before anything is written.
        let version = schema_version(&connection)?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        migrate(&mut connection, version)?;
        let made = first(&connection)?;

        let (inbox, outbox) = sync_channel(WRITES_MAX);
        let writer = DatabaseWriter::new(connection, outbox, log_of(&path));
        let writer = std::thread::Builder::new().name("sqlite-writer".into()).spawn(move || writer.run())?;
        let database = Self(Arc::new(SharedDatabase {
            inbox: Some(inbox),
            room: Arc::new(Semaphore::new(WRITES_MAX)),
            writer: Some(writer),
            readers: Arc::new(Readers {
                path,
                turns: Arc::new(Semaphore::new(READS_MAX)),
                idle: Mutex::new(Vec::new()),
            }),
            _lock: lock,
        }));
        Ok((database, made))
    }

    /// Runs `op` in the next transaction and returns after the commit. `records` is the number of rows that
    /// it writes, which bounds the size of a transaction. Once queued, it runs even if this future is
    /// dropped.
    pub(super) async fn write<T: Send + 'static>(
        &self,
        records: usize,
        op: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, WriteError> {
        self.write_as(Durability::Flushed, records, op).await
    }

    /// The same without a flush of the disk. It survives the end of the process, but not a power failure,
    /// unless [`Self::write`] has returned later: the disk gets all writes in their order. If no other write
    /// follows, it is flushed soon.
    pub(super) async fn write_ordered<T: Send + 'static>(
        &self,
        records: usize,
        op: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, WriteError> {
        self.write_as(Durability::Ordered, records, op).await
    }

    /// One of the two.
    pub(super) async fn write_as<T: Send + 'static>(
        &self,
        durability: Durability,
        records: usize,
        op: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, WriteError> {
        done(self.enqueue(records, durability, op).await?).await
    }

    /// The same, but does not wait for the write. Later writes come after it. If it fails, nobody learns it.
    pub(super) async fn begin_ordered(
        &self,
        records: usize,
        op: impl FnOnce(&Connection) -> rusqlite::Result<()> + Send + 'static,
    ) -> Result<(), WriteError> {
        self.enqueue(records, Durability::Ordered, op).await.map(drop)
    }

    async fn enqueue<T: Send + 'static>(
        &self,
        records: usize,
        durability: Durability,
        op: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<QueuedOutcome<T>, WriteError> {
        let room = self.0.room.clone().acquire_owned().await.map_err(|_| stopped())?;
        let (reply, outcome) = oneshot::channel();
        let write = PendingWrite::new(op, records, durability, reply);
        let inbox = self.0.inbox.as_ref().ok_or_else(stopped)?;
        // This never blocks, because the channel has a slot for each permit.
        inbox.send(QueuedWrite { write: Box::new(write), room }).map_err(|_| stopped())?;
        Ok(outcome)
    }

    /// Runs `op` on a separate connection, on a blocking thread. It sees every write that has returned.
    pub(super) async fn read<T: Send + 'static>(
        &self,
        op: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, BackendError> {
        let readers = self.0.readers.clone();
        let turn = readers.turns.clone().acquire_owned().await;
        let turn = turn.map_err(|_| BackendError::Unavailable("the database readers have stopped".into()))?;
        // The thread owns the permit, because it uses the connection even if this future is dropped.
        let read = tokio::task::spawn_blocking(move || readers.run(turn, op));
        match read.await {
            Ok(outcome) => outcome.map_err(|e| failed(&e)),
            Err(_) => Err(BackendError::Unavailable("a read of the database panicked".into())),
        }
    }
}

impl Drop for SharedDatabase {
    /// Blocks until the last commits are done, so that no pending write is lost.
    fn drop(&mut self) {
        drop(self.inbox.take());
        if let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            tracing::error!("The database writer panicked; the last writes may be lost");
        }
    }
}

impl Readers {
    fn run<T>(
        &self,
        _turn: OwnedSemaphorePermit,
        op: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<T> {
        let idle = self.idle.lock().pop();
        let connection = idle.map_or_else(|| self.connect(), Ok)?;
        let outcome = op(&connection);
        self.idle.lock().push(connection);
        outcome
    }

    fn connect(&self) -> rusqlite::Result<Connection> {
        // Not read-only, because a reader of a WAL database takes part in its locking.
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(&self.path, flags)?;
        prepare(&connection)?;
        connection.pragma_update(None, "query_only", true)?;
        Ok(connection)
    }
}

/// The write-ahead log of the file `path`, as SQLite names it.
fn log_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push("-wal");
    name.into()
}

fn prepare(connection: &Connection) -> rusqlite::Result<()> {
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.set_prepared_statement_cache_capacity(STATEMENTS_MAX);
    Ok(())
}

/// Checks that `dir/name` is a regular file or does not exist yet.
fn check_kind(dir: &Path, name: &'static str) -> Result<(), OpenError> {
    let kind = match fs::metadata(dir.join(name)) {
        Ok(metadata) => metadata.file_type(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e.into()),
    };
    match kind {
        kind if kind.is_file() => Ok(()),
        kind if kind.is_dir() => Err(OpenError::NotAFile(name, "a directory")),
        kind if kind.is_fifo() => Err(OpenError::NotAFile(name, "a FIFO")),
        _ => Err(OpenError::NotAFile(name, "a socket or a device")),
    }
}

/// Detects problems at start that would fail later, while functions run.
fn check(connection: &Connection, path: &Path) -> Result<(), OpenError> {
    // SQLite opens a file that is not writable for reading only.
    if connection.is_readonly("main")? {
        return Err(std::io::Error::from(std::io::ErrorKind::PermissionDenied).into());
    }
    // A large file is not checked. Its damage is detected when it is read.
    if fs::metadata(path)?.len() <= CHECKED_BYTES_MAX {
        let found: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
        if found != "ok" {
            return Err(OpenError::Corrupt(found.lines().last().unwrap_or_default().to_owned()));
        }
    }
    Ok(())
}

/// The schema version of the file. Rejects the tables of other programs.
fn schema_version(connection: &Connection) -> Result<usize, OpenError> {
    let found: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    match usize::try_from(found) {
        Ok(0) if has_tables(connection)? => {
            Err(OpenError::Foreign("it has tables, but no schema version of this program".to_owned()))
        }
        Ok(version) if version <= SCHEMA_VERSION => Ok(version),
        _ => Err(OpenError::Newer(found)),
    }
}

fn migrate(connection: &mut Connection, found: usize) -> Result<(), OpenError> {
    let steps = SCHEMA_STEPS.get(found..).unwrap_or_default();
    if steps.is_empty() {
        return Ok(());
    }
    // One transaction: if the process is killed here, the older version can still read the file.
    let tx = connection.transaction()?;
    for step in steps {
        tx.execute_batch(step)?;
    }
    tx.pragma_update(None, "user_version", integer(SCHEMA_VERSION as u64))?;
    Ok(tx.commit()?)
}

fn has_tables(connection: &Connection) -> rusqlite::Result<bool> {
    connection.query_row("SELECT EXISTS (SELECT * FROM sqlite_master)", [], |row| row.get(0))
}

fn stopped() -> WriteError {
    WriteError::NotApplied(BackendError::Unavailable("the database writer has stopped".into()))
}

/// The inverse of [`integer`]. No column contains negative numbers.
pub(super) fn unsigned(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::FunctionStore;
    use crate::backend::embedded::scratch::{Scratch, in_time};
    use crate::backend::embedded::store::SqliteFunctions;
    use crate::model::{FunctionCounters, FunctionId};
    use std::sync::mpsc::sync_channel;

    fn mark(
        name: &'static str,
    ) -> impl FnOnce(&Connection) -> rusqlite::Result<&'static str> + Send + 'static {
        move |c| c.execute("INSERT INTO meta (name, value) VALUES (?1, 0)", [name]).map(|_| name)
    }

    async fn marks(database: &Database) -> Vec<String> {
        let read = database.read(|c| {
            let mut select = c.prepare("SELECT name FROM meta ORDER BY name")?;
            select.query_map([], |row| row.get(0))?.collect()
        });
        read.await.unwrap()
    }

    /// Creates the database that version 1 of this program left in a directory.
    fn version_1(scratch: &Scratch) {
        let file = Connection::open(scratch.path().join(DATABASE_FILE)).unwrap();
        file.execute_batch(SCHEMA_STEPS[0]).unwrap();
        file.execute_batch(
            "PRAGMA user_version = 1;
             INSERT INTO meta VALUES ('node', 7);
             INSERT INTO functions VALUES
               ('f', 'the f', 'd', 'python', 256, 'k', 'o', 'up', '', '{}', 3, 5, 1.5, 4, 0.5);
             INSERT INTO executions VALUES ('f', 'key', 'r', 1, 'SUCCESS', 1, NULL, 2, 'm', NULL, NULL);
             INSERT INTO jobs VALUES (9, x'00', 'f', 1, x'01');",
        )
        .unwrap();
    }

    #[tokio::test]
    async fn a_directory_of_version_1_keeps_its_data() {
        let scratch = Scratch::new();
        version_1(&scratch);
        for _ in 0..2 {
            let database = scratch.database();
            let f = SqliteFunctions(database.clone())
                .get(&FunctionId::parse("f").unwrap())
                .await
                .unwrap()
                .unwrap();
            assert_eq!((f.name.as_str(), f.memory_mb, f.version), ("the f", 256, 3));
            assert_eq!((f.max_concurrency, f.handler), (0, None));
            let FunctionCounters { invocations, errors, total_duration_ms, .. } = f.counters;
            assert_eq!((invocations, errors, total_duration_ms, f.recommendation), (5, 0, 1.5, None));
            let counts = database.read(|c| {
                c.query_row(
                    "SELECT (SELECT count(*) FROM executions), (SELECT max(seq) FROM jobs),
                         (SELECT count(*) FROM config_records), (SELECT count(*) FROM retired_code)",
                    [],
                    |row| Ok([row.get::<_, i64>(0)?, row.get(1)?, row.get(2)?, row.get(3)?]),
                )
            });
            assert_eq!(counts.await.unwrap(), [1, 9, 0, 0]);
            assert_eq!(marks(&database).await, ["node"]);
        }
    }

    #[test]
    fn a_migration_that_fails_changes_nothing() {
        let scratch = Scratch::new();
        version_1(&scratch);
        let file = || Connection::open(scratch.path().join(DATABASE_FILE)).unwrap();
        // Conflicts with the last table of the migration.
        file().execute_batch("CREATE TABLE retired_code (x)").unwrap();
        assert!(matches!(Database::open(scratch.path(), |_| Ok(())), Err(OpenError::Foreign(_))));
        let version: i64 = file().pragma_query_value(None, "user_version", |row| row.get(0)).unwrap();
        assert_eq!(version, 1);
        file().execute_batch("DROP TABLE retired_code").unwrap();
        assert!(Database::open(scratch.path(), |_| Ok(())).is_ok());
    }

    #[tokio::test]
    async fn one_commit_gives_each_caller_its_own_result() {
        let scratch = Scratch::new();
        let database = scratch.database();
        // While the first write blocks the writer, the others are queued for one transaction.
        let (go, gate) = sync_channel(1);
        let held = database.write(1, move |_| gate.recv().map_err(|_| rusqlite::Error::InvalidQuery));
        let half_done = database.write(1, |c| {
            mark("half")(c)?;
            mark("half")(c)
        });
        let writes =
            async { tokio::join!(database.write(1, mark("a")), half_done, database.write(1, mark("b"))) };
        let release = async { go.send(()).unwrap() };
        let (held, (a, half_done, b), ()) = in_time(async { tokio::join!(held, writes, release) }).await;
        assert!(held.is_ok());
        assert_eq!((a.unwrap(), b.unwrap()), ("a", "b"));
        assert!(matches!(half_done, Err(WriteError::NotApplied(_))));
        assert_eq!(marks(&database).await, ["a", "b"]);
    }

    #[tokio::test]
    async fn a_rollback_of_the_transaction_fails_all_its_writes() {
        let scratch = Scratch::new();
        let database = scratch.database();
        let (go, gate) = sync_channel(1);
        let held = database.write(1, move |_| gate.recv().map_err(|_| rusqlite::Error::InvalidQuery));
        // SQLite rolls back by itself when the disk is full.
        let fatal = database.write(1, |c| c.execute_batch("ROLLBACK"));
        let writes =
            async { tokio::join!(database.write(1, mark("a")), fatal, database.write(1, mark("b"))) };
        let release = async { go.send(()).unwrap() };
        let (_, (a, fatal, b), ()) = in_time(async { tokio::join!(held, writes, release) }).await;
        assert!(a.is_err() && fatal.is_err() && b.is_err());
        assert!(marks(&database).await.is_empty());
        assert!(database.write(1, mark("c")).await.is_ok(), "the writer keeps working");
    }

    #[tokio::test]
    async fn dropping_the_last_handle_commits_and_frees_the_directory() {
        let scratch = Scratch::new();
        let database = scratch.database();
        let (go, gate) = sync_channel(1);
        let held = database.write(1, move |_| gate.recv().map_err(|_| rusqlite::Error::InvalidQuery));
        let asked = database.write(1, mark("asked"));
        // Queue both, and drop the futures before either is done.
        let abandoned = tokio::time::timeout(Duration::from_millis(50), async { tokio::join!(held, asked) });
        assert!(abandoned.await.is_err());
        go.send(()).unwrap();
        drop(database);
        assert_eq!(marks(&scratch.database()).await, ["asked"]);
    }

    #[tokio::test]
    async fn many_callers_at_once_are_all_served() {
        let scratch = Scratch::new();
        let database = scratch.database();
        let sql = "INSERT INTO meta (name, value) VALUES (?1, ?1)";
        let writes = (0..2 * WRITES_MAX).map(|n| {
            database.write(1, move |c| c.prepare_cached(sql)?.execute([integer(n as u64)]).map(|_| n))
        });
        let done = in_time(futures_util::future::join_all(writes)).await;
        let mine: Vec<usize> = done.into_iter().map(Result::unwrap).collect();
        assert_eq!(mine, (0..2 * WRITES_MAX).collect::<Vec<_>>());
        assert_eq!(marks(&database).await.len(), 2 * WRITES_MAX);
    }
}
