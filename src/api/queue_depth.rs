//! The number of jobs on the queue, for all who show it.

use crate::backend::{BackendError, JobQueue};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::time::Instant;

/// Deadline of a single check.
const CHECK_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a depth is reused. Clients must not load the queue by asking.
const DEPTH_KEPT: Duration = Duration::from_secs(1);

/// Reads the depth of the queue, at most once per [`DEPTH_KEPT`] for all callers together.
pub struct QueueDepth {
    queue: Arc<dyn JobQueue>,
    last: Mutex<Option<(Instant, Result<u64, BackendError>)>>,
}

impl QueueDepth {
    pub fn new(queue: Arc<dyn JobQueue>) -> Self {
        Self { queue, last: Mutex::const_new(None) }
    }

    /// The approximate number of jobs on the queue. Also the health check of the queue.
    pub async fn get(&self) -> Result<u64, BackendError> {
        // Held during the call, so that concurrent callers share its outcome.
        let mut last = self.last.lock().await;
        if let Some((at, depth)) = last.as_ref()
            && at.elapsed() < DEPTH_KEPT
        {
            return depth.clone();
        }
        let depth = timed(self.queue.depth()).await;
        *last = Some((Instant::now(), depth.clone()));
        depth
    }
}

/// The outcome of a check, or an error after [`CHECK_TIMEOUT`].
pub async fn timed<T>(check: impl Future<Output = Result<T, BackendError>>) -> Result<T, BackendError> {
    let timeout = BackendError::Unavailable(format!("no answer within {CHECK_TIMEOUT:?}"));
    tokio::time::timeout(CHECK_TIMEOUT, check).await.unwrap_or(Err(timeout))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{QueueTraits, SendError};
    use crate::model::Job;
    use async_trait::async_trait;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// Its depth is the number of calls. The third call is never answered.
    #[derive(Default)]
    struct CountingQueue(AtomicU64);

    #[async_trait]
    impl JobQueue for CountingQueue {
        async fn send_batch(&self, _: &[Job]) -> Vec<Result<(), SendError>> {
            Vec::new()
        }

        fn traits(&self) -> QueueTraits {
            QueueTraits { message_bytes_max: 1, retention: Duration::ZERO, fifo: false }
        }

        async fn depth(&self) -> Result<u64, BackendError> {
            match self.0.fetch_add(1, Ordering::Relaxed) + 1 {
                3 => std::future::pending().await,
                calls => Ok(calls),
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn callers_share_a_read() {
        let depth = QueueDepth::new(Arc::new(CountingQueue::default()));
        assert_eq!(tokio::join!(depth.get(), depth.get()), (Ok(1), Ok(1)));
        tokio::time::advance(DEPTH_KEPT).await;
        assert_eq!(depth.get().await, Ok(2));
        tokio::time::advance(DEPTH_KEPT).await;
        let (one, two) = tokio::join!(depth.get(), depth.get());
        assert!(matches!(one, Err(BackendError::Unavailable(_))) && one == two, "{one:?}");
    }
}
