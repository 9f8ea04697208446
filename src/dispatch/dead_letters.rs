//! Ends jobs whose messages are in the dead-letter queue, because workers received them too often without
//! finishing them.
//!
//! Such a job gets a FAILED result in the way workers deliver theirs: stored, unless a result exists, and
//! then published. So it reaches the node that tracks the job like any other result, and never replaces a
//! worker's result. The messages stay in the queue for a redrive, unless the operator configures that they
//! are consumed.

use crate::ambient;
use crate::backend::{BackendError, DeadLetter, DeadLetters};
use crate::config::DeadLetterConf;
use crate::metrics::Metrics;
use crate::model::{FunctionId, JobId, Status};
use bytes::Bytes;
use rand::Rng;
use serde_json::json;
use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

/// Maximum number of reads per round. Later rounds find the rest, because a queue returns its messages in no
/// order.
const READS_MAX: usize = 20;
/// Maximum number of answered jobs that are remembered. Beyond that the oldest may be answered again, which
/// has no effect.
const TOLD_MAX: usize = 16_384;

/// Reads the dead-letter queue at intervals.
pub struct DeadLetterReader {
    queue: Option<Arc<dyn DeadLetters>>,
    metrics: Arc<Metrics>,
    every: Duration,
    consume: bool,
    told: AnsweredJobs,
}

#[derive(Default)]
struct AnsweredJobs {
    jobs: HashSet<JobId>,
    order: VecDeque<JobId>,
}

impl AnsweredJobs {
    fn insert(&mut self, id: JobId) {
        if self.jobs.insert(id) {
            self.order.push_back(id);
        }
        if self.order.len() > TOLD_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.jobs.remove(&oldest);
        }
    }
}

impl DeadLetterReader {
    pub fn new(conf: &DeadLetterConf, queue: Option<Arc<dyn DeadLetters>>, metrics: Arc<Metrics>) -> Self {
        let every = Duration::from_secs(conf.every_s);
        Self { queue, metrics, every, consume: conf.consume, told: AnsweredJobs::default() }
    }

    /// Runs forever.
    pub async fn run(mut self) {
        let Some(queue) = self.queue.clone() else { return std::future::pending().await };
        let mut was_well = true;
        loop {
            // Jitter, so that the nodes of a fleet do not read at the same time.
            let pause = self.every.mul_f64(ambient::rng().random_range(0.75..1.25));
            tokio::time::sleep(pause).await;
            let done = self.round(queue.as_ref()).await;
            if let (Err(e), true) = (&done, was_well) {
                tracing::warn!(
                    error = %e,
                    "Dead letters not processed; retrying. Check the dead-letter queue and Redis"
                );
            }
            was_well = done.is_ok();
        }
    }

    async fn round(&mut self, queue: &dyn DeadLetters) -> Result<(), BackendError> {
        for _ in 0..READS_MAX {
            let letters = queue.read().await?;
            if letters.is_empty() {
                break;
            }
            for (id, function) in letters.iter().filter_map(|letter| letter.job.as_ref()) {
                self.tell(queue, *id, function).await?;
            }
            // Messages that are not jobs are not ours to delete.
            let read: Vec<DeadLetter> = letters.into_iter().filter(|letter| letter.job.is_some()).collect();
            if self.consume && !read.is_empty() {
                queue.delete(&read).await?;
            }
        }
        Ok(())
    }

    async fn tell(
        &mut self,
        queue: &dyn DeadLetters,
        id: JobId,
        function: &FunctionId,
    ) -> Result<(), BackendError> {
        if self.told.jobs.contains(&id) {
            return Ok(());
        }
        if queue.answer(id, given_up(id, function)).await? {
            tracing::warn!(
                requestId = %id,
                functionId = %function,
                "Job failed: its message is in the dead-letter queue"
            );
            self.metrics.jobs.dead_letters.inc();
        }
        self.told.insert(id);
        Ok(())
    }
}

/// The result of a job that no worker has finished.
fn given_up(id: JobId, function: &FunctionId) -> Bytes {
    let reason = "no worker finished the job in the allowed number of deliveries; \
                  its message is in the dead-letter queue";
    let result = json!({
        "requestId": id.to_string(), "functionId": function.as_str(), "status": Status::FAILED, "exitCode": 1,
        "stdout": "", "stderr": reason, "durationMs": 0,
    });
    Bytes::from(result.to_string())
}
