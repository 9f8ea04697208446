//! The single-machine backend of `dev`: SQLite and files.
//!
//! It implements the same ports as the fleet backend on one file.
//! It is not a mock: everything that a call has confirmed is on the disk. A gateway that is killed and
//! restarted keeps its functions, its logs and its unfinished jobs.
//!
//! An embedded key-value store was rejected. The log is listed by time, status and request. In SQLite these
//! are three indexes; in a key-value store, three tables that the code must keep consistent.
//!
//! The directory contains:
//!
//! * `infra.sqlite` — all tables (see `schema.sql` and the migrations beside it)
//! * `code/<s3Key>` — the zips of the functions; `….part` is an unfinished copy
//! * `runs/` — private directories of the runs in progress
//! * `lock` — locked by the process that uses the directory

mod code_store;
mod database;
mod events;
mod jobs;
mod journal;
mod queue;
mod results;
#[cfg(test)]
pub(crate) mod scratch;
mod seed;
mod start_problem;
mod store;
mod summaries;
mod workers;

use super::StartProblem;
use super::WorkerActivity;
use super::empty_dir::make_empty_dir;
use super::ports::Backend;
use super::{CodeSource, JobSource};
use crate::model::NodeId;
use code_store::LocalCode;
use database::{Database, OpenError};
use events::LocalEvents;
use jobs::LocalJobs;
use journal::SqliteJournal;
use queue::Queue;
use results::LocalResults;
use rusqlite::{Connection, OptionalExtension};
use start_problem::start_problem;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use store::{SqliteClaims, SqliteCodeList, SqliteExecutions, SqliteFunctions};
use summaries::LocalSummaries;
use workers::LocalWorkers;

/// Bucket name in the messages of jobs. It has no meaning, because the code is in the directory.
pub const BUCKET: &str = "local";

/// An opened data directory.
pub struct Embedded {
    /// Node id of this gateway. Chosen once for each directory, so that a restarted gateway resumes its jobs.
    pub node: NodeId,
    pub backend: Backend,
    pub work: LocalWork,
}

/// What the worker of this directory needs.
pub struct LocalWork {
    pub jobs: Arc<dyn JobSource>,
    pub code: Arc<dyn CodeSource>,
    pub activity: Arc<WorkerActivity>,
    /// Empty directory for the runs in progress.
    pub runs_dir: PathBuf,
}

/// Opens `dir`, or creates it with example functions: those of Node.js only if `has_node`. Blocks on the
/// disk, and starts the thread that writes the database.
///
/// Dropping the backend and the work commits the pending writes, and then frees the directory.
///
/// # Errors
/// If another process uses the directory, or a later version of the program wrote it. Also if it is damaged,
/// or the disk or its permissions do not allow access.
pub fn open(dir: &Path, has_node: bool) -> Result<Embedded, StartProblem> {
    try_open(dir, has_node).map_err(|e| start_problem(dir, &e))
}

/// The start problem of an I/O error in `dir`.
pub fn dir_problem(dir: &Path, error: io::Error) -> StartProblem {
    start_problem(dir, &OpenError::Io(error))
}

fn try_open(dir: &Path, has_node: bool) -> Result<Embedded, OpenError> {
    std::fs::create_dir_all(dir)?;
    // Runs start in other directories, so paths must be absolute.
    let dir = dir.canonicalize()?;
    let code_dir = dir.join("code");
    let (database, node) = Database::open(&dir, |connection| {
        seed::plant(connection, &code_dir, has_node)?;
        Ok(node_id(connection)?)
    })?;
    let runs_dir = make_empty_dir(dir.join("runs"))?;

    let queue = Queue::new(database.clone());
    let results = LocalResults::new(database.clone());
    let activity = Arc::new(WorkerActivity::default());
    let backend = Backend {
        queue: Arc::new(queue.clone()),
        results: results.clone(),
        journal: Arc::new(SqliteJournal(database.clone())),
        dead_letters: None,
        membership: None,
        functions: Arc::new(SqliteFunctions(database.clone())),
        executions: Arc::new(SqliteExecutions(database.clone())),
        code: Arc::new(LocalCode::new(code_dir.clone())),
        claims: Arc::new(SqliteClaims(database.clone())),
        code_list: Arc::new(SqliteCodeList(database)),
        workers: Arc::new(LocalWorkers::new(activity.clone())),
        summaries: Arc::new(LocalSummaries::default()),
        changes: None,
        events: Some(Arc::new(LocalEvents::default())),
        limits: None,
    };
    let jobs = Arc::new(LocalJobs::new(queue, results));
    let work = LocalWork { jobs, code: Arc::new(LocalCode::new(code_dir)), activity, runs_dir };
    Ok(Embedded { node, backend, work })
}

fn node_id(connection: &Connection) -> rusqlite::Result<NodeId> {
    let select = "SELECT value FROM meta WHERE name = 'node'";
    if let Some(node) = connection.query_row(select, [], |row| row.get(0)).optional()? {
        return Ok(NodeId(node));
    }
    let node = NodeId(rand::random());
    connection.execute("INSERT INTO meta (name, value) VALUES ('node', ?1)", [node.0])?;
    Ok(node)
}

#[cfg(test)]
mod tests {
    use super::scratch::Scratch;
    use super::*;
    use crate::backend::BackendError;
    use crate::model::FunctionId;

    #[tokio::test]
    async fn a_directory_keeps_its_node_id_and_is_seeded_once() {
        let scratch = Scratch::new();
        let first = open(scratch.path(), true).unwrap();
        let hello = FunctionId::parse("hello").unwrap();
        assert!(first.backend.functions.get(&hello).await.unwrap().is_some());
        let node = first.node;
        drop(first);

        let database = scratch.database();
        let forget = database.write(1, |c| c.execute("DELETE FROM functions", [])).await;
        assert!(forget.is_ok_and(|deleted| deleted >= 1));
        drop(database);
        std::fs::create_dir(scratch.path().join("runs/left-behind")).unwrap();

        let second = open(scratch.path(), true).unwrap();
        assert_eq!(second.node, node);
        assert_eq!(second.backend.functions.get(&hello).await, Ok(None), "deleted examples stay deleted");
        assert_eq!(std::fs::read_dir(scratch.path().join("runs")).unwrap().count(), 0);
    }

    #[test]
    fn a_second_process_is_rejected() {
        let scratch = Scratch::new();
        let first = open(scratch.path(), true).unwrap();
        // The lock belongs to the open file, so it also excludes a second open in the same process.
        let problem = open(scratch.path(), true).err().unwrap();
        assert!(problem.error.is_transient(), "{problem:?}");
        assert!(problem.error.to_string().contains("another process"), "{problem:?}");
        drop(first);
        assert!(open(scratch.path(), true).is_ok());
    }

    #[test]
    fn unreadable_directories_are_rejected() {
        let scratch = Scratch::new();
        drop(open(scratch.path(), true).unwrap());
        let file = scratch.path().join("infra.sqlite");
        let connection = Connection::open(&file).unwrap();
        connection.pragma_update(None, "user_version", 9).unwrap();
        drop(connection);
        let newer = open(scratch.path(), true).err().unwrap();
        assert!(newer.error.to_string().contains("schema 9, this one knows 8"), "{newer:?}");

        std::fs::write(&file, "x".repeat(8192)).unwrap();
        let garbage = open(scratch.path(), true).err().unwrap();
        assert!(matches!(garbage.error, BackendError::Invalid(_)), "{garbage:?}");
        assert!(
            matches!(open(&file, true).err().unwrap().error, BackendError::Invalid(_)),
            "not a directory"
        );
    }
}
