//! The models that an AI node (Ollama) has, asked for at most now and then.

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

/// How long an answer is used again, and how long it is taken as known that there is none.
const KEPT: Duration = Duration::from_secs(10);
const FAILURE_KEPT: Duration = Duration::from_secs(2);
/// Longest answer that is read, in bytes, and most models of it.
const ANSWER_BYTES_MAX: usize = 1 << 20;
const MODELS_MAX: usize = 1000;

/// One model.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    pub name: String,
    /// In bytes.
    pub size: u64,
    pub details: Map<String, Value>,
}

impl Model {
    /// One without a name is none; the rest may be missing or odd.
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

/// Asks the node. One question at a time; those who come meanwhile share the answer.
pub struct Catalogue {
    node: Option<Node>,
    last: Mutex<Option<Asked>>,
}

/// What came of asking.
struct Asked {
    at: Instant,
    models: Option<Arc<[Model]>>,
}

struct Node {
    url: String,
    timeout: Duration,
    client: HttpsClient,
}

/// Why there is no answer; no part of it names the node, whose address may hold a password.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("the address cannot be used")]
    Address,
    #[error("no answer in time")]
    TimeOut,
    #[error("no connection")]
    Connection,
    #[error("status {0}")]
    Status(u16),
    #[error("the answer is too long or breaks off")]
    Body,
    #[error("the answer is no list of models")]
    NoList,
}

impl Catalogue {
    /// `None`: there is no node to ask.
    pub fn new(node: Option<&AiNode>) -> anyhow::Result<Self> {
        let node = node.map(Node::new).transpose()?;
        Ok(Self { node, last: Mutex::const_new(None) })
    }

    /// The models; `None`: the node does not tell.
    pub async fn models(&self) -> Option<Arc<[Model]>> {
        let node = self.node.as_ref()?;
        // Held while asking.
        let mut last = self.last.lock().await;
        if let Some(asked) = last.as_ref()
            && asked.at.elapsed() < if asked.models.is_some() { KEPT } else { FAILURE_KEPT }
        {
            return asked.models.clone();
        }
        let models = match node.ask().await {
            Ok(models) => Some(Arc::from(models)),
            Err(e) => {
                // Once: those who look on ask every few seconds.
                if last.as_ref().is_none_or(|asked| asked.models.is_some()) {
                    tracing::warn!(error = %e, "Model Catalogue Away");
                }
                None
            }
        };
        *last = Some(Asked { at: Instant::now(), models: models.clone() });
        models
    }
}

impl Node {
    fn new(node: &AiNode) -> anyhow::Result<Self> {
        let client = https::client(node.timeout)?;
        Ok(Self { url: format!("{}/api/tags", node.url.reveal()), timeout: node.timeout, client })
    }

    async fn ask(&self) -> Result<Vec<Model>, Failure> {
        let asked = tokio::time::timeout(self.timeout, self.fetch()).await;
        let body = asked.unwrap_or(Err(Failure::TimeOut))?;
        let tags: Tags = serde_json::from_slice(&body).map_err(|_| Failure::NoList)?;
        Ok(tags.models.iter().filter_map(Model::of).take(MODELS_MAX).collect())
    }

    async fn fetch(&self) -> Result<Bytes, Failure> {
        let url = self.url.parse().map_err(|_| Failure::Address)?;
        let answer = self.client.get(url).await.map_err(|_| Failure::Connection)?;
        // A redirect is no answer either: nobody else is asked than whom the operator named.
        if answer.status() != http::StatusCode::OK {
            return Err(Failure::Status(answer.status().as_u16()));
        }
        let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
        Ok(body.map_err(|_| Failure::Body)?.to_bytes())
    }
}
