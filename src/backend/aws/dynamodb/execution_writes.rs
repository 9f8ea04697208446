//! Writes rows to the log table, 25 per call. Each row is serialized directly into the request (see
//! `json_call`).

use super::item::decimal;
use crate::availability::Availability;
use crate::backend::BackendError;
use crate::backend::aws::client::RETRIES;
use crate::backend::aws::json_call::JsonClient;
use crate::model::{Execution, JobId, Rfc3339Ms, RowId, RowKey, RowLife};
use futures_util::StreamExt;
use serde::Deserialize;
use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::io::Write as _;
use std::time::Duration;

const BATCH_WRITE: &str = "DynamoDB_20120810.BatchWriteItem";
const PUT: &str = "DynamoDB_20120810.PutItem";
/// The error code of a failed condition.
const CONDITION: &str = "ConditionalCheckFailedException";

/// LOST never replaces a row, because another row shows a result.
const IF_ABSENT: &str = r#","ConditionExpression":"attribute_not_exists(functionId)""#;
const IF_ABSENT_OR_LOST: &str = concat!(
    r##","ConditionExpression":"attribute_not_exists(functionId) OR #status = :lost""##,
    r##","ExpressionAttributeNames":{"#status":"status"}"##,
    r##","ExpressionAttributeValues":{":lost":{"S":"LOST"}}"##,
);

/// Single-row writes in flight where batches are denied.
const PUTS_IN_FLIGHT_MAX: usize = 8;
/// Maximum number of attempts for the rows that a batch leaves unprocessed.
const BATCH_TRIES_MAX: u32 = 6;
/// How often a batch is attempted while batches are denied; the policy may have changed.
const BATCHES_TRIED_EVERY: Duration = Duration::from_secs(60);

pub struct RowWrites {
    direct: JsonClient,
    table: String,
    /// Whether BatchWriteItem is allowed, as far as is known. The role of the old controller denies it.
    batches: Availability,
}

impl RowWrites {
    pub fn new(direct: JsonClient, table: &str) -> Self {
        Self {
            direct,
            table: table.to_owned(),
            batches: Availability::new(Duration::ZERO, BATCHES_TRIED_EVERY),
        }
    }

    /// Returns one result per row, in order.
    pub async fn put(&self, rows: &[Execution]) -> Vec<Result<(), BackendError>> {
        if rows.is_empty() {
            return Vec::new();
        }
        if !self.batches.may_try() {
            return self.put_one_by_one(rows).await;
        }
        let mut put = self.put_batch(rows).await;
        if matches!(put, Err(BackendError::Denied(_))) {
            // The credentials may have been the cause; they have been refreshed since.
            put = self.put_batch(rows).await;
        }
        match put {
            Ok(left) => {
                if self.batches.succeeded() {
                    tracing::info!(
                        table = %self.table,
                        "dynamodb:BatchWriteItem is allowed now; log rows are written in batches"
                    );
                }
                rows.iter().map(|row| written(row, &left)).collect()
            }
            Err(BackendError::Denied(_)) => {
                let written = self.put_one_by_one(rows).await;
                // Only if each row succeeds alone is the narrow role the cause, and not the credentials or a
                // row.
                if written.iter().all(Result::is_ok) && self.batches.failed() {
                    tracing::warn!(
                        table = %self.table,
                        "dynamodb:BatchWriteItem is denied, so log rows are written one by one. Allow it to \
                         save up to 24 of 25 calls"
                    );
                }
                written
            }
            // One invalid row causes the rejection of the batch. Alone, each row gets its own result.
            Err(BackendError::Invalid(_)) => self.put_one_by_one(rows).await,
            Err(error) => vec![Err(error); rows.len()],
        }
    }

    async fn put_one(&self, row: &Execution) -> Result<(), BackendError> {
        self.direct.call(PUT, self.put_request(row, "")).await.map(drop).map_err(|error| error.class())
    }

    /// Writes a row, unless the table has one with another status than LOST. Returns whether it wrote the
    /// row.
    pub async fn put_first(&self, row: &Execution) -> Result<bool, BackendError> {
        let condition = if row.is_lost() { IF_ABSENT } else { IF_ABSENT_OR_LOST };
        match self.direct.call(PUT, self.put_request(row, condition)).await {
            Ok(_) => Ok(true),
            Err(error) if error.code() == Some(CONDITION) => Ok(false),
            Err(error) => Err(error.class()),
        }
    }

    fn put_request(&self, row: &Execution, condition: &str) -> Vec<u8> {
        let mut body = Vec::with_capacity(row_bytes(row) + self.table.len() + condition.len());
        body.extend_from_slice(b"{\"TableName\":");
        put_text(&mut body, &self.table);
        body.extend_from_slice(condition.as_bytes());
        body.extend_from_slice(b",\"Item\":");
        put_item(&mut body, row);
        body.push(b'}');
        body
    }

    async fn put_one_by_one(&self, rows: &[Execution]) -> Vec<Result<(), BackendError>> {
        let puts: Vec<_> = rows.iter().map(|row| self.put_one(row)).collect();
        futures_util::stream::iter(puts).buffered(PUTS_IN_FLIGHT_MAX).collect().await
    }

    /// Returns the keys of the rows that are still unprocessed after the last attempt.
    async fn put_batch(&self, rows: &[Execution]) -> Result<HashSet<ItemKey>, BackendError> {
        let mut left = HashSet::new();
        for tried in 0..BATCH_TRIES_MAX {
            if tried > 0 {
                RETRIES.sleep(tried).await;
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

/// A row's hash and range key.
type ItemKey = (String, String);

fn key_of(row: &Execution) -> ItemKey {
    (row.function.as_str().to_owned(), row.id.key().into_owned())
}

fn written(row: &Execution, left: &HashSet<ItemKey>) -> Result<(), BackendError> {
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

/// Approximate size of a row in the request, in bytes.
fn row_bytes(row: &Execution) -> usize {
    row.message.len() + row.message.len() / 8 + 1024
}

/// The attributes of the log table.
fn put_item(body: &mut Vec<u8>, row: &Execution) {
    body.extend_from_slice(b"{\"functionId\":{\"S\":");
    put_text(body, row.function.as_str());
    let mut text = |name: &str, value: &str| {
        put_name(body, name, "S");
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
        put_name(body, name, "N");
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
    put_life(body, &row.life);
    if let Some(is_cold) = row.cold_start {
        put_name(body, "coldStart", "BOOL");
        body.extend_from_slice(if is_cold { b"true" } else { b"false" });
    }
    body.extend_from_slice(b"}}");
}

/// The attributes that tell the life of the job. Those that are not known are absent.
fn put_life(body: &mut Vec<u8>, life: &RowLife) {
    let times = [
        ("sentAt", life.sent_at),
        ("confirmedAt", life.confirmed_at),
        ("startedAt", life.started_at),
        ("writtenAt", life.written_at),
    ];
    for (name, at) in times.into_iter().filter_map(|(name, at)| Some((name, at?))) {
        put_name(body, name, "S");
        put_text(body, Rfc3339Ms::of(at).as_str());
    }
    let ended_by = life.ended_by.map(|node| node.to_string());
    let texts = [
        ("workerId", life.worker_id.as_deref()),
        ("endedBy", ended_by.as_deref()),
        ("keyName", life.key_name.as_deref()),
        ("traceId", life.trace_id.as_deref()),
    ];
    for (name, text) in texts.into_iter().filter_map(|(name, text)| Some((name, text?))) {
        put_name(body, name, "S");
        put_text(body, text);
    }
    let numbers = [
        ("configVersion", life.config_version.map(i128::from)),
        ("allocatedMb", life.allocated_mb.map(i128::from)),
        ("exitCode", life.exit_code.map(i128::from)),
    ];
    for (name, number) in numbers.into_iter().filter_map(|(name, number)| Some((name, number?))) {
        put_name(body, name, "N");
        let _ = write!(body, "\"{number}\""); // writing to memory cannot fail
    }
}

/// Closes the previous attribute and opens the next one.
fn put_name(body: &mut Vec<u8>, name: &str, kind: &str) {
    body.extend_from_slice(b"},\"");
    body.extend_from_slice(name.as_bytes());
    body.extend_from_slice(b"\":{\"");
    body.extend_from_slice(kind.as_bytes());
    body.extend_from_slice(b"\":");
}

fn put_text(body: &mut Vec<u8>, text: &str) {
    // Writing a string to memory cannot fail.
    let _ = serde_json::to_writer(body, text);
}

/// The keys of the rows that a batch did not process.
fn unprocessed(answer: &[u8]) -> Result<HashSet<ItemKey>, BackendError> {
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
        .map_err(|_| BackendError::Unavailable("the answer is malformed".into()))?;
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
            concat!(
                r#"{"status":"SUCCESS","stdout":"o\n\u0001\ud83d\ude00","durationMs":1.5,"#,
                r#""handlerDurationMs":1,"peakMemoryBytes":1048576,"coldStart":true}"#
            ),
            "{}",
        ];
        let mut rows: Vec<_> = said
            .iter()
            .map(|said| Execution::of(id, function.clone(), &Outcome::new((*said).into()).fields()))
            .collect();
        rows.push(Execution::lost(id, function, false));
        rows[0].life = RowLife::sample();
        rows
    }

    /// Converts an item of a request to the form in which the table returns it.
    fn read(item: &Value) -> HashMap<String, AttributeValue> {
        let attribute = |value: &Value| match (&value["S"], &value["N"], &value["BOOL"]) {
            (Value::String(text), ..) => AttributeValue::S(text.clone()),
            (_, Value::String(number), _) => AttributeValue::N(number.clone()),
            (.., Value::Bool(flag)) => AttributeValue::Bool(*flag),
            _ => panic!("{value}"),
        };
        item.as_object().unwrap().iter().map(|(name, value)| (name.clone(), attribute(value))).collect()
    }

    #[test]
    fn a_row_survives_a_round_trip() {
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
        assert_eq!(item["coldStart"], AttributeValue::Bool(true));
        assert_eq!(item["memoryMb"], AttributeValue::N("1".into()));
        let key = RowKey::of(JobId::new(NodeId(7), 1_795_305_600_123, 9));
        assert_eq!(item["timestamp"], AttributeValue::S(key.as_str().to_owned()));
    }

    #[test]
    fn unprocessed_rows_are_identified_by_their_keys() {
        let row = &rows()[0];
        let sent = String::from_utf8(batch("t", &[row])).unwrap();
        // The table returns the unprocessed items as they were sent.
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
