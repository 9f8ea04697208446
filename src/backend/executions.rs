//! The execution log.

use crate::backend::BackendError;
use crate::model::{Execution, FunctionId, UnixMs};
use async_trait::async_trait;

/// Most rows in one [`ExecutionStore::put`]: what DynamoDB takes in one call.
pub const ROWS_MAX: usize = 25;

/// Which rows of a function's log to list.
#[derive(Clone, Debug, PartialEq)]
pub struct LogQuery {
    pub function: FunctionId,
    /// Most rows of a page.
    pub limit: usize,
    /// Earliest acceptance time, inclusive.
    pub start: Option<UnixMs>,
    /// Latest acceptance time, exclusive.
    pub end: Option<UnixMs>,
    pub status: Option<String>,
    /// Range key of the last row of the page before.
    pub after: Option<String>,
}

/// One page of a log, newest first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LogPage {
    pub rows: Vec<Execution>,
    /// Range key to go on after; `None`: this was the last page.
    pub next: Option<String>,
}

/// The execution log.
#[async_trait]
pub trait ExecutionStore: Send + Sync {
    /// One result per row, in order; at most [`ROWS_MAX`] rows, no key twice. Writing a row again changes nothing.
    async fn put(&self, rows: &[Execution]) -> Vec<Result<(), BackendError>>;

    /// Live rows only.
    async fn list(&self, query: &LogQuery) -> Result<LogPage, BackendError>;

    /// The live row of a request, also if an old controller wrote it.
    async fn get(&self, function: &FunctionId, request_id: &str) -> Result<Option<Execution>, BackendError>;

    /// Health check: the table exists and may be read.
    async fn probe(&self) -> Result<(), BackendError>;
}
