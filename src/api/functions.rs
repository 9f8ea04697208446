//! `/functions`, `/functions/:id` and its `/metrics`: lists, shows and deletes functions.

use super::call::Call;
use super::cursor::{Cursors, with_next};
use super::number::number;
use super::precondition;
use super::problem::ApiError;
use super::query::Query;
use super::reply::Reply;
use crate::api::call::function_id;
use crate::audit::{Event, RecentEvents};
use crate::backend::FunctionStore;
use crate::functions::Editor;
use crate::model::{Function, FunctionId, Handler, now_ms};
use http::StatusCode;
use http::header::{ETAG, HeaderValue};
use serde_json::{Value, json};
use std::sync::Arc;

/// Maximum and default number of functions in a page. Both are the same, because the previous controller
/// listed all functions.
const LIMIT_MAX: usize = 1000;
/// The context of cursors of this list.
const LIST: &str = "functions";

/// The handlers that list, show and delete functions.
pub struct FunctionRoutes {
    store: Arc<dyn FunctionStore>,
    editor: Editor,
    tail: RecentEvents,
    cursors: Cursors,
}

impl FunctionRoutes {
    pub fn new(store: Arc<dyn FunctionStore>, editor: Editor, tail: RecentEvents, cursors: Cursors) -> Self {
        Self { store, editor, tail, cursors }
    }

    /// One page of functions, with a `Link` to the next one.
    pub async fn list(&self, call: &Call) -> Result<Reply, ApiError> {
        let query = Query::read(&call.uri, &["limit", "cursor"])?;
        let limit = query.limit(LIMIT_MAX)?;
        let after = query.get("cursor").map(|cursor| self.cursors.open(&[LIST], cursor)).transpose()?;
        let page = self.store.list(limit, after.as_deref()).await;
        let page = page.map_err(|e| ApiError::backend("the function table", &e))?;
        let functions = page.functions.iter().map(listed).collect();
        let reply = Reply::value(StatusCode::OK, &Value::Array(functions));
        Ok(match page.next {
            Some(place) => {
                let cursor = self.cursors.seal(&[LIST], &place);
                with_next(reply, call, &[("limit", query.get("limit")), ("cursor", Some(&cursor))])
            }
            None => reply,
        })
    }

    /// One function with its `ETag`. 304 if `If-None-Match` names that tag.
    pub async fn get(&self, call: &Call) -> Result<Reply, ApiError> {
        let f = read(&*self.store, &function_id(call)?).await?;
        if precondition::is_unchanged(&call.headers, &f.tag())? {
            return Ok(tagged(Reply::json(StatusCode::NOT_MODIFIED, ""), &f));
        }
        let body = json!({
            "id": f.id.as_str(),
            "name": name_of(&f),
            "description": f.description,
            "runtime": f.runtime,
            "memoryMb": f.memory_mb,
            "s3Key": f.s3_key,
            "uploadedAt": f.uploaded_at,
            "version": f.version,
            "maxConcurrency": f.max_concurrency,
            "handler": f.handler.as_ref().map(Handler::as_str),
        });
        Ok(tagged(Reply::value(StatusCode::OK, &body), &f))
    }

    /// The counters of a function. Times are in milliseconds.
    pub async fn metrics(&self, call: &Call) -> Result<Reply, ApiError> {
        let f = read(&*self.store, &function_id(call)?).await?;
        let body = json!({
            "executions": f.counters.invocations,
            "avgResponseTime":
                number(average(f.counters.total_duration_ms, f.counters.invocations).unwrap_or(0.0)),
            "errors": f.counters.errors,
            "coldStarts": f.counters.cold_starts,
        });
        Ok(Reply::value(StatusCode::OK, &body))
    }

    /// Deletes a function. Jobs that are already queued still run.
    pub async fn delete(&self, call: &Call) -> Result<Reply, ApiError> {
        let id = function_id(call)?;
        let check = |f: &Function| precondition::check(&call.headers, &f.tag());
        self.editor.delete(call.key_name(), &id, check).await.map_err(ApiError::from)?;
        self.tail.note(now_ms(), || Event::Deleted(id.clone()));
        Ok(Reply::value(StatusCode::OK, &json!({ "success": true, "deletedId": id.as_str() })))
    }
}

/// Reads a function from the table and not from the cache, which may be stale.
///
/// # Errors
/// `NoSuchFunction` and `BackendUnavailable`.
pub async fn read(store: &dyn FunctionStore, id: &FunctionId) -> Result<Function, ApiError> {
    let found = store.get(id).await.map_err(|e| ApiError::backend("the function table", &e))?;
    found.ok_or(ApiError::NoSuchFunction)
}

/// Adds the function's `ETag`.
pub fn tagged(reply: Reply, function: &Function) -> Reply {
    match HeaderValue::try_from(function.tag()) {
        Ok(tag) => reply.with(ETAG, tag),
        Err(_) => reply, // a tag is always visible ASCII
    }
}

/// The reply to a change: the function's id and its new `ETag`.
pub fn changed(function: &Function) -> Reply {
    let body = json!({ "success": true, "functionId": function.id.as_str() });
    tagged(Reply::value(StatusCode::OK, &body), function)
}

fn listed(f: &Function) -> Value {
    let c = &f.counters;
    let handler = average(c.total_handler_duration_ms, c.handler_invocations);
    json!({
        "functionId": f.id.as_str(),
        "name": name_of(f),
        "description": f.description,
        "runtime": f.runtime,
        "memoryMb": f.memory_mb,
        "invocations": c.invocations,
        "avgDuration": number(average(c.total_duration_ms, c.invocations).map_or(0.0, f64::round)),
        // Three decimals, because handlers can take microseconds. `null` and not 0 without data, because the
        // dashboard shows the two differently.
        "avgHandlerDuration": handler.map(|ms| number((ms * 1000.0).round() / 1000.0)),
        "uploadedAt": f.uploaded_at,
    })
}

/// Items of the previous controller may have no name.
fn name_of(f: &Function) -> &str {
    if f.name.is_empty() { "Unknown" } else { &f.name }
}

/// The average in milliseconds. `None` without data.
fn average(total_ms: f64, count: u64) -> Option<f64> {
    // A count below 2^53 is exact as an `f64`.
    (count > 0).then(|| total_ms / count as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::FunctionCounters;

    #[test]
    fn averages_are_formatted_for_the_dashboard() {
        // (invocations, their total ms, those with a handler duration, the total of that in ms, expected)
        for (invocations, total, handlers, handler_total, shown) in [
            (0, 0.0, 0, 0.0, ("0", "null")),
            (3, 100.0, 0, 0.0, ("33", "null")),
            (2, 5.0, 2, 0.0, ("3", "0")),
            (3, 200.0, 3, 1.0, ("67", "0.333")),
            (1, 0.4, 1, 12.0, ("0", "12")),
            (7, 1e9, 7, 12.345_678, ("142857143", "1.764")),
        ] {
            let counters = FunctionCounters {
                invocations,
                errors: 0,
                total_duration_ms: total,
                handler_invocations: handlers,
                total_handler_duration_ms: handler_total,
                cold_starts: 0,
            };
            let listed = listed(&Function { counters, ..Function::sample("f") });
            let found = (listed["avgDuration"].to_string(), listed["avgHandlerDuration"].to_string());
            assert_eq!((found.0.as_str(), found.1.as_str()), shown);
        }
        assert_eq!(listed(&Function { name: String::new(), ..Function::sample("f") })["name"], "Unknown");
    }
}
