//! The single-machine backend: SQLite, and a local worker.
//!
//! The same ports as the fleet's over one file, and a worker that runs uploaded zips as child processes. It is a
//! real mode, not a mock: whatever a call has confirmed is on the disk, and a killed and restarted gateway has its
//! functions, its logs and its unfinished jobs. An embedded key-value store was rejected: the log is listed by time,
//! status and request, which are three indexes to SQLite and three hand-kept tables to the others.
//!
//! What lies in the directory:
//!
//! * `infra.sqlite` — every table (see `schema.sql` and the steps beside it)
//! * `code/<s3Key>` — the zips of the functions; `….part` is one that is being copied in
//! * `runs/` — private directories of the runs under way
//! * `lock` — held by the one process that works here

mod code_store;
mod database;
mod journal;
mod queue;
mod results;
#[cfg(test)]
mod scratch;
mod seed;
mod start_problem;
mod store;
mod worker;
mod workers;

pub use worker::Worker;

use super::{Backend, StartProblem};
use crate::model::NodeId;
use code_store::LocalCode;
use database::{Database, OpenError};
use journal::Inflight;
use queue::Queue;
use results::LocalResults;
use rusqlite::{Connection, OptionalExtension};
use start_problem::start_problem;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use store::{Executions, Functions, LocalClaims, RetiredCodes};
use workers::{Activity, LocalWorkers};

/// What jobs name as their bucket. The code lies in the directory, so it stands for nothing.
pub const BUCKET: &str = "local";

/// An opened directory.
pub struct Embedded {
    /// The name of this gateway, drawn once for the life of the directory: a restarted one goes on with its jobs.
    pub node: NodeId,
    pub backend: Backend,
    pub worker: Worker,
}

/// Opens `dir`, or makes it with two example functions in it. Blocks on the disk, and starts the thread that writes
/// the database; the worker runs only when its loop is started.
///
/// When the backend and the worker are dropped, what waits is written, and the directory is free for another process.
///
/// # Errors
/// If another process works there, a later version of the program wrote it, or the disk or its rights do not allow.
pub fn open(dir: &Path) -> Result<Embedded, StartProblem> {
    try_open(dir).map_err(|e| start_problem(dir, &e))
}

/// What keeps a process from working in `dir`, where the disk or its rights do not allow something.
pub fn dir_problem(dir: &Path, error: io::Error) -> StartProblem {
    start_problem(dir, &OpenError::Io(error))
}

fn try_open(dir: &Path) -> Result<Embedded, OpenError> {
    std::fs::create_dir_all(dir)?;
    // Runs start in directories of their own, so no path may be relative.
    let dir = dir.canonicalize()?;
    let code_dir = dir.join("code");
    let has_node = worker::on_path("node").is_some();
    let (database, node) = Database::open(&dir, |connection| {
        seed::plant(connection, &code_dir, has_node)?;
        Ok(node_id(connection)?)
    })?;
    let runs_dir = swept(dir.join("runs"))?;

    let queue = Queue::new(database.clone());
    let results = LocalResults::new(database.clone());
    let activity = Arc::new(Activity::default());
    let backend = Backend {
        queue: Arc::new(queue.clone()),
        results: results.clone(),
        journal: Arc::new(Inflight(database.clone())),
        dead_letters: None,
        membership: None,
        functions: Arc::new(Functions(database.clone())),
        executions: Arc::new(Executions(database.clone())),
        code: Arc::new(LocalCode::new(code_dir.clone())),
        claims: Arc::new(LocalClaims(database.clone())),
        code_list: Arc::new(RetiredCodes(database)),
        workers: Arc::new(LocalWorkers::new(activity.clone())),
        changes: None,
        limits: None,
    };
    Ok(Embedded { node, backend, worker: Worker::new(queue, results, activity, code_dir, runs_dir) })
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

/// The empty directory `path`, without what a killed process left there.
pub fn swept(path: PathBuf) -> io::Result<PathBuf> {
    match std::fs::remove_dir_all(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    std::fs::create_dir_all(&path)?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::scratch::Scratch;
    use super::*;
    use crate::backend::BackendError;
    use crate::model::FunctionId;

    #[tokio::test]
    async fn a_directory_keeps_its_node_and_examples() {
        let scratch = Scratch::new();
        let first = open(scratch.path()).unwrap();
        let hello = FunctionId::parse("hello").unwrap();
        assert!(first.backend.functions.get(&hello).await.unwrap().is_some());
        let node = first.node;
        drop(first);

        let database = scratch.database();
        let forget = database.write(1, |c| c.execute("DELETE FROM functions", [])).await;
        assert!(forget.is_ok_and(|deleted| deleted >= 1));
        drop(database);
        std::fs::create_dir(scratch.path().join("runs/left-behind")).unwrap();

        let second = open(scratch.path()).unwrap();
        assert_eq!(second.node, node);
        assert_eq!(second.backend.functions.get(&hello).await, Ok(None), "what was deleted stays deleted");
        assert_eq!(std::fs::read_dir(scratch.path().join("runs")).unwrap().count(), 0);
    }

    #[test]
    fn a_second_process_is_refused() {
        let scratch = Scratch::new();
        let first = open(scratch.path()).unwrap();
        // A lock belongs to the open file, so a second open in this process meets it as another process would.
        let problem = open(scratch.path()).err().unwrap();
        assert!(problem.error.is_transient(), "{problem:?}");
        assert!(problem.error.to_string().contains("another process"), "{problem:?}");
        drop(first);
        assert!(open(scratch.path()).is_ok());
    }

    #[test]
    fn what_cannot_be_read_is_refused() {
        let scratch = Scratch::new();
        drop(open(scratch.path()).unwrap());
        let file = scratch.path().join("infra.sqlite");
        let connection = Connection::open(&file).unwrap();
        connection.pragma_update(None, "user_version", 7).unwrap();
        drop(connection);
        let newer = open(scratch.path()).err().unwrap();
        assert!(newer.error.to_string().contains("schema 7, this one knows 6"), "{newer:?}");

        std::fs::write(&file, "x".repeat(8192)).unwrap();
        let garbage = open(scratch.path()).err().unwrap();
        assert!(matches!(garbage.error, BackendError::Invalid(_)), "{garbage:?}");
        assert!(matches!(open(&file).err().unwrap().error, BackendError::Invalid(_)), "not a directory");
    }
}
