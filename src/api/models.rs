//! `/models`: the model catalogue, or a fixed fallback while the catalogue does not answer.

use super::reply::Reply;
use crate::catalogue::Catalogue;
use http::StatusCode;
use serde_json::{Value, json};

/// The only model of the fallback.
const FALLBACK: &str = "llama3:8b";
const WARNING: &str = "The model catalogue cannot be reached at the moment.";

/// The handler of the model catalogue.
pub struct Models {
    catalogue: Catalogue,
}

impl Models {
    pub fn new(catalogue: Catalogue) -> Self {
        Self { catalogue }
    }

    /// The models; 200 in any case. The fallback has a `warning`.
    pub async fn get(&self) -> Reply {
        let Some(models) = self.catalogue.models().await else {
            let fallback = shown(FALLBACK, &json!(0), &json!({}), "fallback");
            return Reply::value(StatusCode::OK, &json!({ "models": [fallback], "warning": WARNING }));
        };
        let models: Vec<Value> =
            models.iter().map(|m| shown(&m.name, &json!(m.size), &json!(m.details), "available")).collect();
        Reply::value(StatusCode::OK, &json!({ "models": models }))
    }
}

fn shown(name: &str, size: &Value, details: &Value, status: &str) -> Value {
    json!({ "id": name, "name": name, "size": size, "details": details, "status": status })
}
