//! Schedules the look-ups of stored results.
//!
//! Publish–subscribe serves only as a wake-up, because a publication can be lost. So each job in flight is
//! also looked up: every second while a request waits for it, otherwise at an age of 1, 2, 4 … 60 s, and
//! after each (re)subscribe.
//!
//! A heap was rejected. All jobs of a stage wait equally long, so one queue per stage is always sorted, and
//! entering a job costs one push.

use crate::model::JobId;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::time::Duration;
use tokio::time::Instant;

/// The pauses between the look-ups of a job, in seconds; after them [`LAST_PAUSE_S`] repeats.
const PAUSES_S: [u64; 7] = [1, 1, 2, 4, 8, 16, 28];
const LAST_PAUSE_S: u64 = 60;

/// Maximum number of look-ups taken from a queue under one lock.
const TAKEN_MAX: usize = 256;

/// The stage of a job that has just entered, or that a request waits for.
pub const FIRST: usize = 0;
/// The stage of a job that ended as LOST.
pub const LAST: usize = PAUSES_S.len();

/// The planned look-ups, by stage.
#[derive(Default)]
pub struct LookupSchedule {
    stages: [Mutex<VecDeque<DueLookup>>; PAUSES_S.len() + 1],
}

/// A planned look-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DueLookup {
    at: Instant,
    pub id: JobId,
    /// The stage that the job was in.
    pub stage: usize,
}

impl LookupSchedule {
    /// Plans the next look-up of a job after the pause of `stage`.
    pub fn plan(&self, id: JobId, stage: usize) {
        let stage = stage.min(PAUSES_S.len());
        let pause = PAUSES_S.get(stage).copied().unwrap_or(LAST_PAUSE_S);
        let due = DueLookup { at: Instant::now() + Duration::from_secs(pause), id, stage };
        self.queue(stage).push_back(due);
    }

    /// Takes at most `max` look-ups that are due and wanted. Unwanted ones do not count: nearly every job has
    /// ended before its first look-up, and those must not accumulate behind `max`.
    pub fn take_due(&self, max: usize, is_wanted: impl Fn(JobId) -> bool) -> Vec<DueLookup> {
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

    /// Takes a few at a time, because requests that plan a look-up wait for the lock.
    fn take_some(&self, stage: usize, now: Instant, max: usize) -> Vec<DueLookup> {
        let mut queue = self.queue(stage);
        let due = queue.iter().take(max.min(TAKEN_MAX)).take_while(|due| due.at <= now).count();
        queue.drain(..due).collect()
    }

    fn queue(&self, stage: usize) -> parking_lot::MutexGuard<'_, VecDeque<DueLookup>> {
        self.stages[stage].lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::NodeId;

    #[tokio::test(start_paused = true)]
    async fn look_ups_are_due_at_an_age_of_1_2_4_to_60_seconds() {
        let schedule = LookupSchedule::default();
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
    async fn at_most_max_look_ups_are_taken() {
        let schedule = LookupSchedule::default();
        for n in 0..10 {
            schedule.plan(JobId::new(NodeId(1), 0, n), FIRST);
        }
        assert!(schedule.take_due(10, |_| true).is_empty());
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(schedule.take_due(7, |_| true).len(), 7);
        assert_eq!(schedule.take_due(7, |_| true).len(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn unwanted_look_ups_do_not_count() {
        let schedule = LookupSchedule::default();
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
