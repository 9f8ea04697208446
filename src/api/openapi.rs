//! `/openapi.json`: this API, described in OpenAPI 3.1.

use super::Reply;
use http::StatusCode;

const DOCUMENT: &str = include_str!("openapi.json");

pub fn document() -> Reply {
    Reply::json(StatusCode::OK, DOCUMENT)
}
