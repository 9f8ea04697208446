//! Records the steps of the jobs of a batch. One reading of the clock serves all of them.

use crate::backend::SendError;
use crate::model::Job;
use tokio::time::Instant;

/// The batch is about to be sent.
pub fn note_sent(jobs: &[Job]) {
    let now = Instant::now();
    jobs.iter().filter_map(|job| job.progress.as_ref()).for_each(|progress| progress.note_sent(now));
}

/// The queue has answered: one result for each job.
pub fn note_answered(jobs: &[Job], results: &[Result<(), SendError>]) {
    let now = Instant::now();
    let confirmed = jobs.iter().zip(results).filter(|(_, result)| result.is_ok());
    confirmed.filter_map(|(job, _)| job.progress.as_ref()).for_each(|progress| progress.note_confirmed(now));
}
