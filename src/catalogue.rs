//! The model catalogue behind `/models`: the models of an AI node (Ollama).
//!
//! Dashboards poll the route, so results and failures are cached for some seconds.

use crate::config::AiNode;
use crate::https::{self, HttpsClient};
use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::time::Instant;

/// How long a list of models is cached, and how long a failure is.
const KEPT: Duration = Duration::from_secs(10);
const FAILURE_KEPT: Duration = Duration::from_secs(2);
/// The longest response body that is read, in bytes, and the most models taken from it.
const ANSWER_BYTES_MAX: usize = 1 << 20;
const MODELS_MAX: usize = 1000;

/// One model of the node.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    pub name: String,
    /// In bytes. 0 if unknown.
    pub size: u64,
    pub details: Map<String, Value>,
}

impl Model {
    /// `None`: the entry has no name. Other members may be missing or have the wrong type.
    fn of(said: &Value) -> Option<Self> {
        let details = said.get("details").and_then(Value::as_object).cloned().unwrap_or_default();
        let size = said.get("size").and_then(Value::as_u64).unwrap_or(0);
        Some(Self { name: said.get("name")?.as_str()?.to_owned(), size, details })
    }
}

#[derive(Deserialize)]
struct Tags {
    models: Vec<Value>,
}

/// Queries the node and caches the result. At most one query is in flight; concurrent callers share its
/// result.
pub struct Catalogue {
    node: Option<CatalogueNode>,
    last: Mutex<Option<CachedModels>>,
}

/// The cached result of a query. `models` is `None` if it failed.
struct CachedModels {
    at: Instant,
    models: Option<Arc<[Model]>>,
}

struct CatalogueNode {
    url: String,
    timeout: Duration,
    client: HttpsClient,
}

/// Why a query failed. No message contains the URL of the node, which may contain a password.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("the URL is not valid")]
    Address,
    #[error("no response within the timeout")]
    TimeOut,
    #[error("the connection failed")]
    Connection,
    #[error("status {0}")]
    Status(u16),
    #[error("the response body is too long or incomplete")]
    Body,
    #[error("the response is not a list of models")]
    NoList,
}

impl Catalogue {
    /// `node`: `None` if no node is configured, so there are never any models.
    pub fn new(node: Option<&AiNode>) -> anyhow::Result<Self> {
        let node = node.map(CatalogueNode::new).transpose()?;
        Ok(Self { node, last: Mutex::const_new(None) })
    }

    /// The models. `None`: no node is configured, or the last query failed.
    pub async fn models(&self) -> Option<Arc<[Model]>> {
        let node = self.node.as_ref()?;
        // Held during the query, so that concurrent callers wait for its result.
        let mut last = self.last.lock().await;
        if let Some(asked) = last.as_ref()
            && asked.at.elapsed() < if asked.models.is_some() { KEPT } else { FAILURE_KEPT }
        {
            return asked.models.clone();
        }
        let models = match node.ask().await {
            Ok(models) => Some(Arc::from(models)),
            Err(e) => {
                // Logged only for the first of consecutive failures: dashboards poll every few seconds.
                if last.as_ref().is_none_or(|asked| asked.models.is_some()) {
                    tracing::warn!(
                        error = %e,
                        "Model catalogue not available; /models returns the fallback. Check AI_NODE_URL"
                    );
                }
                None
            }
        };
        *last = Some(CachedModels { at: Instant::now(), models: models.clone() });
        models
    }
}

impl CatalogueNode {
    fn new(node: &AiNode) -> anyhow::Result<Self> {
        let client = https::client(node.timeout)?;
        Ok(Self { url: format!("{}/api/tags", node.url.reveal()), timeout: node.timeout, client })
    }

    async fn ask(&self) -> Result<Vec<Model>, Failure> {
        let fetched = tokio::time::timeout(self.timeout, self.fetch()).await;
        let body = fetched.unwrap_or(Err(Failure::TimeOut))?;
        let tags: Tags = serde_json::from_slice(&body).map_err(|_| Failure::NoList)?;
        Ok(tags.models.iter().filter_map(Model::of).take(MODELS_MAX).collect())
    }

    async fn fetch(&self) -> Result<Bytes, Failure> {
        let url = self.url.parse().map_err(|_| Failure::Address)?;
        let response = self.client.get(url).await.map_err(|_| Failure::Connection)?;
        // Redirects are not followed: only the host that the operator configured is queried.
        if response.status() != http::StatusCode::OK {
            return Err(Failure::Status(response.status().as_u16()));
        }
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        Ok(body.map_err(|_| Failure::Body)?.to_bytes())
    }
}
