//! The port for the summaries of the nodes: each writes one per second, and any node reads all of them.
//!
//! Summaries only inform people, so losing them is harmless: a node writes the next one a second later. `aws`
//! keeps them in Redis, `embedded` in memory. This port does not know what is in a summary.

use crate::backend::BackendError;
use crate::model::NodeId;
use async_trait::async_trait;
use bytes::Bytes;
use std::time::Duration;

/// How long a node is listed after its last summary.
pub const SUMMARY_LISTED: Duration = Duration::from_secs(10);

/// Maximum number of nodes with a summary.
pub const SUMMARIES_MAX: usize = 256;

/// Maximum size of a summary, in bytes. A larger one is not written and not read.
pub const SUMMARY_BYTES_MAX: usize = 64 << 10;

/// The last summary of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredSummary {
    pub node: NodeId,
    /// By the clock of the store, which all nodes share.
    pub age: Duration,
    pub summary: Bytes,
}

/// The summaries of all nodes.
#[async_trait]
pub trait NodeSummaries: Send + Sync {
    /// Replaces the summary of a node. Returns `false`, and stores nothing, if [`SUMMARIES_MAX`] other nodes
    /// are listed.
    async fn write(&self, node: NodeId, summary: Bytes) -> Result<bool, BackendError>;

    /// The summaries that are at most [`SUMMARY_LISTED`] old, sorted by node.
    async fn all(&self) -> Result<Vec<StoredSummary>, BackendError>;
}
