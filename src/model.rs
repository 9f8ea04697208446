//! The nouns of the house: [`JobId`], [`FunctionId`], [`Function`], [`Job`], [`Outcome`], [`Execution`].
//!
//! Everything here is plain data. Values that come from outside are parsed once, at the door, into these
//! types; behind the door their validity is a precondition that no code checks again.

pub mod archive;
mod change;
mod escape;
mod execution;
mod function;
mod job;
mod outcome;
mod recommendation;
mod runtime;

pub use change::{ConfigAction, ConfigRecord, RetiredCode};
pub use execution::{Execution, LOG_TTL_S, MESSAGE_BYTES_MAX, RowKey, Status};
pub use function::{Counters, Function, FunctionId};
pub use job::{Job, JobDraft, JobId, NodeId, RunRequest, RunRequestError, TIMEOUT_MS_DEFAULT};
pub use outcome::{Outcome, ResultFields};
pub use recommendation::Recommendation;
pub use runtime::Runtime;

use serde::Deserialize;
use std::borrow::Cow;
use time::OffsetDateTime;
use time::macros::format_description;

/// A point in time as Unix milliseconds: what ids, deadlines and rows are reckoned in.
pub type UnixMs = u64;

/// The present, in Unix milliseconds.
pub fn now_ms() -> UnixMs {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

/// RFC 3339 in UTC with exactly three digits of fraction: `2026-11-22T00:00:00.123Z`.
pub fn rfc3339_ms(at: UnixMs) -> String {
    let format = format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");
    let nanos = i128::from(at) * 1_000_000;
    OffsetDateTime::from_unix_timestamp_nanos(nanos)
        .ok()
        .and_then(|t| t.format(format).ok())
        // Past the year 9999 the format has no answer; no clock that matters is there.
        .unwrap_or_else(|| "9999-12-31T23:59:59.999Z".to_owned())
}

/// Reads an RFC 3339 time in any offset, down to the millisecond. What was before 1970 becomes its first moment:
/// as a bound it means the same, since nothing here is older.
pub fn parse_rfc3339_ms(text: &str) -> Option<UnixMs> {
    let at = OffsetDateTime::parse(text, &time::format_description::well_known::Rfc3339).ok()?;
    Some(u64::try_from(at.unix_timestamp_nanos().div_euclid(1_000_000)).unwrap_or(0))
}

/// A JSON string that borrows where it can: `Cow` alone always copies under serde.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);
