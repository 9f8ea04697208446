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

/// The stage of a job that was just entered, or that somebody waits for.
pub const FIRST: usize = 0;

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

    /// Takes at most `max` look-ups that are due.
    pub fn take_due(&self, max: usize) -> Vec<Due> {
        let now = Instant::now();
        let mut due = Vec::new();
        for stage in 0..self.stages.len() {
            let mut queue = self.queue(stage);
            while due.len() < max && queue.front().is_some_and(|front| front.at <= now) {
                due.extend(queue.pop_front());
            }
        }
        due
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
            for due in schedule.take_due(10) {
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
        assert!(schedule.take_due(10).is_empty());
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(schedule.take_due(7).len(), 7);
        assert_eq!(schedule.take_due(7).len(), 3);
    }
}
