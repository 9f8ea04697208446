//! Rows that fail while others are written: when they are retried, and when they are put aside.

use crate::audit::record::Record;
use crate::backend::BackendError;
use crate::model::JobId;
use std::collections::HashMap;
use std::time::Duration;
use tokio::time::Instant;

/// Interval between retries of one failing row, unless there are too many of them.
pub const RETRIED_EVERY: Duration = Duration::from_secs(5);

/// Minimum pause between two rounds of such retries: they cost at most 25 calls per second.
pub const RETRY_PAUSE_MIN: Duration = Duration::from_secs(1);

/// A row is put aside only after this many failed attempts between which other rows were written.
pub const ASIDE_TRIES_MIN: u32 = 3;

/// Failing rows whose attempts are counted. More of them are retried, but not put aside until there is room.
pub const COUNTED_MAX: usize = 65_536;

/// The state of rows that fail while others are written.
#[derive(Default)]
pub struct FailingRows {
    pub next_try: Option<Instant>,
    pub tries: HashMap<JobId, FailedAttempts>,
}

/// The attempts of one such row.
pub struct FailedAttempts {
    pub first: Instant,
    /// The number of all rows written so far, at the last failure.
    pub written: u64,
    /// Failed attempts that count: other rows were written since the previous failure.
    pub counted: u32,
}

impl FailingRows {
    /// Whether the rows may be retried now.
    pub fn is_due(&self) -> bool {
        self.next_try.is_none_or(|at| at <= Instant::now())
    }

    /// Retries no row for the interval.
    pub fn pause(&mut self) {
        self.next_try = Some(Instant::now() + RETRIED_EVERY);
    }

    /// Retries no row for the share of the interval that `rows` of `all` rows have: one round through all of
    /// them takes at least the retry interval of a row.
    pub fn pause_for(&mut self, rows: usize, all: u64) {
        let part = rows as f64 / all.max(1) as f64;
        let pause = RETRIED_EVERY.mul_f64(part.min(1.0)).max(RETRY_PAUSE_MIN);
        self.next_try = Some(Instant::now() + pause);
    }

    /// Counts failed attempts; `written`: all rows written so far. Returns the rows to be put aside, which
    /// have failed for `aside_after`, and the others.
    pub fn count(
        &mut self,
        failures: Vec<(Record, BackendError)>,
        written: u64,
        aside_after: Duration,
    ) -> (Vec<(Record, BackendError)>, Vec<Record>) {
        let now = Instant::now();
        let (mut hopeless, mut failing) = (Vec::new(), Vec::new());
        for (record, error) in failures {
            if self.tries.len() >= COUNTED_MAX && !self.tries.contains_key(&record.id) {
                failing.push(record);
                continue;
            }
            let new = FailedAttempts { first: now, written, counted: 0 };
            let tries = self.tries.entry(record.id).or_insert(new);
            // Otherwise the table may be at fault.
            if written > tries.written {
                (tries.counted, tries.written) = (tries.counted + 1, written);
            }
            if tries.counted >= ASIDE_TRIES_MIN && now - tries.first >= aside_after {
                hopeless.push((record, error));
            } else {
                failing.push(record);
            }
        }
        (hopeless, failing)
    }

    /// Forgets the attempts of rows that are written or put aside.
    pub fn remove(&mut self, ids: &[JobId]) {
        for id in ids {
            self.tries.remove(id);
        }
    }
}
