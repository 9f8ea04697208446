//! Errors and values of SQLite.

use crate::backend::BackendError;

/// Why a write is not durable, or not known to be.
#[derive(Clone, Debug)]
pub enum WriteError {
    /// It has no effect.
    NotApplied(BackendError),
    /// The commit failed, or its outcome is not known.
    Unknown(BackendError),
}

/// Converts an error of SQLite. The text contains names of tables and error codes, never values.
pub fn failed(e: &rusqlite::Error) -> BackendError {
    let text = format!("SQLite: {e}");
    match e.sqlite_error_code() {
        Some(rusqlite::ErrorCode::TooBig | rusqlite::ErrorCode::NotADatabase) => BackendError::Invalid(text),
        _ => BackendError::Unavailable(text),
    }
}

/// Converts to the signed integers of SQLite. Larger values saturate.
pub fn integer(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
