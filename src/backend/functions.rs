//! The ports for functions: their metadata, their code, and the list of code to be deleted.
//!
//! A change of a function, its audit record and its effect on the code list are one transaction. So a failure
//! never leaves one without the others. In `aws` that is a DynamoDB transaction over the function table and
//! the log table, and the code is in S3. In `embedded` it is a transaction of the database, and the code is
//! in files.

use crate::backend::BackendError;
use crate::model::{ConfigRecord, Function, FunctionId, Recommendation, RetiredCode, UnixMs};
use async_trait::async_trait;
use std::path::Path;

/// A change of one function, with everything that is written in the same transaction.
#[derive(Clone, Debug, PartialEq)]
pub struct FunctionWrite {
    /// The function as it was read. Its version and its time of change must not have changed since. `None`:
    /// the function must not exist.
    pub before: Option<Function>,
    /// The new state; `None`: the function is deleted. Counters and recommendation are not written, because
    /// other calls update them.
    pub after: Option<Function>,
    pub record: ConfigRecord,
    /// Code that the function no longer uses. It is added to the code list.
    pub retire: Option<RetiredCode>,
    /// Code that the function uses from now on. It is removed from the code list. If it is not on the list,
    /// the write conflicts, because the code may have been deleted.
    pub adopt: Option<RetiredCode>,
}

/// The outcome of a [`FunctionWrite`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FunctionWriteOutcome {
    Done,
    /// The function was created, changed or deleted since it was read, or its new code is not on the list.
    /// Nothing was written.
    Conflict,
}

/// One page of functions. It may have fewer functions than the limit although another page follows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FunctionPage {
    pub functions: Vec<Function>,
    /// The position after which the next page begins. `None`: this is the last page.
    pub next: Option<String>,
}

/// The function metadata.
#[async_trait]
pub trait FunctionStore: Send + Sync {
    /// Reads a function. The read is strongly consistent.
    async fn get(&self, id: &FunctionId) -> Result<Option<Function>, BackendError>;

    /// Lists at most `limit` functions, which is at least 1. The order is that of the store, and is stable.
    /// `after` is the `next` of the previous page.
    async fn list(&self, limit: usize, after: Option<&str>) -> Result<FunctionPage, BackendError>;

    /// Makes a change, completely or not at all. The same write may be repeated after
    /// [`BackendError::Unavailable`]; it takes effect once.
    async fn write(&self, write: &FunctionWrite) -> Result<FunctionWriteOutcome, BackendError>;

    /// Stores a recommendation. No effect if the function does not exist, or has a recommendation of a later
    /// execution.
    async fn recommend(&self, id: &FunctionId, recommendation: &Recommendation) -> Result<(), BackendError>;

    /// Health check: reads the table.
    async fn probe(&self) -> Result<(), BackendError>;
}

/// The durable list of code to be deleted when it is due.
#[async_trait]
pub trait CodeList: Send + Sync {
    /// Adds an entry. It replaces an entry with the same key.
    async fn add(&self, code: &RetiredCode) -> Result<(), BackendError>;

    /// Returns at most `limit` entries that are due at `now`.
    async fn due(&self, now: UnixMs, limit: usize) -> Result<Vec<RetiredCode>, BackendError>;

    /// Removes an entry, unless its due time has changed.
    async fn remove(&self, code: &RetiredCode) -> Result<(), BackendError>;
}

/// The store of the code of functions.
#[async_trait]
pub trait CodeStore: Send + Sync {
    /// Stores a file under the key. It is durable when the call returns, and is never loaded into memory as a
    /// whole. The store may move the file away.
    async fn put(&self, s3_key: &str, file: &Path) -> Result<(), BackendError>;

    /// Deletes the code of the key. No effect if there is none.
    async fn delete(&self, s3_key: &str) -> Result<(), BackendError>;
}
