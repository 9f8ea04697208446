//! The record of one execution, and the stores to which the audit writes it.

use crate::backend::{Backend, BackendError, Claims, ExecutionStore, FunctionStore, Journal, Membership};
use crate::model::{Execution, IdempotencyKey, JobId, NodeId, Recommendation};
use bytes::Bytes;
use std::sync::Arc;
use tokio::time::Instant;

/// The record of one execution.
pub struct Record {
    pub id: JobId,
    pub row: Execution,
    pub recommendation: Option<Recommendation>,
    pub kept: Option<Box<KeyedResult>>,
    /// The job ended as LOST before. This row replaces its LOST row.
    pub is_late: bool,
    /// Another node may write a row of this execution too, with another result.
    pub is_shared: bool,
    /// When it was recorded by this process.
    pub since: Instant,
    /// Its size as counted when it was queued. 0: it was not queued.
    pub counted: usize,
}

/// A result to be stored with the idempotency key of its request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyedResult {
    pub key: IdempotencyKey,
    pub result: Bytes,
}

impl Record {
    /// Approximate memory size of the record, in bytes.
    pub fn bytes(&self) -> usize {
        let tip = self.recommendation.as_ref().and_then(|r| r.tip.as_ref()).map_or(0, String::len);
        let kept = self.kept.as_ref().map_or(0, |kept| kept.result.len());
        self.row.message.len() + tip + kept + 512
    }
}

/// The stores to which the audit writes.
#[derive(Clone)]
pub struct Stores {
    pub executions: Arc<dyn ExecutionStore>,
    pub claims: Arc<dyn Claims>,
    pub journal: Arc<dyn Journal>,
    pub functions: Arc<dyn FunctionStore>,
    /// This node.
    pub node: NodeId,
    /// `None`: there is only this node.
    pub membership: Option<Arc<dyn Membership>>,
}

impl Stores {
    pub fn of(backend: &Backend, node: NodeId) -> Self {
        Self {
            executions: Arc::clone(&backend.executions),
            claims: Arc::clone(&backend.claims),
            journal: Arc::clone(&backend.journal),
            functions: Arc::clone(&backend.functions),
            node,
            membership: backend.membership.clone(),
        }
    }

    /// Prepares for a change of the journal of `node`: if this process dies after it, another one finds the
    /// change.
    pub async fn entrust(&self, node: NodeId) -> Result<(), BackendError> {
        match &self.membership {
            // A successor of this process reads the journal of this node at its start.
            Some(membership) if node != self.node => membership.entrust(node).await,
            _ => Ok(()),
        }
    }
}

/// The queue is full: the log table does not keep up.
#[derive(Debug, PartialEq, Eq)]
pub struct QueueFull;

/// Receives the ids of jobs whose rows are stored: written, or on this node's disk. Must not block, because
/// the rows of other jobs wait.
pub trait RowsStored: Send + Sync {
    fn rows_written(&self, ids: &[JobId]);
}
