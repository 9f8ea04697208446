//! Deletes code that is due and that no function points to.
//!
//! Every node sweeps without coordination, because each step is idempotent. An entry leaves the list after
//! its code is deleted, so the next sweep continues an interrupted one.

use crate::ambient;
use crate::backend::{Backend, BackendError, CodeList, CodeStore, FunctionStore};
use crate::metrics::Metrics;
use crate::model::{RetiredCode, UnixMs, now_ms};
use rand::Rng;
use std::sync::Arc;
use std::time::Duration;

/// Time between two sweeps, with ±50 % jitter: nodes that start together should not sweep together.
const PERIOD: Duration = Duration::from_secs(600);
/// Maximum number of entries per sweep. The next sweep handles the rest.
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

    /// Runs forever.
    pub async fn run(self) {
        loop {
            if let Err(e) = self.sweep(now_ms()).await {
                tracing::warn!(error = %e, "The list of old code cannot be read; retrying at the next sweep");
            }
            let pause = PERIOD.mul_f64(ambient::rng().random_range(0.5..1.5));
            tokio::time::sleep(pause).await;
        }
    }

    async fn sweep(&self, now: UnixMs) -> Result<(), BackendError> {
        for entry in self.list.due(now, ENTRIES_MAX).await? {
            // An entry that fails must not block the others.
            if let Err(e) = self.sweep_one(&entry).await {
                tracing::warn!(
                    functionId = %entry.function,
                    s3Key = entry.s3_key,
                    error = %e,
                    "Old code not deleted; retrying at the next sweep"
                );
            }
        }
        Ok(())
    }

    async fn sweep_one(&self, entry: &RetiredCode) -> Result<(), BackendError> {
        let function = self.store.get(&entry.function).await?;
        // The write that retired the code may not have happened, or the one that adopted it may have left the
        // entry.
        let is_current = function.is_some_and(|f| f.s3_key == entry.s3_key);
        if !is_current {
            self.code.delete(&entry.s3_key).await?;
            self.metrics.code_deleted.inc();
            tracing::info!(functionId = %entry.function, s3Key = entry.s3_key, "Old code deleted");
        }
        self.list.remove(entry).await
    }
}

#[cfg(test)]
mod tests;
