//! How rows go into the table: 25 a call, straight from the row to the text of the call (see `direct`).

use super::item::decimal;
use crate::backend::BackendError;
use crate::backend::aws::client::backoff;
use crate::backend::aws::json_call::Direct;
use crate::model::{Execution, JobId, Rfc3339Ms, RowId, RowKey, Status};
use futures_util::StreamExt;
use serde::Deserialize;
use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

const BATCH_WRITE: &str = "DynamoDB_20120810.BatchWriteItem";
const PUT: &str = "DynamoDB_20120810.PutItem";
/// A condition did not hold.
const CONDITION: &str = "ConditionalCheckFailedException";

/// Rows written one by one at once, where batches are not allowed.
const PUTS_IN_FLIGHT_MAX: usize = 8;
/// Most tries for what a batch leaves unprocessed.
const BATCH_TRIES_MAX: u32 = 6;
/// How often batches are tried where they are not allowed: the policy may have changed.
const BATCHES_TRIED_EVERY: Duration = Duration::from_secs(60);

pub struct RowWrites {
    direct: Direct,
    table: String,
    batches: BatchPermission,
}

/// Whether BatchWriteItem is allowed, as far as is known: the old controller's role does not allow it.
#[derive(Default)]
struct BatchPermission {
    /// `None`: it is. Else when it was tried last.
    tried_at: Mutex<Option<Instant>>,
}

impl BatchPermission {
    /// Whether to try a batch: always, and one now and then where it was denied.
    fn may_try(&self) -> bool {
        let mut tried_at = self.tried_at();
        let may = tried_at.is_none_or(|at| at.elapsed() >= BATCHES_TRIED_EVERY);
        if may && tried_at.is_some() {
            *tried_at = Some(Instant::now());
        }
        may
    }

    /// Gives whether that is new.
    fn denied(&self) -> bool {
        self.tried_at().replace(Instant::now()).is_none()
    }

    /// Gives whether that is new.
    fn allowed(&self) -> bool {
        self.tried_at().take().is_some()
    }

    fn tried_at(&self) -> MutexGuard<'_, Option<Instant>> {
        self.tried_at.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RowWrites {
    pub fn new(direct: Direct, table: &str) -> Self {
        Self { direct, table: table.to_owned(), batches: BatchPermission::default() }
    }

    /// One result per row, in order.
    pub async fn put(&self, rows: &[Execution]) -> Vec<Result<(), BackendError>> {
        if rows.is_empty() {
            return Vec::new();
        }
        // A batch knows no conditions, and LOST must not take the place of a result.
        if rows.iter().any(is_lost) || !self.batches.may_try() {
            return self.put_one_by_one(rows).await;
        }
        let mut put = self.put_batch(rows).await;
        if matches!(put, Err(BackendError::Denied(_))) {
            // It may have been the credentials, which were looked up anew by now.
            put = self.put_batch(rows).await;
        }
        match put {
            Ok(left) => {
                if self.batches.allowed() {
                    tracing::info!(table = %self.table, "Log rows go in batches: dynamodb:BatchWriteItem is allowed now");
                }
                rows.iter().map(|row| written(row, &left)).collect()
            }
            Err(BackendError::Denied(_)) => {
                let written = self.put_one_by_one(rows).await;
                // Only when all rows do pass alone is it the narrow role, and neither the credentials nor one of the rows.
                if written.iter().all(Result::is_ok) && self.batches.denied() {
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

    async fn put_one(&self, row: &Execution) -> Result<(), BackendError> {
        let mut body = Vec::with_capacity(row_bytes(row) + self.table.len());
        body.extend_from_slice(b"{\"TableName\":");
        put_text(&mut body, &self.table);
        if is_lost(row) {
            body.extend_from_slice(b",\"ConditionExpression\":\"attribute_not_exists(functionId)\"");
        }
        body.extend_from_slice(b",\"Item\":");
        put_item(&mut body, row);
        body.push(b'}');
        match self.direct.call(PUT, body).await {
            Ok(_) => Ok(()),
            Err(error) if error.code() == Some(CONDITION) => Ok(()),
            Err(error) => Err(error.class()),
        }
    }

    async fn put_one_by_one(&self, rows: &[Execution]) -> Vec<Result<(), BackendError>> {
        let puts: Vec<_> = rows.iter().map(|row| self.put_one(row)).collect();
        futures_util::stream::iter(puts).buffered(PUTS_IN_FLIGHT_MAX).collect().await
    }

    /// The keys of the rows still unwritten after the last try.
    async fn put_batch(&self, rows: &[Execution]) -> Result<HashSet<Key>, BackendError> {
        let mut left = HashSet::new();
        for tried in 0..BATCH_TRIES_MAX {
            if tried > 0 {
                tokio::time::sleep(backoff(tried)).await;
            }
            let wanted: Vec<_> =
                rows.iter().filter(|row| tried == 0 || left.contains(&key_of(row))).collect();
            let answer = self.direct.call(BATCH_WRITE, batch(&self.table, &wanted)).await;
            left = unprocessed(&answer.map_err(|e| e.class())?)?;
            if left.is_empty() {
                break;
            }
        }
        Ok(left)
    }
}

/// Nobody knows how the job ended, so what somebody knew before stays.
fn is_lost(row: &Execution) -> bool {
    row.status.as_str() == Status::LOST
}

/// A row's hash and range key.
type Key = (String, String);

fn key_of(row: &Execution) -> Key {
    (row.function.as_str().to_owned(), row.id.key().into_owned())
}

fn written(row: &Execution, left: &HashSet<Key>) -> Result<(), BackendError> {
    if !left.is_empty() && left.contains(&key_of(row)) {
        return Err(BackendError::Unavailable("DynamoDB left the row unprocessed".into()));
    }
    Ok(())
}

fn batch(table: &str, rows: &[&Execution]) -> Vec<u8> {
    let mut body =
        Vec::with_capacity(rows.iter().map(|row| row_bytes(row)).sum::<usize>() + table.len() + 64);
    body.extend_from_slice(b"{\"RequestItems\":{");
    put_text(&mut body, table);
    body.extend_from_slice(b":[");
    for (n, row) in rows.iter().enumerate() {
        body.extend_from_slice(if n == 0 { b"" } else { b"," });
        body.extend_from_slice(b"{\"PutRequest\":{\"Item\":");
        put_item(&mut body, row);
        body.extend_from_slice(b"}}");
    }
    body.extend_from_slice(b"]}}");
    body
}

/// Room for a row in a body, roughly.
fn row_bytes(row: &Execution) -> usize {
    row.message.len() + row.message.len() / 8 + 512
}

/// The attributes of CONTRACT §6.
fn put_item(body: &mut Vec<u8>, row: &Execution) {
    body.extend_from_slice(b"{\"functionId\":{\"S\":");
    put_text(body, row.function.as_str());
    let mut text = |name: &str, value: &str| {
        put_name(body, name, 'S');
        put_text(body, value);
    };
    match &row.id {
        RowId::Job(id) => {
            text("timestamp", RowKey::of(*id).as_str());
            text("requestId", id.text(&mut [0; JobId::TEXT_BYTES]));
        }
        RowId::Old { key, request_id } => {
            text("timestamp", key);
            text("requestId", request_id);
        }
    }
    text("status", row.status.as_str());
    text("message", row.message.as_str());
    if let Some(at) = row.completed_at {
        text("completedAt", Rfc3339Ms::of(at).as_str());
    }
    let mut number = |name: &str, value: &str| {
        put_name(body, name, 'N');
        body.push(b'"');
        body.extend_from_slice(value.as_bytes());
        body.push(b'"');
    };
    number("duration", &decimal(row.duration_ms));
    number("memoryMb", &row.memory_mb.to_string());
    if let Some(ms) = row.handler_duration_ms {
        number("handlerDurationMs", &decimal(ms));
    }
    if let Some(at) = row.expires_at_s {
        number("expiresAt", &at.to_string());
    }
    body.extend_from_slice(b"}}");
}

/// Ends the attribute before and begins the next.
fn put_name(body: &mut Vec<u8>, name: &str, kind: char) {
    body.extend_from_slice(b"},\"");
    body.extend_from_slice(name.as_bytes());
    body.extend_from_slice(b"\":{\"");
    body.push(kind as u8);
    body.extend_from_slice(b"\":");
}

fn put_text(body: &mut Vec<u8>, text: &str) {
    // Writing a string to memory cannot fail.
    let _ = serde_json::to_writer(body, text);
}

/// The keys of the rows that a batch left out.
fn unprocessed(answer: &[u8]) -> Result<HashSet<Key>, BackendError> {
    #[derive(Deserialize)]
    struct Answer<'a> {
        #[serde(rename = "UnprocessedItems", borrow, default)]
        tables: HashMap<Cow<'a, str>, Vec<Left<'a>>>,
    }
    #[derive(Deserialize)]
    struct Left<'a> {
        #[serde(rename = "PutRequest", borrow)]
        put: Put<'a>,
    }
    #[derive(Deserialize)]
    struct Put<'a> {
        #[serde(rename = "Item", borrow)]
        item: KeyItem<'a>,
    }
    #[derive(Deserialize)]
    struct KeyItem<'a> {
        #[serde(rename = "functionId", borrow)]
        function: Value<'a>,
        #[serde(borrow)]
        timestamp: Value<'a>,
    }
    #[derive(Deserialize)]
    struct Value<'a> {
        #[serde(rename = "S", borrow)]
        text: Cow<'a, str>,
    }
    let answer: Answer<'_> = serde_json::from_slice(answer)
        .map_err(|_| BackendError::Unavailable("the answer could not be read".into()))?;
    let left = answer.tables.into_values().flatten().map(|left| left.put.item);
    Ok(left.map(|item| (item.function.text.into_owned(), item.timestamp.text.into_owned())).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::aws::dynamodb::executions::from_item;
    use crate::model::{FunctionId, NodeId, Outcome};
    use aws_sdk_dynamodb::types::AttributeValue;
    use serde_json::Value;

    fn rows() -> Vec<Execution> {
        let function = FunctionId::parse("f").unwrap();
        let id = JobId::new(NodeId(7), 1_795_305_600_123, 9);
        let said = [
            r#"{"status":"SUCCESS","stdout":"o\n\u0001\ud83d\ude00","durationMs":1.5,"handlerDurationMs":1,"peakMemoryBytes":1048576}"#,
            "{}",
        ];
        let mut rows: Vec<_> = said
            .iter()
            .map(|said| Execution::of(id, function.clone(), &Outcome::new((*said).into()).fields()))
            .collect();
        rows.push(Execution::lost(id, function, false));
        rows
    }

    /// As the table gives an item back.
    fn read(item: &Value) -> HashMap<String, AttributeValue> {
        let attribute = |value: &Value| match (&value["S"], &value["N"]) {
            (Value::String(text), _) => AttributeValue::S(text.clone()),
            (_, Value::String(number)) => AttributeValue::N(number.clone()),
            _ => panic!("{value}"),
        };
        item.as_object().unwrap().iter().map(|(name, value)| (name.clone(), attribute(value))).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn batches_that_are_denied_are_tried_again_at_a_pace() {
        let batches = BatchPermission::default();
        assert!(batches.may_try() && batches.may_try());
        assert!(batches.denied(), "told once");
        for _ in 0..3 {
            assert!(!batches.may_try());
            tokio::time::advance(BATCHES_TRIED_EVERY).await;
            assert!(batches.may_try() && !batches.may_try(), "one a minute");
            assert!(!batches.denied());
        }
        assert!(batches.allowed() && !batches.allowed());
        assert!(batches.may_try() && batches.may_try());
    }

    #[test]
    fn a_row_survives_the_table() {
        let rows = rows();
        let body: Value = serde_json::from_slice(&batch("t\"", &rows.iter().collect::<Vec<_>>())).unwrap();
        let requests = body["RequestItems"]["t\""].as_array().unwrap();
        assert_eq!(requests.len(), rows.len());
        for (row, request) in rows.iter().zip(requests) {
            let item = read(&request["PutRequest"]["Item"]);
            assert_eq!(&from_item(&row.function, item), row);
        }
        let item = read(&requests[0]["PutRequest"]["Item"]);
        assert_eq!(item["duration"], AttributeValue::N("1.5".into()));
        assert_eq!(item["memoryMb"], AttributeValue::N("1".into()));
        let key = RowKey::of(JobId::new(NodeId(7), 1_795_305_600_123, 9));
        assert_eq!(item["timestamp"], AttributeValue::S(key.as_str().to_owned()));
    }

    #[test]
    fn what_a_batch_left_out_is_known_by_its_key() {
        let row = &rows()[0];
        let sent = String::from_utf8(batch("t", &[row])).unwrap();
        // The table gives back what it was sent.
        let answer = sent.replace("RequestItems", "UnprocessedItems");
        let left = unprocessed(answer.as_bytes()).unwrap();
        assert_eq!(left, HashSet::from([key_of(row)]));
        assert!(written(row, &left).is_err() && written(row, &HashSet::new()).is_ok());
        for empty in ["{}", r#"{"UnprocessedItems":{}}"#] {
            assert_eq!(unprocessed(empty.as_bytes()), Ok(HashSet::new()));
        }
        assert!(unprocessed(b"x").is_err());
    }
}
