//! The functions and the records of their changes: the tables `functions` and `config_records`.

use super::code_list;
use super::probe::probe;
use crate::backend::embedded::database::error::integer;
use crate::backend::embedded::database::{Database, unsigned};
use crate::backend::{BackendError, FunctionPage, FunctionStore, FunctionWrite, FunctionWriteOutcome};
use crate::model::{ConfigRecord, Function, FunctionCounters, FunctionId, Handler, Recommendation, Sums};
use async_trait::async_trait;
use rusqlite::{Connection, OptionalExtension, Row, params};

/// Most rows that one [`FunctionWrite`] writes.
const WRITE_RECORDS: usize = 4;

/// The table `functions`.
pub(in crate::backend::embedded) struct SqliteFunctions(pub(in crate::backend::embedded) Database);

/// Adds a function without counters and recommendation. `false`: the id exists, and nothing was changed.
pub(in crate::backend::embedded) fn put_function(
    connection: &Connection,
    f: &Function,
) -> rusqlite::Result<bool> {
    let mut insert = connection.prepare_cached(
        "INSERT INTO functions (function_id, name, description, runtime, memory_mb, s3_key, original_name,
             uploaded_at, updated_at, env_vars, version, max_concurrency, handler)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)
         ON CONFLICT (function_id) DO NOTHING",
    )?;
    let added = insert.execute(params![
        f.id.as_str(),
        f.name,
        f.description,
        f.runtime,
        integer(f.memory_mb),
        f.s3_key,
        f.original_name,
        f.uploaded_at,
        f.updated_at,
        f.env_vars,
        integer(f.version),
        integer(f.max_concurrency),
        f.handler.as_ref().map(Handler::as_str),
    ])?;
    Ok(added == 1)
}

/// Updates the fields that a change may set, if the function is still the one that was read.
fn update(connection: &Connection, before: &Function, after: &Function) -> rusqlite::Result<bool> {
    let mut update = connection.prepare_cached(
        "UPDATE functions SET description = ?4, memory_mb = ?5, s3_key = ?6, original_name = ?7,
             updated_at = ?8, version = ?9, max_concurrency = ?10, handler = ?11
         WHERE function_id = ?1 AND version = ?2 AND updated_at = ?3",
    )?;
    let updated = update.execute(params![
        before.id.as_str(),
        integer(before.version),
        before.updated_at,
        after.description,
        integer(after.memory_mb),
        after.s3_key,
        after.original_name,
        after.updated_at,
        integer(after.version),
        integer(after.max_concurrency),
        after.handler.as_ref().map(Handler::as_str),
    ])?;
    Ok(updated == 1)
}

/// Deletes a function, if it is still the one that was read.
fn delete(connection: &Connection, before: &Function) -> rusqlite::Result<bool> {
    let mut delete = connection.prepare_cached(
        "DELETE FROM functions WHERE function_id = ?1 AND version = ?2 AND updated_at = ?3",
    )?;
    let deleted = delete.execute(params![before.id.as_str(), integer(before.version), before.updated_at])?;
    Ok(deleted == 1)
}

/// Applies a whole change. It runs in a savepoint, so an error undoes all of it.
fn write(connection: &Connection, write: &FunctionWrite) -> rusqlite::Result<FunctionWriteOutcome> {
    // Check the conditions first, before anything is written. If the list does not contain the adopted code,
    // it may have been deleted already.
    if let Some(code) = &write.adopt
        && !code_list::contains(connection, code)?
    {
        return Ok(FunctionWriteOutcome::Conflict);
    }
    let held = match (&write.before, &write.after) {
        (None, Some(after)) => put_function(connection, after)?,
        (Some(before), Some(after)) => update(connection, before, after)?,
        (Some(before), None) => delete(connection, before)?,
        // Such a change does not exist.
        (None, None) => false,
    };
    if !held {
        return Ok(FunctionWriteOutcome::Conflict);
    }
    put_record(connection, &write.record)?;
    if let Some(code) = &write.retire {
        code_list::add(connection, code)?;
    }
    if let Some(code) = &write.adopt {
        code_list::remove(connection, code)?;
    }
    Ok(FunctionWriteOutcome::Done)
}

/// Adds to the counters of a function, if it still exists.
pub(in crate::backend::embedded) fn add_counters(
    connection: &Connection,
    id: &FunctionId,
    sums: Sums,
) -> rusqlite::Result<()> {
    let mut update = connection.prepare_cached(
        "UPDATE functions SET
             invocations = invocations + ?2,
             errors = errors + ?3,
             total_duration_ms = total_duration_ms + ?4,
             handler_invocations = handler_invocations + ?5,
             total_handler_duration_ms = total_handler_duration_ms + ?6,
             cold_starts = cold_starts + ?7
         WHERE function_id = ?1",
    )?;
    update.execute(params![
        id.as_str(),
        sums.invocations,
        sums.errors,
        sums.duration_ms(),
        sums.handler_invocations,
        sums.handler_ms(),
        sums.cold_starts,
    ])?;
    Ok(())
}

fn put_record(connection: &Connection, record: &ConfigRecord) -> rusqlite::Result<()> {
    let mut insert = connection.prepare_cached(
        "INSERT OR REPLACE INTO config_records (function_id, key, at_ms, action, changed_by, before, after,
             expires_at_s)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
    )?;
    insert.execute(params![
        record.function.as_str(),
        record.key,
        integer(record.at),
        record.action.as_str(),
        record.by,
        record.before,
        record.after,
        integer(record.expires_at_s),
    ])?;
    Ok(())
}

fn function(id: FunctionId, row: &Row<'_>) -> rusqlite::Result<Function> {
    Ok(Function {
        id,
        name: row.get("name")?,
        description: row.get("description")?,
        runtime: row.get("runtime")?,
        memory_mb: unsigned(row.get("memory_mb")?),
        max_concurrency: unsigned(row.get("max_concurrency")?),
        handler: row.get::<_, Option<String>>("handler")?.and_then(|handler| Handler::parse(&handler)),
        s3_key: row.get("s3_key")?,
        original_name: row.get("original_name")?,
        uploaded_at: row.get("uploaded_at")?,
        updated_at: row.get("updated_at")?,
        env_vars: row.get("env_vars")?,
        version: unsigned(row.get("version")?),
        counters: FunctionCounters {
            invocations: unsigned(row.get("invocations")?),
            errors: unsigned(row.get("errors")?),
            total_duration_ms: row.get("total_duration_ms")?,
            handler_invocations: unsigned(row.get("handler_invocations")?),
            total_handler_duration_ms: row.get("total_handler_duration_ms")?,
            cold_starts: unsigned(row.get("cold_starts")?),
        },
        recommendation: recommendation(row)?,
    })
}

fn recommendation(row: &Row<'_>) -> rusqlite::Result<Option<Recommendation>> {
    let Some(at) = row.get::<_, Option<i64>>("recommended_at_ms")? else { return Ok(None) };
    Ok(Some(Recommendation {
        memory_mb: row.get::<_, Option<i64>>("recommended_memory_mb")?.map(unsigned),
        tip: row.get("optimization_tip")?,
        savings: row.get("estimated_savings")?,
        request_id: row.get::<_, Option<String>>("recommended_by")?.unwrap_or_default(),
        at: unsigned(at),
    }))
}

#[async_trait]
impl FunctionStore for SqliteFunctions {
    async fn get(&self, id: &FunctionId) -> Result<Option<Function>, BackendError> {
        let id = id.clone();
        let read = self.0.read(move |c| {
            let mut select = c.prepare_cached("SELECT * FROM functions WHERE function_id = ?1")?;
            select.query_row([id.as_str()], |row| function(id.clone(), row)).optional()
        });
        read.await
    }

    /// In order of ids. Reads one function more than it returns, to know whether there is a next page.
    async fn list(&self, limit: usize, after: Option<&str>) -> Result<FunctionPage, BackendError> {
        let limit = limit.max(1);
        // The empty string sorts before every id.
        let after = after.unwrap_or_default().to_owned();
        let read = self.0.read(move |c| {
            let mut select = c.prepare_cached(
                "SELECT * FROM functions WHERE function_id > ?1 ORDER BY function_id LIMIT ?2",
            )?;
            let rows = i64::try_from(limit).unwrap_or(i64::MAX).saturating_add(1);
            let found = select.query_map(params![after, rows], |row| {
                // The table contains valid ids only.
                let id = FunctionId::parse(row.get_ref("function_id")?.as_str()?);
                id.map(|id| function(id, row)).transpose()
            })?;
            found.filter_map(Result::transpose).collect::<rusqlite::Result<Vec<_>>>()
        });
        let mut functions = read.await?;
        let more = functions.len() > limit;
        functions.truncate(limit);
        let next = functions.last().filter(|_| more).map(|f| f.id.as_str().to_owned());
        Ok(FunctionPage { functions, next })
    }

    async fn write(&self, change: &FunctionWrite) -> Result<FunctionWriteOutcome, BackendError> {
        let change = change.clone();
        Ok(self.0.write(WRITE_RECORDS, move |c| write(c, &change)).await?)
    }

    async fn recommend(&self, id: &FunctionId, advice: &Recommendation) -> Result<(), BackendError> {
        let (id, advice) = (id.clone(), advice.clone());
        let write = self.0.write(1, move |c| {
            // Results arrive in any order, so an older recommendation must not replace a newer one.
            let mut update = c.prepare_cached(
                "UPDATE functions SET recommended_memory_mb = ?2, optimization_tip = ?3,
                     estimated_savings = ?4, recommended_by = ?5, recommended_at_ms = ?6
                 WHERE function_id = ?1 AND (recommended_at_ms IS NULL OR recommended_at_ms < ?6)",
            )?;
            update.execute(params![
                id.as_str(),
                advice.memory_mb.map(integer),
                advice.tip,
                advice.savings,
                advice.request_id,
                integer(advice.at),
            ])
        });
        Ok(write.await.map(drop)?)
    }

    async fn probe(&self) -> Result<(), BackendError> {
        probe(&self.0, "SELECT 1 FROM functions LIMIT 1").await
    }
}

#[cfg(test)]
mod tests;
