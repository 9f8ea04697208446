//! What executions add to the counters of their function.

use super::{Execution, Status};
use std::ops::AddAssign;

/// Whole numbers, so that they are exact in whatever order they are added. One that stands for a late result may be
/// below zero: it takes back what the job had added when it was given up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sums {
    pub invocations: i64,
    pub errors: i64,
    pub duration_us: i64,
    /// Runs whose worker reported the handler's own time.
    pub handler_invocations: i64,
    pub handler_us: i64,
}

impl Sums {
    /// What one execution adds.
    pub fn of(row: &Execution) -> Self {
        Self {
            invocations: 1,
            errors: i64::from(!row.status.is_success()),
            duration_us: micros(row.duration_ms),
            handler_invocations: i64::from(row.handler_duration_ms.is_some()),
            handler_us: row.handler_duration_ms.map_or(0, micros),
        }
    }

    /// What is left to be added of an execution that was counted as lost before.
    pub fn after_lost(self) -> Self {
        Self { invocations: self.invocations - 1, errors: self.errors - 1, ..self }
    }

    pub fn is_zero(&self) -> bool {
        *self == Self::default()
    }

    pub fn duration_ms(&self) -> f64 {
        self.duration_us as f64 / 1000.0
    }

    pub fn handler_ms(&self) -> f64 {
        self.handler_us as f64 / 1000.0
    }
}

impl AddAssign for Sums {
    fn add_assign(&mut self, other: Self) {
        self.invocations += other.invocations;
        self.errors += other.errors;
        self.duration_us += other.duration_us;
        self.handler_invocations += other.handler_invocations;
        self.handler_us += other.handler_us;
    }
}

fn micros(ms: f64) -> i64 {
    // A float to integer cast saturates and maps NaN to 0.
    (ms * 1000.0).round() as i64
}

impl Execution {
    /// Nobody knows how the job ended, so what somebody knew before stays, and what somebody learns later counts.
    pub fn is_lost(&self) -> bool {
        self.status.as_str() == Status::LOST
    }
}
