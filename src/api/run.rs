//! `POST /run`: parse, call [`Runs`], reply.

use super::call::{Call, CallHeaders};
use super::prefer::Prefer;
use super::problem::ApiError;
use super::reply::Reply;
use crate::model::{Execution, JobId, RunRequest};
use crate::runs::{InvalidKey, RunOrder, RunOutcome, Runs};
use http::StatusCode;
use http::header::{HeaderName, HeaderValue, LOCATION};
use serde_json::json;

/// Maximum length of an idempotency key, in bytes.
const KEY_BYTES_MAX: usize = 255;

const PREFERENCE_APPLIED: HeaderName = HeaderName::from_static("preference-applied");

/// The handler of runs.
pub struct RunRoute {
    runs: Runs,
}

impl RunRoute {
    pub fn new(runs: Runs) -> Self {
        Self { runs }
    }

    /// Runs a function. 200 with its result, or 202 with the location of the result.
    ///
    /// # Errors
    /// `NotJson`, `Invalid`, and those of [`Runs::run`].
    pub async fn post(&self, call: &Call) -> Result<Reply, ApiError> {
        let headers = &call.headers;
        if !headers.is_json() {
            return Err(ApiError::NotJson);
        }
        self.runs.admit()?;
        let request = RunRequest::parse(&call.body).map_err(|e| ApiError::invalid(e.to_string()))?;
        let prefer = Prefer::of(&headers.prefer);
        let tracestate = headers.client_state();
        let order = RunOrder {
            request: &request,
            body: &call.body,
            idempotency_key: idempotency_key(headers),
            caller: call.caller.as_deref(),
            counted: &call.counted,
            traceparent: headers.client_span(),
            tracestate: tracestate.as_deref(),
            request_trace: call.trace.as_ref(),
            is_async: prefer.respond_async || is_true(headers.x_async.as_ref()),
            wait_s: prefer.wait_s,
        };
        Ok(match self.runs.run(&order).await? {
            RunOutcome::Accepted(id) => accepted(id, prefer, call.prefix()),
            RunOutcome::Finished(outcome) => Reply::json(StatusCode::OK, outcome.body()),
            RunOutcome::Recorded(id, row) => of_row(id, &row),
            RunOutcome::StillRunning(id) => still_running(id, call.prefix()),
        })
    }
}

fn accepted(id: JobId, prefer: Prefer, prefix: &str) -> Reply {
    let reply = later(id, prefix, format!("{{\"status\":\"ACCEPTED\",\"jobId\":\"{id}\"}}"));
    let applied = HeaderValue::from_static("respond-async");
    if prefer.respond_async { reply.with(PREFERENCE_APPLIED, applied) } else { reply }
}

/// The reply for a job whose result is no longer stored.
fn of_row(id: JobId, row: &Execution) -> Reply {
    let (function, status) = (row.function.as_str(), row.status.as_str());
    let body = json!({
        "requestId": id.to_string(), "functionId": function, "status": status, "durationMs": row.duration_ms,
        "message": row.message,
    });
    Reply::value(StatusCode::OK, &body)
}

fn still_running(id: JobId, prefix: &str) -> Reply {
    let message = "The job is still running. Get its result from /status/<jobId>.";
    later(id, prefix, format!("{{\"status\":\"TIMEOUT\",\"jobId\":\"{id}\",\"message\":\"{message}\"}}"))
}

/// 202 with the location of the result. It keeps the prefix that the client used, because the client's proxy
/// may not forward the other one.
fn later(id: JobId, prefix: &str, body: String) -> Reply {
    let reply = Reply::json(StatusCode::ACCEPTED, body);
    match HeaderValue::try_from(format!("{prefix}/status/{id}")) {
        Ok(location) => reply.with(LOCATION, location),
        Err(_) => reply, // an id is always visible ASCII
    }
}

fn is_true(value: Option<&HeaderValue>) -> bool {
    value.is_some_and(|v| v.as_bytes().trim_ascii().eq_ignore_ascii_case(b"true"))
}

/// The client's idempotency key. The IETF draft requires a quoted string (`"…"`). Bare text is accepted as
/// well, because many clients send that.
fn idempotency_key(headers: &CallHeaders) -> Result<Option<&str>, InvalidKey> {
    let Some(value) = &headers.idempotency_key else { return Ok(None) };
    let text = value.to_str().unwrap_or_default().trim();
    let key = text.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or(text);
    let is_visible = key.bytes().all(|b| b.is_ascii_graphic() && b != b'"');
    if key.is_empty() || key.len() > KEY_BYTES_MAX || !is_visible {
        return Err(InvalidKey { bytes_max: KEY_BYTES_MAX });
    }
    Ok(Some(key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_may_be_quoted_or_bare() {
        let key = |text: &str| {
            let value = Some(HeaderValue::from_bytes(text.as_bytes()).unwrap());
            let headers = CallHeaders { idempotency_key: value, ..CallHeaders::default() };
            idempotency_key(&headers).map(|key| key.map(str::to_owned)).ok().flatten()
        };
        let long = "x".repeat(KEY_BYTES_MAX);
        for (sent, read) in
            [("abc", "abc"), ("\"abc\"", "abc"), (" 8e03978e-40d5 ", "8e03978e-40d5"), (&long, &long)]
        {
            assert_eq!(key(sent).as_deref(), Some(read), "{sent}");
        }
        for bad in ["", "\"\"", "a b", "\"a", "ä", &format!("{long}x")] {
            assert_eq!(key(bad), None, "{bad}");
        }
        assert!(matches!(idempotency_key(&CallHeaders::default()), Ok(None)));
    }
}
