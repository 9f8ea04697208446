//! Function metadata and code.

use crate::backend::BackendError;
use crate::model::{ConfigRecord, Function, FunctionId, Recommendation, RetiredCode, UnixMs};
use async_trait::async_trait;
use std::path::Path;

/// A change of one function, with all that must be written with it.
#[derive(Clone, Debug, PartialEq)]
pub struct FunctionWrite {
    /// The function as it was read; `None`: it must not exist. The write happens only if its version and time of
    /// change are still the same.
    pub before: Option<Function>,
    /// As it shall be; `None`: deleted. Counters and recommendation are not written: they change by themselves.
    pub after: Option<Function>,
    pub record: ConfigRecord,
    /// Code that nothing points to after this; enters the code list.
    pub retire: Option<RetiredCode>,
    /// Code that is pointed to after this; its entry leaves the code list. Without the entry there is a conflict:
    /// the code may have been swept away.
    pub adopt: Option<RetiredCode>,
}

/// What became of a [`FunctionWrite`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    Done,
    /// The function is no longer (or already) there, or was changed since it was read, or its code was swept away.
    /// Nothing was written.
    Conflict,
}

/// One page of the functions.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FunctionPage {
    pub functions: Vec<Function>,
    /// Where to go on; `None`: this was the last page.
    pub next: Option<String>,
}

/// The function metadata.
#[async_trait]
pub trait FunctionStore: Send + Sync {
    /// A consistent read.
    async fn get(&self, id: &FunctionId) -> Result<Option<Function>, BackendError>;

    /// At most `limit` functions (at least 1), in an order that is the store's own and does not change;
    /// `after`: the `next` of the page before.
    async fn list(&self, limit: usize, after: Option<&str>) -> Result<FunctionPage, BackendError>;

    /// All of it, or nothing. The same write again, after [`BackendError::Unavailable`], changes nothing more.
    async fn write(&self, write: &FunctionWrite) -> Result<Written, BackendError>;

    /// Keeps a recommendation, if the function (still) exists and has none of a later execution.
    async fn recommend(&self, id: &FunctionId, recommendation: &Recommendation) -> Result<(), BackendError>;

    /// Health check: the table exists and may be read.
    async fn probe(&self) -> Result<(), BackendError>;
}

/// The durable list of code that is to be deleted when it is due.
#[async_trait]
pub trait CodeList: Send + Sync {
    /// Puts code on the list, in place of an entry for the same key.
    async fn add(&self, code: &RetiredCode) -> Result<(), BackendError>;

    /// At most `limit` entries that are due.
    async fn due(&self, now: UnixMs, limit: usize) -> Result<Vec<RetiredCode>, BackendError>;

    /// Takes an entry off, unless it has another due time by now.
    async fn remove(&self, code: &RetiredCode) -> Result<(), BackendError>;
}

/// Where the code of functions lies.
#[async_trait]
pub trait CodeStore: Send + Sync {
    /// Stores the file under the key, durably, without holding it in memory. The file may be moved away.
    async fn put(&self, s3_key: &str, file: &Path) -> Result<(), BackendError>;

    /// Deletes what is there, if anything.
    async fn delete(&self, s3_key: &str) -> Result<(), BackendError>;
}
