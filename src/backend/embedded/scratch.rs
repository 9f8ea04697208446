//! Fixtures for the tests of this backend: a temporary directory, jobs, zips, and a deadline.

use super::database::{DATABASE_FILE, Database};
use crate::model::{FunctionId, Job, JobId, NodeId, now_ms};
use bytes::Bytes;
use rusqlite::Connection;
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

/// Deadline for an event that must happen.
const DEADLINE: Duration = Duration::from_secs(30);

pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new() -> Self {
        let path = std::env::temp_dir().join(format!("infra-embedded-{:016x}", rand::random::<u64>()));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Opens the database in it, without examples.
    pub(in crate::backend::embedded) fn database(&self) -> Database {
        Database::open(&self.0, |_| Ok(())).unwrap().0
    }

    /// The jobs on the queue, each with the number of its starts without an end.
    pub(crate) fn starts(&self) -> Vec<(JobId, u32)> {
        let connection = Connection::open(self.0.join(DATABASE_FILE)).unwrap();
        let mut select = connection.prepare("SELECT id, starts FROM jobs ORDER BY seq").unwrap();
        let starts = select.query_map([], |row| Ok((JobId::from_bytes(row.get(0)?), row.get(1)?)));
        starts.unwrap().collect::<Result<_, _>>().unwrap()
    }

    /// Changes these numbers, while no process has the directory open.
    pub(crate) fn set_starts(&self, starts: &[(JobId, u32)]) {
        let connection = Connection::open(self.0.join(DATABASE_FILE)).unwrap();
        for (id, starts) in starts {
            let update = "UPDATE jobs SET starts = ?2 WHERE id = ?1";
            assert_eq!(connection.execute(update, rusqlite::params![id.as_bytes(), starts]), Ok(1));
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(crate) fn job(random: u64, message: &str) -> Job {
    job_of(NodeId(1), random, message)
}

pub(crate) fn job_of(node: NodeId, random: u64, message: &str) -> Job {
    Job {
        progress: None,
        id: JobId::new(node, now_ms(), random),
        function: FunctionId::parse("f").unwrap(),
        idempotency_key: None,
        is_promised: true,
        deadline: now_ms() + 600_000,
        message: Bytes::from(message.to_owned()),
        trace: None,
    }
}

pub(crate) fn zipped(files: &[(&str, &str)]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, text) in files {
        zip.start_file(*name, SimpleFileOptions::default()).unwrap();
        zip.write_all(text.as_bytes()).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

pub(crate) async fn in_time<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.expect("the future did not complete in time")
}
