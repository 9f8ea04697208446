//! One row of the execution log: its key, its status, and how a worker's result is mapped to it.
//!
//! Existing clients and tables rely on the mapping, so it is fixed: `message` is `stderr`, or `stdout` if
//! `stderr` is empty; `status` is that of the result, or SUCCESS if the exit code is 0, or ERROR.

use super::time::{Rfc3339Ms, UnixMs, digits, now_ms, rfc3339_ms};
use super::{FunctionId, JobId, ResultFields, RowLife};
use crate::model::text::cut;
use std::borrow::Cow;
use std::fmt;

/// How long a row is kept, in seconds: 30 days.
pub const LOG_TTL_S: u64 = 30 * 24 * 3600;

/// Maximum length of the message of a row, in bytes. DynamoDB limits an item to 400 KB; the rest is for the
/// other attributes.
pub const MESSAGE_BYTES_MAX: usize = 380 * 1024;

/// The range key of a row. It is a function of the request id alone. So a second write of one execution
/// replaces the first, and a look-up by request id is one read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowKey([u8; Self::BYTES]);

impl RowKey {
    const BYTES: usize = 49;
    /// Where the digits after the milliseconds begin.
    const REST: usize = 23;

    /// The acceptance time in RFC 3339 with milliseconds, the other 80 bits of the id as 25 more decimal
    /// digits of the fraction, and `Z`.
    pub fn of(id: JobId) -> Self {
        Self::at(id.accepted_at(), id.node_and_random())
    }

    /// The key of another kind of record. `rest`, below 10^25, distinguishes it from other records of the
    /// same millisecond.
    pub fn at(at: UnixMs, rest: u128) -> Self {
        let mut key = [b'Z'; Self::BYTES];
        key[..Self::REST].copy_from_slice(&Rfc3339Ms::of(at).as_str().as_bytes()[..Self::REST]);
        // In two halves: 25 divisions of 128 bits would take longer than all other steps of a row.
        let half = 10_u128.pow(13);
        let (high, low) = ((rest / half) as u64, (rest % half) as u64);
        digits(&mut key[Self::REST..Self::REST + 12], high);
        digits(&mut key[Self::REST + 12..Self::BYTES - 1], low);
        Self(key)
    }

    /// A bound that sorts before every key of this millisecond and after every key of the previous one. It
    /// has no `Z`, because `…678Z` would sort after `…6781…`, a longer key of the same millisecond. It equals
    /// no key.
    pub fn bound(at: UnixMs) -> String {
        let mut text = rfc3339_ms(at);
        text.pop(); // the Z
        text
    }

    pub fn as_str(&self) -> &str {
        // Always valid: ASCII digits and separators.
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

/// The identity of a row. Both variants provide its range key and its request id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RowId {
    /// A job of this program. Its texts are formatted on demand, because most rows are written once and never
    /// read.
    Job(JobId),
    /// A row of the old controller: a version 4 UUID or an empty request id, under a plain ISO 8601 time.
    Old { key: String, request_id: String },
}

impl RowId {
    /// The identity of a row that was read from a table.
    pub fn stored(key: String, request_id: String) -> Self {
        match JobId::parse(&request_id) {
            Some(id) if RowKey::of(id).as_str() == key => Self::Job(id),
            _ => Self::Old { key, request_id },
        }
    }

    pub fn key(&self) -> Cow<'_, str> {
        match self {
            Self::Job(id) => Cow::Owned(RowKey::of(*id).as_str().to_owned()),
            Self::Old { key, .. } => Cow::Borrowed(key),
        }
    }

    pub fn request_id(&self) -> Cow<'_, str> {
        match self {
            Self::Job(id) => Cow::Owned(id.to_string()),
            Self::Old { request_id, .. } => Cow::Borrowed(request_id),
        }
    }

    /// The timestamp for clients: the range key, truncated to milliseconds.
    pub fn timestamp(&self) -> String {
        let key = self.key();
        match key.split_once('.') {
            Some((seconds, fraction)) if fraction.len() > 4 && fraction.is_ascii() => {
                format!("{seconds}.{}Z", &fraction[..3])
            }
            _ => key.into_owned(),
        }
    }
}

/// How an execution ended. A worker may report any text, which is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status(Cow<'static, str>);

impl Status {
    pub const SUCCESS: &'static str = "SUCCESS";
    pub const FAILED: &'static str = "FAILED";
    pub const ERROR: &'static str = "ERROR";
    /// No result arrived before the deadline, for an unknown reason.
    pub const LOST: &'static str = "LOST";
    pub const TIMEOUT: &'static str = "TIMEOUT";

    /// The statuses with a defined meaning. Nearly every row has one of them, and only they become labels of
    /// metrics.
    const KNOWN: [&'static str; 5] = [Self::SUCCESS, Self::FAILED, Self::ERROR, Self::TIMEOUT, Self::LOST];

    /// Maximum length of a status, in bytes; the rest is cut off. A broken worker must not fill a row.
    const LEN_MAX: usize = 64;

    pub fn new(text: &str) -> Self {
        let known = Self::KNOWN.into_iter().find(|known| *known == text);
        Self(known.map_or_else(|| Cow::Owned(cut(text, Self::LEN_MAX).to_owned()), Cow::Borrowed))
    }

    /// The status, if it is one with a defined meaning.
    pub fn known(&self) -> Option<&'static str> {
        match self.0 {
            Cow::Borrowed(known) => Some(known),
            Cow::Owned(_) => None,
        }
    }

    pub fn is_success(&self) -> bool {
        self.as_str() == Self::SUCCESS
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
    pub id: RowId,
    pub status: Status,
    /// The duration that the worker reported; 0 if it reported none.
    pub duration_ms: f64,
    /// The time in the handler alone, if the worker reported it.
    pub handler_duration_ms: Option<f64>,
    /// Whether the worker had to start a process or to load a module for the run, if it reported that.
    pub cold_start: Option<bool>,
    /// Peak memory, in MiB; 0 if the worker reported none.
    pub memory_mb: u64,
    /// The output of the run, at most [`MESSAGE_BYTES_MAX`] bytes.
    pub message: String,
    /// When this program received the result; `None` for rows of the old controller.
    pub completed_at: Option<UnixMs>,
    /// When the row may be deleted, in Unix seconds; `None`: never.
    pub expires_at_s: Option<u64>,
    pub life: RowLife,
}

/// The part of a row that is known only when the job ends.
pub struct ExecutionEnd {
    status: Status,
    duration_ms: f64,
    handler_duration_ms: Option<f64>,
    cold_start: Option<bool>,
    memory_mb: u64,
    message: String,
    life: RowLife,
}

impl ExecutionEnd {
    /// The ending of a job with a result of these fields.
    pub fn of(fields: &ResultFields<'_>) -> Self {
        let stderr = fields.stderr.as_deref().filter(|stderr| !stderr.is_empty());
        let message = stderr.or(fields.stdout.as_deref()).unwrap_or_default();
        let status = fields.status.as_deref().unwrap_or(match fields.exit_code {
            Some(0) => Status::SUCCESS,
            _ => Status::ERROR,
        });
        Self {
            status: Status::new(status),
            duration_ms: fields.duration_ms.unwrap_or(0.0),
            handler_duration_ms: fields.handler_duration_ms,
            cold_start: fields.cold_start,
            memory_mb: memory_mb(fields.peak_memory_bytes.unwrap_or(0.0)),
            message: cut_with_note(message),
            life: RowLife::of(fields),
        }
    }

    /// The ending of a job without a result.
    fn lost(is_unconfirmed: bool) -> Self {
        let message = if is_unconfirmed {
            "unconfirmed: it is not known whether the queue received the job, because the process that \
             accepted it ended or the queue did not answer; no result arrived before the deadline of the job"
        } else {
            "no result arrived before the deadline of the job"
        };
        let message = message.to_owned();
        let status = Status::new(Status::LOST);
        let life = RowLife::default();
        Self {
            status,
            duration_ms: 0.0,
            handler_duration_ms: None,
            cold_start: None,
            memory_mb: 0,
            message,
            life,
        }
    }
}

impl Execution {
    /// The row of a job that ended with a result of these fields.
    pub fn of(id: JobId, function: FunctionId, fields: &ResultFields<'_>) -> Self {
        Self::ended(id, function, ExecutionEnd::of(fields))
    }

    /// The row of a job without a result. `is_unconfirmed`: it is not known whether the queue received the
    /// job.
    pub fn lost(id: JobId, function: FunctionId, is_unconfirmed: bool) -> Self {
        Self::ended(id, function, ExecutionEnd::lost(is_unconfirmed))
    }

    /// The row of a job that ends now.
    pub fn ended(id: JobId, function: FunctionId, ending: ExecutionEnd) -> Self {
        let now = now_ms();
        Self {
            completed_at: Some(now),
            expires_at_s: Some(now / 1000 + LOG_TTL_S),
            ..Self::unwritten(RowId::Job(id), function, ending)
        }
    }

    /// The row of a job that has ended at a time that is not known.
    pub fn unwritten(id: RowId, function: FunctionId, ending: ExecutionEnd) -> Self {
        Self {
            function,
            id,
            status: ending.status,
            duration_ms: ending.duration_ms,
            handler_duration_ms: ending.handler_duration_ms,
            cold_start: ending.cold_start,
            memory_mb: ending.memory_mb,
            message: ending.message,
            completed_at: None,
            expires_at_s: None,
            life: ending.life,
        }
    }

    /// Adds what the node that ended the job knows of its life. `heard_at`: when the result arrived, by the
    /// clock of its steps, which stands still while the machine is suspended.
    #[must_use]
    pub fn with_life(self, heard_at: Option<UnixMs>, life: RowLife) -> Self {
        Self { completed_at: heard_at.max(self.completed_at), life: self.life.or(life), ..self }
    }

    /// Whether the job ended without a result. Such a row never replaces another row, and any result replaces
    /// it.
    pub fn is_lost(&self) -> bool {
        self.status.as_str() == Status::LOST
    }

    /// Whether the row has not expired. DynamoDB deletes expired rows hours late, so until then they must be
    /// hidden.
    pub fn is_live(&self, now: UnixMs) -> bool {
        self.expires_at_s.is_none_or(|at| at > now / 1000)
    }
}

/// `round(bytes / 2^20)`; 0 for a negative number or NaN.
fn memory_mb(bytes: f64) -> u64 {
    // A float to integer cast saturates and maps NaN to 0.
    (bytes / f64::from(1 << 20)).round() as u64
}

/// Cuts a message to [`MESSAGE_BYTES_MAX`] bytes, and appends its original length.
fn cut_with_note(message: &str) -> String {
    if message.len() <= MESSAGE_BYTES_MAX {
        return message.to_owned();
    }
    let note = format!("… [cut: the whole message has {} bytes]", message.len());
    let mut kept = cut(message, MESSAGE_BYTES_MAX - note.len()).to_owned();
    kept.push_str(&note);
    kept
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
    fn a_key_consists_of_the_time_and_the_other_80_bits() {
        let key = RowKey::of(id());
        let rest = (0xdead_beef_u128 << 48) | 0x1234_5678_9abc;
        assert_eq!(key.as_str(), format!("2026-11-22T00:00:00.123{rest:025}Z"));
        assert_eq!(key.as_str().len(), "2026-11-22T00:00:00.1230123456789012345678901234Z".len());
        let far = RowKey::at(u64::MAX, 10_u128.pow(25) - 1);
        assert_eq!(far.as_str(), "9999-12-31T23:59:59.9999999999999999999999999999Z");
    }

    #[test]
    fn a_row_is_identified_by_its_job_or_by_its_stored_key() {
        let ours = RowId::stored(RowKey::of(id()).as_str().to_owned(), id().to_string());
        assert_eq!(ours, RowId::Job(id()));
        assert_eq!(
            (&*ours.key(), &*ours.request_id()),
            (RowKey::of(id()).as_str(), id().to_string().as_str())
        );
        assert_eq!(ours.timestamp(), "2026-11-22T00:00:00.123Z");
        for (key, request_id, timestamp) in [
            ("2024-01-02T03:04:05.678Z", "junk", "2024-01-02T03:04:05.678Z"),
            // The key does not belong to the id.
            ("2024-01-02T03:04:05.6781Z", &id().to_string(), "2024-01-02T03:04:05.678Z"),
            ("junk", "", "junk"),
        ] {
            let old = RowId::stored(key.to_owned(), request_id.to_owned());
            assert_eq!((&*old.key(), &*old.request_id()), (key, request_id));
            assert_eq!(old.timestamp(), timestamp);
        }
    }

    #[test]
    fn known_statuses_are_kept_and_others_are_cut() {
        for known in ["SUCCESS", "FAILED", "ERROR", "TIMEOUT", "LOST"] {
            assert_eq!((Status::new(known).as_str(), Status::new(known).known()), (known, Some(known)));
        }
        let long = Status::new(&"x".repeat(1000));
        assert_eq!((long.as_str().len(), long.known()), (Status::LEN_MAX, None));
    }

    #[test]
    fn a_result_becomes_a_row() {
        let full = row(r#"{"status":"FAILED","exitCode":1,"stdout":"out","stderr":"err","durationMs":12.5,
                "handlerDurationMs":3,"coldStart":false,"peakMemoryBytes":1572864}"#);
        assert_eq!(full.status.as_str(), "FAILED");
        assert_eq!(full.message, "err");
        assert_eq!((full.duration_ms, full.handler_duration_ms, full.memory_mb), (12.5, Some(3.0), 2));
        assert_eq!(full.cold_start, Some(false));

        let snake = row(r#"{"exitCode":0,"stdout":"out","stderr":"","duration_ms":7,
                "handler_duration_ms":1,"peak_memory_bytes":1048576}"#);
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
