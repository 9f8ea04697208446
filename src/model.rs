//! The nouns of the house: [`JobId`], [`FunctionId`], [`Function`], [`Job`], [`Outcome`], [`Execution`].
//!
//! Everything here is plain data. Values that come from outside are parsed once, at the door, into these
//! types; behind the door their validity is a precondition that no code checks again.

mod caller;
mod change;
mod encoding;
mod escape;
mod execution;
mod function;
mod idempotency;
mod ids;
mod job;
mod outcome;
mod quota;
mod recommendation;
mod run_request;
mod runtime;
mod scope;
mod sums;

pub use caller::{AllowedFunctions, Caller};
pub use change::{ConfigAction, ConfigRecord, RetiredCode};
pub use encoding::encoding_problem;
pub use execution::{Ending, Execution, LOG_TTL_S, MESSAGE_BYTES_MAX, RowId, RowKey, Status};
pub use function::{Counters, Function, FunctionId};
pub use idempotency::{BodyHash, IdempotencyKey};
pub use ids::{JobId, NodeId, ProcessToken};
pub use job::{Job, JobDraft, JobTemplate, TIMEOUT_MS_DEFAULT};
pub use outcome::{Outcome, ResultFields};
pub use quota::Quota;
pub use recommendation::Recommendation;
pub use run_request::{RunRequest, RunRequestError};
pub use runtime::Runtime;
pub use scope::Scope;
pub use sums::Sums;

use serde::Deserialize;
use std::borrow::Cow;
use time::OffsetDateTime;

/// A point in time as Unix milliseconds: what ids, deadlines and rows are reckoned in.
pub type UnixMs = u64;

/// The present, in Unix milliseconds.
pub fn now_ms() -> UnixMs {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

/// RFC 3339 in UTC with exactly three digits of fraction: `2026-11-22T00:00:00.123Z`.
pub fn rfc3339_ms(at: UnixMs) -> String {
    Rfc3339Ms::of(at).as_str().to_owned()
}

/// What [`rfc3339_ms`] gives, without an allocation: every run writes several of them.
pub struct Rfc3339Ms([u8; 24]);

impl Rfc3339Ms {
    pub fn of(at: UnixMs) -> Self {
        let mut text = *b"9999-12-31T23:59:59.999Z";
        // Past the year 9999 the format has no answer; no clock that matters is there.
        let seconds = i64::try_from(at / 1000).ok();
        if let Some(t) = seconds.and_then(|s| OffsetDateTime::from_unix_timestamp(s).ok()) {
            let (hour, minute, second) = t.to_hms();
            digits(&mut text[0..4], t.year().unsigned_abs().into());
            digits(&mut text[5..7], u8::from(t.month()).into());
            digits(&mut text[8..10], t.day().into());
            digits(&mut text[11..13], hour.into());
            digits(&mut text[14..16], minute.into());
            digits(&mut text[17..19], second.into());
            digits(&mut text[20..23], at % 1000);
        }
        Self(text)
    }

    pub fn as_str(&self) -> &str {
        // Digits and what the pattern holds between them.
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

/// Writes a number with leading zeros.
fn digits(place: &mut [u8], mut number: u64) {
    for digit in place.iter_mut().rev() {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_and_read() {
        for (at, written) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399_999, "2000-02-28T23:59:59.999Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (1_795_305_600_123, "2026-11-22T00:00:00.123Z"),
            (253_402_300_799_999, "9999-12-31T23:59:59.999Z"),
            (u64::MAX, "9999-12-31T23:59:59.999Z"),
        ] {
            assert_eq!(rfc3339_ms(at), written);
            assert_eq!(parse_rfc3339_ms(written), Some(at.min(253_402_300_799_999)));
        }
    }
}
