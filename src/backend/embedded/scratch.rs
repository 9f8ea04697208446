//! Fixtures for the tests of this backend: a temporary directory, jobs, zips, and a deadline.

use super::database::Database;
use crate::model::{FunctionId, Job, JobId, NodeId, now_ms};
use bytes::Bytes;
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

/// Deadline for an event that must happen.
const DEADLINE: Duration = Duration::from_secs(30);

pub(super) struct Scratch(PathBuf);

impl Scratch {
    pub(super) fn new() -> Self {
        let path = std::env::temp_dir().join(format!("infra-embedded-{:016x}", rand::random::<u64>()));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    /// Opens the database in it, without examples.
    pub(super) fn database(&self) -> Database {
        Database::open(&self.0, |_| Ok(())).unwrap().0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(super) fn job(random: u64, message: &str) -> Job {
    job_of(NodeId(1), random, message)
}

pub(super) fn job_of(node: NodeId, random: u64, message: &str) -> Job {
    Job {
        id: JobId::new(node, now_ms(), random),
        function: FunctionId::parse("f").unwrap(),
        idempotency_key: None,
        deadline: now_ms() + 600_000,
        message: Bytes::from(message.to_owned()),
    }
}

pub(super) fn zipped(files: &[(&str, &str)]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, text) in files {
        zip.start_file(*name, SimpleFileOptions::default()).unwrap();
        zip.write_all(text.as_bytes()).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

pub(super) async fn in_time<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.expect("the future did not complete in time")
}
