//! The summaries of the nodes in Redis, in the slot of the fleet's leases (see [`super::membership`]):
//!
//! * `overview:{<log table>}`: a hash of the last summary by node.
//! * `overview:seen:{<log table>}`: a sorted set of the nodes by the time of their last summary.

use super::connection::CommandConnection;
use super::registry::{PutOutcome, RegistryBounds, ReportRegistry, ReportRow};
use crate::backend::{
    BackendError, NodeSummaries, SUMMARIES_MAX, SUMMARY_BYTES_MAX, SUMMARY_LISTED, StoredSummary,
};
use crate::model::NodeId;
use async_trait::async_trait;
use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;

/// How long the summary of a silent node is kept.
const KEPT: Duration = Duration::from_secs(60);
const BOUNDS: RegistryBounds =
    RegistryBounds { listed: SUMMARY_LISTED, kept: KEPT, members_max: SUMMARIES_MAX };

pub struct RedisSummaries(ReportRegistry);

impl RedisSummaries {
    /// The keys have the table name in them, so that fleets that share Redis but no tables stay separate.
    pub fn new(commands: Arc<CommandConnection>, logs_table: &str) -> Self {
        let (summaries, seen) =
            (format!("overview:{{{logs_table}}}"), format!("overview:seen:{{{logs_table}}}"));
        Self(ReportRegistry::new(commands, summaries, seen, BOUNDS))
    }
}

#[async_trait]
impl NodeSummaries for RedisSummaries {
    async fn write(&self, node: NodeId, summary: Bytes) -> Result<bool, BackendError> {
        if summary.len() > SUMMARY_BYTES_MAX {
            return Err(BackendError::Invalid(format!("the summary has {} bytes", summary.len())));
        }
        Ok(self.0.put(&node.to_string(), &summary, false).await? != PutOutcome::Full)
    }

    async fn all(&self) -> Result<Vec<StoredSummary>, BackendError> {
        Ok(self.0.all().await?.into_iter().filter_map(stored).collect())
    }
}

/// `None`: the entry was not written by a node.
fn stored((node, summary, age, _): ReportRow) -> Option<StoredSummary> {
    let node = NodeId::parse(std::str::from_utf8(&node).ok()?)?;
    let age = Duration::from_millis(age);
    (summary.len() <= SUMMARY_BYTES_MAX).then_some(StoredSummary { node, age, summary })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_that_no_node_has_written_are_skipped() {
        let row = |node: &'static str, bytes: usize| (node.into(), vec![b'x'; bytes].into(), 5, 100);
        assert_eq!(stored(row("0000002a", 1)).map(|stored| stored.node), Some(NodeId(42)));
        for bad in [row("2A", 1), row("\u{ff}", 1), row("0000002a", SUMMARY_BYTES_MAX + 1)] {
            assert_eq!(stored(bad), None);
        }
    }
}
