//! The execution log: the table `executions`.

use super::probe::probe;
use crate::backend::embedded::database::error::integer;
use crate::backend::embedded::database::{Database, unsigned};
use crate::backend::{BackendError, ExecutionStore, LogPage, LogQuery, ROWS_MAX};
use crate::model::{Execution, FunctionId, JobId, NodeId, RowId, RowKey, RowLife, Status, UnixMs, now_ms};
use async_trait::async_trait;
use rusqlite::{Connection, OptionalExtension, Row, params};

/// The table `executions`.
pub(in crate::backend::embedded) struct SqliteExecutions(pub(in crate::backend::embedded) Database);

/// Writes a row. A result replaces the row with the same key. LOST means that no result arrived, and never
/// replaces a row.
fn put_execution(connection: &Connection, row: &Execution) -> rusqlite::Result<()> {
    let mut insert = connection.prepare_cached(
        "INSERT INTO executions (function_id, key, request_id, foreign_id, status, duration_ms,
             handler_duration_ms, cold_start, memory_mb, message, completed_at_ms, expires_at_s,
             sent_at_ms, confirmed_at_ms, started_at_ms, written_at_ms, worker_id, ended_by, key_name,
             config_version, allocated_mb, trace_id, exit_code)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?14, ?15, ?16, ?17, ?18, ?19, ?20, ?21,
             ?22, ?23, ?24)
         ON CONFLICT (function_id, key) DO UPDATE SET
             request_id = excluded.request_id, foreign_id = excluded.foreign_id, status = excluded.status,
             duration_ms = excluded.duration_ms, handler_duration_ms = excluded.handler_duration_ms,
             cold_start = excluded.cold_start, memory_mb = excluded.memory_mb, message = excluded.message,
             completed_at_ms = excluded.completed_at_ms, expires_at_s = excluded.expires_at_s,
             sent_at_ms = excluded.sent_at_ms, confirmed_at_ms = excluded.confirmed_at_ms,
             started_at_ms = excluded.started_at_ms, written_at_ms = excluded.written_at_ms,
             worker_id = excluded.worker_id, ended_by = excluded.ended_by, key_name = excluded.key_name,
             config_version = excluded.config_version, allocated_mb = excluded.allocated_mb,
             trace_id = excluded.trace_id, exit_code = excluded.exit_code
         WHERE excluded.status <> ?13",
    )?;
    let life = &row.life;
    insert.execute(params![
        row.function.as_str(),
        row.id.key(),
        row.id.request_id(),
        matches!(row.id, RowId::Old { .. }),
        row.status.as_str(),
        row.duration_ms,
        row.handler_duration_ms,
        row.cold_start,
        integer(row.memory_mb),
        row.message,
        row.completed_at.map(integer),
        row.expires_at_s.map(integer),
        Status::LOST,
        life.sent_at.map(integer),
        life.confirmed_at.map(integer),
        life.started_at.map(integer),
        life.written_at.map(integer),
        life.worker_id.as_deref(),
        life.ended_by.map(|node| node.to_string()),
        life.key_name.as_deref(),
        life.config_version.map(integer),
        life.allocated_mb.map(integer),
        life.trace_id.as_deref(),
        life.exit_code,
    ])?;
    Ok(())
}

/// The key of the row of a request. `None`: the id is not a [`JobId`].
fn computed_key(request_id: &str) -> Option<RowKey> {
    JobId::parse(request_id).map(RowKey::of)
}

fn execution(function: FunctionId, row: &Row<'_>) -> rusqlite::Result<Execution> {
    Ok(Execution {
        function,
        id: RowId::stored(row.get("key")?, row.get("request_id")?),
        status: Status::new(row.get_ref("status")?.as_str()?),
        duration_ms: row.get("duration_ms")?,
        handler_duration_ms: row.get("handler_duration_ms")?,
        cold_start: row.get("cold_start")?,
        memory_mb: unsigned(row.get("memory_mb")?),
        message: row.get("message")?,
        completed_at: row.get::<_, Option<i64>>("completed_at_ms")?.map(unsigned),
        expires_at_s: row.get::<_, Option<i64>>("expires_at_s")?.map(unsigned),
        life: life(row)?,
    })
}

fn life(row: &Row<'_>) -> rusqlite::Result<RowLife> {
    let number = |column: &str| row.get::<_, Option<i64>>(column).map(|number| number.map(unsigned));
    let text = |column: &str| row.get::<_, Option<String>>(column);
    Ok(RowLife {
        sent_at: number("sent_at_ms")?,
        confirmed_at: number("confirmed_at_ms")?,
        started_at: number("started_at_ms")?,
        written_at: number("written_at_ms")?,
        worker_id: text("worker_id")?.map(String::into_boxed_str),
        ended_by: text("ended_by")?.as_deref().and_then(NodeId::parse),
        key_name: text("key_name")?.map(Into::into),
        config_version: number("config_version")?,
        allocated_mb: number("allocated_mb")?,
        trace_id: text("trace_id")?.map(Into::into),
        exit_code: row.get("exit_code")?,
        progress: None,
    })
}

#[async_trait]
impl ExecutionStore for SqliteExecutions {
    async fn put(&self, rows: &[Execution]) -> Vec<Result<(), BackendError>> {
        debug_assert!(rows.len() <= ROWS_MAX);
        // Not flushed: a job leaves the journal later, which is flushed.
        let writes = rows.iter().cloned().map(|row| self.0.write_ordered(1, move |c| put_execution(c, &row)));
        // One write for each row, so that each has its own result. They are committed together.
        futures_util::future::join_all(writes).await.into_iter().map(|put| Ok(put?)).collect()
    }

    async fn list(&self, query: &LogQuery) -> Result<LogPage, BackendError> {
        let query = query.clone();
        self.0.read(move |c| page(c, &query, now_ms())).await
    }

    async fn get(&self, function: &FunctionId, request_id: &str) -> Result<Option<Execution>, BackendError> {
        let (function, request_id) = (function.clone(), request_id.to_owned());
        let read = self.0.read(move |c| {
            let key = computed_key(&request_id);
            let (mut select, by) = match &key {
                Some(key) => (
                    c.prepare_cached("SELECT * FROM executions WHERE function_id = ?1 AND key = ?2")?,
                    key.as_str(),
                ),
                None => (
                    c.prepare_cached(
                        "SELECT * FROM executions
                         WHERE function_id = ?1 AND request_id = ?2 AND foreign_id = 1
                         ORDER BY key DESC LIMIT 1",
                    )?,
                    request_id.as_str(),
                ),
            };
            select.query_row([function.as_str(), by], |row| execution(function.clone(), row)).optional()
        });
        Ok(read.await?.filter(|row| row.is_live(now_ms())))
    }

    async fn probe(&self) -> Result<(), BackendError> {
        probe(&self.0, "SELECT 1 FROM executions LIMIT 1").await
    }
}

/// One page, newest first. Reads one row more than it returns, to know whether there is a next page.
fn page(connection: &Connection, query: &LogQuery, now: UnixMs) -> rusqlite::Result<LogPage> {
    // Two statements instead of `?5 IS NULL OR …`, with which SQLite could not use the index on the status.
    let sql = match query.status {
        None => {
            "SELECT * FROM executions WHERE function_id = ?1 AND key >= ?2 AND key < ?3
             AND (expires_at_s IS NULL OR expires_at_s > ?4) AND ?5 IS NULL ORDER BY key DESC LIMIT ?6"
        }
        Some(_) => {
            "SELECT * FROM executions WHERE function_id = ?1 AND key >= ?2 AND key < ?3
             AND (expires_at_s IS NULL OR expires_at_s > ?4) AND status = ?5 ORDER BY key DESC LIMIT ?6"
        }
    };
    let from = query.start.map(RowKey::bound).unwrap_or_default();
    // The highest character sorts after every key.
    let end = query.end.map_or_else(|| char::MAX.to_string(), RowKey::bound);
    let before = query.after.as_ref().map_or(&end, |after| after.min(&end));
    let limit = i64::try_from(query.limit).unwrap_or(i64::MAX).saturating_add(1);
    let mut select = connection.prepare_cached(sql)?;
    let found = select.query_map(
        params![query.function.as_str(), from, before, integer(now / 1000), query.status, limit],
        |row| execution(query.function.clone(), row),
    )?;
    let mut rows = found.collect::<rusqlite::Result<Vec<_>>>()?;
    let more = rows.len() > query.limit;
    rows.truncate(query.limit);
    let next = rows.last().filter(|_| more).map(|row| row.id.key().into_owned());
    Ok(LogPage { rows, next })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::embedded::scratch::{Scratch, in_time};
    use crate::model::{LOG_TTL_S, NodeId, Outcome, rfc3339_ms};
    use bytes::Bytes;

    const AT: UnixMs = 1_795_305_600_123;

    fn f() -> FunctionId {
        FunctionId::parse("f").unwrap()
    }

    fn row(at: UnixMs, random: u64, status: &str) -> Execution {
        let result =
            serde_json::json!({ "status": status, "stdout": random.to_string(), "durationMs": 1.25 });
        let outcome = Outcome::new(Bytes::from(result.to_string()));
        Execution::of(JobId::new(NodeId(1), at, random), f(), &outcome.fields())
    }

    fn old_row(key: &str, request_id: &str) -> Execution {
        let mut row = row(AT, 0, "SUCCESS");
        row.id = RowId::stored(key.to_owned(), request_id.to_owned());
        row.completed_at = None;
        row.expires_at_s = None;
        row
    }

    fn all() -> LogQuery {
        LogQuery { function: f(), limit: 100, start: None, end: None, status: None, after: None }
    }

    async fn put(log: &SqliteExecutions, rows: &[Execution]) {
        for rows in rows.chunks(ROWS_MAX) {
            assert!(log.put(rows).await.iter().all(Result::is_ok));
        }
    }

    async fn walk(log: &SqliteExecutions, mut query: LogQuery) -> Vec<String> {
        let mut messages = Vec::new();
        loop {
            let page = log.list(&query).await.unwrap();
            assert!(page.next.is_none() || page.rows.len() == query.limit, "only the last page is short");
            messages.extend(page.rows.into_iter().map(|row| row.message));
            match page.next {
                Some(next) => query.after = Some(next),
                None => return messages,
            }
        }
    }

    fn names(numbers: impl IntoIterator<Item = u64>) -> Vec<String> {
        numbers.into_iter().map(|n| n.to_string()).collect()
    }

    #[tokio::test]
    async fn rows_are_read_as_they_were_written() {
        let scratch = Scratch::new();
        let log = SqliteExecutions(scratch.database());
        let mut first = row(AT, 1, "SUCCESS");
        (first.handler_duration_ms, first.cold_start) = (Some(0.5), Some(false));
        first.life = RowLife::sample();
        let old = old_row("2024-01-02T03:04:05.678Z", "67e55044-10b1-426f-9247-bb680e5fe0c8");
        put(&log, &[first.clone(), old.clone()]).await;
        put(&log, &[first.clone()]).await;
        drop(log);

        let log = SqliteExecutions(scratch.database());
        assert_eq!(log.get(&f(), &first.id.request_id()).await, Ok(Some(first.clone())));
        assert_eq!(log.get(&f(), &old.id.request_id()).await, Ok(Some(old.clone())));
        let unknown = JobId::new(NodeId(1), AT, 9).to_string();
        assert_eq!(log.get(&f(), &unknown).await, Ok(None));
        assert_eq!(log.get(&FunctionId::parse("g").unwrap(), &old.id.request_id()).await, Ok(None));
        assert_eq!(log.list(&all()).await.unwrap().rows, [first, old]);
        assert_eq!(log.probe().await, Ok(()));
    }

    #[tokio::test]
    async fn lost_never_replaces_a_result_and_is_replaced_by_one() {
        let scratch = Scratch::new();
        let log = SqliteExecutions(scratch.database());
        let (real, lost) = (row(AT, 1, "SUCCESS"), Execution::lost(JobId::new(NodeId(1), AT, 1), f(), false));
        for (written, kept) in [(&lost, &lost), (&real, &real), (&lost, &real)] {
            put(&log, std::slice::from_ref(written)).await;
            assert_eq!(log.get(&f(), &real.id.request_id()).await, Ok(Some(kept.clone())));
        }
    }

    #[tokio::test]
    async fn pages_are_exact() {
        let scratch = Scratch::new();
        let log = SqliteExecutions(scratch.database());
        // Twelve rows, four in each millisecond. Every third one has failed.
        let status = |n: u64| if n.is_multiple_of(3) { "FAILED" } else { "SUCCESS" };
        let rows: Vec<_> = (0..12).map(|n| row(AT + n / 4, n, status(n))).collect();
        put(&log, &rows).await;
        put(&log, &[Execution { function: FunctionId::parse("g").unwrap(), ..rows[0].clone() }]).await;

        for limit in [1, 3, 4, 5, 11, 12, 13] {
            assert_eq!(walk(&log, LogQuery { limit, ..all() }).await, names((0..12).rev()), "{limit}");
            let failed = LogQuery { limit, status: Some("FAILED".into()), ..all() };
            assert_eq!(walk(&log, failed).await, names([9, 6, 3, 0]), "{limit}");
        }
        for (start, end, expected) in [
            (Some(AT + 1), None, 4..12),
            (None, Some(AT + 1), 0..4),
            (Some(AT + 1), Some(AT + 2), 4..8),
            (Some(AT + 1), Some(AT + 1), 0..0),
            (Some(AT + 3), None, 0..0),
            (Some(0), Some(u64::MAX), 0..12),
        ] {
            let query = LogQuery { start, end, limit: 3, ..all() };
            assert_eq!(walk(&log, query).await, names(expected.rev()), "{start:?} {end:?}");
        }
        let exact = log.list(&LogQuery { limit: 12, ..all() }).await.unwrap();
        assert_eq!(exact.next, None, "a full last page has no next page");
    }

    #[tokio::test]
    async fn a_thousand_rows_in_pages_of_seven() {
        let scratch = Scratch::new();
        let log = SqliteExecutions(scratch.database());
        let mut expected = Vec::new();
        let mut rows = Vec::new();
        for n in 0..1_000_u64 {
            // Ten rows in each millisecond. Every seventh is an old one with a millisecond of its own.
            let is_old = n % 7 == 3;
            let mut one = if is_old {
                old_row(&rfc3339_ms(AT + n / 10 * 100 + 1 + n % 10), &format!("old-{n}"))
            } else {
                row(AT + n / 10 * 100, n, "SUCCESS")
            };
            one.message = n.to_string();
            if (200..260).contains(&n) || n % 11 == 5 {
                one.expires_at_s = Some(now_ms() / 1000);
            } else {
                expected.push((one.id.key().into_owned(), one.message.clone()));
            }
            rows.push(one);
        }
        put(&log, &rows).await;
        put(&log, &rows.into_iter().step_by(5).collect::<Vec<_>>()).await;
        expected.sort();
        let newest_first: Vec<String> = expected.into_iter().rev().map(|(_, message)| message).collect();
        assert!(newest_first.len() > 800);
        assert_eq!(walk(&log, LogQuery { limit: 7, ..all() }).await, newest_first);
    }

    #[tokio::test]
    async fn bounds_hold_for_rows_of_the_old_controller() {
        let scratch = Scratch::new();
        let log = SqliteExecutions(scratch.database());
        let old = old_row(&rfc3339_ms(AT), "old");
        put(&log, &[old.clone(), row(AT, 1, "SUCCESS")]).await;
        let count = async |start, end| {
            let query = LogQuery { start: Some(start), end: Some(end), ..all() };
            log.list(&query).await.unwrap().rows.len()
        };
        assert_eq!(count(AT, AT + 1).await, 2);
        assert_eq!((count(AT - 1, AT).await, count(AT + 1, AT + 2).await), (0, 0));
        assert_eq!(walk(&log, LogQuery { limit: 1, ..all() }).await.len(), 2);
    }

    #[tokio::test]
    async fn expired_rows_are_hidden_and_do_not_shorten_pages() {
        let scratch = Scratch::new();
        let log = SqliteExecutions(scratch.database());
        let mut rows: Vec<_> = (0..6).map(|n| row(AT, n, "SUCCESS")).collect();
        for row in rows.iter_mut().skip(1).step_by(2) {
            row.expires_at_s = Some(now_ms() / 1000);
        }
        put(&log, &rows).await;
        assert_eq!(walk(&log, LogQuery { limit: 1, ..all() }).await, names([4, 2, 0]));
        assert_eq!(log.list(&LogQuery { limit: 3, ..all() }).await.unwrap().next, None);
        assert_eq!(log.get(&f(), &rows[1].id.request_id()).await, Ok(None));
    }

    #[tokio::test]
    async fn the_writer_deletes_expired_rows() {
        let scratch = Scratch::new();
        let log = SqliteExecutions(scratch.database());
        let mut rows: Vec<_> = (0..600).map(|n| row(AT, n, "SUCCESS")).collect();
        rows.iter_mut().skip(1).for_each(|row| row.expires_at_s = Some(now_ms() / 1000 - LOG_TTL_S));
        put(&log, &rows).await;
        drop(log);
        // A writer deletes expired rows as soon as it has started, until none are left.
        let database = scratch.database();
        let count = async || {
            let sql = "SELECT count(*) FROM executions";
            let read = database.read(move |c| c.query_row(sql, [], |row| row.get::<_, i64>(0)));
            read.await.unwrap()
        };
        in_time(async {
            while count().await != 1 {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }
}
