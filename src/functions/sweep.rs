//! Deletes code that nothing points to any more, when it is due.
//!
//! Every node sweeps; they need not agree, as each step may be taken twice. An entry leaves the list after its code
//! is gone, so a sweep that breaks off is taken up by the next.

use crate::backend::{Backend, BackendError, CodeList, CodeStore, FunctionStore};
use crate::metrics::Metrics;
use crate::model::{RetiredCode, now_ms};
use std::sync::Arc;
use std::time::Duration;

/// Between two sweeps, give or take a half: nodes that start together must not sweep together.
const PERIOD: Duration = Duration::from_secs(600);
/// Entries of one sweep; the rest comes with the next.
const ENTRIES_MAX: usize = 1000;

/// The loop that sweeps.
pub struct Sweeper {
    store: Arc<dyn FunctionStore>,
    code: Arc<dyn CodeStore>,
    list: Arc<dyn CodeList>,
    metrics: Arc<Metrics>,
}

impl Sweeper {
    pub fn new(backend: &Backend, metrics: Arc<Metrics>) -> Self {
        Self {
            store: Arc::clone(&backend.functions),
            code: Arc::clone(&backend.code),
            list: Arc::clone(&backend.code_list),
            metrics,
        }
    }

    /// Never ends.
    pub async fn run(self) {
        loop {
            if let Err(e) = self.sweep().await {
                tracing::warn!(error = %e, "Code Sweep Failed");
            }
            tokio::time::sleep(PERIOD.mul_f64(rand::random_range(0.5..1.5))).await;
        }
    }

    async fn sweep(&self) -> Result<(), BackendError> {
        for entry in self.list.due(now_ms(), ENTRIES_MAX).await? {
            self.sweep_one(&entry).await?;
        }
        Ok(())
    }

    async fn sweep_one(&self, entry: &RetiredCode) -> Result<(), BackendError> {
        let function = self.store.get(&entry.function).await?;
        // The write that retired it may not have happened, or the one that adopted it may have left the entry.
        let is_current = function.is_some_and(|f| f.s3_key == entry.s3_key);
        if !is_current {
            self.code.delete(&entry.s3_key).await?;
            self.metrics.code_deleted.inc();
            tracing::info!(functionId = %entry.function, s3Key = entry.s3_key, "Old Code Deleted");
        }
        self.list.remove(entry).await
    }
}
