//! When stored results are looked up.
//!
//! Publish–subscribe is only a wake-up: a publication can be lost. So each job in flight is looked up as well,
//! each second while somebody waits for it, else at 1, 2, 4 … 60 s of age, and all jobs after a (re)subscribe.
//!
//! A heap was rejected: all jobs of one stage wait equally long, so one queue a stage is in order by itself, and
//! entering a job costs one push.

use crate::model::JobId;
use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// The pauses between the look-ups of a job, in seconds; the last repeats.
const PAUSES_S: [u64; 7] = [1, 1, 2, 4, 8, 16, 28];
const LAST_PAUSE_S: u64 = 60;

/// Look-ups taken from a queue under one lock.
const TAKEN_MAX: usize = 256;

/// The stage of a job that was just entered, or that somebody waits for.
pub const FIRST: usize = 0;
/// The stage of a job that was given up.
pub const LAST: usize = PAUSES_S.len();

/// What is to be looked up, and when.
#[derive(Default)]
pub struct Schedule {
    stages: [Mutex<VecDeque<Due>>; PAUSES_S.len() + 1],
}

/// One look-up that is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Due {
    at: Instant,
    pub id: JobId,
    /// The stage the job came from.
    pub stage: usize,
}

impl Schedule {
    /// Plans the next look-up of a job, after the pause of `stage`.
    pub fn plan(&self, id: JobId, stage: usize) {
        let stage = stage.min(PAUSES_S.len());
        let pause = PAUSES_S.get(stage).copied().unwrap_or(LAST_PAUSE_S);
        let due = Due { at: Instant::now() + Duration::from_secs(pause), id, stage };
        self.queue(stage).push_back(due);
    }

    /// Takes at most `max` look-ups that are due and still wanted. Those that are not wanted do not count: nearly every
    /// job has ended by its first look-up, and they must not pile up behind a `max`.
    pub fn take_due(&self, max: usize, is_wanted: impl Fn(JobId) -> bool) -> Vec<Due> {
        let now = Instant::now();
        let mut wanted = Vec::new();
        for stage in 0..self.stages.len() {
            loop {
                let taken = self.take_some(stage, now, max - wanted.len());
                if taken.is_empty() {
                    break;
                }
                wanted.extend(taken.into_iter().filter(|due| is_wanted(due.id)));
            }
        }
        wanted
    }

    /// A few at a time: requests that plan their own look-up wait for the queue.
    fn take_some(&self, stage: usize, now: Instant, max: usize) -> Vec<Due> {
        let mut queue = self.queue(stage);
        let due = queue.iter().take(max.min(TAKEN_MAX)).take_while(|due| due.at <= now).count();
        queue.drain(..due).collect()
    }

    fn queue(&self, stage: usize) -> std::sync::MutexGuard<'_, VecDeque<Due>> {
        self.stages[stage].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::NodeId;

    #[tokio::test(start_paused = true)]
    async fn look_ups_come_at_1_2_4_to_60_seconds_of_age() {
        let schedule = Schedule::default();
        schedule.plan(JobId::new(NodeId(1), 0, 1), FIRST);
        let started = Instant::now();
        let mut ages = Vec::new();
        while ages.len() < 9 {
            tokio::time::advance(Duration::from_millis(500)).await;
            for due in schedule.take_due(10, |_| true) {
                ages.push(started.elapsed().as_secs());
                schedule.plan(due.id, due.stage + 1);
            }
        }
        assert_eq!(ages, [1, 2, 4, 8, 16, 32, 60, 120, 180]);
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_than_asked_for() {
        let schedule = Schedule::default();
        for n in 0..10 {
            schedule.plan(JobId::new(NodeId(1), 0, n), FIRST);
        }
        assert!(schedule.take_due(10, |_| true).is_empty());
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(schedule.take_due(7, |_| true).len(), 7);
        assert_eq!(schedule.take_due(7, |_| true).len(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn jobs_that_have_ended_do_not_count() {
        let schedule = Schedule::default();
        let id = |n| JobId::new(NodeId(1), 0, n);
        for n in 0..10 * TAKEN_MAX as u64 {
            schedule.plan(id(n), FIRST);
        }
        tokio::time::advance(Duration::from_secs(1)).await;
        let open = [id(3), id(5 * TAKEN_MAX as u64), id(9 * TAKEN_MAX as u64)];
        let due = schedule.take_due(2, |id| open.contains(&id));
        assert_eq!(due.iter().map(|due| due.id).collect::<Vec<_>>(), open[..2]);
        let due = schedule.take_due(2, |id| open.contains(&id));
        assert_eq!(due.iter().map(|due| due.id).collect::<Vec<_>>(), open[2..]);
    }
}
