//! The table of jobs as the worker of this process sees it.

use super::queue::{Queue, QueuedJob};
use super::results::LocalResults;
use crate::backend::{BackendError, JobSource, JobSourceTraits, Receipt, ReceivedJob};
use crate::model::JobId;
use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::Duration;

/// Most jobs of one read. Each may have 1 MiB.
const RECEIVED_MAX: usize = 32;
/// Starts without a recorded end after which a job fails, because it may be the cause that the process dies.
const STARTS_MAX: u32 = 3;
/// Interval between reads of the table without a notification. They find jobs whose sender left before the
/// commit.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The jobs of one data directory, for one worker.
pub(super) struct LocalJobs {
    queue: Queue,
    results: Arc<LocalResults>,
    /// Number of the last job that was received.
    last: Mutex<i64>,
}

impl LocalJobs {
    pub(super) fn new(queue: Queue, results: Arc<LocalResults>) -> Self {
        Self { queue, results, last: Mutex::new(0) }
    }
}

fn received(job: QueuedJob) -> ReceivedJob {
    ReceivedJob {
        receipt: Receipt::new(job.seq.to_string()),
        request_id: job.id.to_string(),
        function: job.function,
        deadline: job.deadline,
        starts: job.starts,
        group: None,
        message: job.message,
    }
}

/// The number of a job in the table.
fn seq(receipt: &Receipt) -> Result<i64, BackendError> {
    receipt.text().parse().map_err(|_| BackendError::Invalid("a receipt of another source".into()))
}

#[async_trait]
impl JobSource for LocalJobs {
    fn traits(&self) -> JobSourceTraits {
        JobSourceTraits { lease: None, starts_max: Some(STARTS_MAX), receive_max: RECEIVED_MAX }
    }

    async fn receive(&self, max: usize) -> Result<Vec<ReceivedJob>, BackendError> {
        loop {
            let last = *self.last.lock();
            let jobs = self.queue.after(last, max.min(RECEIVED_MAX)).await?;
            if let Some(newest) = jobs.last() {
                *self.last.lock() = newest.seq;
                return Ok(jobs.into_iter().map(received).collect());
            }
            // It returns without jobs only to wait again.
            let _ = tokio::time::timeout(LOOK_EVERY, self.queue.arrived.notified()).await;
        }
    }

    /// Written before the start: a job that kills the process leaves no time afterwards. For the first start
    /// it need not have returned: a job that is so fast is known after its second one.
    async fn start(&self, job: &ReceivedJob) -> Result<(), BackendError> {
        let seq = seq(&job.receipt)?;
        match job.starts {
            0 => self.queue.begin_first_start(seq).await,
            starts => self.queue.set_starts(vec![(seq, starts + 1)]).await,
        }
    }

    async fn extend(&self, _receipts: &[Receipt]) -> Result<(), BackendError> {
        Ok(())
    }

    /// The next process receives them.
    async fn give_back(&self, jobs: &[ReceivedJob]) -> Result<(), BackendError> {
        let starts: Result<_, BackendError> =
            jobs.iter().map(|job| Ok((seq(&job.receipt)?, job.starts))).collect();
        self.queue.set_starts(starts?).await
    }

    async fn finish(&self, job: &ReceivedJob, result: Bytes) -> Result<(), BackendError> {
        let id = JobId::parse(&job.request_id)
            .ok_or_else(|| BackendError::Invalid("a job of another source".into()))?;
        self.results.finish(seq(&job.receipt)?, id, result).await
    }

    async fn discard(&self, job: &ReceivedJob) -> Result<(), BackendError> {
        self.queue.remove(seq(&job.receipt)?).await
    }
}
