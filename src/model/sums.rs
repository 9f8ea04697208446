//! The amounts that executions add to the counters of their function.
//!
//! All are whole numbers, so the totals are exact in any order of addition. Floating point was rejected for
//! that reason: nodes, retries and adopters add in different orders.

use super::Execution;
use std::ops::AddAssign;

/// The amounts of one or more executions. They may be negative: a late result subtracts the run and the error
/// that its job added when it ended as LOST.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sums {
    pub invocations: i64,
    pub errors: i64,
    /// In microseconds.
    pub duration_us: i64,
    /// Runs whose worker reported the time in the handler.
    pub handler_invocations: i64,
    /// In microseconds.
    pub handler_us: i64,
    /// Runs for which their worker had to start a process or to load a module, as it reported.
    pub cold_starts: i64,
}

impl Sums {
    /// The amounts of one execution.
    pub fn of(row: &Execution) -> Self {
        Self {
            invocations: 1,
            errors: i64::from(!row.status.is_success()),
            duration_us: micros(row.duration_ms),
            handler_invocations: i64::from(row.handler_duration_ms.is_some()),
            handler_us: row.handler_duration_ms.map_or(0, micros),
            cold_starts: i64::from(row.cold_start == Some(true)),
        }
    }

    /// The difference to add for a late result, whose job was already counted as LOST.
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
        self.cold_starts += other.cold_starts;
    }
}

fn micros(ms: f64) -> i64 {
    // A float to integer cast saturates and maps NaN to 0.
    (ms * 1000.0).round() as i64
}
