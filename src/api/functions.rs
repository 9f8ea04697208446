//! `/functions/:id`.

use super::{ApiError, Call, Reply};
use crate::functions::Functions;
use crate::model::FunctionId;
use http::StatusCode;
use http::header::{ETAG, HeaderValue};
use serde_json::json;

pub struct FunctionRoutes {
    functions: Functions,
}

impl FunctionRoutes {
    pub fn new(functions: Functions) -> Self {
        Self { functions }
    }

    pub async fn get(&self, call: &Call) -> Result<Reply, ApiError> {
        let id = function_id(call)?;
        let found = self.functions.get(&id).await.map_err(|e| ApiError::backend("the function table", &e))?;
        let f = found.ok_or(ApiError::NoSuchFunction)?;
        let tag = format!("\"{}\"", f.version);
        let etag = HeaderValue::try_from(&tag).map_err(|_| ApiError::NoSuchFunction)?;
        let unchanged = call.headers.if_none_match.as_ref().is_some_and(|wanted| names_tag(wanted, &tag));
        if unchanged {
            return Ok(Reply::json(StatusCode::NOT_MODIFIED, "").with(ETAG, etag));
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
        });
        Ok(Reply::value(StatusCode::OK, &body).with(ETAG, etag))
    }
}

/// The id in the path; what cannot be an id cannot be a function.
pub fn function_id(call: &Call) -> Result<FunctionId, ApiError> {
    call.params.first().and_then(|raw| FunctionId::parse(raw)).ok_or(ApiError::NoSuchFunction)
}

/// Whether an `If-None-Match` names `tag`; compared weakly (RFC 9110).
fn names_tag(field: &HeaderValue, tag: &str) -> bool {
    let text = field.to_str().unwrap_or_default();
    text.split(',').map(str::trim).any(|t| t == "*" || t.strip_prefix("W/").unwrap_or(t) == tag)
}
