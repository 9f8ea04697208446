//! One row of the execution log, and the fixed mapping from a worker's result to it.

use super::{FunctionId, JobId, ResultFields, UnixMs, now_ms, rfc3339_ms};
use std::fmt;

/// How long a row is kept, in seconds: 30 days.
pub const LOG_TTL_S: u64 = 30 * 24 * 3600;

/// Longest message of a row, in bytes. An item may have 400 KB in all; the rest is for the other attributes.
pub const MESSAGE_BYTES_MAX: usize = 380 * 1024;

/// The range key of a row: a function of the request id alone, so that a second write of one execution
/// replaces the first, and a look-up by request id is one read.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RowKey(String);

impl RowKey {
    /// Acceptance time in RFC 3339 with milliseconds, then the other 80 bits of the id as 25 decimal
    /// digits of the fraction, then `Z`.
    pub fn of(id: JobId) -> Self {
        Self::at(id.accepted_at(), id.node_and_random())
    }

    /// The key of something else that happened then: `rest` tells it from all others of its millisecond.
    pub fn at(at: UnixMs, rest: u128) -> Self {
        Self(format!("{}{rest:025}Z", Self::bound(at)))
    }

    /// What stands before every key of this millisecond and after every key of the last: milliseconds without the
    /// `Z`, since `…678Z` would stand after `…6781…`, its own millisecond's longer keys. It equals no key.
    pub fn bound(at: UnixMs) -> String {
        let mut text = rfc3339_ms(at);
        text.pop(); // the Z
        text
    }

    /// A key as it was read from a table; rows of the old controller have plain ISO 8601 times.
    pub fn stored(key: String) -> Self {
        Self(key)
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What readers get: the time cut to milliseconds.
    pub fn timestamp(&self) -> String {
        match self.0.split_once('.') {
            Some((seconds, fraction)) if fraction.len() > 4 && fraction.is_ascii() => {
                format!("{seconds}.{}Z", &fraction[..3])
            }
            _ => self.0.clone(),
        }
    }
}

/// How an execution ended. Workers may say anything; what they say is kept as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status(String);

impl Status {
    pub const SUCCESS: &'static str = "SUCCESS";
    pub const ERROR: &'static str = "ERROR";
    /// No result by the deadline, and nobody knows why.
    pub const LOST: &'static str = "LOST";

    /// Longest status kept, in bytes: a broken worker must not fill a row or a metric.
    const LEN_MAX: usize = 64;

    pub fn new(text: &str) -> Self {
        Self(cut(text, Self::LEN_MAX).to_owned())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One row of the execution log.
#[derive(Clone, Debug, PartialEq)]
pub struct Execution {
    pub function: FunctionId,
    pub key: RowKey,
    /// Text, not [`JobId`]: rows of the old controller hold version 4 UUIDs, or nothing.
    pub request_id: String,
    pub status: Status,
    pub duration_ms: f64,
    pub handler_duration_ms: Option<f64>,
    pub memory_mb: u64,
    pub message: String,
    /// When the result was seen; `None` on rows of the old controller.
    pub completed_at: Option<UnixMs>,
    /// When the row may be deleted, in epoch seconds; `None`: never.
    pub expires_at_s: Option<u64>,
}

impl Execution {
    /// The row of a job that ended with a result of these fields.
    pub fn of(id: JobId, function: FunctionId, fields: &ResultFields) -> Self {
        let message = match (&fields.stderr, &fields.stdout) {
            (Some(stderr), _) if !stderr.is_empty() => stderr.clone(),
            (_, Some(stdout)) => stdout.clone(),
            _ => String::new(),
        };
        let status = fields.status.as_deref().map_or_else(
            || Status::new(if fields.exit_code == Some(0) { Status::SUCCESS } else { Status::ERROR }),
            Status::new,
        );
        let mut row = Self::ended(id, function, status, message);
        row.duration_ms = fields.duration_ms.unwrap_or(0.0);
        row.handler_duration_ms = fields.handler_duration_ms;
        row.memory_mb = memory_mb(fields.peak_memory_bytes.unwrap_or(0.0));
        row
    }

    /// The row of a job whose result never came.
    pub fn lost(id: JobId, function: FunctionId) -> Self {
        let message = "no result arrived before the deadline of the job".to_owned();
        Self::ended(id, function, Status::new(Status::LOST), message)
    }

    fn ended(id: JobId, function: FunctionId, status: Status, message: String) -> Self {
        let now = now_ms();
        Self {
            function,
            key: RowKey::of(id),
            request_id: id.to_string(),
            status,
            duration_ms: 0.0,
            handler_duration_ms: None,
            memory_mb: 0,
            message: cut_with_note(message),
            completed_at: Some(now),
            expires_at_s: Some(now / 1000 + LOG_TTL_S),
        }
    }

    /// Whether readers may still see the row: DynamoDB deletes expired items hours late.
    pub fn is_live(&self, now: UnixMs) -> bool {
        self.expires_at_s.is_none_or(|at| at > now / 1000)
    }
}

/// `round(bytes / 2^20)`, 0 for what is no size.
fn memory_mb(bytes: f64) -> u64 {
    // A float to integer cast saturates and maps NaN to 0.
    (bytes / f64::from(1 << 20)).round() as u64
}

fn cut_with_note(message: String) -> String {
    if message.len() <= MESSAGE_BYTES_MAX {
        return message;
    }
    let note = format!("… [cut: the whole message has {} bytes]", message.len());
    let mut kept = cut(&message, MESSAGE_BYTES_MAX - note.len()).to_owned();
    kept.push_str(&note);
    kept
}

/// The longest prefix of at most `bytes_max` bytes that ends on a character boundary.
pub(super) fn cut(text: &str, bytes_max: usize) -> &str {
    if text.len() <= bytes_max {
        return text;
    }
    let mut end = bytes_max;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{NodeId, Outcome};
    use bytes::Bytes;

    fn id() -> JobId {
        JobId::new(NodeId(0xdead_beef), 1_795_305_600_123, 0x1234_5678_9abc)
    }

    fn row(result: &str) -> Execution {
        let outcome = Outcome::new(Bytes::from(result.to_owned()));
        Execution::of(id(), FunctionId::parse("f").unwrap(), &outcome.fields())
    }

    #[test]
    fn the_key_is_the_time_and_the_other_80_bits() {
        let key = RowKey::of(id());
        let rest = (0xdead_beef_u128 << 48) | 0x1234_5678_9abc;
        assert_eq!(key.as_str(), format!("2026-11-22T00:00:00.123{rest:025}Z"));
        assert_eq!(key.as_str().len(), "2026-11-22T00:00:00.1230123456789012345678901234Z".len());
        assert_eq!(key.timestamp(), "2026-11-22T00:00:00.123Z");
        assert_eq!(RowKey::stored("2024-01-02T03:04:05.678Z".into()).timestamp(), "2024-01-02T03:04:05.678Z");
        assert_eq!(RowKey::stored("junk".into()).timestamp(), "junk");
    }

    #[test]
    fn a_result_becomes_a_row() {
        let full = row(
            r#"{"status":"FAILED","exitCode":1,"stdout":"out","stderr":"err","durationMs":12.5,"handlerDurationMs":3,"peakMemoryBytes":1572864}"#,
        );
        assert_eq!(full.status.as_str(), "FAILED");
        assert_eq!(full.message, "err");
        assert_eq!((full.duration_ms, full.handler_duration_ms, full.memory_mb), (12.5, Some(3.0), 2));

        let snake = row(
            r#"{"exitCode":0,"stdout":"out","stderr":"","duration_ms":7,"handler_duration_ms":1,"peak_memory_bytes":1048576}"#,
        );
        assert_eq!(snake.status.as_str(), "SUCCESS");
        assert_eq!(snake.message, "out");
        assert_eq!((snake.duration_ms, snake.handler_duration_ms, snake.memory_mb), (7.0, Some(1.0), 1));

        for odd in
            ["{}", "[]", "not json", "", r#"{"status":null,"exitCode":"0","stderr":[],"durationMs":"x"}"#]
        {
            let row = row(odd);
            assert_eq!(row.status.as_str(), "ERROR", "{odd}");
            assert_eq!((row.duration_ms, row.memory_mb), (0.0, 0), "{odd}");
        }
    }

    #[test]
    fn a_long_message_is_cut_on_a_character_boundary() {
        let long = row(&format!("{{\"stdout\":\"{}\"}}", "ä".repeat(MESSAGE_BYTES_MAX)));
        assert!(long.message.len() <= MESSAGE_BYTES_MAX);
        assert!(long.message.ends_with(&format!("the whole message has {} bytes]", 2 * MESSAGE_BYTES_MAX)));
        assert!(long.message.starts_with("ää"));
    }

    #[test]
    fn expired_rows_are_not_live() {
        let mut row = row("{}");
        row.expires_at_s = Some(1_000);
        assert!(row.is_live(999_999));
        assert!(!row.is_live(1_000_000));
        row.expires_at_s = None;
        assert!(row.is_live(u64::MAX));
    }
}
