//! The execution log table: writes, lists and looks up rows.

use super::execution_writes::RowWrites;
use super::item::{self, Item, RawItem, text, whole};
use crate::backend::aws::error::class;
use crate::backend::aws::json_call::{CredentialCache, JsonClient, RouteRecorder};
use crate::backend::{BackendError, ExecutionStore, LogPage, LogQuery, ROWS_MAX};
use crate::https::HttpsClient;
use crate::model::{
    Execution, FunctionId, JobId, NodeId, RowId, RowKey, RowLife, Status, now_ms, parse_rfc3339_ms,
};
use async_trait::async_trait;
use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::operation::query::builders::QueryFluentBuilder;
use std::collections::HashMap;
use std::sync::Arc;

/// Maximum number of table pages (1 MB each) read for one listing. If a filter hides more, the page is
/// short and its `next` continues from there.
const LIST_PAGES_MAX: usize = 10;
/// Minimum number of items per page once a filter has hidden some, to save calls on dense runs of filtered or
/// expired rows.
const FILTERED_PAGE_ITEMS: usize = 250;
/// Maximum number of pages read to find a request id of the old controller: about 20 MB of the newest rows.
const FIND_PAGES_MAX: usize = 20;

const KEY: &[&str] = &["functionId", "timestamp"];

pub struct ExecutionTable {
    client: Client,
    table: String,
    writes: RowWrites,
}

impl ExecutionTable {
    /// Reads an absent row, which shows that the table exists and where it is.
    pub async fn open(
        client: Client,
        https: HttpsClient,
        credentials: Arc<CredentialCache>,
        table: &str,
    ) -> Result<Self, BackendError> {
        let seen = RouteRecorder::default();
        item::probe(&client, table, KEY, &seen).await?;
        let writes = RowWrites::new(JsonClient::new(https, credentials, &seen)?, table);
        Ok(Self { client, table: table.to_owned(), writes })
    }

    fn query(&self, function: &FunctionId) -> QueryFluentBuilder {
        self.client
            .query()
            .table_name(&self.table)
            .scan_index_forward(false)
            .expression_attribute_values(":function", text(function.as_str()))
    }

    /// The newest live row with this request id, among the newest [`FIND_PAGES_MAX`] pages.
    async fn find(&self, function: &FunctionId, request_id: &str) -> Result<Option<Execution>, BackendError> {
        let now = now_ms();
        let mut after = None;
        for _ in 0..FIND_PAGES_MAX {
            let call = self
                .query(function)
                .key_condition_expression("functionId = :function")
                .filter_expression("requestId = :id")
                .expression_attribute_values(":id", text(request_id))
                .set_exclusive_start_key(after);
            let output = call.send().await.map_err(|e| class(&e))?;
            let mut rows = output.items.unwrap_or_default().into_iter().map(|raw| from_item(function, raw));
            if let Some(row) = rows.find(|row| row.is_live(now)) {
                return Ok(Some(row));
            }
            after = output.last_evaluated_key;
            if after.is_none() {
                break;
            }
        }
        Ok(None)
    }
}

#[async_trait]
impl ExecutionStore for ExecutionTable {
    async fn put(&self, rows: &[Execution]) -> Vec<Result<(), BackendError>> {
        assert!(rows.len() <= ROWS_MAX, "{} rows at once", rows.len());
        self.writes.put(rows).await
    }

    async fn put_first(&self, row: &Execution) -> Result<Execution, BackendError> {
        if self.writes.put_first(row).await? {
            return Ok(row.clone());
        }
        let kept = self.get(&row.function, &row.id.request_id()).await?;
        kept.ok_or_else(|| BackendError::Unavailable("the row that blocks another one is gone".into()))
    }

    async fn list(&self, query: &LogQuery) -> Result<LogPage, BackendError> {
        let range = Range::of(query);
        if query.limit == 0 || range.is_empty() {
            return Ok(LogPage::default());
        }
        let now = now_ms();
        let mut rows: Vec<Execution> = Vec::new();
        let mut after = query.after.as_ref().map(|key| key_item(&query.function, key));
        let mut is_filtered = query.status.is_some();
        for _ in 0..LIST_PAGES_MAX {
            // Reads one row more than requested, to find out whether there is a next page.
            let wanted = query.limit + 1 - rows.len();
            let items = if is_filtered { wanted.max(FILTERED_PAGE_ITEMS) } else { wanted };
            let call = range
                .apply(self.query(&query.function), query.status.as_deref(), now)
                .limit(i32::try_from(items).unwrap_or(i32::MAX))
                .set_exclusive_start_key(after);
            let output = call.send().await.map_err(|e| class(&e))?;
            is_filtered |= output.count() < output.scanned_count();
            rows.extend(
                output.items.unwrap_or_default().into_iter().map(|raw| from_item(&query.function, raw)),
            );
            after = output.last_evaluated_key;
            if rows.len() > query.limit || after.is_none() {
                break;
            }
        }
        let next = if rows.len() > query.limit {
            rows.truncate(query.limit);
            rows.last().map(|row| row.id.key().into_owned())
        } else {
            after.and_then(|key| Item::new(key).text("timestamp"))
        };
        Ok(LogPage { rows, next })
    }

    async fn get(&self, function: &FunctionId, request_id: &str) -> Result<Option<Execution>, BackendError> {
        let Some(id) = JobId::parse(request_id) else {
            // The old controller's ids are UUIDs. A search is expensive, so no other ids are searched for.
            let is_old = uuid::Uuid::try_parse(request_id).is_ok();
            return if is_old { self.find(function, request_id).await } else { Ok(None) };
        };
        let call = self
            .client
            .get_item()
            .table_name(&self.table)
            .set_key(Some(key_item(function, RowKey::of(id).as_str())))
            .consistent_read(true);
        let output = call.send().await.map_err(|e| class(&e))?;
        let row = output.item.map(|raw| from_item(function, raw));
        Ok(row.filter(|row| row.id.request_id() == request_id && row.is_live(now_ms())))
    }

    async fn probe(&self) -> Result<(), BackendError> {
        item::probe(&self.client, &self.table, KEY, &RouteRecorder::default()).await
    }
}

fn key_item(function: &FunctionId, range: &str) -> RawItem {
    HashMap::from([("functionId".to_owned(), text(function.as_str())), ("timestamp".to_owned(), text(range))])
}

/// Bounds on the range key: milliseconds without the `Z`.
///
/// A short key `….123Z` and a long key `….123<25 digits>Z` both sort after `….123` and before `….124`. No key
/// equals a bound, so the inclusive end of BETWEEN is still exclusive here.
struct Range {
    start: Option<String>,
    end: Option<String>,
}

impl Range {
    fn of(query: &LogQuery) -> Self {
        Self { start: query.start.map(RowKey::bound), end: query.end.map(RowKey::bound) }
    }

    /// Whether the range is empty. DynamoDB rejects a BETWEEN whose bounds are reversed.
    fn is_empty(&self) -> bool {
        matches!((&self.start, &self.end), (Some(start), Some(end)) if start >= end)
    }

    fn apply(&self, call: QueryFluentBuilder, status: Option<&str>, now: u64) -> QueryFluentBuilder {
        let (condition, bounds) = match (&self.start, &self.end) {
            (None, None) => ("", vec![]),
            (Some(start), None) => (" AND #timestamp >= :start", vec![(":start", start)]),
            (None, Some(end)) => (" AND #timestamp < :end", vec![(":end", end)]),
            (Some(start), Some(end)) => {
                (" AND #timestamp BETWEEN :start AND :end", vec![(":start", start), (":end", end)])
            }
        };
        let mut call = call
            .key_condition_expression(format!("functionId = :function{condition}"))
            .expression_attribute_values(":now", whole(now / 1000));
        if !bounds.is_empty() {
            call = call.expression_attribute_names("#timestamp", "timestamp"); // a reserved word
        }
        for (name, bound) in bounds {
            call = call.expression_attribute_values(name, text(bound.as_str()));
        }
        let live = "(attribute_not_exists(expiresAt) OR expiresAt > :now)";
        match status {
            None => call.filter_expression(live),
            Some(status) => call
                .filter_expression(format!("{live} AND #status = :status"))
                .expression_attribute_names("#status", "status")
                .expression_attribute_values(":status", text(status)),
        }
    }
}

pub fn from_item(function: &FunctionId, raw: RawItem) -> Execution {
    let item = Item::new(raw);
    let text = |name| item.text(name).unwrap_or_default();
    let life = life_of(&item);
    Execution {
        function: function.clone(),
        id: RowId::stored(text("timestamp"), text("requestId")),
        status: Status::new(&text("status")),
        duration_ms: item.float("duration").unwrap_or(0.0),
        handler_duration_ms: item.float("handlerDurationMs"),
        cold_start: item.flag("coldStart"),
        memory_mb: item.whole("memoryMb").unwrap_or(0),
        message: text("message"),
        completed_at: item.text("completedAt").and_then(|at| parse_rfc3339_ms(&at)),
        expires_at_s: item.whole("expiresAt"),
        life,
    }
}

fn life_of(item: &Item) -> RowLife {
    let time = |name| item.text(name).and_then(|at| parse_rfc3339_ms(&at));
    RowLife {
        sent_at: time("sentAt"),
        confirmed_at: time("confirmedAt"),
        started_at: time("startedAt"),
        written_at: time("writtenAt"),
        worker_id: item.text("workerId").map(String::into_boxed_str),
        ended_by: item.text("endedBy").as_deref().and_then(NodeId::parse),
        key_name: item.text("keyName").map(Into::into),
        config_version: item.whole("configVersion"),
        allocated_mb: item.whole("allocatedMb"),
        trace_id: item.text("traceId").map(Into::into),
        exit_code: item.float("exitCode").map(|code| code as i64),
        progress: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{NodeId, rfc3339_ms};

    fn function() -> FunctionId {
        FunctionId::parse("f").unwrap()
    }

    #[test]
    fn a_row_of_the_old_controller_is_parsed() {
        let mut raw = key_item(&function(), "2024-01-02T03:04:05.678Z");
        raw.insert("duration".into(), text("12"));
        raw.insert("status".into(), text("FAILED"));
        let row = from_item(&function(), raw);
        assert_eq!((row.duration_ms, row.status.as_str(), &*row.id.request_id()), (12.0, "FAILED", ""));
        assert_eq!((row.completed_at, row.expires_at_s, row.handler_duration_ms), (None, None, None));
    }

    #[test]
    fn bounds_separate_milliseconds_for_both_kinds_of_key() {
        let at = 1_795_305_600_123;
        let query = |start, end| LogQuery {
            function: function(),
            limit: 1,
            start: Some(start),
            end: Some(end),
            status: None,
            after: None,
        };
        let range = Range::of(&query(at, at + 1));
        let (start, end) = (range.start.as_deref().unwrap(), range.end.as_deref().unwrap());
        let inside = |key: &str| start <= key && key <= end; // BETWEEN
        for ms in [at - 1, at, at + 1] {
            for random in [0, u64::MAX] {
                let long = RowKey::of(JobId::new(NodeId(random as u32), ms, random));
                assert_eq!(inside(long.as_str()), ms == at, "{long:?}");
            }
            assert_eq!(inside(&rfc3339_ms(ms)), ms == at, "{ms}");
        }
        assert!(!range.is_empty());
        assert!(Range::of(&query(at, at)).is_empty());
    }
}
