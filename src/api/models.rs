//! `/models`: the model catalogue.

use super::Reply;
use crate::config::AiNode;
use http::StatusCode;

/// Stub.
pub struct ModelCatalogue;

impl ModelCatalogue {
    pub fn new(_ai_node: Option<&AiNode>) -> Self {
        Self
    }

    pub async fn get(&self) -> Reply {
        Reply::json(StatusCode::OK, "{}")
    }
}
