//! Bounds that several files share, and checks of single values.

use crate::model::Quota;
use std::ops::RangeInclusive;

/// Returns (path, problem) of a value that is out of bounds.
pub fn within(path: &str, value: u64, bounds: RangeInclusive<u64>) -> Option<(String, String)> {
    let problem = if value > *bounds.end() {
        format!("must be at most {}", bounds.end())
    } else if value < *bounds.start() {
        format!("must be at least {}", bounds.start())
    } else {
        return None;
    };
    Some((path.to_owned(), problem))
}

/// Whether `limits.lua` can count a full bucket exactly: burst × period in microseconds, divided by the
/// greatest common divisor of period and rate.
pub fn is_countable(quota: &Quota) -> bool {
    u128::from(quota.drain().1) * u128::from(quota.burst) <= LIMIT_STEPS_MAX
}

/// Largest full bucket, in the steps of `limits.lua`. Numbers in Lua are exact up to four times this value.
pub const LIMIT_STEPS_MAX: u128 = 1 << 51;

/// Upper bound of time settings: one day.
pub const SECONDS_MAX: u64 = 24 * 3600;

/// Upper bound of the number of entries of a queue or table in memory.
pub const ENTRIES_MAX: u64 = 1 << 28;
