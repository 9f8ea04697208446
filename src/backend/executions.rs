//! The port for the execution log: one row per execution, written in batches and listed by time.
//!
//! Writes are idempotent: the key of a row is a function of its request id, so a second write of one
//! execution replaces the first. A row with the status LOST never replaces another row. So any node may write
//! the row of a job, in any order. `aws` uses a DynamoDB table, `embedded` a table of its database.

use crate::backend::BackendError;
use crate::model::{Execution, FunctionId, UnixMs};
use async_trait::async_trait;

/// Maximum number of rows per [`ExecutionStore::put`]; the limit of BatchWriteItem of DynamoDB.
pub const ROWS_MAX: usize = 25;

/// Which rows of a function's log to list.
#[derive(Clone, Debug, PartialEq)]
pub struct LogQuery {
    pub function: FunctionId,
    /// Maximum number of rows of the page.
    pub limit: usize,
    /// Earliest acceptance time, inclusive.
    pub start: Option<UnixMs>,
    /// Latest acceptance time, exclusive.
    pub end: Option<UnixMs>,
    /// Only rows with exactly this status.
    pub status: Option<String>,
    /// The [`LogPage::next`] of the previous page.
    pub after: Option<String>,
}

/// One page of a log, newest first. It may have fewer rows than the limit although another page follows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LogPage {
    pub rows: Vec<Execution>,
    /// The range key after which the next page begins. `None`: this is the last page.
    pub next: Option<String>,
}

/// The execution log.
#[async_trait]
pub trait ExecutionStore: Send + Sync {
    /// Writes at most [`ROWS_MAX`] rows with distinct keys. Returns one result per row, in order. A row is
    /// durable when its result is `Ok`.
    async fn put(&self, rows: &[Execution]) -> Vec<Result<(), BackendError>>;

    /// Writes a row, unless the table has a row of this execution with another status than LOST. Returns the
    /// row that the table has now. For rows that another node may write too, with another result of a job
    /// that ran twice: the row that counts must be the one that stays.
    async fn put_first(&self, row: &Execution) -> Result<Execution, BackendError> {
        // Without other nodes, and for stores whose `put` keeps a result that LOST would replace.
        self.put(std::slice::from_ref(row)).await.pop().unwrap_or(Ok(()))?;
        let kept = self.get(&row.function, &row.id.request_id()).await?;
        Ok(kept.unwrap_or_else(|| row.clone()))
    }

    /// Lists the rows of a function that have not expired.
    async fn list(&self, query: &LogQuery) -> Result<LogPage, BackendError>;

    /// The row of a request, unless it has expired. Rows of the old controller are found too; `aws` searches
    /// only the newest of them.
    async fn get(&self, function: &FunctionId, request_id: &str) -> Result<Option<Execution>, BackendError>;

    /// Health check: reads the table.
    async fn probe(&self) -> Result<(), BackendError>;
}
