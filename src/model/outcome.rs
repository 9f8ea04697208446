//! What a worker published: kept byte for byte, read leniently.
//!
//! A broken worker may publish anything at all, so no member is trusted to be there or to be of its type. Typed
//! `serde` structs were rejected: one member of another type, or one that stands twice, would hide all the others.

use super::Text;
use super::escape::Escape;
use bytes::Bytes;
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::fmt;

/// Longest duration that is believed, in milliseconds: some months.
const DURATION_MS_MAX: f64 = 1e10;
/// Largest memory that is believed, in bytes: 2^50.
const MEMORY_BYTES_MAX: f64 = (1_u64 << 50) as f64;
/// Largest recommendation that is believed, in MiB.
const MEMORY_MB_MAX: f64 = 1e6;
/// Longest text kept of a member that is a string or a number, in bytes of JSON.
const SCALAR_BYTES_MAX: usize = 256;

/// The result of one run, as it was published.
#[derive(Clone, Debug)]
pub struct Outcome {
    published: Bytes,
    /// It was read before, and is JSON.
    is_known_json: bool,
}

impl PartialEq for Outcome {
    fn eq(&self, other: &Self) -> bool {
        self.published == other.published
    }
}

/// What stands for the result of a job that has none at its deadline.
const LOST: &[u8] = br#"{"status":"LOST"}"#;
/// The same, if nobody knows that the queue ever had the job.
const LOST_UNCONFIRMED: &[u8] = br#"{"status":"LOST","reason":"unconfirmed"}"#;

impl Outcome {
    pub fn new(published: Bytes) -> Self {
        Self { published, is_known_json: false }
    }

    /// The outcome of a job that has no result at its deadline.
    pub fn lost(is_unconfirmed: bool) -> Self {
        Self::new(Bytes::from_static(if is_unconfirmed { LOST_UNCONFIRMED } else { LOST }))
    }

    /// Whether it stands for a job that had no result at its deadline.
    pub fn is_lost(&self) -> bool {
        self.published == LOST || self.is_unconfirmed()
    }

    /// Whether it stands for such a job, and nobody knows that the queue ever had it.
    pub fn is_unconfirmed(&self) -> bool {
        self.published == LOST_UNCONFIRMED
    }

    /// The bytes as the worker published them.
    pub fn published(&self) -> &Bytes {
        &self.published
    }

    /// What the client gets: the published bytes if they are JSON, else `{"raw": …}` around them.
    pub fn body(&self) -> Bytes {
        // IgnoredAny walks without recursion, so nesting has no limit here.
        if self.is_known_json || serde_json::from_slice::<IgnoredAny>(&self.published).is_ok() {
            return self.published.clone();
        }
        let raw = String::from_utf8_lossy(&self.published);
        Bytes::from(serde_json::json!({ "raw": raw }).to_string())
    }

    /// The members that a row and the metrics are made of; all absent if it is no object.
    pub fn fields(&self) -> ResultFields<'_> {
        self.read().unwrap_or_default()
    }

    /// The same, and the outcome itself, which need not be read again for the client.
    pub fn into_read<T>(mut self, take: impl FnOnce(&ResultFields<'_>) -> T) -> (Self, T) {
        let read = self.read();
        // Every object that was read is JSON; what was not may be JSON all the same.
        let is_known_json = read.is_some();
        let taken = take(&read.unwrap_or_default());
        self.is_known_json = is_known_json;
        (self, taken)
    }

    fn read(&self) -> Option<ResultFields<'_>> {
        // Looked at once, as a whole, and not at every string in it.
        let text = std::str::from_utf8(&self.published).ok()?;
        serde_json::from_str(text).ok()
    }
}

/// The members of a result that the gateway reads. `None`: missing, null or of another type.
#[derive(Debug, Default, PartialEq)]
pub struct ResultFields<'a> {
    pub status: Option<Cow<'a, str>>,
    pub exit_code: Option<i64>,
    pub stdout: Option<Cow<'a, str>>,
    pub stderr: Option<Cow<'a, str>>,
    pub duration_ms: Option<f64>,
    pub handler_duration_ms: Option<f64>,
    pub peak_memory_bytes: Option<f64>,
    pub recommended_memory_mb: Option<f64>,
    pub optimization_tip: Option<Cow<'a, str>>,
    /// A JSON string or number, as text.
    pub estimated_savings: Option<&'a str>,
}

impl<'de> Deserialize<'de> for ResultFields<'de> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct FieldsVisitor;
        impl<'de> Visitor<'de> for FieldsVisitor {
            type Value = ResultFields<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<ResultFields<'de>, A::Error> {
                let mut fields = ResultFields::default();
                while let Some(Text(key)) = map.next_key()? {
                    let value: &'de RawValue = map.next_value()?;
                    fields.take(&key, value);
                }
                Ok(fields)
            }
        }
        d.deserialize_map(FieldsVisitor)
    }
}

impl<'a> ResultFields<'a> {
    fn take(&mut self, key: &str, value: &'a RawValue) {
        match key {
            "status" => self.status = text(value).filter(|status| !status.is_empty()),
            // Some write whole numbers as 0.0.
            "exitCode" => {
                self.exit_code = read(value).filter(|code: &f64| code.fract() == 0.0).map(|code| code as i64);
            }
            "stdout" => self.stdout = text(value),
            "stderr" => self.stderr = text(value),
            "durationMs" | "duration_ms" => {
                self.duration_ms = number(value, DURATION_MS_MAX).or(self.duration_ms);
            }
            "handlerDurationMs" | "handler_duration_ms" => {
                self.handler_duration_ms = number(value, DURATION_MS_MAX).or(self.handler_duration_ms);
            }
            "peakMemoryBytes" | "peak_memory_bytes" => {
                self.peak_memory_bytes = number(value, MEMORY_BYTES_MAX).or(self.peak_memory_bytes);
            }
            "recommendedMemoryMb" => self.recommended_memory_mb = number(value, MEMORY_MB_MAX),
            "optimizationTip" => self.optimization_tip = text(value),
            "estimatedSavings" => self.estimated_savings = scalar(value),
            _ => {}
        }
    }
}

/// A string or a finite number, as JSON text of bounded length.
fn scalar(value: &RawValue) -> Option<&str> {
    if value.get() == "null" {
        return None;
    }
    let is_number = || read(value).is_some_and(|n: f64| n.is_finite());
    let fits = value.get().len() <= SCALAR_BYTES_MAX && (read::<Text<'_>>(value).is_some() || is_number());
    fits.then(|| value.get())
}

fn read<'a, T: Deserialize<'a>>(value: &'a RawValue) -> Option<T> {
    serde_json::from_str(value.get()).ok()
}

/// A string. Half a surrogate pair, which Python makes of bytes that are no UTF-8, becomes U+FFFD: the rest of a
/// message is worth keeping.
fn text(value: &RawValue) -> Option<Cow<'_, str>> {
    // Most members are null where there is nothing to say, and an error of serde is an allocation.
    if !value.get().starts_with('"') {
        return None;
    }
    let whole = read(value).map(|Text(text)| text);
    whole.or_else(|| serde_json::from_str(&without_halves(value.get())).map(Cow::Owned).ok())
}

fn without_halves(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    let mut rest = json;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let len = match Escape::at(&rest.as_bytes()[at..]) {
            Escape::Whole(len) => {
                out.push_str(&rest[at..at + len]);
                len
            }
            Escape::Half => {
                out.push('\u{FFFD}');
                Escape::HALF_LEN
            }
        };
        rest = &rest[at + len..];
    }
    out + rest
}

/// A number from 0 to `max`: anything else would spoil sums and histograms for good.
fn number(value: &RawValue, max: f64) -> Option<f64> {
    if !value.get().starts_with(|c: char| c.is_ascii_digit() || c == '-') {
        return None;
    }
    read(value).filter(|n: &f64| (0.0..=max).contains(n))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(published: impl Into<Vec<u8>>) -> Outcome {
        Outcome::new(Bytes::from(published.into()))
    }

    #[test]
    fn json_passes_byte_for_byte() {
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        for json in ["{ \"a\":1 , \"a\":2}", "null", "[]", " 1e999 ", "\"\\ud800\"", deep.as_str()] {
            assert_eq!(outcome(json).body(), json.as_bytes(), "{}", &json[..json.len().min(20)]);
        }
    }

    #[test]
    fn what_is_not_json_is_wrapped() {
        assert_eq!(outcome("").body(), r#"{"raw":""}"#);
        assert_eq!(outcome("oh \"no\"").body(), r#"{"raw":"oh \"no\""}"#);
        assert_eq!(outcome(b"\xff\x00".to_vec()).body(), "{\"raw\":\"\u{fffd}\\u0000\"}");
        assert_eq!(outcome("{} {}").body(), r#"{"raw":"{} {}"}"#);
    }

    #[test]
    fn what_was_read_is_not_read_again_and_stays_the_same() {
        let invalid_key = r#"{"\ud800":1}"#;
        for (published, is_known) in [
            ("{}", true),
            (r#" {"a":[1e999]} "#, true),
            ("[]", false),
            (invalid_key, false),
            ("{", false),
            ("", false),
        ] {
            let (read, status) =
                outcome(published).into_read(|fields| fields.status.clone().map(Cow::into_owned));
            assert_eq!((read.is_known_json, status), (is_known, None), "{published}");
            assert_eq!(read.body(), outcome(published).body());
        }
        let (_, status) =
            outcome(r#"{"status":"S"}"#).into_read(|fields| fields.status.clone().map(Cow::into_owned));
        assert_eq!(status.as_deref(), Some("S"));
    }

    #[test]
    fn members_are_read_one_by_one() {
        let published = outcome(
            r#"{"status":7,"exitCode":0,"exitCode":3,"stdout":"o","durationMs":null,"duration_ms":2,"handlerDurationMs":-1,"peakMemoryBytes":1e400}"#,
        );
        let fields = published.fields();
        let expected = ResultFields {
            exit_code: Some(3),
            stdout: Some("o".into()),
            duration_ms: Some(2.0),
            ..Default::default()
        };
        assert_eq!(fields, expected);
        let odd = outcome(
            r#"{"exitCode":0.0,"durationMs":1e300,"peakMemoryBytes":1e30,"stdout":"\ud800 x\\\ud83d\ude00\udc00"}"#,
        );
        let odd = odd.fields();
        assert_eq!((odd.exit_code, odd.duration_ms, odd.peak_memory_bytes), (Some(0), None, None));
        assert_eq!(odd.stdout.as_deref(), Some("\u{FFFD} x\\\u{1F600}\u{FFFD}"));
        for not_an_object in ["", "[]", "1", "x", "{"] {
            assert_eq!(outcome(not_an_object).fields(), ResultFields::default(), "{not_an_object}");
        }
    }

    /// A broken worker may publish anything: there is always an answer and a row.
    #[test]
    fn fuzz_worker_results() {
        use crate::model::{Execution, FunctionId, JobId, MESSAGE_BYTES_MAX, NodeId};
        crate::fuzz::run("worker_result", |input| {
            let outcome = Outcome::new(Bytes::copy_from_slice(input));
            let id = JobId::new(NodeId(1), 0, 0);
            let row = Execution::of(id, FunctionId::parse("f").unwrap(), &outcome.fields());
            assert!(row.message.len() <= MESSAGE_BYTES_MAX + 200 && row.duration_ms.is_finite());
            assert!(!row.status.as_str().is_empty());
            let body = outcome.body();
            assert!(serde_json::from_slice::<IgnoredAny>(&body).is_ok(), "the client gets JSON");
            let is_json = serde_json::from_slice::<IgnoredAny>(input).is_ok();
            assert_eq!(is_json, body == input, "JSON passes byte for byte");
        });
    }
}
