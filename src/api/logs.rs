//! `/functions/:id/logs` and its `/:requestId`: the execution log. `/logs`: recent events of this node.

use super::call::{Call, function_id};
use super::cursor::{Cursors, with_next};
use super::problem::ApiError;
use super::query::Query;
use super::reply::Reply;
use crate::api::number::number;
use crate::audit::{Event, EventEntry, Executed, RecentEvents};
use crate::backend::{ExecutionStore, LogQuery};
use crate::model::{Execution, FunctionId, JobId, parse_rfc3339_ms, rfc3339_ms};
use crate::runs::mode_of;
use http::StatusCode;
use serde_json::{Map, Value, json};
use std::borrow::Cow;
use std::sync::Arc;
use uuid::Uuid;

/// Maximum and default number of rows in a page.
const LIMIT_MAX: usize = 1000;
/// Maximum length of a message in a list, in UTF-16 units: clients count as JavaScript does.
const MESSAGE_UNITS: usize = 200;
/// Appended to a message that was cut.
const CUT: &str = "...";
/// Length of a date such as `2026-11-22`, in bytes.
const DATE_BYTES: usize = 10;

/// Maximum length of the parameter `status`, in characters. No stored status is longer.
const STATUS_CHARS_MAX: usize = 64;

/// The handlers of the execution log and of the recent events.
pub struct Logs {
    executions: Arc<dyn ExecutionStore>,
    tail: RecentEvents,
    cursors: Cursors,
}

impl Logs {
    pub fn new(executions: Arc<dyn ExecutionStore>, tail: RecentEvents, cursors: Cursors) -> Self {
        Self { executions, tail, cursors }
    }

    /// One page of executions of a function, newest first, with cut messages.
    pub async fn list(&self, call: &Call) -> Result<Reply, ApiError> {
        let query = Query::read(&call.uri, &["limit", "startTime", "endTime", "status", "cursor"])?;
        let wanted = self.wanted(call, &query)?;
        let page = self.executions.list(&wanted).await.map_err(|e| ApiError::backend("the log table", &e))?;
        let rows: Vec<Value> = page.rows.iter().map(|row| shown(row, &cut(&row.message))).collect();
        let reply = Reply::value(StatusCode::OK, &Value::Array(rows));
        let Some(place) = page.next else { return Ok(reply) };
        let cursor = self.cursors.seal(&context(&wanted).each_ref().map(String::as_str), &place);
        let mut next: Vec<_> =
            ["limit", "startTime", "endTime", "status"].map(|name| (name, query.get(name))).into();
        next.push(("cursor", Some(&cursor)));
        Ok(with_next(reply, call, &next))
    }

    /// One execution with its whole message.
    ///
    /// # Errors
    /// `NoSuchLog` if it is unknown or expired.
    pub async fn get(&self, call: &Call) -> Result<Reply, ApiError> {
        let function = function_id(call)?;
        let request_id = stored_id(call.params.get(1).ok_or(ApiError::NoSuchLog)?);
        let row = self.executions.get(&function, &request_id).await;
        let row = row.map_err(|e| ApiError::backend("the log table", &e))?.ok_or(ApiError::NoSuchLog)?;
        Ok(Reply::value(StatusCode::OK, &shown(&row, &row.message)))
    }

    /// The recent events of this node, newest first.
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
            limit: query.limit(LIMIT_MAX)?,
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

/// The context of cursors: the function and the filter. The size of pages may change between requests.
fn context(query: &LogQuery) -> [String; 5] {
    let time = |at: Option<u64>| at.map_or_else(String::new, |at| at.to_string());
    let status = query.status.clone().unwrap_or_default();
    ["logs".to_owned(), query.function.to_string(), time(query.start), time(query.end), status]
}

/// Parses a time bound into Unix milliseconds. A date stands for its start in UTC.
fn time(name: &str, value: &str) -> Result<u64, ApiError> {
    let of_date = || parse_rfc3339_ms(&format!("{value}T00:00:00Z"));
    let time = if value.len() == DATE_BYTES { of_date() } else { parse_rfc3339_ms(value) };
    time.ok_or_else(|| {
        let such = "an RFC 3339 time, such as 2026-11-22T00:00:00Z, or a date, such as 2026-11-22";
        ApiError::invalid(format!("`{name}` must be {such}"))
    })
}

/// The request id as stored: UUIDs are stored in lower case, other ids unchanged.
fn stored_id(given: &str) -> Cow<'_, str> {
    let is_uuid = given.len() == JobId::TEXT_BYTES && Uuid::try_parse(given).is_ok();
    if is_uuid { Cow::Owned(given.to_ascii_lowercase()) } else { Cow::Borrowed(given) }
}

/// An event for the dashboard, which classifies events by their text and level.
fn tail_entry(entry: &EventEntry) -> Value {
    let (level, msg, members) = described(&entry.event);
    let mut shown = Map::new();
    shown.insert("id".into(), json!(entry.id.to_string()));
    shown.insert("level".into(), json!(level));
    shown.insert("timestamp".into(), json!(rfc3339_ms(entry.at)));
    shown.insert("msg".into(), json!(cut(&msg)));
    if let Value::Object(mut members) = members {
        shown.append(&mut members);
    }
    Value::Object(shown)
}

/// Level, text and further members of an event.
fn described(event: &Event) -> (&'static str, Cow<'static, str>, Value) {
    match event {
        Event::Executed(executed) => {
            let level = if executed.status.is_success() { "INFO" } else { "ERROR" };
            (level, format!("Function Executed: {}", executed.function).into(), members_of(executed))
        }
        Event::Requested { id, function, model, is_async } => {
            let (id, function, mode) = (id.to_string(), function.as_str(), mode_of(*is_async));
            let members = json!({ "requestId": id, "functionId": function, "modelId": model, "mode": mode });
            ("INFO", "Run Request".into(), members)
        }
        Event::WaitTimedOut(id) => {
            ("WARN", "Sync Wait Timed Out".into(), json!({ "requestId": id.to_string() }))
        }
        Event::Uploaded(function) => of_function("Upload Success", function),
        Event::Updated(function) => of_function("Function Updated", function),
        Event::Deleted(function) => of_function("Function Deleted", function),
        Event::Heartbeat { worker, active_jobs, pools } => {
            let members = json!({ "activeJobs": active_jobs, "pools": pools });
            ("INFO", format!("Heartbeat received from {worker}").into(), members)
        }
        Event::Unauthorized { ip } => {
            let ip = ip.map(|ip| ip.to_canonical().to_string());
            ("WARN", "Unauthorized access".into(), json!({ "ip": ip }))
        }
    }
}

fn of_function(msg: &'static str, function: &FunctionId) -> (&'static str, Cow<'static, str>, Value) {
    ("INFO", msg.into(), json!({ "functionId": function.as_str() }))
}

fn members_of(executed: &Executed) -> Value {
    json!({
        "functionId": executed.function.as_str(),
        "requestId": executed.id.to_string(),
        "duration": number(executed.duration_ms),
        "handlerDurationMs": executed.handler_duration_ms.map(number),
        "memory": executed.memory_mb,
        "status": executed.status.as_str(),
        "exitCode": executed.exit_code,
    })
}

/// Cuts a message to [`MESSAGE_UNITS`] and appends [`CUT`]. A surrogate pair is never split.
fn cut(message: &str) -> Cow<'_, str> {
    let mut units = 0;
    let end = message.char_indices().find_map(|(at, c)| {
        units += c.len_utf16();
        (units > MESSAGE_UNITS).then_some(at)
    });
    end.map_or(Cow::Borrowed(message), |end| Cow::Owned(format!("{}{CUT}", &message[..end])))
}

fn shown(row: &Execution, message: &str) -> Value {
    let mut shown = Map::new();
    shown.insert("id".into(), json!(row.id.request_id()));
    shown.insert("requestId".into(), json!(row.id.request_id()));
    shown.insert("timestamp".into(), json!(row.id.timestamp()));
    shown.insert("status".into(), json!(row.status.as_str()));
    // The fraction is dropped, as by the previous controller.
    shown.insert("duration".into(), number(row.duration_ms.trunc()));
    shown.insert("handlerDurationMs".into(), row.handler_duration_ms.map_or(Value::Null, number));
    shown.insert("memory".into(), json!(row.memory_mb));
    shown.insert("message".into(), json!(message));
    if let Some(at) = row.completed_at {
        shown.insert("completedAt".into(), json!(rfc3339_ms(at)));
    }
    Value::Object(shown)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{NodeId, Status};

    #[test]
    fn messages_are_cut_by_utf_16_units() {
        for (text, times, kept) in [
            ("x", 200, None),
            ("x", 201, Some(200)),
            ("ä", 200, None),
            ("ä", 201, Some(200)),
            // Two units each.
            ("😀", 100, None),
            ("😀", 101, Some(100)),
        ] {
            let expected = match kept {
                Some(kept) => format!("{}...", text.repeat(kept)),
                None => text.repeat(times),
            };
            assert_eq!(cut(&text.repeat(times)), expected, "{times} times {text}");
        }
        let torn = format!("{}😀x", "x".repeat(199));
        assert_eq!(cut(&torn), format!("{}...", "x".repeat(199)), "a surrogate pair is not split");
    }

    #[test]
    fn time_bounds() {
        for (given, at) in [
            ("2026-11-22", Some(1_795_305_600_000)),
            ("2026-11-22T00:00:00Z", Some(1_795_305_600_000)),
            ("2026-11-22T01:00:00.123+01:00", Some(1_795_305_600_123)),
            ("1969-12-31", Some(0)),
            ("2026-02-30", None),
            ("2026-1-2", None),
            ("2026-11-2x", None),
            ("2026-11-22T", None),
            ("yesterday!", None),
            ("", None),
        ] {
            assert_eq!(time("startTime", given).ok(), at, "{given}");
        }
    }

    #[test]
    fn uuids_are_looked_up_in_lower_case() {
        for (given, stored) in [
            ("DEADBEEF-9C2A-8F00-8000-123456789ABC", "deadbeef-9c2a-8f00-8000-123456789abc"),
            ("67E55044-10b1-426f-9247-bb680e5fe0c8", "67e55044-10b1-426f-9247-bb680e5fe0c8"),
            // Other ids are unchanged.
            ("JOB-7", "JOB-7"),
        ] {
            assert_eq!(stored_id(given), stored);
        }
    }

    #[test]
    fn events_have_the_form_that_the_dashboard_expects() {
        let id = JobId::new(NodeId(1), 0, 0);
        let function = FunctionId::parse("f").unwrap();
        let executed = |status: &str, exit_code| {
            Event::Executed(Executed {
                id,
                function: function.clone(),
                status: Status::new(status),
                duration_ms: 12.5,
                handler_duration_ms: None,
                memory_mb: 7,
                exit_code,
            })
        };
        let pools = Map::from_iter([("python".to_owned(), json!(2))]);
        let run = |is_async| Event::Requested { id, function: function.clone(), model: "m".into(), is_async };
        let request_id = id.to_string();
        let of_execution = |status: &str, exit_code: Value| {
            json!({ "functionId": "f", "requestId": request_id, "duration": 12.5, "handlerDurationMs": null,
                "memory": 7, "status": status, "exitCode": exit_code })
        };
        let of_run =
            |mode: &str| json!({ "requestId": request_id, "functionId": "f", "modelId": "m", "mode": mode });
        let of_function = json!({ "functionId": "f" });
        for (event, level, msg, members) in [
            (executed("SUCCESS", Some(0)), "INFO", "Function Executed: f", of_execution("SUCCESS", json!(0))),
            (executed("FAILED", Some(1)), "ERROR", "Function Executed: f", of_execution("FAILED", json!(1))),
            (executed("LOST", None), "ERROR", "Function Executed: f", of_execution("LOST", json!(null))),
            (run(false), "INFO", "Run Request", of_run("SYNC")),
            (run(true), "INFO", "Run Request", of_run("ASYNC")),
            (Event::WaitTimedOut(id), "WARN", "Sync Wait Timed Out", json!({ "requestId": request_id })),
            (Event::Uploaded(function.clone()), "INFO", "Upload Success", of_function.clone()),
            (Event::Updated(function.clone()), "INFO", "Function Updated", of_function.clone()),
            (Event::Deleted(function.clone()), "INFO", "Function Deleted", of_function.clone()),
            (
                Event::Heartbeat { worker: "w".into(), active_jobs: 3, pools },
                "INFO",
                "Heartbeat received from w",
                json!({ "activeJobs": 3, "pools": { "python": 2 } }),
            ),
            (
                Event::Unauthorized { ip: "::ffff:10.0.0.1".parse().ok() },
                "WARN",
                "Unauthorized access",
                json!({ "ip": "10.0.0.1" }),
            ),
        ] {
            let entry = EventEntry { id: Uuid::from_u128(7), at: 1_795_305_600_123, event };
            let Value::Object(mut shown) = tail_entry(&entry) else { panic!("an object") };
            let first: Vec<String> = shown.keys().take(4).cloned().collect();
            assert_eq!(first, ["id", "level", "timestamp", "msg"]);
            assert_eq!(shown.remove("id"), Some(json!(Uuid::from_u128(7).to_string())));
            assert_eq!(shown.remove("timestamp"), Some(json!("2026-11-22T00:00:00.123Z")));
            assert_eq!(shown.remove("level"), Some(json!(level)), "{msg}");
            assert_eq!(shown.remove("msg"), Some(json!(msg)));
            assert_eq!(Value::Object(shown), members, "{msg}");
        }
    }

    #[test]
    fn whole_numbers_have_no_fraction() {
        assert_eq!([number(12.0), number(1.5), number(0.0)].map(|n| n.to_string()), ["12", "1.5", "0"]);
    }
}
