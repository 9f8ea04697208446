//! Receives jobs from the source, and remembers what the last ones were like.

use super::message::Message;
use super::runner::RunEnded;
use crate::backend::{BackendError, JobSource, ReceivedJob, WorkerActivity, WorkerPart};
use crate::backoff::Backoff;
use crate::metrics::WorkerMetrics;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// The pauses after a source that did not answer.
const RETRIES: Backoff = Backoff::new(Duration::from_millis(250), Duration::from_secs(10));
/// The pauses before more jobs are taken, after jobs that this worker could not run.
const PAUSES: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
/// Runs that take less than this on average are short: jobs that wait for them wait briefly too.
const SHORT_RUN: Duration = Duration::from_millis(250);
/// Weight of the last job in the averages, as 1 / this.
const AVERAGE_OVER: u32 = 8;
/// Memory of a job before the first one is known, in MiB: the default of functions.
const MEMORY_MB_TYPICAL: u64 = 128;

/// What one call has brought: jobs in their order, and the memory of their functions, in MiB.
pub(super) type ReceivedBatch = Result<Vec<(ReceivedJob, u64)>, BackendError>;

/// A job that waits for its start.
pub(super) struct WaitingJob {
    /// Counts the jobs of this process in their order of arrival.
    pub(super) number: u64,
    pub(super) job: Arc<ReceivedJob>,
    /// Memory of its function, in MiB.
    pub(super) memory_mb: u64,
}

/// Numbers the jobs that arrive, and keeps averages of them.
#[derive(Debug)]
pub(super) struct Inbox {
    arrived: u64,
    /// Consecutive calls that failed.
    failures: u32,
    /// Consecutive jobs that this worker could not run, and when it takes jobs again.
    not_run: u32,
    takes_at: Instant,
    /// Averages of the last jobs.
    memory_mb: u64,
    duration: Duration,
}

impl Inbox {
    pub(super) fn new() -> Self {
        Self {
            arrived: 0,
            failures: 0,
            not_run: 0,
            takes_at: Instant::now(),
            memory_mb: MEMORY_MB_TYPICAL,
            duration: SHORT_RUN,
        }
    }

    /// The jobs of one call, in their order. Logs the first failure in a row.
    pub(super) fn arrived(&mut self, received: ReceivedBatch) -> Vec<WaitingJob> {
        let jobs = match received {
            Ok(jobs) => jobs,
            Err(error) => {
                self.failures = self.failures.saturating_add(1);
                if self.failures == 1 {
                    tracing::warn!(%error, "No jobs received; retrying");
                }
                return Vec::new();
            }
        };
        self.failures = 0;
        let mut waiting = Vec::with_capacity(jobs.len());
        for (job, memory_mb) in jobs {
            self.arrived += 1;
            let others = self.memory_mb.saturating_mul(u64::from(AVERAGE_OVER - 1));
            self.memory_mb = others.saturating_add(memory_mb) / u64::from(AVERAGE_OVER);
            waiting.push(WaitingJob { number: self.arrived, job: Arc::new(job), memory_mb });
        }
        waiting
    }

    /// Records the end of a run.
    pub(super) fn ended(&mut self, ended: RunEnded, took: Duration) {
        self.duration = (self.duration * (AVERAGE_OVER - 1)).saturating_add(took) / AVERAGE_OVER;
        match ended {
            RunEnded::Finished => self.not_run = 0,
            RunEnded::Unfinished => {
                // What is wrong with this worker concerns other jobs too. But one job alone may be the cause,
                // and must not stop the others.
                if self.not_run > 0 {
                    self.takes_at = Instant::now() + PAUSES.pause(self.not_run);
                }
                self.not_run = self.not_run.saturating_add(1);
            }
        }
    }

    /// Whether this worker takes jobs now, after those that it could not run.
    pub(super) fn takes_jobs(&self) -> bool {
        Instant::now() >= self.takes_at
    }

    /// Memory of a typical job, in MiB; at least 1.
    pub(super) fn typical_mb(&self) -> u64 {
        self.memory_mb.max(1)
    }

    /// Whether most runs end soon.
    pub(super) fn are_runs_short(&self) -> bool {
        self.duration < SHORT_RUN
    }

    /// The number of consecutive calls that failed, for [`receive`].
    pub(super) fn failures(&self) -> u32 {
        self.failures
    }
}

/// Receives at most `max` jobs, after a pause if earlier calls have failed.
pub(super) async fn receive(
    source: Arc<dyn JobSource>,
    max: usize,
    failures: u32,
    activity: Arc<WorkerActivity>,
    metrics: Arc<WorkerMetrics>,
) -> ReceivedBatch {
    if failures > 0 {
        RETRIES.sleep(failures).await;
    }
    let received = source.receive(max.min(source.traits().receive_max)).await;
    activity.note(WorkerPart::Queue, received.is_ok());
    if received.is_err() {
        metrics.jobs.receive_failures.inc();
    }
    // Parsed here, and not where jobs are scheduled, because a message may be long.
    let measured = |job: ReceivedJob| {
        let memory_mb = Message::memory_mb_of(&job.message);
        (job, memory_mb)
    };
    received.map(|jobs| jobs.into_iter().map(measured).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(memory_mb: u64) -> (ReceivedJob, u64) {
        (ReceivedJob::sample("r"), memory_mb)
    }

    #[tokio::test(start_paused = true)]
    async fn jobs_are_numbered_and_averaged() {
        let mut inbox = Inbox::new();
        assert!(inbox.arrived(Err(BackendError::Unavailable("x".into()))).is_empty());
        assert_eq!(inbox.failures(), 1);
        for round in 0..50 {
            let jobs = inbox.arrived(Ok(vec![job(1_000), job(1_000)]));
            let numbers: Vec<u64> = jobs.iter().map(|waiting| waiting.number).collect();
            assert_eq!(numbers, [2 * round + 1, 2 * round + 2]);
            assert_eq!((jobs[0].memory_mb, inbox.failures()), (1_000, 0));
        }
        assert!((950..=1_000).contains(&inbox.typical_mb()), "{}", inbox.typical_mb());
        assert!(!inbox.are_runs_short(), "nothing is known");
        (0..20).for_each(|_| inbox.ended(RunEnded::Finished, Duration::from_millis(2)));
        assert!(inbox.are_runs_short());
        (0..20).for_each(|_| inbox.ended(RunEnded::Finished, Duration::from_secs(9)));
        assert!(!inbox.are_runs_short());
    }

    #[tokio::test(start_paused = true)]
    async fn jobs_that_cannot_be_run_delay_the_next_ones() {
        let mut inbox = Inbox::new();
        inbox.ended(RunEnded::Unfinished, Duration::ZERO);
        for longest_s in [1, 2, 4, 8, 16, 32, 60, 60] {
            assert!(inbox.takes_jobs());
            inbox.ended(RunEnded::Unfinished, Duration::ZERO);
            assert!(!inbox.takes_jobs());
            tokio::time::advance(Duration::from_secs(longest_s)).await;
        }
        inbox.ended(RunEnded::Finished, Duration::ZERO);
        inbox.ended(RunEnded::Unfinished, Duration::ZERO);
        assert!(inbox.takes_jobs(), "it starts anew");
    }
}
