//! The summary of the only node, in memory.

use crate::backend::{BackendError, NodeSummaries, SUMMARY_LISTED, StoredSummary};
use crate::model::NodeId;
use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::time::Instant;

#[derive(Default)]
pub(super) struct LocalSummaries(Mutex<Option<(NodeId, Instant, Bytes)>>);

#[async_trait]
impl NodeSummaries for LocalSummaries {
    async fn write(&self, node: NodeId, summary: Bytes) -> Result<bool, BackendError> {
        *self.0.lock() = Some((node, Instant::now(), summary));
        Ok(true)
    }

    async fn all(&self) -> Result<Vec<StoredSummary>, BackendError> {
        let last = self.0.lock().clone();
        let shown = last.map(|(node, at, summary)| StoredSummary { node, age: at.elapsed(), summary });
        Ok(shown.into_iter().filter(|summary| summary.age <= SUMMARY_LISTED).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test(start_paused = true)]
    async fn the_last_summary_is_listed_until_it_is_old() {
        let summaries = LocalSummaries::default();
        assert_eq!(summaries.all().await, Ok(vec![]));
        for summary in ["a", "b"] {
            assert_eq!(summaries.write(NodeId(7), summary.into()).await, Ok(true));
        }
        tokio::time::advance(SUMMARY_LISTED).await;
        let expected = StoredSummary { node: NodeId(7), age: SUMMARY_LISTED, summary: "b".into() };
        assert_eq!(summaries.all().await, Ok(vec![expected]));
        tokio::time::advance(Duration::from_millis(1)).await;
        assert_eq!(summaries.all().await, Ok(vec![]));
    }
}
