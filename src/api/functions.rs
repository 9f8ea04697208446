//! `/functions` and `/functions/:id`: list, show and delete functions.

use crate::api::call::function_id;
use super::cursor::{Cursors, with_next};
use super::number::number;
use super::query::Query;
use super::problem::ApiError;
use super::call::Call;
use super::reply::Reply;
use super::precondition;
use crate::audit::{Event, Tail};
use crate::backend::FunctionStore;
use crate::functions::Editor;
use crate::model::{Function, FunctionId, now_ms};
use http::StatusCode;
use http::header::{ETAG, HeaderValue};
use serde_json::{Value, json};
use std::sync::Arc;

/// Functions of a page when the client names no number: as many as a page may have, since the old controller
/// listed all.
const LIMIT_MAX: usize = 1000;
/// The context of cursors.
const LIST: &str = "functions";

pub struct FunctionRoutes {
    store: Arc<dyn FunctionStore>,
    editor: Editor,
    tail: Tail,
    cursors: Cursors,
}

impl FunctionRoutes {
    pub fn new(store: Arc<dyn FunctionStore>, editor: Editor, tail: Tail, cursors: Cursors) -> Self {
        Self { store, editor, tail, cursors }
    }

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
        });
        Ok(tagged(Reply::value(StatusCode::OK, &body), &f))
    }

    pub async fn metrics(&self, call: &Call) -> Result<Reply, ApiError> {
        let f = read(&*self.store, &function_id(call)?).await?;
        let body = json!({
            "executions": f.counters.invocations,
            "avgResponseTime": number(average(f.counters.total_duration_ms, f.counters.invocations).unwrap_or(0.0)),
            "errors": f.counters.errors,
            // Workers do not report them.
            "coldStarts": null,
        });
        Ok(Reply::value(StatusCode::OK, &body))
    }

    pub async fn delete(&self, call: &Call) -> Result<Reply, ApiError> {
        let id = function_id(call)?;
        let check = |f: &Function| precondition::check(&call.headers, &f.tag());
        self.editor.delete(call.key_name(), &id, check).await.map_err(ApiError::from)?;
        self.tail.note(now_ms(), || Event::Deleted(id.clone()));
        Ok(Reply::value(StatusCode::OK, &json!({ "success": true, "deletedId": id.as_str() })))
    }
}

/// The function as the table has it.
pub async fn read(store: &dyn FunctionStore, id: &FunctionId) -> Result<Function, ApiError> {
    let found = store.get(id).await.map_err(|e| ApiError::backend("the function table", &e))?;
    found.ok_or(ApiError::NoSuchFunction)
}

/// A reply with the function's tag.
pub fn tagged(reply: Reply, function: &Function) -> Reply {
    match HeaderValue::try_from(function.tag()) {
        Ok(tag) => reply.with(ETAG, tag),
        Err(_) => reply, // a tag is always visible ASCII
    }
}

/// What a function was changed to.
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
        // Handlers take microseconds, and no data is not 0: the dashboard tells the two apart.
        "avgHandlerDuration": handler.map(|ms| number((ms * 1000.0).round() / 1000.0)),
        "uploadedAt": f.uploaded_at,
    })
}

/// Items of the old controller may have none.
fn name_of(f: &Function) -> &str {
    if f.name.is_empty() { "Unknown" } else { &f.name }
}

/// In milliseconds; `None` if there is nothing to average.
fn average(total_ms: f64, count: u64) -> Option<f64> {
    // A count below 2^53 is exact as a float.
    (count > 0).then(|| total_ms / count as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Counters;

    #[test]
    fn averages_are_shown_as_the_dashboard_reads_them() {
        // (invocations, their milliseconds, those with a handler's time, that in milliseconds)
        for (invocations, total, handlers, handler_total, shown) in [
            (0, 0.0, 0, 0.0, ("0", "null")),
            (3, 100.0, 0, 0.0, ("33", "null")),
            (2, 5.0, 2, 0.0, ("3", "0")),
            (3, 200.0, 3, 1.0, ("67", "0.333")),
            (1, 0.4, 1, 12.0, ("0", "12")),
            (7, 1e9, 7, 12.345_678, ("142857143", "1.764")),
        ] {
            let counters = Counters {
                invocations,
                errors: 0,
                total_duration_ms: total,
                handler_invocations: handlers,
                total_handler_duration_ms: handler_total,
            };
            let listed = listed(&Function { counters, ..Function::sample("f") });
            let found = (listed["avgDuration"].to_string(), listed["avgHandlerDuration"].to_string());
            assert_eq!((found.0.as_str(), found.1.as_str()), shown);
        }
        assert_eq!(listed(&Function { name: String::new(), ..Function::sample("f") })["name"], "Unknown");
    }
}
