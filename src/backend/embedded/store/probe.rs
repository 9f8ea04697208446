//! The health check of a table.

use crate::backend::BackendError;
use crate::backend::embedded::database::Database;
use rusqlite::OptionalExtension;

pub async fn probe(database: &Database, sql: &'static str) -> Result<(), BackendError> {
    let read = database.read(move |c| c.prepare_cached(sql)?.query_row([], |_| Ok(())).optional());
    read.await.map(drop)
}
