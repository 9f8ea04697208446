//! Jobs that the queue has given up, since they came to workers too often and none finished them.
//!
//! Such a job gets a result that says so, as a worker would have given it: stored, unless there is one, and then
//! published. So it takes the one way back that all results take, to whichever node looks after the job, and what a
//! worker has said is never overruled. The messages stay where they are, for a redrive, unless the operator wants them
//! consumed.

use crate::backend::{BackendError, DeadLetter, DeadLetters};
use crate::config::DeadLetterConf;
use crate::metrics::Metrics;
use crate::model::{FunctionId, JobId, Status};
use bytes::Bytes;
use serde_json::json;
use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

/// Calls of one round. What is left is found by a later one: a queue gives its messages in no order.
const READS_MAX: usize = 20;
/// Jobs remembered as told. When more come the oldest are told again, which changes nothing.
const TOLD_MAX: usize = 16_384;

/// Reads the dead-letter queue from time to time.
pub struct Undertaker {
    queue: Option<Arc<dyn DeadLetters>>,
    metrics: Arc<Metrics>,
    every: Duration,
    consume: bool,
    told: Told,
}

#[derive(Default)]
struct Told {
    jobs: HashSet<JobId>,
    order: VecDeque<JobId>,
}

impl Told {
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

impl Undertaker {
    pub fn new(conf: &DeadLetterConf, queue: Option<Arc<dyn DeadLetters>>, metrics: Arc<Metrics>) -> Self {
        let every = Duration::from_secs(conf.every_s);
        Self { queue, metrics, every, consume: conf.consume, told: Told::default() }
    }

    /// Never ends.
    pub async fn run(mut self) {
        let Some(queue) = self.queue.clone() else { return std::future::pending().await };
        let mut was_well = true;
        loop {
            // Not all nodes of a fleet at the same time.
            tokio::time::sleep(self.every.mul_f64(rand::random_range(0.75..1.25))).await;
            let done = self.round(queue.as_ref()).await;
            if let (Err(e), true) = (&done, was_well) {
                tracing::warn!(error = %e, "Dead Letters Not Read");
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
            // What is no job of this kind is not ours to throw away.
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
            tracing::warn!(requestId = %id, functionId = %function, "Job Given Up By The Queue");
            self.metrics.jobs.dead_letters.inc();
        }
        self.told.insert(id);
        Ok(())
    }
}

/// The result of a job that no worker finished.
fn given_up(id: JobId, function: &FunctionId) -> Bytes {
    let reason = "no worker finished the job, however often it was delivered: it is in the dead-letter queue";
    let result = json!({
        "requestId": id.to_string(), "functionId": function.as_str(), "status": Status::FAILED, "exitCode": 1,
        "stdout": "", "stderr": reason, "durationMs": 0,
    });
    Bytes::from(result.to_string())
}
