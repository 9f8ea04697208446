//! `/functions/:id/logs` and `/functions/:id/logs/:requestId`.

use super::functions::function_id;
use super::{ApiError, Call, Reply};
use crate::backend::{ExecutionStore, LogQuery};
use crate::model::{Execution, FunctionId, parse_rfc3339_ms, rfc3339_ms};
use http::StatusCode;
use percent_encoding::percent_decode_str;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// Rows of a list when the client names no number.
const LIMIT_DEFAULT: usize = 100;
const LIMIT_MAX: usize = 1000;
/// A list shows this many characters of each message.
const MESSAGE_CHARS: usize = 200;

pub struct Logs {
    executions: Arc<dyn ExecutionStore>,
}

impl Logs {
    pub fn new(executions: Arc<dyn ExecutionStore>) -> Self {
        Self { executions }
    }

    pub async fn list(&self, call: &Call) -> Result<Reply, ApiError> {
        let query = parse_query(function_id(call)?, call.query.as_deref().unwrap_or_default())?;
        let page = self.executions.list(&query).await.map_err(|e| ApiError::backend("the log table", &e))?;
        let rows: Vec<Value> = page.rows.iter().map(|row| shown(row, cut(&row.message))).collect();
        Ok(Reply::value(StatusCode::OK, &Value::Array(rows)))
    }

    pub async fn get(&self, call: &Call) -> Result<Reply, ApiError> {
        let function = function_id(call)?;
        let request_id = call.params.get(1).ok_or(ApiError::NoSuchLog)?;
        let row = self.executions.get(&function, request_id).await;
        let row = row.map_err(|e| ApiError::backend("the log table", &e))?.ok_or(ApiError::NoSuchLog)?;
        Ok(Reply::value(StatusCode::OK, &shown(&row, &row.message)))
    }
}

fn parse_query(function: FunctionId, query: &str) -> Result<LogQuery, ApiError> {
    let mut parsed =
        LogQuery { function, limit: LIMIT_DEFAULT, start: None, end: None, status: None, after: None };
    for pair in query.split('&') {
        let (name, raw) = pair.split_once('=').unwrap_or((pair, ""));
        let plus_is_blank = raw.replace('+', " ");
        let decoded = percent_decode_str(&plus_is_blank).decode_utf8();
        let value = decoded.map_err(|_| ApiError::invalid("the query is not UTF-8"))?;
        match name {
            "limit" => {
                let limit = value.parse().ok().filter(|n| (1..=LIMIT_MAX).contains(n));
                parsed.limit =
                    limit.ok_or_else(|| ApiError::invalid("`limit` must be a number from 1 to 1000"))?;
            }
            "startTime" => parsed.start = Some(time("startTime", &value)?),
            "endTime" => parsed.end = Some(time("endTime", &value)?),
            "status" => parsed.status = Some(value.into_owned()),
            _ => {}
        }
    }
    Ok(parsed)
}

/// A `+` of an offset that was not encoded has become a blank; it is meant all the same.
fn time(name: &str, value: &str) -> Result<u64, ApiError> {
    parse_rfc3339_ms(&value.replace(' ', "+")).ok_or_else(|| {
        ApiError::invalid(format!("`{name}` must be an RFC 3339 time, such as 2026-11-22T00:00:00Z"))
    })
}

fn cut(message: &str) -> &str {
    message.char_indices().nth(MESSAGE_CHARS).map_or(message, |(end, _)| &message[..end])
}

fn shown(row: &Execution, message: &str) -> Value {
    let mut shown = Map::new();
    shown.insert("id".into(), json!(row.request_id));
    shown.insert("requestId".into(), json!(row.request_id));
    shown.insert("timestamp".into(), json!(row.key.timestamp()));
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
fn number(value: f64) -> Value {
    // Every whole f64 below 2^53 is exact as an integer.
    if value.fract() == 0.0 && value.abs() < 9e15 { json!(value as i64) } else { json!(value) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(text: &str) -> Result<LogQuery, ApiError> {
        parse_query(FunctionId::parse("f").unwrap(), text)
    }

    #[test]
    fn queries() {
        assert_eq!(query("").unwrap().limit, 100);
        let all = query(
            "limit=7&startTime=2026-11-22T01:00:00%2B01:00&endTime=2026-11-22T00:00:01.5Z&status=SUCCESS&x=y",
        )
        .unwrap();
        assert_eq!((all.limit, all.start, all.end), (7, Some(1_795_305_600_000), Some(1_795_305_601_500)));
        assert_eq!(all.status.as_deref(), Some("SUCCESS"));
        assert_eq!(query("startTime=2026-11-22T01:00:00+01:00").unwrap().start, all.start);
        for bad in
            ["limit=0", "limit=1001", "limit=x", "limit", "startTime=yesterday", "endTime=", "status=%ff"]
        {
            assert!(query(bad).is_err(), "{bad}");
        }
    }

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
