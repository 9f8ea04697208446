//! The list of code to delete: the table `retired_code`.

use crate::backend::embedded::database::error::integer;
use crate::backend::embedded::database::{Database, unsigned};
use crate::backend::{BackendError, CodeList};
use crate::model::{FunctionId, RetiredCode, UnixMs};
use async_trait::async_trait;
use rusqlite::{Connection, params};

/// The table `retired_code`.
pub(in crate::backend::embedded) struct SqliteCodeList(pub(in crate::backend::embedded) Database);

/// Adds code to the list. Replaces an entry for the same key.
pub(super) fn add(connection: &Connection, code: &RetiredCode) -> rusqlite::Result<()> {
    let mut insert = connection.prepare_cached(
        "INSERT OR REPLACE INTO retired_code (s3_key, function_id, due_ms) VALUES (?1, ?2, ?3)",
    )?;
    insert.execute(params![code.s3_key, code.function.as_str(), integer(code.due)]).map(drop)
}

/// Whether the list contains the entry with this due time.
pub(super) fn contains(connection: &Connection, code: &RetiredCode) -> rusqlite::Result<bool> {
    let mut select =
        connection.prepare_cached("SELECT 1 FROM retired_code WHERE s3_key = ?1 AND due_ms = ?2")?;
    select.exists(params![code.s3_key, integer(code.due)])
}

/// Removes an entry, unless its due time has changed.
pub(super) fn remove(connection: &Connection, code: &RetiredCode) -> rusqlite::Result<()> {
    let mut delete =
        connection.prepare_cached("DELETE FROM retired_code WHERE s3_key = ?1 AND due_ms = ?2")?;
    delete.execute(params![code.s3_key, integer(code.due)]).map(drop)
}

#[async_trait]
impl CodeList for SqliteCodeList {
    async fn add(&self, code: &RetiredCode) -> Result<(), BackendError> {
        let code = code.clone();
        Ok(self.0.write(1, move |c| add(c, &code)).await?)
    }

    async fn due(&self, now: UnixMs, limit: usize) -> Result<Vec<RetiredCode>, BackendError> {
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let read = self.0.read(move |c| {
            let mut select = c.prepare_cached(
                "SELECT s3_key, function_id, due_ms FROM retired_code WHERE due_ms <= ?1
                 ORDER BY due_ms, s3_key LIMIT ?2",
            )?;
            let rows = select.query_map(params![integer(now), limit], |row| {
                Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?, unsigned(row.get(2)?)))
            })?;
            rows.collect::<rusqlite::Result<Vec<_>>>()
        });
        let entries = read.await?.into_iter().map(|(s3_key, function, due)| {
            // The table contains valid ids only.
            FunctionId::parse(&function).map(|function| RetiredCode { s3_key, function, due })
        });
        Ok(entries.flatten().collect())
    }

    async fn remove(&self, code: &RetiredCode) -> Result<(), BackendError> {
        let code = code.clone();
        Ok(self.0.write(1, move |c| remove(c, &code)).await?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::embedded::scratch::Scratch;

    fn code(s3_key: &str, due: UnixMs) -> RetiredCode {
        RetiredCode { s3_key: s3_key.to_owned(), function: FunctionId::parse("f").unwrap(), due }
    }

    #[tokio::test]
    async fn due_entries_are_ordered_and_survive_a_restart() {
        let scratch = Scratch::new();
        let list = SqliteCodeList(scratch.database());
        for entry in [code("b", 20), code("a", 30), code("c", 10), code("d", 31)] {
            list.add(&entry).await.unwrap();
        }
        drop(list);
        let list = SqliteCodeList(scratch.database());
        assert_eq!(list.due(9, 100).await, Ok(vec![]));
        assert_eq!(list.due(30, 100).await.unwrap(), [code("c", 10), code("b", 20), code("a", 30)]);
        assert_eq!(list.due(30, 2).await.unwrap(), [code("c", 10), code("b", 20)]);
    }

    #[tokio::test]
    async fn an_entry_with_a_new_due_time_is_not_removed() {
        let scratch = Scratch::new();
        let list = SqliteCodeList(scratch.database());
        list.add(&code("a", 10)).await.unwrap();
        let seen = list.due(10, 1).await.unwrap();
        list.add(&code("a", 20)).await.unwrap();
        list.remove(&seen[0]).await.unwrap();
        assert_eq!(list.due(100, 9).await.unwrap(), [code("a", 20)]);
        for _ in 0..2 {
            list.remove(&code("a", 20)).await.unwrap();
            assert_eq!(list.due(100, 9).await, Ok(vec![]));
        }
    }
}
