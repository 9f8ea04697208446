//! `/functions/:id/logs`, `/functions/:id/logs/:requestId` and `/logs`.

use super::cursor::{Cursors, with_next};
use super::functions::function_id;
use super::query::Query;
use super::{ApiError, Call, Reply};
use crate::audit::{Tail, TailEntry};
use crate::backend::{ExecutionStore, LogQuery};
use crate::model::{Execution, parse_rfc3339_ms, rfc3339_ms};
use http::StatusCode;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// Rows of a list when the client names no number.
const LIMIT_DEFAULT: usize = 100;
const LIMIT_MAX: usize = 1000;
/// A list shows this many characters of each message.
const MESSAGE_CHARS: usize = 200;

/// Longest status that is asked for, in characters; none that is kept is longer.
const STATUS_CHARS_MAX: usize = 64;

pub struct Logs {
    executions: Arc<dyn ExecutionStore>,
    tail: Tail,
    cursors: Cursors,
}

impl Logs {
    pub fn new(executions: Arc<dyn ExecutionStore>, tail: Tail, cursors: Cursors) -> Self {
        Self { executions, tail, cursors }
    }

    pub async fn list(&self, call: &Call) -> Result<Reply, ApiError> {
        let query = Query::read(&call.uri, &["limit", "startTime", "endTime", "status", "cursor"])?;
        let wanted = self.wanted(call, &query)?;
        let page = self.executions.list(&wanted).await.map_err(|e| ApiError::backend("the log table", &e))?;
        let rows: Vec<Value> = page.rows.iter().map(|row| shown(row, cut(&row.message))).collect();
        let reply = Reply::value(StatusCode::OK, &Value::Array(rows));
        let Some(place) = page.next else { return Ok(reply) };
        let cursor = self.cursors.seal(&context(&wanted).each_ref().map(String::as_str), &place);
        let mut next: Vec<_> =
            ["limit", "startTime", "endTime", "status"].map(|name| (name, query.get(name))).into();
        next.push(("cursor", Some(&cursor)));
        Ok(with_next(reply, call, &next))
    }

    pub async fn get(&self, call: &Call) -> Result<Reply, ApiError> {
        let function = function_id(call)?;
        let request_id = call.params.get(1).ok_or(ApiError::NoSuchLog)?;
        let row = self.executions.get(&function, request_id).await;
        let row = row.map_err(|e| ApiError::backend("the log table", &e))?.ok_or(ApiError::NoSuchLog)?;
        Ok(Reply::value(StatusCode::OK, &shown(&row, &row.message)))
    }

    /// The last executions of this node.
    pub fn of_node(&self) -> Reply {
        let entries = self.tail.entries().iter().map(tail_entry).collect();
        Reply::value(StatusCode::OK, &Value::Array(entries))
    }

    fn wanted(&self, call: &Call, query: &Query<'_>) -> Result<LogQuery, ApiError> {
        let time = |name: &str| query.get(name).map(|value| time(name, value)).transpose();
        let status = query.get("status").map(str::to_owned);
        if status.as_ref().is_some_and(|status| !(1..=STATUS_CHARS_MAX).contains(&status.chars().count())) {
            return Err(ApiError::invalid(format!("`status` must have 1 to {STATUS_CHARS_MAX} characters")));
        }
        let mut wanted = LogQuery {
            function: function_id(call)?,
            limit: query.limit(LIMIT_DEFAULT, LIMIT_MAX)?,
            start: time("startTime")?,
            end: time("endTime")?,
            status,
            after: None,
        };
        if let Some(cursor) = query.get("cursor") {
            let context = context(&wanted);
            wanted.after = Some(self.cursors.open(&context.each_ref().map(String::as_str), cursor)?);
        }
        Ok(wanted)
    }
}

/// What a cursor is bound to: the function and the filter. The page's length may change on the way.
fn context(query: &LogQuery) -> [String; 5] {
    let time = |at: Option<u64>| at.map_or_else(String::new, |at| at.to_string());
    let status = query.status.clone().unwrap_or_default();
    ["logs".to_owned(), query.function.to_string(), time(query.start), time(query.end), status]
}

fn time(name: &str, value: &str) -> Result<u64, ApiError> {
    parse_rfc3339_ms(value).ok_or_else(|| {
        ApiError::invalid(format!("`{name}` must be an RFC 3339 time, such as 2026-11-22T00:00:00Z"))
    })
}

fn tail_entry(entry: &TailEntry) -> Value {
    let is_success = entry.status.is_success();
    let (level, msg) = if is_success { ("info", "Execution Success") } else { ("error", "Execution Failed") };
    json!({
        "id": entry.id.to_string(),
        "level": level,
        "timestamp": rfc3339_ms(entry.at),
        "msg": msg,
        "functionId": entry.function.as_str(),
        "requestId": entry.id.to_string(),
        "duration": number(entry.duration_ms),
        "status": entry.status.as_str(),
    })
}

fn cut(message: &str) -> &str {
    message.char_indices().nth(MESSAGE_CHARS).map_or(message, |(end, _)| &message[..end])
}

fn shown(row: &Execution, message: &str) -> Value {
    let mut shown = Map::new();
    shown.insert("id".into(), json!(row.id.request_id()));
    shown.insert("requestId".into(), json!(row.id.request_id()));
    shown.insert("timestamp".into(), json!(row.id.timestamp()));
    shown.insert("status".into(), json!(row.status.as_str()));
    shown.insert("duration".into(), number(row.duration_ms));
    shown.insert("handlerDurationMs".into(), row.handler_duration_ms.map_or(Value::Null, number));
    shown.insert("memory".into(), json!(row.memory_mb));
    shown.insert("message".into(), json!(message));
    if let Some(at) = row.completed_at {
        shown.insert("completedAt".into(), json!(rfc3339_ms(at)));
    }
    Value::Object(shown)
}

/// Whole numbers without a fraction, as the old controller showed them.
pub fn number(value: f64) -> Value {
    // Every whole f64 below 2^53 is exact as an integer.
    if value.fract() == 0.0 && value.abs() < 9e15 { json!(value as i64) } else { json!(value) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_cut_in_characters() {
        assert_eq!(cut("short"), "short");
        assert_eq!(cut(&"ä".repeat(201)), "ä".repeat(200));
    }

    #[test]
    fn numbers_are_shown_as_before() {
        assert_eq!([number(12.0), number(1.5), number(0.0)].map(|n| n.to_string()), ["12", "1.5", "0"]);
    }
}
