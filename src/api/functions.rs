//! `/functions` and `/functions/:id`: list, show and delete functions.

use super::cursor::{Cursors, with_next};
use super::logs::number;
use super::query::Query;
use super::{ApiError, Call, Reply, precondition};
use crate::backend::FunctionStore;
use crate::functions::Editor;
use crate::model::{Function, FunctionId};
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
    cursors: Cursors,
}

impl FunctionRoutes {
    pub fn new(store: Arc<dyn FunctionStore>, editor: Editor, cursors: Cursors) -> Self {
        Self { store, editor, cursors }
    }

    pub async fn list(&self, call: &Call) -> Result<Reply, ApiError> {
        let query = Query::read(&call.uri, &["limit", "cursor"])?;
        let limit = query.limit(LIMIT_MAX, LIMIT_MAX)?;
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
        if precondition::is_unchanged(&call.headers, &f.tag()) {
            return Ok(tagged(Reply::json(StatusCode::NOT_MODIFIED, ""), &f));
        }
        let body = json!({
            "id": f.id.as_str(),
            "name": f.name,
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
            "avgResponseTime": average(f.counters.total_duration_ms, f.counters.invocations),
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
        Ok(Reply::value(StatusCode::OK, &json!({ "success": true, "deletedId": id.as_str() })))
    }
}

/// The id in the path; what cannot be an id cannot be a function.
pub fn function_id(call: &Call) -> Result<FunctionId, ApiError> {
    call.params.first().and_then(|raw| FunctionId::parse(raw)).ok_or(ApiError::NoSuchFunction)
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
    json!({
        "functionId": f.id.as_str(),
        "name": f.name,
        "description": f.description,
        "runtime": f.runtime,
        "memoryMb": f.memory_mb,
        "invocations": c.invocations,
        "avgDuration": average(c.total_duration_ms, c.invocations),
        "avgHandlerDuration": average(c.total_handler_duration_ms, c.handler_invocations),
        "uploadedAt": f.uploaded_at,
    })
}

/// In milliseconds, 0 if there is nothing to average.
fn average(total_ms: f64, count: u64) -> Value {
    // A count below 2^53 is exact as a float.
    number(if count == 0 { 0.0 } else { total_ms / count as f64 })
}
