//! The oldest job in flight, for the overview of the fleet and the metrics.
//!
//! An index by age was rejected: every job would pay for it. Instead, the oldest job is remembered while it
//! has no result, because all later ones are younger. When it has one, the table is read again, at a bounded
//! pace.

use super::in_flight::InFlight;
use crate::model::{JobId, UnixMs};
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// The table is read at a pace of at most this many jobs per second. Until the next time the age of the last
/// oldest job is reported.
const READ_PER_SECOND: usize = 65_536;

/// Finds the oldest job without a result.
pub struct OldestJob {
    in_flight: Arc<InFlight>,
    last: Mutex<LastOldest>,
}

struct LastOldest {
    job: Option<JobId>,
    /// The table is not read before.
    next: Instant,
}

impl OldestJob {
    pub fn new(in_flight: Arc<InFlight>) -> Self {
        let last = LastOldest { job: None, next: Instant::now() };
        Self { in_flight, last: Mutex::new(last) }
    }

    /// Of a node without jobs.
    #[cfg(test)]
    pub fn of_nothing(metrics: Arc<crate::metrics::Metrics>) -> Self {
        Self::new(Arc::new(InFlight::new(1, 1, metrics)))
    }

    /// When the oldest job without a result was accepted. `None`: there is no such job. A job that was
    /// adopted since the table was read is not seen.
    pub fn accepted_at(&self) -> Option<UnixMs> {
        let mut last = self.last.lock();
        let is_awaited = last.job.is_some_and(|job| self.in_flight.awaited(job).is_some());
        if !is_awaited && last.next <= Instant::now() {
            let jobs = self.in_flight.unsettled();
            last.job = jobs.iter().copied().min_by_key(JobId::accepted_at);
            let pause = jobs.len() / READ_PER_SECOND;
            last.next = Instant::now() + Duration::from_secs(u64::try_from(pause).unwrap_or(u64::MAX));
        }
        last.job.map(|job| job.accepted_at())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::in_flight::Permits;
    use crate::metrics::Metrics;
    use crate::model::{FunctionId, Job, NodeId, Outcome};

    fn job(at: UnixMs) -> Job {
        Job {
            id: JobId::new(NodeId(1), at, at),
            function: FunctionId::parse("f").unwrap(),
            deadline: UnixMs::MAX,
            progress: None,
            idempotency_key: None,
            is_promised: true,
            message: "{}".into(),
            trace: None,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_oldest_job_without_a_result_is_found() {
        let table = Arc::new(InFlight::new(10, 1000, Arc::new(Metrics::new(1).unwrap())));
        let oldest = OldestJob::new(Arc::clone(&table));
        assert_eq!(oldest.accepted_at(), None);
        for at in [500, 300, 400] {
            table.enter(&job(at), Permits::new()).unwrap();
        }
        assert_eq!(oldest.accepted_at(), Some(300));
        table.settle(job(400).id, Outcome::new("{}".into()));
        assert_eq!(oldest.accepted_at(), Some(300));
        table.settle(job(300).id, Outcome::new("{}".into()));
        assert_eq!(oldest.accepted_at(), Some(500));
        table.remove(job(500).id);
        assert_eq!(oldest.accepted_at(), None);
    }
}
