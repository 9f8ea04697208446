//! The stores on the database: functions with their change records, the code list, claims, the execution log.

mod claims;
mod code_list;
mod executions;
mod functions;

pub(super) use claims::SqliteClaims;
pub(super) use code_list::SqliteCodeList;
pub(super) use executions::SqliteExecutions;
pub(super) use functions::{SqliteFunctions, add_counters, put_function};

use super::database::Database;
use crate::backend::BackendError;
use rusqlite::OptionalExtension;

async fn probe(database: &Database, sql: &'static str) -> Result<(), BackendError> {
    let read = database.read(move |c| c.prepare_cached(sql)?.query_row([], |_| Ok(())).optional());
    read.await.map(drop)
}
