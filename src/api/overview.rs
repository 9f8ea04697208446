//! `/system/overview`: the whole fleet in one answer. Every node answers the same.

use super::problem::ApiError;
use super::queue_depth::QueueDepth;
use super::reply::Reply;
use super::workers::Workers;
use crate::overview::Overview;
use bytes::Bytes;
use http::StatusCode;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::time::Instant;

/// How long an answer is reused for all clients of this node. Summaries are written as often.
const ANSWER_KEPT: Duration = Duration::from_secs(1);

/// The handler of the overview.
pub struct OverviewRoute {
    overview: Overview,
    depth: Arc<QueueDepth>,
    workers: Workers,
    last: Mutex<Option<(Instant, Bytes)>>,
}

impl OverviewRoute {
    pub fn new(overview: Overview, depth: Arc<QueueDepth>, workers: Workers) -> Self {
        Self { overview, depth, workers, last: Mutex::const_new(None) }
    }

    /// The state of all nodes, of the queue and of the workers. A part that cannot be read is null.
    pub async fn get(&self) -> Result<Reply, ApiError> {
        // Held during the reads, so that concurrent requests share their answer.
        let mut last = self.last.lock().await;
        if let Some((at, body)) = last.as_ref()
            && at.elapsed() < ANSWER_KEPT
        {
            return Ok(Reply::json(StatusCode::OK, body.clone()));
        }
        let body = Bytes::from(self.read().await.to_string());
        *last = Some((Instant::now(), body.clone()));
        Ok(Reply::json(StatusCode::OK, body))
    }

    async fn read(&self) -> Value {
        let (overview, depth, workers) =
            tokio::join!(self.overview.read(), self.depth.get(), self.workers.in_short());
        let oldest_ms = overview.fleet.jobs.oldest_ms;
        // Numbers, texts and lists can always be shown as JSON.
        let mut shown = serde_json::to_value(overview).unwrap_or_default();
        if let Some(fleet) = shown.get_mut("fleet").and_then(Value::as_object_mut) {
            // No queue tells the age of its messages. A job without a result is on the queue or runs.
            fleet.insert("queue".to_owned(), json!({ "depth": depth.ok(), "oldestJobMs": oldest_ms }));
            fleet.insert("workers".to_owned(), workers.unwrap_or_default());
        }
        shown
    }
}
