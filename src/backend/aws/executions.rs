//! The execution log (CONTRACT §6).

use super::client::backoff;
use super::error::class;
use super::item::{self, Item, RawItem, float, text, whole};
use crate::backend::{BackendError, ExecutionStore, LogPage, LogQuery, ROWS_MAX};
use crate::model::{Execution, FunctionId, JobId, RowKey, Status, now_ms, parse_rfc3339_ms, rfc3339_ms};
use async_trait::async_trait;
use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::error::SdkError;
use aws_sdk_dynamodb::operation::put_item::PutItemError;
use aws_sdk_dynamodb::operation::query::builders::QueryFluentBuilder;
use aws_sdk_dynamodb::types::{AttributeValue, PutRequest, WriteRequest};
use futures_util::StreamExt;
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};

/// Most pages of a table (1 MB each) that one listing reads. A filter that hides more than that gives a short
/// page whose `next` goes on where it stopped.
const LIST_PAGES_MAX: usize = 10;
/// Items looked at a page once a filter hides some: a dense run of other or expired rows costs few calls.
const FILTERED_PAGE_ITEMS: usize = 250;
/// Most pages that the look-up of an old controller's request id reads: about 20 MB of a function's newest rows.
const FIND_PAGES_MAX: usize = 20;
/// Rows written one by one at once, where batches are not allowed.
const PUTS_IN_FLIGHT_MAX: usize = 8;
/// Most tries for what a batch leaves unprocessed.
const BATCH_TRIES_MAX: u32 = 6;

pub(super) struct ExecutionTable {
    client: Client,
    table: String,
    /// BatchWriteItem was denied: the role is the old, narrow one.
    one_by_one: AtomicBool,
}

impl ExecutionTable {
    pub(super) fn new(client: Client, table: &str) -> Self {
        Self { client, table: table.to_owned(), one_by_one: AtomicBool::new(false) }
    }

    async fn put_one(&self, row: &Execution) -> Result<(), BackendError> {
        let mut call = self.client.put_item().table_name(&self.table).set_item(Some(to_item(row)));
        if is_lost(row) {
            call = call.condition_expression("attribute_not_exists(functionId)");
        }
        match call.send().await {
            Ok(_) => Ok(()),
            Err(SdkError::ServiceError(answer))
                if matches!(answer.err(), PutItemError::ConditionalCheckFailedException(_)) =>
            {
                Ok(())
            }
            Err(error) => Err(class(&error)),
        }
    }

    async fn put_one_by_one(&self, rows: &[Execution]) -> Vec<Result<(), BackendError>> {
        let puts: Vec<_> = rows.iter().map(|row| self.put_one(row)).collect();
        futures_util::stream::iter(puts).buffered(PUTS_IN_FLIGHT_MAX).collect().await
    }

    /// The keys of the rows still unwritten after the last try.
    async fn put_batch(&self, rows: &[Execution]) -> Result<HashSet<Key>, BackendError> {
        let mut left: Vec<_> = rows.iter().filter_map(|row| write_request(to_item(row))).collect();
        for tried in 0..BATCH_TRIES_MAX {
            if tried > 0 {
                tokio::time::sleep(backoff(tried)).await;
            }
            let call = self.client.batch_write_item().request_items(&self.table, left);
            let output = call.send().await.map_err(|e| class(&e))?;
            left = output.unprocessed_items.and_then(|mut all| all.remove(&self.table)).unwrap_or_default();
            if left.is_empty() {
                break;
            }
        }
        Ok(left.iter().filter_map(|write| write.put_request()).map(|put| key_of(put.item())).collect())
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
        if rows.is_empty() {
            return Vec::new();
        }
        // A batch knows no conditions, and LOST must not take the place of a result.
        if self.one_by_one.load(Ordering::Relaxed) || rows.iter().any(is_lost) {
            return self.put_one_by_one(rows).await;
        }
        match self.put_batch(rows).await {
            Ok(left) => rows.iter().map(|row| written(row, &left)).collect(),
            Err(BackendError::Denied(_)) => {
                let written = self.put_one_by_one(rows).await;
                // Only when single rows do pass is it the narrow role, and not the credentials.
                if written.iter().any(Result::is_ok) && !self.one_by_one.swap(true, Ordering::Relaxed) {
                    tracing::warn!(
                        table = %self.table,
                        "dynamodb:BatchWriteItem is denied, so log rows go one by one; allowing it saves up to 24 of 25 calls"
                    );
                }
                written
            }
            // One bad row has the whole batch refused; alone each gets its own answer.
            Err(BackendError::Invalid(_)) => self.put_one_by_one(rows).await,
            Err(error) => vec![Err(error); rows.len()],
        }
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
            // One row more than asked for tells whether there is a next page.
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
            rows.last().map(|row| row.key.as_str().to_owned())
        } else {
            after.and_then(|key| Item::new(key).text("timestamp"))
        };
        Ok(LogPage { rows, next })
    }

    async fn get(&self, function: &FunctionId, request_id: &str) -> Result<Option<Execution>, BackendError> {
        let Some(id) = JobId::parse(request_id) else {
            // The old controller's ids are UUIDs; a search reads much, and nothing else is worth it.
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
        Ok(row.filter(|row| row.request_id == request_id && row.is_live(now_ms())))
    }

    async fn probe(&self) -> Result<(), BackendError> {
        item::probe(&self.client, &self.table, &["functionId", "timestamp"]).await
    }
}

/// Nobody knows how the job ended, so what somebody knew before stays.
fn is_lost(row: &Execution) -> bool {
    row.status.as_str() == Status::LOST
}

/// A row's hash and range key.
type Key = (String, String);

fn key_of(item: &RawItem) -> Key {
    let part =
        |name| item.get(name).and_then(|value| value.as_s().ok()).map_or_else(String::new, String::clone);
    (part("functionId"), part("timestamp"))
}

fn key_item(function: &FunctionId, range: &str) -> RawItem {
    HashMap::from([("functionId".to_owned(), text(function.as_str())), ("timestamp".to_owned(), text(range))])
}

fn written(row: &Execution, left: &HashSet<Key>) -> Result<(), BackendError> {
    if left.contains(&(row.function.as_str().to_owned(), row.key.as_str().to_owned())) {
        return Err(BackendError::Unavailable("DynamoDB left the row unprocessed".into()));
    }
    Ok(())
}

fn write_request(item: RawItem) -> Option<WriteRequest> {
    // Fails only without an item.
    let put = PutRequest::builder().set_item(Some(item)).build().ok()?;
    Some(WriteRequest::builder().put_request(put).build())
}

/// Bounds on the range key: milliseconds without the `Z`.
///
/// A plain key `….123Z` and a long key `….123<25 digits>Z` both sort after `….123` and before `….124`, and no key
/// equals a bound, so an end that DynamoDB's BETWEEN includes is still exclusive.
struct Range {
    start: Option<String>,
    end: Option<String>,
}

impl Range {
    fn of(query: &LogQuery) -> Self {
        Self { start: query.start.map(RowKey::bound), end: query.end.map(RowKey::bound) }
    }

    /// DynamoDB refuses a BETWEEN that runs backwards.
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

fn to_item(row: &Execution) -> RawItem {
    let mut item = key_item(&row.function, row.key.as_str());
    let mut set = |name: &str, value: AttributeValue| item.insert(name.to_owned(), value);
    set("requestId", text(row.request_id.as_str()));
    set("status", text(row.status.as_str()));
    set("duration", float(row.duration_ms));
    set("memoryMb", whole(row.memory_mb));
    set("message", text(row.message.as_str()));
    if let Some(ms) = row.handler_duration_ms {
        set("handlerDurationMs", float(ms));
    }
    if let Some(at) = row.completed_at {
        set("completedAt", text(rfc3339_ms(at)));
    }
    if let Some(at) = row.expires_at_s {
        set("expiresAt", whole(at));
    }
    item
}

fn from_item(function: &FunctionId, raw: RawItem) -> Execution {
    let item = Item::new(raw);
    let text = |name| item.text(name).unwrap_or_default();
    Execution {
        function: function.clone(),
        key: RowKey::stored(text("timestamp")),
        request_id: text("requestId"),
        status: Status::new(&text("status")),
        duration_ms: item.float("duration").unwrap_or(0.0),
        handler_duration_ms: item.float("handlerDurationMs"),
        memory_mb: item.whole("memoryMb").unwrap_or(0),
        message: text("message"),
        completed_at: item.text("completedAt").and_then(|at| parse_rfc3339_ms(&at)),
        expires_at_s: item.whole("expiresAt"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{NodeId, Outcome};

    fn function() -> FunctionId {
        FunctionId::parse("f").unwrap()
    }

    #[test]
    fn a_row_survives_the_table() {
        let id = JobId::new(NodeId(7), 1_795_305_600_123, 9);
        let outcome = Outcome::new(
            r#"{"status":"SUCCESS","stdout":"o","durationMs":1.5,"handlerDurationMs":1,"peakMemoryBytes":1048576}"#
                .into(),
        );
        for row in [Execution::of(id, function(), &outcome.fields()), Execution::lost(id, function())] {
            assert_eq!(from_item(&function(), to_item(&row)), row);
        }
        let item = to_item(&Execution::of(id, function(), &outcome.fields()));
        assert_eq!(item["duration"], AttributeValue::N("1.5".into()));
        assert_eq!(item["memoryMb"], AttributeValue::N("1".into()));
        assert_eq!(key_of(&item), ("f".to_owned(), RowKey::of(id).as_str().to_owned()));
    }

    #[test]
    fn an_old_row_is_read() {
        let mut raw = key_item(&function(), "2024-01-02T03:04:05.678Z");
        raw.insert("duration".into(), text("12"));
        raw.insert("status".into(), text("FAILED"));
        let row = from_item(&function(), raw);
        assert_eq!((row.duration_ms, row.status.as_str(), row.request_id.as_str()), (12.0, "FAILED", ""));
        assert_eq!((row.completed_at, row.expires_at_s, row.handler_duration_ms), (None, None, None));
    }

    #[test]
    fn bounds_cut_between_milliseconds_for_both_kinds_of_key() {
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
