//! Points in time, as numbers and as text.

use crate::ambient;
use std::time::Duration;
use time::OffsetDateTime;

/// A point in time, in milliseconds since the Unix epoch. The unit of ids, deadlines and rows.
pub type UnixMs = u64;

/// The current time. A clock before 1970 gives 0.
pub fn now_ms() -> UnixMs {
    u64::try_from(ambient::unix_time().as_millis()).unwrap_or(u64::MAX)
}

/// Formats a time as RFC 3339 in UTC with exactly three fractional digits: `2026-11-22T00:00:00.123Z`. A time
/// after the year 9999 becomes the last millisecond of that year.
pub fn rfc3339_ms(at: UnixMs) -> String {
    Rfc3339Ms::of(at).as_str().to_owned()
}

/// The text of [`rfc3339_ms`], without an allocation: every run writes several times.
pub struct Rfc3339Ms([u8; 24]);

impl Rfc3339Ms {
    pub fn of(at: UnixMs) -> Self {
        let mut text = *b"9999-12-31T23:59:59.999Z";
        // RFC 3339 ends with the year 9999. A later time leaves the text as it is.
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
        // Always valid: ASCII digits and separators.
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

/// Fills `place` with the last decimal digits of a number, with leading zeros.
pub fn digits(place: &mut [u8], mut number: u64) {
    for digit in place.iter_mut().rev() {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
    }
}

/// Parses an RFC 3339 time with any offset, rounded down to the millisecond. A time before 1970 becomes 0. As
/// a bound that is equivalent, because no row is older. Returns `None` if `text` is not such a time.
pub fn parse_rfc3339_ms(text: &str) -> Option<UnixMs> {
    let at = OffsetDateTime::parse(text, &time::format_description::well_known::Rfc3339).ok()?;
    Some(u64::try_from(at.unix_timestamp_nanos().div_euclid(1_000_000)).unwrap_or(0))
}

/// A duration in milliseconds.
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_survive_a_round_trip() {
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
